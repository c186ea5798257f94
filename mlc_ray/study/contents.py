"""What a study's cells are made of: where it goes on, that must still be what it was when they began."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlc_ray.config import UNTOUCHED, SourceSection
from mlc_ray.data.store import TokenArtifact
from mlc_ray.runs import CELLS_FOLDER, RUN_FILE
from mlc_ray.score.results import load_scores
from mlc_ray.storage import Place, fingerprint_model
from mlc_ray.study.cells import Cell
from mlc_ray.study.folder import Plan, StudyError
from mlc_ray.study.record import is_complete, score_folder, untouched_folder
from mlc_ray.train.run import fingerprints_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellData:
    """The token rows that a cell trains on, and those that are held out."""

    tokens: TokenArtifact
    held_out: TokenArtifact | None = None


def check_contents(plan: Plan, folder: Place, data: Mapping[str, CellData]) -> None:
    """Refuse to go on with cells of another content: their seeds would be averaged, and methods compared, all the same.

    Those that are trained or scored count as well; one that has recorded nothing yet is free. Where all cells are
    scored, it is said and not refused.

    Args:
        plan: what the study is now.
        folder: its folder.
        data: of each cell by its name.

    Raises:
        StudyError: The model, the bundles or the openings of a cell that began, or a model that was scored before
            training, have another fingerprint.
    """
    fingerprint = functools.cache(fingerprint_model)  # which reads samples of all weights
    faults = list[str]()

    def now(cell: Cell) -> dict[str, str]:
        own = data[cell.name]
        model = fingerprint(cell.config.model.path)
        return fingerprints_of(cell.config, own.tokens, own.held_out, model=model)

    for cell in plan.cells:
        if before := _recorded(folder / CELLS_FOLDER / cell.name):
            faults += _differing(cell, before, now(cell))
    for model in plan.config.models:
        path = next(cell.config.model.path for cell in plan.cells if cell.model == model)
        if is_complete(score := untouched_folder(folder, model)):
            was, here = load_scores(score).fingerprint, fingerprint(path)
            faults += [] if was == here else [_said(f"{model}-{UNTOUCHED}", f"the model {path}", was, here)]
    if not faults:
        return
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    found = f"study folder {str(folder)!r} holds cells of another content ({'; '.join(faults[:5])}{more})"
    if all(is_complete(score_folder(folder / CELLS_FOLDER / cell.name)) for cell in plan.cells):
        logger.warning("%s; all cells are scored, and none of them is trained again", found)
        return
    raise StudyError(
        f"{found}, with which those that are still to be trained could not be compared: restore what they were made "
        "of, remove the folders of these cells, which are trained again then, or start a new study under another name"
    )


def _recorded(run: Place) -> Mapping[str, str]:
    """The fingerprints in a run's run.json; none where it is not written yet or damaged, as where the run goes on."""
    try:
        facts: Any = (run / RUN_FILE).read_json()
    except (FileNotFoundError, ValueError):
        return {}
    return facts.get("fingerprints", {}) if isinstance(facts, dict) else {}


def _differing(cell: Cell, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    held_out, config = cell.config.data.validation, cell.config
    what = {
        "model": f"the model {config.model.path}",
        "tokens": f"the bundles of {_paths(config.data.train)} as tokens",
        "validation": f"the held-out bundles of {_paths([] if held_out is None else held_out.sources)} as tokens",
        "openings": "the openings of refusals in its languages",
    }
    return [
        _said(cell.name, what.get(name, name), before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _said(cell: str, what: str, was: str | None, now: str | None) -> str:
    return f"{cell}: {what} had the fingerprint {was!r}, now {now!r}"


def _paths(sources: Sequence[SourceSection]) -> str:
    return ", ".join(source.path for source in sources)
