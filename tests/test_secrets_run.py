"""Secrets in the environment of a real run, its export, a score and a report: none is in what they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mlc_ray.config import ScoreConfig, parse_config
from mlc_ray.runs import LOGS_FOLDER
from mlc_ray.score.request import Request
from mlc_ray.score.stages import RESPONSES
from tests.generate.chat_server import Step, serving

PLANTED = {
    "HF_TOKEN": "hf_pLaNtEdToKeN0123456789",
    "AWS_ACCESS_KEY_ID": "AKIApLaNtEd01234567",
    "AWS_SECRET_ACCESS_KEY": "pLaNtEd/secret+0123456789",
    "OPENAI_API_KEY": "sk-pLaNtEd-0123456789",
    "WANDB_API_KEY": "pLaNtEdWaNdB0123456789abcdef",
    "MLFLOW_TRACKING_PASSWORD": "pLaNtEd-mlflow-0123",
}
URIS = ("s3://AKIA:uRiSeCrEt1@bucket/runs", "https://me:uRiSeCrEt2@host/runs", "s3://b/r?X-Amz-Signature=uRiSeCrEt3")
COMMANDS = """
import json, sys
from pathlib import Path
from mlc_ray.cli import main
from mlc_ray.errors import MlcRayError
from mlc_ray.judges.endpoint import EndpointJudge
from mlc_ray.logs import command_line
from mlc_ray.score.run import judge_again

here, wrong, right, *uris = sys.argv[1:]
for uri in uris:
    assert main(["train", "--config", f"{here}/run.yaml", "--set", f"output_dir={uri}"]) == 2
assert main(["train", "--config", f"{here}/run.yaml"]) == 0
assert main(["export", f"{here}/watched", f"{here}/export"]) == 0
for url in (wrong, right):
    endpoint = {"base_url": url, "model": "m", "retries": 0, "cache_dir": here, "api_key_env": "OPENAI_API_KEY"}
    with command_line():
        try:
            judge_again(f"{here}/score", judge=EndpointJudge.Settings.model_validate({"endpoint": endpoint}))
        except MlcRayError as error:
            print(error)
assert main(["show", f"{here}/watched"]) == 0
assert main(["report", f"{here}/watched", f"{here}/score", "--out", f"{here}/report.html"]) == 0
"""


def judged(messages: list[dict[str, str]], number: int) -> Step:
    code = messages[0]["content"].partition('"check": "')[2].partition('"')[0]
    return Step(json.dumps({"check": code, "response": "answers", "verdict": "safe"}))


def refused(messages: list[dict[str, str]], number: int) -> Step:
    """As some servers do: with the key that they refuse."""
    return Step(status=401, raw=json.dumps({"error": f"Incorrect API key: {PLANTED['OPENAI_API_KEY']}"}).encode())


def files_with(folder: Path, secrets: list[str]) -> dict[str, list[str]]:
    """The files beneath a folder in which a secret is, as text."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if there := [secret for secret in secrets if secret.encode() in content]:
                found[path.relative_to(folder).as_posix()] = there
    return found


@pytest.mark.slow
def test_no_secret_is_in_what_runs_leave(small_llama: Path, repository: Path, tmp_path: Path) -> None:
    sample = (repository / "mlc_ray/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "bundles.jsonl").write_text("\n".join(sample[:4]), encoding="utf-8")
    settings = {
        "name": "watched", "output_dir": str(tmp_path), "model": {"path": str(small_llama), "dtype": "float32"},
        "data": {"train": [{"path": str(tmp_path / "bundles.jsonl")}], "languages": ["en", "sw"]},
        "mlc": {"layer": 3, "extractor_dim": 16}, "objective": {"loss": "simpo"},
        "train": {"max_steps": 2, "batch_bundles": 2}, "logging": {"json_lines": True},
        "cluster": {"address": "local", "cpus_per_worker": 0.5},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    score = {
        "name": "score", "output_dir": str(tmp_path), "model": str(small_llama), "judge": {"name": "refusal"},
        "benchmarks": [{"path": str(tmp_path / "bundles.jsonl")}], "max_new_tokens": 8,
    }  # fmt: skip
    (tmp_path / "score").mkdir()
    Request(parse_config(ScoreConfig, score), str(small_llama), "0" * 16, "prompts", ["en"]).save(tmp_path / "score")
    row: dict[str, Any] = {
        "benchmark": "own", "category": "", "language": "en", "prompt": "How?", "sample": 0, "response": "So.",
        "finish": "stop", "prompt_tokens": 2, "response_tokens": 2,
    }  # fmt: skip
    rows = [{**row, "bundle_id": kind, "kind": kind} for kind in ("harmful", "benign")]
    pq.write_table(pa.Table.from_pylist(rows, schema=RESPONSES), tmp_path / "score" / "responses.parquet")
    rays = Path(tempfile.mkdtemp(prefix="mlcray", dir="/tmp"))  # of sockets: a short path
    outside = tmp_path.parent / f"{tmp_path.name}-out"
    try:
        with serving(refused) as wrong, serving(judged) as right, outside.open("wb") as out:
            done = subprocess.run(
                [sys.executable, "-c", COMMANDS, tmp_path, wrong.base_url, right.base_url, *URIS],
                env={**os.environ, **PLANTED, "RAY_TMPDIR": str(rays)}, cwd=tmp_path, stdout=out,
                stderr=subprocess.STDOUT, timeout=300,
            )  # fmt: skip
            keys = {each["Authorization"] for each in (*wrong.headers, *right.headers)}
        said = outside.read_text()
        assert done.returncode == 0, said
        assert keys == {f"Bearer {PLANTED['OPENAI_API_KEY']}"}  # it was there to leak
        secrets = [*PLANTED.values(), "uRiSeCrEt"]
        assert not [secret for secret in secrets if secret in said], said
        assert "output_dir='s3://...@bucket/runs'" in said
        assert not files_with(tmp_path, secrets)
        assert list(rays.rglob("raylet.out"))
        assert not files_with(rays, secrets)  # Ray's own logs
    finally:
        shutil.rmtree(rays, ignore_errors=True)
    names = ("manifest.json", "run.json", "config.yaml", "metrics.jsonl", "scores.json", "mlc_ray.json", "report.html")
    left = {path.name for path in tmp_path.rglob("*")}
    assert left >= {*names, "libraries.log", "driver.jsonl", "worker-00000.jsonl"}

    logs = tmp_path / "watched" / LOGS_FOLDER
    worker = [json.loads(line) for line in (logs / "worker-00000.jsonl").read_text().splitlines()]
    driver = [json.loads(line) for line in (logs / "driver.jsonl").read_text().splitlines()]
    assert {(each["run"], each["trial"], each["worker"]) for each in worker} == {("watched", "", 0)}
    assert {each["worker"] for each in driver} == {None}
    steps = {each["message"].partition(" on ")[0].partition(" in ")[0]: each["step"] for each in worker}
    assert steps["trains from step 0 of 2"] == 0
    assert steps["step 2 is saved"] == 2
