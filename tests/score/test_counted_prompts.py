"""Prompts that are counted beforehand, against counts by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.config import ScoringSection, parse_config
from mlc_ray.score.counted_prompts import Prompts, prompts_of


def scoring_of(path: Path | str, **changes: Any) -> ScoringSection:
    return parse_config(ScoringSection, {"benchmarks": [{"path": str(path)}], **changes})


def row(file: str, number: int) -> dict[str, Any]:
    prompts = {"en": f"Say {number} of {file}.", **({"sw": f"Sema {number} ya {file}."} if number > 45 else {})}
    return {"kind": "harmful" if number % 4 else "benign", "prompts": prompts}


@pytest.mark.parametrize(
    ("languages", "limit", "cells"),
    [
        (["en", "sw"], None, {("harmful", "en"): 90, ("benign", "en"): 30, ("harmful", "sw"): 22, ("benign", "sw"): 6}),
        (["en"], 10, {("harmful", "en"): 10, ("benign", "en"): 10}),
        (["sw"], 10, {("harmful", "sw"): 10, ("benign", "sw"): 6}),
    ],
)
def test_bundles_are_chosen_as_a_score_chooses_them(
    tmp_path: Path, languages: list[str], limit: int | None, cells: dict[tuple[str, str], int]
) -> None:
    """The limit is one of both files together, and of bundles that have a language; those with Swahili stand last."""
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for file in "ab":
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row(file, number)) + "\n" for number in range(60)))
    scoring = scoring_of(folder, languages=languages)
    assert prompts_of(scoring.benchmarks, scoring, limit) == Prompts(Counter(cells))


def test_of_a_benchmark_that_is_not_here_no_more_than_the_limit_are_counted() -> None:
    scoring = scoring_of("/not/here.csv", languages=["en", "fr"])
    assert len(prompts_of(scoring.benchmarks, scoring, None)) == 2 * 180
    some = prompts_of(scoring.benchmarks, scoring, 20)
    assert len(some) == 2 * 20 and "20 bundles in 2 languages" in some.assumed[0]
    assert len(prompts_of(scoring.benchmarks, scoring, 500)) == 2 * 180


def test_of_a_published_format_as_many_are_counted_as_it_has_in_its_own_languages() -> None:
    benchmarks = [{"path": "/not/here.csv", "format": "multijail"}]
    scoring = parse_config(ScoringSection, {"benchmarks": benchmarks})
    found = prompts_of(scoring.benchmarks, scoring, None)
    assert len(found) == 10 * 315 and found.cells["harmful", "jv"] == 315
    assert "315 bundles in 10 languages, as published of MultiJail" in found.assumed[0]
    some = parse_config(ScoringSection, {"benchmarks": benchmarks, "languages": ["en", "jv", "fr"]})
    assert prompts_of(some.benchmarks, some, 20).cells == {("harmful", "en"): 20, ("harmful", "jv"): 20}


def test_prompts_are_counted_by_kind_and_language() -> None:
    found = Prompts(Counter({("harmful", "en"): 3, ("benign", "en"): 2}))
    assert len(found) == 5
