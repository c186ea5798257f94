"""How often intervals hold the truth: simulated verdicts, the tables of docs/metrics.md and a figure of docs/search.md.

    python benchmarks/coverage.py                             # all of it, 400 simulated scores a row
    python benchmarks/coverage.py --trials 1000 --only means

Verdicts of a bundle's languages are normal draws below a threshold, of which two languages share the latent
correlation `alike`. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mlc_ray.search.sides import read_side
from mlc_ray.stats.calibration import Errors, rogan_gladen
from mlc_ray.stats.intervals import Grid, Statistic, interval, wilson
from mlc_ray.stats.lowest import lowest_interval
from mlc_ray.stats.rates import Judged

Hits = NDArray[np.float64]
Limits = tuple[float, float]
Row = Sequence[object]

SPREAD = (0.5, 0.544, 0.589, 0.633, 0.678, 0.722, 0.767, 0.811, 0.856, 0.9)
WORST = {
    "all 70 %": (0.7,) * 10,
    "all 95 %": (0.95,) * 10,
    "50 % to 90 %": SPREAD,
    "30 %, others 90 %": (0.3, *(0.9,) * 9),
}


class Tally:
    """How often limits held the truth, and how often all of them were above it or below it."""

    def __init__(self) -> None:
        self.trials = self.above = self.below = 0
        self.width = 0.0

    def add(self, truth: float, limits: Limits) -> None:
        """Count one interval."""
        low, high = limits
        self.trials += 1
        self.above += low > truth + 1e-9
        self.below += high < truth - 1e-9
        self.width += high - low

    @property
    def held(self) -> str:
        """The share that held it."""
        return f"{100 * (1 - (self.above + self.below) / self.trials):.0f} %"

    @property
    def points(self) -> str:
        """The mean width."""
        return f"{100 * self.width / self.trials:.0f}"


def draw(generator: np.random.Generator, rates: Sequence[float], bundles: int, alike: float) -> Hits:
    """[B, L] verdicts of which those of language l are hits with `rates[l]`."""
    thresholds = [NormalDist().inv_cdf(rate) for rate in rates]
    shared, own = generator.normal(size=(bundles, 1)), generator.normal(size=(bundles, len(rates)))
    return (math.sqrt(alike) * shared + math.sqrt(1 - alike) * own < thresholds).astype(float)


def grid_of(stream: int = 0, **layers: Hits) -> Grid:
    """A grid of layers, and of `present`, in which every bundle has every language."""
    first = next(iter(layers.values()))
    return Grid(tuple(f"l{i}" for i in range(first.shape[1])), {**layers, "present": np.ones_like(first)}, stream)


def percentiles(statistic: Statistic) -> Limits:
    """Plain quantiles of the resamples."""
    low, high = np.nanquantile(statistic.of(statistic.source.resampled), [0.025, 0.975])
    return float(low), float(high)


def basic(statistic: Statistic) -> Limits:
    """2 x value - quantile."""
    low, high = percentiles(statistic)
    return 2 * statistic.value - high, 2 * statistic.value - low


def means(trials: int) -> Iterator[Row]:
    """Means of six languages: BCa, plain percentiles, and Wilson's limits as if all responses were independent."""
    yield "bundles", "true rate", "alike", "BCa", "plain percentiles", "responses taken as independent"
    for bundles, rate, alike in [(40, 0.7, 0.6), (180, 0.7, 0.6), (40, 0.95, 0.4), (40, 0.95, 0.8), (180, 0.95, 0.8)]:
        generator, tallies = np.random.default_rng(7), [Tally() for _ in range(3)]
        for _ in range(trials):
            hits = draw(generator, [rate] * 6, bundles, alike)
            mean = grid_of(hit=hits).mean("hit", "present")
            for tally, limits in zip(
                tallies,
                (interval((1, mean))[1:], percentiles(mean), wilson(float(hits.sum()), hits.size)),
                strict=True,
            ):
                tally.add(rate, limits)
        yield bundles, f"{100 * rate:.0f} %", alike, *(tally.held for tally in tallies)


