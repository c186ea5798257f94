"""Every ZeRO stage against a plain PyTorch loop written out here, which knows no DeepSpeed, padding or packing."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from mlc_ray.data.order import epoch_order
from mlc_ray.data.tables import keys_of
from mlc_ray.errors import MlcRayError
from mlc_ray.train.divergence import DivergedError
from mlc_ray.train.engines.base import TrainingEngineError
from mlc_ray.train.engines.deepspeed import deepspeed_config
from mlc_ray.train.loop import learning_rate
from tests.train.tiny import (
    LANGUAGES,
    ReferenceRow,
    make_engine,
    on_workers,
    random_rows,
    run_engine,
    tiny_config,
    tiny_model,
    whole_weights,
    wrapped,
)

BUNDLES, STEPS = 7, 4  # two epochs of two batches, of 4 and 3 bundles: at the second, a worker forwards one for nothing
SCENARIOS = {
    "stage0": {"engine": {"stage": 0}},
    "stage1": {"engine": {"stage": 1, "bucket_size": 1000}},  # of some 25,000 gradients: many buckets
    "stage2": {"engine": {"stage": 2, "bucket_size": 1000}},
    "stage3": {
        "engine": {
            "stage": 3,
            "bucket_size": 1000,
            "prefetch_size": 5000,
            "extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        }
    },
    "stage2_offload": {"engine": {"stage": 2, "offload_optimizer": True}},
    "stage3_offload": {
        "engine": {"stage": 3, "persistence_threshold": 0, "offload_optimizer": True, "offload_parameters": True}
    },
    "stage3_online": {
        "engine": {"stage": 3, "persistence_threshold": 0, "secondary_partition": 2},
        "reference": "online",
    },
    "stage2_online": {"engine": {"stage": 2, "overlap_comm": False}, "reference": "online"},
    "stage2_checkpointing": {"engine": {"stage": 2}, "model": {"gradient_checkpointing": True}},
    "stage3_checkpointing": {
        "engine": {"stage": 3, "persistence_threshold": 0},
        "model": {"gradient_checkpointing": True},
    },
    "stage2_bf16": {"engine": {"stage": 2}, "model": {"dtype": "bfloat16"}},
    "stage3_bf16": {"engine": {"stage": 3, "persistence_threshold": 0}, "model": {"dtype": "bfloat16"}},
    "stage0_bf16": {"engine": {"stage": 0}, "model": {"dtype": "bfloat16"}},
}


def train_scenarios(rank, table):
    results = {}
    for name, sections in SCENARIOS.items():
        config = tiny_config(**sections)
        engine, history = run_engine(config, random_rows(BUNDLES), STEPS, table)
        results[name] = (history, whole_weights(engine))
    return results


@pytest.fixture(scope="module")
def plain():
    """Losses and final weights of the plain loop; also the reference's log-probs."""
    rows, config = random_rows(BUNDLES), tiny_config()
    reference = tiny_model()
    table = {
        row.bundle_id: ReferenceRow(
            *(float(answer_log_prob(reference, row, part)) for part in (row.chosen, row.rejected))
        )
        for row in rows
    }
    module = wrapped(config)
    model, extractor = module.policy, module.extractor
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    history = []
    for step in range(STEPS):
        epoch, half = divmod(step, 2)
        order = epoch_order(keys_of(row.bundle_id for row in rows), config.seed, epoch)
        members = [rows[i] for i in order[4 * half : 4 * half + 4]]
        alignment = torch.stack([dpo(model, row, table, config.objective.beta) for row in members]).mean()
        mlc = torch.stack([plain_mlc(model, extractor, row, layer=2) for row in members]).mean()
        total = alignment + 0.8 * mlc if step % 2 == 0 else alignment
        optimizer.zero_grad(set_to_none=False)  # a step without the term has zero gradients, not none
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config.optimizer)
        optimizer.step()
        history.append({"total": float(total), "norm": float(norm)})
    return table, history, {name: value.detach() for name, value in module.state_dict().items()}


