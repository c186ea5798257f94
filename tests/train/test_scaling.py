"""The recipes of `configs/scaling`: each is valid, fits the cluster that it names, and takes a step of a shrunk model.

What a shrunk model keeps of its published config: the ratio of heads to key heads, soft-caps, sliding windows and which
blocks have them, normed heads, biases, tied embeddings, routing. The figures are of the models' `config.json`.
"""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlc_ray.config import TrainConfig, load_config
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.check import check_run
from mlc_ray.plan.hardware import cluster_of
from mlc_ray.plan.lengths import assumed
from mlc_ray.plan.runs import PlanError
from mlc_ray.train.attention import TREE, register_attention
from mlc_ray.train.experts import has_experts
from mlc_ray.train.loop import loss_of
from mlc_ray.train.model import PolicyWithExtractor, checkpoint_blocks, resolve_layer, router_weight
from mlc_ray.train.reference import ReferenceModel, asked_of_reference
from tests.train.test_model import batch
from tests.train.tiny import random_rows

register_attention()

FILES = sorted((Path(__file__).parents[2] / "configs" / "scaling").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
QWEN, LLAMA = {"model_type": "qwen2"}, {"model_type": "llama"}
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
        {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "norm_topk_prob": True, "router_aux_loss_coef": 0.001, "head_dim": 16},
    ),
}  # fmt: skip
"""Query heads, key heads, and what else a shrunk model keeps; of experts 8, of which a token meets 2 for 8 of 128."""


def shrunk(name):
    heads, key_heads, kept = PUBLISHED[name]
    kept = dict(kept)
    size = kept.pop("head_dim", 8)
    queries = heads // key_heads * 2  # two key heads
    torch.manual_seed(0)
    return AutoConfig.for_model(
        kept.pop("model_type"), vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=queries, num_key_value_heads=2, head_dim=size, max_position_embeddings=128,
        initializer_range=0.1, **kept,
    )  # fmt: skip


def workers_of(file):
    """What the header says: GPUs, and which."""
    found = re.match(r"# [^,]+, all parameters, for (\d+) x (\w+) \(", file.read_text())
    assert found, f"{file.name} does not begin with the cluster that it is for"
    return int(found[1]), found[2]


def test_every_published_size_has_a_recipe():
    assert sorted(PUBLISHED) == NAMES


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_it_is_valid_and_asks_for_the_cluster_that_it_names(file):
    config = load_config(TrainConfig, file)
    gpus, _ = workers_of(file)
    assert config.name == f"scaling-{file.stem}"
    assert config.cluster.workers == gpus and config.cluster.accelerator == "gpu"
    assert config.train.batch_bundles % gpus == 0, "every worker has as many bundles"
    assert len(file.read_text().splitlines()) <= 20


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_it_fits_the_cluster_that_it_names(file):
    gpus, gpu = workers_of(file)
    config = load_config(TrainConfig, file)
    check_run(config, gpu=True, weights=assumed(config), cluster=cluster_of(gpus, gpu))


def test_a_recipe_on_less_than_it_names_is_refused():
    config = load_config(TrainConfig, next(file for file in FILES if file.stem == "qwen2.5-72b"))
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 8})})
    with pytest.raises(PlanError, match="on 8 x h100 needs"):
        check_run(config, gpu=True, weights=assumed(config), cluster=cluster_of(8, "h100"))


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_shrunk_model_takes_a_step(file):
    """DPO against the model itself is ln 2; a step lowers the loss, and moves every parameter."""
    config, published = load_config(TrainConfig, file), shrunk(file.stem)
    assert (
        published.num_attention_heads / published.num_key_value_heads
        == PUBLISHED[file.stem][0] / PUBLISHED[file.stem][1]
    )
    model = AutoModelForCausalLM.from_config(published, attn_implementation=TREE)
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
