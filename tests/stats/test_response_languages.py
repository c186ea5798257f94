from __future__ import annotations

import math

import pytest

from mlc_ray.stats.intervals import wilson
from mlc_ray.stats.rates import ALL_BENCHMARKS, Interval, Judged
from mlc_ray.stats.response_languages import InLanguage, in_language
from mlc_ray.types import Behaviour, Kind


def said(
    kind: Kind, language: str, letters: str, told: str, benchmark: str = "own", behaviours: bool = True
) -> list[Judged]:
    """A bundle for each letter (R refused, C complied) and each word of `told`, `-` where nothing is told."""
    names: dict[str, Behaviour] = {"R": "refused", "C": "complied", "D": "degenerate"}
    return [
        Judged(
            benchmark, f"{kind}{index}", kind, language, names[letter] if behaviours else None, "safe",
            response_language=None if code == "-" else code,
        )
        for index, (letter, code) in enumerate(zip(letters, told.split(), strict=True))
    ]  # fmt: skip


def only(found: InLanguage, kind: Kind = "harmful") -> dict[str, float | None]:
    return {part: found_mean.value if (found_mean := found.mean("own", kind, part)) else None
            for part in ("all", "refused", "others")}  # type: ignore[arg-type]  # fmt: skip


def test_shares_are_of_the_responses_whose_language_could_be_told() -> None:
    records = [
        *said("harmful", "ja", "RRRCCC", "en en ja ja ja -"),
        *said("harmful", "en", "RRRCCC", "en en en en en en"),
        *said("benign", "zh-Hant", "CCRD", "zh en - -"),
    ]
    found = in_language(records)
    assert [(row.kind, row.language) for row in found.rows] == [
        ("harmful", "en"),
        ("harmful", "ja"),
        ("benign", "zh-Hant"),
    ]
    japanese = found.rows[1]
    assert (japanese.n, japanese.told, japanese.same) == (6, 5, 3)
    assert (japanese.refused_told, japanese.refused_same) == (3, 1)
    assert japanese.instead == {"en": 2}
    low, high = wilson(3, 5)
    assert japanese.rate == Interval(pytest.approx(60), pytest.approx(100 * low), pytest.approx(100 * high))
    assert only(found) == pytest.approx({"all": 80, "refused": 100 * (1 + 1 / 3) / 2, "others": 100})
    assert only(found, "benign") == {"all": 50, "refused": None, "others": 50}
    assert found.rows[2].instead == {"en": 1}
    assert found.mean("other", "harmful") is None


def test_a_mean_has_an_interval_over_bundles_that_holds_it() -> None:
    records = said("harmful", "es", "RC" * 20, "es en " * 20) + said("harmful", "fr", "RC" * 20, "fr fr " * 20)
    mean = in_language(records).mean("own", "harmful")
    assert mean is not None and mean.value == 75 and 65 < mean.low < 72 and 78 < mean.high < 85
    everywhere = in_language(said("harmful", "es", "R" * 12, "es " * 12)).mean("own", "harmful")
    assert everywhere is not None and everywhere.value == everywhere.high == 100 and everywhere.low < 90


def test_a_language_of_which_nothing_is_told_has_no_rate_and_no_part_in_the_mean() -> None:
    records = said("harmful", "ps", "RRCC", "- - - -") + said("harmful", "es", "RRCC", "es es en es")
    found = in_language(records)
    spanish, pashto = found.rows
    assert (pashto.told, pashto.rate, pashto.instead) == (0, None, {})
    assert spanish.rate is not None and only(found) == {"all": 75, "refused": 100, "others": 50}
    assert in_language(said("harmful", "ps", "R", "-")).means == ()


def test_without_a_judge_of_behaviour_refusals_are_not_told_apart() -> None:
    found = in_language(said("harmful", "es", "RRCC", "es es en es", behaviours=False))
    assert only(found) == {"all": 75, "refused": None, "others": None}


def test_over_benchmarks_it_is_the_mean_of_their_means() -> None:
    records = said("harmful", "es", "RRRR", "es es es es") + said("harmful", "fr", "RR", "en en", benchmark="other")
    found = in_language(records)
    means = [found.mean(name, "harmful") for name in ("own", "other", ALL_BENCHMARKS)]
    assert [mean.value if mean else math.nan for mean in means] == [100, 0, 50]
