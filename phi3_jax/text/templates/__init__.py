"""A checkpoint's chat template, which somebody else wrote: run with bounds, and what it writes judged.

`sandbox` runs a template on plain data (it knows jinja2 and nothing of ours), `template` does so for a tokenizer, and
`literals` sees to it that special tokens come from the template alone. Other modules of `text` use these three.
"""
