"""A step that stays non-finite: the error that ends the run, and the file in the run's folder that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mlc_ray.errors import MlcRayError
from mlc_ray.runs import DIVERGED_FILE
from mlc_ray.storage import write_json_atomic


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


def record_divergence(run_folder: Path, error: DivergedError) -> None:
    """Write into a run's folder at which step it diverged, with which bundles, and what to change."""
    content = {"step": error.step, "bundles": list(error.bundles), "message": str(error)}
    write_json_atomic(run_folder / DIVERGED_FILE, content)


def forget_divergence(run_folder: Path, step: int) -> None:
    """Remove what `record_divergence` wrote, once optimizer step `step`, which is done, is as far as that."""
    file = run_folder / DIVERGED_FILE
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["step"] <= step:
        file.unlink()
