"""Where a run's numbers go: metrics.jsonl always; TensorBoard, Weights & Biases and MLflow as configured."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlc_ray.config import TrainConfig
from mlc_ray.errors import MlcRayError

METRICS_FILE = "metrics.jsonl"


class TrackingError(MlcRayError):
    """A tracker was asked for whose package is not installed."""


def check_trackers(config: TrainConfig) -> None:
    """Raise `TrackingError` at once, not on a worker minutes later, if an asked-for tracker is not installed."""
    for package, asked in {"wandb": config.logging.wandb, "mlflow": config.logging.mlflow}.items():
        if asked is not None and importlib.util.find_spec(package) is None:
            raise TrackingError(
                f"logging.{package}={asked!r}, but {package} is not installed: pip install 'mlc_ray[{package}]'"
            )


class Tracker:
    """Writes one run's metrics; only rank 0 has one. Steps after `start_step` from an earlier try are forgotten."""

    def __init__(self, config: TrainConfig, run_folder: Path, start_step: int) -> None:
        self.run_folder = run_folder
        kept = [row for row in read_metrics(run_folder) if row["step"] <= start_step]
        self.file = (run_folder / METRICS_FILE).open("w", encoding="utf-8")
        for row in kept:
            self._write(row)
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.mlflow: Any = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run_folder / "tensorboard"), purge_step=start_step + 1)
        if config.logging.wandb is not None:
            import wandb

            self.wandb = wandb.init(
                project=config.logging.wandb,
                name=config.name,
                id=config.name,
                resume="allow",
                dir=str(run_folder),
                config=config.model_dump(mode="json"),
            )
        if config.logging.mlflow is not None:
            import mlflow

            mlflow.set_tracking_uri(config.logging.mlflow)
            mlflow.set_experiment("mlc_ray")
            self.mlflow = mlflow
            mlflow.start_run(run_name=config.name)
            mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one optimizer step's numbers everywhere."""
        self._write({"step": step, **metrics})
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if self.mlflow is not None:
            self.mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        """Flush and end."""
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.mlflow is not None:
            self.mlflow.end_run()

    def _write(self, row: dict[str, float]) -> None:
        # NaN (no gradient norm, one bundle only) is not JSON: it is written as null
        clean = {name: value if value == value else None for name, value in row.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()


def read_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a run's metrics file so far; a last line still being written is left for the next call."""
    path = run_folder / METRICS_FILE
    if not path.exists():
        return iter(())
    text = path.read_text(encoding="utf-8")
    return iter([json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()])
