"""From config to one scalar: total = alignment + weight * mlc, plus weight * anti-collapse; weighted bundle means."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mlc_ray.config import AntiCollapseSection, MlcSection, ObjectiveSection
from mlc_ray.losses.anti_collapse import Round, anchor_losses, contrast_losses, variance_losses
from mlc_ray.losses.mlc import leading_share, mlc_losses
from mlc_ray.losses.preference import PreferenceLoss, dpo_loss, ipo_loss, orpo_loss, sft_loss, simpo_loss
from mlc_ray.types import LossOutput, ResponseLogProbs


@dataclass(frozen=True)
class Objective:
    """The loss of a run. Facts about it (does it need a reference, rejected answers?) sit here, not in the loop."""

    objective: ObjectiveSection
    mlc: MlcSection

    @property
    def needs_reference(self) -> bool:
        """Whether `total_loss` must be given anything of a frozen reference."""
        return self.needs_reference_log_probs or self.needs_reference_state

    @property
    def needs_reference_log_probs(self) -> bool:
        """Whether `total_loss` must be given the reference's log-probs."""
        return self.objective.needs_reference

    @property
    def needs_reference_state(self) -> bool:
        """Whether `total_loss` must be given the reference's tapped states on steps with the MLC term."""
        return self.mlc.anti_collapse is not None and self.mlc.anti_collapse.needs_reference

    @property
    def needs_round(self) -> bool:
        """Whether `total_loss` must be given all workers' representations on steps with the MLC term."""
        return self.mlc.anti_collapse is not None and self.mlc.anti_collapse.needs_round

    @property
    def needs_rejected(self) -> bool:
        """Whether bundles must have a rejected answer."""
        return self.objective.loss != "sft"

    def mlc_active(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) has the MLC term; the same on every worker."""
        return self.mlc.weight > 0 and step % self.mlc.every == 0

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

        `weight` [B] multiplies each bundle before the mean over slots (see `Batch`). On steps with the MLC term
        `representations` [B, L, D] and `present` [B, L] are given, and what the anti-collapse term reads: `tapped`
        [B, L, H] and `reference_state` [B, H], or the round `together` that the B bundles are part of. Metrics are
        [B], one number per bundle. Raises ValueError naming what the configured loss misses.
        """
        aligned = self.alignment(chosen, rejected, reference_chosen, reference_rejected)
        total = (aligned.loss * weight).mean()
        metrics: dict[str, Tensor] = {"loss/alignment": aligned.loss.detach()}
        if aligned.chosen_reward is not None and aligned.rejected_reward is not None:
            margin = aligned.chosen_reward - aligned.rejected_reward
            metrics["reward/chosen"] = aligned.chosen_reward
            metrics["reward/rejected"] = aligned.rejected_reward
            metrics["reward/margin"] = margin
            metrics["reward/accuracy"] = (margin > 0).to(margin.dtype)
        if representations is not None:
            losses, values = mlc_losses(
                representations, temperature=self.mlc.temperature, scaling=self.mlc.scaling, present=present
            )
            total = total + self.mlc.weight * (losses.to(total.dtype) * weight).mean()
            metrics["loss/mlc"] = losses.detach()
            metrics["mlc/leading_share"] = leading_share(values)
            if self.mlc.anti_collapse is not None:
                term, parts = _anti_collapse(
                    self.mlc.anti_collapse, weight, together, tapped=tapped, present=present, state=reference_state
                )
                total = total + self.mlc.anti_collapse.weight * term.to(total.dtype)
                metrics["loss/anti_collapse"] = parts.detach()
        return LossOutput(loss=total, metrics=metrics)

    def alignment(
        self,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs | None,
        reference_chosen: Tensor | None,
        reference_rejected: Tensor | None,
    ) -> PreferenceLoss:
        """The alignment loss of each bundle [B]. Raises ValueError naming what the configured loss misses."""
        settings = self.objective
        if settings.loss == "sft":
            return sft_loss(chosen)
        if rejected is None:
            raise ValueError(f"objective.loss={settings.loss!r} needs rejected answers, none were given")
        if settings.loss == "simpo":
            return simpo_loss(chosen, rejected, beta=settings.beta, margin=settings.margin)
        if settings.loss == "orpo":
            return orpo_loss(chosen, rejected, beta=settings.beta)
        if reference_chosen is None or reference_rejected is None:
            raise ValueError(f"objective.loss={settings.loss!r} needs the reference's log-probs, none were given")
        if settings.loss == "ipo":
            return ipo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=settings.beta)
        return dpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )


def _anti_collapse(
    settings: AntiCollapseSection,
    weight: Tensor,
    together: Round | None,
    *,
    tapped: Tensor | None,
    present: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The term as a weighted mean over slots, and the loss of each of this worker's bundles [B]."""
    if settings.kind == "anchor":
        if tapped is None or present is None or state is None:
            raise ValueError("mlc.anti_collapse.kind='anchor' needs tapped states and the reference's, none were given")
        losses = anchor_losses(tapped, present, state)
        return (losses * weight).mean(), losses
    if together is None:
        raise ValueError(f"mlc.anti_collapse.kind={settings.kind!r} needs all workers' bundles, none were given")
    if settings.kind == "contrast":
        losses = contrast_losses(together.representations, together.taking_part, temperature=settings.temperature)
    else:
        losses = variance_losses(together.representations, together.taking_part, target_std=settings.target_std)
    return (losses * together.weight).mean(), losses[together.first : together.first + len(weight)]
