"""A study goes on with what its folder says, wherever the command is given; only cells may be added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlc_ray.cli import main
from mlc_ray.runs import CELLS_FOLDER, CONFIG_FILE
from mlc_ray.storage import Place
from mlc_ray.study.folder import StudyError, check_goes_on, load_plan
from tests.documented import REPOSITORY
from tests.study.folders import planned, raw_study


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = planned(tmp_path / "s")
    plan.save(Place(tmp_path / "s"))
    found = load_plan(Place(tmp_path / "s"))
    assert (found.config, found.cells, found.scoring, found.prompts) == (
        plan.config, plan.cells, plan.scoring, plan.prompts,
    )  # fmt: skip
    assert (found.commits.models, found.commits.data) == ({"m": "m"}, {"owner/d": "owner/d#1"})


def test_methods_models_and_seeds_may_be_added_and_nothing_else_may_change(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    before, raw = planned(folder, utility={"tasks": ["mmlu"]}), raw_study(folder)
    for cell in before.cells:
        (run := folder / CELLS_FOLDER / cell.name).mkdir(parents=True)
        (run / CONFIG_FILE).write_text("")
    more = {
        "methods": {**raw["methods"], "sft": ["objective={loss: sft}"]},
        "seeds": [1, 2, 3],
        "models": {**raw["models"], "b": {"path": "n"}},
    }
    check_goes_on(before, planned(folder, **more), Place(folder))
    elsewhere = {"train": {**raw["train"], "cluster": {"workers": 8}, "checkpoint": {"every": 5}}}
    check_goes_on(before, planned(folder, **elsewhere), Place(folder))
    bound = {"scoring": {**raw["scoring"], "max_unparsed": 0.5}, "utility": {"tasks": ["mmlu", "arc_easy"]}}
    check_goes_on(before, planned(folder, **bound), Place(folder))
    for changes, said in (
        ({"seeds": [1]}, "tiny_1-dpo-2 is not a cell any more"),
        ({"methods": {"dpo": ["mlc.weight=0.5"], "mlc": []}}, "tiny_1-dpo-1: mlc.weight was 0.0, now 0.5"),
        ({"scoring": {**raw["scoring"], "limit": 3}}, "scoring.limit was None, now 3"),
        ({"utility": {"tasks": ["mmlu"], "num_fewshot": 5}}, "utility.num_fewshot was None, now 5"),
    ):
        with pytest.raises(StudyError, match=said):
            check_goes_on(before, planned(folder, **changes), Place(folder))
    with pytest.raises(StudyError, match=r"the prompts of scoring\.benchmarks were feedfacecafebeef, now 0"):
        check_goes_on(before, replace(before, prompts="0"), Place(folder))


def test_cells_that_have_not_begun_may_change_and_be_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    before, raw = planned(folder), raw_study(folder)
    (folder / CELLS_FOLDER / "tiny_1-dpo-1").mkdir(parents=True)
    (folder / CELLS_FOLDER / "tiny_1-dpo-1" / CONFIG_FILE).write_text("")
    check_goes_on(before, planned(folder, methods={"dpo": raw["methods"]["dpo"]}), Place(folder))
    check_goes_on(before, planned(folder, methods={**raw["methods"], "mlc": ["mlc.layer=2"]}), Place(folder))
    with pytest.raises(StudyError, match="tiny_1-dpo-1 is not a cell any more"):
        check_goes_on(before, planned(folder, methods={"mlc": []}), Place(folder))


def test_examples_of_folders_are_those_of_the_small_study(capsys: pytest.CaptureFixture[str]) -> None:
    small = yaml.safe_load((REPOSITORY / "configs/study/small.yaml").read_text())
    folder = f"{small['output_dir']}/{small['name']}"
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    assert f"--resume {folder}\n" in capsys.readouterr().out
    with pytest.raises(StudyError, match=rf"e\.g\. {folder}$"):
        load_plan(Place("nowhere"))


def test_what_is_no_study_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"is not a study folder, it has no study\.json"):
        load_plan(Place(tmp_path))
    (tmp_path / "study.json").write_text('{"cells": []}')
    with pytest.raises(StudyError, match="is damaged"):
        load_plan(Place(tmp_path))
