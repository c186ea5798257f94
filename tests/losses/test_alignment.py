"""Each alignment loss against its formula worked out by hand in plain Python, and against finite differences."""

import math

import pytest
import torch
from pydantic import ValidationError

from mlc_ray._registry import names
from mlc_ray.config import ObjectiveConfig
from mlc_ray.losses.dpo import dpo_loss
from mlc_ray.losses.ipo import ipo_loss
from mlc_ray.losses.kto import kto_loss
from mlc_ray.losses.objective import Objective
from mlc_ray.losses.orpo import orpo_loss
from mlc_ray.losses.sft import sft_loss
from mlc_ray.losses.simpo import simpo_loss
from mlc_ray.types import AnswerRows, ResponseLogProbs


def answers(totals, lengths):
    return ResponseLogProbs(torch.tensor(totals, dtype=torch.float64, requires_grad=True), torch.tensor(lengths))


@pytest.fixture
def pair():
    return answers([-12.0, -9.0], [4, 6]), answers([-10.0, -20.0], [5, 8])


def reference():
    return torch.tensor([-11.0, -10.0], dtype=torch.float64), torch.tensor([-11.5, -18.0], dtype=torch.float64)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_sft(pair):
    assert sft_loss(pair[0]).loss.tolist() == pytest.approx([3.0, 1.5])


def test_dpo(pair):
    result = dpo_loss(*pair, *reference(), beta=0.1)
    assert result.chosen_reward.tolist() == pytest.approx([-0.1, 0.1])
    assert result.rejected_reward.tolist() == pytest.approx([0.15, -0.2])
    assert result.loss.tolist() == pytest.approx([-log_sigmoid(-0.25), -log_sigmoid(0.3)])


def test_dpo_with_label_smoothing(pair):
    loss = dpo_loss(*pair, *reference(), beta=0.1, label_smoothing=0.2).loss
    expected = [-0.8 * log_sigmoid(m) - 0.2 * log_sigmoid(-m) for m in (-0.25, 0.3)]
    assert loss.tolist() == pytest.approx(expected)


def test_dpo_is_ln_2_where_policy_is_reference(pair):
    chosen, rejected = pair
    loss = dpo_loss(chosen, rejected, chosen.total.detach(), rejected.total.detach(), beta=0.7).loss
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


def test_ipo(pair):
    loss = ipo_loss(*pair, *reference(), beta=0.5).loss
    first = (-12.0 + 11.0) / 4 - (-10.0 + 11.5) / 5
    second = (-9.0 + 10.0) / 6 - (-20.0 + 18.0) / 8
    assert loss.tolist() == pytest.approx([(first - 1) ** 2, (second - 1) ** 2])


def test_simpo(pair):
    result = simpo_loss(*pair, beta=2.0, margin=0.5)
    margins = [2.0 * (-3.0 + 2.0) - 0.5, 2.0 * (-1.5 + 2.5) - 0.5]
    assert result.loss.tolist() == pytest.approx([-log_sigmoid(m) for m in margins])
    assert result.chosen_reward.tolist() == pytest.approx([-6.0, -3.0])


def test_orpo(pair):
    def odds(log_probability):
        return math.exp(log_probability) / (1 - math.exp(log_probability))

    loss = orpo_loss(*pair, beta=0.3).loss
    expected = [
        3.0 - 0.3 * log_sigmoid(math.log(odds(-3.0) / odds(-2.0))),
        1.5 - 0.3 * log_sigmoid(math.log(odds(-1.5) / odds(-2.5))),
    ]
    assert loss.tolist() == pytest.approx(expected)


def test_orpo_stays_finite_when_an_answer_is_certain():
    certain = answers([0.0], [3])
    loss = orpo_loss(certain, answers([-5.0], [3]), beta=0.1).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(certain.total.grad).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda c, r: dpo_loss(c, r, *reference(), beta=0.4, label_smoothing=0.1).loss,
        lambda c, r: ipo_loss(c, r, *reference(), beta=0.4).loss,
        lambda c, r: simpo_loss(c, r, beta=2.0, margin=0.3).loss,
        lambda c, r: orpo_loss(c, r, beta=0.4).loss,
    ],
    ids=["dpo", "ipo", "simpo", "orpo"],
)
def test_gradients_equal_finite_differences(loss, pair):
    chosen, rejected = pair

    def of_totals(first, second):
        return loss(ResponseLogProbs(first, chosen.length), ResponseLogProbs(second, rejected.length))

    assert torch.autograd.gradcheck(of_totals, (chosen.total, rejected.total))


def objective(loss="dpo", **mlc):
    return Objective(ObjectiveConfig(objective=loss, mlc=mlc))


