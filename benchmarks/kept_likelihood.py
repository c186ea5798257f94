"""How likely trained models find what the untouched one said to held-out benign prompts, by language.

Of each response in a study's `untouched/MODEL` with which the model complied: the log-prob of its tokens behind its
prompt, without the end of the turn, by the untouched model and by each of the study's models. The table has the mean
log-prob a token in nats of the untouched model, and of each method the change of it as a share of that, as the mean
over seeds.

    python benchmarks/kept_likelihood.py runs/study-recipe
    python benchmarks/kept_likelihood.py runs/study-recipe --dtype float32 --methods recipe
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mlc_ray.config import ChatSection
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer
from mlc_ray.device import resolved
from mlc_ray.report.collect import read_responses
from mlc_ray.stats.rates import language_order

AT_ONCE, LONGEST = 8, 4096
"""Responses that are read at once, and tokens of the longest prompt."""

Asked = Mapping[str, Sequence[tuple[list[int], list[int]]]]
"""Ids of prompts and responses, by language."""


def asked_of(folder: Path, model: str, chat: ChatSection) -> Asked:
    """The benign prompts of a score with which the model complied, and its responses."""
    template = ChatTemplate(load_tokenizer(model), chat, prompts_only=True)
    found = defaultdict(list)
    for row in read_responses(folder / "responses.parquet"):
        if (row.kind, row.behaviour) == ("benign", "complied") and row.response:
            prompt, _ = template.encode_prompt(row.prompt, LONGEST)
            response = template.tokenizer(row.response, add_special_tokens=False)["input_ids"]
            found[row.language].append((prompt, response))
    return {code: found[code] for code in sorted(found, key=language_order)}


@torch.inference_mode()
def likelihoods(model: str, asked: Asked, dtype: str) -> dict[str, float]:
    """Mean log-prob of a response's token, in nats, by language."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    found = {}
    for code, pairs in asked.items():
        total, tokens = 0.0, 0
        ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        for start in range(0, len(ordered), AT_ONCE):
            some = ordered[start : start + AT_ONCE]
            longest = max(len(prompt) + len(response) for prompt, response in some)
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prompt, response) in enumerate(some):
                ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
                mask[row, : len(prompt) + len(response)] = 1
            logits = policy(input_ids=ids, attention_mask=mask).logits
            for row, (prompt, response) in enumerate(some):
                own = logits[row, len(prompt) - 1 : len(prompt) + len(response) - 1].float()
                target = ids[row, len(prompt) : len(prompt) + len(response)]
                total -= float(F.cross_entropy(own, target, reduction="sum"))
            tokens += sum(len(response) for _, response in some)
        found[code] = total / tokens
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every model of a study that is kept, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study with keep_models: true")
    parser.add_argument("--methods", nargs="*", help="these alone")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    options = parser.parse_args(arguments)
    dtype = resolved(options.dtype, gpu=False)
    plan = json.loads((options.study / "study.json").read_text(encoding="utf-8"))["config"]
    chat = ChatSection.model_validate(plan["train"].get("chat") or {})
    if unknown := set(options.methods or ()) - plan["methods"].keys():
        parser.error(f"--methods {' '.join(unknown)}: the study has {', '.join(plan['methods'])}")
    for name, section in plan["models"].items():
        asked = asked_of(options.study / "untouched" / name, section["path"], chat)
        untouched = likelihoods(section["path"], asked, dtype)
        changes: dict[str, list[dict[str, float]]] = defaultdict(list)
        for method in options.methods or plan["methods"]:
            for seed in plan["seeds"]:
                folder = options.study / "cells" / f"{name}-{method}-{seed}" / "model"
                if folder.is_dir():
                    own = likelihoods(str(folder), asked, dtype)
                    changes[method].append({code: own[code] / untouched[code] - 1 for code in asked})
        if not changes:
            parser.error(f"{options.study} has no model of {name} that is kept (keep_models: true)")
        print(f"| {name} | responses | untouched | {' | '.join(changes)} |\n|{'---|' * (3 + len(changes))}")
        for code, pairs in asked.items():
            # A log-prob is below 0: one that is larger by a share is less likely.
            shares = [f"{-statistics.mean(each[code] for each in found):+.1%}" for found in changes.values()]
            print(f"| {code} | {len(pairs)} | {untouched[code]:.3f} | {' | '.join(shares)} |")
        print(f"{name}: {', '.join(f'{method} {len(found)}' for method, found in changes.items())} seeds, in {dtype}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
