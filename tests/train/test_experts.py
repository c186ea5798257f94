"""A mixture of experts: its routers' loss written out, its gradient, ZeRO-3, and its count of operations."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mlc_ray.config import ModelSection
from mlc_ray.losses.objective import Objective
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.experts import expert_blocks
from mlc_ray.train.flops import Work
from mlc_ray.train.loop import Progress, loss_of
from mlc_ray.train.model import ModelError, PolicyWithExtractor, checkpoint_blocks, router_weight
from mlc_ray.train.reference import ReferenceOutput
from mlc_ray.train.validation import Validation
from tests.train.test_model import batch
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, tiny_config, tiny_model, whole_weights

SMALL = {
    "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.2, "attn_implementation": "tree",
}  # fmt: skip


def mixture(seed=0, **settings):
    """Qwen3's, 8 experts of which a token meets 2."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **SMALL, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, router_aux_loss_coef=0.05, **settings,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def policy(model=None, layer=2, **settings):
    model = model or mixture()
    weight = router_weight(model, ModelSection(path="m", **settings))
    return PolicyWithExtractor(model, layer=layer, extractor_dim=16, seed=0, router_weight=weight).train()


def test_the_weight_is_the_configs_unless_another_is_asked_for():
    settings = ModelSection(path="m")
    assert router_weight(mixture(), settings) == 0.05
    assert router_weight(mixture(), ModelSection(path="m", router_weight=0.0)) == 0
    assert router_weight(tiny_model(), settings) == 0
    with pytest.raises(ModelError, match=r"model.router_weight=0.1: LlamaForCausalLM gives no load-balancing loss"):
        router_weight(tiny_model(), ModelSection(path="m", router_weight=0.1))


@pytest.mark.parametrize(("layer", "checkpointing"), [(2, False), (1, False), (1, True), (2, True)])
def test_the_routers_loss_is_that_of_all_tokens_of_all_blocks(layer, checkpointing):
    """8 times the sum over experts of the share of tokens that go there times their mean probability; no other."""
    module = policy(layer=layer)
    checkpoint_blocks(module.language_model, checkpointing)
    logits = []
    gates = [block.mlp.gate for block in module.language_model.model.layers]
    hooks = [gate.register_forward_hook(lambda _, given, output: logits.append(output[0])) for gate in gates]
    output = module(batch())
    for hook in hooks:
        hook.remove()
    assert len(logits[0]) > len(logits[1]) or layer == 2, "prompts without answers leave at the tap"
    chosen = torch.cat(logits).softmax(dim=1)
    taken = torch.zeros_like(chosen).scatter(1, chosen.topk(2).indices, 1.0)
    wanted = 8 * (taken.mean(dim=0) * chosen.mean(dim=0)).sum()
    torch.testing.assert_close(output.router, 0.05 * wanted)
    parameters = [gate.weight for gate in gates]
    ours = torch.autograd.grad(output.router, parameters, retain_graph=True)
    theirs = torch.autograd.grad(0.05 * wanted, parameters)
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


def test_it_is_a_part_of_the_loss_and_can_be_left_out():
    config = tiny_config(objective={"loss": "simpo"})
    results = {}
    for weight in (None, 0.0):
        module = policy(router_weight=weight)
        bundles = batch(random_rows(3))
        output = module(bundles)
        results[weight] = (loss_of(Objective(config), bundles, output, ReferenceOutput()), output.router)
    (with_it, router), (without, none) = results.values()
    assert none is None and "loss/router" not in without.metrics
    torch.testing.assert_close(with_it.loss, without.loss + 3 * router)  # weights of 1 each
    torch.testing.assert_close(with_it.metrics["loss/router"], router.detach().expand(3))


def test_the_total_of_held_out_bundles_has_it_as_that_of_a_step_has():
    config, bundles = tiny_config(objective={"loss": "simpo"}, mlc={"weight": 0.5}), batch(random_rows(3))
    module = policy()
    engine = SimpleNamespace(module=module, forward=module, device=torch.device("cpu"))
    measured = Validation(Objective(config), engine, lambda: iter([[bundles]]), None, [], Progress())()
    parts = {name: measured[f"validation/loss/{name}"] for name in ("alignment", "mlc", "router")}
    assert parts["router"] > 0
    assert measured["validation/loss/total"] == pytest.approx(parts["alignment"] + 0.5 * parts["mlc"] + parts["router"])


@pytest.mark.parametrize("build", [mixture, lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))])
def test_blocks_with_experts_are_found(build):
    model = build()
    assert expert_blocks(model) == {type(model.model.layers[0].mlp)}
    assert expert_blocks(tiny_model()) == set()


def olmoe():
    """One that DeepSpeed does not know by itself."""
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(**SMALL, intermediate_size=16, num_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.05)
    )


def train(rank, stage, weights):
    results = []
    for weight in weights:
        keeps_none = {"persistence_threshold": 0} if stage == 3 else {}
        config = tiny_config(engine={"stage": stage, **keeps_none}, objective={"loss": "simpo"})
        engine = make_engine(config, policy(olmoe(), router_weight=weight))
        marked = [type(each).__name__ for each in engine.module.modules() if getattr(each, "_z3_leaf", False)]
        engine, history = run_engine(config, random_rows(8), 3, engine=engine)
        results.append((history, whole_weights(engine), marked))
    return results


def test_sharded_over_workers_whose_tokens_go_to_other_experts_it_takes_the_same_steps(tmp_path):
    (((alone, weights, unmarked),),) = on_workers(1, train, tmp_path / "alone", 0, [0.0])
    ((history, sharded, marked), (balanced, *_)), _ = on_workers(2, train, tmp_path / "sharded", 3, [0.0, None])
    assert marked == ["OlmoeSparseMoeBlock"] * 2 and not unmarked
    assert [row["loss/total"] for row in history] == pytest.approx([row["loss/total"] for row in alone], rel=1e-5)
    for name, value in weights.items():  # by norm: where a gradient is next to nothing, AdamW's step is its rounding
        assert float((sharded[name] - value).norm() / value.norm()) < 1e-5, name
    assert all(0.05 * 2 * 0.9 < row["loss/router"] < 0.05 * 8 for row in balanced)


def test_operations_are_those_of_the_experts_that_a_token_meets():
    work = Work.of(policy(), Engine.shape)
    experts = 3 * 16 * 32  # of one
    attention = 32 * 8 * (4 + 2 + 2 + 4)
    assert work.blocks == 2 * (attention + 8 * 32 + 2 * experts)
    assert work.trained == 1
