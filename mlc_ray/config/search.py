"""Settings of a search: what varies, what is maximised, and how trials are scored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mlc_ray._registry import resolve
from mlc_ray.config.base import RESUME, PositiveInt, Resume, RunName, Section
from mlc_ray.config.component import ComponentSettings
from mlc_ray.config.data import SourceSection
from mlc_ray.config.paths import ConfigPath, StoredPath
from mlc_ray.config.score import ScoringSection
from mlc_ray.config.train import TrainConfig

Scalar = bool | int | float | str


class ParameterSection(Section):
    """How one field of a run varies: exactly one of the four."""

    choice: Annotated[list[Scalar], Field(min_length=1)] | None = Field(None, description="One of these values.")
    integers: tuple[int, int] | None = Field(None, description="A whole number between two, both included.")
    uniform: tuple[float, float] | None = Field(None, description="A number between two.")
    loguniform: tuple[float, float] | None = Field(
        None, description="A number between two, every order of magnitude as likely as another."
    )

    @model_validator(mode="after")
    def _one_range(self) -> ParameterSection:
        given = [name for name in ParameterSection.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(ParameterSection.model_fields)}; got {given or 'none'}")
        for name in ("integers", "uniform", "loguniform"):
            if (bounds := getattr(self, name)) is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"{name}={list(bounds)!r}: the first bound must be below the second")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform={list(self.loguniform)!r}: bounds must be positive")
        for value in self.choice or ():
            if isinstance(value, str) and _reads_as_number(value):
                raise ValueError(f"choice has {value!r}, which is text: write the number without quotes")
        if self.choice is not None and len({(isinstance(v, bool), v) for v in self.choice}) < len(self.choice):
            raise ValueError(f"choice={self.choice!r} names a value twice")
        return self


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class ObjectiveSettings(Section):
    """What the settings of every search objective share; an objective adds its own fields in its nested `Settings`."""

    name: str = Field(description="Objective: a name, or package.module:Class for one from outside this package.")
    one_sided_languages: list[str] = Field(
        [],
        description="Languages that may lack harmful or benign prompts. They are asked and shown, and count on neither "
        "side; one that is not listed here and lacks a side is refused.",
    )


_AVERAGE: Any = {}  # validated like any other value: the settings of the objective that is the default


Criterion = Literal["headroom", "silhouette", "separation", "transfer"]
"""What ranks layers before training; `search.criteria` has the formulas."""


PROBE_LIMIT = 64
"""Bundles of each kind: enough for a probe's AUC to have a standard error near 0.05, few enough to hold all layers."""


class ProbePriorSection(Section):
    """Look at every layer once, forward only, and try the layers in the order in which it ranks them."""

    criterion: Criterion = Field("headroom", description="What ranks the layers, see docs/search.md; all are shown.")
    limit: PositiveInt | None = Field(
        None, description=f"Probe on at most this many bundles of each kind (default: {PROBE_LIMIT})."
    )


class ConfirmSection(Section):
    """What is reported of a search: its best few points, scored on bundles on which none of them was chosen."""

    benchmarks: Annotated[list[SourceSection], Field(min_length=1)] | None = Field(
        None,
        description="Bundles to confirm on (default: every second bundle of scoring.benchmarks, by the hash of its "
        "content, is kept from the trials for this).",
    )
    limit: PositiveInt | None = Field(
        None, description="At most this many bundles per benchmark and kind of confirm.benchmarks."
    )
    keep: PositiveInt = Field(3, description="How many points are confirmed: those of the highest lower bounds.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="Train each of them again with these seeds, and confirm the mean over seeds."
    )

    @model_validator(mode="after")
    def _read(self) -> ConfirmSection:
        if self.limit is not None and self.benchmarks is None:
            raise ValueError(f"limit={self.limit} is read with confirm.benchmarks only; set scoring.limit")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds!r} names a seed twice")
        return self


