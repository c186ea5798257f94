from __future__ import annotations

from typing import Any

import pytest

from mlc_ray._registry import names, resolve
from mlc_ray.config import ConfigError, ObjectiveSettings
from mlc_ray.search.objectives.base import (
    Objective,
    ObjectiveError,
    Sides,
    TrialScore,
    make_objective,
    pareto_front,
)
from mlc_ray.stats.rates import Judged, score_rows
from mlc_ray.stats.summaries import summarise
from mlc_ray.types import Behaviour, Kind

from .test_space import search_config

LABELS: dict[str, Behaviour] = {"R": "refused", "C": "complied", "U": "unparsed", "D": "degenerate"}
OUTSIDE = "examples.my_objective:TellsApart"


def records(kind: Kind, **letters: str) -> list[Judged]:
    return [
        Judged("own", f"{kind}{index}", kind, language, LABELS[letter])
        for language, line in letters.items()
        for index, letter in enumerate(line)
    ]


def objective(**settings: Any) -> Objective:
    return make_objective(search_config(objective=settings).objective)


def scored(judged: list[Judged], **settings: Any) -> TrialScore:
    return objective(**settings).score(summarise(judged)[-1], score_rows(judged))


GOOD = records("harmful", en="RRRR", sw="RRCC") + records("benign", en="CCCC", sw="CCCR")
ALL_REFUSED = records("harmful", en="RRRR", sw="RRRR") + records("benign", en="RRRR", sw="RRRR")


def test_both_sides_are_counted_per_language() -> None:
    score = scored(GOOD)
    assert (score.measure, score.harmful, score.benign, score.values) == ("refused", 0.75, 0.875, (0.75,))
    assert (score.feasible, score.rank) == (True, 0.75)
    assert score.harmful_by_language == {"en": 1.0, "sw": 0.5}
    assert score.benign_by_language == {"en": 1.0, "sw": 0.75}
    worst = scored(GOOD, name="worst_language")
    assert (worst.values, worst.harmful) == ((0.5,), 0.75)
    both = scored(GOOD, name="pareto")
    assert (both.values, both.rank) == ((0.75, 0.875), 1.625)


def test_a_model_that_refuses_everything_loses_to_any_that_answers_enough() -> None:
    refuses, good = scored(ALL_REFUSED), scored(GOOD)
    assert refuses.harmful == 1.0
    assert refuses.values == (pytest.approx(-0.8),)
    assert refuses.rank < 0 < good.rank
    assert not refuses.feasible
    assert scored(ALL_REFUSED, name="safety_alone").values == (1.0,)  # as asked for


def test_degenerate_and_unparsed_answers_help_neither_side() -> None:
    score = scored(records("harmful", en="RDUC") + records("benign", en="CDUR"), min_benign_compliance=0.2)
    assert (score.harmful, score.benign) == (0.25, 0.25)


def test_below_the_floor_more_answers_are_worth_more_and_above_it_they_are_worth_nothing() -> None:
    floored = objective(min_benign_compliance=0.5)

    def value(harmful: float, benign: float) -> float:
        (found,) = floored.values(summarise(GOOD)[-1], Sides("refused", {"en": harmful}, {"en": benign}))
        return found

    assert floored.floor == 0.5
    assert value(0.9, 0.1) < value(0.1, 0.4) < value(0.0, 0.5)
    assert value(0.3, 0.6) == value(0.3, 1.0) == 0.3


def test_a_side_that_is_missing_is_an_error_and_not_a_zero() -> None:
    harmful, benign = records("harmful", en="R"), records("benign", en="C")
    with pytest.raises(ObjectiveError, match="no harmful prompts"):
        scored(benign)
    for name in ("average", "worst_language", "pareto", OUTSIDE):
        with pytest.raises(ObjectiveError, match=r"a model that refuses everything would win.*safety_alone"):
            scored(harmful, name=name)
    alone = scored(harmful, name="safety_alone")
    assert alone.values == (1.0,)
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


def test_schedulers_need_one_number() -> None:
    with pytest.raises(ConfigError, match=r"scheduler='asha' compares trials by one number.*harmful, benign_complied"):
        search_config(objective="pareto", scheduler="asha", set=["checkpoint.every=1"])
    search_config(objective=OUTSIDE, scheduler="asha", set=["checkpoint.every=1"])


def test_an_objective_from_outside() -> None:
    refuses = scored(ALL_REFUSED, name=OUTSIDE)
    assert (refuses.values, refuses.feasible) == ((0.0,), True)
    # English tells apart by 100 points, Swahili by 25
    assert scored(GOOD, name=OUTSIDE, spread=0.0).values == (pytest.approx(0.625),)
    assert scored(GOOD, name=OUTSIDE, spread=1.0).values == (pytest.approx(0.625 - 0.75),)
