from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mlc_ray.report.collect import ReportError, collect, metric_series, read_responses
from mlc_ray.score.results import ScoresFileError
from tests.report.runs import grid, response, steps, utility_row, write_run, write_score, write_utility

ROWS = grid(["en", "sw"], lambda kind, code: float(kind == "harmful"), bundles=2)


def test_a_run_brings_its_scores_oldest_first_and_its_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps())
    write_score(run / "scores" / "aligned", ROWS, created="2026-02-02T00:00:00+0000")
    write_score(run / "scores" / "base", ROWS, created="2026-01-01T00:00:00+0000")
    (run / "scores" / "half").mkdir()
    found = collect([run])
    assert [model.label for model in found.models] == ["base", "aligned"]
    (training,) = found.trainings
    assert training.facts["fingerprints"] == {"model": "d58bcb1cd8572f65"}
    assert training.metrics["loss/total"][1] == (2, 0.5)
    assert training.metrics["collapse/effective_rank"][2] == (3, None)
    assert any("half" in note and "not finished" in note for note in found.notes)


def test_a_folder_of_runs_and_scores_is_read_whole_and_names_the_rest(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps(2))
    write_score(tmp_path / "a" / "scores" / "after", ROWS)
    write_run(tmp_path / "b")
    write_score(tmp_path / "b" / "scores" / "after", ROWS)
    write_score(tmp_path / "alone", ROWS)
    (tmp_path / "cache").mkdir()
    (tmp_path / ".hidden").mkdir()
    found = collect([tmp_path])
    assert [model.label for model in found.models] == ["a / after", "b / after", "alone"]
    assert [training.label for training in found.trainings] == ["a", "b"]
    assert [note for note in found.notes if "cache" in note]
    assert not [note for note in found.notes if "hidden" in note]


def test_scores_come_in_the_order_given(tmp_path: Path) -> None:
    first = write_score(tmp_path / "z", ROWS, created="2026-03-03")
    second = write_score(tmp_path / "a", ROWS, created="2026-01-01")
    assert [model.label for model in collect([first, second]).models] == ["z", "a"]


def test_responses_are_read_with_their_verdicts(tmp_path: Path) -> None:
    row = response(
        0, "harmful", "ur", behaviour=None, safety="unsafe", categories=["theft"], margin=-1.5, via_refused=None,
        via_safe="translated", response=None, reason=None,
    )  # fmt: skip
    (found,) = read_responses(write_score(tmp_path / "s", [row]) / "responses.parquet")
    assert (found.safety, found.behaviour, found.via_safe, found.via_refused) == ("unsafe", None, "translated", None)
    assert (found.categories, found.margin, found.response, found.reason) == (("theft",), -1.5, "", "")
    assert found.judged.safety == "unsafe"


