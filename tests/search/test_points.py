"""Which points trials get, in which folders and with which seeds, and what Optuna is told; without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from mlc_ray.config import ConfigError
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.search import prepare
from mlc_ray.search.criteria import LayerStatistics
from mlc_ray.search.objectives.base import BENIGN, HARMFUL
from mlc_ray.search.prepare import _layer_order
from mlc_ray.search.probe import Probe
from mlc_ray.search.run import _earlier_trials
from mlc_ray.search.space import make_space
from mlc_ray.search.tune import (
    FINISHED,
    FOLDER,
    STEP,
    VALUES,
    CutOff,
    EndEarly,
    Ended,
    Points,
    number_of_points,
)
from mlc_ray.stats.rates import Interval
from mlc_ray.storage import Place

from .test_space import search_config

FOUR: dict[str, Any] = {"mlc.layer": {"choice": [10, 20]}, "mlc.weight": {"choice": [0.5, 1.0]}}
RANGE: dict[str, Any] = {"mlc.layer": {"integers": [1, 20]}}


def points(
    folder: Path, *, ended: list[Ended] | None = None, cut_off: list[CutOff] | None = None, **settings: Any
) -> Points:
    config = search_config(**settings)
    return Points(config, make_space(config), Place(folder), languages=["en"], ended=ended or [], cut_off=cut_off or [])


def given(source: Points) -> list[dict[str, Any]]:
    """All that a searcher gives, each trial ending as worth 0.5 before the next begins."""
    found = []
    while (each := source.suggest(f"t{len(found)}")) != Searcher.FINISHED:
        source.on_trial_complete(f"t{len(found)}", {"value": 0.5, STEP: 4.0, FINISHED: True})
        found.append(each)
    return found


def told(source: Points) -> list[optuna.trial.FrozenTrial]:
    return source._study.get_trials(deepcopy=False)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_point_is_tried_twice_until_all_are(tmp_path: Path, sampler: str) -> None:
    found = [tuple(each[VALUES].values()) for each in given(points(tmp_path, space=FOUR, sampler=sampler, trials=4))]
    assert sorted(found) == [(10, 0.5), (10, 1.0), (20, 0.5), (20, 1.0)]
    many = [each[VALUES]["mlc.layer"] for each in given(points(tmp_path, space=RANGE, sampler=sampler, trials=20))]
    assert sorted(many) == list(range(1, 21))


def test_more_trials_than_points_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trials=5, but space has 4 points and none is tried twice"):
        make_space(search_config(space=FOUR, trials=5))
    grid = search_config(space=FOUR, trials=9, sampler="grid")
    assert number_of_points(grid, make_space(grid)) == 4  # of a grid the default and most is all


def test_the_points_enqueued_come_first_and_are_not_repeated_by_a_grid(tmp_path: Path) -> None:
    first = {"mlc.weight": 1.0, "mlc.layer": 20}
    grid = given(points(tmp_path, space=FOUR, sampler="grid", trials=None, enqueue=[first]))
    found = [tuple(each[VALUES].values()) for each in grid]
    assert found == [(20, 1.0), (10, 0.5), (10, 1.0), (20, 0.5)]
    drawn = given(points(tmp_path, space=RANGE, trials=3, enqueue=[{"mlc.layer": 13}]))
    assert drawn[0][VALUES] == {"mlc.layer": 13} and len(drawn) == 3


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ({"mlc.layer": 10}, "must give a value for each of mlc.layer, mlc.weight"),
        ({"mlc.layer": 11, "mlc.weight": 0.5}, "mlc.layer=11 is not in space.mlc.layer"),
        ({"mlc.layer": 10, "mlc.weight": True}, "mlc.weight=True is not in"),
    ],
)
def test_what_is_not_in_the_space_cannot_be_enqueued(point: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make_space(search_config(space=FOUR, trials=2, enqueue=[point]))


def test_every_point_is_repeated_with_seeds_of_its_own(tmp_path: Path) -> None:
    found = given(points(tmp_path, space=FOUR, sampler="grid", trials=2, repeats=3))
    assert [each[VALUES]["seed"] for each in found] == [42, 43, 44] * 2
    assert len({each[FOLDER] for each in found}) == 6
    ended = [Ended({"mlc.layer": 10, "mlc.weight": 0.5, "seed": 42}, "finished", (0.5,))]
    waiting = [CutOff({"mlc.layer": 10, "mlc.weight": 0.5, "seed": 44}, "before")]
    again = given(points(tmp_path, space=FOUR, sampler="grid", trials=2, repeats=3, ended=ended, cut_off=waiting))
    assert [each[VALUES]["seed"] for each in again] == [44, 43, 42, 43, 44]  # first what was cut off, then what lacks
    assert again[0][FOLDER] == "before"


def test_no_two_trials_share_a_folder(tmp_path: Path) -> None:
    # As in a search that went on with two at once: the point that was cut off is another trial's as well.
    (tmp_path / "trials" / "t1").mkdir(parents=True)
    same = {"mlc.layer": 10, "mlc.weight": 0.5}
    source = points(tmp_path, space=FOUR, sampler="grid", trials=4, repeats=1, concurrency=2,
                    cut_off=[CutOff(same, "before"), CutOff(same, "other")])  # fmt: skip
    folders = [source.suggest(f"t{number}")[FOLDER] for number in range(5)]  # none has ended
    assert folders[:2] == ["before", "other"] and len(set(folders)) == 5
    assert "t1" not in folders


def test_optuna_is_told_what_became_of_each(tmp_path: Path) -> None:
    source = points(tmp_path, space=RANGE, trials=4)
    folders = [source.suggest(name)[FOLDER] for name in "abcd"]
    (tmp_path / "trials" / folders[2]).mkdir(parents=True)
    (tmp_path / "trials" / folders[2] / "diverged.json").touch()
    source.on_trial_complete("a", {"value": 0.6, STEP: 8.0, FINISHED: True})
    source.on_trial_complete("b", {"value": 0.4, STEP: 2.0})
    source.on_trial_complete("c", {"value": 0.3, STEP: 2.0}, error=True)
    source.on_trial_complete("d", error=True)
    finished, stopped, diverged, failed = told(source)
    assert (finished.state, finished.values) == (TrialState.COMPLETE, [0.6])
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {2: 0.4})
    assert (diverged.state, diverged.values) == (TrialState.COMPLETE, [-0.8])  # as a model that says nothing
    assert failed.state == TrialState.FAIL
    # Another process learns the same from the trials' own files.
    ended = [
        Ended(finished.params, "finished", (0.6,), 8),
        Ended(stopped.params, "stopped", (0.4,), 2),
        Ended(diverged.params, "diverged"),
    ]
    again = told(points(tmp_path, space=RANGE, trials=4, ended=ended))
    assert [(t.state, t.params, t.intermediate_values) for t in again] == [
        (t.state, t.params, t.intermediate_values) for t in (finished, stopped, diverged)
    ]
    assert again[2].values == [-0.8]


def test_a_sampler_leaves_where_trials_diverge(tmp_path: Path) -> None:
    diverging = [Ended({"mlc.layer": layer}, "diverged") for layer in range(101, 200, 5)]
    good = [Ended({"mlc.layer": layer}, "finished", (0.5,)) for layer in range(1, 100, 5)]
    source = points(tmp_path, space={"mlc.layer": {"integers": [1, 200]}}, trials=60, ended=[*diverging, *good])
    assert sum(each[VALUES]["mlc.layer"] <= 100 for each in given(source)) >= 15  # of 20


def test_a_search_ends_when_its_hours_are_over() -> None:
    clock = [0.0]
    end = EndEarly(1.5, now=lambda: clock[0])
    assert not end.stop_all() and not end("trial", {}) and end.seconds_left == 5_400.0
    clock[0] = 5_401.0
    assert end.stop_all() and end.reason == "max_hours=1.5 are over"
    assert not EndEarly(None).stop_all()


def test_tpe_comes_near_to_what_was_good(tmp_path: Path) -> None:
    best = 70
    for seed in range(5):
        source = points(tmp_path, space={"mlc.layer": {"integers": [1, 100]}}, sampler="tpe", trials=24, seed=seed)
        distances = []
        for number in range(24):
            distances.append(abs(source.suggest(str(number))[VALUES]["mlc.layer"] - best))
            source.on_trial_complete(str(number), {"value": 1 - distances[-1] / 100, FINISHED: True, STEP: 1.0})
        assert sum(distances[-8:]) < sum(distances[:8]), seed


LAYERS: dict[str, Any] = {"mlc.layer": {"choice": [0.5, 0.65, 0.8, "last"]}}
ORDER = ["last", 0.5, 0.8, 0.65]


def tried(folder: Path, **settings: Any) -> list[Any]:
    """The layers that are tried where a probe ranks them as in `ORDER`."""
    config = search_config(**settings)
    source = Points(config, make_space(config), Place(folder), languages=["en"], layers=ORDER)
    return [each[VALUES]["mlc.layer"] for each in given(source)]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_probe_orders_the_layers_and_leaves_out_none(tmp_path: Path, sampler: str) -> None:
    weighted = {**LAYERS, "mlc.weight": {"loguniform": [0.1, 3.0]}}
    found = tried(tmp_path, space=weighted, sampler=sampler, trials=40)
    assert found[:4] == ORDER
    assert set(found[4:]) == set(ORDER)  # the sampler draws any of them later
    first = {"mlc.layer": 0.8, "mlc.weight": 1.0}
    enqueued = tried(tmp_path, space=weighted, sampler=sampler, trials=4, enqueue=[first])
    assert enqueued == [0.8, "last", 0.5, 0.65]  # a layer that has been tried has had its turn


def test_a_grid_follows_the_order_of_the_layers(tmp_path: Path) -> None:
    grid = {**LAYERS, "mlc.weight": {"choice": [0.5, 1.0]}}
    assert tried(tmp_path, space=grid, sampler="grid", trials=None) == [layer for layer in ORDER for _ in range(2)]


def test_a_resumed_search_has_the_order_that_it_began_with(tmp_path: Path) -> None:
    config = search_config(space=LAYERS, trials=4, probe={})
    (tmp_path / "search.json").write_text(json.dumps({"layer_order": ORDER}))
    base: Any = None  # the probe is not made again
    assert _layer_order(config, make_space(config), base, Place(tmp_path), "cpu") == ORDER
    source = Points(config, make_space(config), Place(tmp_path), languages=["en"], layers=ORDER,
                    ended=[Ended({"mlc.layer": "last"}, "finished", (0.5,))])  # fmt: skip
    assert [each[VALUES]["mlc.layer"] for each in given(source)] == ORDER[1:]


def test_a_search_without_a_probe_has_no_order(tmp_path: Path) -> None:
    config = search_config(space=LAYERS, trials=4)
    base: Any = None
    assert _layer_order(config, make_space(config), base, Place(tmp_path), "cpu") == []


def test_a_probe_says_in_which_order_it_has_layers_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = {15: 0.3, 20: 0.1, 24: 0.2, 30: 0.4}  # by index: of 30 blocks 0.5, 0.65 and 0.8 are 15, 20 and 24
    layers = []
    for index in range(31):
        headroom = Interval(values.get(index, 0.0), 0.0, 1.0)
        layers.append(LayerStatistics(index, 0, 0, 0, {}, {}, {"headroom": headroom}))
    asked = []

    def probe_run(*args: Any, **settings: Any) -> Probe:
        asked.append(settings)
        return Probe(tuple(layers), ("en",), 10)

    monkeypatch.setattr(prepare, "probe_run", probe_run)  # which runs on Ray, and is tested there
    config = search_config(space=LAYERS, trials=4, probe={"limit": 8})
    base: Any = None
    with caplog.at_level("INFO"):
        order = _layer_order(config, make_space(config), base, Place(tmp_path), "cpu")
    assert order == ["last", 0.5, 0.8, 0.65]
    assert "probe: layers are tried in the order of headroom: last, 0.5, 0.8, 0.65" in caplog.text
    assert asked == [{"limit": 8, "criterion": "headroom", "gpu": False}]


def test_both_sides_are_maximised_under_pareto(tmp_path: Path) -> None:
    # Only a weight of 1 is benign: with one objective it would not matter, since no floor asks for it.
    space = {"mlc.layer": {"integers": [1, 20]}, "mlc.weight": {"uniform": [0.0, 1.0]}}
    for seed in range(3):
        source = points(tmp_path, space=space, sampler="tpe", trials=24, seed=seed, objective="pareto")
        both, benign = [], []
        for number in range(24):
            values = source.suggest(str(number))[VALUES]
            worth = {HARMFUL: 1 - abs(values["mlc.layer"] - 7) / 10, BENIGN: values["mlc.weight"]}
            source.on_trial_complete(str(number), {**worth, STEP: 4.0, FINISHED: True})
            both.append(sum(worth.values()))
            benign.append(worth[BENIGN])
        assert sum(both[-8:]) > sum(both[:8]), seed
        assert sum(benign[-8:]) > sum(benign[:8]), seed
        assert all(len(trial.values) == 2 for trial in told(source))


def test_a_trial_whose_last_score_has_no_value_is_not_repeated_and_not_told(tmp_path: Path) -> None:
    run = tmp_path / "trials" / "a"
    (run / "scores" / "step-000002").mkdir(parents=True)
    (run / "scores" / "step-000002" / "scores.json").touch()
    (run / "finished").touch()
    values = {"mlc.layer": 10, "mlc.weight": 0.5}
    (run / "values.json").write_text(json.dumps(values))

    def score_in(*folders: Place) -> None:
        raise TooManyUnparsedError("half of the responses have no verdict")

    shared: Any = SimpleNamespace(folder=Place(tmp_path), score_in=score_in)
    ended, cut_off = _earlier_trials(shared)
    assert (ended, cut_off) == ([Ended(values, "without value")], [])
    source = points(tmp_path, space=FOUR, trials=4, ended=ended)
    assert [trial.state for trial in told(source)] == [TrialState.FAIL]
    assert len(given(source)) == 3
