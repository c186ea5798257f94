"""What a run's plan says beside memory: time by where workers lie, checkpoints, the reference's pass, assumptions."""

import json
import math
from dataclasses import replace

import pytest

from mlc_ray.config import (
    ConfigError,
    EngineSection,
    SearchConfig,
    SimulationConfig,
    TrainConfig,
    load_config,
    parse_config,
)
from mlc_ray.plan.costs import Costs
from mlc_ray.plan.hardware import Cluster, HardwareError, cluster_of
from mlc_ray.plan.lengths import assumed
from mlc_ray.plan.memory import adamws_copy, gathered, holding_of
from mlc_ray.plan.rates import Rates, assumed_rates, gpu_here, rates_of, write_calibration
from mlc_ray.plan.runs import plan_run
from mlc_ray.plan.scores import plan_score, plan_scoring, plan_search
from mlc_ray.plan.show import run_lines
from tests.plan.test_memory import run, shape

CPU = Cluster(None, 1, 1, 24 * 2**30)


def plan(config, name, cluster, workers, rates=None):
    rates = rates or assumed_rates(cluster.gpu, "bfloat16")
    return plan_run(config, shape(name), cluster, assumed(config), rates, dtype="bfloat16", workers=workers)


@pytest.mark.parametrize("stage", [2, 3])
def test_workers_on_one_node_do_not_use_the_network_of_a_larger_cluster(stage):
    config = run(engine={"stage": stage}, cluster={"workers": 8})
    alone, among = (plan(config, "qwen2.5-7b", cluster_of(gpus, "h100"), 8) for gpus in (8, 64))
    assert alone.seconds == among.seconds
    assert (alone.nodes, among.nodes) == (1, 1)
    assert not [each for each in among.assumed if "between nodes" in each]
    over_two = plan(config, "qwen2.5-7b", cluster_of(64, "h100"), 16)
    assert over_two.nodes == 2 and [each for each in over_two.assumed if "50 GB/s between nodes" in each]
    assert over_two.seconds.exchange > among.seconds.exchange


def test_checkpoints_stop_training_for_as_long_as_a_simulation_says_and_are_part_of_the_run():
    config = run(engine={"stage": 3}, checkpoint={"every": 4}, train={"max_steps": 45}, mlc={"extractor_dim": None})
    found = plan(config, "qwen2.5-72b", cluster_of(32, "h100"), 32)
    p = shape("qwen2.5-72b").parameters
    simulated = parse_config(
        SimulationConfig,
        {
            "gpus": 32, "bundles": 1000, "step_seconds": 1.0, "state_gb": 12 * p / 1e9, "model_gb": 2 * p / 1e9,
            "storage_gb_per_second": 1000, "bundle_kb": 0.0,
        },
    )  # fmt: skip
    costs = Costs.of(simulated)
    assert (found.checkpoint_seconds, found.checkpoint_behind_seconds) == pytest.approx((costs.blocking, costs.upload))
    # 12 B x 72.7 billion / 4 nodes / 10 GB/s, and 145.4 - 2.1 GB at 2 GB/s
    assert found.checkpoint_seconds == pytest.approx(21.8 + 71.6, abs=0.2)
    # At steps 4, 8, ... 44 and 45: each waits for the one before it, and the end of the last is waited for.
    late = 10 * max(0.0, costs.upload - 4 * found.seconds.step) + costs.upload - found.seconds.step
    saving = 12 * costs.blocking + late + costs.upload
    assert found.seconds.step < costs.upload
    assert found.wall_seconds - found.reference_seconds == pytest.approx(45 * found.seconds.step + saving)
    in_turn = run(
        engine={"stage": 3}, checkpoint={"every": 4, "background": False}, train={"max_steps": 45},
        mlc={"extractor_dim": None},
    )  # fmt: skip
    stopped = plan(in_turn, "qwen2.5-72b", cluster_of(32, "h100"), 32)
    assert stopped.checkpoint_seconds == pytest.approx(costs.blocking + costs.upload)
    assert stopped.checkpoint_behind_seconds == 0


