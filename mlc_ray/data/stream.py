"""A run's batches, inside a worker: planned, read and made into tensors by a thread while the worker computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from mlc_ray.data.batches import collate
from mlc_ray.data.order import Order
from mlc_ray.data.plan import Cutting, Forward, StepPlan
from mlc_ray.data.store import TokenArtifact
from mlc_ray.types import Batch, ReferenceTable, pinned

AHEAD = 2
"""Optimizer steps that are ready before they are asked for; 32 bundles in ten languages are about half a MiB."""

T = TypeVar("T")


def plans(tokens: TokenArtifact, order: Order, cutting: Cutting, steps: range) -> Iterator[StepPlan]:
    """How each of these optimizer steps is cut; the same on every worker."""
    for step in steps:
        rows = order.batch(step)
        yield cutting.plan(step, rows, tokens.lengths(rows))


def stream_steps(
    tokens: TokenArtifact,
    planned: Iterator[StepPlan],
    cutting: Cutting,
    reference: ReferenceTable | None,
    *,
    rank: int,
    pin: bool = False,
) -> Iterator[list[Batch]]:
    """Worker `rank`'s micro-batches of each planned step, made by a thread a few steps ahead.

    Rows are read from the memory-mapped artefact, which all workers of a node share through its page cache.

    Args:
        tokens: the artefact.
        planned: the steps, see `plans`.
        cutting: by what they are cut, and so what of a bundle is read.
        reference: what the frozen reference says of each row; None where the loss needs none.
        rank: whose forwards.
        pin: whether tensors go into pinned memory, from which a GPU copies while it computes.

    Raises:
        BatchError: a bundle lacks what the loss needs.
    """

    def batch(forward: Forward, plan: StepPlan) -> Batch:
        made = collate(
            tokens.table(forward.rows),
            languages=tokens.languages,
            weights=forward.weights,
            term_weights=forward.term_weights,
            groups=forward.groups,
            needs_rejected=cutting.rejected,
            reference=None if reference is None else reference.take(forward.rows),
            tap=plan.taps,
            pairing=cutting.pairing,
            whole=cutting.whole,
            scope=plan.scope,
            branches=cutting.branches,
            keeps=cutting.keeps,
        )
        return pinned(made) if pin else made

    return ahead([batch(micro[rank], plan) for micro in plan.forwards] for plan in planned)


def ahead(values: Iterator[T], number: int = AHEAD) -> Generator[T]:
    """The same values, up to `number` of them made before they are asked for, in a thread.

    An error of theirs is raised here, in its turn. The thread ends when nobody asks any more.
    """
    pool, end = ThreadPoolExecutor(1, "batches"), object()
    try:
        ready = deque(pool.submit(next, values, end) for _ in range(number))
        while (value := ready.popleft().result()) is not end:
            ready.append(pool.submit(next, values, end))
            yield cast(T, value)
    finally:
        pool.shutdown(cancel_futures=True)
