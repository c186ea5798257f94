"""Token rows -> Batch: sequences of several bundles packed into one row, with every part named.

Ids go from Arrow's buffers to tensors by index arithmetic; none of them becomes a Python number on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mlc_ray.data.tables import rows_to_table
from mlc_ray.errors import MlcRayError
from mlc_ray.types import Batch, Kind, PackedPrompts, PackedResponses, PackedSequences, ReferenceRow, TokenRow

Ints = npt.NDArray[np.int64]
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
    reference: Mapping[str, ReferenceRow] | None,
) -> Batch:
    """Pack B token rows into a `Batch` (shapes as documented there; ids int64, weights and log-probs float32, on CPU).

    Args:
        rows: a table of `TOKENS`, or token rows.
        languages: the L columns of the prompt grid.
        weights: the bundles' weights, [B].
        needs_rejected: whether the loss reads rejected answers.
        reference: what the frozen reference says of each bundle_id; None where the loss needs no reference.

    Raises:
        BatchError: there are no rows, or a bundle lacks an answer, has a language outside `languages`, or has no
            reference entry.
    """
    table = _table(rows)
    if not len(table) or len(table) != len(weights):
        raise BatchError(
            f"a batch needs one weight per bundle and at least one bundle: {len(table)} bundles, {len(weights)} weights"
        )
    bundle_ids: list[str] = table["bundle_id"].to_pylist()
    kinds: list[Kind] = table["kind"].to_pylist()
    cached = [_reference_of(name, reference) for name in bundle_ids] if reference is not None else []
    return Batch(
        bundle_ids=tuple(bundle_ids),
        kinds=tuple(kinds),
        languages=tuple(languages),
        weight=torch.tensor(weights, dtype=torch.float32),
        chosen=_pack_responses(table, "chosen"),
        rejected=_pack_responses(table, "rejected") if needs_rejected else None,
        prompts=pack_prompts(table, languages),
        reference_chosen=_column(cached, "chosen"),
        reference_rejected=_column(cached, "rejected") if needs_rejected else None,
        reference_state=_column(cached, "state"),
    )


def pack_prompts(rows: TokenRows, languages: Sequence[str]) -> PackedPrompts:
    """All prompts of the rows in a packed row, by bundle and then by column of the grid.

    Raises:
        BatchError: a bundle has a language outside `languages`, the grid's L.
    """
    table = _table(rows)
    ids, starts, lengths = _prompts(table)
    bundle = np.repeat(np.arange(len(table)), _lengths(table["languages"]))
    columns = {code: index for index, code in enumerate(languages)}
    codes = table["languages"].combine_chunks().flatten().to_pylist()
    column = np.array([columns.get(code, -1) for code in codes], dtype=np.int64)
    if (column < 0).any():
        first = int(bundle[int(np.argmin(column))])
        outside = sorted(set(table["languages"][first].as_py()) - set(columns))
        raise BatchError(
            f"bundle {table['bundle_id'][first].as_py()} has languages {outside!r} outside the grid {list(languages)!r}"
        )
    order = np.lexsort((column, bundle))
    tapped = _integers(table["tapped"].combine_chunks().flatten())
    sequences = _pack(ids[_ranges(starts[order], lengths[order])], lengths[order])
    return PackedPrompts(
        sequences=sequences,
        tapped=torch.from_numpy(_starts(lengths[order]) + tapped[order]),
        bundle_of_prompt=torch.from_numpy(bundle[order]),
        language_of_prompt=torch.from_numpy(column[order]),
    )


def _pack_responses(table: pa.Table, name: str) -> PackedResponses:
    """Each bundle's prompt in its response language, and behind it the answer called `name`."""
    answers = table[name].combine_chunks()
    answer_lengths = _lengths(answers)
    which = _integers(table["response_prompt"])
    if (missing := (answer_lengths == 0) | (which < 0)).any():
        bundle = table["bundle_id"][int(np.argmax(missing))].as_py()
        raise BatchError(f"bundle {bundle} has no {name!r} answer, which this loss needs")
    prompt_ids, prompt_starts, all_prompt_lengths = _prompts(table)
    prompt = _starts(_lengths(table["languages"])) + which
    prompt_lengths = all_prompt_lengths[prompt]
    answer_ids = _integers(answers.flatten())
    # Both in one array, and out of it prompt, answer, prompt, answer, ...
    starts = np.stack([prompt_starts[prompt], len(prompt_ids) + _starts(answer_lengths)], axis=1).ravel()
    lengths = np.stack([prompt_lengths, answer_lengths], axis=1).ravel()
    whole = prompt_lengths + answer_lengths
    ids = np.concatenate([prompt_ids, answer_ids])[_ranges(starts, lengths)]
    # Position t predicts the token at t + 1: the prompt's last token predicts the answer's first.
    first = _starts(whole) + prompt_lengths - 1
    return PackedResponses(
        sequences=_pack(ids, whole),
        predicting=torch.from_numpy(_ranges(first, answer_lengths)),
        targets=torch.from_numpy(answer_ids),
        bundle_of_target=torch.from_numpy(np.repeat(np.arange(len(table)), answer_lengths)),
    )


def _pack(ids: Ints, lengths: Ints) -> PackedSequences:
    """Sequences that lie one after another in `ids` as a row [1, T]; position_ids restart at 0 at each."""
    positions = _ranges(np.zeros_like(lengths), lengths)
    return PackedSequences(
        torch.from_numpy(ids)[None], torch.from_numpy(positions)[None], tuple(int(length) for length in lengths)
    )


def _table(rows: TokenRows) -> pa.Table:
    return rows if isinstance(rows, pa.Table) else rows_to_table(rows)


def _prompts(table: pa.Table) -> tuple[Ints, Ints, Ints]:
    """Ids of all prompts one after another, and each prompt's start in them and length."""
    prompts = table["prompts"].combine_chunks().flatten()
    lengths = _lengths(prompts)
    return _integers(prompts.flatten()), _starts(lengths), lengths


def _lengths(lists: pa.ListArray | pa.ChunkedArray) -> Ints:
    """Number of values of each list; 0 for null."""
    return _integers(pc.fill_null(pc.list_value_length(lists), 0))


def _integers(values: pa.Array | pa.ChunkedArray) -> Ints:
    """As a contiguous array of its own, for tensors that are written to."""
    return np.array(values.to_numpy(), dtype=np.int64)


def _starts(lengths: Ints) -> Ints:
    """Where each of several runs begins when they lie one after another."""
    starts: Ints = np.cumsum(lengths) - lengths
    return starts


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, ... for each run, one after another."""
    ranges: Ints = np.repeat(starts - _starts(lengths), lengths) + np.arange(int(lengths.sum()))
    return ranges


def _column(cached: Sequence[ReferenceRow], name: str) -> torch.Tensor | None:
    values = [getattr(row, name) for row in cached]
    if not values or values[0] is None:
        return None
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _reference_of(bundle_id: str, reference: Mapping[str, ReferenceRow]) -> ReferenceRow:
    try:
        return reference[bundle_id]
    except KeyError:
        raise BatchError(
            f"bundle {bundle_id} is not among the {len(reference)} that the reference was cached for; "
            "compute them again for this data"
        ) from None
