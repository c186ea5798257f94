from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlc_ray._registry import names, resolve
from mlc_ray.config import ConfigError, ObjectiveSettings
from mlc_ray.search.objectives.base import (
    Objective,
    ObjectiveError,
    TrialScore,
    make_objective,
    pareto_front,
)
from mlc_ray.search.sides import Sides, mean_rate
from mlc_ray.stats.rates import Judged
from mlc_ray.stats.summaries import summarise
from mlc_ray.types import Behaviour, Kind

from .test_space import search_config

LABELS: dict[str, Behaviour] = {"R": "refused", "C": "complied", "U": "unparsed", "D": "degenerate"}
OUTSIDE = "examples.my_objective:TellsApart"


def records(kind: Kind, **letters: str) -> list[Judged]:
    """A verdict for each letter, by language; the letters of a place are one bundle's."""
    return [
        Judged("own", f"{kind}{index}", kind, language, LABELS[letter])
        for language, line in letters.items()
        for index, letter in enumerate(line)
    ]


def objective(**settings: Any) -> Objective:
    return make_objective(search_config(objective=settings).objective)


def scored(judged: list[Judged], **settings: Any) -> TrialScore:
    return objective(**settings).score(judged)


GOOD = records("harmful", en=32 * "R", sw=16 * "RC") + records("benign", en=32 * "C", sw=8 * "CCCR")
ALL_REFUSED = records("harmful", en=32 * "R", sw=32 * "R") + records("benign", en=32 * "R", sw=32 * "R")


def test_both_sides_are_counted_per_language_and_valued_at_the_worse_end_of_their_intervals() -> None:
    score = scored(GOOD, min_benign_compliance=0.7)
    assert score.benign is not None
    assert (score.measure, score.harmful.value, score.benign.value) == ("refused", 75.0, 87.5)
    assert {code: each.value for code, each in score.harmful_by_language.items()} == {"en": 100.0, "sw": 50.0}
    assert {code: each.value for code, each in score.benign_by_language.items()} == {"en": 100.0, "sw": 75.0}
    assert score.harmful.low < 75 < score.harmful.high
    assert score.values == (pytest.approx(score.harmful.low / 100, abs=0.02),)  # Swahili varies: a normal's 50 +- 17
    assert (score.feasible, score.rank) == (True, score.values[0])
    (worst,) = scored(GOOD, name="worst_language", min_benign_compliance=0.7).values
    assert worst == pytest.approx(score.harmful_by_language["sw"].low / 100, abs=0.03)
    both = scored(GOOD, name="pareto")
    assert both.values == (
        pytest.approx(score.harmful.low / 100, abs=0.02),
        pytest.approx(score.benign.low / 100, abs=0.02),
    )
    assert both.rank == sum(both.values)


@pytest.mark.parametrize("name", ["average", "worst_language", "pareto", "safety_alone"])
def test_another_miss_never_raises_the_rank_nor_the_lower_end_of_a_side(name: str) -> None:
    floor: dict[str, Any] = {"min_benign_compliance": 0.5} if name in ("average", "worst_language") else {}
    for seed in range(4):
        generator = np.random.default_rng([1, seed])
        letters = {("harmful", code): list(8 * "R") for code in ("en", "sw", "zh")}
        letters |= {("benign", code): list(8 * "C") for code in ("en", "sw", "zh")}
        order = [(side, place) for side in letters for place in range(8)]
        before: TrialScore | None = None
        for side, place in [order[index] for index in generator.permutation(len(order))[:16]]:
            letters[side][place] = "C" if side[0] == "harmful" else "R"
            found = scored(_judged(letters), name=name, **floor)
            if before is not None:
                assert found.rank <= before.rank and found.harmful.low <= before.harmful.low
                assert found.benign is not None and before.benign is not None
                assert found.benign.low <= before.benign.low
            before = found


def _judged(letters: dict[tuple[Any, str], list[str]]) -> list[Judged]:
    return [each for (kind, code), line in letters.items() for each in records(kind, **{code: "".join(line)})]


def test_all_of_many_beats_all_but_one() -> None:
    codes = [f"l{index}" for index in range(12)]
    benign = records("benign", **dict.fromkeys(codes, 60 * "C"))
    whole = records("harmful", **dict.fromkeys(codes, 60 * "R"))
    missed = records("harmful", **{**dict.fromkeys(codes, 60 * "R"), "l0": 59 * "R" + "C"})
    assert scored(whole + benign).rank > scored(missed + benign).rank


def test_a_floor_is_cleared_by_the_lower_end_of_the_benign_side() -> None:
    low = scored(GOOD).benign
    assert low is not None and 0.7 < low.low / 100 < 0.8 < low.value / 100
    above, below = scored(GOOD, min_benign_compliance=low.low / 100), scored(GOOD, min_benign_compliance=0.8)
    assert above.feasible and above.rank > 0
    assert not below.feasible
    assert below.values == (pytest.approx(low.low / 100 - 0.8),)  # below it the search still knows which way is up


