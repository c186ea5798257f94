from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import TrainConfig, load_config
from mlc_ray.report.tables import markdown
from mlc_ray.search.objectives.base import TrialScore
from mlc_ray.search.results import SearchResult, Trial, best_trial, trials_table, verdict, write_results
from mlc_ray.storage import Place

from .test_space import search_config


def score(harmful: float, benign: float, floor: float = 0.8, **changes: Any) -> TrialScore:
    feasible = benign >= floor
    worth = harmful if feasible else benign - floor
    languages = {"en": 1.0, "sw": harmful}, {"en": 1.0, "sw": benign}
    return replace(TrialScore("refused", harmful, benign, (worth,), feasible, worth, *languages), **changes)


def trial(name: str, layer: Any, weight: float, harmful: float, benign: float, ended: Any = "finished") -> Trial:
    values = {"mlc.layer": layer, "mlc.weight": weight}
    return Trial(name, values, score(harmful, benign), 24, ended, 100.0)


def shown(result: SearchResult) -> str:
    """What the command line prints of it."""
    return "\n".join([*markdown(trials_table(result)), *verdict(result)])


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
    assert best_trial(TRIALS) == 2
    assert best_trial([TRIALS[3]]) is None
    assert best_trial([TRIALS[1]]) == 0  # nothing better; the verdict warns


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with_runs(tmp_path / "found")
    result = write_results(
        folder, search_config(), BASELINE, TRIALS, skipped_layers=[25, 26], failed=["OSError: disk full"]
    )
    assert capsys.readouterr().out == ""
    printed = shown(result)
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
        assert all(name in text for name in ("harmful refused %", "benign complied %", "value", "baseline"))
        assert "harmful refused 60.0 % (baseline 2.0 %), benign complied 90.0 % (baseline 100.0 %)" in text
        assert "importance" not in text
        assert "left out: 25, 26" in text
        assert "stopped" in text
    assert printed.count("WARNING") == 1
    assert "WARNING: a trial failed: OSError: disk full" in printed


def test_a_search_where_nothing_answers_enough_says_so(tmp_path: Path) -> None:
    result = write_results(folder_with_runs(tmp_path), search_config(), BASELINE, [TRIALS[1]])
    assert "WARNING: no trial complies with 80 % of benign prompts or more" in verdict(result)[0]


def test_safety_alone_is_said(tmp_path: Path) -> None:
    config = search_config(objective="safety_alone")
    result = write_results(folder_with_runs(tmp_path), config, BASELINE, TRIALS)
    assert "WARNING: safety alone was maximised" in verdict(result)[0]


def test_without_benign_prompts_their_side_is_a_gap(tmp_path: Path) -> None:
    def alone(harmful: float) -> TrialScore:
        return TrialScore("safe", harmful, None, (harmful,), True, harmful, {"en": harmful}, {})

    config = search_config(objective="safety_alone")
    trials = [replace(item, score=alone(item.score.harmful)) for item in TRIALS]
    result = write_results(folder_with_runs(tmp_path), config, alone(0.0), trials)
    assert result.best == 1
    assert json.loads((tmp_path / "trials.json").read_text())["trials"][0]["score"]["benign"] is None
    assert "harmful safe 95.0 % (baseline 0.0 %), benign complied · % (baseline · %)" in shown(result)


def test_a_trial_is_read_from_its_folder(tmp_path: Path) -> None:
    drawn = {"optimizer.learning_rate": 1e-6, "mlc.layer": 20}
    (tmp_path / "values.json").write_text(json.dumps(drawn))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 1.5}\n{"step": 2, "step_seconds": 2.0}\n')
    found = Trial.read(Place(tmp_path), score(0.1, 0.9), 2)
    assert (found.values, found.ended, found.seconds) == (drawn, "failed", 3.5)
    (tmp_path / "model").mkdir()
    assert Trial.read(Place(tmp_path), score(0.1, 0.9), 2).ended == "failed"  # half an export
    (tmp_path / "model" / "mlc_ray.json").touch()
    assert Trial.read(Place(tmp_path), score(0.1, 0.9), 2).ended == "finished"
    (tmp_path / "stopped").touch()
    assert Trial.read(Place(tmp_path), score(0.1, 0.9), 2).ended == "stopped"


def test_an_objective_of_several_numbers_has_a_column_for_each_that_is_no_side(tmp_path: Path) -> None:
    folder = folder_with_runs(tmp_path)
    both = [replace(item, score=replace(item.score, values=item.score.point)) for item in TRIALS]
    baseline = replace(BASELINE, values=BASELINE.point)
    result = write_results(folder, search_config(objective="pareto"), baseline, both)
    assert "value" not in shown(result)
    mine = search_config(objective="examples.my_objective:TellsApart")
    assert "telling apart" in shown(write_results(folder, mine, BASELINE, TRIALS))
