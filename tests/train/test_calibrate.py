"""A probe of the device: what it computes is what a plan counts, and rates are its slope and intercept."""

import statistics

import pytest
import torch

from mlc_ray.plan.activations import Row
from mlc_ray.plan.seconds import attended, flops
from mlc_ray.plan.shapes import config_of, shape_of
from mlc_ray.train.calibrate import TIMED, Probed, _batches, probe, probe_settings, speed
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
    threads = torch.get_num_threads()
    try:
        probed = probe(probe_settings(config, "float32"), "cpu", 1, 2)
    finally:
        torch.set_num_threads(threads)
    shape = shape_of(*config_of(str(small_llama), trust_remote_code=False))
    for number, counted in zip((1, 2), probed.flops, strict=True):
        found = []
        for made in _batches(config, number, "cpu", TIMED)[1:]:
            tree, head = made.tree, len(made.chosen.targets) + len(made.rejected.targets)
            pairs = sum(q * k for q, k in zip(tree.lengths, tree.key_lengths, strict=True))
            row = Row(tree.tokens, sum(tree.key_lengths), pairs, head, len(made.prompts.tapped))
            found.append(flops(shape, row, trained=1.0, head_trained=True, pairs=attended(row)))
        assert counted == pytest.approx(statistics.median(found), rel=0.05), "what is measured is what plans count"
