from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import TrainConfig, load_config
from mlc_ray.search.objectives import TrialScore
from mlc_ray.search.results import Trial, best_trial, importance, write_results

from .test_space import search_config


def score(held_back: float, answered: float, floor: float = 0.8) -> TrialScore:
    feasible = answered >= floor
    worth = held_back if feasible else answered - floor
    return TrialScore(held_back, answered, worth, feasible, {"en": 1.0, "sw": held_back}, {"en": 1.0, "sw": answered})


def trial(name: str, layer: Any, weight: float, held_back: float, answered: float, ended: Any = "finished") -> Trial:
    values = {"mlc.layer": layer, "mlc.weight": weight}
    return Trial(name, values, score(held_back, answered), 24, ended, 100.0)


TRIALS = [
    trial("a", 20, 0.3, 0.10, 0.99),
    trial("b", "last", 0.8, 0.95, 0.10),
    trial("c", "last", 0.3, 0.60, 0.90),
    trial("d", 0.5, 0.9, 0.70, 0.85, ended="stopped"),
    trial("e", 20, 1.5, 0.12, 0.98),
]
BASELINE = score(0.02, 1.0)


def folder_with_runs(folder: Path) -> Path:
    for item in TRIALS:
        run = folder / "trials" / item.name
        (run / "model").mkdir(parents=True)
        (run / "model" / "weights").write_text(item.name)
        raw = {"name": item.name, "output_dir": str(folder), "model": {"path": "m"}, "data": {"train": [{"path": "d"}]},
               "mlc": {"layer": item.values["mlc.layer"], "weight": item.values["mlc.weight"]}}  # fmt: skip
        (run / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder


def test_the_best_ran_to_its_end_and_answers_enough() -> None:
    assert best_trial(TRIALS, search_config()) == 2
    assert best_trial(TRIALS, search_config(objective={"pareto": True})) == 2
    assert best_trial([TRIALS[3]], search_config()) is None
    assert best_trial([TRIALS[1]], search_config()) == 0  # nothing better; the verdict warns


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with_runs(tmp_path / "found")
    result = write_results(
        folder, search_config(), BASELINE, TRIALS, skipped_layers=[25, 26], failed=["OSError: disk full"]
    )
    printed = capsys.readouterr().out
    assert (result.best, result.front) == (2, (1, 3, 2, 4, 0))
    best = load_config(TrainConfig, folder / "best.yaml")
    assert (best.name, best.mlc.layer, best.mlc.weight, best.output_dir) == ("found-best", "last", 0.3, "runs")
    assert (folder / "best" / "weights").read_text() == "c"
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "trials.json").read_text())
    assert [item["name"] for item in content["trials"]] == ["a", "b", "c", "d", "e"]
    table = (folder / "search.md").read_text()
    for text in (printed, table):
        assert "c^*" in text
        assert "as it is" in text
        assert "held back 60.0 % (as it is: 2.0 %), answered 90.0 % (as it is: 100.0 %)" in text
        assert "left out: 25, 26" in text
        assert "stopped" in text
    assert printed.count("WARNING") == 1
    assert "WARNING: a trial failed: OSError: disk full" in printed


def test_a_search_where_nothing_answers_enough_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(folder_with_runs(tmp_path), search_config(), BASELINE, [TRIALS[1]])
    assert "WARNING: no trial answers at least 80 % of benign prompts" in capsys.readouterr().out


def test_safety_alone_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = search_config(objective={"safety_alone": True})
    write_results(folder_with_runs(tmp_path), config, BASELINE, TRIALS)
    assert "WARNING: safety alone was maximised" in capsys.readouterr().out


def test_without_benign_prompts_their_side_is_a_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def alone(held_back: float) -> TrialScore:
        return TrialScore(held_back, None, held_back, True, {"en": held_back}, {})

    config = search_config(objective={"safety_alone": True})
    trials = [replace(item, score=alone(item.score.held_back)) for item in TRIALS]
    result = write_results(folder_with_runs(tmp_path), config, alone(0.0), trials)
    assert result.best == 1
    assert json.loads((tmp_path / "trials.json").read_text())["trials"][0]["score"]["answered"] is None
    assert "held back 95.0 % (as it is: 0.0 %), answered · % (as it is: · %)" in capsys.readouterr().out


def test_a_trial_is_read_from_its_folder(tmp_path: Path) -> None:
    drawn = {"optimizer.learning_rate": 1e-6, "mlc.layer": 20}
    (tmp_path / "values.json").write_text(json.dumps(drawn))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 1.5}\n{"step": 2, "step_seconds": 2.0}\n')
    found = Trial.read(tmp_path, score(0.1, 0.9), 2)
    assert (found.values, found.ended, found.seconds) == (drawn, "failed", 3.5)
    (tmp_path / "model").mkdir()
    assert Trial.read(tmp_path, score(0.1, 0.9), 2).ended == "finished"
    (tmp_path / "stopped").touch()
    assert Trial.read(tmp_path, score(0.1, 0.9), 2).ended == "stopped"


def test_the_parameter_that_decides_is_the_important_one() -> None:
    weights = [0.1, 0.3, 0.5, 0.9, 1.2, 1.9]
    trials = [
        trial(f"{layer}{w}", layer, w, 0.9 if layer == "last" else 0.1, 0.9) for layer in (20, "last") for w in weights
    ]
    shares = importance(trials, search_config(space={"mlc.layer": {"choice": [20, "last"]},
                                                     "mlc.weight": {"loguniform": [0.1, 2.0]}}))  # fmt: skip
    assert shares is not None
    assert shares["mlc.layer"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert importance(trials[:3], search_config()) is None
