"""The searches of a scaling study, as its folder keeps them: paths absolute, the run of each size written out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from mlc_ray.config import ConfigError, ScaleConfig, SearchConfig, TrainConfig, dump_yaml, parse_config
from mlc_ray.report.scale import SizeBudget
from mlc_ray.report.search import SearchFileError, is_search, read_confirmed, read_progress
from mlc_ray.runs import BASE_FILE, CELLS_FOLDER, SCALE_FILE, SEARCH_CONFIG_FILE
from mlc_ray.search.checks import as_it_runs, base_of
from mlc_ray.search.folder import changed_settings, settings_in
from mlc_ray.search.space import Space, make_space
from mlc_ray.search.tune import number_of_points
from mlc_ray.storage import Place, local_side
from mlc_ray.study.folder import StudyError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SizeSearch:
    """The search of a size: `base` is the run that its trials share."""

    size: str
    config: SearchConfig
    space: Space

    @property
    def run(self) -> TrainConfig:
        """A run of it."""
        return base_of(self.space)

    @property
    def points(self) -> int:
        """Points to try."""
        return number_of_points(self.config, self.space)


@dataclass(frozen=True)
class ScalePlan:
    """A scaling study: its settings, its searches, and what they take, once it is counted."""

    config: ScaleConfig
    searches: tuple[SizeSearch, ...]
    budget: tuple[SizeBudget, ...] = ()

    def save(self, folder: Place) -> None:
        """Write `scale.json`: all that `load_scale` needs, wherever the command is given."""
        content = {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "searches": {
                each.size: {
                    "settings": settings_in(each.config, each.space, cell_folder(folder, each.size)),
                    "base": dict(each.space.base),
                }
                for each in self.searches
            },
            "budget": [asdict(each) for each in self.budget],
        }
        (folder / SCALE_FILE).write_json(content)


def cell_folder(folder: Place, size: str) -> Place:
    """Where the search of a size is."""
    return folder / CELLS_FOLDER / size


def make_searches(config: ScaleConfig, folder: Place) -> tuple[SizeSearch, ...]:
    """All searches, every corner of each valid as a run.

    Raises:
        ConfigError: One would be invalid; the message names the size.
    """
    found = []
    for size in config.sizes:
        try:
            search = _search_of(config, size, folder)
            space = make_space(search)
            found.append(SizeSearch(size, as_it_runs(search, space), space))
        except ConfigError as error:
            raise ConfigError(f"sizes.{size}: {error}") from None
    return tuple(found)


def _search_of(config: ScaleConfig, size: str, folder: Place) -> SearchConfig:
    section = config.sizes[size]
    own = {
        "name": size,
        "output_dir": str(folder / CELLS_FOLDER),
        "resume": "auto",
        "train": section.train or config.train,
        "set": [*config.set, *section.set],
    }
    search: dict[str, Any] = {**config.search, **own}
    if section.engine:
        scoring = search["scoring"]
        search["scoring"] = {**scoring, "engine": {**scoring.get("engine", {}), **section.engine}}
    return parse_config(SearchConfig, search)


def load_scale(folder: Place) -> ScalePlan:
    """The scaling study in a folder.

    Raises:
        StudyError: None began there, or its file is damaged.
    """
    file = folder / SCALE_FILE
    try:
        raw: dict[str, Any] = file.read_json()
        searches = [_search(folder, size, each["settings"], each["base"]) for size, each in raw["searches"].items()]
        budget = TypeAdapter(tuple[SizeBudget, ...]).validate_python(raw["budget"])
        return ScalePlan(parse_config(ScaleConfig, raw["config"]), tuple(searches), budget)
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(
            f"{str(folder)!r} is not the folder of a scaling study, it has no {SCALE_FILE}: one is in OUTPUT_DIR/NAME"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise StudyError(f"{str(file)!r} has settings that are none any more: {error}") from None
        raise StudyError(f"{str(file)!r} is damaged ({error}); restore it, or start a new study") from None


def _search(folder: Place, size: str, settings: Mapping[str, Any], base: Mapping[str, Any]) -> SizeSearch:
    """A search whose `train` is the run as the study keeps it, in a file on this machine."""
    file = local_side(folder) / "bases" / f"{size}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_yaml(base), encoding="utf-8")
    config = parse_config(SearchConfig, {**settings, "train": str(file), "resume": "auto"})
    return SizeSearch(size, config, make_space(config))


def check_scale_goes_on(now: ScalePlan, folder: Place) -> None:
    """Refuse to go on with another study: sizes and trials may be added, and those that have not begun be changed.

    Raises:
        StudyError: A search that began is gone or has other settings.
    """
    before = load_scale(folder)
    there = {each.size: each for each in now.searches}
    faults = []
    for each in before.searches:
        place = cell_folder(folder, each.size)
        if not (place / SEARCH_CONFIG_FILE).is_file():
            continue
        if each.size not in there:
            faults.append(f"{each.size} is not a size any more")
        else:
            again = there[each.size]
            faults += [f"{each.size}: {change}" for change in changed_settings(again.config, again.space, place)]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise StudyError(
            f"study folder {str(folder)!r} holds a study with other settings ({'; '.join(faults[:5])}{more}): sizes "
            "and trials can be added; give the study another name, or the settings it has"
        )


def is_over(search: SizeSearch, folder: Place) -> bool:
    """Whether all trials of a search have ended, and the best are confirmed after them.

    One with a damaged `trials.json` is not: the search writes it anew when it goes on.
    """
    place = cell_folder(folder, search.size)
    if not (place / BASE_FILE).is_file() or not is_search(place):
        return False
    try:
        confirmed, ended = read_confirmed(place), read_progress(place).ended
    except SearchFileError as error:
        logger.warning("search %s goes on: %s", search.size, error)
        return False
    return confirmed is not None and min(ended, confirmed.trials or 0) >= search.points * search.config.repeats
