"""What a step, a checkpoint and a start cost in a simulated run, by formulas; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from mlc_ray.config.simulation import SimulationConfig

START_SECONDS, START_SECONDS_PER_BUNDLE = 0.09, 0.76e-6
"""Of opening token rows at a start, measured by `benchmarks/data_stream.py` up to a million bundles."""
MODEL_IN_BACKGROUND_GB = 2 * 1.0737
"""The last part of `model/`, which is written while training goes on: 2 GiB."""
COPY_GB, NODE_GB = (
    float(SimulationConfig.model_fields[name].default) for name in ("copy_gb_per_second", "node_gb_per_second")
)
"""10⁹ bytes a second that a node copies to host memory, and writes to the storage, where nothing else is said."""
HOURS = 3600.0
_POINTS = 4096


def steps_of(config: SimulationConfig) -> int:
    """Optimizer steps of a run: an epoch's last batch may be smaller."""
    batch = max(1, round(config.gpus * config.bundles_per_gpu))
    return config.epochs * -(-config.bundles // batch)


@lru_cache(maxsize=256)
def slowest(workers: int, spread: float) -> tuple[float, float]:
    """Mean and variance of the largest of `workers` independent log-normal factors with median 1.

    The quantile of the largest at u is that of one at u^(1 / workers); the mean is over 4,096 midpoints of u.
    """
    if not spread:
        return 1.0, 0.0
    normal = NormalDist()
    levels = ((np.arange(_POINTS) + 0.5) / _POINTS) ** (1 / workers)
    factors = np.exp(spread * np.array([normal.inv_cdf(min(level, 1 - 1e-16)) for level in levels]))
    return float(factors.mean()), float(factors.var())


@dataclass(frozen=True)
class Costs:
    """Seconds, and rates as fractions of full speed.

    `step` and `step_variance` are of a step that waits for its slowest worker. `free` is the speed at which data arrive
    while no checkpoint is written, `beside` while one is: 1 where they are there in time. `blocking` is how long a
    checkpoint stops training, `upload` how long it is written after that. `start` is a start with all that it reads.
    `strikes` is failures a second of all nodes, `notices` preemptions.
    """

    step: float
    step_variance: float
    free: float
    beside: float
    blocking: float
    upload: float
    start: float
    strikes: float
    notices: float
    data_share: float
    """Of the storage's bandwidth, what data at full speed would take; more than 1 cannot be."""

    @staticmethod
    def of(config: SimulationConfig) -> Costs:
        """Those of a run.

        Data and a checkpoint that is written share the storage fairly: each gets half, or as much as it can use if that
        is less. A start reads state/ twice (checksums, then each worker's ranges) and, on every node, the model.
        """
        nodes, storage = config.nodes, config.storage_gb_per_second
        links = nodes * config.node_gb_per_second
        mean, variance = slowest(config.gpus, config.step_spread)
        step = config.step_seconds * mean
        data = config.gpus * config.bundles_per_gpu * config.bundle_kb * 1e-6 / step  # GB/s at full speed
        most = min(storage, links)
        writing = min(max(most - data, most / 2), most)
        beside = min(data, most - writing) if data else 0.0
        one = min(config.node_gb_per_second, storage)
        rest = behind(config.state_gb, config.model_gb, writing=writing, storage=one)
        stops = blocking(config.state_gb, config.model_gb, nodes=nodes, copy=config.copy_gb_per_second, storage=one)
        read = 2 * config.state_gb
        reading = max(
            (read + nodes * config.model_gb) / storage, (read / nodes + config.model_gb) / config.node_gb_per_second
        )
        opening = START_SECONDS + START_SECONDS_PER_BUNDLE * config.bundles
        failing = 0.0 if config.node_mtbf_hours is None else 1 / (config.node_mtbf_hours * HOURS)
        return Costs(
            step=step,
            step_variance=config.step_seconds**2 * variance,
            free=min(1.0, most / data) if data else 1.0,
            beside=min(1.0, beside / data) if data else 1.0,
            blocking=stops + (0.0 if config.background else rest),
            upload=rest if config.background else 0.0,
            start=config.restart_seconds + reading + opening,
            strikes=nodes * failing,
            notices=nodes * config.preemptions_per_node_day / (24 * HOURS),
            data_share=data / most,
        )


def blocking(state_gb: float, model_gb: float, *, nodes: int, copy: float, storage: float) -> float:
    """Seconds that training stops for a checkpoint that is written in the background (docs/reliability.md).

    Args:
        state_gb: state/, in 10⁹ bytes, which each node copies its share of to host memory.
        model_gb: model/; the first worker writes all of it but the last 2 GiB meanwhile.
        nodes: of the run.
        copy: 10⁹ bytes a second that a node copies.
        storage: 10⁹ bytes a second that a node writes.
    """
    return state_gb / nodes / copy + max(0.0, model_gb - MODEL_IN_BACKGROUND_GB) / storage


def behind(state_gb: float, model_gb: float, *, writing: float, storage: float) -> float:
    """Seconds that the rest of a checkpoint is written after that: state/ by all nodes, the end of model/ by one.

    Args:
        state_gb: as in `blocking`.
        model_gb: as there.
        writing: 10⁹ bytes a second that all nodes write.
        storage: that one writes.
    """
    return state_gb / writing + min(model_gb, MODEL_IN_BACKGROUND_GB) / storage


def young(cost: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that cost `cost` each (Young, Communications of the ACM 1974)."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """The same to a higher order (Daly, Future Generation Computer Systems 2006, equation 37)."""
    if cost >= 2 * mtbf:
        return mtbf
    part = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - cost
