"""What stands between the network and the endpoints: connections, limits, keys, the log, and the server's life.

limits.py and keys.py are plain values, which need no server. connections.py and server.py are below ASGI, in uvicorn's
place; layers.py and logs.py are layers of ASGI, and app.py puts them around the endpoints.
"""

from .keys import Access as Access
from .keys import Keys as Keys
from .limits import Limits as Limits
