"""Folders of runs, scores, searches and studies: the names of their files, and how they are read; defined here alone.

    RUN/       config.yaml first, run.json, metrics.jsonl, train/checkpoint_NNNNNN/, scores/NAME/ (a score each);
               diverged.json where a step failed every time, mlflow.json where MLflow is asked for
    SCORE/     request.json first, responses.parquet, scores.json last, perhaps utility.json
    SEARCH/    base.yaml and config.json first, search.json, trials/ID/ (a run each), baseline/ and confirmation/
               (scores of the model before training), trials.json, at the end best.yaml and best/
    STUDY/     study.json first, cells/MODEL-METHOD-SEED/ (a run each, its model in model/, its score in scores/study/),
               untouched/MODEL/ (scores of the models before training), results.json, study.md, study.tex
    SCALE/     scale.json first, cells/SIZE/ (a search each), results.json, study.md, study.tex
    PROBE/     probe.json
    TRANSLATION/  translation.json first, bundles/, rejected/ and answers/ (a file for each shard), quality.json and
               quality.md, manifest.json last

Training and scoring meet only through these folders, and so what describes them lies beneath both. Paths of settings
and models are resolved here too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlc_ray.checkpoints import CHECKPOINT, WEIGHTS, is_named_so, read_checkpoint
from mlc_ray.config import ChatSection, ConfigError, parse_config
from mlc_ray.config.paths import stored_path
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import (
    MANIFEST,
    HubModel,
    IncompleteArtifactError,
    Place,
    StorageError,
    pinned_model,
)

CONFIG_FILE, RUN_FILE, METRICS_FILE, TRAIN_FOLDER, SCORES_FOLDER, DIVERGED_FILE, FAILED_FILE = (
    "config.yaml", "run.json", "metrics.jsonl", "train", "scores", "diverged.json", "failed.json",
)  # fmt: skip
"""Of a run; `diverged.json` says at which step it diverged, until it goes on past that step, and `failed.json` what
else ended its training, or the trial that it is of, until that is resumed."""
DAMAGED_FILE = "damaged.txt"
"""Of a checkpoint that was found damaged at a start, which is passed over from then on: what is wrong with it."""
MLFLOW_FILE = "mlflow.json"
"""The ids of a run's runs in MLflow, by tracking URI."""
LEASE_FILE = "lease.json"
"""Of a run or a search while a driver works in it: who."""
LOGS_FOLDER = "logs"
"""Of a run whose workers hung: where each of them was; with `logging.json_lines` of any folder what is logged."""
STOP_FILE = "stop"
"""Of a run whose driver got SIGTERM: the lease's id, by which its workers know that it is meant for them."""
KEPT_FOLDER = "kept"
REQUEST_FILE, RESPONSES_FILE, REPLIES_FILE, SCORES_FILE, HEATMAP_FILE, UTILITY_FILE = (
    "request.json", "responses.parquet", "replies.parquet", "scores.json", "heatmap.png", "utility.json",
)  # fmt: skip
"""Of a score; `request.json` is written before anything runs, `scores.json` last. `replies.parquet`: of endpoints."""
SEARCH_CONFIG_FILE, BASE_FILE, COMMITS_FILE, SEARCH_FILE, TRIALS_FILE, TRIALS_FOLDER, BASELINE_FOLDER = (
    "config.json", "base.yaml", "commits.json", "search.json", "trials.json", "trials", "baseline",
)  # fmt: skip
"""Of a search; `search.json` is there when the trials begin, `trials.json` from the first score on."""
SEARCH_TEXT, PARETO_FILE, BEST_CONFIG_FILE, BEST_FOLDER = "search.md", "pareto.png", "best.yaml", "best"
"""Of a search, too: its tables, its front, and the settings and the model of the best trial."""
VALUES_FILE, MODEL_FOLDER, FINISHED_FILE, STOPPED_FILE = "values.json", "model", "finished", "stopped"
"""Of a trial, which is a run too: what was drawn for it, its model unless that was one of too many, and the mark of one
that ran to its end or was cut short. A cell of a study has a model and the mark `finished`, too."""
CONFIRMATION = "confirmation"
"""The name of a trial's score, and of the baseline's, on the prompts that chose no trial."""
STUDY_FILE, STUDY_RESULTS_FILE, STUDY_TEXT, STUDY_LATEX, CELLS_FOLDER, STUDY_SCORE, UNTOUCHED_FOLDER = (
    "study.json", "results.json", "study.md", "study.tex", "cells", "study", "untouched",
)  # fmt: skip
"""Of a study; `study` is the name of a cell's score. `results.json` is there from the first cell on."""
SCALE_FILE = "scale.json"
"""Of a study whose cells are searches; its other files are those of a study."""
PROBE_FILE, PROBE_TEXT = "probe.json", "probe.md"
TRANSLATION_FILE, QUALITY_FILE, QUALITY_TEXT, BUNDLES_FOLDER, REJECTED_FOLDER, ANSWERS_FOLDER = (
    "translation.json", "quality.json", "quality.md", "bundles", "rejected", "answers",
)  # fmt: skip
"""Of a translation; `translation.json` is written before anything runs, the manifest last."""
PROVENANCE_FILE = "mlc_ray.json"
"""Of an exported model: where it comes from."""

