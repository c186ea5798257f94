"""What a study does before its cells run, and when it goes on; no cluster is needed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlc_ray.config import ConfigError, StudyConfig, parse_config
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.generate.engine import EngineError
from mlc_ray.judges.base import make_judge
from mlc_ray.judges.panel import Reader
from mlc_ray.runs import CELLS_FOLDER, SCORES_FILE
from mlc_ray.score.plan import Judging
from mlc_ray.show import show
from mlc_ray.storage import Place
from mlc_ray.study import run as running
from mlc_ray.study.folder import StudyError, load_plan
from mlc_ray.study.record import score_folder
from mlc_ray.train.run_folder import ended
from mlc_ray.types import Kind, Measure, Via
from tests.data.files import write_rows
from tests.report.runs import utility_row, write_utility
from tests.study.folders import LANGUAGES, asked, planned, raw_study, recorder, write_cell, write_untouched
from tests.train.tiny import random_rows


def test_a_method_that_cannot_be_prepared_leaves_the_study_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Place(tmp_path / "s")
    before = planned(tmp_path / "s")
    before.save(folder)

    def prepared(*_: Any) -> None:
        raise ConfigError("cell tiny_1-bad-1: bad")

    monkeypatch.setattr(running, "_check", lambda *_: None)
    monkeypatch.setattr(running, "_prepare", prepared)
    more = planned(tmp_path / "s", methods={**raw_study(tmp_path)["methods"], "bad": ["mlc.weight=0.5"]})
    with pytest.raises(ConfigError, match="tiny_1-bad-1"):
        running._study(more, asked(), folder)
    assert load_plan(folder).cells == before.cells


def test_a_study_that_another_driver_began_meanwhile_is_seen_under_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def taken(folder: Place, *, wait: bool) -> Iterator[None]:
        planned(tmp_path / "s").save(folder)
        yield

    monkeypatch.setattr(running, "connect", lambda *_: None)
    monkeypatch.setattr(running, "lease", taken)
    with pytest.raises(StudyError, match="exists already"):
        running.study(parse_config(StudyConfig, raw_study(tmp_path / "s")))


def test_a_study_keeps_its_log_where_its_runs_are_to_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise StudyError("no prompts")

    monkeypatch.setattr(running, "connect", lambda *_: None)
    monkeypatch.setattr(running, "_planned", refused)
    for name, logs in (("quiet", {}), ("told", {"logging": {"json_lines": True}})):
        raw = raw_study(tmp_path / name)
        with pytest.raises(StudyError, match="no prompts"):
            running.study(parse_config(StudyConfig, {**raw, "train": {**raw["train"], **logs}}))
    assert not (tmp_path / "quiet" / "logs").exists()
    (line,) = map(json.loads, (tmp_path / "told" / "logs" / "driver.jsonl").read_text().splitlines())
    assert (line["run"], line["trial"], line["message"]) == ("told", "", "ended by StudyError: no prompts")


def test_bundles_of_one_kind_are_refused_before_a_cell_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(
        tmp_path,
        [rows_to_table([replace(row, kind="harmful") for row in random_rows(4)])],
        fingerprint="f",
        rejected={},
    )
    monkeypatch.setattr(running, "use_gpu", lambda _: False)
    monkeypatch.setattr(running, "prepare_token_rows", lambda *_, **__: TokenArtifact.open(tmp_path))
    plan = planned(tmp_path / "s", methods={"decided": ["terms={decision: {}}"]})
    with pytest.raises(ConfigError, match=r"cell tiny_1-decided-1: terms\.decision needs harmful and benign"):
        running._prepare(plan, Place(tmp_path / "s"))


def test_a_driver_that_died_after_the_export_leaves_no_checkpoints(tmp_path: Path) -> None:
    run = write_cell(tmp_path, "dpo", 1, scored=False)
    (run / "train/checkpoint_000003").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    cell = next(cell for cell in planned(tmp_path).cells if cell.name == run.name)
    running._train(cell, Place(tmp_path))
    assert not (run / "train").exists()
    assert ended(Place(run)) is not None
    (run / "model/mlc_ray.json").unlink()  # as keep_models=false does
    (run / "run.json").write_text('{"total_steps": 3}')
    said = show(run)
    assert "ended, 3 of 3 steps" in said and "none kept" in said and "train --resume" not in said


def test_engines_that_do_not_start_fail_the_cells_of_their_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cell(tmp_path, "dpo", 1, scored=False)
    write_cell(tmp_path, "dpo", 2)
    plan = planned(tmp_path)

    def started(*_: Any, **__: Any) -> None:
        raise EngineError("no memory")

    monkeypatch.setattr(running, "use_gpu", lambda _: False)
    monkeypatch.setattr(running, "start_scorer", started)
    monkeypatch.setattr(running, "fitted", lambda *_: plan.scoring.judge)
    monkeypatch.setattr(running, "_path", lambda *_: "m")
    found = recorder(plan, tmp_path)
    running._score(plan, asked(), Place(tmp_path), "tiny_1", plan.cells, found)
    said = "the engines of tiny_1 did not start: no memory"
    assert found.failures == dict.fromkeys(("tiny_1-untouched", "tiny_1-dpo-1"), said)


def test_a_score_that_engines_failed_on_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_untouched(tmp_path)
    for seed in (1, 2):
        write_cell(tmp_path, "dpo", seed)
    faulty = score_folder(Place(tmp_path) / CELLS_FOLDER / "tiny_1-dpo-2")
    result = (faulty / SCORES_FILE).read_json()
    (faulty / SCORES_FILE).write_json({**result, "judge_faults": 3})
    plan = planned(tmp_path)
    asked_of: list[Place] = []

    def started(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(close=lambda: None, check=lambda: None)

    monkeypatch.setattr(running, "use_gpu", lambda _: False)
    monkeypatch.setattr(running, "start_scorer", started)
    monkeypatch.setattr(running, "fitted", lambda *_: plan.scoring.judge)
    monkeypatch.setattr(running, "_path", lambda *_: "m")
    monkeypatch.setattr(
        running, "_score_one", lambda scorer, scoring, prompts, target, weights: asked_of.append(target)
    )
    running._score(plan, asked(), Place(tmp_path), "tiny_1", plan.cells, recorder(plan, tmp_path))
    assert asked_of == [faulty]


def test_a_task_that_was_added_when_a_model_was_gone_is_a_failure_of_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_untouched(tmp_path, utility=True)
    for seed in (1, 2):
        run = write_cell(tmp_path, "dpo", seed)
        write_utility(run / "scores/study", utility_row("mmlu"), *([utility_row("arc_easy")] if seed == 2 else []))
        shutil.rmtree(run / "model")  # as keep_models=false does
    write_utility(tmp_path / "untouched/tiny_1", utility_row("mmlu"), utility_row("arc_easy"))
    plan = planned(tmp_path, utility={"tasks": ["mmlu", "arc_easy"]}, keep_models=False)
    monkeypatch.setattr(running, "_path", lambda *_: "m")
    found = recorder(plan, tmp_path)
    running._measure_utility(plan, Place(tmp_path), "tiny_1", plan.cells, found)
    (name,) = found.failures  # cells that were never scored, and the one that has both, lack nothing
    assert name == "tiny_1-dpo-1"
    said = found.failures[name]
    assert said.startswith("utility.tasks=['arc_easy'] cannot be measured: the model was removed once it was scored")
    assert "keep_models: true" in said and f"remove '{tmp_path}/cells/tiny_1-dpo-1', and it is trained" in said
    (cell,) = [each for each in found.write().cells if each.name == name]
    assert (cell.state, cell.message) == ("scored", said)
    assert "| tiny_1-dpo-1 | scored | utility.tasks=" in (tmp_path / "study.md").read_text()


def test_a_judge_must_say_what_is_refused_of_every_kind_in_every_language() -> None:
    judge, prompts = make_judge(planned(Path("s")).scoring.judge), asked()

    def reader(harmful: Measure) -> Reader:
        cells: dict[tuple[Kind, str], dict[Measure, Via]] = {("benign", code): {"refused": ""} for code in LANGUAGES}
        cells |= {("harmful", code): {"refused" if code == "en" else harmful: ""} for code in LANGUAGES}
        return Reader("r", judge, cells)

    running.check_says_refused(Judging(judge, [reader("refused")], {}), prompts)
    running.check_says_refused(Judging(judge, [], {}), prompts)
    with pytest.raises(StudyError, match="does not say what is refused of harmful in fr, harmful in sw, so that"):
        running.check_says_refused(Judging(judge, [reader("safe")], {}), prompts)
