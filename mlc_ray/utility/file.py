"""`utility.json`: what a measurement of utility leaves behind. Written by `score.utility`, read by reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from mlc_ray.errors import MlcRayError
from mlc_ray.score.results import DamagedError, read_fields
from mlc_ray.storage import write_json_atomic

UTILITY_FILE = "utility.json"
FORMAT = 1


class UtilityFileError(MlcRayError):
    """A utility.json is missing, damaged or of another format; the message names the path."""


@dataclass(frozen=True)
class UtilityRow:
    """One metric of one task or group, and how it was measured.

    `value` and `stderr` (None where the harness gives no finite number) are in the metric's own unit, a fraction for
    accuracies; `n` is the number of questions asked, summed over the tasks of a group. `version` is the task's, None
    for a group.
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


@dataclass(frozen=True)
class Utility:
    """What a utility.json holds: rows of one model, whose content `fingerprint` names."""

    model: str
    resolved: str
    fingerprint: str
    rows: tuple[UtilityRow, ...]
    versions: Mapping[str, str]
    created: str
    folder: Path = Path()

    def row(self, task: str, metric: str = "acc") -> UtilityRow:
        """The row of a task; raises `KeyError`, which lists what there is."""
        for row in self.rows:
            if (row.task, row.metric) == (task, metric):
                return row
        raise KeyError(f"{task} {metric} was not measured; there are {[(r.task, r.metric) for r in self.rows]}")


def save_utility(utility: Utility) -> Path:
    """Write `utility` as `utility.json` into its folder; returns the file."""
    file = utility.folder / UTILITY_FILE
    content = asdict(utility)
    del content["folder"]  # it may be moved; the reader knows where it found it
    write_json_atomic(file, {"format": FORMAT, **content})
    return file


def load_utility(path: str | Path) -> Utility:
    """The content of a folder's `utility.json`, or of the file itself. Raises `UtilityFileError`."""
    file = Path(path)
    file = file / UTILITY_FILE if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UtilityFileError(f"{str(file)!r} does not exist; `mlc-ray utility` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UtilityFileError(f"{str(file)!r} is damaged: not valid JSON ({error})") from None
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise UtilityFileError(
            f"{str(file)!r} has format {found!r}, expected {FORMAT}; measure again with `mlc-ray utility`"
        )
    try:
        hints = {name: hint for name, hint in get_type_hints(Utility).items() if name != "folder"}
        values = read_fields(hints, content, "the utility")
    except DamagedError as error:
        raise UtilityFileError(
            f"{str(file)!r} is damaged: {error}; remove it and measure again with `mlc-ray utility`"
        ) from None
    return Utility(**values, folder=file.resolve().parent)
