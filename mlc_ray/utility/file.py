"""`utility.json`: what a measurement of utility leaves behind. Written by `utility.run`, read by reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mlc_ray.errors import MlcRayError
from mlc_ray.result_files import RESULT_FILE, ResultFileError, read_result
from mlc_ray.runs import UTILITY_FILE
from mlc_ray.storage import Place

FORMAT = 1


class UtilityError(MlcRayError):
    """The utility cannot be measured as asked; the message names the setting or the package that is missing."""


class UtilityFileError(MlcRayError):
    """A utility.json is missing, damaged or of another format; the message names the path."""


@dataclass(frozen=True)
class UtilityRow:
    """One metric of one task or group, and how it was measured.

    `value` and `stderr` (None where the harness gives no finite number) are in the metric's own unit, a fraction for
    accuracies; `n` is the number of questions asked, summed over the tasks of a group. `version` is the task's, None
    for a group. `chat` is the section of the settings that questions stood in, None without `chat_template`.
    """

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    n: int | None
    higher_is_better: bool | None
    version: str | None
    num_fewshot: int | None
    limit: int | None
    chat_template: bool
    backend: str
    chat: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Utility:
    """What a utility.json holds: rows of one model, whose content `fingerprint` names."""

    __pydantic_config__ = RESULT_FILE

    model: str
    resolved: str
    fingerprint: str
    rows: tuple[UtilityRow, ...]
    versions: Mapping[str, str]
    created: str
    folder: Place = field(default_factory=lambda: Place("."))

    def row(self, task: str, metric: str = "acc") -> UtilityRow:
        """The row of a task.

        Raises:
            KeyError: There is no such task; the message lists those there are.
        """
        for row in self.rows:
            if (row.task, row.metric) == (task, metric):
                return row
        raise KeyError(f"{task} {metric} was not measured; there are {[(r.task, r.metric) for r in self.rows]}")


_UTILITY = TypeAdapter(Utility)


def save_utility(utility: Utility) -> Place:
    """Write `utility` as `utility.json` into its folder; returns the file."""
    file = Place(utility.folder) / UTILITY_FILE
    content = asdict(utility)
    del content["folder"]  # it may be moved; the reader knows where it found it
    file.write_json({"format": FORMAT, **content})
    return file


def load_utility(path: str | Path | Place) -> Utility:
    """The content of a folder's `utility.json`, or of the file itself.

    Raises:
        UtilityFileError: It is missing, damaged, or of another format.
    """
    file = Place(path)
    file = file / UTILITY_FILE if file.is_dir() else file
    try:
        result = read_result(file, _UTILITY, FORMAT)
    except ResultFileError as error:
        raise UtilityFileError(f"{error}; measure again with `mlc-ray utility`") from None
    return replace(result, folder=file.absolute().parent)