def test_without_responses_the_report_says_so(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", ROWS)
    (folder / "responses.parquet").unlink()
    found = collect([folder])
    assert found.models[0].responses == ()
    assert any("responses.parquet" in note and "missing" in note for note in found.notes)


def test_utility_is_read(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", ROWS)
    rows = (
        utility_row("mmlu", stderr=None),
        utility_row("gsm8k", metric="exact_match", filter="strict-match"),
        utility_row("gsm8k", None, metric="exact_match", filter="flexible-extract", n=None),
    )
    write_utility(folder, *rows)
    assert collect([folder]).models[0].utility == rows


def test_utility_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", ROWS)
    write_utility(folder, utility_row("mmlu"), fingerprint="ffff")
    with pytest.raises(ReportError, match=r"utility\.json' is of the model .*'ffff', but scores\.json.*--scores"):
        collect([folder])


def test_utility_without_a_score_is_told_where_it_belongs(tmp_path: Path) -> None:
    alone = tmp_path / "utility" / "base-20260101"
    alone.mkdir(parents=True)
    write_utility(alone, utility_row("mmlu"))
    for path in (alone, alone.parent):
        with pytest.raises(ReportError, match=r"base-20260101' has utility\.json but no scores\.json.*--scores"):
            collect([path])
    write_score(alone.parent / "s", ROWS)
    found = collect([alone.parent])
    assert [model.label for model in found.models] == ["s"]
    (note,) = found.notes
    assert "base-20260101" in note and "--scores SCORE_FOLDER" in note


def test_what_is_no_run_is_refused_with_its_path(tmp_path: Path) -> None:
    empty = tmp_path / "nothing here"
    with pytest.raises(ReportError, match=r"nothing here' does not exist"):
        collect([empty])
    empty.mkdir()
    (empty / "weights").mkdir()
    with pytest.raises(ReportError, match=r"nothing here' is neither a run .* nor a score"):
        collect([empty])
    file = write_score(tmp_path / "s", ROWS) / "scores.json"
    with pytest.raises(ReportError, match=r"scores\.json' is a file; give the folder"):
        collect([file])
    with pytest.raises(ReportError, match="no run was given"):
        collect([])


def test_a_run_with_nothing_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"run'.*neither a score nor training metrics there yet.*mlc-ray score"):
        collect([write_run(tmp_path / "run")])


def test_a_folder_given_twice_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps())
    score = write_score(run / "scores" / "after", ROWS)
    with pytest.raises(ReportError, match=r"score folder '.*after' is in the report twice"):
        collect([run, score])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", ROWS)
    parquet, scores = folder / "responses.parquet", folder / "scores.json"
    whole, saved = parquet.read_bytes(), scores.read_text()

    parquet.write_bytes(whole[:100])
    with pytest.raises(ReportError, match=r"responses\.parquet' is damaged"):
        collect([folder])
    parquet.write_bytes(whole)

    pq.write_table(pq.read_table(parquet).drop_columns(["safety", "via_safe"]), parquet)
    with pytest.raises(ReportError, match=r"responses\.parquet' lacks the columns safety, via_safe"):
        collect([folder])
    parquet.write_bytes(whole)

    pq.write_table(pq.read_table(parquet).slice(1), parquet)
    with pytest.raises(ReportError, match=r"has 7 responses, but scores\.json beside it counts 8"):
        collect([folder])
    parquet.write_bytes(whole)

    utility = write_utility(folder, utility_row("mmlu"))
    written = utility.read_text()
    for text, fault in (
        (written[:40], r"is damaged: not valid JSON"),
        ('[{"task": "mmlu"}]', r"has format None, expected 1"),
        (written.replace('"value": 0.25', '"value": "high"'), r"is damaged: .*rows\[0\]\.value is 'high'"),
        (written.replace('"filter"', '"filtre"'), r"is damaged: rows\[0\]\.filter is missing"),
    ):
        utility.write_text(text)
        with pytest.raises(ReportError, match=rf"utility\.json' {fault}"):
            collect([folder])
    utility.unlink()

    scores.write_text(saved.replace('"format": 5', '"format": 1'))
    with pytest.raises(ScoresFileError, match=r"scores\.json' has format 1, expected 5"):
        collect([folder])


def test_verdicts_that_are_none_and_prompts_there_twice_are_refused(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", ROWS)
    file = folder / "responses.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    pq.write_table(table.from_pylist([{**rows[0], "behaviour": "dodged"}, *rows[1:]], schema=table.schema), file)
    with pytest.raises(ReportError, match=r"behaviour='dodged' is not one of refused, complied"):
        read_responses(file)
    pq.write_table(table.from_pylist([rows[0], *rows[:-1]], schema=table.schema), file)
    with pytest.raises(ReportError, match=r"harmful-0.*is there twice"):
        read_responses(file)


def test_metrics_keep_gaps() -> None:
    rows = [{"step": 1, "a": 1, "b": float("nan")}, {"step": 2, "a": None, "note": "x"}]
    assert metric_series(rows) == {"a": ((1, 1.0), (2, None)), "b": ((1, None),)}


def test_a_moved_score_is_still_read(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", ROWS)
    shutil.move(folder, tmp_path / "moved")
    assert collect([tmp_path / "moved"]).models[0].result.folder == tmp_path / "moved"
