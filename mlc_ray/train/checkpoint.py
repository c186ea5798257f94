"""Checkpoint folders: written by all workers straight into the run's folder, trusted only when complete and undamaged.

model/                 the policy: safetensors and tokenizer (full-parameter runs)
adapter/               the LoRA adapters in peft's format (LoRA runs; model/ is made at export)
extractor.safetensors  the extractor, dropped at export
state/                 float32 weights and AdamW's moments, by parameter and range: see `shards`
random_state_*         random numbers, one file a worker
manifest.json          resolved config, fingerprints, step, bundles consumed, number of workers, versions, and of every
                       file its size and checksum

Nothing in it depends on the number of workers or on how their engine shards: any layout goes on from any other's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlc_ray.config import TrainConfig
from mlc_ray.config.train import CheckpointSection
from mlc_ray.runs import TRAIN_FOLDER, checkpoint_folder, checkpoint_folders, complete_checkpoints
from mlc_ray.storage import (
    MANIFEST,
    SEAL,
    ArtifactError,
    IncompleteArtifactError,
    checksum,
    fingerprint,
    library_versions,
    read_manifest,
    sealed,
    verify_checksums,
    verify_files,
    write_json_atomic,
)
from mlc_ray.train.collectives import from_rank_zero, gather_objects, rank_and_workers
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.loop import Progress
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.train.random_state import random_state, restore_random_state
from mlc_ray.train.shards import CheckpointError, ShardReader, index_of, write_bytes, write_shards

logger = logging.getLogger(__name__)

STATE, INDEX = "state", "index.json"


def save_checkpoint(
    run: Path,
    *,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    progress: Progress,
    fingerprints: Mapping[str, str],
) -> Path:
    """Write a checkpoint of a run, and remove those that are no longer to be kept; every worker calls it.

    The workers write into a folder whose name starts with a dot. Once all their files are on the disk, rank 0 adds the
    manifest and gives the folder its name. When this returns, on whichever worker, the checkpoint is there.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: What the engine says that its workers own is not each trainable element once.
    """
    folder = checkpoint_folder(run, progress.step)
    writing = folder.with_name(f".{folder.name}.writing")
    if engine.rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        (writing / STATE).mkdir(parents=True)
    gather_objects(None)  # the folder is there from here on
    ranges, written = write_shards(writing / STATE, engine.rank, engine.owned_state())
    checksums = {f"{STATE}/{name}": value for name, value in written.items()}
    own_random = _random_state_file(writing, engine.rank)
    checksums[own_random.name] = write_bytes(own_random, save(random_state()))
    lora = config.model.lora is not None
    weights = engine.full_weights(trainable_only=lora)
    if weights is not None:
        checksums |= _save_weights(writing, engine.module, weights, tokenizer, lora=lora)
    everyones = gather_objects((ranges, checksums))
    if engine.rank == 0:
        index = index_of([part for part, _ in everyones], _sizes(engine))
        checksums = {name: value for _, part in everyones for name, value in part.items()}
        checksums[f"{STATE}/{INDEX}"] = write_bytes(writing / STATE / INDEX, json.dumps(index).encode())
        manifest = {
            "config": config.model_dump(mode="json", exclude_unset=True),
            "resolved_config": config.model_dump(mode="json"),
            "fingerprints": dict(fingerprints),
            "step": progress.step,
            "bundles_consumed": progress.bundles,
            "validation_before": progress.before,
            "world_size": engine.world_size,
            "versions": library_versions(),
            "files": {name: (writing / name).stat().st_size for name in sorted(checksums)},
            "checksums": dict(sorted(checksums.items())),
        }
        write_json_atomic(writing / MANIFEST, sealed(manifest))
        _remove(folder)
        os.rename(writing, folder)
        prune_checkpoints(run, config.checkpoint)
    gather_objects(None)
    return folder


def load_checkpoint(folder: Path, *, engine: Engine, config: TrainConfig, fingerprints: Mapping[str, str]) -> Progress:
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
    index = json.loads((folder / STATE / INDEX).read_text(encoding="utf-8"))
    reader = ShardReader(folder / STATE, index)
    reader.check(_sizes(engine))
    engine.load_state(reader, manifest["step"])
    if (own := _random_state_file(folder, engine.rank)).is_file():
        restore_random_state(load_file(own))
    else:
        torch.manual_seed(int(fingerprint([config.seed, engine.rank, manifest["step"]])[:15], 16))
    return Progress(manifest["step"], manifest["bundles_consumed"], manifest["validation_before"])


def agree_on_checkpoint(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, the same on all workers; every worker calls it, at its start.

    Rank 0 looks which one is the newest, and each worker computes the checksums of its share of the files. Where one is
    wrong for rank 0 too, the checkpoint is renamed to `checkpoint_NNNNNN.damaged`, a warning says so, and the one
    before is looked at. What a run that died left half written is removed.

    Returns:
        Its folder; None where the run has not written one yet.

    Raises:
        CheckpointError: on every worker: one of them does not see what rank 0 sees; or all checkpoints are damaged.
    """
    rank, workers = rank_and_workers()
    if rank == 0:
        for leftover in (run / TRAIN_FOLDER).glob(".checkpoint_*"):
            shutil.rmtree(leftover, ignore_errors=True)
    while True:
        newest, refusal = from_rank_zero(_newest(run) if rank == 0 else (None, None))
        if refusal is not None:
            raise CheckpointError(refusal)
        if newest is None:
            return None
        faults = gather_objects((_fault(newest, rank, workers), socket.gethostname()))
        faulty = next((number for number, (fault, _) in enumerate(faults) if fault is not None), None)
        if faulty is None:
            return newest
        if rank == 0:
            fault, host = faults[faulty]
            refusal = _set_aside(run, newest, str(fault), host, own=_fault(newest, faulty, workers))
        if (refusal := from_rank_zero(refusal)) is not None:
            raise CheckpointError(refusal)


