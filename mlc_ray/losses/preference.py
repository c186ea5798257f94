"""Alignment losses on answers in the response language, each per bundle [B].

Inputs are `ResponseLogProbs` (summed log-probs [B] in nats, token counts [B]); nothing here knows where they came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlc_ray.types import ResponseLogProbs


@dataclass(frozen=True)
class PreferenceLoss:
    """Loss [B] to differentiate, and the detached rewards [B] the loss implies (None where it has none)."""

    loss: Tensor
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None


def sft_loss(chosen: ResponseLogProbs) -> PreferenceLoss:
    """Mean negative log-likelihood per token of each chosen answer."""
    return PreferenceLoss(-_mean(chosen))


def dpo_loss(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Sigmoid DPO (Rafailov et al. 2023, eq. 7); label smoothing as conservative DPO. `reference_*` [B] are sums.

    With h the difference of the policy's and the reference's log-ratios:
    -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h); ln 2 when the policy is the reference.
    """
    chosen_reward = beta * (chosen.total - reference_chosen)
    rejected_reward = beta * (rejected.total - reference_rejected)
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return PreferenceLoss(loss, chosen_reward.detach(), rejected_reward.detach())


def ipo_loss(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """IPO (Azar et al. 2023, eq. 17): (h - 1 / (2 beta))^2 with h on log-probs *averaged* over tokens.

    Averaging is what the authors confirmed for language models; sums would make the target depend on length.
    """
    chosen_gain = (chosen.total - reference_chosen) / chosen.length
    rejected_gain = (rejected.total - reference_rejected) / rejected.length
    loss = (chosen_gain - rejected_gain - 1 / (2 * beta)).square()
    return PreferenceLoss(loss, (beta * chosen_gain).detach(), (beta * rejected_gain).detach())


def simpo_loss(chosen: ResponseLogProbs, rejected: ResponseLogProbs, *, beta: float, margin: float) -> PreferenceLoss:
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(beta (mean log-prob difference) - gamma); no reference."""
    chosen_reward, rejected_reward = beta * _mean(chosen), beta * _mean(rejected)
    loss = -F.logsigmoid(chosen_reward - rejected_reward - margin)
    return PreferenceLoss(loss, chosen_reward.detach(), rejected_reward.detach())


def orpo_loss(chosen: ResponseLogProbs, rejected: ResponseLogProbs, *, beta: float) -> PreferenceLoss:
    """ORPO (Hong et al. 2024, eq. 6): SFT loss - beta log sigmoid(log odds ratio) on mean log-probs; no reference."""
    log_odds = _log_odds(_mean(chosen)) - _log_odds(_mean(rejected))
    loss = -_mean(chosen) - beta * F.logsigmoid(log_odds)
    return PreferenceLoss(loss, (beta * _mean(chosen)).detach(), (beta * _mean(rejected)).detach())


def _mean(answer: ResponseLogProbs) -> Tensor:
    return answer.total / answer.length


def _log_odds(log_prob: Tensor) -> Tensor:
    # log(p / (1 - p)); log1p(-exp(x)) is -inf at x = 0, a probability of exactly 1, so stay a rounding step below.
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return log_prob - torch.log1p(-torch.exp(log_prob))
