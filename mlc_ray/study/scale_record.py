"""What a scaling study has so far, from its searches' folders: read, counted, and written as a study's results."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlc_ray.config import UNTOUCHED
from mlc_ray.config.scale import LAYER, WEIGHT
from mlc_ray.data.prepare import prepared_tokens
from mlc_ray.errors import MlcRayError
from mlc_ray.report.scale import BEST, Scaling, SizePoint
from mlc_ray.report.study import CellOutcome, MethodRow, StudyResult
from mlc_ray.runs import (
    CONFIG_FILE,
    CONFIRMATION,
    PROBE_FILE,
    SCORES_FOLDER,
    TRIALS_FOLDER,
    artifact_cache,
    read_metrics,
)
from mlc_ray.score.results import ScoreResult, load_records, load_scores
from mlc_ray.search.objectives.base import Objective, make_objective
from mlc_ray.search.results import Confirmation, ending, read_confirmation, read_values
from mlc_ray.search.trial import scores_of, trial_folders
from mlc_ray.stats.rates import Interval, Judged
from mlc_ray.stats.significance import holm
from mlc_ray.stats.study import (
    MethodRates,
    MethodTest,
    Verdicts,
    change_in,
    corrected,
    method_rates,
    method_tests,
    read_verdicts,
)
from mlc_ray.stats.study_languages import MethodLanguages, method_languages
from mlc_ray.stats.trend import Trend, trend
from mlc_ray.storage import Place, fingerprint, library_versions
from mlc_ray.study.record import write_study
from mlc_ray.study.searches import ScalePlan, SizeSearch, cell_folder
from mlc_ray.study.supervision import Supervision, supervision_of
from mlc_ray.train.run_folder import load_run_config
from mlc_ray.types import Kind, primary_language

logger = logging.getLogger(__name__)

TIES = 20_260
"""Seed of the lots that are drawn between points which are equally good in a resample."""

TRENDS = ("best layer (fraction of the depth)", "log10 of lambda", "transfer (points)", "over-refusal (points)")


@dataclass(frozen=True)
class _Confirmed:
    """The best point of a size, with its verdicts and those of the model before training."""

    confirmation: Confirmation
    untouched: Verdicts
    best: Verdicts
    scores: tuple[ScoreResult, ...]
    seeds: tuple[int, ...]

    @property
    def trained(self) -> list[str]:
        return sorted({code for score in self.scores for code in score.seen_languages or ()})


class ScaleRecorder:
    """Counts the searches' scores, and writes a study's results; `failures` says by size what could not be done."""

    def __init__(self, plan: ScalePlan, folder: Place, *, gpu: bool) -> None:
        self.failures: dict[str, str] = {}
        self._used: dict[Place, Supervision] = {}  # by run; finding it reads the data
        self._plan, self._folder, self._gpu = plan, folder, gpu

    def write(self) -> StudyResult:
        """Count anew what is confirmed so far, and write it."""
        rows: list[MethodRow] = []
        tests: list[MethodTest] = []
        cells: list[CellOutcome] = []
        points: list[SizePoint] = []
        judges: dict[str, None] = {}
        asked: Counter[Kind] = Counter()
        trained: set[str] = set()
        seeds: dict[int, None] = {}
        told_by: dict[str, None] = {}
        for search in self._plan.searches:
            found = None
            try:
                found = self._confirmed(search)
            except MlcRayError as error:  # a damaged score, or a judge that does not say what is refused
                self.failures[search.size] = str(error)
            rates: dict[str, MethodRates] = {}
            told: dict[str, tuple[MethodLanguages, ...]] = {}
            if found is not None:
                both = {UNTOUCHED: found.untouched, BEST: found.best}
                rates = {name: method_rates(verdicts, found.trained) for name, verdicts in both.items()}
                ways = dict.fromkeys(score.told_by for score in found.scores)
                told_by |= ways
                if len(ways) == 1 and "" not in ways:
                    told = {name: method_languages(verdicts.runs, found.trained) for name, verdicts in both.items()}
                tests += method_tests(search.size, both)
                points.append(self._point(search, found))
                judges |= dict.fromkeys(f"{by} ({what})" for what, by in found.scores[0].measured_by.items())
                trained |= set(found.trained)
                seeds |= dict.fromkeys(found.seeds)
                records = next(iter(found.untouched.runs.values()))
                asked = Counter(kind for _, _, kind in {(r.benchmark, r.bundle_id, r.kind) for r in records})
            rows += [MethodRow(search.size, name, rates.get(name), told.get(name, ())) for name in (UNTOUCHED, BEST)]
            cells += self._cells(search, found)
        result = StudyResult(
            name=self._plan.config.name,
            models={search.size: search.run.model.path for search in self._plan.searches},
            methods={BEST: (_space_of(self._plan.searches[0]),)},
            seeds=tuple(seeds),
            trained=tuple(sorted(trained)),
            gpu=self._gpu,
            judge=", ".join(judges),
            bundles={kind: asked[kind] for kind in sorted(asked, reverse=True)},
            rows=tuple(rows),
            tests=tuple(corrected(tests)),
            cells=tuple(cells),
            told_by=tuple(told_by),
            scaling=Scaling(tuple(points), tuple(trends_of(points)), self._plan.budget),
            versions=library_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            folder=self._folder,
        )
        write_study(result)
        return result

    def _confirmed(self, search: SizeSearch) -> _Confirmed | None:
        """None where nothing is confirmed yet, or not against the model before training."""
        folder = cell_folder(self._folder, search.size)
        confirmation = read_confirmation(folder)
        if confirmation is None:
            return None
        if confirmation.baseline is None:
            self.failures[search.size] = "; ".join(confirmation.left_out)
            return None
        scores = [load_scores(_run(folder, name) / SCORES_FOLDER / CONFIRMATION) for name in confirmation.best.runs]
        runs: dict[int | None, Sequence[Judged]] = {}
        for name, score in zip(confirmation.best.runs, scores, strict=True):
            runs[load_run_config(_run(folder, name)).seed] = load_records(score)
        before = load_scores(folder / CONFIRMATION)
        untouched = read_verdicts({None: load_records(before)})
        seeds = tuple(seed for seed in runs if seed is not None)
        return _Confirmed(confirmation, untouched, read_verdicts(runs), (before, *scores), seeds)

    def _point(self, search: SizeSearch, found: _Confirmed) -> SizePoint:
        folder, section = cell_folder(self._folder, search.size), self._plan.config.sizes[search.size]
        budget = {each.size: each.parameters for each in self._plan.budget}
        best = found.confirmation.best.values
        drawn = best_values(folder, make_objective(search.config.objective))
        primary = set(map(primary_language, found.trained))
        asked = {record.language for run in found.best.runs.values() for record in run}
        never = [code for code in sorted(asked) if primary_language(code) not in primary]
        trials = [each for each in trial_folders(folder) if ending(each) == "finished"]
        workers = search.run.cluster.most_workers
        runs = [each for each in (folder / TRIALS_FOLDER).iterdir() if (each / CONFIG_FILE).is_file()]
        return SizePoint(
            size=search.size,
            parameters=section.parameters or budget[search.size],
            family=section.family,
            layer=_around(_fraction(best[LAYER]), [_fraction(each[LAYER]) for each in drawn]),
            log_weight=_around(_log(best[WEIGHT]), [_log(each[WEIGHT]) for each in drawn]),
            transfer=change_in(found.untouched, found.best, "harmful", "hits", never),
            over_refusal=change_in(found.untouched, found.best, "benign", "hits", sorted(asked)),
            seeds=len(found.seeds),
            trials=len(trials),
            probed=_probed(folder),
            seconds=workers * sum(map(_seconds, runs)),
        )

    def _cells(self, search: SizeSearch, found: _Confirmed | None) -> list[CellOutcome]:
        """The model before training, then the models of the best point; or what there is of the search."""
        size, folder = search.size, cell_folder(self._folder, search.size)
        message = self.failures.get(size, "")
        if found is None:
            return [
                CellOutcome(f"{size}-{UNTOUCHED}", size, UNTOUCHED, None, "waiting"),
                CellOutcome(size, size, BEST, 0, "failed" if message else "waiting", message),
            ]
        before, *scores = found.scores
        seconds = _score_seconds(before)
        cells = [CellOutcome(f"{size}-{UNTOUCHED}", size, UNTOUCHED, None, "scored", score_seconds=seconds)]
        for name, seed, score in zip(found.confirmation.best.runs, found.seeds, scores, strict=True):
            run = _run(folder, name)
            if run not in self._used:
                self._used[run] = _supervision(folder, run)
            rows, used = read_metrics(run), self._used[run]
            workers = search.run.cluster.most_workers
            cells.append(
                CellOutcome(
                    f"{size}-{name}", size, BEST, seed, "scored",
                    steps=int(rows[-1]["step"]) if rows else 0, workers=workers,
                    seconds=workers * _seconds(run), score_seconds=_score_seconds(score),
                    prompt_tokens=used.prompts, answer_tokens=used.answers,
                )
            )  # fmt: skip
        return [*cells[:-1], replace(cells[-1], message=message)]


def _run(folder: Place, name: str) -> Place:
    return folder / TRIALS_FOLDER / name


def _supervision(folder: Place, run: Place) -> Supervision:
    """What the loss of a run of a search read; nothing where its token rows, or what they were made of, are gone."""
    config = load_run_config(run)
    cache = artifact_cache(folder / TRIALS_FOLDER)
    try:
        tokens = prepared_tokens(config.data, config.model, chat=config.chat, cache_dir=cache)
    except MlcRayError as error:
        logger.warning("the tokens of supervision of %s are not known: %s", run, error)
        tokens = None
    return Supervision([], {}, {}) if tokens is None else supervision_of(config, tokens)


def _seconds(run: Place) -> float:
    return sum(row.get("step_seconds") or 0.0 for row in read_metrics(run))


def _score_seconds(score: ScoreResult) -> float:
    return float(score.config.get("seconds", {}).get("total", 0.0))


def _space_of(search: SizeSearch) -> str:
    return f"the best of {', '.join(search.config.space)} by {search.config.objective.name}"


def _probed(folder: Place) -> float | None:
    """The fraction of the depth of the layer that the search's probe ranks first."""
    file = folder / "probe" / PROBE_FILE
    if not file.is_file():
        return None
    probe = file.read_json()["probe"]
    return float(probe["ranking"][0]) / (len(probe["layers"]) - 1) if probe["ranking"] else None


