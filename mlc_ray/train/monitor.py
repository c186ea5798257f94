"""What a training worker tells of itself while it trains (`mlc_ray.monitoring`), from the numbers of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping

from mlc_ray.monitoring import count, measure, told_of
from mlc_ray.runs import names_of
from mlc_ray.storage import Place

_COUNTED = {
    "tokens": "mlc_train_tokens",
    "step_seconds": "mlc_train_seconds",
    "data_wait_seconds": "mlc_train_data_wait_seconds",
    "retries": "mlc_train_retries",
}
_MEASURED = {
    "tokens_per_second": "mlc_train_tokens_per_second",
    "tflops_per_second": "mlc_train_tflops_per_second",
    "mfu": "mlc_train_mfu",
    "learning_rate": "mlc_train_learning_rate",
    "gradient_norm": "mlc_train_gradient_norm",
}
_PARTS = {
    "loss/": ("mlc_train_loss", "part"),
    "collapse/": ("mlc_train_collapse", "measure"),
    "validation/loss/": ("mlc_validation_loss", "part"),
}


class Monitor:
    """Tells of one worker of a run: rank 0 of all that is logged, the others how far they are.

    Args:
        run_folder: its folder.
        rank: the worker's.
        bundles: consumed before it began.
        steps: of the whole run.
    """

    def __init__(self, run_folder: Place, rank: int, *, bundles: int, steps: int) -> None:
        self.rank, self.bundles = rank, bundles
        run, trial = names_of(run_folder)
        told_of(run=run, trial=trial, rank=str(rank))
        if rank == 0:
            measure("mlc_train_steps_planned", steps)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell of one optimizer step, or of held-out bundles before the first one (step 0)."""
        measure("mlc_train_step", step)
        if self.rank:
            return
        for name, value in metrics.items():
            if name in _COUNTED:
                count(_COUNTED[name], value)
            elif name in _MEASURED:
                measure(_MEASURED[name], value)
            else:
                for prefix, (metric, label) in _PARTS.items():
                    if name.startswith(prefix):
                        measure(metric, value, **{label: name.removeprefix(prefix)})
        if (memory := metrics.get("peak_memory_gib")) is not None:
            measure("mlc_train_peak_memory_bytes", memory * 2**30)
        if (bundles := metrics.get("bundles_consumed")) is not None:
            count("mlc_train_bundles", bundles - self.bundles)
            self.bundles = int(bundles)
