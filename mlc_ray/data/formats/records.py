"""One record of a file, and one part of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One record: `line` from 1 (of the file for text, of the table for Parquet and datasets), its text, its fields.

    `fields` is None where the record itself is malformed; `reason` then says how.
    """

    line: int
    text: str
    fields: dict[str, Any] | None
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """A part of a file that is read by itself: from `start` up to `stop`, the first whole line or row of it `line`.

    The unit is that of the container: bytes of JSON lines (a line belongs to the part that it starts in; `line` is that
    of byte `start`, whether or not a line starts there), row groups of Parquet, rows of a dataset.
    """

    start: int
    stop: int
    line: int
