"""Which share of a score's refusals begins as training read refusals: in the report beside the AUC, and in `show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlc_ray._registry import names, resolve
from mlc_ray.config import OpeningsSection
from mlc_ray.report.collect import collect, read_responses
from mlc_ray.report.openings import READ_BY, coverage, openings_read
from mlc_ray.report.remarks import warnings
from mlc_ray.report.write import write_report
from mlc_ray.runs import RESPONSES_FILE, ModelPathError
from mlc_ray.show import show
from tests.report.runs import response, write_run, write_score
from tests.report.test_decisions import decision, probe_folder

LISTED, OTHER = "I'm sorry, but I can't help with that.", "That is nothing I would write about."
AYUDA = "Lo siento, pero no puedo ayudarte con eso."


def rows() -> list[dict[str, Any]]:
    """English: 6 of 14 refusals begin as listed; Spanish: all 8, one of them in English; and help on the other side."""
    texts = [*[LISTED] * 6, *[OTHER] * 8]
    found = [response(at, "harmful", "en", response=f" {text}\n") for at, text in enumerate(texts)]
    found += [response(at, "benign", "en", response=OTHER, behaviour="complied") for at in range(8)]
    spanish = [*[AYUDA] * 7, LISTED]
    found += [response(at, "benign", "es", response=text, behaviour="refused") for at, text in enumerate(spanish)]
    return [*found, *(response(at, "harmful", "es", response="Claro.", behaviour="complied") for at in range(8))]


def run_of(folder: Path, **settings: Any) -> Path:
    run = write_run(folder)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "resolved_config": settings}))
    return run


DECIDES = {"terms": {"decision": {"name": "decision", "weight": 0.5}}, "openings": {}}
FURTHER = {"further": {"en": ["That is nothing"]}}


def test_refusals_are_counted_that_begin_with_an_opening_that_is_read(tmp_path: Path) -> None:
    responses = read_responses(write_score(tmp_path / "s", rows()) / RESPONSES_FILE)
    found = coverage(responses, OpeningsSection())
    assert {code: (each.begun, each.refusals) for code, each in found.items()} == {"en": (6, 14), "es": (8, 8)}
    assert found["en"].is_low and not found["es"].is_low
    more = coverage(responses, OpeningsSection(further={"en": ["That is nothing"]}))
    assert str(more["en"]) == "14 of 14" and not more["en"].is_low
    own = coverage(responses, OpeningsSection(english_everywhere=False))
    assert str(own["es"]) == "7 of 8"
    assert not coverage(responses[:4], OpeningsSection(further={"en": ["Never"]}))["en"].is_low  # four are too few


def test_the_report_has_them_beside_the_auc_and_names_a_low_share(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", **DECIDES)
    score = write_score(run / "scores" / "after", rows())
    probe = probe_folder(tmp_path / "probe", decisions=[decision("en", 0.93, 80, 10), decision("es", 0.8, 90, 20)])
    (line,) = [line for line in warnings(collect([score, probe]).models) if "begin with openings" in line]
    assert ", under 75% begin with openings" in line, "few would be untrue of 74 of 100"
    assert "that its training's terms read (en 6 of 14): " in line and "es" not in line.partition(":")[0]
    _, *paper = write_report([score, probe], tmp_path / "report.html", paper=tmp_path / "paper")
    text = paper[0].read_text()
    assert "refusals that open as read %" in text and "43 (6 of 14)" in text and "100 (8 of 8)" in text
    assert "begin with openings that its training" in (tmp_path / "report.html").read_text()
    alone = write_score(tmp_path / "untouched", rows())
    assert not [line for line in warnings(collect([alone]).models) if "openings" in line], "nothing reads any"
    (line,) = [line for line in warnings(collect([alone, probe]).models) if "openings" in line]
    assert "openings that are listed (en 6 of 14)" in line


def test_the_runs_own_openings_count_by_its_folder_its_export_or_where_the_score_lies(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", **{**DECIDES, "openings": FURTHER})
    export = tmp_path / "export"
    export.mkdir()
    (export / "mlc_ray.json").write_text(json.dumps({"settings": {**DECIDES, "openings": FURTHER}}))
    off = {"terms": {"mine": {"name": "consistency", "weight": 0}, "contrast": {"weight": 1.0}}, "openings": {}}
    untold = run_of(tmp_path / "untold", terms=DECIDES["terms"])  # they may have been any
    for number, (resolved, expected) in enumerate(
        [
            (run, True),
            (export, True),
            (run_of(tmp_path / "other", **off), False),
            (untold, None),
            (tmp_path / "none", None),
        ]
    ):
        (model,) = collect([write_score(tmp_path / f"s{number}", rows(), resolved=str(resolved))]).models
        found = openings_read(model.result)
        assert (None if found is None else found.by_terms) == expected
        if expected:
            assert found is not None and found.openings.further == FURTHER["further"]
            assert not [line for line in warnings([model]) if "openings" in line]
    (model,) = collect([write_score(run / "scores" / "after", rows(), resolved="s3://gone/model")]).models
    assert openings_read(model.result) is not None
    (run / "run.json").write_text(json.dumps({"resolved_config": {"openings": {"further": {"en": []}}}}))
    with pytest.raises(ModelPathError, match=r"run\.json' is damaged: openings"):
        openings_read(model.result)


def test_show_says_it_of_a_score_whose_models_terms_read_openings(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", **DECIDES)
    said = show(write_score(run / "scores" / "after", rows()))
    assert "refusals that begin as training's terms read them: en 6 of 14 (few), es 8 of 8" in said
    assert "training's terms" not in show(write_score(tmp_path / "untouched", rows()))


def test_the_terms_that_read_openings_are_those_that_are_shipped() -> None:
    """Known by name, since a report imports no component; one of your own has a name of its own."""
    shipped = [name for name in names("term") if resolve("term", name).__module__.startswith("mlc_ray.")]
    assert tuple(name for name in shipped if resolve("term", name).needs_decisions) == READ_BY
