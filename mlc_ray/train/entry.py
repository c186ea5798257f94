"""What Ray Train's controller is handed: what workers are told, and the function that each of them calls.

The controller and the process of a trial unpickle both and need none of what a worker imports, which takes seconds: so
that is imported by the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mlc_ray.storage import Place
from mlc_ray.train.failures import own_errors


class WeightsScorer(Protocol):
    """Called on the first worker with published weights while the others wait; its numbers are reported to Ray."""

    @property
    def every(self) -> int | None:
        """Optimizer steps between scores; None: the last step's weights alone are scored, as they always are."""
        ...

    @property
    def keep_state(self) -> bool:
        """Whether the run is to end with a checkpoint, too."""
        ...

    def __call__(self, run_folder: Place, weights: Place, step: int) -> dict[str, float]:
        """Numbers about the folder of `weights`, written at optimizer step `step`."""
        ...


@dataclass(frozen=True)
class LastWeights:
    """A `WeightsScorer` that scores nothing: a run whose last weights alone are asked for, without optimizer states."""

    keep_state: bool = False
    every: int | None = None

    def __call__(self, run_folder: Place, weights: Place, step: int) -> dict[str, float]:
        """No numbers."""
        return {}


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
    score: WeightsScorer | None
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Asked:
    """A token artefact that the reference is asked about, the folder of what it says, and that artefact's key."""

    tokens_folder: Place
    folder: Place
    key: str


@dataclass(frozen=True)
class ReferenceSpec:
    """What the driver tells the workers of a reference pass.

    `config` is the run's as JSON has it, `layer` the one whose states are kept where they are needed, `folder` where
    hangs are told of, and `id` the pass's own, which they bear.
    """

    config: dict[str, Any]
    layer: int
    asked: tuple[Asked, ...]
    folder: Place
    id: str


def train_worker(told: dict[str, WorkerSpec]) -> None:
    """One process per GPU. Raises an `MlcRayError` unwrapped: causes are lost between processes."""
    from mlc_ray.train.worker import work

    with own_errors():
        work(told["spec"])


def reference_worker(told: dict[str, ReferenceSpec]) -> None:
    """One process per GPU, as for training; errors as there."""
    from mlc_ray.train.reference_pass import work

    with own_errors():
        work(told["spec"])