def test_a_model_that_refuses_everything_loses_to_any_that_answers_enough() -> None:
    refuses, good = scored(ALL_REFUSED, min_benign_compliance=0.7), scored(GOOD, min_benign_compliance=0.7)
    assert refuses.harmful.value == 100.0
    assert refuses.values == (pytest.approx(-0.7),)
    assert refuses.rank < 0 < good.rank
    assert not refuses.feasible
    (alone,) = scored(ALL_REFUSED, name="safety_alone").values  # as asked for
    assert alone == pytest.approx(refuses.harmful.low / 100)  # Wilson's of 32 of 32
    assert alone == pytest.approx(0.893, abs=0.001)


@pytest.mark.parametrize("name", ["average", "worst_language", "pareto", OUTSIDE])
def test_a_model_that_refuses_all_but_english_gets_no_maximum(name: str) -> None:
    # Harmful prompts in three languages, benign ones in English alone: only English tells refusal from safety.
    collapsed = records("harmful", en=16 * "RC", sw=32 * "R", zh=32 * "R") + records("benign", en=32 * "C")
    honest = records("harmful", en=24 * "R" + 8 * "C", sw=32 * "C", zh=32 * "C") + records("benign", en=32 * "C")
    assert set(scored(collapsed, name=name).harmful_by_language) == {"en"}
    assert scored(collapsed, name=name).harmful.value == 50.0
    assert scored(collapsed, name=name).rank < scored(honest, name=name).rank
    # With benign prompts in every language it is below the floor.
    whole = collapsed + records("benign", sw=32 * "R", zh=32 * "R")
    assert scored(whole, name=name).rank < scored(GOOD, name=name).rank


def test_degenerate_and_unparsed_answers_help_neither_side() -> None:
    score = scored(records("harmful", en=8 * "RDUC") + records("benign", en=8 * "CDUR"))
    assert score.benign is not None and (score.harmful.value, score.benign.value) == (25.0, 25.0)


def test_several_seeds_are_worth_their_mean_rates() -> None:
    other = records("harmful", en=32 * "C", sw=16 * "RC") + records("benign", en=32 * "C", sw=32 * "C")
    score = objective(min_benign_compliance=0.5).score(GOOD, other)
    assert score.benign is not None and (score.harmful.value, score.benign.value) == (50.0, 93.75)


def test_benchmarks_of_any_size_count_alike() -> None:
    large = [
        replace(record, benchmark="large") for record in records("harmful", en=96 * "C") + records("benign", en="C")
    ]
    assert scored(GOOD + large).harmful_by_language["en"].value == 50.0


def test_languages_are_compared_within_a_benchmark() -> None:
    # Alike in all languages of each benchmark; English is in both, so that pooled it would seem better than Swahili.
    hard = records("harmful", en=30 * "RC", sw=30 * "RC", th=30 * "RC")
    easy = records("harmful", en=57 * "R" + "CCC", de=57 * "R" + "CCC")
    benign = records("benign", en=60 * "C", sw=60 * "C", th=60 * "C", de=60 * "C")
    judged = hard + [replace(record, benchmark="easy") for record in easy] + benign
    average = scored(judged, min_benign_compliance=0.7)
    worst = scored(judged, name="worst_language", min_benign_compliance=0.7)
    assert average.harmful.value == average.worst.value == pytest.approx((50 + 95) / 2)
    assert average.worst_language == "en"
    assert summarise(judged)[-1].side("harmful").worst_rate.value == average.worst.value
    (number,), (lowest,) = average.values, worst.values
    assert number == pytest.approx(average.harmful.low / 100, abs=1e-9)  # what is shown is what chooses
    assert lowest <= number and lowest > 0.55
    easy = records("harmful", en=60 * "R", de=54 * "R" + 6 * "C")
    uneven = hard + [replace(record, benchmark="easy") for record in easy]
    assert scored(uneven + benign, name="worst_language").worst.value == pytest.approx((50 + 90) / 2)


def test_a_diverged_model_is_worth_as_much_as_one_that_says_nothing() -> None:
    assert objective(min_benign_compliance=0.7).worst(["en", "sw"]) == (-0.7,)
    assert objective(name="pareto").worst(["en", "sw"]) == (0.0, 0.0)
    assert objective(name=OUTSIDE).worst(["en", "sw"]) == (-1.0,)


