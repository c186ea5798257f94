"""The search space: from the YAML of a search to distributions, and from a trial's values to the config of a run.

Every corner is validated by the same schema as a run, before anything starts: a search must not find out in its
fortieth trial that a value is invalid.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import optuna

from mlc_ray._registry import ComponentKind, resolve
from mlc_ray.config import (
    ConfigError,
    ParameterSection,
    SearchConfig,
    SourceSection,
    TrainConfig,
    apply_override,
    parse_config,
    read_config_file,
)
from mlc_ray.config.component import ComponentSettings
from mlc_ray.data.bundles import KINDS
from mlc_ray.data.sources import pinned
from mlc_ray.data.store import TokenArtifact
from mlc_ray.runs import training_name
from mlc_ray.score.plan import commits_of, judge_at_commits
from mlc_ray.storage import Commits, absolute_if_here, pinned_model

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study it creates

_HIGHER_IS_BETTER = {
    "loss/total": False,
    "loss/alignment": False,
    "loss/sft": False,
    "reward/margin": True,
    "reward/accuracy": True,
    "log_prob/chosen": True,
    "log_prob/chosen_change": True,
    "mlc/leading_share": True,
}
"""What `train.validation` measures beside `loss/NAME` of each term, of which lower is better."""

_OWN = {"name", "output_dir"}
_OWN_SECTIONS = {"logging", "checkpoint.keep", "checkpoint.keep_every", "cluster"}
# Engines, baseline and adapters' base are made once, of one model.
_SHARED = {"model.path", "model.trust_remote_code"}
_DRAWS = 100
_MOST_POINTS = 10_000


@dataclass(frozen=True)
class Space:
    """The runs of a search: `base` is the raw config they share, `parameters` what varies, by dotted name."""

    base: Mapping[str, Any]
    parameters: Mapping[str, ParameterSection]

    def run(self, values: Mapping[str, Any], **own: Any) -> TrainConfig:
        """The config of the run with `values`, and top-level fields `own` (name, output_dir).

        Raises:
            ConfigError: The config is invalid; the message names the values as well as the fault.
        """
        raw: dict[str, Any] = copy.deepcopy(dict(self.base))
        for name, value in values.items():
            apply_override(raw, f"{name}={json.dumps(value)}")
        try:
            return parse_config(TrainConfig, {**raw, **own})
        except ConfigError as error:
            raise ConfigError(f"with {dict(values)!r}: {error}" if values else str(error)) from None

    def corners(self) -> Iterable[dict[str, Any]]:
        """Every choice, both ends of every range and a number between, one parameter at a time, others at the first.

        The number between is not a whole one, so that a range of numbers over a field that takes only whole numbers is
        refused.
        """
        first = {name: _ends(parameter)[0] for name, parameter in self.parameters.items()}
        yield first
        for name, parameter in self.parameters.items():
            for value in _ends(parameter)[1:]:
                yield {**first, name: value}

    def heaviest(self, weight: Callable[[TrainConfig], float]) -> TrainConfig:
        """The run that weighs most, of all values that corners have.

        Each parameter takes what weighs most beside the values of the others, twice over: one may count only beside
        what another takes later. A combination that no run takes is passed over.
        """
        values = {name: _ends(parameter)[0] for name, parameter in self.parameters.items()}
        found = self.run(values, name="corner")
        most = weight(found)
        for name, value in 2 * [(name, value) for name, each in self.parameters.items() for value in _ends(each)]:
            if values[name] == value:
                continue
            with contextlib.suppress(ConfigError):
                run = self.run({**values, name: value}, name="corner")
                if (tried := weight(run)) > most:
                    values, found, most = {**values, name: value}, run, tried
        return found

    def values_in(self, run: TrainConfig) -> dict[str, Any]:
        """What a run of the space has for each parameter."""
        found: dict[str, Any] = {}
        dumped = run.model_dump(mode="json")
        for name in self.parameters:
            value: Any = dumped
            for part in name.split("."):
                value = value[part]
            found[name] = value
        return found

    @property
    def points(self) -> int | None:
        """The number of points; None where a parameter is a range of numbers."""
        if any(each.choice is None and each.integers is None for each in self.parameters.values()):
            return None
        return math.prod(len(values_of(each)) for each in self.parameters.values())

    def grid(self) -> list[dict[str, Any]]:
        """All combinations of choices and whole numbers, in the order they are written."""
        names = list(self.parameters)
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*map(values_of, self.parameters.values()))
        ]


def make_space(config: SearchConfig) -> Space:
    """The space of a search, every corner of it valid as a run.

    Raises:
        ConfigError: A field does not exist or is decided by the search itself, or a run refuses a value.
    """
    for name in config.space:
        if name in _OWN or any(name == own or name.startswith(f"{own}.") for own in _OWN_SECTIONS):
            raise ConfigError(f"space.{name}: the search decides {name} itself; it cannot vary")
        if name.partition(".")[0] == "chat":
            raise ConfigError(
                f"space.{name}: all trials are scored on the same prompts, and train on them; give chat in the file of "
                "the runs, or by set"
            )
        if name in _SHARED:
            raise ConfigError(f"space.{name}: all trials share one model; search {name} in separate searches")
    raw = read_config_file(config.train, TrainConfig)
    for override in config.set:
        if (field := override.partition("=")[0].strip()) in config.space:
            raise ConfigError(f"set {override!r} has no effect: space varies {field}; remove one of them")
        if field in _OWN:
            raise ConfigError(f"set {override!r} has no effect: give {field} at the top of the search's own file")
        apply_override(raw, override)
    _make_absolute(raw)
    _check_fields_of_components(config, raw)
    space = Space(raw, {name: _absolute(name, parameter) for name, parameter in config.space.items()})
    _check_base(config, space)
    if config.sampler == "grid" and (points := space.points or 0) > _MOST_POINTS:
        raise ConfigError(
            f"sampler='grid' has {points:,} points here, more than {_MOST_POINTS:,}: list fewer values, or draw some "
            "with sampler=random or tpe, and trials"
        )
    if config.scheduler_metric is not None:
        _check_comparable(config.scheduler_metric, config.space)
    for values in tried(config, space):
        run = space.run(values, name="corner")
        if config.scheduler_metric is not None:
            _check_scheduler_metric(config.scheduler_metric, run, config.score_every)
    _check_number(config, space)
    return space


def _check_number(config: SearchConfig, space: Space) -> None:
    """Refuse more trials than there are points, and enqueued points that are not in the space."""
    points = space.points
    if config.sampler != "grid" and points is not None and config.trials is not None and config.trials > points:
        raise ConfigError(
            f"trials={config.trials}, but space has {points} points and none is tried twice: ask for {points} or "
            "fewer, or for repeats of each (repeats: 3)"
        )
    for index, point in enumerate(config.enqueue):
        if point.keys() != config.space.keys():
            raise ConfigError(f"enqueue.{index}={point!r} must give a value for each of {', '.join(config.space)}")
        for name, value in point.items():
            if not _holds(config.space[name], value):
                raise ConfigError(f"enqueue.{index}: {name}={value!r} is not in space.{name}")
        if point in config.enqueue[:index]:
            raise ConfigError(f"enqueue.{index}={point!r} is given twice; for several seeds set repeats")


def _holds(parameter: ParameterSection, value: Any) -> bool:
    """Whether a parameter can have a value: of a choice one that is written alike, 1 not being True or 1.0."""
    if parameter.choice is not None:
        return any(type(each) is type(value) and each == value for each in parameter.choice)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if parameter.integers is not None:
        return isinstance(value, int) and parameter.integers[0] <= value <= parameter.integers[1]
    low, high = parameter.uniform or parameter.loguniform or (0.0, 0.0)
    return low <= value <= high


def _check_scheduler_metric(metric: str, run: TrainConfig, every: int | None) -> None:
    """Refuse to compare trials by a number that a run does not measure, or not at every score, each `every` steps."""
    held_out = run.data.validation
    if held_out is None:
        raise ConfigError(f"scheduler_metric={metric!r} is measured on data.validation, which the runs do not have")
    if every is not None and every % held_out.every:
        raise ConfigError(
            f"scheduler_metric={metric!r} is compared at scores, every score_every={every} steps, but "
            f"measured every data.validation.every={held_out.every}: let the second divide the first"
        )
    names = [*_HIGHER_IS_BETTER, *(f"loss/{name}" for name in run.active_terms)]
    if not run.objective.sft_weight:
        names.remove("loss/sft")
    if "mlc" not in run.active_terms or run.mlc.name != "mlc":  # of the terms in its place, none has singular values
        names.remove("mlc/leading_share")
    if not _has_rewards(run):
        names = [name for name in names if not name.startswith("reward/")]
    if training_name(metric) not in names:
        raise ConfigError(
            f"scheduler_metric={metric!r}: runs with objective.loss={run.objective.loss!r} measure validation/NAME, "
            f"and validation/KIND/NAME, for each NAME of {', '.join(names)}"
        )


def _check_comparable(metric: str, fields: Iterable[str]) -> None:
    """Refuse to compare trials by a number that means another thing in each of them.

    Raises:
        ConfigError: One of the fields that vary is part of its definition.
    """
    name = training_name(metric)
    for field in fields:
        section, last = field.partition(".")[0], field.rpartition(".")[2]
        if field == "mlc.every" or (section in ("mlc", "terms") and last in ("start", "ramp")):
            defines = False  # held-out bundles are measured with all terms at their whole weights
        elif name == "loss/total":
            defines = section in ("objective", "terms", "mlc", "openings") or field == "train.group_bundles"
        elif name in ("loss/alignment", "reward/margin"):
            defines = section == "objective" and last != "sft_weight"
        elif name in ("loss/sft", "reward/accuracy"):
            defines = field in ("objective.loss", "objective.answers")
        elif name == "mlc/leading_share":
            tap = ("mlc.layer", "mlc.extractor_dim", "mlc.name", "mlc.centring")
            defines = field in (*tap, "train.group_bundles")
        elif name.startswith("loss/"):
            own = section == "mlc" or field.startswith(f"terms.{name.removeprefix('loss/')}.")
            defines = (own and last != "weight") or field == "train.group_bundles" or section == "openings"
        else:
            defines = False
        if defines:
            raise ConfigError(
                f"scheduler_metric={metric!r} cannot compare trials that differ in {field}, which is part of what it "
                "measures; use validation/log_prob/chosen_change, or the objective"
            )


def check_held_out(metric: str, held_out: TokenArtifact) -> None:
    """Refuse to compare trials by what none of the held-out bundles has.

    Raises:
        ConfigError: None is of its kind or, for a term, has two languages.
    """
    kind = metric.split("/")[1]
    own = held_out.kinds == KINDS.index(kind) if kind in KINDS else np.ones(len(held_out), dtype=bool)
    if not own.any():
        kinds = ", ".join(sorted(held_out.counts.kinds))
        raise ConfigError(f"scheduler_metric={metric!r}: data.validation has no {kind} bundles, only {kinds}")
    name = training_name(metric)
    of_a_term = name == "mlc/leading_share" or (name.startswith("loss/") and name not in _HIGHER_IS_BETTER)
    if of_a_term and not (held_out.counted(lambda lengths: lengths.languages)[own] >= 2).any():
        raise ConfigError(f"scheduler_metric={metric!r}: no such bundle of data.validation has two languages")


def _has_rewards(run: TrainConfig) -> bool:
    """Whether the alignment loss gives rewards: only calling it tells, since it may be from outside."""
    import torch

    from mlc_ray.losses.objective import Objective
    from mlc_ray.types import AnswerRows, ResponseLogProbs

    zero, answer = torch.zeros(1), ResponseLogProbs(torch.full((1,), -1.0), torch.ones(1, dtype=torch.long))
    states = torch.zeros(2, 1, 1)
    said = Objective(run).total_loss(
        weight=torch.ones(1),
        chosen=answer,
        rejected=answer,
        reference_chosen=zero,
        reference_rejected=zero,
        rows=AnswerRows(*torch.zeros(4, 1, dtype=torch.long)),
        pooled=states,
        reference_pooled=states,
        factors={},  # no terms, which may need more than this
    )
    return "reward/margin" in said.metrics


def mode_of(metric: str) -> Literal["min", "max"]:
    """Whether the lower or the higher number of `data.validation` is the better; of a term's loss, the lower."""
    return "max" if _HIGHER_IS_BETTER.get(training_name(metric)) else "min"


