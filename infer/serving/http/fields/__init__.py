"""Reads the fields of requests strictly: values.py what each may be, and the other files what several of them mean.

sampling.py: how tokens are picked; formats.py: what answers match; messages.py: conversations and tools.
"""

from .formats import LONGEST_PATTERN as LONGEST_PATTERN
from .formats import MOST_OPTIONS as MOST_OPTIONS
from .formats import check_schema as check_schema
from .formats import read_grammar as read_grammar
from .messages import ToolUse as ToolUse
from .messages import read_messages as read_messages
from .messages import read_template_options as read_template_options
from .messages import read_tool_use as read_tool_use
from .sampling import LONGEST_STOP as LONGEST_STOP
from .sampling import MOST_BIASES as MOST_BIASES
from .sampling import MOST_STOPS as MOST_STOPS
from .sampling import read_most_tokens as read_most_tokens
from .sampling import read_sampling as read_sampling
from .sampling import read_stop as read_stop
from .sampling import with_seed as with_seed
from .values import IGNORED as IGNORED
from .values import Fields as Fields
from .values import attempt as attempt
from .values import read_fields as read_fields
