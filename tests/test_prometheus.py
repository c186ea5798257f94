"""A real run, scraped while it lasts: what the dashboard asks for is there.

Beside it are a search that only begins and a pool whose actors die, for what no healthy search tells. What a real
search and its engines tell is scraped in tests/search/test_search.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.config import EngineSection, TrainConfig, parse_config
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import Stage
from mlc_ray.monitoring import METRICS
from mlc_ray.search.record import Recorder
from mlc_ray.search.tune import EndEarly
from mlc_ray.train.run import train
from tests.ray_head import free_ports
from tests.scraping import scraped, target_of
from tests.search.test_trial import shared_of
from tests.test_monitoring import DASHBOARD, expressions, metrics_in

# No GPU's peak is known on a CPU; no step of this run has to be tried again, and no checkpoint fails.
NOT_TOLD = {"ray_mlc_train_mfu", "ray_mlc_train_retries_total"}
LIMIT = 180.0  # seconds: Ray's processes report every ten, and the machine may be busy


class Answers(Stage):
    """Answers numbers; its process dies of 3 whenever that is asked."""

    columns = pa.schema({"response_tokens": pa.int32()})

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        if 3 in table["number"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"response_tokens": 5} for _ in range(len(table))]

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **settings: Any) -> list[dict[str, Any]]:
        return [{"response_tokens": 0} for _ in range(len(table))]


@dataclass
class Held:
    """A scorer of weights that keeps the run going until `until` is there."""

    until: str
    every: int | None = None
    keep_state: bool = True

    def __call__(self, run_folder: Any, weights: Any, step: int) -> dict[str, float]:
        deadline = time.monotonic() + LIMIT + 30
        while not Path(self.until).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return {}


@contextmanager
def prometheus(program: str, target: str, folder: Path) -> Iterator[str]:
    """A real Prometheus that scrapes `target` every second; its address."""
    folder.mkdir()
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: ray, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    (port,) = free_ports(1)
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def asked(address: str, expression: str) -> list[Any]:
    """What Prometheus answers; none while it is not up. One that it cannot parse fails the test."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as answer:
            found: list[Any] = json.load(answer)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []
        raise AssertionError(f"{expression}: {error.read().decode()}") from None
    except OSError:
        return []


def engines_and_search(folder: Path) -> None:
    """What a pool tells whose actors die of a row, and a search whose first trial begins."""
    part = Part("answering", Answers, {}, EngineSection(replicas=1, cpus_per_replica=0.1, retries=1, block_rows=2))
    with EnginePool.open(part, "cpu") as pool:
        assert pool.map(pa.table({"number": [1, 2, 3]}))["response_tokens"].to_pylist() == [5, 5, 0]
    recorder = Recorder(shared_of(folder, None), None, total=3, end=EndEarly(None))  # type: ignore[arg-type]
    recorder.on_trial_start(1, [], SimpleNamespace(trial_id="first"))


def wait_for(missing: Callable[[], list[str]], going: threading.Thread) -> list[str]:
    """What is still missing when the run has ended, or after the limit."""
    deadline = time.monotonic() + LIMIT
    while (left := missing()) and time.monotonic() < deadline and going.is_alive():
        time.sleep(0.5)
    return left


@pytest.mark.slow
def test_a_running_job_has_what_the_dashboard_asks_for(
    ray_local: Any, small_llama: Path, repository: Path, tmp_path: Path, record_property: Any
) -> None:
    sample = (repository / "mlc_ray/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "bundles.jsonl").write_text("\n".join(sample[:8]), encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("\n".join(sample[8:10]), encoding="utf-8")
    config = parse_config(TrainConfig, {
        "name": "watched", "output_dir": str(tmp_path), "model": {"path": str(small_llama), "dtype": "float32"},
        "data": {
            "train": [{"path": str(tmp_path / "bundles.jsonl")}], "languages": ["en", "sw"],
            "validation": {"sources": [{"path": str(tmp_path / "held_out.jsonl")}], "every": 2},
        },
        "mlc": {"layer": 3, "extractor_dim": 16}, "objective": {"loss": "simpo"},
        "train": {"max_steps": 4, "batch_bundles": 4}, "checkpoint": {"every": 2},
        "cluster": {"cpus_per_worker": 0.5}, "logging": {"tensorboard": False},
    })  # fmt: skip
    target = target_of(ray_local)
    program = os.environ.get("MLC_RAY_PROMETHEUS") or shutil.which("prometheus")
    questions = expressions(json.loads(DASHBOARD.read_text(encoding="utf-8")))
    failures: list[BaseException] = []

    def run() -> None:
        try:
            train(config, score=Held(str(tmp_path / "seen")), display=False)
        except BaseException as error:
            failures.append(error)

    going = threading.Thread(target=run)
    going.start()
    try:
        engines_and_search(tmp_path / "search")
        if program is None:
            wanted = {metric.exposed for metric in METRICS} - NOT_TOLD
            left = wait_for(lambda: sorted(wanted - {name for name, _ in scraped(target)}), going)
        else:
            with prometheus(program, target, tmp_path / "prometheus") as address:
                answered: set[str] = set()

                def missing() -> list[str]:
                    answered.update(each for each in questions if each not in answered and asked(address, each))
                    return [each for each in questions if each not in answered and not metrics_in(each) & NOT_TOLD]

                left = wait_for(missing, going)
                labels = [each["metric"] for each in asked(address, 'ray_mlc_train_loss{part="total"}')]
                assert {(each["run"], each["NodeAddress"]) for each in labels} == {
                    ("watched", target.partition(":")[0])
                }
    finally:
        (tmp_path / "seen").touch()
        going.join()
    how = "asked of Prometheus" if program is not None else "looked for in what Ray exposes: no Prometheus is installed"
    record_property("dashboard", how)
    print(f"the dashboard's expressions were {how}")
    assert not failures, failures
    assert not left
