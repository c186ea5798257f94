"""What every Ray Train worker of a run does: build the engine, load the last checkpoint, run the training loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.execution.context import get_train_context

from mlc_ray._registry import resolve
from mlc_ray.config import TrainConfig, parse_config, resolve_layer
from mlc_ray.data.plan import Cutting
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import plans, stream_steps
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.lease import LeaseGuard
from mlc_ray.log_files import log_file
from mlc_ray.logs import quiet_workers, send_warnings
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import order_of
from mlc_ray.runs import checkpoint_sizes, logged_until
from mlc_ray.storage import Place, StorageFaultError, fetched_bytes, local_model
from mlc_ray.train.checkpoint import agree_on_checkpoint, load_checkpoint
from mlc_ray.train.checks import check_batch, check_tap
from mlc_ray.train.divergence import forget_divergence
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.entry import HeldOut, WeightsScorer, WorkerSpec
from mlc_ray.train.forward import n_layers
from mlc_ray.train.loop import Progress, train_loop
from mlc_ray.train.meter import Metrics
from mlc_ray.train.model import (
    PolicyWithExtractor,
    add_adapters,
    cast_parameters,
    load_policy,
    router_weight,
)
from mlc_ray.train.monitor import Monitor
from mlc_ray.train.openings import branches_of
from mlc_ray.train.planning import check_groups, cutting_of_worker, held_out_cutting
from mlc_ray.train.preemption import SIGTERM, Notice, StopFile, highest
from mlc_ray.train.reference import (
    Reference,
    ReferenceModel,
    asked_of_reference,
    cached_reference,
    policy_reference,
)
from mlc_ray.train.reference_shards import load_reference
from mlc_ray.train.saving import CheckpointSaver
from mlc_ray.train.tracking import Tracker
from mlc_ray.train.validation import Validation, batches_of, plans_of
from mlc_ray.train.watchdog import Watchdog
from mlc_ray.types import Batch, ReferenceTable, move

logger = logging.getLogger(__name__)


def engine_class(config: TrainConfig) -> type[Engine]:
    """The engine that `config.engine` names."""
    return cast(type[Engine], resolve("engine", config.engine.name))


def work(spec: WorkerSpec) -> None:
    """Train, as one worker of a run."""
    config = parse_config(TrainConfig, spec.config)
    send_warnings()
    rank = ray.train.get_context().get_world_rank()
    with (
        log_file(config.logging, spec.run_folder, rank) as lines,
        begun(config, spec.run_folder, spec.lease) as (watchdog, device),
    ):
        if lines is not None:
            lines.step = lambda: watchdog.step
        _work(spec, config, watchdog, device)


@contextlib.contextmanager
def begun(config: TrainConfig, folder: Place, lease: str) -> Iterator[tuple[Watchdog, torch.device]]:
    """A worker whose engine has prepared its device, with the model on its machine, about to load it.

    Args:
        config: the run's settings.
        folder: where a hang is told of.
        lease: the id that hangs bear.

    Yields:
        What watches it until the block ends, loading and closing too; and its device.
    """
    send_warnings()
    quiet_workers()
    rank = ray.train.get_context().get_world_rank()
    with contextlib.closing(Watchdog(config.cluster.hang_timeout, folder, lease=lease, rank=rank, step=0)) as watchdog:
        device = ray.train.torch.get_device()
        engine_class(config).prepare(device)
        watchdog.beat("fetching the model")
        with watchdog.while_changing(fetched_bytes):
            local_model(config.model.path)  # of a URL, a copy for all workers of this machine
        watchdog.beat("loading the model")
        yield watchdog, device


def _work(spec: WorkerSpec, config: TrainConfig, watchdog: Watchdog, device: torch.device) -> None:
    rank = watchdog.rank
    torch.manual_seed(config.seed + rank)  # dropout; order and extractor have their own seeded generators
    engine, online = _build(config, device)
    guard = LeaseGuard(spec.run_folder, spec.lease)
    if rank == 0:  # it removes and renames for all, and the others wait for it
        watchdog.beat("checking the lease")
        guard.check(now=True)
    watchdog.beat("verifying the checksums of a checkpoint, with all workers")
    # From the folder, not from Ray's list, which names what was reported, not what is there and undamaged.
    progress = Progress()
    run = spec.run_folder
    if (checkpoint := agree_on_checkpoint(run, logged_until(run) if rank == 0 else None)) is not None:
        watchdog.beat("loading the checkpoint")
        progress = load_checkpoint(checkpoint, engine=engine, config=config, fingerprints=spec.fingerprints)
    watchdog.beat("opening its data", progress.step)
    tokens = TokenArtifact.open(spec.tokens_folder)
    table = load_reference(spec.reference_folder) if spec.reference_folder else None
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    watchdog.beat("cutting its batches, with all workers")
    held_out = [TokenArtifact.open(spec.held_out.tokens_folder)] if spec.held_out is not None else []
    branches = branches_of(config, tokenizer, [tokens, *held_out])
    cutting = cutting_of_worker(config, tokens, engine, spec.total_steps, branches)
    planned = plans(tokens, order_of(config, tokens), cutting, range(progress.step, spec.total_steps))
    batches = stream_steps(tokens, planned, cutting, table, rank=rank, pin=device.type == "cuda")
    steps = _checked(watchdog.over(batches, "waiting for its batches", "in a step, with all workers"), engine)
    reference = _asked(online, table)
    validate = None
    if spec.held_out is not None:
        validate = _validation(config, spec.held_out, held_out[0], engine, online, cutting, progress, watchdog)
    watchdog.beat("opening the trackers")
    begins = Objective(config).begins(spec.total_steps)
    tracker = Tracker(config, run, progress.step, guard.check, begins=begins) if rank == 0 else None
    is_past_divergence = False
    with contextlib.closing(tracker) if tracker is not None else contextlib.nullcontext(), contextlib.closing(steps):
        monitor = Monitor(run, rank, bundles=progress.bundles, steps=spec.total_steps)

        def log(step: int, metrics: Metrics) -> None:
            watchdog.beat("logging", step)
            monitor.log(step, metrics)
            if tracker is not None:
                guard.check()
                tracker.log(step, {**metrics, "tokens_per_forward": float(cutting.tokens_per_forward)})
                nonlocal is_past_divergence
                with contextlib.suppress(OSError):  # it is asked again after the next step
                    is_past_divergence = is_past_divergence or forget_divergence(run, step)

        saver = CheckpointSaver(
            run,
            engine=engine,
            tokenizer=tokenizer,
            config=config,
            fingerprints=spec.fingerprints,
            may_write=partial(guard.check, now=True),
            completing=partial(watched, "completing a checkpoint", run, watchdog, guard if rank == 0 else None),
            record=partial(record, tracker, guard) if tracker is not None else lambda: None,
        )
        saves = WatchedSaves(spec, saver, watchdog, guard)
        logger.info("trains from step %d of %d on %s", progress.step, spec.total_steps, device)
        try:
            train_loop(
                config,
                engine=engine,
                steps=steps,
                reference=reference,
                progress=progress,
                total_steps=spec.total_steps,
                kinds=tokens.counts.kinds,
                validate=validate,
                noticed=_notices(spec),
                log=log,
                saves=saves,
            )
        finally:
            watchdog.beat("closing its batches and trackers")


@contextlib.contextmanager
def watched(what: str, run: Place, watchdog: Watchdog, guard: LeaseGuard | None) -> Iterator[None]:
    """Around a step on the way to a checkpoint: watched for progress, and under the lease still.

    Args:
        what: the step, as the watchdog tells of it.
        run: its folder.
        watchdog: this worker's; it goes back to what was done before.
        guard: rank 0's, which removes and completes for all: another driver may have taken over meanwhile.

    Raises:
        LeaseError: One has.
    """
    before = watchdog.doing
    watchdog.beat(f"{what}, with all workers")
    if guard is not None:
        guard.check(now=True)
    # A worker that has written its files waits for the slowest one: what any of them writes is progress.
    with watchdog.while_changing(partial(checkpoint_sizes, run)):
        yield
    watchdog.beat(before)


def record(tracker: Tracker, guard: LeaseGuard) -> None:
    """What rank 0 does last before it writes a manifest: raises as `Tracker.sync` and `LeaseGuard.check`."""
    tracker.sync()
    guard.check(now=True)  # sending may have taken long, and another driver may have taken over meanwhile


class WatchedSaves:
    """Saves checkpoints of a run on Ray: watched for progress, under the lease, and scored where that is asked."""

    def __init__(self, spec: WorkerSpec, saver: CheckpointSaver, watchdog: Watchdog, guard: LeaseGuard) -> None:
        self.spec, self.saver, self.watchdog = spec, saver, watchdog
        self.guard = guard if saver.engine.rank == 0 else None
        self.writes, self.settle, self.finish = saver.writes, saver.settle, saver.finish

    @property
    def at_the_end(self) -> bool:
        """Whether the run ends with a checkpoint: nothing goes on from the end of a trial."""
        return self.spec.score is None or self.spec.score.keep_state

    def save(self, progress: Progress, metrics: Metrics, *, wait: bool, needed: bool) -> bool:
        """Save a checkpoint; False where it could not be written.

        Raises:
            StorageFaultError: It is needed, and could not be written; `cluster.max_failures` applies.
        """
        with watched("saving a checkpoint", self.spec.run_folder, self.watchdog, self.guard):
            self.saver.save(progress)
        if wait or needed or not self.saver.in_background:
            self.finish()
        if needed and self.saver.fault is not None:
            raise StorageFaultError(f"{self.saver.fault}. To go on: mlc-ray train --resume {self.spec.run_folder}")
        self.watchdog.beat("between two steps")
        return self.saver.going or self.saver.fault is None

    def score(self, progress: Progress, *, last: bool) -> None:
        """Publish the weights and score them, where that is asked of this step.

        Raises:
            StorageFaultError: They could not be written.
        """
        asked = self.spec.score
        if asked is not None and (last or (asked.every is not None and progress.step % asked.every == 0)):
            self._publish_and_score(asked, progress, last=last)

    def _publish_and_score(self, asked: WeightsScorer, progress: Progress, *, last: bool) -> None:
        with watched("publishing weights", self.spec.run_folder, self.watchdog, self.guard):
            self.saver.publish(progress, ends=last)
            self.finish()
        if self.saver.fault is not None or self.saver.newest is None:
            raise StorageFaultError(f"{self.saver.fault}. To go on, resume the search")
        score = partial(asked, self.spec.run_folder, self.saver.newest, progress.step)
        with self.watchdog.off():  # scoring takes as long as it takes, while the other workers wait
            ray.train.report(_on_first_worker(score))
        self.watchdog.beat("between two steps")


def _notices(spec: WorkerSpec) -> Callable[[], Notice]:
    """What tells this worker that it, or another one, is about to be taken away."""
    # Ray Train runs this function in a thread; signals are handled in the main one, where the actor's methods run.
    actor = ray.get_runtime_context().current_actor
    ray.get(actor.__ray_call__.remote(_catch_sigterm))
    return highest([SIGTERM, StopFile(spec.run_folder, spec.lease), _node_is_drained])


def _catch_sigterm(_: object) -> None:
    SIGTERM.catch()


def _node_is_drained() -> Notice:
    """SAVE once Ray says that the node of a worker is to be taken away."""
    # Not by ray.train.get_preemption_info, at which all workers wait for each other: the step has a reduction anyway.
    told = get_train_context().preemption_context.preemption_info
    return Notice.NONE if told is None else Notice.SAVE


def _on_first_worker(function: Callable[[], Metrics]) -> Metrics:
    """What `function` returns on rank 0, on every worker; the others wait, as long as it takes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # an engine that slept on this GPU needs the memory that PyTorch only keeps in reserve
    first = ray.train.get_context().get_world_rank() == 0
    # Ray's broadcast has no time limit; a collective of NCCL would end the run when scoring takes half an hour.
    return cast(Metrics, broadcast_from_rank_zero(function() if first else None))