def _check_fields_of_components(config: SearchConfig, raw: Mapping[str, Any]) -> None:
    """Where a component varies (`objective.loss`), what is set or varied beside it must be a field of each choice.

    Every combination of a search is a run. A field that only some of the losses have is refused rather than dropped
    from the trials of the others, which would then be compared under a setting that they never read.
    """
    for name, parameter in config.space.items():
        section, _, by = name.rpartition(".")
        if (kind := _component_kind(section, by)) is None:
            continue
        beside = {field: f"train={config.train!r} with set gives" for field in _mapping_at(raw, section) if field != by}
        for other in config.space:
            if other != name and other.startswith(f"{section}."):
                beside[other.removeprefix(f"{section}.")] = "space varies"
        for choice in values_of(parameter):
            fields = sorted(resolve(kind, str(choice)).Settings.model_fields)
            for field, where in beside.items():
                if field not in fields:
                    keep = [
                        str(c) for c in values_of(parameter) if field in resolve(kind, str(c)).Settings.model_fields
                    ]
                    raise ConfigError(
                        f"{name}={choice!r} has no field {field}, but {where} {section}.{field} for every trial "
                        f"({choice} has {', '.join(f for f in fields if f != by)}); take {section}.{field} out "
                        f"(set: [{section}={{}}] drops what the file says of {section}), or search {name} among "
                        f"those that have it ({', '.join(keep)})"
                    )


