"""How likely trained models still find what the untouched one said to held-out benign prompts, by language.

Of each response in a study's `untouched/MODEL` with which the model complied in the prompt's language: the log-prob of
its tokens behind its prompt, without the end of the turn, by the untouched model and by each of the study's models.
Printed is the change in nats a token (trained less untouched; below 0 is less likely: by -0.1 a token has 0.905 of its
probability), as a mean over responses, and over seeds with the lowest and highest of them. The first three tokens,
where a refusal begins, stand apart from the others.

It is no measure of utility. Greedy responses are the likeliest of the untouched model, so that any change of weights
tends to make them less likely; training on the model's own answers makes such texts likelier.

    python benchmarks/kept_likelihood.py runs/study-recipe
    python benchmarks/kept_likelihood.py runs/study-recipe --dtype float32 --methods recipe
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mlc_ray.config import ChatSection
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer
from mlc_ray.device import resolved
from mlc_ray.report.collect import read_responses
from mlc_ray.stats.rates import language_order
from mlc_ray.types import primary_language

AT_ONCE, LONGEST = 8, 4096
"""Responses that are read at once, and tokens of the longest prompt."""

FIRST = 3
"""Tokens in which a refusal begins."""

PARTS = (f"the first {FIRST} tokens", "the others")

Asked: TypeAlias = Mapping[str, Sequence[tuple[list[int], list[int]]]]
"""Ids of prompts and responses, by language."""

Likelihoods: TypeAlias = Mapping[tuple[str, str], list[float]]
"""Mean log-prob of a token in nats, of each response, by language and part."""


def asked_of(folder: Path, model: str, chat: ChatSection) -> tuple[Asked, Counter[str]]:
    """The benign prompts of a score that the model answered in their language, with its responses; and all, counted."""
    template = ChatTemplate(load_tokenizer(model), chat, prompts_only=True)
    found, asked = defaultdict(list), Counter[str]()
    for row in read_responses(folder / "responses.parquet"):
        if row.kind != "benign":
            continue
        asked[row.language] += 1
        told = row.response_language is not None and primary_language(row.response_language)
        if row.behaviour == "complied" and row.response and told == primary_language(row.language):
            prompt, _ = template.encode_prompt(row.prompt, LONGEST)
            response = template.tokenizer(row.response, add_special_tokens=False)["input_ids"]
            found[row.language].append((prompt, response))
    return {code: found[code] for code in sorted(asked, key=language_order)}, asked


@torch.inference_mode()
def likelihoods(model: str, asked: Asked, dtype: str) -> Likelihoods:
    """Of all responses, in the same order for every model."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for code, pairs in asked.items():
        for start in range(0, len(pairs), AT_ONCE):
            some = pairs[start : start + AT_ONCE]
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
                each = -F.cross_entropy(own, target, reduction="none")
                for part, numbers in zip(PARTS, (each[:FIRST], each[FIRST:]), strict=True):
                    if len(numbers):
                        found[code, part].append(float(numbers.mean()))
    return found


def changed(before: Likelihoods, seeds: Sequence[Likelihoods], key: tuple[str, str]) -> str:
    """The change of a part of a language's responses: mean over seeds, and the lowest and highest of them."""
    if not before.get(key):
        return "-"
    values = [statistics.mean(new - old for new, old in zip(after[key], before[key], strict=True)) for after in seeds]
    spread = f" ({min(values):+.3f} to {max(values):+.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every model of a study that is kept, and print the tables."""
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
        asked, prompts = asked_of(options.study / "untouched" / name, section["path"], chat)
        if not any(asked.values()):
            parser.error(
                f"{options.study}/untouched/{name} has no benign response in its prompt's language; were "
                "languages told (lingua-language-detector, of mlc_ray[score])?"
            )
        before = likelihoods(section["path"], asked, dtype)
        after: dict[str, list[Likelihoods]] = defaultdict(list)
        for method in options.methods or plan["methods"]:
            for seed in plan["seeds"]:
                folder = options.study / "cells" / f"{name}-{method}-{seed}" / "model"
                if folder.is_dir():
                    after[method].append(likelihoods(str(folder), asked, dtype))
        if not after:
            parser.error(f"{options.study} has no model of {name} that is kept (keep_models: true)")
        seeds = ", ".join(f"{method} {len(found)}" for method, found in after.items())
        print(f"{name} in {dtype}; seeds: {seeds}; change in nats a token\n")
        heads = [f"{method}, {part}" for method in after for part in PARTS]
        print(f"| language | responses | untouched, nats a token | {' | '.join(heads)} |\n|{'---|' * (3 + len(heads))}")
        for code, pairs in asked.items():
            own = " / ".join(
                f"{statistics.mean(each):.2f}" if (each := before.get((code, part))) else "-" for part in PARTS
            )
            cells = [changed(before, found, (code, part)) for found in after.values() for part in PARTS]
            print(f"| {code} | {len(pairs)} of {prompts[code]} | {own} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
