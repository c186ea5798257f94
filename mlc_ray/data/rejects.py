"""What a driver keeps while a data set is read: numbers of every bundle, and why rows were rejected.

Of each bundle that is 12 bytes: its key, 8, and its line, 4 or fewer; where a source joins files, 1 to 4 more for the
number of its file. While repeats are found by sorting, at the end, it is 37 bytes (measured with four million bundles):
370 MB for ten million. Of rejected rows it keeps at most 50 reasons: the tasks write them down, and their files are
joined.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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


@dataclass
class Rejects:
    """Why rows were rejected, and the first of them."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[RejectedRow] = field(default_factory=list)

    def reject(self, row: RejectedRow) -> str:
        """Count one more row; what a file of rejected rows says of it, a line of JSON."""
        self.add_rejects(Rejects(Counter([row.reason]), [row]))
        return json.dumps(asdict(row), ensure_ascii=False) + "\n"

    def add_rejects(self, other: Rejects) -> None:
        """Count others, which come behind these."""
        for reason, number in other.reasons.items():
            count(self.reasons, reason, number)
        self.first = [*self.first, *other.first][:NAMED_FIRST]


@dataclass
class PartRead(Rejects):
    """What a task says of the part of a source that it reads, table after table.

    Of the bundles of each table: `keys`, `lines`, and `file_of`, indices into `files`. `rejects` has all rejected rows,
    as JSON lines.
    """

    keys: list[Keys] = field(default_factory=list)
    lines: list[Ints] = field(default_factory=list)
    file_of: list[Ints] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    rejects: list[str] = field(default_factory=list)

    def bundles(self, table: pa.Table) -> pa.Table:
        """Of the next table, of `PARSED`, the bundles, a table of `BUNDLES`; what is rejected is taken down."""
        valid = table["reason"].is_null().combine_chunks()
        if valid.false_count:
            rejected = table.filter(pc.invert(valid)).select(["file", "line", "reason", "text"])
            self.rejects += [self.reject(RejectedRow(**row)) for row in rejected.to_pylist()]
        bundles = table.filter(valid).select(BUNDLES.names)
        self.keys.append(keys_of(bundles["bundle_id"].to_pylist()))
        self.lines.append(bundles["line"].to_numpy())
        files = bundles["file"].combine_chunks().dictionary_encode()
        self.files += [file for file in files.dictionary.to_pylist() if file not in self.files]
        known = [self.files.index(file) for file in files.dictionary.to_pylist()]
        self.file_of.append(np.array(known, dtype=np.int64)[files.indices.to_numpy()])
        return bundles


class _Places(NamedTuple):
    """Where the bundles of a part stood: `lines` [B], and `file_of` [B], indices into `files`."""

    lines: npt.NDArray[Any]
    files: list[str]
    file_of: npt.NDArray[Any]


@dataclass
class Ledger(Rejects):
    """Takes down what tasks say of the parts of all sources, in order, and finds repeated bundles."""

    bundles: int = 0
    _keys: list[Keys] = field(default_factory=list)
    _parts: list[_Places] = field(default_factory=list)

    def add(self, read: PartRead) -> None:
        """Take down the next part; of rejected rows only what a message says."""
        lines, of = (np.concatenate([np.empty(0, np.int64), *each]) for each in (read.lines, read.file_of))
        # The number of one file for all takes no memory.
        of = _narrowed(of) if len(read.files) > 1 else np.broadcast_to(np.uint8(0), of.shape)
        self._parts.append(_Places(_narrowed(lines), read.files, of))
        self._keys += read.keys
        self.bundles += len(lines)
        self.add_rejects(read)

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
        repeats, firsts = self._repeats()
        path.unlink(missing_ok=True)
        if not self.reasons and not len(repeats):
            return {}
        starts = np.cumsum([0, *(len(part.lines) for part in self._parts)])
        if ids_at is not None:
            self._refuse_collisions(repeats, firsts, ids_at, starts)
        self._write(path, rejects, repeats, firsts, starts)
        self._say(self.bundles - len(repeats), on_invalid, named or path)
        parts = np.searchsorted(starts, repeats, side="right") - 1
        return {int(part): repeats[parts == part] - starts[part] for part in np.unique(parts)}

    def columns(self, part: int) -> tuple[list[str], npt.NDArray[Any]]:
        """File and line of each bundle of a part."""
        lines, files, file_of = self._parts[part]
        return [files[index] for index in file_of], lines

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

    def _write(self, path: Path, rejects: Iterable[str], repeats: Ints, firsts: Ints, starts: Ints) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(rejects)
            for repeat, first in zip(repeats.tolist(), firsts.tolist(), strict=True):
                reason = f"repeats the bundle of {place(*self._place(first, starts))!r}"
                file.write(self.reject(RejectedRow(*self._place(repeat, starts), reason, "")))

    def _place(self, number: int, starts: Ints) -> tuple[str, int]:
        part = int(np.searchsorted(starts, number, side="right")) - 1
        (lines, files, file_of), index = self._parts[part], number - int(starts[part])
        return files[file_of[index]], int(lines[index])

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
        summary = "".join(f"\n  {number} x {reason}" for reason, number in self.reasons.most_common())
        logger.warning("%d invalid rows, written to %s:%s", rejected, named, summary)
        if on_invalid != "fail" and kept:
            return
        more = rejected - len(self.first)
        raise InvalidBundlesError(
            "\n".join(
                [
                    f"{rejected} of {rejected + kept} rows are not valid bundles:",
                    *(f"  {place(row.file, row.line)}: {row.reason}" for row in self.first),
                    *([f"  and {more} more"] if more else []),
                    f"All of them are in {str(named)!r}."
                    + (" To leave them out, set data.on_invalid=skip." if kept else " No valid row is left."),
                ]
            )
        )


def _narrowed(numbers: Ints) -> npt.NDArray[Any]:
    """The same in as few bytes as the largest takes."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
