"""One training run on Ray, seen from the driver: prepare data, start the workers (see `worker`), wait for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ray.train import UserCallback

from mlc_ray.capacity import workers_needed
from mlc_ray.cluster import check_fits, connect, use_gpu, with_dtype
from mlc_ray.config import DataSection, SourceSection, TrainConfig, parse_config, resolve_layer
from mlc_ray.data.plan import Cutting
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.sources import pinned
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.lease import LeaseGuard, lease
from mlc_ray.log_files import log_file
from mlc_ray.logs import keep_in
from mlc_ray.losses.objective import Objective
from mlc_ray.nodes import check_nodes
from mlc_ray.plan.check import check_run
from mlc_ray.plan.cutting import cutting_of, order_of, steps_of, tokens_per_forward
from mlc_ray.plan.lengths import of_artifact
from mlc_ray.runs import TRAIN_FOLDER, artifact_cache
from mlc_ray.storage import Place, absolute_if_here, fingerprint_model, local_side, pinned_model
from mlc_ray.train.answers import check_answers
from mlc_ray.train.console import RunDisplay
from mlc_ray.train.divergence import DivergedError, record_divergence
from mlc_ray.train.entry import HeldOut, WeightsScorer, WorkerSpec, train_worker
from mlc_ray.train.failures import error_inside, failure_kept
from mlc_ray.train.model import check_device, model_depth
from mlc_ray.train.openings import branches_of, fingerprint_openings, refusals_unlike
from mlc_ray.train.planning import (
    check_groups,
    check_kinds,
    check_terms,
    held_out_cutting,
    look_ahead,
    not_measured,
    said_of,
    tapping,
)
from mlc_ray.train.preemption import PreemptedError, StopFile, WorkersPreemptedError
from mlc_ray.train.reference_cache import prepare_references
from mlc_ray.train.run_folder import (
    TrainResult,
    changed_settings,
    claimed,
    commits_of,
    ended,
    find_run_folder,
    record_start,
    result_of,
    with_commits_of,
    with_dtype_of,
    with_model,
    with_sources,
)
from mlc_ray.train.tracking import check_trackers
from mlc_ray.train.validation import batches_of, check_held_out, held_out_section
from mlc_ray.train.watchdog import hang_error
from mlc_ray.train.workers import run_workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """What a run reads, on disk: made once, and used again by every later run that needs the same."""

    tokens: TokenArtifact
    reference_folder: Place | None
    fingerprints: dict[str, str]
    held_out: HeldOut | None = None


def train(
    config: TrainConfig,
    *,
    resume: Path | Place | None = None,
    score: WeightsScorer | None = None,
    callbacks: Sequence[UserCallback] = (),
    display: bool = True,
) -> TrainResult:
    """Train to the end and return where everything is.

    Args:
        config: the run. With `resume: auto` it starts, or goes on from its last complete checkpoint where its folder is
            there, so that the same command can be given again after whatever ended it.
        resume: go on with the run in this folder, by its own settings (`run_folder.load_run_config`), of which those
            may differ that `settings.KINDS` lets change.
        score: called with the weights of every `score.every` steps and of the last; the run then ends with those, and
            with a checkpoint only if `score.keep_state`.
        callbacks: Ray Train's own.
        display: show progress on the console.

    Raises:
        RunError: a new run's folder exists already, or a resumed one's does not.
        LeaseError: another driver works in the run's folder. With `resume: auto` it is waited for whether that one is
            alive.
        SettingsChangedError: the run to go on with has other settings, model or bundles.
        DivergedError: the loss or its gradients stayed non-finite; the run's folder says so from then on.
        ModelError: the model's kernels need a GPU, and there is none.
        NodeError: a node does not see what it needs, or has other versions.
        PlanError: it cannot fit into the memory of its workers (`cluster.plan`).
        HangError: workers made no progress for `cluster.hang_timeout` seconds, more often than `cluster.max_failures`.
        PreemptedError: the driver got SIGTERM, or a worker did, more often than `cluster.max_failures`; the run saved a
            checkpoint, and can be resumed.
        MlcRayError: a worker raised it (`CheckpointError`, `ModelError`, ...). Like a `DivergedError`, it ends the run:
            `cluster.max_failures` counts other failures only.
        KeyboardInterrupt: Ctrl-C; the workers have ended by then.
    """
    check_trackers(config)
    config = _with_absolute_paths(config)
    config, run_folder, is_new = _found(config, resume)  # refused before anything is started
    commits = {config.model.path: pinned_model(config.model.path)}
    depth = model_depth(commits[config.model.path], trust_remote_code=config.model.trust_remote_code)
    layer = resolve_layer(config.mlc.layer, depth)
    asks_whether_ended = score is None  # else the last checkpoint may lack its score
    if asks_whether_ended and not is_new and (result := ended(run_folder)) is not None:
        return _said_to_have_ended(result)
    keep_in(local_side(run_folder))
    connect(config.cluster.address, config.cluster.env)
    gpu = use_gpu(config.cluster.accelerator)
    check_device(config.model, gpu=gpu)
    check_fits(
        "training (cluster.workers x cluster.cpus_per_worker)",
        workers_needed(config.cluster, gpu=gpu),
    )
    if score is None:  # a search has asked before its trials
        check_nodes(run_folder.parent, paths_read(config))
        check_run(with_model(config, commits[config.model.path]), gpu=gpu)
    with lease(run_folder, wait=config.resume == "auto") as held, log_file(config.logging, run_folder):
        config, _, is_new = _found(config, resume)  # meanwhile another driver may have started it, or ended it
        if asks_whether_ended and not is_new and (result := ended(run_folder)) is not None:
            return _said_to_have_ended(result)
        given = _with_dtype(config, gpu=gpu)
        model = commits.get(given.model.path) or pinned_model(given.model.path)
        config = with_model(with_sources(given, pinned), model)
        with claimed(run_folder, config) if is_new else nullcontext():
            data = prepare_data(config, cache_dir=artifact_cache(run_folder.parent), layer=layer, gpu=gpu)
            steps = steps_of(config, data.tokens)
            _announce(config, data, steps, gpu=gpu)
        LeaseGuard(run_folder, held).check(now=True)  # preparing data may have taken hours
        record_start(run_folder, config, data.fingerprints, data.tokens, steps, commits_of(given, config))
        spec = WorkerSpec(
            config=config.model_dump(mode="json", exclude_unset=True),
            run_folder=run_folder,
            tokens_folder=data.tokens.folder,
            reference_folder=data.reference_folder,
            held_out=data.held_out,
            fingerprints=data.fingerprints,
            total_steps=steps,
            lease=held,
            score=score,
        )
        with failure_kept(run_folder):
            return _fit(config, spec, gpu=gpu, callbacks=callbacks, display=display)


def _said_to_have_ended(result: TrainResult) -> TrainResult:
    logger.info("run %s has ended already: there is nothing left to train", result.run_folder)
    return result


def _found(config: TrainConfig, resume: Path | Place | None) -> tuple[TrainConfig, Place, bool]:
    """The settings, with the type and the commits that a run to go on with has; its folder; and whether it is new."""
    run_folder, is_new = find_run_folder(config, resume)
    if not is_new:
        config = with_commits_of(run_folder, with_dtype_of(run_folder, config))
        changed_settings(run_folder, config)
    return config, run_folder, is_new


def _fit(
    config: TrainConfig, spec: WorkerSpec, *, gpu: bool, callbacks: Sequence[UserCallback], display: bool
) -> TrainResult:
    """Have Ray Train run the workers to their end."""
    run_folder = spec.run_folder
    to_go_on = f"mlc-ray train --resume {run_folder}"
    parts = Objective(config).parts
    shown = RunDisplay(run_folder, spec.total_steps, config.logging.every, parts) if display else nullcontext()
    try:
        with shown, StopFile(run_folder, spec.lease).at_sigterm():
            run_workers(
                train_worker,
                spec,
                config.cluster,
                workers=config.cluster.workers,
                gpu=gpu,
                name=TRAIN_FOLDER,
                storage=local_side(run_folder),
                goes_on="from the last checkpoint",
                to_go_on=to_go_on,
                callbacks=callbacks,
            )
    except (DivergedError, PreemptedError) as error:
        raise _of_the_run(error, spec, to_go_on) from None
    except Exception as error:
        if isinstance(error, MlcRayError) or (cause := _cause(error, config, spec, to_go_on)) is None:
            raise
        raise cause from error
    return result_of(run_folder)


def _of_the_run(error: DivergedError | PreemptedError, spec: WorkerSpec, to_go_on: str) -> MlcRayError:
    """The end that workers agreed on, in the words of the driver; a divergence is recorded in the run's folder."""
    run = spec.run_folder
    if isinstance(error, DivergedError):
        try:
            record_divergence(run, error)
        except OSError as fault:
            logger.warning("%s does not say that the run diverged: %s", run, fault)
        return DivergedError(f"run {str(run)!r} ended at {error}", step=error.step, bundles=error.bundles)
    return PreemptedError(
        f"run {str(run)!r} got SIGTERM at step {error.step} of {spec.total_steps} and ended after a checkpoint; to go "
        f"on: {to_go_on}",
        step=error.step,
    )


