"""A trial: a run of `mlc-ray train`, whose weights engines that stay warm score every few steps and at the end."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray.tune

from mlc_ray.config import ScoreConfig, SearchConfig, parse_config
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import (
    BASELINE_FOLDER,
    CONFIG_FILE,
    FAILED_FILE,
    FINISHED_FILE,
    MODEL_FOLDER,
    SCORES_FILE,
    SCORES_FOLDER,
    TRAIN_FOLDER,
    TRIALS_FOLDER,
    VALUES_FILE,
    read_metrics,
    training_languages,
    weights_folders,
)
from mlc_ray.score.prompts import Prompts
from mlc_ray.score.request import Request
from mlc_ray.score.results import load_records, load_scores
from mlc_ray.score.run import TooManyUnparsedError, check_unparsed
from mlc_ray.score.scorer import WarmScorer, write_warm_score
from mlc_ray.search.objectives.base import TrialScore, make_objective
from mlc_ray.search.results import Trial, ending
from mlc_ray.search.space import Space
from mlc_ray.search.tune import FINISHED, FOLDER, STEP, VALUES
from mlc_ray.stats.rates import Judged
from mlc_ray.storage import Place, fingerprint_model

logger = logging.getLogger(__name__)


class SearchError(MlcRayError):
    """A search cannot start or go on; the message quotes the folder or the setting, and names the fix."""


_LOOK_SECONDS = 1.0  # between looks for a new score, which takes seconds at least
_STEP_FOLDER, _STEP_NAME = "step-{:06d}", re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Shared:
    """What every trial is given. Sent to the processes of trials and, within `ScoreWeights`, to training workers.

    `model` is the folder or hub name of the weights that training starts from, `prompts` the fingerprint of what trials
    are asked, `lora` whether they train adapters.
    """

    config: SearchConfig
    space: Space
    folder: Place
    scorer: WarmScorer
    prompts: str
    model: str
    lora: bool

    def trial_folder(self, name: str) -> Place:
        """The run folder of a trial."""
        return self.folder / TRIALS_FOLDER / name

    def drop_optimizer_states(self) -> None:
        """Remove checkpoints and published weights of trials that ended, unless checkpoints are to be kept.

        Those that failed can be gone on with.
        """
        config: SearchConfig = self.config
        for folder in filter(has_ended, trial_folders(self.folder)):
            gone = weights_folders(folder) if config.keep_checkpoints else [folder / TRAIN_FOLDER]
            for each in gone:
                with suppress(FileNotFoundError):  # another trial may do the same just now
                    each.remove()

    def baseline(self) -> TrialScore:
        """The score of the model before training: made once for a search, read from its folder when that is resumed."""
        folder = self.folder / BASELINE_FOLDER
        self.score(folder, model=self.model, weights=None if self.lora else self.model)
        return self.score_in(folder)

    def weights(self, run_folder: Place, weights: Place, step: int) -> Place:
        """Score published weights of a run; returns the score's folder, `run_folder/scores/step-...`."""
        folder = run_folder / SCORES_FOLDER / _STEP_FOLDER.format(step)
        self.score(folder, model=str(weights), weights=str(weights / ("adapter" if self.lora else "model")))
        return folder

    def score_in(self, *folders: Place) -> TrialScore:
        """What a score folder is worth, or several of models that differ in their seed.

        Raises:
            TooManyUnparsedError: Too few responses got a verdict.
        """
        score = make_objective(self.config.objective).score(*map(self.records_in, folders))
        return replace(score, faults=sum(load_scores(folder).faults for folder in folders))

    def records_in(self, folder: Place) -> list[Judged]:
        """The verdicts of a score folder.

        Raises:
            TooManyUnparsedError: Too few responses got one.
        """
        result = load_scores(folder)
        check_unparsed(result, self.config.scoring.max_unparsed)
        return load_records(result)

    def metrics_in(self, folder: Place) -> dict[str, float]:
        """The numbers of a trial's score folder that Tune is told; raises as `score_in`, and

        Raises:
            SearchError: the run did not measure the scheduler's metric at that step.
        """
        score = self.score_in(folder)
        return {
            **dict(zip(make_objective(self.config.objective).metrics, score.values, strict=True)),
            STEP: float(step_of(folder)),
            **self._compared(folder),
        }

    def _compared(self, folder: Place) -> dict[str, float]:
        """What the scheduler compares beside the objective, as the run logged it at the step of a score folder."""
        config: SearchConfig = self.config
        name = config.scheduler_metric
        if name is None:
            return {}
        step, run = step_of(folder), folder.parent.parent
        row = next((row for row in read_metrics(run) if row["step"] == step), {})
        if name not in row:
            there = ", ".join(key for key in row if key.startswith("validation/")) or "nothing"
            raise SearchError(
                f"scheduler_metric={name!r} was not measured at step {step} of trial {run.name}; "
                f"measured were {there}: name one of these as scheduler_metric in a new search"
            )
        return {name: math.nan if row[name] is None else row[name]}

    def score(self, folder: Place, *, model: str, weights: str | None, prompts: Prompts | None = None) -> None:
        """Score weights, or where trials train adapters one of those (None: no adapter), unless the folder has it.

        A score on whose prompts or responses engines failed is made again; answers that are there of the same weights
        stay.

        Args:
            folder: The score's folder.
            model: What the score is said to be of, and where the languages of its training are recorded.
            weights: What the engines serve.
            prompts: Others than every trial is asked: those that confirm.
        """
        if (folder / SCORES_FILE).is_file() and not load_scores(folder).faults:
            return
        resolved = self.model if weights is None else weights
        scoring = self.config.scoring
        own: dict[str, Any] = {"name": folder.name, "output_dir": str(folder.parent), "model": model}
        confirm = self.config.confirm
        if prompts is not None and confirm.benchmarks is not None:
            own["benchmarks"] = [each.model_dump(mode="json", exclude_unset=True) for each in confirm.benchmarks]
            own["limit"] = confirm.limit
        request = Request(
            config=parse_config(ScoreConfig, {**scoring.model_dump(mode="json", exclude_unset=True), **own}),
            resolved=resolved,
            fingerprint=fingerprint_model(resolved),
            prompts=self.prompts if prompts is None else prompts.fingerprint,
            seen_languages=training_languages(model),
        )
        table = None if prompts is None else prompts.table
        scored = self.scorer.score(weights, lora=self.lora, prompts=table, request=request, place=folder)
        write_warm_score(scored, request, folder)


