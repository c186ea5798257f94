"""Which bundles an optimizer step has: pure arithmetic, the same on every machine, cluster and restart.

A step's *batch* is `train.batch_bundles` consecutive bundles of the epoch's order. The last batch of an epoch has what
is left, so that every bundle is used exactly once an epoch. Nothing here knows of workers: how a batch is cut into
forwards is `mlc_ray.data.plan`.
"""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np

from mlc_ray.data.ragged import Ints
from mlc_ray.data.tables import Keys


def epoch_order(keys: Keys, seed: int, epoch: int) -> Ints:
    """Indices into `keys` [N], which differ, sorted by a hash of each key with (seed, epoch).

    The place of one bundle relative to another does not depend on how the input is ordered. The hash is splitmix64 of
    the key xor the first 8 bytes (little-endian) of SHA-256 of "SEED:EPOCH". It is a bijection: there are no ties.
    A million bundles are ordered in 0.15 CPU seconds; ten million take 160 MB meanwhile.
    """
    salt = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8]
    ranks = keys ^ np.uint64(int.from_bytes(salt, "little"))
    ranks += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        ranks ^= ranks >> np.uint64(shift)
        ranks *= np.uint64(factor)
    ranks ^= ranks >> np.uint64(31)
    return np.argsort(ranks)


def twin_order(pairs: Keys, keys: Keys, seed: int, epoch: int) -> Ints:
    """`epoch_order` of pairs, each bundle [N] beside the others of its own, and bundles without one two and two.

    Batches of an even number part no pair then, as long as none has three. It does not depend on how the input is
    ordered either: those of a pair lie in the order of their keys.
    """
    labels, own, sizes = np.unique(pairs, return_inverse=True, return_counts=True)
    places = np.argsort(epoch_order(labels, seed, epoch))[own]
    alone = np.flatnonzero(sizes[own] == 1)
    alone = alone[np.argsort(places[alone])]
    places[alone[1::2]] = places[alone[: len(alone) // 2 * 2 : 2]]
    order: Ints = np.lexsort((keys, places))
    return order


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


class Order:
    """The batches of a run.

    Args:
        keys: of all rows (`mlc_ray.data.tables.keys_of`); a batch names rows by their index here.
        seed: of the order.
        batch_bundles: bundles of a batch.
        pairs: keys of the pairs that bundles are in, [N], where those of a pair are to come together.
    """

    def __init__(self, keys: Keys, *, seed: int, batch_bundles: int, pairs: Keys | None = None) -> None:
        self.steps_per_epoch = steps_per_epoch(len(keys), batch_bundles)
        self._keys, self._seed, self._size = keys, seed, batch_bundles
        self._ordered = epoch_order if pairs is None else partial(twin_order, pairs)
        self._narrowest = np.min_scalar_type(len(keys))  # kept for a whole epoch: 4 bytes a bundle, not 8
        self._epoch, self._order = -1, np.empty(0, self._narrowest)

    def batch(self, step: int) -> list[int]:
        """Rows of optimizer step `step` (from 0, over all epochs), in order; an epoch is ordered when it begins."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(self._keys, self._seed, epoch).astype(self._narrowest)
        rows: list[int] = self._order[number * self._size : (number + 1) * self._size].tolist()
        return rows
