"""TokenRows -> Batch: sequences of several bundles packed into one row, with every part named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from mlc_ray.errors import MlcRayError
from mlc_ray.types import Batch, PackedPrompts, PackedResponses, PackedSequences, ReferenceRow, TokenRow


class BatchError(MlcRayError, ValueError):
    """A bundle lacks what the batch needs; the message names the bundle."""


def collate(
    rows: Sequence[TokenRow],
    *,
    languages: Sequence[str],
    weights: Sequence[float],
    needs_rejected: bool,
    reference: Mapping[str, ReferenceRow] | None,
) -> Batch:
    """Pack B token rows into a `Batch` (shapes as documented there; ids int64, weights and log-probs float32, on CPU).

    `languages` are the L columns of the prompt grid; `weights` [B] the bundles' weights; `reference` maps bundle_id
    to what the frozen reference says of it, or is None where the loss needs no reference. Raises `BatchError` if there
    are no rows, if a bundle lacks an answer, has a language outside `languages`, or has no reference entry.
    """
    if not rows or len(rows) != len(weights):
        raise BatchError(f"a batch needs one weight per bundle and at least one bundle: {len(rows)=}, {len(weights)=}")
    cached = [_reference_of(row, reference) for row in rows] if reference is not None else []
    return Batch(
        bundle_ids=tuple(row.bundle_id for row in rows),
        kinds=tuple(row.kind for row in rows),
        languages=tuple(languages),
        weight=torch.tensor(weights, dtype=torch.float32),
        chosen=_pack_responses(rows, "chosen"),
        rejected=_pack_responses(rows, "rejected") if needs_rejected else None,
        prompts=pack_prompts(rows, languages),
        reference_chosen=_column(cached, "chosen"),
        reference_rejected=_column(cached, "rejected") if needs_rejected else None,
        reference_state=_column(cached, "state"),
    )


def pack(sequences: Iterable[Sequence[int]]) -> PackedSequences:
    """Sequences one after another in a row [1, T]; position_ids restart at 0 at each."""
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    for sequence in sequences:
        ids += sequence
        positions += range(len(sequence))
        lengths.append(len(sequence))
    return PackedSequences(torch.tensor([ids]), torch.tensor([positions]), tuple(lengths))


def _pack_responses(rows: Sequence[TokenRow], name: str) -> PackedResponses:
    sequences: list[list[int]] = []
    predicting: list[int] = []
    targets: list[int] = []
    bundle_of_target: list[int] = []
    offset = 0
    for index, row in enumerate(rows):
        answer = row.chosen if name == "chosen" else row.rejected
        if not answer or row.response_prompt < 0:
            raise BatchError(f"bundle {row.bundle_id} has no {name!r} answer, which this loss needs")
        prompt = row.prompts[row.response_prompt]
        # Position t predicts the token at t + 1: the prompt's last token predicts the answer's first.
        first = offset + len(prompt) - 1
        predicting += range(first, first + len(answer))
        targets += answer
        bundle_of_target += [index] * len(answer)
        sequences.append(prompt + answer)
        offset += len(prompt) + len(answer)
    return PackedResponses(
        sequences=pack(sequences),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        bundle_of_target=torch.tensor(bundle_of_target),
    )


def pack_prompts(rows: Sequence[TokenRow], languages: Sequence[str]) -> PackedPrompts:
    """All prompts of the rows in a packed row; raises `BatchError` for a language outside `languages`, the grid's L."""
    column = {code: index for index, code in enumerate(languages)}
    cells: list[tuple[int, int, list[int], int]] = []
    for bundle, row in enumerate(rows):
        if outside := sorted(set(row.languages) - set(column)):
            raise BatchError(f"bundle {row.bundle_id} has languages {outside!r} outside the grid {list(languages)!r}")
        order = sorted(range(len(row.languages)), key=lambda i, row=row: column[row.languages[i]])
        cells += [(bundle, column[row.languages[i]], row.prompts[i], row.tapped[i]) for i in order]
    tapped: list[int] = []
    offset = 0
    for _, _, prompt, index in cells:
        tapped.append(offset + index)
        offset += len(prompt)
    return PackedPrompts(
        sequences=pack(prompt for _, _, prompt, _ in cells),
        tapped=torch.tensor(tapped),
        bundle_of_prompt=torch.tensor([bundle for bundle, _, _, _ in cells]),
        language_of_prompt=torch.tensor([language for _, language, _, _ in cells]),
    )


def _column(cached: Sequence[ReferenceRow], name: str) -> torch.Tensor | None:
    values = [getattr(row, name) for row in cached]
    if not values or values[0] is None:
        return None
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _reference_of(row: TokenRow, reference: Mapping[str, ReferenceRow]) -> ReferenceRow:
    try:
        return reference[row.bundle_id]
    except KeyError:
        raise BatchError(
            f"bundle {row.bundle_id} is not among the {len(reference)} that the reference was cached for; "
            "compute them again for this data"
        ) from None