def _newest(run: Path) -> tuple[Path | None, str | None]:
    """The newest checkpoint by name, if there is one; and why a run does not start over where none is usable."""
    if folders := [folder for _, folder in checkpoint_folders(run)]:
        return folders[-1], None
    damaged = sorted(path.name for path in (run / TRAIN_FOLDER).glob("checkpoint_*.damaged*"))
    if not damaged:
        return None, None
    return None, (
        f"run {str(run)!r} has no usable checkpoint left: {', '.join(damaged)} are damaged. Restore one of them (from "
        "a copy, without the end .damaged), or remove them to start over from step 0"
    )


def _set_aside(run: Path, folder: Path, fault: str, host: str, *, own: str | None) -> str | None:
    """Rename a damaged checkpoint; where this process does not see the fault, rename nothing and return what to say."""
    if own is None:
        return (
            f"a worker on {host} does not see checkpoint {str(folder)!r} as rank 0 on {socket.gethostname()} does: "
            f"{fault}; mount the same storage on all nodes"
        )
    aside, number = folder.with_name(f"{folder.name}.damaged"), 1
    while aside.exists():
        aside, number = folder.with_name(f"{folder.name}.damaged-{number}"), number + 1
    os.rename(folder, aside)
    before, _ = _newest(run)
    tried = f", and {before.name} is tried" if before is not None else ""
    logger.warning("not a usable checkpoint: %s; it is %s now%s", fault, aside.name, tried)
    return None


def prune_checkpoints(run: Path, settings: CheckpointSection) -> None:
    """Remove all checkpoints of a run but the latest `checkpoint.keep`, and those of `checkpoint.keep_every`."""
    for step, folder in checkpoint_folders(run)[: -settings.keep]:
        if settings.keep_every is None or step % settings.keep_every:
            _remove(folder)


def verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        CheckpointError: A file is missing or cut short.
    """
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
    except (ArtifactError, IncompleteArtifactError) as error:
        raise CheckpointError(f"not a usable checkpoint: {error}") from None
    return manifest


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; incomplete ones are left out."""
    return [checkpoint.folder for checkpoint in complete_checkpoints(run)[0]]


def find_checkpoint(run: Path, name: str | None = None) -> Path:
    """The newest complete checkpoint of a run, or the one called `name`; `run` may be a checkpoint itself."""
    if (run / MANIFEST).is_file() and (run / STATE).is_dir():
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
        raise CheckpointError(f"{str(run)!r} holds no complete checkpoint (looked for train/checkpoint_*/{MANIFEST})")
    return complete[-1]


def _fault(folder: Path, rank: int, workers: int) -> str | None:
    """What is wrong with the files of a checkpoint that fall to this worker; sizes are looked at by every one."""
    try:
        manifest = read_manifest(folder)
        if SEAL not in manifest:
            return f"{str(folder / MANIFEST)!r} is damaged: it has no {SEAL} of its own"
        verify_files(folder, manifest)
        verify_checksums(folder, manifest, sorted(manifest["files"])[rank::workers])
    except IncompleteArtifactError as error:
        return str(error)
    return None


def _remove(folder: Path) -> None:
    """Remove a checkpoint, if it is there: out of sight first, so that none is ever seen by half."""
    if folder.exists():
        removing = folder.with_name(f".{folder.name}.removing")
        os.rename(folder, removing)
        shutil.rmtree(removing)


def _sizes(engine: Engine) -> dict[str, int]:
    """The number of elements of each trainable parameter."""
    named = engine.module.named_parameters()
    return {name: torch.Size(engine.shape(p)).numel() for name, p in named if p.requires_grad}


def _save_weights(
    folder: Path,
    module: PolicyWithExtractor,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    lora: bool,
) -> dict[str, str]:
    """Write the weights as they are published; returns the checksums of all files."""
    # contiguous() also copies: a view into a shard would be written with its whole storage
    extractor = {k.removeprefix("extractor."): v.contiguous() for k, v in weights.items() if k.startswith("extractor.")}
    save_file(extractor, folder / "extractor.safetensors")
    policy = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    target = folder / ("adapter" if lora else "model")
    module.policy.save_pretrained(target, state_dict=policy, safe_serialization=True)
    tokenizer.save_pretrained(target)
    files = [folder / "extractor.safetensors", *(path for path in target.rglob("*") if path.is_file())]
    for path in files:
        path.chmod(0o644)  # safetensors writes 0600, which a scorer under another user could not read
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def _random_state_file(folder: Path, rank: int) -> Path:
    return folder / f"random_state_{rank:05d}.safetensors"
