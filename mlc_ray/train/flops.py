"""Useful floating-point operations of a forward and its backward: counted from shapes, what is recomputed left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mlc_ray.train.experts import is_expert, share_met
from mlc_ray.train.forward import n_layers
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.types import Batch, Tree


@dataclass(frozen=True)
class Work:
    """What a token costs in one model: multiplications and additions, each counted.

    Args:
        blocks: parameters of all blocks' matrices that a token meets.
        trained: the share of them that is trained, from 0 to 1.
        head: parameters of the LM head; 0 where there is none.
        head_trained: whether it is trained.
        layers: number of blocks.
        attention: query heads x their size.
        tapped: blocks that prompts pass which nothing answers.
    """

    blocks: int
    trained: float
    head: int
    head_trained: bool
    layers: int
    attention: int
    tapped: int

    @classmethod
    def of(cls, module: PolicyWithExtractor, shape: Callable[[nn.Parameter], Sequence[int]]) -> Work | None:
        """Those of a policy, whose parameters have whole shapes `shape` (see `Engine.shape`).

        Of a mixture's experts those count that a token meets; None where its config does not say how many.
        """
        model: Any = module.language_model
        config = model.config.get_text_config()
        if (met := share_met(config)) is None:
            return None
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        apart = {id(part.weight) for part in (head, embedding) if part is not None}
        matrices: list[tuple[nn.Parameter, float]] = []
        for name, p in module.policy.named_parameters():
            if id(p) not in apart and len(shape(p)) in ((2, 3) if is_expert(name) else (2,)):
                matrices.append((p, math.prod(shape(p)) * (met if is_expert(name) else 1.0)))
        blocks = round(sum(size for _, size in matrices))
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            blocks=blocks,
            trained=sum(size for p, size in matrices if p.requires_grad) / max(1, blocks),
            head=math.prod(shape(head.weight)) if head is not None else 0,
            head_trained=head is not None and head.weight.requires_grad,
            layers=n_layers(model),
            attention=config.num_attention_heads * size,
            tapped=module.layer,
        )

    def step(self, batch: Batch) -> float:
        """Operations of one forward and backward.

        A product with a matrix takes 2 operations a parameter and token forward, 2 back to its input, and 2 to the
        matrix if it is trained; attention 4 a pair of tokens, layer and dimension forward, and twice that backward.
        """
        tree = batch.tree
        stays = tree if batch.openings is not None else tree.first(tree.prompt_only)
        leaves = tree.tokens - stays.tokens
        share = self.tapped / self.layers
        tokens = stays.tokens + share * leaves
        pairs = _pairs(stays) + share * (_pairs(tree) - _pairs(stays))
        answers = len(batch.chosen.targets) + (len(batch.rejected.targets) if batch.rejected is not None else 0)
        answers += len(batch.openings.predicting) if batch.openings is not None else 0
        return (
            (4 + 2 * self.trained) * self.blocks * tokens
            + (4 + 2 * self.head_trained) * self.head * answers
            + 12 * self.layers * self.attention * pairs
        )


def _pairs(tree: Tree) -> float:
    """Pairs of a token and what it attends to, with no sliding window."""
    return sum(
        own * (seen - own) + own * (own + 1) / 2 for own, seen in zip(tree.lengths, tree.key_lengths, strict=True)
    )