FolderKind = Literal["run", "score", "search", "study", "scale", "probe", "translation"]

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in the environment of what `ray job submit` starts
_INDEX = "model.safetensors.index.json"
_FIX_RECORD = "restore it, or name the languages yourself, e.g. --set seen_languages=[en,sw]"
_FIX_MODEL = "fetch or export the model again"


class ModelPathError(MlcRayError):
    """The path leads to no model that can be scored; the message says what was looked for."""


class OutputFolderError(MlcRayError, ValueError):
    """Nothing can be written to the folder asked for; the message quotes it and says what to give instead."""


# ------------------------------------------------------------------------------------------------------------- folders


def kind_of(folder: Place) -> FolderKind | None:
    """What a folder is, by the file that is written into it first; None if it is not one of these."""
    for kind, file in _FIRST_FILES.items():
        if (folder / file).is_file():
            return kind
    return None


_FIRST_FILES: dict[FolderKind, str] = {
    "search": BASE_FILE, "study": STUDY_FILE, "scale": SCALE_FILE, "score": REQUEST_FILE, "run": CONFIG_FILE,
    "probe": PROBE_FILE, "translation": TRANSLATION_FILE,
}  # fmt: skip


def names_of(folder: Place) -> tuple[str, str]:
    """What a folder is called in logs and metrics: its name; or of what is in a search or study, that and the trial's.

    `("my-search", "0003")` of trial 0003 and of its scores, `("my-run", "")` of a run.
    """
    above = folder.absolute()
    for _ in range(4):  # a cell's score is the deepest: STUDY/cells/ID/scores/study
        parent = above.parent
        if parent.name in (TRIALS_FOLDER, CELLS_FOLDER, UNTOUCHED_FOLDER):
            return parent.parent.name, above.name
        if not parent.name or parent.name == above.name:
            break
        above = parent
    return folder.absolute().name, ""


def output_place(output_dir: str | Path, *, setting: str = "output_dir") -> Place:
    """The absolute place that a setting stands for where something is to be written.

    Raises:
        OutputFolderError: it is relative inside a Ray job, whose working folder is a temporary copy, or a URL of which
            no storage is registered, or like a URL.
    """
    try:
        place = Place(stored_path(str(output_dir)))
    except ValueError as error:
        raise OutputFolderError(f"{setting}={str(output_dir)!r}: {error}") from None
    if not place.is_local:
        return place.absolute()
    folder = Path(place).expanduser()
    if not folder.is_absolute() and _RAY_JOB in os.environ:
        raise OutputFolderError(
            f"{setting}={str(output_dir)!r} is relative, but this is a Ray job: it runs in a temporary copy of its "
            "working folder, and what it writes there is lost; give an absolute path on storage that all nodes share, "
            "e.g. /shared/runs"
        )
    return Place(folder.absolute())


