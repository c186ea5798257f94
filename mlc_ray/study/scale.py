"""A scaling study: of each size the layer and lambda are searched, with seeds, and confirmed; then sizes are compared.

Its cells are searches (`search.run`), one after another, each with all that the cluster has: it probes, trains, scores
by engines that stay warm, trains the best again with further seeds, and confirms them on bundles that chose none of
them. A search that fails is a row that says so. What a killed study finished is not done again: a search goes on by its
own folder, and one that is over is not begun.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlc_ray.cluster import connect, use_gpu
from mlc_ray.config import ScaleConfig
from mlc_ray.lease import lease
from mlc_ray.log_files import log_file
from mlc_ray.logs import keep_in
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.there import known_cluster
from mlc_ray.report.scale import SizeBudget
from mlc_ray.report.study import StudyResult
from mlc_ray.runs import SCALE_FILE, output_place
from mlc_ray.search.checks import check_search
from mlc_ray.search.run import search
from mlc_ray.storage import Place, local_side
from mlc_ray.study.budget import budget_of, budget_on
from mlc_ray.study.failing import failing
from mlc_ray.study.folder import StudyError
from mlc_ray.study.scale_record import ScaleRecorder
from mlc_ray.study.searches import ScalePlan, check_scale_goes_on, is_over, load_scale, make_searches

logger = logging.getLogger(__name__)


def scale(config: ScaleConfig) -> StudyResult:
    """Run a scaling study to its end; writes and returns what it found.

    With `resume: auto` an existing folder is gone on with: sizes and trials may have been added.

    Raises:
        ConfigError: a search would be invalid.
        StudyError: the folder exists already, with `resume: auto` with another study; or no size got a result.
        ClusterError: the cluster can never hold one of the searches.
        LeaseError: another driver works in the folder.
        PreemptedError: the driver got SIGTERM; the study can be gone on with.
        MlcRayError: what reading data and models raises, before any search starts.
    """
    folder = scale_folder(config)
    plan = ScalePlan(config, make_searches(config, folder))
    exists = (folder / SCALE_FILE).is_file()
    if exists and config.resume == "never":
        raise StudyError(
            f"study folder {str(folder)!r} exists already: choose another name, remove it, or go on with it by "
            f"`mlc-ray scale --resume {folder}` or by resume=auto"
        )
    if exists:
        check_scale_goes_on(plan, folder)
    _connect(plan, folder)
    with lease(folder, wait=config.resume == "auto"), log_file(plan.searches[0].run.logging, folder):
        plan = replace(plan, budget=state_budget(plan, folder))
        plan.save(folder)
        return _scale(load_scale(folder), folder)


def resume_scale(folder: Path | Place) -> StudyResult:
    """Go on with the scaling study in a folder, with the settings it has; searches that failed are tried again.

    Raises:
        StudyError: the folder holds none. Other errors are those of `scale`.
    """
    place = Place(folder).absolute()
    plan = load_scale(place)
    _connect(plan, place)
    with lease(place, wait=plan.config.resume == "auto"), log_file(plan.searches[0].run.logging, place):
        return _scale(load_scale(place), place)


def scale_budget(config: ScaleConfig, cluster: Cluster | None = None) -> tuple[SizeBudget, ...]:
    """What a study would take, and nothing else.

    Args:
        config: the study.
        cluster: what it is to run on (default: the cluster that is there, which must then hold each search, and
            bundles are tokenised for it). For one that is named Ray is not started and nothing is written, and a size
            that it cannot hold has a `fault`.
    """
    folder = scale_folder(config)
    plan = ScalePlan(config, make_searches(config, folder))
    if cluster is not None:
        parameters = {name: size.parameters for name, size in config.sizes.items()}
        return tuple(budget_on(each, folder, parameters[each.size], cluster) for each in plan.searches)
    _connect(plan, folder)
    return state_budget(plan, folder)


def scale_folder(config: ScaleConfig) -> Place:
    """Where a study is."""
    return (output_place(config.output_dir) / config.name).absolute()


def state_budget(plan: ScalePlan, folder: Place) -> tuple[SizeBudget, ...]:
    """Check that the cluster that is there can hold each search, and count what it takes."""
    found = []
    for each in plan.searches:
        check_search(each.config, each.space)
        on = known_cluster(gpu=use_gpu(each.run.cluster.accelerator), labels=each.run.cluster.label_selector)
        found.append(budget_of(each, folder, plan.config.sizes[each.size].parameters, on))
        logger.info(
            "%s: %d runs of %d steps, at most %s tokens, %.2g operations, %s answers to score%s", each.size,
            found[-1].runs, found[-1].steps, f"{found[-1].tokens:,}", found[-1].operations, f"{found[-1].answers:,}",
            "" if found[-1].hours is None else f", {found[-1].hours:.3g} hours",
        )  # fmt: skip
    return tuple(found)


def _connect(plan: ScalePlan, folder: Place) -> None:
    keep_in(local_side(folder))
    cluster = plan.searches[0].run.cluster
    connect(cluster.address, cluster.env)


def _scale(plan: ScalePlan, folder: Place) -> StudyResult:
    """The lease on the folder is held."""
    recorder = ScaleRecorder(plan, folder, gpu=use_gpu(plan.searches[0].run.cluster.accelerator))
    for each in plan.searches:
        if is_over(each, folder):
            continue
        logger.info("searching %s", each.size)
        with failing(recorder.failures, each.size, again=f"mlc-ray scale --resume {folder}", ends=()):
            search(each.config)
        recorder.write()
    result = recorder.write()
    if result.scaling is None or not result.scaling.points:
        raise StudyError(f"no size of study {str(folder)!r} got a result; {_first(recorder.failures, plan)}")
    return result


def _first(failures: dict[str, str], plan: ScalePlan) -> str:
    found: Sequence[str] = [each.size for each in plan.searches if each.size in failures]
    return f"the first fault, of {found[0]}: {failures[found[0]]}" if found else "nothing was confirmed"
