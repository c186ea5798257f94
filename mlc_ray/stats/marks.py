"""The marks of languages that a judge does not read directly: the same in tables, figures and reports."""

from __future__ import annotations

from collections.abc import Iterable

from mlc_ray.types import Via

VIA_MARK: dict[Via, str] = {"": "", "translated": "†", "unmeasured": "§", "uncovered": "‡"}
VIA_TEXT: dict[Via, str] = {
    "": "",
    "translated": "read by the judge in translation",
    "unmeasured": "read by word lists of your own, whose errors nobody has counted",
    "uncovered": "the judge does not declare this language: do not rely on it",
}


def mark_lines(ways: Iterable[Via]) -> list[str]:
    """A line for each mark that `ways` need, saying what it means."""
    used = set(ways)
    return [f"{VIA_MARK[way]} {VIA_TEXT[way]}" for way in VIA_MARK if way and way in used]
