from __future__ import annotations

import dataclasses
import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mlc_ray.score.console import comparison_table, heatmap, heatmap_figure, score_table, show
from mlc_ray.score.results import ScoreResult, count
from mlc_ray.stats.rates import Judged, summarise
from mlc_ray.types import Behaviour, Kind

LABELS: dict[str, Behaviour] = {"R": "refused", "C": "complied", "U": "unparsed", "D": "degenerate"}


def records(kind: Kind, benchmark: str = "own", **letters: str) -> list[Judged]:
    return [
        Judged(benchmark, f"{kind}{index}", kind, language, LABELS[letter])
        for language, line in letters.items()
        for index, letter in enumerate(line)
    ]


def result_of(name: str, judged: Sequence[Judged], folder: Path = Path(), **changes: object) -> ScoreResult:
    result = count(
        judged,
        folder=folder / name,
        seen_languages=None,
        model=f"models/{name}",
        resolved=f"/models/{name}",
        fingerprint="0123456789abcdef",
        prompts="prompts",
        judge="refusal",
        measured_by={"refused": "refusal"},
        finish={"stop": len(judged)},
        config={"max_new_tokens": 64},
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
    side = RAW.summary().side("harmful")
    assert side is not None
    interval = f"37.5 ({side.avg.low:.1f} to {side.avg.high:.1f})".split()
    expected = ["harmful", "refused", *interval, "50.0", "attacked", "14.06", "0.00", "sw", "0.0", "8", "0", "1"]
    assert any(line[: len(expected)] == expected and line[len(expected)] == "+75.0" for line in lines)
    assert any(line[:2] == ["difference", "+37.5"] and line[3] == "to" for line in lines)
    assert any("16 responses, 0 degenerate, 1 without a verdict (6.2%)" in " ".join(line) for line in lines)


def test_table_marks_languages_the_judge_does_not_declare() -> None:
    judged = [
        dataclasses.replace(r, via_refused="uncovered" if r.language == "sw" else "")
        for r in records("benign", en="C", sw="C")
    ]
    lines = [" ".join(line) for line in printed(score_table(result_of("x", judged)))]
    assert "en sw‡" in lines
    assert "‡ the judge does not declare this language: do not rely on it" in lines
    assert not any("‡" in " ".join(line) for line in printed(score_table(RAW)))
    compared = [" ".join(line) for line in printed(comparison_table(RAW, result_of("x", judged)))]
    assert "model en sw avg var PAG" in compared  # only one of the two is read so: its cells are marked
    assert any(line.startswith("x 0 0‡") for line in compared)
    assert "‡ the judge does not declare this language: do not rely on it" in compared


def test_heat_map_marks_languages_as_the_tables_do() -> None:
    ways = {"en": "", "ku": "translated", "ps": "uncovered"}
    judged = [
        dataclasses.replace(record, via_refused=ways[record.language])
        for record in records("benign", en="C", ku="C", ps="C")
    ]
    axes = heatmap_figure([result_of("x", judged)]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["en", "ku†", "ps‡"]
    assert axes.get_xlabel().splitlines() == [
        "† read by the judge in translation",
        "‡ the judge does not declare this language: do not rely on it",
    ]
    plain = heatmap_figure([RAW]).axes[0]
    assert [label.get_text() for label in plain.get_xticklabels()] == ["en", "sw"]
    assert plain.get_xlabel() == ""


def test_table_marks_the_measure_that_is_not_read_as_it_stands() -> None:
    judged = [
        dataclasses.replace(r, safety="safe", via_refused="uncovered" if r.language == "de" else "", via_safe="")
        for r in records("harmful", en="RR", de="RC")
    ]
    guarded = result_of("x", judged, measured_by={"refused": "refusal", "safe": "llama-guard"})
    for table in (score_table(guarded), comparison_table(guarded, guarded)):
        lines = [" ".join(line) for line in printed(table)]
        assert any(line.endswith("en de") or "en de avg" in line for line in lines), "the head marks no measure"
        assert any("harmful refused %" in line and "50‡" in line for line in lines)
        assert not any("safe" in line and "‡" in line for line in lines)
    explained = "‡ the judge does not declare this language: do not rely on it"
    assert explained in [" ".join(line) for line in printed(score_table(guarded))]


def test_table_shouts_when_a_side_is_missing() -> None:
    lines = [" ".join(line) for line in printed(score_table(ONE_SIDED))]
    assert any(line.startswith("own: benign: not scored: a model that refuses everything") for line in lines)
    assert "benign: not scored · ·" in lines
    assert not any(line.startswith("benign refused") for line in lines)


def test_table_names_prompts_that_were_too_long() -> None:
    cut = dataclasses.replace(RAW, finish={"stop": 13, "prompt_too_long": 3})
    assert any("3 prompts were too long" in " ".join(line) for line in printed(score_table(cut)))
    assert not any("too long" in " ".join(line) for line in printed(score_table(RAW)))


def test_table_tells_what_was_cut_off() -> None:
    cut = dataclasses.replace(RAW, finish={"stop": 12, "length": 4})
    lines = [" ".join(line) for line in printed(score_table(cut))]
    assert any(line.endswith("25% cut off at max_new_tokens") for line in lines)
    assert not any("harmful part" in line for line in lines), "only a safety judge could miss it"
    safe = dataclasses.replace(cut, measured_by={"refused": "refusal", "safe": "llama-guard"})
    lines = [" ".join(line) for line in printed(score_table(safe))]
    assert any(line.startswith("25% of the responses were cut off") and "harmful part" in line for line in lines)
    assert not any("cut off" in " ".join(line) for line in printed(score_table(RAW)))


def test_table_names_a_language_without_verdicts() -> None:
    judged = records("harmful", en="R" * 60, sw="UU") + records("benign", en="C" * 60, sw="CC")
    result = result_of("x", judged, config={"max_unparsed": 0.05})
    assert result.unparsed_share < 0.05
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    show(score_table(result), console)
    assert "own harmful refused sw (2 of 2): ignore these rates" in console.file.getvalue()
    (line,) = [line for line in console.file.getvalue().splitlines() if "harmful refused %" in line]
    assert re.findall(r"\x1b\[1;31m *(\d+)", line) == ["0"]  # red, and the 100 of English is not
    assert not any("ignore these" in " ".join(line) for line in printed(score_table(RAW)))


def test_summary_lines_show_seen_languages_and_margins_where_there_are_any() -> None:
    plain = str(printed(score_table(RAW)))
    assert "gap" in plain and "seen" not in plain and "nats" not in plain
    assert any(line == ["worst", "difference", "sw", "+0.0"] for line in printed(score_table(RAW)))
    judged = [dataclasses.replace(r, margin=1.5) for r in records("harmful", en="RR", sw="RC")]
    result = dataclasses.replace(RAW, summaries=tuple(summarise(judged, ["en"])))
    lines = printed(score_table(result))
    (head,) = [" ".join(line) for line in lines if "nats" in line]
    assert "seen % unseen % English gap margin, nats" in head
    assert any(line[:2] == ["harmful", "refused"] and line[-1] == "+1.50" and "100.0" in line for line in lines)


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
    assert "benign refused: not scored one · · · · ·" in lines
    assert any(line.startswith("own: benign: not scored") for line in lines)


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
