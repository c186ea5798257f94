"""Whether every bundle has the answers that the loss reads: counted while tokenising, said before a model is loaded."""

from __future__ import annotations

from mlc_ray.config import TrainConfig
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.objective import Objective


class MissingAnswersError(MlcRayError):
    """Bundles lack answers that the loss needs; the message names the first few, the loss, and the fix."""


def check_answers(config: TrainConfig, tokens: TokenArtifact) -> None:
    """Make sure that each bundle has a chosen answer and, where the loss reads them, a rejected one.

    Only the manifest is read. A bundle without a chosen answer has no rejected one.

    Raises:
        MissingAnswersError: Some have not.
    """
    needed = ("chosen", "rejected") if Objective(config).needs_rejected else ("chosen",)
    lacking = tokens.counts.lacking
    if not any(lacking[answer] for answer in needed):
        return
    first = tokens.lacking[needed[-1]]
    named = [
        f"  {one.place}: bundle {one.bundle_id} has no {' and no '.join(a for a in one.absent if a in needed)} answer"
        for one in first
    ]
    more = lacking[needed[-1]] - len(named)
    counts = ", ".join(
        f"without a {answer} answer: {lacking[answer]} of {len(tokens)}" for answer in needed if lacking[answer]
    )
    fix = "Complete these rows or leave them out"
    if not lacking["chosen"]:
        fix = "Complete these rows, leave them out, or choose a loss that needs no rejected answers: objective.loss=sft"
    raise MissingAnswersError(
        "\n".join(
            [
                f"objective.loss={config.objective.loss!r} needs {' and '.join(needed)} answers; bundles {counts}",
                *named,
                *([f"  and {more} more"] if more else []),
                f"{fix}.",
            ]
        )
    )
