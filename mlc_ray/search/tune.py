"""Ray Tune as a search uses it: Optuna's samplers, the schedulers, and a log line for every score."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch

from mlc_ray.config import SearchConfig
from mlc_ray.search.objectives.base import BENIGN, HARMFUL, make_objective
from mlc_ray.search.space import Space, distribution, mode_of
from mlc_ray.storage import Place, local_side

TUNE_FOLDER = "tune"
STEP, FINISHED = "score_step", "finished"
"""What a trial reports beside its score: its optimizer step and, at its end, that it came there."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """A trial of an earlier process that is not to be repeated: its values, and the metrics it reported last."""

    values: Mapping[str, Any]
    metrics: Mapping[str, float]


def make_tuner(
    config: SearchConfig,
    space: Space,
    trainable: Any,
    folder: Path | Place,
    *,
    ended: Sequence[Ended] = (),
    cut_off: Sequence[Mapping[str, Any]] = (),
    callbacks: Sequence[ray.tune.Callback] = (),
) -> ray.tune.Tuner | None:
    """A tuner whose trials call `trainable` with values of the space; None where all trials have ended.

    A trial reports the objective's metrics, `HARMFUL`, `BENIGN` and `STEP` after every score. Of a search that is
    resumed, the sampler is told what `ended`, and the values of trials that were `cut_off` (or failed) are tried first.
    Tune writes its own logs to `folder/tune`, of a search at a URL to this machine; nothing is read from there, so that
    a search depends on its runs alone.
    """
    sampler = make_sampler(config, space, seen=len(ended) + len(cut_off))
    remaining = number_of_trials(config, space) - len(ended)
    if remaining <= 0:
        return None
    objective = make_objective(config.objective)
    metrics, modes = list(objective.metrics), [direction[:3] for direction in objective.directions]
    distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=storage, study_name=TUNE_FOLDER, sampler=sampler, directions=list(objective.directions)
    )
    for trial in ended:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.values), distributions=distributions, values=[trial.metrics[name] for name in metrics]
            )
        )
    next_ones = [dict(values) for values in cut_off]
    if config.sampler == "grid":  # tried in the order it is written
        known = [*(dict(trial.values) for trial in ended), *next_ones]
        next_ones += [point for point in space.grid() if point not in known]
    for values in next_ones[:remaining]:
        study.enqueue_trial(values)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer one prints a box whatever `verbose` says
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=OptunaSearch(
                space=distributions,
                sampler=sampler,
                storage=storage,
                study_name=TUNE_FOLDER,
                metric=metrics if len(metrics) > 1 else metrics[0],
                mode=modes if len(metrics) > 1 else modes[0],
            ),
            scheduler=make_scheduler(config),
            num_samples=remaining,
            max_concurrent_trials=config.concurrency,
        ),
        run_config=ray.tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(local_side(Place(folder))),
            verbose=0,
            callbacks=[TrialLines(), *callbacks],
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


def number_of_trials(config: SearchConfig, space: Space) -> int:
    """Trials to run: those asked for, but of a grid no more than it has points."""
    if config.sampler != "grid":
        return config.trials or 1
    points = len(space.grid())
    return min(config.trials or points, points)


def make_scheduler(config: SearchConfig) -> Any:
    """Tune's scheduler, which compares trials by `scheduler_metric`, or else by the objective's first metric."""
    objective = make_objective(config.objective)
    compared: dict[str, Any] = {"metric": objective.metrics[0], "mode": objective.directions[0][:3]}
    if config.scheduler_metric is not None:
        compared = {"metric": config.scheduler_metric, "mode": mode_of(config.scheduler_metric)}
    if config.scheduler == "asha":
        return ASHAScheduler(**compared, grace_period=config.grace_scores, max_t=10_000)
    if config.scheduler == "median":
        return MedianStoppingRule(
            **compared, time_attr="training_iteration", grace_period=config.grace_scores, min_samples_required=2
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]


class TrialLines(ray.tune.Callback):
    """A log line for every score and every trial that fails."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log a trial's latest score."""
        if result.get(FINISHED):
            return  # it was logged when it was made
        logger.info(
            "trial %s  %s  step %.0f  harmful refused %5.1f %%  benign complied %5.1f %%",
            trial.trial_id, _values(trial.config), result.get(STEP, math.nan),
            100 * result[HARMFUL], 100 * result[BENIGN],
        )  # fmt: skip

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log that a trial failed."""
        logger.warning("trial %s  %s  failed", trial.trial_id, _values(trial.config))


def _values(values: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
