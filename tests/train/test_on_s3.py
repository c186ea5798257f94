"""A whole run on an object store, its model too: nothing of it needs a shared disk, a rename or an append."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import SearchConfig, TrainConfig, load_config
from mlc_ray.runs import complete_checkpoints, read_metrics, resolve_model
from mlc_ray.score.results import load_scores
from mlc_ray.show import show
from mlc_ray.storage import Place
from mlc_ray.train.export import export
from mlc_ray.train.run import train as train_here

pytestmark = pytest.mark.slow
STEPS = 16
SCORING = ["limit=2", "languages=[en,sw]", "max_new_tokens=4", "max_unparsed=1.0"]
ENGINE = {"cpus_per_replica": 0.5, "max_model_len": 256, "cpu_kv_cache_gib": 1}


@pytest.fixture(scope="module")
def bucket(s3: str, small_llama: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the settings of a run, whose model is in the bucket already, and of a search."""
    folder = tmp_path_factory.mktemp("on-s3")
    model = Place(s3) / "model"
    model.storage.publish(small_llama, str(model))
    sample = (repository / "mlc_ray/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "bundles.jsonl").write_text("\n".join(sample[:8]) + "\n", encoding="utf-8")
    run = {
        "name": "mine",
        "output_dir": f"{s3}/runs",
        "resume": "auto",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [{"path": str(folder / "bundles.jsonl")}], "languages": ["en", "sw"]},
        "objective": {"loss": "simpo"},
        "mlc": {"extractor_dim": 16},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"epochs": 24, "max_steps": STEPS, "batch_bundles": 4},
        "engine": {"stage": 2},
        "cluster": {"address": "local", "workers": 1, "cpus_per_worker": 0.5},
        "checkpoint": {"every": 2, "keep": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def mlc_ray(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command, on a machine of its own as far as its cache goes."""
    environment = {**os.environ, "MLC_RAY_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "mlc_ray", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip


def done(process: subprocess.Popen[str]) -> str:
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def rows(run: Place | Path) -> Sequence[tuple[int, Any]]:
    return [(row["step"], row["loss/total"]) for row in read_metrics(run)]


def test_a_killed_run_on_s3_is_resumed_from_exactly_and_exported(
    bucket: Path, s3: str, small_llama: Path, tmp_path: Path, ray_local: Any
) -> None:
    train = ["train", "--config", str(bucket / "run.yaml")]
    run = Place(s3) / "runs" / "mine"
    driver = mlc_ray(bucket, *train)
    while not complete_checkpoints(run)[0]:
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert (run / "lease.json").is_file()
    shutil.rmtree(bucket / "cache")  # it goes on elsewhere
    said = done(mlc_ray(bucket, *train))
    assert f"run         {run}\n" in said
    assert "has ended already" not in said and not (run / "lease.json").exists(), said
    here = [f"output_dir={tmp_path}", f"model.path={small_llama}"]
    train_here(load_config(TrainConfig, bucket / "run.yaml", here))
    assert rows(run) == rows(tmp_path / "mine")
    assert [step for step, _ in rows(run)] == list(range(1, STEPS + 1))
    assert (run / "tensorboard").is_dir()

    assert f"ended, {STEPS} of {STEPS} steps" in show(run)
    assert resolve_model(run) == f"{run}/train/checkpoint_{STEPS:06d}/model"
    out = export(run, f"{s3}/exported")
    assert json.loads((out / "mlc_ray.json").read_text())["languages"] == ["en", "sw"]
    assert s3 not in (out / "README.md").read_text()
    exported = Path(export(tmp_path / "mine", tmp_path / "exported"))
    assert sorted(path.name for path in exported.iterdir()) == [each.name for each in out.iterdir()]
    with (out / "model.safetensors").open() as file:
        assert file.read() == (exported / "model.safetensors").read_bytes()
    assert not any(Path().glob("s3:*"))


@pytest.mark.soak
def test_a_score_and_a_search_on_s3(bucket: Path, s3: str) -> None:
    engine = json.dumps(ENGINE)
    scored = ["score", f"{s3}/model", "--benchmark", "sample:test", "--out", f"{s3}/scores/base"]
    done(mlc_ray(bucket, *scored, *(part for each in [*SCORING, f"engine={engine}"] for part in ("--set", each))))
    assert load_scores(Place(s3) / "scores" / "base").responses > 0
    settings = {
        "name": "found",
        "output_dir": f"{s3}/searches",
        "train": str(bucket / "run.yaml"),
        "set": ["resume=never", "train.max_steps=2"],
        "score_every": 1,
        "space": {"mlc.layer": {"choice": [1, "last"]}},
        "sampler": "grid",
        "objective": {"name": "average", "min_benign_compliance": 0.0},
        "scoring": {
            "benchmarks": [{"path": "sample:select"}],
            "engine": ENGINE,
            **{name: yaml.safe_load(value) for name, value in (each.split("=") for each in SCORING)},
        },
    }
    (bucket / "search.yaml").write_text(yaml.safe_dump(settings))
    load_config(SearchConfig, bucket / "search.yaml")
    done(mlc_ray(bucket, "search", "--config", str(bucket / "search.yaml")))
    found = Place(s3) / "searches" / "found"
    trials = json.loads((found / "trials.json").read_text())["trials"]
    assert {trial["ended"] for trial in trials} == {"finished"} and len(trials) == 2
    assert (found / "best" / "model.safetensors").is_file() and (found / "pareto.png").is_file()
    inside = [child for child in (found / "trials").iterdir() if child.name != "cache"]  # of prepared data, for all
    assert len(inside) == 2
    for trial in inside:
        scores = [load_scores(each) for each in (trial / "scores").iterdir()]
        assert [score.name for score in scores] == ["confirmation", "step-000001", "step-000002"]
        assert len({score.fingerprint for score in scores[1:]}) == 2
        assert not (trial / "train").is_dir()
    assert "ended, 2 of 2 trials have ended" in show(found)
    done(mlc_ray(bucket, "search", "--resume", str(found)))
    report = bucket / "report.html"
    done(mlc_ray(bucket, "report", f"{s3}/scores/base", str(found / "baseline"), "--out", str(report)))
    assert report.stat().st_size > 10_000
    assert [path.name for path in (bucket / "cache" / "models").iterdir() if path.name.endswith("-now")] == []
