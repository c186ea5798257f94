"""The training loop. It does not depend on Ray, nor on where batches come from and checkpoints go: it is given both."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mlc_ray.config import OptimizerSection, TrainConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.objective import Objective
from mlc_ray.train.collectives import distributed, gather_objects, gather_round
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.model import ModelOutput
from mlc_ray.train.random_state import random_state, restore_random_state
from mlc_ray.train.reference import Reference, ReferenceOutput
from mlc_ray.train.watch import StateWindow, TappedStep
from mlc_ray.types import Batch, LossOutput, move

Metrics = dict[str, float]

logger = logging.getLogger(__name__)
_MOST_NAMED = 50


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


@dataclass
class Progress:
    """Where a run is: optimizer steps done, and bundles consumed by all workers (padding not counted)."""

    step: int = 0
    bundles: int = 0


def train_loop(
    config: TrainConfig,
    *,
    engine: Engine,
    batches: Iterator[Batch],
    reference: Reference | None,
    progress: Progress,
    total_steps: int,
    kinds: Collection[str],
    log: Callable[[int, Metrics], None],
    save: Callable[[Progress, Metrics], None],
) -> Metrics:
    """Run optimizer steps `progress.step` .. `total_steps`; returns the last step's metrics.

    A step whose loss or gradients are not finite, on any worker, does not count: weights, optimizer state, position and
    schedule do not change, random numbers are set back, and the same batches are tried again.

    Args:
        config: the run.
        engine: what trains.
        batches: this worker's micro-batches in order, made for steps that tap or do not as the objective says.
        reference: what the frozen reference says; None where the loss needs none.
        progress: where to start; moved on with every step.
        total_steps: where to stop.
        kinds: of the bundles, all that occur: only where there are both, states are kept for the probe.
        log: called as `log(step, metrics)` after every step, on every worker.
        save: called as `save(progress, metrics)` every `checkpoint.every` steps and at the end, on every worker.

    Raises:
        DivergedError: on every worker, when `optimizer.max_retries` more tries of a step failed; nothing is saved then.
    """
    objective = Objective(config)
    window = StateWindow(config.collapse.window if len(set(kinds)) > 1 else 0)
    engine.module.train()
    metrics: Metrics = {}
    while progress.step < total_steps:
        started = time.perf_counter()
        rate = learning_rate(progress.step, total_steps, config.optimizer)
        micro_batches = [next(batches) for _ in range(config.train.gradient_accumulation_steps)]
        taps = objective.taps(progress.step)
        if any(batch.taps is not taps for batch in micro_batches):
            raise ValueError(f"step {progress.step + 1} taps: {taps}, but not all its batches were made for that")
        before = random_state()
        for retries in range(config.optimizer.max_retries + 1):
            restore_random_state(before)
            meter = StepMeter(TappedStep(config.collapse.sample, window))
            _accumulate(engine, objective, micro_batches, reference, meter)
            norm = engine.step(rate)
            if math.isfinite(norm):
                break
            if engine.rank == 0 and retries < config.optimizer.max_retries:
                logger.warning(
                    "step %d: the loss or its gradients are not finite (try %d of %d); its batches are tried again",
                    progress.step + 1, retries + 1, config.optimizer.max_retries + 1,
                )  # fmt: skip
        else:
            raise _diverged(config, progress.step + 1, rate, micro_batches, meter)
        metrics = meter.reduce() | meter.tapped.measure(f"{config.seed} {progress.step}")
        progress.step += 1
        progress.bundles += int(metrics.pop("bundles"))
        seconds = time.perf_counter() - started
        metrics |= {
            "learning_rate": rate,
            "gradient_norm": norm,
            "retries": float(retries),
            "tokens_per_second": metrics["tokens"] / seconds,
            "step_seconds": seconds,
            "peak_memory_gib": peak_memory_gib(engine.device),
            "bundles_consumed": float(progress.bundles),
        }
        log(progress.step, metrics)
        last = progress.step == total_steps
        if last or (config.checkpoint.every is not None and progress.step % config.checkpoint.every == 0):
            save(progress, metrics)
    return metrics


def _accumulate(
    engine: Engine,
    objective: Objective,
    micro_batches: Sequence[Batch],
    reference: Reference | None,
    meter: StepMeter,
) -> None:
    """Forward and backward of one optimizer step's micro-batches; `meter` takes in what they give."""
    for on_host in micro_batches:
        batch = move(on_host, engine.device)
        frozen = ReferenceOutput()
        if reference is not None and (objective.needs_reference_log_probs or batch.taps):
            frozen = reference(batch)
        output = engine.forward(batch)
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
        engine.backward(_with_telling_gradient(result.loss, output.chosen.total))
        meter.add(batch, output, result)


