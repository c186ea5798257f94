"""Utility through lm-evaluation-harness: its command line, its results file, and one real run on real vLLM."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.cli import build_parser
from mlc_ray.cli.commands import utility_config
from mlc_ray.config import ConfigError, UtilityConfig, parse_config
from mlc_ray.runs import ModelPathError
from mlc_ray.storage import fingerprint_model
from mlc_ray.utility import run as utility
from mlc_ray.utility.file import Utility, UtilityFileError, load_utility, save_utility
from mlc_ray.utility.run import (
    UtilityError,
    harness_command,
    measure_utility,
    rows_of,
)
from tests.report.runs import response, write_score

TASKS = Path(__file__).parent / "tasks"
HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")

# The layout of the harness's results file, version 0.4.13.
RESULTS: dict[str, Any] = {
    "results": {
        "mmlu": {"name": "mmlu", "alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "mmlu_stem": {"alias": " - stem", "acc,none": 0.25, "acc_stderr,none": "N/A"},
        "gsm": {"alias": "gsm", "exact_match,strict": 0.125, "exact_match_stderr,strict": 0.02, "exact_match,flex": 1},
    },
    "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["algebra", "biology"]},
    "n-samples": {
        "algebra": {"original": 100, "effective": 8},
        "biology": {"original": 90, "effective": 7},
        "gsm": {"original": 10, "effective": 10},
    },
    "versions": {"gsm": 3.0},
    "n-shot": {"gsm": 5},
    "higher_is_better": {"mmlu": {"acc": True}, "gsm": {"exact_match": True}},
}


def config(**settings: Any) -> UtilityConfig:
    return parse_config(UtilityConfig, {"model": "owner/name", "tasks": ["mmlu"], **settings})


def test_rows_of_a_results_file():
    rows = {(row.task, row.metric, row.filter): row for row in rows_of(RESULTS, config(limit=8))}
    assert list(rows) == [
        ("mmlu", "acc", "none"),
        ("mmlu_stem", "acc", "none"),
        ("gsm", "exact_match", "strict"),
        ("gsm", "exact_match", "flex"),
    ]
    whole = rows["mmlu", "acc", "none"]
    assert (whole.value, whole.stderr, whole.n, whole.version, whole.limit) == (0.5, 0.1, 15, None, 8)
    assert rows["mmlu_stem", "acc", "none"].stderr is None
    strict = rows["gsm", "exact_match", "strict"]
    assert (strict.n, strict.version, strict.num_fewshot, strict.higher_is_better) == (10, "3.0", 5, True)
    assert rows["gsm", "exact_match", "flex"].value == 1.0


def test_results_without_numbers_are_refused():
    with pytest.raises(UtilityError, match="no result for tasks="):
        rows_of({"results": {"mmlu": {"alias": "mmlu"}}}, config())
    with pytest.raises(UtilityError, match="'high' for 'mmlu', which is not a number"):
        rows_of({"results": {"mmlu": {"acc,none": "high"}}}, config())


def test_the_command_line_of_each_backend():
    command = harness_command(config(tasks=["mmlu", "mmmlu_sw_ke"], limit=5), "/model, with a comma", "cpu")
    assert command[1:6] == ["-m", "lm_eval", "run", "--model", "vllm"]
    arguments = json.loads(command[command.index("--model_args") + 1])
    assert arguments["pretrained"] == "/model, with a comma"
    assert (arguments["enforce_eager"], arguments["max_model_len"]) == (True, 4096)
    assert command[command.index("--tasks") + 1] == "mmlu,mmmlu_sw_ke"
    assert command[command.index("--limit") + 1] == "5"
    gpu = harness_command(config(engine={"tensor_parallel": 2, "options": {"max_num_seqs": 8}}), "m", "gpu")
    assert json.loads(gpu[gpu.index("--model_args") + 1])["max_num_seqs"] == 8
    assert json.loads(gpu[gpu.index("--model_args") + 1])["tensor_parallel_size"] == 2
    plain = harness_command(config(backend="hf", chat_template=True, num_fewshot=0), "m", "cpu")
    assert plain[plain.index("--device") + 1] == "cpu"
    assert plain[plain.index("--num_fewshot") + 1] == "0"
    assert "--apply_chat_template" in plain


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.replicas=2"):
        config(engine={"replicas": 2})
    with pytest.raises(ConfigError, match=r"engine\.hang_seconds=9\.0: not read by utility"):
        config(engine={"hang_seconds": 9})
    with pytest.raises(ConfigError, match="tasks"):
        config(tasks=[])
    with pytest.raises(UtilityError, match=r"holds no task file \(\*\.yaml\)"):
        harness_command(config(include_path=str(tmp_path)), "m", "cpu")


@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_parallel": 2}, {"gpu_memory_utilization": 0.5}, {"enforce_eager": True}, {"cpu_kv_cache_gib": 4},
    ],
)  # fmt: skip
def test_engine_settings_that_transformers_do_not_read_are_refused(engine: dict[str, Any]) -> None:
    (name,) = engine
    with pytest.raises(ConfigError, match=rf"engine\.{name}=.*not read with backend='hf'.*set backend=vllm"):
        config(backend="hf", engine=engine)
    assert config(engine=engine).backend == "vllm"
    read = {"dtype": "float32", "max_model_len": 512, "trust_remote_code": True, "cpus_per_replica": 2}
    assert config(backend="hf", engine=read).engine.max_model_len == 512


@pytest.mark.parametrize(
    ("engine", "tokens"), [({}, 4096), ({"dtype": "float32"}, 4096), ({"max_model_len": 512}, 512)]
)
def test_an_engine_that_is_set_in_part_keeps_its_length(engine: dict[str, Any], tokens: int) -> None:
    config = parse_config(UtilityConfig, {"model": "m", "tasks": ["mmlu"], "engine": engine})
    assert config.engine.max_model_len == tokens


def test_transformers_run_where_torch_finds_a_device(monkeypatch) -> None:
    import torch

    assert utility._device(config(backend="hf")) == ("gpu" if torch.cuda.is_available() else "cpu")
    for found, device in ((True, "gpu"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert utility._device(config(backend="hf")) == device
    assert utility._device(config(backend="hf", accelerator="cpu")) == "cpu"
    with pytest.raises(UtilityError, match="accelerator='gpu', but torch finds no CUDA device"):
        utility._device(config(backend="hf", accelerator="gpu"))


def test_a_value_that_is_not_finite_is_kept_as_none(tmp_path: Path) -> None:
    rows = rows_of({"results": {"wiki": {"perplexity,none": float("inf"), "perplexity_stderr,none": 1.0}}}, config())
    saved = Utility("m", "m", "0123", rows, {"lm_eval": "0.4.13"}, "2026-01-01", tmp_path)
    save_utility(saved)
    assert load_utility(tmp_path) == saved


def test_options_of_the_command_win_over_set():
    words = "utility runs/mine --tasks mmlu,mmmlu_sw_ke --scores s --limit 5 --set backend=hf --set limit=9"
    found = utility_config(build_parser().parse_args(words.split()))
    assert (found.model, found.tasks, found.scores) == ("runs/mine", ["mmlu", "mmmlu_sw_ke"], "s")
    assert (found.limit, found.backend) == (5, "hf")
    with pytest.raises(ConfigError, match="tasks: required"):
        utility_config(build_parser().parse_args(["utility", "runs/mine"]))


def test_without_the_harness_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(utility.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UtilityError, match=r"pip install 'lm-eval"):
        measure_utility(config())


@needs_harness
def test_models_and_score_folders_are_checked_before_anything_starts(tmp_path, smollm2):
    with pytest.raises(ModelPathError, match="does not exist"):
        measure_utility(config(model=str(tmp_path / "none")))
    settings = {"model": str(smollm2), "output_dir": str(tmp_path)}
    with pytest.raises(UtilityError, match=r"max_model_len=9999 is more than the 8192 positions"):
        measure_utility(config(**settings, engine={"max_model_len": 9999}))
    with pytest.raises(UtilityError, match="is not a score folder"):
        measure_utility(config(**settings, scores=str(tmp_path)))
    other = write_score(tmp_path / "other", [response(0, "harmful", "en")], fingerprint="0000")
    with pytest.raises(UtilityError, match="is the score of another model: its fingerprint is '0000'"):
        measure_utility(config(**settings, scores=str(other)))
    with pytest.raises(UtilityError, match="accelerator='gpu', but the installed vLLM is for CPU"):
        measure_utility(config(**settings, accelerator="gpu"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "not valid JSON"), ("{}", "has format None"), ('{"format": 1}', "damaged")],
)
def test_utility_files_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "utility.json").write_text(content)
    with pytest.raises(UtilityFileError, match=message):
        load_utility(tmp_path)


@needs_harness
@pytest.mark.slow
def test_a_small_task_of_ones_own_on_real_vllm_is_merged_into_the_score_folder(tmp_path, smollm2):
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    task = tasks / "small_facts.yaml"
    task.write_text(task.read_text().replace("small_facts.jsonl", str(tasks / "small_facts.jsonl")))
    rows = [response(0, "harmful", "en")]
    scores = write_score(tmp_path / "scores", rows, fingerprint=fingerprint_model(str(smollm2)))
    settings = {
        "model": str(smollm2), "scores": str(scores), "include_path": str(tasks),
        "engine": {"max_model_len": 512, "cpu_kv_cache_gib": 1},
    }  # fmt: skip

    with pytest.raises(UtilityError, match=r"no_such_task[\s\S]*utility\.log|utility\.log[\s\S]*no_such_task"):
        measure_utility(config(**settings, tasks=["no_such_task"]))
    assert not (scores / "utility.json").exists()

    measured = measure_utility(config(**settings, tasks=["small_facts"]))
    row = measured.row("small_facts")
    assert row.n == 8
    assert 0.5 <= row.value <= 1.0  # three choices each: guessing gives a third
    assert row.stderr is not None
    assert load_utility(scores) == measured
    assert measured.versions["lm_eval"]
