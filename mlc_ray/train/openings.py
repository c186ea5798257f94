"""The openings of refusals as tokens of a model, in the languages of data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlc_ray.config import TrainConfig
from mlc_ray.data.branches import Branches
from mlc_ray.data.bundles import KINDS
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.judges.openings import openings_by_language
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.openings import make_branches
from mlc_ray.storage import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def branches_of(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, artefacts: Sequence[TokenArtifact]
) -> Branches | None:
    """The openings that a run reads, in the languages of its bundles; None where it reads none.

    Without `tokenizer`, the model's is loaded.

    Raises:
        OpeningsError: A language has none.
        ConfigError: Some are given for a language that none of these reads.
    """
    held_out = config.data.validation
    if not config.reads_decisions and (held_out is None or held_out.min_decision_auc is None):
        return None
    model = config.model
    tokenizer = tokenizer or load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    languages = {code for tokens in artefacts for code in tokens.languages}
    return make_branches(config.openings, tokenizer, config.chat, languages)


def refusals_unlike(
    config: TrainConfig, artefacts: Sequence[TokenArtifact], branches: Branches | None = None
) -> str | None:
    """What to warn of where chosen answers to harmful bundles begin with no opening, which a term counts as help.

    The loss on answers teaches such an answer, and a term that labels kinds (`decision`) lowers its probability, in the
    languages that both read. Of many bundles `LOOKED_AT` spread evenly are read. None where at least `MOST_OPEN` of
    each language's begin so, or where no term labels kinds.

    Args:
        config: the run.
        artefacts: its bundles, then those that are held out, whose languages may have openings too.
        branches: the openings, which are made of the lists where they are not given.
    """
    objective, tokens = Objective(config), artefacts[0]
    naming = {name: term for name, term in objective.terms.items() if term.needs_kinds and term.needs_decisions}
    if not naming or (branches := branches or branches_of(config, None, artefacts)) is None:
        return None
    in_all = objective.alignment.pairing != "response" and any(term.needs_languages for term in naming.values())
    harmful = np.flatnonzero(tokens.kinds == KINDS.index("harmful"))
    rows = harmful[np.linspace(0, max(0, len(harmful) - 1), min(len(harmful), LOOKED_AT)).astype(np.int64)]
    answers, opening = Counter[str](), Counter[str]()
    for row in tokens.table(rows).select(_READ).to_pylist():
        chosen = [(row["response_prompt"], row["chosen"])]
        chosen += [(each["prompt"], each["chosen"]) for each in row["answers"]] if in_all else []
        for prompt, ids in chosen:
            if not ids:
                continue
            code = row["languages"][prompt]
            answers[code] += 1
            opening[code] += any(tuple(ids[: len(one)]) == one for one in branches.openings[code])
    unlike = [
        f"{answers[code] - opening[code]} of {answers[code]} in {code}"
        for code in sorted(answers)
        if opening[code] < MOST_OPEN * answers[code]
    ]
    if not unlike:
        return None
    return (
        f"chosen answers to harmful bundles begin with no opening of a refusal ({', '.join(unlike)}): "
        f"objective.loss={config.objective.loss!r} teaches them, and terms.{next(iter(naming))} counts them as help "
        "and lowers them; let them begin as an opening does, or give their beginnings by openings.further "
        "(`mlc-ray openings` finds them)"
    )


_READ = ["languages", "response_prompt", "chosen", "answers"]

LOOKED_AT = 512
"""Bundles whose answers are read at the start of a run."""

MOST_OPEN = 0.75
"""Of a language's chosen answers to harmful bundles; the share that reports ask of a model's refusals, too."""


def fingerprint_openings(config: TrainConfig, artefacts: Sequence[TokenArtifact]) -> str:
    """Of the texts of all openings in the languages of a run's bundles: lists differ by version, and steps with them.

    Raises:
        ConfigError: Some are given for a language that no bundle is in.
    """
    return fingerprint(
        openings_by_language({code for tokens in artefacts for code in tokens.languages}, config.openings)
    )
