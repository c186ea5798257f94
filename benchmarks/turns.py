"""An engine that waits for its turn before each step, so that two runs are timed in turn, each alone on the machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from mlc_ray.config import TrainConfig
from mlc_ray.train.engines.deepspeed import DeepSpeed
from mlc_ray.train.model import PolicyWithExtractor

TURN = "turn"


class TakingTurns(DeepSpeed):
    """DeepSpeed; from one `begin` to the next is one step with all that the loop does around it."""

    class Settings(DeepSpeed.Settings):
        """DeepSpeed, and whose turn it is."""

        folder: str = Field(description="Where the two runs say whose turn it is, and write their seconds.")
        me: str = Field(description="This run's name.")
        other: str = Field(description="The other run's name.")
        steps: int = Field(description="Steps that both take.")

    def __init__(self, module: PolicyWithExtractor, config: TrainConfig, device: torch.device) -> None:
        super().__init__(module, config, device)
        settings: Any = config.engine
        self.turn = Path(settings.folder) / TURN
        self.out = Path(settings.folder) / f"{settings.me}.json"
        self.me, self.other, self.steps = settings.me, settings.other, settings.steps
        self.started: float | None = None
        self.seconds: list[float] = []

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """The step before is over: let the other run take one, and wait for it."""
        self.hand_over()
        while self.turn.read_text(encoding="utf-8") != self.me:
            time.sleep(0.0005)
        self.started = time.perf_counter()
        super().begin(*args, **kwargs)

    def step(self, learning_rate: float) -> float:
        """After the last step nobody begins another: hand over here."""
        norm = super().step(learning_rate)
        if len(self.seconds) == self.steps - 1:
            self.hand_over()
            self.out.write_text(json.dumps(self.seconds), encoding="utf-8")
        return norm

    def hand_over(self) -> None:
        """End the step that was begun, if any."""
        if self.started is not None:
            self.seconds.append(time.perf_counter() - self.started)
            self.started = None
            temporary = self.turn.with_suffix(f".{self.me}")
            temporary.write_text(self.other, encoding="utf-8")
            temporary.replace(self.turn)
