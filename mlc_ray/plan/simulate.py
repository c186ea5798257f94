"""A whole run as discrete events: nodes that fail or are taken away, checkpoints, starts, late workers, slow storage.

An event is the loss of a node or its replacement; what lies between two of them (thousands of steps and checkpoints) is
one array. So a run on 10,000 GPUs over 100 million bundles takes milliseconds. `plan.costs` has the formulas.

Not in it: runs that go on with fewer workers (`cluster.workers: [least, most]`), a storage that fails, and failures
that come together.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from mlc_ray.config.simulation import SimulationConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.plan.costs import HOURS, Costs, daly, steps_of, young
from mlc_ray.stats.rates import Interval
from mlc_ray.stats.seeds import student_quantile

LOSSES = ("stragglers", "data", "storage", "repeated", "restarts")
"""Where time goes that no step uses: late workers; data not there in time; checkpoints, as far as training stops for
them; work done again after a loss; and waiting for nodes and starting."""
SATURATED = 0.1
"""A cause saturates where it takes this share of the run."""
_AT_ONCE = 65_536  # checkpoints
_HOPELESS = 50  # times the ideal time, after which a run is given up
_LOOKS_AT = 500  # losses: after each so many a run that is on course to more than that is given up at once
_FACTORS = tuple(2 ** (k / 2) for k in range(-4, 5))


class SimulationError(MlcRayError):
    """A simulation is asked for what it cannot count; the message quotes the setting."""


@dataclass(frozen=True)
class Simulated:
    """What became of the repetitions, means with 95 % intervals over them (Student's t).

    `goodput` is the time that ideal steps take over the whole time. `shares` are where the rest goes, by `LOSSES`, as
    means; with goodput they add up to 1. `lost_nodes` counts failures and preemptions. `finished` is false where a
    repetition was given up, since hardly a step of it lasts.
    """

    gpus: int
    every: int
    steps: int
    goodput: Interval
    wall_hours: Interval
    gpu_hours: Interval
    shares: dict[str, float]
    lost_nodes: float
    finished: bool
    runs: tuple[float, ...] = field(repr=False, default=())
    """Goodput of each repetition, whose draws depend on the seed and its number alone."""

    @property
    def largest(self) -> str:
        """The cause that takes the most time."""
        return max(LOSSES, key=lambda name: self.shares[name])


@dataclass(frozen=True)
class Best:
    """The best interval between checkpoints, of those tried, and what is not told apart from it.

    `alike` are the least and the most steps whose goodput does not differ from the best's by more than the 95 %
    interval of their paired difference. `young` and `daly` are these authors' optima in steps; None where nothing
    interrupts the run.
    """

    run: Simulated
    tried: tuple[Simulated, ...]
    alike: tuple[int, int]
    young: float | None
    daly: float | None


@dataclass(frozen=True)
class Growth:
    """The same work a GPU on more and more of them; `first` says what takes 10 % of the time first, and where."""

    runs: tuple[Simulated, ...]
    first: tuple[str, int] | None


def simulate(config: SimulationConfig, *, every: int | None = None) -> Simulated:
    """All repetitions of a run with one interval between checkpoints.

    Args:
        config: The run; `checkpoint_every` must be a number unless `every` is given.
        every: Optimizer steps between checkpoints, in its place.

    Raises:
        SimulationError: There is no number.
    """
    steps = every if every is not None else config.checkpoint_every
    if not isinstance(steps, int):
        raise SimulationError("checkpoint_every='best' is looked for by best_interval; give a number of steps here")
    costs = Costs.of(config)
    runs = [_Run(config, costs, steps, number).go() for number in range(config.repetitions)]
    goodput, walls = [run.useful / run.wall for run in runs], [run.wall / HOURS for run in runs]
    wall = _over(walls)
    return Simulated(
        gpus=config.gpus,
        every=steps,
        steps=steps_of(config),
        goodput=_over(goodput, 0.0, 1.0),
        wall_hours=wall,
        gpu_hours=Interval(*(config.gpus * each for each in (wall.value, wall.low, wall.high))),
        shares={name: float(np.mean([run.spent[name] / run.wall for run in runs])) for name in LOSSES},
        lost_nodes=float(np.mean([run.struck for run in runs])),
        finished=all(run.done >= run.all_steps for run in runs),
        runs=tuple(goodput),
    )


def _over(values: Sequence[float], least: float = 0.0, most: float = math.inf) -> Interval:
    mean = float(np.mean(values))
    half = student_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, max(least, mean - half), min(most, mean + half))


# ------------------------------------------------------------------------------------------------ the best, and growth


def optimum(config: SimulationConfig) -> tuple[float | None, float | None]:
    """Young's and Daly's optimum in steps: of what stops training, and of failures (and notices that are too short)."""
    costs = Costs.of(config)
    rate = costs.strikes + (0.0 if _saves_in_notice(config, costs) else costs.notices)
    if not rate:
        return None, None
    step = costs.step / costs.free
    return young(costs.blocking, 1 / rate) / step, daly(costs.blocking, 1 / rate) / step


def run_of(config: SimulationConfig) -> Best:
    """The run at its best interval, or at the one that `checkpoint_every` gives."""
    if config.checkpoint_every == "best":
        return best_interval(config)
    run = simulate(config)
    return Best(run, (run,), (run.every, run.every), *optimum(config))


def best_interval(config: SimulationConfig) -> Best:
    """Try intervals around Daly's optimum, from a quarter to four times, each with the same draws.

    None is tried that is shorter than writing a checkpoint takes: the next one would only wait for it.
    """
    costs = Costs.of(config)
    first, higher = optimum(config)
    least = max(1, math.ceil(costs.upload * costs.free / costs.step))
    middle = steps_of(config) if higher is None else max(higher, least)
    tried = sorted(
        {min(steps_of(config), max(1, least if f * middle < least else round(f * middle))) for f in _FACTORS}
    )
    runs = [simulate(config, every=every) for every in tried]
    best = max(runs, key=lambda run: run.goodput.value)
    alike = [run.every for run in runs if run is best or _alike(best, run)]
    return Best(best, tuple(runs), (min(alike), max(alike)), first, higher)


def _alike(best: Simulated, other: Simulated) -> bool:
    difference = _over(np.subtract(best.runs, other.runs).tolist(), -1.0)
    return difference.low <= 0


def growth(config: SimulationConfig, sizes: Sequence[int] | None = None) -> Growth:
    """The run on more and more GPUs, each with as many bundles a step, at the best interval by Daly.

    Args:
        config: The run; its `gpus` is one of the sizes.
        sizes: Numbers of GPUs; by default whole nodes, four times as many each, up to 10,000 or `config.gpus`.
    """
    if sizes is None:
        node, most = config.gpus_per_node, max(10_000, config.gpus)
        several = [node * 4**k for k in range(16) if node * 4**k < most]
        sizes = sorted({*several, most - most % node, config.gpus})
    runs = []
    for gpus in sizes:
        own = config.model_copy(update={"gpus": gpus})
        costs, (_, higher) = Costs.of(own), optimum(own)
        least = math.ceil(costs.upload * costs.free / costs.step)
        every = steps_of(own) if higher is None else min(steps_of(own), max(1, least, round(higher)))
        runs.append(simulate(own, every=every))
    saturated = ((run.largest, run.gpus) for run in runs if run.shares[run.largest] >= SATURATED)
    return Growth(tuple(runs), next(saturated, None))


# --------------------------------------------------------------------------------------------------------------- a run


def _saves_in_notice(config: SimulationConfig, costs: Costs) -> bool:
    """Whether a step and a checkpoint fit between the notice and the loss of the node."""
    return costs.step / costs.free + costs.blocking + costs.upload <= config.notice_seconds


@dataclass(frozen=True)
class _Stretch:
    """Segments from one checkpoint to the next, as they go if nothing happens; seconds from the stretch's beginning.

    `ends` [N] is when training goes on behind each one's checkpoint, `durable` [N] when that one is whole.
    """

    steps: np.ndarray[Any, np.dtype[np.int64]]
    work: np.ndarray[Any, np.dtype[np.float64]]
    taken: np.ndarray[Any, np.dtype[np.float64]]
    ends: np.ndarray[Any, np.dtype[np.float64]]
    durable: np.ndarray[Any, np.dtype[np.float64]]


class _Run:
    """One repetition. `done` counts steps that a checkpoint holds, `spent` the seconds that were not useful."""

    def __init__(self, config: SimulationConfig, costs: Costs, every: int, number: int) -> None:
        self.config, self.costs, self.every, self.all_steps = config, costs, every, steps_of(config)
        self.random = np.random.default_rng([config.seed, number])
        self.strikes = np.random.default_rng([config.seed, number, 1])  # the same whatever the interval is
        self.environment = simpy.Environment()
        self.done, self.struck, self.useful = 0, 0, 0.0
        self.spent = dict.fromkeys(LOSSES, 0.0)
        self.missing, self.whole = 0, self.environment.event()
        self.hopeless = self.environment.event()
        self.spares = simpy.Container(self.environment, init=config.spare_nodes) if config.spare_nodes else None

    @property
    def wall(self) -> float:
        """Seconds until now."""
        return float(self.environment.now)

    def go(self) -> _Run:
        """To its end, or until it is given up."""
        training = self.environment.process(self._train())
        for rate, cause in ((self.costs.strikes, "failure"), (self.costs.notices, "notice")):
            if rate:
                self.environment.process(self._strike(training, rate, cause))
        self.environment.run(until=training | self.hopeless | self.environment.timeout(self._longest))
        return self

    @property
    def _longest(self) -> float:
        return _HOPELESS * (self.all_steps * self.config.step_seconds + self.costs.start)

    def _strike(self, training: simpy.Process, rate: float, cause: str) -> Generator[simpy.Event, Any, None]:
        """Nodes are lost one after another, whatever the run does, until it has ended."""
        while True:
            yield self.environment.timeout(self.strikes.exponential(1 / rate))
            if not training.is_alive:
                return
            self.struck += 1
            if not self.struck % _LOOKS_AT and self.done / self.all_steps < self.wall / self._longest:
                self.hopeless.succeed()
                return
            self.missing += 1
            self.environment.process(self._replace(self.config.notice_seconds if cause == "notice" else 0.0))
            training.interrupt(cause)

    def _replace(self, notice: float) -> Generator[simpy.Event, Any, None]:
        """Another node for a lost one: a spare one at once, else when there is one."""
        yield self.environment.timeout(notice)
        if self.spares is not None:
            self.environment.process(self._refill())
            yield self.spares.get(1)
        else:
            yield self.environment.timeout(self.config.replace_seconds)
        self.missing -= 1
        if not self.missing:
            self.whole.succeed()
            self.whole = self.environment.event()

    def _refill(self) -> Generator[simpy.Event, Any, None]:
        assert self.spares is not None
        yield self.environment.timeout(self.config.replace_seconds)
        yield self.spares.put(1)

    def _train(self) -> Generator[simpy.Event, Any, None]:
        yield from self._start()
        while self.done < self.all_steps:
            began, stretch = self.wall, self._stretch()
            try:
                yield self.environment.timeout(stretch.durable[-1])
                self._keep(stretch, len(stretch.ends))
            except simpy.Interrupt as struck:
                after = self.wall - began
                if struck.cause == "notice":
                    yield from self._notice(stretch, began, after)
                else:
                    self._lose(stretch, after)
                if self.done < self.all_steps:
                    yield from self._start()

    def _start(self) -> Generator[simpy.Event, Any, None]:
        """Wait for all nodes, and start; whatever interrupts it begins it anew."""
        began = self.wall
        while True:
            try:
                if self.missing:
                    yield self.whole
                yield self.environment.timeout(self.costs.start)
            except simpy.Interrupt:
                continue
            break
        self.spent["restarts"] += self.wall - began

    def _stretch(self) -> _Stretch:
        """All segments that are left, or very many of them.

        While the checkpoint before is written, data may come more slowly; and a segment that is done before that waits
        for it. The work of a segment is normal with the mean and variance of its steps' sum.
        """
        costs, left = self.costs, self.all_steps - self.done
        steps = np.full(min(_AT_ONCE, -(-(left + self.done % self.every) // self.every)), self.every, dtype=np.int64)
        steps[0] -= self.done % self.every
        steps[-1] = min(steps[-1], left - int(steps[:-1].sum()))
        drawn = self.random.standard_normal(len(steps))
        least = steps * self.config.step_seconds
        work = np.maximum(least, steps * costs.step + np.sqrt(steps * costs.step_variance) * drawn)
        upload = np.full(len(steps), costs.upload)
        upload[0] = 0.0  # a start begins with none
        beside = np.minimum(work, upload * costs.beside) / costs.beside if costs.beside else upload
        taken = beside + np.maximum(0.0, work - beside * costs.beside) / costs.free
        ends = np.cumsum(np.maximum(taken, upload) + costs.blocking)
        return _Stretch(steps, work, taken, ends, ends + costs.upload)

    def _keep(self, stretch: _Stretch, segments: int) -> float:
        """Count the first `segments`, which checkpoints hold; returns when training went on behind the last of them."""
        if not segments:
            return 0.0
        steps, end = int(stretch.steps[:segments].sum()), float(stretch.ends[segments - 1])
        work, taken = float(stretch.work[:segments].sum()), float(stretch.taken[:segments].sum())
        self.done += steps
        self.useful += steps * self.config.step_seconds
        self.spent["stragglers"] += work - steps * self.config.step_seconds
        self.spent["data"] += taken - work
        self.spent["storage"] += end - taken
        if segments == len(stretch.ends):  # the last checkpoint is waited for
            self.spent["storage"] += self.costs.upload
        return end

    def _lose(self, stretch: _Stretch, after: float) -> None:
        """A node is gone `after` seconds: what no checkpoint holds is done again."""
        kept = self._keep(stretch, int(np.searchsorted(stretch.durable, after, side="right")))
        self.spent["repeated"] += after - kept

    def _notice(self, stretch: _Stretch, began: float, after: float) -> Generator[simpy.Event, Any, None]:
        """End the step and save, if there is time for it; another loss meanwhile is one without notice."""
        costs, segment = self.costs, int(np.searchsorted(stretch.ends, after, side="right"))
        before = float(stretch.ends[segment - 1]) if segment else 0.0
        if segment == len(stretch.ends):  # all but the last checkpoint is done
            needed, steps, work, taken = float(stretch.durable[-1]) - after, 0, 0.0, 0.0
        else:
            share = min(1.0, (after - before) / float(stretch.taken[segment]))
            whole = int(stretch.steps[segment])
            steps = min(whole, math.floor(share * whole) + 1)
            work, taken = (float(part[segment]) * steps / whole for part in (stretch.work, stretch.taken))
            written = max(before + taken, float(stretch.durable[segment - 1]) if segment else 0.0)
            needed = max(0.0, written - after) + costs.blocking + costs.upload
        try:
            yield self.environment.timeout(min(needed, self.config.notice_seconds))
        except simpy.Interrupt:
            self._lose(stretch, self.wall - began)
            return
        if needed > self.config.notice_seconds:
            self._lose(stretch, self.wall - began)
            return
        self._keep(stretch, segment)
        if not steps:
            return
        self.done += steps
        self.useful += steps * self.config.step_seconds
        self.spent["stragglers"] += work - steps * self.config.step_seconds
        self.spent["data"] += taken - work
        self.spent["storage"] += self.wall - began - before - taken
