"""Log-probabilities of answers, without a float32 copy of all logits.

The logits are the largest tensors of a step: rows x vocabulary. Beside those that the model's head returns, only pieces
of them are alive: in forward and backward alike the softmax is taken piece by piece, and the gradient is written over
the logits, which nothing reads any more by then. That is 2 bytes a logit in bfloat16 and 4 in float32. The plain
`cross_entropy(logits.float())` needs 14 (a float32 copy, the saved log-softmax and its gradient beside the logits) and
12. It acts after the model's own head, so that soft-caps, scaled or tied heads, adapters on the head and ZeRO-3's
gathering, once, stay what they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mlc_ray.types import ResponseLogProbs

CHUNK = {"cpu": 2**20}
"""Logits in a piece. 4 MiB in float32 stay in a CPU's cache: least time of 2**18 to 2**26, see benchmarks/README.md."""

CHUNK_ELSEWHERE = 2**24
"""On a GPU: 64 MiB in float32, some hundred rows of a vocabulary of 152k, so that a kernel has enough to do."""


def response_log_probs(log_probs: Tensor, row_of_target: Tensor, n_answers: int) -> ResponseLogProbs:
    """Summed log-prob in nats and token count of each answer.

    Args:
        log_probs: [R], of the answers' tokens, from `token_log_probs`.
        row_of_target: [R], the answer 0..A-1 of each.
        n_answers: A.
    """
    total = log_probs.new_zeros(n_answers).index_add(0, row_of_target, log_probs)
    ones = torch.ones_like(row_of_target)  # bincount would wait for the device, to learn the largest value
    length = row_of_target.new_zeros(n_answers).index_add(0, row_of_target, ones)
    return ResponseLogProbs(total=total, length=length)


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-prob in nats of each of `targets` [R] under `logits` [R, V]: [R], float32 whatever the logits' type.

    A target of -1 has 0 for its log-prob. `targets` may be [R, K]: several of a row, all different, or -1. Give all
    logits that the head returned, at once. The backward overwrites them with their gradient: where anything else needs
    them for its own, or the backward runs twice, autograd raises an error.
    """
    log_probs: Tensor = cast(Any, _TokenLogProbs).apply(logits, targets)
    return log_probs


def mean_log_prob(answer: ResponseLogProbs) -> Tensor:
    """Mean log-prob per token of each answer [A], in nats."""
    return answer.total / answer.length


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor) -> Tensor:
        context.save_for_backward(logits, targets)
        if targets.dim() == 1:
            losses = [
                F.cross_entropy(part.float(), target, reduction="none", ignore_index=-1)
                for part, target in zip(*_pieces(logits, targets), strict=True)
            ]
            return -torch.cat(losses)
        parts = [
            part.float().log_softmax(dim=-1).gather(1, target.clamp(min=0))
            for part, target in zip(*_pieces(logits, targets), strict=True)
        ]
        return torch.cat(parts).masked_fill_(targets < 0, 0.0)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = context.saved_tensors
        # Through detach() it is still the same version counter: a second reader of these logits fails, loudly.
        logits = logits.detach()
        for part, target, gradient in zip(*_pieces(logits, targets, gradients[0]), strict=True):
            if targets.dim() == 1:
                target, gradient = target.unsqueeze(1), gradient.unsqueeze(1)
            own = gradient.masked_fill(target < 0, 0.0)
            slope = part.float().softmax(dim=-1).mul_(-own.sum(dim=1, keepdim=True))
            part.copy_(slope.scatter_add_(1, target.clamp(min=0), own))
        return logits, None


def _pieces(logits: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    rows = max(1, CHUNK.get(logits.device.type, CHUNK_ELSEWHERE) // logits.shape[1])
    return [tensor.split(rows) for tensor in (logits, *others)]
