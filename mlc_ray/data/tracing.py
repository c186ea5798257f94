"""What a chat template does with the text of a message: learnt from one rendering, of a text that writes it down.

A template that only writes a text, perhaps stripped, can be filled in without being rendered for each text. Whether it
does no more cannot be seen in what it gives: Qwen3's asks whether a text begins with `<tool_response>`. So it is
rendered once with strings that note which of their methods are called. `_CHANGES` and `_QUESTIONS` can be repeated on
any text; whatever else is done with a text makes it opaque, and such a template is rendered for each.

Jinja also makes plain strings of a text (a macro, a `set` block and `~` do), or asks where no method of the text is
called (`text in 'yes no'`). `is_traceable` finds this in the template's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

_CHANGES = ("strip", "lstrip", "rstrip")
_QUESTIONS = ("startswith", "endswith", "__contains__", "__eq__", "__ne__", "__bool__")
_JOINS = ("__add__", "__radd__")
_NOT_OF_THE_TEXT = (
    "__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__delattr__", "__dir__", "__doc__",
    "__init_subclass__", "__subclasshook__", "__str__", "__sizeof__", "__reduce__", "__reduce_ex__", "__getstate__",
)  # fmt: skip

_PLAIN_STRINGS = (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock, nodes.Concat)
"""What makes a string that notes nothing of what it is given."""
_FILTERS = ("trim", "length", "count", "string", "lower", "upper", "replace", "default", "d")
"""Filters that call methods of a text."""
_WRITTEN_FILTERS = ("tojson", "join")
"""Filters that make a plain string, which may be written but not asked about."""
_SELECTING_FILTERS = ("select", "reject", "selectattr", "rejectattr")
_FUNCTIONS = ("raise_exception", "namespace", "range", "strftime_now")

Calls = tuple[tuple[str, tuple[Any, ...]], ...]
"""Methods of a text that are called one on what another gave, with their arguments."""


@dataclass
class Trace:
    """What a template did with one text.

    `changes` are the ways in which it changed the text before writing it; `asked` the questions about it (the last
    call; those before change the text), each with its answer; `opaque` is whether it did something else.
    """

    changes: set[Calls] = field(default_factory=lambda: {()})
    asked: set[tuple[Calls, Any]] = field(default_factory=set)
    opaque: bool = False

    def holds_for(self, text: str) -> bool:
        """Whether the template does with `text` what it did with the traced one."""
        return not self.opaque and all(replayed(text, calls) == answer for calls, answer in self.asked)


def code_of(template: str) -> nodes.Template:
    """The syntax tree of a chat template; raises jinja2's TemplateSyntaxError."""
    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)


def is_traceable(template: str) -> bool:
    """Whether a template's code does nothing with a text that `Traced` does not note; where in doubt, False."""
    try:
        # Tags that transformers adds, such as `generation`, are not known here: their blocks make plain strings too.
        code = code_of(template)
    except TemplateSyntaxError:
        return False
    written = {id(part) for output in code.find_all(nodes.Output) for node in output.nodes for part in _added(node)}
    return all(_is_noted(node, id(node) in written) for node in code.find_all(nodes.Node))


def _added(node: nodes.Node) -> list[nodes.Node]:
    """The parts of a sum."""
    return [*_added(node.left), *_added(node.right)] if isinstance(node, nodes.Add) else [node]


def _is_noted(node: nodes.Node, written: bool) -> bool:
    """Whether a text notes what this does with it; `written` is whether it stands in the output, or a sum there."""
    match node:
        case nodes.Filter(name=name) if name in _SELECTING_FILTERS:
            return any(isinstance(each, nodes.Const) and each.value in ("equalto", "eq", "==") for each in node.args)
        case nodes.Filter(name=name):
            return name in _FILTERS or (name in _WRITTEN_FILTERS and written)
        case nodes.Test(name="in"):
            return _asks_no_text(node.node, node.args[0])
        case nodes.Compare(expr=left, ops=ops):
            values = [left, *(each.expr for each in ops)]
            pairs = zip(ops, values, values[1:], strict=False)
            return all(_asks_no_text(one, other) for each, one, other in pairs if each.op in ("in", "notin"))
        case nodes.Mod():  # of numbers; '%s' % text makes a plain string
            return isinstance(node.right, nodes.Const) and not isinstance(node.right.value, str)
        case nodes.Call():  # 'a b'.split(text) asks a string that notes nothing
            given = [*node.args, *(each.value for each in node.kwargs)]
            constant = all(isinstance(each, nodes.Const) for each in given) and not (node.dyn_args or node.dyn_kwargs)
            return constant or (isinstance(node.node, nodes.Name) and node.node.name in _FUNCTIONS)
    return not isinstance(node, _PLAIN_STRINGS)


def _asks_no_text(one: nodes.Node, other: nodes.Node) -> bool:
    """Whether `one in other` does not ask a string about a text: a list compares its values with it, which is noted."""
    return isinstance(one, nodes.Const) or isinstance(other, nodes.List | nodes.Tuple)


def replayed(text: str, calls: Calls) -> Any:
    """What `calls` make of a text, or say of it."""
    said: Any = text
    for name, arguments in calls:
        said = _call(said, name, arguments)
    return said


class Traced(str):
    """A text that notes in `trace` what is done with it; `calls` made it, or are None once other text was joined."""

    trace: Trace
    calls: Calls | None

    def __new__(cls, text: str, trace: Trace, calls: Calls | None = ()) -> Traced:
        """A string cannot be changed, and gets its value here."""
        made = super().__new__(cls, text)
        made.trace, made.calls = trace, calls
        return made

    def __str__(self) -> str:
        return self


def _call(text: str, name: str, arguments: tuple[Any, ...]) -> Any:
    """Call the method of `str` itself, whatever class `text` has."""
    if name == "__bool__":
        return len(str.__str__(text)) > 0
    return str.__add__(arguments[0], text) if name == "__radd__" else getattr(str, name)(text, *arguments)


def _noting(name: str) -> Callable[..., Any]:
    def method(self: Traced, *arguments: Any, **named: Any) -> Any:
        if named:
            self.trace.opaque = True
            return getattr(str, name)(self, *arguments, **named)
        said = _call(self, name, arguments)
        if name in _JOINS:
            return Traced(said, self.trace, None)
        plain = all(argument is None or type(argument) in (str, tuple) for argument in arguments)
        if self.calls is None or not plain or name not in _CHANGES + _QUESTIONS:
            self.trace.opaque = True
            return said
        if name in _CHANGES:
            arguments = tuple(each for each in arguments if each is not None)  # strip(None) is strip()
            if self.calls and self.calls[-1] == (name, arguments):  # the second time, nothing is left to strip
                return self
        calls = (*self.calls, (name, arguments))
        if name in _QUESTIONS:
            self.trace.asked.add((calls, said))
            return said
        self.trace.changes.add(calls)
        return Traced(said, self.trace, calls)

    return method


for _name in {*dir(str), "__bool__", "__radd__"} - set(_NOT_OF_THE_TEXT):
    setattr(Traced, _name, _noting(_name))
