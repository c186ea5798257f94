"""Samplers and schedulers on real Ray Tune, with trials that only look their score up: what is tried and stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.tune
import yaml

from mlc_ray.config import SearchConfig, parse_config
from mlc_ray.search.objective import ANSWERED, HELD_BACK, STEP, VALUE
from mlc_ray.search.ray_tune import make_tuner, number_of_trials
from mlc_ray.search.space import make_space

pytestmark = pytest.mark.slow

REPORTS = 4
BEST_LAYER = 7


@pytest.fixture
def run_search(ray_local: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs a search whose trials are worth the more the nearer their layer is to `BEST_LAYER`; the last results."""
    run = {"name": "base", "model": {"path": "some/model"}, "data": {"train": [{"path": "sample:train"}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    def score_of_a_layer(values: dict[str, Any]) -> None:
        with (tmp_path / "calls").open("a") as calls:
            calls.write(f"{values['mlc.layer']}\n")
        if (tmp_path / f"fail-{values['mlc.layer']}").exists():
            raise RuntimeError("no luck with this layer")
        held_back = 1 - abs(values["mlc.layer"] - BEST_LAYER) / 10
        answered = 1 - held_back
        for step in range(1, REPORTS + 1):
            ray.tune.report({VALUE: held_back, HELD_BACK: held_back, ANSWERED: answered, STEP: float(step)})

    def run_it(resumed: bool = False, **settings: Any) -> list[dict[str, Any]]:
        scoring = {"benchmarks": [{"path": "sample:test"}]}
        settings = {"name": "s", "train": str(tmp_path / "run.yaml"), "scoring": scoring, **settings}
        config = parse_config(SearchConfig, settings)
        tuner = make_tuner(config, make_space(config), score_of_a_layer, tmp_path, resumed=resumed)
        return [result.metrics or {} for result in tuner.fit()]

    return run_it


def layers(results: list[dict[str, Any]]) -> list[int]:
    return [result["config"]["mlc.layer"] for result in results]


def test_tpe_comes_back_to_what_was_good(run_search: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    run_search(space={"mlc.layer": {"integers": [1, 20]}}, sampler="tpe", trials=12)
    tried = [int(line) for line in (tmp_path / "calls").read_text().split()]
    assert len(tried) == 12
    distance = [abs(layer - BEST_LAYER) for layer in tried]
    assert min(distance) <= 1
    assert sum(distance[-6:]) < sum(distance[:6])


def test_both_sides_are_maximised_under_pareto(run_search: Callable[..., list[dict[str, Any]]]) -> None:
    space = {"mlc.layer": {"integers": [1, 20]}}
    results = run_search(space=space, sampler="tpe", trials=4, objective={"pareto": True})
    assert all(result[HELD_BACK] + result[ANSWERED] == pytest.approx(1) for result in results)
    assert {result["training_iteration"] for result in results} == {REPORTS}  # nothing is stopped


def test_a_grid_is_tried_whole_and_failed_trials_again(
    run_search: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "space": {"mlc.layer": {"choice": [2, 7]}, "mlc.weight": {"choice": [0.1, 1.0]}},
        "sampler": "grid",
    }
    (tmp_path / "fail-2").touch()
    run_search(**settings)
    assert sorted((tmp_path / "calls").read_text().split()) == ["2", "2", "7", "7"]
    (tmp_path / "fail-2").unlink()
    results = run_search(resumed=True, **settings)
    assert sorted((tmp_path / "calls").read_text().split()) == ["2", "2", "2", "2", "7", "7"]  # 7 was done
    points = {(result["config"]["mlc.layer"], result["config"]["mlc.weight"]) for result in results}
    assert points == {(2, 0.1), (2, 1.0), (7, 0.1), (7, 1.0)}
    assert all(VALUE in result for result in results)


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_poor_trials_are_stopped_early(run_search: Callable[..., list[dict[str, Any]]], scheduler: str) -> None:
    results = run_search(
        space={"mlc.layer": {"choice": [7, 6, 1, 20]}}, sampler="grid", scheduler=scheduler, grace_scores=1
    )
    reports = {result["config"]["mlc.layer"]: result["training_iteration"] for result in results}
    assert reports[7] == REPORTS
    assert min(reports.values()) == 1


def test_no_more_trials_than_a_grid_has_points(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{name: base, model: {path: m}, data: {train: [{path: 'sample:train'}]}}")
    settings: dict[str, Any] = {
        "name": "s",
        "train": str(tmp_path / "run.yaml"),
        "space": {"mlc.layer": {"choice": [1, 2, 3]}},
        "sampler": "grid",
        "scoring": {"benchmarks": [{"path": "sample:test"}]},
    }
    for asked, expected in ((None, 3), (2, 2), (9, 3)):
        config = parse_config(SearchConfig, {**settings, **({} if asked is None else {"trials": asked})})
        assert number_of_trials(config, make_space(config)) == expected
