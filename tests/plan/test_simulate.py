"""The simulation against Young's and Daly's formulas, and exact counts where nothing is random."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from mlc_ray.cli import main
from mlc_ray.config import ConfigError, SimulationConfig, load_config, parse_config
from mlc_ray.plan.costs import START_SECONDS, Costs, daly, slowest, young
from mlc_ray.plan.simulate import (
    LOSSES,
    Growth,
    SimulationError,
    _Run,
    best_interval,
    growth,
    optimum,
    run_of,
    simulate,
)
from mlc_ray.report.simulation import findings, tables


def settings(**changes: Any) -> SimulationConfig:
    """20,000 steps of 1 s on 8 nodes that never fail; checkpoints of 1 GB a node stop training for 10 s."""
    raw = {
        "gpus": 64, "bundles": 64 * 20_000, "epochs": 1, "bundles_per_gpu": 1, "step_seconds": 1.0, "step_spread": 0.0,
        "state_gb": 8.0, "model_gb": 0.0, "background": False, "copy_gb_per_second": 0.2, "node_gb_per_second": 0.2,
        "storage_gb_per_second": 1.6, "bundle_kb": 0.0, "node_mtbf_hours": None, "replace_seconds": 0.0,
        "restart_seconds": 20.0, "checkpoint_every": 100, "repetitions": 30,
    }  # fmt: skip
    return parse_config(SimulationConfig, {**raw, **changes})


def daly_wall(work: float, interval: float, cost: float, restart: float, mtbf: float) -> float:
    """Expected seconds of `work`, in pieces of `interval` with a checkpoint of `cost` behind each (Daly, equation 20).

    Failures come at any time, as a Poisson process of mean `mtbf`, and a start of `restart` seconds follows each.
    """
    return mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf) * work / interval


def test_without_losses_every_second_is_counted() -> None:
    config = settings(checkpoint_every=3000)
    run = simulate(config)
    costs = Costs.of(config)
    assert costs.blocking == pytest.approx(5 + 5) and costs.upload == 0
    # checksums and ranges: 16 GB over eight links; opening the rows of 1.28 million bundles
    assert costs.start == pytest.approx(20 + 10 + START_SECONDS + 0.76e-6 * 1_280_000)
    wall = 20_000 + 7 * 10 + costs.start  # six whole intervals, and the end
    assert run.wall_hours.value == pytest.approx(wall / 3600)
    assert run.goodput.value == pytest.approx(20_000 / wall)
    assert run.gpu_hours.value == pytest.approx(64 * wall / 3600)
    assert run.shares["storage"] == pytest.approx(70 / wall)
    assert run.finished and run.lost_nodes == 0


@pytest.mark.parametrize("every", [60, 250, 1000])
def test_expected_time_is_dalys(every: int) -> None:
    """Failures every 1,800 s: Daly's equation 20 is exact for them, and the mean of 200 runs is within 2 % of it."""
    config = settings(node_mtbf_hours=8 * 0.5, checkpoint_every=every, repetitions=200)
    costs = Costs.of(config)
    run = simulate(config)
    expected = daly_wall(20_000, every, costs.blocking, costs.start, 1800) / 3600
    assert run.wall_hours.value == pytest.approx(expected, rel=0.02)
    assert run.goodput.value + sum(run.shares.values()) == pytest.approx(1)
    assert run.lost_nodes == pytest.approx(run.wall_hours.value * 2, rel=0.05)


def test_the_best_interval_is_dalys() -> None:
    config = settings(node_mtbf_hours=8 * 0.5, checkpoint_every="best", repetitions=100)
    best = best_interval(config)
    assert best.daly == pytest.approx(daly(10, 1800)) and best.young == pytest.approx(young(10, 1800))
    assert best.young == pytest.approx(189.7, abs=0.1)
    assert best.alike[0] <= round(best.daly) <= best.alike[1]
    assert best.alike[1] <= 2 * best.daly, "intervals twice as long are told apart"
    at = {run.every: run.goodput.value for run in best.tried}
    assert at[best.run.every] == max(at.values())
    assert best.run.goodput.value - simulate(config, every=round(best.daly)).goodput.value < 0.005


