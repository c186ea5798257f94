"""Folders of searches: what their `trials.json` says for people, and which scores belong to what was confirmed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from mlc_ray.errors import MlcRayError
from mlc_ray.report.tables import Table
from mlc_ray.runs import BASELINE_FOLDER, CONFIRMATION, SCORES_FOLDER, TRIALS_FILE, TRIALS_FOLDER
from mlc_ray.stats.rates import Interval
from mlc_ray.storage import Place
from mlc_ray.types import Measure

T = TypeVar("T")

SHOWN = "shown"
"""The key of `trials.json` under which a search keeps what reports show of it: `findings` and `tables`."""
CONFIRMATION_KEY = "confirmation"
"""The key under which it keeps what it confirmed."""
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
class Progress:
    """How many of the trials have ended, and about how many seconds the others take (None: not known)."""

    ended: int
    total: int
    seconds_left: float | None = None


@dataclass(frozen=True)
class BothSides:
    """Both sides of a score, in %: of harmful prompts the rate of `measure`, of benign ones that of compliance."""

    measure: Measure
    harmful: Interval
    benign: Interval | None


@dataclass(frozen=True)
class Point:
    """A point that a search confirmed: `trial` has its model, `score` is the mean over all `runs` scored."""

    trial: str
    runs: tuple[str, ...]
    score: BothSides


@dataclass(frozen=True)
class ConfirmedPoints:
    """The points that a search confirmed, best first, after how many trials."""

    points: tuple[Point, ...]
    trials: int | None


_SHOWN = TypeAdapter(Shown)
_CONFIRMED = TypeAdapter(ConfirmedPoints | None)
_PROGRESS = TypeAdapter(Progress)


def is_search(folder: Place) -> bool:
    """Whether a search has written results into a folder."""
    return (folder / TRIALS_FILE).is_file()


def read_search(folder: Place, label: str) -> Search:
    """The search in a folder.

    Raises:
        SearchFileError: Its `trials.json` is damaged.
    """
    shown = read_trials(folder, SHOWN, _SHOWN)
    return Search(label, folder, shown.findings, shown.tables)


def scores_of(folder: Place) -> dict[str, Place]:
    """The score folders that a report compares, by what it calls them: the model before training, the confirmed trials.

    They are of the prompts that chose none of them. Until something is confirmed it is the first model's alone, on the
    prompts that choose: what the trials have there is too good.

    Raises:
        SearchFileError: The `trials.json` is damaged.
    """
    confirmed = read_confirmed(folder)
    if confirmed is None:
        return {BEFORE: folder / BASELINE_FOLDER}
    names = [point.trial for point in confirmed.points]
    trials = {name: folder / TRIALS_FOLDER / name / SCORES_FOLDER / CONFIRMATION for name in names}
    return {BEFORE: folder / CONFIRMATION, **trials}


def read_confirmed(folder: Place) -> ConfirmedPoints | None:
    """What the search in a folder confirmed; None if nothing.

    Raises:
        SearchFileError: The `trials.json` is damaged.
    """
    return read_trials(folder, CONFIRMATION_KEY, _CONFIRMED)


def read_progress(folder: Place) -> Progress:
    """How far the search in a folder was when it last wrote results.

    Raises:
        SearchFileError: The `trials.json` is damaged.
    """
    return read_trials(folder, "progress", _PROGRESS)


_FIX = "`mlc-ray search --resume` writes it anew"


def read_trials(folder: Place, key: str, form: TypeAdapter[T]) -> T:
    """What is under a key of the `trials.json` in a folder; None is read where it has none.

    Raises:
        FileNotFoundError: The search has not written it yet.
        SearchFileError: It is damaged, or what is under the key is not of this `form`.
    """
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
