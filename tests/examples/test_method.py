"""The method on one page and in TRL, each on the real small model and the shipped sample."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mlc_ray
from examples import mlc_in_plain_torch, mlc_with_trl
from mlc_ray.config import ModelSection, ObjectiveConfig
from mlc_ray.data.batches import collate
from mlc_ray.data.bundles import make_bundle
from mlc_ray.data.tokens import load_tokenizer, tokenize_bundle
from mlc_ray.losses.base import Tapped
from mlc_ray.losses.objective import Objective
from mlc_ray.train.model import PolicyWithExtractor, load_policy

SAMPLE = Path(mlc_ray.__file__).parent / "data" / "sample" / "train.jsonl"
LANGUAGES = ["en", "es", "fr", "sw"]


def test_the_page_is_one_page_and_needs_nothing_but_torch_and_transformers():
    source = Path(mlc_in_plain_torch.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 130
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"copy", "json", "sys", "pathlib", "torch", "transformers", "mlc_ray"}


@pytest.mark.slow
def test_the_page_makes_held_out_bundles_more_consistent(smollm2, monkeypatch, capsys):
    monkeypatch.setattr(mlc_in_plain_torch, "TRAINED", 8)
    monkeypatch.setattr(mlc_in_plain_torch, "LANGUAGES", ["en", "es", "sw"])
    results = mlc_in_plain_torch.main(str(smollm2), str(SAMPLE))
    printed = capsys.readouterr().out
    assert printed.count("loss/alignment") == 4
    assert "loss/alignment 0.6931" in printed  # ln 2, where the policy still is the reference
    (loss_before, share_before), (loss_after, share_after) = results["before"], results["after"]
    assert loss_after < loss_before and share_after > share_before
    for when, (loss, share) in results.items():
        assert f"{when:>6}  held-out bundles: loss/mlc {loss:.4f}  leading share {share:.4f}" in printed


def term_of_mlc_ray(model, extractor, layer):
    """`loss/mlc` of the sample's first two bundles by mlc_ray: its tokens, forward of a tree, tap and term."""
    tokenizer = load_tokenizer(str(model))
    lines = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:2]]
    fields = ("kind", "prompts", "chosen", "rejected")
    bundles = [make_bundle({name: line[name] for name in fields}) for line in lines]
    limits = {"max_prompt_tokens": 512, "max_response_tokens": 512}
    rows = [tokenize_bundle(bundle, tokenizer, languages=LANGUAGES, **limits) for bundle in bundles]
    batch = collate(rows, languages=LANGUAGES, weights=[1.0, 1.0], needs_rejected=True, reference=None, tap=True)
    policy = load_policy(ModelSection(path=str(model), dtype="float32"))
    module = PolicyWithExtractor(policy, layer=layer, extractor_dim=extractor.out_features, seed=0)
    module.extractor.load_state_dict(extractor.state_dict())
    output = module(batch)
    term = Objective(ObjectiveConfig()).terms["mlc"]
    return term(Tapped(output.representations, output.present)).loss.mean().item()


@pytest.mark.slow
def test_in_trl_the_term_is_ours_and_falls(smollm2, tmp_path):
    trainer = mlc_with_trl.make_trainer(str(smollm2), str(tmp_path), bundles=2, max_steps=3)
    with torch.no_grad():
        ours = term_of_mlc_ray(smollm2, trainer.model.mlc_extractor, layer=30)
    before = {name: value.clone() for name, value in trainer.model.mlc_extractor.state_dict().items()}
    trainer.train()
    logged = [row for row in trainer.state.log_history if "mlc/loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert logged[0]["mlc/loss"] == pytest.approx(ours, rel=1e-3)
    assert logged[2]["mlc/loss"] < logged[0]["mlc/loss"]
    assert logged[2]["mlc/leading_share"] > logged[0]["mlc/leading_share"]
    assert logged[0]["loss"] == pytest.approx(0.693147 + 0.8 * ours, rel=1e-3)
    extractor = trainer.drop_extractor()
    assert any(not torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
    trainer.save_model(str(tmp_path / "model"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert "mlc_extractor.weight" not in saved.state_dict()
