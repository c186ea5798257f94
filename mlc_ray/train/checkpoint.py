"""Checkpoint folders: written by all workers straight into the run's folder, trusted only when complete and undamaged.

A run's folder may be on any storage: nothing is renamed, linked or appended to. A folder is a checkpoint once it has a
manifest, which is written last and removed first.

model/                 the policy: safetensors and tokenizer (full-parameter runs)
adapter/               the LoRA adapters in peft's format (LoRA runs; model/ is made at export)
extractor.safetensors  the extractor, if there is one; dropped at export
state/                 float32 weights and AdamW's moments, by parameter and range: see `shards`
random_state_*         random numbers, one file a worker
manifest.json          resolved config, fingerprints, step, bundles consumed, number of workers, versions, and of every
                       file its size and checksum
damaged.txt            of one that was found damaged: what is wrong with it

A trial of a search is scored by `weights_NNNNNN` beside these folders: a policy or adapter, the extractor and a
manifest, which says in `ends` whether its step was the run's last one. No run goes on from them.

Nothing in it depends on the number of workers or on how their engine shards: any layout goes on from any other's.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load

from mlc_ray.checkpoints import read_checkpoint
from mlc_ray.config import TrainConfig
from mlc_ray.config.train import CheckpointSection
from mlc_ray.runs import (
    DAMAGED_FILE,
    METRICS_FILE,
    TRAIN_FOLDER,
    checkpoint_folders,
    complete_checkpoints,
    is_set_aside,
    weights_folders,
)
from mlc_ray.storage import (
    MANIFEST,
    IncompleteArtifactError,
    Place,
    fingerprint,
    verify_checksums,
)
from mlc_ray.train.collectives import from_rank_zero, gather_objects, rank_and_workers
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.loop import Progress
from mlc_ray.train.random_state import restore_random_state
from mlc_ray.train.shards import CheckpointError, ShardReader, read_index

logger = logging.getLogger(__name__)

STATE, INDEX = "state", "index.json"


def load_checkpoint(folder: Place, *, engine: Engine, config: TrainConfig, fingerprints: Mapping[str, str]) -> Progress:
    """Load a checkpoint into the engine, with optimizer and random state; returns the progress that it was made at.

    A worker reads the ranges that it needs, from whichever files hold them. One that the run did not have before draws
    random numbers of its own, by seed, rank and step.

    Raises:
        CheckpointError: if the folder is incomplete or damaged, of another model, or from other data.
    """
    manifest = verified_manifest(folder)
    for name, value in fingerprints.items():
        if manifest["fingerprints"].get(name) != value:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} was trained with {name}={manifest['fingerprints'].get(name)!r}, "
                f"now it is {value!r}: it has changed since; start a new run under another name"
            )
    with ShardReader(folder / STATE, read_index(folder / STATE / INDEX)) as reader:
        reader.check(element_counts(engine))
        engine.load_state(reader, manifest["step"])
    if (own := folder / random_file(engine.rank)).is_file():
        with own.open() as file:
            restore_random_state(load(file.read()))
    else:
        torch.manual_seed(int(fingerprint([config.seed, engine.rank, manifest["step"]])[:15], 16))
    return Progress(manifest["step"], manifest["bundles_consumed"], manifest["validation_before"])


def agree_on_checkpoint(run: Place, logged: int | None = None) -> Place | None:
    """The newest undamaged checkpoint of a run, the same on all workers; every worker calls it, at its start.

    Rank 0 looks which one is the newest, and each worker computes the checksums of its share of the files. Where one is
    wrong for rank 0 too, the checkpoint is set aside by a file `damaged.txt` in it, a warning says so, and the one
    before is looked at. One whose steps were not logged is passed over and stays, as rows may come back.
    What has no manifest is what a run that died left unfinished: rank 0 removes it.

    Args:
        run: its folder.
        logged: on rank 0, the last step of which the metrics have a row; None where nothing is logged.

    Returns:
        Its folder; None where the run has not written one yet.

    Raises:
        CheckpointError: on every worker: one of them does not see what rank 0 sees; or no checkpoint is
            undamaged and logged.
    """
    rank, workers = rank_and_workers()
    if rank == 0:
        _remove_unfinished(run)
    while True:
        newest, refusal = from_rank_zero(_newest(run, logged) if rank == 0 else (None, None))
        if refusal is not None:
            raise CheckpointError(refusal)
        if newest is None:
            return None
        faults = gather_objects((fault_in(newest, rank, workers), socket.gethostname()))
        faulty = next((number for number, (fault, _) in enumerate(faults) if fault is not None), None)
        if faulty is None:
            return newest
        if rank == 0:
            fault, host = faults[faulty]
            refusal = _set_aside(newest, str(fault), host, own=fault_in(newest, faulty, workers))
        if (refusal := from_rank_zero(refusal)) is not None:
            raise CheckpointError(refusal)


def _remove_unfinished(run: Place) -> None:
    for _, folder in checkpoint_folders(run):
        if not (folder / MANIFEST).is_file() and not is_set_aside(folder):
            logger.warning("removing %s: it has no %s, so its writing was cut off", folder, MANIFEST)
            folder.remove()


def _newest(run: Place, logged: int | None) -> tuple[Place | None, str | None]:
    """The newest checkpoint by name, if there is one; and why a run does not start over where none is usable."""
    folders = checkpoint_folders(run)
    damaged = [folder.name for _, folder in folders if is_set_aside(folder)]
    # What is listed without a manifest has been removed: some stores list a folder after its last file is gone.
    usable = [each for each in folders if each[1].name not in damaged and (each[1] / MANIFEST).is_file()]
    if usable:
        step, newest = next((each for each in reversed(usable) if logged is None or each[0] <= logged), usable[0])
        if logged is None or usable[-1][0] <= logged:
            return newest, None
        last, unlogged = usable[-1]
        lost = f"{str(run / METRICS_FILE)!r} has no rows of steps {logged + 1} to {last}"
        if step <= logged:
            logger.warning("%s: %s is passed over, and %s is taken", lost, unlogged.name, newest.name)
            return newest, None
        return None, (
            f"{lost}, and no usable checkpoint is of a step before these: restore the file from a copy, or start a "
            f"new run from the model that `mlc-ray export` makes of {str(unlogged)!r}"
        )
    if not damaged:
        return None, None
    return None, (
        f"run {str(run)!r} has no usable checkpoint left: {', '.join(damaged)} in {TRAIN_FOLDER}/ are damaged. Restore "
        f"one of them from a copy and remove {DAMAGED_FILE} in it, or remove them all to start over from step 0"
    )


def _set_aside(folder: Place, fault: str, host: str, *, own: str | None) -> str | None:
    """Mark a damaged checkpoint; where this process does not see the fault, mark nothing and return what to say."""
    if own is None:
        return (
            f"a worker on {host} does not see checkpoint {str(folder)!r} as rank 0 on {socket.gethostname()} does: "
            f"{fault}; give all nodes the same storage"
        )
    (folder / DAMAGED_FILE).write_text(f"{fault}\n")
    logger.warning("not a usable checkpoint: %s; %s in it says so from now on", fault, DAMAGED_FILE)
    return None


def prune_checkpoints(run: Place, settings: CheckpointSection, saved: int) -> None:
    """Remove all checkpoints of a run but the latest `checkpoint.keep`, and those of `checkpoint.keep_every`.

    Not among the latest are those that were set aside, those of steps after `saved`, which a resumed run passed
    over, and what is left of one whose removal was cut off; they are removed with the others of their age.
    """
    folders = checkpoint_folders(run)
    until = [(step, folder) for step, folder in folders if step <= saved]
    usable = [step for step, folder in until if (folder / MANIFEST).is_file() and not is_set_aside(folder)]
    oldest = min(usable[-settings.keep :], default=0)
    for step, folder in folders:
        if step < oldest and (settings.keep_every is None or step % settings.keep_every):
            remove_checkpoint(folder)


def remove_checkpoint(folder: Place) -> None:
    """Remove a checkpoint, if it is there: the manifest first, so that what is left of it is none."""
    (folder / MANIFEST).remove()
    folder.remove()


def verified_manifest(folder: Place) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        CheckpointError: A file is missing or cut short, or the checkpoint was set aside as damaged.
    """
    if is_set_aside(folder):
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was found damaged: {DAMAGED_FILE} in it says where; use another one, or "
            f"restore its files from a copy and remove {DAMAGED_FILE}"
        )
    try:
        return read_checkpoint(folder)
    except IncompleteArtifactError as error:
        raise CheckpointError(f"not a usable checkpoint: {error}") from None


