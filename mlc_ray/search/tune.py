"""Ray Tune as a search uses it: which point each trial gets, what Optuna is told of it, and when to stop."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import Searcher

from mlc_ray.config import SearchConfig, TrainConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import DIVERGED_FILE, TRIALS_FOLDER
from mlc_ray.search.objectives.base import Objective, make_objective
from mlc_ray.search.space import Space, distribution, mode_of, values_of
from mlc_ray.storage import Place, fingerprint, local_side

TUNE_FOLDER = "tune"
STEP, FINISHED = "score_step", "finished"
"""What a trial reports beside its score: its optimizer step and, at its end, that it came there."""
VALUES, FOLDER = "values", "folder"
"""What a trial is given: its values, and the name of its run folder, which no other trial gets."""
LAYER = "mlc.layer"
"""The field of a run that a probe ranks the values of."""
SEED = "seed"
"""The field of a run that `repeats` and `confirm.seeds` set."""

logger = logging.getLogger(__name__)

State = Literal["finished", "stopped", "diverged", "without value"]


@dataclass(frozen=True)
class Ended:
    """A trial that is not to be repeated: its values, the objective's numbers at its last score, and that score's step.

    `numbers` and `step` mean nothing of one that diverged, or whose last score has too few verdicts to have a value.
    """

    values: Mapping[str, Any]
    state: State
    numbers: tuple[float, ...] = ()
    step: int = 0


@dataclass(frozen=True)
class CutOff:
    """A trial that an earlier process began and did not end: its values, and the name of its run folder."""

    values: Mapping[str, Any]
    folder: str


class Points(Searcher):
    """Gives each trial its values and its folder, and tells Optuna what became of it.

    First come the trials that were cut off; then the repeats that points lack; then, point by point, those that are
    enqueued, those of a grid, or what the sampler draws. Where `layers` are given in an order, a grid follows it, and a
    sampler first draws a point of each layer. No point is tried twice, beyond its repeats. Optuna's study is in memory
    alone, and made anew from the trials' own files by every process (`ended`).

    A stopped trial is told as pruned at its last score, which TPE ranks behind those that finished; one that diverged
    as worth what a model is that says nothing; one that failed otherwise is not told.
    """

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        folder: Place,
        *,
        languages: Sequence[str],
        ended: Sequence[Ended] = (),
        cut_off: Sequence[CutOff] = (),
        layers: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        self._config, self._space, self._trials = config, space, folder / TRIALS_FOLDER
        self._distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
        self._objective = make_objective(config.objective)
        self._worst = self._objective.worst(languages)
        self._study = optuna.create_study(
            sampler=make_sampler(config, space, seen=len(ended) + len(cut_off)),
            directions=list(self._objective.directions),
        )
        self._generator = np.random.default_rng([config.seed, len(ended)])
        self._cut_off = list(cut_off)
        self._layers = list(layers)
        self._first = first_points(config, space, self._layers)
        self._begun: dict[str, tuple[dict[str, Any], set[int]]] = {}  # of each point the seeds that were begun
        self._running: dict[str, tuple[optuna.trial.Trial, str]] = {}
        self._seeds = seeds_of(config, space)
        for each in ended:
            self._note(each.values)
            self._study.add_trial(self._recorded(each))
        for waiting in cut_off:
            self._note(waiting.values)

    def suggest(self, trial_id: str) -> Any:
        """Values and folder of the next trial; `Searcher.FINISHED` where all have begun."""
        if self._cut_off:
            waiting = self._cut_off.pop(0)
            trial, values, folder = self._asked(self._point(waiting.values)), dict(waiting.values), waiting.folder
        elif (lacking := self._lacking()) is not None:
            point, seed = lacking
            trial, values, folder = self._asked(point), self._seeded(point, seed), self._free(trial_id)
        elif len(self._begun) < number_of_points(self._config, self._space):
            trial = self._next()
            values, folder = self._seeded(trial.params, self._seeds[0]), self._free(trial_id)
        else:
            return Searcher.FINISHED
        self._note(values)
        self._running[trial_id] = (trial, folder)
        return {VALUES: values, FOLDER: folder}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a trial counts by what it is worth at its end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Called by Tune once for every trial, with what it reported last."""
        trial, folder = self._running.pop(trial_id)
        if error and (self._trials / folder / DIVERGED_FILE).is_file():
            self._study.tell(trial, self._worst)
        elif error or result is None or any(name not in result for name in self._objective.metrics):
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif result.get(FINISHED) or len(self._objective.metrics) > 1:  # Optuna prunes with one objective only
            self._study.tell(trial, [result[name] for name in self._objective.metrics])
        else:
            trial.report(result[self._objective.metrics[0]], int(result[STEP]))
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file; nothing is read from it."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Never called: a search is resumed from its trials' own files."""
        raise NotImplementedError("a search is resumed from its trials' own files")

    def _recorded(self, ended: Ended) -> optuna.trial.FrozenTrial:
        params = self._point(ended.values)
        shared: dict[str, Any] = {"params": params, "distributions": self._distributions}
        if ended.state == "stopped" and len(ended.numbers) == 1:
            return optuna.trial.create_trial(
                state=optuna.trial.TrialState.PRUNED, intermediate_values={ended.step: ended.numbers[0]}, **shared
            )
        if ended.state == "without value":
            return optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, **shared)
        numbers = self._worst if ended.state == "diverged" else ended.numbers
        return optuna.trial.create_trial(values=list(numbers), **shared)

    def _point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in self._space.parameters}

    def _note(self, values: Mapping[str, Any]) -> None:
        point = self._point(values)
        _, seeds = self._begun.setdefault(fingerprint(point), (point, set()))
        seeds.add(values.get(SEED, self._seeds[0]))

    def _lacking(self) -> tuple[dict[str, Any], int] | None:
        """A point that was begun, and a seed that it lacks."""
        if len(self._seeds) == 1:
            return None
        return next(((p, seed) for p, begun in self._begun.values() for seed in self._seeds if seed not in begun), None)

    def _seeded(self, point: Mapping[str, Any], seed: int) -> dict[str, Any]:
        return dict(point) if len(self._seeds) == 1 else {**point, SEED: seed}

    def _free(self, name: str) -> str:
        """A folder name that no trial has."""
        return name if not (self._trials / name).exists() else self._free(f"{name}x")

    def _asked(self, point: Mapping[str, Any]) -> optuna.trial.Trial:
        self._study.enqueue_trial(dict(point))
        return self._study.ask(self._distributions)

    def _next(self) -> optuna.trial.Trial:
        """A point that was not begun, as a trial of the study."""
        for point in self._first:
            if fingerprint(point) not in self._begun:
                return self._asked(point)
        tried = {fingerprint(point[LAYER]) for point, _ in self._begun.values()} if self._layers else set()
        for layer in self._layers:
            if fingerprint(layer) not in tried:
                return self._asked({LAYER: layer})  # the sampler draws the rest
        for _ in range(_DRAWS):
            trial = self._study.ask(self._distributions)
            if fingerprint(trial.params) not in self._begun:
                return trial
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        while True:  # there is one: `number_of_points` is at most as many as the space has
            point = {name: _any(self._generator, values_of(each)) for name, each in self._space.parameters.items()}
            if fingerprint(point) not in self._begun:
                return self._asked(point)


