"""What runs, scores and searches tell of themselves while they last, for Prometheus: by Ray's metrics, where Ray is up.

`METRICS` declares each one; the table in docs/monitoring.md and the panels of cluster/grafana-dashboard.json are
checked against it. Ray exposes them on each node's metrics port, with `ray_` in front, `_total` behind a counter's
name, and the labels NodeAddress and WorkerId. Of a process without Ray nothing is told, at the cost of one look; where
telling fails, a warning says so once, and nothing else happens. Values are those that the caller has on the host.

There are no histograms: Ray 2.60 passes observations on as the middle of their bucket (0.5 in a bucket of 0.1 to 1
became a sum of 0.55). Seconds are counters, so that their rate is a share of the time.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

RUN = ("run", "trial")
"""Labels of every metric: what runs by the name of its folder, and which trial or cell of it that is, or nothing."""


@dataclass(frozen=True)
class Metric:
    """A declared metric; `labels` are those beside `RUN`."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def exposed(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


METRICS = (
    Metric("mlc_train_step", "gauge", "steps", "Last optimizer step that the worker ended.", ("rank",)),
    Metric("mlc_train_steps_planned", "gauge", "steps", "Optimizer steps of the run."),
    Metric("mlc_train_bundles", "counter", "bundles", "Bundles consumed; those of a step taken again count again."),
    Metric("mlc_train_tokens", "counter", "tokens", "Tokens forwarded, over all workers."),
    Metric("mlc_train_tokens_per_second", "gauge", "tokens/s", "Of the last step, over all workers."),
    Metric("mlc_train_tflops_per_second", "gauge", "1e12 FLOP/s", "Useful operations of the last step, of a worker."),
    Metric("mlc_train_mfu", "gauge", "share", "The same over the GPU's peak; only where that is known."),
    Metric("mlc_train_seconds", "counter", "s", "Time in optimizer steps."),
    Metric("mlc_train_data_wait_seconds", "counter", "s", "Of that, what the slowest worker waited for its batches."),
    Metric("mlc_train_retries", "counter", "tries", "Further tries of steps that were not finite."),
    Metric("mlc_train_learning_rate", "gauge", "", "Of the last step."),
    Metric("mlc_train_gradient_norm", "gauge", "", "Before clipping, of the last step."),
    Metric("mlc_train_peak_memory_bytes", "gauge", "bytes", "The most that a worker has held, on its GPU if any."),
    Metric("mlc_train_loss", "gauge", "", "Loss of the last step: the total, and each part unweighted.", ("part",)),
    Metric("mlc_train_collapse", "gauge", "", "Measures of collapse, as docs/collapse.md defines them.", ("measure",)),
    Metric("mlc_validation_loss", "gauge", "", "Loss of held-out bundles when they were last measured.", ("part",)),
    Metric(
        "mlc_checkpoint_seconds", "counter", "s",
        "Of a worker in checkpoints: `copy`, while training stands still; `upload`, writing its files, on a disk too; "
        "`complete`, adding the manifest.", ("rank", "phase"),
    ),
    Metric("mlc_checkpoint_bytes", "counter", "bytes", "Written into checkpoints, by worker.", ("rank",)),
    Metric("mlc_checkpoints", "counter", "checkpoints", "How each ended: `saved` or `failed`.", ("outcome",)),
    Metric(
        "mlc_engines", "gauge", "processes",
        "Engines and light actors of a pool, by state: `starting`, `working`, `idle`, `gone`.", ("part", "state"),
    ),
    Metric(
        "mlc_engine_failures", "counter", "failures", "Why one ended: `died`, `hung`, `failed`.", ("part", "reason")
    ),
    Metric("mlc_engine_restarts", "counter", "starts", "Starts of one that was gone.", ("part",)),
    Metric("mlc_engine_blocks_in_flight", "gauge", "blocks", "Blocks of rows that are being worked on.", ("part",)),
    Metric("mlc_engine_rows_left", "gauge", "rows", "Rows that are there and not done.", ("part",)),
    Metric("mlc_engine_rows", "counter", "rows", "Rows done: prompts, responses, translations.", ("part",)),
    Metric("mlc_engine_rows_given_up", "counter", "rows", "Rows on which engines fail alone.", ("part",)),
    Metric("mlc_engine_tokens", "counter", "tokens", "Tokens of the answers.", ("part",)),
    Metric("mlc_search_trials", "gauge", "trials", "Trials by state: `ended`, `running`, `failed`.", ("state",)),
    Metric("mlc_search_trials_planned", "gauge", "trials", "Trials of the search."),
)  # fmt: skip

_DECLARED = {metric.name: metric for metric in METRICS}
_labels: dict[str, str] = {}
_made: dict[str, Any] = {}
_works = True


def told_of(**labels: str) -> None:
    """What this process tells of from now on: `run`, `trial`, `rank`; a label left out is empty."""
    _labels.clear()
    _labels.update(labels)


def count(name: str, by: float = 1.0, **labels: str) -> None:
    """Add to a counter; nothing happens for 0, less, or what is not finite."""
    if by > 0 and math.isfinite(by):
        _tell(name, by, labels)


def measure(name: str, value: float | None, **labels: str) -> None:
    """Set a gauge; what is not finite, or None, leaves it as it is."""
    if value is not None and math.isfinite(value):
        _tell(name, value, labels)


def _tell(name: str, value: float, labels: Mapping[str, str]) -> None:
    metric = _DECLARED[name]
    global _works
    if not _works or not ray_is_up():
        return
    try:
        made = _made[name] if name in _made else _made.setdefault(name, _make(metric))
        tags = {label: labels.get(label, _labels.get(label, "")) for label in (*RUN, *metric.labels)}
        (made.inc if metric.kind == "counter" else made.set)(float(value), tags=tags)
    except Exception as error:  # whatever Ray's inner parts raise: nothing that is told is worth a run
        _works = False
        logger.warning("metrics are not told to Ray any more: %s: %s", type(error).__name__, error)


def ray_is_up() -> bool:
    """Whether this process is in a Ray cluster; Ray is not imported for it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _make(metric: Metric) -> Any:
    from ray.util.metrics import Counter, Gauge

    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, f"{metric.help} [{metric.unit or 'no unit'}]", (*RUN, *metric.labels))


def table() -> str:
    """All metrics as a table in Markdown."""
    rows = []
    for each in METRICS:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(f"| `{each.exposed}` | {labels or '–'} | {each.unit or '–'} | {each.help} |")
    return "\n".join(["| metric | further labels | unit | |", "|---|---|---|---|", *rows])
