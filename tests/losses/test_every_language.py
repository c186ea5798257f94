"""Losses that read answers in several languages: values and gradients against plain loops, and where each is zero."""

import pytest
import torch

from mlc_ray.config import ConfigError, ObjectiveConfig, parse_config
from mlc_ray.losses.base import Pooled
from mlc_ray.losses.dco import Dco, dco_loss
from mlc_ray.losses.mpo import mpo_loss
from mlc_ray.losses.objective import Objective
from mlc_ray.losses.sdrrl import sdrrl_loss
from mlc_ray.types import AnswerRows, ResponseLogProbs
from tests.train.tiny import tiny_config

# Three bundles: answers in en (column 1), ar and sw; in en and ar; in sw alone, its response language.
ROWS = AnswerRows(
    bundle=torch.tensor([0, 0, 0, 1, 1, 2]),
    prompt=torch.tensor([1, 0, 2, 1, 0, 2]),
    answer=torch.tensor([1, 0, 2, 1, 0, 2]),
    response=torch.tensor([0, 3, 5]),
)
MEMBERS = {0: [0, 1, 2], 1: [3, 4], 2: [5]}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answers(seed, lengths=(4, 3, 6, 2, 5, 1)):
    return ResponseLogProbs((-5 * random(len(lengths), seed=seed).abs()).requires_grad_(), torch.tensor(lengths))


CHOSEN_LENGTHS, REJECTED_LENGTHS = (4, 3, 6, 2, 5, 1), (2, 2, 7, 3, 1, 4)


@pytest.fixture
def pair():
    return answers(1, CHOSEN_LENGTHS), answers(2, REJECTED_LENGTHS)


def gradients(loss, *values):
    weights = torch.tensor([0.5, 1.5, -2.0], dtype=torch.float64)
    return torch.autograd.grad((loss * weights).sum(), values, allow_unused=True)


def plain_mpo(chosen, rejected, reference_chosen, reference_rejected, pooled, *, beta, hidden_weight, least=None):
    losses = []
    for bundle, members in MEMBERS.items():
        source, *targets = members
        gap = {
            row: chosen.total[row] / chosen.length[row] - rejected.total[row] / rejected.length[row] for row in targets
        }
        wanted = reference_chosen[bundle] / chosen.length[source] - reference_rejected[bundle] / rejected.length[source]
        teaches = bool(targets) and (least is None or wanted > least)
        errors = [(beta * gap[row] - wanted) ** 2 for row in targets] if teaches else [torch.zeros(())]
        distance = torch.nn.functional.mse_loss(pooled.policy[:, bundle], pooled.reference[:, bundle])
        losses.append(sum(errors) / len(errors) + hidden_weight * distance)
    return torch.stack(losses)