def _with_telling_gradient(loss: Tensor, log_probs: Tensor) -> Tensor:
    """`loss`, whose gradient is not finite where the loss itself is not.

    A loss can be infinite where its gradient is finite (a clamped logarithm). NaN times the log-probs, which depend on
    every weight, then tells all workers through the norm of the gradients, which they share anyway. Adding 0 changes
    no bit.
    """
    return loss + torch.where(loss.detach().isfinite(), 0.0, torch.nan).to(loss.dtype) * log_probs.sum()


def _diverged(
    config: TrainConfig, step: int, rate: float, micro_batches: Sequence[Batch], meter: StepMeter
) -> DivergedError:
    """The error message for a step that failed every time; every worker calls it, and all get the same."""
    own = [
        name for batch in micro_batches for name, w in zip(batch.bundle_ids, batch.weight.tolist(), strict=True) if w
    ]
    bundles = [name for part in gather_objects(own) for name in part]
    broken = [name for part in gather_objects(meter.broken) for name in part]
    named = f"bundles {_listed(bundles)}"
    if broken:
        named += f", of which the loss of {_listed(broken)} is not finite already in the forward"
    changes = [f"lower optimizer.learning_rate (now {rate:.3g} here)", "look at these bundles"]
    if config.model.dtype != "float32":
        changes.insert(1, "use model.dtype=float32")
    return DivergedError(
        f"step {step}: the loss or its gradients are not finite, after {config.optimizer.max_retries + 1} tries "
        f"(optimizer.max_retries={config.optimizer.max_retries}), with {named}. The last checkpoint is from before; "
        f"start a new run: {', '.join(changes[:-1])}, or {changes[-1]}",
        step=step,
        bundles=bundles,
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown


def learning_rate(step: int, total: int, settings: OptimizerSection) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`; a pure function, so resuming needs no state.

    Linear warm-up over ceil(warmup_ratio * total) steps, then constant, or down to 0 at `total` by line or half cosine.
    """
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * factor[settings.schedule]


@dataclass
class StepMeter:
    """Adds up one optimizer step's numbers over micro-batches, then over workers.

    Every number is a mean over the *real* bundles of the whole round: padding bundles (weight 0) are left out.
    """

    tapped: TappedStep
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    losses: list[tuple[list[str], Tensor]] = field(default_factory=list)

    def add(self, batch: Batch, output: ModelOutput, result: LossOutput) -> None:
        """Add one micro-batch."""
        real = (batch.weight > 0).double()
        self._accumulate("bundles", real.sum())
        for name, values in result.metrics.items():
            self._accumulate(name, (values.double() * real).sum())
        finite = [values.isfinite() for name, values in result.metrics.items() if name.startswith("loss/")]
        self.losses.append((list(batch.bundle_ids), torch.stack(finite).all(dim=0) | (real == 0)))
        self.tokens += batch.tree.tokens
        self.tapped.add(batch, output)

    @property
    def broken(self) -> list[str]:
        """This worker's bundles with a loss that is not finite."""
        return [name for names, fine in self.losses for name, ok in zip(names, fine.tolist(), strict=True) if not ok]

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
        return {**dict(sorted(metrics.items())), "bundles": bundles, "tokens": tokens}

    def _accumulate(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far, in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
