"""One training run on Ray, seen from the driver: prepare data, start the workers (see `worker`), wait for them."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from mlc_ray.cluster import check_fits, connect, use_gpu, with_dtype
from mlc_ray.config import SourceSection, TrainConfig, load_config, parse_config
from mlc_ray.config.base import by_dotted_name
from mlc_ray.data.order import total_steps
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import keep_in
from mlc_ray.losses.objective import Objective
from mlc_ray.runs import CONFIG_FILE, RUN_FILE, TRAIN_FOLDER, checkpoint_folder, output_folder, read_metrics
from mlc_ray.storage import Place, absolute_if_here, fingerprint, fingerprint_model, library_versions, write_json_atomic
from mlc_ray.train.answers import check_answers
from mlc_ray.train.checkpoint import find_checkpoint, list_checkpoints
from mlc_ray.train.console import RunDisplay
from mlc_ray.train.divergence import DivergedError, record_divergence
from mlc_ray.train.entry import CheckpointScorer, HeldOut, WorkerSpec, train_worker
from mlc_ray.train.failures import EndAtOwnError, keyboard_interrupt, own_errors
from mlc_ray.train.meter import Metrics
from mlc_ray.train.model import check_device, model_depth, resolve_layer
from mlc_ray.train.planning import (
    check_groups,
    cutting_of,
    held_out_cutting,
    look_ahead,
    order_of,
    said_of,
    tapping,
    tokens_per_forward,
)
from mlc_ray.train.reference_cache import prepare_reference
from mlc_ray.train.tracking import check_trackers
from mlc_ray.train.validation import batches_of, check_held_out, held_out_section

logger = logging.getLogger(__name__)


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
    """What a run reads, on disk: made once, and used again by every later run that needs the same."""

    tokens: TokenArtifact
    reference_folder: Path | None
    fingerprints: dict[str, str]
    held_out: HeldOut | None = None


def train(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    score: CheckpointScorer | None = None,
    callbacks: Sequence[UserCallback] = (),
    display: bool = True,
) -> TrainResult:
    """Train to the end and return where everything is.

    Args:
        config: the run. With `resume: auto` it starts, or goes on from its last complete checkpoint where its folder is
            there, so that the same command can be given again after whatever ended it.
        resume: go on with the run in this folder, whose own settings `config` must be (`load_run_config`).
        score: called with every checkpoint.
        callbacks: Ray Train's own.
        display: show progress on the console.

    Raises:
        RunError: a new run's folder exists already, a resumed one's does not, or it holds a run with other settings.
        DivergedError: the loss or its gradients stayed non-finite; the run's folder says so from then on.
        ModelError: the model's kernels need a GPU, and there is none.
        MlcRayError: a worker raised it (`CheckpointError`, `ModelError`, ...). Like a `DivergedError`, it ends the run:
            `cluster.max_failures` counts other failures only.
        KeyboardInterrupt: Ctrl-C; the workers have ended by then.
    """
    check_trackers(config)
    config = _with_absolute_paths(config)
    depth = model_depth(config.model.path, trust_remote_code=config.model.trust_remote_code)
    layer = resolve_layer(config.mlc.layer, depth)
    run_folder, is_new = _run_folder(config, resume)
    if not is_new and score is None and (ended := _ended(run_folder)) is not None:
        logger.info("run %s has ended already: there is nothing left to train", run_folder)
        return ended
    keep_in(run_folder)
    connect(config.cluster.address)
    gpu = use_gpu(config.cluster.accelerator)
    check_device(config.model, gpu=gpu)
    check_fits(
        "training (cluster.workers x cluster.cpus_per_worker)",
        [(config.cluster.cpus_per_worker, 1.0 if gpu else 0.0)] * config.cluster.workers,
    )
    if not is_new:
        config = _with_dtype_of(run_folder, config)
    config = _with_dtype(config, gpu=gpu)
    with _claimed(run_folder, config) if is_new else contextlib.nullcontext():
        data = prepare_data(config, cache_dir=run_folder.parent / "cache", layer=layer, gpu=gpu)
        steps = _total_steps(config, data.tokens)
        _announce(config, data.tokens, steps, gpu=gpu)
    _describe_run(run_folder, config, data.fingerprints, data.tokens, steps)
    trainer = TorchTrainer(
        cast(Any, train_worker),
        train_loop_config={
            "spec": WorkerSpec(
                config=config.model_dump(mode="json", exclude_unset=True),
                run_folder=run_folder,
                tokens_folder=data.tokens.folder,
                reference_folder=data.reference_folder,
                held_out=data.held_out,
                fingerprints=data.fingerprints,
                total_steps=steps,
                score=score,
            )
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=cast(Any, RunConfig)(  # type checkers see the class of Ray Train V1
            name=TRAIN_FOLDER,
            storage_path=str(run_folder),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            logging_config=LoggingConfig(log_level="WARNING"),  # the console has a table of its own
            callbacks=[*callbacks, EndAtOwnError()],
        ),
    )
    try:
        with (
            RunDisplay(run_folder, steps, config.logging.every, Objective(config).parts)
            if display
            else contextlib.nullcontext(),
            own_errors(),
            keyboard_interrupt(f"to go on: mlc-ray train --resume {run_folder}"),
        ):
            result: Any = trainer.fit()
    except DivergedError as error:
        record_divergence(run_folder, error)
        raise DivergedError(
            f"run {str(run_folder)!r} ended at {error}", step=error.step, bundles=error.bundles
        ) from None
    return TrainResult(run_folder, find_checkpoint(run_folder), dict(result.metrics or {}))


def prepare_data(config: TrainConfig, *, cache_dir: Path, layer: int, gpu: bool) -> PreparedData:
    """Token rows and, where the loss needs them, cached reference numbers for `config`; existing ones are reused.

    Raises:
        MissingAnswersError: Bundles lack answers that the loss needs; found before a model is loaded.
        ValidationError: Held-out bundles are trained on.
        BudgetError: A group of bundles that are compared with each other does not fit into a forward.
    """
    tokens = prepare_token_rows(config.data, config.model, cache_dir=cache_dir)
    check_answers(config, tokens)
    held_out = _held_out_tokens(config, tokens, cache_dir)
    _check_groups(config, tokens, held_out, gpu=gpu)
    fingerprints = {
        "model": fingerprint_model(config.model.path),
        "tokens": tokens.fingerprint,
        "training": fingerprint(_what_must_not_change(config)),
    }
    reference_folder = held_out_reference = None
    cached = config.needs_reference and config.reference == "cached"
    if cached:
        reference_folder, fingerprints["reference"] = prepare_reference(
            config, tokens, layer=layer, cache_dir=cache_dir, gpu=gpu
        )
    if held_out is None:
        return PreparedData(tokens, reference_folder, fingerprints)
    fingerprints["validation"] = held_out.fingerprint
    if cached:
        held_out_reference, _ = prepare_reference(config, held_out, layer=layer, cache_dir=cache_dir, gpu=gpu)
    return PreparedData(tokens, reference_folder, fingerprints, HeldOut(held_out.folder, held_out_reference))


def _held_out_tokens(config: TrainConfig, training: TokenArtifact, cache_dir: Path) -> TokenArtifact | None:
    section = held_out_section(config.data)
    if section is None:
        return None
    tokens = prepare_token_rows(section, config.model, cache_dir=cache_dir)
    check_answers(config, tokens)
    check_held_out(tokens, training)
    return tokens


def _check_groups(config: TrainConfig, tokens: TokenArtifact, held_out: TokenArtifact | None, *, gpu: bool) -> None:
    """Refuse a budget that a group of bundles exceeds, where it is known before workers look at their memory.

    Raises:
        BudgetError: It does.
    """
    budget = tokens_per_forward(config, gpu=gpu)
    if budget is None:
        return
    cutting = cutting_of(config, tokens, tokens_per_forward=budget, world_size=config.cluster.workers)
    check_groups(tokens, tapping(order_of(config, tokens), cutting, _total_steps(config, tokens)), cutting)
    if held_out is not None:
        batches = batches_of(held_out, seed=config.seed, at_once=config.train.batch_bundles)
        check_groups(held_out, batches, held_out_cutting(cutting, held_out))


def load_run_config(run: Path) -> TrainConfig:
    """The config that a run was started with.

    Raises:
        RunError: `run` is not a run folder.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise RunError(f"{str(run)!r} is not a run folder: it has no {CONFIG_FILE}")
    return load_config(TrainConfig, path)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    def absolute(sources: list[SourceSection]) -> list[SourceSection]:
        return [source.model_copy(update={"path": absolute_if_here(source.path)}) for source in sources]

    model = config.model.model_copy(update={"path": absolute_if_here(config.model.path)})
    data = config.data.model_copy(update={"train": absolute(config.data.train)})
    if data.validation is not None:
        validation = data.validation.model_copy(update={"sources": absolute(data.validation.sources)})
        data = data.model_copy(update={"validation": validation})
    return config.model_copy(update={"model": model, "data": data})


