"""A run in the terminal: a line of progress and one table row per logged step.

The driver reads metrics.jsonl as the workers write it, or as they send it to a URL, so a slow terminal never holds up a
step. Rows are messages of
the logger `mlc_ray.train.console`, as many columns as fit the terminal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlc_ray.progress import phase, terminal_width
from mlc_ray.runs import MetricsFileError, MetricsReader
from mlc_ray.storage import Place

logger = logging.getLogger(__name__)

MEASURES = {
    "share": "mlc/leading_share",
    "between": "collapse/between_bundle_cosine",
    "rank": "collapse/effective_rank",
    "kinds": "collapse/separability",
    "margin": "reward/margin",
    "acc": "reward/accuracy",
    "lr": "learning_rate",
    "|grad|": "gradient_norm",
    "tok/s": "tokens_per_second",
    "GiB": "peak_memory_gib",
}
_VALIDATION = {
    "loss": "loss/total",
    "margin": "reward/margin",
    "accuracy": "reward/accuracy",
    "change of chosen": "log_prob/chosen_change",
    "mlc": "loss/mlc",
    "share": "mlc/leading_share",
}
# Where the terminal is too narrow for all measures, these are left out, the first one first.
_SPARED = ("kinds", "GiB", "|grad|", "lr", "rank", "tok/s", "acc", "margin", "between", "share")


class RunDisplay:
    """Shows a run while it lasts; use as a context manager around the call that trains.

    Metrics that cannot be read are warned of, once until they can be read again: they end no run.
    """

    def __init__(self, run_folder: Path | Place, total_steps: int, every: int, parts: Sequence[str]) -> None:
        self.total, self.every = total_steps, every
        self.columns = fitting(columns(parts), terminal_width())
        self.metrics = MetricsReader(run_folder)
        self.seconds = 0.5 if Place(run_folder).is_local else 5.0  # rows come every ten seconds from elsewhere
        self.shown, self.unreadable = -1, False
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.stack = ExitStack()

    def __enter__(self) -> RunDisplay:
        self.shown = max((row["step"] for row in self._read() or []), default=-1)
        logger.info(header(self.columns))
        self.phase = self.stack.enter_context(phase("training", self.total, "steps", done=max(0, self.shown)))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._update()
        self.stack.close()

    def _follow(self) -> None:
        while not self.stop.wait(self.seconds):
            self._update()

    def _read(self) -> list[dict[str, Any]] | None:
        """The rows that are new; None where they cannot be read now."""
        try:
            rows = self.metrics.read()
        except (OSError, MetricsFileError) as error:
            if not self.unreadable:
                logger.warning("steps are not shown until the metrics can be read: %s", error)
            self.unreadable = True
            return None
        self.unreadable = False
        return rows

    def _update(self) -> None:
        if (rows := self._read()) is None:
            return
        if rows and rows[-1]["step"] < self.shown:
            self.shown = rows[-1]["step"]  # a worker died and training went back to its last checkpoint
        for row in rows:
            if row["step"] > self.shown:
                self.shown = row["step"]
                if row["step"] and (row["step"] % self.every == 0 or row["step"] == self.total):
                    logger.info(table_row(row, self.columns))
                if held_out := validation_line(row):
                    logger.info(held_out)
                for warning in row.get("warnings", ()):
                    logger.warning("step %d: %s", row["step"], warning)
        self.phase.update(max(0, self.shown))


def columns(parts: Iterable[str]) -> dict[str, str]:
    """Titles of the table, and the metrics under them: the total, its parts (`loss/NAME`), then what is measured."""
    return {"loss": "loss/total", **{part.removeprefix("loss/"): part for part in parts}, **MEASURES}


def fitting(columns: Mapping[str, str], width: int | None) -> dict[str, str]:
    """The columns without the measures that `width` characters leave no place for; all of them for None."""
    kept = dict(columns)
    for name in _SPARED:
        if width is not None and len(header(kept)) >= width:
            del kept[name]
    return kept


def header(columns: Mapping[str, str]) -> str:
    """Column names of the table."""
    return "  step " + " ".join(f"{name:>8}" for name in columns)


def table_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """One step's numbers under `header`; a dash where the step has no such number."""
    return f"{row['step']:>6} " + " ".join(
        f"{_cell(row.get(key)):>{max(8, len(name))}}" for name, key in columns.items()
    )


def validation_line(row: Mapping[str, Any]) -> str:
    """What held-out bundles measured at this step, in a line; empty where they were not measured."""
    named = {title: row.get(f"validation/{name}") for title, name in _VALIDATION.items()}
    shown = ", ".join(f"{title} {_cell(value)}" for title, value in named.items() if value is not None)
    return f"{row['step']:>6} validation: {shown}" if shown else ""


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
