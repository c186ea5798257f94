"""Judgement by language in the report: a probe's AUC beside refusal rates, and languages that a model does not know."""

import json

import pytest

from mlc_ray.report.collect import ReportError, collect
from mlc_ray.report.remarks import warnings
from mlc_ray.report.write import write_report
from mlc_ray.runs import PROBE_FILE
from tests.report.runs import grid, write_score

RATES = {("harmful", "en"): 1.0, ("benign", "en"): 0.0, ("harmful", "sw"): 1.0, ("benign", "sw"): 1.0}


def decision(language, auc, harmful, benign):
    low, high = auc - 0.1, auc + 0.1
    return {"language": language, "auc": {"value": auc, "low": low, "high": high}, "harmful": harmful, "benign": benign}


FOUND = (decision("en", 0.9, 80, 10), decision("sw", 0.5, 100, 90))


def probe_folder(folder, fingerprint="0123456789abcdef", decisions=FOUND):
    folder.mkdir()
    (folder / PROBE_FILE).write_text(
        json.dumps({"model_fingerprint": fingerprint, "probe": {"decisions": list(decisions)}})
    )
    return folder


@pytest.fixture
def scored(tmp_path):
    return write_score(tmp_path / "mine", grid(["en", "sw"], lambda kind, code: RATES[kind, code]))


def test_a_language_that_the_model_does_not_know_is_named_and_not_counted_as_safe(tmp_path, scored):
    collection = collect([scored, probe_folder(tmp_path / "probe")])
    (model,) = collection.models
    assert [each.language for each in model.decisions if each.is_unknown] == ["sw"] and collection.notes == ()
    (line,) = [line for line in warnings(collection.models) if "does not know" in line]
    assert line.startswith("mine does not know sw: ") and "no safety" in line
    page, *paper = write_report([scored, tmp_path / "probe"], tmp_path / "report.html", paper=tmp_path / "paper")
    html, text = page.read_text(), paper[0].read_text()
    assert "Judgement by language" in html and "not known: refuses without telling what" in html
    rows = [line for line in text.splitlines() if line.startswith(("| en | 0.90", "| sw | 0.50", "| **languages that"))]
    assert ["100 | 0 |" in rows[0], "100 | 100 | 0 (0 of 16) | not known" in rows[1]] == [True, True] and len(rows) == 3
    assert "**100** | **0**" in rows[2]  # of English alone


def test_a_probe_of_other_weights_is_named_and_one_alone_is_no_report(tmp_path, scored):
    other = probe_folder(tmp_path / "other", fingerprint="fedcba9876543210")
    collection = collect([scored, other])
    assert collection.models[0].decisions == () and "of a model that no score here is of" in collection.notes[0]
    assert "Judgement" not in write_report([scored, other], tmp_path / "report.html")[0].read_text()
    with pytest.raises(ReportError, match="neither a score nor training metrics"):
        collect([other])


def test_a_folder_of_scores_and_probes_is_read_and_a_damaged_probe_refused(tmp_path, scored):
    probe = probe_folder(tmp_path / "probe", decisions=[decision("en", 0.8, 10, 0)])
    collection = collect([tmp_path])
    assert collection.models[0].decisions[0].is_undecided is False and collection.notes == ()
    assert not [line for line in warnings(collection.models) if "does not know" in line]
    (probe / PROBE_FILE).write_text('{"probe": {}}')
    with pytest.raises(ReportError, match="probe again"):
        collect([tmp_path])