def _with_dtype(config: TrainConfig, *, gpu: bool) -> TrainConfig:
    """What the workers compute in is decided here, before anything is loaded, and recorded with the run."""
    model = with_dtype(config.model, gpu=gpu)
    if model is config.model:
        return config
    given = config.model_dump(mode="json", exclude_unset=True)
    return parse_config(TrainConfig, {**given, "model": {**given["model"], "dtype": model.dtype}})


def _with_dtype_of(folder: Path, config: TrainConfig) -> TrainConfig:
    """A resumed run computes in the same type as before, on whatever machine it is now."""
    dtype = load_run_config(folder).model.dtype
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def _run_folder(config: TrainConfig, resume: Path | None) -> tuple[Path, bool]:
    """The run's folder, and whether the run is a new one."""
    if resume is not None:
        folder = Path(resume).expanduser().resolve()
        if not (folder / CONFIG_FILE).is_file():
            raise RunError(f"--resume {str(resume)!r}: not a run folder, it has no {CONFIG_FILE}")
        return folder, False
    folder = (output_folder(config.output_dir) / config.name).resolve()
    if not (folder / CONFIG_FILE).exists():
        return folder, True
    if config.resume == "never":
        raise _exists_already(folder)
    _refuse_other_settings(folder, config)
    return folder, False


