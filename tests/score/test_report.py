from __future__ import annotations

import dataclasses
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from mlc_ray.score.metrics import Judged, Label, pooled_rows, score_rows, summarise
from mlc_ray.score.report import comparison_table, heatmap, score_table, show
from mlc_ray.score.results import ScoreResult, ScoresFileError, load_scores, save_scores
from mlc_ray.types import Kind

LABELS: dict[str, Label] = {"R": "refused", "C": "complied", "U": "unparsed"}


def records(kind: Kind, benchmark: str = "own", **letters: str) -> list[Judged]:
    return [
        Judged(benchmark, f"{kind}{index}", kind, language, LABELS[letter])
        for language, line in letters.items()
        for index, letter in enumerate(line)
    ]


def result_of(name: str, judged: Sequence[Judged], folder: Path = Path(), **changes: object) -> ScoreResult:
    summaries = tuple(summarise(judged))
    pooled = pooled_rows(judged) if len(summaries) > 1 else []
    result = ScoreResult(
        name=name,
        model=f"models/{name}",
        resolved=f"/models/{name}",
        fingerprint="0123456789abcdef",
        prompts="prompts",
        judge="refusal",
        rows=(*score_rows(judged), *pooled),
        summaries=summaries,
        responses=len(judged),
        unparsed=sum(record.label == "unparsed" for record in judged),
        finish={"stop": len(judged)},
        config={"max_new_tokens": 64},
        folder=folder,
    )
    return dataclasses.replace(result, **changes)


def printed(renderable: object) -> list[list[str]]:
    """The words of each line, as a terminal of 40 columns would get them before it wraps."""
    console = Console(file=io.StringIO(), width=40)
    show(renderable, console)
    return [line.split() for line in console.file.getvalue().splitlines()]


RAW = result_of("raw", records("harmful", en="RRRC", sw="CCCU") + records("benign", en="CCCC", sw="CCCC"))
ALIGNED = result_of("aligned", records("harmful", en="RRRR", sw="RRRC") + records("benign", en="CCCC", sw="RRRC"))
ONE_SIDED = result_of("one", records("harmful", en="RRRR", sw="RRRR"))


def test_table_shows_both_sides_and_the_difference() -> None:
    lines = printed(score_table(RAW))
    assert ["harmful", "refused", "%", "75", "0"] in lines
    assert ["benign", "refused", "%", "0", "0"] in lines
    assert ["difference", "+75", "+0"] in lines
    assert ["unparsed", "0", "1"] in lines
    assert ["harmful", "37.5", "14.06", "0.00", "sw", "0.0", "8", "1"] in lines
    assert ["difference", "+37.5"] in lines
    assert any("16 responses, 1 without a verdict (6.2%)" in " ".join(line) for line in lines)


def test_table_shouts_when_a_side_is_missing() -> None:
    lines = [" ".join(line) for line in printed(score_table(ONE_SIDED))]
    assert any(line.startswith("own: benign: not scored: a model that refuses everything") for line in lines)
    assert "benign: not scored · ·" in lines
    assert not any(line.startswith("benign refused") for line in lines)


def test_table_names_prompts_that_were_too_long() -> None:
    cut = dataclasses.replace(RAW, finish={"stop": 13, "prompt_too_long": 3})
    assert any("3 prompts were too long" in " ".join(line) for line in printed(score_table(cut)))
    assert not any("too long" in " ".join(line) for line in printed(score_table(RAW)))


def test_no_number_is_cut_off_with_many_languages() -> None:
    codes = [f"l{index:02}" for index in range(20)]
    wide = result_of("wide", records("harmful", **dict.fromkeys(codes, "RC")))
    lines = printed(score_table(wide))
    assert codes in lines
    assert ["harmful", "refused", "%", *["50"] * 20] in lines
    assert "…" not in str(lines)


def test_comparison_shows_the_change_on_both_sides() -> None:
    lines = printed(comparison_table(RAW, ALIGNED))
    assert ["harmful", "refused", "%", "raw", "75", "0", "37.5", "14.06", "0.00"] in lines
    assert ["aligned", "100", "75", "87.5", "1.56", "0.75"] in lines
    assert ["change", "+25", "+75", "+50.0"] in lines
    assert ["change", "+0", "+75", "+37.5"] in lines
    assert ["harmful", "-", "benign", "raw", "+75", "+0", "+37.5"] in lines
    assert ["aligned", "+100", "+0", "+50.0"] in lines
    assert not any("not" in line for line in lines)


def test_comparison_says_what_was_not_measured_alike() -> None:
    other = dataclasses.replace(ALIGNED, prompts="others", config={"max_new_tokens": 32})
    lines = [" ".join(line) for line in printed(comparison_table(RAW, other))]
    assert "not measured alike: prompts differ (prompts, others)" in lines
    assert "not measured alike: max_new_tokens differ (64, 32)" in lines


def test_comparison_with_a_missing_side_says_so() -> None:
    lines = [" ".join(line) for line in printed(comparison_table(RAW, ONE_SIDED))]
    assert "benign: not scored one · · · · ·" in lines
    assert any(line.startswith("own: benign: not scored") for line in lines)


def test_scores_file_comes_back_as_it_was(tmp_path: Path) -> None:
    several = records("harmful", en="RC") + records("benign", "other", en="C", sw="U")
    for judged in (several, records("harmful", en="RC")):
        result = result_of("x", judged, tmp_path)
        save_scores(result)
        assert load_scores(tmp_path) == result
        assert load_scores(tmp_path / "scores.json") == result


def test_scores_file_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScoresFileError, match="does not exist"):
        load_scores(tmp_path)
    file = save_scores(result_of("x", records("harmful", en="RC"), tmp_path))
    content = json.loads(file.read_text(encoding="utf-8"))
    for text, fault in (
        ("{", "not valid JSON"),
        ("[]", "format None"),
        (json.dumps({**content, "format": 99}), "format 99"),
        (json.dumps({key: value for key, value in content.items() if key != "rows"}), "rows"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ScoresFileError, match=fault):
            load_scores(file)


def test_summary_is_found_by_name() -> None:
    several = result_of("x", records("harmful", en="RC") + records("benign", "other", en="C"))
    assert several.summary("other").not_scored == ("harmful",)
    assert several.summary().benchmark == "all"
    with pytest.raises(KeyError, match="nothing"):
        several.summary("nothing")


def test_heat_map_is_a_png_that_grows_with_what_it_shows(tmp_path: Path) -> None:
    one = _png_size(heatmap([RAW], tmp_path / "one.png"))
    two = _png_size(heatmap([RAW, ONE_SIDED], tmp_path / "two.png"))
    assert one[0] > 300
    assert two[1] > one[1]


def _png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height
