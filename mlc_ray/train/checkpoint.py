"""Checkpoint folders: written by all workers, trusted only when complete, exported as plain Hugging Face folders.

model/                 the policy: safetensors and tokenizer (full-parameter runs)
adapter/               the LoRA adapters in peft's format (LoRA runs; model/ is made at export)
extractor.safetensors  the extractor, dropped at export
engine/                what DeepSpeed needs to go on, one file per worker
manifest.json          resolved config, fingerprints, step, bundles consumed, versions, and every file with its size
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mlc_ray.config import TrainConfig, parse_config
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.objective import Objective
from mlc_ray.runs import PROVENANCE_FILE, TRAIN_FOLDER, complete_checkpoints
from mlc_ray.storage import (
    MANIFEST,
    ArtifactError,
    IncompleteArtifactError,
    atomic_folder,
    library_versions,
    read_manifest,
    verify_files,
    write_json_atomic,
)
from mlc_ray.train.engines.deepspeed import full_state_dict, pickle_enums_by_value, records_in_checkpoints
from mlc_ray.train.loop import Progress

ENGINE_TAG = "state"
_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class CheckpointError(MlcRayError):
    """A checkpoint is missing, incomplete or does not fit; the message quotes the path and names the fix."""


def save_checkpoint(
    folder: Path,
    *,
    engine: Any,
    tokenizer: Any,
    config: TrainConfig,
    progress: Progress,
    fingerprints: Mapping[str, str],
) -> None:
    """Write this worker's part of a checkpoint into `folder`; all workers call it, each with a folder of its own.

    Rank 0 writes the model, and the manifest with every worker's files, so that a merged folder from which any file is
    missing or cut short is recognised.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    pickle_enums_by_value()
    engine.save_checkpoint(
        str(folder / "engine"),
        tag=ENGINE_TAG,
        exclude_frozen_parameters=config.model.lora is not None,
    )
    # In a file of every worker's own: DeepSpeed keeps one worker's client state, and with it all would draw the same.
    save_file(_random_state(), _random_state_file(folder, rank))
    weights = full_state_dict(engine)
    if rank == 0:
        assert weights is not None
        _save_weights(folder, engine.module, weights, tokenizer, lora=config.model.lora is not None)
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    everyones: list[dict[str, int] | None] = [sizes]
    if world_size > 1:
        everyones = [None] * world_size
        dist.all_gather_object(everyones, sizes)
    if rank == 0:
        files = {name: size for part in everyones if part for name, size in part.items()}
        manifest = {
            "config": config.model_dump(mode="json", exclude_unset=True),
            "resolved_config": config.model_dump(mode="json"),
            "fingerprints": dict(fingerprints),
            "step": progress.step,
            "bundles_consumed": progress.bundles,
            "world_size": world_size,
            "versions": library_versions(),
            "files": dict(sorted(files.items())),
        }
        write_json_atomic(folder / MANIFEST, manifest)


def load_checkpoint(folder: Path, *, engine: Any, config: TrainConfig, fingerprints: Mapping[str, str]) -> Progress:
    """Put the engine where the checkpoint was, with optimizer and random state; returns how far that is.

    Raises `CheckpointError` when the folder is incomplete, was written by another number of workers or ZeRO stage, or
    from other data.
    """
    manifest = verified_manifest(folder)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    written_stage = manifest["resolved_config"]["zero"]["stage"]
    if manifest["world_size"] != world_size:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was written by {manifest['world_size']} workers, this run has {world_size}: "
            f"set cluster.workers={manifest['world_size']}"
        )
    if written_stage != config.zero.stage:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} was written at zero.stage={written_stage}, this run has "
            f"zero.stage={config.zero.stage}: set zero.stage={written_stage}"
        )
    for name, value in fingerprints.items():
        if manifest["fingerprints"].get(name) != value:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} was trained with {name}={manifest['fingerprints'].get(name)!r}, "
                f"now it is {value!r}: it has changed since; start a new run under another name"
            )
    with _weights_only_loading():
        loaded, _ = engine.load_checkpoint(
            str(folder / "engine"),
            tag=ENGINE_TAG,
            load_module_strict=config.model.lora is None,  # frozen weights were not written
        )
    if loaded is None:
        raise CheckpointError(f"checkpoint {str(folder)!r} holds no engine state")
    _restore_random_state(load_file(_random_state_file(folder, dist.get_rank() if dist.is_initialized() else 0)))
    return Progress(step=manifest["step"], bundles=manifest["bundles_consumed"])


def verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint; raises `CheckpointError` if a file is missing or cut short."""
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
    if (run / MANIFEST).is_file() and (run / "engine").is_dir():
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


def export(run: Path, out: Path, *, merge_lora: bool = False, checkpoint: str | None = None) -> Path:
    """Write a plain Hugging Face folder with a model card; returns it.

    A full-parameter run gives the whole model. A LoRA run gives the adapter, or with `merge_lora` the whole model.
    Raises `CheckpointError` if `out` exists, there is no complete checkpoint, or there is nothing to merge.
    """
    source = find_checkpoint(Path(run), checkpoint)
    manifest = verified_manifest(source)
    config = parse_config(TrainConfig, manifest["config"])
    if merge_lora and config.model.lora is None:
        raise CheckpointError(f"--merge-lora: run {str(run)!r} trained all parameters, it has no adapter to merge")
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"export folder {str(out)!r} exists already; remove it or choose another")
    with atomic_folder(out) as temporary:
        if config.model.lora is None:
            shutil.copytree(source / "model", temporary, dirs_exist_ok=True)
        elif merge_lora:
            _merge(source / "adapter", config, temporary)
        else:
            shutil.copytree(source / "adapter", temporary, dirs_exist_ok=True)
        (temporary / "README.md").write_text(model_card(config, manifest), encoding="utf-8")
        write_json_atomic(temporary / PROVENANCE_FILE, _provenance(source, manifest))
    return out


def _provenance(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported folder says of where it comes from; a scorer reads `languages`, those of its training data."""
    kept = {
        name: manifest[name] for name in ("step", "bundles_consumed", "fingerprints", "resolved_config", "versions")
    }
    described = checkpoint.resolve().parent.parent / "run.json"
    languages = json.loads(described.read_text(encoding="utf-8"))["languages"] if described.is_file() else None
    return {"languages": languages, **kept}


def model_card(config: TrainConfig, manifest: Mapping[str, Any]) -> str:
    """A model card that says what was trained, from what and how, and that it has not been scored."""
    fingerprints = "\n".join(f"- {name}: `{value}`" for name, value in manifest["fingerprints"].items())
    versions = "\n".join(f"- {name} {version}" for name, version in manifest["versions"].items())
    sources = "\n".join(f"- {source.path}" for source in config.data.train)
    parts = "\n".join(f"- {part}" for part in Objective(config).describe())
    base = f"base_model: {config.model.path}\n" if not Path(config.model.path).exists() else ""
    return f"""---
{base}library_name: transformers
tags: [multilingual, safety, alignment, mlc]
---
# {config.name}

`{config.model.path}` aligned by mlc_ray: {manifest["step"]} optimizer steps, {manifest["bundles_consumed"]} bundles,
learning rate {config.optimizer.learning_rate}, {"LoRA" if config.model.lora else "all parameters"}.

## Loss
The sum of these (`mlc`: multilingual consistency, arXiv 2602.16660):

{parts}

## Trained on
{sources}

## Not measured here
This card reports no safety figure. Score the model on harmful *and* benign prompts (`mlc-ray score`): a model that
refuses everything also refuses what is harmful.

## Fingerprints
{fingerprints}

## Versions
{versions}
"""


def _save_weights(folder: Path, module: Any, weights: dict[str, torch.Tensor], tokenizer: Any, *, lora: bool) -> None:
    # contiguous() also copies: a view into a shard would be written with its whole storage
    extractor = {k.removeprefix("extractor."): v.contiguous() for k, v in weights.items() if k.startswith("extractor.")}
    save_file(extractor, folder / "extractor.safetensors")
    policy = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    target = folder / ("adapter" if lora else "model")
    module.policy.save_pretrained(target, state_dict=policy, safe_serialization=True)
    tokenizer.save_pretrained(target)
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which a scorer under another user could not read


def _merge(adapter: Path, config: TrainConfig, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    from mlc_ray.train.model import load_policy

    merged = PeftModel.from_pretrained(load_policy(config.model), adapter).merge_and_unload()
    merged.save_pretrained(out, safe_serialization=True)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)


def _random_state_file(folder: Path, rank: int) -> Path:
    return folder / f"random_state_{rank:05d}.safetensors"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def _weights_only_loading() -> Iterator[None]:
    """Within, torch.load builds tensors, plain containers and DeepSpeed's own records, whatever its caller asked for.

    DeepSpeed reads its files with weights_only=False. A checkpoint path comes from the user; a pickle in it must not be
    able to run code.
    """
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(records_in_checkpoints()):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE_WEIGHTS_ONLY]
        else:
            os.environ[_FORCE_WEIGHTS_ONLY] = before
