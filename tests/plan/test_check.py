"""What commands refuse before they start, and the command that says why."""

import json
import subprocess
import sys

import pytest

from mlc_ray.cli import main
from mlc_ray.config import ScoreConfig
from mlc_ray.plan.check import check_engine, check_run
from mlc_ray.plan.hardware import Cluster, cluster_of
from mlc_ray.plan.runs import PlanError
from tests.plan.test_memory import run

EIGHT = cluster_of(8, "h100")


def test_a_run_that_cannot_fit_is_refused_with_its_part_and_the_nearest_that_would():
    config = run(model={"path": "Qwen/Qwen2.5-32B-Instruct"}, cluster={"workers": 8}, engine={"stage": 1})
    with pytest.raises(
        PlanError, match=r"GiB of each worker's memory, which has 79\.1; the largest part is weights"
    ) as said:
        check_run(config, gpu=True, cluster=EIGHT)
    assert "the nearest that fits: engine.stage=3" in str(said.value)


def test_what_fits_and_what_is_not_to_be_checked_passes():
    check_run(run(model={"path": "Qwen/Qwen2.5-7B"}, cluster={"workers": 8}), gpu=True, cluster=EIGHT)
    check_run(run(model={"path": "Qwen/Qwen2.5-72B"}, cluster={"plan": "off"}), gpu=True, cluster=EIGHT)
    check_run(run(engine={"name": "examples.my_engine:TorchDdp"}), gpu=True, cluster=EIGHT)


def test_workers_on_a_cpu_share_its_memory():
    config = run(model={"path": "Qwen/Qwen2.5-0.5B"}, cluster={"workers": 4, "accelerator": "cpu"})
    with pytest.raises(PlanError, match=r"on 4 x cpu needs .* GiB of each worker's memory, which has 6\.0"):
        check_run(config, gpu=False, cluster=Cluster(None, 1, 1, 24 * 2**30))
    check_run(config, gpu=False, cluster=Cluster(None, 1, 1, 96 * 2**30))
    check_run(config, gpu=False, cluster=Cluster(None, 4, 1, 24 * 2**30))  # four such nodes


def test_a_check_is_a_matter_of_milliseconds_and_imports_no_model():
    code = (
        "import sys, time, mlc_ray.train.run\n"
        "from mlc_ray.config import TrainConfig\n"
        "from mlc_ray.plan.check import check_run\n"
        "from mlc_ray.plan.hardware import cluster_of\n"
        "from mlc_ray.plan.shapes import published_config\n"
        "published_config('7b')  # a driver has read a config by now\n"
        "config = TrainConfig.model_validate({'name': 'x', 'model': {'path': 'Qwen/Qwen2.5-7B', 'dtype': 'bfloat16'},\n"
        "    'data': {'train': [{'path': 'x.jsonl'}]}, 'cluster': {'workers': 8}})\n"
        "began = time.process_time()\n"
        "check_run(config, gpu=True, cluster=cluster_of(8, 'h100'))\n"
        "print(time.process_time() - began, 'transformers.modeling_utils' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, imported = said.splitlines()[-1].split()
    assert imported == "False"
    assert float(seconds) < 1  # it takes 0.02; what imports a model takes longer


def test_an_engine_that_cannot_hold_the_model_is_refused():
    scoring = ScoreConfig(model="Qwen/Qwen2.5-72B", benchmarks=[{"path": "sample:test"}])
    with pytest.raises(PlanError, match=r"the nearest that fits: engine\.tensor_parallel=4"):
        check_engine(scoring.model, scoring, gpu=True, cluster=EIGHT)
    wide = scoring.model_copy(update={"engine": scoring.engine.model_copy(update={"tensor_parallel": 4})})
    check_engine(scoring.model, wide, gpu=True, cluster=EIGHT)


def test_the_command_says_the_same_in_words_and_as_json(capsys):
    asked = ["plan", "--config", "recipe:qwen2.5-7b", "--gpus", "8", "--gpu", "h100"]
    assert main(asked) == 0
    words = capsys.readouterr().out
    assert "it fits" in words
    assert "AdamW's moments" in words
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["worker_bytes"] == sum(part["bytes"] for part in found["memory"]["worker"])
    assert f"{found['worker_bytes'] / 2**30:.1f} of 79.1 GiB" in words
    assert found["gpu_hours"] == pytest.approx(8 * found["wall_seconds"] / 3600)


def test_scores_and_searches_are_planned(capsys):
    score = [
        "plan",
        "--for",
        "score",
        "--config",
        "configs/score/default.yaml",
        "--shape",
        "7b",
        "--gpus",
        "8",
        "--json",
    ]
    assert main(score) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["prompts"] > 0
    search = ["plan", "--for", "search", "--config", "configs/search/demo.yaml", "--shape", "0.5b", "--gpus", "8"]
    assert main(search) == 0
    assert "the search: " in capsys.readouterr().out
