"""How a run's batches are cut: its order, its steps, the budget of a forward; of token rows, or of what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mlc_ray.config import TrainConfig
from mlc_ray.data.branches import Branches
from mlc_ray.data.order import Order, total_steps
from mlc_ray.data.plan import Cutting
from mlc_ray.data.tables import Keys
from mlc_ray.losses.objective import Objective
from mlc_ray.types import Scope

BUNDLES_PER_REFERENCE_FORWARD = 8
"""On a GPU with `tokens_per_forward: auto`, a forward of the reference's pass has so many times a bundle's mean number
of tokens. In training `auto` goes by what a backward keeps of a forward; there is no backward."""

CPU_TOKENS = 2048
"""`auto` on a CPU, which no more tokens at once make faster: about 3 GB for a model of 135M parameters in float32."""


class Weighed(Protocol):
    """Token rows, or what is known of their lengths: `head` is how many tokens all prompts begin with."""

    @property
    def head(self) -> int:
        """Tokens that all prompts begin with."""
        ...

    def __len__(self) -> int:
        """Bundles."""
        ...


class Keyed(Weighed, Protocol):
    """Token rows with the keys that order them."""

    @property
    def keys(self) -> Keys:
        """Of all rows, [N]."""
        ...

    @property
    def pairs(self) -> Keys:
        """Of the pairs that rows are in, [N]."""
        ...


def order_of(config: TrainConfig, tokens: Keyed) -> Order:
    """The batches of a run; those of a pair come together where a term tells them apart."""
    pairs = tokens.pairs if any(term.needs_pairs for term in Objective(config).terms.values()) else None
    return Order(tokens.keys, seed=config.seed, batch_bundles=config.train.batch_bundles, pairs=pairs)


def steps_of(config: TrainConfig, tokens: Weighed) -> int:
    """The optimizer steps of a run."""
    train = config.train
    return total_steps(len(tokens), epochs=train.epochs, batch_bundles=train.batch_bundles, max_steps=train.max_steps)


def cutting_of(
    config: TrainConfig,
    tokens: Weighed,
    *,
    tokens_per_forward: int,
    world_size: int,
    branches: Branches | None = None,
    opened: Mapping[Scope, int] | None = None,
) -> Cutting:
    """By what they are cut; `branches` are the openings of responses that steps read, or a plan has `opened`."""
    objective, steps = Objective(config), steps_of(config, tokens)
    return Cutting(
        tokens_per_forward,
        world_size,
        head=tokens.head,
        rejected=objective.alignment.needs_rejected,
        taps=lambda step: objective.taps(step, steps),
        ever_taps=objective.ever_taps,
        group_bundles=config.train.group_bundles if objective.needs_group else None,
        pairing=objective.alignment.pairing,
        whole=objective.alignment.pooling is not None,
        scope=lambda step: objective.scope(step, steps),
        widest=objective.widest_scope,
        branches=branches,
        opened=opened or {},
        keeps=objective.needs_reference_logits,
    )


def tokens_per_forward(config: TrainConfig, *, gpu: bool) -> int | None:
    """What the settings say, or None where the workers must look at their GPUs' memory."""
    said = config.train.tokens_per_forward
    if said != "auto":
        return said
    return None if gpu else CPU_TOKENS
