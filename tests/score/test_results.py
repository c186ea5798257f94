from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray.config import ScoreConfig, parse_config
from mlc_ray.score.request import Request, ScoreError, load_request
from mlc_ray.score.results import (
    ScoreResult,
    ScoresFileError,
    count,
    hides_harm,
    load_records,
    load_scores,
    records_of,
    save_scores,
    unread_rows,
)
from mlc_ray.stats.rates import Judged
from mlc_ray.storage import library_versions
from mlc_ray.types import Behaviour, Kind

LETTERS: dict[str, Behaviour] = {"R": "refused", "C": "complied", "D": "degenerate", "U": "unparsed"}


FACTS: dict[str, Any] = {
    "seen_languages": ["en"], "model": "models/x", "resolved": "/models/x", "fingerprint": "0123456789abcdef",
    "prompts": "prompts", "judge": "refusal", "measured_by": {"refused": "refusal"},
    "config": {"judge": {"name": "refusal", "allow_uncovered": False}, "languages": None},
}  # fmt: skip


def judged(kind: Kind, benchmark: str = "own", **letters: str) -> list[Judged]:
    return [
        Judged(benchmark, f"{kind}{index}", kind, language, LETTERS[letter])
        for language, line in letters.items()
        for index, letter in enumerate(line)
    ]


def result_of(records: Sequence[Judged], folder: Path) -> ScoreResult:
    return count(records, folder=folder, finish={"stop": len(records)}, **FACTS)


BOTH = judged("harmful", en="RCR", sw="RDU") + judged("benign", "other", en="CCC", sw="UCR")
ONE = [
    Judged("own", "a", "harmful", "en", "refused", "safe", "translated", "", 1.5),
    Judged("own", "b", "harmful", "en", "unparsed", "unsafe", "translated", "", None),
]


@pytest.mark.parametrize("records", [BOTH, ONE])
def test_scores_file_comes_back_as_it_was(records: list[Judged], tmp_path: Path) -> None:
    result = result_of(records, tmp_path)
    save_scores(result)
    assert load_scores(tmp_path) == result
    assert load_scores(tmp_path / "scores.json") == result


def test_scores_file_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScoresFileError, match="does not exist"):
        load_scores(tmp_path)
    file = Path(save_scores(result_of(BOTH, tmp_path)))
    content = json.loads(file.read_text(encoding="utf-8"))
    for text, fault in (
        ("{", "not valid JSON"),
        ("[]", "format None"),
        (json.dumps({**content, "format": 1}), "format 1, expected 5; score again with"),
        (json.dumps({key: value for key, value in content.items() if key != "rows"}), "rows is missing"),
        (json.dumps({**content, "more": 1}), "more is unknown"),
        (json.dumps({**content, "responses": "18"}), "responses is '18', expected a valid integer"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ScoresFileError, match=fault):
            load_scores(file)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (["sides", 0, "avg"], None, r"summaries\[0\]\.sides\[0\]\.avg is None"),
        (["sides", 0, "avg", "low"], "1", r"sides\[0\]\.avg\.low is '1', expected a valid number"),
        (["sides", 0, "avg", "low"], True, r"avg\.low is True"),
        (["sides", 0, "avg", "low"], float("nan"), r"avg\.low is nan"),
        (["sides", 0, "kind"], "odd", r"kind is 'odd', expected 'harmful' or 'benign'"),
        (["sides", 0, "n"], 1.5, r"n is 1\.5, expected a valid integer"),
        (["sides", 0, "extra"], 1, r"summaries\[0\]\.sides\[0\]\.extra is unknown"),
        (["sides"], {}, r"sides is \{\}"),
        (["difference"], {"en": None}, r"difference\.en is None"),
        (["not_scored"], ["all"], r"not_scored\[0\] is 'all'"),
    ],
)
def test_a_damaged_summary_says_where(path: list[Any], value: Any, fault: str, tmp_path: Path) -> None:
    file = Path(save_scores(result_of(BOTH, tmp_path)))
    content = json.loads(file.read_text(encoding="utf-8"))
    place = content["summaries"][0]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ScoresFileError, match=rf"scores\.json' is damaged: .*{fault}.*; score again"):
        load_scores(file)


def test_a_damaged_row_says_where(tmp_path: Path) -> None:
    file = Path(save_scores(result_of(ONE, tmp_path)))
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["rows"][1]["margin"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ScoresFileError, match=r"is damaged: rows\[1\]\.margin is missing"):
        load_scores(file)
    del content["rows"][1]["hits"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ScoresFileError, match=r"damaged: rows\[1\]\.hits is missing"):
        load_scores(file)
    file.write_text(json.dumps({**content, "rows": None}), encoding="utf-8")
    with pytest.raises(ScoresFileError, match="rows is None, expected a valid array"):
        load_scores(file)


