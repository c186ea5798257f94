"""States by stage: by hand, and by DeepSpeed's own estimators; and what breaks."""

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from mlc_ray.config import TrainConfig
from mlc_ray.plan.hardware import HardwareError, cluster_of, gpu_of
from mlc_ray.plan.lengths import assumed
from mlc_ray.plan.memory import bucket, gathered, gradients, holding_of, reduction, states
from mlc_ray.plan.nearest import cheapest, fitting, nearest
from mlc_ray.plan.rates import assumed_rates
from mlc_ray.plan.runs import PlanError, plan_run
from mlc_ray.plan.seconds import traffic
from mlc_ray.plan.shapes import config_of, shape_of


def run(**sections):
    raw = {"name": "x", "model": {"path": "x", "dtype": "bfloat16"}, "data": {"train": [{"path": "x.jsonl"}]}}
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value}
    return TrainConfig.model_validate(raw)


def shape(name):
    return shape_of(config_of(name)[0], name)


def held(name, workers, **sections):
    sections.setdefault("mlc", {"extractor_dim": None})
    return holding_of(run(**sections), shape(name), workers=workers, dtype="bfloat16", device="gpu")


def planned(name, gpus, gpu="h100", **sections):
    config, cluster = run(**sections), cluster_of(gpus, gpu)
    found = {"dtype": "bfloat16", "workers": gpus}
    rates, weights = assumed_rates(cluster.gpu, "bfloat16"), assumed(config)
    plan = plan_run(config, shape(name), cluster, weights, rates, **found)
    return plan, fitting(config, shape(name), cluster, weights, rates, **found)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-72b", "llama-3.1-70b", "gemma-2-27b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("nodes", [1, 8])
