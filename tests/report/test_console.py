from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mlc_ray.report.collect import Model
from mlc_ray.report.console import score_tables, show
from mlc_ray.report.rates import views_of
from mlc_ray.report.summaries import side_table
from mlc_ray.report.tables import console, markdown
from mlc_ray.report.text import percent
from mlc_ray.report.utility import utility_table
from mlc_ray.score.results import ScoreResult, count
from mlc_ray.stats.rates import Judged
from mlc_ray.stats.summaries import summarise
from mlc_ray.types import Behaviour, Kind
from tests.report.runs import utility_row

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
    terminal = Console(file=io.StringIO(), width=40)
    show(renderable, terminal)
    return [line.split() for line in terminal.file.getvalue().splitlines()]


SUMMARY = (
    "refused or safe %", "complied %", "English − others", "attack success, at most %", "n", "degenerate", "unparsed",
)  # fmt: skip


def text_of(renderable: object) -> str:
    """All that is printed, blanks made one."""
    return " ".join(word for line in printed(renderable) for word in line)


RAW = result_of("raw", records("harmful", en="RRRC", sw="CCCU") + records("benign", en="CCCC", sw="CCCC"))
ALIGNED = result_of("aligned", records("harmful", en="RRRR", sw="RRRC") + records("benign", en="CCCC", sw="RRRC"))
ONE_SIDED = result_of("one", records("harmful", en="RRRR", sw="RRRR"))


def test_table_shows_both_sides_and_the_difference() -> None:
    lines = printed(score_tables(RAW))
    assert ["language", "refused", "%", "complied", "%", "−", "benign", "refused"] in lines
    assert ["en", "75.0", "100.0", "+75.0"] in lines
    assert ["sw", "0.0", "100.0", "+0.0"] in lines
    assert ["average", "37.5", "100.0", "+37.5"] in lines
    summary = RAW.summary()
    sides = [side for kind in ("harmful", "benign") if (side := summary.side(kind)) is not None]
    shown = {name: " ".join(line) for line in lines for name in SUMMARY if line[: len(name.split())] == name.split()}
    rates = [f"{percent(side.avg.value)} ({percent(side.avg.low)} to {percent(side.avg.high)})" for side in sides]
    assert shown["refused or safe %"] == f"refused or safe % {' '.join(rates)}"
    assert shown["complied %"].startswith("complied % · 100.0 (")
    assert "+75.0" in shown["English − others"]
    assert shown["attack success, at most %"].endswith("4 of 8, and 1 unparsed) ·"), "what its upper bound is made of"
    assert [shown[name] for name in ("n", "degenerate", "unparsed")] == ["n 8 8", "degenerate 0 0", "unparsed 1 0"]
    assert any("16 responses, 0 degenerate, 1 without a verdict (6.2%)" in " ".join(line) for line in lines)


def test_tables_say_which_way_is_better_and_both_columns_go_that_way() -> None:
    refuses = result_of("x", records("harmful", en="RRRR") + records("benign", en="RRRC"))
    lines = printed(score_tables(refuses))
    assert "higher is better on both sides" in " ".join(word for line in lines for word in line)
    assert ["en", "100.0", "25.0", "+25.0"] in lines


def test_rates_that_are_nearly_all_are_not_shown_as_all() -> None:
    judged = records("harmful", en="R" * 2999 + "C") + records("benign", en="C" * 2999 + "R")
    row = ["en", ">99.9", "(1", "of", "3000", "not)", ">99.9", "(1", "of", "3000", "not)", "+99.9"]
    assert row in printed(score_tables(result_of("x", judged)))


def test_table_marks_languages_the_judge_does_not_declare() -> None:
    judged = [
        dataclasses.replace(r, via_refused="uncovered" if r.language == "sw" else "")
        for r in records("benign", en="C", sw="C")
    ]
    marked = result_of("x", judged)
    lines = [" ".join(line) for line in printed(score_tables(marked))]
    assert any(line.startswith("sw ") and "100.0‡" in line for line in lines)
    assert not any(line.startswith("en ") and "‡" in line for line in lines)
    assert "‡ the judge does not declare this language: do not rely on it" in lines
    assert not any("‡" in " ".join(line) for line in printed(score_tables(RAW)))
    compared = [" ".join(line) for line in printed(score_tables(RAW, marked))]
    (line,) = [line for line in compared if line.startswith("sw ")]
    assert "100.0 100.0‡" in line, "only the model that is read so has the mark"
    assert "‡ the judge does not declare this language: do not rely on it" in compared


def test_table_marks_a_language_whose_word_list_nobody_has_measured() -> None:
    judged = [
        dataclasses.replace(r, via_refused="unmeasured" if r.language == "sw" else "")
        for r in records("benign", en="C", sw="C")
    ]
    lines = [" ".join(line) for line in printed(score_tables(result_of("x", judged)))]
    assert any(line.startswith("sw ") and "100.0§" in line for line in lines)
    assert not any(line.startswith("en ") and "§" in line for line in lines)
    assert "§ read by word lists of your own, whose errors nobody has counted" in lines


