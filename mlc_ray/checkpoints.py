"""What a checkpoint is called, what its manifest holds, and whether its files are what was written.

Training and scoring ask here.
"""

from __future__ import annotations

import json
import re
from reprlib import repr as shortened
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from mlc_ray.storage import MANIFEST, IncompleteArtifactError, Place, read_manifest, verify_checksums, verify_files

CHECKPOINT, WEIGHTS = re.compile(r"checkpoint_(\d{6,})"), re.compile(r"weights_(\d{6,})")
"""Names of the folders of a run's checkpoints, and of a step's weights alone, with the step."""

FileName = Annotated[str, Field(pattern=r"^[^/\x00]+(/[^/\x00]+)*$")]


class CheckpointManifest(BaseModel):
    """The manifest of a checkpoint, or of a step's weights: no value is coerced, no field is missing or new.

    Attributes:
        config: the run's settings as they were given, and `resolved_config` with the defaults.
        fingerprints: of the model and the data.
        step: optimizer steps done, and `bundles_consumed` by them.
        validation_before: log-probs of held-out answers before the first step, by the names of their means.
        world_size: workers that wrote it.
        versions: of the libraries.
        files: bytes of each file, by its path in the folder; `checksums` has the BLAKE2b of each.
        ends: of weights alone: whether their step was the run's last one.
        checksum: of the manifest's other fields.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    config: dict[str, Any]
    resolved_config: dict[str, Any]
    fingerprints: dict[str, str]
    step: NonNegativeInt
    bundles_consumed: NonNegativeInt
    validation_before: dict[str, float]
    world_size: PositiveInt
    versions: dict[str, str]
    files: dict[FileName, NonNegativeInt]
    checksums: dict[FileName, str]
    ends: bool | None = None
    checksum: str


def read_checkpoint(folder: Place) -> dict[str, Any]:
    """The manifest of a checkpoint or of a step's weights, whose files are all there with their sizes.

    Raises:
        IncompleteArtifactError: The manifest is missing or not that of a checkpoint, or a file is missing or has
            another size.
    """
    manifest = read_manifest(folder)
    try:
        CheckpointManifest.model_validate_json(json.dumps(manifest))
    except ValidationError as error:
        raise IncompleteArtifactError(f"{str(folder / MANIFEST)!r} is damaged: {first_fault(error)}") from None
    verify_files(folder, manifest)
    return manifest


def is_named_so(folder: Place) -> bool:
    """Whether a folder has the name of a checkpoint or of a step's weights."""
    return bool(CHECKPOINT.fullmatch(folder.name) or WEIGHTS.fullmatch(folder.name))


def verify_weights(model: str) -> None:
    """Check that the weights of a checkpoint are byte for byte what training wrote; reads all of them, once.

    A driver asks before engines load them. What is in no checkpoint has no checksums, and passes.

    Args:
        model: as `runs.resolve_model` gives it.

    Raises:
        IncompleteArtifactError: A file is not, or the checkpoint is incomplete; the message names it and says how to
            go on.
    """
    if Place(model).name != "model":
        return
    checkpoint = Place(model).parent
    try:
        manifest = read_checkpoint(checkpoint)
    except IncompleteArtifactError:
        if is_named_so(checkpoint):
            raise
        return  # the manifest of something else, or none
    try:
        verify_checksums(checkpoint, manifest, [name for name in manifest["files"] if name.startswith("model/")])
    except IncompleteArtifactError as error:
        raise IncompleteArtifactError(
            f"these weights are not used: {error}. Give another checkpoint, or have the run write this one again: "
            f"mlc-ray train --resume {checkpoint.parent.parent}"
        ) from None


def first_fault(error: ValidationError) -> str:
    """The first of what pydantic found, as a sentence's end."""
    fault = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, fault["loc"])) or "the content"
    if fault["type"] == "missing":
        return f"it has no {place}"
    if fault["type"] == "extra_forbidden":
        return f"{place} is unknown"
    return f"{place} is {shortened(fault['input'])}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