def test_the_same_seed_is_the_same_run() -> None:
    config = settings(node_mtbf_hours=4.0, step_spread=0.1, preemptions_per_node_day=2, notice_seconds=30)
    assert simulate(config) == simulate(config)
    other = simulate(config.model_copy(update={"seed": 7}))
    assert other.goodput != simulate(config).goodput


def test_intervals_hold_the_expected_time() -> None:
    """Of 60 simulations of 10 runs, the 95 % intervals hold Daly's expectation in at least 85 %."""
    config = settings(bundles=64 * 2000, node_mtbf_hours=4.0, repetitions=10)
    costs = Costs.of(config)
    expected = daly_wall(2000, 100, costs.blocking, costs.start, 1800) / 3600
    walls = [simulate(config.model_copy(update={"seed": seed})).wall_hours for seed in range(60)]
    assert sum(wall.low <= expected <= wall.high for wall in walls) >= 51


def test_a_step_waits_for_its_slowest_worker() -> None:
    drawn = np.exp(0.1 * np.random.default_rng(0).standard_normal((4000, 64))).max(axis=1)
    mean, variance = slowest(64, 0.1)
    assert mean == pytest.approx(drawn.mean(), rel=2e-3)
    assert variance == pytest.approx(drawn.var(), rel=0.1)
    run = simulate(settings(step_spread=0.1))
    assert run.shares["stragglers"] * run.wall_hours.value * 3600 == pytest.approx(20_000 * (mean - 1), rel=0.01)


def test_a_background_checkpoint_costs_the_copy_alone_and_the_next_waits() -> None:
    in_turn, beside = settings(), settings(background=True)
    assert Costs.of(beside).blocking == pytest.approx(5) and Costs.of(beside).upload == pytest.approx(5)
    saved = simulate(in_turn).wall_hours.value - simulate(beside).wall_hours.value
    assert saved * 3600 == pytest.approx(199 * 5)  # all but the last, which is waited for
    run = simulate(beside, every=2)  # 2 s of steps, 5 s of writing: 3 s of waiting
    assert run.shares["storage"] * run.wall_hours.value * 3600 == pytest.approx(9999 * 8 + 5 + 5 - 0, rel=1e-3)


def test_data_slower_than_steps_are_the_limit() -> None:
    config = settings(bundle_kb=100_000.0)  # 6.4 GB/s, four times what the storage gives
    assert Costs.of(config).data_share == pytest.approx(4)
    run = simulate(config)
    assert run.largest == "data"
    assert run.shares["data"] * run.wall_hours.value * 3600 == pytest.approx(20_000 * 3, rel=1e-6)
    half = settings(bundle_kb=25_000.0, background=True)  # all of it: beside a checkpoint half as fast
    costs = Costs.of(half)
    assert (costs.free, costs.beside) == (1.0, pytest.approx(0.5))
    assert costs.upload == pytest.approx(10)
    slowed = simulate(half).shares["data"] * simulate(half).wall_hours.value * 3600
    assert slowed == pytest.approx(199 * 5, rel=1e-6)  # 10 s at half the speed


def test_a_notice_costs_no_step_where_a_checkpoint_fits() -> None:
    raw: dict[str, Any] = {"preemptions_per_node_day": 6.0, "repetitions": 20}
    enough, short = simulate(settings(**raw, notice_seconds=30)), simulate(settings(**raw, notice_seconds=5))
    assert enough.lost_nodes > 3 and enough.shares["repeated"] < 0.001 < short.shares["repeated"]
    assert enough.shares["restarts"] > 0 and enough.finished
    assert optimum(settings(**raw, notice_seconds=30)) == (None, None)
    assert optimum(settings(**raw, notice_seconds=5))[0] is not None


FIRST, SECOND = (162.2, (43, 26, 25)), (161.8, (56, 38))
"""Two runs of `benchmarks/survival.py`: seconds of 12 steps with a checkpoint every two, and from each death to a step
(docs/plan-simulate.md)."""


