"""What a scaling study takes, counted before it begins: runs, tokens, operations, answers to score, and hours."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import steps_of
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import of_artifact
from mlc_ray.plan.runs import PlanError, plan_alone, plannable
from mlc_ray.plan.scores import SearchPlan, plan_scoring, plan_search, runs_in, scores_in
from mlc_ray.plan.shapes import known_shape
from mlc_ray.report.scale import SizeBudget
from mlc_ray.runs import TRIALS_FOLDER, artifact_cache, resolve_model
from mlc_ray.search.objectives.base import make_objective
from mlc_ray.search.selection import read_asked
from mlc_ray.storage import Place, local_model, local_side
from mlc_ray.study.searches import SizeSearch, cell_folder
from mlc_ray.train.experts import is_expert, share_met

logger = logging.getLogger(__name__)


def model_size(path: str, *, trust_remote_code: bool) -> tuple[int, float]:
    """Parameters of a model, and those that a token meets, without embeddings; from its config, without weights."""
    folder = local_model(resolve_model(path), weights=False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
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
    run, place = search.run, cell_folder(folder, search.size)
    tokens = prepare_token_rows(run.data, run.model, chat=run.chat, cache_dir=artifact_cache(place / TRIALS_FOLDER))
    objective = Objective(run)
    needs_rejected, pairing = objective.alignment.needs_rejected, objective.alignment.pairing
    own = tokens.counted(
        lambda lengths: lengths.own_tokens(head=0, taps=objective.ever_taps, rejected=needs_rejected, pairing=pairing)
    )
    config, steps = search.config, steps_of(run, tokens)
    runs = runs_in(config, points=search.points)
    forwarded = round(float(own.mean()) * run.train.batch_bundles * steps * runs)
    asked = read_asked(config, make_objective(config.objective), rejects=local_side(place))
    selected, confirmed = len(asked.selection.table), len(asked.confirmation.table)
    chosen, kept = scores_in(config, points=search.points, steps=steps)
    hours = None if cluster is None else plan_of(search, tokens, (selected, confirmed), cluster)
    size, met = model_size(run.model.path, trust_remote_code=run.model.trust_remote_code)
    found = SizeBudget(
        search.size, parameters or size, runs, steps, forwarded, 6 * met * forwarded, chosen + kept,
        chosen * selected + kept * confirmed,
    )  # fmt: skip
    if hours is None:
        return found
    return replace(found, hours=hours.seconds / 3600, gpu_hours=hours.gpu_hours, assumed=hours.assumed)


def plan_of(search: SizeSearch, tokens: TokenArtifact, answers: tuple[int, int], cluster: Cluster) -> SearchPlan | None:
    """The time of a search on a cluster, as `mlc-ray plan` counts it.

    Args:
        search: of a size.
        tokens: its bundles, tokenised.
        answers: of a score that chooses, and of one that confirms; of each prompt all its samples.
        cluster: what it runs on, or is to.

    Returns:
        None where the engine or the shape of the model is not known, or the cluster has too few GPUs.

    Raises:
        ShapeError: The model has no config.
    """
    run = search.run
    if not plannable(run):
        return None
    shape = known_shape(run.model.path, trust_remote_code=run.model.trust_remote_code)
    if shape is None:
        return None
    scoring = search.config.scoring
    try:
        planned = plan_alone(run, shape, cluster, of_artifact(tokens))
        choosing, confirming = (
            plan_scoring(scoring, shape, cluster, prompts=number // scoring.asking.samples) for number in answers
        )
        return plan_search(
            search.config, planned, points=search.points, choosing=choosing, confirming=confirming, cluster=cluster
        )
    except PlanError as error:  # of what is there now: an autoscaler may add to it
        logger.warning("hours of %s are not known: %s", search.size, error)
        return None
