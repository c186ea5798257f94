"""Held-out bundles, measured while training: losses, margins and consistency, per kind and language."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mlc_ray.config import DataSection
from mlc_ray.data.order import epoch_order
from mlc_ray.data.plan import Cutting, StepPlan
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.measures import auc
from mlc_ray.losses.mlc import unit_rows
from mlc_ray.losses.objective import Objective
from mlc_ray.train.collectives import gather_objects, sum_over_workers
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.loop import Progress, decisions_of, loss_of
from mlc_ray.train.meter import Metrics, add_to
from mlc_ray.train.reference import Reference, ReferenceOutput
from mlc_ray.types import AnswerRows, Batch, move

PREFIX = "validation/"
_CHOSEN, _CHANGE = "log_prob/chosen", "log_prob/chosen_change"


class ValidationError(MlcRayError):
    """Held-out bundles cannot be measured; the message says how many, and what to change."""


def held_out_section(data: DataSection) -> DataSection | None:
    """The settings by which `data.validation` becomes tokens, as training data do; None where there is none."""
    if data.validation is None:
        return None
    return data.model_copy(update={"train": data.validation.sources, "validation": None, "other_languages": None})


def check_held_out(tokens: TokenArtifact, training: TokenArtifact) -> None:
    """Refuse bundles that are trained on: those of the same kind, prompts and answers.

    Raises:
        ValidationError: There are some.
    """
    both = np.flatnonzero(np.isin(tokens.keys, training.keys))
    if len(both):
        raise ValidationError(
            f"data.validation: {len(both)} of its {len(tokens)} bundles are in data.train too, the first is "
            f"{tokens.rows(both[:1])[0].bundle_id!r}; take them out of one of the two"
        )


def batches_of(tokens: TokenArtifact, *, seed: int, at_once: int) -> list[list[int]]:
    """All held-out bundles in an order that the seed decides, as a run's are, in batches alike in size.

    There are as many as batches of about `at_once` make. A term that compares bundles compares those of a batch: in the
    order of a sorted file it would compare its like, and a last batch of one bundle would have nothing to compare.
    """
    order = epoch_order(tokens.keys, seed, 0)
    number = max(1, round(len(order) / at_once))
    return [part.tolist() for part in np.array_split(order, number)]


def plans_of(tokens: TokenArtifact, batches: Sequence[Sequence[int]], cutting: Cutting) -> Iterator[StepPlan]:
    """Each batch cut like that of an optimizer step."""
    for number, rows in enumerate(batches):
        yield cutting.plan(number, rows, tokens.lengths(rows))


@dataclass
class Validation:
    """Measures held-out bundles with the weights of the moment.

    Args:
        objective: the run's.
        engine: what trains; neither its weights nor its optimizer state nor random numbers change.
        batches: makes this worker's batches, all of which tap where there are terms, as many as every worker's.
        reference: what the frozen reference says of them; None where the loss needs none.
        kinds: all that occur.
        progress: of the run; it keeps the chosen answers' log-probs of step 0.
    """

    objective: Objective
    engine: Engine
    batches: Callable[[], Iterator[Sequence[Batch]]]
    reference: Reference | None
    kinds: Sequence[str]
    progress: Progress
    _decided: list[tuple[str, float, bool]] = field(default_factory=list, init=False)

    def __call__(self) -> Metrics:
        """Means over the held-out bundles and, under `KIND/`, over those of each kind; every worker must call it.

        Returns:
            `validation/` and the name that training gives the same number: `loss/total`, which has all terms at their
            whole weights, `loss/alignment`, `loss/NAME`, `reward/margin`, `mlc/leading_share`, ...; and beside them
            `log_prob/chosen`: the chosen answers' summed log-probs, in nats;
            `log_prob/chosen_change`: the same, less what it was before training;
            `log_prob/chosen/LANGUAGE`, `log_prob/chosen_change/LANGUAGE`: both, of the answers in each language to the
            prompts in it, where the loss reads answers in several;
            `mlc/cosine/LANGUAGE`: see `language_cosines`;
            `refusal/log_odds`, `refusal/log_odds/LANGUAGE`: log-odds, in nats, that a response opens as a refusal, in
            the response language and in each that is read;
            `refusal/auc`, `refusal/auc/LANGUAGE`, of both kinds alone: how well these tell harmful from benign;
            `refusal/likeliest/LANGUAGE`: the highest of these log-odds behind a harmful prompt;
            `refusal/per_kind`: how many bundles the rarer kind has, which the AUC is of.
        """
        self._decided.clear()
        module, sums = self.engine.module, dict[str, Tensor]()
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                for batches in self.batches():
                    for batch in batches:
                        self._add(sums, move(batch, self.engine.device))
        finally:
            module.train(training)
        found = self._aucs()
        totals = dict(zip(sums, sum_over_workers(torch.stack(list(sums.values()))).tolist(), strict=True))
        means = {
            name: total / count
            for name, total in totals.items()
            if not name.endswith("#") and (count := totals[f"{name}#"])
        }
        for prefix in self._prefixes():
            if (loss := means.get(f"{prefix}loss/alignment")) is not None:
                if self.objective.sft_weight:
                    loss += self.objective.sft_weight * means[f"{prefix}loss/sft"]
                for name, term in self.objective.terms.items():
                    loss += term.settings.weight * means.get(f"{prefix}loss/{name}", 0.0)
                loss += means.get(f"{prefix}loss/router", 0.0)  # it has its weight
                means[f"{prefix}loss/total"] = loss
        if self.progress.step == 0:
            chosen = {name: means[name] for name in means if _CHOSEN in name}
            self.progress.before = {name: value for name, value in chosen.items() if math.isfinite(value)}
        for name, before in self.progress.before.items():
            means[name.replace(_CHOSEN, _CHANGE)] = means[name] - before
        return {PREFIX + name: value for name, value in sorted({**means, **found}.items())}

    def _aucs(self) -> Metrics:
        """AUC of the log-odds of all workers' bundles, by the name of the metric; every worker calls it."""
        every = [one for part in gather_objects(self._decided) for one in part]
        metrics = {}
        for name in sorted({name for name, _, _ in every}):
            values, harmful = zip(
                *((value, is_harmful) for own, value, is_harmful in every if own == name), strict=True
            )
            if name == "refusal/auc":
                metrics["refusal/per_kind"] = float(min(sum(harmful), len(harmful) - sum(harmful)))
            elif any(harmful):
                metrics[name.replace("/auc/", "/likeliest/")] = max(
                    v for v, h in zip(values, harmful, strict=True) if h
                )
            found = auc(torch.tensor(values, dtype=torch.float64), torch.tensor(harmful))
            if not math.isnan(found):
                metrics[name] = found
        return metrics

    def _prefixes(self) -> list[str]:
        return ["", *(f"{kind}/" for kind in self.kinds)]

    def _add(self, sums: dict[str, Tensor], batch: Batch) -> None:
        """Add one forward's numbers to `sums`, and under `NAME#` of how many bundles they are."""
        frozen = self.reference(batch) if self.reference is not None else ReferenceOutput()
        output = self.engine.forward(batch)
        result = loss_of(self.objective, batch, output, frozen)
        real, with_terms = batch.weight > 0, batch.term_weight > 0
        numbers = {_CHOSEN: (output.chosen.total[batch.rows.response], real)}
        if self.objective.alignment.pairing not in ("response", "shared"):
            totals, there = by_language(output.chosen.total, batch.rows, len(real), len(batch.languages))
            for column, language in enumerate(batch.languages):
                numbers[f"{_CHOSEN}/{language}"] = (totals[:, column], there[:, column] & real)
        numbers |= {name: (values, real) for name, values in result.metrics.items()}
        numbers |= {name: (values, with_terms) for name, values in result.term_metrics.items()}
        if output.representations is not None and output.present is not None:
            cosines, others = language_cosines(output.representations, output.present)
            for column, language in enumerate(batch.languages):
                numbers[f"mlc/cosine/{language}"] = (cosines[:, column], others[:, column] & real)
        if (decisions := decisions_of(batch, output)) is not None:
            numbers["refusal/log_odds"] = (decisions.in_response, real)
            for column, language in enumerate(batch.languages):
                values, there = decisions.log_odds[:, column], decisions.present[:, column]
                numbers[f"refusal/log_odds/{language}"] = (values, there & real)
            for name in (name for name in numbers if name.startswith("refusal/log_odds")):
                values, counts = numbers[name]
                rows = zip(values.tolist(), counts.tolist(), decisions.harmful.tolist(), strict=True)
                to = name.replace("log_odds", "auc")
                self._decided += [(to, value, harmful) for value, there, harmful in rows if there]
        for prefix, kind in zip(self._prefixes(), [None, *self.kinds], strict=True):
            own = torch.tensor([kind in (None, it) for it in batch.kinds], device=real.device)
            for name, (values, counts) in numbers.items():
                here = counts & own
                for key, value in ((name, values.double().where(here, 0.0).sum()), (f"{name}#", here.double().sum())):
                    add_to(sums, prefix + key, value)


def by_language(values: Tensor, rows: AnswerRows, bundles: int, languages: int) -> tuple[Tensor, Tensor]:
    """Values [A] of answers in the language of their prompt as a grid [B, L]; and where there are such, [B, L]."""
    own = rows.prompt == rows.answer
    places = (rows.bundle[own], rows.answer[own])
    grid, there = values.new_zeros(bundles, languages), values.new_zeros(bundles, languages, dtype=torch.bool)
    grid[places], there[places] = values[own], True
    return grid, there


def language_cosines(representations: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean |cosine| of each language with the others of its bundle, [B, L]; and whether there are others, [B, L].

    What `mlc/leading_share` says of a bundle, said of each of its languages: 1 where all others are collinear with it.
    It is of representations before `mlc.centring`, which the share comes after.
    """
    rows = unit_rows(representations, present)
    cosines = (rows @ rows.mT).abs()  # an absent row is zero
    others = present.sum(dim=1, keepdim=True) - 1
    own = cosines.diagonal(dim1=1, dim2=2)
    return (cosines.sum(dim=2) - own) / others.clamp(min=1), present & (others > 0)
