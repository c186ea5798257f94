"""The training loop. It does not depend on Ray, nor on where batches come from and checkpoints go: it is given both."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from mlc_ray.config import OptimizerSection, TrainConfig
from mlc_ray.device import peak_tflops
from mlc_ray.losses.base import Decisions, Kept, refusal_log_odds
from mlc_ray.losses.objective import Objective
from mlc_ray.train.collectives import gather_objects
from mlc_ray.train.divergence import DivergedError
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.flops import Work
from mlc_ray.train.meter import Metrics, StepMeter
from mlc_ray.train.model import ModelOutput
from mlc_ray.train.preemption import Notice, ended_by
from mlc_ray.train.random_state import random_state, restore_random_state
from mlc_ray.train.reference import Reference, ReferenceOutput
from mlc_ray.train.slow import SlowWorkers, Stopwatch
from mlc_ray.train.watch import StateWindow, TappedStep
from mlc_ray.types import Batch, LossOutput, move

logger = logging.getLogger(__name__)
_MOST_NAMED = 50


@dataclass
class Progress:
    """Where a run is: optimizer steps done, and bundles consumed; how they were cut, and for how many, is not in it.

    `before` are the log-probs of held-out answers before the first step, by the names of their means.
    """

    step: int = 0
    bundles: int = 0
    before: Metrics = field(default_factory=dict)


class Saves(Protocol):
    """What saves checkpoints. Every worker calls `save`, `score`, `settle` and `finish` after the same steps."""

    @property
    def at_the_end(self) -> bool:
        """Whether a run ends with a checkpoint; of a trial of a search only its weights are asked for."""
        ...

    def save(self, progress: Progress, metrics: Metrics, *, wait: bool, needed: bool) -> bool:
        """Save a checkpoint; with `wait`, return when it is there. One that is `needed` must be, or this raises.

        Returns:
            Whether it is there or being written, the same on every worker.
        """
        ...

    def score(self, progress: Progress, *, last: bool) -> None:
        """Called after every step, behind `save`: where it is due, publish the weights and have them scored."""
        ...

    def writes(self) -> bool:
        """Whether this worker still writes one."""
        ...

    def settle(self) -> None:
        """Called after a step at which no worker wrote."""
        ...

    def finish(self) -> None:
        """Wait for what is being written."""
        ...


def train_loop(
    config: TrainConfig,
    *,
    engine: Engine,
    steps: Iterator[Sequence[Batch]],
    reference: Reference | None,
    progress: Progress,
    total_steps: int,
    kinds: Collection[str],
    validate: Callable[[], Metrics] | None = None,
    noticed: Callable[[], Notice] = lambda: Notice.NONE,
    log: Callable[[int, Metrics], None],
    saves: Saves,
) -> Metrics:
    """Run optimizer steps `progress.step` .. `total_steps`; returns the last step's metrics.

    A step whose loss or gradients are not finite, on any worker, does not count: weights, optimizer state, position and
    schedule do not change, random numbers are set back, and the same batches are tried again.

    Args:
        config: the run.
        engine: what trains.
        steps: this worker's micro-batches of each step, as many as each other worker's, tapping as the objective says.
        reference: what the frozen reference says; None where the loss needs none.
        progress: where to start; moved on with every step.
        total_steps: where to stop.
        kinds: of the bundles, all that occur: only where there are both, states are kept for the probe.
        validate: measures held-out bundles, on every worker: before the first step, every `data.validation.every`
            steps, before a term begins that relates languages, and at the end.
        noticed: what this worker was told so far of being taken away.
        log: called as `log(step, metrics)` after every step, on every worker; where bundles are held out, for step 0
            too, with what they measure before training.
        saves: saves every `checkpoint.every` steps, at the end unless it says otherwise, and after a notice; the last
            two are waited for.

    Raises:
        PreemptedError: on every worker, after a checkpoint, when one had a notice to end.
        WorkersPreemptedError: the same where workers are to be started again.
        DivergedError: on every worker, when `optimizer.max_retries` more tries of a step failed; nothing is saved.
    """
    objective = Objective(config)
    begins = objective.begins(total_steps)
    work = Work.of(engine.module, engine.shape)
    peak = _gpu_peak(engine, config) if engine.device.type == "cuda" else None
    window = StateWindow(config.collapse.window if len(set(kinds)) > 1 else 0)
    slow = SlowWorkers(engine.rank)
    engine.module.train()
    metrics: Metrics = {}
    saved_for_notice = False
    if validate is not None and progress.step == 0:
        log(0, validate())
    if progress.step:  # it may have died before that step's score
        saves.score(progress, last=progress.step == total_steps)
    while progress.step < total_steps:
        started = time.perf_counter()
        rate = learning_rate(progress.step, total_steps, config.optimizer)
        micro_batches = next(steps)
        waited = time.perf_counter() - started
        factors = objective.factors(progress.step, total_steps)
        taps, opens = objective.taps(progress.step, total_steps), objective.scope(progress.step, total_steps) != "none"
        if any(batch.taps is not taps or (batch.openings is not None) is not opens for batch in micro_batches):
            raise ValueError(f"step {progress.step + 1}: its batches were made for a step that reads other things")
        before = random_state()
        for retries in range(config.optimizer.max_retries + 1):
            restore_random_state(before)
            meter = StepMeter(TappedStep(config.collapse.sample, window), work, Stopwatch(engine.device))
            _accumulate(engine, objective, factors, micro_batches, reference, meter)
            norm = engine.step(rate)
            if math.isfinite(norm):
                break
            _warn_of_retry(engine.rank, progress.step + 1, retries + 1, config.optimizer.max_retries + 1)
        else:
            saves.finish()
            raise _diverged(config, progress.step + 1, rate, micro_batches, meter)
        metrics = meter.reduce(waited, engine.device, noticed(), writes=saves.writes())
        slow.add(meter.paces)
        metrics |= meter.tapped.measure(f"{config.seed} {progress.step}")
        progress.step += 1
        progress.bundles += int(metrics.pop("bundles"))
        notice, still_written = Notice(int(metrics.pop("notice"))), bool(metrics.pop("writes"))
        metrics |= {
            "learning_rate": rate,
            "gradient_norm": norm,
            "retries": float(retries),
            "bundles_consumed": float(progress.bundles),
            **_speed(metrics, time.perf_counter() - started, peak),
        }
        last = progress.step == total_steps
        held_out = config.data.validation
        measures = last or progress.step in begins or (held_out is not None and progress.step % held_out.every == 0)
        if validate is not None and measures:
            metrics |= validate()
        log(progress.step, metrics)
        if not still_written:
            saves.settle()
        ends = notice >= Notice.RESTART and not last
        every = config.checkpoint.every
        due = saves.at_the_end if last else every is not None and progress.step % every == 0
        saved = False
        if due or ends or (notice is Notice.SAVE and not saved_for_notice):
            saved = saves.save(progress, metrics, wait=last or notice is not Notice.NONE, needed=last or ends)
        if not ends:
            saves.score(progress, last=last)
        # It stays until the node is gone, and one checkpoint is enough.
        saved_for_notice = notice is Notice.SAVE and (saved or saved_for_notice)
        if ends:
            raise ended_by(notice, progress.step)
    return metrics


def _gpu_peak(engine: Engine, config: TrainConfig) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(engine.device), config.model.dtype)


def _warn_of_retry(rank: int, step: int, tried: int, tries: int) -> None:
    if rank == 0 and tried < tries:
        logger.warning(
            "step %d: the loss or its gradients are not finite (try %d of %d); its batches are tried again",
            step, tried, tries,
        )  # fmt: skip


def _accumulate(
    engine: Engine,
    objective: Objective,
    factors: Mapping[str, float],
    micro_batches: Sequence[Batch],
    reference: Reference | None,
    meter: StepMeter,
) -> None:
    """Forward and backward of one optimizer step's micro-batches; `meter` takes in what they give."""
    engine.begin(len(micro_batches))
    for on_host in micro_batches:
        batch = move(on_host, engine.device)
        frozen = ReferenceOutput()
        if reference is not None and (objective.alignment.needs_reference or batch.taps):
            frozen = reference(batch)
        with meter.forwarding:
            output = engine.forward(batch)
        result = loss_of(objective, batch, output, frozen, factors)
        engine.backward(_with_telling_gradient(result.loss, output.chosen.total))
        meter.add(batch, output, result, idle=not bool(on_host.weight.any()))


