"""How lines of `mlc-ray show` are written, and what their texts have in common."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place

Line = tuple[str, str]
"""A label and its text; an empty label continues the one before."""


class ShowError(MlcRayError):
    """The folder cannot be shown; the message quotes it and says what can."""


def as_text(lines: Iterable[Line]) -> str:
    """The lines, their texts under each other."""
    rows = list(lines)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def next_lines(commands: Sequence[str]) -> list[Line]:
    """What to do next, a command a line."""
    return [("next" if number == 0 else "", command) for number, command in enumerate(commands)]


def values_text(values: Mapping[str, Any]) -> str:
    """Settings or metrics by name."""
    texts = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def read_json(file: Place) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        return file.read_object(ShowError)
    except FileNotFoundError:
        return {}


def age(file: Place) -> str:
    """How long ago a file was written, which tells whether something still goes on."""
    if not file.is_local:
        return ""
    try:
        return f"; last written {duration(time.time() - Path(file).stat().st_mtime)} ago"
    except FileNotFoundError:
        return ""


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def quoted(place: Place) -> str:
    """A folder as a shell reads it."""
    return shlex.quote(str(place))
