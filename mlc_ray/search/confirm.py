"""After the trials: the few best are scored on bundles that chose none of them, and only that is the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mlc_ray.errors import MlcRayError
from mlc_ray.runs import (
    CONFIG_FILE,
    CONFIRMATION,
    DIVERGED_FILE,
    MODEL_FOLDER,
    PROVENANCE_FILE,
    SCORES_FOLDER,
    TRAIN_FOLDER,
    complete_checkpoints,
    weights_folders,
)
from mlc_ray.score.prompts import Prompts
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.score.scorer import ScorerDiedError
from mlc_ray.search.apart import apart_p, choice_p
from mlc_ray.search.objectives.base import Objective, TrialScore, make_objective
from mlc_ray.search.results import Change, Confirmation, Confirmed, Trial, duration
from mlc_ray.search.selection import cleared, shortlist
from mlc_ray.search.sides import side_change
from mlc_ray.search.trial import Shared, scores_of
from mlc_ray.search.tune import SEED, EndEarly, seeds_of
from mlc_ray.stats.rates import Judged
from mlc_ray.stats.significance import holm
from mlc_ray.storage import Place, fingerprint
from mlc_ray.train.divergence import DivergedError
from mlc_ray.train.entry import LastWeights
from mlc_ray.train.failures import own_error, said_of
from mlc_ray.train.preemption import PreemptedError

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

    def order(point: Point) -> tuple[bool, bool, float, bool, str]:
        whole, score = len(point.trials) == shared.config.repeats, point.score
        # Of equal points one that has its model, and then the first by name: every process has the same order.
        without_model = not all(_has_model(shared, trial) for trial in point.trials)
        return not whole, not score.feasible, -score.rank, without_model, point.trials[0].name

    return sorted(points, key=order)


def _has_model(shared: Shared, trial: Trial) -> bool:
    return (shared.trial_folder(trial.name) / MODEL_FOLDER).is_dir()


def drop_models(shared: Shared, trials: Sequence[Trial]) -> None:
    """Remove the models of the finished trials beyond the best `keep_models`; a point that lacks a repeat keeps its."""
    kept = shared.config.keep_models
    if kept is None or sum(trial.finished for trial in trials) <= kept:
        return
    whole = [point for point in finished_points(shared, trials) if len(point.trials) == shared.config.repeats]
    # A model that is gone takes no place, so that there are `keep_models` of them.
    there = [trial for point in whole for trial in point.trials if _has_model(shared, trial)]
    for trial in there[kept:]:
        (shared.trial_folder(trial.name) / MODEL_FOLDER).remove()


@dataclass(frozen=True)
class _Scored:
    """A point that was confirmed, and the verdicts of its models by the seed of their training."""

    point: Confirmed
    records: Mapping[int, Sequence[Judged]]


def confirm(
    shared: Shared, prompts: Prompts, trials: Sequence[Trial], end: EndEarly | None = None
) -> Confirmation | None:
    """Score the best `confirm.keep` points on `prompts`; None where no trial ran to its end, or none can be confirmed.

    With `confirm.seeds` each is trained again first. What an earlier process did is not done again. A seed whose
    training fails, whatever of, is left out, one that `end` leaves no time for too, and so is a model with too few
    verdicts; a point of which every trial is makes room for the next. If the model before training has too few, nothing
    is compared with it.
    """
    end = EndEarly(None) if end is None else end
    points = finished_points(shared, trials)
    points = [point for point in points if len(point.trials) == shared.config.repeats] or points
    listed = [points[index] for index in shortlist([point.score for point in points], len(points))]
    if not listed:
        return None
    before = shared.folder / CONFIRMATION
    shared.score(before, model=shared.model, weights=None if shared.lora else shared.model, prompts=prompts)
    found: list[_Scored] = []
    left_out: list[str] = []
    for point in listed:
        if len(found) == shared.config.confirm.keep:
            break
        logger.info("confirming trial %s, %d of %d", point.trials[0].name, len(found) + 1, shared.config.confirm.keep)
        scored = _confirmed(shared, point, prompts, left_out, end)
        if scored is not None:
            found.append(scored)
    if not found:
        return None
    baseline = None
    try:
        baseline = shared.score_in(before), shared.records_in(before)
    except TooManyUnparsedError as error:
        left_out.append(f"the model before training: {str(error).splitlines()[0]}")
        logger.warning("not confirmed, %s", left_out[-1])
    objective = make_objective(shared.config.objective)
    return confirmation_of(objective, [(each.point, each.records) for each in found], baseline, left_out)


def _confirmed(shared: Shared, point: Point, prompts: Prompts, left_out: list[str], end: EndEarly) -> _Scored | None:
    """A point scored on `prompts`, without the models that `left_out` then names; None where no trial of it is left."""
    first = point.trials[0]
    own_seed = seeds_of(shared.config, shared.space)[0]
    makers: list[tuple[int, str, Callable[[], Place]]] = [
        (int(trial.values.get(SEED, own_seed)), trial.name, partial(shared.trial_folder, trial.name))
        for trial in point.trials
    ]
    for seed in shared.config.confirm.seeds:
        makers.append((seed, f"{first.name} with seed {seed}", partial(_trained_again, shared, first, seed, end)))
    runs: dict[int, Place] = {}
    records: dict[int, Sequence[Judged]] = {}
    for number, (seed, name, make) in enumerate(makers):
        if number == len(point.trials) and not runs:
            break  # whatever other seeds say, there is no model to hand over
        try:
            run = make()
            if not (run / MODEL_FOLDER).is_dir():
                raise ModelGoneError("its model is gone")
            model, folder = str(run / MODEL_FOLDER), run / SCORES_FOLDER / CONFIRMATION
            shared.score(folder, model=model, weights=model, prompts=prompts)
            records[seed], runs[seed] = shared.records_in(folder), run
        except Exception as error:
            of_model = isinstance(error, (DivergedError, TooManyUnparsedError, ModelGoneError))
            ends_all = isinstance(own_error(error), (ScorerDiedError, PreemptedError))
            if ends_all or (number < len(point.trials) and not of_model):
                raise  # what happens to a further seed is no reason to confirm nothing
            left_out.append(f"{name}: {said_of(error).splitlines()[0]}")
            logger.warning("not confirmed, %s", left_out[-1], exc_info=own_error(error) is None)
    if not runs:
        return None
    score = shared.score_in(*(run / SCORES_FOLDER / CONFIRMATION for run in runs.values()))
    names = tuple(run.name for run in runs.values())
    return _Scored(Confirmed(names[0], names, first.values, score), records)


class ModelGoneError(MlcRayError):
    """A trial has no model any more."""


class NoTimeLeftError(MlcRayError):
    """`max_hours` would be over before a point is trained again."""


def confirmation_of(
    objective: Objective,
    found: Sequence[tuple[Confirmed, Mapping[int, Sequence[Judged]]]],
    baseline: tuple[TrialScore, Sequence[Judged]] | None,
    left_out: Sequence[str] = (),
) -> Confirmation:
    """What was confirmed, the best first, compared with it.

    A point that is not sure to be above the floor is never the best where another is.

    Args:
        objective: What the trials were chosen by.
        found: The points in the order of the selection, and the verdicts of their models by seed.
        baseline: The same of the model before training, which has no seed; None where it could not be read.
        left_out: Which models could not be confirmed, and why.
    """
    scores = [point.score for point, _ in found]
    first, *rest = cleared(scores)
    p_values = [choice_p(objective, scores[first], found[index][1], found[first][1]) for index in rest]
    chosen = (first, *rest)[best_of([scores[index] for index in (first, *rest)], p_values)]
    best, records = found[chosen]
    others = [each for index, each in enumerate(found) if index != chosen]
    others.sort(key=lambda each: (each[0].score.feasible, each[0].score.rank), reverse=True)
    compared = [other for _, other in others]
    if baseline is not None:
        compared.append(dict.fromkeys(records, baseline[1]))
    p_holm = holm([apart_p(objective, best.score, other, records) for other in compared])
    changes = [change_between(best.score, other, records, p) for other, p in zip(compared, p_holm, strict=True)]
    confirmed = [best, *(replace(each[0], change=change) for each, change in zip(others, changes, strict=False))]
    if baseline is None:
        return Confirmation(tuple(confirmed), None, None, tuple(left_out))
    return Confirmation(tuple(confirmed), baseline[0], changes[-1], tuple(left_out))


def best_of(scores: Sequence[TrialScore], p_values: Sequence[float]) -> int:
    """The best of those confirmed: the first of the selection, unless a better one is told apart from it.

    The best of them by the confirmation itself would be the luckiest of them on these prompts.

    Args:
        scores: On the prompts that confirm, in the order of the selection, of those that may be the best.
        p_values: Of the others against the first (`choice_p`); Holm's correction is applied here.
    """
    apart = [index for index, p in enumerate(holm(p_values), 1) if p <= _LEVEL]
    return max([0, *apart], key=lambda index: scores[index].rank)


def change_between(
    best: TrialScore, others: Mapping[int, Sequence[Judged]], bests: Mapping[int, Sequence[Judged]], p_holm: float
) -> Change:
    """The mean rates of the best's models less those of another's; `p_holm` says whether they are told apart."""
    runs = list(bests.values()), list(others.values())
    harmful = side_change(*runs, "harmful", best.measure, "hits", list(best.harmful_by_language))
    benign = None
    if best.benign is not None:
        benign = side_change(*runs, "benign", "refused", "misses", list(best.benign_by_language))
    return Change(harmful, benign, p_holm <= _LEVEL)


def _trained_again(shared: Shared, trial: Trial, seed: int, end: EndEarly) -> Place:
    """The run folder of a trial's values with another seed, trained to its end; it is no trial of the search.

    As of a trial, its last weights alone are written, unless checkpoints are to be kept.

    Raises:
        NoTimeLeftError: `end` leaves less time than the trial itself took for as many steps as are left.
    """
    from mlc_ray.train.checkpoint import damaged_weights, last_weights, remove_checkpoint
    from mlc_ray.train.export import export
    from mlc_ray.train.run import train

    folder = shared.trial_folder(f"{trial.name}-seed-{seed}")
    if (folder / DIVERGED_FILE).is_file():
        raise DivergedError(f"training diverged (see {str(folder / DIVERGED_FILE)!r})")
    if not (folder / MODEL_FOLDER / PROVENANCE_FILE).is_file():
        logger.info("training trial %s again with seed %d", trial.name, seed)
        shared.scorer.check()
        values = {**trial.values, SEED: seed}
        for damaged, fault in damaged_weights(folder):
            logger.warning("%s goes on without %s: %s", folder.name, damaged.name, fault)
            remove_checkpoint(damaged)
        if last_weights(folder) is None:  # else it died while it exported them
            _check_time(shared, trial, folder, end)
            train(
                shared.space.run(values, name=folder.name, output_dir=str(folder.parent)),
                resume=folder if (folder / CONFIG_FILE).is_file() else None,
                score=LastWeights(keep_state=shared.config.keep_checkpoints),
            )
        found = last_weights(folder)
        assert found is not None  # `train` raises where they could not be written
        (folder / MODEL_FOLDER).remove()
        export(found[0], folder / MODEL_FOLDER, trust_remote_code=True)  # its components ran in this very search
    for gone in weights_folders(folder) if shared.config.keep_checkpoints else [folder / TRAIN_FOLDER]:
        gone.remove()
    return folder


def _check_time(shared: Shared, trial: Trial, run: Place, end: EndEarly) -> None:
    checkpoints, _ = complete_checkpoints(run)
    left = 1 - checkpoints[-1].step / trial.step if checkpoints else 1.0  # of it what an earlier process has not done
    if end.seconds_left < left * trial.seconds:
        took = f"the trial took {duration(trial.seconds)}"
        raise NoTimeLeftError(
            f"not trained: max_hours={end.hours:g} would be over before its end "
            f"({took if left == 1 else f'{took}, and {left:.0%} of the steps are left'}); `mlc-ray search --resume "
            f"{shared.folder}` trains it, if need be with more hours (--set max_hours=N)"
        )
