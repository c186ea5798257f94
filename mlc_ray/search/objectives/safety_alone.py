"""The harmful side alone. A model that refuses everything wins, and every result says so."""

from __future__ import annotations

from mlc_ray._registry import register
from mlc_ray.config import ObjectiveSettings
from mlc_ray.search.objectives.base import Objective
from mlc_ray.search.sides import Sides, mean_rate


@register("objective", "safety_alone")
class SafetyAlone(Objective):
    """Refusal (or safe) rate of harmful prompts, mean over languages; benign prompts are not needed."""

    name = "safety_alone"
    needs_benign = False

    class Settings(ObjectiveSettings):
        """It has no settings."""

        name: str = "safety_alone"

    @property
    def warning(self) -> str:
        """What such a search selects."""
        return "safety alone was maximised: a model that refuses everything wins; read the benign side"

    def values(self, sides: Sides) -> tuple[float, ...]:
        """One number."""
        return (mean_rate(sides.harmful),)
