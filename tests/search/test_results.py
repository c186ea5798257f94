from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import TrainConfig, load_config
from mlc_ray.report.collect import ReportError, collect
from mlc_ray.report.page import render
from mlc_ray.report.paper import write_paper
from mlc_ray.report.search import Progress, SearchFileError
from mlc_ray.report.tables import markdown
from mlc_ray.search.objectives.base import TrialScore
from mlc_ray.search.record import confirmed_earlier
from mlc_ray.search.results import (
    Change,
    Confirmation,
    Confirmed,
    SearchResult,
    Trial,
    confirmation_table,
    read_confirmation,
    trials_table,
    verdict,
    write_results,
)
from mlc_ray.stats.rates import Interval
from mlc_ray.storage import Place
from tests.report.html_checks import Page
from tests.report.runs import grid, write_score

from .test_space import search_config


def rate(value: float, half: float = 0.1) -> Interval:
    return Interval(100 * value, 100 * (value - half), 100 * (value + half))


def score(harmful: float, benign: float, floor: float = 0.8, **changes: Any) -> TrialScore:
    """Rates as fractions, with intervals of 10 points on either side."""
    feasible = benign - 0.1 >= floor
    worth = harmful - 0.1 if feasible else benign - 0.1 - floor
    languages = {"en": rate(1.0), "sw": rate(harmful)}, {"en": rate(1.0), "sw": rate(benign)}, rate(harmful), "sw"
    return replace(TrialScore("refused", rate(harmful), rate(benign), (worth,), feasible, worth, *languages), **changes)


def trial(name: str, layer: Any, weight: float, harmful: float, benign: float, ended: Any = "finished") -> Trial:
    values = {"mlc.layer": layer, "mlc.weight": weight}
    return Trial(name, values, score(harmful, benign), 24, ended, 100.0)


def shown(result: SearchResult) -> str:
    """What the command line prints of it."""
    tables = [table for table in (confirmation_table(result), trials_table(result)) if table is not None]
    return "\n".join([*(line for table in tables for line in markdown(table)), *verdict(result)])


TRIALS = [
    trial("a", 20, 0.3, 0.10, 0.99),
    trial("b", "last", 0.8, 0.95, 0.10),
    trial("c", "last", 0.3, 0.60, 0.95),
    trial("d", 0.5, 0.9, 0.70, 0.92, ended="stopped"),
    trial("e", 20, 1.5, 0.58, 0.98),
]
BASELINE = score(0.02, 1.0)
DONE = Progress(5, 5)


def confirmed(name: str, harmful: float, change: Change | None = None, **settings: Any) -> Confirmed:
    item = next(each for each in TRIALS if each.name == name)
    return Confirmed(name, (name,), item.values, score(harmful, 0.93, **settings), change)


CONFIRMATION = Confirmation(
    (confirmed("e", 0.51), confirmed("c", 0.49, Change(Interval(2.0, -5.0, 9.0), Interval(-1.0, -4.0, 2.0), False))),
    BASELINE,
    Change(Interval(49.0, 40.0, 58.0), Interval(-7.0, -11.0, -3.0), True),
)


def folder_with_runs(folder: Path) -> Path:
    for item in TRIALS:
        run = folder / "trials" / item.name
        (run / "model").mkdir(parents=True)
        (run / "model" / "weights").write_text(item.name)
        raw = {"name": item.name, "output_dir": str(folder), "model": {"path": "m"}, "data": {"train": [{"path": "d"}]},
               "mlc": {"layer": item.values["mlc.layer"], "weight": item.values["mlc.weight"]}}  # fmt: skip
        (run / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder


def test_the_result_is_what_was_confirmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with_runs(tmp_path / "found")
    result = write_results(
        folder, search_config(), BASELINE, TRIALS, progress=DONE,
        failed=["OSError: disk full"], confirmation=CONFIRMATION,
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    printed = shown(result)
    assert result.best is not None and result.best.trial == "e"  # though c was better on what chose both
    assert result.front == (1, 3, 2, 4, 0)
    best = load_config(TrainConfig, folder / "best.yaml")
    assert (best.name, best.mlc.layer, best.mlc.weight, best.output_dir) == ("found-best", 20, 1.5, "runs")
    assert (folder / "best" / "weights").read_text() == "e"
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "trials.json").read_text())
    assert [item["name"] for item in content["trials"]] == ["a", "b", "c", "d", "e"]
    assert [point["trial"] for point in content["confirmation"]["points"]] == ["e", "c"]
    assert content["confirmation"]["points"][0]["score"]["harmful"] == {"value": 51.0, "low": 41.0, "high": 61.0}
    table = (folder / "search.md").read_text()
    for text in (printed, table):
        assert "Selection" in text and "the best of these numbers are too good" in text and "c^*" in text
        assert "harmful refused 51.0 % (41.0 to 61.0); baseline 2.0 %, change +49.0 points, +40.0 to +58.0" in text
        assert "60.0 %" not in text and "60.0 (50.0 to 70.0)" in text  # what chose it is in its table alone
        assert "not told apart from: c (best less this: harmful +2.0, benign −1.0 points)" in text
        assert "stopped" in text
    assert printed.count("WARNING") == 1
    assert "WARNING: a trial failed: OSError: disk full" in printed


