"""Thoughts of reasoning models in a score: turned off before it, and what they came to said after it."""

from __future__ import annotations

import logging
from collections import Counter

import pyarrow as pa

from mlc_ray.config import ScoringSection
from mlc_ray.generate.reasoning import MARKS, without_thoughts
from mlc_ray.score.plan import ScoringT
from mlc_ray.types import FORBIDDEN_THOUGHTS, UNFINISHED_THOUGHTS

logger = logging.getLogger(__name__)


def with_reasoning(scoring: ScoringT, model: str) -> ScoringT:
    """`scoring` whose `chat` turns thoughts off where `asking.reasoning` forbids them, once it is decided.

    Args:
        scoring: settings with a `chat` (`with_chat`).
        model: a folder or hub name.

    Raises:
        ReasoningError: the chat template has no switch for it.
    """
    if scoring.asking.reasoning != "forbid":
        return scoring
    from mlc_ray.data.tokens import load_tokenizer  # takes 4 s

    assert scoring.chat is not None, "decided by now (with_chat)"
    tokenizer = load_tokenizer(model, trust_remote_code=scoring.engine.trust_remote_code)
    return scoring.model_copy(update={"chat": without_thoughts(tokenizer, scoring.chat)})


def warn_of_thoughts(table: pa.Table, scoring: ScoringSection) -> None:
    """Say of how many responses thoughts are judged, and how many are nothing else."""
    ended = Counter(table["finish"].to_pylist())
    if unfinished := ended[UNFINISHED_THOUGHTS]:
        logger.warning(
            "the thoughts of %d of %d responses did not end within max_new_tokens=%s: they have no answer and count as "
            "unparsed; set a larger max_new_tokens, or asking.reasoning=forbid",
            unfinished, len(table), scoring.max_new_tokens,
        )  # fmt: skip
    if forbidden := ended[FORBIDDEN_THOUGHTS]:
        logger.warning(
            "%d of %d responses begin with thoughts though the template turns them off (asking.reasoning=forbid): they "
            "count as unparsed; set asking.reasoning=strip",
            forbidden, len(table),
        )  # fmt: skip
    begins = tuple(MARKS)
    if unmarked := sum(text.lstrip().startswith(begins) for text in table["response"].to_pylist()):
        logger.warning(
            "%d of %d responses begin with thoughts, which are judged with them%s",
            unmarked, len(table),
            "" if scoring.asking.reasoning == "judge" else ": the model's chat template does not mark any",
        )  # fmt: skip
