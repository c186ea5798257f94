"""From a checkpoint to a plain Hugging Face folder, with a model card that says where it comes from.

An export is made to be published: only the settings listed here go into it (no address, user, token or path of the
machine). The checkpoint that is read may come from another person: its manifest decides neither whose code runs nor
which files outside of it are copied.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlc_ray._registry import shipped_only
from mlc_ray.config import TrainConfig, parse_config
from mlc_ray.losses.objective import Objective, public_settings
from mlc_ray.runs import PROVENANCE_FILE, output_place, training_languages
from mlc_ray.storage import (
    HubModel,
    IncompleteArtifactError,
    Place,
    new_folder,
    scratch_folder,
    verify_checksums,
    write_json_atomic,
)
from mlc_ray.train.checkpoint import find_checkpoint, verified_manifest
from mlc_ray.train.shards import CheckpointError

logger = logging.getLogger(__name__)

_PUBLISHED = ("seed", "reference", "optimizer", "train", "openings")
"""Sections of the settings that an export repeats unchanged; of the loss and the terms it repeats `public_settings`."""
_PUBLISHED_OF_MODEL = ("dtype", "lora")
_PUBLISHED_OF_DATA = ("languages", "other_languages", "max_prompt_tokens", "max_response_tokens")
_PUBLISHED_OF_SOURCE = ("format", "kind", "only", "share")


def export(
    run: str | Path | Place,
    out: str | Path | Place,
    *,
    merge_lora: bool = False,
    checkpoint: str | None = None,
    trust_remote_code: bool = False,
) -> Place:
    """Write a plain Hugging Face folder with a model card; returns it.

    A full-parameter run gives the whole model. A LoRA run gives the adapter, or with `merge_lora` the whole model.

    Args:
        run: the folder or URL of a run, or of one checkpoint.
        out: the folder to make, or its URL.
        merge_lora: add the adapter to the base model that the run names, which is loaded for it.
        checkpoint: the name of a checkpoint of the run (default: the newest).
        trust_remote_code: run Python code that the run names, which another person may have written: components from
            outside this package, and with `merge_lora` the code of the base model, regardless of the run's settings.

    Raises:
        ConfigError: the run's settings name a component from outside this package, and it is not trusted.
        CheckpointError: if `out` exists, there is no complete checkpoint, there is nothing to merge, the base model
            needs code that is not trusted, or the checkpoint holds links or a file that is damaged.
        OutputFolderError: `out` is a URL that no storage serves, or relative inside a Ray job.
    """
    out = output_place(str(out), setting="out")
    source = find_checkpoint(Place(run).absolute(), checkpoint)
    manifest = verified_manifest(source)
    with nullcontext() if trust_remote_code else shipped_only("add --trust-remote-code if you trust that module"):
        config = parse_config(TrainConfig, manifest["config"])
    if merge_lora and config.model.lora is None:
        raise CheckpointError(f"--merge-lora: run {str(run)!r} trained all parameters, it has no adapter to merge")
    if merge_lora and config.model.trust_remote_code and not trust_remote_code:
        raise CheckpointError(
            f"--merge-lora: the run was trained with model.trust_remote_code=true, so its base model "
            f"{config.model.path!r} may bring Python code; add --trust-remote-code if you trust that model"
        )
    if out.exists():
        raise CheckpointError(f"export folder {str(out)!r} exists already; remove it or choose another")
    trained = "model" if config.model.lora is None else "adapter"
    files = [name for name in manifest["files"] if name.startswith(f"{trained}/")]
    if not files:
        raise CheckpointError(
            f"nothing is exported: checkpoint {str(source)!r} has no {trained}/, which its settings say"
        )
    with scratch_folder() as scratch, new_folder(out, last=(PROVENANCE_FILE,)) as made:
        here = Path(source) if source.is_local else scratch
        if not source.is_local:
            source.storage.fetch(str(source / trained), here / trained)
        _refuse_links(here / trained)
        try:
            verify_checksums(here, manifest, files)
        except IncompleteArtifactError as error:
            raise CheckpointError(
                f"nothing is exported: {error}; export another checkpoint with --checkpoint"
            ) from None
        if merge_lora:
            _merge(here / trained, config, made, trust_remote_code=trust_remote_code)
        else:
            shutil.copytree(here / trained, made, dirs_exist_ok=True)
            _hide_base_path(made / "adapter_config.json")
        (made / "README.md").write_text(model_card(config, manifest), encoding="utf-8")
        write_json_atomic(made / PROVENANCE_FILE, provenance(source, config, manifest))
    return out


def provenance(checkpoint: Place, config: TrainConfig, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported folder says of where it comes from; a scorer reads `languages` and `chat` of its training."""
    return {
        "languages": training_languages(checkpoint),
        "chat": config.chat.model_dump(mode="json"),
        **{name: manifest[name] for name in ("step", "bundles_consumed", "fingerprints", "versions")},
        "settings": _published(config),
    }


