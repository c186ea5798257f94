"""A run struck by six deaths is the run that nobody struck: `benchmarks/survival.py` at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.soak
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
