"""`mlc-ray plan`: what a run, a score or a search needs; nothing is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlc_ray.config import ConfigError, ScoreConfig, ScoringSection, SearchConfig, TrainConfig, load_config
from mlc_ray.plan.hardware import Cluster, cluster_of, gpu_of
from mlc_ray.plan.lengths import Weights, weights_of
from mlc_ray.plan.nearest import Fitting, cheapest, fitting
from mlc_ray.plan.rates import Rates, rates_of
from mlc_ray.plan.records import RunPlan
from mlc_ray.plan.runs import plan_run
from mlc_ray.plan.scores import ScorePlan, plan_score, plan_search
from mlc_ray.plan.shapes import Shape, config_of, counted, shape_of
from mlc_ray.plan.show import run_json, run_lines, score_json, score_lines, search_lines
from mlc_ray.plan.there import cluster_there, this_machine, with_workers


def plan_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray plan`.

    Raises:
        ConfigError: There is nothing to plan.
    """
    if arguments.config is None:
        raise ConfigError("plan needs --config FILE (see configs/), or recipe:NAME")
    if arguments.calibrate:
        _calibrate(arguments)
        return
    kinds: dict[str, Any] = {"train": _train, "score": _score, "search": _search}
    lines, found = kinds[arguments.schema_of](arguments, _cluster(arguments))
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines))


def _cluster(arguments: argparse.Namespace) -> Cluster:
    """The one that is asked for, the one that is there, or this machine."""
    if arguments.gpus is not None:
        memory = None if arguments.node_memory is None else int(arguments.node_memory * 2**30)
        return cluster_of(arguments.gpus, arguments.gpu, per_node=arguments.gpus_per_node, node_memory=memory)
    from mlc_ray.cluster import connect, running, use_gpu

    if running() is not None:
        connect("auto")
        if (there := cluster_there(gpu=use_gpu("auto"))) is not None:
            return there
    import torch

    if torch.cuda.is_available():
        number = torch.cuda.device_count()
        return Cluster(gpu_of(torch.cuda.get_device_name()), number, number, None)
    return this_machine()


def _shape(arguments: argparse.Namespace, path: str, *, trust_remote_code: bool) -> Shape:
    config, name = config_of(arguments.shape or path, trust_remote_code=trust_remote_code)
    return counted(shape_of(config, name), config)


def _dtype(said: str, cluster: Cluster) -> str:
    from mlc_ray.device import resolved

    return "bfloat16" if said == "auto" and cluster.gpu is not None else resolved(said, gpu=False)


def _run(arguments: argparse.Namespace, config: TrainConfig, cluster: Cluster) -> tuple[RunPlan, Fitting | None, Shape]:
    from mlc_ray.runs import artifact_cache
    from mlc_ray.storage import Place

    shape = _shape(arguments, config.model.path, trust_remote_code=config.model.trust_remote_code)
    # All GPUs that are asked for; of a cluster that is there, as many as the run takes.
    workers = arguments.gpus or config.cluster.most_workers
    cluster = with_workers(cluster, workers)
    weights: Weights = weights_of(config, artifact_cache(Place(config.output_dir)))
    dtype = _dtype(config.model.dtype, cluster)
    rates: Rates = rates_of(cluster.gpu, dtype)
    plan = plan_run(config, shape, cluster, weights, rates, dtype=dtype, workers=workers)
    found = fitting(config, shape, cluster, weights, rates, dtype=dtype, workers=workers)
    return plan, cheapest(found), shape


def _train(arguments: argparse.Namespace, cluster: Cluster) -> tuple[Sequence[str], Any]:
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    plan, best, _ = _run(arguments, config, cluster)
    return run_lines(plan, best), run_json(plan, best)


def _score(arguments: argparse.Namespace, cluster: Cluster) -> tuple[Sequence[str], Any]:
    defaults = {"model": arguments.shape} if arguments.shape is not None else {}
    config = load_config(ScoreConfig, arguments.config, arguments.overrides, defaults=defaults)
    shape = _shape(arguments, config.model, trust_remote_code=config.engine.trust_remote_code)
    plan = _scored(config, shape, cluster)
    return score_lines(plan), score_json(plan)


def _scored(scoring: ScoringSection, shape: Shape, cluster: Cluster) -> ScorePlan:
    from mlc_ray.score.plan import with_longest_answer

    decided = with_longest_answer(scoring)
    dtype = _dtype("float32" if scoring.engine.dtype == "float32" else scoring.engine.dtype, cluster)
    engine = scoring.engine.model_copy(update={"dtype": dtype})
    return plan_score(
        shape, engine, cluster, rates_of(cluster.gpu, dtype), prompts=_prompts(scoring), prompt_tokens=68,
        answer_tokens=decided.max_new_tokens or 1,
    )  # fmt: skip


def _prompts(scoring: ScoringSection) -> int:
    """Prompts of the benchmarks that are here; of others as many as the published test set has, in ten languages."""
    from mlc_ray.data.sources import Reading, resolve_source
    from mlc_ray.types import Bundle

    number = 0
    for source in scoring.benchmarks:
        if not (source.path.startswith("sample:") or Path(source.path).expanduser().exists()):
            number += 180 * len(scoring.languages or range(10))
            continue
        for file in resolve_source(source):
            bundles = [row.parsed for row in Reading(file).rows() if isinstance(row.parsed, Bundle)]
            asked = bundles if scoring.limit is None else bundles[: 2 * scoring.limit]
            number += sum(len(set(bundle.prompts) & set(scoring.languages or bundle.prompts)) for bundle in asked)
    return number


def _search(arguments: argparse.Namespace, cluster: Cluster) -> tuple[Sequence[str], Any]:
    from mlc_ray.search.space import make_space
    from mlc_ray.search.tune import number_of_points

    config = load_config(SearchConfig, arguments.config, arguments.overrides)
    space = make_space(config)
    base = space.run(next(iter(space.corners())), name="corner")
    run, best, shape = _run(arguments, base, cluster)
    score = _scored(config.scoring, shape, cluster)
    trials = number_of_points(config, space) * config.repeats
    at_once = max(1, (cluster.gpus if cluster.gpu is not None else 1) // run.workers)
    plan = plan_search(
        trials=trials, at_once=min(trials, at_once), run_seconds=run.wall_seconds, run_gpus=run.workers, score=score,
        scores=1,
    )  # fmt: skip
    lines = [*run_lines(run, best), "", *score_lines(score), "", *search_lines(plan)]
    return lines, {"run": run_json(run, best), "score": score_json(score), "search": vars(plan)}


def _calibrate(arguments: argparse.Namespace) -> None:
    from mlc_ray.plan.rates import write_calibration
    from mlc_ray.train.calibrate import calibrate

    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    rates = calibrate(config)
    file = write_calibration(rates)
    print(
        f"{rates.device}, {rates.dtype}: {rates.flops / 1e9:.4g}e9 useful operations a second, "
        f"{rates.forward_seconds:.2g} s a block and forward beside its tokens, AdamW {rates.adamw:.3g} parameters a "
        f"second, activations {rates.kept:.2f} times what is counted; kept in {file}"
    )
