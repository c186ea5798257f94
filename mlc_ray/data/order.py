"""Which bundle is used when, by whom, with what weight: pure arithmetic, the same on every machine and restart.

An optimizer step consumes a *round*: G = world_size x bundles_per_worker x accumulation consecutive positions of the
epoch's order. Which bundles share a round depends on G alone, not on how G is divided. The last round of an epoch is
filled up with bundles of weight 0, so that every worker does the same number of forwards and no bundle is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One bundle's place in the run.

    `epoch` and `step` count from 0, steps over all epochs; `micro` is the forward within the step; `row_index` the
    bundle; `weight` is 0 for padding, else (slots of the round) / (real bundles of the round).
    """

    epoch: int
    step: int
    micro: int
    row_index: int
    weight: float


def epoch_order(bundle_ids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Indices into `bundle_ids`, sorted by a BLAKE2b hash of the id keyed with (seed, epoch).

    The place of one bundle relative to another does not depend on how the input is ordered.
    """
    key = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()

    def rank(index: int) -> tuple[bytes, str]:
        name = bundle_ids[index]
        return hashlib.blake2b(name.encode(), key=key, digest_size=16).digest(), name

    return sorted(range(len(bundle_ids)), key=rank)


def steps_per_epoch(bundles: int, *, world_size: int, bundles_per_worker: int, accumulation: int) -> int:
    """Rounds that cover `bundles`, the last one padded.

    Raises:
        ValueError: there are no bundles.
    """
    if bundles < 1:
        raise ValueError(f"there is nothing to order: {bundles} bundles")
    return -(-bundles // _round_size(world_size, bundles_per_worker, accumulation))


def total_steps(
    bundles: int,
    *,
    epochs: int,
    world_size: int,
    bundles_per_worker: int,
    accumulation: int,
    max_steps: int | None,
) -> int:
    """Optimizer steps of a whole run: all epochs, or `max_steps` if that is fewer."""
    steps = epochs * steps_per_epoch(
        bundles, world_size=world_size, bundles_per_worker=bundles_per_worker, accumulation=accumulation
    )
    return steps if max_steps is None else min(steps, max_steps)


def bundles_consumed(bundles: int, step: int, *, world_size: int, bundles_per_worker: int, accumulation: int) -> int:
    """Real (not padding) bundles that the first `step` optimizer steps use, over all epochs."""
    size = _round_size(world_size, bundles_per_worker, accumulation)
    epochs, rounds = divmod(step, -(-bundles // size))
    return epochs * bundles + min(bundles, rounds * size)


def plan_rank(
    bundle_ids: Sequence[str],
    *,
    seed: int,
    epochs: int,
    world_size: int,
    rank: int,
    bundles_per_worker: int,
    accumulation: int,
    max_steps: int | None,
    start_step: int = 0,
) -> list[Slot]:
    """All slots of one worker from `start_step` on, in the order it consumes them.

    Each `bundles_per_worker` consecutive slots are one forward, each `accumulation` of those one optimizer step. The
    ranks together use every bundle exactly once an epoch with a weight above 0.

    Raises:
        ValueError: the rank is impossible, or there are no bundles.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} workers")
    count = len(bundle_ids)
    sizes = {"world_size": world_size, "bundles_per_worker": bundles_per_worker, "accumulation": accumulation}
    size = _round_size(**sizes)
    rounds = steps_per_epoch(count, **sizes)
    end = total_steps(count, epochs=epochs, max_steps=max_steps, **sizes)
    slots: list[Slot] = []
    order: list[int] = []
    ordered_epoch = -1
    for step in range(start_step, end):
        epoch, round_in_epoch = divmod(step, rounds)
        if epoch != ordered_epoch:
            order, ordered_epoch = epoch_order(bundle_ids, seed, epoch), epoch
        start = round_in_epoch * size
        weight = size / min(size, count - start)
        for micro in range(accumulation):
            first = start + (micro * world_size + rank) * bundles_per_worker
            for position in range(first, first + bundles_per_worker):
                real = position < count
                slots.append(Slot(epoch, step, micro, order[position % count], weight if real else 0.0))
    return slots


def _round_size(world_size: int, bundles_per_worker: int, accumulation: int) -> int:
    return world_size * bundles_per_worker * accumulation
