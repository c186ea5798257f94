"""Token rows -> Batch: the prompts and answers of several bundles as one prefix tree, with every part named.

Ids go from Arrow's buffers to tensors by index arithmetic; none of them becomes a Python number on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mlc_ray.data.ragged import Ints, common_start, ranges, starts_of
from mlc_ray.data.tables import rows_to_table
from mlc_ray.data.trees import make_tree
from mlc_ray.errors import MlcRayError
from mlc_ray.types import Answers, Batch, Kind, Prompts, ReferenceRows, TokenRow, Tree

TokenRows: TypeAlias = pa.Table | Sequence[TokenRow]
"""A table of `mlc_ray.data.tables.TOKENS`, or (for small calls) token rows."""


class BatchError(MlcRayError, ValueError):
    """A bundle lacks what the batch needs; the message names the bundle."""


def collate(
    rows: TokenRows,
    *,
    languages: Sequence[str],
    weights: Sequence[float],
    needs_rejected: bool,
    reference: ReferenceRows | None,
    tap: bool,
    term_weights: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
) -> Batch:
    """B token rows as a `Batch` (shapes as documented there; ids int64, weights and log-probs float32, on CPU).

    Args:
        rows: a table of `TOKENS`, or token rows.
        languages: the L columns of the prompt grid.
        weights: the bundles' weights, [B].
        needs_rejected: whether the loss reads rejected answers.
        reference: what the frozen reference says of these bundles; None where the loss needs no reference.
        tap: whether the prompts in all languages are read, or only those that are answered.
        term_weights: the bundles' weights in terms on representations, [B]; None for `weights`.
        groups: the group of each bundle, [B]; None where no term needs any.

    Raises:
        BatchError: there are no rows, or a bundle lacks an answer or has a language outside `languages`.
    """
    table = _table(rows)
    if not len(table) or len(table) != len(weights):
        raise BatchError(
            f"a batch needs one weight per bundle and at least one bundle: {len(table)} bundles, {len(weights)} weights"
        )
    bundle_ids: list[str] = table["bundle_id"].to_pylist()
    kinds: list[Kind] = table["kind"].to_pylist()
    said = reference or ReferenceRows()
    grid = _Grid.of(table, languages)
    tree, answers, prompts = _plant(table, grid, ("chosen", "rejected") if needs_rejected else ("chosen",), tap=tap)
    return Batch(
        bundle_ids=tuple(bundle_ids),
        kinds=tuple(kinds),
        languages=tuple(languages),
        weight=torch.tensor(weights, dtype=torch.float32),
        term_weight=torch.tensor(weights if term_weights is None else term_weights, dtype=torch.float32),
        groups=tuple(groups) if groups is not None else None,
        tree=tree,
        chosen=answers[0],
        rejected=answers[1] if needs_rejected else None,
        prompts=prompts if tap else None,
        reference_chosen=_float32(said.chosen),
        reference_rejected=_float32(said.rejected) if needs_rejected else None,
        reference_state=_float32(said.state),
    )


def collate_prompts(rows: TokenRows, languages: Sequence[str]) -> tuple[Tree, Prompts]:
    """All prompts of the rows, without answers.

    Raises:
        BatchError: a bundle has a language outside `languages`, the grid's L.
    """
    table = _table(rows)
    tree, _, prompts = _plant(table, _Grid.of(table, languages), (), tap=True)
    return tree, prompts


@dataclass(frozen=True)
class _Grid:
    """All P prompts of a table: ids one after another, each one's start, length, tapped token, bundle and column."""

    ids: Ints
    starts: Ints
    lengths: Ints
    tapped: Ints
    bundle: Ints
    column: Ints

    @classmethod
    def of(cls, table: pa.Table, languages: Sequence[str]) -> _Grid:
        prompts = table["prompts"].combine_chunks().flatten()
        lengths = _lengths(prompts)
        bundle = np.repeat(np.arange(len(table)), _lengths(table["languages"]))
        columns = {code: index for index, code in enumerate(languages)}
        codes = table["languages"].combine_chunks().flatten().to_pylist()
        column = np.array([columns.get(code, -1) for code in codes], dtype=np.int64)
        if (column < 0).any():
            first = int(bundle[int(np.argmin(column))])
            outside = sorted(set(table["languages"][first].as_py()) - set(columns))
            raise BatchError(
                f"bundle {table['bundle_id'][first].as_py()} has languages {outside!r} "
                f"outside the grid {list(languages)!r}"
            )
        tapped = _integers(table["tapped"].combine_chunks().flatten())
        return cls(_integers(prompts.flatten()), starts_of(lengths), lengths, tapped, bundle, column)