def test_the_reference_gathers_its_parameters_in_every_forward_at_stage_3():
    """2,835 bundles in forwards of eight on 32 workers: twelve rounds, each of which gathers 145 GB at 50 GB/s."""
    config = run(engine={"stage": 3}, mlc={"extractor_dim": None})
    found = plan(config, "qwen2.5-72b", cluster_of(32, "h100"), 32)
    gather = 2 * shape("qwen2.5-72b").parameters * 31 / 32 / 50e9
    assert found.reference_seconds == pytest.approx(12 * gather) == pytest.approx(33.8, abs=0.1)
    whole = plan(run(engine={"stage": 2}), "qwen2.5-0.5b", cluster_of(32, "h100"), 32)
    assert whole.reference_seconds < 0.1  # computing alone


def test_a_search_asks_the_reference_once():
    config = load_config(SearchConfig, "configs/search/demo.yaml")
    config = config.model_copy(update={"concurrency": 1})
    base = run(engine={"stage": 2}, checkpoint={"every": 10})
    rates = replace(assumed_rates(None, "bfloat16"), flops=1e9)
    planned = plan(base, "smollm2-135m", CPU, 1, rates)
    assert planned.reference_seconds > 100
    scores = [plan_scoring(config.scoring, shape("smollm2-135m"), CPU, prompts=0)] * 2

    def seconds(run_plan, points):
        return plan_search(
            config, run_plan, points=points, choosing=scores[0], confirming=scores[1], cluster=CPU
        ).seconds

    first, second = seconds(planned, 6), seconds(planned, 7)
    assert second - first == pytest.approx(planned.wall_seconds - planned.reference_seconds)
    without = replace(planned, reference_seconds=0.0)
    assert first - seconds(without, 6) == pytest.approx(planned.reference_seconds)


def test_further_seeds_are_trained_one_after_another():
    config = load_config(SearchConfig, "configs/search/demo.yaml")
    config = config.model_copy(
        update={"concurrency": 3, "confirm": config.confirm.model_copy(update={"seeds": [7, 8], "keep": 2})}
    )
    planned = plan(run(engine={"stage": 2}), "smollm2-135m", CPU, 1)
    score = plan_scoring(config.scoring, shape("smollm2-135m"), CPU, prompts=0)
    found = plan_search(config, planned, points=6, choosing=score, confirming=score, cluster=CPU)
    each = planned.wall_seconds - planned.reference_seconds
    assert (found.trials, found.at_once, found.runs) == (6, 3, 10)
    assert found.seconds == pytest.approx(score.start + planned.reference_seconds + (2 + 4) * each)


def test_what_a_node_holds_is_assumed_where_its_memory_is_not_known():
    config = run(engine={"stage": 3, "offload_optimizer": True, "offload_parameters": True})
    unknown = plan(config, "qwen2.5-72b", cluster_of(1, "l4"), 1)
    (said,) = [each for each in unknown.assumed if "--node-memory" in each]
    assert said.startswith("each node's memory holds what lies in it")
    known = plan(config, "qwen2.5-72b", cluster_of(1, "l4", node_memory=64 * 2**30), 1)
    assert not known.memory.fits and not [each for each in known.assumed if "--node-memory" in each]


def test_what_deepspeed_is_told_beside_the_settings_is_planned_or_named():
    zero = {"stage3_max_live_parameters": 10**8, "stage3_prefetch_bucket_size": 10**7, "reduce_bucket_size": 10**8}
    told = run(engine={"stage": 3, "extra": {"zero_optimization": {**zero, "round_robin_gradients": True}}})
    seven = shape("qwen2.5-7b")
    plain = holding_of(run(engine={"stage": 3}), seven, workers=8, dtype="bfloat16", device="gpu")
    held = holding_of(told, seven, workers=8, dtype="bfloat16", device="gpu")
    assert gathered(plain, seven).bytes == 2 * 10**9
    assert gathered(held, seven).bytes == 2 * (seven.embedding + 10**7)
    assert (plain.bucket, held.bucket) == (5 * 10**8, 10**8)
    (said,) = [
        each for each in plan(told, "qwen2.5-7b", cluster_of(8, "h100"), 8).assumed if "zero_optimization" in each
    ]
    assert "round_robin_gradients" in said and "reduce_bucket_size" not in said


