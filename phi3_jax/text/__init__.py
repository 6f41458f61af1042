"""Text <-> token ids, the messages of a chat -> a prompt, and an answer -> the calls of tools in it.

It reads a checkpoint's tokenizer files and its chat template, encodes text as token ids, and decodes ids to text, also
one by one during generation. Other packages use the names below, `tokenizer_files` to read JSON, and `backends` and
`added_tokens` to build a tokenizer from other files.
"""

from phi3_jax.text.answers import encode_answers as encode_answers
from phi3_jax.text.call_schema import call_schema as call_schema
from phi3_jax.text.chat import encode_chat as encode_chat
from phi3_jax.text.chat import render_chat as render_chat
from phi3_jax.text.end_ids import end_ids as end_ids
from phi3_jax.text.messages import Message as Message
from phi3_jax.text.messages import Tool as Tool
from phi3_jax.text.messages import read_chat as read_chat
from phi3_jax.text.messages import read_tools as read_tools
from phi3_jax.text.spans import Span as Span
from phi3_jax.text.spans import encode_spans as encode_spans
from phi3_jax.text.tokenizer import Tokenizer as Tokenizer
from phi3_jax.text.tokenizer import load_tokenizer as load_tokenizer
from phi3_jax.text.tool_calls import MarkerDecoder as MarkerDecoder
from phi3_jax.text.tool_calls import Reply as Reply
from phi3_jax.text.tool_calls import ToolCall as ToolCall
from phi3_jax.text.tool_calls import ToolCallParser as ToolCallParser
from phi3_jax.text.tool_calls import parse_tool_calls as parse_tool_calls