def output_folder(output_dir: str | Path, *, setting: str = "output_dir") -> Path:
    """As `output_place`, where real files are needed.

    Raises:
        OutputFolderError: as `output_place`, and for any URL.
    """
    try:
        return Path(output_place(output_dir, setting=setting))
    except StorageError as error:
        raise OutputFolderError(f"{setting}={error}") from None


def artifact_cache(output: Place) -> Place:
    """Where prepared data go, which all nodes read and other runs use again: `cache` beside the runs."""
    return output / "cache"


# --------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class CheckpointFolder:
    """A complete checkpoint of a run, and the optimizer step after which it was written."""

    folder: Place
    step: int


def checkpoint_folder(run: Place, step: int) -> Place:
    """Where the checkpoint of an optimizer step lies."""
    return run / TRAIN_FOLDER / f"checkpoint_{step:06d}"


def checkpoint_folders(run: Place) -> list[tuple[int, Place]]:
    """Step and folder of every checkpoint of a run by their names, whole or not, oldest first."""
    found = ((CHECKPOINT.fullmatch(folder.name), folder) for folder in (run / TRAIN_FOLDER).iterdir())
    return sorted(((int(match[1]), folder) for match, folder in found if match), key=lambda each: each[0])


def weights_folder(run: Place, step: int) -> Place:
    """Where the weights of an optimizer step lie by which a trial is scored, without what resuming needs."""
    return run / TRAIN_FOLDER / f"weights_{step:06d}"


def weights_folders(run: Place) -> list[Place]:
    """The folder of every step's weights by their names, whole or not, oldest first."""
    found = ((WEIGHTS.fullmatch(folder.name), folder) for folder in (run / TRAIN_FOLDER).iterdir())
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found if match)]


def is_set_aside(checkpoint: Place) -> bool:
    """Whether a checkpoint was found damaged at a start."""
    return (checkpoint / DAMAGED_FILE).is_file()


def checkpoint_sizes(run: Place) -> tuple[int, int]:
    """How many files all checkpoints of a run have, and bytes in them: what grows while one is written."""
    sizes = (run / TRAIN_FOLDER).sizes()
    return len(sizes), sum(sizes.values())


def complete_checkpoints(run: Place) -> tuple[list[CheckpointFolder], list[str]]:
    """The complete checkpoints of a run, oldest first, and what is wrong with the others.

    The manifest is what is trusted: its step, and every file that it lists with its size.
    """
    complete, faults = [], []
    for _, folder in checkpoint_folders(run):
        if is_set_aside(folder):
            faults.append(f"{str(folder)!r} is damaged: {DAMAGED_FILE} in it says where")
            continue
        try:
            complete.append(CheckpointFolder(folder, read_checkpoint(folder)["step"]))
        except IncompleteArtifactError as error:
            faults.append(str(error))
    return sorted(complete, key=lambda checkpoint: (checkpoint.step, checkpoint.folder.name)), faults


# ------------------------------------------------------------------------------------------------------------- metrics


class MetricsFileError(MlcRayError):
    """A line of a metrics.jsonl is damaged; the message names the file and the line."""


class MetricsReader:
    """Follows a run's metrics file: each call of `read` returns the rows that are new since the one before."""

    def __init__(self, run_folder: Path | Place) -> None:
        self.file = Place(run_folder) / METRICS_FILE
        self.offset = self.lines = 0
        self.last = b""

    def read(self) -> list[dict[str, Any]]:
        """New whole rows; all of them again where the file is another one, or shorter than it was.

        A last line without its end of line is still being written, and left for the next call.

        Returns:
            A mapping per optimizer step: `step`, and what was logged of it. Empty where there is no such file.

        Raises:
            MetricsFileError: A line is not JSON, or has no optimizer step.
        """
        try:
            with self.file.open() as file:
                begin = self.offset - len(self.last)
                data = b""
                if file.seek(0, os.SEEK_END) > begin:
                    file.seek(begin)
                    data = file.read()
                if data.startswith(self.last):
                    data = data[len(self.last) :]
                else:  # the row before is not where it was: a run that went on has replaced the file
                    self.offset, self.lines = 0, 0
                    file.seek(0)
                    data = file.read()
        except FileNotFoundError:
            return []
        rows = _rows(data, str(self.file), self.lines)
        whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self.last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        elif not self.offset:
            self.last = b""
        self.offset, self.lines = self.offset + len(whole), self.lines + len(rows)
        return rows


