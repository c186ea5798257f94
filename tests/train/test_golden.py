"""Parity with the published code, case by case, from numbers computed with it on random tensors.

Reads every case in the folder named by MLC_GOLDEN_DIR (default: tests/golden). The `step_*` cases go through
`PolicyWithExtractor` and `Objective`, which is what training runs.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlc_ray.config import ObjectiveConfig
from mlc_ray.data.trees import make_tree
from mlc_ray.losses.mlc import mlc_loss
from mlc_ray.losses.objective import Objective
from mlc_ray.train.attention import register_attention
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.train.reference import ReferenceModel
from mlc_ray.types import AnswerRows, Answers, Batch, Prompts

register_attention()
FOLDER = Path(os.environ.get("MLC_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


def relative(actual, expected):
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).double()
    return float((actual - expected).norm() / expected.norm())


def test_every_file_of_the_folder_is_a_case():
    files = {path.stem for path in FOLDER.glob("*.safetensors")}
    assert files == {f"{family}_{name}" for family, cases in MANIFEST.items() for name in cases}
    assert len(files) >= 10


@pytest.mark.parametrize("name", MANIFEST["mlc"])
def test_mlc_case(name):
    case, tensors = MANIFEST["mlc"][name], load_file(FOLDER / f"mlc_{name}.safetensors")
    languages = case["languages"]
    last = tensors["mask"].sum(dim=1) - 1
    hidden = tensors["hidden"][torch.arange(len(last)), last].requires_grad_()
    weight, bias = tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    projected = torch.nn.functional.linear(hidden, weight, bias)
    grid = projected.view(-1, languages, weight.shape[0])
    loss, values = mlc_loss(grid, temperature=case["tau"], scaling=case.get("scaling", "leading"))
    loss.backward()
    assert relative(loss, tensors["loss"][0]) < 1e-5
    assert relative(loss, case["loss"]) < 1e-5
    assert relative(values, tensors["singular_values"]) < 1e-5
    assert relative(hidden.grad, tensors["grad_last_hidden"]) < 1e-4
    assert relative(weight.grad, tensors["grad_weight"]) < 1e-4
    assert relative(bias.grad, tensors["grad_bias"]) < 1e-4


@pytest.mark.parametrize("name", MANIFEST["step"])
def test_step_case(name):
    case, tensors = MANIFEST["step"][name], load_file(FOLDER / f"step_{name}.safetensors")
    policy = build(case["config"], tensors, "policy.")
    module = PolicyWithExtractor(policy, layer=case["layer"], extractor_dim=tensors["extractor_bias"].numel(), seed=0)
    module.extractor.load_state_dict({"weight": tensors["extractor_weight"], "bias": tensors["extractor_bias"]})
    batch = batch_of(case, tensors)
    loss = {"sigmoid": "dpo"}.get(case["loss_type"], case["loss_type"])
    settings = {"loss": loss, "beta": case["beta"]} | ({"margin": case["simpo_gamma"]} if loss == "simpo" else {})
    objective = Objective(ObjectiveConfig(objective=settings, mlc={"weight": case["lam"], "temperature": case["tau"]}))
    reference = {}
    if objective.needs_reference:
        with torch.no_grad():
            frozen = build(case["config"], tensors, "reference.")
            said = ReferenceModel(frozen)(batch, state=False)
        reference = {"reference_chosen": said.chosen, "reference_rejected": said.rejected}
    assert objective.needs_reference == case["uses_reference"]

    output = module(batch)
    result = objective.total_loss(
        weight=batch.weight / case["pairs"],
        chosen=output.chosen,
        rejected=output.rejected,
        representations=output.representations,
        present=output.present,
        **reference,
    )
    result.loss.backward()

    metrics = case["metrics"]
    assert relative(result.loss.detach(), case["total_loss"]) < 1e-5
    assert relative(result.metrics["loss/alignment"].mean(), metrics["dpo_losses"]) < 1e-5
    assert relative(result.term_metrics["loss/mlc"].mean() * case["lam"], metrics["mlc_losses"]) < 1e-5
    assert relative(result.metrics["reward/margin"].mean(), metrics["rewards/margins"]) < 1e-4
    assert float(result.metrics["reward/accuracy"].mean()) == metrics["rewards/accuracies"]
    gradients = {key: value.grad for key, value in policy.named_parameters()}
    for key, norm in case["grad_norms"].items():
        assert relative(gradients[key].norm(), norm) < 1e-4, key
    whole = {
        "grad_embed": gradients["model.embed_tokens.weight"],
        "grad_lm_head": gradients["lm_head.weight"],
        "grad_layer0_q": gradients["model.layers.0.self_attn.q_proj.weight"],
        "grad_extractor_weight": module.extractor.weight.grad,
        "grad_extractor_bias": module.extractor.bias.grad,
    }
    compared = [key for key in tensors if key.startswith("grad_")]
    assert len(compared) >= 4
    for key in compared:
        assert relative(whole[key], tensors[key]) < 1e-4, key


def build(config, tensors, prefix):
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="tree"))
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    model.load_state_dict(weights, strict=True)
    return model


def batch_of(case, tensors):
    """The fixture's padded rows as a Batch whose tree has each of them whole: answers, then prompts."""
    pairs, languages = case["pairs"], case["languages"]
    lengths = tensors["attention_mask"].sum(dim=1)
    starts = lengths.cumsum(0) - lengths
    rows = [row[:length] for row, length in zip(tensors["input_ids"], lengths.tolist(), strict=True)]

    def answers(first):
        predicting, targets, bundles = [], [], []
        for bundle in range(pairs):
            answer = (tensors["labels"][first + bundle] != -100).nonzero().flatten()
            predicting.append(starts[first + bundle] + answer - 1)
            targets.append(tensors["labels"][first + bundle][answer])
            bundles.append(torch.full_like(answer, bundle))
        return Answers(torch.cat(predicting), torch.cat(targets), torch.cat(bundles))

    place = torch.arange(pairs * languages)
    return Batch(
        bundle_ids=tuple(str(i) for i in range(pairs)),
        kinds=("harmful",) * pairs,
        harmful=torch.ones(pairs, dtype=torch.bool),
        languages=tuple(f"l{i}" for i in range(languages)),
        weight=torch.ones(pairs),
        term_weight=torch.ones(pairs),
        groups=None,
        tree=make_tree(
            torch.cat(rows).numpy(), lengths.numpy(), np.full(len(rows), -1), answers=0, prompt_only=2 * pairs
        ),
        chosen=answers(0),
        rejected=answers(pairs),
        rows=AnswerRows(torch.arange(pairs), torch.zeros(pairs).long(), torch.zeros(pairs).long(), torch.arange(pairs)),
        prompts=Prompts((starts + lengths - 1)[2 * pairs :], place // languages, place % languages),
    )
