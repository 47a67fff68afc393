"""The one place that runs chat templates, which are programs of strangers, within limits.

Jinja's immutable sandbox keeps a template from reaching Python. It does not keep it from running for ever or from
filling the memory (``'x' * 10**9``, ``9**9**9``, loops in loops, a string that doubles itself). So the template's tree
is rewritten before it is compiled: loops, macros, outputs, concatenations, literals and comparisons report to a
``Budget``, as do operators, calls, filters and tests. The budget refuses a value before it becomes too large.

A template sees and may call what transformers' ``apply_chat_template`` offers, so that an ordinary one gives the same
text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from weft.data.rendering.budget import BUDGET, Budget, LimitError, guard_filter, guard_method, guard_percent, guard_test
from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 128 << 10  # characters of a template; the longest that is known has 40,000
# Seconds that templates spent before they were stopped. Data has many records, so beyond _PATIENCE none is tried again.
_STOPPED: dict[str, float] = {}
_PATIENCE = 1.5
# Filters that no chat template needs, and whose arguments do not tell their cost.
_WITHOUT = ("urlize", "wordwrap", "striptags", "pprint", "xmlattr", "random", "wordcount", "filesizeformat")


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    **variables: object,
) -> str:
    """The conversation as the tokenizer's chat template, or another one, writes it.

    Raises:
        UserError: the template reaches a limit.
        Exception: whatever the template raises.
    """
    text = tokenizer.get_chat_template(chat_template, tools)  # type: ignore[arg-type]
    shown = {
        **tokenizer.special_tokens_map,
        "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
        "tools": list(tools) if tools else None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **variables,
    }
    return render_template(text, {key: _plain(value) for key, value in shown.items()})


def render_template(text: str, variables: Mapping[str, object]) -> str:
    """Run a template within its limits, which grow with its input.

    Raises:
        UserError: The template reaches a limit, or fails as in ``render_chat``.
    """
    if _STOPPED.get(text, 0.0) > _PATIENCE:
        raise UserError("the chat template is stopped: it reached its limits with others of these conversations")
    budget, begun = Budget(variables), time.thread_time()
    before = BUDGET.set(budget)
    try:
        pieces = []
        for piece in _compiled(text).generate(variables):
            budget.written(piece)
            pieces.append(piece)
        return "".join(pieces)
    except LimitError as error:
        _STOPPED[text] = _STOPPED.get(text, 0.0) + time.thread_time() - begun
        raise UserError(f"the chat template is stopped: {error}") from None
    except (RecursionError, MemoryError):
        raise UserError("the chat template is stopped: it calls itself without end, or is nested too deeply") from None
    finally:
        BUDGET.reset(before)


def variables_of(text: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself.

    Raises:
        jinja2.TemplateSyntaxError: It is no template.
    """
    given = jinja2.meta.find_undeclared_variables(_environment().parse(text))
    return frozenset(given - _environment().globals.keys())


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    if len(text) > _LONGEST:
        raise UserError(f"the chat template has {len(text)} characters; at most {_LONGEST} are compiled")
    return _environment().from_string(text)


def _plain(value: object) -> object:
    """The value with only the types of JSON: other objects have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else [*map(_plain, value)]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits: it rewrites the tree and measures calls."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Rewriter().visit(source), *args, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = BUDGET.get()
        if operator == "+":
            budget.check_sum(left, right)
        elif operator == "%":
            if isinstance(left, str):
                guard_percent(budget, left, right)
        elif operator == "*":
            budget.check_product(left, right)
        else:
            budget.check_power(left, right)
        return budget.made(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja's
        budget = BUDGET.get()
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, int, float, bytes)):
            guard_method(budget, owner, __obj.__name__, args, kwargs)
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, by_map = value.__self__, value.__name__ == "format_map"

        def limited(*args: Any, **kwargs: Any) -> str:
            given = (args, kwargs) if not by_map else ((), *args)
            formatter = _Formatter(self)
            return str(BUDGET.get().made(formatter.vformat(text, *given)))

        return limited


class _Formatter(SandboxedFormatter):
    """``str.format`` with a limit for each field."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = BUDGET.get()
        budget.check_width(format_spec)
        budget.check_text(value)
        return budget.made(super().format_field(value, format_spec))


class _Rewriter(NodeTransformer):
    """Rewrites a template so that it reports to the budget, through filters that no template can name."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [one if isinstance(one, nodes.TemplateData) else _through(one, "out") for one in node.nodes]
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock | nodes.For) -> nodes.Node:  # noqa: N802
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick(node, written), lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro  # noqa: N815

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.visit_Macro(node)
        if node.test is not None:
            node.test = nodes.And(_tick(node, 0), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(nodes.List(node.nodes, lineno=node.lineno), "cat")

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        values = [item.value if isinstance(item, nodes.Pair) else item for item in node.items]
        return node if all(isinstance(value, nodes.Const) for value in values) else _through(node, "new")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(node, "made") if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _compared(node.expr)
        for operand in node.ops:
            operand.expr = _compared(operand.expr)
        return node

    def _refuse(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError("a chat template cannot load other templates")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse  # noqa: N815


def _through(node: nodes.Expr, name: str) -> nodes.Expr:
    return nodes.Filter(node, f" {name}", [], [], None, None, lineno=node.lineno)


def _compared(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _through(node, "cmp")


def _tick(node: nodes.Node, written: int) -> nodes.Expr:
    return _through(nodes.Const(written, lineno=node.lineno), "tick")


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: marks for other tools, which change no text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], object]) -> str:
        return str(caller())


class _Dict:
    """The ``dict`` of templates. The class itself has attributes that lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _Namespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: object) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name[:40]!r}")


def _raise_exception(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message)[:1000])


def _tojson(
    value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(wanted: str) -> str:
    if len(wanted) > 200:
        raise LimitError("strftime_now is given more than 200 characters")
    return datetime.now().strftime(wanted)


def _measures() -> dict[str, Any]:
    """The filters that ``_Rewriter`` inserts. Their names hold a blank, so that no template can write them."""

    def measure(function: Any) -> Any:
        # Jinja runs no filter that asks for the context at compile time, when there is no budget.
        return jinja2.pass_context(lambda _, value: function(BUDGET.get(), value))

    return {
        " out": measure(Budget.out),
        " tick": measure(Budget.tick),
        " cat": measure(Budget.concatenated),
        " new": measure(Budget.new),
        " made": measure(Budget.made),
        " cmp": measure(Budget.compared),
    }


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    made = _Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols], cache_size=0
    )
    made.filters["tojson"] = _tojson
    made.filters = {name: guard_filter(name, f) for name, f in made.filters.items() if name not in _WITHOUT}
    made.filters |= _measures()
    tests: dict[str, Any] = dict(made.tests)
    made.tests = {name: guard_test(f) for name, f in tests.items()}
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    del made.globals["lipsum"]
    return made
