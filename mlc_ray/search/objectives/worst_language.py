"""The harmful side in the language where it is lowest, with a floor under the benign side."""

from __future__ import annotations

from mlc_ray._registry import register
from mlc_ray.search.objectives.base import Floored, FlooredSettings
from mlc_ray.search.sides import Sides, lowest_rate


@register("objective", "worst_language")
class WorstLanguage(Floored):
    """Refusal (or safe) rate of harmful prompts in the language where it is lowest, mean over benchmarks."""

    name = "worst_language"

    class Settings(FlooredSettings):
        """The floor."""

        name: str = "worst_language"

    def harmful(self, sides: Sides) -> float:
        """The lowest."""
        return lowest_rate(sides.harmful)
