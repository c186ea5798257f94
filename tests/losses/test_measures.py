"""Measures of collapse against plain definitions, and on states whose answer is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlc_ray.losses import measures
from mlc_ray.losses.measures import (
    MIN_PER_KIND,
    RIDGE,
    between_bundle_cosine,
    cosine_sums,
    effective_rank,
    probe_auc,
    separability,
)
from mlc_ray.losses.mlc import mlc_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everyone(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def test_between_bundle_cosine_sees_the_collapse_that_the_loss_does_not():
    direction = random(1, 1, 16)
    collapsed = direction.expand(3, 4, 16)
    apart = torch.eye(3, 16, dtype=torch.float64).unsqueeze(1).expand(3, 4, 16)
    present = everyone(3, 4)
    assert mlc_loss(collapsed)[0].item() == pytest.approx(mlc_loss(apart)[0].item())
    assert between_bundle_cosine(collapsed, present).item() == pytest.approx(1.0)
    assert between_bundle_cosine(apart, present).item() == pytest.approx(0.0)
    mixed = torch.cat([collapsed[:1], -collapsed[:1], apart[:1]])
    only = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
    assert between_bundle_cosine(mixed, only).item() == pytest.approx(1.0)
    assert math.isnan(between_bundle_cosine(mixed[:1], present[:1]).item())


@pytest.mark.parametrize("block", [1, 200, 2**22])
def test_blocks_and_shares_of_the_work_add_up_to_the_plain_mean(monkeypatch, block):
    monkeypatch.setattr(measures, "BLOCK", block)
    z, present = random(7, 3, 8), torch.arange(21).view(7, 3) % 4 != 1
    rows = [(b, F.normalize(z[b, k], dim=0)) for b in range(7) for k in range(3) if present[b, k]]
    pairs = [abs(float(x @ y)) for a, x in rows for b, y in rows if a != b]
    assert float(between_bundle_cosine(z, present)) == pytest.approx(sum(pairs) / len(pairs))
    parts = [cosine_sums(z, present, part) for part in (range(0), range(0, 2), range(2, 3), range(3, 7))]
    assert sum(float(total) for total, _ in parts) == pytest.approx(sum(pairs))
    assert sum(int(number) for _, number in parts) == len(pairs)


def test_no_tensor_has_the_square_of_all_rows():
    z, present = random(64, 4, 8), everyone(64, 4)
    with Largest() as seen:
        between_bundle_cosine(z, present)
        effective_rank(z, present)
    assert seen.largest == 64 * 64 * 4 * 4  # small enough for one block
    with pytest.MonkeyPatch.context() as patch, Largest() as seen:
        patch.setattr(measures, "BLOCK", 4 * 64 * 4 * 4)
        between_bundle_cosine(z, present)
    assert seen.largest == 4 * 64 * 4 * 4


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


# ------------------------------------------------------------------------------------------------- effective rank


def test_effective_rank_equals_the_definition_with_absent_languages():
    z, present = (
        random(5, 4, 8),
        torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]).bool(),
    )
    means = torch.stack([F.normalize(z[b, present[b]], dim=-1).mean(dim=0) for b in (0, 1, 3, 4)])
    s = torch.linalg.svdvals(F.normalize(means, dim=-1))
    p = s / s.sum()
    expected = math.exp(-sum(float(x * x.log()) for x in p))
    rank, share = effective_rank(z, present)
    assert float(rank) == pytest.approx(expected)
    assert float(share) == pytest.approx((expected - 1) / 3)


def test_effective_rank_of_collapsed_orthogonal_and_paired_bundles():
    eye = torch.eye(4, 16, dtype=torch.float64).unsqueeze(1).expand(4, 3, 16)
    assert [float(x) for x in effective_rank(eye, everyone(4, 3))] == pytest.approx([4.0, 1.0])
    one = random(1, 1, 16).expand(4, 3, 16)
    assert [float(x) for x in effective_rank(one, everyone(4, 3))] == pytest.approx([1.0, 0.0], abs=1e-5)
    pairs = eye[[0, 0, 1, 1]]
    assert [float(x) for x in effective_rank(pairs, everyone(4, 3))] == pytest.approx([2.0, 1 / 3], abs=1e-5)
    narrow = random(9, 3, 2)  # no more than D directions
    assert float(effective_rank(narrow, everyone(9, 3))[0]) <= 2 + 1e-9


def test_effective_rank_falls_as_bundles_move_together():
    common, own = F.normalize(random(1, 1, 64), dim=-1), F.normalize(random(8, 1, 64, seed=1), dim=-1)
    ranks = [
        float(effective_rank(((1 - part) * own + part * common).expand(8, 3, 64), everyone(8, 3))[0])
        for part in (0.0, 0.3, 0.6, 0.9, 0.99)
    ]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > 7.5 and ranks[-1] < 1.5


def test_effective_rank_of_one_bundle_is_not_a_number():
    for present in (everyone(1, 3), torch.tensor([[True] * 3, [False] * 3])):
        assert all(math.isnan(x) for x in effective_rank(random(len(present), 3, 8), present))


def test_effective_rank_of_diverged_states_is_not_a_number():
    z = random(3, 2, 8)
    z[1, 0, 0] = math.inf
    assert all(math.isnan(x) for x in effective_rank(z, everyone(3, 2)))


# --------------------------------------------------------------------------------------------------- separability


def plain_leave_pair_out(states, positive):
    """Train a ridge probe for every pair left out, in primal form, and count pairs in order."""
    x = states - states.mean(dim=0)
    x = x / x.square().sum(dim=1).mean().sqrt()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    y = torch.where(positive, 1.0, -1.0).to(x.dtype)
    right = []
    for up in positive.nonzero()[:, 0].tolist():
        for down in (~positive).nonzero()[:, 0].tolist():
            rest = [i for i in range(len(x)) if i not in (up, down)]
            normal = x[rest].T @ x[rest] + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
            weights = torch.linalg.solve(normal, x[rest].T @ y[rest])
            right.append(float(x[up] @ weights > x[down] @ weights))
    return sum(right) / len(right)


@pytest.mark.parametrize("size", [3, 12, 40])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_closed_form_equals_training_a_probe_for_every_pair(size, shift):
    states, positive = random(14, size), torch.arange(14) < 6
    states[positive, 0] += 3 * shift
    assert float(probe_auc(states, positive)) == pytest.approx(plain_leave_pair_out(states, positive))


def test_kinds_that_differ_are_told_apart_and_equal_ones_are_at_chance():
    positive = torch.arange(64) % 2 == 0
    apart = random(64, 200)
    apart[positive, :20] += 2
    assert float(probe_auc(apart, positive)) > 0.99
    # far more dimensions than rows: a probe without cross-validation would be perfect here
    aucs = torch.stack([probe_auc(random(24, 200, seed=seed), torch.arange(24) < 12) for seed in range(60)])
    assert abs(float(aucs.mean()) - 0.5) < 3 * float(aucs.std()) / 60**0.5
    assert float(aucs.std()) < 0.2


def test_collapsed_states_are_at_chance_exactly():
    assert float(probe_auc(random(1, 50).expand(20, 50), torch.arange(20) < 10)) == 0.5
    assert float(probe_auc(torch.zeros(20, 50), torch.arange(20) < 10)) == 0.5


def test_scale_shift_and_rotation_of_states_do_not_matter():
    states, positive = random(30, 12), torch.arange(30) < 13
    states[positive] += 0.4
    turn = torch.linalg.qr(random(12, 12, seed=3)).Q
    moved = states @ turn * 1e-3 + 5
    assert float(probe_auc(moved, positive)) == pytest.approx(float(probe_auc(states, positive)), abs=1e-6)


def test_matched_pairs_are_below_chance_as_documented():
    form = random(20, 50)
    twins = torch.cat([form, form]) + 0.3 * random(40, 50, seed=1)
    assert float(probe_auc(twins, torch.arange(40) < 20)) < 0.3


def test_every_language_counts_alike():
    harmful = torch.arange(40) % 2 == 0
    states = random(40, 3, 64)
    states[harmful, 0] += 2  # one language alone tells the kinds apart
    present = everyone(40, 3)
    each = [float(probe_auc(states[:, language], harmful)) for language in range(3)]
    assert float(separability(states, present, harmful)) == pytest.approx(sum(each) / 3)
    assert each[0] > 0.99 and max(each[1:]) < 0.8
    present[:, 2] = torch.arange(40) < 2 * MIN_PER_KIND - 2  # too few bundles have it
    assert float(separability(states, present, harmful)) == pytest.approx(sum(each[:2]) / 2)
    changed = states.clone()
    changed[:, 2] = 1e3
    assert float(separability(changed, present, harmful)) == pytest.approx(sum(each[:2]) / 2)


def test_one_kind_or_too_few_bundles_give_no_number():
    states = random(40, 2, 8)
    assert math.isnan(separability(states, everyone(40, 2), everyone(40)))
    few = torch.arange(40) < MIN_PER_KIND - 1
    assert math.isnan(separability(states, everyone(40, 2), few))
    enough = torch.arange(40) < MIN_PER_KIND
    assert not math.isnan(separability(states, everyone(40, 2), enough))
