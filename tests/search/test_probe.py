from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlc_ray.data.tables import keys_of
from mlc_ray.losses.mlc import leading_share, singular_values, unit_rows
from mlc_ray.search.probe import LayerStatistics, Probe, choose_bundles, layer_statistics, probe_plot, probe_table
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


def test_numbers_against_the_formulas_written_out() -> None:
    states, present, harmful = made()
    layer = layer_statistics(states, present, harmful, LANGUAGES).layers[2]
    shares = leading_share(singular_values(unit_rows(states[:, :, 2], present)))
    assert layer.share == pytest.approx(float(shares.mean()))
    rows = [
        (n, states[n, k, 2].double() / states[n, k, 2].double().norm())
        for n, k in itertools.product(range(24), range(3))
        if present[n, k]
    ]
    pairs = list(itertools.combinations(rows, 2))
    within = [float(a @ b) for (n, a), (m, b) in pairs if n == m]
    between = [float(a @ b) for (n, a), (m, b) in pairs if n != m]
    assert layer.within == pytest.approx(sum(within) / len(within))
    assert layer.between == pytest.approx(sum(between) / len(between))
    assert layer.separation == pytest.approx(layer.within - layer.between)


def test_who_knows_what_is_found() -> None:
    noise, english, everyone = layer_statistics(*made(), LANGUAGES).layers
    assert abs(noise.separability["en"] - 0.5) < 0.35
    assert english.separability["en"] > 0.95
    assert max(english.separability["bn"], english.separability["sw"]) < 0.8
    assert min(everyone.separability.values()) > 0.95
    assert set(everyone.transfer) == {"bn", "sw"}
    assert min(everyone.transfer.values()) > 0.95
    assert max(english.transfer.values()) < 0.8


def test_with_one_kind_only_consistency_is_told() -> None:
    states, present, _ = made()
    probe = layer_statistics(states, present, torch.ones(24, dtype=torch.bool), LANGUAGES)
    assert all(not layer.separability and not layer.transfer for layer in probe.layers)
    assert probe.layer_score(1) == pytest.approx(1 - probe.layers[1].share)
    assert "·" in probe.markdown()


def probe_of(*layers: tuple[float, float]) -> Probe:
    statistics = [LayerStatistics(i, share, 0, 0, {"en": auc}, {}) for i, (share, auc) in enumerate(layers)]
    return Probe(tuple(statistics), ("en", "sw"), 10)


def test_a_layer_ranks_by_scope_times_what_english_knows() -> None:
    probe = probe_of((1.0, 0.9), (0.9, 0.5), (0.95, 0.9), (0.9, 0.9), (0.9, 0.4))
    assert probe.ranking() == [3, 2, 4, 1, 0]  # no scope or no knowledge is 0; of equal layers the deeper first
    assert probe.layer_score(3) == pytest.approx(0.1 * 0.8)
    assert [probe.rank_of(layer) for layer in (3, "last", 0.5)] == [0, 2, 1]


def test_a_larger_limit_only_adds() -> None:
    tokens = SimpleNamespace(keys=keys_of(f"b{i}" for i in range(40)), kinds=np.arange(40, dtype=np.int8) % 2)
    small, large = choose_bundles(tokens, 5), choose_bundles(tokens, 9)
    assert (len(small), len(large)) == (10, 18)
    assert set(small) < set(large)
    assert small == sorted(small)
    assert choose_bundles(tokens, 100) == list(range(40))


def test_what_is_shown(tmp_path: Path) -> None:
    probe = layer_statistics(*made(), LANGUAGES)
    assert probe.markdown().count("\n| ") == 5  # header, rule, three layers
    assert [row.name.text for row in probe_table(probe, [2, 0]).rows] == ["2", "0"]
    probe_plot(probe, Place(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert probe.plain()["ranking"] == probe.ranking()
