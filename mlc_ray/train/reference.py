"""The frozen reference model: run at every step (`Engine.frozen`), or read from a table computed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlc_ray.losses.objective import Objective
from mlc_ray.train.forward import benign_logits, read_answers, read_tree, response_prompts
from mlc_ray.types import Batch, Pairing, Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ReferenceOutput:
    """The reference's outputs for B bundles; None is what was not asked for.

    `chosen` and `rejected` are summed log-probs of the answers in nats: [A], or [B] where only those in the response
    language are asked about. `state` [B, H] is the tapped state of the last token of the response-language prompt,
    `pooled` [2, B, H] as `ModelOutput` has it; all float32. So has it `benign` [K, V], in the model's type.
    """

    chosen: Tensor | None = None
    rejected: Tensor | None = None
    state: Tensor | None = None
    pooled: Tensor | None = None
    benign: Tensor | None = None


Reference = Callable[[Batch], ReferenceOutput]


class ReferenceModel(nn.Module):
    """The frozen language model: answers' log-probs, and tapped states at `layer` unless that is None.

    `pairing` says which answers it is asked about: all that a batch has, or with `response` only those in the response
    language. With `pooling`, their log-probs come with pooled states; with `keeps`, logits of benign bundles with
    tapped states' batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        log_probs: bool = True,
        layer: int | None = None,
        pairing: Pairing = "response",
        pooling: Pooling | None = None,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.keeps = keeps
        self.log_probs = log_probs
        self.layer = layer
        self.pairing = pairing
        self.pooling = pooling

    def forward(self, batch: Batch, *, state: bool) -> ReferenceOutput:
        """Log-probs if it has them, and states if it has them and `state`; one forward, of no more than that needs.

        Raises:
            ValueError: Log-probs are asked of a batch without rejected answers.
        """
        benign = batch.benign if self.keeps and state else None
        tree = batch.tree.first(batch.tree.prompt_only if benign is None else batch.tree.openings)
        layer = self.layer if self.layer is not None and state else None
        tapped = response_prompts(batch.chosen, batch.rows.response) if layer is not None else None
        chosen = rejected = hidden = pooled = logits = None
        if self.log_probs:
            if batch.rejected is None:
                raise ValueError("the reference is asked for bundles without rejected answers")
            first, second, hidden, pooled, _, logits = read_answers(
                self.model, batch, tree, tapped, layer or 0, self.pooling, benign=benign
            )
            asked = batch.rows.response if self.pairing == "response" else slice(None)
            chosen, rejected = first.total[asked], second.total[asked] if second is not None else None
        elif benign is not None:
            logits, hidden = benign_logits(self.model, batch, tapped, layer or 0)
        elif tapped is not None and layer is not None:
            _, hidden, _ = read_tree(self.model, tree.first(tree.answers), None, tapped, layer)
        return ReferenceOutput(chosen, rejected, hidden.float() if hidden is not None else None, pooled, logits)


def asked_of_reference(objective: Objective, layer: int) -> dict[str, Any]:
    """What an objective needs of the reference, as arguments of `ReferenceModel`: log-probs, states at `layer`, ..."""
    alignment = objective.alignment
    return {
        "log_probs": alignment.needs_reference,
        "layer": layer if objective.needs_reference_state else None,
        # One answer is read for a state, too.
        "pairing": alignment.reference_pairing if alignment.needs_reference else "response",
        "pooling": alignment.pooling,
        "keeps": objective.needs_reference_logits,
    }


def policy_reference(policy: nn.Module, model: ReferenceModel) -> Reference:
    """`model`, which holds the language model of `policy`, with the adapters off: what `policy` was before training.

    No second model is loaded: the frozen weights of a policy with adapters are the reference's.
    """

    @torch.no_grad()
    def ask(batch: Batch) -> ReferenceOutput:
        training = policy.training
        policy.eval()
        try:
            with _without_adapters(policy):
                said: ReferenceOutput = model(batch, state=batch.taps)
        finally:
            policy.train(training)
        return said

    return ask


@contextmanager
def _without_adapters(policy: nn.Module) -> Iterator[None]:
    """Within, layers with adapters are the plain layers.

    peft's own way to that freezes the adapters, and leaves the context with all of them trainable: an engine has built
    its gradient's machinery on what is trainable. So only the flag is set that its layers read.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def cached_reference(batch: Batch) -> ReferenceOutput:
    """The numbers that the batch brought along.

    Raises:
        ValueError: It brought none.
    """
    if batch.reference_chosen is None and batch.reference_state is None:
        raise ValueError("the batch has no cached reference numbers")
    return ReferenceOutput(
        batch.reference_chosen, batch.reference_rejected, batch.reference_state, batch.reference_pooled
    )
