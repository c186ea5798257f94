"""The plan of a score: an engine's memory, and the time of prompts and answers. And that of a search, made of both."""

from __future__ import annotations

from dataclasses import dataclass

from mlc_ray.config import EngineSection
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.rates import Rates
from mlc_ray.plan.records import GIB
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
    """A score: prompts, engines, and the seconds from the start of the engines to the last answer."""

    prompts: int
    replicas: int
    gpus: int
    engine: EnginePlan
    seconds: float

    @property
    def gpu_hours(self) -> float:
        """All its GPUs, for that long."""
        return self.gpus * self.seconds / 3600


@dataclass(frozen=True)
class SearchPlan:
    """A search: trials, each a run and its scores; what confirms the best comes on top."""

    trials: int
    at_once: int
    seconds: float
    gpu_hours: float


def plan_engine(shape: Shape, engine: EngineSection, cluster: Cluster) -> EnginePlan:
    """Memory of an engine: vLLM fills its share of each GPU with weights, and keys and values of tokens."""
    size = 4 if engine.dtype == "float32" else 2
    parallel = engine.tensor_parallel if cluster.gpu is not None else 1
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
    """
    own = plan_engine(shape, engine, cluster)
    parallel = engine.tensor_parallel if cluster.gpu is not None else 1
    room = max(1, cluster.gpus // parallel)
    replicas = min(room, engine.replicas if engine.replicas != "auto" else room)
    active = shape.layers * shape.matrices + shape.embedding
    each = -(-prompts // replicas)
    prefill = 2 * active * prompt_tokens * each / (rates.flops * parallel)
    together = min(each, own.at_once)
    bandwidth = cluster.gpu.bandwidth if cluster.gpu is not None else CPU_BANDWIDTH
    one = (own.weights + together * own.token * (prompt_tokens + answer_tokens / 2)) / bandwidth
    one = max(one, 2 * active * together / (rates.flops * parallel))
    start = START_CPU if cluster.gpu is None else START_GPU
    seconds = start + prefill + -(-each // together) * answer_tokens * one
    return ScorePlan(prompts, replicas, replicas * parallel, own, seconds)


def plan_search(
    *, trials: int, at_once: int, run_seconds: float, run_gpus: int, score: ScorePlan, scores: int
) -> SearchPlan:
    """Trials side by side, each scored `scores` times; engines stay up, so that their start is paid once."""
    start = START_CPU if score.gpus == 0 else min(score.seconds, START_GPU)
    scoring = scores * (score.seconds - start)
    rounds = -(-trials // at_once)
    seconds = start + rounds * (run_seconds + scoring)
    hours = (trials * run_seconds * run_gpus + trials * scoring * score.gpus) / 3600
    return SearchPlan(trials, at_once, seconds, hours)
