"""Bundles for the step benchmarks: the shipped sample's templated text, or random tokens with the published lengths."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mlc_ray.data.batches import collate
from mlc_ray.data.bundles import make_bundle
from mlc_ray.data.sources import sample_path
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer, tokenize_bundle
from mlc_ray.types import Batch, ReferenceRows, TokenRow

# The published data has about 427 prompt tokens a bundle over ten languages. How they are shared out is our guess:
# scripts that the tokenizer knows less well take more tokens.
LENGTHS = {"en": 25, "zh": 23, "ru": 32, "ja": 30, "ar": 33, "bn": 75, "sw": 40, "ur": 53, "ps": 66, "ku": 50}
PROMPT_TOKENS = sum(LENGTHS.values())
# ... and about 208 preference tokens, read here as both preference sequences together, the English prompt included
# in each. (Reading it as the two answers alone would make the padded step longer and flatter us.)
PREFERENCE_TOKENS = 208
HEAD, TAIL = 25, 5
"""Tokens of a chat template before and after the user's text, about those of Qwen2.5 with its default system prompt."""

LANGUAGES = sorted(LENGTHS)
MOST_TOKENS = 512


def sample_row(line: Mapping[str, Any], template: ChatTemplate, languages: Sequence[str]) -> TokenRow:
    """A bundle of the shipped sample, as its file has it, templated and tokenized."""
    return tokenize_bundle(
        make_bundle({key: value for key, value in line.items() if key not in ("pair", "split")}),
        template,
        languages=languages,
        max_prompt_tokens=MOST_TOKENS,
        max_response_tokens=MOST_TOKENS,
    )


def sample_rows(tokenizer_folder: str, bundles: int, repeats: int, seed: int = 0) -> list[list[TokenRow]]:
    """Bundles of the sample's training half in ten languages, templated and tokenized, for each of the repeats.

    Harmful and benign in an order that the seed decides; from the start again where there are not enough.
    """
    template = ChatTemplate(load_tokenizer(tokenizer_folder))
    lines = [json.loads(line) for line in sample_path("train").read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(lines)
    rows = [sample_row(line, template, LANGUAGES) for line in lines]
    return [[rows[(at * bundles + i) % len(rows)] for i in range(bundles)] for at in range(repeats)]


def published_rows(vocabulary: int, bundles: int, repeats: int, seed: int = 0) -> list[list[TokenRow]]:
    """Bundles of random tokens in a template, each of exactly the published mean size.

    Lengths of languages vary by a fifth and answers share their tokens between 40:60 and 60:40. Bundles of one step
    do not vary in total, which real ones do: more variation means more padding, so this is the cautious choice.
    """
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(n)]

    head, tail = tokens(HEAD), tokens(TAIL)

    def bundle() -> TokenRow:
        varied = {code: n * rng.uniform(0.8, 1.2) for code, n in LENGTHS.items() if code != "en"}
        scale = (PROMPT_TOKENS - LENGTHS["en"]) / sum(varied.values())
        lengths = {"en": LENGTHS["en"]} | {code: round(n * scale) for code, n in varied.items()}
        lengths["bn"] += PROMPT_TOKENS - sum(lengths.values())  # what rounding left over
        answers = PREFERENCE_TOKENS - 2 * LENGTHS["en"]
        chosen = round(answers * rng.uniform(0.4, 0.6))
        prompts = [head + tokens(n) + tail for n in lengths.values()]
        return TokenRow(
            bundle_id=f"{rng.getrandbits(64):016x}",
            kind="harmful",
            languages=list(lengths),
            prompts=prompts,
            tapped=[len(prompt) - 1 for prompt in prompts],
            response_prompt=0,
            chosen=tokens(chosen),
            rejected=tokens(answers - chosen),
        )

    return [[bundle() for _ in range(bundles)] for _ in range(repeats)]


def batch_of(
    rows: Sequence[TokenRow],
    of: int,
    *,
    tap: bool = True,
    reference: ReferenceRows | None = None,
) -> Batch:
    """Our batch of `rows`, which are some or all of a step's `of` bundles."""
    weights = [1 / of] * len(rows)  # the step's loss is the sum over its batches
    return collate(rows, languages=LANGUAGES, weights=weights, needs_rejected=True, reference=reference, tap=tap)
