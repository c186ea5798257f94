"""Checkpoint folders: written by all workers, trusted only when complete.

model/                 the policy: safetensors and tokenizer (full-parameter runs)
adapter/               the LoRA adapters in peft's format (LoRA runs; model/ is made at export)
extractor.safetensors  the extractor, dropped at export
engine/                what the engine needs to go on, in files of its own
random_state_*         random numbers, one file a worker
manifest.json          resolved config, fingerprints, step, bundles consumed, number of workers, the engine's layout,
                       versions, and every file with its size
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mlc_ray.config import TrainConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import TRAIN_FOLDER, complete_checkpoints
from mlc_ray.storage import (
    MANIFEST,
    ArtifactError,
    IncompleteArtifactError,
    library_versions,
    read_manifest,
    verify_files,
    write_json_atomic,
)
from mlc_ray.train.collectives import gather_objects
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.loop import Progress
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.train.random_state import random_state, restore_random_state

ENGINE = "engine"


class CheckpointError(MlcRayError):
    """A checkpoint is missing, incomplete or does not fit; the message quotes the path and names the fix."""


def save_checkpoint(
    folder: Path,
    *,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    progress: Progress,
    fingerprints: Mapping[str, str],
) -> None:
    """Write this worker's part of a checkpoint into `folder`; all workers call it, each with a folder of its own.

    Rank 0 writes the model, and the manifest with every worker's files, so that a merged folder from which any file is
    missing or cut short is recognised.
    """
    lora = config.model.lora is not None
    engine.save(folder / ENGINE)
    # In a file of every worker's own: an engine may keep one worker's state, and with it all would draw the same.
    save_file(random_state(), _random_state_file(folder, engine.rank))
    weights = engine.full_weights(trainable_only=lora)
    if weights is not None:
        _save_weights(folder, engine.module, weights, tokenizer, lora=lora)
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    everyones = gather_objects(sizes)
    if engine.rank == 0:
        files = {name: size for part in everyones for name, size in part.items()}
        manifest = {
            "config": config.model_dump(mode="json", exclude_unset=True),
            "resolved_config": config.model_dump(mode="json"),
            "fingerprints": dict(fingerprints),
            "step": progress.step,
            "bundles_consumed": progress.bundles,
            "validation_before": progress.before,
            "world_size": engine.world_size,
            "layout": engine.layout(),
            "versions": library_versions(),
            "files": dict(sorted(files.items())),
        }
        write_json_atomic(folder / MANIFEST, manifest)


def load_checkpoint(folder: Path, *, engine: Engine, config: TrainConfig, fingerprints: Mapping[str, str]) -> Progress:
    """Load a checkpoint into the engine, with optimizer and random state; returns the progress that it was made at.

    Raises:
        CheckpointError: if the folder is incomplete, or was written by a number of workers that the engine cannot go on
            from, by another engine or with other settings of it, or from other data.
    """
    manifest = verified_manifest(folder)
    if manifest["world_size"] != engine.world_size and not engine.any_workers:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was written by {manifest['world_size']} workers, this run has "
            f"{engine.world_size}: set cluster.workers={manifest['world_size']}"
        )
    written = {"engine.name": manifest["resolved_config"]["engine"]["name"], **manifest["layout"]}
    here = {"engine.name": config.engine.name, **engine.layout()}
    for name in {**written, **here}:
        if written.get(name) != here.get(name):
            raise CheckpointError(
                f"checkpoint {str(folder)!r} was written with {name}={written.get(name)!r}, this run has "
                f"{name}={here.get(name)!r}: set {name}={written.get(name)}"
            )
    for name, value in fingerprints.items():
        if manifest["fingerprints"].get(name) != value:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} was trained with {name}={manifest['fingerprints'].get(name)!r}, "
                f"now it is {value!r}: it has changed since; start a new run under another name"
            )
    engine.load(folder / ENGINE)
    if (
        own := _random_state_file(folder, engine.rank)
    ).is_file():  # of more workers than before, the new ones have none
        restore_random_state(load_file(own))
    return Progress(manifest["step"], manifest["bundles_consumed"], manifest["validation_before"])


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
    if (run / MANIFEST).is_file() and (run / ENGINE).is_dir():
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


def _save_weights(
    folder: Path,
    module: PolicyWithExtractor,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    lora: bool,
) -> None:
    # contiguous() also copies: a view into a shard would be written with its whole storage
    extractor = {k.removeprefix("extractor."): v.contiguous() for k, v in weights.items() if k.startswith("extractor.")}
    save_file(extractor, folder / "extractor.safetensors")
    policy = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    target = folder / ("adapter" if lora else "model")
    module.policy.save_pretrained(target, state_dict=policy, safe_serialization=True)
    tokenizer.save_pretrained(target)
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which a scorer under another user could not read


def _random_state_file(folder: Path, rank: int) -> Path:
    return folder / f"random_state_{rank:05d}.safetensors"