def test_table_marks_the_measure_that_is_not_read_directly() -> None:
    judged = [
        dataclasses.replace(r, safety="safe", via_refused="uncovered" if r.language == "de" else "", via_safe="")
        for r in records("harmful", en="RR", de="RC")
    ]
    guarded = result_of("x", judged, measured_by={"refused": "refusal", "safe": "llama-guard"})
    for results in ([guarded], [guarded, guarded]):
        lines = [" ".join(line) for line in printed(score_tables(*results))]
        (line,) = [line for line in lines if line.startswith("de ")]
        assert line.startswith("de 100.0 ") and "50.0‡" in line, "safe is read directly, refused is not"
        assert "‡ the judge does not declare this language: do not rely on it" in lines


def test_languages_of_several_judges_are_named() -> None:
    def judged_by(other: str) -> ScoreResult:
        found = records("harmful", en="RR", de="RC", sw="RC") + records("benign", en="CC", de="CC", sw="CC")
        judges = {("harmful", "sw"): other}
        by = [dataclasses.replace(r, judge_refused=judges.get((r.kind, r.language), "refusal")) for r in found]
        return result_of("x", by)

    assert "several judges" not in text_of(score_tables(judged_by("refusal")))
    assert (
        "x: what is refused of own's harmful prompts was said by several judges (refusal: en, de; guard: sw):"
    ) in text_of(score_tables(judged_by("guard")))


def test_table_shouts_when_a_side_is_missing() -> None:
    lines = [" ".join(line) for line in printed(score_tables(ONE_SIDED))]
    text = " ".join(lines)
    assert "WARNING: Benign prompts were not scored: a model that refuses everything would look perfect here" in text
    assert "en 100.0 not scored" in lines
    assert "by refused" in lines and "by refused by refused" not in lines, "the summary has one side"


def test_table_names_prompts_that_were_too_long() -> None:
    cut = dataclasses.replace(RAW, finish={"stop": 11, "prompt_too_long": 3, "engine_fault": 2})
    assert "3 prompts were too long" in text_of(score_tables(cut))
    assert "engines fail on 2 prompts alone" in text_of(score_tables(cut))
    assert "engines of a judge, or of its translator, fail on 3 responses alone, or their endpoint was out" in text_of(
        score_tables(dataclasses.replace(RAW, judge_faults=3))
    )
    assert "too long" not in text_of(score_tables(RAW))


def test_table_names_thoughts_that_left_no_answer() -> None:
    cut = dataclasses.replace(RAW, finish={"stop": 12, "unfinished_thoughts": 3, "forbidden_thoughts": 1})
    text = text_of(score_tables(cut))
    assert f"the thoughts of 3 of {RAW.responses} responses did not end within max_new_tokens" in text
    assert "1 responses begin with thoughts, which were forbidden" in text
    assert "thoughts" not in text_of(score_tables(RAW))


def test_table_shows_how_many_prompts_any_of_several_answers_is_bad_for() -> None:
    answers = [(kind, letters) for kind, letters in (("harmful", "RRCR"), ("harmful", "RRRR"), ("benign", "CCRU"))]
    judged = [
        Judged("own", f"{kind}{bundle}", kind, "en", LABELS[letter], sample=sample)
        for bundle, (kind, letters) in enumerate(answers)
        for sample, letter in enumerate(letters)
    ]
    lines = [" ".join(line) for line in printed(score_tables(result_of("x", judged)))]
    (bad,) = [line for line in lines if line.startswith("any of 4 bad, at most %")]
    assert re.fullmatch(r"any of 4 bad, at most % 50\.0 \(.*\) 100\.0 \(.*\)", bad)
    assert "4 bad" not in text_of(score_tables(RAW))

    models = [Model("x", result_of("x", judged))]
    tables = [markdown(side_table(models, "own", view)) for view in views_of(models, "own")]
    sides = {" ".join(line.split()) for lines in tables for line in lines}
    assert any(line.startswith("| complied in any of 2 responses, at least % | 25.0") for line in sides)
    assert any(line.startswith("| refused in any of 4 responses, at most % | 100.0") for line in sides)


def test_scores_that_were_asked_otherwise_are_not_measured_alike() -> None:
    drawn = {**RAW.config, "asking": {"temperature": 1.0, "samples": 1, "seed": 0, "reasoning": "strip"}}
    greedy = {**RAW.config, "asking": {"temperature": 0.0, "samples": 1, "seed": 0, "reasoning": "strip"}}
    models = [dataclasses.replace(RAW, name=name, config=config) for name, config in (("a", drawn), ("b", greedy))]
    text = text_of(score_tables(*models))
    assert "the ways of asking (asking) differ" in text and "temperature: 1.0" in text
    assert "ways of asking" not in text_of(score_tables(models[0], dataclasses.replace(models[0], name="c")))


def test_table_tells_what_was_cut_off() -> None:
    cut = dataclasses.replace(RAW, finish={"stop": 12, "length": 4})
    text = text_of(score_tables(cut))
    assert "25% cut off at max_new_tokens" in text
    assert "harmful part" not in text, "only a safety judge could miss it"
    safe = dataclasses.replace(cut, measured_by={"refused": "refusal", "safe": "llama-guard"})
    assert re.search("25% of the responses were cut off at max_new_tokens: a harmful part", text_of(score_tables(safe)))
    assert "cut off" not in text_of(score_tables(RAW))


