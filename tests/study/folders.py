"""A study's folder as a study leaves it, without training: scores written by the real functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlc_ray.config import StudyConfig, parse_config
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.runs import CELLS_FOLDER, DIVERGED_FILE, MODEL_FOLDER, PROVENANCE_FILE, SCORES_FOLDER, STUDY_SCORE
from mlc_ray.score.prompts import Prompts
from mlc_ray.storage import Place
from mlc_ray.study.cells import Commits, make_cells
from mlc_ray.study.folder import Plan
from mlc_ray.study.record import Recorder
from mlc_ray.study.supervision import Supervision
from tests.report.runs import grid, utility_row, write_score, write_utility

LANGUAGES = ("en", "fr", "sw")
REFUSES = {"untouched": 0.2, "dpo": 0.5, "mlc": 0.95}
PROMPTS_FINGERPRINT = "feedfacecafebeef"  # that of `write_score`


def raw_study(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "models": {"tiny_1": {"path": "m"}},
        "methods": {"dpo": ["mlc.weight=0"], "mlc": []},
        "seeds": [1, 2],
        "train": {"data": {"train": [{"path": "sample:train"}]}, "cluster": {"workers": 2}},
        "scoring": {"benchmarks": [{"path": "sample:test"}]},
        **changes,
    }


def planned(folder: Path, **changes: Any) -> Plan:
    config = parse_config(StudyConfig, raw_study(folder, **changes))
    return Plan(
        config,
        tuple(make_cells(config)),
        config.scoring,
        Commits({"m": "m"}, {"owner/d": "owner/d#1"}),
        PROMPTS_FINGERPRINT,
    )


def asked() -> Prompts:
    rows = [
        {**dict.fromkeys(PROMPTS.names, ""), "benchmark": "mine", "bundle_id": f"{kind}-{bundle}", "kind": kind,
         "language": code, "sample": 0}
        for kind in ("harmful", "benign") for bundle in range(8) for code in LANGUAGES
    ]  # fmt: skip
    return Prompts(pa.Table.from_pylist(rows, schema=PROMPTS), PROMPTS_FINGERPRINT)


def write_cell(
    folder: Path, method: str, seed: int, *, scored: bool = True, unparsed: float = 0.0, swahili: str | None = None
) -> Path:
    """A cell that was trained in 3 steps of 2 seconds, and perhaps scored.

    `swahili` is the language of the responses to Swahili prompts, which others are in that of their prompt; None where
    no languages were told.
    """
    run = folder / CELLS_FOLDER / f"tiny_1-{method}-{seed}"
    (run / MODEL_FOLDER).mkdir(parents=True)
    (run / MODEL_FOLDER / PROVENANCE_FILE).write_text("{}")
    lines = [json.dumps({"step": step, "step_seconds": 2.0}) + "\n" for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(lines))
    if scored:
        chance = REFUSES[method]
        rows = grid(LANGUAGES, lambda kind, code: chance if kind == "harmful" else chance / 2, seed=seed)
        for number, each in enumerate(rows):
            if number < unparsed * len(rows):
                each["behaviour"] = "unparsed"
        config = {"max_new_tokens": 64, "max_unparsed": 0.05, "seconds": {"total": 10.0}}
        told = None if swahili is None else [swahili if row["language"] == "sw" else row["language"] for row in rows]
        write_score(run / SCORES_FOLDER / STUDY_SCORE, rows, seen=["en", "fr"], config=config, told=told)
    return run


def write_untouched(folder: Path, *, utility: bool = False, told: bool = False) -> Path:
    rows = grid(LANGUAGES, lambda kind, code: 0.2 if kind == "harmful" else 0.1, seed=9)
    score = write_score(folder / "untouched" / "tiny_1", rows, told=[row["language"] for row in rows] if told else None)
    if utility:
        write_utility(score, utility_row("mmlu", 0.5))
    return score


def write_diverged(folder: Path, method: str, seed: int) -> None:
    run = folder / CELLS_FOLDER / f"tiny_1-{method}-{seed}"
    run.mkdir(parents=True)
    (run / DIVERGED_FILE).write_text(json.dumps({"step": 2, "message": "the loss is not finite"}))


def recorder(plan: Plan, folder: Path, languages: Sequence[str] = ("en", "fr")) -> Recorder:
    used = Supervision(list(languages), {"en": 100, "fr": 120}, {"en": 50, "fr": 7})
    return Recorder(plan, Place(folder), asked(), {cell.name: used for cell in plan.cells}, gpu=False)