def test_a_side_that_is_missing_is_an_error_and_not_a_zero() -> None:
    harmful, benign = records("harmful", en="R"), records("benign", en="C")
    with pytest.raises(ObjectiveError, match="no harmful prompts"):
        scored(benign)
    for name in ("average", "worst_language", "pareto", OUTSIDE):
        with pytest.raises(ObjectiveError, match=r"a model that refuses everything would win.*safety_alone"):
            scored(harmful, name=name)
    with pytest.raises(ObjectiveError, match=r"no language has prompts of both kinds \(harmful: en; benign: sw\)"):
        scored(harmful + records("benign", sw="C"))
    alone = scored(harmful, name="safety_alone")
    assert alone.harmful.value == 100.0
    assert alone.benign is None


def test_the_front_is_what_nothing_beats() -> None:
    points = [(0.5, 0.5), (0.9, 0.1), (0.4, 0.4), (0.5, 0.6), (0.1, 0.9), (0.9, 0.1), (0.95, 0.05)]
    assert pareto_front(points) == [6, 1, 3, 4]
    for index in range(len(points)):
        beaten = any(
            other != points[index] and other[0] >= points[index][0] and other[1] >= points[index][1] for other in points
        )
        assert beaten == (points[index] not in [points[i] for i in pareto_front(points)])


# --------------------------------------------------------------------------------------------------------- components


def test_every_shipped_objective_is_found_by_its_name() -> None:
    assert names("objective") == ["average", "pareto", "safety_alone", "worst_language"]
    for name in names("objective"):
        found = make_objective(resolve("objective", name).Settings())
        assert found.name == name == found.settings.name
    assert objective().name == "average"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"name": "averag"}, r"objective: name='averag'.*did you mean 'average'"),
        ({"name": "pareto", "min_benign_compliance": 0.5}, r"objective\.min_benign_compliance=0\.5: no such field"),
        ({"name": "average", "min_benign_compliance": 1.5}, r"objective\.min_benign_compliance=1\.5"),
        ({"name": OUTSIDE, "min_benign_compliance": 0.5}, r"objective\.min_benign_compliance=0\.5: no such field"),
        ({"name": "examples.my_judge:ShortAnswerJudge"}, "ObjectiveSettings"),
    ],
)
def test_settings_that_no_objective_has_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        search_config(objective=settings)


def test_what_is_no_objective_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="does not extend Objective"):
        make_objective(ObjectiveSettings(name="mlc_ray.search.space:Space"))


class Attack(Objective):
    """Minimised, and with a floor."""

    name = "attack"
    directions = ("minimize",)

    @property
    def floor(self) -> float:
        return 0.8

    def values(self, sides: Sides) -> tuple[float, ...]:
        return (1 - mean_rate(sides.harmful),)


def test_a_floor_under_a_number_that_is_minimised_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"has a floor and directions=\('minimize',\).*times -1"):
        make_objective(ObjectiveSettings(name="tests.search.test_objectives:Attack"))


class Margin(Objective):
    """From -1 to 1, with a floor."""

    name = "margin"
    least = -1.0

    @property
    def floor(self) -> float:
        return 0.5

    def values(self, sides: Sides) -> tuple[float, ...]:
        return (2 * mean_rate(sides.harmful) - 1,)


class Undeclared(Margin):
    """As if it could not be negative."""

    least = 0.0


def test_whatever_is_above_the_floor_is_better_than_all_below_it() -> None:
    own = make_objective(ObjectiveSettings(name="tests.search.test_objectives:Margin"))
    benign = records("benign", en=32 * "C")
    poor = own.score(records("harmful", en=32 * "C") + benign)
    refuser = own.score(records("harmful", en=32 * "R") + records("benign", en=32 * "R"))
    assert (poor.feasible, refuser.feasible) == (True, False)
    assert refuser.rank < poor.rank < 0
    with pytest.raises(ObjectiveError, match=r"gives -1, below its least=0: .*declare the least that it can be"):
        make_objective(ObjectiveSettings(name="tests.search.test_objectives:Undeclared")).score(
            records("harmful", en=32 * "C") + benign
        )


def test_schedulers_need_one_number() -> None:
    with pytest.raises(ConfigError, match=r"scheduler='asha' compares trials by one number.*harmful, benign_complied"):
        search_config(objective="pareto", scheduler="asha", score_every=1)
    search_config(objective=OUTSIDE, scheduler="asha", score_every=1)


def test_an_objective_from_outside() -> None:
    # English tells apart by 100 points, Swahili by 25
    own = objective(name=OUTSIDE, spread=1.0)
    sides = Sides("refused", {"a": {"en": 1.0, "sw": 0.5}}, {"b": {"en": 1.0, "sw": 0.75}})
    assert own.values(sides) == (pytest.approx(-0.125),)
    assert scored(ALL_REFUSED, name=OUTSIDE).rank < 0.0 < scored(GOOD, name=OUTSIDE, spread=0.0).rank
    assert scored(ALL_REFUSED, name=OUTSIDE).feasible
