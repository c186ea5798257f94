"""Parity with the published code, case by case, from numbers computed with it on random tensors.

Reads every case in the folder named by MLC_GOLDEN_DIR (default: tests/golden). The `step_*` cases go through
`PolicyWithExtractor` and `Objective`, which is what training runs.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mlc_ray.config import ObjectiveConfig
from mlc_ray.losses.mlc import mlc_loss
from mlc_ray.losses.objective import Objective
from mlc_ray.train.model import PolicyWithExtractor, answer_log_probs
from mlc_ray.types import Batch, PackedPrompts, PackedResponses, PackedSequences

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
            chosen, rejected = answer_log_probs(frozen, batch.chosen, batch.rejected, case["pairs"])
        reference = {"reference_chosen": chosen.total, "reference_rejected": rejected.total}
    assert objective.needs_reference == case["uses_reference"]

    output = module(batch, tap=True)
    result = objective.total_loss(
        weight=batch.weight,
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
    assert relative(result.metrics["loss/mlc"].mean() * case["lam"], metrics["mlc_losses"]) < 1e-5
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
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="packed"))
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    model.load_state_dict(weights, strict=True)
    return model


def batch_of(case, tensors):
    """The fixture's padded rows as a packed Batch."""
    pairs, languages = case["pairs"], case["languages"]
    lengths = tensors["attention_mask"].sum(dim=1).tolist()
    rows = [row[:length] for row, length in zip(tensors["input_ids"], lengths, strict=True)]
    labels = [row[:length] for row, length in zip(tensors["labels"], lengths, strict=True)]

    def pack(indices):
        starts, start = [], 0
        for index in indices:
            starts.append(start)
            start += lengths[index]
        sequences = PackedSequences(
            torch.cat([rows[i] for i in indices]).unsqueeze(0),
            torch.cat([torch.arange(lengths[i]) for i in indices]).unsqueeze(0),
            tuple(lengths[i] for i in indices),
        )
        return SimpleNamespace(sequences=sequences, starts=starts)

    def responses(indices):
        packed = pack(indices)
        predicting, targets, bundles = [], [], []
        for bundle, (index, start) in enumerate(zip(indices, packed.starts, strict=True)):
            answer = (labels[index] != -100).nonzero().flatten()
            predicting.append(start + answer - 1)
            targets.append(labels[index][answer])
            bundles.append(torch.full_like(answer, bundle))
        return PackedResponses(packed.sequences, torch.cat(predicting), torch.cat(targets), torch.cat(bundles))

    prompts = list(range(2 * pairs, 2 * pairs + pairs * languages))
    packed = pack(prompts)
    tapped = torch.tensor([start + lengths[i] - 1 for i, start in zip(prompts, packed.starts, strict=True)])
    place = torch.arange(pairs * languages)
    return Batch(
        bundle_ids=tuple(str(i) for i in range(pairs)),
        kinds=("harmful",) * pairs,
        languages=tuple(f"l{i}" for i in range(languages)),
        weight=torch.ones(pairs),
        chosen=responses(list(range(pairs))),
        rejected=responses(list(range(pairs, 2 * pairs))),
        prompts=PackedPrompts(packed.sequences, tapped, place // languages, place % languages),
    )
