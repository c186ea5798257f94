"""How responses to one bundle go together, outcome by outcome. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from mlc_ray.stats.intervals import design_effect


def design_effects(verdicts: Iterable[tuple[str, str]]) -> Mapping[Literal["hits", "misses"], float]:
    """`intervals.design_effect` of the rate of each outcome, from bundle and outcome of each response."""
    found = Counter(verdicts)
    asked: Counter[str] = Counter()
    for (bundle, _), number in found.items():
        asked[bundle] += number
    present = np.array(list(asked.values()), np.float64)
    outcomes: tuple[Literal["hits", "misses"], ...] = ("hits", "misses")
    return {
        counted: design_effect(np.array([found[bundle, counted] for bundle in asked], np.float64), present)
        for counted in outcomes
    }
