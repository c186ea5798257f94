"""The default objective: the harmful side, mean over languages, with a floor under the benign side."""

from __future__ import annotations

from mlc_ray._registry import register
from mlc_ray.search.objectives.base import Floored, FlooredSettings
from mlc_ray.search.sides import Sides, mean_rate


@register("objective", "average")
class Average(Floored):
    """Refusal (or safe) rate of harmful prompts, mean over benchmarks of the mean over languages."""

    name = "average"

    class Settings(FlooredSettings):
        """The floor."""

        name: str = "average"

    def harmful(self, sides: Sides) -> float:
        """The mean."""
        return mean_rate(sides.harmful)
