"""What Ray Train's controller is handed: the settings of a run's workers, and the function that each of them calls.

The controller and the process of a trial unpickle both and need none of what a worker imports, which takes seconds: so
that is imported by the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mlc_ray.storage import Place
from mlc_ray.train.failures import own_errors


class CheckpointScorer(Protocol):
    """Called on the first worker after every checkpoint while the others wait; its numbers are reported to Ray."""

    def __call__(self, run_folder: Place, checkpoint: Place, step: int) -> dict[str, float]:
        """Numbers about `checkpoint`, written at optimizer step `step`."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Where the tokens of held-out bundles are, and what the reference says of them."""

    tokens_folder: Place
    reference_folder: Place | None


@dataclass(frozen=True)
class WorkerSpec:
    """What the driver tells its workers: the run's `config` as JSON has it, the id of the `lease` on its folder."""

    config: dict[str, Any]
    run_folder: Place
    tokens_folder: Place
    reference_folder: Place | None
    fingerprints: dict[str, str]
    total_steps: int
    lease: str
    score: CheckpointScorer | None
    held_out: HeldOut | None = None


def train_worker(told: dict[str, WorkerSpec]) -> None:
    """One process per GPU. Raises an `MlcRayError` unwrapped: causes are lost between processes."""
    from mlc_ray.train.worker import work

    with own_errors():
        work(told["spec"])
