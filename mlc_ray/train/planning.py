"""How a run's batches are cut: the budget of a forward, the cutting, and what is said of it before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from mlc_ray.config import ConfigError, TrainConfig
from mlc_ray.data.branches import Branches
from mlc_ray.data.order import Order
from mlc_ray.data.plan import BudgetError, Cutting, group_of
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import plans
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.budget import tokens_in
from mlc_ray.plan.cutting import cutting_of, order_of, tokens_per_forward
from mlc_ray.plan.lengths import of_artifact
from mlc_ray.plan.shapes import ShapeError, shape_of
from mlc_ray.progress import counted
from mlc_ray.train.collectives import largest
from mlc_ray.train.engines.base import Engine

logger = logging.getLogger(__name__)

LOOKED_AT = 100
"""Optimizer steps that are planned at the start, to say what they are like; a batch of 32 is planned in 0.2 ms."""


def check_terms(config: TrainConfig, steps: int) -> None:
    """Make sure that each term has a step, in a run of so many.

    Raises:
        ConfigError: One has none.
    """
    every = config.mlc.every
    last = (steps - 1) // every * every  # that taps; a factor never falls
    for name, term in config.active_terms.items():
        if not term.factor(last, steps):
            raise _without_step("mlc" if name == "mlc" else f"terms.{name}", term.start, every, steps)


def _without_step(path: str, start: float, every: int, steps: int) -> ConfigError:
    return ConfigError(
        f"{path}.start={start} with mlc.every={every} leaves no step of {steps} that has the term; lower one of them, "
        "or train for more steps"
    )


def check_kinds(config: TrainConfig, tokens: TokenArtifact) -> None:
    """Make sure that there are bundles of both kinds where a term teaches to tell them apart.

    Raises:
        ConfigError: There are not.
    """
    needing = [name for name, term in Objective(config).terms.items() if term.needs_kinds]
    if needing and len(tokens.counts.kinds) < 2:
        raise _of_one_kind(needing[0], tokens)


def not_measured(config: TrainConfig, steps: int) -> str | None:
    """What of a run only held-out bundles tell, where there are none; None where there is nothing of it."""
    if config.data.validation is not None:
        return None
    objective = Objective(config)
    unknown = []
    if names := [name for of_step in objective.begins(steps).values() for name in of_step]:
        begin = "begins" if len(names) == 1 else "begin"
        unknown.append(f"whether the response language tells harmful from benign when {', '.join(names)} {begin}")
    if objective.alignment.needs_rejected:
        unknown.append("whether the chosen answers themselves lose probability")
    if not unknown:
        return None
    return (
        f"no held-out bundles (data.validation): it is not measured on any, and nothing warns, {' and '.join(unknown)}"
    )


def _of_one_kind(term: str, tokens: TokenArtifact) -> ConfigError:
    (kind,) = tokens.counts.kinds
    return ConfigError(
        f"terms.{term} needs harmful and benign bundles, but all {len(tokens)} of data.train are "
        f"{kind}: add bundles of the other kind (their rows, or their source's `kind`, say which they are), or "
        "remove the term"
    )


def tokens_that_fit(config: TrainConfig, tokens: TokenArtifact, engine: Engine, branches: Branches | None) -> int:
    """`auto` on GPUs: what the one with the least free memory holds; every worker must call it once it has its engine.

    Free is what neither another process nor a tensor of this one takes, less what the engine's first step allocates.

    Raises:
        ConfigError: The model's shape is not known.
    """
    free = torch.cuda.mem_get_info(engine.device)[0]
    free += torch.cuda.memory_reserved(engine.device) - torch.cuda.memory_allocated(engine.device)
    try:
        shape = shape_of(engine.module.language_model.config, config.model.path)
    except ShapeError as error:
        raise ConfigError(f"train.tokens_per_forward='auto': {error}; set a number") from None
    size = next(engine.module.parameters()).element_size()
    weights = of_artifact(tokens)
    if branches is not None:  # of all languages, since a forward may be of the one that has most
        weights = replace(weights, opened={"response": branches.tokens, "all": branches.tokens})
    own = tokens_in(free - engine.memory_to_come(), config, shape, weights, size=size, workers=engine.world_size)
    return -int(largest([-own], engine.device)[0])


def cutting_of_worker(
    config: TrainConfig,
    tokens: TokenArtifact,
    engine: Engine,
    total_steps: int,
    branches: Branches | None = None,
) -> Cutting:
    """The cutting, once a worker has its engine; where the budget is counted from memory, it is looked at here.

    Raises:
        BudgetError: What must be forwarded at once does not fit.
    """
    said = tokens_per_forward(config, gpu=engine.device.type == "cuda")
    budget = said if said is not None else tokens_that_fit(config, tokens, engine, branches)
    cutting = cutting_of(config, tokens, tokens_per_forward=budget, world_size=engine.world_size, branches=branches)
    if said is None:
        _check_counted(config, tokens, engine, cutting, total_steps)
    return cutting


def _check_counted(config: TrainConfig, tokens: TokenArtifact, engine: Engine, cutting: Cutting, steps: int) -> None:
    """What the driver could not look at yet: a budget that was counted from memory."""
    order = order_of(config, tokens)
    check_groups(tokens, tapping(order, cutting, steps), cutting)
    outlook = look_ahead(tokens, order, cutting, steps)
    if engine.rank == 0 and outlook.oversized:
        logger.warning("%s", said_of(outlook, cutting, config.train.batch_bundles)[-1])


@dataclass(frozen=True)
class Outlook:
    """What a run's first steps are like: optimizer steps looked at, and in them forwards of one worker, and how many
    forwards of all workers have nothing that counts; and how many bundles are larger than a forward."""

    steps: int
    forwards: int
    idle: int
    oversized: int


def look_ahead(tokens: TokenArtifact, order: Order, cutting: Cutting, total_steps: int) -> Outlook:
    """What the steps of a run are like, from lengths alone."""
    own = tokens.counted(partial(cutting.own_tokens, taps=cutting.ever_taps, scope=cutting.widest))
    looked_at = min(LOOKED_AT, total_steps)
    looked = list(plans(tokens, order, cutting, range(looked_at)))
    return Outlook(
        steps=looked_at,
        forwards=sum(len(plan.forwards) for plan in looked),
        idle=sum(forward.idle for plan in looked for micro in plan.forwards for forward in micro),
        oversized=int((own > cutting.tokens_per_forward - cutting.head).sum()),
    )


def said_of(outlook: Outlook, cutting: Cutting, bundles: int) -> list[str]:
    """The outlook in sentences."""
    lines = [
        f"{counted(f'{outlook.forwards / outlook.steps:.3g}', 'forwards')} a step, of at most "
        f"{cutting.tokens_per_forward} tokens, on each of {counted(cutting.world_size, 'workers')}, for "
        f"{counted(bundles, 'bundles')} (mean of the first {counted(outlook.steps, 'steps')})"
    ]
    return [*lines, *_warned_of(outlook, cutting)] if outlook.idle or outlook.oversized else lines


def _warned_of(outlook: Outlook, cutting: Cutting) -> list[str]:
    lines = []
    if outlook.idle:
        lines.append(
            f"{outlook.idle} of {outlook.forwards * cutting.world_size} forwards have no bundle left, and forward one "
            "at weight 0: a batch of more bundles, fewer workers or a smaller train.tokens_per_forward leave fewer"
        )
    if outlook.oversized:
        lines.append(
            f"{outlook.oversized} bundles have more tokens than train.tokens_per_forward={cutting.tokens_per_forward} "
            "and are forwarded alone"
        )
    return lines


def check_groups(tokens: TokenArtifact, batches: Iterable[Sequence[int]], cutting: Cutting) -> None:
    """Make sure that each group of bundles that must be forwarded at once fits into a forward.

    Args:
        tokens: the bundles.
        batches: the rows of each batch with terms.
        cutting: how they are cut.

    Raises:
        BudgetError: One does not.
    """
    if cutting.group_bundles is None:
        return
    own = tokens.counted(partial(cutting.own_tokens, taps=True, scope=cutting.widest))
    capacity = cutting.tokens_per_forward - cutting.head
    most = 0
    for rows in batches:
        sizes = own[rows]
        firsts = np.unique(group_of(len(sizes), cutting.group_bundles), return_index=True)[1]
        most = max(most, int(np.add.reduceat(sizes, firsts).max()))
    if most > capacity:
        raise BudgetError(
            f"train.tokens_per_forward={cutting.tokens_per_forward} is too small for a group of "
            f"train.group_bundles={cutting.group_bundles} bundles, which are forwarded at once: the largest takes "
            f"{most + cutting.head} tokens; raise the one or lower the other"
        )


def tapping(order: Order, cutting: Cutting, total_steps: int) -> Iterator[list[int]]:
    """The batches of a run's steps with terms."""
    return (order.batch(step) for step in range(total_steps) if cutting.taps(step))


def held_out_cutting(cutting: Cutting, held_out: TokenArtifact) -> Cutting:
    """How held-out bundles are cut in a run that cuts its batches so: with the terms, if it has any on any step.

    Where they are of both kinds, openings of responses are read at least in the response language.
    """
    scope = cutting.widest
    if scope == "none" and cutting.branches is not None and len(held_out.counts.kinds) > 1:
        scope = "response"
    taps, head = cutting.ever_taps, held_out.head
    return replace(cutting, head=head, taps=lambda _: taps, scope=lambda _: scope, widest=scope)