def answer_log_prob(model, row, answer):
    prompt = row.prompts[row.response_prompt]
    ids = torch.tensor([prompt + answer])
    log_probs = F.log_softmax(model(ids).logits[0], dim=-1)
    return sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def dpo(model, row, table, beta):
    chosen, rejected = (answer_log_prob(model, row, part) for part in (row.chosen, row.rejected))
    reference = table[row.bundle_id]
    return -F.logsigmoid(beta * ((chosen - reference.chosen) - (rejected - reference.rejected)))


def plain_mlc(model, extractor, row, layer):
    states = [
        model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer][0, -1] for prompt in row.prompts
    ]
    z = F.normalize(extractor(torch.stack(states)), dim=-1)
    s = torch.linalg.svdvals(z.double())
    return F.cross_entropy((s / s[0].detach() / 0.2).unsqueeze(0), torch.tensor([0]))


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory):
    return on_workers(2, train_scenarios, tmp_path_factory.mktemp("workers"), plain[0])


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_workers_follow_the_plain_loop(name, plain, trained):
    _, expected, weights = plain
    history, state = trained[0][name]
    exact = "bf16" not in name
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    for row, want in zip(history, expected, strict=True):
        assert row["loss/total"] == pytest.approx(want["total"], rel=2e-5 if exact else 0.1)
        if exact:
            assert row["gradient_norm"] == pytest.approx(want["norm"], rel=1e-3)
    assert ["loss/mlc" in row for row in history] == [True, False, True, False]
    assert [row["bundles_consumed"] for row in history] == [4, 7, 11, 14]
    if exact:
        assert set(state) == set(weights)
        for key, value in weights.items():
            assert torch.allclose(state[key].float(), value, atol=2e-4), key


def test_workers_log_the_same_numbers(trained):
    local = {"step_seconds", "tokens_per_second", "tflops_per_second"}
    for name in SCENARIOS:
        first, second = (
            [{k: v for k, v in row.items() if k not in local} for row in worker[name][0]] for worker in trained
        )
        assert first == second


def test_first_dpo_loss_is_ln_2(trained):
    for name in SCENARIOS:
        tolerance = 1e-5 if "bf16" not in name else 5e-2
        assert trained[0][name][0][0]["loss/alignment"] == pytest.approx(math.log(2), abs=tolerance)


def first_steps(rank):
    """Weights before and after one bfloat16 step at stages 0 and 1, and what a model with a NaN weight ends in."""
    states, before = {}, None
    for stage in (0, 1):
        config = tiny_config(
            objective={"loss": "simpo"},
            model={"dtype": "bfloat16"},
            optimizer={"weight_decay": 0.1, "warmup_ratio": 0.0},
            engine={"stage": stage},
        )
        engine = make_engine(config)
        before = whole_weights(engine)
        assert all(group["fused"] for group in engine._engine.optimizer.param_groups)  # plain AdamW is another kernel
        run_engine(config, random_rows(BUNDLES), 1, engine=engine)
        states[stage] = whole_weights(engine)
    with pytest.raises(TrainingEngineError, match=r"engine\.secondary_partition=2 does not divide 1 workers"):
        make_engine(tiny_config(engine={"stage": 3, "secondary_partition": 2}))
    config = tiny_config(objective={"loss": "simpo"})
    module = wrapped(config)
    with torch.no_grad():
        next(module.policy.parameters())[0, 0] = torch.nan
        next(module.policy.parameters())[:, 1] = torch.nan
    try:
        run_engine(config, random_rows(BUNDLES), 1, engine=make_engine(config, module))
    except DivergedError as error:
        return before, states, str(error)
    return before, states, None


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    return on_workers(1, first_steps, tmp_path_factory.mktemp("first"))[0]


