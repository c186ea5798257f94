"""Where a run's metrics go: metrics.jsonl always; TensorBoard, Weights & Biases and MLflow as configured.

Of a run at a URL, files are kept in the user's cache of rank 0's machine and sent there (`storage.mirror`).
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlc_ray.config import TrainConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import METRICS_FILE, MLFLOW_FILE, read_metrics
from mlc_ray.storage import Place, StorageFaultError, local_side
from mlc_ray.storage.mirror import Mirror
from mlc_ray.train.rows import EventFiles, RowFile
from mlc_ray.train.run_folder import run_id
from mlc_ray.train.watch import Watch

_TENSORBOARD = "tensorboard"


class TrackingError(MlcRayError):
    """A tracker's package is not installed, or it does not know the run any more that it is to go on with."""


def check_trackers(config: TrainConfig) -> None:
    """Check that the trackers asked for are installed: at once, not on a worker minutes later.

    Raises:
        TrackingError: One of them is not.
    """
    for package, asked in {"wandb": config.logging.wandb, "mlflow": config.logging.mlflow}.items():
        if asked is not None and importlib.util.find_spec(package) is None:
            raise TrackingError(
                f"logging.{package}={asked!r}, but {package} is not installed: pip install 'mlc_ray[{package}]'"
            )


class Tracker:
    """Writes one run's metrics; only rank 0 has one. Steps after `start_step` from an earlier try are forgotten.

    Args:
        config: the run.
        run_folder: its folder.
        start_step: the optimizer step that it goes on after.
        may_write: raises where another driver has taken the run; asked before metrics are sent to a URL.
        begins: as `Objective.begins` says, for the warning of terms that begin too early.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_folder: Path | Place,
        start_step: int,
        may_write: Callable[[], None] = lambda: None,
        *,
        begins: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        place = Place(run_folder)
        folder, self.mirror = local_side(place), None
        if not place.is_local:
            folder = folder / "tracking"
            # A run that starts anew logs all its steps again.
            self.mirror = Mirror(folder, place, (METRICS_FILE, _TENSORBOARD), may_write, unsent=bool(start_step))
        # A run that starts anew writes a row of step 0 again, where bundles are held out.
        kept = list(takewhile(lambda row: start_step and row["step"] <= start_step, read_metrics(folder)))
        held_out = config.data.validation
        self.watch = Watch(
            config.collapse,
            max_chosen_drop=held_out.max_chosen_drop if held_out else None,
            min_decision_auc=held_out.min_decision_auc if held_out else None,
            reads_decisions=config.reads_decisions,
            begins=begins,
        )
        for row in kept:
            self.watch.see(row)
        self.rows = RowFile(folder / METRICS_FILE, _bytes_of(folder / METRICS_FILE, len(kept)))
        self.events = EventFiles(folder / _TENSORBOARD, start_step) if config.logging.tensorboard else None
        self.wandb: Any = None
        self.mlflow: Any = None
        if config.logging.wandb is not None:
            import wandb

            self.wandb = wandb.init(
                project=config.logging.wandb,
                name=config.name,
                id=run_id(place),
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
                allow_val_change=True,  # what may change when a run goes on
            )
        if config.logging.mlflow is not None:
            self.mlflow = _mlflow_run(config, config.logging.mlflow, place)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one optimizer step's numbers everywhere, and `warnings` into its row where there are any."""
        row: dict[str, Any] = {"step": step, **metrics}
        warnings = self.watch.see(row)
        if retries := metrics.get("retries"):
            warnings.append(f"the loss or its gradients were not finite: tried again {retries:.0f} times")
        if warnings:
            row["warnings"] = warnings
        self.rows.append(_line(row).encode())
        if self.events is not None:
            self.events.add(step, metrics)
        if self.wandb is not None and step >= self.wandb.step:  # it takes no step twice: those after a checkpoint stay
            self.wandb.log(metrics, step=step)
        if self.mlflow is not None:
            self.mlflow.log_metrics(metrics, step=step)

    def sync(self) -> None:
        """Have the rows logged so far where the run is, on the disk itself or sent; a thread may call it.

        Raises:
            OSError: The storage does not take them; they are kept and written later.
            LeaseError: Another driver has taken the run (`may_write`).
            RowFileError: The rows are not there any more: they were removed, or another driver has its own there.
        """
        self.rows.sync()
        if self.events is not None:
            self.events.sync()
        if self.mirror is not None and not self.mirror.sync():
            raise StorageFaultError(f"metrics could not be sent to {str(self.mirror.place)!r}")
        self.rows.check()  # at the end: so it was these rows that were sent

    def close(self) -> None:
        """Flush and end."""
        self.rows.close()
        if self.events is not None:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.mlflow is not None:
            self.mlflow.end_run()
        if self.mirror is not None:
            self.mirror.close()


def _mlflow_run(config: TrainConfig, uri: str, run_folder: Place) -> Any:
    """The module `mlflow`, in which the run's own run goes on; a new one where the run had none at `uri` so far.

    MLflow makes the id, which is kept in the run's folder with the URI.

    Raises:
        TrackingError: It knows no run of that id.
    """
    import mlflow

    mlflow.set_tracking_uri(uri)
    file = run_folder / MLFLOW_FILE
    known = file.read_json() if file.is_file() else {}
    if uri not in known:
        mlflow.set_experiment(config.logging.mlflow_experiment or config.name)
        known[uri] = mlflow.start_run(run_name=config.name).info.run_id
        file.write_json(known)
    else:
        try:
            mlflow.start_run(run_id=known[uri])
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST" and "deleted" not in str(error):
                raise  # the server does not answer: another try may find it
            raise TrackingError(
                f"logging.mlflow={uri!r} has no run {known[uri]!r}, which {str(file)!r} names ({error}): restore it "
                "there, or remove the file to log into a new one"
            ) from None
    mlflow.log_dict(config.model_dump(mode="json"), "config.json")
    return mlflow


def _line(row: dict[str, Any]) -> str:
    """A row as JSON, which has no numbers that are not finite: they become null."""
    whole = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(whole, allow_nan=False) + "\n"


def _bytes_of(path: Path, lines: int) -> int:
    """How many bytes the first `lines` lines of a file take."""
    if not lines:
        return 0
    with path.open("rb") as file:
        return sum(len(next(file)) for _ in range(lines))
