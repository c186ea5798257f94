"""The marks of languages that a judge does not read as they stand: the same in tables, figures and reports."""

from __future__ import annotations

from collections.abc import Iterable

from mlc_ray.types import ScoreRow, Via

VIA_MARK: dict[Via, str] = {"": "", "translated": "†", "uncovered": "‡"}
VIA_TEXT: dict[Via, str] = {
    "": "",
    "translated": "read by the judge in translation",
    "uncovered": "the judge does not declare this language: do not rely on it",
}


def marked(code: str, rows: Iterable[ScoreRow]) -> str:
    """A language's code, with a mark behind it if it holds for every row of the language: `ku†`, `ps‡`."""
    return code + VIA_MARK[_common_way(code, rows)]


def own_mark(row: ScoreRow, rows: Iterable[ScoreRow]) -> str:
    """The mark of a row whose language is not read alike by the judge of every measure; else nothing."""
    return "" if row.via == _common_way(row.language, rows) else VIA_MARK[row.via]


def _common_way(code: str, rows: Iterable[ScoreRow]) -> Via:
    ways = {row.via for row in rows if row.language == code}
    return ways.pop() if len(ways) == 1 else ""


def mark_lines(ways: Iterable[Via]) -> list[str]:
    """A line for each mark that `ways` need, saying what it means."""
    used = set(ways)
    return [f"{VIA_MARK[way]} {VIA_TEXT[way]}" for way in VIA_MARK if way and way in used]
