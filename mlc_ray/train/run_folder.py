"""A run's folder, as the driver sees it: whose it is, what it was started with, and what it came to. No Ray here."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlc_ray.config import DataSection, SourceSection, TrainConfig, apply_override, dump_yaml, parse_config, parse_yaml
from mlc_ray.data.hub import HubName
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import (
    CONFIG_FILE,
    FINISHED_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    TRAIN_FOLDER,
    checkpoint_folder,
    complete_checkpoints,
    output_place,
    read_metrics,
)
from mlc_ray.storage import NO_COMMITS, Commits, Place, StorageFaultError, library_versions, without_commit
from mlc_ray.storage.hub import is_commit
from mlc_ray.train.checkpoint import fault_in, find_checkpoint, last_weights, list_checkpoints
from mlc_ray.train.file_writer import with_retries
from mlc_ray.train.meter import Metrics
from mlc_ray.train.settings import Change, changes, refuse_fixed, refuse_other_content

logger = logging.getLogger(__name__)

_COMMITS = "commits"
"""Of run.json: what names of the hub, as they were given, stood for when the run began."""


class RunError(MlcRayError):
    """A run cannot start or go on; the message quotes the folder and names the fix."""


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run is, its newest checkpoint (of a trial, its last weights; of a cell, where its model is or
    was), and the last step's metrics."""

    run_folder: Place
    checkpoint: Place
    metrics: Metrics