def _plant(table: pa.Table, grid: _Grid, names: Sequence[str], *, tap: bool) -> tuple[Tree, list[Answers], Prompts]:
    """The tree of B bundles, where their answers called `names` are in it, and (if `tap`) where their prompts are.

    The row: the head that all its prompts begin with (where there is one), the prompts that are answered, the answers
    of each name, the other prompts.
    """
    n_bundles = len(table)
    found = [_answers(table, name) for name in names]
    answered = starts_of(_lengths(table["languages"])) + _integers(table["response_prompt"]) if names else np.arange(0)
    order = np.lexsort((grid.column, grid.bundle)) if tap else answered
    others = order[~np.isin(order, answered)]
    prompts = np.concatenate([answered, others])
    # Short of the tapped token, which is of its prompt alone. A single prompt shares its beginning with none.
    head = common_start(grid.ids, grid.starts[prompts], grid.tapped[prompts]) if len(prompts) > 1 else 0
    heads = 1 if head else 0
    continued = np.arange(heads, heads + len(answered))

    sources = [grid.ids, *(ids for ids, _ in found)]
    offsets = starts_of(np.array([len(ids) for ids in sources]))[1:]
    starts, lengths, parents = np.concatenate(
        [
            _segments(grid.starts[prompts[:heads]], head, -1),
            _segments(grid.starts[answered] + head, grid.lengths[answered] - head, heads - 1),
            # An answer's last token predicts nothing.
            *(_segments(at + starts_of(n), n - 1, continued) for at, (_, n) in zip(offsets, found, strict=True)),
            _segments(grid.starts[others] + head, grid.lengths[others] - head, heads - 1),
        ],
        axis=1,
    )
    places = starts_of(lengths)
    there = lengths > 0  # an answer of one token has nothing in the row
    last_answer = len(lengths) - len(others)
    tree = make_tree(
        np.concatenate(sources)[ranges(starts, lengths)],
        lengths[there],
        parents[there],
        answers=heads + len(answered),
        prompt_only=int(there[:last_answer].sum()),
    )

    segment = np.empty(len(grid.starts), dtype=np.int64)
    segment[answered], segment[others] = continued, np.arange(last_answer, len(lengths))
    ends = places[continued] + lengths[continued] - 1
    answers = []
    for index, (ids, counts) in enumerate(found):
        first = places[heads + n_bundles * (1 + index) : heads + n_bundles * (2 + index)]
        predicting = ranges(first - 1, counts)
        predicting[starts_of(counts)] = ends  # the prompt's last token predicts the answer's first
        bundle = np.repeat(np.arange(n_bundles), counts)
        answers.append(Answers(torch.from_numpy(predicting), torch.from_numpy(ids), torch.from_numpy(bundle)))
    tapped = places[segment[order]] + grid.tapped[order] - head
    where = (tapped, grid.bundle[order], grid.column[order])
    return tree, answers, Prompts(*(torch.from_numpy(part) for part in where))


def _segments(starts: Ints, lengths: Ints | int, parents: Ints | int) -> Ints:
    """Some segments [3, n]: where in the sources each begins, how long it is, and which segment it continues."""
    return np.stack(np.broadcast_arrays(starts, lengths, parents))


def _answers(table: pa.Table, name: str) -> tuple[Ints, Ints]:
    """Ids of each bundle's answer called `name`, one after another, and their lengths."""
    answers = table[name].combine_chunks()
    lengths = _lengths(answers)
    if (missing := (lengths == 0) | (_integers(table["response_prompt"]) < 0)).any():
        bundle = table["bundle_id"][int(np.argmax(missing))].as_py()
        raise BatchError(f"bundle {bundle} has no {name!r} answer, which this loss needs")
    return _integers(answers.flatten()), lengths


def _table(rows: TokenRows) -> pa.Table:
    return rows if isinstance(rows, pa.Table) else rows_to_table(rows)


def _lengths(lists: pa.ListArray | pa.ChunkedArray) -> Ints:
    """Number of values of each list; 0 for null."""
    return _integers(pc.fill_null(pc.list_value_length(lists), 0))


def _integers(values: pa.Array | pa.ChunkedArray) -> Ints:
    """As a contiguous array of its own, for tensors that are written to."""
    return np.array(values.to_numpy(), dtype=np.int64)


def _float32(column: np.ndarray | None) -> torch.Tensor | None:
    return None if column is None else torch.from_numpy(column.astype(np.float32))
