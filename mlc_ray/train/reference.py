"""The frozen reference model's log-probs: by a second engine at every step, or from a table made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlc_ray.train.model import answer_log_probs
from mlc_ray.types import Batch

ReferenceLogProbs = Callable[[Batch], tuple[Tensor, Tensor]]


class ReferenceModel(nn.Module):
    """The frozen language model, answering with summed log-probs [B] of chosen and rejected answers."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probs in nats, float32; raises ValueError where the batch has no rejected answers."""
        chosen, rejected = answer_log_probs(self.model, batch.chosen, batch.rejected, len(batch.bundle_ids))
        if rejected is None:
            raise ValueError("a reference is asked for bundles without rejected answers")
        return chosen.total, rejected.total


def online_reference(engine: Any) -> ReferenceLogProbs:
    """Log-probs from a reference engine at every step."""

    @torch.no_grad()
    def log_probs(batch: Batch) -> tuple[Tensor, Tensor]:
        return engine(batch)

    return log_probs


def cached_reference(batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs that travelled with the batch."""
    if batch.reference_chosen is None or batch.reference_rejected is None:
        raise ValueError("the batch carries no cached reference log-probs")
    return batch.reference_chosen, batch.reference_rejected