def _build(config: TrainConfig, device: torch.device) -> tuple[Engine, Reference | None]:
    """The policy's engine, and the reference where one is asked at every step."""
    chosen = engine_class(config)
    with chosen.loading(config):
        policy = load_policy(config.model)
    layer = resolve_layer(config.mlc.layer, n_layers(policy))
    weight = router_weight(policy, config.model)
    objective = Objective(config)
    policy = add_adapters(policy, config.model)
    module = PolicyWithExtractor(
        policy,
        layer=layer,
        extractor_dim=config.mlc.extractor_dim,
        seed=config.seed,
        pooling=objective.alignment.pooling,
        keeps=objective.needs_reference_logits,
        router_weight=weight,
    )
    cast_parameters(module, getattr(torch, config.model.dtype))
    engine = chosen(module, config, device)
    check_tap(engine.module.language_model, layer, openings=objective.widest_scope != "none")
    is_asked = config.needs_reference and config.reference == "online"
    return engine, _online_reference(config, engine) if is_asked else None


def _online_reference(config: TrainConfig, engine: Engine) -> Reference:
    """The policy without its adapters, or a second model."""
    asked = asked_of_reference(Objective(config), engine.module.layer)
    if config.model.lora is not None:
        return policy_reference(engine.module, ReferenceModel(engine.module.language_model, **asked))
    return frozen_reference(config, asked, engine.device)


