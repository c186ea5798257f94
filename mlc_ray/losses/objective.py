"""From config to one scalar: total = alignment + sum of weight * term, and the parts by name; weighted bundle means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlc_ray._registry import resolve
from mlc_ray.config import LossSettings, ObjectiveConfig, TermSettings
from mlc_ray.losses.base import Alignment, AlignmentLoss, Round, Tapped, Term, TermLoss
from mlc_ray.types import LossOutput, ResponseLogProbs


class Objective:
    """The loss of a run: its alignment loss and its terms, those whose weight is not 0.

    Facts about it (does it need a reference, rejected answers?) sit here, not in the loop.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.alignment: Alignment = resolve("loss", config.objective.loss)(config.objective)
        self.terms: dict[str, Term] = {
            name: resolve("term", settings.name)(settings) for name, settings in config.active_terms.items()
        }

    @property
    def parts(self) -> list[str]:
        """What the total is made of, as metrics name it: `loss/alignment`, and `loss/NAME` of each term."""
        return [f"loss/{name}" for name in ("alignment", *self.terms)]

    def describe(self) -> list[str]:
        """A line for each part: its weight, its name and its settings, those that may be published."""
        loss = self.config.objective.loss
        lines = [_described(loss, public_settings(self.config.objective), {"loss"})]
        for name, term in self.config.active_terms.items():
            own = {"weight", "name"} if term.name == name else {"weight"}
            lines.append(_described(f"{term.weight} x {name}", public_settings(term), own))
        return lines

    @property
    def needs_reference(self) -> bool:
        """Whether `total_loss` must be given anything of a frozen reference."""
        return self.needs_reference_log_probs or self.needs_reference_state

    @property
    def needs_reference_log_probs(self) -> bool:
        """Whether `total_loss` must be given the reference's log-probs."""
        return self.alignment.needs_reference

    @property
    def needs_reference_state(self) -> bool:
        """Whether `total_loss` must be given the reference's tapped states on steps that tap."""
        return any(term.needs_reference_state for term in self.terms.values())

    @property
    def needs_round(self) -> bool:
        """Whether `total_loss` must be given all workers' representations on steps that tap."""
        return any(term.needs_round for term in self.terms.values())

    @property
    def needs_rejected(self) -> bool:
        """Whether bundles must have a rejected answer."""
        return self.alignment.needs_rejected

    def taps(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) has the terms; the same on every worker."""
        return bool(self.terms) and step % self.config.mlc.every == 0

    def total_loss(
        self,
        *,
        weight: Tensor,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs | None = None,
        reference_chosen: Tensor | None = None,
        reference_rejected: Tensor | None = None,
        reference_state: Tensor | None = None,
        representations: Tensor | None = None,
        present: Tensor | None = None,
        tapped: Tensor | None = None,
        together: Round | None = None,
    ) -> LossOutput:
        """Loss of a batch, a scalar, and its parts for each bundle, which the caller averages over all workers.

        Args:
            weight: [B], multiplies each bundle before the mean over slots (see `Batch`).
            chosen: Log-probs of the chosen answers.
            rejected: Those of the rejected ones.
            reference_chosen: [B], the reference's summed log-probs of the chosen answers.
            reference_rejected: [B], those of the rejected ones.
            reference_state: [B, H], its tapped states of the response prompts.
            representations: [B, L, D], the extractor's outputs; given on steps that tap, and absent on others.
            present: [B, L], the languages that each bundle has; all of them if it is not given.
            tapped: [B, L, H], hidden states before the extractor.
            together: The round that the B bundles are part of.

        Returns:
            The scalar to differentiate; metrics are [B], one number per bundle: `loss/total`, `parts`, without their
            weights, and what the components log beside them.

        Raises:
            ValueError: A component needs what was not given; the message names both.
        """
        aligned = self._align(chosen, rejected, reference_chosen, reference_rejected)
        total = (aligned.loss * weight).mean()
        metrics: dict[str, Tensor] = {"loss/total": aligned.loss.detach(), "loss/alignment": aligned.loss.detach()}
        if aligned.chosen_reward is not None and aligned.rejected_reward is not None:
            margin = aligned.chosen_reward - aligned.rejected_reward
            metrics["reward/chosen"] = aligned.chosen_reward
            metrics["reward/rejected"] = aligned.rejected_reward
            metrics["reward/margin"] = margin
            metrics["reward/accuracy"] = (margin > 0).to(margin.dtype)
        if representations is None:
            return LossOutput(loss=total, metrics=metrics)
        if present is None:
            present = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
        here = Tapped(representations, present, tapped)
        for name, term in self.terms.items():
            result = _term_loss(name, term, here, reference_state, together)
            factor = term.settings.weight
            losses, slots = result.loss, weight
            if term.needs_round and together is not None:
                slots = together.weight
                own = losses[together.first : together.first + len(weight)].detach()
            else:
                own = losses.detach()
            total = total + factor * (losses.to(total.dtype) * slots).mean()
            metrics["loss/total"] = metrics["loss/total"] + factor * own
            metrics[f"loss/{name}"] = own
            metrics |= {f"{name}/{key}": value.detach() for key, value in result.metrics.items()}
        return LossOutput(loss=total, metrics=metrics)

    def _align(
        self,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs | None,
        reference_chosen: Tensor | None,
        reference_rejected: Tensor | None,
    ) -> AlignmentLoss:
        loss, given = f"objective.loss={self.config.objective.loss!r}", dict[str, Any](chosen=chosen)
        if self.alignment.needs_rejected:
            if rejected is None:
                raise ValueError(f"{loss} needs rejected answers, none were given")
            given["rejected"] = rejected
        if self.alignment.needs_reference:
            if reference_chosen is None or reference_rejected is None:
                raise ValueError(f"{loss} needs the reference's log-probs, none were given")
            given |= {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
        return self.alignment(**given)


def public_settings(settings: LossSettings | TermSettings) -> dict[str, Any]:
    """The settings of a loss or a term that may be published: all of one that is shipped.

    Of one from outside, whose texts may be paths or names of people, its own name, the numbers and the booleans.
    """
    whole = settings.model_dump(mode="json")
    if type(settings).__module__.startswith("mlc_ray."):
        return whole
    by = "loss" if isinstance(settings, LossSettings) else "name"
    return {key: value for key, value in whole.items() if key == by or isinstance(value, bool | int | float)}


def _described(title: str, settings: dict[str, Any], said: set[str]) -> str:
    values = ", ".join(f"{key}={value}" for key, value in settings.items() if key not in said)
    return f"{title} ({values})" if values else title


def _term_loss(
    name: str, term: Term, tapped: Tapped, reference_state: Tensor | None, together: Round | None
) -> TermLoss:
    given = dict[str, Any](tapped=tapped)
    if term.needs_reference_state:
        if reference_state is None:
            raise ValueError(f"term {name!r} needs the reference's tapped states, none were given")
        given["reference_state"] = reference_state
    if term.needs_round:
        if together is None:
            raise ValueError(f"term {name!r} needs all workers' bundles, none were given")
        given["together"] = together
    return term(**given)