def _cause(error: Exception, config: TrainConfig, spec: WorkerSpec, to_go_on: str) -> MlcRayError | None:
    """Why Ray gave up: workers were taken away or hung more often than `cluster.max_failures`; None for all else."""
    what = f"run {str(spec.run_folder)!r}"
    if (preempted := error_inside(error, WorkersPreemptedError)) is not None:
        return PreemptedError(
            f"a worker of {what} got SIGTERM at step {preempted.step} of {spec.total_steps}, all ended after "
            f"a checkpoint, and none of cluster.max_failures={config.cluster.max_failures} restarts is left; to "
            f"go on: {to_go_on}",
            step=preempted.step,
        )
    return hang_error(spec.run_folder, spec.lease, what=what, to_go_on=to_go_on)


def prepare_data(config: TrainConfig, *, cache_dir: Path | Place, layer: int, gpu: bool) -> PreparedData:
    """Token rows and, where the loss needs them, cached reference numbers for `config`; existing ones are reused.

    Raises:
        MissingAnswersError: Bundles lack answers that the loss needs; found before a model is loaded.
        ValidationError: Held-out bundles are trained on.
        BudgetError: A group of bundles that are compared with each other does not fit into a forward.
        ConfigError: A term has no step in so short a run, or no bundles of both kinds, which it needs; or openings are
            given for a language that no bundle is in.
    """
    tokens = prepare_token_rows(config.data, config.model, chat=config.chat, cache_dir=cache_dir)
    held_out = check_tokens(config, tokens, cache_dir=cache_dir, gpu=gpu)
    check_run(config, gpu=gpu, weights=of_artifact(tokens, config if config.reads_decisions else None))
    artifacts = [tokens, *([held_out] if held_out is not None else [])]
    fingerprints = fingerprints_of(config, tokens, held_out, model=fingerprint_model(config.model.path))
    said: dict[str, Place] = {}
    if config.needs_reference and config.reference == "cached":
        said = prepare_references(config, artifacts, layer=layer, cache_dir=cache_dir, gpu=gpu)
    return PreparedData(
        tokens,
        said.get(tokens.fingerprint),
        fingerprints,
        None if held_out is None else HeldOut(held_out.folder, said.get(held_out.fingerprint)),
    )


