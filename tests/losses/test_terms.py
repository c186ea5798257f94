"""The terms against collapse: values and gradients against plain loops, who takes part, limits, collapse itself."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mlc_ray.config import ObjectiveConfig
from mlc_ray.losses.anchor import anchor_losses
from mlc_ray.losses.contrast import contrast_losses
from mlc_ray.losses.objective import Objective
from mlc_ray.losses.variance import variance_losses
from mlc_ray.types import ResponseLogProbs


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size, seed=0):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


PRESENT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)


HARMFUL = torch.tensor([True, False, True, False, False])


def plain_contrast(z, present, temperature, other_kind=1):
    """Loop over rows, positives and negatives; bundles without a positive or a negative cost nothing."""
    rows = {(b, i): F.normalize(z[b, i], dim=0) for b in range(len(z)) for i in range(z.shape[1]) if present[b, i]}
    losses = []
    for bundle in range(len(z)):
        of_rows = []
        for anchor in (key for key in rows if key[0] == bundle):
            others = [key for key in rows if key != anchor]
            positives = [key for key in others if key[0] == bundle]
            if not positives or len(positives) == len(others):
                continue
            counted = {key: other_kind if HARMFUL[key[0]] != HARMFUL[bundle] else 1 for key in others}
            below = sum(n * torch.exp(rows[anchor] @ rows[key] / temperature) for key, n in counted.items())
            shares = [torch.exp(rows[anchor] @ rows[key] / temperature) / below for key in positives]
            of_rows.append(-sum(map(torch.log, shares)) / len(shares))
        losses.append(sum(of_rows) / len(of_rows) if of_rows else torch.zeros((), dtype=z.dtype))
    return torch.stack(losses)


def plain_variance(z, present, target_std):
    """The definition on the D x D covariance, by torch.cov."""
    means = [
        torch.stack([F.normalize(row, dim=0) for row, there in zip(bundle, mask, strict=True) if there]).mean(dim=0)
        for bundle, mask in zip(z, present, strict=True)
        if mask.any()
    ]
    number, size = len(means), z.shape[-1]
    covariance = torch.cov(torch.stack(means).T)
    std = (size * covariance.diagonal() + 1e-4).sqrt()
    spread = torch.clamp(target_std - std, min=0).mean()
    squares = torch.linalg.matrix_norm(covariance) ** 2 - covariance.trace() ** 2 / min(number - 1, size)
    return spread + squares / (covariance.trace() + 0.01) ** 2 / 25


def plain_anchor(h, present, r):
    losses = []
    for bundle, mask, target in zip(h, present, r, strict=True):
        of_rows = [((row - target) ** 2).sum() / (target**2).sum() for row, m in zip(bundle, mask, strict=True) if m]
        losses.append(sum(of_rows) / len(of_rows) if of_rows else torch.zeros((), dtype=h.dtype))
    return torch.stack(losses)


def test_contrast_weighs_bundles_of_the_other_kind_as_it_says():
    ours, theirs = (random(5, 4, 7, seed=8).requires_grad_() for _ in range(2))
    losses = contrast_losses(ours, PRESENT, temperature=0.3, harmful=HARMFUL, other_kind=5.0)
    expected = plain_contrast(theirs, PRESENT, 0.3, other_kind=5)
    assert torch.allclose(losses, expected, rtol=1e-9) and losses[0] > plain_contrast(theirs, PRESENT, 0.3)[0]
    losses.sum().backward()
    expected.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)
    with pytest.raises(ValueError, match=r"other_kind=5\.0 needs the kinds"):
        contrast_losses(ours, PRESENT, temperature=0.3, other_kind=5.0)
    made = Objective(
        ObjectiveConfig(
            objective={"loss": "sft"},
            mlc={"weight": 0},
            terms={"contrast": {"weight": 1, "other_kind": 5.0, "temperature": 0.3}},
        )
    )
    answer = ResponseLogProbs(torch.zeros(5), torch.ones(5))
    said = made.total_loss(
        weight=torch.ones(5),
        chosen=answer,
        representations=ours,
        present=PRESENT,
        harmful=HARMFUL,
        groups=[0, 0, 0, 1, 1],
    )
    halves = [
        contrast_losses(ours[part], PRESENT[part], temperature=0.3, harmful=HARMFUL[part], other_kind=5.0)
        for part in (slice(3), slice(3, 5))
    ]
    assert torch.allclose(said.term_metrics["loss/contrast"], torch.cat(halves), rtol=1e-9)


def test_contrast_equals_the_plain_loop():
    ours, theirs = (random(5, 4, 8).requires_grad_() for _ in range(2))
    losses, expected = contrast_losses(ours, PRESENT, temperature=0.3), plain_contrast(theirs, PRESENT, 0.3)
    assert torch.allclose(losses, expected, rtol=1e-10)
    assert (losses[[2, 3]] == 0).all() and (losses[[0, 1, 4]] > 0).all()
    (losses * torch.arange(5)).sum().backward()
    (expected * torch.arange(5)).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    assert (ours.grad[~PRESENT] == 0).all()


@pytest.mark.parametrize("size", [3, 8, 40])
def test_variance_equals_the_plain_definition(size):
    ours, theirs = (random(5, 4, size).requires_grad_() for _ in range(2))
    losses, expected = variance_losses(ours, PRESENT, target_std=0.9), plain_variance(theirs, PRESENT, 0.9)
    assert torch.allclose(losses, expected * PRESENT.any(dim=1), rtol=1e-9)
    losses.sum().backward()
    (4 * expected).backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-7, atol=1e-12)
    assert (ours.grad[~PRESENT] == 0).all()


def test_anchor_equals_the_plain_loop_and_leaves_the_reference_alone():
    ours, theirs = (random(5, 4, 8).requires_grad_() for _ in range(2))
    reference = random(5, 8, seed=1).requires_grad_()
    losses, expected = anchor_losses(ours, PRESENT, reference), plain_anchor(theirs, PRESENT, reference.detach())
    assert torch.allclose(losses, expected, rtol=1e-10)
    losses.sum().backward()
    expected.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9)
    assert reference.grad is None
    at_rest = reference.detach().unsqueeze(1).expand(5, 4, 8)
    assert (anchor_losses(at_rest, PRESENT, reference) == 0).all()


TERMS = {
    "contrast": lambda z, present: contrast_losses(z, present, temperature=0.2),
    "variance": lambda z, present: variance_losses(z, present, target_std=1.0),
}


@pytest.mark.parametrize("name", TERMS)
def test_what_stands_in_rows_that_take_no_part_does_not_matter(name):
    z = random(5, 4, 8)
    other = torch.where(PRESENT.unsqueeze(-1), z, random(5, 4, 8, seed=9) * 100)
    kept = PRESENT.any(dim=1)
    losses = TERMS[name](z, PRESENT)
    assert torch.equal(losses, TERMS[name](other, PRESENT))
    assert torch.allclose(losses[kept], TERMS[name](z[kept], PRESENT[kept]), rtol=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_order_of_bundles_and_languages_and_scale_do_not_matter(name):
    z, losses = random(5, 4, 8), TERMS[name](random(5, 4, 8), PRESENT)
    bundles, languages = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 3, 1])
    moved = TERMS[name](z[bundles][:, languages], PRESENT[bundles][:, languages])
    assert torch.allclose(moved, losses[bundles], rtol=1e-12)
    assert torch.allclose(TERMS[name](z * random(5, 4, 1, seed=2).abs(), PRESENT), losses, rtol=1e-10)


def test_rotations_do_not_matter_to_contrast_and_anchor():
    z, turn, r = random(5, 4, 8), orthogonal(8), random(5, 8, seed=1)
    assert torch.allclose(TERMS["contrast"](z @ turn, PRESENT), TERMS["contrast"](z, PRESENT), rtol=1e-9)
    assert torch.allclose(anchor_losses(z @ turn, PRESENT, r @ turn), anchor_losses(z, PRESENT, r), rtol=1e-9)


def test_contrast_sees_signs():
    z = random(3, 1, 8).expand(3, 4, 8)
    everyone = torch.ones(3, 4, dtype=torch.bool)
    flipped = z * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64).view(1, 4, 1)
    assert (TERMS["contrast"](flipped, everyone) > TERMS["contrast"](z, everyone) + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-6, 1e-3])
@pytest.mark.parametrize("name", TERMS)
def test_finite_at_collapse(name, noise, dtype):
    z = (random(1, 1, 32).expand(4, 5, 32) + noise * random(4, 5, 32)).to(dtype).requires_grad_()
    everyone = torch.ones(4, 5, dtype=torch.bool)
    losses = TERMS[name](z, everyone)
    losses.mean().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(z.grad).all()
    assert z.grad.norm() < 100


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("bundles", [2, 3, 6])
def test_spreading_from_collapse_always_lowers_the_term(name, bundles):
    common, own = F.normalize(random(1, 1, 64), dim=-1), F.normalize(random(bundles, 1, 64, seed=1), dim=-1)
    everyone = torch.ones(bundles, 3, dtype=torch.bool)
    values = [
        float(TERMS[name](((1 - part) * common + part * own).expand(bundles, 3, 64), everyone).mean())
        for part in (0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
    ]
    assert values == sorted(values, reverse=True) and values[0] - values[-1] > 0.3


def test_contrast_at_collapse_and_at_its_best():
    everyone = torch.ones(3, 4, dtype=torch.bool)
    collapsed = random(1, 1, 16).expand(3, 4, 16)
    assert contrast_losses(collapsed, everyone, temperature=0.1).tolist() == pytest.approx([math.log(11)] * 3)
    apart = torch.eye(3, 16, dtype=torch.float64).unsqueeze(1).expand(3, 4, 16)
    best = -math.log(math.exp(10) / (3 * math.exp(10) + 8))
    assert contrast_losses(apart, everyone, temperature=0.1).tolist() == pytest.approx([best] * 3)


def test_off_diagonal_covariance_of_few_bundles_would_reward_collapse():
    """Why `variance_losses` does not take VICReg's covariance term as it stands."""

    def off_diagonal(means):
        covariance = torch.cov(8 * means.T)  # 8 = sqrt(64)
        return (covariance.square().sum() - covariance.diagonal().square().sum()) / 64

    apart = torch.eye(2, 64, dtype=torch.float64) @ orthogonal(64)
    together = apart * 0.1 + apart.mean(dim=0) * 0.9
    assert off_diagonal(apart) > 10 > 0.1 > off_diagonal(together)
    assert variance_losses(together.unsqueeze(1), torch.ones(2, 1, dtype=torch.bool), target_std=1.0)[0] > 0.5


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("present", [PRESENT[2:3], PRESENT[:1], PRESENT[2:4]])
def test_fewer_than_two_bundles_cost_nothing(name, present):
    z = random(len(present), 4, 8).requires_grad_()
    losses = TERMS[name](z, present)
    losses.sum().backward()
    assert (losses == 0).all() and (z.grad == 0).all()


