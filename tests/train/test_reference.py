"""The policy with its adapters off as its own reference, at every ZeRO stage, against a second model."""

import pytest
import torch

from mlc_ray.train.engines.deepspeed import DeepSpeed
from mlc_ray.train.reference import ReferenceModel, policy_reference
from mlc_ray.train.worker import _build
from tests.train.tiny import on_workers, random_rows, run_engine, steps_of, tiny_config, tiny_model

STAGES = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3, "persistence_threshold": 0},
}
STEPS = 3


def ask_both(rank):
    """After some steps: what the policy without adapters says, a second model, the policy itself, and its losses."""
    results, rows = {}, random_rows(8)
    for name, stage in STAGES.items():
        config = tiny_config(
            model={"lora": {"rank": 4, "dropout": 0.1}, "gradient_checkpointing": name == "stage3"},
            terms={"anchor": {"weight": 0.3}},
            train={"epochs": 3},
            reference="online",
            engine=stage,
        )
        torch.manual_seed(rank)
        engine, history = run_engine(config, rows, STEPS)
        module = engine.module
        own = policy_reference(module, ReferenceModel(module.language_model, layer=2))
        second = DeepSpeed.frozen(ReferenceModel(tiny_model(), layer=2), config, engine.device)
        batch = next(steps_of(config, rows, rank, 2))[0]
        assert batch.taps
        answers = own(batch), second(batch)
        with torch.no_grad():
            policy = engine.forward(batch)
        trainable = {name for name, p in module.policy.named_parameters() if p.requires_grad}
        results[name] = (*answers, policy.chosen.total, history, trainable, module.training)
    return results


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return on_workers(2, ask_both, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("name", STAGES)
def test_without_its_adapters_the_policy_is_exactly_the_model_it_started_from(name, asked):
    for worker in asked:
        own, second, policy, _, trainable, training = worker[name]
        for part in ("chosen", "rejected", "state"):
            assert torch.equal(getattr(own, part), getattr(second, part)), part
        assert not torch.allclose(policy, own.chosen, atol=1e-3)  # the adapters have learned, and are on again
        assert training and len(trainable) == 3 * 7 * 2 and all("lora_" in key for key in trainable)


def test_it_trains_alike_at_every_stage(asked):
    expected = asked[0]["stage0"][3]
    assert expected[0]["loss/alignment"] == pytest.approx(0.6931, abs=1e-4)
    for name in STAGES:
        for row, want in zip(asked[0][name][3], expected, strict=True):
            for key in ("loss/total", "loss/alignment", "gradient_norm"):
                assert row[key] == pytest.approx(want[key], rel=1e-3), (name, key)


def build_in_bfloat16(rank, folder, stage):
    """The types of the parameters that a run in bfloat16 trains, and its rotary embedding's frequencies."""
    if rank == 0:
        tiny_model().save_pretrained(folder)
    torch.distributed.barrier()
    config = tiny_config(model={"path": str(folder), "dtype": "bfloat16"}, engine={"stage": stage})
    engine, _ = _build(config, torch.device("cpu"))
    rotary = engine.module.language_model.get_decoder().rotary_emb
    return {parameter.dtype for parameter in engine.module.parameters()}, rotary.inv_freq.clone()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_in_bfloat16_rotates_by_the_angles_of_its_reference(stage, tmp_path):
    [[types, frequencies]] = on_workers(1, build_in_bfloat16, tmp_path / "workers", tmp_path / "model", stage)
    assert types == {torch.bfloat16}
    expected = tiny_model().get_decoder().rotary_emb.inv_freq
    assert frequencies.dtype == expected.dtype == torch.float32 and torch.equal(frequencies, expected)
