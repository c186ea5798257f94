"""Workers of a joined cluster get the variables that settings name, and their values stand nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlc_ray.environment import chosen, lacking, not_set
from tests.ray_head import Head, running

SECRET, OTHER = "hf_Zq81-not-to-be-written", "wandb-Kp37-not-to-be-written"
DRIVER = """
import json, os, sys
import psutil
import ray
from mlc_ray.cluster import connect

connect("auto", ["HF_TOKEN", "WANDB_*"])
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE", "UNNAMED", "OWN")

@ray.remote
def task():
    return {name: os.environ.get(name) for name in NAMES}

@ray.remote(runtime_env={"env_vars": {"OWN": "1"}})
class Actor:
    def ask(self):
        return {name: os.environ.get(name) for name in NAMES}

actor = Actor.remote()
found = [ray.get(task.remote()), ray.get(actor.ask.remote())]
listed = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
assert any("ray::Actor" in line for line in listed)
assert not [line for line in listed if os.environ["HF_TOKEN"] in line or os.environ["WANDB_API_KEY"] in line]
connect("auto", ["HF_TOKEN"])
connect("auto", ["UNN*"])
print(json.dumps(found))
"""


LEFT = """
import sys, ray
from ray.experimental.internal_kv import _internal_kv_list

ray.init(sys.argv[1], log_to_driver=False)
print(_internal_kv_list(b"", namespace=b"mlc_ray"))
"""


def test_names_and_patterns_choose_variables() -> None:
    environment = {"HF_TOKEN": "1", "HF_TOKENS": "2", "AWS_REGION": "3", "aws_x": "4", "NCCL_DEBUG": "5"}
    assert chosen(["HF_TOKEN", "AWS_*"], environment) == {"HF_TOKEN": "1", "AWS_REGION": "3"}
    assert chosen([], environment) == {}
    assert not_set(["HF_TOKEN", "WANDB_*", "NCCL_*", "WANDB_MODE"], environment) == ["WANDB_*", "WANDB_MODE"]


def test_variables_that_were_not_left_are_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_A", "1")
    monkeypatch.setenv("MLC_B", "2")
    monkeypatch.setattr("mlc_ray.environment._left", {"MLC_A"})
    assert lacking(["MLC_?", "MLC_NOT_SET"]) == ["MLC_B"]
    assert lacking([]) == []


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running() as started:
        yield started


@pytest.mark.slow
def test_workers_get_them_and_nothing_writes_them(head: Head, repository: Path) -> None:
    # The head was started without them.
    environment = {
        **head.environment, "RAY_ADDRESS": head.gcs, "HF_TOKEN": SECRET, "WANDB_API_KEY": OTHER, "UNNAMED": "x",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=repository, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    task, actor = json.loads(done.stdout.splitlines()[-1])
    shared = {"HF_TOKEN": SECRET, "WANDB_API_KEY": OTHER, "WANDB_MODE": None, "UNNAMED": None}
    assert task == {**shared, "OWN": None} and actor == {**shared, "OWN": "1"}
    assert SECRET not in done.stderr
    # What comes too late is not ignored in silence; what was passed on is not complained of.
    assert "env=['UNN*']: workers do not get UNNAMED: this process joined its Ray before" in done.stderr
    assert "workers do not get HF_TOKEN" not in done.stderr
    written = [file for file in head.folder.rglob("*") if file.is_file() and not file.is_socket()]
    assert any(file.name.startswith("runtime_env") for file in written)
    for file in written:
        text = file.read_bytes()
        assert SECRET.encode() not in text and OTHER.encode() not in text, file
    after = subprocess.run(
        [sys.executable, "-c", LEFT, head.gcs], env=head.environment, capture_output=True, text=True, timeout=120
    )
    assert after.stdout.split() == ["[]"], after.stdout + after.stderr  # nor is the entry there any more
