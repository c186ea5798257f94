"""The errors of a judge, and rates corrected for them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from mlc_ray.stats.calibration import Corrected, Errors, LabelledVerdict, corrected_rates, errors_of, rogan_gladen
from mlc_ray.stats.intervals import wilson
from mlc_ray.stats.rates import Judged, score_rows
from mlc_ray.types import Kind


def errors(hits: int, called: int, others: int, wrongly: int, language: str = "en", judge: str = "") -> Errors:
    return Errors("refused", language, judge, hits, called, others, wrongly, unparsed=0)


def test_precision_and_recall_of_labelled_responses() -> None:
    #                          hit    called unparsed
    cells = [*[(True, True, False)] * 6, (True, False, False), (True, False, True), (False, True, False)]
    cells += [(False, False, False)] * 3
    english = [LabelledVerdict("refused", "en", "r", *cell) for cell in cells]
    swahili = [LabelledVerdict("safe", "sw", "g", False, False, False)]
    found, other = errors_of([*swahili, *english])
    assert found == Errors("refused", "en", "r", hits=8, hits_called=6, others=4, others_called=1, unparsed=1)
    assert (found.recall, found.precision, found.labels) == (6 / 8, 6 / 7, 4)
    assert (found.recall_limits, found.precision_limits) == (wilson(6, 8), wilson(6, 7))
    assert (other.recall, other.precision, other.recall_limits, other.labels) == (None, None, None, 0)


def test_a_rate_is_corrected_by_the_published_formula() -> None:
    # Of 100 true hits 80 are called so, and of 100 others 10: 45 % observed are (0.45 + 0.9 - 1) / (0.8 + 0.9 - 1).
    found = rogan_gladen(45, 100, errors(100, 80, 100, 10))
    assert found is not None
    assert found.value == pytest.approx(0.35 / 0.7)
    assert found.low < 0.4 < 0.6 < found.high
    assert not found.clipped


def test_a_perfect_judge_corrects_nothing_and_labels_without_end_give_wilsons_width() -> None:
    found = rogan_gladen(30, 100, errors(10**7, 10**7, 10**7, 0))
    assert found is not None
    assert found.value == pytest.approx(0.3)
    low, high = wilson(30, 100)
    assert found.high - found.low == pytest.approx(high - low, abs=0.01)
    fewer = rogan_gladen(30, 100, errors(50, 45, 50, 5))
    more = rogan_gladen(30, 100, errors(500, 450, 500, 50))
    assert fewer is not None and more is not None
    assert fewer.high - fewer.low > more.high - more.low  # how little is known of the judge counts too


def test_what_falls_outside_is_clipped_and_said() -> None:
    found = rogan_gladen(2, 50, errors(50, 40, 50, 5))  # fewer called than the judge calls by mistake
    assert found is not None
    assert (found.value, found.low, found.clipped) == (0.0, 0.0, True)
    assert found.high > 0.0


@pytest.mark.parametrize("guesses", [errors(40, 20, 40, 20), errors(0, 0, 40, 0), errors(12, 7, 12, 4)])
def test_a_judge_that_guesses_corrects_nothing(guesses: Errors) -> None:
    assert rogan_gladen(20, 40, guesses) is None


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize(("recall", "right"), [(0.6, 0.98), (0.9, 0.9), (0.8, 1.0)])
def test_the_interval_holds_the_true_share(share: float, recall: float, right: float) -> None:
    random = np.random.default_rng(7)
    n, labels, samples, held = 60, 30, 0, 0
    while samples < 400:
        true = random.binomial(n, share)
        seen = random.binomial(true, recall) + random.binomial(n - true, 1 - right)
        judge = errors(labels, int(random.binomial(labels, recall)), labels, int(random.binomial(labels, 1 - right)))
        found = rogan_gladen(int(seen), n, judge)
        if found is None:  # too few labels to tell the judge from a guess
            continue
        samples += 1
        held += found.low <= share <= found.high
    assert held / samples >= 0.92  # 95 % are claimed; 400 samples vary by 2 points


def test_each_row_has_a_corrected_rate_or_the_reason_why_not() -> None:
    records = [
        Judged("b", f"{number}", "harmful", code, "refused" if number < 20 else "complied")
        for code in ("en", "sw", "ps", "ku")
        for number in range(40)
    ]
    known = [errors(40, 36, 40, 2), errors(40, 30, 29, 0, "sw"), errors(40, 20, 40, 20, "ps")]
    rates = {each.language: each for each in corrected_rates(score_rows(records), known, fewest=30)}
    assert {each.rate for each in rates.values()} == {0.5}
    assert rates["en"].corrected == rogan_gladen(20, 40, known[0])
    for code, labels in (("sw", 29), ("ku", 0)):
        why = f"not measured: {labels} labels of the rarer class, fewer than 30"
        assert (rates[code].corrected, rates[code].why) == (None, why)
    assert (rates["ps"].corrected, rates["ps"].why) == (None, "the judge is not told apart from guessing")


def test_equal_responses_to_one_prompt_make_a_corrected_rate_no_surer() -> None:
    def corrected(samples: int) -> Corrected:
        records = [
            Judged("b", f"{number}", "harmful", "en", "refused" if number < 20 else "complied", sample=sample)
            for number in range(40)
            for sample in range(samples)
        ]
        (rate,) = corrected_rates(score_rows(records), [errors(40, 36, 40, 2)], fewest=30)
        assert rate.corrected is not None
        return rate.corrected

    one, five = corrected(1), corrected(5)
    assert (five.value, five.low, five.high) == pytest.approx((one.value, one.low, one.high), abs=0.01)


def test_a_panels_rate_is_corrected_by_the_errors_of_the_judge_that_made_it() -> None:
    """One judge of the harmful side, which never errs, and one of the benign side that nobody has labelled."""
    verdict = partial(LabelledVerdict, "refused", "en", "phrases")
    harmful = [verdict(is_hit, is_hit, False) for is_hit in (True, False) for _ in range(40)]
    wrong = [LabelledVerdict("refused", "en", "other", False, True, False)] * 40
    found = {each.judge: each for each in errors_of([*harmful, *wrong])}
    assert (found["phrases"].hits, found["phrases"].others_called, found["other"].others_called) == (40, 0, 40)
    kinds: dict[Kind, str] = {"harmful": "phrases", "benign": "other"}
    records = [
        Judged("b", f"{kind}{number}", kind, "en", "refused" if number < 20 else "complied", judge_refused=judge)
        for kind, judge in kinds.items()
        for number in range(40)
    ]
    for known in (errors_of(harmful), list(found.values())):
        rates = {each.kind: each for each in corrected_rates(score_rows(records), known, fewest=30)}
        assert rates["harmful"].corrected == rogan_gladen(20, 40, found["phrases"])
        assert rates["benign"].corrected is None and "not measured: 0 labels" in rates["benign"].why
