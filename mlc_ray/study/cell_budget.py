"""What a study takes, counted before its first cell: hours, memory, disk, and what its judge asks of endpoints."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from mlc_ray.config import ConfigError, ScoringSection, StudyConfig, TrainConfig
from mlc_ray.data.sources import is_here
from mlc_ray.errors import MlcRayError
from mlc_ray.plan.check import broken, said
from mlc_ray.plan.check_engines import check_engine
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import PROMPT, Weigh, Weighing, weights_of
from mlc_ray.plan.records import RunPlan
from mlc_ray.plan.runs import PlanError, plan_alone, plannable
from mlc_ray.plan.scores import plan_scoring
from mlc_ray.plan.shapes import Shape, known_shape
from mlc_ray.plan.there import cluster_here
from mlc_ray.runs import CELLS_FOLDER, artifact_cache, output_place
from mlc_ray.score.asked import Asked, asked_to_judge
from mlc_ray.score.counted_prompts import Prompts, prompts_of
from mlc_ray.study.budget_tables import MethodBudget, ScoringBudget, StudyBudget, study_budget_lines
from mlc_ray.study.cells import Cell, make_cells, scoring_of

logger = logging.getLogger(__name__)


def study_budget(config: StudyConfig, cluster: Cluster | None = None) -> StudyBudget:
    """What a study would take on a cluster (default: the one that it would join, or this machine).

    Nothing is started, downloaded or written.

    Raises:
        ConfigError: a cell's settings are invalid.
        HardwareError: a GPU that is there is neither in the table nor calibrated.
        MlcRayError: what reading benchmarks that are here raises.
    """
    cells = make_cells(config)
    scoring = scoring_of(config, cells)
    cached = artifact_cache(output_place(config.output_dir) / config.name / CELLS_FOLDER)
    weigh = Weighing(lambda run: weights_of(run, cached))
    asked = prompts_of(scoring.benchmarks, scoring, scoring.limit)
    section = cells[0].config.cluster
    if cluster is None:
        cluster = cluster_here(section.address, accelerator=section.accelerator, labels=section.label_selector)
    return budget_of_cells(cells, scoring, asked, weigh, cluster, keep_models=config.keep_models)


def state_budget(
    cells: Sequence[Cell], scoring: ScoringSection, prompts: Prompts, weigh: Weigh, cluster: Cluster | None, *,
    keep_models: bool,
) -> None:  # fmt: skip
    """Log what a study that begins takes, all of it: also what is done already where it goes on."""
    if cluster is None:
        return  # its GPUs are not known, which is logged
    try:
        budget = budget_of_cells(cells, scoring, prompts, weigh, cluster, keep_models=keep_models)
    except MlcRayError as error:  # a damaged calibration: what is only said stops nothing
        logger.warning("what the study takes is not known: %s", error)
        return
    for line in study_budget_lines(budget):
        logger.info("%s", line)


def budget_of_cells(
    cells: Sequence[Cell], scoring: ScoringSection, prompts: Prompts, weigh: Weigh, cluster: Cluster, *,
    keep_models: bool,
) -> StudyBudget:  # fmt: skip
    """The budget of these cells and their scores.

    Args:
        cells: of a study.
        scoring: its longest answer is decided.
        prompts: what every model is asked.
        weigh: what a run's bundles weigh.
        cluster: what it runs on, or is to.
        keep_models: whether models stay once they are scored.
    """
    methods, scores, folders = list[MethodBudget](), list[ScoringBudget](), list[tuple[str, int, RunPlan]]()
    lengths, guessed = dict[str, None](), list[TrainConfig]()
    models = list(dict.fromkeys(cell.model for cell in cells))
    for model in models:
        own = [cell for cell in cells if cell.model == model]
        shape, fault = _shape(model, own[0].config)
        if shape is None:
            methods += [
                MethodBudget(model=model, method=name, runs=number, fault=fault)
                for name, number in Counter(cell.method for cell in own).items()
            ]
            scores.append(_scores(model, own, scoring, prompts, None, cluster, fault))
            continue
        for method, number in Counter(cell.method for cell in own).items():
            run = next(cell.config for cell in own if cell.method == method)
            weights = weigh(run)
            lengths[f"data: {weights.said}"] = None
            guessed += [run] if weights.said.startswith("assumed") else []
            try:
                plan = plan_alone(run, shape, cluster, weights)
            except (ConfigError, PlanError) as error:  # a layer that the model lacks, or what does not fit
                fits = False if plannable(run) else None
                fault = f"{model} {method}: {error}"
                methods.append(MethodBudget(model=model, method=method, runs=number, fits=fits, fault=fault))
                continue
            methods.append(_runs(model, method, number, plan, cluster))
            folders.append((model, number, plan))
        scores.append(_scores(model, own, scoring, prompts, shape, cluster))
    numbers = [each.scores for each in scores]
    asked, caps = _asked(scoring, prompts, scores=sum(numbers), most=max(numbers))
    assumed = [*(plan.assumed for *_, plan in folders), *(each.assumed for each in scores), prompts.assumed]
    return StudyBudget(
        "cpu" if cluster.gpu is None else f"{cluster.gpus} x {cluster.gpu.name}",
        tuple(methods), tuple(scores), asked, _disk(folders, keep_models=keep_models),
        (*lengths, *caps), tuple(dict.fromkeys(chain.from_iterable(assumed))),
        assumed_of=(*_assumed_of_bundles(guessed), *(["numbers of prompts"] if prompts.assumed else [])),
    )  # fmt: skip


def _assumed_of_bundles(runs: Sequence[TrainConfig]) -> list[str]:
    """What is assumed of the bundles of runs whose weights are: where sources are here, they are counted."""
    if not runs:
        return []
    counted = all(is_here(source) for run in runs for source in run.data.train)
    return ["lengths of bundles" if counted else "numbers and lengths of bundles"]


def _shape(model: str, run: TrainConfig) -> tuple[Shape | None, str]:
    """The shape of a model; or None, and why it is not known."""
    try:
        shape = known_shape(run.model.path, trust_remote_code=run.model.trust_remote_code)
    except MlcRayError as error:
        return None, f"{model}: {error}"
    return shape, "" if shape is not None else f"{model}: the shape of {run.model.path} is not known"


def _asked(scoring: ScoringSection, prompts: Prompts, *, scores: int, most: int) -> tuple[tuple[Asked, ...], list[str]]:
    """What all scores ask of endpoints, and what is to be said of their caps, which hold for the scores of a model.

    Each section of an endpoint has a purse of its own; `most` are the scores of the model that has most of them.
    """
    samples = scoring.asking.samples
    one = [(*of, float(PROMPT)) for of, number in prompts.cells.items() for _ in range(number * samples)]
    asked = list(asked_to_judge(scoring.judge, one, scoring.max_new_tokens or 1))
    said = dict[str, None]()
    for each in asked:
        if each.cap is None:
            continue
        usd = most * (each.usd or 0.0)
        fault = "" if usd <= each.cap else f", which may take ${usd:,.2f}: what it leaves unasked is unparsed"
        said[f"max_cost_usd={each.cap:g} of {each.model} is a cap for all scores of one model{fault}"] = None
    return tuple(each.times(scores) for each in asked), list(said)


def _runs(model: str, method: str, number: int, plan: RunPlan, cluster: Cluster) -> MethodBudget:
    """The reference is asked once: seeds share what it said."""
    memory = plan.memory
    needs, limit = memory.worker_bytes, memory.worker_limit
    if not memory.fits:
        _, _, needs, limit = broken(memory)
    seconds = number * (plan.wall_seconds - plan.reference_seconds) + plan.reference_seconds
    idle = _idle(plan.workers, cluster) if memory.worker_bytes > memory.worker_limit else ""
    fault = "" if memory.fits else f"{model} {method}: {said(plan)}{idle}"
    return MethodBudget(
        model=model, method=method, runs=number, steps=plan.steps, hours=seconds / 3600,
        gpu_hours=plan.workers * seconds / 3600, needs=needs, limit=limit, fits=memory.fits, fault=fault,
    )  # fmt: skip


def _idle(workers: int, cluster: Cluster) -> str:
    """That a run leaves GPUs idle which might hold what does not fit."""
    if cluster.gpu is None or workers == cluster.gpus:
        return ""
    return f"; it takes cluster.workers={workers} of {cluster.gpus} GPUs"


def _scores(
    model: str, own: Sequence[Cell], scoring: ScoringSection, prompts: Prompts, shape: Shape | None, cluster: Cluster,
    fault: str = "",
) -> ScoringBudget:  # fmt: skip
    """The model before training is scored too; engines, also of judges and translators, start once."""
    number = 1 + len(own)
    counted = ScoringBudget(model=model, scores=number, answers=number * len(prompts) * scoring.asking.samples)
    if shape is None:
        return replace(counted, fault=fault)
    try:
        plan = plan_scoring(scoring, shape, cluster, prompts=len(prompts))
    except PlanError as error:
        return replace(counted, fits=False, fault=f"engines of {model}: {error}")
    try:
        check_engine(own[0].config.model.path, scoring, gpu=cluster.gpu is not None, cluster=cluster)
    except PlanError as error:
        fault = f"engines of {model}: {error}"
    start = plan.wall_seconds - plan.working_seconds
    parts = (plan, *plan.readers)
    held = sum(each.gpus * (each.start + number * (each.seconds - each.start)) for each in parts)
    engine = next((each.engine for each in parts if not each.engine.fits), plan.engine)
    return replace(
        counted, hours=(start + number * plan.working_seconds) / 3600, gpu_hours=held / 3600, needs=engine.bytes,
        limit=engine.limit, fits=not fault, fault=fault, assumed=plan.assumed,
    )  # fmt: skip


def _disk(folders: Sequence[tuple[str, int, RunPlan]], *, keep_models: bool) -> int | None:
    """Models that are kept, and the checkpoints of the run that has most; those of others are removed by then."""
    if not folders:
        return None
    kept: dict[str, int] = {}
    for model, number, plan in folders:
        weights = (2 if plan.settings["model.dtype"] == "bfloat16" else 4) * plan.parameters  # whole, adapters merged
        kept[model] = kept.get(model, 0) + number * weights
    models = sum(kept.values()) if keep_models else max(kept.values())
    return models + max(plan.memory.disk_bytes for _, _, plan in folders)
