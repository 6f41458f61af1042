"""jinja2's filters on coloured texts (see `provenance`), for `following`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from itertools import groupby
from typing import Any, NamedTuple

import jinja2
import jinja2.filters
import jinja2.nodes
from jinja2.exceptions import FilterArgumentError
from markupsafe import Markup

from phi3_jax.text.templates.provenance import Colours

_OPAQUE = ("int", "float", "filesizeformat", "urlencode", "urlize", "wordcount", "xmlattr", "pprint", "striptags")
_NAMING = ("select", "reject", "selectattr", "rejectattr", "attr", "sum")  # their arguments are names


def on_plain(colours: Colours, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on plain arguments. What text it makes of coloured ones is LOST."""

    @wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        result = function(*colours.plain(args), **colours.plain(kwargs))
        is_lost = isinstance(result, str) and colours.is_coloured([args, kwargs])
        return colours.checked(None, result) if is_lost else result

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

    def title(value: Any) -> Any:
        expected = filters["title"](plain(value))
        return colours.checked(colours.with_case(spell(value), "title", expected), expected)

    @jinja2.pass_environment
    def wordwrap(environment: jinja2.Environment, value: str, *args: Any, **kwargs: Any) -> Any:
        expected = filters["wordwrap"](environment, plain(value), *plain(args), **plain(kwargs))
        return colours.checked(colours.respaced(value, expected), expected)

    return {
        **{name: method(name) for name in ("lower", "upper", "capitalize")},
        **{name: _also_on_plain(colours, filters[name]) for name in ("indent", "truncate")},
        **{name: on_plain(colours, filters[name]) for name in _OPAQUE},
        **{name: naming(name) for name in _NAMING},
        **_ordering(colours),
        "e": colours.escape,
        "escape": colours.escape,
        "forceescape": lambda value: colours.escape(str(spell(value))),
        "trim": lambda value, chars=None: colours.method(spell(value), "strip", (chars,), {}),
        "center": lambda value, width=80: colours.method(spell(value), "center", (width,), {}),
        "title": title,
        "wordwrap": wordwrap,
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


class _Group(NamedTuple):
    """As jinja2's own, of the filter `groupby`."""

    grouper: Any
    list: list[Any]

    def __repr__(self) -> str:
        return tuple.__repr__(self)


def _ordering(colours: Colours) -> dict[str, Callable[..., Any]]:
    """The filters that compare what is in a list, with jinja2's arguments."""
    getter = jinja2.filters.make_attrgetter

    def comparable(case_sensitive: bool) -> Callable[[Any], Any]:
        fold = (lambda value: value) if case_sensitive else jinja2.filters.ignore_case
        return lambda value: fold(colours.plain(value))

    @jinja2.pass_environment
    def sort(
        environment: Any, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
    ) -> list[Any]:
        names, compared = colours.plain(attribute), comparable(case_sensitive)
        return sorted(value, key=jinja2.filters.make_multi_attrgetter(environment, names, compared), reverse=reverse)

    @jinja2.pass_environment
    def unique(environment: Any, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Iterator[Any]:
        key, seen = getter(environment, colours.plain(attribute), comparable(case_sensitive)), set()
        for each in value:
            if (found := key(each)) not in seen:
                seen.add(found)
                yield each

    def choosing(choose: Callable[..., Any]) -> Callable[..., Any]:
        @jinja2.pass_environment
        def chosen(environment: Any, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
            if not (values := list(value)):
                return environment.undefined("No aggregated item, sequence was empty.")
            return choose(values, key=getter(environment, colours.plain(attribute), comparable(case_sensitive)))

        return chosen

    @jinja2.pass_environment
    def groupby_(
        environment: Any, value: Any, attribute: Any, default: Any = None, case_sensitive: bool = False
    ) -> list[_Group]:
        attribute = colours.plain(attribute)
        key = getter(environment, attribute, comparable(case_sensitive), default=default)
        shown = getter(environment, attribute, default=default)
        groups = [list(values) for _, values in groupby(sorted(value, key=key), key)]
        return [_Group(shown(values[0]), values) for values in groups]

    def dictsort(value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False) -> list[Any]:
        by = colours.plain(by)
        if by not in ("key", "value"):
            raise FilterArgumentError('You can only sort by either "key" or "value"')
        key = comparable(case_sensitive)
        return sorted(value.items(), key=lambda item: key(item[by == "value"]), reverse=reverse)

    return {
        "sort": sort,
        "unique": unique,
        "min": choosing(min),
        "max": choosing(max),
        "groupby": groupby_,
        "dictsort": dictsort,
    }
