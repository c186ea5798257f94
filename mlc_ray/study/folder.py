"""A study's folder: its settings as they were resolved, and what may be added to them when it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlc_ray.config import ConfigError, ScoringSection, StudyConfig, TrainConfig, parse_config
from mlc_ray.config.base import Section, by_dotted_name
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import CELLS_FOLDER, CONFIG_FILE, STUDY_FILE
from mlc_ray.storage import Place
from mlc_ray.study.cells import Cell, Commits
from mlc_ray.train.settings import Kind, changes, kind_of_field


class StudyError(MlcRayError):
    """A study cannot start or go on; the message quotes the folder or the setting, and names the fix."""


@dataclass(frozen=True)
class Plan:
    """A study as its folder keeps it: paths absolute, names of the hub with their commits, `auto` decided.

    `prompts` is the fingerprint of what every model is asked.
    """

    config: StudyConfig
    cells: tuple[Cell, ...]
    scoring: ScoringSection
    commits: Commits
    prompts: str

    def save(self, folder: Place) -> None:
        """Write `study.json`: all that `load_plan` needs, wherever the command is given."""
        content = {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "cells": [
                {
                    "model": cell.model,
                    "method": cell.method,
                    "seed": cell.seed,
                    "run": cell.config.model_dump(mode="json", exclude_unset=True),
                }
                for cell in self.cells
            ],
            "scoring": self.scoring.model_dump(mode="json", exclude_unset=True),
            "commits": {"models": self.commits.models, "data": self.commits.data},
            "prompts": self.prompts,
        }
        (folder / STUDY_FILE).write_json(content)


def load_plan(folder: Place) -> Plan:
    """What the study in a folder is.

    Raises:
        StudyError: No study began there, or its file is damaged.
    """
    file = folder / STUDY_FILE
    try:
        raw: dict[str, Any] = file.read_json()
        cells = [Cell(c["model"], c["method"], c["seed"], parse_config(TrainConfig, c["run"])) for c in raw["cells"]]
        return Plan(
            parse_config(StudyConfig, raw["config"]),
            tuple(cells),
            parse_config(ScoringSection, raw["scoring"]),
            Commits(raw["commits"]["models"], raw["commits"]["data"]),
            raw["prompts"],
        )
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(
            f"{str(folder)!r} is not a study folder, it has no {STUDY_FILE}: a study is in OUTPUT_DIR/NAME, e.g. "
            "runs/study-small"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise StudyError(f"{str(file)!r} has settings that are none any more: {error}") from None
        raise StudyError(f"{str(file)!r} is damaged ({error}); restore it, or start a new study") from None


def check_goes_on(before: Plan, now: Plan, folder: Place) -> None:
    """Refuse to go on with another study: models, methods and seeds may be added, and where cells run may change.

    Cells that have not begun may be anything.

    Raises:
        StudyError: A cell is gone or would compute something else, or models are scored or measured otherwise.
    """
    there = {cell.name: cell for cell in now.cells}
    begun = [cell for cell in before.cells if (folder / CELLS_FOLDER / cell.name / CONFIG_FILE).is_file()]
    faults = [f"{cell.name} is not a cell any more" for cell in begun if cell.name not in there]
    for cell in begun:
        if cell.name in there:
            changed = changes(cell.config.model_dump(mode="json"), there[cell.name].config)
            faults += [f"{cell.name}: {each}" for each in changed if kind_of_field(each.field) is not Kind.FREE]
    faults += _differing("scoring", before.scoring, now.scoring, free={"max_unparsed"})
    if before.config.utility is not None and now.config.utility is not None:
        free = {"tasks", "address", "env", "accelerator", "engine"}
        faults += _differing("utility", before.config.utility, now.config.utility, free=free)
    if not faults and before.prompts != now.prompts:
        faults = [f"the prompts of scoring.benchmarks were {before.prompts}, now {now.prompts}"]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise StudyError(
            f"study folder {str(folder)!r} holds a study with other settings ({'; '.join(faults[:5])}{more}): only "
            "models, methods, seeds and tasks of utility can be added, cells that have not begun changed, and cluster, "
            "engine, checkpoint and scoring.max_unparsed; give the study another name, or the settings it has"
        )


def _differing(path: str, before: Section, now: Section, *, free: set[str]) -> list[str]:
    """The fields of a section that differ, but those that are free to."""
    was, is_now = (by_dotted_name(each.model_dump(mode="json", exclude=free)) for each in (before, now))
    return [
        f"{path}.{name} was {was.get(name)!r}, now {is_now.get(name)!r}"
        for name in sorted(was.keys() | is_now.keys())
        if was.get(name) != is_now.get(name)
    ]
