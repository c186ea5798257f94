"""Run and score folders as training and scoring leave them, written with the real functions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.runs import RESPONSES_FILE
from mlc_ray.score.results import LANGUAGE_COLUMN, count, records_of, save_scores
from mlc_ray.types import Kind
from mlc_ray.utility.file import Utility, UtilityRow, save_utility

TEXT = pa.string()
SCHEMA = pa.schema(
    [
        *((name, TEXT) for name in ("benchmark", "bundle_id", "kind", "category", "language", "prompt", "response")),
        ("finish", TEXT), ("prompt_tokens", pa.int32()), ("response_tokens", pa.int32()),
        ("behaviour", TEXT), ("safety", TEXT), ("reason", TEXT), ("categories", pa.list_(TEXT)),
        ("margin", pa.float64()), ("via_refused", TEXT), ("via_safe", TEXT),
        ("judge_refused", TEXT), ("judge_safe", TEXT), ("sample", pa.int32()), ("thoughts", TEXT),
    ]
)  # fmt: skip
THIRTY = [
    "en", "am", "ar", "bn", "cs", "de", "el", "es", "fa", "fi", "fr", "ha", "he", "hi", "id", "it", "ja", "ko", "ku",
    "ms", "nl", "pl", "ps", "pt", "ru", "sw", "th", "tr", "ur", "zh-Hant",
]  # fmt: skip


def response(bundle: int, kind: Kind, language: str, **columns: Any) -> dict[str, Any]:
    """A row of responses.parquet: refused if harmful, complied with if benign, unless told otherwise."""
    row = {
        "benchmark": "mine", "bundle_id": f"{kind}-{bundle}", "kind": kind, "category": "", "language": language,
        "prompt": f"prompt {bundle} in {language}", "response": f"answer {bundle} in {language}", "finish": "stop",
        "prompt_tokens": 8, "response_tokens": 8, "behaviour": "refused" if kind == "harmful" else "complied",
        "safety": None, "reason": "", "categories": None, "margin": None, "via_refused": "", "via_safe": None,
        "judge_refused": "refusal", "judge_safe": None, "sample": 0, "thoughts": None,
    }  # fmt: skip
    assert row.keys() >= columns.keys()
    return {**row, **columns}


def grid(
    languages: Sequence[str],
    refuses: Callable[[str, str], float],
    *,
    bundles: int = 8,
    kinds: Sequence[Kind] = ("harmful", "benign"),
    seed: int = 0,
    **columns: Any,
) -> list[dict[str, Any]]:
    """Responses to `bundles` bundles of each kind, refused with the probability `refuses(kind, language)`."""
    chance = random.Random(seed)
    return [
        response(
            bundle, kind, code,
            **{"behaviour": "refused" if chance.random() < refuses(kind, code) else "complied", **columns},
        )
        for kind in kinds
        for bundle in range(bundles)
        for code in languages
    ]  # fmt: skip


def write_score(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    seen: Sequence[str] | None = None,
    told: Sequence[str | None] | None = None,
    **more: Any,
) -> Path:
    """A score folder: responses.parquet and the scores.json that its verdicts make.

    `told` are the languages that the responses are in, by some lingua; None where no languages were told.
    """
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    if told is not None:
        table = table.append_column(LANGUAGE_COLUMN, pa.array(told, TEXT))
        more = {"told_by": "lingua 2.1.1 among en es", **more}
    pq.write_table(table, folder / RESPONSES_FILE)
    records = records_of(table)
    fields: dict[str, Any] = {
        "model": f"/models/{folder.name}", "resolved": f"/models/{folder.name}", "fingerprint": "0123456789abcdef",
        "prompts": "feedfacecafebeef", "judge": "refusal", "measured_by": {"refused": "refusal"},
        "config": {"max_new_tokens": 64, "max_unparsed": 0.05}, "versions": {"python": "3.11.9", "vllm": "0.30.0"},
        "finish": {"stop": len(records)}, "created": "2026-01-01T00:00:00+0000",
    }  # fmt: skip
    result = count(records, folder=folder, seen_languages=seen, **{**fields, **more})
    save_scores(result)
    return folder


def utility_row(task: str, value: float | None = 0.25, **more: Any) -> UtilityRow:
    """One accuracy over 100 questions, unless told otherwise."""
    fields: dict[str, Any] = {
        "metric": "acc", "filter": "none", "stderr": 0.01, "n": 100, "higher_is_better": True, "version": "1",
        "num_fewshot": 5, "limit": None, "chat_template": False, "backend": "vllm",
    }  # fmt: skip
    return UtilityRow(task=task, value=value, **{**fields, **more})


def write_utility(folder: Path, *rows: UtilityRow, fingerprint: str = "0123456789abcdef") -> Path:
    """A folder's utility.json, of the model that `write_score` names."""
    name = f"/models/{folder.name}"
    versions = {"lm_eval": "0.4.13"}
    return Path(save_utility(Utility(name, name, fingerprint, rows, versions, "2026-01-01T00:00:00+0000", folder)))


def write_run(folder: Path, metrics: Sequence[dict[str, Any]] | None = None) -> Path:
    """A training run's folder, without scores."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: mine\nmlc:\n  weight: 0.8\n", encoding="utf-8")
    facts = {
        "resolved_config": {}, "fingerprints": {"model": "d58bcb1cd8572f65"}, "bundles": 48,
        "languages": ["en", "sw"], "total_steps": 24, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    if metrics is not None:
        lines = "".join(json.dumps(row) + "\n" for row in metrics)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


def steps(count: int = 12) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl as a run that collapses writes them, with a step that had no finite value."""
    return [
        {
            "step": i, "loss/total": 1.0 / i, "loss/alignment": 0.7 / i, "mlc/leading_share": 1 - 0.5 / i,
            "collapse/effective_rank": None if i == 3 else 1 + 4.0 / i, "learning_rate": 1e-5,
        }
        for i in range(1, count + 1)
    ]  # fmt: skip
