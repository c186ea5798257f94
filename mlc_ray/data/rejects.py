"""What a driver keeps while a data set is read: numbers of every bundle, and the rejected rows in a file.

Of each bundle that is 12 bytes: its key, 8, and its line, 4 or fewer; where a source joins files, 4 more for the number
of its file. While repeats are found by sorting, at the end, it is 37 bytes (measured with four million bundles): 370 MB
for ten million. Rejected rows never stay in memory.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlc_ray.data.bundles import NAMED_FIRST, RejectedRow, place
from mlc_ray.data.ragged import Ints
from mlc_ray.data.tables import BUNDLES, Keys, keys_of
from mlc_ray.errors import MlcRayError

OTHER_REASONS = "other reasons"
_REASONS = 50
_COMPARED_AT_ONCE = 1 << 16
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")

logger = logging.getLogger(__name__)


class InvalidBundlesError(MlcRayError, ValueError):
    """Some or all rows are not valid bundles; the message names the first few and the rejects file."""


class KeyCollisionError(MlcRayError, ValueError):
    """Two bundles that differ have the same key; the message names both."""


class ReasonCounts:
    """How often each reason occurs; values and numbers in a reason do not tell reasons apart, and 50 are told apart."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Count it once."""
        plain = _VALUES.sub("…", reason)
        self._counts[plain if plain in self._counts or len(self._counts) < _REASONS else OTHER_REASONS] += 1

    def by_frequency(self) -> dict[str, int]:
        """Most frequent first."""
        return dict(self._counts.most_common())

    @property
    def total(self) -> int:
        """All that were counted."""
        return self._counts.total()


@dataclass(frozen=True)
class PartRead:
    """What a task says of the part of a source that it read, of B bundles and R rejected rows.

    `rejected_at` [R] are the numbers of rejected rows among its rows, `rejects` their JSONL; `keys` and `lines` [B] are
    of the bundles, and `file_of` [B] (None: all are of `files[0]`) indices into `files`.
    """

    rejected_at: Ints
    rejects: str
    keys: Keys
    lines: npt.NDArray[Any]
    files: list[str]
    file_of: Ints | None


@dataclass(frozen=True)
class _Kept:
    lines: npt.NDArray[Any]
    files: list[str]
    file_of: Ints | None
    rejected_at: Ints

    def place(self, index: int) -> tuple[str, int]:
        return self.files[0 if self.file_of is None else int(self.file_of[index])], int(self.lines[index])


