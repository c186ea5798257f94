"""The published recipe's training step, rebuilt from a description of its code, with nothing slower than that says.

Policy *and* reference forward all 2 + L sequences of every bundle, padded to one length, with every layer's hidden
states kept and all logits upcast to float32; the tapped token is the last unmasked one; singular values by an SVD.
Attention is PyTorch's sdpa, the reference takes no gradient, and the log-softmax is that of the answers' rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.types import TokenRow

BETA, WEIGHT, TEMPERATURE = 0.1, 0.8, 0.2
Losses = dict[str, Tensor]


@dataclass(frozen=True)
class PaddedBatch:
    """What the rebuild forwards: B chosen rows, B rejected, then L prompts of each bundle, all of one length.

    `input_ids`, `attention_mask` and `labels` (-100 where nothing is predicted) are [2 B + B L, T], padded right.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    bundles: int


def padded(rows: Sequence[TokenRow]) -> PaddedBatch:
    """The rebuild's batch of the same token rows."""

    def answered(row: TokenRow, answer: list[int] | None) -> tuple[list[int], list[int]]:
        return row.prompts[row.response_prompt], answer or []

    parts = [answered(row, row.chosen) for row in rows] + [answered(row, row.rejected) for row in rows]
    parts += [(prompt, []) for row in rows for prompt in row.prompts]
    length = max(len(prompt) + len(answer) for prompt, answer in parts)
    ids = torch.zeros(len(parts), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(parts):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer, dtype=torch.long)
    return PaddedBatch(ids, mask, labels, len(rows))


def their_step(
    module: PolicyWithExtractor,
    reference: PreTrainedModel,
    batch: PaddedBatch,
    *,
    term: bool = True,
    attention: str = "sdpa",
) -> Losses:
    """Forward and backward; without the `term`, everything is forwarded all the same."""
    n = batch.bundles
    module.language_model.set_attn_implementation(attention)
    reference.set_attn_implementation(attention)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    policy = module.policy(**inputs, output_hidden_states=True)
    logits = policy.logits.float()
    with torch.no_grad():
        reference_logits = reference(**inputs, output_hidden_states=True).logits.float()
        reference_chosen, reference_rejected = answer_sums(reference_logits[: 2 * n], batch.labels[: 2 * n]).split(n)
    chosen, rejected = answer_sums(logits[: 2 * n], batch.labels[: 2 * n]).split(n)
    alignment = -F.logsigmoid(BETA * ((chosen - reference_chosen) - (rejected - reference_rejected))).mean()
    if not term:
        alignment.backward()
        return {"alignment": alignment.detach(), "total": alignment.detach()}
    states = policy.hidden_states[module.layer][2 * n :]
    last = batch.attention_mask[2 * n :].sum(dim=1) - 1
    tapped = states[torch.arange(len(states), device=states.device), last]
    rows = F.normalize(module.extractor(tapped), dim=-1)
    values = torch.linalg.svdvals(rows.view(n, -1, rows.shape[-1]).float())
    scaled = values / values[:, :1].detach() / TEMPERATURE
    mlc = F.cross_entropy(scaled, torch.zeros(n, dtype=torch.long, device=scaled.device))
    total = alignment + WEIGHT * mlc
    total.backward()
    return {"alignment": alignment.detach(), "mlc": mlc.detach(), "total": total.detach()}


def answer_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed log-prob [N] of the labelled tokens of padded rows: `logits` [N, T, V], `labels` [N, T]."""
    targets = labels[:, 1:]
    log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (log_probs * (targets != -100)).sum(dim=1)