@dataclass(frozen=True)
class ScoreWeights:
    """Called by a run's first worker with published weights: scores them, returns the numbers that Tune compares."""

    shared: Shared

    @property
    def every(self) -> int | None:
        """Optimizer steps between scores."""
        return self.shared.config.score_every

    @property
    def keep_state(self) -> bool:
        """Whether a trial ends with its optimizer states, too."""
        return self.shared.config.keep_checkpoints

    def __call__(self, run_folder: Place, weights: Place, step: int) -> dict[str, float]:
        """Score the folder of `weights`, written at optimizer step `step`."""
        return self.shared.metrics_in(self.shared.weights(run_folder, weights, step))


def run_trial(given: dict[str, Any], *, shared: Shared) -> None:
    """One trial, in a process of its own: train, with scores; then keep the model and drop the rest.

    Called for a trial that was cut off, it goes on from the last checkpoint; one whose last weights are there already
    is not trained, unless they are damaged.

    Args:
        given: Its values and the name of its folder, as `tune.Points` gives them.
        shared: What all trials share.

    Raises:
        ScorerDiedError: Nothing could score it; raised before it trains.
    """
    # Here alone: workers and their controller unpickle `ScoreWeights`, and would import all that too.
    from mlc_ray.train.checkpoint import damaged_weights, last_weights, remove_checkpoint
    from mlc_ray.train.export import export
    from mlc_ray.train.run import train

    shared.scorer.check()
    shared.drop_optimizer_states()
    folder, values = shared.trial_folder(given[FOLDER]), given[VALUES]
    (folder / VALUES_FILE).write_json(values)
    (folder / FAILED_FILE).remove()  # of an earlier try
    for damaged, fault in damaged_weights(folder):
        logger.warning("trial %s goes on without %s and its score: %s", folder.name, damaged.name, fault)
        score = folder / SCORES_FOLDER / _STEP_FOLDER.format(step_of(damaged))
        (score / SCORES_FILE).remove()  # first, so that what is left of it is none
        score.remove()
        remove_checkpoint(damaged)
    if last_weights(folder) is None:
        _train_and_report(train, shared, folder, values)
    found = last_weights(folder)
    assert found is not None  # `train` raises where they could not be written
    weights, step = found
    if not (folder / SCORES_FOLDER / _STEP_FOLDER.format(step) / SCORES_FILE).is_file():
        # it died between writing its last weights and their score
        ray.tune.report(ScoreWeights(shared)(folder, weights, step))
    (folder / MODEL_FOLDER).remove()  # half of it, where storage has no rename and a process died while it wrote it
    export(weights, folder / MODEL_FOLDER, trust_remote_code=True)  # its components ran in this very trial
    metrics = shared.metrics_in(scores_of(folder)[-1])  # may raise: what has no value has not finished
    (folder / FINISHED_FILE).write_text("")
    ray.tune.report({**metrics, FINISHED: True})


