"""jinja2 with coloured texts (see `provenance`): what a template compares is plain, what it writes has its colours.

The template's texts and constants are coloured when it is compiled. What is compared, looked up, tested and counted is
taken plain; filters and methods that change letters are run on plain text, and the colours are carried over.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from markupsafe import Markup

from phi3_jax.text.templates.coloured_filters import coloured_filters, on_plain
from phi3_jax.text.templates.provenance import TEMPLATE, Colours

OPERATORS = frozenset(["%", "+"])  # that are to be intercepted
_COMPARING_TESTS = (
    *("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">="),
    *("in", "lower", "upper", "filter", "test"),
)


class Following(jinja2.sandbox.SandboxedEnvironment):
    """An environment for templates in colours. `follow` comes before anything is compiled."""

    def follow(self, colours: Colours) -> None:
        """Sets the filters, tests and globals up, which the environment has as its own, for these colours."""
        self._colours = colours
        self._painter = _Painter(colours)
        self.finalize = _finalizer(colours)
        self.filters.update(coloured_filters(colours, dict(self.filters)))
        for name in _COMPARING_TESTS:
            compare: Any = self.tests[name]
            self.tests[name] = on_plain(colours, compare)
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
        format_plain = super().wrap_str_format(getattr(colours.plain(text), value.__name__))
        assert format_plain is not None

        def wrapper(*args: Any, **kwargs: Any) -> str:
            expected = format_plain(*colours.plain(args), **colours.plain(kwargs))
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
            return colours.lost(result) if colours.is_coloured([args, kwargs]) else result
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
        return self._filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_concat")

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
