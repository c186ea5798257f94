"""Criteria that rank layers before training, each with an interval over bundles; without Ray.

A criterion is a number of one layer's states; the higher, the earlier the layer is tried. docs/search.md says what each
reads, and what came of the layers that they ranked first.

    headroom     (1 - share) x (2 AUC of English - 1)
    silhouette   silhouette of the states by bundle, less that by language (LASA, arXiv 2604.12710)
    separation   mean cosine within bundles, less that between them
    transfer     mean AUC, in the other languages, of a harmful/benign probe trained on English

Intervals are percentiles of a bootstrap over bundles. The probes are not trained again and a state's nearest other
bundle stays the same: with replacement, copies of a bundle would be trained on and asked about, and be each other's
nearest. So an interval says how far the number depends on the bundles that it averages over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mlc_ray.config.search import Criterion
from mlc_ray.losses.measures import MIN_PER_KIND, RIDGE, probe_wins
from mlc_ray.losses.mlc import leading_share, singular_values, unit_rows
from mlc_ray.stats.rates import Interval

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
RESAMPLES = 1_000
_AT_ONCE = 100  # resamples: at 1,536 rows of 12 languages, 15 MB each of what is weighted
_SEED = 20_260
_LEVELS = [0.025, 0.975]
_ALIKE = 1e-9  # what differs by less, as states that are the same do by rounding, is alike (as in `probe_wins`)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer, an index into Hugging Face's `hidden_states`.

    `share` is s1^2 / sum s^2 within bundles, mean over bundles: 1 when all languages are collinear already. `within`
    and `between` are mean cosines of rows of one bundle and of different bundles. `separability` is, by language, the
    AUC of a linear probe that tells harmful from benign (`losses.measures.probe_auc`; empty with too few of either),
    and `transfer` by language that of a probe trained on English states and asked in the other language. `criteria`
    are by name, None of one that these bundles cannot give.
    """

    layer: int
    share: float
    within: float
    between: float
    separability: Mapping[str, float]
    transfer: Mapping[str, float]
    criteria: Mapping[str, Interval | None]

    @property
    def mean_separability(self) -> float | None:
        """Mean over languages, None where there is none."""
        values = list(self.separability.values())
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class _Pairs:
    """What `probe_wins` says of harmful bundles `ups` and benign ones `downs`: `wins` [P, Q]."""

    ups: Tensor
    downs: Tensor
    wins: Tensor

    def auc(self, weights: Tensor) -> Tensor:
        """[K] AUCs of bundles that count `weights` [K, N] times."""
        up, down = weights[:, self.ups], weights[:, self.downs]
        return (up @ self.wins * down).sum(dim=1) / (up.sum(dim=1) * down.sum(dim=1))


def layer_statistics(
    layer: int, states: Tensor, present: Tensor, harmful: Tensor, languages: Sequence[str]
) -> LayerStatistics:
    """Statistics of a layer's states [N, L, H]; `present` [N, L], `harmful` [N], `languages` the L codes."""
    made = _Layer(states, present, harmful, languages)
    every = torch.ones(1, len(states), dtype=torch.float64)
    once = made.numbers(every)
    drawn = resamples(len(states))
    parts = [made.numbers(drawn[start : start + _AT_ONCE]) for start in range(0, len(drawn), _AT_ONCE)]
    criteria: dict[str, Interval | None] = dict.fromkeys(CRITERIA)
    for name in CRITERIA:
        if name in once:
            low, high = np.nanquantile(torch.cat([part[name] for part in parts]).numpy(), _LEVELS)
            criteria[name] = Interval(float(once[name]), float(low), float(high))
    return LayerStatistics(
        layer,
        share=float(once["share"]),
        within=float(once["within"]),
        between=float(once["between"]),
        separability={code: float(pairs.wins.mean()) for code, pairs in made.own.items()},
        transfer={code: float(made.transferred(code, every)) for code in made.across},
        criteria=criteria,
    )


def resamples(bundles: int) -> Tensor:
    """How often each bundle is drawn with replacement, [RESAMPLES, N].

    Not kind by kind: pairs of bundles of one kind would then be drawn together less often than others, by 1 in the
    number of that kind, and cosines between bundles be biased.
    """
    generator = np.random.default_rng(_SEED)
    drawn = generator.multinomial(bundles, np.full(bundles, 1 / bundles), size=RESAMPLES)
    return torch.from_numpy(drawn).double()


