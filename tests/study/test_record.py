"""What a study writes of its cells' folders: results, tables in Markdown, LaTeX and HTML, and what `show` says."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.report.collect import ReportError
from mlc_ray.report.latex import escape, latex
from mlc_ray.report.study import StudyFileError, load_study, study_notes, study_tables
from mlc_ray.report.tables import cell, row, table
from mlc_ray.report.write import write_report
from mlc_ray.score.results import load_scores
from mlc_ray.show import show
from mlc_ray.stats.significance import holm
from mlc_ray.storage import Place
from mlc_ray.study.folder import StudyError
from mlc_ray.study.record import is_read
from mlc_ray.study.run import unmeasured
from tests.report.runs import utility_row, write_utility
from tests.study.folders import planned, raw_study, recorder, write_cell, write_diverged, write_untouched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both methods with both seeds, and the model before training."""
    study = tmp_path / "st_udy"
    write_untouched(study, utility=True)
    for method in ("dpo", "mlc"):
        for seed in (1, 2):
            write_cell(study, method, seed)
    planned(study).save(Place(study))
    return study


def test_results_are_the_means_of_the_cells_scores_and_are_read_back(folder: Path) -> None:
    result = recorder(planned(folder), folder).write()
    assert load_study(folder) == result
    for method in ("dpo", "mlc"):
        rates = result.row("tiny_1", method).rates
        assert rates is not None and rates.seeds == 2
        summaries = [load_scores(folder / f"cells/tiny_1-{method}-{seed}/scores/study").summary() for seed in (1, 2)]
        harmful = [side.avg.value for s in summaries if (side := s.side("harmful")) is not None]
        benign = [side.misses_avg.value for s in summaries if (side := s.side("benign")) is not None]
        differences = [s.avg_difference.value for s in summaries if s.avg_difference is not None]
        assert rates.harmful.avg.value == pytest.approx(sum(harmful) / 2)
        assert rates.benign.avg.value == pytest.approx(sum(benign) / 2)
        assert rates.difference.value == pytest.approx(sum(differences) / 2)
    assert len(result.tests) == 9  # three pairs, three numbers each
    assert [test.p_holm for test in result.tests] == holm([test.p for test in result.tests])
    (untouched,) = [each for each in result.cells if each.seed is None]
    assert untouched.utility == {"mmlu acc": 0.5}
    trained = [each for each in result.cells if each.seed is not None]
    assert {(each.state, each.steps, each.workers, each.seconds, each.score_seconds) for each in trained} == {
        ("scored", 3, 2, 12.0, 10.0)
    }
    assert trained[0].answer_tokens == {"en": 50, "fr": 7} and trained[0].prompt_tokens == {"en": 100, "fr": 120}


def test_tables_have_both_sides_and_mark_what_was_never_trained(folder: Path) -> None:
    shown = {each.title: each for each in study_tables(recorder(planned(folder), folder).write())}
    assert list(shown) == [
        "tiny_1: both sides", "tiny_1: harmful prompts", "tiny_1: benign prompts", "Supervision and time",
        "Supervision by language", "Utility", "tiny_1: which methods are told apart",
    ]  # fmt: skip
    heads = [head.text for head in shown["tiny_1: harmful prompts"].columns]
    assert heads == ["method", "en", "fr", "sw †", "avg", "var", "PAG"]
    assert shown["tiny_1: harmful prompts"].note.endswith("† never trained: in the bundles of no run of the study")
    assert "trained: in the bundles of any run of the study, whether" in shown["tiny_1: both sides"].note
    assert [each.name.text for each in shown["tiny_1: benign prompts"].rows] == ["untouched", "dpo", "mlc"]
    costs = shown["Supervision and time"].rows[0]
    assert [each.text for each in costs.cells] == ["dpo", "57", "7", "220", "3", "12", "10"]
    by_language = shown["Supervision by language"]
    assert [head.text for head in by_language.columns] == ["model", "method", "en", "fr"]
    assert [(each.text, each.more) for each in by_language.rows[0].cells[1:]] == [("50", ("100",)), ("7", ("120",))]
    tests = shown["tiny_1: which methods are told apart"]
    assert [each.name.text for each in tests.rows] == ["dpo − untouched", "mlc − untouched", "mlc − dpo"]
    said = {(each.name.text, index): each.cells[index].more for each in tests.rows for index in range(3)}
    for (_, _), more in said.items():
        p = float(re.search(r"p [<=] ([\d.]+)", more[1])[1])  # type: ignore[index]
        assert ("not told apart" in more) == (p > 0.05)
    assert any("not told apart" in more for more in said.values())


