from collections import Counter
from itertools import groupby

import pytest

from mlc_ray.data.order import bundles_consumed, epoch_order, plan_rank, steps_per_epoch, total_steps

IDS = [f"{number:04x}" for number in range(101)]


def plans(world, *, bundles=IDS, per_worker=1, accumulation=1, epochs=2, max_steps=None, start_step=0):
    return [
        plan_rank(
            bundles,
            seed=7,
            epochs=epochs,
            world_size=world,
            rank=rank,
            bundles_per_worker=per_worker,
            accumulation=accumulation,
            max_steps=max_steps,
            start_step=start_step,
        )
        for rank in range(world)
    ]


def rounds(ranks, bundles=IDS):
    """Step -> sorted (bundle, weight) of all ranks."""
    slots = sorted((slot for rank in ranks for slot in rank), key=lambda slot: slot.step)
    return {
        step: sorted((bundles[slot.row_index], slot.weight) for slot in group)
        for step, group in groupby(slots, key=lambda slot: slot.step)
    }


def test_the_order_is_pinned_so_that_no_release_or_machine_shuffles_otherwise():
    assert epoch_order(["a", "b", "c", "d", "e", "f"], seed=42, epoch=0) == [3, 2, 5, 1, 0, 4]


def test_the_order_depends_on_seed_epoch_and_id_alone():
    order = [IDS[i] for i in epoch_order(IDS, 1, 0)]
    assert sorted(order) == IDS
    assert order != IDS
    backwards = IDS[::-1]
    assert [backwards[i] for i in epoch_order(backwards, 1, 0)] == order
    assert [IDS[i] for i in epoch_order(IDS, 1, 1)] != order
    assert [IDS[i] for i in epoch_order(IDS, 2, 0)] != order
    fewer = [i for i in IDS if i != order[5]]
    assert [fewer[i] for i in epoch_order(fewer, 1, 0)] == [i for i in order if i != order[5]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("per_worker", "accumulation"), [(1, 1), (2, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("count", [101, 1, 12])
def test_every_bundle_counts_exactly_once_an_epoch(world, per_worker, accumulation, count):
    ids = IDS[:count]
    ranks = plans(world, bundles=ids, per_worker=per_worker, accumulation=accumulation)
    assert len({len(rank) for rank in ranks}) == 1
    for epoch in range(2):
        real = Counter(s.row_index for rank in ranks for s in rank if s.epoch == epoch and s.weight > 0)
        assert real == Counter(range(count))
    size = world * per_worker * accumulation
    for members in rounds(ranks, ids).values():
        assert len(members) == size
        assert sum(weight for _, weight in members) == pytest.approx(size)
        assert len({weight for _, weight in members if weight > 0}) == 1
    for rank in ranks:
        micros = [slot.micro for slot in rank]
        assert micros == [
            m
            for _ in range(len(rank) // (per_worker * accumulation))
            for m in range(accumulation)
            for _ in range(per_worker)
        ]


def test_a_round_holds_the_same_bundles_however_it_is_divided():
    same = [plans(1, per_worker=6), plans(2, per_worker=3), plans(3, per_worker=2), plans(2, accumulation=3), plans(6)]
    assert all(rounds(ranks) == rounds(same[0]) for ranks in same)


@pytest.mark.parametrize("start", [0, 1, 16, 17, 18, 33, 34, 99])
def test_a_restart_goes_on_exactly_where_it_stopped(start):
    for world in (1, 2, 3):
        per_worker = 6 // world
        everything = plans(world, per_worker=per_worker)
        rest = plans(world, per_worker=per_worker, start_step=start)
        assert rest == [[slot for slot in rank if slot.step >= start] for rank in everything]


def test_steps_count_over_epochs_and_stop_where_told():
    sizes = {"world_size": 2, "bundles_per_worker": 3, "accumulation": 1}
    assert steps_per_epoch(101, **sizes) == 17
    assert total_steps(101, epochs=2, max_steps=None, **sizes) == 34
    assert total_steps(101, epochs=2, max_steps=5, **sizes) == 5
    assert total_steps(101, epochs=2, max_steps=500, **sizes) == 34
    assert sorted(rounds(plans(2, per_worker=3))) == list(range(34))
    assert sorted(rounds(plans(2, per_worker=3, max_steps=5))) == list(range(5))
    assert [bundles_consumed(101, step, **sizes) for step in (0, 1, 16, 17, 18, 34)] == [0, 6, 96, 101, 107, 202]


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="rank 2 is not one of 2 workers"):
        plan_rank(IDS, seed=0, epochs=1, world_size=2, rank=2, bundles_per_worker=1, accumulation=1, max_steps=None)
    with pytest.raises(ValueError, match="nothing to order"):
        plans(1, bundles=[])
