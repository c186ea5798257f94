"""Folders of searches: what their `trials.json` says for people, and which scores belong to what was confirmed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from mlc_ray.errors import MlcRayError
from mlc_ray.report.tables import Table
from mlc_ray.runs import BASELINE_FOLDER, CONFIRMATION, SCORES_FOLDER, TRIALS_FILE, TRIALS_FOLDER
from mlc_ray.storage import Place

T = TypeVar("T")

SHOWN = "shown"
"""The key of `trials.json` under which a search keeps what reports show of it: `findings` and `tables`."""
BEFORE = "before training"
"""What a report calls the score of the model before training."""


class SearchFileError(MlcRayError):
    """The `trials.json` of a search is damaged; the message quotes the path."""


@dataclass(frozen=True)
class Search:
    """One search: `findings` are the result in a few lines, `tables` what was confirmed, if anything, and trials."""

    label: str
    folder: Place
    findings: tuple[str, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Shown:
    """What `trials.json` holds for reports."""

    findings: tuple[str, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class _Trial:
    trial: str


@dataclass(frozen=True)
class _Confirmed:
    points: tuple[_Trial, ...]


_SHOWN = TypeAdapter(Shown)
_CONFIRMED = TypeAdapter(_Confirmed | None)


def is_search(folder: Place) -> bool:
    """Whether a search has written results into a folder."""
    return (folder / TRIALS_FILE).is_file()


def read_search(folder: Place, label: str) -> Search:
    """The search in a folder.

    Raises:
        SearchFileError: Its `trials.json` is damaged.
    """
    shown = _read(folder, SHOWN, _SHOWN)
    return Search(label, folder, shown.findings, shown.tables)


def scores_of(folder: Place) -> dict[str, Place]:
    """The score folders that a report compares, by what it calls them: the model before training, the confirmed trials.

    They are of the prompts that chose none of them. Until something is confirmed it is the first model's alone, on the
    prompts that choose: what the trials have there is too good.

    Raises:
        SearchFileError: The `trials.json` is damaged.
    """
    confirmed = _read(folder, "confirmation", _CONFIRMED)
    if confirmed is None:
        return {BEFORE: folder / BASELINE_FOLDER}
    names = [point.trial for point in confirmed.points]
    trials = {name: folder / TRIALS_FOLDER / name / SCORES_FOLDER / CONFIRMATION for name in names}
    return {BEFORE: folder / CONFIRMATION, **trials}


_FIX = "`mlc-ray search --resume` writes it anew"


def _read(folder: Place, key: str, form: TypeAdapter[T]) -> T:
    """What is under a key of `trials.json`; None is read where it has none."""
    content = (folder / TRIALS_FILE).read_object(SearchFileError, _FIX)
    try:
        return form.validate_python(content.get(key), strict=False)
    except (ValidationError, ValueError) as error:
        raise SearchFileError(f"{str(folder / TRIALS_FILE)!r} is damaged: {_first(error, key)}; {_FIX}") from None


def _first(error: Exception, key: str) -> str:
    if isinstance(error, ValidationError):
        found = error.errors()[0]
        return f"{'.'.join(map(str, (key, *found['loc'])))}: {found['msg']}"
    return str(error)
