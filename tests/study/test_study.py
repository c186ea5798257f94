"""A whole study on real Ray, DeepSpeed and vLLM with a small random Llama: killed after a cell, then resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from mlc_ray.config import ConfigError, parse_config
from mlc_ray.config.study import StudyConfig
from mlc_ray.report.study import load_study
from mlc_ray.report.write import write_report
from mlc_ray.show import show
from mlc_ray.storage import Place
from mlc_ray.study.cells import make_cells
from mlc_ray.study.folder import StudyError
from mlc_ray.study.run import _train, resume_study, study

pytestmark = pytest.mark.slow
SECONDS = 400


def settings(folder: Path, model: Path, address: str) -> dict[str, Any]:
    return {
        "name": "small",
        "output_dir": str(folder),
        "resume": "auto",
        "models": {"llama": {"path": str(model), "dtype": "float32"}},
        "methods": {"dpo": ["mlc.weight=0"], "mlc": []},
        "seeds": [1],
        "train": {
            "data": {"train": [{"path": "sample:train"}], "languages": ["en", "sw"]},
            "mlc": {"extractor_dim": 16},
            "optimizer": {"learning_rate": 1e-2},
            "train": {"max_steps": 1, "batch_bundles": 4},
            "engine": {"stage": 0},
            "cluster": {"address": address, "cpus_per_worker": 0.5},
            "logging": {"json_lines": True},
        },
        "scoring": {
            "benchmarks": [{"path": "sample:test"}],
            "languages": ["en", "fr"],
            "limit": 2,
            "max_new_tokens": 4,
            "max_unparsed": 1.0,
            "engine": {"cpus_per_replica": 0.5, "max_model_len": 256, "cpu_kv_cache_gib": 1},
        },
        "keep_models": False,
    }


def test_a_killed_study_goes_on_and_repeats_no_cell(ray_local: Any, small_llama: Path, tmp_path: Path) -> None:
    raw = settings(tmp_path, small_llama, ray_local.get_runtime_context().gcs_address)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    folder, log = tmp_path / "small", tmp_path / "killed.log"
    first = folder / "cells/llama-dpo-1"
    with log.open("w") as output:
        command = [sys.executable, "-m", "mlc_ray", "study", "--config", str(tmp_path / "study.yaml")]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
        deadline = time.monotonic() + SECONDS
        while not (first / "model/mlc_ray.json").is_file():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (first / "run.json", first / "model/mlc_ray.json")}
    assert "0 of 2 cells are scored, 1 are trained" in show(folder)

    with pytest.raises(StudyError, match=r"llama-dpo-1: mlc\.layer was 'last', now 2"):
        study(
            parse_config(StudyConfig, {**raw, "models": {"llama": {**raw["models"]["llama"], "set": ["mlc.layer=2"]}}})
        )
    with pytest.raises(ConfigError, match=r"cell llama-mlc-1: .*9"):
        bad = {**raw, "name": "bad", "methods": {"mlc": ["mlc.layer=9"]}}
        study(parse_config(StudyConfig, bad))
    assert not (tmp_path / "bad/study.json").exists()

    before = (first / "run.json").stat().st_mtime_ns
    result = resume_study(folder)
    assert (first / "run.json").stat().st_mtime_ns == before == kept[first / "run.json"]
    assert [(each.name, each.state) for each in result.cells] == [
        ("llama-untouched", "scored"), ("llama-dpo-1", "scored"), ("llama-mlc-1", "scored"),
    ]  # fmt: skip
    assert load_study(folder) == result
    cells = {each.name for each in result.cells} - {"llama-untouched"}
    told = {name: (folder / name / "logs/driver.jsonl").read_text() for name in (".", *(f"cells/{c}" for c in cells))}
    lines = {name: [json.loads(line) for line in text.splitlines()] for name, text in told.items()}
    assert len({line["pid"] for line in lines["."]}) == 2, "the killed driver's, and this one's"
    assert {line["trial"] for name in lines for line in lines[name]} == {"", *cells}
    scorers = [line for file in (folder / "logs").glob("scorer-*") for line in file.read_text().splitlines()]
    assert {json.loads(line)["trial"] for line in scorers} >= cells
    assert result.trained == ("en", "sw") and result.bundles == {"harmful": 2, "benign": 2}
    assert all(row.rates is not None for row in result.rows) and len(result.tests) == 9
    dpo, mlc = result.cells[1:]
    assert dpo.steps == mlc.steps == 1 and dpo.seconds > 0 and dpo.score_seconds > 0
    assert dpo.answer_tokens == mlc.answer_tokens and set(dpo.prompt_tokens) == {"en"}
    assert set(mlc.prompt_tokens) == {"en", "sw"} and mlc.prompt_tokens["en"] == dpo.prompt_tokens["en"]
    assert not (first / "model").exists() and not (first / "train").exists()
    assert "2 of 2 cells are scored" in show(folder)
    write_report([first], tmp_path / "cell.html")  # a cell is a run like any other
    # what is finished is not begun again: nothing is trained, no engine is started
    scores = first / "scores/study/scores.json"
    written = scores.stat().st_mtime_ns
    assert resume_study(folder).rows == result.rows
    assert scores.stat().st_mtime_ns == written


def test_a_cell_of_adapters_gives_engines_a_whole_model(ray_local: Any, small_llama: Path, tmp_path: Path) -> None:
    raw = settings(tmp_path, small_llama, ray_local.get_runtime_context().gcs_address)
    raw["models"]["llama"]["lora"] = {"rank": 4}
    (cell, *_) = make_cells(parse_config(StudyConfig, raw))
    _train(cell, Place(tmp_path))
    made = tmp_path / "cells" / cell.name / "model"
    assert (made / "mlc_ray.json").is_file() and not (made / "adapter_config.json").exists()
    before = AutoModelForCausalLM.from_pretrained(small_llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(made).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert changed and all("_proj" in name for name in changed)
