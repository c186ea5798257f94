"""`train.tokens_per_forward: auto` on GPUs: how many tokens of a forward some memory holds, in plans and in runs."""

from __future__ import annotations

from mlc_ray.config import TrainConfig
from mlc_ray.plan.lengths import Weights, cut
from mlc_ray.plan.memory import activations
from mlc_ray.plan.shapes import Shape

USED_SHARE = 0.7
"""Of the free memory; the rest is for the allocator's gaps and what is not counted."""

SAMPLED = 8192
"""Tokens of the forwards that say what a token takes."""


def tokens_in(
    free: int,
    config: TrainConfig,
    shape: Shape,
    weights: Weights,
    *,
    size: int,
    workers: int,
    kept_share: float = 1.0,
) -> int:
    """Tokens of a forward for which `free` bytes are enough, at least 1; a token counts as in the fullest of some.

    Args:
        free: bytes of a GPU that are free, what training still allocates being taken off.
        config: the run.
        shape: its model's.
        weights: what its bundles weigh.
        size: bytes of an element of the model.
        workers: of the run.
        kept_share: as of `activations`.
    """
    rows = cut(config, weights, tokens_per_forward=SAMPLED, workers=workers).largest
    filled = max(row.tokens for row in rows) / 2  # steps whose forwards are smaller hold all bundles in one
    each = max(
        sum(part.bytes for part in activations(config, shape, row, size, kept_share)) / row.tokens
        for row in rows
        if row.tokens > filled
    )
    return max(1, int(USED_SHARE * max(0, free) / each))
