"""What the driver does while trials run: results are written after every score, and dead engines end the search."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.tune

from mlc_ray.monitoring import measure, told_of
from mlc_ray.report.search import Progress, SearchFileError
from mlc_ray.runs import FAILED_FILE, STOPPED_FILE
from mlc_ray.score.scorer import ScorerDiedError
from mlc_ray.search.confirm import drop_models
from mlc_ray.search.objectives.base import TrialScore
from mlc_ray.search.results import (
    Confirmation,
    SearchResult,
    Trial,
    duration,
    ending,
    read_confirmation,
    write_results,
)
from mlc_ray.search.trial import Shared, has_ended, read_trial, scored_trials, trial_folders
from mlc_ray.search.tune import FINISHED, FOLDER, VALUES, EndEarly
from mlc_ray.stats.rates import Interval
from mlc_ray.storage import Place

logger = logging.getLogger(__name__)


class Recorder(ray.tune.Callback):
    """Writes the results after every score, with the time left, and marks what became of each trial.

    `total` is the number of trials, those of earlier processes too; `end` is told of engines that died.
    """

    def __init__(self, shared: Shared, baseline: TrialScore, *, total: int, end: EndEarly) -> None:
        self._shared, self._baseline, self._total, self._end = shared, baseline, total, end
        self.trials: dict[str, Trial] = {trial.name: trial for trial in scored_trials(shared)}
        self.failed: list[str] = []
        self._earlier = confirmed_earlier(shared.folder)
        self.over = False  # whether no trial of this process will run any more
        self._began: dict[str, float] = {}
        self._took: list[float] = []
        self._errors = 0
        told_of(run=shared.folder.name)

    def progress(self) -> Progress:
        """From what the trials of this process took so far."""
        ended = sum(map(has_ended, trial_folders(self._shared.folder)))
        left = None
        if self._took and not self.over:
            each = sum(self._took) / len(self._took)
            left = each * (self._total - ended) / self._shared.config.concurrency
            left -= sum(min(each, time.monotonic() - began) for began in self._began.values()) / max(
                1, self._shared.config.concurrency
            )
        return Progress(ended, self._total, None if left is None else max(0.0, left))

    def write(self, confirmation: Confirmation | None = None) -> SearchResult:
        """Write what there is so far; until there is a new confirmation, with that of an earlier process."""
        progress = self.progress()
        found = self._earlier if confirmation is None else replace(confirmation, trials=progress.ended)
        return write_results(
            self._shared.folder, self._shared.config, self._baseline,
            [self.trials[name] for name in sorted(self.trials)],
            progress=progress, failed=self.failed, confirmation=found,
            earlier=confirmation is None,
        )  # fmt: skip

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune for every trial that begins."""
        self._began[trial.trial_id] = time.monotonic()
        self._tell()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Tune for every score, and once more for a trial that has finished."""
        if result.get(FINISHED):
            return
        found = read_trial(self._shared, self._shared.trial_folder(trial.config[FOLDER]))
        if found is not None:
            self.trials[found.name] = found
            benign = found.score.benign
            logger.info(
                "trial %s  %s  step %d  harmful %s %s  benign complied %s", found.name, _values(found.values),
                found.step, found.score.measure, _rate(found.score.harmful), "-" if benign is None else _rate(benign),
            )  # fmt: skip
        self._try_to_write()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune for every trial that ended without a fault, or that was ended."""
        began = self._began.pop(trial.trial_id, None)
        folder = self._shared.trial_folder(trial.config[FOLDER])
        if folder.is_dir() and ending(folder) == "unfinished":
            if self._end.reason:
                return  # cut off with the search, to be gone on with
            (folder / STOPPED_FILE).write_text("")
        elif began is not None:
            self._took.append(time.monotonic() - began)
        if (found := read_trial(self._shared, folder)) is not None:
            self.trials[found.name] = found
        drop_models(self._shared, list(self.trials.values()))
        progress = self.progress()
        left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
        logger.info("%d of %d trials have ended%s", progress.ended, progress.total, left)
        self._try_to_write()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune for every trial that failed."""
        self._errors += 1
        self._began.pop(trial.trial_id, None)
        name = trial.config[FOLDER]
        folder = self._shared.trial_folder(name)
        said = _said(trial, folder)
        first = said.partition("\n")[0]
        self.failed.append(f"{name}: {first}")
        logger.warning("trial %s  %s  failed: %s", name, _values(trial.config[VALUES]), first)
        self._mark_failed(folder, said)
        if folder.is_dir() and (found := read_trial(self._shared, folder)) is not None:
            self.trials[found.name] = found
        try:
            self._shared.scorer.check()
        except ScorerDiedError as error:
            self._end.fault = error
        self._try_to_write()

    def _mark_failed(self, folder: Place, said: str) -> None:
        """Into the trial's folder, also of one that was killed, or that failed before its first step."""
        try:
            if folder.is_dir() and ending(folder) == "unfinished":
                (folder / FAILED_FILE).write_json({"message": said})
        except OSError as error:
            logger.warning("%s does not say that the trial failed: %s", folder, error)

    def _tell(self) -> None:
        ended = sum(map(has_ended, trial_folders(self._shared.folder)))
        for state, number in {"ended": ended, "running": len(self._began), "failed": self._errors}.items():
            measure("mlc_search_trials", number, state=state)
        measure("mlc_search_trials_planned", self._total)

    def _try_to_write(self) -> None:
        self._tell()
        try:
            self.write()
        except OSError as error:  # a store that is away for a while must not end the trials
            logger.warning("the results so far could not be written (%s); they are again after the next score", error)


def confirmed_earlier(folder: Place) -> Confirmation | None:
    """What an earlier process confirmed; nothing where its file is damaged, which is written anew."""
    try:
        return read_confirmation(folder)
    except SearchFileError as error:
        logger.warning("%s; the best trials are confirmed again", error)
        return None


_RAISED = re.compile(r"^(?:mlc_ray\.(?:\w+\.)*[A-Z]\w*: |(?=(?:\w+\.)*[A-Z]\w*(?:Error|Exception): ))", re.MULTILINE)
"""Where a traceback ends and says what was raised: what our own errors say, and others with their class."""


def _said(trial: Any, folder: Place) -> str:
    """What a trial failed of: as its run says, else by the text that Tune writes before it calls back."""
    with suppress(OSError, ValueError, KeyError):
        return str((folder / FAILED_FILE).read_json()["message"])
    text = "" if trial.error_file is None else Path(trial.error_file).read_text(encoding="utf-8")
    text = text.rpartition("Failure # ")[2].partition("\n")[2].strip()
    raised = [*_RAISED.finditer(text)]
    return (text[raised[-1].end() :] if raised else text) or "Tune says no reason"


def _rate(rate: Interval) -> str:
    return f"{rate.value:.1f} % ({rate.low:.1f} to {rate.high:.1f})"


def _values(values: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