def _train_and_report(train: Callable[..., Any], shared: Shared, folder: Place, values: dict[str, Any]) -> None:
    """Train the run in `folder` to its end; every score that appears meanwhile is reported to Tune."""
    reported = {score.name for score in scores_of(folder)}
    # Reported from this thread alone. Ray's `TuneReportCallback` has the trial's main thread report as well, and where
    # both do at once, each waits for the other without end.
    with ThreadPoolExecutor(1) as threads:
        training = threads.submit(
            train,
            shared.space.run(values, name=folder.name, output_dir=str(folder.parent)),
            resume=folder if (folder / CONFIG_FILE).is_file() else None,
            score=ScoreWeights(shared),
            display=False,
        )
        over = False
        while not over:
            over = bool(wait([training], timeout=_LOOK_SECONDS).done)
            for score in scores_of(folder):
                if score.name not in reported:
                    reported.add(score.name)
                    ray.tune.report(shared.metrics_in(score))
    training.result()


def trial_folders(search: Place) -> list[Place]:
    """The folders of all trials of a search that began, by name."""
    return [folder for folder in (search / TRIALS_FOLDER).iterdir() if (folder / VALUES_FILE).is_file()]


def has_ended(folder: Place) -> bool:
    """Whether a trial ran to its end, was stopped, or diverged; others were cut off, or failed."""
    return ending(folder) != "unfinished"


def scores_of(run_folder: Place) -> list[Place]:
    """The complete score folders of a trial's weights, the first step's first."""
    found = (run_folder / SCORES_FOLDER).iterdir()
    return [each for each in found if _STEP_NAME.fullmatch(each.name) and (each / SCORES_FILE).is_file()]


def scored_trials(shared: Shared) -> list[Trial]:
    """All trials of a search that have a score, by their names; the last score counts."""
    return [trial for folder in trial_folders(shared.folder) if (trial := read_trial(shared, folder)) is not None]


def read_trial(shared: Shared, folder: Place) -> Trial | None:
    """The trial in a run folder, None before its first score, or where too few of its responses got a verdict."""
    if not (scores := scores_of(folder)):
        return None
    try:
        score = shared.score_in(scores[-1])
    except TooManyUnparsedError:
        return None  # its trial failed of it, and is listed with those
    return Trial.read(folder, score, step_of(scores[-1]))


def step_of(folder: Place) -> int:
    """The optimizer step of weights, or of their score, by the name of its folder."""
    return int(re.split("[-_]", folder.name)[-1])