class _Layer:
    """What the numbers of one layer are averages of, for any number of times that each bundle counts."""

    def __init__(self, states: Tensor, present: Tensor, harmful: Tensor, languages: Sequence[str]) -> None:
        several = present.sum(dim=1) > 1
        self.several = several.double()
        self.shares = torch.zeros(len(states), dtype=torch.float64)
        self.shares[several] = leading_share(singular_values(unit_rows(states[several], present[several]))).double()
        rows = unit_rows(states, present).double()
        self.counts = present.sum(dim=1).double()
        sums = rows.sum(dim=1)
        self.products = sums @ sums.T  # of all rows of a bundle with all of another, or of its own
        self.own: dict[str, _Pairs] = {}
        for index, code in enumerate(languages):
            here = present[:, index].nonzero()[:, 0]
            kinds = harmful[here]
            if min(int(kinds.sum()), int((~kinds).sum())) >= MIN_PER_KIND:
                self.own[code] = _Pairs(here[kinds], here[~kinds], probe_wins(states[here, index], kinds))
        self.across: dict[str, list[_Pairs]] = {}
        if "en" in self.own:
            english = list(languages).index("en")
            self.across = {
                code: _transfers(states, present, harmful, english, languages.index(code))
                for code in self.own
                if code != "en"
            }
        self.silhouettes = _Silhouettes(rows, present)

    def numbers(self, weights: Tensor) -> dict[str, Tensor]:
        """[K] values of each number and criterion that there is, where bundles count `weights` [K, N] times."""
        share = (weights * self.several * self.shares).sum(dim=1) / (weights * self.several).sum(dim=1)
        inside = self.products.diagonal()
        within = (weights @ (inside - self.counts)) / (weights @ (self.counts.square() - self.counts))
        apart = self.products - torch.diag(inside)
        pairs = (weights @ self.counts).square() - weights.square() @ self.counts.square()
        between = (weights @ apart * weights).sum(dim=1) / pairs
        knowledge = torch.ones(len(weights), dtype=torch.float64)
        if "en" in self.own:
            knowledge = (2 * self.own["en"].auc(weights) - 1).clamp(min=0)
        transfers = [self.transferred(code, weights) for code in self.across]
        transfer = {"transfer": torch.stack(transfers).nanmean(dim=0)} if transfers else {}
        return {
            "share": share,
            "within": within,
            "between": between,
            "headroom": (1 - share) * knowledge,
            "silhouette": self.silhouettes.difference(weights),
            "separation": within - between,
            **transfer,
        }

    def transferred(self, code: str, weights: Tensor) -> Tensor:
        """[K] AUCs in a language, the mean of both halves."""
        return torch.stack([half.auc(weights) for half in self.across[code]]).nanmean(dim=0)


class _Silhouettes:
    """Silhouettes of the rows by two labels, cosine distance (Rousseeuw 1987): 0 of a row alone in its cluster."""

    def __init__(self, rows: Tensor, present: Tensor) -> None:
        self.bundle, self.language = present.nonzero(as_tuple=True)
        flat = rows[self.bundle, self.language]
        distance = (1 - flat @ flat.T).clamp(min=0)
        self.grid = torch.zeros(len(flat), *present.shape, dtype=distance.dtype)  # [R, N, L]
        self.grid[:, self.bundle, self.language] = distance
        self.present = present.double()
        counts = self.present.sum(dim=1)
        sums = self.grid.sum(dim=2)  # [R, N]
        own = torch.arange(len(flat)), self.bundle
        cohesion = sums[own] / (counts[self.bundle] - 1).clamp(min=1)
        means = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
        means[own] = torch.inf
        self.by_bundle = _silhouette(cohesion, means.min(dim=1).values, counts[self.bundle] > 1)

    def difference(self, weights: Tensor) -> Tensor:
        """[K] mean silhouettes by bundle less those by language, of bundles that count `weights` [K, N] times."""
        sums = torch.einsum("kn,rnl->krl", weights, self.grid)
        counts = (weights @ self.present).unsqueeze(1).expand_as(sums).clone()
        own = torch.arange(len(self.bundle)), self.language
        counts[:, own[0], own[1]] -= weights[:, self.bundle]  # not the distance to itself, which is 0
        means = torch.where(counts > 0, sums / counts.clamp(min=1e-9), torch.inf)
        cohesion, alone = means[:, own[0], own[1]].clone(), counts[:, own[0], own[1]] <= 0
        means[:, own[0], own[1]] = torch.inf
        by_language = _silhouette(torch.where(alone, 0.0, cohesion), means.min(dim=2).values, ~alone)
        times = weights[:, self.bundle]
        return (times * (self.by_bundle - by_language)).sum(dim=1) / times.sum(dim=1)


def _silhouette(cohesion: Tensor, separation: Tensor, several: Tensor) -> Tensor:
    """(b - a) / max(a, b) where a cluster has rows and there is another, else 0, as of rows that are all alike."""
    most = torch.maximum(cohesion, separation)
    there = several & torch.isfinite(separation) & (most > _ALIKE)
    return torch.where(there, (separation - cohesion) / torch.where(there, most, 1.0), 0.0)


def _transfers(states: Tensor, present: Tensor, harmful: Tensor, source: int, target: int) -> list[_Pairs]:
    """What ridge probes trained on the language `source` say in the language `target`, each centred by itself.

    A bundle is never asked about by a probe that was trained on it in another language: the probe is trained on one
    half of the bundles and asked about the other, both ways.
    """
    found = []
    half = torch.zeros(len(states), dtype=torch.bool)
    for kind in (harmful, ~harmful):
        half[kind.nonzero()[::2, 0]] = True
    for train in (half, ~half):
        fit, ask = train & present[:, source], (~train & present[:, target]).nonzero()[:, 0]
        x, y = _centred(states[fit, source]), torch.where(harmful[fit], 1.0, -1.0).double()
        kernel = x @ x.T
        scale = kernel.diagonal().mean()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # of states that are all the same: chance
        weights = x.T @ torch.linalg.solve(kernel / scale + RIDGE * torch.eye(len(x), dtype=x.dtype), y) / scale
        scores = _centred(states[ask, target]) @ weights
        difference = scores[harmful[ask]].unsqueeze(1) - scores[~harmful[ask]].unsqueeze(0)
        wins = torch.where(difference.abs() < _ALIKE, 0.5, (difference > 0).double())
        found.append(_Pairs(ask[harmful[ask]], ask[~harmful[ask]], wins))
    return found


def _centred(states: Tensor) -> Tensor:
    return states.double() - states.double().mean(dim=0)
