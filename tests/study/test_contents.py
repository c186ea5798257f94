"""A study goes on only with what its cells began with; no cluster is needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.config import TrainConfig
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.runs import CELLS_FOLDER, CONFIG_FILE, MODEL_FOLDER, RUN_FILE, STUDY_FILE
from mlc_ray.storage import Place, fingerprint_model
from mlc_ray.study import contents
from mlc_ray.study import run as running
from mlc_ray.study.contents import CellData, check_contents
from mlc_ray.study.folder import Plan, StudyError
from mlc_ray.train import run as training
from mlc_ray.train.run_folder import record_start
from tests.data.files import write_rows
from tests.study.folders import asked, planned, write_cell, write_untouched
from tests.train.tiny import random_rows

METHODS = {"dpo": ["mlc.weight=0"], "decided": ["terms={decision: {}}"]}


def token_rows(folder: Path, seed: int = 1, first: int = 0) -> TokenArtifact:
    rows = [replace(row, bundle_id=f"{first}-{row.bundle_id}") for row in random_rows(12, seed=seed)]
    write_rows(folder, [rows_to_table(rows)], fingerprint=f"of {seed}", rejected={})
    return TokenArtifact.open(folder)


def write_model(folder: Path, weights: str = "first") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def plan(tmp_path: Path, model: Path) -> Plan:
    return planned(tmp_path / "s", models={"tiny_1": {"path": str(model)}}, methods=METHODS)


def data_of(plan: Plan, tokens: TokenArtifact, held_out: TokenArtifact | None = None) -> dict[str, CellData]:
    return {cell.name: CellData(tokens, held_out) for cell in plan.cells}


def fingerprints(config: TrainConfig, data: CellData) -> dict[str, str]:
    return training.fingerprints_of(config, data.tokens, data.held_out, model=fingerprint_model(config.model.path))


def begin(plan: Plan, folder: Path, name: str, data: dict[str, CellData]) -> Path:
    """A cell as training leaves it that has begun."""
    (cell,) = [cell for cell in plan.cells if cell.name == name]
    run = folder / CELLS_FOLDER / name
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG_FILE).write_text(json.dumps(cell.config.model_dump(mode="json", exclude_unset=True)))
    record_start(Place(run), cell.config, fingerprints(cell.config, data[name]), data[name].tokens, 3)
    return run


def test_bundles_that_were_made_again_are_refused_where_a_cell_began(tmp_path: Path, plan: Plan) -> None:
    folder = tmp_path / "s"
    before, now = (data_of(plan, token_rows(tmp_path / f"rows-{seed}", seed)) for seed in (1, 2))
    check_contents(plan, Place(folder), now)  # nothing began
    begin(plan, folder, "tiny_1-dpo-1", before)
    (folder / CELLS_FOLDER / "tiny_1-dpo-2").mkdir()  # claimed, and killed before anything was trained
    (folder / CELLS_FOLDER / "tiny_1-dpo-2" / CONFIG_FILE).write_text("")
    check_contents(plan, Place(folder), before)
    said = (
        r"'.*/s' holds cells of another content \(tiny_1-dpo-1: the bundles of sample:train as tokens had the "
        r"fingerprint 'of 1', now 'of 2'\), .*: restore what they were made of, remove the folders of these cells, .*, "
        r"or start a new study under another name"
    )
    with pytest.raises(StudyError, match=said):
        check_contents(plan, Place(folder), now)


def test_of_a_study_whose_cells_are_all_scored_it_is_said(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "s"
    plan = planned(folder, models={"tiny_1": {"path": str(model)}})
    before, now = (data_of(plan, token_rows(tmp_path / f"rows-{seed}", seed)) for seed in (1, 2))
    for cell in plan.cells[:-1]:
        write_cell(folder, cell.method, cell.seed)
        begin(plan, folder, cell.name, before)
    with pytest.raises(StudyError):
        check_contents(plan, Place(folder), now)
    last = plan.cells[-1]
    write_cell(folder, last.method, last.seed)
    check_contents(plan, Place(folder), now)
    assert "now 'of 2'" in caplog.text and "all cells are scored" in caplog.text


def test_a_model_that_was_replaced_is_refused_also_where_the_cells_own_is_gone(
    tmp_path: Path, plan: Plan, model: Path
) -> None:
    """What counts is the model before training, of a scored cell whose model was removed, too."""
    folder = tmp_path / "s"
    data = data_of(plan, token_rows(tmp_path / "rows"))
    run = write_cell(folder, "dpo", 1)
    begin(plan, folder, run.name, data)
    shutil.rmtree(run / MODEL_FOLDER)
    check_contents(plan, Place(folder), data)
    write_model(model, "other")
    with pytest.raises(StudyError, match=rf"\(tiny_1-dpo-1: the model {model} had the fingerprint '\w+', now '\w+'\)"):
        check_contents(plan, Place(folder), data)


def test_a_model_that_was_scored_before_training_counts_without_any_cell(
    tmp_path: Path, plan: Plan, model: Path
) -> None:
    folder = tmp_path / "s"
    data = data_of(plan, token_rows(tmp_path / "rows"))
    scores = write_untouched(folder) / "scores.json"
    scores.write_text(json.dumps({**json.loads(scores.read_text()), "fingerprint": fingerprint_model(str(model))}))
    check_contents(plan, Place(folder), data)
    write_model(model, "other")
    with pytest.raises(StudyError, match=rf"\(tiny_1-untouched: the model {model} had the fingerprint"):
        check_contents(plan, Place(folder), data)


def test_openings_of_another_version_are_refused_for_the_methods_that_read_them(tmp_path: Path, plan: Plan) -> None:
    folder = tmp_path / "s"
    data = data_of(plan, token_rows(tmp_path / "rows"))
    for name in ("tiny_1-dpo-1", "tiny_1-decided-1"):
        run = begin(plan, folder, name, data)
        facts = json.loads((run / RUN_FILE).read_text())
        assert ("openings" in facts["fingerprints"]) == ("decided" in name)
    facts["fingerprints"]["openings"] = "of an earlier list"
    (run / RUN_FILE).write_text(json.dumps(facts))
    with pytest.raises(StudyError) as raised:
        check_contents(plan, Place(folder), data)
    said = "(tiny_1-decided-1: the openings of refusals in its languages had the fingerprint 'of an earlier list'"
    assert said in str(raised.value) and "tiny_1-dpo-1" not in str(raised.value)


def test_of_many_cells_some_are_named_and_each_model_is_read_once(
    tmp_path: Path, plan: Plan, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    more = planned(folder, models={"tiny_1": {"path": str(model)}}, methods=METHODS, seeds=[1, 2, 3])
    data = data_of(more, token_rows(tmp_path / "rows"))
    for cell in more.cells:
        begin(more, folder, cell.name, data)
    write_model(model, "other")
    read: list[str] = []
    monkeypatch.setattr(contents, "fingerprint_model", lambda path: read.append(path) or fingerprint_model(path))
    with pytest.raises(StudyError, match=r"and 1 more\), with which"):
        check_contents(more, Place(folder), data)
    assert read == [str(model)]


def test_what_is_compared_is_what_a_run_records(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that holds bundles out and reads openings: all that there is a fingerprint of."""
    data = {"train": [{"path": "sample:train"}], "validation": {"sources": [{"path": "sample:select"}]}}
    train = {"data": data, "cluster": {"plan": "skip"}, "objective": {"loss": "sft"}}
    methods = {"decided": ["terms={decision: {}}", "mlc.weight=0"]}
    plan = planned(tmp_path / "s", models={"tiny_1": {"path": str(smollm2)}}, methods=methods, train=train)
    rows = [token_rows(tmp_path / "rows"), token_rows(tmp_path / "held-out", seed=2, first=1)]
    config = plan.cells[0].config

    def prepared(data: Any, *_: Any, **__: Any) -> TokenArtifact:
        return rows[data.train != config.data.train]

    monkeypatch.setattr(training, "prepare_token_rows", prepared)
    monkeypatch.setattr(running, "prepare_token_rows", prepared)
    monkeypatch.setattr(running, "use_gpu", lambda _: False)
    recorded = training.prepare_data(config, cache_dir=tmp_path, layer=1, gpu=False).fingerprints
    assert recorded.keys() == {"model", "tokens", "validation", "openings"}
    found = running._prepare(plan, Place(tmp_path / "s"))
    assert fingerprints(config, found[plan.cells[0].name]) == recorded


def test_a_study_of_another_content_trains_nothing_and_stays_as_it_was(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path / "s", models={"tiny_1": {"path": str(tmp_path / "model")}})
    begin(plan, tmp_path / "s", "tiny_1-dpo-1", data_of(plan, token_rows(tmp_path / "rows-1")))
    now = token_rows(tmp_path / "rows-2", seed=2)

    def trained(*_: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(running, "_check", lambda *_: None)
    monkeypatch.setattr(running, "use_gpu", lambda _: False)
    monkeypatch.setattr(running, "prepare_token_rows", lambda *_, **__: now)
    monkeypatch.setattr(running, "_train", trained)
    with pytest.raises(StudyError, match="holds cells of another content"):
        running._study(plan, asked(), Place(tmp_path / "s"))
    assert not (tmp_path / "s" / STUDY_FILE).exists() and not (tmp_path / "s/results.json").exists()
