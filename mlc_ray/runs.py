"""What a score may be asked of: a Hugging Face folder, a checkpoint, a run, or a hub name -> the weights to load."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mlc_ray.config.paths import real_path
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import MANIFEST, IncompleteArtifactError, read_manifest, verify_files

METRICS_FILE = "metrics.jsonl"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in the environment of what `ray job submit` starts
_INDEX = "model.safetensors.index.json"
_FIX_RECORD = "restore it, or name the languages yourself, e.g. --set seen_languages=[en,sw]"
_FIX_MODEL = "fetch or export the model again"


class ModelPathError(MlcRayError):
    """The path leads to no model that can be scored; the message says what was looked for."""


class OutputFolderError(MlcRayError, ValueError):
    """Nothing can be written to the folder asked for; the message quotes it and says what to give instead."""


def output_folder(output_dir: str | Path, *, setting: str = "output_dir") -> Path:
    """The absolute folder that a setting stands for where something is to be written.

    Raises:
        OutputFolderError: it is a URL, or relative inside a Ray job, whose working folder is a temporary copy.
    """
    try:
        folder = Path(real_path(str(output_dir))).expanduser()
    except ValueError as error:
        raise OutputFolderError(f"{setting}={str(output_dir)!r}: {error}") from None
    if not folder.is_absolute() and _RAY_JOB in os.environ:
        raise OutputFolderError(
            f"{setting}={str(output_dir)!r} is relative, but this is a Ray job: it runs in a temporary copy of its "
            "working folder, and what it writes there is lost; give an absolute path on storage that all nodes share, "
            "e.g. /shared/runs"
        )
    return folder.absolute()


def resolve_model(path: str | Path) -> str:
    """The folder (absolute) or hub name to load weights from.

    Accepts a Hugging Face folder (`config.json`), a checkpoint (`model/config.json`), and a run: its newest checkpoint
    `train/checkpoint_*` that is complete, else its `export`. What is no folder here but looks like a hub name is taken
    for one. Raises `ModelPathError` if there is no model, it has no safetensors weights, or files of it are missing.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if _HUB_NAME.fullmatch(str(path)):
            return str(path)
        try:
            real_path(str(path))
        except ValueError as error:
            raise ModelPathError(f"model={str(path)!r}: {error}") from None
        raise ModelPathError(f"model={str(path)!r} does not exist")
    if not folder.is_dir():
        raise ModelPathError(f"model={str(path)!r} is a file; give the folder with config.json and safetensors weights")
    folder = folder.resolve()
    if (folder / "config.json").is_file():
        return str(_with_weights(folder))
    if (folder / MANIFEST).is_file() or (folder / "model").is_dir():
        return str(_of_checkpoint(folder))
    return str(_of_run(folder))


def training_languages(path: str | Path) -> list[str] | None:
    """The languages of the bundles that a run, a checkpoint of it, or an exported model was trained on; None elsewhere.

    A run records them in `run.json`, an exported folder in `mlc_ray.json`. Raises `ModelPathError` for a damaged one.
    """
    folder = Path(path).expanduser()
    for file in (folder / "mlc_ray.json", folder / "run.json", folder / ".." / ".." / "run.json"):
        if file.is_file():
            languages = _read_object(file, _FIX_RECORD).get("languages")
            if languages is not None and not (
                isinstance(languages, list) and all(isinstance(code, str) for code in languages)
            ):
                raise ModelPathError(
                    f"{str(file)!r} is damaged: languages is {languages!r}, expected a list of codes; {_FIX_RECORD}"
                )
            return languages
    return None


def longest_context(model: str) -> int | None:
    """The number of positions a local model was made for, where its config.json says so; None otherwise.

    Raises `ModelPathError` for a damaged one.
    """
    file = Path(model) / "config.json"
    if not file.is_file():
        return None
    config = _read_object(file, _FIX_MODEL)
    text = config.get("text_config")
    value = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return value if isinstance(value, int) else None


