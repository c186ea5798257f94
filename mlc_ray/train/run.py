"""One training run on Ray: prepare data, start Ray Train workers, run the loop in each, keep checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import ray
import ray.train
import ray.train.torch
import torch
import yaml
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer

from mlc_ray.cluster import check_capacity, connect, use_gpu, with_dtype
from mlc_ray.config import TrainConfig, load_config, parse_config
from mlc_ray.data.order import plan_rank, total_steps
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import stream_batches
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import keep_in
from mlc_ray.losses.objective import Objective
from mlc_ray.runs import CONFIG_FILE, RUN_FILE, TRAIN_FOLDER, checkpoint_folder, output_folder
from mlc_ray.storage import absolute_if_here, fingerprint, fingerprint_model, library_versions, write_json_atomic
from mlc_ray.train.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from mlc_ray.train.console import RunDisplay
from mlc_ray.train.engines import deepspeed as engines
from mlc_ray.train.loop import Metrics, Progress, train_loop
from mlc_ray.train.model import (
    PolicyWithExtractor,
    add_adapters,
    check_tap,
    load_policy,
    model_depth,
    resolve_layer,
)
from mlc_ray.train.reference import Reference, ReferenceModel, cached_reference, online_reference
from mlc_ray.train.reference_cache import load_reference, prepare_reference
from mlc_ray.train.tracking import Tracker, check_trackers
from mlc_ray.types import Batch, ReferenceRow


class RunError(MlcRayError):
    """A run cannot start or go on; the message quotes the folder and names the fix."""


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run is, its newest checkpoint, and the last step's metrics."""

    run_folder: Path
    checkpoint: Path
    metrics: Metrics


@dataclass(frozen=True)
class PreparedData:
    """What a run reads, on disk: made once, and found again by every later run that needs the same."""

    tokens: TokenArtifact
    reference_folder: Path | None
    fingerprints: dict[str, str]


class CheckpointScorer(Protocol):
    """Called on the first worker after every checkpoint while the others wait; its numbers are reported to Ray."""

    def __call__(self, run_folder: Path, checkpoint: Path, step: int) -> Metrics:
        """Numbers about `checkpoint`, written at optimizer step `step`."""
        ...


def train(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    score: CheckpointScorer | None = None,
    callbacks: Sequence[UserCallback] = (),
    display: bool = True,
) -> TrainResult:
    """Train to the end and return where everything is.

    With `resume`, the folder of an earlier try, training goes on from its last complete checkpoint, or starts where
    there is none. `score` is called with every checkpoint; `callbacks` are Ray Train's own; without `display` the
    console stays quiet. Raises `RunError` when a new run's folder exists already or a resumed one's does not.
    """
    check_trackers(config)
    config = _with_absolute_paths(config)
    depth = model_depth(config.model.path, trust_remote_code=config.model.trust_remote_code)
    layer = resolve_layer(config.mlc.layer, depth)
    run_folder = _run_folder(config, resume)
    keep_in(run_folder)
    connect(config.cluster.address)
    gpu = use_gpu(config.cluster.accelerator)
    check_capacity(
        "training (cluster.workers x cluster.cpus_per_worker)",
        workers=config.cluster.workers,
        cpus_each=config.cluster.cpus_per_worker,
        gpus_each=1 if gpu else 0,
    )
    config = _with_dtype(config, gpu=gpu)
    with _claimed(run_folder, config) if resume is None else contextlib.nullcontext():
        data = prepare_data(config, cache_dir=run_folder.parent / "cache", layer=layer, gpu=gpu)
    steps = _total_steps(config, data.tokens)
    _describe_run(run_folder, config, data.fingerprints, data.tokens, steps)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json", exclude_unset=True),
            "run_folder": str(run_folder),
            "tokens_folder": str(data.tokens.folder),
            "reference_folder": str(data.reference_folder) if data.reference_folder else None,
            "fingerprints": data.fingerprints,
            "total_steps": steps,
            "score": score,
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=TRAIN_FOLDER,
            storage_path=str(run_folder),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            logging_config=LoggingConfig(log_level="WARNING"),  # the console has a table of its own
            callbacks=list(callbacks),
        ),
    )
    with (
        RunDisplay(run_folder, steps, config.logging.every, Objective(config).parts)
        if display
        else contextlib.nullcontext()
    ):
        result = trainer.fit()
    return TrainResult(run_folder, find_checkpoint(run_folder), dict(result.metrics or {}))


