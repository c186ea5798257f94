"""Whether every bundle has the answers that the loss reads: counted while tokenising, said before a model is loaded."""

from __future__ import annotations

import logging

from mlc_ray.config import TrainConfig
from mlc_ray.data.store import EVERY, GIVEN, Lacking, TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.objective import Objective

logger = logging.getLogger(__name__)


class MissingAnswersError(MlcRayError):
    """Bundles lack answers that the loss needs; the message names the first few, the loss, and the fix."""


def check_answers(config: TrainConfig, tokens: TokenArtifact) -> None:
    """Make sure that each bundle has the answers that the loss reads, chosen and rejected, in the languages needed.

    The manifest is read, and for a loss that relates languages to each other how many a bundle has. A bundle without a
    chosen answer has no rejected one. Languages of the settings that no bundle has are warned of.

    Raises:
        MissingAnswersError: Some have not, or of a loss that relates languages no bundle has two.
    """
    if absent := sorted(set(config.data.languages or ()) - set(tokens.languages)):
        logger.warning(
            "no bundle is read in %s, which data.languages names; bundles are in %s",
            ", ".join(absent), ", ".join(tokens.languages),
        )  # fmt: skip
    objective = Objective(config)
    loss = f"objective.loss={config.objective.loss!r}"
    needed = ("chosen", "rejected") if objective.alignment.needs_rejected else ("chosen",)
    _check(tokens, f"{loss} needs {' and '.join(needed)} answers", needed)
    if objective.alignment.pairing in ("own", "crossed"):
        in_every = f"{loss} as it is set needs {' and '.join(needed)} answers in each language of a bundle"
        _check_every(tokens, in_every, EVERY + needed[-1])
    if objective.alignment.pairing == "given":
        where_given = f"{loss} as it is set needs {' and '.join(needed)} answers in each language that has one"
        _check_every(tokens, where_given, GIVEN + needed[-1])
    if objective.alignment.needs_rows and objective.alignment.pairing != "response" and tokens.most_languages < 2:
        raise MissingAnswersError(
            f"{loss} relates a bundle's languages to each other, but none of the {len(tokens)} bundles has two; "
            "add prompts and answers in others, or keep more by data.languages"
        )
    wanted = objective.alignment.response_language
    if wanted is not None and (others := {code: n for code, n in tokens.counts.answered.items() if code != wanted}):
        counts = ", ".join(f"{code}: {n} of {len(tokens)}" for code, n in sorted(others.items()))
        raise MissingAnswersError(
            f"{loss} has the dominant language {wanted!r}, but bundles have other response languages ({counts}); set "
            "objective.dominant to theirs, or give these bundles that response_language"
        )


def _check(tokens: TokenArtifact, needs: str, needed: tuple[str, ...]) -> None:
    """Refuse bundles without an answer in the response language."""
    lacking = tokens.counts.lacking
    if not any(lacking[answer] for answer in needed):
        return
    first = tokens.lacking[needed[-1]]
    named = [f"has no {' and no '.join(answer for answer in one.absent if answer in needed)} answer" for one in first]
    counts = ", ".join(
        f"without a {answer} answer: {lacking[answer]} of {len(tokens)}" for answer in needed if lacking[answer]
    )
    fix = "Complete these rows or leave them out"
    if not lacking["chosen"]:
        fix = "Complete these rows, leave them out, or choose a loss that needs no rejected answers: objective.loss=sft"
    raise MissingAnswersError(_message(f"{needs}; bundles {counts}", first, named, lacking[needed[-1]], fix))


def _check_every(tokens: TokenArtifact, needs: str, kind: str) -> None:
    """Refuse bundles without an answer in one of the languages that need it."""
    number, answer = tokens.counts.lacking[kind], kind.rpartition(" ")[2]
    if not number:
        return
    first = tokens.lacking[kind]
    named = [f"has no {answer} answer in {', '.join(one.languages)}" for one in first]
    complete = "Complete these rows (answers: {LANGUAGE: {chosen: ..., rejected: ...}})"
    fix = f"{complete}, or leave languages out by data.languages"
    head = f"{needs}; bundles without a {answer} answer in one: {number} of {len(tokens)}"
    raise MissingAnswersError(_message(head, first, named, number, fix))


def _message(head: str, first: list[Lacking], named: list[str], number: int, fix: str) -> str:
    lines = [f"  {one.place}: bundle {one.bundle_id} {text}" for one, text in zip(first, named, strict=True)]
    more = number - len(named)
    return "\n".join([head, *lines, *([f"  and {more} more"] if more else []), f"{fix}."])
