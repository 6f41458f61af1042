"""A look inside of a model while it reads a prompt, for people: the report, its page and picture.

html.py makes the page (its texts, style and script are in page/), picture.py a still picture.
"""