def test_responses_in_their_prompts_language_have_a_table_where_all_scores_told_it(tmp_path: Path) -> None:
    study = tmp_path / "st_udy"
    write_untouched(study, told=True)
    for seed, swahili in ((1, "sw"), (2, "en")):
        write_cell(study, "dpo", seed, swahili=swahili)
    planned(study).save(Place(study))
    result = recorder(planned(study), study).write()
    assert load_study(study) == result and result.told_by == ("lingua 2.1.1 among en es",)
    harmful, benign = result.row("tiny_1", "dpo").in_language
    assert (harmful.kind, benign.kind) == ("harmful", "benign")
    assert harmful.avg.value == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert harmful.trained is not None and harmful.trained.value == 100
    assert harmful.never is not None and harmful.never.value == 50 and harmful.never.low == 0
    assert result.row("tiny_1", "mlc").in_language == ()
    shown = {each.title: each for each in study_tables(result)}["tiny_1: responses in the prompt's language"]
    assert [head.text for head in shown.columns][1:4] == ["harmful %", "harmful % trained", "harmful % never trained"]
    assert "trained: in the bundles of any run of the study, whether" in shown.note
    assert [[cell.text for cell in row.cells[:3]] for row in shown.rows] == [["100.0"] * 3, ["83.3", "100.0", "50.0"]]
    write_cell(study, "mlc", 1)
    result = recorder(planned(study), study).write()
    assert all(each.in_language == () for each in result.rows) and set(result.told_by) == {"", result.told_by[0]}
    assert not any("prompt's language" in each.title for each in study_tables(result))
    assert any("not told in the same way in all scores" in note for note in study_notes(result))


def test_a_cell_that_failed_or_diverged_is_a_row_that_says_so(tmp_path: Path) -> None:
    study = tmp_path / "s"
    write_untouched(study)
    write_cell(study, "dpo", 1)
    write_cell(study, "dpo", 2, scored=False)
    write_diverged(study, "mlc", 1)
    plan = planned(study)
    found = recorder(plan, study)
    found.failures["tiny_1-mlc-2"] = "OutOfMemoryError: no memory | left"
    result = found.write()
    states = {each.name: each.state for each in result.cells}
    assert states == {
        "tiny_1-untouched": "scored", "tiny_1-dpo-1": "scored", "tiny_1-mlc-1": "diverged", "tiny_1-dpo-2": "trained",
        "tiny_1-mlc-2": "failed",
    }  # fmt: skip
    assert result.row("tiny_1", "mlc").rates is None
    rates = result.row("tiny_1", "dpo").rates
    assert rates is not None and rates.seeds == 1
    text = (study / "study.md").read_text()
    assert "| tiny_1-mlc-2 | failed | OutOfMemoryError: no memory \\| left |" in text
    assert "With one seed, intervals and tests say nothing of what another seed would give." in text
    assert "Fewer than the study's 2 seeds are scored of dpo on tiny_1 (1)" in text


def test_costs_are_those_of_all_cells_that_took_steps(tmp_path: Path) -> None:
    study = tmp_path / "s"
    write_untouched(study)
    write_diverged(study, "dpo", 1)
    run = study / "cells/tiny_1-dpo-1"
    (run / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 3.0}\n')
    shown = {each.title: each for each in study_tables(recorder(planned(study), study).write())}
    for title in ("Supervision and time", "Supervision by language"):
        assert [each.cells[0].text for each in shown[title].rows] == ["dpo"]  # no step of mlc was ever taken
    assert shown["Supervision and time"].rows[0].cells[-2].text == "6"  # of two workers