def list_checkpoints(run: Place) -> list[Place]:
    """Complete checkpoints of a run, oldest first; incomplete ones are left out."""
    return [checkpoint.folder for checkpoint in complete_checkpoints(run)[0]]


def prune_weights(run: Place, kept: Place) -> None:
    """Remove the weights of all steps of a run but `kept`."""
    for folder in weights_folders(run):
        if folder != kept:
            remove_checkpoint(folder)


def damaged_weights(run: Place) -> list[tuple[Place, str]]:
    """The weights of a run of which a file is not what was written, each with what is wrong; reads all of them."""
    written = [folder for folder in weights_folders(run) if (folder / MANIFEST).is_file()]
    return [(folder, fault) for folder in written if (fault := fault_in(folder)) is not None]


def last_weights(run: Place) -> tuple[Place, int] | None:
    """The weights that a run ended with, and their step, if they are there and whole; a search scores them."""
    for folder in reversed(weights_folders(run)):
        if (folder / MANIFEST).is_file():
            manifest = verified_manifest(folder)
            return (folder, manifest["step"]) if manifest.get("ends") else None
    return None


def find_checkpoint(run: Place, name: str | None = None) -> Place:
    """The newest complete checkpoint of a run, or that called `name`; `run` may be one, or a step's weights, itself.

    Raises:
        CheckpointError: The run has no complete one, or none of that name; or the one asked for is not whole, or was
            set aside as damaged.
    """
    if (run / MANIFEST).is_file() and any((run / part).is_dir() for part in (STATE, "model", "adapter")):
        verified_manifest(run)
        return run
    if name is not None:
        folder = run / TRAIN_FOLDER / name
        if not folder.is_dir():
            names = ", ".join(p.name for p in list_checkpoints(run)) or "none"
            raise CheckpointError(f"run {str(run)!r} has no checkpoint {name!r}; complete ones: {names}")
        verified_manifest(folder)
        return folder
    complete = list_checkpoints(run)
    if not complete:
        why = f"looked for train/checkpoint_*/{MANIFEST}" if run.is_dir() else "there is no such folder"
        raise CheckpointError(f"{str(run)!r} holds no complete checkpoint ({why})")
    return complete[-1]


def fault_in(folder: Place, rank: int = 0, workers: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint that fall to this worker; sizes are looked at by every one."""
    try:
        manifest = read_checkpoint(folder)
        own = sorted(manifest["files"])[rank::workers]
        verify_checksums(folder, manifest, own)
        if f"{STATE}/{INDEX}" in own:
            read_index(folder / STATE / INDEX)
    except (IncompleteArtifactError, CheckpointError) as error:
        return str(error)
    return None


def element_counts(engine: Engine) -> dict[str, int]:
    """The number of elements of each trainable parameter of what an engine trains."""
    named = engine.module.named_parameters()
    return {name: torch.Size(engine.shape(p)).numel() for name, p in named if p.requires_grad}


def random_file(rank: int) -> str:
    """The file of a worker's random numbers in a checkpoint."""
    return f"random_state_{rank:05d}.safetensors"