def test_total_is_alignment_plus_weighted_mlc_over_real_bundles(pair):
    z = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    present = torch.ones(2, 4, dtype=torch.bool)
    chosen, rejected = pair
    arguments = {"chosen": chosen, "rejected": rejected, "representations": z, "present": present}
    arguments |= dict(zip(("reference_chosen", "reference_rejected"), reference(), strict=True))
    both = objective(weight=0.5).total_loss(weight=torch.full((2,), 0.5), **arguments)
    first = objective(weight=0.5).total_loss(weight=torch.tensor([1.0, 0.0]), **arguments)
    alignment, mlc = both.metrics["loss/alignment"], both.term_metrics["loss/mlc"]
    expected = alignment + 0.5 * mlc
    assert both.loss.item() == pytest.approx(expected.mean().item())
    assert first.loss.item() == pytest.approx(expected[0].item())  # the padding bundle weighs nothing
    of_one = torch.tensor([0.0, 1.0])  # the term's mean is over other bundles than the alignment loss's
    other = objective(weight=0.5).total_loss(weight=torch.full((2,), 0.5), term_weight=of_one, **arguments)
    assert other.loss.item() == pytest.approx((alignment.mean() + 0.5 * mlc[1]).item())


def test_mlc_every_second_step():
    assert [objective(every=2).taps(step, 5) for step in range(5)] == [True, False, True, False, True]
    assert not objective(weight=0).taps(0, 5)