def test_table_names_a_language_without_verdicts() -> None:
    judged = records("harmful", en="R" * 60, sw="UU") + records("benign", en="C" * 60, sw="CC")
    result = result_of("x", judged, config={"max_unparsed": 0.05})
    assert result.unparsed_share < 0.05
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    show(score_tables(result), terminal)
    assert "own harmful refused sw (2 of 2): ignore these" in text_of(score_tables(result))
    (line,) = [line for line in terminal.file.getvalue().splitlines() if line.startswith(" sw ")]
    assert re.findall(r"\x1b\[1;31m *([\d.]+)", line) == ["0.0"]  # red, and the benign rate is not
    assert "ignore these" not in text_of(score_tables(RAW))


def test_summary_shows_seen_languages_and_margins_where_there_are_any() -> None:
    plain = text_of(score_tables(RAW))
    assert "− others" in plain and "seen" not in plain and "nats" not in plain
    judged = [dataclasses.replace(r, margin=1.5) for r in records("harmful", en="RR", sw="RC")]
    result = dataclasses.replace(RAW, summaries=tuple(summarise(judged, ["en"])))
    lines = printed(score_tables(result))
    text = text_of(score_tables(result))
    assert "seen" in text and "unseen" in text and "nats" in text
    shown = [" ".join(line) for line in lines]
    assert "margin, nats +1.50" in shown and any(line.startswith("seen % 100.0 (") for line in shown)


def test_no_number_is_cut_off_with_many_languages() -> None:
    codes = [f"l{index:02}" for index in range(20)]
    wide = result_of("wide", records("harmful", **dict.fromkeys(codes, "RC")))
    lines = printed(score_tables(wide, wide, wide))
    for code in codes:
        assert [code, "50.0", "50.0", "50.0", "+0.0", "not", "scored"] in lines
    assert "…" not in str(lines)


def test_comparison_shows_the_change_on_both_sides() -> None:
    lines = printed(score_tables(RAW, ALIGNED))
    assert ["en", "75.0", "100.0", "+25.0", "100.0", "100.0", "+0.0", "+75.0", "+100.0"] in lines
    assert ["sw", "0.0", "75.0", "+75.0", "100.0", "25.0", "−75.0", "+0.0", "+0.0"] in lines
    assert ["average", "37.5", "87.5", "+50.0", "100.0", "62.5", "−37.5", "+37.5", "+50.0"] in lines
    assert ["raw", "aligned", "raw", "aligned"] in lines
    shown = {line[0]: line for line in lines if line[:1] in (["refused"], ["var"], ["PAG"])}
    assert "87.5" in shown["refused"] and "1.56" in shown["var"] and "0.750" in shown["PAG"]
    assert "Not measured the same way" not in text_of(score_tables(RAW, ALIGNED))


def test_the_mean_change_is_over_languages_that_both_have() -> None:
    other = result_of("other", records("harmful", en="RRRR", ar="CCCC"))
    before = result_of("before", records("harmful", en="RRCC", sw="RRRR"))
    (line,) = [line for line in printed(score_tables(before, other)) if line[0:1] == ["average"]]
    assert line[3] == "+50.0"


def test_comparison_says_what_was_not_measured_alike() -> None:
    config = {"max_new_tokens": 32, "engine": {"dtype": "float32"}}
    other = dataclasses.replace(ALIGNED, prompts="others", config=config)
    text = text_of(score_tables(RAW, other))
    assert "(engine.dtype) differ (" in text
    assert "Not measured the same way, the prompts differ (prompts: raw; others: aligned)" in text
    assert "(max_new_tokens) differ (64: raw; 32: aligned)" in text


def test_comparison_with_a_missing_side_says_so() -> None:
    lines = printed(score_tables(RAW, ONE_SIDED))
    (line,) = [line for line in lines if line[:1] == ["average"]]
    assert line[4:8] == ["100.0", "not", "scored", "·"]
    assert "Benign prompts were not scored" in text_of(score_tables(RAW, ONE_SIDED))
    assert "(one)" in text_of(score_tables(RAW, ONE_SIDED))


def test_control_characters_do_not_reach_the_terminal() -> None:
    judged = records("harmful", "own\x1b[2J", en="R") + records("benign", "own\x1b[2J", en="C")
    assert "\x1b" not in text_of(score_tables(result_of("x\x1b]0;", judged)))


def test_utility_is_a_table_like_the_others() -> None:
    measured = {"m": [utility_row("wiki", None, metric="perplexity", stderr=1.0, limit=20), utility_row("mmlu")]}
    shown = utility_table(measured)
    assert shown is not None
    lines = [" ".join(line) for line in printed(console(shown))]
    assert "wiki (perplexity) no value (± 1.0000; n = 100; first 20 of each task, 5-shot)" in lines
    assert "mmlu (acc) 0.2500 (± 0.0100; n = 100; 5-shot)" in lines
    assert utility_table({"m": []}) is None
