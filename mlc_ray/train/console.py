"""A run as seen in the terminal: a progress bar and one table row per logged step.

The driver reads metrics.jsonl as the workers write it, so a slow terminal never holds up a step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlc_ray.runs import MetricsReader

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
LEGEND = (
    "loss: the total, and its parts without their weights; share: s1^2/sum s^2 within bundles; "
    "between: mean |cosine| between different bundles (near 1 = collapse); "
    "rank: effective rank of bundle means; kinds: AUC of harmful against benign states"
)


class RunDisplay:
    """Shows a run while it lasts; use as a context manager around the call that trains."""

    def __init__(
        self, run_folder: Path, total_steps: int, every: int, parts: Sequence[str], console: Console | None = None
    ) -> None:
        self.total, self.every = total_steps, every
        self.columns = columns(parts)
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,  # a log file gets the rows alone
        )
        self.bar = self.progress.add_task("training", total=total_steps)
        self.metrics = MetricsReader(run_folder)
        self.shown = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> RunDisplay:
        self.shown = max((row["step"] for row in self.metrics.read()), default=0)
        self.console.print(LEGEND, style="dim", highlight=False, soft_wrap=True)
        self.console.print(header(self.columns), style="bold", highlight=False, soft_wrap=True)
        self.progress.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._update()
        self.progress.stop()

    def _follow(self) -> None:
        while not self.stop.wait(0.5):
            self._update()

    def _update(self) -> None:
        rows = self.metrics.read()
        if rows and rows[-1]["step"] < self.shown:
            self.shown = rows[-1]["step"]  # a worker died and training went back to its last checkpoint
        for row in rows:
            if row["step"] > self.shown:
                self.shown = row["step"]
                if row["step"] % self.every == 0 or row["step"] == self.total:
                    self.progress.console.print(table_row(row, self.columns), highlight=False, soft_wrap=True)
                for warning in row.get("warnings", ()):
                    text = f"  step {row['step']}: {warning}"
                    self.progress.console.print(
                        text, style="bold yellow", highlight=False, soft_wrap=True, markup=False
                    )
        self.progress.update(self.bar, completed=self.shown)


def columns(parts: Iterable[str]) -> dict[str, str]:
    """Titles of the table, and the metrics under them: the total, its parts (`loss/NAME`), then what is measured."""
    return {"loss": "loss/total", **{part.removeprefix("loss/"): part for part in parts}, **MEASURES}


def header(columns: Mapping[str, str]) -> str:
    """Column names of the table."""
    return "  step " + " ".join(f"{name:>8}" for name in columns)


def table_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """One step's numbers under `header`; a dash where the step has no such number."""
    return f"{row['step']:>6} " + " ".join(
        f"{_cell(row.get(key)):>{max(8, len(name))}}" for name, key in columns.items()
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