def test_what_engines_failed_on_is_named(tmp_path: Path) -> None:
    trials = [replace(each, score=replace(each.score, faults=3 * (each.name == "c"))) for each in TRIALS]
    folder = folder_with_runs(tmp_path / "found")
    first, second = CONFIRMATION.points
    faulty = replace(CONFIRMATION, points=(first, replace(second, score=replace(second.score, faults=2))))
    baseline = replace(BASELINE, faults=1)
    result = write_results(folder, search_config(), baseline, trials, progress=DONE, confirmation=faulty)
    said = (
        "engines or an endpoint failed on prompts or responses, which count on neither side: 1 of the baseline, "
        "3 of trial c, 2 of c"
    )
    assert said in shown(result) and said in (folder / "search.md").read_text()
    content = json.loads((folder / "trials.json").read_text())
    assert [item["score"]["faults"] for item in content["trials"]] == [0, 0, 3, 0, 0]


def test_a_search_that_still_runs_shows_no_result(tmp_path: Path) -> None:
    folder = folder_with_runs(tmp_path)
    result = write_results(folder, search_config(), BASELINE, TRIALS, progress=Progress(2, 6, 11_100.0))
    assert "2 of 6 trials have ended, about 3 h 05 min left" in (folder / "search.md").read_text()
    assert verdict(result)[-1] == "nothing is confirmed yet"
    assert not (folder / "best").exists() and "Confirmed" not in shown(result)
    stopped = write_results(folder, search_config(), BASELINE, [TRIALS[3]], progress=DONE)
    assert verdict(stopped)[-1] == "no trial ran to its end"


def test_a_resumed_search_keeps_what_was_confirmed_and_says_so(tmp_path: Path) -> None:
    folder = folder_with_runs(tmp_path)
    before = replace(CONFIRMATION, trials=5, left_out=("x: diverged",))
    write_results(folder, search_config(), BASELINE, TRIALS, progress=DONE, confirmation=before)
    assert read_confirmation(Place(folder)) == before == confirmed_earlier(Place(folder))
    (folder / "best" / "weights").write_text("as it was")
    result = write_results(
        folder, search_config(), BASELINE, TRIALS, progress=Progress(7, 8), confirmation=before, earlier=True
    )
    assert "the best was confirmed before 2 more trials had ended" in verdict(result)
    assert "WARNING: not confirmed, x: diverged" in verdict(result)
    assert (folder / "best" / "weights").read_text() == "as it was"


def test_a_search_where_nothing_answers_enough_says_so(tmp_path: Path) -> None:
    unsure = replace(CONFIRMATION, points=(confirmed("e", 0.51, floor=0.9),))
    result = write_results(
        folder_with_runs(tmp_path), search_config(), BASELINE, TRIALS, progress=DONE, confirmation=unsure
    )
    assert "WARNING: it is not sure that the best complies with 80 % of benign prompts" in verdict(result)[0]


def test_without_benign_prompts_their_side_is_a_gap(tmp_path: Path) -> None:
    def alone(harmful: float) -> TrialScore:
        return TrialScore(
            "safe", rate(harmful), None, (harmful,), True, harmful, {"en": rate(harmful)}, {}, rate(harmful), "en"
        )

    config = search_config(objective="safety_alone")
    trials = [replace(item, score=alone(item.score.harmful.value / 100)) for item in TRIALS]
    change = Change(Interval(49.0, 40.0, 58.0), None, False)
    best = Confirmed("b", ("b", "b-seed-7"), TRIALS[1].values, alone(0.9))
    confirmation = Confirmation((best,), alone(0.1), change)
    result = write_results(
        folder_with_runs(tmp_path), config, alone(0.0), trials, progress=DONE, confirmation=confirmation
    )
    assert json.loads((tmp_path / "trials.json").read_text())["trials"][0]["score"]["benign"] is None
    said = "\n".join(verdict(result))
    assert "WARNING: safety alone was maximised" in said
    assert "harmful safe 90.0 % (80.0 to >99.9); baseline" not in said and "benign complied: no such prompts" in said
    assert "means over 2 seeds" in said and "not told apart from the baseline" in said