def test_a_calibration_counts_the_reading_of_weights_once_and_names_other_threads(tmp_path):
    file = tmp_path / "calibration.json"
    one = Rates("cpu", "bfloat16", 5e10, 0.0, 1e8, 4e8, 1.1, "today", 1)
    crowded = replace(one, crowd=3, crowded=0.5)
    assert [crowded.among(workers).flops for workers in (1, 2, 3, 8)] == [5e10, 3.75e10, 2.5e10, 2.5e10]
    assert crowded.among(3).adamw == 5e7 and one.among(8) == one
    said = plan(run(cluster={"workers": 8}), "smollm2-135m", Cluster(None, 8, 8, None), 8, crowded).assumed
    assert "of 8 workers on one CPU each is as fast as of the 3 that were measured at once" in said
    for kind in (False, True):  # what stays of other forwards does not depend on checkpointing
        config = run(model={"path": "m", "gradient_checkpointing": kind})
        before, after = (plan(config, "smollm2-135m", CPU, 1, each) for each in (one, replace(one, grown=0.5)))
        (gaps,) = [part.bytes for part in after.memory.worker if part.name == "gaps"]
        assert (
            sum(part.bytes for part in after.memory.worker) == sum(part.bytes for part in before.memory.worker) + gaps
        )
        more = plan(config, "smollm2-135m", CPU, 1, replace(one, grown=1.0))
        assert [part.bytes for part in more.memory.worker if part.name == "gaps"] == [pytest.approx(2 * gaps, abs=2)]
    four = replace(one, flops=18e10, threads=4)
    write_calibration(one, file)
    write_calibration(four, file)
    assert rates_of(None, "bfloat16", file, threads=4) == four
    assert rates_of(None, "bfloat16", file, threads=1) == one
    other = rates_of(None, "bfloat16", file, threads=2)
    said = [
        plan(run(cluster={"cpus_per_worker": cpus}), "smollm2-135m", CPU, 1, other).assumed
        for cpus in (other.threads, 2)
    ]
    assert not [each for each in said[0] if "cpus_per_worker" in each]
    assert [each for each in said[1] if f"cpus_per_worker={other.threads}, but this run has 2" in each]


def test_adapters_are_planned_by_what_was_measured_of_adapters():
    """Which is said, and also where a calibration has none."""
    whole = Rates("cpu", "bfloat16", 9e10, 0.1, 1e8, 1e9, measured="today")
    both = replace(whole, lora_flops=1.2e11, lora_forward_seconds=0.02)
    lora = run(model={"path": "x", "lora": {"rank": 8}})
    plain, adapted = (plan(lora, "smollm2-135m", CPU, 1, rates) for rates in (whole, both))
    assert plain.seconds.compute == pytest.approx(adapted.seconds.compute * 1.2e11 / 9e10)
    assert plain.seconds.overhead == pytest.approx(5 * adapted.seconds.overhead)
    assert [each for each in adapted.assumed if "0.12e12 useful operations a second, as calibrated (today)" in each]
    assert [each for each in plain.assumed if "adapters take the time of all weights" in each]
    assert not [each for each in adapted.assumed if "adapters take" in each]
    of_all = [plan(run(), "smollm2-135m", CPU, 1, rates).seconds for rates in (whole, both)]
    assert of_all[0] == of_all[1]
    crowded = replace(both, crowd=2, crowded=0.5).training(lora=True).among(2)
    assert crowded.flops == 0.6e11


