from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlc_ray.stats.agreement import judge_agreement
from mlc_ray.stats.rates import Judged

from .test_rates import judged


def test_kappa_against_its_definition() -> None:
    first = judged({"en": "RRRRRRCCCC", "sw": "RRCCUURRCC"})
    second = judged({"en": "RRRRCCCCCR", "sw": "RRCCUCRCCC"})
    whole, english, swahili = judge_agreement(first, second)
    assert (whole.language, english.language, swahili.language) == ("", "en", "sw")
    assert (english.n, english.same, english.first_only, english.second_only) == (10, 7, 2, 1)
    chance = 0.6 * 0.5 + 0.4 * 0.5
    assert english.kappa.value == pytest.approx((0.7 - chance) / (1 - chance))
    assert english.kappa.low < english.kappa.value < english.kappa.high
    assert (whole.n, whole.same, whole.first_only) == (20, 15, 3)
    chance = sum(a * b for a, b in ((0.5, 0.4), (0.4, 0.55), (0.1, 0.05)))
    assert whole.kappa.value == pytest.approx((0.75 - chance) / (1 - chance))


def test_agreement_of_all_is_no_certainty() -> None:
    letters = "RC" * 10
    (found, _) = judge_agreement(judged({"en": letters}), judged({"en": letters}))
    assert found.kappa.value == 1.0 == found.kappa.high
    assert 0.6 < found.kappa.low < 0.7  # twice Wilson's 83.9 % of 20, less 1
    # Twelve languages of 60 bundles are 60 draws, not 720: twice Wilson's 94.0 %, less 1.
    many = judged(dict.fromkeys("abcdefghijkl", "RC" * 30))
    whole, one, *_ = judge_agreement(many, many)
    assert (whole.n, one.n) == (720, 60)
    assert whole.kappa.low == one.kappa.low == pytest.approx(0.880, abs=0.001)
    (same, _) = judge_agreement(judged({"en": "RRRR"}), judged({"en": "RRRR"}))
    assert (same.same, same.kappa) == (4, None)  # chance alone would agree as often


def test_judges_that_guess_have_a_kappa_of_0() -> None:
    generator = np.random.default_rng(2)
    guesses = ["".join(generator.choice(list("RC"), 400)) for _ in range(2)]
    (found, _) = judge_agreement(judged({"en": guesses[0]}), judged({"en": guesses[1]}))
    assert found.kappa.low < 0 < found.kappa.high
    assert found.kappa.high - found.kappa.low < 0.25


def test_only_common_verdicts_count_and_gibberish_that_both_see_does_not() -> None:
    first = judged({"en": "RDDC", "sw": "RR"}) + judged({"en": "C"}, "benign")
    second = judged({"en": "RDRC"}) + judged({"en": "R"}, "benign")
    found = {(each.kind, each.language): each for each in judge_agreement(first, second)}
    assert set(found) == {("harmful", ""), ("harmful", "en"), ("benign", ""), ("benign", "en")}
    assert (found["harmful", ""].n, found["harmful", ""].same, found["harmful", ""].second_only) == (3, 2, 1)
    assert (found["benign", ""].same, found["benign", ""].second_only) == (0, 1)


def test_each_of_several_responses_to_a_prompt_is_compared_with_itself() -> None:
    def by_sample(letters: str) -> list[Judged]:
        return [replace(r, sample=n) for n, letter in enumerate(letters) for r in judged({"en": letter})]

    (found, _) = judge_agreement(by_sample("RRCC"), by_sample("RRCR"))
    assert (found.n, found.same, found.second_only) == (4, 3, 1)
