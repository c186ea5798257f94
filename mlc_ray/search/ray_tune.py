"""Ray Tune as a search uses it: Optuna's samplers, the schedulers, and a line on the console for every score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch

from mlc_ray.config import SearchConfig
from mlc_ray.search.objective import ANSWERED, FINISHED, HELD_BACK, STEP, VALUE
from mlc_ray.search.space import Space, distribution

TUNE_FOLDER = "tune"


def make_tuner(config: SearchConfig, space: Space, trainable: Any, folder: Path, *, resumed: bool) -> ray.tune.Tuner:
    """A tuner whose trials call `trainable` with values of the space; it keeps its state in `folder/tune`.

    A trial reports `objective.VALUE`, `HELD_BACK` and `ANSWERED` after every score. With `resumed` it is the tuner of
    an earlier process, if that got as far: trials that ended are not repeated; those that ran or failed are called
    again by the same names.
    """
    state = str(folder / TUNE_FOLDER)
    if resumed and ray.tune.Tuner.can_restore(state):
        return ray.tune.Tuner.restore(state, trainable=trainable, resume_unfinished=True, resume_errored=True)
    metric: Any = [HELD_BACK, ANSWERED] if config.objective.pareto else VALUE
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=Optuna(
                space={name: distribution(parameter) for name, parameter in space.parameters.items()},
                sampler=make_sampler(config, space),
                metric=metric,
                mode=["max", "max"] if config.objective.pareto else "max",
            ),
            scheduler=make_scheduler(config),
            num_samples=number_of_trials(config, space),
            max_concurrent_trials=config.concurrency,
        ),
        run_config=ray.tune.RunConfig(name=TUNE_FOLDER, storage_path=str(folder), verbose=0, callbacks=[TrialLines()]),
    )


class Optuna(OptunaSearch):
    """Ray's searcher, which learns of a trial that failed, was resumed, and ended well: Ray's own only warns of it."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take note of a score."""
        if trial_id not in self._completed_trials:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take note of the last score."""
        if trial_id not in self._completed_trials:
            super().on_trial_complete(trial_id, result, error)
        elif result and not error:
            metrics = self.metric if isinstance(self.metric, list) else [self.metric]
            self._ot_study.add_trial(
                optuna.trial.create_trial(
                    params=self._ot_trials[trial_id].params,
                    distributions=self._space,
                    values=[result[name] for name in metrics],
                )
            )


def make_sampler(config: SearchConfig, space: Space) -> optuna.samplers.BaseSampler:
    """Optuna's sampler, seeded. The first trials of TPE are random: as many as there are parameters, at least three."""
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=config.seed)
    if config.sampler == "grid":
        names = list(space.parameters)
        grid = space.grid()
        values = {name: list(dict.fromkeys(point[name] for point in grid)) for name in names}
        return optuna.samplers.GridSampler(values, seed=config.seed)
    return optuna.samplers.TPESampler(
        seed=config.seed, n_startup_trials=max(3, len(space.parameters)), constant_liar=config.concurrency > 1
    )


def number_of_trials(config: SearchConfig, space: Space) -> int:
    """Trials to run: those asked for, but of a grid no more than it has points."""
    if config.sampler != "grid":
        return config.trials or 1
    return min(config.trials or len(space.grid()), len(space.grid()))


def make_scheduler(config: SearchConfig) -> Any:
    """Tune's scheduler."""
    if config.scheduler == "asha":
        return ASHAScheduler(metric=VALUE, mode="max", grace_period=config.grace_scores, max_t=10_000)
    if config.scheduler == "median":
        return MedianStoppingRule(
            metric=VALUE, mode="max", time_attr="training_iteration", grace_period=config.grace_scores,
            min_samples_required=2,
        )  # fmt: skip
    return FIFOScheduler()


class TrialLines(ray.tune.Callback):
    """A line on the console for every score and every trial that ends."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print a trial's latest score."""
        if result.get(FINISHED):
            return  # it was printed when it was made
        print(
            f"trial {trial.trial_id}  {_values(trial.config)}  step {result.get(STEP, float('nan')):.0f}  "
            f"held back {100 * result[HELD_BACK]:5.1f} %  answered {100 * result[ANSWERED]:5.1f} %",
            flush=True,
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial failed."""
        print(f"trial {trial.trial_id}  {_values(trial.config)}  failed", flush=True)


def _values(values: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