def test_a_run_of_the_survival_benchmark_is_predicted_from_another() -> None:
    """By the first run's mean restart, and by what it took without restarts: within a fifth.

    Deaths of the benchmark strike steps and never starts, so simulated runs with as many such deaths are compared.
    """
    (wall, restarts), (asked, deaths) = FIRST, SECOND
    restart = sum(restarts) / len(restarts)
    config = settings(
        gpus=2, gpus_per_node=1, bundles=24, bundles_per_gpu=1, step_seconds=(wall - sum(restarts) - restart) / 12,
        state_gb=0.0, restart_seconds=restart, checkpoint_every=2, node_mtbf_hours=240 / 3600,
    )  # fmt: skip
    costs, alike = Costs.of(config), []
    for number in range(4000):
        run = _Run(config, costs, 2, number).go()
        if run.struck == len(deaths) and run.spent["restarts"] > (0.999 + run.struck) * costs.start:
            alike.append(run.wall)
    assert len(alike) > 30
    assert np.mean(alike) == pytest.approx(asked, rel=0.2)


def test_spare_nodes_save_the_wait() -> None:
    raw: dict[str, Any] = {"node_mtbf_hours": 4.0, "replace_seconds": 900.0}
    runs = [simulate(settings(**raw, spare_nodes=n)) for n in (0, 1, 8)]
    restarts = [run.shares["restarts"] for run in runs]
    assert restarts[0] > 2 * restarts[1] > 2 * restarts[2] > 0


def test_a_run_that_cannot_end_is_given_up() -> None:
    run = simulate(settings(node_mtbf_hours=8 * 10 / 3600, bundles=64 * 500, repetitions=2))  # a failure every 10 s
    assert not run.finished and run.goodput.value < 0.01


def test_a_run_that_hardly_gets_on_is_given_up_after_500_lost_nodes() -> None:
    """Failures every 11 s of the cluster, where a start takes 33: few reach a step, and none the hundredth.

    Until 50 times its ideal time it would lose 90,000 nodes.
    """
    run = simulate(settings(node_mtbf_hours=8 * 11 / 3600, repetitions=2))
    assert not run.finished and run.lost_nodes == 500
    slow = simulate(settings(node_mtbf_hours=8 * 20 / 3600, checkpoint_every=1, repetitions=2))
    assert not slow.finished and slow.lost_nodes == 500 and slow.goodput.value > 0
    found = run_of(settings(node_mtbf_hours=8 * 11 / 3600, repetitions=2))
    (by_interval, _) = tables(settings(), found, Growth((), None))
    assert [cell.text for cell in by_interval.rows[0].cells].count("does not end") == 1
    enough = simulate(settings(node_mtbf_hours=8 * 90 / 3600, checkpoint_every=20, repetitions=2))
    assert enough.finished and enough.lost_nodes > 500


def test_ten_thousand_gpus_and_a_hundred_million_bundles() -> None:
    config = settings(
        gpus=10_000, bundles=100_000_000, bundles_per_gpu=4, step_seconds=3.8, step_spread=0.02, state_gb=872.0,
        model_gb=145.0, storage_gb_per_second=40.0, node_gb_per_second=2.0, copy_gb_per_second=10.0, background=True,
        bundle_kb=6.0, node_mtbf_hours=6300.0, checkpoint_every="best", repetitions=20,
    )  # fmt: skip
    best, grown = best_interval(config), growth(config)
    assert best.run.finished and best.run.steps == 2500
    assert set(best.run.shares) == set(LOSSES)
    assert grown.runs[0].gpus == 8 and grown.runs[-1].gpus == 10_000
    assert grown.first is not None and grown.first[0] == next(
        run.largest for run in grown.runs if run.gpus == grown.first[1]
    )
    assert any("first to take 10 %" in line for line in findings(config, best, grown))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="gpus=12 are no whole nodes of gpus_per_node=8"):
        settings(gpus=12)
    with pytest.raises(ConfigError, match=r"step_spread=50: .*less than or equal to 2"):
        settings(step_spread=50)
    with pytest.raises(SimulationError, match="best_interval"):
        simulate(settings(checkpoint_every="best"))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--set", "repetitions=3", "--set", "gpus=64"]
    assert main(["plan", "--simulate", "recipe:simulation/72b", *overrides]) == 0
    said = capsys.readouterr().out
    assert main(["plan", "--simulate", "recipe:simulation/72b", *overrides, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["config"]["gpus"] == 64 and written["findings"][0] in said
    assert load_config(SimulationConfig, "recipe:simulation/72b").gpus == 512
    assert main(["plan"]) == 2 and "plan needs --config FILE" in capsys.readouterr().err
