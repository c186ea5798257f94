"""The term that keeps benign bundles: values and gradients against the formula written out, and where it is 0."""

import pytest
import torch

from mlc_ray.config import ConfigError, ObjectiveConfig, parse_config
from mlc_ray.losses.base import Kept
from mlc_ray.losses.consistency import Consistency
from mlc_ray.losses.kl import kl_divergence, kl_losses
from mlc_ray.losses.objective import Objective
from mlc_ray.types import ResponseLogProbs
from tests.train.tiny import tiny_config

WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0])


def logits(seed, dtype=torch.float32):
    return (3 * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("chunk", [1, 14, 2**20])
def test_divergence_and_gradient_are_those_of_the_formula(chunk, monkeypatch):
    monkeypatch.setattr("mlc_ray.losses.kl.CHUNK", chunk)
    ours, theirs = logits(1).requires_grad_(), logits(1).double().requires_grad_()
    reference = logits(2)
    wanted = reference.double().softmax(-1)
    plain = torch.stack(
        [
            sum(p * (p / q).log() for p, q in zip(*row, strict=True))
            for row in zip(wanted, theirs.softmax(-1), strict=True)
        ]
    )
    found = kl_divergence(ours, reference)
    assert torch.allclose(found.double(), plain, atol=1e-5) and (found > 0).all()
    (found * WEIGHTS).sum().backward()
    (plain * WEIGHTS).sum().backward()
    assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)


def test_it_is_nothing_where_the_policy_is_the_reference():
    for dtype in (torch.float32, torch.bfloat16):
        ours = logits(1, dtype).requires_grad_()
        found = kl_divergence(ours, logits(1, dtype))
        found.sum().backward()
        assert found.tolist() == [0.0] * 4 and (ours.grad == 0).all() and ours.grad.dtype == dtype


def test_a_bundle_has_the_mean_over_its_places_and_a_harmful_one_none():
    kept = Kept(logits(1), logits(2), torch.tensor([0, 0, 2, 2]), torch.tensor([0.5, 0.5, 0.25, 0.75]), 3)
    single = kl_divergence(kept.policy, kept.reference)
    assert torch.allclose(
        kl_losses(kept), torch.stack([single[:2].mean(), torch.tensor(0.0), 0.25 * single[2] + 0.75 * single[3]])
    )


def test_the_objective_adds_it_by_its_schedule_and_it_begins_nothing_that_carries():
    config = {
        "objective": {"loss": "sft"},
        "mlc": {"weight": 0},
        "terms": {"kl": {"weight": 2, "start": 0.5, "ramp": 0.5}},
    }
    made = Objective(parse_config(ObjectiveConfig, config))
    assert made.needs_reference and made.needs_reference_logits and made.ever_taps and made.begins(4) == {}
    assert [made.factors(step, 4).get("kl") for step in range(4)] == [None, None, 0.5, 1.0]
    chosen = ResponseLogProbs(torch.tensor([-2.0, -2.0]), torch.tensor([1, 1]))
    kept = Kept(logits(1), logits(2), torch.zeros(4, dtype=torch.long), torch.full((4,), 0.25), 2)
    given = {"weight": torch.ones(2), "chosen": chosen, "representations": torch.zeros(2, 2, 3), "factors": {"kl": 0.5}}
    said = made.total_loss(**given, term_weight=torch.tensor([1.0, 0.0]), kept=kept)
    assert float(said.loss) == pytest.approx(4 + 0.5 * 2 * float(kl_losses(kept)[0]))
    assert said.term_metrics["loss/kl"][1] == 0
    with pytest.raises(ValueError, match="'kl' needs next-token logits"):
        made.total_loss(**given)


def test_a_cached_reference_is_refused_and_so_are_facts_that_exclude_it(monkeypatch):
    terms = {"kl": {"weight": 0.1}}
    tiny_config(objective={"loss": "sft"}, terms=terms, reference="online")
    with pytest.raises(ValueError, match=r"terms\.kl compares whole distributions.*reference: online"):
        tiny_config(objective={"loss": "sft"}, terms=terms)
    monkeypatch.setattr(Consistency, "needs_reference_logits", True)
    with pytest.raises(ConfigError, match=r"needs_decisions and needs_reference_logits.*make two terms"):
        Objective(parse_config(ObjectiveConfig, {"terms": {"consistency": {"weight": 1}}}))