def test_the_first_bfloat16_step_is_a_whole_one_at_every_stage(started):
    before, states, _ = started
    for name, value in before.items():
        moved, expected = (states[stage][name].float() - value.float() for stage in (0, 1))
        assert float((moved - expected).abs().mean()) < 5e-4, name  # the rate is 1e-2
    moved = torch.cat([(states[0][name].float() - before[name].float()).abs().flatten() for name in before])
    assert float(moved.median()) == pytest.approx(1e-2, rel=0.1)


def test_a_loss_that_is_not_finite_ends_with_advice(started):
    assert isinstance(DivergedError("x"), MlcRayError)
    assert re.search(
        r"^step 1: the loss .* after 4 tries \(optimizer.max_retries=3\), with bundles (bundle-0\d(, |, of which )){2,}"
        r"the loss of (bundle-0\d(, )?){2,} is not finite already in the forward.*"
        r"lower optimizer.learning_rate \(now 0.01",
        started[2],
    )


def test_schedules():
    config = tiny_config(optimizer={"warmup_ratio": 0.2, "learning_rate": 1.0})
    cosine = [learning_rate(step, 10, config.optimizer) for step in range(10)]
    assert cosine[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert cosine[6] == pytest.approx(0.5)
    assert cosine[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    linear = tiny_config(optimizer={"warmup_ratio": 0.0, "learning_rate": 1.0, "schedule": "linear"}).optimizer
    assert [learning_rate(step, 4, linear) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    constant = tiny_config(optimizer={"warmup_ratio": 0.5, "learning_rate": 1.0, "schedule": "constant"}).optimizer
    assert [learning_rate(step, 4, constant) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_languages_of_the_fixture_differ():
    assert {len(row.languages) for row in random_rows(BUNDLES)} == {2, 3} and len(LANGUAGES) == 3


def settings_of(stage, model=None, **engine):
    return deepspeed_config(tiny_config(engine={"stage": stage, **engine}, model=model or {}))


def test_optimizer_is_torch_adamw_everywhere():
    assert settings_of(2, offload_optimizer=True)["zero_force_ds_cpu_optimizer"] is False


def test_gradients_travel_and_are_added_up_in_float32_unless_told_otherwise():
    low = {"dtype": "bfloat16"}
    types = {stage: settings_of(stage, low)["data_types"]["grad_accum_dtype"] for stage in range(4)}
    assert types == {0: "bf16", 1: "bf16", 2: "fp32", 3: "fp32"}  # DeepSpeed cannot at 0, and changes optimizer at 1
    assert {settings_of(stage, low)["communication_data_type"] for stage in range(4)} == {"fp32"}
    asked = settings_of(3, low, reduce_dtype="bfloat16", accumulate_dtype="bfloat16")
    assert (asked["communication_data_type"], asked["data_types"]["grad_accum_dtype"]) == ("bf16", "bf16")
    with pytest.raises(TrainingEngineError, match=r"engine\.reduce_dtype='bfloat16' .* model\.dtype='float32'"):
        settings_of(2, reduce_dtype="bfloat16")


def test_reductions_overlap_where_deepspeed_adds_up_right():
    assert [settings_of(stage)["zero_optimization"]["overlap_comm"] for stage in range(4)] == [False, False, True, True]


def test_more_of_deepspeeds_configuration_is_merged_and_never_replaces_ours():
    extra = {"zero_optimization": {"round_robin_gradients": True}, "bf16": {"bf16_optimizer_states": True}}
    merged = settings_of(2, extra=extra)
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": True, "round_robin_gradients": True}
    assert merged["bf16"] == {"enabled": False, "bf16_optimizer_states": True}
    for clash in ({"zero_optimization": {"stage": 3}}, {"zero_optimization": 1}, {"bf16": {"enabled": True}}):
        with pytest.raises(TrainingEngineError, match=r"engine\.extra sets .* change the setting instead"):
            settings_of(2, extra=clash)
    on_disk = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(TrainingEngineError, match=r"device to 'nvme'.*use engine\.offload_optimizer=true"):
        settings_of(3, extra=on_disk)