def _any(generator: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(generator.integers(len(values)))]


_DRAWS = 20  # of a sampler that comes back to points that were tried, before one of the others is drawn by chance


def first_points(config: SearchConfig, space: Space, layers: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The points that are tried in a fixed order: those enqueued, then a grid's as it is written, or by `layers`."""
    grid = space.grid() if config.sampler == "grid" else []
    if layers:
        place = {fingerprint(layer): index for index, layer in enumerate(layers)}
        grid.sort(key=lambda point: place[fingerprint(point[LAYER])])
    return [{name: point[name] for name in space.parameters} for point in (*config.enqueue, *grid)]


def seeds_of(config: SearchConfig, space: Space) -> list[int]:
    """The seeds that every point is trained with."""
    first = int(space.base.get(SEED, TrainConfig.model_fields[SEED].default))
    return list(range(first, first + config.repeats))


def make_tuner(
    config: SearchConfig,
    trainable: Any,
    folder: Path | Place,
    points: Points,
    *,
    remaining: int,
    callbacks: Sequence[ray.tune.Callback] = (),
    stop: ray.tune.Stopper | None = None,
) -> ray.tune.Tuner:
    """A tuner of `remaining` trials that call `trainable` with what `points` gives them.

    A trial reports the objective's metrics and `STEP` after every score. Tune writes its own logs to `folder/tune`, of
    a search at a URL to this machine; nothing is read from there, so that a search depends on its runs alone.
    """
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer one prints a box whatever `verbose` says
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=points,
            scheduler=make_scheduler(config),
            num_samples=remaining,
            max_concurrent_trials=config.concurrency,
        ),
        run_config=ray.tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(local_side(Place(folder))),
            verbose=0,
            callbacks=list(callbacks),
            stop=stop,
        ),
    )


