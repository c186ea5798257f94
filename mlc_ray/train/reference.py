"""The frozen reference model: run at every step (`Engine.frozen`), or read from a table computed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from mlc_ray.train.model import answer_log_probs, response_prompts, tapped_states
from mlc_ray.types import Batch


@dataclass(frozen=True)
class ReferenceOutput:
    """The reference's outputs for B bundles; None is what was not asked for.

    `chosen` and `rejected` [B] are summed log-probs of the answers in nats, `state` [B, H] the tapped state of the last
    token of the response-language prompt; all float32.
    """

    chosen: Tensor | None = None
    rejected: Tensor | None = None
    state: Tensor | None = None


Reference = Callable[[Batch, bool], ReferenceOutput]
"""(batch, whether its step taps) -> the reference's outputs."""


class ReferenceModel(nn.Module):
    """The frozen language model: answers' log-probs, and tapped states at `layer` unless that is None."""

    def __init__(self, model: PreTrainedModel, *, log_probs: bool = True, layer: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.log_probs = log_probs
        self.layer = layer

    def forward(self, batch: Batch, *, tap: bool = True) -> ReferenceOutput:
        """Log-probs if it has them, and states if it has them and `tap`.

        Raises:
            ValueError: Log-probs are asked of a batch without rejected answers.
        """
        n_bundles = len(batch.bundle_ids)
        chosen = rejected = state = None
        if self.log_probs:
            answers = answer_log_probs(self.model, batch.chosen, batch.rejected, n_bundles)
            if answers[1] is None:
                raise ValueError("the reference is asked for bundles without rejected answers")
            chosen, rejected = answers[0].total, answers[1].total
        if self.layer is not None and tap:
            state = tapped_states(self.model, response_prompts(batch.chosen, n_bundles), self.layer).float()
        return ReferenceOutput(chosen, rejected, state)


def cached_reference(batch: Batch, tap: bool) -> ReferenceOutput:
    """The numbers that the batch brought along."""
    if batch.reference_chosen is None and batch.reference_state is None:
        raise ValueError("the batch has no cached reference numbers")
    return ReferenceOutput(batch.reference_chosen, batch.reference_rejected, batch.reference_state)
