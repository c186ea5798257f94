"""A run as seen in the terminal: a progress bar and one table row per logged step.

The driver reads metrics.jsonl as the workers write it, so a slow terminal never holds up a step.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlc_ray.runs import MetricsReader

COLUMNS = {
    "loss": "loss/total",
    "align": "loss/alignment",
    "mlc": "loss/mlc",
    "anti": "loss/anti_collapse",
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
    "anti: the anti-collapse term, where there is one; share: s1^2/sum s^2 within bundles; "
    "between: mean |cosine| between different bundles (near 1 = collapse); "
    "rank: effective rank of bundle means; kinds: AUC of harmful against benign states"
)


class RunDisplay:
    """Shows a run while it lasts; use as a context manager around the call that trains."""

    def __init__(self, run_folder: Path, total_steps: int, every: int, console: Console | None = None) -> None:
        self.total, self.every = total_steps, every
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
        self.console.print(header(), style="bold", highlight=False, soft_wrap=True)
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
                    self.progress.console.print(table_row(row), highlight=False, soft_wrap=True)
                for warning in row.get("warnings", ()):
                    text = f"  step {row['step']}: {warning}"
                    self.progress.console.print(
                        text, style="bold yellow", highlight=False, soft_wrap=True, markup=False
                    )
        self.progress.update(self.bar, completed=self.shown)


def header() -> str:
    """Column names of the table."""
    return "  step " + " ".join(f"{name:>8}" for name in COLUMNS)


def table_row(row: dict[str, Any]) -> str:
    """One step's numbers under `header`; a dash where the step has no such number."""
    return f"{row['step']:>6} " + " ".join(f"{_cell(row.get(key)):>8}" for key in COLUMNS.values())


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