# ------------------------------------------------------------------------------------------------- in the objective


def inputs(bundles, seed=0):
    answers = [ResponseLogProbs(-random(bundles, seed=i).abs() * 9, torch.full((bundles,), 4)) for i in (1, 2)]
    return {"chosen": answers[0], "rejected": answers[1]}


def objective(loss="simpo", mlc=0.8, **terms):
    return Objective(ObjectiveConfig(objective=loss, mlc={"weight": mlc}, terms=terms))


@pytest.mark.parametrize("kind", TERMS)
def test_the_total_adds_the_weighted_term_of_each_group(kind):
    """Bundles 0 to 2 are a group, 3 and 4 another, 5 (of weight 0) one alone."""
    z, everyone = random(6, 4, 8).requires_grad_(), torch.ones(6, 4, dtype=torch.bool)
    weight = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0], dtype=torch.float64)
    term_weight = torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25, 0.0], dtype=torch.float64)
    given = {"weight": weight, "term_weight": term_weight, "representations": z, "present": everyone, **inputs(6)}
    plain = objective().total_loss(**given)
    result = objective(**{kind: {"weight": 0.7}}).total_loss(**given, groups=(4, 4, 4, 1, 1, 7))
    of_group = {
        "contrast": partial(contrast_losses, temperature=0.1),
        "variance": partial(variance_losses, target_std=1),
    }
    losses = torch.cat([of_group[kind](z[part], everyone[part]) for part in (slice(0, 3), slice(3, 5), slice(5, 6))])
    assert result.loss.item() == pytest.approx(plain.loss.item() + 0.7 * losses[[0, 1, 3, 4]].mean().item())
    assert result.term_metrics[f"loss/{kind}"].tolist() == pytest.approx(losses.tolist())
    assert losses[5] == 0 and (losses[:5] > 0).all()
    (result.loss - plain.loss).backward()
    assert (z.grad[5] == 0).all() and (z.grad[:5] != 0).any(dim=2).all()  # bundle 2 is compared with its neighbours
    assert f"loss/{kind}" not in plain.term_metrics