@pytest.mark.parametrize("least", [None, 0.4])
def test_mpo_equals_the_plain_loop(pair, least):
    references = random(3, seed=3), random(3, seed=4)
    policy = random(2, 3, 7, seed=5).requires_grad_()
    pooled = Pooled(policy, random(2, 3, 7, seed=6).requires_grad_())
    result = mpo_loss(*pair, *references, ROWS, pooled, beta=1.5, hidden_weight=0.7, min_source_gap=least)
    expected = plain_mpo(*pair, *references, pooled, beta=1.5, hidden_weight=0.7, least=least)
    assert torch.allclose(result.loss, expected, rtol=1e-6)  # distances of states are taken in float32
    inputs = [pair[0].total, pair[1].total, policy]
    for ours, theirs in zip(gradients(result.loss, *inputs), gradients(expected, *inputs), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert gradients(result.loss, pooled.reference) == (None,)
    teaches = result.metrics["teaches"].tolist()
    assert teaches[2] == 0 and sum(teaches) == (2 if least is None else 1)  # the last bundle has no other language


def test_mpo_says_which_bundles_teach_to_prefer_the_rejected_answer(pair):
    chosen, rejected = torch.full((3,), -90.0), torch.full((3,), -1.0)  # of the reference, which prefers these
    taught = mpo_loss(*pair, chosen, rejected, ROWS, None, beta=1.0).metrics
    assert taught["reversed"].tolist() == taught["teaches"].tolist() == [1, 1, 0]
    held = mpo_loss(*pair, chosen, rejected, ROWS, None, beta=1.0, min_source_gap=0.0).metrics
    assert held["reversed"].tolist() == held["teaches"].tolist() == [0, 0, 0]
    right = mpo_loss(*pair, rejected, chosen, ROWS, None, beta=1.0).metrics
    assert (right["reversed"].tolist(), right["teaches"].tolist()) == ([0, 0, 0], [1, 1, 0])


def test_mpo_is_zero_where_policy_is_reference_and_languages_are_one(pair):
    """The authors' case: beta 1, the target says what the dominant language says."""
    chosen, rejected = (
        ResponseLogProbs(one.total[[0, 0, 0, 3, 3, 5]].detach().requires_grad_(), one.length[[0, 0, 0, 3, 3, 5]])
        for one in pair
    )
    references = [one.total[ROWS.response].detach() for one in (chosen, rejected)]
    states = random(2, 3, 7)
    assert mpo_loss(chosen, rejected, *references, ROWS, Pooled(states, states), beta=1.0).loss.tolist() == [0, 0, 0]
    moved = mpo_loss(chosen, rejected, *references, ROWS, Pooled(states, states), beta=2.0)
    (gradient,) = gradients(moved.loss, chosen.total)
    assert (gradient[ROWS.response] == 0).all() and (gradient[[1, 2, 4]] != 0).all()  # English is a fixed teacher


def plain_dco(chosen, rejected, reference_chosen, reference_rejected, *, beta):
    losses = []
    for first, *others in MEMBERS.values():

        def ratio(row):
            return (chosen.total[row] - reference_chosen[row]) - (rejected.total[row] - reference_rejected[row])

        def odds(row):
            return reference_chosen[row] - reference_rejected[row]

        costs = [(ratio(first) - odds(t) / beta).abs() + (ratio(t) - beta * odds(first)).abs() for t in others]
        losses.append(sum(costs) / len(costs) if costs else torch.zeros((), dtype=torch.float64))
    return torch.stack(losses)


def test_dco_equals_the_plain_loop(pair):
    references = random(6, seed=3), random(6, seed=4)
    ours, theirs = dco_loss(*pair, *references, ROWS, beta=0.6).loss, plain_dco(*pair, *references, beta=0.6)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for mine, expected in zip(*(gradients(x, pair[0].total, pair[1].total) for x in (ours, theirs)), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_dco_is_zero_where_each_language_wants_what_the_reference_does_in_the_other(beta):
    """r(1) = o(t) / beta and r(t) = beta o(1); from there each nat of a log-ratio costs one, whatever beta."""
    # The further languages of a bundle have the same odds, so that one r(1) suits all; the last bundle has none.
    odds = torch.tensor([0.8, -1.5, -1.5, 2.0, 0.3, 7.0], dtype=torch.float64)
    wanted = torch.stack([odds[1] / beta, beta * odds[0], beta * odds[0], odds[4] / beta, beta * odds[3], odds[5]])
    reference_chosen, rejected = random(6, seed=3), random(6, seed=4)
    reference_rejected = reference_chosen - odds
    total = (rejected - reference_rejected + wanted + reference_chosen).requires_grad_()
    lengths = torch.tensor(CHOSEN_LENGTHS)

    def loss(chosen, *, beta=beta):
        other = ResponseLogProbs(rejected, lengths)
        return dco_loss(ResponseLogProbs(chosen, lengths), other, reference_chosen, reference_rejected, ROWS, beta=beta)

    assert loss(total).loss.tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert (loss(total, beta=2 * beta).loss[:2] > 0.1).all()
    moved = total.detach() + torch.tensor([0, 0.3, 0, 0.2, -0.4, 9.0], dtype=torch.float64)
    assert loss(moved).loss.tolist() == pytest.approx([0.3 / 2, 0.2 + 0.4, 0])


def test_dco_of_the_reference_itself_is_how_far_it_is_from_indifferent(pair):
    """Where policy is reference both log-ratios are 0, and the loss |o(t)| / beta + beta |o(1)|."""
    references = [one.total.detach() for one in pair]
    odds = (references[0] - references[1]).abs()
    expected = [(odds[1] / 2 + odds[2] / 2 + 4 * odds[0]) / 2, odds[4] / 2 + 2 * odds[3], 0]
    assert dco_loss(*pair, *references, ROWS, beta=2.0).loss.tolist() == pytest.approx([float(one) for one in expected])


def test_dcos_reference_takes_no_gradient(pair):
    references = random(6, seed=3).requires_grad_(), random(6, seed=4).requires_grad_()
    result = dco_loss(*pair, *references, ROWS, beta=0.6)
    assert gradients(result.loss, *references) == (None, None)
    assert all((one[:5] != 0).any() for one in gradients(result.loss, pair[0].total, pair[1].total))


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_the_response_language_may_weigh_more_than_the_others(pair, share, sft_weight):
    """Of a bundle of one language that is all; the loss and the SFT part beside it are weighed alike."""
    raw = {"loss": "dpo", "answers": "all", "sft_weight": sft_weight, "response_share": share}
    objective = Objective(parse_config(ObjectiveConfig, {"objective": raw, "mlc": {"weight": 0}}))
    references = random(6, seed=3), random(6, seed=4)
    chosen, rejected = pair
    weight = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    found = objective.total_loss(
        weight=weight, chosen=chosen, rejected=rejected, reference_chosen=references[0],
        reference_rejected=references[1], rows=ROWS,
    )  # fmt: skip
    margins = 0.1 * ((chosen.total - references[0]) - (rejected.total - references[1]))
    parts = [-torch.nn.functional.logsigmoid(margins), -chosen.total / torch.tensor(CHOSEN_LENGTHS)]

    def of_bundles(values):
        means = []
        for first, *others in MEMBERS.values():
            rest = [values[row] for row in others]
            if share is None or not rest:
                means.append(sum([values[first], *rest]) / (1 + len(rest)))
            else:
                means.append(share * values[first] + (1 - share) * sum(rest) / len(rest))
        return torch.stack(means)

    loss, fitted = map(of_bundles, parts)
    expected = ((loss + sft_weight * fitted) * weight).sum()
    assert torch.allclose(found.loss, expected, rtol=1e-12)
    assert torch.allclose(found.metrics["loss/alignment"], loss)
    inputs = [chosen.total, rejected.total]
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("raw", [{"response_share": 0.4}, {"loss": "sft", "answers": "all", "response_share": 1.0}])
def test_a_share_without_other_answers_to_share_with_is_refused(raw):
    with pytest.raises(ConfigError, match=r"response_share=(0\.4 is read with answers|1\.0.*less than 1)"):
        parse_config(ObjectiveConfig, {"objective": raw})


def test_sdrrl_equals_the_plain_loop():
    # Bundle 0 has all pairings of en (1) with ar (0) and sw (2), bundle 1 English alone.
    pairs = [(0, 1, 1), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 2), (0, 2, 1), (0, 1, 2), (1, 1, 1)]
    rows = AnswerRows(*torch.tensor(pairs).T, response=torch.tensor([0, 7]))
    chosen = answers(1, (4, 3, 6, 2, 5, 1, 7, 3))
    shares = (0.4, 0.3, 0.2, 0.1)
    result = sdrrl_loss(chosen, rows, shares=shares)
    nll = -chosen.total / chosen.length
    expected = 0.4 * nll[0] + 0.3 * (nll[1] + nll[4]) / 2 + 0.2 * (nll[2] + nll[5]) / 2 + 0.1 * (nll[3] + nll[6]) / 2
    assert torch.allclose(result.loss, torch.stack([expected, 0.4 * nll[7]]))
    ours, theirs = (torch.autograd.grad(x, chosen.total, retain_graph=True)[0] for x in (result.loss[0], expected))
    assert torch.allclose(ours, theirs) and (ours[:7] != 0).all()
    assert result.metrics["english_prompts"].tolist() == pytest.approx([float((nll[3] + nll[6]).detach() / 2), 0])


def objective(loss, **settings):
    return Objective(ObjectiveConfig.model_validate({"objective": {"loss": loss, **settings}, "mlc": {"weight": 0}}))


@pytest.mark.parametrize(
    ("shares", "pairing"),
    [
        ({}, "crossed"),
        ({"english": 1, "translated": 0, "english_answers": 0, "english_prompts": 0}, "response"),
        ({"english": 0.5, "translated": 0, "english_answers": 0.5, "english_prompts": 0}, "shared"),
        ({"english": 0.5, "translated": 0.5, "english_answers": 0, "english_prompts": 0}, "own"),
    ],
)
def test_sdrrl_reads_no_more_answers_than_its_shares_ask_for(shares, pairing):
    assert objective("sdrrl", **shares).alignment.pairing == pairing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "sdrrl", "english": 0.5}, "add up to 1.25; make that 1"),
        ({"loss": "mpo", "dominant": "English"}, "dominant"),
        ({"loss": "mpo", "answers": "all"}, "answers"),
        ({"loss": "dco", "answers": "response"}, "answers"),
        ({"loss": "sdrrl", "sft_weight": 0.5}, "adds what objective.loss='sdrrl' is already; remove it"),
    ],
)
def test_settings_that_make_no_loss_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(ObjectiveConfig, {"objective": settings})


