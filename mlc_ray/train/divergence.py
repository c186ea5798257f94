"""A step that stays non-finite: the error that ends the run, and the file in the run's folder that says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlc_ray.errors import MlcRayError
from mlc_ray.runs import DIVERGED_FILE
from mlc_ray.storage import Place


class DivergedError(MlcRayError, FloatingPointError):
    """The loss or its gradients stay non-finite; the message names the step, its bundles and what to change.

    Args:
        message: what to tell.
        step: the optimizer step, from 1; 0 where it is not known.
        bundles: ids of all its bundles, of all workers.
    """

    def __init__(self, message: str, *, step: int = 0, bundles: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step, self.bundles = step, tuple(bundles)


def record_divergence(run_folder: Path | Place, error: DivergedError) -> None:
    """Write into a run's folder at which step it diverged, with which bundles, and what to change."""
    content = {"step": error.step, "bundles": list(error.bundles), "message": str(error)}
    (Place(run_folder) / DIVERGED_FILE).write_json(content)


def forget_divergence(run_folder: Path | Place, step: int) -> bool:
    """Remove what `record_divergence` wrote, once optimizer step `step`, which is done, is as far as that.

    Returns:
        Whether nothing is left of it.
    """
    file = Place(run_folder) / DIVERGED_FILE
    if file.is_file():
        if file.read_json()["step"] > step:
            return False
        file.remove()
    return True
