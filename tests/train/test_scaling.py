"""The recipes of `configs/scaling`: each is valid, fits the cluster that it names, and takes a step of a shrunk model.

What a shrunk model keeps of its published config: the ratio of heads to key heads, soft-caps, sliding windows and which
blocks have them, normed heads, biases, tied embeddings, routing. Windows are shrunk too, so that they cut.
"""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlc_ray.config import TrainConfig, load_config, resolve_layer
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.check import check_run
from mlc_ray.plan.hardware import cluster_of
from mlc_ray.plan.lengths import assumed
from mlc_ray.plan.runs import PlanError
from mlc_ray.plan.shapes import published_config
from mlc_ray.train.attention import TREE, register_attention
from mlc_ray.train.experts import has_experts
from mlc_ray.train.loop import loss_of
from mlc_ray.train.model import PolicyWithExtractor, checkpoint_blocks, router_weight
from mlc_ray.train.reference import ReferenceModel, asked_of_reference
from tests.train.test_model import batch
from tests.train.tiny import random_rows

register_attention()

FILES = sorted((Path(__file__).parents[2] / "configs" / "scaling").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
QWEN, LLAMA = ({"model_type": kind, "tie_word_embeddings": False} for kind in ("qwen2", "llama"))
GEMMA = {
    "model_type": "gemma2", "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
PUBLISHED = {
    "qwen2.5-0.5b": (14, 2, {**QWEN, "tie_word_embeddings": True}),
    "qwen2.5-1.5b": (12, 2, {**QWEN, "tie_word_embeddings": True}),
    "qwen2.5-3b": (16, 2, {**QWEN, "tie_word_embeddings": True}),
    "qwen2.5-7b": (28, 4, QWEN),
    "qwen2.5-14b": (40, 8, QWEN),
    "qwen2.5-32b": (40, 8, QWEN),
    "qwen2.5-72b": (64, 8, QWEN),
    "gemma-2-2b": (8, 4, {**GEMMA, "query_pre_attn_scalar": 256}),
    "gemma-2-9b": (16, 8, {**GEMMA, "query_pre_attn_scalar": 256}),
    "gemma-2-27b": (32, 16, {**GEMMA, "query_pre_attn_scalar": 144}),
    "llama-3.2-1b": (32, 8, {**LLAMA, "tie_word_embeddings": True}),
    "llama-3.1-8b": (32, 8, LLAMA),
    "llama-3.1-70b": (64, 8, LLAMA),
    "qwen3-30b-a3b": (
        32, 4,
        {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
         "norm_topk_prob": True, "router_aux_loss_coef": 0.001, "head_dim": 128, "tie_word_embeddings": False},
    ),
}  # fmt: skip
"""Query heads, key heads and more, copied from the `config.json` of each model."""

KEPT = (
    "tie_word_embeddings", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation",
    "query_pre_attn_scalar", "norm_topk_prob", "router_aux_loss_coef",
)  # fmt: skip


WINDOW = 4
"""Tokens that a shrunk model's windows hold: rows of these tests have up to 22."""


def shrunk(name, window=WINDOW):
    """The published config, and of it in small: sizes, two key heads, eight experts of which a token meets two."""
    config = published_config(name)
    small = {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": config.num_attention_heads // config.num_key_value_heads * 2, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "initializer_range": 0.1,
    }  # fmt: skip
    if has_experts(config):
        small |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    if config.model_type == "gemma2":
        small["sliding_window"] = window
    kept = {field: getattr(config, field) for field in KEPT if hasattr(config, field)}
    return AutoConfig.for_model(config.model_type, **kept, **small)


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=TREE)


def cluster_named(file):
    """What the header says: GPUs, which, and the memory of a node."""
    found = re.match(r"# [^,]+, all parameters, for (\d+) x (\w+) \((\d+) nodes? of (\d+) GiB\)", file.read_text())
    assert found, f"{file.name} does not begin with the cluster that it is for"
    cluster = cluster_of(int(found[1]), found[2], node_memory=int(found[4]) * 2**30)
    assert cluster.nodes == int(found[3])
    return cluster


def test_every_published_size_has_a_recipe():
    assert sorted(PUBLISHED) == NAMES


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_it_is_valid_and_asks_for_the_cluster_that_it_names(file):
    config = load_config(TrainConfig, file)
    gpus = cluster_named(file).gpus
    assert config.name == f"scaling-{file.stem}"
    assert config.cluster.workers == gpus and config.cluster.accelerator == "gpu"
    assert config.train.batch_bundles % gpus == 0, "every worker has as many bundles"
    assert len(file.read_text().splitlines()) <= 20


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_it_fits_the_cluster_that_it_names(file):
    config, cluster = load_config(TrainConfig, file), cluster_named(file)
    check_run(config, gpu=True, weights=assumed(config), cluster=cluster)


@pytest.mark.parametrize("name", NAMES)
def test_published_shapes_are_those_of_the_models_own_configs(name):
    heads, key_heads, kept = PUBLISHED[name]
    config = published_config(name)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, key_heads)
    assert {field: getattr(config, field) for field in kept} == kept


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemma-2")])
def test_windows_of_a_shrunk_model_cut_its_rows(name):
    """With the same weights and wider windows other answers are as likely as they were not."""
    bundles, said = batch(random_rows(2, head=[1, 2]), weights=[0.5] * 2), []
    for window in (WINDOW, 4096):
        module = PolicyWithExtractor(model_of(shrunk(name, window)), layer=2, extractor_dim=16, seed=0)
        with torch.no_grad():
            said.append(module(bundles).chosen.total)
    assert not torch.allclose(said[0], said[1], atol=1e-3)


