"""The engines of a score: whose they are, and the memory of each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from mlc_ray._registry import resolve
from mlc_ray.config import EngineSection, JudgeSettings
from mlc_ray.errors import MlcRayError
from mlc_ray.judges.panel import PanelJudge, Reader
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.memory import RAY
from mlc_ray.plan.records import GIB
from mlc_ray.plan.runs import NoRoomError, PlanError, dtype_of
from mlc_ray.plan.shapes import Shape, known_shape

logger = logging.getLogger(__name__)

WORKSPACE = 2 * GIB
"""Assumed: what vLLM takes of a GPU beside weights and cache, with its captured graphs."""

ENGINE = GIB
"""Of an engine on a CPU beside its cache and weights, which it has twice, once packed for its kernels. Measured with
vLLM 0.32 and a cache of 1 GiB: 2.5 GiB of SmolLM2-135M (weights 0.25), 4.3 of Qwen2.5-Coder-0.5B (1.17)."""

SEQUENCES = 256
"""vLLM's own `max_num_seqs`."""

_LONGEST = 2048
"""Assumed tokens of a guard's longest conversation, where its settings leave that to the prompts."""

_UNKNOWN = ("quantization", "cpu_offload_gb")
"""Settings of vLLM by which weights take less of a GPU than is counted."""


@dataclass(frozen=True)
class Engines:
    """Engines of one part of a score.

    Attributes:
        where: what stands before `engine` in the settings: nothing for the model that answers, `judge.`,
            `judge.judges.0.judge.`, `judge.translate.`.
        model: that they serve.
        engine: their settings.
        reply: tokens of the longest reply of a judge or translator.
        asked: how often each response is read.
    """

    where: str
    model: str
    engine: EngineSection
    reply: int = 1
    asked: int = 1

    def shape(self) -> Shape | None:
        """The model's shape; None where that, or how much of it an engine holds, is not known."""
        if unknown := [name for name in _UNKNOWN if name in self.engine.options]:
            _say(f"memory is not planned: what {self.where}engine.options.{unknown[0]} leaves is not known")
            return None
        try:
            return known_shape(self.model, trust_remote_code=self.engine.trust_remote_code)
        except MlcRayError as error:  # an adapter has no config of its own; a hub may not answer
            _say(f"memory is not planned: {error}")
            return None


@cache  # asked for every corner of a search
def _say(what: str) -> None:
    logger.info("%s", what)


def readers_of(judge: JudgeSettings, readers: Sequence[Reader] | None = None) -> list[Engines]:
    """Engines of a judge, its translator, and for a panel of all its judges.

    Args:
        judge: the settings.
        readers: who reads responses, once that is known: only their engines, and the translator's only if any of them
            reads what is translated.
    """
    used = None if readers is None else [reader.judge.settings for reader in readers]
    ways = [via for reader in readers or () for cell in reader.cells.values() for via in cell.values()]
    found = _of(judge, "judge.", used)
    translate = judge.translator
    if translate is not None and translate.model is not None and (readers is None or "translated" in ways):
        reply = translate.max_new_tokens or 1
        found.append(Engines("judge.translate.", translate.model, translate.engine, reply=reply))
    return found


def _of(judge: JudgeSettings, where: str, used: Sequence[JudgeSettings] | None) -> list[Engines]:
    if isinstance(judge, PanelJudge.Settings):
        members = [(f"{where}judges.{number}.judge.", member.judge) for number, member in enumerate(judge.judges)]
        return [each for place, member in members for each in _of(member, place, used)]
    model, engine = getattr(judge, "model", None), getattr(judge, "engine", None)
    if not (isinstance(model, str) and isinstance(engine, EngineSection)) or (used is not None and judge not in used):
        return []
    found = resolve("judge", judge.name)
    policies = getattr(found, "policies", ("",))
    return [Engines(where, model, engine, reply=getattr(found, "max_new_tokens", 1), asked=len(policies))]


@dataclass(frozen=True)
class EnginePlan:
    """An engine of a score.

    Attributes:
        weights: bytes of them on each GPU.
        token: bytes of a token's keys and values on each GPU.
        bytes: what the engine needs at least: weights, workspace, and the cache of one longest sequence; on a CPU
            weights twice, the whole cache, and its process.
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


def room_of(engine: EngineSection, cluster: Cluster, *, where: str = "") -> int:
    """Engines that the nodes of a cluster with GPUs hold, each on one node.

    Raises:
        NoRoomError: A node holds none.
    """
    parallel = engine.tensor_parallel
    if parallel > cluster.per_node:
        raise NoRoomError(
            f"{where}engine.tensor_parallel={parallel}, but an engine lies on one node, which has "
            f"{cluster.per_node} GPUs; lower it"
        )
    return max(1, cluster.gpus // cluster.per_node) * (cluster.per_node // parallel)


def plan_engine(shape: Shape, engine: EngineSection, cluster: Cluster, *, where: str = "") -> EnginePlan:
    """Memory of an engine: vLLM fills its share of each GPU with weights, and keys and values of tokens.

    Args:
        shape: of its model.
        engine: its settings; `dtype: auto` is decided for the cluster.
        cluster: it is on.
        where: what stands before `engine` in the settings, for messages.

    Raises:
        PlanError: The model's heads cannot be split over the engine's GPUs.
    """
    size = 4 if dtype_of(engine.dtype, cluster) == "float32" else 2
    parallel = engine.tensor_parallel if cluster.gpu is not None else 1
    if shape.heads % parallel:
        could = ", ".join(str(each) for each in range(1, cluster.per_node + 1) if not shape.heads % each)
        raise PlanError(
            f"{where}engine.tensor_parallel={parallel}: vLLM cannot split the {shape.heads} attention heads of "
            f"{shape.name} over so many GPUs; set one of {could}"
        )
    weights = size * shape.parameters // parallel
    # Keys and values are split by heads, and kept whole where there are fewer of them than GPUs.
    token = 2 * shape.layers * size * shape.head_size * max(1, shape.key_heads // parallel)
    if cluster.gpu is None:
        cache, work = engine.cpu_kv_cache_gib * GIB, 0
        limit = 2**62 if cluster.node_room is None else max(0, cluster.node_room - RAY)
        needed = 2 * weights + cache + ENGINE
    else:
        limit, work = int(engine.gpu_memory_utilization * cluster.gpu.memory), WORKSPACE
        cache = max(0, limit - weights - work)
        needed = weights + work + token * engine.max_model_len
    cached = cache // token
    most = int(engine.options.get("max_num_seqs", SEQUENCES))
    at_once = max(1, min(most, cached // (engine.max_model_len or _LONGEST)))
    return EnginePlan(weights, token, needed, limit, cached, at_once)
