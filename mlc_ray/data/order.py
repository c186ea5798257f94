"""Which bundles an optimizer step has: pure arithmetic, the same on every machine, cluster and restart.

A step's *batch* is `train.batch_bundles` consecutive bundles of the epoch's order. The last batch of an epoch has what
is left, so that every bundle is used exactly once an epoch. Nothing here knows of workers: how a batch is cut into
forwards is `mlc_ray.data.plan`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def epoch_order(bundle_ids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Indices into `bundle_ids`, sorted by a BLAKE2b hash of the id keyed with (seed, epoch).

    The place of one bundle relative to another does not depend on how the input is ordered.
    """
    key = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()

    def rank(index: int) -> tuple[bytes, str]:
        name = bundle_ids[index]
        return hashlib.blake2b(name.encode(), key=key, digest_size=16).digest(), name

    return sorted(range(len(bundle_ids)), key=rank)


def steps_per_epoch(bundles: int, batch_bundles: int) -> int:
    """Batches that cover `bundles`.

    Raises:
        ValueError: There are no bundles.
    """
    if bundles < 1:
        raise ValueError(f"there is nothing to order: {bundles} bundles")
    return -(-bundles // batch_bundles)


def total_steps(bundles: int, *, epochs: int, batch_bundles: int, max_steps: int | None) -> int:
    """Optimizer steps of a whole run: all epochs, or `max_steps` if that is fewer."""
    steps = epochs * steps_per_epoch(bundles, batch_bundles)
    return steps if max_steps is None else min(steps, max_steps)


def bundles_consumed(bundles: int, step: int, batch_bundles: int) -> int:
    """Bundles that the first `step` optimizer steps use, over all epochs."""
    epochs, batches = divmod(step, steps_per_epoch(bundles, batch_bundles))
    return epochs * bundles + min(bundles, batches * batch_bundles)


class Order:
    """The batches of a run.

    Args:
        bundle_ids: ids of all rows; a batch names rows by their index here.
        seed: of the order.
        batch_bundles: bundles of a batch.
    """

    def __init__(self, bundle_ids: Sequence[str], *, seed: int, batch_bundles: int) -> None:
        self.steps_per_epoch = steps_per_epoch(len(bundle_ids), batch_bundles)
        self._ids, self._seed, self._size = bundle_ids, seed, batch_bundles
        self._epoch, self._order = -1, list[int]()

    def batch(self, step: int) -> list[int]:
        """Rows of optimizer step `step` (from 0, over all epochs), in order; an epoch is ordered when it begins."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._ids, self._seed, epoch)
        return self._order[number * self._size : (number + 1) * self._size]
