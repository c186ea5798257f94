"""The cells of a study: from its settings to those of every run, all of them valid before any starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlc_ray.config import (
    DECIDED,
    ConfigError,
    ScoringSection,
    SourceSection,
    StudyConfig,
    TrainConfig,
    apply_override,
    parse_config,
)
from mlc_ray.data.sources import pinned
from mlc_ray.score.plan import with_longest_answer
from mlc_ray.storage import absolute_if_here, pinned_model
from mlc_ray.train.run_folder import with_model, with_sources


@dataclass(frozen=True)
class Cell:
    """One run of a study; `config` is that run's, complete."""

    model: str
    method: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return self.config.name


def make_cells(config: StudyConfig) -> list[Cell]:
    """All cells, model by model, of each first all methods with the first seed.

    A run's settings are those of `train`, then the overrides of its model, of its method, and of the method for the
    model, each as after `--set`: `objective={loss: mpo}` replaces a section, `mlc.layer=42` sets a field of one.

    Raises:
        ConfigError: A run would be invalid, an override sets what the study decides, one of `train` does not hold
            for any method, or two methods are the same; the message names the cell or the methods.
    """
    cells = [
        _cell(config, model, method, seed)
        for model in config.models
        for seed in config.seeds
        for method in config.methods
    ]
    made: dict[str, str] = {}  # the first method that runs so on every model
    for method in config.methods:
        runs = [cell.config.model_dump(exclude={"name"}) for cell in cells if cell.method == method]
        if (same := made.setdefault(repr(runs), method)) != method:
            raise ConfigError(f"methods.{same} and methods.{method} have the same settings on every model; remove one")
    return cells


def _cell(config: StudyConfig, model: str, method: str, seed: int) -> Cell:
    section = config.models[model]
    raw: dict[str, Any] = copy.deepcopy(dict(config.train))
    places = {
        f"models.{model}.set": section.set,
        f"methods.{method}": config.methods[method],
        f"models.{model}.methods.{method}": section.methods.get(method, []),
    }
    for place, overrides in places.items():
        for override in overrides:
            field = override.partition("=")[0].strip()
            if (first := field.partition(".")[0]) in DECIDED:
                raise ConfigError(f"{place}: {override!r} sets {field}, but {_WHO[first]}; remove it")
            try:
                apply_override(raw, override)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
    own = section.model_dump(mode="json", exclude_unset=True, exclude={"set", "methods"})
    name = f"{model}-{method}-{seed}"
    try:
        run = parse_config(TrainConfig, {**raw, "name": name, "seed": seed, "resume": "auto", "model": own})
    except ConfigError as error:
        given = ", then ".join(["train", *(place for place, overrides in places.items() if overrides)])
        raise ConfigError(f"the run of method {method!r} on model {model!r} ({given}): {error}") from None
    return Cell(model, method, seed, run)


def scoring_of(config: StudyConfig, cells: Sequence[Cell]) -> ScoringSection:
    """How all models are scored: in the conversation that cells train in, the longest answer decided.

    Raises:
        ConfigError: it names another conversation.
    """
    scoring, chat = config.scoring, cells[0].config.chat
    if scoring.chat is not None and scoring.chat != chat:
        raise ConfigError(
            f"scoring.chat={scoring.chat!r}, but the cells train with chat={chat!r}; give chat under train alone"
        )
    return with_longest_answer(scoring.model_copy(update={"chat": chat}))


_WHO = {
    **dict.fromkeys(("name", "output_dir", "seed", "resume"), "the study decides it"),
    "model": "models gives the model of all its methods",
    "chat": "all cells are scored on the same prompts, and train on them: give it under train",
}


class Commits:
    """What names of the hub stand for: asked once for a study, and the same for all its cells and when it goes on.

    `models` and `data` have what is known by the name that was given; a model and a data set may have the same one.
    """

    def __init__(self, models: Mapping[str, str] | None = None, data: Mapping[str, str] | None = None) -> None:
        self.models, self.data = dict(models or {}), dict(data or {})

    def model(self, path: str) -> str:
        """A model's name with its commit; a folder as an absolute path.

        Raises:
            HubError: The hub cannot say which.
        """
        if path not in self.models:
            self.models[path] = pinned_model(absolute_if_here(path))
        return self.models[path]

    def sources(self, sources: Sequence[SourceSection]) -> list[SourceSection]:
        """The same of data sets.

        Raises:
            BundleFileError: The hub cannot say which.
        """
        found = []
        for source in sources:
            if source.path not in self.data:
                self.data[source.path] = _pinned(source)
            found.append(source.model_copy(update={"path": self.data[source.path]}))
        return found

    def cell(self, cell: Cell) -> Cell:
        """A cell with all of its names so."""
        config = with_model(with_sources(cell.config, self.sources), self.model(cell.config.model.path))
        return replace(cell, config=config)


def _pinned(source: SourceSection) -> str:
    (found,) = pinned([source.model_copy(update={"path": absolute_if_here(source.path)})])
    return found.path
