"""What a scaling study takes, counted before it begins: runs, tokens, operations, answers to score, and hours."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from mlc_ray.config import ConfigError, TrainConfig
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import steps_of
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import Weigh, Weighing, Weights, of_artifact, weights_of
from mlc_ray.plan.records import RunPlan
from mlc_ray.plan.runs import PlanError, plan_alone, plannable
from mlc_ray.plan.scores import SearchPlan, plan_scoring, plan_search, runs_in, scores_in
from mlc_ray.plan.shapes import config_of, known_shape
from mlc_ray.report.scale import SizeBudget
from mlc_ray.runs import TRIALS_FOLDER, artifact_cache, resolve_model
from mlc_ray.search.checks import check_plan
from mlc_ray.search.objectives.base import make_objective
from mlc_ray.search.selection import count_asked, read_asked
from mlc_ray.storage import Place, local_model, local_side
from mlc_ray.study.searches import SizeSearch, cell_folder
from mlc_ray.train.experts import is_expert, share_met

logger = logging.getLogger(__name__)


def model_size(path: str, *, trust_remote_code: bool) -> tuple[int, float]:
    """Parameters of a model, and those that a token meets, without embeddings; from its config, without weights."""
    config, _ = config_of(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    met = share_met(config.get_text_config()) or 1.0
    embedding = model.get_input_embeddings().weight
    counted = sum(
        parameter.numel() * (met if is_expert(name) else 1.0)
        for name, parameter in model.named_parameters()
        if parameter is not embedding
    )
    return sum(parameter.numel() for parameter in model.parameters()), counted


def budget_of(search: SizeSearch, folder: Place, parameters: float | None, cluster: Cluster | None) -> SizeBudget:
    """What the search of a size takes at most; its bundles are tokenised for it, and the search finds them there.

    Hours are those on `cluster`, if it is known.

    Tokens are those of all languages in every step, though only every `mlc.every`th reads them, and shared beginnings
    of prompts count once a bundle that has them.

    Raises:
        MlcRayError: What reading data, prompts and the model's config raises.
    """
    run, place, config = search.run, cell_folder(folder, search.size), search.config
    cache = artifact_cache(place / TRIALS_FOLDER)
    weigh = Weighing(
        lambda trial: of_artifact(prepare_token_rows(trial.data, trial.model, chat=trial.chat, cache_dir=cache), trial)
    )
    asked = read_asked(config, make_objective(config.objective), rejects=local_side(place))
    answers = (len(asked.selection.table), len(asked.confirmation.table))
    model = local_model(resolve_model(run.model.path), weights=False)
    found = _counted(search, model, parameters, weigh, answers=answers)
    if cluster is None:
        return found
    try:
        return _with_hours(found, plan_of(search, weigh, answers, cluster))
    except PlanError as error:  # of what is there now: an autoscaler may add to it
        logger.warning("hours of %s are not known: %s", search.size, error)
        return found


def budget_on(search: SizeSearch, folder: Place, parameters: float | None, cluster: Cluster) -> SizeBudget:
    """The same on a cluster that is only thought of, with the `fault` that keeps it from fitting; nothing is written.

    Bundles and prompts that are not here are assumed, which is said.

    Raises:
        MlcRayError: What reading data, prompts and the model's config raises.
    """
    run, config = search.run, search.config
    cache = artifact_cache(cell_folder(folder, search.size) / TRIALS_FOLDER)
    weigh = Weighing(lambda trial: weights_of(trial, cache))
    choosing, confirming = count_asked(config)
    assumed = dict.fromkeys((*choosing.assumed, *confirming.assumed))
    answers = (len(choosing) * config.scoring.asking.samples, len(confirming) * config.scoring.asking.samples)
    found = _counted(search, run.model.path, parameters, weigh, answers=answers)
    try:
        if run.cluster.plan == "check":
            check_plan(config, search.space, gpu=cluster.gpu is not None, cluster=cluster, weights=weigh(run))
        found = _with_hours(found, plan_of(search, weigh, answers, cluster))
    except (ConfigError, PlanError) as error:  # a layer that the model lacks, or what does not fit
        found = replace(found, fault=str(error))
    return replace(found, assumed=(*found.assumed, *weigh.assumed, *assumed))


def _forwarded(run: TrainConfig, weights: Weights) -> float:
    """Tokens that a run forwards where terms are in every step."""
    objective = Objective(run)
    rejected, pairing = objective.alignment.needs_rejected, objective.alignment.pairing
    scope = objective.widest_scope
    each = weights.lengths.own_tokens(
        head=0, taps=objective.ever_taps, rejected=rejected, pairing=pairing,
        scope=scope, openings=weights.opened.get(scope, 0),
    )  # fmt: skip
    return float(each.mean()) * run.train.batch_bundles * steps_of(run, weights)


def _counted(
    search: SizeSearch, model: str, parameters: float | None, weigh: Weigh, *, answers: tuple[int, int]
) -> SizeBudget:
    """What is counted without a cluster, as if each trial were the one that forwards most, with the steps of that which
    has most of them."""
    config, space = search.config, search.space
    run = space.heaviest(lambda run: _forwarded(run, weigh(run)))
    runs, steps = runs_in(config, points=search.points), _most_steps(search, weigh)
    forwarded = round(_forwarded(run, weigh(run)) * runs)
    chosen, kept = scores_in(config, points=search.points, steps=steps)
    size, met = model_size(model, trust_remote_code=run.model.trust_remote_code)
    return SizeBudget(
        search.size, parameters or size, runs, steps, forwarded, 6 * met * forwarded, chosen + kept,
        chosen * answers[0] + kept * answers[1],
    )  # fmt: skip


def _most_steps(search: SizeSearch, weigh: Weigh) -> int:
    run = search.space.heaviest(lambda run: steps_of(run, weigh(run)))
    return steps_of(run, weigh(run))


def _with_hours(found: SizeBudget, plan: SearchPlan | None) -> SizeBudget:
    if plan is None:
        return found
    return replace(found, hours=plan.seconds / 3600, gpu_hours=plan.gpu_hours, assumed=plan.assumed)


def plan_of(search: SizeSearch, weigh: Weigh, answers: tuple[int, int], cluster: Cluster) -> SearchPlan | None:
    """The time of a search on a cluster, as `mlc-ray plan` counts it: as if each trial were the one that takes longest.

    Args:
        search: of a size.
        weigh: what the bundles of a trial weigh.
        answers: of a score that chooses, and of one that confirms; of each prompt all its samples.
        cluster: what it runs on, or is to.

    Returns:
        None where the engine or the shape of the model is not known.

    Raises:
        PlanError: The cluster has too few GPUs.
        ShapeError: The model has no config.
    """
    run = search.run
    if not plannable(run):
        return None
    shape = known_shape(run.model.path, trust_remote_code=run.model.trust_remote_code)
    if shape is None:
        return None
    scoring = search.config.scoring

    def planned_as(trial: TrainConfig) -> RunPlan:
        return plan_alone(trial, shape, cluster, weigh(trial))

    longest = search.space.heaviest(lambda trial: planned_as(trial).wall_seconds if plannable(trial) else 0.0)
    planned, steps = planned_as(longest), _most_steps(search, weigh)
    choosing, confirming = (
        plan_scoring(scoring, shape, cluster, prompts=number // scoring.asking.samples) for number in answers
    )
    return plan_search(
        search.config,
        planned,
        points=search.points,
        choosing=choosing,
        confirming=confirming,
        cluster=cluster,
        steps=steps,
    )