def prepare_data(config: TrainConfig, *, cache_dir: Path, layer: int, gpu: bool) -> PreparedData:
    """Token rows and, where the loss needs them, cached reference numbers for `config`; what is there is used again."""
    tokens = prepare_token_rows(config.data, config.model, cache_dir=cache_dir)
    fingerprints = {
        "model": fingerprint_model(config.model.path),
        "tokens": tokens.fingerprint,
        "training": fingerprint(_what_must_not_change(config)),
    }
    reference_folder = None
    if config.needs_reference and config.reference == "cached":
        reference_folder, fingerprints["reference"] = prepare_reference(
            config, tokens, layer=layer, cache_dir=cache_dir, gpu=gpu
        )
    return PreparedData(tokens, reference_folder, fingerprints)


def load_run_config(run: Path) -> TrainConfig:
    """The config a run was started with. Raises `RunError` if `run` is not a run folder."""
    path = run / CONFIG_FILE
    if not path.is_file():
        raise RunError(f"{str(run)!r} is not a run folder: it has no {CONFIG_FILE}")
    return load_config(TrainConfig, path)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    sources = [source.model_copy(update={"path": absolute_if_here(source.path)}) for source in config.data.train]
    model = config.model.model_copy(update={"path": absolute_if_here(config.model.path)})
    data = config.data.model_copy(update={"train": sources})
    return config.model_copy(update={"model": model, "data": data})


def _with_dtype(config: TrainConfig, *, gpu: bool) -> TrainConfig:
    """What the workers compute in is decided here, before anything is loaded, and recorded with the run."""
    model = with_dtype(config.model, gpu=gpu)
    if model is config.model:
        return config
    given = config.model_dump(mode="json", exclude_unset=True)
    return parse_config(TrainConfig, {**given, "model": {**given["model"], "dtype": model.dtype}})


def _run_folder(config: TrainConfig, resume: Path | None) -> Path:
    if resume is not None:
        folder = Path(resume).expanduser().resolve()
        if not (folder / CONFIG_FILE).is_file():
            raise RunError(f"--resume {str(resume)!r}: not a run folder, it has no {CONFIG_FILE}")
        return folder
    folder = (output_folder(config.output_dir) / config.name).resolve()
    if (folder / CONFIG_FILE).exists():
        raise _exists_already(folder)
    return folder


def _exists_already(folder: Path) -> RunError:
    return RunError(
        f"run folder {str(folder)!r} exists already: choose another name, remove it, or go on with "
        f"`mlc-ray train --resume {folder}`"
    )


@contextlib.contextmanager
def _claimed(folder: Path, config: TrainConfig) -> Iterator[None]:
    """Take the run's name by writing its config.yaml before data are prepared, which may last minutes.

    Raises `RunError` if another run has taken it. When preparing fails, the name is free again, since what mends that
    is another setting; a driver that is killed meanwhile leaves the file, and can be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    temporary = folder / f".{CONFIG_FILE}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)  # unlike a rename, it fails where the file is there
    except FileExistsError:
        raise _exists_already(folder) from None
    except OSError:  # no hard links here, as on mounted object stores: a little less sure, but a run can start
        if path.exists():
            raise _exists_already(folder) from None
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: something of the user's is in it
            folder.rmdir()
        raise


def _what_must_not_change(config: TrainConfig) -> dict[str, Any]:
    """Settings that a resumed run must share with its checkpoint; where and how to log or keep may differ."""
    return config.model_dump(
        mode="json", include={"seed", "reference", "model", "objective", "mlc", "terms", "optimizer", "train"}
    )


def _total_steps(config: TrainConfig, tokens: TokenArtifact) -> int:
    return total_steps(
        len(tokens.bundle_ids),
        epochs=config.train.epochs,
        world_size=config.cluster.workers,
        bundles_per_worker=config.train.bundles_per_worker,
        accumulation=config.train.gradient_accumulation_steps,
        max_steps=config.train.max_steps,
    )


def _describe_run(
    folder: Path, config: TrainConfig, fingerprints: dict[str, str], tokens: TokenArtifact, steps: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        folder / RUN_FILE,
        {
            "resolved_config": config.model_dump(mode="json"),
            "fingerprints": fingerprints,
            "bundles": len(tokens.bundle_ids),
            "languages": list(tokens.languages),
            "total_steps": steps,
            "versions": library_versions(),
        },
    )


def _worker(spec: dict[str, Any]) -> None:
    """What every Ray Train worker runs; one process per GPU."""
    _quiet()
    config = parse_config(TrainConfig, spec["config"])
    run_folder, total = Path(spec["run_folder"]), spec["total_steps"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    engines.select_accelerator(device)
    torch.manual_seed(config.seed + rank)  # dropout; order and extractor have their own seeded generators

    engine, reference_engine = _build(config, device)
    # From the folder, not from Ray's list: only checkpoints whose every file is there count, and the newest such one
    # is the same for all workers, since they share the run folder.
    complete = list_checkpoints(run_folder)
    progress = Progress()
    if complete:
        progress = load_checkpoint(complete[-1], engine=engine, config=config, fingerprints=spec["fingerprints"])
    tokens = TokenArtifact.open(Path(spec["tokens_folder"]))
    table = load_reference(Path(spec["reference_folder"])) if spec["reference_folder"] else None
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    with (
        contextlib.closing(Tracker(config, run_folder, progress.step))
        if rank == 0
        else contextlib.nullcontext() as tracker
    ):

        def log(step: int, metrics: Metrics) -> None:
            if tracker is not None:
                tracker.log(step, metrics)

        def checkpoint_of(step: int) -> Path:
            return checkpoint_folder(run_folder, step)

        def save(at: Progress, metrics: Metrics) -> None:
            with tempfile.TemporaryDirectory(prefix="mlc_ray-checkpoint-") as folder:
                save_checkpoint(
                    Path(folder),
                    engine=engine,
                    tokenizer=tokenizer,
                    config=config,
                    progress=at,
                    fingerprints=spec["fingerprints"],
                )
                ray.train.report(
                    {"step": at.step, **metrics},
                    checkpoint=Checkpoint.from_directory(folder),
                    checkpoint_dir_name=checkpoint_of(at.step).name,
                )
            # report() returns before the checkpoint is registered; a worker that died now would lose it.
            ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
            if spec["score"] is not None:
                ray.train.report(_on_first_worker(partial(spec["score"], run_folder, checkpoint_of(at.step), at.step)))

        train_loop(
            config,
            engine=engine,
            batches=_batches(config, tokens, table, rank, world_size, progress.step),
            reference=_reference(reference_engine, table),
            progress=progress,
            total_steps=total,
            device=device,
            log=log,
            save=save,
        )


def _on_first_worker(function: Callable[[], Metrics]) -> Metrics:
    """What `function` returns on rank 0, on every worker; the others wait, as long as it takes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # an engine that slept on this GPU needs what PyTorch only keeps in reserve
    first = ray.train.get_context().get_world_rank() == 0
    # Ray's broadcast has no time limit; a collective of NCCL would end the run when scoring takes half an hour.
    return cast(Metrics, broadcast_from_rank_zero(function() if first else None))