def test_a_recipe_on_less_than_it_names_is_refused():
    config = load_config(TrainConfig, next(file for file in FILES if file.stem == "qwen2.5-72b"))
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 8})})
    with pytest.raises(PlanError, match="on 8 x h100 needs"):
        check_run(config, gpu=True, weights=assumed(config), cluster=cluster_of(8, "h100"))


def test_a_node_with_less_memory_than_its_processes_take_is_refused():
    config = load_config(TrainConfig, next(file for file in FILES if file.stem == "qwen2.5-0.5b"))
    little = cluster_of(1, "h100", node_memory=2**30)
    with pytest.raises(PlanError, match=r"4\.4 GiB of each node's memory, which has 0\.9"):
        check_run(config, gpu=True, weights=assumed(config), cluster=little)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_shrunk_model_takes_a_step(file):
    """DPO against the model itself is ln 2; a step lowers the loss, and moves every parameter."""
    config, published = load_config(TrainConfig, file), shrunk(file.stem)
    model = model_of(published)
    checkpoint_blocks(model, config.model.gradient_checkpointing)
    objective, layer = Objective(config), resolve_layer(config.mlc.layer, 2)
    weight = router_weight(model, config.model)
    module = PolicyWithExtractor(
        model, layer=layer, extractor_dim=config.mlc.extractor_dim, seed=config.seed, router_weight=weight
    )
    frozen = ReferenceModel(copy.deepcopy(model), **asked_of_reference(objective, layer))
    bundles = batch(random_rows(2, head=[1, 2]), weights=[0.5] * 2)
    with torch.no_grad():
        said = frozen(bundles, state=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}

    def loss():
        output = module(bundles)
        return loss_of(objective, bundles, output, said), output

    first, output = loss()
    first.loss.backward()
    optimizer.step()
    second, _ = loss()
    torch.testing.assert_close(first.metrics["loss/alignment"], torch.full((2,), math.log(2.0)))
    assert second.loss.item() < first.loss.item()
    still = [name for name, value in module.named_parameters() if torch.equal(value, before[name])]
    assert not still, "all parameters are trained"
    assert (output.router is not None) == has_experts(published)
    if output.router is not None:
        assert weight == published.router_aux_loss_coef and "loss/router" in first.metrics
