"""How many tokens of supervision a run uses: those that its loss reads, of the bundles that it trains on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mlc_ray.config import TrainConfig
from mlc_ray.data.store import TokenArtifact
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import order_of, steps_of

_AT_ONCE = 4096  # bundles


@dataclass(frozen=True)
class Supervision:
    """Tokens by language, each bundle counted once however often it is trained on; `languages` are the data's."""

    languages: list[str]
    prompts: dict[str, int]
    answers: dict[str, int]


def supervision_of(config: TrainConfig, tokens: TokenArtifact) -> Supervision:
    """What the loss of a run reads of its bundles.

    Answers in the response language always, those in the others where the loss is of them; rejected ones where it needs
    them. A prompt counts where an answer is read behind it, and all of a bundle's on a step with a term
    that taps them.
    """
    objective = Objective(config)
    steps, order = steps_of(config, tokens), order_of(config, tokens)
    all_prompts = objective.alignment.pairing in ("shared", "crossed")
    answered, tapped = set[int](), set[int]()
    for step in range(steps):
        rows = order.batch(step)
        answered.update(rows)
        if all_prompts or objective.taps(step, steps):
            tapped.update(rows)
    used = sorted(answered)
    all_answers = objective.alignment.pairing in ("own", "given", "crossed")
    names = ("chosen", "rejected") if objective.alignment.needs_rejected else ("chosen",)
    prompts, answers = Counter[str](), Counter[str]()
    for start in range(0, len(used), _AT_ONCE):
        chosen = used[start : start + _AT_ONCE]
        for row, bundle in zip(chosen, tokens.table(chosen).to_pylist(), strict=True):
            codes = bundle["languages"]
            pairs = [(bundle["response_prompt"], bundle)]
            pairs += [(further["prompt"], further) for further in bundle["answers"]] if all_answers else []
            read = set(range(len(codes))) if row in tapped else {index for index, _ in pairs}
            for index in read:
                prompts[codes[index]] += len(bundle["prompts"][index])
            for index, pair in pairs:
                answers[codes[index]] += sum(len(pair[name] or ()) for name in names)
    return Supervision(tokens.languages, dict(sorted(prompts.items())), dict(sorted(answers.items())))
