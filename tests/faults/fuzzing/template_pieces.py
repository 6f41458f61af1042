"""Changes to a chat template: blocks that are too large, too deep or not there, at a place between two blocks."""

from __future__ import annotations

import random
import re

BOMBS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' }}{% endfor %}{% endfor %}",
    "{% for a in range(10 ** 9) %}{{ 'x' }}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ ['a'] * 10 ** 10 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'|center(10 ** 10) }}",
    "{{ ('a' * 99999)|indent(99999) }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 2 ** 10 ** 8 }}",
    "{{ 1e308|round(10 ** 9) }}",
    "{{ '1' * 99999 * 99999 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n else 'x' }}{% endmacro %}{{ f(60) }}",
    "{% set x %}{% for a in range(99999) %}{{ 'y' * 99999 }}{% endfor %}{% endset %}{{ x }}",
    "{{ range(10 ** 9)|list|length }}",
    "{{ range(10 ** 12)|join }}",
    "{{ 'ab'|replace('', 'c' * 9999)|replace('', 'c' * 9999) }}",
    "{{ (messages|string * 9999)|tojson(indent=9999) }}",
    "{{ lipsum(n=10 ** 6) }}",
    "{{ 'a' * 9999999 ~ 'b' * 9999999 }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "not " * 20_000 + "1 }}",
    "{{ " + "-" * 90_000 + "1 }}",
    "{{ " + "1 + " * 20_000 + "1 }}",
    "{% if true %}" * 500 + "{% endif %}" * 500,
    "{{ '" + "a" * 5_000_000 + "' }}",
    "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "{{ messages|map('string')|join * 10 ** 9 }}",
    "{{ ('a' * 9999 + '!')|wordwrap(1)|urlize }}",
    "{{ ('a' * 29 + '!')|regex_search('(a+)+$') }}",
    "{{ strftime_now('%Y' * 999999) }}",
    "{{ dict(a=1)|dictsort|batch(1)|list|slice(10 ** 9)|list }}",
)
ODD = (
    *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ self._TemplateReference__context }}", "{% include 'x' %}"),
    *(
        "{% import 'os' as o %}{{ o }}",
        "{% extends 'x' %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ nothing.at.all }}",
    ),
    *(
        "{{ raise_exception('no') }}",
        "{{ raise_exception('two\nlines') }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ [][3] }}",
    ),
    *(
        "{{ messages[99].content }}",
        "{{ '\\ud800' }}",
        "{% set 1 = 2 %}",
        "{% break %}",
        "{{ } }}",
        "{% endfor %}",
        "{#",
    ),
    *("{{ joiner()() }}", "{% do 1 %}", "{% continue %}", "{% trans %}{% endtrans %}", "{% call f() %}{% endcall %}"),
    *("{{ caller() }}", "{{ varargs }}", "{{ 'é'.encode('utf-16') }}", "{{ 'a'.encode().decode('utf-16') }}", "\0"),
    *(
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ tools|tojson }}",
        "{{ 1|tojson(indent='x') }}",
        "{% raw %}",
    ),
    *("{{ 'a'|attr('__class__') }}", "{{ '%s %s' % 1 }}", "{{ '{0.__class__}'.format(1) }}", "{{ ''|int(base='x') }}"),
    *(
        "{% generation %}x{% endgeneration %}",
        "{{ strftime_now(1) }}",
        "{{ strftime_now('%é') }}",
        "{{ namespace(1) }}",
    ),
)


def change(text: str, rng: random.Random) -> tuple[str, str]:
    """Puts something between two blocks, or takes blocks away -> (the template, the kind)."""
    blocks = re.split(r"(\{[{%#].*?[}%#]\})", text, flags=re.DOTALL)
    at, how = rng.randrange(len(blocks)), rng.random()
    if how < 0.2:
        del blocks[at]
        return "".join(blocks), "block away"
    if how < 0.3:
        other = rng.randrange(len(blocks))
        blocks[at], blocks[other] = blocks[other], blocks[at]
        return "".join(blocks), "blocks swapped"
    number = rng.randrange(len(BOMBS + ODD))
    blocks.insert(at, (BOMBS + ODD)[number])
    return "".join(blocks), f"bomb {number}" if number < len(BOMBS) else f"odd {number - len(BOMBS)}"
