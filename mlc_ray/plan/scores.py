"""The plan of a score: an engine's memory, and the time of prompts and answers. And that of a search, made of both."""

from __future__ import annotations

from dataclasses import dataclass

from mlc_ray.config import EngineSection, ScoringSection, SearchConfig
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import HEAD, PROMPT
from mlc_ray.plan.rates import Rates, rates_of
from mlc_ray.plan.records import GIB, RunPlan
from mlc_ray.plan.runs import PlanError
from mlc_ray.plan.shapes import Shape

WORKSPACE = 2 * GIB
"""Assumed: what vLLM takes of a GPU beside weights and cache, with its captured graphs."""

START_GPU, START_CPU = 72.0, 13.0
"""Seconds until an engine answers: vLLM 0.25 on an H100 with its graphs, vLLM 0.32 on two CPU cores."""

SEQUENCES = 256
"""vLLM's own `max_num_seqs`."""

CPU_BANDWIDTH = 1e10
"""Bytes a second that a CPU core reads, assumed."""


@dataclass(frozen=True)
class EnginePlan:
    """An engine of a score.

    Attributes:
        weights: bytes of them on each GPU.
        token: bytes of a token's keys and values on each GPU.
        bytes: what the engine needs at least: weights, workspace, and the cache of one longest sequence.
        limit: what it may have.
        cached: tokens that its cache holds.
        at_once: sequences of the longest kind that are answered at once.
    """

    weights: int
    token: int
    bytes: int
    limit: int
    cached: int
    at_once: int

    @property
    def fits(self) -> bool:
        """Whether it holds the model and one longest sequence."""
        return self.bytes <= self.limit


@dataclass(frozen=True)
class ScorePlan:
    """A score: prompts, engines, and the seconds from the start of the engines to the last answer.

    `start` are those of them until engines answer; `gpu` is what they run on.
    """

    prompts: int
    replicas: int
    gpus: int
    gpu: str
    engine: EnginePlan
    start: float
    seconds: float

    @property
    def gpu_hours(self) -> float:
        """All its GPUs, for that long."""
        return self.gpus * self.seconds / 3600


@dataclass(frozen=True)
class SearchPlan:
    """A search, its confirmation too, at most: no trial is stopped early.

    `runs` are those of trials and of the best again with further seeds; `scores` those that choose and that confirm.
    """

    trials: int
    at_once: int
    runs: int
    scores: tuple[int, int]
    seconds: float
    gpu_hours: float
    gpu: str


def plan_engine(shape: Shape, engine: EngineSection, cluster: Cluster) -> EnginePlan:
    """Memory of an engine: vLLM fills its share of each GPU with weights, and keys and values of tokens.

    Raises:
        PlanError: The model's heads cannot be split over the engine's GPUs.
    """
    size = 4 if engine.dtype == "float32" else 2
    parallel = engine.tensor_parallel if cluster.gpu is not None else 1
    if shape.heads % parallel:
        could = ", ".join(str(each) for each in range(1, cluster.per_node + 1) if not shape.heads % each)
        raise PlanError(
            f"engine.tensor_parallel={parallel}: vLLM cannot split the {shape.heads} attention heads of {shape.name} "
            f"over so many GPUs; set one of {could}"
        )
    weights = size * shape.parameters // parallel
    # Keys and values are split by heads, and kept whole where there are fewer of them than GPUs.
    token = 2 * shape.layers * size * shape.head_size * max(1, shape.key_heads // parallel)
    if cluster.gpu is None:
        cache, work = engine.cpu_kv_cache_gib * GIB, 0
        limit = cluster.node_memory or 2**62
        needed = weights + cache
    else:
        limit, work = int(engine.gpu_memory_utilization * cluster.gpu.memory), WORKSPACE
        cache = max(0, limit - weights - work)
        needed = weights + work + token * engine.max_model_len
    cached = cache // token
    most = int(engine.options.get("max_num_seqs", SEQUENCES))
    at_once = max(1, min(most, cached // engine.max_model_len))
    return EnginePlan(weights, token, needed, limit, cached, at_once)


def plan_score(
    shape: Shape,
    engine: EngineSection,
    cluster: Cluster,
    rates: Rates,
    *,
    prompts: int,
    prompt_tokens: int,
    answer_tokens: int,
) -> ScorePlan:
    """Time of a score: prompts are products of matrices, answers read all weights once a token of all at once.

    Judges are left out, and translators: they are other models.

    Raises:
        PlanError: An engine has more GPUs than the cluster, or the model's heads cannot be split over them.
    """
    own = plan_engine(shape, engine, cluster)
    parallel = engine.tensor_parallel if cluster.gpu is not None else 1
    if parallel > cluster.gpus:
        raise PlanError(f"engine.tensor_parallel={parallel}, but the cluster has {cluster.gpus} GPUs; lower it")
    room = cluster.gpus // parallel
    replicas = min(room, engine.replicas if engine.replicas != "auto" else room)
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
    return ScorePlan(prompts, replicas, replicas * parallel, name, own, start, start + answering)


def plan_scoring(scoring: ScoringSection, shape: Shape, cluster: Cluster, *, prompts: int, dtype: str) -> ScorePlan:
    """The plan of a score with these settings, whose longest answer is decided; prompts are as long as published."""
    engine = scoring.engine.model_copy(update={"dtype": dtype})
    return plan_score(
        shape, engine, cluster, rates_of(cluster.gpu, dtype), prompts=prompts, prompt_tokens=HEAD + PROMPT,
        answer_tokens=scoring.max_new_tokens or 1,
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
    config: SearchConfig, run: RunPlan, *, points: int, choosing: ScorePlan, confirming: ScorePlan, cluster: Cluster
) -> SearchPlan:
    """Trials side by side, as many as `concurrency` says and GPUs beside the engines hold.

    Engines are up from the first trial to the last, so that their start is paid once, and their GPUs are held all the
    time (with `share_gpu` those of the trials). Trials that end together are scored one after another.

    Raises:
        PlanError: The cluster has too few GPUs for a trial beside the engines.
    """
    trials, runs = points * config.repeats, runs_in(config, points=points)
    scores = scores_in(config, points=points, steps=run.steps)
    engines = 0 if config.share_gpu else choosing.gpus
    room = config.concurrency if cluster.gpu is None else (cluster.gpus - engines) // run.workers
    if room < 1:
        raise PlanError(
            f"a trial on {run.workers} GPUs beside engines on {engines} needs more than the {cluster.gpus} of the "
            "cluster; lower cluster.workers of the runs, or take more GPUs"
        )
    at_once = min(config.concurrency, trials, room)
    rounds = -(-trials // at_once) + -(-(runs - trials) // at_once)
    scoring = scores[0] * (choosing.seconds - choosing.start) + scores[1] * (confirming.seconds - confirming.start)
    each = run.wall_seconds - run.reference_seconds  # the reference is asked once: its numbers are cached
    seconds = choosing.start + run.reference_seconds + rounds * each + scoring
    if config.share_gpu:
        held = run.workers * seconds
    else:
        held = (run.reference_seconds + runs * each) * run.workers + seconds * engines
    return SearchPlan(trials, at_once, runs, scores, seconds, held / 3600, run.gpu)