def make_sampler(config: SearchConfig, space: Space, *, seen: int = 0) -> optuna.samplers.BaseSampler:
    """Optuna's sampler, seeded. The first trials of TPE are random: as many as there are parameters, at least three.

    `seen` is the number of trials that an earlier process began: a sampler that starts over must not draw them again.
    A grid needs none, its points being queued.
    """
    seed = config.seed + seen
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=max(3, len(space.parameters)), constant_liar=config.concurrency > 1
        )
    return optuna.samplers.RandomSampler(seed=seed)


def number_of_points(config: SearchConfig, space: Space) -> int:
    """Points to try: those asked for, but no more than the space has; of a grid by default all."""
    asked = config.trials if config.trials is not None else space.points
    return min(each for each in (asked, space.points) if each is not None)


def make_scheduler(config: SearchConfig) -> Any:
    """Tune's scheduler, which compares trials by `scheduler_metric`, or else by the objective's first metric."""
    objective: Objective = make_objective(config.objective)
    compared: dict[str, Any] = {"metric": objective.metrics[0], "mode": objective.directions[0][:3]}
    if config.scheduler_metric is not None:
        compared = {"metric": config.scheduler_metric, "mode": mode_of(config.scheduler_metric)}
    if config.scheduler == "asha":
        return ASHAScheduler(
            **compared,
            grace_period=config.grace_scores,
            reduction_factor=config.reduction_factor,
            max_t=_NEVER,
        )
    if config.scheduler == "median":
        return MedianStoppingRule(
            **compared, time_attr="training_iteration", grace_period=config.grace_scores, min_samples_required=2
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]


_NEVER = 10_000  # scores, more than any run has: a trial that ASHA ends there would have no model


class EndEarly(ray.tune.Stopper):
    """Ends all trials, and says why in `reason`: after `max_hours`, or where a `fault` is set that none survives."""

    def __init__(self, max_hours: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.fault: MlcRayError | None = None
        self.hours = math.inf if max_hours is None else max_hours
        self._now = now
        self._deadline = now() + 3600 * self.hours

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tune's question of one trial: none ends alone."""
        return False

    @property
    def seconds_left(self) -> float:
        """Until `max_hours` are over; infinite without."""
        return self._deadline - self._now()

    @property
    def reason(self) -> str:
        """Why they end; empty while they may go on."""
        if self.fault is not None:
            return str(self.fault)
        return f"max_hours={self.hours:g} are over" if self.seconds_left <= 0 else ""

    def stop_all(self) -> bool:
        """Tune's question of all trials, after every event."""
        return bool(self.reason)
