"""Both sides at once: the Pareto front of the harmful and the benign side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mlc_ray._registry import register
from mlc_ray.config import ObjectiveSettings
from mlc_ray.search.objectives.base import BENIGN, HARMFUL, Direction, Objective
from mlc_ray.search.sides import Sides, mean_rate


@register("objective", "pareto")
class Pareto(Objective):
    """Refusal (or safe) rate of harmful prompts and compliance rate of benign ones, each the mean over languages."""

    name = "pareto"
    metrics = (HARMFUL, BENIGN)
    directions: ClassVar[tuple[Direction, ...]] = ("maximize", "maximize")

    class Settings(ObjectiveSettings):
        """It has no settings."""

        name: str = "pareto"

    def values(self, sides: Sides) -> tuple[float, ...]:
        """Both sides."""
        return mean_rate(sides.harmful), mean_rate(sides.benign)

    def rank(self, values: Sequence[float]) -> float:
        """Both sides together."""
        return sum(values)
