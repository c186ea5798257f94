"""Settings of a scaling study: which sizes are searched for layer and lambda, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from mlc_ray._registry import names, resolve
from mlc_ray.config.base import RESUME, PositiveFloat, Resume, RunName, Section
from mlc_ray.config.paths import ConfigPath, StoredPath
from mlc_ray.config.search import SearchConfig
from mlc_ray.config.study import Overrides

LAYER, WEIGHT = "mlc.layer", "mlc.weight"
"""What every search of a scaling study varies, at least."""
DECIDED_OF_SEARCHES = ("name", "output_dir", "resume", "train", "set")


class SizeSection(Section):
    """One size: the runs of its search."""

    train: ConfigPath | None = Field(None, description="Config file of its runs (default: `train` of the study).")
    set: Overrides = Field(
        [], description="Overrides of that file for this size, section.field=value, e.g. model.path=owner/model."
    )
    engine: dict[str, Any] = Field(
        {},
        description="Settings of `search.scoring.engine` for this size alone, e.g. {tensor_parallel: 4} where one GPU "
        "does not hold it.",
    )
    family: str | None = Field(
        None,
        description="Models of one family have a level of their own in the trends, which are then within families.",
    )
    parameters: PositiveFloat | None = Field(
        None, description="What the trends take for its size, in parameters (default: all that the model has)."
    )


class ScaleConfig(Section):
    """A study whose cells are searches: of each size the layer, as a fraction of the depth, and lambda."""

    command: ClassVar = "scale"
    name: RunName = Field(description="Folder name of the study.")
    output_dir: StoredPath = Field(
        "runs", description="Where study folders go; on a cluster, a path that all nodes share, or a URL."
    )
    resume: Resume = Field("never", description=RESUME)
    sizes: Annotated[dict[RunName, SizeSection], Field(min_length=1)] = Field(
        description="The models by the names that tables show; they are searched in this order."
    )
    train: ConfigPath | None = Field(None, description="Config file of the runs of every size that names no other.")
    set: Overrides = Field([], description="Overrides of the runs of all sizes, before each size's own.")
    search: Mapping[str, Any] = Field(
        description="What all searches share: settings of a search without name, output_dir, resume, train and set."
    )

    @model_validator(mode="after")
    def _searches_that_can_be_compared(self) -> ScaleConfig:
        if own := [name for name in DECIDED_OF_SEARCHES if name in self.search]:
            fix = "give it at the top, or under a size" if own[0] in ("train", "set") else "the study decides it"
            raise ValueError(f"search.{own[0]}={self.search[own[0]]!r} cannot stand here: {fix}; remove it")
        if lacking := [name for name, section in self.sizes.items() if (section.train or self.train) is None]:
            raise ValueError(f"sizes.{lacking[0]} has no file of its runs: give train at the top, or for each size")
        search = SearchConfig.model_validate({**self.search, "name": self.name, "train": "of each size"})
        for name in (LAYER, WEIGHT):
            if name not in search.space:
                raise ValueError(f"search.space has no {name}, whose best value is followed over the sizes; add it")
        layers = search.space[LAYER].choice
        indices = [value for value in layers or ["no choice"] if value != "last" and not isinstance(value, float)]
        if indices:
            raise ValueError(
                f"search.space.{LAYER} has {indices[0]!r}: an index is another depth in each size; give a choice of "
                "fractions and last, e.g. choice: [0.5, 0.75, last]"
            )
        if not _has_one_best(search.objective.name):
            raise ValueError(
                f"search.objective.name={search.objective.name!r}: a scaling study follows one best point a size, with "
                f"a floor under the benign side; use {' or '.join(filter(_has_one_best, names('objective')))}"
            )
        return self


def _has_one_best(objective: str) -> bool:
    found = resolve("objective", objective)
    return bool(found.has_floor and len(found.metrics) == 1)
