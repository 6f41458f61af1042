"""jinja2's filters on coloured texts (see `provenance`), for `following`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes
from jinja2.exceptions import FilterArgumentError
from markupsafe import Markup

from phi3_jax.text.templates.provenance import Colours

_OPAQUE = (
    *("int", "float", "filesizeformat", "urlencode", "urlize", "wordcount", "xmlattr", "pprint", "striptags", "title"),
    *("wordwrap", "sort", "unique", "min", "max", "groupby", "dictsort"),
)
_NAMING = ("select", "reject", "selectattr", "rejectattr", "attr", "sum")  # their arguments are names


def on_plain(colours: Colours, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on plain arguments. What it makes of coloured ones is LOST."""

    @wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        given = [list(each) if isinstance(each, Iterator) else each for each in args]
        result = function(*colours.plain(given), **colours.plain(kwargs))
        result = list(result) if isinstance(result, Iterator) else result
        return colours.lost(result) if colours.is_coloured([given, kwargs]) else result

    return changed


def coloured_filters(colours: Colours, filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters that are not the same on coloured text, out of an environment's own for plain text."""
    plain, spell = colours.plain, colours.spell

    def method(name: str) -> Callable[..., Any]:
        return lambda value, *args: colours.method(spell(value), name, args, {})

    def naming(name: str) -> Callable[..., Any]:
        function = filters[name]

        @wraps(function)
        def named(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return function(context, value, *plain(args), **plain(kwargs))

        return named

    @jinja2.pass_eval_context
    def concat(context: jinja2.nodes.EvalContext, values: list[Any]) -> str:
        if context.autoescape and any(isinstance(each, Markup) for each in values):
            return Markup("").join(map(colours.escape, values))
        return "".join(str(spell(each)) for each in values)

    @jinja2.pass_context
    def map_(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if "attribute" in kwargs:
            kwargs["attribute"] = plain(kwargs["attribute"])
        return filters["map"](context, value, *plain(args[:1]), *args[1:], **kwargs)

    @jinja2.pass_environment
    def join(environment: jinja2.Environment, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(environment, plain(attribute)), value)
        return str(spell(d)).join(str(spell(each)) for each in value)

    def replace(value: Any, old: Any, new: Any, count: int | None = None) -> Any:
        given = (str(spell(old)), str(spell(new)), -1 if count is None else count)
        return colours.method(str(spell(value)), "replace", given, {})

    def format_(value: Any, *args: Any, **kwargs: Any) -> Any:
        if args and kwargs:
            raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
        return colours.percent(spell(value), kwargs or args)

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> Any:
        options["indent"] = indent
        expected = filters["tojson"](plain(value), ensure_ascii=ensure_ascii, **plain(options))
        is_plain = not colours.is_coloured([value, options])
        return expected if is_plain else colours.checked(colours.json(value, ensure_ascii, options), expected)

    return {
        **{name: method(name) for name in ("lower", "upper", "capitalize")},
        **{name: _also_on_plain(colours, filters[name]) for name in ("indent", "truncate")},
        **{name: on_plain(colours, filters[name]) for name in _OPAQUE},
        **{name: naming(name) for name in _NAMING},
        "e": colours.escape,
        "escape": colours.escape,
        "forceescape": lambda value: colours.escape(str(spell(value))),
        "trim": lambda value, chars=None: colours.method(spell(value), "strip", (chars,), {}),
        "center": lambda value, width=80: colours.method(spell(value), "center", (width,), {}),
        "map": map_,
        "join": join,
        "replace": replace,
        "format": format_,
        "tojson": to_json,
        "string": spell,
        "safe": lambda value: Markup(spell(value)),
        "_plain": plain,
        "_concat": concat,
        "_key": colours.key,
    }


def _also_on_plain(colours: Colours, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on coloured text, and on plain text to see whether it did the same."""

    @wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        return colours.checked(function(*args, **kwargs), function(*colours.plain(args), **colours.plain(kwargs)))

    return both