class SearchConfig(Section):
    """A search: many runs that differ in a few fields, each scored by engines that stay warm."""

    command: ClassVar = "search"
    name: RunName = Field(description="Folder name of the search.")
    output_dir: StoredPath = Field(
        "runs", description="Where search folders go; on a cluster, a path that all nodes share, or a URL."
    )
    seed: Annotated[int, Field(ge=0, le=2**31)] = Field(42, description="Seed of the sampler; runs keep their own.")
    resume: Resume = Field("never", description=RESUME)
    train: ConfigPath = Field(description="Config file of the runs.")
    set: list[str] = Field([], description="Overrides of that file, section.field=value, the same for all trials.")
    space: Annotated[dict[str, ParameterSection], Field(min_length=1)] = Field(
        description="Fields of a run that vary, by their dotted names, e.g. mlc.layer."
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        "tpe", description="Optuna's sampler: tree-structured Parzen estimator, random, or every combination."
    )
    trials: PositiveInt | None = Field(None, description="Number of points to try (grid: default and most is all).")
    enqueue: list[dict[str, Scalar]] = Field(
        [], description="Points tried first, each a value for every name of space."
    )
    repeats: PositiveInt = Field(1, description="Trials a point, each with a seed of its own: seed, seed + 1, ...")
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Stop trials after this time, and confirm those that ended, with those of `confirm.seeds` that it "
        "leaves time for; the others go on when the search is resumed, with the same time again.",
    )
    concurrency: PositiveInt = Field(1, description="Trials at once.")
    score_every: PositiveInt | None = Field(
        None,
        description="Optimizer steps between scores of a trial, of its weights alone; the last step is always scored "
        "(default: that one only). Optimizer states are written every `checkpoint.every` steps of the run, to resume.",
    )
    scheduler: Literal["none", "asha", "median"] = Field(
        "none", description="Stop poor trials at a score: successive halving, or below the median of the others."
    )
    scheduler_metric: str | None = Field(
        None,
        pattern=r"^validation(/[\w.-]+)+$",
        description="What the scheduler compares at each score: a number of data.validation, such as "
        "validation/reward/accuracy or validation/harmful/log_prob/chosen_change (default: the objective).",
    )
    grace_scores: PositiveInt = Field(1, description="Schedulers: scores a trial gets before it may be stopped.")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        4, description="asha: one in this many trials goes on at each rung; rungs are grace_scores x its powers."
    )
    objective: Annotated[ObjectiveSettings, ComponentSettings("objective", default="average")] = Field(
        _AVERAGE, description="What makes one trial better than another."
    )
    scoring: ScoringSection
    confirm: ConfirmSection = ConfirmSection()
    probe: ProbePriorSection | None = Field(
        None, description="Probe first, and try layers in the order of its ranking; none is left out."
    )
    share_gpu: bool = Field(
        False,
        description="The engine sleeps while trials train, so that both fit the GPU of a cluster that has one; else "
        "engines own theirs.",
    )
    keep_models: PositiveInt | None = Field(
        None, description="Keep the models of this many of the best trials (default: of all)."
    )
    keep_checkpoints: bool = Field(
        False,
        description="Write a checkpoint of the last step too, and keep what is there when a trial ends: of one that "
        "was stopped early, the checkpoints of `checkpoint.every`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fields_of_runs(cls, raw: Any) -> Any:
        """What belongs to the runs, or is written as they write it, has a place of its own here."""
        if isinstance(raw, dict):
            for name in sorted((TrainConfig.model_fields.keys() - cls.model_fields.keys()) & raw.keys()):
                raise ValueError(
                    f"{name} is a setting of the runs: change it for all trials under set, e.g. "
                    f"set: [model.path=/abs/model], or vary it under space; given was {name}={raw[name]!r}"
                )
            space = raw.get("space")
            for name, parameter in space.items() if isinstance(space, dict) else ():
                inner = list(parameter.values()) if isinstance(parameter, dict) else []
                if "." not in str(name) and inner and all(isinstance(value, dict) for value in inner):
                    raise ValueError(
                        f"space.{name}={parameter!r}: write dotted names as one key, e.g. "
                        f"{name}.{next(iter(parameter))}: {inner[0]!r}"
                    )
        return raw

    @model_validator(mode="after")
    def _supported_combinations(self) -> SearchConfig:
        if self.sampler == "grid":
            if ranges := [name for name, p in self.space.items() if p.choice is None and p.integers is None]:
                raise ValueError(f"sampler='grid' needs choice or integers; {ranges[0]} is a range of numbers")
        elif self.trials is None:
            raise ValueError(f"sampler={self.sampler!r} needs trials: how many?")
        objective = resolve("objective", self.objective.name)
        metrics = objective.metrics
        if self.objective.one_sided_languages and not objective.needs_benign:
            raise ValueError(
                f"objective.one_sided_languages={self.objective.one_sided_languages!r} is not read by "
                f"objective={self.objective.name!r}, which needs no benign prompts; remove it"
            )
        self._check_selection()
        if self.scheduler != "none" and len(metrics) > 1 and self.scheduler_metric is None:
            raise ValueError(
                f"scheduler={self.scheduler!r} compares trials by one number, but objective={self.objective.name!r} "
                f"has {', '.join(metrics)}; set scheduler_metric, scheduler='none', or another objective"
            )
        if self.scheduler != "none" and self.score_every is None:
            raise ValueError(
                f"scheduler={self.scheduler!r} stops trials at their scores, but score_every=None scores the last step "
                "alone; set score_every, or scheduler=none"
            )
        if self.scheduler_metric is not None and self.scheduler == "none":
            raise ValueError(f"scheduler_metric={self.scheduler_metric!r} is read by schedulers only; scheduler='none'")
        if "grace_scores" in self.model_fields_set and self.scheduler == "none":
            raise ValueError(f"grace_scores={self.grace_scores} is read by schedulers only; scheduler='none'")
        if "reduction_factor" in self.model_fields_set and self.scheduler != "asha":
            raise ValueError(
                f"reduction_factor={self.reduction_factor} is read by asha only; scheduler={self.scheduler!r}"
            )
        judge = self.scoring.judge
        engines: dict[str, Any] = {
            "engine": self.scoring.engine,
            "judge.engine": getattr(judge, "engine", None),
            "judge.translate.engine": judge.translator and judge.translator.engine,
        }
        for number, member in enumerate(getattr(judge, "judges", ())):  # of a panel
            engines[f"judge.judges.{number}.judge.engine"] = getattr(member.judge, "engine", None)
        if names := [name for name, engine in engines.items() if engine is not None and engine.replicas == "auto"]:
            raise ValueError(
                f"scoring.{names[0]}.replicas='auto' would take what the trials train on; set a number of engines"
            )
        if self.share_gpu and self.scoring.engine.replicas != 1:
            raise ValueError(
                f"share_gpu=True has one engine sleep beside training, but scoring.engine.replicas="
                f"{self.scoring.engine.replicas}; set it to 1, or share_gpu=False"
            )
        if self.share_gpu and self.concurrency > 1:
            raise ValueError(
                f"share_gpu=True has one engine sleep while a trial trains, but concurrency={self.concurrency} trials "
                "would train while it answers; set concurrency=1, or share_gpu=False"
            )
        judge = self.scoring.judge
        translated_by = judge.translator.model if judge.translator is not None else None
        if self.share_gpu and (resolve("judge", judge.name).runs == "engine" or translated_by is not None):
            raise ValueError(
                f"share_gpu=True leaves no GPU to the judge's own engine (judge={judge.name!r}, "
                f"translate.model={translated_by!r}); use another judge, or share_gpu=False"
            )
        if self.probe is not None:
            self._check_probe()
        return self

    def _check_selection(self) -> None:
        """What trials are chosen on, and what is confirmed of them."""
        if any(source.path == "sample:test" for source in self.scoring.benchmarks):
            raise ValueError(
                "scoring.benchmarks has sample:test, which is never selected on: choose trials on sample:select, and "
                "confirm them on it (confirm: {benchmarks: [{path: sample:test}]})"
            )
        seeded = {"repeats": self.repeats > 1, "confirm.seeds": bool(self.confirm.seeds)}
        for name, given in seeded.items():
            if given and "seed" in self.space:
                raise ValueError(f"{name} sets the runs' seed, which space varies; remove one of them")
        if self.keep_models is not None and self.keep_models < self.confirm.keep * self.repeats:
            raise ValueError(
                f"keep_models={self.keep_models} leaves too few models for confirm.keep={self.confirm.keep} "
                f"points of repeats={self.repeats}: {self.confirm.keep * self.repeats} or more, or lower confirm.keep"
            )

    def _check_probe(self) -> None:
        if "mlc.layer" not in self.space:
            raise ValueError("probe ranks layers, but space does not vary mlc.layer; remove one or add the other")
        layers = self.space["mlc.layer"]
        if layers.choice is None and layers.integers is None:
            raise ValueError("probe ranks listed layers: give space.mlc.layer as choice or integers")
