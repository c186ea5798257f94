"""`mlc-ray plan`: what a run, a score or a search needs; nothing is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from mlc_ray.config import (
    ClusterSection,
    ConfigError,
    ScoreConfig,
    ScoringSection,
    SearchConfig,
    TrainConfig,
    load_config,
)
from mlc_ray.errors import MlcRayError
from mlc_ray.monitoring import ray_is_up
from mlc_ray.plan.check import check_run
from mlc_ray.plan.check_engines import check_beside, check_engine
from mlc_ray.plan.cutting import steps_of
from mlc_ray.plan.hardware import Cluster, cluster_of, with_workers
from mlc_ray.plan.lengths import Weighing, weights_of
from mlc_ray.plan.nearest import Fitting, cheapest, fitting
from mlc_ray.plan.rates import rates_of, threads_of
from mlc_ray.plan.records import RunPlan
from mlc_ray.plan.runs import NoRoomError, PlanError, check_room, dtype_of, plan_run, plannable
from mlc_ray.plan.scores import ScorePlan, plan_scoring, plan_search
from mlc_ray.plan.shapes import Shape, ShapeError, config_of, counted, is_quantised, shape_of
from mlc_ray.plan.show import run_json, run_lines, score_json, score_lines, search_json, search_lines
from mlc_ray.plan.there import cluster_here, grows, most_on_cpus
from mlc_ray.score.counted_prompts import Prompts, prompts_of

_CLUSTER = ("gpus", "gpu", "gpus_per_node", "node_memory")


class DoesNotFitError(MlcRayError):
    """What was planned does not fit; the plan that was printed says what lacks, and what fits."""

    exit_status = 1


def plan_command(arguments: argparse.Namespace) -> None:
    """`mlc-ray plan`.

    Raises:
        ConfigError: There is nothing to plan, or options do not go together.
        DoesNotFitError: The run, or the engine of the score, does not fit; the plan is printed all the same.
    """
    if arguments.simulate is not None:
        _refuse(arguments, "--simulate", (*_CLUSTER, "config", "shape", "calibrate", "kind"), "give settings by --set")
        if find_spec("simpy") is None:
            raise ConfigError("plan --simulate needs simpy, which is not installed: pip install 'mlc_ray[plan]'")
        from mlc_ray.cli.simulation import simulate_command

        simulate_command(arguments)
        return
    if arguments.config is None:
        raise ConfigError("plan needs --config FILE (see configs/), or recipe:NAME; or --simulate FILE")
    if arguments.calibrate:
        _refuse(
            arguments, "--calibrate", (*_CLUSTER, "shape", "kind"), "this machine is measured, with the model of a run"
        )
        _calibrate(arguments)
        return
    kinds: dict[str, Any] = {"train": _train, "score": _score, "search": _search}
    try:
        lines, found = kinds[arguments.kind or "train"](arguments)
    except NoRoomError as error:
        if arguments.json:
            none = {"fits": False, "refused": str(error)}
            print(json.dumps({"search": none} if arguments.kind == "search" else none, indent=2))
        raise DoesNotFitError(str(error)) from None
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines))
    parts = [found] if "fits" in found else found.values()
    if not all(part["fits"] for part in parts):
        raise DoesNotFitError("it does not fit; what lacks is in the plan that was printed")


def _refuse(arguments: argparse.Namespace, beside: str, names: Sequence[str], why: str) -> None:
    """Refuse options that nothing would read."""
    for name in names:
        if value := getattr(arguments, name):
            option = "for" if name == "kind" else name.replace("_", "-")
            said = f"--{option}" if value is True else f"--{option} {value}"
            raise ConfigError(f"{said} is not read with {beside}: {why}; remove it")


def named_cluster(arguments: argparse.Namespace) -> Cluster | None:
    """The cluster that `--gpus` and what belongs to it name; None where they name none.

    Raises:
        ConfigError: What belongs to it is there without it.
        HardwareError: The GPU is not known, or the number of GPUs is no multiple of a node's.
    """
    if arguments.gpus is None:
        for name in _CLUSTER[1:]:
            if (value := getattr(arguments, name)) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value} says what --gpus N are; give that too, or remove it"
                )
        return None
    memory = None if arguments.node_memory is None else int(arguments.node_memory * 2**30)
    return cluster_of(
        arguments.gpus, arguments.gpu or "h100", per_node=arguments.gpus_per_node or 8, node_memory=memory
    )


def _run_on(arguments: argparse.Namespace, section: ClusterSection) -> Cluster:
    """Where a run with this section is planned."""
    named = named_cluster(arguments)
    if named is not None:
        return named
    return cluster_here(section.address, accelerator=section.accelerator, labels=section.label_selector)


def _shape(arguments: argparse.Namespace, path: str, *, trust_remote_code: bool) -> Shape:
    config, name = config_of(arguments.shape or path, trust_remote_code=trust_remote_code)
    if is_quantised(config):
        raise ShapeError(
            f"the weights of {name!r} are quantised, whose memory is not planned; name a model with plain weights by "
            "--shape"
        )
    return counted(shape_of(config, name), config, trust_remote_code=trust_remote_code)


class _Runs:
    """Plans of runs of one model on one cluster."""

    def __init__(self, arguments: argparse.Namespace, base: TrainConfig, cluster: Cluster, *, workers: int) -> None:
        from mlc_ray.runs import artifact_cache
        from mlc_ray.storage import Place

        self.shape = _shape(arguments, base.model.path, trust_remote_code=base.model.trust_remote_code)
        self.cluster, self.workers = with_workers(cluster, workers), workers
        self.weights = Weighing(lambda run: weights_of(run, artifact_cache(Place(run.output_dir))))

    def plan(self, config: TrainConfig) -> RunPlan:
        """The plan of a run."""
        return plan_run(config, self.shape, self.cluster, self.weights(config), **self._given(config))

    def cheapest(self, config: TrainConfig) -> Fitting | None:
        """The cheapest of the settings that fit."""
        return cheapest(fitting(config, self.shape, self.cluster, self.weights(config), **self._given(config)))

    def _given(self, config: TrainConfig) -> dict[str, Any]:
        dtype = dtype_of(config.model.dtype, self.cluster)
        rates = rates_of(self.cluster.gpu, dtype, threads=threads_of(config))
        return {"rates": rates, "dtype": dtype, "workers": self.workers}


def _train(arguments: argparse.Namespace) -> tuple[Sequence[str], Any]:
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    section = config.cluster
    cluster = _run_on(arguments, section)
    # All GPUs that are named; of a cluster that is there, as many as the run takes.
    workers = arguments.gpus or (section.most_workers if cluster.gpu is not None else most_on_cpus(section))
    if arguments.gpus is None and cluster.gpu is not None and not (ray_is_up() and grows()):
        check_room(section, cluster, workers=section.least_workers)
        workers = min(workers, cluster.gpus)
    runs = _Runs(arguments, config, cluster, workers=workers)
    plan = runs.plan(config)
    if "workers" in section.model_fields_set and arguments.gpus not in (None, section.most_workers):
        said = f"all {workers} GPUs of --gpus, not cluster.workers={section.workers}"
        plan = replace(plan, assumed=(*plan.assumed, said))
    refused = None
    if section.least_workers < section.most_workers and section.plan == "check":  # what `train` looks at
        few = _as_planned(config, arguments.shape or config.model.path, cluster)
        refused = _refused(
            lambda: check_run(few, gpu=cluster.gpu is not None, weights=runs.weights(few), cluster=cluster)
        )
    best = runs.cheapest(config)
    return run_lines(plan, best, refused), run_json(plan, best, refused)


def _score(arguments: argparse.Namespace) -> tuple[Sequence[str], Any]:
    defaults = {"model": arguments.shape} if arguments.shape is not None else {}
    config = load_config(ScoreConfig, arguments.config, arguments.overrides, defaults=defaults)
    cluster = named_cluster(arguments) or cluster_here(
        config.address, accelerator=config.accelerator, labels=config.engine.label_selector
    )
    shape = _shape(arguments, config.model, trust_remote_code=config.engine.trust_remote_code)
    plan = _scored(config, shape, cluster, prompts_of(config.benchmarks, config, config.limit))
    gpu, on = cluster.gpu is not None, _to_check(arguments, cluster)
    refused = _refused(lambda: check_engine(arguments.shape or config.model, config, gpu=gpu, cluster=on))
    return score_lines(plan, refused), score_json(plan, refused)


def _to_check(arguments: argparse.Namespace, cluster: Cluster) -> Cluster | None:
    """What checks look at; None where that is a cluster that was joined, which they ask as the command itself does."""
    return cluster if arguments.gpus is not None or not ray_is_up() else None


def _refused(check: Callable[[], None]) -> str | None:
    """What the command itself would refuse by; None where it would start."""
    try:
        check()
    except PlanError as error:
        return str(error)
    return None


def _scored(scoring: ScoringSection, shape: Shape, cluster: Cluster, prompts: Prompts) -> ScorePlan:
    from mlc_ray.score.plan import with_longest_answer

    plan = plan_scoring(with_longest_answer(scoring), shape, cluster, prompts=len(prompts))
    return replace(plan, counted=prompts.assumed)


def _search(arguments: argparse.Namespace) -> tuple[Sequence[str], Any]:
    from mlc_ray.search.selection import count_asked
    from mlc_ray.search.space import make_space
    from mlc_ray.search.tune import number_of_points

    config = load_config(SearchConfig, arguments.config, arguments.overrides)
    space = make_space(config)
    base = space.run(next(iter(space.corners())), name="corner")
    cluster = _run_on(arguments, base.cluster)
    planned = _Runs(arguments, base, cluster, workers=base.cluster.most_workers)
    longest = space.heaviest(lambda trial: planned.plan(trial).wall_seconds if plannable(trial) else 0.0)
    run, best = planned.plan(longest), planned.cheapest(longest)
    scoring, points = config.scoring, number_of_points(config, space)
    choosing, confirming = (_scored(scoring, planned.shape, cluster, prompts) for prompts in count_asked(config))
    most = space.heaviest(lambda trial: steps_of(trial, planned.weights(trial)))
    steps = steps_of(most, planned.weights(most))
    plan = plan_search(
        config, run, points=points, choosing=choosing, confirming=confirming, cluster=cluster, steps=steps
    )
    said = [f"each trial takes as long as that of {space.values_in(longest)}, which takes longest"]
    if not all(plannable(space.run(values, name="corner")) for values in space.corners()):
        said.append("nothing of trials with another engine than deepspeed, whose memory and time are not known")
    plan = replace(plan, assumed=(*plan.assumed, *said))
    model, gpu, on = arguments.shape or base.model.path, cluster.gpu is not None, _to_check(arguments, cluster)
    lacks = _refused(lambda: check_engine(model, scoring, gpu=gpu, cluster=on))
    runs = [_as_planned(space.run(corner, name="corner"), model, cluster) for corner in space.corners()]
    refused: str | None = None
    together = False
    if base.cluster.plan == "check":
        try:
            for each in runs:
                check_run(each, gpu=gpu, weights=planned.weights(each), cluster=on)
            if not gpu:
                together = check_beside(scoring, runs, at_once=min(config.concurrency, plan.trials), cluster=on)
        except PlanError as error:
            refused = str(error)
    lines = [*run_lines(run, best), "", *score_lines(choosing, lacks), ""]
    parts = {"run": run_json(run, best), "score": score_json(choosing, lacks), "search": search_json(plan, refused)}
    return [*lines, *search_lines(plan, refused, checks=base.cluster.plan, together=together)], parts


def _as_planned(run: TrainConfig, model: str, cluster: Cluster) -> TrainConfig:
    """A run of the model that is planned, its type decided."""
    changed = {"path": model, "dtype": dtype_of(run.model.dtype, cluster)}
    return run.model_copy(update={"model": run.model.model_copy(update=changed)})


def _calibrate(arguments: argparse.Namespace) -> None:
    from mlc_ray.plan.rates import write_calibration
    from mlc_ray.train.calibrate import calibrate

    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    rates = calibrate(config)
    file = write_calibration(rates)
    if arguments.json:
        print(json.dumps(asdict(rates), indent=2))
        return
    gaps = f", and {rates.grown:.2f} times that stays after many" if rates.grown else ""
    if rates.lora_flops is not None and rates.lora_forward_seconds is not None:
        gaps += f", with adapters {rates.lora_flops / 1e9:.4g}e9 and {rates.lora_forward_seconds:.2g} s"
    crowd = f", {rates.crowded:.0%} of that speed for each of {rates.crowd} workers at once" if rates.crowd > 1 else ""
    print(
        f"{rates.device}, {rates.dtype}: {rates.flops / 1e9:.4g}e9 useful operations a second, "
        f"{rates.forward_seconds:.2g} s a block and forward beside its tokens, AdamW {rates.adamw:.3g} parameters a "
        f"second, activations {rates.kept:.2f} times what is counted{gaps}{crowd}; kept in {file}"
    )