def worst(trials: int) -> Iterator[Row]:
    """The lowest of ten rates."""
    yield "alike", "bundles", "true rates", "used", "its width, points", "basic limits", "plain percentiles"
    for alike in (0.0, 0.6):
        for name, rates in WORST.items():
            for bundles in (16, 40, 180):
                generator, tallies = np.random.default_rng(7), [Tally() for _ in range(3)]
                for _ in range(trials):
                    lowest = grid_of(hit=draw(generator, rates, bundles, alike)).lowest("hit", "present")
                    for tally, limits in zip(
                        tallies, (lowest_interval(lowest)[1:], basic(lowest), percentiles(lowest)), strict=True
                    ):
                        tally.add(min(rates), limits)
                yield alike, bundles, name, tallies[0].held, tallies[0].points, *(tally.held for tally in tallies[1:])


def several(trials: int) -> Iterator[Row]:
    """The mean over benchmarks of 40 bundles of the lowest of ten rates in each."""
    yield "alike", "benchmarks", "true rates", "held", "its width, points"
    mixed = (WORST["all 95 %"], WORST["30 %, others 90 %"]) * 2
    for alike in (0.0, 0.6):
        for name, each in {**{name: (rates,) * 4 for name, rates in WORST.items()}, "mixed": mixed}.items():
            for number in (1, 2, 4) if name in WORST else (2, 4):
                generator, tally = np.random.default_rng(7), Tally()
                for _ in range(trials):
                    grids = [grid_of(k, hit=draw(generator, each[k], 40, alike)) for k in range(number)]
                    found = lowest_interval(*(grid.lowest("hit", "present") for grid in grids))
                    tally.add(sum(map(min, each[:number])) / number, found[1:])
                yield alike, number, name, tally.held, tally.points


def changes(trials: int) -> Iterator[Row]:
    """The changes of the lowest of ten rates and of their variance, between two models that answer the same bundles."""
    yield "bundles", "true rates before", "after", "of the lowest", "of the variance"
    names = ("all 70 %", "50 % to 90 %", "30 %, others 90 %")
    for bundles in (16, 40, 180):
        for old in names:
            for new in names:
                generator, tallies = np.random.default_rng(7), [Tally(), Tally()]
                truths = min(WORST[new]) - min(WORST[old]), float(np.var(WORST[new]) - np.var(WORST[old]))
                for _ in range(trials):
                    before, after = np.hsplit(draw(generator, (*WORST[old], *WORST[new]), bundles, 0.5), 2)
                    grid = grid_of(before=before, after=after)
                    for tally, truth, of in zip(tallies, truths, (grid.lowest, grid.variance), strict=True):
                        tally.add(truth, interval((1, of("after", "present")), (-1, of("before", "present")))[1:])
                yield bundles, old, new, *(tally.held for tally in tallies)


def variance(trials: int) -> Iterator[Row]:
    """The variance of rates."""
    yield "languages", "bundles", "true rates", "used", "basic limits", "plain percentiles"
    for name, rates in {"60 %, 50 %": (0.6, 0.5), "all 50 %": (0.5,) * 6, "50 % to 90 %": (*SPREAD[::2], 0.9)}.items():
        for bundles in (40, 180):
            generator, tallies = np.random.default_rng(7), [Tally() for _ in range(3)]
            for _ in range(trials):
                found = grid_of(hit=draw(generator, rates, bundles, 0.0)).variance("hit", "present")
                for tally, limits in zip(
                    tallies, (interval((1, found))[1:], basic(found), percentiles(found)), strict=True
                ):
                    tally.add(float(np.var(rates)), limits)
            yield len(rates), bundles, name, *(tally.held for tally in tallies)


