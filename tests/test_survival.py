"""A run struck by six deaths is the run that nobody struck: `benchmarks/survival.py` at its smallest."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlc_ray.storage import Place


@pytest.mark.slow
def test_six_deaths(tmp_path: Path, repository: Path, smollm2: Path) -> None:
    out = tmp_path / "survival.json"
    command = [sys.executable, repository / "benchmarks" / "survival.py", "--model", smollm2, "--out", out]
    more = ["--keep", tmp_path / "place", "--per-run", "6"]
    done = subprocess.run(list(map(str, [*command, *more])), capture_output=True, text=True, timeout=800)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in (tmp_path / "place").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    runs = json.loads(out.read_text())
    struck = sorted(death.split()[0] for run in runs for death in run["deaths"])
    assert struck == ["damage", "driver", "nan", "node", "worker", "write"]
    assert all(run["losses"] == run["weights"] == 0 and run["left"] == [] for run in runs)


@pytest.mark.slow
@pytest.mark.soak
def test_a_store_that_is_away_for_longer_than_a_lease_lives(tmp_path: Path, repository: Path, smollm2: Path) -> None:
    out, place = tmp_path / "survival.json", tmp_path / "place"
    command = [sys.executable, repository / "benchmarks" / "survival.py", "--model", smollm2, "--out", out]
    more = ["--keep", place, "--warm", "--deaths", "away=1"]
    done = subprocess.run(list(map(str, [*command, *more])), capture_output=True, text=True, timeout=800)
    logs = "\n".join(path.read_text(errors="replace") for path in place.glob("away-*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs[-9000:]
    assert "could not be read for " in logs and "where cluster.max_failures=100 allows, all workers start again" in logs
    assert all(run["losses"] == run["weights"] == 0 for run in json.loads(out.read_text()))


def test_a_death_that_ends_in_an_error_is_in_the_table(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository)
    monkeypatch.syspath_prepend(repository / "benchmarks")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a scene changes it
    survival, scenes = importlib.import_module("survival"), importlib.import_module("survival_scene")

    class Sleeping(scenes.Scene):
        def start(self, name, output_dir, settings):
            return subprocess.Popen(["sleep", "60"])

    def break_off(run):
        raise FileNotFoundError("a manifest")

    monkeypatch.setitem(survival.DEATHS, "misses", lambda run: False)
    monkeypatch.setitem(survival.DEATHS, "breaks off", break_off)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 12}) + "\n")
    run = scenes.Run(Sleeping(tmp_path / "scene", seed=0), "run", tmp_path)
    # What is left is looked for in a cluster, and here is none: another error that is to end no benchmark.
    row = survival.lived(run, ["misses", "breaks off", "worker"], run)
    assert row["error"] == "FileNotFoundError: a manifest" and row["left"] and not row["ok"] and run.ended()
    assert (row["deaths"], row["missed"]) == (["breaks off at 12"], ["misses at 12", "worker"])
    other = {"deaths": [], "ok": True, "losses": 0.0, "weights": 0.0}
    assert survival.table([row, other]).splitlines()[2:] == [
        "| breaks | 1 | 1 | 0 | inf | inf |",
        "| all | 1 | 2 | 1 | inf | inf |",
    ]


def test_half_made_files_are_looked_for_in_the_caches_too(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository)
    monkeypatch.syspath_prepend(repository / "benchmarks")
    survival = importlib.import_module("survival")
    left = ("run/.a.tmp-0", "cache/.tokens-1.tmp-0/rows", "scene/cache/models/.m.tmp-0/config.json")
    for name in (*left, "run/.validate_storage_marker", "scene/cache/models/.m.lock", "run/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run = SimpleNamespace(folder=Place(tmp_path / "run"), output_dir=tmp_path)
    run.scene = SimpleNamespace(folder=tmp_path / "scene")
    assert survival.half_made(run) == [f"{tmp_path}/{name}" for name in left]
