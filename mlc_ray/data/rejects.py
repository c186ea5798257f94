"""What a driver keeps while a data set is read: numbers of every bundle, and why rows were rejected.

Of each bundle that is 12 bytes: its key, 8, and its line, 4 or fewer; where a source joins files, 4 more for the number
of its file. While repeats are found by sorting, at the end, it is 37 bytes (measured with four million bundles): 370 MB
for ten million. Of rejected rows it keeps at most 50 reasons: the tasks write them down, and their files are joined.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlc_ray.data.bundles import NAMED_FIRST, RejectedRow, place
from mlc_ray.data.ragged import Ints
from mlc_ray.data.tables import BUNDLES, Keys, keys_of
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place

OTHER_REASONS = "other reasons"
_REASONS = 50
_COMPARED_AT_ONCE = 1 << 16
_NO_KEYS: Keys = np.empty(0, np.uint64)
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")

logger = logging.getLogger(__name__)


class InvalidBundlesError(MlcRayError, ValueError):
    """Some or all rows are not valid bundles; the message names the first few and the rejects file."""


class KeyCollisionError(MlcRayError, ValueError):
    """Two bundles that differ have the same key; the message names both."""


def count(reasons: Counter[str], reason: str, number: int = 1) -> None:
    """Count a reason; values and numbers in it do not tell reasons apart, and at most 50 are told apart."""
    plain = _VALUES.sub("…", reason)
    reasons[plain if plain in reasons or len(reasons) < _REASONS else OTHER_REASONS] += number


@dataclass(frozen=True)
class PartRead:
    """What a task says of the part of a source that it read, of B bundles.

    `keys` and `lines` [B] are of the bundles, and `file_of` [B] (None: all are of `files[0]`) indices into `files`.
    `reasons` counts why rows were rejected, `first` has the first of those rows, and `rejects` all, as JSON lines.
    """

    keys: Keys
    lines: npt.NDArray[Any]
    files: list[str]
    file_of: Ints | None
    reasons: Counter[str]
    first: list[RejectedRow]
    rejects: str


class Ledger:
    """Takes down what tasks say of the parts of all sources, in order, and finds repeated bundles."""

    def __init__(self) -> None:
        self.bundles = 0
        self.reasons: Counter[str] = Counter()
        self._first: list[RejectedRow] = []
        self._keys: list[Keys] = []
        self._parts: list[PartRead] = []

    def add(self, read: PartRead) -> None:
        """Take down the next part; of rejected rows only what a message says."""
        lines = read.lines.astype(np.min_scalar_type(int(read.lines.max(initial=0))))
        self._keys.append(read.keys)
        self._parts.append(replace(read, keys=_NO_KEYS, lines=lines, rejects="", reasons=Counter(), first=[]))
        self._first = [*self._first, *read.first][:NAMED_FIRST]
        for reason, number in read.reasons.items():
            count(self.reasons, reason, number)
        self.bundles += len(lines)

    def close(
        self,
        ids_at: Callable[[Ints], Sequence[str]] | None,
        on_invalid: str,
        rejects: Iterable[str],
        path: Path,
        *,
        named: Path | Place | None = None,
    ) -> dict[int, Ints]:
        """Repeated bundles, by part as indices among its bundles; `reasons` counts them too.

        Rejected rows are in `path` then, if there were any: what is no bundle in the order of the sources, and behind
        it the repeats in theirs.

        Args:
            ids_at: ids of bundles by their number in the data set, to see whether equal keys are of equal bundles; None
                where rows were rejected and that is fatal, which is said instead.
            on_invalid: `fail` or `skip`, as data.on_invalid.
            rejects: the JSON lines of the parts, in order.
            path: where to write them; an older file there is removed.
            named: what messages call it (None: `path`).

        Raises:
            KeyCollisionError: two ids have the same key.
            InvalidBundlesError: `on_invalid` is "fail" and a row was rejected, or no bundle is left.
        """
        starts = np.cumsum([0, *(len(part.lines) for part in self._parts)])
        repeats, firsts = self._repeats()
        if ids_at is not None:
            self._refuse_collisions(repeats, firsts, ids_at, starts)
        path.unlink(missing_ok=True)
        if self.reasons or len(repeats):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(rejects)
                for repeat, first in zip(repeats.tolist(), firsts.tolist(), strict=True):
                    reason = f"repeats the bundle of {place(*self._place(first, starts))!r}"
                    row = RejectedRow(*self._place(repeat, starts), reason, "")
                    count(self.reasons, reason)
                    self._first = [*self._first, row][:NAMED_FIRST]
                    file.write(_json_line(row))
        self._say(self.bundles - len(repeats), on_invalid, named or path)
        parts = np.searchsorted(starts, repeats, side="right") - 1
        return {int(part): repeats[parts == part] - starts[part] for part in np.unique(parts)}

    def columns(self, part: int) -> tuple[list[str], npt.NDArray[Any]]:
        """File and line of each bundle of a part."""
        kept = self._parts[part]
        of = np.zeros(len(kept.lines), dtype=int) if kept.file_of is None else kept.file_of
        return [kept.files[index] for index in of], kept.lines

    def _repeats(self) -> tuple[Ints, Ints]:
        """Bundles whose key an earlier one has, ascending, and the first that has it."""
        keys = np.concatenate([_NO_KEYS, *self._keys])
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
        kept, index = self._parts[part], number - int(starts[part])
        return kept.files[0 if kept.file_of is None else int(kept.file_of[index])], int(kept.lines[index])

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

    def _say(self, kept: int, on_invalid: str, named: Path | Place) -> None:
        rejected = self.reasons.total()
        if not rejected:
            return
        summary = "".join(f"\n  {number} x {reason}" for reason, number in self.reasons.most_common())
        logger.warning("%d invalid rows, written to %s:%s", rejected, named, summary)
        if on_invalid != "fail" and kept:
            return
        more = rejected - len(self._first)
        raise InvalidBundlesError(
            "\n".join(
                [
                    f"{rejected} of {rejected + kept} rows are not valid bundles:",
                    *(f"  {place(row.file, row.line)}: {row.reason}" for row in self._first),
                    *([f"  and {more} more"] if more else []),
                    f"All of them are in {str(named)!r}."
                    + (" To leave them out, set data.on_invalid=skip." if kept else " No valid row is left."),
                ]
            )
        )


class Sorting:
    """Separates tables of `PARSED` into bundles and rejected rows, in the task that reads them."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: list[RejectedRow] = []
        self._rejects: list[str] = []
        self._keys: list[Keys] = []
        self._lines: list[Ints] = []
        self._file_of: list[Ints] = []
        self._files: dict[str, int] = {}

    def bundles(self, table: pa.Table) -> pa.Table:
        """The bundles of the next table, a table of `BUNDLES`."""
        valid = table["reason"].is_null().combine_chunks()
        if valid.false_count:
            for row in table.filter(pc.invert(valid)).select(["file", "line", "reason", "text"]).to_pylist():
                rejected = RejectedRow(**row)
                count(self.reasons, rejected.reason)
                self._first = [*self._first, rejected][:NAMED_FIRST]
                self._rejects.append(_json_line(rejected))
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
            keys=np.concatenate([_NO_KEYS, *self._keys]),
            lines=np.concatenate([np.empty(0, np.int64), *self._lines]),
            files=list(self._files),
            file_of=np.concatenate(self._file_of) if len(self._files) > 1 else None,
            reasons=self.reasons,
            first=self._first,
            rejects="".join(self._rejects),
        )


def _json_line(row: RejectedRow) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"
