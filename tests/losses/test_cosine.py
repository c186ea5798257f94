"""Pairwise cosines and centring: values and gradients against plain loops, and where each is zero."""

import pytest
import torch
import torch.nn.functional as F

from mlc_ray.config import ConfigError, ObjectiveConfig, parse_config
from mlc_ray.losses.base import Tapped
from mlc_ray.losses.cosine import cosine_losses
from mlc_ray.losses.mlc import centred, mlc_losses, singular_values, unit_rows
from mlc_ray.losses.objective import Objective
from tests.train.tiny import tiny_config

PRESENT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
ANCHOR = torch.tensor([2, 3, 0, 1, 0])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(z, *, squared=False, anchored=False, detach=True):
    losses = []
    for bundle, there in enumerate(PRESENT):
        rows = {i: F.normalize(z[bundle, i], dim=0) for i in range(4) if there[i]}
        pairs = [(i, j) for i in rows for j in rows if i < j]
        if anchored:
            fixed = int(ANCHOR[bundle])
            pairs = [(fixed, i) for i in rows if i != fixed]
        cosines = [(rows[i].detach() if anchored and detach else rows[i]) @ rows[j] for i, j in pairs]
        values = [cosine**2 if squared else cosine for cosine in cosines]
        losses.append(1 - sum(values) / len(values) if len(rows) > 1 else torch.zeros((), dtype=z.dtype))
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"squared": True}, {"squared": True}),
        ({"anchor": ANCHOR}, {"anchored": True}),
        ({"anchor": ANCHOR, "detach": False}, {"anchored": True, "detach": False}),
    ],
)
def test_cosines_equal_the_plain_loop(ours, theirs):
    one, other = (random(5, 4, 8).requires_grad_() for _ in range(2))
    losses, expected = cosine_losses(one, PRESENT, **ours), plain(other, **theirs)
    assert torch.allclose(losses, expected, rtol=1e-10)
    (losses * torch.arange(1, 6)).sum().backward()
    (expected * torch.arange(1, 6)).sum().backward()
    assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-13)
    assert (one.grad[~PRESENT] == 0).all()
    if ours.get("anchor") is not None:
        at_anchor = one.grad[torch.arange(5), ANCHOR]
        assert (at_anchor == 0).all() == ours.get("detach", True)


def test_squared_cosines_are_a_function_of_mlc_s_singular_values():
    z, whole = random(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)
    fourth = singular_values(unit_rows(z)).pow(4).sum(dim=1)
    assert torch.allclose(cosine_losses(z, whole, squared=True), 1 - (fourth - 4) / 12)


def test_the_linear_form_sees_signs_which_mlc_does_not():
    row = random(8)
    z, whole = torch.stack([row, row, -row]).unsqueeze(0), torch.ones(1, 3, dtype=torch.bool)
    assert float(cosine_losses(z, whole)) == pytest.approx(4 / 3)
    assert float(cosine_losses(z, whole, squared=True)) == pytest.approx(0)
    assert float(cosine_losses(z.abs(), whole)) < float(cosine_losses(z, whole))
    assert torch.allclose(mlc_losses(z)[0], mlc_losses(torch.stack([row] * 3).unsqueeze(0))[0])


def test_centring_takes_the_mean_of_the_rows_that_are_present_from_each():
    z = random(5, 4, 8).requires_grad_()
    shifted = z + 100 * random(8, seed=1)
    rows = [z[b, i] for b in range(5) for i in range(4) if PRESENT[b, i]]
    mean = torch.stack(rows).mean(dim=0)
    expected = (z - mean) * PRESENT.unsqueeze(-1)
    assert torch.allclose(centred(Tapped(z, PRESENT)), expected)
    assert torch.allclose(centred(Tapped(shifted, PRESENT)), expected)
    ours, theirs = (torch.autograd.grad((part**3).sum(), z)[0] for part in (centred(Tapped(z, PRESENT)), expected))
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("name", ["mlc", "cosine"])
def test_a_centred_term_is_of_its_group_alone(name):
    settings = {"mlc": {"name": name, "centring": True}}
    objective = Objective(ObjectiveConfig.model_validate(settings))
    assert objective.needs_group and not Objective(ObjectiveConfig.model_validate({"mlc": {"name": name}})).needs_group
    z = random(4, 3, 8) + 5
    whole = torch.ones(4, 3, dtype=torch.bool)
    term = objective.terms["mlc"]
    groups = torch.cat([term(tapped=Tapped(z[part], whole[part])).loss for part in (slice(0, 2), slice(2, 4))])
    together = term(tapped=Tapped(z, whole)).loss
    assert not torch.allclose(groups, together)
    assert not torch.allclose(groups, type(term)(term.settings.model_copy(update={"centring": False}))(
        tapped=Tapped(z, whole)).loss)  # fmt: skip


@pytest.mark.parametrize("name", ["mlc", "cosine"])
@pytest.mark.parametrize("absent", [0, 1])
def test_a_centred_bundle_alone_has_no_loss(name, absent):
    """Less their own mean, its languages are noise, which a term would turn towards each other."""
    z, present = (random(1 + absent, 3, 8) + 5).requires_grad_(), torch.ones(1 + absent, 3, dtype=torch.bool)
    present[1:] = False
    whole = torch.ones(3, 3, dtype=torch.bool)
    for centring in (True, False):
        term = Objective(ObjectiveConfig.model_validate({"mlc": {"name": name, "centring": centring}})).terms["mlc"]
        losses = term(tapped=Tapped(z, present)).loss
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        assert (losses == 0).all() == centring and (gradient == 0).all() == centring
        assert (term(tapped=Tapped(random(3, 3, 8), whole)).loss > 0).all()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mlc": {"name": "cosine", "detach": True}}, "detach=True is read with form=anchored, not with form=linear"),
        ({"mlc": {"name": "cosine", "temperature": 0.2}}, "temperature"),
        ({"terms": {"cosine": {"weight": 0.5}}}, "set mlc.name='cosine'"),
    ],
)
def test_settings_that_are_not_read_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(ObjectiveConfig, sections)


def test_centring_needs_a_group():
    assert tiny_config(mlc={"centring": True, "weight": 0}, train={"batch_bundles": 1}).active_terms == {}
    with pytest.raises(ValueError, match=r"mlc\.centring compares the bundles of a batch, but train\.batch_bundles=1"):
        tiny_config(mlc={"centring": True}, train={"batch_bundles": 1})
    assert tiny_config(mlc={"centring": True}, train={"group_bundles": 3}).train.group_bundles == 3
    with pytest.raises(ValueError, match="this run has none"):
        tiny_config(train={"group_bundles": 3})