def test_more_tests_than_random_flips_can_tell_apart_are_said(folder: Path) -> None:
    result = recorder(planned(folder), folder).write()
    assert not any("random flips" in note for note in study_notes(result))
    many = replace(result, tests=result.tests[:1] * 10_001)
    assert any("With 10,001 tests no p-value by 200,000 random flips" in note for note in study_notes(many))


def test_a_score_on_other_prompts_is_refused_and_one_without_verdicts_is_left_out(folder: Path) -> None:
    with pytest.raises(StudyError, match="is a score on other prompts"):
        recorder(replace(planned(folder), prompts="0000"), folder)
    write_cell(folder, "mlc", 3, unparsed=0.5)
    result = recorder(planned(folder, seeds=[1, 2, 3]), folder).write()
    (unread,) = [each for each in result.cells if each.name == "tiny_1-mlc-3"]
    assert unread.state == "failed" and "got no verdict" in unread.message
    rates = result.row("tiny_1", "mlc").rates
    assert rates is not None and rates.seeds == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"judge": "another"}, "another judge (another)"), ({"versions": {"vllm": "0.1"}}, "another engine (vllm 0.1)")],
)
def test_a_score_by_another_judge_or_engine_is_refused(folder: Path, changed: dict[str, Any], said: str) -> None:
    file = folder / "cells/tiny_1-mlc-2/scores/study/scores.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(StudyError, match=rf"tiny_1-mlc-2/scores/study' is a score by {re.escape(said)}.*made again"):
        recorder(planned(folder), folder)


def test_a_score_with_too_few_verdicts_counts_once_it_is_made_again_or_allowed(folder: Path) -> None:
    score = write_cell(folder, "mlc", 3, unparsed=0.5) / "scores/study"
    plan = planned(folder, seeds=[1, 2, 3])
    found = recorder(plan, folder)
    assert "tiny_1-mlc-3" in found.failures
    assert not is_read(Place(score), 0.05) and is_read(Place(score), 0.5)
    shutil.rmtree(score.parent.parent)
    write_cell(folder, "mlc", 3)
    found.count()
    (cell,) = [each for each in found.write().cells if each.name == "tiny_1-mlc-3"]
    assert (cell.state, cell.message) == ("scored", "")


def test_seconds_are_those_of_the_workers_that_a_cell_had(folder: Path) -> None:
    run = folder / "cells/tiny_1-mlc-1"
    (cell,) = [each for each in planned(folder).cells if each.name == run.name]
    (run / "config.yaml").write_text(yaml.safe_dump(cell.config.model_dump(mode="json", exclude_unset=True)))
    now = planned(folder, train={**raw_study(folder)["train"], "cluster": {"workers": 8}})
    (found,) = [each for each in recorder(now, folder).write().cells if each.name == run.name]
    assert (found.workers, found.seconds) == (2, 12.0)


def test_values_of_a_metric_under_several_filters_are_kept_apart(folder: Path) -> None:
    strict = utility_row("gsm8k", 0.2, filter="strict-match")
    write_utility(folder / "untouched/tiny_1", utility_row("gsm8k", 0.4), strict)
    result = recorder(planned(folder), folder).write()
    assert result.cells[0].utility == {"gsm8k acc": 0.4, "gsm8k acc (strict-match)": 0.2}


def test_utility_of_cells_is_a_mean_over_seeds_and_a_task_that_is_missing_is_known(folder: Path) -> None:
    for seed, value in ((1, 0.4), (2, 0.6)):
        write_utility(folder / f"cells/tiny_1-dpo-{seed}/scores/study", utility_row("mmlu", value))
    result = recorder(planned(folder, utility={"tasks": ["mmlu"]}), folder).write()
    dpo = [each.utility for each in result.cells if each.method == "dpo"]
    assert dpo == [{"mmlu acc": 0.4}, {"mmlu acc": 0.6}] and load_study(folder) == result
    (shown,) = [each for each in study_tables(result) if each.title == "Utility"]
    values = {row.cells[0].text: (row.cells[1].text, row.cells[1].more) for row in shown.rows}
    assert values == {
        "untouched": ("0.5000", ()),
        "dpo": ("0.5000", ("0.4000 to 0.6000",)),
    }  # the other method has none
    assert shown.note.endswith("in each metric's own unit, with the lowest and the highest of a seed")
    once = replace(result, cells=tuple(each for each in result.cells if each.seed != 2))
    (shown,) = [each for each in study_tables(once) if each.title == "Utility"]
    assert shown.note.endswith("own unit") and all(row.cells[1].more == () for row in shown.rows)
    score = Place(folder / "cells/tiny_1-dpo-1/scores/study")
    assert unmeasured(["mmlu", "arc_easy"], score) == ["arc_easy"]
    assert unmeasured(["mmlu"], Place(folder / "cells/tiny_1-mlc-1/scores/study")) == ["mmlu"]


