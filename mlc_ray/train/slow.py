"""Workers that are slower than the others, as a GPU that is too hot or a node that is shared makes them.

Gradients are exchanged in every step, so the slowest worker sets everyone's pace, and the time of a step tells nothing.
What is compared is the time of forwards, for each token: in them workers do not wait for each other. At ZeRO stage 3
they do, for parameters, and a slow worker does not stand out.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Sequence
from statistics import mean, median_low
from typing import Any

import torch

logger = logging.getLogger(__name__)

WINDOW = 20
"""Steps over which paces are compared."""

FACTOR = 1.3
"""How many times the median's time makes a worker slow."""

_PAUSE = 60.0  # seconds between two messages of a worker


class Stopwatch:
    """Adds up the seconds of blocks: on a GPU by its own events, for which nothing waits, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._blocks: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        self._blocks.append((self._began, self._now()))

    def seconds(self) -> float:
        """Of all blocks so far; waits until the GPU has done them."""
        if self.on_gpu:
            if self._blocks:
                self._blocks[-1][1].synchronize()
            return sum(float(began.elapsed_time(ended)) / 1000 for began, ended in self._blocks)
        return sum(float(ended - began) for began, ended in self._blocks)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class SlowWorkers:
    """Says of its own worker that it is slow, at most once a minute."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._paces: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._said = float("-inf")

    def add(self, paces: Sequence[float]) -> None:
        """Take in a step: seconds for a token, by rank."""
        self._paces.append(paces)
        if len(self._paces) < WINDOW or len(paces) < 2:
            return
        means = [mean(each) for each in zip(*self._paces, strict=True)]
        typical = median_low(means)
        if means[self.rank] > FACTOR * typical and (now := time.monotonic()) - self._said >= _PAUSE:
            self._said = now
            logger.warning(
                "rank %d on %s is slow: over the last %d steps a token took it %.1f times as long in forwards as the "
                "median of %d workers, and all wait for the slowest",
                self.rank, socket.gethostname(), WINDOW, means[self.rank] / typical, len(means),
            )  # fmt: skip
