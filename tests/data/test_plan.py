"""How batches are cut: every bundle once, within the budget, as many forwards for every worker, weights that add up."""

import random

import numpy as np
import pytest

from mlc_ray.data.plan import Cutting, Lengths, cut, group_of

HEAD = 5


def lengths_of(count, seed=0):
    """Bundles in 1 to 4 languages, of 20 to 80 tokens each."""
    draw = np.random.default_rng(seed)
    languages = draw.integers(1, 5, count)
    prompts = np.array([draw.integers(20, 80, n) for n in languages], dtype=object)
    return Lengths(
        languages,
        np.array([int(p.sum()) for p in prompts]),
        np.array([int(p[0]) for p in prompts]),
        draw.integers(1, 40, count),
        draw.integers(1, 40, count),
        *np.zeros((3, count), dtype=np.int64),
    )


def cutting(budget=300, workers=2, groups=None, every=1, **changes):
    taps = {"taps": lambda step: step % every == 0, "ever_taps": True}
    return Cutting(budget, workers, **{"head": HEAD, "rejected": True, "group_bundles": groups, **taps, **changes})


def plan_of(batch, lengths, step=0, **settings):
    return cutting(**settings).plan(step, batch, lengths.take(batch))


def all_forwards(plan):
    return [forward for micro in plan.forwards for forward in micro]


SIZES = [random.Random(seed).choices(range(10, 100), k=random.Random(-seed).randint(1, 60)) for seed in range(1, 40)]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("capacity", [120, 250, 1000])
def test_bins_hold_every_item_once_within_the_capacity_and_as_many_for_every_rank(workers, capacity):
    for sizes in SIZES:
        bins = cut(sizes, capacity, workers)
        assert {len(micro) for micro in bins} == {workers}
        assert sorted(item for micro in bins for one in micro for item in one) == list(range(len(sizes)))
        loads = [sum(sizes[item] for item in one) for micro in bins for one in micro]
        assert max(loads) <= capacity
        # No two bins of first-fit would go into one, so that more than half of them is filled.
        assert len(bins) * workers < 2 * sum(sizes) / capacity + 1 + workers
        assert bins == cut(sizes, capacity, workers)


def test_what_is_forwarded_at_the_same_time_is_alike_in_tokens():
    draw = random.Random(0)
    for workers in (2, 4, 8):
        sizes = draw.choices(range(300, 900), k=64)
        bins = cut(sizes, 4096, workers)
        loads = np.array([[sum(sizes[item] for item in one) for one in micro] for micro in bins])
        assert (loads.max(axis=1) / loads.mean(axis=1)).max() < 1.1
        assert loads.sum(axis=0).max() / loads.sum(axis=0).mean() < 1.05


def test_an_item_larger_than_a_bin_has_one_of_its_own():
    bins = cut([50, 400, 30, 20], 100, 1)
    assert sorted(map(sorted, (one for micro in bins for one in micro))) == [[0, 2, 3], [1]]


def test_where_levelling_would_overfill_a_bin_first_fit_stands():
    sizes = [5, 4, 3, 3, 3]  # 9 + 9 fit; each to the emptier bin would be 5 + 3 and 4 + 3 + 3, or 5 + 3 + 3
    bins = [sum(sizes[item] for item in one) for micro in cut(sizes, 9, 1) for one in micro]
    assert max(bins) <= 9 and sum(bins) == 18


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
@pytest.mark.parametrize("budget", [10, 300, 900, 10**6])
def test_weights_add_up_to_the_batch_whatever_the_cut(workers, budget):
    lengths = lengths_of(40)
    batch = [3, 17, 5, 21, 39, 0, 8]
    plan = plan_of(batch, lengths, budget=budget, workers=workers)
    real = [
        (row, weight, term_weight)
        for f in all_forwards(plan)
        for row, weight, term_weight in zip(f.rows, f.weights, f.term_weights, strict=True)
        if weight
    ]
    assert sorted(row for row, _, _ in real) == sorted(batch)
    assert {w for _, w, _ in real} == {workers / len(batch)}
    with_term = [row for row in batch if lengths.languages[row] >= 2]
    assert 0 < len(with_term) < len(batch)
    assert {row: t for row, _, t in real} == {
        row: workers / len(with_term) if row in with_term else 0.0 for row in batch
    }
    assert all(f.rows and len(f.rows) == len(f.weights) for f in all_forwards(plan))
    idle = [f for f in all_forwards(plan) if f.idle]
    assert len(idle) == len(all_forwards(plan)) - len({f.rows for f in all_forwards(plan) if not f.idle})
    if workers == 64:
        assert len(idle) == 57 and {len(f.rows) for f in idle} == {1}


def test_tokens_of_a_forward_are_the_head_once_and_each_bundles_own():
    lengths = lengths_of(10)
    plan = plan_of(range(10), lengths, budget=700)
    for micro, tokens in zip(plan.forwards, plan.tokens, strict=True):
        for forward, number in zip(micro, tokens, strict=True):
            rows = list(forward.rows)
            prompts = int((lengths.prompts[rows] - HEAD * lengths.languages[rows]).sum())
            assert number == HEAD + prompts + int((lengths.chosen[rows] + lengths.rejected[rows] - 2).sum()) <= 700


def test_steps_that_do_not_tap_forward_the_answered_prompt_alone_and_fewer_times():
    lengths = lengths_of(32)
    tapped, plain = (plan_of(range(32), lengths, step, every=2, groups=4, budget=2000) for step in (0, 1))
    assert (tapped.taps, plain.taps) == (True, False)
    assert len(plain.forwards) < len(tapped.forwards)
    assert all(f.groups is None for f in all_forwards(plain)) and all(f.groups for f in all_forwards(tapped))
    own = lengths.own_tokens(head=HEAD, taps=False, rejected=False)
    assert (own == lengths.answered - HEAD + lengths.chosen - 1).all()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("budget", [1300, 2600, 10**6])
def test_a_group_is_the_same_bundles_and_in_one_forward_whatever_the_cut(workers, budget):
    lengths, batch = lengths_of(40), list(range(39, 7, -1))
    plan = plan_of(batch, lengths, budget=budget, workers=workers, groups=8)
    where = {}
    for number, forward in enumerate(f for f in all_forwards(plan) if not f.idle):
        for row, group in zip(forward.rows, forward.groups, strict=True):
            where.setdefault(group, []).append((number, row))
    assert {group: [row for _, row in members] for group, members in where.items()} == {
        group: batch[8 * group : 8 * group + 8] for group in range(4)
    }
    assert all(len({number for number, _ in members}) == 1 for members in where.values())


def test_groups_are_alike_in_size_and_none_is_a_single_bundle_but_of_a_batch_of_one():
    assert [group_of(n, 8) for n in (1, 3, 8)] == [[0], [0] * 3, [0] * 8]
    assert group_of(9, 8) == [0] * 5 + [1] * 4
    for bundles in range(2, 100):
        for most in range(2, 12):
            sizes = np.bincount(group_of(bundles, most))
            assert 2 <= sizes.min() <= sizes.max() <= most or (most == 2 and bundles % 2)
            assert sizes.max() - sizes.min() <= 1 and group_of(bundles, most) == sorted(group_of(bundles, most))
