"""The language that each response of a score is in."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa

from mlc_ray.judges.degenerate import MADE, WRONG_SCRIPT
from mlc_ray.judges.languages import Identifier
from mlc_ray.score.results import LANGUAGE_COLUMN, ScoreResult, write_responses

logger = logging.getLogger(__name__)


def with_languages(judged: pa.Table, folder: Path) -> tuple[pa.Table, str]:
    """`judged` with the language of each response, also in the folder's file, and how it was told.

    The column is null where the language cannot be told (`Identifier.told`), and for a response that is degenerate or
    was never made; one in the wrong script says something. Where nothing was answered, or lingua is not installed,
    there is no such column, and how is empty.
    """
    made = [finish in MADE for finish in judged["finish"].to_pylist()]
    if not any(made) or find_spec("lingua") is None:
        if any(made):
            logger.warning("which language responses are in is not told: pip install 'mlc_ray[score]' brings lingua")
        return judged, ""
    asked, texts = judged["language"].to_pylist(), judged["response"].to_pylist()
    verdicts = zip(*(judged[name].to_pylist() for name in ("behaviour", "safety", "reason")), strict=True)
    gibberish = ["degenerate" in verdict and not (verdict[2] or "").startswith(WRONG_SCRIPT) for verdict in verdicts]
    read = [text if is_made and not none else "" for text, is_made, none in zip(texts, made, gibberish, strict=True)]
    identifier = Identifier(set(asked))
    table = judged.append_column(LANGUAGE_COLUMN, pa.array(identifier.told(read, asked), pa.string()))
    write_responses(table, folder)
    return table, identifier.identity


def unread_languages(result: ScoreResult, bound: float) -> list[str]:
    """What of a score has no verdict at all, in words; nothing where `bound` lets all be unparsed."""
    rows = [row for row in result.rows if row.unparsed == row.n] if bound < 1 else []
    return [f"{row.kind} prompts in {row.language} of {row.benchmark} ({row.measure})" for row in rows]
