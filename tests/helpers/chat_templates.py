"""Chat templates to compare with transformers, a tokenizer with their special tokens, and conversations for them.

The templates of Phi are those that Microsoft published with the models, under the MIT licence (the system prompt of
Phi-4-reasoning is shortened). The others are written for these tests, in the manner of models whose templates do more:
with macros, namespaces, tools, thinking, dates, and blocks that mark what an assistant says.
"""

from pathlib import Path
from typing import Any

from vocabularies import byte_level_spec, write

SPECIALS = [
    *("<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"),
    *("<|tool_call|>", "<|/tool_call|>", "<|tool_response|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    "[/TOOL_RESULTS]",
]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

_PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif "
    "message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PUBLISHED = {
    "Phi-3-mini, first": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
        "message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
        "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
    ),
    "Phi-3-mini": _PHI3,
    "Phi-3-medium": (
        "{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + "
        "'<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}{{message['content'] + "
        "'<|end|>' + '\n'}}{% endif %}{% endfor %}"
    ),
    "Phi-3.5-mini": _PHI3.replace("'system' %}", "'system' and message['content'] %}"),
    "Phi-4": (
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
        "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "Phi-4-reasoning": (
        "<|im_start|>system<|im_sep|>You are Phi, a language model trained by Microsoft to help users. Please "
        "structure your response into two sections: <think> {Thought section} </think> {Solution section}.<|im_end|>"
        "{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
        "{{'<|im_start|>assistant<|im_sep|>'}}{% generation %}{{message['content'] + '<|im_end|>'}}"
        "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "Phi-4-mini": (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is "
        "not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>'"
        " + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "Phi-4-mini-reasoning": (
        "{{ '<|system|>Your name is Phi, an AI math expert developed by Microsoft.' }}{% for message in messages %}"
        "{% if message['role'] == 'system' %} {{ message['content'] }}{% if 'tools' in message and message['tools'] is "
        "not none %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}{% endif %}{% endfor %}{{ '<|end|>' }}"
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ '<|' + message['role'] + '|>' + "
        "message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
}
# A fine-tune's ChatML: a default system message, and what an assistant says is marked.
CHATML = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Hermes: signatures by a recursive macro, calls between tags, results of one turn together.
HERMES = """{%- macro kind(schema) -%}
{%- set names = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"} -%}
{%- if schema.type is defined and schema.type == "array" -%}list[{{ kind(schema['items']) }}]
{%- elif schema.type is iterable and schema.type is not string -%}{{ schema.type | map("upper") | join(" | ") }}
{%- elif schema.enum is defined -%}Literal[{{ schema.enum | map("tojson") | join(", ") }}]
{%- else -%}{{ names.get(schema.type, "Any") }}{%- endif -%}
{%- endmacro -%}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}
{%- if tools %}
{{- 'Functions within <tools></tools>: <tools> ' }}
{%- for tool in tools %}
{%- if tool.function is defined %}{% set tool = tool.function %}{% endif %}
{{- '{"name": "' ~ tool.name ~ '", "signature": "' ~ tool.name ~ '(' }}
{%- for name, schema in tool.parameters.properties.items() %}
{{- name ~ ': ' ~ kind(schema) }}{% if not loop.last %}{{ ', ' }}{% endif %}
{%- endfor %}
{{- ')", "parameters": ' ~ tool.parameters | tojson ~ '}' }}
{%- if not loop.last %}{{- '\n' }}{% endif %}
{%- endfor %}
{{- ' </tools>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and message.tool_calls is not defined) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>' + message.role }}
{%- for call in message.tool_calls %}
{%- if call.function is defined %}{% set call = call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>tool\n' }}{% endif %}
{{- '<tool_response>\n' + message.content }}{{ '\n</tool_response>' if loop.last else '\n</tool_response>\n' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
# Llama 3.1: the date, tools in the first user message, one call at a time, results as JSON.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{% endif %}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
{%- if messages | length == 0 %}{{ raise_exception("tools need a user message") }}{% endif %}
{%- set first = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\n\nRespond with a JSON for a function call.\n\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{% endfor %}
{{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{ raise_exception("only one call at a time") }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- else %}
{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
{%- else %}{{- message.content }}{% endif %}
{{- "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
# Mistral: strict turns, tools before the last question, ids of calls.
MISTRAL = """{%- set ns = namespace(index=0) %}
{%- set loop_messages = messages[1:] if messages[0]["role"] == "system" else messages %}
{%- set questions = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- for message in loop_messages %}
{%- if message.role == "user" or (message.role == "assistant" and message.tool_calls is undefined) %}
{%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
{%- set ns.index = ns.index + 1 %}
{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
{%- if message["role"] == "user" %}
{%- if tools is not none and (message == questions[-1]) %}
{{- "[AVAILABLE_TOOLS] [" }}
{%- for tool in tools %}
{{- '{"type": "function", "function": {' }}
{%- for key, value in tool.function.items() if key != "return" %}
{%- if value is string %}{{- '"' + key + '": "' + value + '"' }}{% else %}
{{- '"' + key + '": ' + value | tojson }}{% endif %}
{%- if not loop.last %}{{- ", " }}{% endif %}
{%- endfor %}
{{- "}}" }}{% if not loop.last %}{{- ", " }}{% else %}{{- "]" }}{% endif %}
{%- endfor %}
{{- "[/AVAILABLE_TOOLS]" }}
{%- endif %}
{%- if loop.first and messages[0]["role"] == "system" %}
{{- "[INST] " + messages[0]["content"] + "\n\n" + message["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{% endif %}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}
{{- "[TOOL_CALLS] [" }}
{%- for call in message.tool_calls %}
{%- set out = call.function | tojson %}{{- out[:-1] }}
{%- if call.id is not defined or call.id | length < 2 %}{{ raise_exception("a call needs an id") }}{% endif %}
{{- ', "id": "' + call.id + '"}' }}{% if not loop.last %}{{- ", " }}{% else %}{{- "]" + eos_token }}{% endif %}
{%- endfor %}
{%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
{%- elif message["role"] in ["tool_results", "tool"] %}
{{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}' }}
{{- "[/TOOL_RESULTS]" }}
{%- else %}{{ raise_exception("only user, assistant and tool are known") }}{% endif %}
{%- endfor %}"""
# Qwen 3: thoughts of earlier turns are left out, those of the last are kept; a switch against thinking.
QWEN = """{%- if tools %}
{{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
{{- '# Tools\n<tools>' }}
{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{% endfor %}
{{- "\n</tools>\nCall within <tool_call></tool_call> tags.<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
{%- set index = (messages | length - 1) - loop.index0 %}
{%- if ns.searching and message.role == "user" and message.content is string
  and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
{%- set ns.searching = false %}{% set ns.last = index %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == "user" or (message.role == "system" and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- elif message.role == "assistant" %}
{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- '<|im_start|>assistant\n' + content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{- '\n' }}{% endif %}
{%- if call.function %}{% set call = call.function %}{% endif %}
{{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
{%- if call.arguments is string %}{{- call.arguments }}{% else %}{{- call.arguments | tojson }}{% endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
{%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
# Zephyr, and what is left: break, continue, filters, slices, JSON options.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'system' and not loop.first %}{% continue %}{% endif %}
{% if loop.index > 6 %}{% break %}{% endif %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% endfor %}
{%- if tools %}
{{ tools | map(attribute="function") | map(attribute="name") | sort | join(",") | upper }}
{{ tools[0] | tojson(indent=2, ensure_ascii=true, sort_keys=true) }}
{{ tools[-1:] | tojson(separators=(",", ":")) }}
{% endif %}
{% if loop_controls is not defined and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}"""
TEMPLATES = PUBLISHED | {
    "ChatML": CHATML,
    "Hermes": HERMES,
    "Llama 3.1": LLAMA,
    "Mistral": MISTRAL,
    "Qwen 3": QWEN,
    "Zephyr": ZEPHYR,
}

_CITY = {"type": "string", "description": "Name of the city, e.g. 'Orléans' <b>&</b>"}
_WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": _CITY,
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city"],
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": 'It "says" how it is.', "parameters": _WEATHER_SCHEMA},
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, TIME]
SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": " What is the weather in Orléans? \n"}
ANSWER = {"role": "assistant", "content": "It is 21 °C."}
BYE = {"role": "user", "content": "> Thanks\nBye <3"}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Orléans", "days": [1, 2], "unit": None}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"celsius": 21.0}'}
_THOUGHT = {"role": "assistant", "content": "<think>\nHm. 21?\n</think>\n\nIt is 21 °C."}
_REASONED = {"role": "assistant", "content": "It is 21 °C.", "reasoning_content": "I look\nit up."}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [USER]},
    "a system message": {"messages": [SYSTEM, USER]},
    "an answer": {"messages": [SYSTEM, USER, ANSWER]},
    "turns": {"messages": [USER, ANSWER, BYE]},
    "a system message in between": {"messages": [USER, ANSWER, {"role": "system", "content": "Now be long."}, BYE]},
    "tools": {"messages": [SYSTEM, USER], "tools": TOOLS},
    "tools, no system message": {"messages": [USER], "tools": [WEATHER]},
    "no tools": {"messages": [USER], "tools": []},
    "a call": {"messages": [USER, CALL], "tools": TOOLS},
    "a call with content": {"messages": [USER, CALL | {"content": "I look."}], "tools": TOOLS},
    "a result": {"messages": [SYSTEM, USER, CALL, RESULT], "tools": TOOLS},
    "two results": {"messages": [USER, CALL, RESULT, RESULT | {"content": "no"}, ANSWER, BYE], "tools": TOOLS},
    "answer to a result": {"messages": [USER, CALL, RESULT, ANSWER], "tools": [WEATHER]},
    "tools in a message": {"messages": [SYSTEM | {"tools": '[{"name": "f"}]'}, USER]},
    "thoughts": {"messages": [USER, _THOUGHT, BYE, _THOUGHT]},
    "reasoning": {"messages": [USER, _REASONED, BYE, _REASONED | {"tool_calls": CALL["tool_calls"]}]},
    "options": {"messages": [USER], "options": {"enable_thinking": False, "date_string": "1 May 2024"}},
}


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes in Hugging Face's files, with the special tokens of all the templates."""
    spec = byte_level_spec()
    blank = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    alphabet = list(spec["model"]["vocab"])[:256]
    spec["model"] |= {"vocab": {piece: i for i, piece in enumerate(alphabet)}, "merges": []}
    spec["added_tokens"] = [
        {"id": 256 + i, "content": content, "special": content in SPECIALS, **blank}
        for i, content in enumerate([*SPECIALS, *NOT_SPECIAL])
    ]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    return write(folder, {"tokenizer.json": spec, "tokenizer_config.json": config})
