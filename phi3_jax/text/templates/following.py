"""jinja2 with coloured texts (see `provenance`): what a template compares is plain, what it writes has its colours.

The template's texts and constants are coloured when it is compiled. What is compared, looked up, tested and counted is
taken plain; filters and methods that change letters are run on plain text, and the colours are carried over.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import update_wrapper, wraps
from itertools import groupby
from typing import Any, NamedTuple

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from markupsafe import Markup

from phi3_jax.text.templates.provenance import TEMPLATE, Colours

OPERATORS = frozenset(["%", "+"])  # that are to be intercepted
_COMPARING_TESTS = (
    *("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">="),
    *("in", "lower", "upper", "filter", "test"),
)
_OPAQUE_FILTERS = (
    "int",
    "float",
    "filesizeformat",
    "urlencode",
    "urlize",
    "wordcount",
    "xmlattr",
    "pprint",
    "striptags",
)
_NAMING_FILTERS = ("select", "reject", "selectattr", "rejectattr", "attr", "sum")  # their arguments are names


class Following(jinja2.sandbox.SandboxedEnvironment):
    """An environment for templates in colours. `follow` comes before anything is compiled."""

    def follow(self, colours: Colours) -> None:
        """Sets the filters, tests and globals up, which the environment has as its own, for these colours."""
        self._colours = colours
        self._painter = _Painter(colours)
        self.finalize = _finalizer(colours)
        self.filters.update(_filters(colours, dict(self.filters)))
        for name in _COMPARING_TESTS:
            self.tests[name] = _on_plain(colours, self.tests[name])
        self.globals["dict"] = _keeping(
            lambda *args, **kwargs: {colours.key(k): v for k, v in dict(*args, **kwargs).items()}
        )

    def parse(self, source: str, name: str | None = None, filename: str | None = None) -> jinja2.nodes.Template:
        """See jinja2; the tree is coloured."""
        tree = self._painter.visit(super().parse(source, name, filename))
        tree.set_environment(self)
        assert isinstance(tree, jinja2.nodes.Template)
        return tree

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See jinja2; what is looked up is plain."""
        return super().getitem(obj, self._colours.plain(argument) if isinstance(argument, str) else argument)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """See jinja2."""
        if operator == "%" and isinstance(left, str):
            return self._colours.percent(left, right)
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            if isinstance(left, Markup) or isinstance(right, Markup):
                left, right = self._colours.escape(left), self._colours.escape(right)
            return left + right
        if operator in OPERATORS:
            return self.binop_table[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See jinja2: the methods `format` and `format_map`."""
        if super().wrap_str_format(value) is None:
            return None
        text, colours = value.__self__, self._colours
        on_plain = super().wrap_str_format(getattr(colours.plain(text), value.__name__))
        assert on_plain is not None

        def wrapper(*args: Any, **kwargs: Any) -> str:
            expected = on_plain(*colours.plain(args), **colours.plain(kwargs))
            given = args[0] if value.__name__ == "format_map" else kwargs
            return str(colours.format(text, args, given, expected))

        return _keeping(update_wrapper(wrapper, value))

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See jinja2; methods of text see it plain, and unknown functions see all plain."""
        colours, owner = __self._colours, getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        scope = {key: kwargs.pop(key) for key in ("_loop_vars", "_block_vars") if key in kwargs}
        if isinstance(owner, str):
            return colours.method(owner, name, args, kwargs)
        if isinstance(owner, list | tuple) and name in ("index", "count"):
            return getattr(colours.plain(owner), name)(*colours.plain(args))
        if isinstance(owner, dict):
            args = (*colours.plain(args[:1]), *args[1:])
        elif not _keeps_colours(__obj, owner, name):
            result = super().call(__context, __obj, *colours.plain(args), **colours.plain(kwargs), **scope)
            is_lost = isinstance(result, str) and colours.is_coloured([args, kwargs])
            return colours.checked(None, result) if is_lost else result
        return super().call(__context, __obj, *args, **kwargs, **scope)


def _keeps_colours(function: Any, owner: Any, name: str) -> bool:
    """Whether a function only passes its arguments on: macros, loops, `loop.cycle`, `namespace`, `joiner`, ours."""
    if isinstance(owner, jinja2.runtime.LoopContext):
        return name != "changed"
    kinds = (jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.utils.Joiner, type)
    return isinstance(function, kinds) or getattr(function, "keeps_colours", False) is True


def _keeping(function: Any) -> Any:
    function.keeps_colours = True
    return function


def _finalizer(colours: Colours) -> Callable[..., str]:
    @jinja2.pass_eval_context
    def finalize(context: jinja2.nodes.EvalContext, value: Any) -> str:
        return colours.escape(value) if context.autoescape else colours.spell(value)

    return finalize


class _Painter(jinja2.visitor.NodeTransformer):
    """Colours what a template writes itself, and lets it compare plain text."""

    def __init__(self, colours: Colours):
        self._colours = colours

    def visit_TemplateData(self, node: jinja2.nodes.TemplateData) -> jinja2.nodes.Node:  # noqa: N802
        """Text outside of braces."""
        return jinja2.nodes.TemplateData(self._colours.paint(node.data, TEMPLATE), lineno=node.lineno)

    def visit_Const(self, node: jinja2.nodes.Const) -> jinja2.nodes.Node:  # noqa: N802
        """A constant, which may become a part of what is written."""
        value = self._colours.paint(node.value, TEMPLATE) if isinstance(node.value, str) else node.value
        return jinja2.nodes.Const(value, lineno=node.lineno)

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:  # noqa: N802
        """`a == b < c in d`"""
        node.expr = self._filtered(node.expr, "_plain")
        for operand in node.ops:
            operand.expr = self._filtered(operand.expr, "_plain")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        """`a ~ b`"""
        node.nodes = [self._filtered(each, "_spell") for each in node.nodes]
        return node

    def visit_Pair(self, node: jinja2.nodes.Pair) -> jinja2.nodes.Node:  # noqa: N802
        """`{key: value}`"""
        node.key, node.value = self._filtered(node.key, "_key"), self.visit(node.value)
        return node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:  # noqa: N802
        """`a[b]`"""
        node.node = self.visit(node.node)
        if not isinstance(node.arg, jinja2.nodes.Const):
            node.arg = self.visit(node.arg)
        return node

    def _filtered(self, node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Expr:
        if isinstance(node, jinja2.nodes.Const) and name == "_plain":
            return node
        return jinja2.nodes.Filter(self.visit(node), name, [], [], None, None, lineno=node.lineno)


def _filters(colours: Colours, filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters that are not the same on coloured text."""
    plain, spell = colours.plain, colours.spell

    def method(name: str) -> Callable[..., Any]:
        return lambda value, *args: colours.method(spell(value), name, args, {})

    def naming(name: str) -> Callable[..., Any]:
        function = filters[name]

        @wraps(function)
        def named(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return function(context, value, *plain(args), **plain(kwargs))

        return named

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
            raise jinja2.filters.FilterArgumentError("can't handle positional and keyword arguments at the same time")
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
        **{name: _on_plain(colours, filters[name]) for name in _OPAQUE_FILTERS},
        **{name: naming(name) for name in _NAMING_FILTERS},
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
        "_spell": spell,
        "_key": colours.key,
    }


def _on_plain(colours: Colours, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on plain arguments. What text it makes of coloured ones is LOST."""

    @wraps(function)
    def on_plain(*args: Any, **kwargs: Any) -> Any:
        result = function(*colours.plain(args), **colours.plain(kwargs))
        is_lost = isinstance(result, str) and colours.is_coloured([args, kwargs])
        return colours.checked(None, result) if is_lost else result

    return on_plain


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
            raise jinja2.filters.FilterArgumentError('You can only sort by either "key" or "value"')
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
