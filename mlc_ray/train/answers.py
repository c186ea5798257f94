"""Whether every bundle has the answers that the loss reads: known from token lengths, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlc_ray.config import SourceSection, TrainConfig
from mlc_ray.data.sources import places_of
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.objective import Objective

_NAMED_FIRST = 5


class MissingAnswersError(MlcRayError):
    """Bundles lack answers that the loss needs; the message names the first few, the loss, and the fix."""


def check_answers(config: TrainConfig, tokens: TokenArtifact, sources: Sequence[SourceSection]) -> None:
    """Make sure that each bundle has a chosen answer and, where the loss reads them, a rejected one.

    `tokens` are those of `sources`. The artefact does not know where its bundles stood, so the sources are read again,
    up to the last bundle that the message names; without a fault nothing is read but lengths.

    Raises:
        MissingAnswersError: Some have not.
        BundleFileError: They have not, and a source can no longer be read.
    """
    lengths = tokens.lengths()
    lacking = {"chosen": (lengths.chosen == 0) | (lengths.answered == 0)}
    if Objective(config).needs_rejected:
        lacking["rejected"] = lengths.rejected == 0
    faulty = np.flatnonzero(np.any(list(lacking.values()), axis=0))
    if not len(faulty):
        return
    first = tokens.table(faulty[:_NAMED_FIRST].tolist())["bundle_id"].to_pylist()
    places = places_of(first, sources)
    named = []
    for row, name in zip(faulty[:_NAMED_FIRST], first, strict=True):
        absent = " and no ".join(answer for answer, lack in lacking.items() if lack[row])
        named.append(f"  {places[name]}: bundle {name} has no {absent} answer")
    more = len(faulty) - len(named)
    counts = ", ".join(
        f"without a {answer} answer: {int(lack.sum())} of {len(tokens)}"
        for answer, lack in lacking.items()
        if lack.any()
    )
    fix = "Complete these rows or leave them out"
    if not lacking["chosen"].any():
        fix = "Complete these rows, leave them out, or choose a loss that needs no rejected answers: objective.loss=sft"
    raise MissingAnswersError(
        "\n".join(
            [
                f"objective.loss={config.objective.loss!r} needs {' and '.join(lacking)} answers; bundles {counts}",
                *named,
                *([f"  and {more} more"] if more else []),
                f"{fix}.",
            ]
        )
    )