def _fraction(layer: Any) -> float:
    return 1.0 if layer == "last" else float(layer)


def _log(weight: Any) -> float:
    """log10 of lambda; of 0, which has none, that of 1/1000."""
    return math.log10(max(float(weight), 1e-3))


def _around(value: float, drawn: Sequence[float]) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (value, value)
    return Interval(value, min(value, float(low)), max(value, float(high)))


def best_values(folder: Place, objective: Objective) -> list[Mapping[str, Any]]:
    """The values of the point that is best in each resample of the bundles that chose, of all finished trials.

    Of several that are equally good in a resample one is drawn. Of a point that is repeated the mean rates of its
    models count, as in the search. The resamples of all trials are of the same bundles, so that they are compared with
    each other in each.
    """
    groups: dict[str, list[Place]] = {}
    values: dict[str, Mapping[str, Any]] = {}
    for trial in trial_folders(folder):
        if ending(trial) == "finished" and (scores := scores_of(trial)):
            own = {name: value for name, value in read_values(trial).items() if name != "seed"}
            key = fingerprint(own)
            values[key] = own
            groups.setdefault(key, []).append(scores[-1])
    ranks = {
        key: objective.drawn(*(load_records(load_scores(score)) for score in scores)) for key, scores in groups.items()
    }
    if not ranks:
        return []
    shortest, keys = min(map(len, ranks.values())), list(ranks)
    drawn = np.array([ranks[key][:shortest] for key in keys])
    # The first of several equal ones would look as sure as if it were better.
    lots = np.random.default_rng(TIES).random(drawn.shape)
    best = np.argmax(np.where(drawn == drawn.max(axis=0), lots, -1.0), axis=0)
    return [values[keys[index]] for index in best]


def trends_of(points: Sequence[SizePoint]) -> list[Trend]:
    """The line of each number over the sizes that have it, corrected for all of them by Holm."""
    of: list[list[tuple[SizePoint, Interval | None]]] = [
        [(each, each.layer) for each in points],
        [(each, each.log_weight) for each in points],
        [(each, each.transfer) for each in points],
        [(each, each.over_refusal) for each in points],
    ]
    found = []
    for name, pairs in zip(TRENDS, of, strict=True):
        there = [(point, value) for point, value in pairs if value is not None]
        if not there:
            continue
        families = [point.family or "" for point, _ in there]
        found.append(trend(name, [point.parameters for point, _ in there], [value for _, value in there], families))
    return [replace(each, p_holm=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]
