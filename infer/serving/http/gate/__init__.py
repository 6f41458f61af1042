"""What stands between the network and the endpoints: connections, limits, keys, the log, and the server's life.

connections.py and server.py are below ASGI, in uvicorn's place; limits.py, keys.py and logs.py are layers of ASGI, and
app.py puts them around the endpoints.
"""

from .keys import Keys as Keys
from .limits import Limits as Limits
from .logs import note as note
