"""Runs a chat template: a jinja2 program from a file that somebody else wrote.

It runs in jinja2's sandbox, and sees plain data only: text, numbers, lists and dicts. Time and memory have no bounds
here: `process` runs this module in a process that has.
"""

import json
import random
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from phi3_jax.text.templates.following import OPERATORS, Following
from phi3_jax.text.templates.provenance import Colours

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_GENERATED_CHARACTERS = 1_000_000  # written by the template itself, on top of the messages

_CHANCE = "phi3_jax chance"  # no name that a template could write


def run(source: str, variables: dict[str, Any], characters: int, palettes: Sequence[Any] = ()) -> list[str]:
    """What a template writes: plain, and then once in the colours of each palette (see `provenance`).

    Args:
        source: the template.
        variables: the names that it may use: JSON's types only. "now", a time in ISO's form, is what its function
            strftime_now tells.
        characters: how long the texts in them are.
        palettes: each {"letters": str, "first": the first of its code points, "own": what among the variables is the
            template's own word (see `Colours.paint_variables`)}.

    Raises:
        Exception: it has a syntax error, fails, refuses the messages, or writes too much; `explain` says what.
    """
    variables = dict(variables)
    now = datetime.fromisoformat(variables.pop("now")) if "now" in variables else datetime.now()
    variables = {"strftime_now": now.strftime} | variables
    texts = [_write(source, None, variables | {_CHANCE: random.Random(str(now))}, characters)]
    for palette in palettes:
        key = (palette["letters"], palette["first"])
        given = _colours(*key).paint_variables(variables, palette["own"])
        texts.append(_write(source, key, given | {_CHANCE: random.Random(str(now))}, characters))
    return texts


def _write(source: str, palette: tuple[str, int] | None, variables: dict[str, Any], characters: int) -> str:
    room = MAX_GENERATED_CHARACTERS + characters
    chunks = []
    for chunk in _compile(source, palette).generate(variables):
        chunks.append(chunk)
        room -= len(chunk)
        if room < 0:
            raise jinja2.TemplateError(f"more than {MAX_GENERATED_CHARACTERS} characters written")
    return "".join(chunks)


def explain(error: Exception) -> str:
    """What is wrong with a template, or with what it was given, by the error that it led to."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"syntax error in the chat template, line {error.lineno}: {error}"
    if isinstance(error, jinja2.TemplateError):
        return f"the chat template refuses these messages: {error}"
    return f"the chat template fails on these messages: {type(error).__name__}: {error}"


def vocabulary(source: str) -> dict[str, list[str] | bool]:
    """What a template speaks of: the fields of `process.Vocabulary`. Raises what `explain` explains."""
    # One tree for each question: the first changes its own, by folding constants.
    undeclared = jinja2.meta.find_undeclared_variables(_parse(source))
    tree = _parse(source)
    nodes = jinja2.nodes

    def texts(*roots: jinja2.nodes.Node) -> set[str]:
        consts = [const for root in roots for const in (root, *root.find_all(nodes.Const))]
        return {c.value for c in consts if isinstance(c, nodes.Const) and isinstance(c.value, str)}

    got = [call for call in tree.find_all(nodes.Call) if getattr(call.node, "attr", None) == "get"]
    fields = texts(*got, *(node.arg for node in tree.find_all(nodes.Getitem)))
    return {
        "variables": sorted(undeclared),
        "fields": sorted(fields.union(node.attr for node in tree.find_all(nodes.Getattr))),
        "compared": sorted(texts(*tree.find_all(nodes.Compare), *(pair.key for pair in tree.find_all(nodes.Pair)))),
        "writes_json": any(node.name == "tojson" for node in tree.find_all(nodes.Filter)),
    }


def words(source: str) -> str:
    """What a template itself may write: its text and its string constants, U+0000 between them."""
    tree = _parse(source)
    texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    return "\0".join(texts + [n.value for n in tree.find_all(jinja2.nodes.Const) if isinstance(n.value, str)])


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 wants a set)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Coloured(Following, _Sandbox):
    intercepted_binops = _Sandbox.intercepted_binops | OPERATORS


@lru_cache(maxsize=8)
def _colours(letters: str, first: int) -> Colours:
    return Colours(letters, first)


@lru_cache(maxsize=8)
def _environment(palette: tuple[str, int] | None = None) -> _Sandbox:
    """The environment that Hugging Face chat templates expect."""
    kind = _Sandbox if palette is None else _Coloured
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock])
    environment.filters.update(tojson=_to_json, random=_random)
    environment.globals.update(raise_exception=_raise_exception)
    del environment.globals["lipsum"]  # generates filler text of any length
    if isinstance(environment, _Coloured) and palette is not None:
        environment.follow(_colours(*palette))
    return environment


def _parse(source: str, palette: tuple[str, int] | None = None) -> jinja2.nodes.Template:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise jinja2.TemplateError(f"it has {len(source)} characters, more than {MAX_TEMPLATE_CHARACTERS}")
    return _environment(palette).parse(source)


@lru_cache(maxsize=24)
def _compile(source: str, palette: tuple[str, int] | None) -> jinja2.Template:
    environment = _environment(palette)
    code = environment.compile(_parse(source, palette))
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Replaces jinja2's own filter, which escapes HTML: chat templates expect plain JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
    if ensure_ascii:  # but by noncharacters `chat` and `answers` find what they look for
        text = re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", lambda match: json.dumps(match[0])[1:-1], text)
    return text


@jinja2.pass_context
def _random(context: jinja2.runtime.Context, values: Sequence[Any]) -> Any:
    """Replaces jinja2's own filter: all renderings of a chat choose the same."""
    return context[_CHANCE].choice(values)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