@pytest.mark.parametrize("kind", TERMS)
def test_without_groups_all_bundles_are_one(kind):
    given = {"weight": torch.ones(4).double(), "representations": random(4, 3, 8), **inputs(4)}
    one, whole = (objective(**{kind: {}}).total_loss(**given, groups=groups) for groups in ((0,) * 4, None))
    assert torch.equal(one.loss, whole.loss)


def test_anchor_halves_add_up_to_one_batch():
    h, r, z, weight = random(4, 3, 8), random(4, 8, seed=1), random(4, 3, 6, seed=2), torch.ones(4).double()
    everyone = torch.ones(4, 3, dtype=torch.bool)
    term = objective(anchor={"weight": 0.5})

    def run(part, h):
        answers = {
            name: ResponseLogProbs(answer.total[part], answer.length[part]) for name, answer in inputs(4).items()
        }
        return term.total_loss(
            weight=weight[part],
            representations=z[part],
            present=everyone[part],
            tapped=h[part],
            reference_state=r[part],
            **answers,
        ).loss

    whole, halves = h.clone().requires_grad_(), h.clone().requires_grad_()
    run(slice(0, 4), whole).backward()
    for part in (slice(0, 2), slice(2, 4)):
        run(part, halves).backward()
    assert torch.allclose(whole.grad, halves.grad, rtol=1e-10)


