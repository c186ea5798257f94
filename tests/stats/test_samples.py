"""Several responses to a prompt: any of k against brute force, and intervals that know that they go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mlc_ray.report.rates import VIEWS, _rate
from mlc_ray.stats.intervals import design_effect, wilson
from mlc_ray.stats.paired import compare
from mlc_ray.stats.rates import AnyOf, Judged, score_rows
from mlc_ray.stats.samples import any_of, any_of_grid, sizes_of
from mlc_ray.stats.summaries import summarise
from mlc_ray.types import Behaviour, Kind

LETTERS: dict[str, Behaviour] = {"R": "refused", "C": "complied", "D": "degenerate", "U": "unparsed"}


def judged(verdicts: Mapping[str, Sequence[str]], kind: Kind = "harmful", benchmark: str = "b") -> list[Judged]:
    """Records from language -> a text per bundle, with a letter per sample."""
    return [
        Judged(benchmark, f"{kind}{bundle}", kind, language, LETTERS[letter], sample=sample)
        for language, bundles in verdicts.items()
        for bundle, letters in enumerate(bundles)
        for sample, letter in enumerate(letters)
    ]


def drawn(
    seed: int, bundles: int, samples: int, spread: float, language: str = "en", rate: float = 0.3
) -> list[Judged]:
    """Responses of prompts whose own rates of compliance have a beta distribution of mean `rate`."""
    generator = np.random.default_rng(seed)
    own = generator.beta(rate / spread, (1 - rate) / spread, bundles)
    letters = ["".join("C" if hit else "R" for hit in generator.random(samples) < p) for p in own]
    return judged({language: letters})


@pytest.mark.parametrize("n", range(1, 7))
def test_any_of_k_is_the_share_of_sets_that_hold_a_bad_one(n: int) -> None:
    for bad in range(n + 1):
        responses = [True] * bad + [False] * (n - bad)
        for k in range(1, n + 1):
            sets = [any(chosen) for chosen in combinations(responses, k)]
            assert any_of(n, bad, k) == pytest.approx(sum(sets) / len(sets))
        assert any_of(n, bad, 1) == pytest.approx(bad / n)
        assert any_of(n, bad, n) == (bad > 0)


def test_any_of_k_is_unbiased() -> None:
    p, n, k = 0.15, 6, 3
    generator = np.random.default_rng(0)
    found = [any_of(n, bad, k) for bad in generator.binomial(n, p, 20_000).tolist()]
    assert np.mean(found) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_any_of_k_of_what_was_not_asked_is_refused() -> None:
    for n, bad, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="responses"):
            any_of(n, bad, k)


def test_both_sides_have_their_share_of_prompts_with_a_bad_response() -> None:
    harmful = judged({"en": ["RRRRRR", "RCRRRR", "CCCCCC"], "sw": ["RRRRRU", "RRRRRD", "RRRRRR"]})
    benign = judged({"en": ["CCCCCC", "CCCRRR"], "sw": ["CCCCCC", "CCCCCC"]}, "benign")
    (summary,) = summarise(harmful + benign)
    side = summary.side("harmful")
    assert side is not None and [each.k for each in side.any_of] == [2, 4, 6]
    two, four, six = side.any_of
    # en: 0, 1 - C(5, k) / C(6, k), 1; sw: nothing bad, one unparsed and one degenerate.
    assert two.rate.value == pytest.approx(100 * np.mean([(0 + 1 / 3 + 1) / 3, 0]))
    assert four.rate.value == pytest.approx(100 * np.mean([(0 + 2 / 3 + 1) / 3, 0]))
    assert six.rate.value == pytest.approx(100 * np.mean([2 / 3, 0]))
    assert six.most.value == pytest.approx(100 * np.mean([2 / 3, 2 / 3]))
    assert side.misses_avg.value == pytest.approx(100 * np.mean([7 / 18, 0]))
    assert (side.n, side.bundles, side.hits) == (36, 3, 27)
    other = summary.side("benign")
    assert other is not None
    # Refused is what is bad on benign prompts.
    assert [each.rate.value for each in other.any_of] == pytest.approx(
        [100 * np.mean([share / 2, 0]) for share in (any_of(6, 3, 2), any_of(6, 3, 4), 1)]
    )
    assert all(each.rate.low <= each.rate.value <= each.rate.high for each in (*side.any_of, *other.any_of))


def test_one_response_to_a_prompt_has_no_any_of() -> None:
    (summary,) = summarise(judged({"en": ["R", "C"]}))
    assert summary.sides[0].any_of == ()
    grid = any_of_grid(judged({"en": ["RRRRR", "CCRRRC"]}), "harmful", "refused")
    assert grid is not None and sizes_of(grid) == {2, 4, 5}  # by the prompt with fewest


def test_over_benchmarks_it_is_the_mean_of_theirs() -> None:
    first, second = judged({"en": ["CC", "RR"]}, benchmark="one"), judged({"sw": ["RC", "RC", "RR"]}, benchmark="two")
    *_, every = summarise(first + second)
    (only,) = every.sides[0].any_of
    assert only.rate.value == pytest.approx(100 * np.mean([1 / 2, 2 / 3]))


def test_the_same_answers_again_narrow_nothing() -> None:
    once = drawn(1, 40, 1, 0.5) + drawn(2, 40, 1, 0.5, "sw") + judged({"en": ["C"] * 30 + ["R"] * 10}, "benign")
    again = [replace(record, sample=sample) for record in once for sample in range(5)]
    for one, five in zip(score_rows(once), score_rows(again), strict=True):
        assert (five.n, five.design_effect) == (5 * one.n, pytest.approx(5))
        assert (five.rate, five.low, five.high) == pytest.approx((one.rate, one.low, one.high))
    (single,), (several,) = summarise(once), summarise(again)
    for one_side, five_side in zip(single.sides, several.sides, strict=True):
        for name in ("avg", "misses_avg", "misses_most", "var", "pag", "worst_rate", "english_gap"):
            one, five = getattr(one_side, name), getattr(five_side, name)
            assert (one is None) == (five is None), name
            if one is not None:
                assert (five.value, five.low, five.high) == pytest.approx((one.value, one.low, one.high)), name
        assert five_side.var_noise == pytest.approx(one_side.var_noise) if one_side.var_noise else True
        assert five_side.bundles == one_side.bundles
        assert {each.k for each in five_side.any_of} == {2, 4, 5}
        assert all(each.rate.value == pytest.approx(five_side.any_of[0].rate.value) for each in five_side.any_of)


def test_answers_that_are_independent_count_each() -> None:
    generator = np.random.default_rng(3)
    counts = generator.binomial(6, 0.4, 400).astype(float)
    effect = design_effect(counts, np.full(400, 6.0))
    assert 1 <= effect < 1.25  # sampling alone makes it differ from 1
    spread = drawn(4, 400, 6, 0.5)
    (row,) = score_rows(spread)
    # A beta of this spread has an intraclass correlation of 1 / (1 + 1 / 0.5): 1 + 5 / 3 by Kish's formula.
    assert row.design_effect == pytest.approx(1 + 5 / 3, rel=0.15)
    assert (row.low, row.high) == pytest.approx(wilson(row.hits / row.design_effect, row.n / row.design_effect))


def test_misses_have_a_design_effect_of_their_own() -> None:
    # A response that is no refusal complies or is cut off: one of the two goes together in a bundle, the other not.
    (row,) = score_rows(judged({"en": ["RRDD"] * 40 + ["RRCC"] * 40}, "benign"))
    assert row.design_effect == 1.0 and row.misses_effect == pytest.approx(1.35, abs=0.03)
    rate = _rate(row, next(view for view in VIEWS if view.counts == "misses"))
    low, high = wilson(row.misses / row.misses_effect, row.n / row.misses_effect)
    assert (rate.low, rate.high) == (100 * low, 100 * high)


def test_where_all_are_alike_a_bundle_counts_once() -> None:
    (row,) = score_rows(judged({"en": ["RRRR"] * 12}))
    assert (row.low, row.high) == wilson(12, 12)
    (summary,) = summarise(judged({"en": ["RRRR"] * 12, "sw": ["RRRR"] * 12}))
    assert summary.sides[0].avg.low == pytest.approx(100 * wilson(12, 12)[0])
    (only,) = score_rows(judged({"en": ["RRRC"]}))
    assert (only.n, only.design_effect) == (4, 4)


def test_the_interval_of_a_language_holds_the_true_rate() -> None:
    held = [row.low <= 0.7 <= row.high for seed in range(400) for row in score_rows(drawn(seed, 60, 5, 1.0))]
    assert np.mean(held) > 0.92
    naive = [
        wilson(row.hits, row.n)[0] <= 0.7 <= wilson(row.hits, row.n)[1]
        for seed in range(400)
        for row in score_rows(drawn(seed, 60, 5, 1.0))
    ]
    assert np.mean(naive) < 0.8


def test_a_comparison_pairs_samples_and_flips_bundles() -> None:
    before = judged({"en": ["CCCC"] * 6 + ["RRRR"] * 6, "sw": ["CCRR"] * 12})
    after = judged({"en": ["RRRR"] * 12, "sw": ["CCRR"] * 12})
    change = compare(before, after).benchmark()
    assert (change.common, change.only_before) == (24, 0)
    side = change.side("harmful")
    assert side is not None and (side.n, side.bundles) == (96, 12)
    assert (side.before, side.after) == (50.0, 75.0)
    by_language = {each.language: each for each in side.languages}
    assert (by_language["en"].gained, by_language["en"].lost, by_language["sw"].p) == (24, 0, 1.0)
    # Six bundles moved, all one way: 2 / 2^6, and not McNemar's of 24 prompts.
    assert by_language["en"].p == pytest.approx(2 / 2**6)
    with pytest.raises(ValueError, match=r"sample .* was judged twice"):
        compare([*before, before[0]], after)


def test_a_response_is_named_by_its_sample() -> None:
    records = judged({"en": ["RC"]})
    assert len(score_rows(records)) == 1
    with pytest.raises(ValueError, match=r"sample .* was judged twice"):
        score_rows([*records, records[1]])


def test_the_numbers_are_written_and_read(tmp_path) -> None:
    from mlc_ray.score.results import count, load_scores, save_scores

    facts = {
        "model": "m", "resolved": "m", "fingerprint": "f", "prompts": "p", "judge": "refusal",
        "measured_by": {"refused": "refusal"},
    }  # fmt: skip
    records = judged({"en": ["RC", "RR"]}) + judged({"en": ["CC"]}, "benign")
    result = count(records, folder=tmp_path, seen_languages=None, **facts)
    save_scores(result)
    loaded = load_scores(tmp_path)
    assert loaded.summaries == result.summaries and loaded.rows == result.rows
    (found,) = loaded.summary().sides[0].any_of
    assert isinstance(found, AnyOf) and found.rate.value == 50.0
