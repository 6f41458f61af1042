"""Ways of writing a template that many published ones have: followed to the end, for any role."""

import dataclasses
import json
import warnings

import jinja2
import pytest
from chat_templates import write_tokenizer

from phi3_jax.text import encode_chat, load_tokenizer, render_chat

COMMON = {
    "named": "{{ m.role | title }}: {{ m['content'] | trim }}<|end|>\n{{ 'ASSISTANT:' if loop.last }}",
    "renamed": "{% set role = 'model' if m.role == 'assistant' else m.role %}<|im_start|>{{ role }}\n{{ m.content }}",
    "looked up": "{% set names = dict(human='<|user|>', gpt='<|assistant|>') %}{{ names.get(m.role, '<|system|>') }}"
    "{{ m.content ~ '<|end|>' }}{{ names[m.role] if m.role in names }}",
    "gathered": "{% if not loop.first %}{% set ns.text = ns.text + '\n' %}{% endif %}"
    "{% set ns.text = ns.text + '[INST] ' + m.content.strip() + ' [/INST]' %}{{ bos_token + ns.text if loop.last }}",
    "a macro": "{% macro turn(role, text) %}<|start_header_id|>{{ role }}<|end_header_id|>\n{{ text | trim }}<|eot_id|>"
    "{% endmacro %}{{ turn(m.role, m.content) }}{{ turn('ipython', messages | tojson(indent=4)) }}",
    "thoughts": "{% if m.role not in ['system', 'tool'] %}<|user|>{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{{ loop.index0 }}<|end|>{% endif %}{{ messages | map(attribute='role') | unique | join(', ') }}",
    "formats": "{{ '<|im_start|>%s\n%s<|im_end|>' % (m.role, m.content) }}{{ '<|{}|>'.format('user') }}"
    "{{ {'content': messages[0].content, 'e': eos_token} | tojson }}",
}


@pytest.mark.parametrize("name", COMMON)
def test_the_text_is_what_jinja2_alone_writes_and_its_tokens_are_tokens(tmp_path, name):
    template = f"{{% set ns = namespace(text='') %}}{{% for m in messages %}}{COMMON[name]}{{% endfor %}}"
    tokenizer = dataclasses.replace(load_tokenizer(write_tokenizer(tmp_path)), chat_template=template)
    alone = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    alone.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    for role in ("tool_response", "gpt", "human", "Système", "用户", "ipython", "Assistant", "USER"):
        chat = [{"role": role, "content": " Hé, <b>7</b> & more\n"}, {"role": "assistant", "content": "Yes."}]
        written = alone.from_string(template).render(messages=chat, bos_token="<s>", eos_token="<|endoftext|>")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that something is dropped
            ids = encode_chat(tokenizer, chat)
            assert render_chat(tokenizer, chat) == written
        assert ids == tokenizer.encode(written, parse_special=True, add_bos=False)
        assert tokenizer.special_ids & set(ids)