def test_a_gpu_without_a_data_sheet_is_planned_by_its_calibration(tmp_path):
    name, memory = "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * 2**30
    with pytest.raises(HardwareError, match=r"part of a GPU \(MIG\).*or measure it: mlc-ray plan --calibrate"):
        gpu_here(name, memory, [])
    measured = Rates("h100-80gb-hbm3-mig-1g.10gb", "bfloat16", 4e13, 2e-3, 1.2e10, None, 1.2, "today")
    gpu = gpu_here(name, memory, [measured])
    assert (gpu.memory, gpu.bandwidth) == (memory, pytest.approx(28 * 1.2e10))
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps([vars(measured)]))
    assert rates_of(gpu, "bfloat16", file) == measured
    found = plan(run(cluster={"workers": 2}), "qwen2.5-0.5b", Cluster(gpu, 2, 2, None), 2, measured)
    assert found.memory.worker_limit == memory
    assert [each for each in found.assumed if "32 GB/s between the GPUs of a node" in each]
    assert not [each for each in found.assumed if "not calibrated" in each]
    assert gpu_here("NVIDIA H100 80GB HBM3", memory, []).memory == memory  # what CUDA offers, not the sheet


def test_the_settings_of_the_recipes_are_planned():
    config = load_config(TrainConfig, "recipe:scaling/qwen2.5-7b")
    found = plan(config, "qwen2.5-7b", cluster_of(8, "h100"), 8)
    assert found.memory.fits
    assert found.saving_seconds > -(-found.steps // 50) * found.checkpoint_seconds


def test_a_score_and_a_step_by_hand():
    """7.6 billion parameters on H100s, by their data sheet."""
    score = plan_score(
        shape("qwen2.5-7b"), EngineSection(dtype="bfloat16", max_model_len=1024), cluster_of(2, "h100"),
        prompts=2, prompt_tokens=100, answer_tokens=200,
    )  # fmt: skip
    # One prompt on each engine: 100 tokens at 2 x 7.1 billion operations, then 200 times all weights at 3.35 TB/s.
    prompt, answer = 100 * 2 * 7.07e9 / (0.4 * 989e12), 200 * 2 * 7.616e9 / 3.35e12
    assert score.seconds - score.start == pytest.approx(prompt + answer, rel=0.01)
    found = plan(run(engine={"stage": 2}, train={"batch_bundles": 8}), "qwen2.5-7b", cluster_of(8, "h100"), 8)
    # A bundle each: 6 operations a token and parameter, and of the head's 545 million for 158 rows alone.
    by_hand = 6 * (7.07e9 - 0.545e9) * found.work.tokens + 6 * 0.545e9 * 158 * 8
    assert found.work.flops == pytest.approx(by_hand, rel=0.03)
    assert found.seconds.compute == pytest.approx(found.work.flops / 8 / (0.4 * 989e12), rel=1e-6)


def test_workers_beyond_the_bundles_of_a_step_are_named_and_add_no_tokens():
    config = run(engine={"stage": 3}, train={"batch_bundles": 16})
    sixteen, million = (plan(config, "qwen2.5-7b", cluster_of(gpus, "h100"), gpus) for gpus in (16, 1_000_000))
    assert (sixteen.idle_workers, million.idle_workers) == (0, 999_984)
    assert million.work == sixteen.work
    assert "999,984 of 1,000,000 workers have no bundle of their own in a step of 16" in "\n".join(
        run_lines(million, None)
    )
    assert "no bundle of" not in "\n".join(run_lines(sixteen, None))


def test_a_layer_that_the_model_lacks_is_refused():
    plan(run(mlc={"layer": 24}), "qwen2.5-0.5b", CPU, 1)
    with pytest.raises(ConfigError, match=r"mlc\.layer=28 is outside 0\.\.24"):
        plan(run(mlc={"layer": 28}), "qwen2.5-0.5b", CPU, 1)


def test_a_node_may_use_95_percent_of_its_memory():
    """Above that Ray kills workers."""
    config = run(checkpoint={"background": False})
    found = plan(config, "qwen2.5-0.5b", CPU, 1).memory
    assert found.node_limit == found.worker_limit == int(0.95 * 24 * 2**30)
    enough = math.ceil(found.node_bytes / 0.95)
    assert plan(config, "qwen2.5-0.5b", replace(CPU, node_memory=enough), 1).memory.fits
    little = plan(config, "qwen2.5-0.5b", replace(CPU, node_memory=enough - 2**20), 1).memory
    assert little.node_bytes == found.node_bytes and little.breaks is not None


def test_a_checkpoint_is_copied_by_auto_where_half_of_what_is_free_between_steps_holds_it():
    def node(memory):
        return {
            part.name: part.bytes
            for part in plan(run(), "qwen2.5-0.5b", replace(CPU, node_memory=memory), 1).memory.node
        }

    trained = plan(run(), "qwen2.5-0.5b", CPU, 1).trained
    between = node(100 * 2**30)["Ray"] + node(100 * 2**30)["Ray Train"] + node(100 * 2**30)["processes"]
    between += shape("qwen2.5-0.5b").parameters * 2 + (trained - shape("qwen2.5-0.5b").parameters) * 2 + 12 * trained
    assert "checkpoint copy" in node(between + 24 * trained) and "checkpoint copy" not in node(
        between + 24 * trained - 2
    )


@pytest.mark.parametrize(
    ("engine", "dtype", "each"),
    [
        ({"stage": 0}, "bfloat16", 0),
        ({"stage": 1}, "bfloat16", 2 + 4),
        ({"stage": 1}, "float32", 4),
        ({"stage": 1, "offload_optimizer": True}, "bfloat16", 0),
        ({"stage": 2}, "bfloat16", 0),
        ({"stage": 2, "accumulate_dtype": "bfloat16"}, "bfloat16", 2 + 4),
        ({"stage": 2}, "float32", 4),
        ({"stage": 3}, "bfloat16", 4),
        ({"stage": 3, "accumulate_dtype": "bfloat16"}, "bfloat16", 2 + 4),
        ({"stage": 3, "offload_optimizer": True}, "bfloat16", 0),
    ],
)
def test_gradients_are_copied_flat_for_adamw_in_their_own_type_and_then_in_float32(engine, dtype, each):
    """As DeepSpeed 0.19.8 flattens them and has them `to` float32 (`stage_1_and_2.py`, `stage3.py`)."""
    config = run(engine=engine)
    held = holding_of(config, shape("qwen2.5-7b"), workers=2, dtype=dtype, device="gpu")
    own = held.trained // 2
    assert adamws_copy(held).bytes == each * (min(own, 10**9) if engine["stage"] == 3 else own)


def test_at_stage_1_gradients_of_other_workers_are_gone_before_adamw():
    one, two = (
        plan(run(engine={"stage": 1}), "qwen2.5-0.5b", Cluster(None, workers, workers, 200 * 2**30), workers)
        for workers in (1, 2)
    )
    parts = [{part.name: part.bytes for part in found.memory.worker} for found in (one, two)]
    assert parts[0]["gradients"] == 2 * one.trained and parts[0]["AdamW's copy"] == 6 * one.trained
    # Of two the reduction is higher: all gradients, those of the own part, and a copy of 4 bytes of a bucket.
    assert "AdamW's copy" not in parts[1]
    assert (parts[1]["gradients"], parts[1]["own gradients"]) == (2 * two.trained, two.trained)


def test_a_cpu_keeps_as_much_of_activations_as_was_measured_until_it_is_calibrated():
    found = {part.name: part.bytes for part in plan(run(), "qwen2.5-0.5b", CPU, 1).memory.worker}
    bare = replace(assumed_rates(None, "bfloat16"), grown=0.0)
    without = {part.name: part.bytes for part in plan(run(), "qwen2.5-0.5b", CPU, 1, bare).memory.worker}
    assert found.keys() - without.keys() == {"gaps"}
