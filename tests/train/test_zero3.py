"""What DeepSpeed does with a step at ZeRO-3: how often it gathers each block, and whether its prefetching settles."""

from collections import Counter

import numpy as np
import pytest
import torch

from mlc_ray.plan.memory import holding_of
from mlc_ray.plan.seconds import gathered_elements
from mlc_ray.plan.shapes import shape_of
from mlc_ray.train.checks import check_tap
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, steps_of, tiny_config

STEPS, ACCUMULATION = 6, 2
GATHER = "_PartitionedParameterCoordinator__all_gather_params_"
CASES = {
    "last layer": {"mlc": {"layer": 3}},
    "below it": {"mlc": {"layer": 1}},
    "below it, selective checkpointing": {"mlc": {"layer": 1}, "model": {"gradient_checkpointing": "selective"}},
    "below it, checkpointing": {"mlc": {"layer": 1}, "model": {"gradient_checkpointing": True}},
    # As DeepSpeed's own thresholds are to a large model: some blocks may be kept, and are not gathered again at once.
    "keeping some, checkpointing": {
        "mlc": {"layer": 3},
        "model": {"gradient_checkpointing": True},
        "engine": {
            "stage": 3,
            "extra": {
                "zero_optimization": {
                    "stage3_param_persistence_threshold": 0,
                    "stage3_max_reuse_distance": 4_000,
                    "stage3_max_live_parameters": 10_000,
                    "stage3_prefetch_bucket_size": 1_000,
                }
            },
        },
    },
}


def recorded(rank):
    """Of each case, by micro-batch: how often every module was fetched in forward and backward, the elements that were
    gathered for it, those that a plan counts; and when the trace was dropped."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    fetch, drop, gather = Coordinator.fetch_sub_module, Coordinator._invalidate_trace, getattr(Coordinator, GATHER)
    results = {}
    for name, sections in CASES.items():
        gathers, dropped, elements = [], [], []

        def gathering(self, params, *rest, elements=elements, **named):
            params = list(params)
            if elements:
                absent = (each for each in params if each.ds_status == ZeroParamStatus.NOT_AVAILABLE)
                elements[-1] += sum(each.ds_numel for each in absent)
            return gather(self, params, *rest, **named)

        def fetching(self, module, forward, gathers=gathers):
            if gathers:
                gathers[-1][module.ds_id, forward] += 1
            return fetch(self, module, forward)

        def dropping(self, gathers=gathers, dropped=dropped):
            dropped.append(len(gathers))
            return drop(self)

        Coordinator.fetch_sub_module, Coordinator._invalidate_trace = fetching, dropping
        setattr(Coordinator, GATHER, gathering)
        train = {"batch_bundles": ACCUMULATION, "tokens_per_forward": 1}  # a bundle in each forward
        zero3 = {"stage": 3, "persistence_threshold": 0}
        config = tiny_config(**{"engine": zero3, "objective": {"loss": "simpo"}, "train": train, **sections})
        engine = make_engine(config)
        check_tap(engine.module.language_model, engine.module.layer)
        forward = engine.forward

        def counted(batch, gathers=gathers, elements=elements, forward=forward):
            gathers.append(Counter())
            elements.append(0)
            return forward(batch)

        engine.forward = counted
        _, history = run_engine(config, random_rows(6, head=[1, 2]), STEPS, engine=engine)
        names = {module.ds_id: path for path, module in engine.module.named_modules()}
        by_name = [{(names[number], way): n for (number, way), n in each.items()} for each in gathers]
        shape = shape_of(engine.module.language_model.config, "tiny")
        planned = gathered_elements(holding_of(config, shape, workers=2, dtype="float32", device="cpu"))
        results[name] = (by_name, dropped, ["loss/mlc" in row for row in history], elements, planned)
    return results


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return on_workers(1, recorded, tmp_path_factory.mktemp("zero3"))[0]


@pytest.mark.parametrize("case", CASES)
def test_every_block_is_gathered_once_forward_and_once_backward(steps, case):
    gathers, _, tapped, *_ = steps[case]
    assert tapped == [True, False] * (STEPS // 2) and len(gathers) == STEPS * ACCUMULATION
    again = 2 if "checkpointing" in case else 1  # blocks run a second time in the backward
    for each in gathers:
        for block in range(3):
            weight = f"policy.model.layers.{block}.mlp.up_proj"
            assert (each[weight, True], each[weight, False]) == (again, 1)
        assert (each["policy.lm_head", True], each["policy.lm_head", False]) == (1, 1)
        assert each["extractor", True] == 1


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_modules_settles_although_only_every_second_step_taps(steps, case):
    _, dropped, *_ = steps[case]
    # What ran before the first step is no step: its trace is dropped, the second micro-batch is recorded, and all
    # later ones prefetch by that record.
    assert all(micro_batch <= 1 for micro_batch in dropped), dropped


@pytest.mark.parametrize("case", CASES)
def test_a_plan_counts_the_elements_that_are_gathered(steps, case):
    """Parameters twice, and of checkpointed blocks that are not kept a third time, but for the last product.

    Where thresholds keep some, what is there at the turn from forward to backward is not gathered again: for a large
    model that is little, and here a third.
    """
    *_, tapped, elements, planned = steps[case]
    with_taps = [each for each, taps in zip(elements, np.repeat(tapped, ACCUMULATION), strict=True) if taps]
    if case.startswith("keeping some"):
        whole = elements[0]  # before the order of modules is known, nothing is kept
        assert all(planned - 10_000 <= each <= planned < whole for each in with_taps[ACCUMULATION:])
    else:
        assert with_taps == [planned] * len(with_taps)


def drops_with_validation(rank):
    """After which optimizer steps the trace was dropped, in a run that forwards held-out bundles after each step."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    drop, done, dropped = Coordinator._invalidate_trace, [], []

    def dropping(self):
        dropped.append(len(done))
        return drop(self)

    Coordinator._invalidate_trace = dropping
    config = tiny_config(
        engine={"stage": 3, "persistence_threshold": 0},
        objective={"loss": "simpo"},
        data={"validation": {"sources": [{"path": "none"}], "every": 1}},
        train={"batch_bundles": ACCUMULATION, "tokens_per_forward": 1},
    )
    engine, rows = make_engine(config), random_rows(6, head=[1, 2])
    check_tap(engine.module.language_model, engine.module.layer)

    @torch.no_grad()
    def validate():
        done.append(None)
        engine.module.eval()
        for batch in next(steps_of(config, rows, 0, 1)):
            assert engine.forward(batch).representations is not None
        engine.module.train()
        return {}

    run_engine(config, rows, STEPS, engine=engine, validate=validate)
    return dropped, len(done)


def test_held_out_forwards_between_steps_do_not_unsettle_it(tmp_path):
    dropped, measured = on_workers(1, drops_with_validation, tmp_path)[0]
    assert measured == STEPS + 1  # before the first step too
    assert all(steps <= 1 for steps in dropped), dropped
