"""Metrics for Prometheus: declared once, told by Ray where it is up, and free where it is not."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlc_ray import monitoring
from mlc_ray.monitoring import METRICS, count, measure, told_of
from mlc_ray.runs import names_of
from mlc_ray.storage import Place
from mlc_ray.train.monitor import Monitor

REPOSITORY = Path(__file__).resolve().parent.parent
DASHBOARD = REPOSITORY / "cluster" / "grafana-dashboard.json"
NAMES = {metric.name: metric for metric in METRICS}


def expressions(dashboard: Any) -> list[str]:
    """Every PromQL expression of a dashboard's panels, with Grafana's own variables replaced."""
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found.append(re.sub(r"label_values\((.*), \w+\)", r"\1", variable["query"]["query"]))
    values = {"$__rate_interval": "1m", "$run": ".*", "$trial": ".*"}
    for name, value in values.items():
        found = [each.replace(name, value) for each in found]
    return found


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_mlc_\w+", expression))


def test_each_is_declared_once_and_well_named() -> None:
    assert len(NAMES) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"mlc_(train|validation|checkpoint|engine|search)s?(_[a-z]+)*", metric.name)
        assert not metric.name.endswith("_total")  # Ray puts it there
        assert ("seconds" in metric.name) <= (metric.unit == "s" or metric.name.endswith("_per_second")), metric


def test_each_is_told_somewhere_and_none_that_is_not_declared() -> None:
    told: dict[str, set[str]] = {}
    for file in (REPOSITORY / "mlc_ray").rglob("*.py"):
        if file.name == "monitoring.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = node.value if isinstance(node, ast.Constant) else None
            if isinstance(name, str) and re.fullmatch(r"mlc_(train|validation|checkpoint|engine|search)\w*", name):
                told.setdefault(name, set()).add(file.name)
    assert told.keys() == NAMES.keys()


def test_the_dashboard_shows_each_and_knows_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    shown = set().union(*map(metrics_in, expressions(dashboard)))
    assert shown == {metric.exposed for metric in METRICS}
    counters = {metric.exposed for metric in METRICS if metric.kind == "counter"}
    for expression in expressions(dashboard):
        for name in metrics_in(expression) & counters:
            assert re.search(rf"(rate|increase)\({name}\b", expression), expression
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(panel["description"] for panel in dashboard["panels"] if panel["type"] != "row")


def test_the_documents_table_is_the_declarations() -> None:
    assert monitoring.table() in (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8")


def test_without_ray_nothing_is_made_or_imported() -> None:
    code = (
        "import sys; from mlc_ray.monitoring import _made, count, measure; from mlc_ray.train.monitor import Monitor\n"
        "measure('mlc_train_loss', 1.0, part='total'); count('mlc_train_tokens', 3.0)\n"
        "assert not _made and 'ray' not in sys.modules, sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


class Told:
    """What stands in Ray's place: keeps what it is told."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def tell(self, name: str, value: float, labels: dict[str, str]) -> None:
        metric = NAMES[name]
        assert set(labels) <= set(metric.labels), (name, labels)
        key = (name, *labels.values())
        self.values[key] = value + (self.values.get(key, 0.0) if metric.kind == "counter" else 0.0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    kept = Told()
    monkeypatch.setattr(monitoring, "_tell", kept.tell)
    return kept


def test_a_worker_tells_what_is_logged(told: Told, tmp_path: Path) -> None:
    monitor = Monitor(Place(tmp_path / "mine"), 0, bundles=32, steps=10)
    monitor.log(0, {"validation/loss/total": 0.7, "validation/harmful/reward/margin": 1.0})
    for step, more in ((2, {"mfu": 0.4}), (3, {"collapse/effective_rank": math.nan})):
        monitor.log(step, {
            "loss/total": 0.5, "loss/mlc": 0.1 * step, "collapse/between_bundle_cosine": 0.9, "tokens": 100.0,
            "bundles_consumed": 32.0 + 4 * (step - 1), "data_wait_seconds": 0.5, "step_seconds": 2.0, "retries": 0.0,
            "tokens_per_second": 50.0, "peak_memory_gib": 2.0, "gradient_norm": 1.0, "learning_rate": 1e-6, **more,
        })  # fmt: skip
    assert told.values == {
        ("mlc_train_steps_planned",): 10,
        ("mlc_train_step",): 3,
        ("mlc_validation_loss", "total"): 0.7,
        ("mlc_train_loss", "total"): 0.5,
        ("mlc_train_loss", "mlc"): pytest.approx(0.3),
        ("mlc_train_collapse", "between_bundle_cosine"): 0.9,
        ("mlc_train_tokens",): 200.0,
        ("mlc_train_bundles",): 8,
        ("mlc_train_data_wait_seconds",): 1.0,
        ("mlc_train_seconds",): 4.0,
        ("mlc_train_tokens_per_second",): 50.0,
        ("mlc_train_mfu",): 0.4,
        ("mlc_train_peak_memory_bytes",): 2 * 2**30,
        ("mlc_train_gradient_norm",): 1.0,
        ("mlc_train_learning_rate",): 1e-6,
    }
    told.values.clear()
    Monitor(Place(tmp_path / "mine"), 1, bundles=0, steps=10).log(4, {"loss/total": 0.5})
    assert told.values == {("mlc_train_step",): 4}


def test_what_ray_refuses_is_warned_of_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(metric: Any) -> None:
        raise RuntimeError("no agent")

    monkeypatch.setattr(monitoring, "ray_is_up", lambda: True)
    monkeypatch.setattr(monitoring, "_works", True)
    monkeypatch.setattr(monitoring, "_made", {})
    monkeypatch.setattr(monitoring, "_make", fails)
    with caplog.at_level(logging.WARNING, "mlc_ray"):
        for _ in range(3):
            measure("mlc_train_loss", 1.0, part="total")
            count("mlc_train_tokens", 2)
    assert [record.getMessage() for record in caplog.records] == [
        "metrics are not told to Ray any more: RuntimeError: no agent"
    ]


def test_labels_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, dict[str, str]]] = []

    class Made:
        def inc(self, value: float, tags: dict[str, str]) -> None:
            seen.append((value, tags))

        set = inc

    monkeypatch.setattr(monitoring, "ray_is_up", lambda: True)
    monkeypatch.setattr(monitoring, "_works", True)
    monkeypatch.setattr(monitoring, "_made", {name: Made() for name in NAMES})
    told_of(run="mine", rank="3")
    measure("mlc_train_loss", 1, part="mlc")
    measure("mlc_train_step", 7)
    for number in (0.0, -1.0, math.nan, math.inf):
        count("mlc_train_tokens", number)
    measure("mlc_train_loss", math.nan, part="total")
    told_of()
    assert seen == [
        (1.0, {"run": "mine", "trial": "", "part": "mlc"}), (7.0, {"run": "mine", "trial": "", "rank": "3"})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("/shared/runs/mine", ("mine", "")),
        ("s3://bucket/runs/mine", ("mine", "")),
        ("s3://mine", ("mine", "")),
        ("/shared/runs/search/trials/0003", ("search", "0003")),
        ("s3://bucket/search/trials/0003/scores/step-000010", ("search", "0003")),
        ("/shared/study/cells/base-mlc-1/scores/study", ("study", "base-mlc-1")),
        ("/shared/runs/mine/scores/first", ("first", "")),
    ],
)
def test_folders_of_trials_are_called_by_their_search(folder: str, names: tuple[str, str]) -> None:
    assert names_of(Place(folder)) == names