def _ended(folder: Path) -> TrainResult | None:
    """What the run in `folder` came to, if the checkpoint of its last step is there."""
    try:
        steps = Place(folder / RUN_FILE).read_json()["total_steps"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not written yet, or damaged: going on writes it anew
        return None
    checkpoints = list_checkpoints(folder)
    if not checkpoints or checkpoints[-1] != checkpoint_folder(folder, steps):
        return None
    rows = list(read_metrics(folder))
    return TrainResult(folder, checkpoints[-1], rows[-1] if rows else {})


def _refuse_other_settings(folder: Path, config: TrainConfig) -> None:
    """Refuse to resume the run in `folder` with settings that make it another run.

    Raises:
        RunError: It was started with other ones.
    """
    before, now = (by_dotted_name(_what_makes_the_run(each)) for each in (load_run_config(folder), config))
    if now["model.dtype"] == "auto":  # it becomes what it was
        now["model.dtype"] = before["model.dtype"]
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        differences = ", ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in changed)
        raise RunError(
            f"resume='auto': run folder {str(folder)!r} holds a run with other settings ({differences}): give the run "
            "another name, or the settings it has"
        )


def _exists_already(folder: Path) -> RunError:
    return RunError(
        f"run folder {str(folder)!r} exists already: choose another name, remove it, or go on with it by "
        f"`mlc-ray train --resume {folder}` or by resume=auto"
    )


@contextlib.contextmanager
def _claimed(folder: Path, config: TrainConfig) -> Iterator[None]:
    """Take the run's name by writing its config.yaml before data are prepared, which may last minutes.

    When preparing fails, the name is free again, since the fix is another setting; a driver that is killed meanwhile
    leaves the file, and can be resumed.

    Raises:
        RunError: Another run has taken the name.
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
    except OSError:  # no hard links here, as on mounted object stores: less safe against a race, but a run can start
        if path.exists():
            raise _exists_already(folder) from None
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: the user has put something into it
            folder.rmdir()
        raise


def _what_must_not_change(config: TrainConfig) -> dict[str, Any]:
    """Settings that a resumed run must share with its checkpoint; how to log, keep, cut or try again may differ."""
    return config.model_dump(
        mode="json",
        include={"seed", "reference", "model", "objective", "mlc", "terms", "optimizer", "train"},
        exclude={"optimizer": {"max_retries"}, "train": {"tokens_per_forward"}},
    )


def _what_makes_the_run(config: TrainConfig) -> dict[str, Any]:
    """Settings by which a run is the same one when it is started again; machines, logs and bounds may differ."""
    how_often = {"data": {"validation": {"every"}}}
    data_and_engine = config.model_dump(mode="json", include={"data", "engine"}, exclude=how_often)
    return {**_what_must_not_change(config), **data_and_engine}


def _total_steps(config: TrainConfig, tokens: TokenArtifact) -> int:
    return total_steps(
        len(tokens),
        epochs=config.train.epochs,
        batch_bundles=config.train.batch_bundles,
        max_steps=config.train.max_steps,
    )


def _announce(config: TrainConfig, tokens: TokenArtifact, steps: int, *, gpu: bool) -> None:
    """Say how the batches are cut, where that is known before workers look at their memory."""
    budget = tokens_per_forward(config, gpu=gpu)
    if budget is None:
        return
    cutting = cutting_of(config, tokens, tokens_per_forward=budget, world_size=config.cluster.workers)
    outlook = look_ahead(tokens, order_of(config, tokens), cutting, steps)
    logger.info("%s", "\n  ".join(said_of(outlook, cutting, config.train.batch_bundles)))


def _describe_run(
    folder: Path, config: TrainConfig, fingerprints: dict[str, str], tokens: TokenArtifact, steps: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        folder / RUN_FILE,
        {
            "resolved_config": config.model_dump(mode="json"),
            "fingerprints": fingerprints,
            "bundles": len(tokens),
            "languages": list(tokens.languages),
            "total_steps": steps,
            "versions": library_versions(),
        },
    )