def test_a_term_begins_late_and_rises():
    late = objective(start=0.3, ramp=0.4)
    assert [late.factors(step, 10).get("mlc", 0.0) for step in range(10)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [late.taps(step, 10) for step in range(5)] == [False, False, False, True, True]
    assert [objective(start=0.29).taps(step, 100) for step in (28, 29)] == [False, True]
    every_other = objective(start=0.3, every=2)
    assert [every_other.factors(step, 10) for step in (2, 3, 4)] == [{}, {}, {"mlc": 1.0}]
    assert objective(start=0.99).taps(0, 1)  # the last step always comes after it
    for start, ramp in ((1.0, 0.0), (0.7, 0.4)):
        with pytest.raises(ValidationError):
            objective(start=start, ramp=ramp)


def test_the_total_has_a_rising_term_by_its_factor(pair):
    z = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    chosen, rejected = pair
    arguments = {"chosen": chosen, "rejected": rejected, "representations": z, "weight": torch.full((2,), 0.5)}
    arguments |= dict(zip(("reference_chosen", "reference_rejected"), reference(), strict=True))
    both = objective(weight=0.5)
    whole, half, none = (both.total_loss(**arguments, factors=f) for f in (None, {"mlc": 0.5}, {}))
    alignment = whole.metrics["loss/alignment"].mean().item()
    mlc = whole.term_metrics["loss/mlc"].mean().item()
    assert whole.loss.item() == pytest.approx(alignment + 0.5 * mlc)
    assert half.loss.item() == pytest.approx(alignment + 0.25 * mlc)
    assert half.term_metrics["loss/mlc"].tolist() == whole.term_metrics["loss/mlc"].tolist()  # logged without a weight
    assert none.loss.item() == pytest.approx(alignment) and "loss/mlc" not in none.term_metrics


@pytest.mark.parametrize("name", names("term"))
def test_every_term_begins_and_rises_as_its_settings_say(name):
    schedule = {"weight": 1.0, "start": 0.5, "ramp": 0.25}
    tap = name in ("mlc", "cosine")
    section = {"mlc": {"name": name, **schedule}} if tap else {"mlc": {"weight": 0}, "terms": {name: schedule}}
    made = Objective(ObjectiveConfig(objective={"loss": "sft"}, **section))
    of = "mlc" if tap else name
    assert [made.factors(step, 8).get(of, 0) for step in range(8)] == [0, 0, 0, 0, 0.5, 1, 1, 1]
    assert [made.taps(step, 8) for step in (3, 4)] == [False, name != "decision"]


def test_an_sft_part_beside_a_preference_loss(pair):
    chosen, rejected = pair
    settings = ObjectiveConfig(objective={"loss": "simpo", "sft_weight": 0.25}, mlc={"weight": 0})
    both = Objective(settings)
    result = both.total_loss(weight=torch.full((2,), 0.5), chosen=chosen, rejected=rejected)
    simpo = simpo_loss(chosen, rejected, beta=0.1, margin=0.5).loss
    assert result.metrics["loss/sft"].tolist() == pytest.approx([3.0, 1.5])  # nats a token of the chosen answers
    assert result.loss.item() == pytest.approx((simpo.mean() + 0.25 * 2.25).item())
    assert both.parts == ["loss/alignment", "loss/sft"]
    assert both.describe() == ["simpo (answers=response, beta=0.1, margin=0.5)", "0.25 x sft"]
    for loss in ("sft", "mlc_ray.losses.sft:Sft"):  # however it is named: the class says it
        with pytest.raises(ValidationError, match="is already; remove it"):
            ObjectiveConfig(objective={"loss": loss, "sft_weight": 0.25})


@pytest.mark.parametrize("answers", ["response", "all"])
@pytest.mark.parametrize("loss", sorted({*names("loss")} - {"sft", "sdrrl"}))
def test_an_sft_part_is_added_beside_every_preference_loss(loss, answers):
    """By its factor and into the gradient, as the mean over a bundle's answers."""
    settings = {"loss": loss} if loss in ("mpo", "dco") else {"loss": loss, "answers": answers}
    section = {"objective": {**settings, **({"hidden_weight": 0} if loss == "mpo" else {})}, "mlc": {"weight": 0}}
    totals = torch.tensor([-6.0, -3.0, -4.0], requires_grad=True)
    chosen, rejected = (
        ResponseLogProbs(totals, torch.tensor([2, 2, 4])),
        ResponseLogProbs(totals - 3, torch.tensor([3, 1, 2])),
    )
    two = [[0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 2]]  # a bundle in two languages, and one in one
    rows, count = AnswerRows(*map(torch.tensor, two)), 3
    if loss not in ("mpo", "dco") and answers == "response":
        rows, count = AnswerRows(*(torch.tensor(part) for part in ([0, 1], [0, 0], [0, 0], [0, 1]))), 2
    chosen, rejected = (ResponseLogProbs(each.total[:count], each.length[:count]) for each in (chosen, rejected))
    asked = 2 if loss == "mpo" else count
    given = {
        "chosen": chosen,
        "rejected": rejected,
        "reference_chosen": torch.full((asked,), -5.0),
        "reference_rejected": torch.full((asked,), -7.0),
        "rows": rows,
        "weight": torch.ones(2),
    }
    plain = Objective(ObjectiveConfig(**section)).total_loss(**given)
    section["objective"]["sft_weight"] = 0.5
    said = Objective(ObjectiveConfig(**section)).total_loss(**given)
    fitted = [3.0, 1.5] if count == 2 else [(3.0 + 1.5) / 2, 1.0]
    assert said.metrics["loss/sft"].tolist() == pytest.approx(fitted)
    assert float(said.loss) == pytest.approx(float(plain.loss) + 0.5 * sum(fitted))
    taught = torch.autograd.grad(said.loss - plain.loss, totals)[0][:count]
    assert taught.tolist() == pytest.approx([-0.25, -0.25] if count == 2 else [-0.125, -0.125, -0.125])


def test_kto_is_that_of_the_formula_and_half_where_the_policy_is_the_reference():
    chosen, rejected = (
        torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in ([-6.0, -3.0], [-9.0, -2.0])
    )
    lengths, of_reference = torch.tensor([2, 3]), torch.tensor([-5.0, -4.0], dtype=torch.float64)
    ours = kto_loss(
        ResponseLogProbs(chosen, lengths), ResponseLogProbs(rejected, lengths), of_reference, of_reference,
        beta=0.3, desirable=2.0, undesirable=0.5,
    )  # fmt: skip
    plain = [
        (2.0 * (1 - 1 / (1 + math.exp(-0.3 * (c + 5 - d)))) + 0.5 * (1 - 1 / (1 + math.exp(0.3 * (r + 5 - d))))) / 2
        for c, r, d in ((-6.0, -9.0, 0.0), (-3.0, -2.0, 1.0))
    ]
    assert ours.loss.tolist() == pytest.approx(plain)
    up, down = torch.autograd.grad(ours.loss.sum(), (chosen, rejected))
    slopes = [s * (1 - s) for s in (1 / (1 + math.exp(0.3)), 1 / (1 + math.exp(-0.3)))]
    assert up.tolist() == pytest.approx([-0.3 * slope for slope in slopes])  # of the chosen rewards alone
    assert (down > 0).all()
    same = ResponseLogProbs(of_reference, lengths)
    assert kto_loss(same, same, of_reference, of_reference, beta=0.3).loss.tolist() == [0.5, 0.5]


def test_what_an_objective_needs():
    needs = {
        name: (o.needs_reference, o.alignment.needs_rejected)
        for name in ["sft", "dpo", "ipo", "simpo", "orpo"]
        if (o := objective(name))
    }
    assert needs == {
        "sft": (False, False),
        "dpo": (True, True),
        "ipo": (True, True),
        "simpo": (False, True),
        "orpo": (False, True),
    }


def test_missing_parts_are_named(pair):
    with pytest.raises(ValueError, match="'dpo' needs the reference"):
        objective().total_loss(weight=torch.ones(2), chosen=pair[0], rejected=pair[1])
    with pytest.raises(ValueError, match="'simpo' needs rejected"):
        objective("simpo").total_loss(weight=torch.ones(2), chosen=pair[0])
