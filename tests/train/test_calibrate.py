"""A probe of the device: what it computes is what a plan counts, and rates are its slope and intercept."""

import os
import statistics

import pytest

from mlc_ray.config import ConfigError
from mlc_ray.plan.activations import Row
from mlc_ray.plan.memory import holding_of
from mlc_ray.plan.seconds import attended, flops
from mlc_ray.plan.shapes import config_of, shape_of
from mlc_ray.train import calibrate
from mlc_ray.train.calibrate import (
    TIMED,
    Probed,
    _batches,
    _in_children,
    kept_bytes_of,
    probe_settings,
    rows_of,
    speed,
    timed_steps,
    with_adapters,
)
from tests.plan.test_memory import run


def test_a_rate_is_a_slope_and_what_is_beside_it_an_intercept():
    probed = Probed(seconds=(1.5, 3.5), flops=(2e9, 10e9), kept=1.2, adamw=1e9, reading=14_000_000_000)
    assert speed(probed, "cpu") == pytest.approx((4e9, 1.0))
    # 14 GB at the 28 GB/s of AdamW, which a plan adds by itself; an H100 reads them in 4 ms
    assert speed(probed, "unknown-gpu") == pytest.approx((4e9, 0.5))
    assert speed(probed, "h100") == pytest.approx((4e9, 1.0 - 14 / 3350))
    assert speed(Probed((2.0, 2.0), (2e9, 10e9), 1.2, 1e9, 0), "cpu") == (3e9, 0.0)


def test_a_run_with_adapters_is_probed_with_all_its_weights(small_llama):
    config = run(
        model={"path": str(small_llama), "dtype": "float32", "lora": {"rank": 4}, "gradient_checkpointing": True},
        data={"train": [{"path": "sample:train"}]}, cluster={"accelerator": "cpu"},
    )  # fmt: skip
    settings = probe_settings(config, "float32")
    (stepped,) = _in_children(1, "small", timed_steps, settings, 1, 2)
    assert min(*stepped.seconds, stepped.stepping) > 0 and stepped.peak > 1e8
    sharded = settings | {"engine": {"name": "deepspeed", "stage": 3}}
    (shards,) = _in_children(1, "small", timed_steps, sharded, 1, 2)
    assert (shards.trained, shards.flops) == (stepped.trained, stepped.flops), "stage 3 hides shapes, and nothing else"
    ((kept, grown),) = _in_children(1, "small", kept_bytes_of, settings, 1, 2)
    assert kept >= 0.5 and grown >= 0
    (adapted,) = _in_children(1, "small", timed_steps, with_adapters(settings, config), 1, 2)
    assert adapted.trained < stepped.trained / 2
    shape = shape_of(*config_of(str(small_llama), trust_remote_code=False))
    held = holding_of(config, shape, workers=1, dtype="float32", device="cpu")
    assert adapted.trained == held.trained
    for number, counted, frozen in zip((1, 2), stepped.flops, adapted.flops, strict=True):
        found, of_adapters = [], []
        for made in _batches(rows_of(config, number + TIMED - 1), number, TIMED, "cpu")[1:]:
            tree, head = made.tree, len(made.chosen.targets) + len(made.rejected.targets)
            pairs = sum(q * k for q, k in zip(tree.lengths, tree.key_lengths, strict=True))
            row = Row(tree.tokens, sum(tree.key_lengths), pairs, head, len(made.prompts.tapped))
            found.append(flops(shape, row, trained=1.0, head_trained=True, pairs=attended(row)))
            base = flops(shape, row, trained=0.0, head_trained=False, pairs=attended(row))
            of_adapters.append(base + 6 * shape.adapters(4, "all-linear") * row.tokens)
        assert frozen == pytest.approx(statistics.median(of_adapters), rel=0.05)
        assert counted == pytest.approx(statistics.median(found), rel=0.05), "what is measured is what plans count"


def test_a_process_that_is_killed_is_told_of():
    with pytest.raises(ConfigError, match=r"one of 2 processes that calibrate was killed.*model\.path='m'"):
        _in_children(2, "m", os._exit, 9)


def test_a_process_that_fails_keeps_no_other_waiting(tmp_path):
    """The first one fails, and the second waits for it until that is known."""
    with pytest.raises(MemoryError, match="too little"):
        _in_children(2, "m", fails_once, tmp_path / "first")


def fails_once(first):
    try:
        first.touch(exist_ok=False)
    except FileExistsError:
        calibrate._together.wait()
    else:
        raise MemoryError("too little")
