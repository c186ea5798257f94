"""TokenRows -> Batch: sequences of several bundles packed into one row, with every part named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mlc_ray.errors import MlcRayError
from mlc_ray.types import Batch, PackedPrompts, PackedResponses, PackedSequences, TokenRow


class BatchError(MlcRayError, ValueError):
    """A bundle lacks what the batch needs; the message names the bundle."""


def collate(
    rows: Sequence[TokenRow],
    *,
    languages: Sequence[str],
    weights: Sequence[float],
    needs_rejected: bool,
    reference: Mapping[str, tuple[float, float]] | None,
) -> Batch:
    """Pack B token rows into a `Batch` (shapes as documented there; ids int64, weights and log-probs float32, on CPU).

    `languages` are the L columns of the prompt grid; `weights` [B] the bundles' weights; `reference` maps bundle_id
    to the summed log-probs (chosen, rejected) of the frozen reference, in nats, or is None where the loss needs none.
    Raises `BatchError` if there are no rows, if a bundle lacks an answer, has a language outside `languages`, or has no
    reference entry.
    """
    if not rows or len(rows) != len(weights):
        raise BatchError(f"a batch needs one weight per bundle and at least one bundle: {len(rows)=}, {len(weights)=}")
    reference_chosen = reference_rejected = None
    if reference is not None:
        pairs = [_reference_of(row, reference) for row in rows]
        reference_chosen = torch.tensor([chosen for chosen, _ in pairs], dtype=torch.float32)
        if needs_rejected:
            reference_rejected = torch.tensor([rejected for _, rejected in pairs], dtype=torch.float32)
    return Batch(
        bundle_ids=tuple(row.bundle_id for row in rows),
        languages=tuple(languages),
        weight=torch.tensor(weights, dtype=torch.float32),
        chosen=_pack_responses(rows, "chosen"),
        rejected=_pack_responses(rows, "rejected") if needs_rejected else None,
        prompts=_pack_prompts(rows, languages),
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
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


def _pack_prompts(rows: Sequence[TokenRow], languages: Sequence[str]) -> PackedPrompts:
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


def _reference_of(row: TokenRow, reference: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    try:
        return reference[row.bundle_id]
    except KeyError:
        raise BatchError(
            f"bundle {row.bundle_id} has no reference log-probs among the {len(reference)} cached ones; "
            "compute them again for this data"
        ) from None
