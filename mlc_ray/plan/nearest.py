"""Settings that fit: the cheapest ones, and those that differ least from what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlc_ray.config import ConfigError, TrainConfig, parse_config
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import Weights
from mlc_ray.plan.rates import Rates
from mlc_ray.plan.records import RunPlan
from mlc_ray.plan.runs import plan_run
from mlc_ray.plan.shapes import Shape

LEAST_TOKENS = 512


@dataclass(frozen=True)
class Fitting:
    """Settings by dotted name that make a run fit, and its plan then."""

    changes: dict[str, Any]
    plan: RunPlan

    def __str__(self) -> str:
        return " ".join(
            f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in self.changes.items()
        )


def fitting(
    config: TrainConfig, shape: Shape, cluster: Cluster, weights: Weights, rates: Rates, *, dtype: str, workers: int
) -> list[Fitting]:
    """What fits of all that is tried, the fastest step first; as asked first of all where that fits.

    Tried are each ZeRO stage, with checkpointing or without, with offloading, hpZ, and a budget of few tokens; LoRA
    last, since it is another training.
    """
    found: list[Fitting] = []
    for changes in _candidates(config, cluster, workers):
        try:
            changed = with_settings(config, changes)
        except ConfigError:
            continue
        plan = plan_run(changed, shape, cluster, weights, rates, dtype=dtype, workers=workers)
        if plan.memory.fits:
            found.append(Fitting(changes, plan))
    return sorted(found, key=lambda one: ("model.lora.rank" in one.changes, one.plan.seconds.step, len(one.changes)))


def cheapest(found: list[Fitting]) -> Fitting | None:
    """The one to take: fastest, and of those that are nearly as fast (2 %) the one with the fewest changes."""
    if not found:
        return None
    lora = "model.lora.rank" in found[0].changes
    best = found[0].plan.seconds.step
    near = [one for one in found if one.plan.seconds.step <= 1.02 * best and ("model.lora.rank" in one.changes) == lora]
    return min(near, key=lambda one: len(one.changes))


def nearest(found: list[Fitting]) -> Fitting | None:
    """The one with the fewest changes, and of those the fastest."""
    return min(
        found, key=lambda one: ("model.lora.rank" in one.changes, len(one.changes), one.plan.seconds.step), default=None
    )


def with_settings(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The same run with other settings, validated.

    Raises:
        ConfigError: They do not go together.
    """
    raw = config.model_dump(mode="json", exclude_unset=True)
    for name, value in changes.items():
        *path, last = name.split(".")
        node = raw
        for part in path:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        node[last] = value
    return parse_config(TrainConfig, raw)


def _candidates(config: TrainConfig, cluster: Cluster, workers: int) -> Iterator[dict[str, Any]]:
    engine: Any = config.engine
    asked = {
        "engine.stage": engine.stage,
        "engine.offload_optimizer": engine.offload_optimizer,
        "engine.offload_parameters": engine.offload_parameters,
        "engine.secondary_partition": engine.secondary_partition,
        "model.gradient_checkpointing": config.model.gradient_checkpointing,
        "train.tokens_per_forward": config.train.tokens_per_forward,
    }
    offload = [(False, False), (True, False), (True, True)]
    hpz = [1, cluster.per_node] if cluster.nodes_of(workers) > 1 and workers % cluster.per_node == 0 else [1]
    loras = [{}] if config.model.lora is not None else [{}, {"model.lora.rank": 16}]
    seen = set()
    for lora in loras:
        for stage in (0, 1, 2, 3):
            for optimizer, parameters in offload if stage else offload[:1]:
                if parameters and stage != 3:
                    continue
                for secondary in hpz if stage == 3 else [1]:
                    for checkpointing in (False, "selective", True):
                        for tokens in (config.train.tokens_per_forward, LEAST_TOKENS):
                            values = dict(
                                zip(
                                    asked, (stage, optimizer, parameters, secondary, checkpointing, tokens), strict=True
                                )
                            )
                            changes = {name: value for name, value in values.items() if value != asked[name]} | lora
                            if (key := str(changes)) not in seen:
                                seen.add(key)
                                yield changes
