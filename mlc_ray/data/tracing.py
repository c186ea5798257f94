"""What a chat template does with the text of a message: learnt from one rendering, of a text that writes it down.

A template that only writes a text, perhaps stripped, can be filled in without being rendered for each text. Whether it
does no more cannot be seen in what it gives: Qwen3's asks whether a text begins with `<tool_response>`. So it is
rendered once with strings that note which of their methods are called. `_CHANGES` and `_QUESTIONS` can be repeated on
any text; whatever else is done with a text makes it opaque, and such a template is rendered for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_CHANGES = ("strip", "lstrip", "rstrip")
_QUESTIONS = ("startswith", "endswith", "__contains__", "__eq__", "__ne__", "__bool__")
_JOINS = ("__add__", "__radd__")
_NOT_OF_THE_TEXT = (
    "__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__delattr__", "__dir__", "__doc__",
    "__init_subclass__", "__subclasshook__", "__str__", "__sizeof__", "__reduce__", "__reduce_ex__", "__getstate__",
)  # fmt: skip

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
        calls = (*self.calls, (name, arguments))
        if name in _QUESTIONS:
            self.trace.asked.add((calls, said))
            return said
        self.trace.changes.add(calls)
        return Traced(said, self.trace, calls)

    return method


for _name in {*dir(str), "__bool__", "__radd__"} - set(_NOT_OF_THE_TEXT):
    setattr(Traced, _name, _noting(_name))