class Ledger:
    """Takes down what tasks say of the parts of all sources, in order, and finds repeated bundles.

    Args:
        path: where rejected rows are written; an older file there is removed.
        named: what messages call it.
    """

    def __init__(self, path: Path, named: Path) -> None:
        self.path, self.named = path, named
        self.bundles = 0
        self._spool: TextIO | None = None  # rejected rows without repeats, which are known at the end
        self._keys: list[Keys] = []
        self._parts: list[_Kept] = []
        path.unlink(missing_ok=True)

    @property
    def rejected(self) -> int:
        """Rejected rows so far, repeated bundles not among them."""
        return sum(len(part.rejected_at) for part in self._parts)

    def add(self, read: PartRead) -> None:
        """Take down the next part."""
        lines = read.lines.astype(np.min_scalar_type(int(read.lines.max(initial=0))))
        self._keys.append(read.keys)
        self._parts.append(_Kept(lines, read.files, read.file_of, read.rejected_at))
        self.bundles += len(lines)
        if read.rejects:
            if self._spool is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._spool = tempfile.TemporaryFile("w+", encoding="utf-8", dir=self.path.parent)  # noqa: SIM115
            self._spool.write(read.rejects)

    def close(
        self, ids_at: Callable[[Ints], Sequence[str]] | None, on_invalid: str
    ) -> tuple[dict[int, Ints], ReasonCounts]:
        """Repeated bundles, by part as indices among its bundles; and why rows were rejected, repeats among them.

        All rejected rows are in the file then, in the order of the sources.

        Args:
            ids_at: ids of bundles by their number in the data set, to see whether equal keys are of equal bundles; None
                where rows were rejected and that is fatal, which is said instead.
            on_invalid: `fail` or `skip`, as data.on_invalid.

        Raises:
            KeyCollisionError: two ids have the same key.
            InvalidBundlesError: `on_invalid` is "fail" and a row was rejected, or no bundle is left.
        """
        starts = np.cumsum([0, *(len(part.lines) for part in self._parts)])
        repeats, firsts = self._repeats()
        if ids_at is not None:
            self._refuse_collisions(repeats, firsts, ids_at, starts)
        parts, begins = np.unique(np.searchsorted(starts, repeats, side="right") - 1, return_index=True)
        inside = dict(zip(parts.tolist(), np.split(np.arange(len(repeats)), begins)[1:], strict=True))
        reasons, first = ReasonCounts(), list[RejectedRow]()
        if self.rejected or len(repeats):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", encoding="utf-8", errors="backslashreplace") as file:
                for row in self._in_order(repeats, firsts, inside, starts):
                    reasons.add(row.reason)
                    if len(first) < NAMED_FIRST:
                        first.append(row)
                    file.write(_json_line(row))
        self._say(reasons, first, self.bundles - len(repeats), on_invalid)
        return {part: repeats[which] - starts[part] for part, which in inside.items()}, reasons

    def columns(self, part: int) -> tuple[list[str], npt.NDArray[Any]]:
        """File and line of each bundle of a part."""
        kept = self._parts[part]
        of = np.zeros(len(kept.lines), dtype=int) if kept.file_of is None else kept.file_of
        return [kept.files[index] for index in of], kept.lines

    def _repeats(self) -> tuple[Ints, Ints]:
        """Bundles whose key an earlier one has, ascending, and the first that has it."""
        keys = np.concatenate([np.empty(0, np.uint64), *self._keys])
        self._keys.clear()
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        where = 1 + np.flatnonzero(keys[1:] == keys[:-1])
        begins = np.diff(where, prepend=-1) > 1  # each run of repeats lies behind the first of its key
        firsts = order[where[begins] - 1][np.cumsum(begins) - 1]
        ascending = np.argsort(order[where])
        return order[where][ascending], firsts[ascending]

    def _place(self, number: int, starts: Ints) -> tuple[str, int]:
        part = int(np.searchsorted(starts, number, side="right")) - 1
        return self._parts[part].place(number - int(starts[part]))

    def _refuse_collisions(
        self, repeats: Ints, firsts: Ints, ids_at: Callable[[Ints], Sequence[str]], starts: Ints
    ) -> None:
        for start in range(0, len(repeats), _COMPARED_AT_ONCE):
            at = slice(start, start + _COMPARED_AT_ONCE)
            for index, (mine, theirs) in enumerate(zip(ids_at(repeats[at]), ids_at(firsts[at]), strict=True)):
                if mine != theirs:
                    here, there = (place(*self._place(int(n[start + index]), starts)) for n in (repeats, firsts))
                    raise KeyCollisionError(
                        f"{here}: bundle {mine} has by chance the same key as bundle {theirs} of {there}: leave one of "
                        "the two out"
                    )

    def _in_order(self, repeats: Ints, firsts: Ints, inside: dict[int, Ints], starts: Ints) -> Iterator[RejectedRow]:
        if self._spool is not None:
            self._spool.seek(0)
        for number, part in enumerate(self._parts):
            which = inside.get(number, np.empty(0, dtype=int))
            rows = np.setdiff1d(np.arange(len(part.lines) + len(part.rejected_at)), part.rejected_at)
            again = rows[repeats[which] - starts[number]]
            for index in np.argsort(np.concatenate([part.rejected_at, again])).tolist():
                if index < len(part.rejected_at):
                    assert self._spool is not None
                    yield RejectedRow(**json.loads(self._spool.readline()))
                    continue
                pair = which[index - len(part.rejected_at)]
                file, line = self._place(int(repeats[pair]), starts)
                first = place(*self._place(int(firsts[pair]), starts))
                yield RejectedRow(file, line, f"repeats the bundle of {first!r}", "")

    def _say(self, reasons: ReasonCounts, first: list[RejectedRow], kept: int, on_invalid: str) -> None:
        rejected = reasons.total
        if not rejected:
            return
        summary = "".join(f"\n  {count} x {reason}" for reason, count in reasons.by_frequency().items())
        logger.warning("%d invalid rows, written to %s:%s", rejected, self.named, summary)
        if on_invalid != "fail" and kept:
            return
        more = rejected - len(first)
        raise InvalidBundlesError(
            "\n".join(
                [
                    f"{rejected} of {rejected + kept} rows are not valid bundles:",
                    *(f"  {place(row.file, row.line)}: {row.reason}" for row in first),
                    *([f"  and {more} more"] if more else []),
                    f"All of them are in {str(self.named)!r}."
                    + (" To leave them out, set data.on_invalid=skip." if kept else " No valid row is left."),
                ]
            )
        )


class Sorting:
    """Separates tables of `PARSED` into bundles and rejected rows, in the task that reads them."""

    def __init__(self) -> None:
        self._rows = 0
        self._rejected_at: list[int] = []
        self._rejects: list[str] = []
        self._keys: list[Keys] = []
        self._lines: list[Ints] = []
        self._file_of: list[Ints] = []
        self._files: dict[str, int] = {}

    @property
    def rejected(self) -> int:
        """Rejected rows so far."""
        return len(self._rejected_at)

    def bundles(self, table: pa.Table) -> pa.Table:
        """The bundles of the next table, a table of `BUNDLES`."""
        valid = table["reason"].is_null().combine_chunks()
        if valid.false_count:
            self._rejected_at += (self._rows + np.flatnonzero(~valid.to_numpy(zero_copy_only=False))).tolist()
            for row in table.filter(pc.invert(valid)).select(["file", "line", "reason", "text"]).to_pylist():
                self._rejects.append(_json_line(RejectedRow(**row)))
        self._rows += len(table)
        bundles = table.filter(valid).select(BUNDLES.names)
        self._keys.append(keys_of(bundles["bundle_id"].to_pylist()))
        self._lines.append(bundles["line"].to_numpy())
        files = bundles["file"].combine_chunks().dictionary_encode()
        known = [self._files.setdefault(file, len(self._files)) for file in files.dictionary.to_pylist()]
        self._file_of.append(np.array(known, dtype=np.int32)[files.indices.to_numpy()])
        return bundles

    def result(self) -> PartRead:
        """What was sorted."""
        return PartRead(
            np.array(self._rejected_at, dtype=np.int64),
            "".join(self._rejects),
            np.concatenate([np.empty(0, np.uint64), *self._keys]),
            np.concatenate([np.empty(0, np.int64), *self._lines]),
            list(self._files),
            np.concatenate(self._file_of) if len(self._files) > 1 else None,
        )


def _json_line(row: RejectedRow) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"