def test_states_are_those_of_deepspeed_s_estimators(name, nodes):
    workers = 8 * nodes
    parameters = shape(name).parameters
    own = held(name, workers, engine={"stage": 3})
    _, theirs, largest = estimate_zero3_model_states_mem_needs(
        parameters, shape(name).embedding, num_gpus_per_node=8, num_nodes=nodes, cpu_offload=False
    )
    # 18 bytes a parameter: 2 of weights, 4 of master, 8 of moments, 4 of gradients.
    ours = sum(part.bytes for part in [*states(own), gradients(own)])
    assert ours == pytest.approx(theirs - largest, rel=1e-6)
    own = held(name, workers, engine={"stage": 2})
    _, theirs = estimate_zero2_model_states_mem_needs(parameters, 8, nodes, cpu_offload=False)
    # The estimator has 2 bytes of gradients in 16 bits too, which here are there in a bucket alone.
    ours = sum(part.bytes for part in [*states(own), gradients(own)])
    assert ours == pytest.approx(theirs - 2 * parameters // workers, rel=1e-6)


def test_states_of_each_stage_by_hand():
    p = shape("qwen2.5-7b").parameters
    by_stage = {0: (2 + 12 + 2) * p, 1: 2 * p + 12 * p // 8 + 2 * p, 2: 2 * p + 16 * p // 8, 3: 18 * p // 8}
    for stage, bytes_ in by_stage.items():
        own = held("qwen2.5-7b", 8, engine={"stage": stage})
        assert sum(part.bytes for part in [*states(own), gradients(own)]) == pytest.approx(bytes_, rel=1e-6)


def test_settings_of_the_reduction_are_read():
    p = shape("qwen2.5-7b").parameters
    plain = held("qwen2.5-7b", 8, engine={"stage": 2})
    assert (gradients(plain).bytes, bucket(plain).bytes, reduction(plain).bytes) == (4 * p // 8, 2e9, 6 * 5e8)
    asked = {"reduce_dtype": "bfloat16", "accumulate_dtype": "bfloat16", "overlap_comm": False}
    own = held("qwen2.5-7b", 8, engine={"stage": 2, **asked})
    assert (gradients(own).bytes, bucket(own).bytes, reduction(own).bytes) == (2 * p // 8, 1e9, 2 * 5e8)


def test_what_checkpointing_repeats_is_said():
    for how, share in ((False, 0.0), ("selective", 0.1), (True, 0.21)):
        plan, _ = planned("qwen2.5-0.5b", 1, model={"gradient_checkpointing": how})
        assert plan.work.repeated == share


def test_stage_3_gathers_at_most_what_deepspeed_keeps_alive():
    assert gathered(held("qwen2.5-72b", 64, engine={"stage": 3}), shape("qwen2.5-72b")).bytes == pytest.approx(
        2 * (shape("qwen2.5-72b").embedding + 50_000_000)
    )
    assert gathered(held("qwen2.5-7b", 1, engine={"stage": 3}), shape("qwen2.5-7b")).bytes == 0


def test_traffic_by_hand():
    p, ring = shape("qwen2.5-7b").parameters, 7 / 8
    assert traffic(held("qwen2.5-7b", 8, engine={"stage": 2}), 3) == (pytest.approx(ring * p * (3 * 4 + 2)), 0)
    assert traffic(held("qwen2.5-7b", 8, engine={"stage": 3}), 3) == (pytest.approx(3 * ring * p * (4 + 2 * 2)), 0)
    assert traffic(held("qwen2.5-7b", 8, engine={"stage": 0}), 3) == (pytest.approx(ring * p * 2 * 4), 0)
    half = held("qwen2.5-7b", 8, engine={"stage": 2, "reduce_dtype": "bfloat16"})
    assert traffic(half, 3) == (pytest.approx(ring * p * (3 * 2 + 2)), 0)
    hpz = held("qwen2.5-7b", 64, engine={"stage": 3, "secondary_partition": 8})
    assert traffic(hpz, 1) == (pytest.approx(63 / 64 * p * (4 + 2)), pytest.approx(ring * p * 2))


def test_a_run_that_does_not_fit_names_its_largest_part_and_what_fits():
    plan, found = planned("qwen2.5-72b", 64)
    assert plan.memory.breaks.name == "weights"
    assert nearest(found).changes == {"engine.stage": 3}
    assert cheapest(found).changes["engine.stage"] == 3
    assert all(one.plan.memory.fits for one in found)


def test_what_fits_as_asked_is_kept():
    plan, found = planned("qwen2.5-7b", 8)
    assert plan.memory.fits
    assert nearest(found).changes == {}


def test_nothing_fits_one_small_gpu():
    plan, found = planned("qwen2.5-72b", 1, gpu="l4")
    assert not plan.memory.fits
    assert not [one for one in found if not one.changes.get("engine.offload_parameters")]


def test_offloading_moves_states_to_the_node():
    on, _ = planned("qwen2.5-7b", 8, engine={"stage": 3, "offload_optimizer": True})
    off, _ = planned("qwen2.5-7b", 8, engine={"stage": 3})
    assert off.memory.worker_bytes - on.memory.worker_bytes > 10 * on.parameters // 8
    assert on.memory.node_bytes > off.memory.node_bytes


def test_gpus_are_found_by_their_sheet_s_name_and_pytorch_s():
    assert gpu_of("NVIDIA H100 80GB HBM3") == gpu_of("h100")
    assert gpu_of("NVIDIA A100-SXM4-40GB") == gpu_of("a100-40")
    assert gpu_of("NVIDIA A100-PCIE-40GB") == gpu_of("a100-40")
    assert gpu_of("NVIDIA A100-SXM4-80GB") == gpu_of("NVIDIA A100 80GB PCIe") == gpu_of("a100")
    assert gpu_of("NVIDIA H100 PCIe").bandwidth == 2e12
    with pytest.raises(HardwareError, match=r"part of a GPU \(MIG\)"):
        gpu_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    with pytest.raises(HardwareError, match="'b100' is not known"):
        gpu_of("b100")
    with pytest.raises(HardwareError, match="12 GPUs"):
        cluster_of(12, "h100")


def test_another_engine_is_not_planned():
    with pytest.raises(PlanError, match=r"only the memory of engine\.name='deepspeed' is known"):
        planned("qwen2.5-7b", 8, engine={"name": "examples.my_engine:TorchDdp"})
