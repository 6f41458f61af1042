"""A checkpoint's chat template, which somebody else wrote: run with bounds, and what it writes judged.

`sandbox` runs a template on plain data (it knows jinja2 and nothing of ours); `process` has it do so in a process of
its own, `worker`, with bounds; `template` asks that for a tokenizer's template, and `literals` sees to it that special
tokens come from the template alone. `provenance` holds texts in colours, which say whose word each character is;
`following` and `coloured_filters` are jinja2 with such texts. Other modules of `text` use `template` and `literals`.
"""
