"""The training loop. It knows neither Ray nor where batches and checkpoints go: those are handed in."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlc_ray.config import TrainConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.measures import between_bundle_cosine, effective_rank
from mlc_ray.losses.objective import Objective
from mlc_ray.train.engines.deepspeed import backward_and_step, learning_rate, set_learning_rate
from mlc_ray.train.model import ModelOutput
from mlc_ray.train.reference import Reference, ReferenceOutput
from mlc_ray.train.watch import StateWindow
from mlc_ray.train.workers import distributed, gather, gather_round
from mlc_ray.types import Batch, LossOutput, move

Metrics = dict[str, float]


class DivergedError(MlcRayError, FloatingPointError):
    """The loss is no longer finite; the message names the step and what to lower or change."""


@dataclass
class Progress:
    """Where a run is: optimizer steps done, and bundles consumed by all workers (padding not counted)."""

    step: int = 0
    bundles: int = 0


def train_loop(
    config: TrainConfig,
    *,
    engine: Any,
    batches: Iterator[Batch],
    reference: Reference | None,
    progress: Progress,
    total_steps: int,
    device: torch.device,
    log: Callable[[int, Metrics], None],
    save: Callable[[Progress, Metrics], None],
) -> Metrics:
    """Run optimizer steps `progress.step` .. `total_steps`; returns the last step's metrics.

    `batches` yields this worker's micro-batches in order. `log(step, metrics)` runs after every step and
    `save(progress, metrics)` every `checkpoint.every` steps and at the end, both on every worker.
    """
    objective = Objective(config)
    window = StateWindow(config.collapse.window)
    engine.train()
    metrics: Metrics = {}
    while progress.step < total_steps:
        step, started = progress.step, time.perf_counter()
        tap = objective.taps(step)
        rate = learning_rate(step, total_steps, config.optimizer)
        set_learning_rate(engine, rate)
        meter = StepMeter()
        for _ in range(config.train.gradient_accumulation_steps):
            batch = move(next(batches), device)
            frozen = ReferenceOutput()
            if reference is not None and (objective.needs_reference_log_probs or tap):
                frozen = reference(batch, tap)
            output: ModelOutput = engine(batch, tap=tap)
            together = None
            if objective.needs_round and output.representations is not None and output.present is not None:
                together = gather_round(output.representations, output.present, batch.weight)
            result = objective.total_loss(
                weight=batch.weight,
                chosen=output.chosen,
                rejected=output.rejected,
                reference_chosen=frozen.chosen,
                reference_rejected=frozen.rejected,
                reference_state=frozen.state,
                representations=output.representations,
                present=output.present,
                tapped=output.tapped,
                together=together,
            )
            norm = backward_and_step(engine, result.loss)
            meter.add(batch, output, result)
            if window.size and output.tapped is not None and output.present is not None:
                window.add(output.tapped, output.present, batch)
        metrics = meter.reduce()
        if not math.isfinite(metrics["loss/total"]):
            raise DivergedError(
                f"loss/total is {metrics['loss/total']} at step {step + 1}; lower optimizer.learning_rate={rate:.3g} "
                "or use model.dtype=float32"
            )
        if tap and not math.isnan(separability := window.separability()):
            metrics["collapse/separability"] = separability
        progress.step += 1
        progress.bundles += int(metrics.pop("bundles"))
        seconds = time.perf_counter() - started
        metrics |= {
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": metrics["tokens"] / seconds,
            "step_seconds": seconds,
            "peak_memory_gib": peak_memory_gib(device),
            "bundles_consumed": float(progress.bundles),
        }
        log(progress.step, metrics)
        last = progress.step == total_steps
        if last or (config.checkpoint.every is not None and progress.step % config.checkpoint.every == 0):
            save(progress, metrics)
    return metrics


@dataclass
class StepMeter:
    """Adds up one optimizer step's numbers over micro-batches, then over workers.

    Every number is a mean over the *real* bundles of the whole round: padding bundles (weight 0) are left out.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    grids: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, batch: Batch, output: ModelOutput, result: LossOutput) -> None:
        """Take in one micro-batch."""
        real = (batch.weight > 0).double()
        self._accumulate("bundles", real.sum())
        for name, values in result.metrics.items():
            self._accumulate(name, (values.double() * real).sum())
        self.tokens += batch.chosen.sequences.input_ids.numel()
        self.tokens += batch.rejected.sequences.input_ids.numel() if batch.rejected is not None else 0
        if output.representations is not None and output.present is not None:
            self.tokens += batch.prompts.sequences.input_ids.numel()
            self.grids.append(output.representations.detach())
            self.masks.append(output.present & (batch.weight > 0).unsqueeze(1))

    def reduce(self) -> Metrics:
        """Means over all workers' bundles; the same on every worker, which must all call it."""
        names = list(self.sums)
        device = self.sums["bundles"].device
        packed = torch.stack([*self.sums.values(), torch.tensor(float(self.tokens), device=device).double()])
        if distributed():
            dist.all_reduce(packed)
        totals = dict(zip([*names, "tokens"], packed.tolist(), strict=True))
        bundles, tokens = totals.pop("bundles"), totals.pop("tokens")
        metrics = {name: value / bundles for name, value in totals.items()}
        if self.grids:
            grid, mask = gather(torch.cat(self.grids)), gather(torch.cat(self.masks))
            rank, share = effective_rank(grid, mask)
            metrics["collapse/between_bundle_cosine"] = float(between_bundle_cosine(grid, mask))
            metrics["collapse/effective_rank"] = float(rank)
            metrics["collapse/effective_rank_share"] = float(share)
        return {**dict(sorted(metrics.items())), "bundles": bundles, "tokens": tokens}

    def _accumulate(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far, in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