def load_run_config(run: Path | Place, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config that a run was last started with, and overrides `section.field=value` of it.

    Raises:
        RunError: `run` is not a run folder.
        ConfigError: The overrides are invalid.
    """
    file = Place(run) / CONFIG_FILE
    try:
        raw = parse_yaml(file.read_text(), str(file))
    except (FileNotFoundError, NotADirectoryError):
        why = f"it has no {CONFIG_FILE}" if Place(run).is_dir() else "there is no such folder"
        raise RunError(f"{str(run)!r} is not a run folder: {why}") from None
    for override in overrides:
        apply_override(raw, override)
    return parse_config(TrainConfig, raw)


def find_run_folder(config: TrainConfig, resume: Path | Place | None) -> tuple[Place, bool]:
    """The run's folder, and whether the run is a new one.

    Raises:
        RunError: `resume` is no run folder, or without it and with `resume: never` the folder is there already.
    """
    if resume is not None:
        folder = Place(resume).absolute()
        if not (folder / CONFIG_FILE).is_file():
            raise RunError(f"--resume {str(resume)!r}: not a run folder, it has no {CONFIG_FILE}")
        if config.output_dir != (written := load_run_config(folder).output_dir):
            raise RunError(
                f"--resume {str(resume)!r} goes on in that folder, but output_dir={config.output_dir!r} is another one "
                f"than {written!r}: leave it out"
            )
        return folder, False
    folder = (output_place(config.output_dir) / config.name).absolute()
    if not (folder / CONFIG_FILE).is_file():
        return folder, True
    if config.resume == "never":
        raise _exists_already(folder)
    return folder, False


def with_dtype_of(folder: Place, config: TrainConfig) -> TrainConfig:
    """`config` with `model.dtype: auto` replaced by what the run in `folder` computes in, wherever it is now."""
    if config.model.dtype != "auto":
        return config
    dtype = load_run_config(folder).model.dtype
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def with_sources(config: TrainConfig, change: Callable[[Sequence[SourceSection]], list[SourceSection]]) -> TrainConfig:
    """`config` with what `change` makes of its sources, those of training and those held out."""
    data = config.data.model_copy(update={"train": change(config.data.train)})
    if data.validation is not None:
        validation = data.validation.model_copy(update={"sources": change(data.validation.sources)})
        data = data.model_copy(update={"validation": validation})
    return config.model_copy(update={"data": data})


def with_model(config: TrainConfig, path: str) -> TrainConfig:
    """`config` with another `model.path`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def with_commits_of(folder: Place, config: TrainConfig) -> TrainConfig:
    """`config` whose names of the hub have the commits that they stood for when the run in `folder` began."""
    commits: Commits = _facts(Place(folder)).get(_COMMITS, NO_COMMITS)
    models, data_sets = commits["model"], commits["data set"]
    began = load_run_config(folder)
    data, model = began.data, models.get(config.model.path, config.model.path)
    if without_commit(began.model.path) == model:
        model = began.model.path
    stored = iter([data.train, data.validation.sources if data.validation is not None else []])

    def known(sources: Sequence[SourceSection]) -> list[SourceSection]:
        found = [source.model_copy(update={"path": data_sets.get(source.path, source.path)}) for source in sources]
        # A run that died while it prepared its data has no such record yet, but the commits at their places.
        for position, (source, before) in enumerate(zip(sources, next(stored), strict=False)):
            name = HubName.parse(before.path)
            if name is not None and is_commit(name.revision) and str(replace(name, revision=None)) == source.path:
                found[position] = source.model_copy(update={"path": before.path})
        return found

    return with_sources(with_model(config, model), known)


def commits_of(given: TrainConfig, pinned: TrainConfig) -> Commits:
    """What each name of the hub in `given` stands for in `pinned`."""
    sources = zip(_sources(given.data), _sources(pinned.data), strict=True)
    return {
        "model": {given.model.path: pinned.model.path} if given.model.path != pinned.model.path else {},
        "data set": {one.path: other.path for one, other in sources if one.path != other.path},
    }


def _sources(data: DataSection) -> list[SourceSection]:
    """Those of training, and those held out."""
    return [*data.train, *(data.validation.sources if data.validation is not None else ())]


def changed_settings(folder: Place, config: TrainConfig) -> list[Change]:
    """The settings in which `config` differs from those that the run in `folder` was last started with.

    Raises:
        SettingsChangedError: One of them must not change.
    """
    before = _facts(folder).get("resolved_config") or load_run_config(folder).model_dump(mode="json")
    changed = changes(before, config)
    refuse_fixed(changed, folder)
    return changed


def ended(folder: Place) -> TrainResult | None:
    """What the run in `folder` came to, if it is marked as finished or the checkpoint of its last step is there.

    All of that checkpoint is read: where a file of it is not what was written, the run has not ended, and goes on from
    the one before.
    """
    if (folder / FINISHED_FILE).is_file():  # its checkpoints may be gone
        rows = list(read_metrics(folder))
        return TrainResult(folder, folder / MODEL_FOLDER, rows[-1] if rows else {})
    steps = _facts(folder).get("total_steps")
    checkpoints = list_checkpoints(folder)
    if steps is None or not checkpoints or checkpoints[-1] != checkpoint_folder(folder, steps):
        return None
    logger.info("%s is the last one: its files are compared with their checksums", checkpoints[-1])
    if fault_in(checkpoints[-1]) is not None:  # it is set aside once workers see that, too
        return None
    rows = list(read_metrics(folder))
    return TrainResult(folder, checkpoints[-1], rows[-1] if rows else {})


def result_of(folder: Place) -> TrainResult:
    """What the run in `folder`, whose workers have just ended, came to; a storage that is away is asked three times.

    Raises:
        StorageFaultError: It still is: the run has ended, and its result cannot be told.
    """

    def read() -> TrainResult:
        rows, weights = read_metrics(folder), last_weights(folder)
        newest = find_checkpoint(folder) if weights is None else weights[0]
        return TrainResult(folder, newest, rows[-1] if rows else {})

    try:
        return with_retries(f"reading what run {folder} came to", read)
    except OSError as error:
        raise StorageFaultError(
            f"run {str(folder)!r} has ended after its last step, with a checkpoint in {str(folder / TRAIN_FOLDER)!r}, "
            f"but they cannot be read now: {error}. Nothing is left to train: once the storage answers, "
            f"`mlc-ray train --resume {folder}` says so"
        ) from error


@contextlib.contextmanager
def claimed(folder: Place, config: TrainConfig) -> Iterator[None]:
    """Take the run's name by writing its config.yaml before data are prepared, which may last minutes.

    The lease is held. Where the storage cannot decide between two drivers, it alone does.

    When preparing fails, the name is free again, since the fix is another setting; a driver that is killed meanwhile
    leaves the file, and can be resumed.

    Raises:
        RunError: Another run has taken the name.
    """
    file = folder / CONFIG_FILE
    created = file.create(_as_yaml(config))
    if created is False or (created is None and file.is_file()):
        raise _exists_already(folder)
    if created is None:
        file.write_text(_as_yaml(config))
    try:
        yield
    except BaseException:
        file.remove()
        if folder.is_local:
            with contextlib.suppress(OSError):  # not empty: the user has put something into it
                Path(folder).rmdir()
        raise


def record_start(
    folder: Place,
    config: TrainConfig,
    fingerprints: Mapping[str, str],
    tokens: TokenArtifact,
    steps: int,
    commits: Commits = NO_COMMITS,
) -> None:
    """Write what a run starts or goes on with into config.yaml and run.json, and there too what changed since before.

    Args:
        folder: the run's, with its config.yaml.
        config: the settings that it now runs with.
        fingerprints: of the model and the bundles.
        tokens: the bundles as tokens.
        steps: optimizer steps of the whole run.
        commits: what names of the hub that were given stand for, as of `commits_of`.

    Raises:
        SettingsChangedError: A setting or a content differs that must not; nothing is written then.
    """
    facts = _facts(folder)
    changed = changed_settings(folder, config)
    if "fingerprints" in facts:
        refuse_other_content(facts["fingerprints"], fingerprints, changed, folder)
    complete, _ = complete_checkpoints(folder)
    when = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": complete[-1].step if complete else 0}
    history = [{**when, "field": each.field, "before": each.before, "now": each.now} for each in changed]
    (folder / RUN_FILE).write_json(
        {
            "id": facts.get("id", uuid.uuid4().hex),
            "resolved_config": config.model_dump(mode="json"),
            "fingerprints": dict(fingerprints),
            "bundles": len(tokens),
            "languages": list(tokens.languages),
            _COMMITS: {kind: {**known, **commits[kind]} for kind, known in facts.get(_COMMITS, NO_COMMITS).items()},
            "chat": config.chat.model_dump(mode="json"),
            "total_steps": steps,
            "versions": library_versions(),
            "changes": [*facts.get("changes", []), *history],
        }
    )
    (folder / CONFIG_FILE).write_text(_as_yaml(config))


def run_id(folder: Place) -> str:
    """The id that a run has had since its first start, as trackers know it.

    Raises:
        RunError: run.json lacks it.
    """
    found = _facts(folder).get("id")
    if not isinstance(found, str):
        raise RunError(f"{str(folder / RUN_FILE)!r} has no id: restore the file, or start the run under another name")
    return found


def _facts(folder: Place) -> dict[str, Any]:
    """What run.json says; nothing where it is not written yet or damaged: going on writes it anew."""
    try:
        facts = (folder / RUN_FILE).read_json()
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _as_yaml(config: TrainConfig) -> str:
    return dump_yaml(config.model_dump(mode="json", exclude_unset=True))


def _exists_already(folder: Place) -> RunError:
    return RunError(
        f"run folder {str(folder)!r} exists already: choose another name, remove it, or go on with it by "
        f"`mlc-ray train --resume {folder}` or by resume=auto"
    )