def test_facts_of_the_objective():
    facts = {
        (loss, kind): (o.needs_reference, o.alignment.needs_reference, o.needs_reference_state, o.needs_group)
        for loss in ("dpo", "sft")
        for kind in ("contrast", "anchor", "variance")
        for o in [objective(loss, **{kind: {}})]
    }
    assert facts == {
        ("dpo", "contrast"): (True, True, False, True),
        ("dpo", "anchor"): (True, True, True, False),
        ("dpo", "variance"): (True, True, False, True),
        ("sft", "contrast"): (False, False, False, True),
        ("sft", "anchor"): (True, False, True, False),
        ("sft", "variance"): (False, False, False, True),
    }


def test_a_missing_part_is_named():
    z = random(2, 3, 8)
    with pytest.raises(ValueError, match="term 'anchor' needs"):
        objective(anchor={}).total_loss(
            weight=torch.ones(2), representations=z, present=torch.ones(2, 3, dtype=torch.bool), **inputs(2)
        )


def test_steps_that_do_not_tap_have_no_term():
    result = objective(anchor={}).total_loss(weight=torch.ones(2).double(), **inputs(2))
    assert not result.term_metrics
    assert result.loss == result.metrics["loss/alignment"].sum()


def test_several_terms_at_once_and_every_part_is_in_the_total():
    """Two of them the same class under other names, one switched off, and none of MLC."""
    terms = {
        "contrast": {"weight": 0.5},
        "cold": {"name": "contrast", "weight": 2.0, "temperature": 0.05},
        "anchor": {"weight": 0.25},
        "variance": {"weight": 0},
    }
    term = objective(mlc=0, **terms)
    assert term.parts == ["loss/alignment", "loss/contrast", "loss/cold", "loss/anchor"]
    assert [term.taps(step, 2) for step in (0, 1)] == [True, True]
    z, weight = random(2, 4, 8), torch.full((2,), 0.5).double()
    given = {"weight": weight, "representations": z, "tapped": z, **inputs(2)}
    result = term.total_loss(**given, reference_state=random(2, 8, seed=1))
    found = {**result.metrics, **result.term_metrics}
    parts = {name: float(found[name].mean()) for name in term.parts}
    weights = [1, 0.5, 2.0, 0.25]
    total = sum(factor * value for factor, value in zip(weights, parts.values(), strict=True))
    assert result.loss.item() == pytest.approx(total)
    assert {name for name in found if name.startswith("loss/")} == set(parts)
    assert parts["loss/contrast"] != parts["loss/cold"]
    assert not objective(mlc=0, variance={"weight": 0}).taps(0, 1)


def test_a_description_names_every_part_with_its_settings():
    assert objective("sft", mlc=0, keep={"name": "anchor", "weight": 0.25}, contrast={}).describe() == [
        "sft (answers=response)",
        "0.25 x keep (name=anchor): ours",
        "0.1 x contrast (temperature=0.1, other_kind=1.0): after arXiv 2004.11362; ours: bundles as classes of "
        "prompts in several languages",
    ]