def loss_of(
    objective: Objective,
    batch: Batch,
    output: ModelOutput,
    frozen: ReferenceOutput,
    factors: Mapping[str, float] | None = None,
) -> LossOutput:
    """The loss of one micro-batch, from its forward's output and what the reference says of it.

    `factors` as of `Objective.total_loss`. The routers' loss of a mixture of experts is one of all tokens of a forward,
    which count by its bundles.
    """
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
        term_weight=batch.term_weight,
        groups=batch.groups,
        rows=batch.rows,
        pooled=output.pooled,
        reference_pooled=frozen.pooled,
        factors=factors,
        decisions=decisions_of(batch, output) if output.refusals is not None else None,
        harmful=batch.harmful,
        kept=_kept(batch, output, frozen) if output.benign is not None else None,
    )
    if output.router is None:
        return result
    metrics = {**result.metrics, "loss/router": output.router.detach().expand(len(batch.bundle_ids))}
    return replace(result, loss=result.loss + output.router * batch.weight.sum(), metrics=metrics)


def _kept(batch: Batch, output: ModelOutput, frozen: ReferenceOutput) -> Kept | None:
    """Next-token logits on benign bundles, where policy and reference were read there."""
    if output.benign is None or frozen.benign is None or batch.benign is None:
        return None
    places = batch.benign
    return Kept(output.benign, frozen.benign, places.bundle, places.share, len(batch.bundle_ids))


def decisions_of(batch: Batch, output: ModelOutput) -> Decisions | None:
    """How likely responses are to open as refusals, where the batch reads that."""
    if output.refusals is None or output.opened is None:
        return None
    response = batch.rows.prompt[batch.rows.response]
    return Decisions(refusal_log_odds(output.refusals), output.opened, response, batch.harmful)


def _speed(metrics: Metrics, seconds: float, peak: float | None) -> Metrics:
    """Numbers a second, of a step that took so many; `peak` is the device's, in 1e12 operations a second."""
    speed = {"tokens_per_second": metrics["tokens"] / seconds, "step_seconds": seconds}
    if flops := metrics.pop("flops", 0.0):
        speed["tflops_per_second"] = flops / seconds / 1e12
        speed |= {"mfu": speed["tflops_per_second"] / peak} if peak is not None else {}
    return speed


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
