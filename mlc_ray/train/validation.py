"""Held-out bundles, measured while training: losses, margins and consistency, per kind and language."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlc_ray.config import DataSection
from mlc_ray.data.plan import Cutting, StepPlan
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.mlc import unit_rows
from mlc_ray.losses.objective import Objective
from mlc_ray.train.collectives import sum_over_workers
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.loop import Progress, loss_of
from mlc_ray.train.meter import Metrics
from mlc_ray.train.reference import Reference, ReferenceOutput
from mlc_ray.types import Batch, move

PREFIX = "validation/"
_LOG_PROB, _CHANGE = "chosen_log_prob", "chosen_change"


class ValidationError(MlcRayError):
    """Held-out bundles cannot be measured; the message says how many, and what to change."""


def held_out_section(data: DataSection) -> DataSection | None:
    """The settings by which `data.validation` becomes tokens, as training data do; None where there is none."""
    if data.validation is None:
        return None
    return data.model_copy(update={"train": data.validation.sources, "validation": None})


def check_held_out(tokens: TokenArtifact, training: TokenArtifact) -> None:
    """Refuse bundles that are trained on.

    Raises:
        ValidationError: There are some.
    """
    if both := sorted(set(tokens.bundle_ids) & set(training.bundle_ids)):
        raise ValidationError(
            f"data.validation: {len(both)} of its {len(tokens)} bundles are in data.train too, the first is "
            f"{both[0]!r}; take them out of one of the two"
        )


def plans_of(tokens: TokenArtifact, cutting: Cutting, at_once: int) -> Iterator[StepPlan]:
    """All bundles in the order of the file, `at_once` of them cut like the batch of an optimizer step."""
    for number, start in enumerate(range(0, len(tokens), at_once)):
        rows = range(start, min(start + at_once, len(tokens)))
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
        progress: of the run; it keeps what is measured at step 0.
    """

    objective: Objective
    engine: Engine
    batches: Callable[[], Iterator[Sequence[Batch]]]
    reference: Reference | None
    kinds: Sequence[str]
    progress: Progress

    def __call__(self) -> Metrics:
        """Means over the held-out bundles and, under `KIND/`, over those of each kind; every worker must call it.

        Returns:
            `validation/` and
            `loss`: the objective, as in training, with all its terms;
            `alignment`, `margin`, `accuracy`: of the alignment loss;
            `chosen_log_prob`: the chosen answers' summed log-probs, in nats; `chosen_change`: since before training;
            NAME, `NAME/...`: the loss of each term without its weight, and what it logs, such as `mlc/leading_share`;
            `cosine/LANGUAGE`: see `language_cosines`.
        """
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
        totals = dict(zip(sums, sum_over_workers(torch.stack(list(sums.values()))).tolist(), strict=True))
        means = {
            name: total / count
            for name, total in totals.items()
            if not name.endswith("#") and (count := totals[f"{name}#"])
        }
        for prefix in self._prefixes():
            if (loss := means.get(f"{prefix}alignment")) is not None:
                weighted = {name: term.settings.weight for name, term in self.objective.terms.items()}
                means[f"{prefix}loss"] = loss + sum(w * means.get(prefix + name, 0.0) for name, w in weighted.items())
        metrics = {PREFIX + name: value for name, value in sorted(means.items())}
        if self.progress.step == 0:
            self.progress.before = metrics
        for name in [name for name in metrics if name.endswith(_LOG_PROB) and name in self.progress.before]:
            metrics[name.removesuffix(_LOG_PROB) + _CHANGE] = metrics[name] - self.progress.before[name]
        return metrics

    def _prefixes(self) -> list[str]:
        return ["", *(f"{kind}/" for kind in self.kinds)]

    def _add(self, sums: dict[str, Tensor], batch: Batch) -> None:
        """Add one forward's numbers to `sums`, and under `NAME#` of how many bundles they are."""
        frozen = self.reference(batch) if self.reference is not None else ReferenceOutput()
        output = self.engine.forward(batch)
        result = loss_of(self.objective, batch, output, frozen)
        real, with_terms = batch.weight > 0, batch.term_weight > 0
        numbers = {_LOG_PROB: (output.chosen.total, real), "alignment": (result.metrics["loss/alignment"], real)}
        for name in ("margin", "accuracy"):
            if f"reward/{name}" in result.metrics:
                numbers[name] = result.metrics[f"reward/{name}"], real
        numbers |= {name.removeprefix("loss/"): (values, with_terms) for name, values in result.term_metrics.items()}
        if output.representations is not None and output.present is not None:
            cosines, others = language_cosines(output.representations, output.present)
            for column, language in enumerate(batch.languages):
                numbers[f"cosine/{language}"] = (cosines[:, column], others[:, column] & real)
        for prefix, kind in zip(self._prefixes(), [None, *self.kinds], strict=True):
            own = torch.tensor([kind in (None, it) for it in batch.kinds], device=real.device)
            for name, (values, counts) in numbers.items():
                here = counts & own
                for key, value in ((name, values.double().where(here, 0.0).sum()), (f"{name}#", here.double().sum())):
                    key = prefix + key
                    sums[key] = sums[key] + value if key in sums else value


def language_cosines(representations: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean |cosine| of each language with the others of its bundle, [B, L]; and whether there are others, [B, L].

    What `mlc/leading_share` says of a bundle, said of each of its languages: 1 where all others are collinear with it.
    """
    rows = unit_rows(representations, present)
    cosines = (rows @ rows.mT).abs()  # an absent row is zero
    others = present.sum(dim=1, keepdim=True) - 1
    own = cosines.diagonal(dim1=1, dim2=2)
    return (cosines.sum(dim=2) - own) / others.clamp(min=1), present & (others > 0)