def _published(config: TrainConfig) -> dict[str, Any]:
    whole = config.model_dump(mode="json")
    model, data = whole["model"], whole["data"]
    return {
        **{name: whole[name] for name in _PUBLISHED},
        "objective": public_settings(config.objective),
        "mlc": public_settings(config.mlc),
        "terms": {name: public_settings(term) for name, term in config.terms.items()},
        "model": {"name": _public_name(model["path"]), **{name: model[name] for name in _PUBLISHED_OF_MODEL}},
        "data": {
            **{name: data[name] for name in _PUBLISHED_OF_DATA},
            "train": [
                {"name": _public_name(source["path"]), **{name: source[name] for name in _PUBLISHED_OF_SOURCE}}
                for source in data["train"]
            ],
        },
    }


def model_card(config: TrainConfig, manifest: Mapping[str, Any]) -> str:
    """A model card that says what was trained, from what and how, and that it has not been scored."""
    fingerprints = "\n".join(f"- {name}: `{value}`" for name, value in manifest["fingerprints"].items())
    versions = "\n".join(f"- {name} {version}" for name, version in manifest["versions"].items())
    parts = "\n".join(f"- {part}" for part in Objective(config).describe())
    sources = "\n".join(f"- {_public_name(source.path)}" for source in config.data.train)
    name = _public_name(config.model.path)
    hub = HubModel.parse(config.model.path)
    base = "" if hub is None else f"base_model: {hub.name}\n"
    return f"""---
{base}library_name: transformers
tags: [multilingual, safety, alignment, mlc]
---
# {config.name}

`{name}` aligned by mlc_ray: {manifest["step"]} optimizer steps, {manifest["bundles_consumed"]} bundles,
learning rate {config.optimizer.learning_rate}, {"LoRA" if config.model.lora else "all parameters"}.

## Loss
The sum of these (`mlc`: multilingual consistency, arXiv 2602.16660):

{parts}

## Trained on
{sources}

The fingerprint `tokens` below is of their contents.

## Not measured here
This card reports no safety figure. Score the model on harmful *and* benign prompts (`mlc-ray score`): a model that
refuses everything also refuses what is harmful.

## Fingerprints
{fingerprints}

## Versions
{versions}
"""


def _public_name(path: str) -> str:
    """What may be published of a model or a source: hub names and `sample:...` in full, else the end of the path."""
    owner_and_name = path.count("/") <= 1 and not path.startswith((".", "/", "~")) and "\\" not in path
    return path if owner_and_name and not Path(path).exists() else Path(path).name


def _refuse_links(folder: Path) -> None:
    """A link in a checkpoint would copy whatever it points to on this machine into what is published."""
    for parent, folders, files in os.walk(folder):
        for name in ("", *folders, *files):
            if (path := Path(parent) / name).is_symlink():
                raise CheckpointError(
                    f"{str(path)!r} in a checkpoint is a link to {os.readlink(path)!r}; links are not followed: put "
                    "the file itself there"
                )


def _hide_base_path(adapter_config: Path) -> None:
    """peft notes the base model's path in the adapter; a path of this machine is private."""
    if not adapter_config.is_file():
        return
    settings = json.loads(adapter_config.read_text(encoding="utf-8"))
    if isinstance(path := settings.get("base_model_name_or_path"), str):
        settings["base_model_name_or_path"] = _public_name(path)
        write_json_atomic(adapter_config, settings)


def _merge(adapter: Path, config: TrainConfig, out: Path, *, trust_remote_code: bool) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    from mlc_ray.train.model import load_policy

    # By what runs anywhere: merging adds two matrices, and there may be no GPU.
    anywhere = {"attention": "auto", "kernels": "torch", "gradient_checkpointing": False}
    model = config.model.model_copy(update={"trust_remote_code": trust_remote_code, **anywhere})
    logger.warning("merging into the base model %r, which the run names", model.path)
    merged = PeftModel.from_pretrained(load_policy(model), adapter, torch_device="cpu").merge_and_unload()
    merged.save_pretrained(out, safe_serialization=True)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