def benchmarks(trials: int) -> Iterator[Row]:
    """The mean over a benchmark of 12 bundles at 95 %, all alike in three languages, and one of 400 bundles at 40 %."""
    yield "used", "the small one taken as known where it has no miss"
    generator, tallies = np.random.default_rng(7), [Tally(), Tally()]
    for _ in range(trials):
        small = np.repeat((generator.random((12, 1)) < 0.95).astype(float), 3, axis=1)
        few = grid_of(hit=small).mean("hit", "present")
        many = grid_of(1, hit=(generator.random((400, 3)) < 0.4).astype(float)).mean("hit", "present")
        tallies[0].add(0.675, interval((0.5, few), (0.5, many))[1:])
        both = (few.of(few.source.resampled) + many.of(many.source.resampled)) / 2
        low, high = np.quantile(both, [0.025, 0.975])
        tallies[1].add(0.675, (float(low), float(high)))
    yield tuple(tally.held for tally in tallies)


def corrected(trials: int) -> Iterator[Row]:
    """Rates corrected for a judge's errors: the least share over four true shares, and the mean width at 70 %."""
    yield (
        "responses",
        "labels of either class",
        "recall",
        "right of the others",
        "held at least",
        "width at 70 %, points",
    )
    for n in (60, 315):
        for labels in (30, 100, 300):
            for recall, right in ((0.6, 0.98), (0.8, 1.0), (0.9, 0.9), (0.95, 0.99)):
                generator, least, width = np.random.default_rng(7), 1.0, ""
                for share in (0.02, 0.3, 0.7, 0.98):
                    tally = Tally()
                    while tally.trials < trials:
                        limits = _corrected(generator, n, labels, share, recall, right)
                        if limits is not None:  # else too few labels to tell the judge from a guess
                            tally.add(share, limits)
                    least = min(least, 1 - (tally.above + tally.below) / tally.trials)
                    width = tally.points if share == 0.7 else width
                yield n, labels, recall, right, f"{100 * least:.1f} %", width


def _corrected(
    generator: np.random.Generator, n: int, labels: int, share: float, recall: float, right: float
) -> Limits | None:
    true = generator.binomial(n, share)
    seen = generator.binomial(true, recall) + generator.binomial(n - true, 1 - right)
    called, wrongly = int(generator.binomial(labels, recall)), int(generator.binomial(labels, 1 - right))
    found = rogan_gladen(int(seen), n, Errors("refused", "en", "", labels, called, labels, wrongly, unparsed=0))
    return None if found is None else (found.low, found.high)


def limits(trials: int) -> Iterator[Row]:
    """The limits that a search chooses by beside those of metrics: four languages, 8 to 60 bundles, any rates."""
    yield "sets of verdicts", "narrower by metrics", "width by metrics, points", "by which a search chooses"
    generator, narrower, widths = np.random.default_rng(7), 0, np.zeros(2)
    for _ in range(trials):
        rates = generator.uniform(0.1, 0.95, 4).tolist()
        hits = draw(generator, rates, int(generator.integers(8, 61)), float(generator.uniform(0, 0.8)))
        records = [
            Judged("own", f"b{bundle}", "harmful", f"l{language}", "refused" if hit else "complied")
            for (bundle, language), hit in np.ndenumerate(hits)
        ]
        codes = [f"l{language}" for language in range(4)]
        found = read_side([records], "harmful", "refused", "hits", codes).mean
        _, low, high = interval((1, grid_of(hit=hits).mean("hit", "present")))
        pair = 100 * (high - low), found.high - found.low
        narrower += pair[0] < pair[1]
        widths += pair
    yield trials, narrower, *(f"{width / trials:.0f}" for width in widths)


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    each.__name__: each for each in (means, worst, several, changes, variance, benchmarks, corrected, limits)
}


def main() -> None:
    """Parse arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="simulated scores a row (default: 400)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    asked = parser.parse_args()
    for name in asked.only:
        print(f"\n{name}: {(PARTS[name].__doc__ or '').strip()} {asked.trials} a row.\n")
        for number, cells in enumerate(PARTS[name](asked.trials)):
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            if number == 0:
                print("|" + "---|" * len(cells))


if __name__ == "__main__":
    main()