def fingerprints_of(
    config: TrainConfig, tokens: TokenArtifact, held_out: TokenArtifact | None, *, model: str
) -> dict[str, str]:
    """What a run is made of, as its record has it: `model` before training, token rows, openings if they are read."""
    artifacts = [tokens, *([held_out] if held_out is not None else [])]
    return {
        "model": model,
        "tokens": tokens.fingerprint,
        **({"validation": held_out.fingerprint} if held_out is not None else {}),
        **({"openings": fingerprint_openings(config, artifacts)} if config.reads_decisions else {}),
    }


def check_tokens(
    config: TrainConfig, tokens: TokenArtifact, *, cache_dir: Path | Place, gpu: bool
) -> TokenArtifact | None:
    """Refuse token rows that `config` cannot train on; no model is loaded.

    Returns:
        The token rows that are held out, if any are.

    Raises:
        MlcRayError: As `prepare_data`.
    """
    check_answers(config, tokens)
    check_terms(config, steps_of(config, tokens))
    check_kinds(config, tokens)
    section = held_out_section(config.data)
    held_out = _held_out_tokens(config, section, tokens, cache_dir) if section is not None else None
    # Openings that a language lacks are found there, too.
    if Objective(config).needs_group or config.reads_decisions or section is not None:
        _check_groups(config, tokens, held_out, gpu=gpu)
    return held_out


