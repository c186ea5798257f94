"""Samplers and schedulers on real Ray Tune, with trials that only look their score up: what is tried and stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray.tune
import yaml

from mlc_ray.config import SearchConfig, parse_config
from mlc_ray.search.objectives.base import BENIGN, HARMFUL
from mlc_ray.search.space import make_space
from mlc_ray.search.tune import FINISHED, FOLDER, STEP, VALUES, CutOff, Ended, Points, make_tuner, number_of_points
from mlc_ray.storage import Place

pytestmark = pytest.mark.slow

VALUE = "value"

REPORTS = 4
BEST_LAYER = 7


@pytest.fixture
def run_search(ray_local: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs a search whose trials are worth the more the nearer their layer is to `BEST_LAYER`; the last results."""
    run = {"name": "base", "model": {"path": "some/model"}, "data": {"train": [{"path": "sample:train"}]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    def score_of_a_layer(given: dict[str, Any]) -> None:
        values = given[VALUES]
        with (tmp_path / "calls").open("a") as calls:
            calls.write(f"{values['mlc.layer']}\n")
        if (tmp_path / f"fail-{values['mlc.layer']}").exists():
            (tmp_path / "trials" / given[FOLDER]).mkdir(parents=True)
            (tmp_path / "trials" / given[FOLDER] / "diverged.json").touch()
            raise RuntimeError("no luck with this layer")
        harmful = 1 - abs(values["mlc.layer"] - BEST_LAYER) / 10
        benign = values.get("mlc.weight", 1.0)
        began = time.time()
        for step in range(1, REPORTS + 1):
            ray.tune.report({VALUE: harmful, HARMFUL: harmful, BENIGN: benign, STEP: float(step)})
        ray.tune.report({VALUE: harmful, HARMFUL: harmful, BENIGN: benign, STEP: float(step), FINISHED: True})
        if at_once:  # hold the place until as many run as may, and a moment for one that may not
            (tmp_path / f"began-{began}").touch()
            deadline = time.monotonic() + 120
            while len(list(tmp_path.glob("began-*"))) < at_once and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(1)
        with (tmp_path / "times").open("a") as times:
            times.write(f"{began} {time.time()}\n")

    at_once = 0

    def run_it(
        ended: Sequence[Ended] = (), cut_off: Sequence[CutOff] = (), meet: int = 0, **settings: Any
    ) -> list[dict[str, Any]]:
        scoring = {"benchmarks": [{"path": "sample:select"}]}
        settings = {"name": "s", "train": str(tmp_path / "run.yaml"), "scoring": scoring, **settings}
        config = parse_config(SearchConfig, settings)
        nonlocal at_once
        at_once = meet
        space = make_space(config)
        points = Points(config, space, Place(tmp_path), languages=["en"], ended=ended, cut_off=cut_off)
        remaining = number_of_points(config, space) * config.repeats - len(ended)
        tuner = make_tuner(config, score_of_a_layer, tmp_path, points, remaining=remaining)
        return [result.metrics or {} for result in tuner.fit()]

    return run_it


def tried_by(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "calls").read_text().split()]


GRID: dict[str, Any] = {
    "space": {"mlc.layer": {"choice": [2, 7]}, "mlc.weight": {"choice": [0.1, 1.0]}},
    "sampler": "grid",
}


def test_a_grid_is_tried_whole_and_a_resumed_one_to_its_end(
    run_search: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    results = run_search(**GRID)
    points = [tuple(result["config"][VALUES].values()) for result in results]
    assert sorted(points) == [(2, 0.1), (2, 1.0), (7, 0.1), (7, 1.0)]
    ended = [Ended({"mlc.layer": layer, "mlc.weight": 0.1}, "finished", (0.5,)) for layer in (2, 7)]
    again = run_search(**GRID, ended=ended, cut_off=[CutOff({"mlc.layer": 7, "mlc.weight": 1.0}, "earlier")])
    points = [tuple(result["config"][VALUES].values()) for result in again]
    assert sorted(points) == [(2, 1.0), (7, 1.0)]
    assert tried_by(tmp_path)[4:] == [7, 2]  # what was cut off comes first
    assert sum(result["config"][FOLDER] == "earlier" for result in again) == 1


def test_a_trial_that_fails_does_not_end_the_others(
    run_search: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    (tmp_path / "fail-2").touch()
    results = run_search(**GRID)
    assert tried_by(tmp_path) == [2, 2, 7, 7]
    assert sorted(result[HARMFUL] for result in results if HARMFUL in result) == [1.0, 1.0]


def test_a_resumed_sampler_knows_what_was_seen(run_search: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    space = {"mlc.layer": {"integers": [1, 1000]}}
    seen = [Ended({"mlc.layer": layer}, "finished", (-abs(layer - 400) / 1000,)) for layer in range(10, 1000, 30)]
    run_search(space=space, sampler="tpe", trials=len(seen) + 6, ended=seen)
    tried = tried_by(tmp_path)
    assert len(tried) == 6
    assert sum(abs(layer - 400) < 100 for layer in tried) >= 4  # near those that were good, from the first on
    run_search(space=space, sampler="random", trials=3)
    first = tried_by(tmp_path)[6:]
    run_search(
        space=space, sampler="random", trials=6, ended=[Ended({"mlc.layer": n}, "finished", (0.0,)) for n in first]
    )
    assert not set(tried_by(tmp_path)[9:]) & set(first)  # not the same draws once more


@pytest.mark.parametrize("concurrency", [1, 2])
def test_no_more_trials_at_once_than_asked_for(
    run_search: Callable[..., list[dict[str, Any]]], tmp_path: Path, concurrency: int
) -> None:
    cut_off = [CutOff({"mlc.layer": layer, "mlc.weight": 0.1}, f"earlier-{layer}") for layer in (2, 7)]
    run_search(**GRID, cut_off=cut_off, concurrency=concurrency, meet=concurrency)
    times = [tuple(map(float, line.split())) for line in (tmp_path / "times").read_text().splitlines()]
    assert len(times) == 4
    assert max(sum(start <= moment < end for start, end in times) for moment, _ in times) == concurrency


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_poor_trials_are_stopped_early(run_search: Callable[..., list[dict[str, Any]]], scheduler: str) -> None:
    results = run_search(
        space={"mlc.layer": {"choice": [7, 6, 1, 20]}},
        sampler="grid",
        scheduler=scheduler,
        grace_scores=1,
        score_every=1,
    )
    reports = {result["config"][VALUES]["mlc.layer"]: result["training_iteration"] for result in results}
    assert reports[7] == REPORTS + 1
    assert min(reports.values()) == 1
