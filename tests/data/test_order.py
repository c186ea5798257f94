import hashlib
from collections import Counter

import numpy as np
import pytest

from mlc_ray.data.order import Order, epoch_order, steps_per_epoch, total_steps
from mlc_ray.data.tables import keys_of

IDS = keys_of(f"{number:04x}" for number in range(101))


def batches(ids=IDS, size=6, epochs=2, seed=7):
    order = Order(ids, seed=seed, batch_bundles=size)
    return [order.batch(step) for step in range(epochs * order.steps_per_epoch)]


def test_the_order_is_pinned_so_that_no_release_or_machine_shuffles_otherwise():
    keys = keys_of(["a", "b", "c", "d", "e", "f"])
    assert keys[0] == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little")
    assert epoch_order(keys, seed=42, epoch=0).tolist() == [0, 3, 5, 4, 1, 2]


def test_ranks_are_those_of_splitmix64_in_plain_integers():
    salt = int.from_bytes(hashlib.sha256(b"3:1").digest()[:8], "little")

    def rank(key):
        z = ((int(key) ^ salt) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    before = IDS.copy()
    assert epoch_order(IDS, 3, 1).tolist() == sorted(range(101), key=lambda index: rank(IDS[index]))
    assert (before == IDS).all()


def test_the_order_depends_on_seed_epoch_and_id_alone():
    order = [IDS[i] for i in epoch_order(IDS, 1, 0)]
    assert sorted(order) == sorted(IDS)
    assert order != IDS.tolist()
    backwards = IDS[::-1]
    assert [backwards[i] for i in epoch_order(backwards, 1, 0)] == order
    assert [IDS[i] for i in epoch_order(IDS, 1, 1)] != order
    assert [IDS[i] for i in epoch_order(IDS, 2, 0)] != order
    fewer = IDS[order[5] != IDS]
    assert [fewer[i] for i in epoch_order(fewer, 1, 0)] == [i for i in order if i != order[5]]


@pytest.mark.parametrize("size", [1, 6, 12, 101, 200])
@pytest.mark.parametrize("count", [101, 1, 12])
def test_every_bundle_is_in_exactly_one_batch_an_epoch(size, count):
    ids = IDS[:count]
    steps = steps_per_epoch(count, size)
    found = batches(ids, size)
    assert len(found) == 2 * steps
    for epoch in range(2):
        own = found[epoch * steps : (epoch + 1) * steps]
        assert Counter(row for batch in own for row in batch) == Counter(range(count))
        assert [row for batch in own for row in batch] == epoch_order(ids, 7, epoch).tolist()
        assert [len(batch) for batch in own[:-1]] == [size] * (steps - 1)


@pytest.mark.parametrize("epoch", [0, 1])
def test_twins_come_together_and_even_batches_part_none(epoch):
    """Of 101 bundles the first 60 are twins, two and two, and the others have none."""
    pairs = keys_of(f"pair {number // 2}" if number < 60 else f"{number:04x}" for number in range(101))
    found = batches_of_pairs(IDS, pairs, epoch)
    assert Counter(row for batch in found for row in batch) == Counter(range(101))
    for batch in found:
        assert all(row ^ 1 in batch for row in batch if row < 60)
    assert [row for batch in found for row in batch] != [
        row for batch in batches_of_pairs(IDS, pairs, 2) for row in batch
    ]
    backwards = [[100 - row for row in batch] for batch in batches_of_pairs(IDS[::-1], pairs[::-1], epoch)]
    assert backwards == found


def batches_of_pairs(ids, pairs, epoch):
    order = Order(ids, seed=7, batch_bundles=6, pairs=pairs)
    return [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize("start", [0, 1, 16, 17, 18, 33])
def test_a_restart_goes_on_exactly_where_it_stopped(start):
    order = Order(IDS, seed=7, batch_bundles=6)
    assert [order.batch(step) for step in range(start, 34)] == batches()[start:]


def test_steps_count_over_epochs_and_stop_where_told():
    assert steps_per_epoch(101, 6) == 17
    assert total_steps(101, epochs=2, batch_bundles=6, max_steps=None) == 34
    assert total_steps(101, epochs=2, batch_bundles=6, max_steps=5) == 5
    assert total_steps(101, epochs=2, batch_bundles=6, max_steps=500) == 34


def test_nothing_to_order_is_refused():
    with pytest.raises(ValueError, match="nothing to order"):
        Order(np.empty(0, np.uint64), seed=0, batch_bundles=1)
