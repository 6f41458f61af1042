"""Runs a chat template: a jinja2 program from a file that somebody else wrote.

It runs in jinja2's sandbox, and sees plain data only: text, numbers, lists and dicts. Time and memory have no bounds
here: `process` runs this module in a process that has.
"""

import json
import re
from collections.abc import Callable, Sequence
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

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_GENERATED_CHARACTERS = 1_000_000  # written by the template itself, on top of the messages

_DEFUSE = "phi3_jax defuse"  # no name that a template could write
_SEARCHING = frozenset(  # methods of text whose first argument is looked for in it
    ["split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "rindex"]
).union(["replace", "count", "removeprefix", "removesuffix"])


def run(
    source: str,
    variables: dict[str, Any],
    characters: int,
    palettes: Sequence[Any] = (),
    defuse: dict[str, Any] | None = None,
) -> list[str]:
    """What a template writes: plain, and then once in each palette's colours.

    Args:
        source: the template.
        variables: the names that it may use: JSON's types only. "now", a time in ISO's form, is what its function
            strftime_now tells.
        characters: how long the texts in them are.
        palettes: of colours.
        defuse: what was done to these texts. What the template searches in them is then treated alike.

    Raises:
        Exception: it has a syntax error, fails, refuses the messages, or writes too much; `explain` says what.
    """
    variables = dict(variables)
    now = datetime.fromisoformat(variables.pop("now")) if "now" in variables else datetime.now()
    variables = {"strftime_now": now.strftime} | variables
    return [_write(source, variables, characters, _change(defuse) if defuse else None) for _ in (None, *palettes)]


def _change(data: dict[str, Any]) -> Callable[[str], str]:
    if "letters" in data:
        table = str.maketrans(data["letters"])
        return lambda text: text.translate(table)
    return lambda text: re.sub(data["pattern"], data["replacement"], text)


def _write(source: str, variables: dict[str, Any], characters: int, defuse: Callable[[str], str] | None = None) -> str:
    room = MAX_GENERATED_CHARACTERS + characters
    chunks = []
    for chunk in _compile(source).generate(variables | {_DEFUSE: defuse}):
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


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox."""

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # content.split('</think>') has to find the string where it is a special token and was defused in the content.
        text = getattr(__obj, "__self__", None)
        if args and isinstance(args[0], str) and isinstance(text, str) and __obj.__name__ in _SEARCHING:
            defused = _defused(__context, args[0])
            args = (defused if defused in text else args[0], *args[1:])
        return super().call(__context, __obj, *args, **kwargs)


@jinja2.pass_context
def _defused(context: jinja2.runtime.Context, value: Any) -> Any:
    defuse = context.get(_DEFUSE)
    return defuse(value) if defuse is not None and isinstance(value, str) else value


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 wants a set)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    """The environment that Hugging Face chat templates expect."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock])
    environment.filters.update(tojson=_to_json, _defused=_defused)
    environment.globals.update(raise_exception=_raise_exception)
    del environment.globals["lipsum"]  # generates filler text of any length
    return environment


def _parse(source: str) -> jinja2.nodes.Template:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise jinja2.TemplateError(f"it has {len(source)} characters, more than {MAX_TEMPLATE_CHARACTERS}")
    return _environment().parse(source)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment, tree = _environment(), _parse(source)
    for comparison in tree.find_all(jinja2.nodes.Compare):  # '</think>' in content: as in `_Sandbox.call`
        literal, [first, *_] = comparison.expr, comparison.ops
        if isinstance(literal, jinja2.nodes.Const) and first.op in ("in", "notin"):
            comparison.expr = jinja2.nodes.Filter(literal, "_defused", [], [], None, None, lineno=literal.lineno)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Replaces jinja2's own filter, which escapes HTML: chat templates expect plain JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
    if ensure_ascii:  # but a noncharacter may be the mark of `Literals`, which is dropped later, and not if escaped
        text = re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", lambda match: json.dumps(match[0])[1:-1], text)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
