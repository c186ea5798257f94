"""Whole searches on real Ray, DeepSpeed and vLLM, with a small random Llama: what they leave, and what they survive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from transformers import AutoModelForCausalLM

from mlc_ray.config import SearchConfig, TrainConfig, load_config
from mlc_ray.ray_cluster import ClusterError
from mlc_ray.score.results import load_scores
from mlc_ray.search import ray_tune
from mlc_ray.search.probe import choose_bundles, layer_statistics
from mlc_ray.search.ray_tune import SearchError, search

pytestmark = pytest.mark.slow
SECONDS = 400


@pytest.fixture(scope="module")
def run_place(small_llama: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few bundles of the sample, the config of a run, and that of a search over it."""
    folder = tmp_path_factory.mktemp("search")
    sample = (repository / "mlc_ray/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "bundles.jsonl").write_text("\n".join(sample[:8]) + "\n", encoding="utf-8")
    run = {
        "name": "base",
        "model": {"path": str(small_llama)},
        "data": {"train": [{"path": str(folder / "bundles.jsonl")}], "languages": ["en", "sw"]},
        "mlc": {"extractor_dim": 16},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"epochs": 4, "max_steps": 2},
        "zero": {"stage": 2},
        "cluster": {"address": "local", "workers": 2, "cpus_per_worker": 0.5},
        "checkpoint": {"every": 1, "keep": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    searched = {
        "name": "found",
        "output_dir": str(folder),
        "train": str(folder / "run.yaml"),
        "space": {"mlc.layer": {"choice": [1, "last"]}},
        "sampler": "grid",
        "objective": {"min_benign_compliance": 0.0},
        "scoring": {
            "benchmarks": [{"path": "sample:test"}],
            "languages": ["en", "sw"],
            "limit": 2,
            "max_new_tokens": 4,
            "max_unparsed": 1.0,
            "engine": {"cpus_per_replica": 0.5, "max_model_len": 256, "cpu_kv_cache_gib": 1},
        },
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(searched))
    return folder


def configured(run_place: Path, *overrides: str) -> SearchConfig:
    return load_config(SearchConfig, run_place / "search.yaml", overrides)


def nothing_is_held(ray_local: Any) -> bool:
    """Whether all CPUs are free again and no placement group is left; Ray needs a moment to notice."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        groups = [g for g in ray_local.util.placement_group_table().values() if g["state"] != "REMOVED"]
        if not groups and ray_local.available_resources().get("CPU") == ray_local.cluster_resources()["CPU"]:
            return True
        time.sleep(0.5)
    return False


def test_a_search_says_what_it_found_and_leaves_nothing_running(
    ray_local: Any, run_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = search(configured(run_place))

    folder = run_place / "found"
    assert sorted(str(trial.values["mlc.layer"]) for trial in result.trials) == ["1", "last"]
    assert all(trial.finished and trial.step == 2 for trial in result.trials)
    # Made once, before any trial, and by none of them again.
    (tokens,) = (folder / "trials" / "cache").glob("tokens-*")
    (reference,) = (folder / "trials" / "cache").glob("reference-*")
    runs = [path.parent for path in (folder / "trials").glob("*/config.yaml")]
    assert len(runs) == 2
    first = min((run / "config.yaml").stat().st_mtime for run in runs)
    assert max(tokens.stat().st_mtime, reference.stat().st_mtime) < first
    fingerprints = [json.loads((run / "run.json").read_text())["fingerprints"] for run in runs]
    assert fingerprints[0]["tokens"] == fingerprints[1]["tokens"]
    assert fingerprints[0]["reference"] == fingerprints[1]["reference"]
    # Every checkpoint was scored, by weights that are not those of the other checkpoints.
    scores = [load_scores(path) for run in runs for path in sorted((run / "scores").iterdir())]
    baseline = load_scores(folder / "baseline")
    assert [score.name for score in scores] == ["step-000001", "step-000002"] * 2
    assert len({score.fingerprint for score in [*scores, baseline]}) == 5
    assert {score.prompts for score in scores} == {baseline.prompts}
    assert all(score.config["seconds"]["transfer"] > 0 for score in scores)
    assert not list((folder / "trials").glob("*/train"))  # optimizer states are gone, models are not
    best = load_config(TrainConfig, folder / "best.yaml")
    assert best.mlc.layer in (1, "last")
    AutoModelForCausalLM.from_pretrained(folder / "best")
    assert "as it is" in capsys.readouterr().out
    assert nothing_is_held(ray_local)

    with pytest.raises(SearchError, match=r"exists already.*--resume"):
        search(configured(run_place))

    # Resuming what is finished repeats nothing.
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.json*")}
    again = search(configured(run_place), resume=folder)
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*.json*")} == before
    assert again.trials == result.trials


class StopAtFirstScore(FIFOScheduler):
    """Stops every trial in the middle of its run, as ASHA and median stopping do with poor ones."""

    def on_trial_result(self, *_: Any) -> str:
        return TrialScheduler.STOP


def test_stopped_trials_leave_nothing(ray_local: Any, run_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tune, "make_scheduler", lambda config: StopAtFirstScore())
    result = search(configured(run_place, "name=stopped", "space={mlc.layer: {choice: [2]}}"))
    assert [(trial.finished, trial.step) for trial in result.trials] == [(False, 1)]
    assert result.best is None
    assert nothing_is_held(ray_local)


def test_what_the_cluster_can_never_hold_is_refused(ray_local: Any, run_place: Path) -> None:
    with pytest.raises(ClusterError, match=r"concurrency=4 trials of 1\.1 CPUs"):
        search(configured(run_place, "name=greedy", "concurrency=4"))


def test_a_killed_driver_is_resumed_without_repeating_a_trial(run_place: Path) -> None:
    folder = run_place / "killed"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "mlc_ray", "search"]
    started = [*command, "--config", str(run_place / "search.yaml"), "--set", "name=killed"]
    with (run_place / "killed.log").open("w") as log:
        process = subprocess.Popen(
            started, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + SECONDS
        while not list((folder / "trials").glob("*/model")):
            assert process.poll() is None, (run_place / "killed.log").read_text()
            assert time.monotonic() < deadline, (run_place / "killed.log").read_text()
            time.sleep(0.2)
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.send_signal(signal.SIGKILL)
        process.wait()
    (done,) = (path.parent for path in (folder / "trials").glob("*/model"))
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.json*")}
    assert not (folder / "trials.json").exists()

    resumed = subprocess.run(
        [*command, "--resume", str(folder)], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*.json*")} == before
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    assert sorted(str(trial["values"]["mlc.layer"]) for trial in trials) == ["1", "last"]
    assert all(trial["finished"] for trial in trials)


def test_a_probe_sees_every_layer_as_transformers_does(ray_local: Any, small_llama: Path, tmp_path: Path) -> None:
    import torch

    from mlc_ray.config import ModelSection, SourceSection
    from mlc_ray.data.ray_data import TokenArtifact
    from mlc_ray.search.ray_probe import probe

    settings = ModelSection(path=str(small_llama), dtype="float32")
    found = probe(settings, [SourceSection(path="sample:train")], tmp_path / "probe", languages=["en", "sw"], limit=8)
    assert (found.depth, found.bundles, found.languages) == (4, 16, ("en", "sw"))
    content = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert content["probe"]["ranking"] == found.ranking()
    assert set(found.layers[4].separability) == {"en", "sw"}

    (folder,) = (tmp_path / "cache").glob("tokens-*")
    tokens = TokenArtifact.open(folder)
    model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    chosen = [tokens.rows([index])[0] for index in choose_bundles(tokens.kinds, tokens.bundle_ids, 8)]
    rows = []
    for row in chosen:
        with torch.no_grad():
            states = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in row.prompts]
        rows.append([torch.stack([layer[0, -1] for layer in each]) for each in states])
    states = torch.stack([torch.stack(row) for row in rows])  # [N, L, layers, H]
    harmful = torch.tensor([row.kind == "harmful" for row in chosen])
    expected = layer_statistics(states, torch.ones(16, 2, dtype=torch.bool), harmful, ["en", "sw"])
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.share == pytest.approx(theirs.share, rel=1e-4)
        assert ours.within == pytest.approx(theirs.within, rel=1e-3, abs=1e-4)
        assert ours.separability == pytest.approx(theirs.separability, abs=0.05)
