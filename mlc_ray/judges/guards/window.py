"""Whether a guard's context holds what a policy may write, found out before anything is generated.

A guard counts a text in tokens of its own, and in scripts that it knows less well these are several times as many as
the policy's: the languages that matter most here would drop out first, as `unparsed`, after all the generation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlc_ray.generate.translate import COUNTED, longest_translation, token_counts
from mlc_ray.judges.base import JudgeError, Policy
from mlc_ray.judges.guards.slots import EscapeError
from mlc_ray.runs import longest_context, resolve_model
from mlc_ray.storage import local_model
from mlc_ray.types import Answer

if TYPE_CHECKING:
    from mlc_ray.judges.guards.base import Guard

_RESPONSE = "max_new_tokens"


@dataclass(frozen=True)
class _Longest:
    """The most that prompt and response in `language` may take of the guard's tokens.

    `limit` is the setting that bounds what is written, and `per_token` how many of the guard's tokens one token of it
    may bring.
    """

    language: str
    prompt: int
    response: int
    limit: str
    per_token: float


def check_window(guard: Guard, prompts: Mapping[str, Sequence[str]], policy: Policy, *, window: int) -> int:
    """Check that `window` tokens hold the longest prompt and response in the guard's template, and its reply.

    Prompts are counted by the guard's tokenizer. A response is not there yet: it is taken to have as many of the
    guard's tokens for each of the policy's as the prompts in its language have, at least one. What is translated for
    the guard is as long as the translator may write, in as many tokens.

    Returns:
        How many of them an engine needs: what was found, and the longest response once more, since a response may take
        more tokens than its language's prompts let one expect.

    Raises:
        JudgeError: they do not fit; the message has the numbers and the fix.
    """
    frame = max(len(slots.fill("", "").ids) for slots in guard.asked)
    fixed = frame + guard.max_new_tokens
    found = list(_longest(guard, prompts, policy))
    if not found:
        return fixed
    worst = max(found, key=lambda each: each.prompt + each.response)
    if (needed := fixed + worst.prompt + worst.response) <= window:
        return min(window, needed + worst.response)
    model, trust = resolve_model(guard.settings.model), guard.settings.engine.trust_remote_code
    positions = context_of(model, trust_remote_code=trust)
    alike = [each for each in found if each.limit == worst.limit]
    # A translated prompt is bounded by the same setting as its response.
    spaces = [(window - fixed - (each.prompt if each.limit == _RESPONSE else 0)) / each.per_token for each in alike]
    left = math.floor(min(spaces))
    fixes = [f"{worst.limit}={left} or less"] if left > 0 else []
    if positions is None or needed <= positions:
        fixes.insert(0, f"judge.engine.max_model_len={needed} or more")
    each_of = f" ({worst.per_token:.2f} for each token of the policy's)" if worst.limit == _RESPONSE else ""
    raise JudgeError(
        f"judge.name={guard.name!r}: a conversation in {worst.language!r} may take {needed} of its tokens, and "
        f"judge.engine.max_model_len is {window}: {frame} for its template, {worst.prompt} for the longest prompt, "
        f"{worst.response} for the longest response{each_of} and {guard.max_new_tokens} for its reply; set "
        f"{' or '.join(fixes) or 'languages to those that fit, or take another guard'}"
    )


def needed_for(guard: Guard, answers: Iterable[Answer]) -> int:
    """How many tokens an engine needs for answers that are there, reply included."""
    by_language: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for answer in answers:
        by_language[answer.language].add((answer.prompt, answer.response))
    ways, translate = guard.coverage(by_language), guard.settings.translator
    longest = 0
    for language, texts in by_language.items():
        if ways[language] == "translated" and translate is not None:
            longest = max(longest, len(guard.asked[0].fill("", "").ids) + 2 * longest_translation(translate))
            continue
        by_length = sorted(texts, key=lambda pair: sum(len(text.encode()) for text in pair), reverse=True)
        for pair in by_length[:COUNTED]:
            with suppress(EscapeError):  # the guard is not asked about it
                longest = max(longest, *(len(slots.fill(*pair).ids) for slots in guard.asked))
    # A quarter more: the longest by bytes are counted, and another may take more tokens.
    return longest + longest // 4 + guard.max_new_tokens


def context_of(model: str, *, trust_remote_code: bool) -> int | None:
    """The number of positions that a model was made for, by its configuration; None where that does not say it.

    A hub name's configuration is asked of the hub, or its cache.
    """
    if (positions := longest_context(model)) is not None:
        return positions
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            local_model(model, weights=False), trust_remote_code=trust_remote_code
        ).get_text_config()
    except (OSError, ValueError):
        return None
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _longest(guard: Guard, prompts: Mapping[str, Sequence[str]], policy: Policy) -> Iterator[_Longest]:
    from mlc_ray.data.tokens import load_tokenizer

    own = guard.asked[0].tokenizer
    theirs = load_tokenizer(policy.model, trust_remote_code=policy.trust_remote_code)
    ways, translate = guard.coverage(prompts), guard.settings.translator
    for language, texts in prompts.items():
        if ways[language] == "translated" and translate is not None:
            endpoint = translate.endpoint
            setting, limit = (
                "max_new_tokens" if endpoint is None else "endpoint.max_reply_tokens",
                longest_translation(translate),
            )
            yield _Longest(language, limit, limit, f"judge.translate.{setting}", 2.0)  # prompt and response
            continue
        counts = token_counts(texts, own, theirs)
        # A prompt that does not fit the policy gets no response, so the guard is not asked about it.
        sent = [(mine, other) for mine, other in counts if other <= policy.longest_prompt]
        if sent and (total := sum(other for _, other in sent)):
            ratio = max(1.0, sum(mine for mine, _ in sent) / total)
            response = math.ceil(policy.max_new_tokens * ratio)
            yield _Longest(language, max(mine for mine, _ in sent), response, _RESPONSE, ratio)
