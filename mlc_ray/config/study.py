"""Settings of a study: which methods, models and seeds are compared, and how each of them is scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from mlc_ray.config.base import RESUME, Resume, RunName, Section
from mlc_ray.config.model import ModelSection
from mlc_ray.config.paths import StoredPath
from mlc_ray.config.score import ScoringSection, UtilitySection

UNTOUCHED = "untouched"
"""The name of each model's reference row: the model before any training."""
DECIDED = ("name", "output_dir", "seed", "resume", "model", "chat")
"""Fields of a run that overrides of a study cannot set: the study decides them, or all cells share them."""

Overrides = list[str]


class StudyModelSection(ModelSection):
    """A model of a study: the section `model` of its runs, and what else differs for it."""

    set: Overrides = Field(
        [], description="Overrides of `train` for all runs of this model, section.field=value, e.g. mlc.layer=42."
    )
    methods: dict[RunName, Overrides] = Field(
        {}, description="Overrides of methods for this model, after the method's own, by the method's name."
    )


class StudyConfig(Section):
    """A study: every method on every model with every seed, each a run and a score, in one table."""

    command: ClassVar = "study"
    name: RunName = Field(description="Folder name of the study.")
    output_dir: StoredPath = Field(
        "runs", description="Where study folders go; on a cluster, a path that all nodes share, or a URL."
    )
    resume: Resume = Field("never", description=RESUME)
    models: Annotated[dict[RunName, StudyModelSection], Field(min_length=1)] = Field(
        description="The models by the names that tables show; each is scored untouched, too."
    )
    methods: Annotated[dict[RunName, Overrides], Field(min_length=1)] = Field(
        description="The methods by the names that tables show: overrides of `train`, section.field=value; none: []."
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        description="The seeds of every method's runs on every model."
    )
    train: Mapping[str, Any] = Field(
        description="What all runs share: settings of a run without name, output_dir, seed, resume and model."
    )
    scoring: ScoringSection = Field(description="How every model is scored; prompts of both kinds in each language.")
    utility: UtilitySection | None = Field(
        None, description="Measure what each model still knows, too, by lm-evaluation-harness."
    )
    keep_models: bool = Field(
        True, description="Keep the model of each cell; false removes it once it is scored (and its utility measured)."
    )

    @model_validator(mode="after")
    def _cells_have_names_of_their_own(self) -> StudyConfig:
        if UNTOUCHED in self.methods:
            raise ValueError(f"methods.{UNTOUCHED} is the name of the models before training; give it another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds!r} names a seed twice")
        if own := [name for name in DECIDED[:5] if name in self.train]:
            fix = "give models" if own[0] == "model" else "the study decides it"
            raise ValueError(f"train.{own[0]}={self.train[own[0]]!r} cannot stand here: {fix}; remove it")
        for name, model in self.models.items():
            if strangers := sorted(model.methods.keys() - self.methods.keys()):
                known = ", ".join(self.methods)
                raise ValueError(f"models.{name}.methods.{strangers[0]} is no method of the study ({known})")
        pairs = [(model, method) for model in self.models for method in self.methods]
        names = [f"{model}-{method}" for model, method in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two models and methods make the cell name {twice[0]!r}-SEED; rename one of them")
        return self

    @model_validator(mode="after")
    def _scored_as_trained(self) -> StudyConfig:
        if self.scoring.asking.reasoning == "forbid":
            raise ValueError(
                "scoring.asking.reasoning='forbid' would score models in another conversation than they train in; turn "
                "thoughts off in train.chat, e.g. chat: {arguments: {enable_thinking: false}}"
            )
        return self
