"""Which layer is the best to train at: short runs that differ in `mlc.layer` alone, each scored on both kinds.

What the probe's criteria said of the layers before training is compared with what came of it. Each run is DPO + MLC in
one process, without Ray and vLLM: ten steps of two of the sample's harmful training bundles in five languages,
embeddings frozen, and then the answers to the first bundles of `sample:select` in six. Criteria are of the first
bundles of the sample's training half, in the five. Its figures are in docs/probe.md.

    python benchmarks/trained_layers.py --probe --layers 30 25 20 15 10 5 -1 --limit 6 --out layers.json

`--out` is extended: runs that it holds are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_data import MOST_TOKENS, sample_row
from techniques import OBJECTIVE
from transformers import PreTrainedModel

from mlc_ray.config import ModelSection
from mlc_ray.data.batches import collate, collate_prompts
from mlc_ray.data.sources import sample_path
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.search.probe import statistics
from mlc_ray.storage import user_cache
from mlc_ray.train.forward import layer_states
from mlc_ray.train.loop import loss_of
from mlc_ray.train.model import PolicyWithExtractor, load_policy
from mlc_ray.train.reference import ReferenceModel, cached_reference
from mlc_ray.types import Answer, Batch, TokenRow

TRAINED = ["en", "es", "ru", "sw", "zh"]
SCORED = [*TRAINED, "fr"]
STEPS, BUNDLES, EXTRACTOR, SEED = 10, 2, 512, 42
NEW_TOKENS, AT_ONCE, PROBED = 16, 60, 20


def sample(split: str) -> list[dict[str, Any]]:
    """The bundles of a part of the shipped sample."""
    return [json.loads(line) for line in sample_path(split).read_text(encoding="utf-8").splitlines()]


def training_rows(template: ChatTemplate, kind: str = "harmful") -> list[TokenRow]:
    """The sample's training bundles of a kind, templated and tokenized."""
    return [sample_row(line, template, TRAINED) for line in sample("train") if line["kind"] == kind]


@torch.no_grad()
def probed(model: PreTrainedModel, template: ChatTemplate) -> dict[str, Any]:
    """The probe's numbers of all layers, from `PROBED` bundles of each kind."""
    rows = [row for kind in ("harmful", "benign") for row in training_rows(template, kind)[:PROBED]]
    grids = []
    for row in rows:
        tree, prompts = collate_prompts([row], TRAINED)
        grids.append(layer_states(model, tree, prompts).float())  # [L, layers, H], of a bundle in all languages
    present = torch.ones(len(rows), len(TRAINED), dtype=torch.bool)
    harmful = torch.tensor([row.kind == "harmful" for row in rows])
    return statistics(torch.stack(grids), present, harmful, TRAINED).plain()


def trained(model: PreTrainedModel, layer: int, rows: Sequence[TokenRow], learning_rate: float) -> list[float]:
    """Train `model` with the term at `layer`; the losses of all steps. The reference is the model as it came."""
    model.get_input_embeddings().requires_grad_(False)
    module = PolicyWithExtractor(model, layer=layer, extractor_dim=EXTRACTOR, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(rows), generator=generator).tolist()
    steps = [[rows[i] for i in order[start : start + BUNDLES]] for start in range(0, STEPS * BUNDLES, BUNDLES)]
    batches: list[Batch] = []
    with torch.no_grad():
        for chosen in steps:
            shares = [1 / BUNDLES] * BUNDLES
            batch = collate(chosen, languages=TRAINED, weights=shares, needs_rejected=True, reference=None, tap=True)
            said = ReferenceModel(model)(batch, state=False)
            batches.append(replace(batch, reference_chosen=said.chosen, reference_rejected=said.rejected))
    weights = [each for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    losses = []
    for batch in batches:
        result = loss_of(OBJECTIVE, batch, module(batch), cached_reference(batch))
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(result.loss.detach()))
    return losses


@torch.no_grad()
def answered(model: PreTrainedModel, tokenizer: Any, template: ChatTemplate, limit: int) -> list[dict[str, Any]]:
    """A row per prompt of the first bundles of `sample:select`: the answer, what it was read as, and what was asked."""
    model.eval()
    asked = []
    for kind in ("harmful", "benign"):
        for line in [line for line in sample("select") if line["kind"] == kind][:limit]:
            for code in SCORED:
                ids, _ = template.encode_prompt(line["prompts"][code], MOST_TOKENS)
                asked.append(
                    {
                        "kind": kind,
                        "bundle": line["pair"],
                        "language": code,
                        "prompt": line["prompts"][code],
                        "ids": ids,
                    }
                )
    asked.sort(key=lambda each: len(each["ids"]))
    model.set_attn_implementation("sdpa")
    for start in range(0, len(asked), AT_ONCE):
        block = asked[start : start + AT_ONCE]
        longest = max(len(each["ids"]) for each in block)
        padding = [longest - len(each["ids"]) for each in block]
        ids = torch.tensor([[0] * n + list(each["ids"]) for n, each in zip(padding, block, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        with torch.autocast("cpu", torch.bfloat16):
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        for each, row in zip(block, out[:, longest:], strict=True):
            each["answer"] = tokenizer.decode(row, skip_special_tokens=True)
            del each["ids"]
    judge = RefusalJudge(RefusalJudge.Settings())
    verdicts = judge.judge(
        [Answer(each["prompt"], each["answer"], each["language"], each["kind"], "length") for each in asked]
    )
    for each, verdict in zip(asked, verdicts, strict=True):
        each["read_as"] = verdict.behaviour
    return asked


def main() -> None:
    """Train and score the layers that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hugging Face folder (default: {MODEL_NAME}, prepared as the quickstart does)")
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="indices into hidden_states; -1: no training")
    parser.add_argument("--probe", action="store_true", help="also compute the criteria")
    parser.add_argument("--limit", type=int, default=12, help="bundles of each kind to score on (default: 12)")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.model or str(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
    tokenizer = load_tokenizer(path)
    template = ChatTemplate(tokenizer)
    rows = training_rows(template)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.probe and (name := f"{Path(path).name} probe") not in found:
        found[name] = probed(load_policy(ModelSection(path=path, dtype="float32")), template)
        options.out.write_text(json.dumps(found, ensure_ascii=False))
        print(name, found[name]["rankings"], flush=True)
    for layer in [None if layer == -1 else layer for layer in options.layers]:
        name = f"{Path(path).name} {layer}" + ("" if layer is None else f" {options.learning_rate:g}")
        if name in found:
            continue
        started = time.perf_counter()
        torch.manual_seed(SEED)
        model = load_policy(ModelSection(path=path, dtype="float32"))
        losses = [] if layer is None else trained(model, layer, rows, options.learning_rate)
        ended = time.perf_counter()
        answers = answered(model, tokenizer, template, options.limit)
        seconds = {"train": ended - started, "answer": time.perf_counter() - ended}
        found[name] = {"layer": layer, "losses": losses, "seconds": seconds, "answers": answers}
        options.out.write_text(json.dumps(found, ensure_ascii=False))
        refused = {
            kind: sum(each["read_as"] == "refused" for each in answers if each["kind"] == kind)
            for kind in ("harmful", "benign")
        }
        print(name, {key: round(value) for key, value in seconds.items()}, refused, flush=True)


if __name__ == "__main__":
    main()