@pytest.mark.parametrize(("loss", "source"), [("mpo", "2505.16869"), ("dco", "2603.04678"), ("sdrrl", "2402.12204")])
def test_a_model_card_says_whose_a_method_is_and_what_of_it_is_ours(loss, source):
    (line,) = objective(loss).describe()
    assert line.startswith(f"{loss} (") and f"): after arXiv {source}; ours: " in line


@pytest.mark.parametrize(
    ("sections", "ours"),
    [
        ({"objective": {"loss": "dpo", "answers": "all"}}, "ours: answers in every language of a bundle"),
        (
            {"objective": {"loss": "sft", "answers": "given"}},
            "ours: answers in each language that a bundle has answers in",
        ),
        ({"mlc": {"extractor_dim": None}}, "ours: no extractor"),
        ({"mlc": {"extractor_dim": None, "centring": True}}, "ours: no extractor, centring"),
        ({}, ""),
    ],
)
def test_a_model_card_says_which_settings_are_ours(sections, ours):
    lines = Objective(ObjectiveConfig.model_validate(sections)).describe()
    assert [line.partition("): ")[2] for line in lines if "ours" in line] == ([ours] if ours else [])


class Crossed(Dco):
    """DCO that also reads answers to prompts in other languages than theirs."""

    pairing = "crossed"