def read_metrics(run_folder: Path | Place) -> list[dict[str, Any]]:
    """The rows of a run's metrics file so far, wherever the run is; else as `MetricsReader.read`.

    Raises:
        MetricsFileError: A line is not JSON, or has no optimizer step.
    """
    file = Place(run_folder) / METRICS_FILE
    try:
        with file.open() as opened:
            return _rows(opened.read(), str(file), 0)
    except FileNotFoundError:
        return []


def logged_until(run_folder: Path | Place) -> int:
    """The last optimizer step of which a run's metrics have a row; 0 where they have none. Raises as `read_metrics`."""
    return max((row["step"] for row in read_metrics(run_folder)), default=0)


def training_name(metric: str) -> str:
    """The name by which training logs the number that `metric` is of held-out bundles, or of those of a kind."""
    return re.sub(r"^validation/((harmful|benign)/)?", "", metric)


def _rows(data: bytes, where: str, before: int) -> list[dict[str, Any]]:
    """The whole lines of `data`, of which the first is line `before` + 1."""
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], before + 1):
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one as well
            raise MetricsFileError(f"{where!r}, line {number} is damaged: not valid JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise MetricsFileError(f"{where!r}, line {number} is damaged: no optimizer step in {row!r}")
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------------------- models


def resolve_model(path: str | Path | Place, *, setting: str = "model") -> str:
    """The folder (absolute, or a URL) or hub name to load weights from.

    Accepts a Hugging Face folder (`config.json`), a checkpoint (`model/config.json`), and a run: its newest checkpoint
    `train/checkpoint_*` that is complete, else its `export`. What is not a folder here but looks like a hub name,
    `NAME[#REVISION]`, is taken for one. Messages call it by the name of the `setting`.

    Raises:
        ModelPathError: There is no model, it has no safetensors weights, or files of it are missing.
        HubError: It is a folder on this machine with a revision.
    """
    try:
        folder = Place(stored_path(str(path)))
    except ValueError as error:
        if HubModel.parse(str(path)) is not None:
            return str(path)
        raise ModelPathError(f"{setting}={str(path)!r}: {error}") from None
    if folder.is_local and HubModel.parse(str(path)) is not None:
        return str(path)
    folder = folder.absolute()
    if folder.is_file():
        raise ModelPathError(
            f"{setting}={str(path)!r} is a file; give the folder with config.json and safetensors weights"
        )
    if not folder.is_dir():
        raise ModelPathError(f"{setting}={str(path)!r} does not exist")
    if (folder / "config.json").is_file():
        return str(_with_weights(folder))
    if (folder / MANIFEST).is_file() or (folder / "model").is_dir():
        return str(_of_checkpoint(folder))
    return str(_of_run(folder, setting))


def pinned_weights(path: str | Path | Place, known: Mapping[str, str] | None = None) -> str:
    """As `resolve_model`, a hub name with its commit: what a driver asks for once, and passes to all nodes.

    Args:
        path: as of `resolve_model`.
        known: what names of the hub stood for when the work began that goes on now; for them it is not asked.

    Raises:
        ModelPathError: As `resolve_model`.
        HubError: The hub has no such model or revision, or cannot say which commit that is.
    """
    found = resolve_model(path)
    return (known or {}).get(found) or pinned_model(found)


def model_name(path: str) -> str:
    """The last part of a model's folder or URL, or a hub name with a dash: what a folder about it can be called."""
    here = Place(path)
    if not here.is_local or here.exists():
        return here.absolute().name
    return path.partition("#")[0].replace("/", "-")


def training_languages(path: str | Path | Place) -> list[str] | None:
    """The languages of the bundles that a run, a checkpoint of it, or an exported model was trained on; None elsewhere.

    A run records them in `run.json`, an exported folder in `mlc_ray.json`.

    Raises:
        ModelPathError: That file is damaged.
    """
    for file, facts in descriptions_of(path):
        languages = facts.get("languages")
        if languages is not None and not (
            isinstance(languages, list) and all(isinstance(code, str) for code in languages)
        ):
            raise ModelPathError(
                f"{str(file)!r} is damaged: languages is {languages!r}, expected a list of codes; {_FIX_RECORD}"
            )
        return languages
    return None


def training_chat(path: str | Path | Place) -> ChatSection | None:
    """The conversation that a run, a checkpoint of it, or an exported model was trained in; None elsewhere.

    Raises:
        ModelPathError: What says so is damaged.
    """
    for file, facts in descriptions_of(path):
        if (chat := facts.get("chat")) is not None:
            try:
                return parse_config(ChatSection, chat)
            except ConfigError as error:
                raise ModelPathError(f"{str(file)!r} is damaged: chat: {error}; {_FIX_RECORD}") from None
    return None


def chat_of(given: ChatSection | None, model: str | Path | Place) -> ChatSection:
    """The conversation that prompts stand in: that of the settings, else of the model's training, else a plain one.

    Raises:
        ModelPathError: What says how the model was trained is damaged.
    """
    return given or training_chat(model) or ChatSection()


def descriptions_of(path: str | Path | Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The files that say how a model was trained, and what is in them."""
    if not Place(path).is_dir():
        return  # a hub name
    folder = Place(path).absolute()
    files = [folder / PROVENANCE_FILE, folder / RUN_FILE]
    if is_named_so(folder) and folder.parent.name == TRAIN_FOLDER:
        files.append(folder.parent.parent / RUN_FILE)
    for file in files:
        if file.is_file():
            yield file, file.read_object(ModelPathError, _FIX_RECORD)


def longest_context(model: str) -> int | None:
    """The number of positions a model was made for, where its config.json says so; None otherwise, or of a hub name.

    Raises:
        ModelPathError: Its config.json is damaged.
    """
    file = Place(model) / "config.json"
    if not file.is_file():
        return None
    config = file.read_object(ModelPathError, _FIX_MODEL)
    text = config.get("text_config")
    value = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return value if isinstance(value, int) else None


def _of_run(run: Place, setting: str) -> Place:
    """The newest complete checkpoint, else the export."""
    complete, faults = complete_checkpoints(run)
    if complete:
        return _of_checkpoint(complete[-1].folder)
    if (run / "export" / "config.json").is_file():
        return _with_weights(run / "export")
    looked = (
        f"{setting}={str(run)!r} holds no model: neither config.json (a Hugging Face folder), nor model/config.json (a "
        "checkpoint), nor a complete train/checkpoint_* or export (a run)"
    )
    raise ModelPathError("; ".join([looked, *faults]))


def _of_checkpoint(folder: Place) -> Place:
    if is_set_aside(folder):
        raise ModelPathError(
            f"checkpoint {str(folder)!r} was found damaged: {DAMAGED_FILE} in it says where; give another checkpoint"
        )
    # Without a manifest, one that is called so is still being written.
    if (folder / MANIFEST).is_file() or CHECKPOINT.fullmatch(folder.name):
        try:
            read_checkpoint(folder)
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


def _with_weights(folder: Place) -> Place:
    """`folder`, once it is sure that its safetensors weights are all there."""
    names = [each.name for each in folder.iterdir()]
    if not any(name.endswith(".safetensors") for name in names):
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
        found = f" (it has {', '.join(others)}: pickles are never loaded; convert to safetensors)" if others else ""
        raise ModelPathError(f"model folder {str(folder)!r} has no *.safetensors weights{found}")
    if _INDEX in names:
        weights = (folder / _INDEX).read_object(ModelPathError, _FIX_MODEL).get("weight_map")
        if not isinstance(weights, dict):
            raise ModelPathError(f"{str(folder / _INDEX)!r} is damaged: it has no weight_map; {_FIX_MODEL}")
        listed = set(map(str, weights.values()))
        if missing := sorted(listed.difference(names)):
            raise ModelPathError(
                f"model folder {str(folder)!r} is incomplete: {_INDEX} names {missing[0]!r}, not there"
            )
    return folder
