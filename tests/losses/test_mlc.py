"""What the MLC loss must do, beyond the golden numbers: identities, limits, and gradients where they are delicate."""

import math

import pytest
import torch
import torch.nn.functional as F

from mlc_ray.losses.mlc import leading_share, mlc_loss, mlc_losses, singular_values, unit_rows


def plain_loss(z, temperature=0.2, scaling="leading"):
    """The definition, by torch.linalg.svdvals on each bundle."""
    losses = []
    for bundle in F.normalize(z.double(), dim=-1):
        s = torch.linalg.svdvals(bundle)
        logits = s / s[0].detach() / temperature if scaling == "leading" else s / temperature
        losses.append(-torch.log_softmax(logits, dim=0)[0])
    return torch.stack(losses).mean()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size, seed=0):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


@pytest.mark.parametrize("scaling", ["leading", "none"])
@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 10, 4), (1, 2, 8)])
def test_values_and_gradients_equal_the_svd_definition(scaling, shape):
    ours, theirs = (random(*shape).requires_grad_() for _ in range(2))
    loss, values = mlc_loss(ours, temperature=0.3, scaling=scaling)
    expected = plain_loss(theirs, 0.3, scaling)
    loss.backward()
    expected.backward()
    assert values.shape == (shape[0], min(shape[1:]))
    assert torch.allclose(loss, expected, rtol=1e-10)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)


def test_leading_scaling_detaches_the_first_singular_value():
    z = random(1, 4, 8).requires_grad_()
    mlc_loss(z)[0].backward()
    attached = z.detach().clone().requires_grad_()
    s = torch.linalg.svdvals(F.normalize(attached[0], dim=-1))
    loss = -torch.log_softmax(s / s[0] / 0.2, dim=0)[0]
    assert torch.allclose(loss, mlc_loss(z)[0])  # the same value,
    loss.backward()
    assert (attached.grad - z.grad).norm() > 0.05 * z.grad.norm()  # another gradient


def test_sum_of_squares_is_the_number_of_languages():
    _, values = mlc_loss(random(4, 7, 32))
    assert torch.allclose(values.square().sum(dim=1), torch.full((4,), 7.0, dtype=torch.float64))


def test_singular_values_are_those_of_svd_and_descend():
    rows = unit_rows(random(3, 6, 20))
    values = singular_values(rows)
    assert torch.allclose(values, torch.linalg.svdvals(rows), rtol=1e-10)
    assert (values[:, :-1] >= values[:, 1:]).all()


@pytest.mark.parametrize("rank_limit", [(6, 16), (6, 4)])
def test_minimum_is_at_collinear_languages(rank_limit):
    languages, size = rank_limit
    z = random(1, 1, size).expand(1, languages, size) * torch.arange(1.0, languages + 1).view(1, -1, 1)
    limit = min(languages, size)
    minimum = -math.log(math.exp(5) / (math.exp(5) + limit - 1))
    assert mlc_loss(z)[0].item() == pytest.approx(minimum, rel=1e-6)
    for seed in range(5):
        assert mlc_loss(random(1, languages, size, seed=seed))[0].item() > minimum


@pytest.mark.parametrize(
    "transform",
    [
        lambda z: z[:, torch.tensor([3, 0, 4, 1, 2])],
        lambda z: z @ orthogonal(z.shape[-1]),
        lambda z: z * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(1, -1, 1),
        lambda z: z * torch.tensor([0.1, 3.0, 7.0, 1.0, 100.0], dtype=torch.float64).view(1, -1, 1),
    ],
    ids=["permutation", "rotation", "sign flips", "scale"],
)
def test_invariances(transform):
    z = random(3, 5, 12)
    assert torch.allclose(mlc_losses(z)[0], mlc_losses(transform(z))[0], rtol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_is_finite_and_bounded_near_rank_one(noise, dtype):
    z = (random(1, 1, 64).expand(2, 10, 64) + noise * random(2, 10, 64)).to(dtype).requires_grad_()
    loss, _ = mlc_loss(z)
    loss.backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.norm() < 10


def test_gradient_is_right_near_rank_one():
    base = random(1, 1, 64).expand(1, 8, 64) + 1e-3 * random(1, 8, 64)
    ours, theirs = base.clone().requires_grad_(), base.clone().requires_grad_()
    mlc_loss(ours)[0].backward()
    plain_loss(theirs).backward()
    assert (ours.grad - theirs.grad).norm() < 1e-6 * theirs.grad.norm()


def test_gradient_is_finite_at_tied_singular_values():
    z = torch.eye(5, 16, dtype=torch.float64).unsqueeze(0).clone().requires_grad_()  # all singular values are 1
    mlc_loss(z)[0].backward()
    assert torch.isfinite(z.grad).all()


def test_absent_languages_take_no_part():
    z = random(2, 6, 16)
    present = torch.tensor([[True, False, True, True, False, True], [True] * 6])
    filled = z.clone()
    filled[0, [1, 4]] = 1e3  # whatever stands in an absent row
    losses, values = mlc_losses(filled.requires_grad_(), present=present)
    alone, _ = mlc_losses(z[:1, [0, 2, 3, 5]])
    whole, _ = mlc_losses(z[1:])
    assert torch.allclose(losses, torch.cat([alone, whole]), rtol=1e-9)
    assert (values[0, 4:] == 0).all()
    losses.sum().backward()
    assert (filled.grad[0, [1, 4]] == 0).all()
    assert (filled.grad[0, 0] != 0).any()


@pytest.mark.parametrize("count", [0, 1])
def test_a_bundle_with_fewer_than_two_languages_costs_nothing(count):
    present = torch.zeros(1, 4, dtype=torch.bool)
    present[0, :count] = True
    z = random(1, 4, 8).requires_grad_()
    losses, _ = mlc_losses(z, present=present)
    losses.sum().backward()
    assert losses.item() == 0
    assert (z.grad == 0).all()


def test_bf16_inputs_agree_with_fp32():
    z = random(4, 10, 128).float()
    assert mlc_loss(z.bfloat16())[0].item() == pytest.approx(mlc_loss(z)[0].item(), rel=1e-2)


def test_accumulation_halves_add_up_to_one_batch():
    whole = random(4, 5, 16).requires_grad_()
    halves = whole.detach().clone().requires_grad_()
    mlc_loss(whole)[0].backward()
    for part in (slice(0, 2), slice(2, 4)):
        (mlc_loss(halves[part])[0] / 2).backward()
    assert torch.allclose(whole.grad, halves.grad, rtol=1e-10)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"\[B, L, D\].*\(3, 4\)"):
        mlc_loss(random(3, 4))
    with pytest.raises(ValueError, match=r"present must be \[B, L\] = \(2, 3\), got shape \(2, 5\)"):
        mlc_loss(random(2, 3, 4), present=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        mlc_loss(random(1, 3, 4), temperature=0)
    with pytest.raises(ValueError, match="'mean'"):
        mlc_loss(random(1, 3, 4), scaling="mean")


def test_leading_share():
    collinear = random(1, 1, 8).expand(1, 4, 8)
    _, values = mlc_loss(torch.cat([collinear, torch.eye(4, 8, dtype=torch.float64).unsqueeze(0)]))
    assert leading_share(values).tolist() == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bundle_that_is_not_finite_is_nan_and_the_others_are_not(bad):
    z = random(3, 4, 16)
    z[1, 2, 5] = bad
    losses, values = mlc_losses(z)
    assert losses[1].isnan() and values[1].isnan().all()
    alone, _ = mlc_losses(z[[0, 2]])
    assert torch.equal(losses[[0, 2]], alone)