def test_a_cached_reference_of_answers_to_several_prompts_is_refused():
    loss = {"loss": "tests.losses.test_every_language:Crossed"}
    with pytest.raises(ValueError, match=r"Crossed' asks the reference about .*; set reference: online"):
        tiny_config(objective=loss)
    assert Objective(tiny_config(objective=loss, reference="online")).alignment.reference_pairing == "crossed"


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "sft"])
def test_the_upper_bound_is_the_mean_of_the_loss_over_a_bundle_s_languages(loss, pair):
    """The loss of answers in all languages is the mean of what it costs to read each language alone."""
    references = random(6, seed=3), random(6, seed=4)

    def of(bound, rows, picked):
        given = {"chosen": pair[0], "rejected": pair[1], "reference_chosen": references[0]}
        given["reference_rejected"] = references[1]
        given = {
            name: ResponseLogProbs(one.total[picked], one.length[picked])
            if name in ("chosen", "rejected")
            else one[picked]
            for name, one in given.items()
        }
        count = len(rows.response) if rows is not None else len(picked)
        return bound.total_loss(weight=torch.ones(count, dtype=torch.float64), rows=rows, **given)

    bound = objective(loss, answers="all")
    assert bound.alignment.pairing == "own" and objective(loss).alignment.pairing == "response"
    assert objective(loss, answers="given").alignment.pairing == "given"
    whole = of(bound, ROWS, list(range(6))).metrics
    alone = of(objective(loss), None, list(range(6))).metrics
    for name, values in whole.items():
        expected = [float(alone[name][members].mean()) for members in MEMBERS.values()]
        assert values.tolist() == pytest.approx(expected), name
