"""After the trials: the few best are scored on bundles that chose none of them, and only that is the result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlc_ray.runs import (
    CONFIG_FILE,
    CONFIRMATION,
    MODEL_FOLDER,
    PROVENANCE_FILE,
    SCORES_FOLDER,
    TRAIN_FOLDER,
)
from mlc_ray.score.prompts import Prompts
from mlc_ray.search.objectives.base import Objective, TrialScore, make_objective
from mlc_ray.search.results import Change, Confirmation, Confirmed, Trial
from mlc_ray.search.selection import shortlist
from mlc_ray.search.trial import Shared, scores_of
from mlc_ray.search.tune import SEED
from mlc_ray.stats.paired import Comparison, compare
from mlc_ray.stats.rates import Judged
from mlc_ray.storage import Place, fingerprint

logger = logging.getLogger(__name__)
_LEVEL = 0.05


@dataclass(frozen=True)
class Point:
    """A point of the space: its finished trials, which differ in their seed, and what they are worth together."""

    trials: tuple[Trial, ...]
    score: TrialScore


def finished_points(shared: Shared, trials: Sequence[Trial]) -> list[Point]:
    """The points of which a trial has finished, best first; those that lack a repeat come last."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.finished:
            groups.setdefault(fingerprint([trial.values[name] for name in shared.space.parameters]), []).append(trial)
    points = []
    for group in groups.values():
        several = len(group) > 1
        folders = [scores_of(shared.trial_folder(trial.name))[-1] for trial in group] if several else []
        points.append(Point(tuple(group), shared.score_in(*folders) if several else group[0].score))

    def worth(point: Point) -> tuple[bool, bool, float]:
        return len(point.trials) == shared.config.repeats, point.score.feasible, point.score.rank

    return sorted(points, key=worth, reverse=True)


def drop_models(shared: Shared, trials: Sequence[Trial]) -> None:
    """Remove the models of the finished trials beyond the best `keep_models`; a point that lacks a repeat keeps its."""
    kept = shared.config.keep_models
    if kept is None or sum(trial.finished for trial in trials) <= kept:
        return
    whole = [point for point in finished_points(shared, trials) if len(point.trials) == shared.config.repeats]
    for trial in [trial for point in whole for trial in point.trials][kept:]:
        (shared.trial_folder(trial.name) / MODEL_FOLDER).remove()


def confirm(shared: Shared, prompts: Prompts, trials: Sequence[Trial]) -> Confirmation | None:
    """Score the best `confirm.keep` points on `prompts`; None where no trial ran to its end.

    With `confirm.seeds` each is trained again first. What an earlier process did is not done again.
    """
    points = finished_points(shared, trials)
    points = [point for point in points if len(point.trials) == shared.config.repeats] or points
    chosen = [points[index] for index in shortlist([point.score for point in points], shared.config.confirm.keep)]
    if not chosen:
        return None
    before = shared.folder / CONFIRMATION
    shared.score(before, model=shared.model, weights=None if shared.lora else shared.model, prompts=prompts)
    found: list[tuple[Confirmed, list[Place]]] = []
    for number, point in enumerate(chosen, 1):
        first = point.trials[0]
        logger.info("confirming trial %s, %d of %d", first.name, number, len(chosen))
        runs = [shared.trial_folder(trial.name) for trial in point.trials]
        runs += [_trained_again(shared, first, seed) for seed in shared.config.confirm.seeds]
        folders = [run / SCORES_FOLDER / CONFIRMATION for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            model = str(run / MODEL_FOLDER)
            shared.score(folder, model=model, weights=model, prompts=prompts)
        names = tuple(run.name for run in runs)
        found.append((Confirmed(first.name, names, first.values, shared.score_in(*folders)), folders))
    found.sort(key=lambda each: (each[0].score.feasible, each[0].score.rank), reverse=True)
    (best, folders), *others = found
    objective = make_objective(shared.config.objective)

    def against(other: Sequence[Place]) -> Change:
        return change_between(
            objective, best.score, *([shared.records_in(folder) for folder in each] for each in (other, folders))
        )

    confirmed = [best, *(replace(point, change=against(scored)) for point, scored in others)]
    return Confirmation(tuple(confirmed), shared.score_in(before), against([before] * len(folders)))


def change_between(
    objective: Objective, best: TrialScore, others: Sequence[Sequence[Judged]], bests: Sequence[Sequence[Judged]]
) -> Change:
    """The best against another model, seed by seed: the comparison that tells them apart least counts.

    Args:
        objective: What the trials were chosen by.
        best: The score of `bests`, for the languages that count.
        others: The verdicts of each of the other's models.
        bests: The same of the best's, as many.
    """
    languages = best.harmful_by_language.keys()
    pairs = (
        compare(*([record for record in records if record.language in languages] for records in pair))
        for pair in zip(others, bests, strict=True)
    )
    decides_by_benign = objective.needs_benign and objective.floor is None
    changes = [_change(found, best, decides_by_benign) for found in pairs]
    return max(changes, key=lambda each: each[0])[1]


def _change(found: Comparison, best: TrialScore, decides_by_benign: bool) -> tuple[float, Change]:
    """The p-value that decides, and the change."""
    harmful, benign = found.benchmark().side("harmful", best.measure), found.benchmark().side("benign")
    assert harmful is not None  # the objective has counted it
    p = harmful.p
    if benign is not None and decides_by_benign:
        p = min(1.0, 2 * min(p, benign.p))  # two tests, either of which may tell them apart
    return p, Change(harmful.change, None if benign is None else benign.change, p <= _LEVEL)


def _trained_again(shared: Shared, trial: Trial, seed: int) -> Place:
    """The run folder of a trial's values with another seed, trained to its end; it is no trial of the search."""
    from mlc_ray.train.export import export
    from mlc_ray.train.run import train

    folder = shared.trial_folder(f"{trial.name}-seed-{seed}")
    if not (folder / MODEL_FOLDER / PROVENANCE_FILE).is_file():
        logger.info("training trial %s again with seed %d", trial.name, seed)
        shared.scorer.check()
        values = {**trial.values, SEED: seed}
        train(
            shared.space.run(values, name=folder.name, output_dir=str(folder.parent)),
            resume=folder if (folder / CONFIG_FILE).is_file() else None,
        )
        (folder / MODEL_FOLDER).remove()
        export(folder, folder / MODEL_FOLDER, trust_remote_code=True)  # its components ran in this very search
    if not shared.config.keep_checkpoints:
        (folder / TRAIN_FOLDER).remove()
    return folder