def frozen_reference(config: TrainConfig, asked: dict[str, Any], device: torch.device) -> Reference:
    """The reference as the engine runs it; `asked` are the arguments of the `ReferenceModel`."""
    chosen = engine_class(config)
    with chosen.loading(config):
        frozen = ReferenceModel(load_policy(config.model), **asked)
    return chosen.frozen(frozen, config, device)


def _validation(
    config: TrainConfig,
    found: HeldOut,
    tokens: TokenArtifact,
    engine: Engine,
    online: Reference | None,
    cutting: Cutting,
    progress: Progress,
    watchdog: Watchdog,
) -> Validation:
    """What measures held-out bundles."""
    table = load_reference(found.reference_folder) if found.reference_folder else None
    own = held_out_cutting(cutting, tokens)
    rows = batches_of(tokens, seed=config.seed, at_once=config.train.batch_bundles)
    check_groups(tokens, rows, own)
    pin = engine.device.type == "cuda"

    def batches() -> Iterator[list[Batch]]:
        streamed = stream_steps(tokens, plans_of(tokens, rows, own), own, table, rank=engine.rank, pin=pin)
        return watchdog.over(streamed, "waiting for held-out batches", "measuring held-out bundles, with all workers")

    kinds = sorted(tokens.counts.kinds)
    return Validation(Objective(config), engine, batches, _asked(online, table), kinds, progress)


def _asked(online: Reference | None, table: ReferenceTable | None) -> Reference | None:
    """What answers for the reference: a model, or the table whose numbers batches bring along."""
    return online or (cached_reference if table is not None else None)


def _checked(steps: Iterator[list[Batch]], engine: Engine) -> Generator[list[Batch]]:
    """The same batches; what the tree's forward says of the first is compared with plain forwards before its step."""
    for index, batches in enumerate(steps):
        if index == 0:
            module = engine.module
            check_batch(module.language_model, move(batches[0], engine.device), module.layer)
        yield batches