def test_a_score_of_another_version_is_said_to_be_one(tmp_path: Path) -> None:
    now = library_versions()["mlc_ray"]
    file = Path(save_scores(dataclasses.replace(result_of(ONE, tmp_path), versions={"mlc_ray": "0.0.1"})))
    assert load_scores(file).versions == {"mlc_ray": "0.0.1"}  # another version alone is no fault
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["told_by"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        ScoresFileError, match=rf"by mlc_ray 0\.0\.1, and this is {now}: told_by is missing; score again"
    ):
        load_scores(file)


def test_a_request_that_lacks_a_field_says_which(tmp_path: Path) -> None:
    config = parse_config(ScoreConfig, {"model": "m", "benchmarks": [{"path": "sample:test"}]})
    request = Request(config, "/m", "f", "p", ["en"], {"mlc_ray": "0.0.1"})
    request.save(tmp_path)
    assert load_request(tmp_path) == request
    content = json.loads((tmp_path / "request.json").read_text(encoding="utf-8"))
    for name, changed, fault in (
        ("versions", {}, r"request\.json' is damaged: versions is missing; score again"),
        ("prompts", {}, r"was written by mlc_ray 0\.0\.1, and this is .*: prompts is missing; score again"),
        ("", {"more": 1}, r"was written by mlc_ray 0\.0\.1, .*: more is unknown; score again"),
    ):
        lacking = {key: value for key, value in {**content, **changed}.items() if key != name}
        (tmp_path / "request.json").write_text(json.dumps(lacking), encoding="utf-8")
        with pytest.raises(ScoreError, match=fault):
            load_request(tmp_path)
    (tmp_path / "request.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ScoreError, match="is damaged: it holds list, expected an object"):
        load_request(tmp_path)


def test_records_are_read_from_the_responses(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{**dataclasses.asdict(record), "response": "..."} for record in (*ONE, *BOTH)])
    assert records_of(table) == [*ONE, *BOTH]
    result = result_of(ONE, tmp_path)
    with pytest.raises(ScoresFileError, match=r"responses\.parquet' does not exist"):
        load_records(result)
    result.responses_file.write_text("no")
    with pytest.raises(ScoresFileError, match="not a Parquet file"):
        load_records(result)
    pq.write_table(table.drop_columns(["via_safe"]), result.responses_file)
    with pytest.raises(ScoresFileError, match="lacks the column 'via_safe'"):
        load_records(result)
    pq.write_table(table, result.responses_file)
    assert load_records(result) == [*ONE, *BOTH]


def test_a_language_without_verdicts_is_not_hidden_by_the_others(tmp_path: Path) -> None:
    records = judged("harmful", en="R" * 30, sw="UR") + judged("benign", "other", en="C" * 30, sw="CCCU")
    result = result_of(records, tmp_path)
    assert result.unparsed_share < 0.05
    found = [(row.benchmark, row.kind, row.language, row.measure) for row in unread_rows(result, 0.05)]
    assert found == [("own", "harmful", "sw", "refused"), ("other", "benign", "sw", "refused")]
    assert [row.benchmark for row in unread_rows(result, 0.25)] == ["own"]  # a quarter does not exceed a quarter
    assert unread_rows(result, 0.5) == []


@pytest.mark.parametrize(
    ("measured", "finish", "expected"),
    [
        ({"safe": "x"}, {"stop": 8, "length": 2}, True),
        ({"safe": "x"}, {"stop": 9, "length": 1}, False),
        ({"refused": "x"}, {"length": 10}, False),
        ({"safe": "x"}, {"not_generated": 10}, False),
        ({"safe": "x"}, {"stop": 8, "length": 1, "prompt_too_long": 20}, True),
    ],
)
def test_a_cut_off_response_may_hide_harm(
    measured: dict[str, str], finish: dict[str, int], expected: bool, tmp_path: Path
) -> None:
    assert hides_harm(dataclasses.replace(result_of(BOTH, tmp_path), measured_by=measured, finish=finish)) is expected


def test_summary_is_found_by_name(tmp_path: Path) -> None:
    several = result_of(BOTH, tmp_path)
    assert several.summary("other").not_scored == ("harmful",)
    assert several.summary().benchmark == "all"
    with pytest.raises(KeyError, match="nothing"):
        several.summary("nothing")