def _held_out_tokens(
    config: TrainConfig, section: DataSection, training: TokenArtifact, cache_dir: Path | Place
) -> TokenArtifact:
    tokens = prepare_token_rows(section, config.model, chat=config.chat, cache_dir=cache_dir)
    check_answers(config, tokens)
    check_held_out(tokens, training)
    return tokens


def _check_groups(config: TrainConfig, tokens: TokenArtifact, held_out: TokenArtifact | None, *, gpu: bool) -> None:
    """Refuse a budget that a group of bundles exceeds, where it is known before workers look at their memory.

    Raises:
        BudgetError: It does.
    """
    artifacts = [tokens, *([held_out] if held_out is not None else [])]
    if (cutting := _cutting_known(config, artifacts, gpu=gpu)) is None:
        return
    check_groups(tokens, tapping(order_of(config, tokens), cutting, steps_of(config, tokens)), cutting)
    if held_out is not None:
        batches = batches_of(held_out, seed=config.seed, at_once=config.train.batch_bundles)
        check_groups(held_out, batches, held_out_cutting(cutting, held_out))


def paths_read(config: TrainConfig) -> dict[str, str]:
    """What a run reads beside its own folder, by the setting that names it."""
    sources = {"data.train": config.data.train}
    if config.data.validation is not None:
        sources["data.validation.sources"] = config.data.validation.sources
    found = {
        f"{name}.{index}.path": each.path for name, each_of in sources.items() for index, each in enumerate(each_of)
    }
    return {"model.path": config.model.path, **found}


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    def absolute(sources: Sequence[SourceSection]) -> list[SourceSection]:
        return [source.model_copy(update={"path": absolute_if_here(source.path)}) for source in sources]

    return with_sources(with_model(config, absolute_if_here(config.model.path)), absolute)


def _with_dtype(config: TrainConfig, *, gpu: bool) -> TrainConfig:
    """What the workers compute in is decided here, before anything is loaded, and recorded with the run."""
    model = with_dtype(config.model, gpu=gpu, labels=config.cluster.label_selector)
    if model is config.model:
        return config
    given = config.model_dump(mode="json", exclude_unset=True)
    return parse_config(TrainConfig, {**given, "model": {**given["model"], "dtype": model.dtype}})


def _announce(config: TrainConfig, data: PreparedData, steps: int, *, gpu: bool) -> None:
    """Say how the batches are cut, where that is known before workers look at their memory, and what pulls apart."""
    tokens = data.tokens
    artifacts = [tokens, *([TokenArtifact.open(data.held_out.tokens_folder)] if data.held_out is not None else [])]
    if (unlike := refusals_unlike(config, artifacts)) is not None:
        logger.warning("%s", unlike)
    if (unmeasured := not_measured(config, steps)) is not None:
        logger.info("%s", unmeasured)
    if (cutting := _cutting_known(config, artifacts, gpu=gpu)) is not None:
        outlook = look_ahead(tokens, order_of(config, tokens), cutting, steps)
        logger.info("%s", "\n  ".join(said_of(outlook, cutting, config.train.batch_bundles)))


def _cutting_known(config: TrainConfig, artifacts: Sequence[TokenArtifact], *, gpu: bool) -> Cutting | None:
    """By what the batches of the first of `artifacts` are cut, with openings for the languages of all; None where the
    workers must look at their memory first."""
    budget = tokens_per_forward(config, gpu=gpu)
    if budget is None:
        return None
    branches = branches_of(config, None, artifacts)
    workers = config.cluster.most_workers
    return cutting_of(config, artifacts[0], tokens_per_forward=budget, world_size=workers, branches=branches)