def _component_kind(section: str, field: str) -> ComponentKind | None:
    """The kind of component that `section.field` of a run names, if it names one: loss of `objective.loss`."""
    top, _, key = section.partition(".")
    info = TrainConfig.model_fields.get(top)
    for mark in info.metadata if info is not None else ():
        if isinstance(mark, ComponentSettings) and mark.by == field and mark.by_key == bool(key):
            return mark.kind
    return None


def _mapping_at(raw: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    node: Any = raw
    for key in section.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else {}


def _check_base(config: SearchConfig, space: Space) -> None:
    """Blame the file of the runs or `set`, not the values of a trial, where no value could fix it."""
    try:
        space.run(next(iter(space.corners())), name="corner")
    except ConfigError:
        try:
            space.run({}, name="corner")
        except ConfigError as error:
            raise ConfigError(f"train={config.train!r} with set={config.set!r}: {error}") from None


def tried(config: SearchConfig, space: Space) -> list[dict[str, Any]]:
    """The points whose runs are validated before the search: all corners, and all points of a grid, or some that a
    sampler could draw. Values can be valid each and not together."""
    corners = list(space.corners())
    if config.sampler == "grid":
        return [*corners, *space.grid()]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
    distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
    return [*corners, *(study.ask(distributions).params for _ in range(_DRAWS))]


def distribution(parameter: ParameterSection) -> optuna.distributions.BaseDistribution:
    """The same range for Optuna."""
    if parameter.choice is not None:
        return optuna.distributions.CategoricalDistribution(parameter.choice)
    if parameter.integers is not None:
        return optuna.distributions.IntDistribution(*parameter.integers)
    if parameter.uniform is not None:
        return optuna.distributions.FloatDistribution(*parameter.uniform)
    low, high = parameter.loguniform or (1.0, 1.0)  # `ParameterSection` has exactly one of the four
    return optuna.distributions.FloatDistribution(low, high, log=True)


def _make_absolute(raw: dict[str, Any]) -> None:
    """Local paths of the model and of data become absolute, in place: trials run in folders of their own."""
    for place in (raw.get("model"), *_sources(raw)):
        if isinstance(place, dict) and isinstance(place.get("path"), str):
            place["path"] = absolute_if_here(place["path"])


def with_commits(config: SearchConfig, space: Space) -> tuple[SearchConfig, Space, Commits]:
    """A search that names the commits of its models and data sets of the hub, and what each name given stands for.

    So all its trials read the same, and so do those of the search when it is resumed.

    Raises:
        HubError: The hub cannot say which, of the model, a judge or a translator.
        BundleFileError: The same of a data set.
    """
    base = copy.deepcopy(dict(space.base))
    given = base["model"]["path"]
    base["model"]["path"] = pinned_model(given)
    judge = judge_at_commits(config.scoring.judge)
    models = {given: base["model"]["path"], **commits_of(config.scoring.judge, judge)}
    data_sets: dict[str, str] = {}

    def at_commits(sources: Sequence[SourceSection]) -> list[SourceSection]:
        found = pinned(sources)
        data_sets.update({one.path: other.path for one, other in zip(sources, found, strict=True)})
        return found

    for place in _sources(base):
        (source,) = at_commits([SourceSection.model_validate(place)])
        place["path"] = source.path
    scoring, confirm = config.scoring, config.confirm
    scoring = scoring.model_copy(update={"benchmarks": at_commits(scoring.benchmarks), "judge": judge})
    if confirm.benchmarks is not None:
        confirm = confirm.model_copy(update={"benchmarks": at_commits(confirm.benchmarks)})
    config = config.model_copy(update={"scoring": scoring, "confirm": confirm})
    return config, replace(space, base=base), {"model": _changed(models), "data set": _changed(data_sets)}


def _changed(commits: Mapping[str, str]) -> dict[str, str]:
    return {name: at for name, at in commits.items() if name != at}


def _sources(raw: Mapping[str, Any]) -> list[Any]:
    """The sources of a raw config, of training and held out."""
    train, held_out = _mapping_at(raw, "data").get("train"), _mapping_at(raw, "data.validation").get("sources")
    return [place for listed in (train, held_out) if isinstance(listed, list) for place in listed]


def _absolute(name: str, parameter: ParameterSection) -> ParameterSection:
    """The same for a path that varies."""
    if not name.endswith(".path") or parameter.choice is None:
        return parameter
    return ParameterSection(choice=[absolute_if_here(str(value)) for value in parameter.choice])


def _ends(parameter: ParameterSection) -> list[Any]:
    if parameter.choice is not None:
        return list(parameter.choice)
    if parameter.integers is not None:
        return list(parameter.integers)
    low, high = parameter.uniform or parameter.loguniform or (0.0, 0.0)
    return [low, high, low + (high - low) / math.pi]


def values_of(parameter: ParameterSection) -> list[Any]:
    """Every value of a choice or of whole numbers, in order.

    Raises:
        ValueError: It is a range of numbers.
    """
    if parameter.choice is not None:
        return list(parameter.choice)
    if parameter.integers is None:
        raise ValueError("a range of numbers has no list of values")
    low, high = parameter.integers
    return list(range(low, high + 1))