def test_the_report_of_a_study_is_one_page_and_tables_for_a_paper(folder: Path, tmp_path: Path) -> None:
    recorder(planned(folder), folder).write()
    written = write_report([folder], tmp_path / "out.html", paper=tmp_path / "paper")
    assert [path.name for path in written] == ["out.html", "study.md", "study.tex"]
    page = (tmp_path / "out.html").read_text()
    assert "tiny_1: both sides" in page and "not told apart" in page and "<script" not in page
    assert (tmp_path / "paper/study.tex").read_text() == (folder / "study.tex").read_text()
    with pytest.raises(ReportError, match="give it alone"):
        write_report([folder, folder / "untouched/tiny_1"], tmp_path / "out.html")
    with pytest.raises(ReportError, match="--samples 3"):
        write_report([folder], tmp_path / "out.html", samples=3)


def test_names_with_markup_stay_text(tmp_path: Path) -> None:
    study = tmp_path / "s"
    write_untouched(study)
    plan = planned(study, models={"tiny_1": {"path": "<b>m</b>_%&"}})
    found = recorder(plan, study)
    found.failures["tiny_1-dpo-1"] = "<script>alert(1)</script> \\input{x} 100%_#"
    result = found.write()
    plan.save(Place(study))
    write_report([study], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;m" in page
    text = (study / "study.tex").read_text()
    assert r"\textless{}script\textgreater{}alert(1)" in text
    assert r"\textbackslash{}input\{x\} 100\%\_\#" in text
    assert r"tiny\_1: both sides" in text and result.cells


def test_latex_is_escaped_and_has_the_rules_of_booktabs() -> None:
    every = '\\ { } $ & # _ % ~ ^ < > | " − → † ·'
    escaped = escape(every)
    plain = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textquotedbl|"
                   r"textdagger)\{\}|\$-\$|\$\\rightarrow\$|\\[{}$&#_%]", "", escaped)  # fmt: skip
    assert not re.search(r"[\\{}$&#_%~^<>|\"−→†·]", plain)
    shown = table("A & B", ["m_1", "en †"], [row("x%", [cell("1.0", "0 to 2", tone="strong")])], "50 %")
    assert latex(shown) == [
        r"\begin{table}",
        r"\caption{A \& B (50 \%).}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"m\_1 & en \textdagger{} \\",
        r"\midrule",
        r"x\% & \textbf{1.0} {\footnotesize(0 to 2)} \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]


def test_show_says_how_far_a_study_is_and_what_is_next(folder: Path, tmp_path: Path) -> None:
    assert "4 of 4 cells are scored, 4 are trained" in (said := show(folder))
    assert f"mlc-ray study --resume {folder}" in said  # no results yet
    recorder(planned(folder), folder).write()
    said = show(folder)
    assert re.search(r"tiny_1 mlc +harmful refused [\d.]+ %, benign complied [\d.]+ %, 2 seeds", said)
    assert "--resume" not in said and f"mlc-ray report {folder} --out study.html" in said
    other = tmp_path / "other"
    write_diverged(other, "mlc", 1)
    write_cell(other, "dpo", 1)
    write_cell(other, "dpo", 2, scored=False)
    planned(other).save(Place(other))
    said = show(other)
    assert "1 of 4 cells are scored, 2 are trained" in said and "tiny_1-mlc-1" in said
    assert "st_udy" in show(tmp_path) and "study: " in show(tmp_path)
    with pytest.raises(StudyFileError, match=r"results\.json"):
        load_study(other)
