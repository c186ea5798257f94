"""`ray job submit --working-dir . -- python -m mlc_ray ...` against a real local head, as the README shows it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_head import RAY, Head, running

pytestmark = pytest.mark.slow

JOB_SECONDS = 600


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running() as started:
        yield started


def submit(head: Head, repository: Path, command: list[str], settings: list[str]) -> str:
    """Run `mlc-ray COMMAND --set ...` as a job to its end; returns what it said."""
    line = [
        RAY, "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python", "-m", "mlc_ray",
        *command, *[part for setting in settings for part in ("--set", setting)],
    ]  # fmt: skip
    done = subprocess.run(
        line, cwd=repository, env=head.environment, capture_output=True, text=True, timeout=JOB_SECONDS
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "succeeded" in said, said
    return said


@pytest.mark.soak
def test_search_as_a_ray_job(head: Head, repository: Path, small_llama: Path, tmp_path: Path) -> None:
    run = ["train.max_steps=1", "data.languages=[en,fr]", f"model.path={small_llama}", "cluster.workers=1"]
    settings = [
        f"output_dir={tmp_path}",
        "name=job-search",
        f"set={json.dumps(run)}",
        "trials=1",
        "space={mlc.layer: {choice: [2, last]}}",
        "sampler=random",
        "scoring.limit=1",
        "confirm.limit=1",
        "scoring.languages=[en,fr]",
        "scoring.max_new_tokens=4",
        "scoring.max_unparsed=1.0",
        "scoring.engine.max_model_len=256",
    ]
    said = submit(head, repository, ["search", "--config", "configs/search/demo.yaml"], settings)
    assert "baseline" in said
    (trial,) = json.loads((tmp_path / "job-search" / "trials.json").read_text())["trials"]
    assert trial["ended"] == "finished"
    assert (tmp_path / "job-search" / "best.yaml").is_file()
    again = submit(head, repository, ["search", "--resume", str(tmp_path / "job-search")], [])
    assert f"best: {trial['name']}" in again
    assert json.loads((tmp_path / "job-search" / "trials.json").read_text())["trials"] == [trial]


def test_train_as_a_ray_job(head: Head, repository: Path, smollm2: Path, tmp_path: Path) -> None:
    sample = (repository / "mlc_ray" / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "four.jsonl").write_text("\n".join(sample[:4]) + "\n", encoding="utf-8")
    settings = [
        f"model.path={smollm2}",
        f"data.train.0.path={tmp_path / 'four.jsonl'}",
        f"output_dir={tmp_path}",
        "name=job",
        "train.max_steps=1",
        "train.batch_bundles=2",
        "data.languages=[en,fr]",
    ]
    submit(head, repository, ["train", "--config", "configs/quickstart.yaml"], settings)

    run = tmp_path / "job"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1]
    (checkpoint,) = (path for path in (run / "train").glob("checkpoint_*") if path.is_dir())
    assert (checkpoint / "manifest.json").is_file()
    assert (checkpoint / "model" / "model.safetensors").is_file()
    # .gitignore keeps the environment, the models and earlier runs out of what is sent to the cluster
    (sent,) = (path for path in head.folder.glob("session_2*/runtime_resources/working_dir_files/*") if path.is_dir())
    assert (sent / "configs" / "quickstart.yaml").is_file()
    assert not {path.name for path in sent.iterdir()} & {".venv", ".cache", "runs", ".git"}
    assert sum(path.stat().st_size for path in sent.rglob("*") if path.is_file()) < 20 * 2**20