def _read_object(file: Path, fix: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelPathError(f"{str(file)!r} is damaged: not valid JSON ({error}); {fix}") from None
    if not isinstance(content, dict):
        raise ModelPathError(f"{str(file)!r} is damaged: expected an object, found {type(content).__name__}; {fix}")
    return content


def _of_run(run: Path) -> Path:
    """The newest complete checkpoint; names carry the step, zero-padded, but the manifest is what is trusted."""
    faults, complete = [], []
    for folder in sorted((run / "train").glob("checkpoint_*")):
        try:
            manifest = read_manifest(folder)
            verify_files(folder, manifest)
        except IncompleteArtifactError as error:
            faults.append(str(error))
            continue
        complete.append((int(manifest.get("step", 0)), folder.name, folder))
    if complete:
        return _of_checkpoint(max(complete)[-1])
    if (run / "export" / "config.json").is_file():
        return _with_weights(run / "export")
    looked = (
        f"model={str(run)!r} holds no model: neither config.json (a Hugging Face folder), nor model/config.json (a "
        "checkpoint), nor a complete train/checkpoint_* or export (a run)"
    )
    raise ModelPathError("; ".join([looked, *faults]))


def _of_checkpoint(folder: Path) -> Path:
    if (folder / MANIFEST).is_file():
        try:
            verify_files(folder, read_manifest(folder))
        except IncompleteArtifactError as error:
            raise ModelPathError(f"checkpoint cannot be scored: {error}") from None
    if (folder / "model" / "config.json").is_file():
        return _with_weights(folder / "model")
    if (folder / "adapter").is_dir():
        raise ModelPathError(
            f"checkpoint {str(folder)!r} holds a LoRA adapter, not a whole model; merge it with"
            " `mlc-ray export RUN OUT --merge-lora` and score OUT"
        )
    raise ModelPathError(f"checkpoint {str(folder)!r} has no model/config.json")


def _with_weights(folder: Path) -> Path:
    """`folder`, once it is sure that its safetensors weights are all there."""
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (it has {', '.join(others)}: pickles are never loaded; convert to safetensors)" if others else ""
        raise ModelPathError(f"model folder {str(folder)!r} has no *.safetensors weights{found}")
    if (folder / _INDEX).is_file():
        weights = _read_object(folder / _INDEX, _FIX_MODEL).get("weight_map")
        if not isinstance(weights, dict):
            raise ModelPathError(f"{str(folder / _INDEX)!r} is damaged: it has no weight_map; {_FIX_MODEL}")
        listed = set(map(str, weights.values()))
        if missing := sorted(name for name in listed if not (folder / name).is_file()):
            raise ModelPathError(
                f"model folder {str(folder)!r} is incomplete: {_INDEX} names {missing[0]!r}, not there"
            )
    return folder


# --------------------------------------------------------------------------------------------------- metrics of a run


class MetricsFileError(MlcRayError):
    """A line of a metrics.jsonl is damaged; the message names the file and the line."""


class MetricsReader:
    """Follows a run's metrics file: each call of `read` returns the rows that are new since the one before."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / METRICS_FILE
        self.offset = self.lines = 0
        self.file_id: int | None = None

    def read(self) -> list[dict[str, Any]]:
        """New whole rows; all of them again where the file is another one or shorter than it was.

        A last line without its end of line is still being written, and left for the next call.

        Returns:
            A mapping per optimizer step: `step`, and what was logged of it. Empty where there is no such file.

        Raises:
            MetricsFileError: A line is not JSON, or has no optimizer step.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.file_id or status.st_size < self.offset:
                self.file_id, self.offset, self.lines = status.st_ino, 0, 0
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        rows = [self._row(line, self.lines + number) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]
        self.offset, self.lines = self.offset + len(whole), self.lines + len(rows)
        return rows

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one as well
            raise MetricsFileError(f"{str(self.path)!r}, line {number} is damaged: not valid JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise MetricsFileError(f"{str(self.path)!r}, line {number} is damaged: no optimizer step in {row!r}")
        return row


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics file so far; see `MetricsReader.read`."""
    return MetricsReader(run_folder).read()
