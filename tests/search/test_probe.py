from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlc_ray.data.tables import keys_of
from mlc_ray.losses.mlc import leading_share, singular_values, unit_rows
from mlc_ray.search import criteria
from mlc_ray.search.criteria import CRITERIA, LayerStatistics, resamples
from mlc_ray.search.probe import (
    Probe,
    ProbeError,
    choose_bundles,
    probe_plot,
    probe_table,
    statistics,
    statistics_table,
)
from mlc_ray.stats.rates import Interval
from mlc_ray.storage import Place

LANGUAGES = ["bn", "en", "sw"]


def made(n: int = 24, hidden: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States [N, 3, 3, H]: layer 0 is noise; in layer 1 only English knows kinds; in layer 2 all, in one direction."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, 3, 3, hidden, generator=generator)
    harmful = torch.arange(n) % 2 == 0
    direction = 8 * torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
    sign = torch.where(harmful, 1.0, -1.0)[:, None]
    states[:, 1, 1] += sign * direction
    states[:, :, 2] += (sign * direction)[:, None]
    present = torch.ones(n, 3, dtype=torch.bool)
    present[0, 0] = present[5, 2] = False
    states[~present] = 0
    return states, present, harmful


@pytest.fixture(scope="module")
def probed() -> Probe:
    return statistics(*made(), LANGUAGES)


# ------------------------------------------------------------------------------- every criterion, written out in numpy


class Rows:
    """The rows of a layer as plain lists, each drawn as often as its bundle."""

    def __init__(self, layer: int, times: np.ndarray) -> None:
        states, present, harmful = (each.numpy() for each in made())
        self.states, self.present, self.harmful = states[:, :, layer].astype(np.float64), present, harmful
        self.times = times
        self.rows = [(n, k) for n in range(24) for k in range(3) if present[n, k]]

    def unit(self, n: int, k: int) -> Any:
        return self.states[n, k] / np.linalg.norm(self.states[n, k])

    def distance(self, one: tuple[int, int], other: tuple[int, int]) -> float:
        return 1 - float(self.unit(*one) @ self.unit(*other))

    def mean(self, one: tuple[int, int], others: list[tuple[int, int]]) -> float:
        """The mean distance to rows of drawn bundles, each as often as it was drawn; NaN of none."""
        times = [self.times[n] for n, _ in others]
        distances = [self.distance(one, other) for other in others]
        return float(np.average(distances, weights=times)) if sum(times) else float("nan")

    def average(self, values: list[float]) -> float:
        return float(np.average(values, weights=[self.times[n] for n, _ in self.rows]))

    def silhouette(self) -> float:
        by_bundle, by_language = [], []
        for n, k in self.rows:
            own = [row for row in self.rows if row[0] == n and row[1] != k]
            if not own:
                by_bundle.append(0.0)
            else:
                a = np.mean([self.distance((n, k), row) for row in own])
                others = [
                    np.mean([self.distance((n, k), row) for row in self.rows if row[0] == m])
                    for m in range(24)
                    if m != n and self.present[m].any()
                ]
                by_bundle.append((min(others) - a) / max(min(others), a))
            a = self.mean((n, k), [row for row in self.rows if row[1] == k and row[0] != n])
            b = min(self.mean((n, k), [row for row in self.rows if row[1] == j]) for j in range(3) if j != k)
            by_language.append((b - a) / max(a, b))
        return self.average(by_bundle) - self.average(by_language)

    def share(self) -> float:
        several = [n for n in range(24) if self.present[n].sum() > 1]
        shares = []
        for n in several:
            rows = np.stack([self.unit(n, k) for k in range(3) if self.present[n, k]])
            values = np.linalg.svd(rows, compute_uv=False)
            shares.append(values[0] ** 2 / (values**2).sum())
        return float(np.average(shares, weights=self.times[several]))

    def separation(self) -> float:
        within, between = [], []
        for (n, k), (m, j) in itertools.combinations(self.rows, 2):
            cosine = float(self.unit(n, k) @ self.unit(m, j))
            if n == m:
                within.append((cosine, self.times[n]))
            else:
                between.append((cosine, self.times[n] * self.times[m]))
        means = [np.average([v for v, _ in each], weights=[t for _, t in each]) for each in (within, between)]
        return float(means[0] - means[1])

    def auc(self, wins: list[tuple[float, int, int]]) -> float:
        times = [self.times[up] * self.times[down] for _, up, down in wins]
        return float(np.average([won for won, _, _ in wins], weights=times))

    def english(self) -> float:
        """Leave-pair-out: a probe is trained for every pair, in the primal form, with an intercept of unit prior."""
        rows = [n for n in range(24) if self.present[n, 1]]
        x = self.states[rows, 1]
        x = x - x.mean(axis=0)
        x = x / np.sqrt((x**2).sum(axis=1).mean())
        x = np.hstack([x, np.ones((len(x), 1))])
        y = np.where(self.harmful[rows], 1.0, -1.0)
        wins = []
        for i, j in itertools.product(range(len(rows)), repeat=2):
            if y[i] > 0 > y[j]:
                kept = [r for r in range(len(rows)) if r not in (i, j)]
                hat = np.linalg.solve(x[kept].T @ x[kept] + 0.1 * np.eye(x.shape[1]), x[kept].T @ y[kept])
                difference = (x[i] - x[j]) @ hat
                wins.append((float(difference > 0), rows[i], rows[j]))
        return self.auc(wins)

    def transfer(self) -> float:
        halves: list[list[int]] = [[], []]
        for kind in (True, False):
            for place, n in enumerate(n for n in range(24) if self.harmful[n] == kind):
                halves[place % 2].append(n)
        by_language = []
        for k in (0, 2):
            found = []
            for fit, ask in (halves, halves[::-1]):
                fit = [n for n in fit if self.present[n, 1]]
                ask = [n for n in ask if self.present[n, k]]
                x = self.states[fit, 1] - self.states[fit, 1].mean(axis=0)
                scale = (x**2).sum(axis=1).mean()
                y = np.where(self.harmful[fit], 1.0, -1.0)
                hat = np.linalg.solve(x.T @ x / scale + 0.1 * np.eye(x.shape[1]), x.T @ y)
                z = self.states[ask, k] - self.states[ask, k].mean(axis=0)
                scores = dict(zip(ask, z @ hat, strict=True))
                wins = [
                    (float(scores[up] > scores[down]), up, down)
                    for up, down in itertools.product(ask, repeat=2)
                    if self.harmful[up] and not self.harmful[down]
                ]
                found.append(self.auc(wins))
            by_language.append(np.mean(found))
        return float(np.mean(by_language))

    def value(self, criterion: str) -> float:
        if criterion == "headroom":
            return (1 - self.share()) * max(0.0, 2 * self.english() - 1)
        return float(getattr(self, criterion)())


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_is_its_formula_in_numpy(criterion: str, layer: int, probed: Probe) -> None:
    found = probed.layers[layer].criteria[criterion]
    assert found is not None
    assert found.value == pytest.approx(Rows(layer, np.ones(24)).value(criterion), abs=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_so_it_is_where_bundles_count_as_often_as_they_are_drawn(criterion: str) -> None:
    states, present, harmful = made()
    drawn = resamples(24)[7]
    layer = criteria._Layer(states[:, :, 2], present, harmful, LANGUAGES)
    (found,) = layer.numbers(drawn.unsqueeze(0))[criterion].tolist()
    assert found == pytest.approx(Rows(2, drawn.numpy()).value(criterion), abs=1e-6)


def test_resamples_draw_bundles_with_replacement_and_alike_in_every_process() -> None:
    drawn = resamples(14)
    assert drawn.shape == (criteria.RESAMPLES, 14) and bool((drawn.sum(dim=1) == 14).all())
    assert len({tuple(row) for row in drawn.tolist()}) > 900
    assert torch.equal(drawn, resamples(14))


def test_intervals_hold_the_number_and_narrow_with_more_bundles(probed: Probe) -> None:
    more = statistics(*made(96), LANGUAGES)
    for few, many in zip(probed.layers, more.layers, strict=True):
        for name in CRITERIA:
            one, other = few.criteria[name], many.criteria[name]
            assert one is not None and other is not None
            assert one.low <= one.value <= one.high and other.low <= other.value <= other.high, (few.layer, name)
    for name in ("silhouette", "separation"):
        widths = [probe.layers[2].criteria[name] for probe in (probed, more)]
        assert widths[1].high - widths[1].low < 0.8 * (widths[0].high - widths[0].low), name  # type: ignore[union-attr]


def test_numbers_against_the_formulas_written_out(probed: Probe) -> None:
    states, present, _ = made()
    layer = probed.layers[2]
    shares = leading_share(singular_values(unit_rows(states[:, :, 2], present)))
    assert layer.share == pytest.approx(float(shares.mean()))
    found = layer.criteria["separation"]
    assert found is not None and found.value == pytest.approx(layer.within - layer.between)


def test_who_knows_what_is_found(probed: Probe) -> None:
    noise, english, everyone = probed.layers
    assert abs(noise.separability["en"] - 0.5) < 0.35
    assert english.separability["en"] > 0.95
    assert max(english.separability["bn"], english.separability["sw"]) < 0.8
    assert min(everyone.separability.values()) > 0.95
    assert set(everyone.transfer) == {"bn", "sw"}
    assert min(everyone.transfer.values()) > 0.95
    assert max(english.transfer.values()) < 0.8


def test_with_one_kind_only_consistency_is_told() -> None:
    states, present, _ = made()
    harmful = torch.ones(24, dtype=torch.bool)
    probe = statistics(states, present, harmful, LANGUAGES)
    assert all(not layer.separability and not layer.transfer for layer in probe.layers)
    headroom = probe.layers[1].criteria["headroom"]
    assert headroom is not None and headroom.value == pytest.approx(1 - probe.layers[1].share)
    assert probe.layers[1].criteria["transfer"] is None and probe.ranking("transfer") == []
    assert "·" in probe.markdown()
    with pytest.raises(ProbeError, match=r"criterion='transfer' needs English .* 24 harmful and 0 benign .* another"):
        statistics(states, present, harmful, LANGUAGES, "transfer")


def test_without_enough_english_bundles_headroom_says_that_it_is_the_share_alone(
    caplog: pytest.LogCaptureFixture, probed: Probe
) -> None:
    states, present, harmful = made(14)  # seven of each kind
    few = statistics(states, present, harmful, LANGUAGES)
    note = "headroom is 1 - share alone: English has fewer than 8 harmful or benign bundles"
    assert few.plain()["note"] == note and f"\n{note}.\n" in few.markdown() and note in caplog.text
    foreign = statistics(*made(), ["bn", "ru", "sw"])
    assert foreign.note == note
    assert probed.plain()["note"] is None and "alone" not in probed.markdown()


@pytest.mark.parametrize("fill", [1.0, 0.37])
def test_states_that_are_all_the_same_tell_nothing(fill: float) -> None:
    _, _, harmful = made()
    for layer in statistics(torch.full((24, 3, 1, 576), fill), torch.ones(24, 3).bool(), harmful, LANGUAGES).layers:
        assert set(layer.transfer.values()) == set(layer.separability.values()) == {0.5}
        assert layer.criteria["transfer"] == Interval(0.5, 0.5, 0.5)
        assert layer.criteria["silhouette"] == Interval(0.0, 0.0, 0.0)


def test_layers_rank_by_the_criterion_that_is_asked_for() -> None:
    values = {"headroom": [0.1, 0.3, 0.3, 0.0], "transfer": [0.9, 0.5, 0.6, 0.7]}
    layers = [
        LayerStatistics(i, 0, 0, 0, {}, {}, {name: Interval(each[i], 0, 1) for name, each in values.items()})
        for i in range(4)
    ]
    probe = Probe(tuple(layers), ("en", "sw"), 10)
    assert probe.ranking() == [2, 1, 3, 0]  # of equal layers the deeper first
    assert probe.ranking("transfer") == [3, 2, 1, 0]  # the embeddings last, though their number is the highest
    assert [probe.rank_of(layer) for layer in (2, "last", 0.5)] == [0, 2, 0]
    assert [probe.rank_of(layer, "transfer") for layer in (2, "last", 0.0)] == [1, 0, 3]


def test_a_larger_limit_only_adds() -> None:
    tokens = SimpleNamespace(keys=keys_of(f"b{i}" for i in range(40)), kinds=np.arange(40, dtype=np.int8) % 2)
    small, large = choose_bundles(tokens, 5), choose_bundles(tokens, 9)
    assert (len(small), len(large)) == (10, 18)
    assert set(small) < set(large)
    assert small == sorted(small)
    assert choose_bundles(tokens, 100) == list(range(40))


def test_what_is_shown(tmp_path: Path, probed: Probe) -> None:
    assert probed.markdown().count("\n| ") == 10  # two tables: header, rule, three layers
    shown = probe_table(probed, [2, 0])
    assert [row.name.text for row in shown.rows] == ["2", "0"]
    found = probed.layers[2].criteria["transfer"]
    assert found is not None
    assert shown.rows[0].cells[-1].text == f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
    assert len(statistics_table(probed, [1]).rows) == 1
    probe_plot(probed, Place(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    plain = probed.plain()
    assert plain["ranking"] == plain["rankings"]["headroom"] == probed.ranking()
    assert set(plain["rankings"]) == set(CRITERIA)
    assert set(plain["layers"][0]["criteria"]["silhouette"]) == {"value", "low", "high"}
