"""The plan of a score: its engines, the time of prompts and answers, and of judging. And that of a search."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlc_ray.config import EngineSection, ScoringSection, SearchConfig
from mlc_ray.config.search import PROBE_LIMIT
from mlc_ray.plan.engines import EnginePlan, Engines, plan_engine, readers_of, room_of
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import HEAD, PROMPT
from mlc_ray.plan.rates import rates_of, said_of
from mlc_ray.plan.records import RunPlan
from mlc_ray.plan.runs import NoRoomError, dtype_of
from mlc_ray.plan.shapes import Shape

START_GPU, START_CPU = 72.0, 13.0
"""Seconds until an engine answers: vLLM 0.25 on an H100 with its graphs, vLLM 0.32 on two CPU cores."""

_LEFT_OUT = "no time for data to be prepared, for the start of each run and of a probe, and for what fails"
CPU_BANDWIDTH = 1e10
"""Bytes a second that a CPU core reads, assumed."""


@dataclass(frozen=True)
class ScorePlan:
    """Engines of one model, and the seconds from their start to the last answer; of a score, those that answer.

    Attributes:
        of: the model's name.
        prompts: that they are asked.
        replicas: engines.
        gpus: of all of them; on CPUs as many as there are engines.
        gpu: what they run on.
        engine: one of them.
        start: seconds of `seconds` until engines answer.
        seconds: of all, without the readers.
        rates: what was assumed of their speed.
        readers: the engines of judges, guards and translators, each asked at most every response; none of theirs.
        unknown: models of such engines that are not planned, by the names of their settings.
        counted: what was assumed of the prompts, each as a sentence.
    """

    of: str
    prompts: int
    replicas: int
    gpus: int
    gpu: str
    engine: EnginePlan
    start: float
    seconds: float
    rates: str
    readers: tuple[ScorePlan, ...] = ()
    unknown: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()

    @property
    def wall_seconds(self) -> float:
        """Answering and judging, one after the other, as where they share devices."""
        return self.seconds + sum(each.seconds for each in self.readers)

    @property
    def working_seconds(self) -> float:
        """The same, with engines that are up."""
        return self.wall_seconds - self.start - sum(each.start for each in self.readers)

    @property
    def assumed(self) -> tuple[str, ...]:
        """What was assumed, and what is left out, each as a sentence."""
        rates = dict.fromkeys(each.rates for each in (self, *self.readers))
        left_out = (f"nothing for the engines of {each}, which are not known" for each in self.unknown)
        return (*self.counted, *rates, *left_out)

    @property
    def held(self) -> int:
        """GPUs of all its engines."""
        return self.gpus + sum(each.gpus for each in self.readers)

    @property
    def gpu_hours(self) -> float:
        """All GPUs of each model, while its engines work."""
        return self.gpus * self.seconds / 3600 + sum(each.gpu_hours for each in self.readers)


@dataclass(frozen=True)
class SearchPlan:
    """A search, its confirmation too, at most: no trial is stopped early.

    `runs` are those of trials and of the best again with further seeds; `scores` those that choose and that confirm.
    `probe_seconds` are those of the probe before, which are in `seconds`. `assumed` is what is left out of them, each
    as a sentence.
    """

    trials: int
    at_once: int
    runs: int
    scores: tuple[int, int]
    seconds: float
    gpu_hours: float
    gpu: str
    probe_seconds: float
    assumed: tuple[str, ...]


def plan_score(
    shape: Shape,
    engine: EngineSection,
    cluster: Cluster,
    *,
    prompts: int,
    prompt_tokens: int,
    answer_tokens: int,
    where: str = "",
) -> ScorePlan:
    """Time of a score: prompts are products of matrices, answers read all weights once a token of all at once.

    On CPUs `replicas: auto` is taken for an engine on each node.

    Raises:
        NoRoomError: An engine has more GPUs than a node.
        PlanError: The model's heads cannot be split over them.
    """
    own = plan_engine(shape, engine, cluster, where=where)
    rates = rates_of(cluster.gpu, dtype_of(engine.dtype, cluster), threads=max(1, int(engine.cpus_per_replica)))
    parallel = engine.tensor_parallel if cluster.gpu is not None else 1
    room = room_of(engine, cluster, where=where) if cluster.gpu is not None else cluster.nodes
    replicas = room if engine.replicas == "auto" else engine.replicas
    replicas = min(room, replicas) if cluster.gpu is not None else replicas
    active = shape.layers * shape.matrices + shape.embedding
    each = -(-prompts // replicas)
    prefill = 2 * active * prompt_tokens * each / (rates.flops * parallel)
    together = min(each, own.at_once)
    bandwidth = cluster.gpu.bandwidth if cluster.gpu is not None else CPU_BANDWIDTH
    one = (own.weights + together * own.token * (prompt_tokens + answer_tokens / 2)) / bandwidth
    one = max(one, 2 * active * together / (rates.flops * parallel))
    start = START_CPU if cluster.gpu is None else START_GPU
    name = "cpu" if cluster.gpu is None else cluster.gpu.name
    answering = 0.0 if not prompts else prefill + -(-each // together) * answer_tokens * one
    said = (
        f"an engine: {start:g} s until it answers, {said_of(rates)}, {bandwidth / 1e9:.4g} GB/s of its memory, prompts "
        f"of {prompt_tokens} tokens"
    )
    return ScorePlan(shape.name, prompts, replicas, replicas * parallel, name, own, start, start + answering, said)


def plan_scoring(scoring: ScoringSection, shape: Shape, cluster: Cluster, *, prompts: int) -> ScorePlan:
    """The plan of a score with these settings, whose longest answer is decided; prompts are as long as published.

    Every judge and translator that is a model is taken to read every response, at its longest.
    """
    responses, answer = prompts * scoring.asking.samples, scoring.max_new_tokens or 1
    own = plan_score(
        shape, scoring.engine, cluster, prompts=responses, prompt_tokens=HEAD + PROMPT, answer_tokens=answer
    )
    named = [(each, _reading(each, cluster, responses=responses, answer=answer)) for each in readers_of(scoring.judge)]
    return replace(
        own,
        prompts=prompts,
        readers=tuple(plan for _, plan in named if plan is not None),
        unknown=tuple(f"{each.where}model={each.model}" for each, plan in named if plan is None),
    )


def _reading(each: Engines, cluster: Cluster, *, responses: int, answer: int) -> ScorePlan | None:
    """Engines that read responses, each in a conversation of its own; None where their model is not known."""
    if (shape := each.shape()) is None:
        return None
    return plan_score(
        shape, each.engine, cluster, prompts=responses * each.asked, prompt_tokens=HEAD + PROMPT + answer,
        answer_tokens=each.reply, where=each.where,
    )  # fmt: skip


def scores_in(config: SearchConfig, *, points: int, steps: int) -> tuple[int, int]:
    """Scores of a search, at most: those that choose, and those that confirm; each with one before training."""
    each = 1 if config.score_every is None else -(-steps // config.score_every)
    kept = min(config.confirm.keep, points)
    return 1 + points * config.repeats * each, 1 + kept * (config.repeats + len(config.confirm.seeds))


def runs_in(config: SearchConfig, *, points: int) -> int:
    """Runs of a search, at most: its trials, and the best again with further seeds."""
    return points * config.repeats + min(config.confirm.keep, points) * len(config.confirm.seeds)


def plan_search(
    config: SearchConfig,
    run: RunPlan,
    *,
    points: int,
    choosing: ScorePlan,
    confirming: ScorePlan,
    cluster: Cluster,
    steps: int | None = None,
) -> SearchPlan:
    """Trials side by side, as many as `concurrency` says and GPUs beside the engines hold; further seeds in turn.

    Engines are up from the first trial to the last, so that their start is paid once, and their GPUs are held all the
    time (with `share_gpu` those of the trials). Trials that end together are scored one after another. `run` is the
    trial that takes longest, and `steps` those of the one that has most (default: the same one).

    Raises:
        NoRoomError: The cluster has too few GPUs for a trial beside the engines.
    """
    trials, runs = points * config.repeats, runs_in(config, points=points)
    scores = scores_in(config, points=points, steps=steps or run.steps)
    engines = 0 if config.share_gpu else choosing.held
    room = config.concurrency if cluster.gpu is None else (cluster.gpus - engines) // run.workers
    if room < 1:
        raise NoRoomError(
            f"a trial on {run.workers} GPUs beside engines on {engines} needs more than the {cluster.gpus} of the "
            "cluster; lower cluster.workers of the runs, or take more GPUs"
        )
    at_once = min(config.concurrency, trials, room)
    rounds = -(-trials // at_once) + runs - trials  # further seeds are trained one after another
    scoring = scores[0] * choosing.working_seconds + scores[1] * confirming.working_seconds
    each = run.wall_seconds - run.reference_seconds  # the reference is asked once: its numbers are cached
    start = max(part.start for part in (choosing, *choosing.readers))  # at once
    seconds = start + run.reference_seconds + rounds * each + scoring
    if config.share_gpu:
        held = run.workers * seconds
    else:
        held = (run.reference_seconds + runs * each) * run.workers + seconds * engines
    probe = _probe_seconds(config, run)  # by one process, before engines start
    assumed = (_LEFT_OUT, *dict.fromkeys((*choosing.assumed, *confirming.assumed)))
    return SearchPlan(trials, at_once, runs, scores, probe + seconds, (probe + held) / 3600, run.gpu, probe, assumed)


def _probe_seconds(config: SearchConfig, run: RunPlan) -> float:
    """A forward of each bundle of the probe, at most: a third of what a step computes of it, by one worker."""
    if config.probe is None:
        return 0.0
    bundles = 2 * (config.probe.limit or PROBE_LIMIT)  # of each kind
    return bundles * run.seconds.compute * (run.workers - run.idle_workers) / run.bundles / 3