def test_a_baseline_that_could_not_be_read_is_told(tmp_path: Path) -> None:
    told = replace(CONFIRMATION, baseline=None, change=None, left_out=("the model before training: no verdicts",))
    folder = folder_with_runs(tmp_path)
    result = write_results(folder, search_config(), BASELINE, TRIALS, progress=DONE, confirmation=told)
    said = "\n".join(verdict(result))
    assert "WARNING: not confirmed, the model before training: no verdicts" in said
    assert "harmful refused 51.0 % (41.0 to 61.0); not compared with the baseline" in said
    assert "told apart from the baseline" not in said
    assert "| baseline |" in (tmp_path / "search.md").read_text()
    found = read_confirmation(Place(folder))
    assert found is not None and (found.baseline, found.change, found.left_out) == (None, None, told.left_out)


def test_a_trial_is_read_from_its_folder(tmp_path: Path) -> None:
    drawn = {"optimizer.learning_rate": 1e-6, "mlc.layer": 20}
    (tmp_path / "values.json").write_text(json.dumps(drawn))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 1.5}\n{"step": 2, "step_seconds": 2.0}\n')
    found = Trial.read(Place(tmp_path), score(0.1, 0.9), 2)
    assert (found.values, found.ended, found.seconds) == (drawn, "unfinished", 3.5)
    (tmp_path / "diverged.json").touch()
    assert Trial.read(Place(tmp_path), score(0.1, 0.9), 2).ended == "diverged"
    (tmp_path / "finished").touch()
    assert Trial.read(Place(tmp_path), score(0.1, 0.9), 2).ended == "finished"
    (tmp_path / "finished").unlink()
    (tmp_path / "stopped").touch()
    assert Trial.read(Place(tmp_path), score(0.1, 0.9), 2).ended == "stopped"


def test_an_objective_of_several_numbers_has_a_column_for_each_that_is_no_side(tmp_path: Path) -> None:
    folder = folder_with_runs(tmp_path)
    both = [replace(item, score=replace(item.score, values=item.score.point)) for item in TRIALS]
    baseline = replace(BASELINE, values=BASELINE.point)
    result = write_results(folder, search_config(objective="pareto"), baseline, both, progress=DONE)
    assert "value at least" not in shown(result)
    mine = search_config(objective="examples.my_objective:TellsApart")
    assert "telling apart at least" in shown(write_results(folder, mine, BASELINE, TRIALS, progress=DONE))


def scored(folder: Path, refuses: float, **more: Any) -> None:
    rows = grid(["en", "sw"], lambda kind, code: refuses if kind == "harmful" else 0.05, bundles=30)
    write_score(folder, rows, **more)


def test_a_report_of_a_search_shows_what_was_confirmed_and_the_trials(tmp_path: Path) -> None:
    folder = folder_with_runs(tmp_path / "found")
    scored(folder / "baseline", 0.1)
    write_results(folder, search_config(), BASELINE, TRIALS, progress=Progress(2, 6))
    so_far = collect([folder])
    assert [model.label for model in so_far.models] == ["before training"]
    page = Page(render(so_far))
    assert "Safety: search found" in page.text and "nothing is confirmed yet" in page.text
    assert "Selection" in page.text and "the best of these numbers are too good" in page.text

    write_results(folder, search_config(), BASELINE, TRIALS, progress=DONE, confirmation=CONFIRMATION)
    scored(folder / "confirmation", 0.1)
    for name, refuses in (("e", 0.9), ("c", 0.8)):
        scored(folder / "trials" / name / "scores" / "confirmation", refuses, fingerprint=name)
        scored(folder / "trials" / name / "scores" / "step-000004", 0.99, fingerprint=name)
    found = collect([tmp_path])  # a folder of searches is one of runs
    assert [model.label for model in found.models] == ["before training", "e", "c"] and not found.notes
    page = Page(render(found))
    page.check_self_contained()
    assert "not told apart from: c" in page.text and "Confirmed" in page.text and "Selection" in page.text
    assert str(tmp_path) in render(found) and str(tmp_path) not in render(found, public=True)
    write_paper(found, tmp_path / "paper")
    assert "**Confirmed**" in (tmp_path / "paper" / "report.md").read_text()

    shutil.rmtree(folder / "trials" / "c" / "scores" / "confirmation")
    (note,) = collect([folder]).notes
    assert "the score of c is not there" in note
    with pytest.raises(ReportError, match=r"search folder .* twice"):
        collect([folder, folder])
    content = json.loads((folder / "trials.json").read_text())
    points = [{"points": points} for points in (None, [3], [{}], [{"trial": 3}])]
    changes = [{"shown": {"findings": 1}}, *({"confirmation": each} for each in (3, {}, *points))]
    for damaged in ("{", "[]", *(json.dumps({**content, **change}) for change in changes)):
        (folder / "trials.json").write_text(damaged)
        with pytest.raises(SearchFileError, match=r"is damaged: .*search --resume"):
            collect([folder])
    with pytest.raises(SearchFileError, match=r"is damaged: .*search --resume"):
        read_confirmation(Place(folder))
    assert confirmed_earlier(Place(folder)) is None  # a search that goes on writes it anew
