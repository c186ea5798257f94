"""Components from outside the package: found through the config by where they are, and used in real training steps."""

import pytest
import torch

from examples.my_loss import Hinge
from examples.my_term import SameSign
from mlc_ray.config import ConfigError, ObjectiveConfig, TrainConfig, load_config, parse_config
from mlc_ray.losses.base import Tapped
from mlc_ray.losses.objective import Objective
from mlc_ray.train.export import model_card
from mlc_ray.types import ResponseLogProbs
from tests.train.tiny import ReferenceRow, on_workers, random_rows, run_engine, tiny_config

LOSS = {"loss": "examples.my_loss:Hinge", "margin": 2.0}
TERMS = {"sign": {"name": "examples.my_term:SameSign", "weight": 0.5}}


def test_a_loss_of_ones_own_is_what_it_says():
    objective = Objective(ObjectiveConfig(objective=LOSS))
    assert isinstance(objective.alignment, Hinge)
    assert objective.needs_reference and objective.alignment.needs_rejected
    chosen, rejected = (
        ResponseLogProbs(torch.tensor(totals, requires_grad=True), torch.tensor([3, 4]))
        for totals in ([-5.0, -9.0], [-6.0, -20.0])
    )
    frozen = {"reference_chosen": torch.tensor([-5.5, -10.0]), "reference_rejected": torch.tensor([-6.0, -15.0])}
    result = objective.total_loss(weight=torch.full((2,), 0.5), chosen=chosen, rejected=rejected, **frozen)
    assert result.metrics["loss/alignment"].tolist() == [1.5, 0.0]  # leads of 0.5 and 6 nats; wanted are 2
    assert result.metrics["reward/accuracy"].tolist() == [1.0, 1.0]
    result.loss.backward()
    assert chosen.total.grad.tolist() == [-0.5, 0.0] and rejected.total.grad.tolist() == [0.5, 0.0]


def test_a_term_of_ones_own_sees_the_sign_that_mlc_does_not():
    z = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 4, 8).clone()
    z[1, 2] *= -1
    present = torch.ones(2, 4, dtype=torch.bool)
    objective = Objective(ObjectiveConfig(objective="sft", terms=TERMS))
    assert isinstance(objective.terms["sign"], SameSign)
    chosen = ResponseLogProbs(torch.tensor([-1.0, -1.0]), torch.tensor([1, 1]))
    result = objective.total_loss(weight=torch.ones(2), chosen=chosen, representations=z, present=present)
    metrics = result.term_metrics
    assert metrics["loss/mlc"][0] == pytest.approx(metrics["loss/mlc"][1].item())
    assert metrics["loss/sign"].tolist() == pytest.approx([0.0, (0.5 + 1) / 4])
    assert metrics["sign/cosine"].tolist() == pytest.approx([1.0, 0.5])
    of_mlc = 0.8 * float(metrics["loss/mlc"].sum())
    assert float(result.loss) == pytest.approx(2 + of_mlc + 0.5 * (0.5 + 1) / 4, rel=1e-6)
    z[1, 2] = 100.0  # an absent language takes no part
    present[1, 2] = False
    assert objective.terms["sign"](Tapped(z, present)).loss.tolist() == pytest.approx([0.0, 0.0])


def test_their_settings_are_validated_like_all_others(repository):
    file, sign = repository / "configs/quickstart.yaml", "terms.sign.name=examples.my_term:SameSign"
    with pytest.raises(ConfigError, match=r"objective\.beta=0\.1: no such field \(valid here: loss, margin, sft_w"):
        load_config(TrainConfig, file, ["objective.loss=examples.my_loss:Hinge"])
    config = load_config(TrainConfig, file, [sign])
    assert config.terms["sign"].least == 0.5
    assert parse_config(TrainConfig, config.model_dump(mode="json", exclude_unset=True)) == config
    with pytest.raises(ConfigError, match=r"terms\.sign\.least=2: .*less than or equal to 1"):
        load_config(TrainConfig, file, [sign, "terms.sign.least=2"])


def steps_with_both(rank):
    terms = {"sign": {**TERMS["sign"], "weight": 20.0, "least": 1.0}}
    config = tiny_config(objective=LOSS, terms=terms, optimizer={"warmup_ratio": 0.0}, train={"epochs": 4})
    table = {row.bundle_id: ReferenceRow(-20.0, -20.0) for row in random_rows(2)}
    return run_engine(config, random_rows(2), 4, table)[1]


def test_both_train_a_tiny_model(tmp_path):
    history = on_workers(1, steps_with_both, tmp_path)[0]
    for row in history:
        terms = 0.8 * row["loss/mlc"] + 20.0 * row["loss/sign"] if "loss/sign" in row else 0.0
        assert row["loss/total"] == pytest.approx(row["loss/alignment"] + terms)
    assert ["loss/sign" in row for row in history] == [True, False, True, False]
    assert history[2]["loss/sign"] < 0.9 * history[0]["loss/sign"]


def test_the_card_says_where_they_come_from():
    manifest = {"step": 1, "bundles_consumed": 2, "fingerprints": {}, "versions": {}}
    card = model_card(tiny_config(objective=LOSS, terms=TERMS), manifest)
    assert "- examples.my_loss:Hinge (margin=2.0)\n" in card
    assert "- 0.5 x sign (name=examples.my_term:SameSign, least=0.5)\n" in card