def _quiet() -> None:
    """Keep notices about Ray's and PyTorch's own calls out of the run's console; warnings of ours stay."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for name in list(logging.root.manager.loggerDict):
        if "ray/train/" in name:  # Ray Train's loggers bear their files' names; they print all metrics at every report
            logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")


def _build(config: TrainConfig, device: torch.device) -> tuple[Any, Any]:
    """The policy's engine, and the reference's where one runs online."""
    with engines.partitioned_loading(config):
        policy = load_policy(config.model)
    layer = resolve_layer(config.mlc.layer, policy.config.get_text_config().num_hidden_layers)
    policy = add_adapters(policy, config.model)
    module = PolicyWithExtractor(policy, layer=layer, extractor_dim=config.mlc.extractor_dim, seed=config.seed)
    module.to(dtype=getattr(torch, config.model.dtype))
    engine = engines.policy_engine(module, config, device)
    check_tap(engine.module.language_model, layer)
    if not (config.needs_reference and config.reference == "online"):
        return engine, None
    objective = Objective(config)
    with engines.partitioned_loading(config):
        frozen = ReferenceModel(
            load_policy(config.model),
            log_probs=objective.needs_reference_log_probs,
            layer=layer if objective.needs_reference_state else None,
        )
    return engine, engines.reference_engine(frozen, config)


def _reference(reference_engine: Any, table: dict[str, ReferenceRow] | None) -> Reference | None:
    if reference_engine is not None:
        return online_reference(reference_engine)
    return cached_reference if table is not None else None


def _batches(
    config: TrainConfig,
    tokens: TokenArtifact,
    table: dict[str, ReferenceRow] | None,
    rank: int,
    world_size: int,
    start_step: int,
) -> Iterator[Batch]:
    slots = plan_rank(
        tokens.bundle_ids,
        seed=config.seed,
        epochs=config.train.epochs,
        world_size=world_size,
        rank=rank,
        bundles_per_worker=config.train.bundles_per_worker,
        accumulation=config.train.gradient_accumulation_steps,
        max_steps=config.train.max_steps,
        start_step=start_step,
    )
    stream = stream_batches(
        tokens.folder,
        slots,
        bundles_per_worker=config.train.bundles_per_worker,
        languages=tokens.languages,
        needs_rejected=Objective(config).needs_rejected,
        reference=table,
    )
    return (batch for _, batch in stream)
