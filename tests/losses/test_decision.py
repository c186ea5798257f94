"""The terms on decisions: values and gradients against plain loops, and what each leaves alone."""

import math

import pytest
import torch

from mlc_ray.config import ConfigError, ObjectiveConfig, parse_config
from mlc_ray.losses.base import Decisions
from mlc_ray.losses.consistency import Consistency, consistency_losses
from mlc_ray.losses.decision import Decision
from mlc_ray.losses.measures import auc
from mlc_ray.losses.objective import Objective
from mlc_ray.types import ResponseLogProbs
from tests.train.tiny import tiny_config

PRESENT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
RESPONSE = torch.tensor([1, 2, 2, 0])
HARMFUL = torch.tensor([True, False, True, False])


def given(seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    log_odds = (spread * torch.randn(4, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    return Decisions(log_odds, PRESENT, RESPONSE, HARMFUL)


def plain_consistency(decisions, bound):
    losses = []
    for bundle, response in enumerate(decisions.response.tolist()):
        target = max(-bound, min(bound, float(decisions.log_odds[bundle, response].detach())))
        others = [c for c in range(4) if decisions.present[bundle, c] and c != response]
        of_languages = []
        for column in others:
            m = decisions.log_odds[bundle, column]
            distance = (m - target).abs()
            value = 0.5 * distance**2 if float(distance.detach()) < 1 else distance - 0.5
            same = abs(target) == bound and float((m * target).detach()) >= bound * bound
            of_languages.append(0 * value if same else value)
        losses.append(sum(of_languages) / len(others) if others else torch.zeros((), dtype=torch.float64))
    return torch.stack(losses)


@pytest.mark.parametrize("bound", [2.0, 5.0, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_consistency_equals_the_plain_loop(seed, bound):
    ours, theirs = given(seed), given(seed)
    losses, gaps = consistency_losses(ours, bound=bound)
    expected = plain_consistency(theirs, bound)
    assert torch.allclose(losses, expected, rtol=1e-12) and losses[2] == 0  # one language
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    own, their = (
        torch.autograd.grad((loss * weights).sum(), part.log_odds)[0]
        for loss, part in ((losses, ours), (expected, theirs))
    )
    assert torch.allclose(own, their, rtol=1e-12)
    assert (own[torch.arange(4), RESPONSE] == 0).all()  # English is taught nothing
    assert (own[~PRESENT] == 0).all() and not gaps.requires_grad


def test_consistency_draws_towards_the_response_language_and_is_least_there():
    decisions = given()
    (gradient,) = torch.autograd.grad(consistency_losses(decisions, bound=100.0)[0].sum(), decisions.log_odds)
    target = decisions.in_response.detach().unsqueeze(1).expand(4, 4)
    taught = gradient != 0
    assert taught.sum() == 6 and ((decisions.log_odds - target).sign() == gradient.sign())[taught].all()
    equal = Decisions(target.clone(), PRESENT, RESPONSE, HARMFUL)
    assert consistency_losses(equal, bound=100.0)[0].tolist() == [0, 0, 0, 0]


def test_decisions_beyond_the_bound_on_the_same_side_are_equal_and_on_another_are_not():
    log_odds = torch.tensor([[-30.0, -12.0, 30.0, -4.0]], dtype=torch.float64).requires_grad_()
    one = Decisions(log_odds, PRESENT[:1], torch.tensor([0]), HARMFUL[:1])
    losses, gaps = consistency_losses(one, bound=10.0)
    assert losses.tolist() == [pytest.approx((0 + 39.5 + 5.5) / 3)] and gaps.tolist() == [pytest.approx(46 / 3)]


def test_the_decision_is_cross_entropy_and_its_gradient_has_the_sign_of_the_kind():
    decisions = given()
    result = Decision(Decision.Settings(name="decision"))(decisions)
    m = decisions.in_response.detach()
    p = torch.sigmoid(m)
    expected = torch.where(HARMFUL, -p.log(), -(1 - p).log())
    assert torch.allclose(result.loss, expected, rtol=1e-10)
    (gradient,) = torch.autograd.grad(result.loss.sum(), decisions.log_odds)
    english = gradient[torch.arange(4), RESPONSE]
    assert ((english < 0) == HARMFUL).all()  # a step down raises the log-odds of harmful prompts and lowers the others
    assert torch.allclose(english, p - HARMFUL.double())
    others = torch.ones(4, 4, dtype=torch.bool).index_put((torch.arange(4), RESPONSE), torch.tensor(False))
    assert (gradient[others] == 0).all()
    assert result.metrics["accuracy"].tolist() == [float((x > 0) == h) for x, h in zip(m, HARMFUL, strict=True)]


def test_the_decision_of_all_languages_is_their_mean():
    decisions = given()
    result = Decision(Decision.Settings(name="decision", languages="all"))(decisions)
    p = torch.sigmoid(decisions.log_odds.detach())
    each = torch.where(HARMFUL.unsqueeze(1), -p.log(), -(1 - p).log())
    rows = [[0, 1, 2, 3], [0, 2, 3], [2], [0, 1]]
    assert torch.allclose(result.loss, torch.stack([each[b, row].mean() for b, row in enumerate(rows)]), rtol=1e-10)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((result.loss * weights).sum(), decisions.log_odds)
    share = weights.unsqueeze(1) * PRESENT / PRESENT.sum(1, keepdim=True)
    assert torch.allclose(gradient, share * (p - HARMFUL.double().unsqueeze(1)))
    odds = decisions.log_odds.detach()
    right = [(odds[b, row] > 0) == HARMFUL[b] for b, row in enumerate(rows)]
    assert result.metrics["accuracy"].tolist() == pytest.approx([float(each.double().mean()) for each in right])
    assert result.metrics["log_odds"].tolist() == pytest.approx(
        [float(odds[b, row].mean()) for b, row in enumerate(rows)]
    )


def test_the_decision_of_all_languages_counts_each_bundle_and_begins_without_a_warning():
    decisions = given()
    made = objective(decision={"weight": 0.5, "languages": "all"})
    assert made.widest_scope == "all" and made.ever_taps and not made.begins(10)
    chosen = ResponseLogProbs(torch.full((4,), -6.0), torch.full((4,), 3))
    term_weight = torch.tensor([1, 1, 0, 1]) / 3  # the third has one language, and a decision all the same
    said = made.total_loss(
        weight=torch.full((4,), 0.25), chosen=chosen, representations=torch.zeros(4, 4, 2), present=PRESENT,
        term_weight=term_weight, decisions=decisions,
    )  # fmt: skip
    decided = Decision(Decision.Settings(name="decision", languages="all"))(decisions).loss
    expected = said.metrics["loss/alignment"].mean() + 0.5 * decided.mean()
    assert float(said.loss.detach()) == pytest.approx(float(expected.detach()))
    assert said.metrics["loss/decision"].tolist() == pytest.approx(decided.tolist()) and not said.term_metrics


def objective(**terms):
    return Objective(
        ObjectiveConfig.model_validate({"objective": {"loss": "sft"}, "mlc": {"weight": 0}, "terms": terms})
    )


def test_the_total_has_the_decision_of_all_bundles_and_consistency_of_those_with_two_languages():
    decisions = given()
    made = objective(decision={"weight": 0.5}, consistency={"weight": 0.3})
    chosen = ResponseLogProbs(torch.full((4,), -6.0), torch.full((4,), 3))
    weight, term_weight = torch.full((4,), 0.25), torch.tensor([1, 1, 0, 1]) / 3
    states = torch.zeros(4, 4, 2)
    said = made.total_loss(
        weight=weight, chosen=chosen, representations=states, present=PRESENT, term_weight=term_weight,
        decisions=decisions, factors={"decision": 1.0, "consistency": 0.5},
    )  # fmt: skip
    decided = Decision(Decision.Settings(name="decision"))(decisions).loss.mean()
    drawn = consistency_losses(decisions, bound=10.0)[0][[0, 1, 3]].mean()
    assert float(said.loss.detach()) == pytest.approx(2 + float((0.5 * decided + 0.5 * 0.3 * drawn).detach()))
    assert "loss/decision" in said.metrics and "loss/consistency" in said.term_metrics
    # Before consistency begins, no prompt in another language is read.
    early = made.total_loss(weight=weight, chosen=chosen, decisions=decisions, factors={"decision": 1.0})
    assert float(early.loss.detach()) == pytest.approx(2 + 0.5 * float(decided.detach())) and not early.term_metrics
    with pytest.raises(ValueError, match="'decision' needs to know how responses open"):
        made.total_loss(weight=weight, chosen=chosen)


def test_consistency_needs_log_odds_and_no_tapped_states():
    decisions, made = given(), objective(consistency={"weight": 0.3})
    chosen, weight = ResponseLogProbs(torch.full((4,), -6.0), torch.full((4,), 3)), torch.full((4,), 0.25)
    drawn = consistency_losses(decisions, bound=10.0)[0].mean()
    said = made.total_loss(weight=weight, chosen=chosen, decisions=decisions)
    assert float(said.loss.detach()) == pytest.approx(2 + 0.3 * float(drawn.detach()))
    with pytest.raises(ValueError, match="'consistency' needs to know how responses open"):
        made.total_loss(weight=weight, chosen=chosen)


@pytest.mark.parametrize(
    "facts",
    [
        {"needs_decisions": True, "needs_group": True},
        {"needs_decisions": True, "needs_reference_state": True},
        {"needs_languages": False},
        {"relates_languages": False},
    ],
)
def test_facts_of_a_term_that_exclude_each_other_are_refused(facts, monkeypatch):
    for fact in ("needs_decisions", "needs_group", "needs_reference_state", "needs_languages", "relates_languages"):
        monkeypatch.setattr(Consistency, fact, facts.get(fact, fact.endswith("_languages")))
    refused = next(fact for fact in facts if fact != "needs_decisions")
    with pytest.raises(ConfigError, match=f"'consistency'.*{refused}.*make two terms"):
        objective(consistency={"weight": 0.3})


def test_what_a_step_reads_follows_from_what_has_begun():
    made = objective(decision={}, consistency={"start": 0.5})
    assert [made.scope(step, 4) for step in range(4)] == ["response", "response", "all", "all"]
    assert [made.taps(step, 4) for step in range(4)] == [False, False, True, True]
    assert made.begins(4) == {2: ["consistency"]} and made.widest_scope == "all" and made.ever_taps
    alone = objective(decision={})
    assert alone.widest_scope == "response" and not alone.ever_taps and alone.begins(4) == {}
    assert objective().widest_scope == "none"
    assert [line for line in made.describe() if "openings" in line] == [
        "openings of refusals: those listed, 0 further ones"
    ]


NO = {"further": {"en": ["No."]}}


def test_openings_that_nothing_reads_are_refused():
    with pytest.raises(ValueError, match="openings is read by terms"):
        tiny_config(openings=NO)
    tiny_config(openings=NO, terms={"decision": {}})
    tiny_config(openings=NO, data={"validation": {"sources": [{"path": "x"}]}})
    with pytest.raises(ConfigError, match="has blanks around it"):
        parse_config(ObjectiveConfig, {"openings": {"further": {"fr": ["Désolé "]}}})


def test_auc_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).double()
    positive = torch.rand(40, generator=generator) < 0.4
    pairs = [(float(u), float(d)) for u in scores[positive] for d in scores[~positive]]
    expected = sum((u > d) + 0.5 * (u == d) for u, d in pairs) / len(pairs)
    assert auc(scores, positive) == pytest.approx(expected)
    assert math.isnan(auc(scores, torch.zeros(40, dtype=torch.bool)))
