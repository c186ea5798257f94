"""A judge calibrated on labelled responses, from the command line to a score's corrected rates; without Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray.cli import main
from mlc_ray.config import CalibrationConfig, parse_config
from mlc_ray.data.labelled import LabelledError, read_labelled
from mlc_ray.report.console import score_tables, show
from mlc_ray.score.calibrate import calibrate
from mlc_ray.score.calibration import CalibrationError, check_calibration, load_calibration, with_corrected_rates
from mlc_ray.score.results import load_scores, save_scores
from mlc_ray.stats.calibration import Errors
from tests.report.runs import grid, write_score
from tests.score.local_pool import LocalPool

REFUSAL, HELP = "I'm sorry, but I can't help with that.", "Boil the rice for ten minutes."


def labelled(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def english(path: Path) -> Path:
    """32 refusals, of which the phrases see 31, and 40 answers, of which they see none."""
    rows = [{"prompt": f"Question {n}?", "response": REFUSAL, "label": "refused"} for n in range(31)]
    rows += [{"prompt": "Why?", "response": "That stays with her.", "label": "refused"}]
    rows += [{"prompt": "How?", "response": f"{HELP} {n}", "label": "complied"} for n in range(40)]
    return labelled(path, *rows)


def config(tmp_path: Path, *sources: Path | str, **more: object) -> CalibrationConfig:
    raw = {"labelled": list(map(str, sources)), "out": str(tmp_path / "calibration.json"), **more}
    return parse_config(CalibrationConfig, raw)


def test_from_labels_to_corrected_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = labelled(tmp_path / "few.jsonl", *({"response": "Siwezi.", "label": "refused"} for _ in range(3)))
    out = tmp_path / "calibration.json"
    command = ["judge", "--calibrate", str(english(tmp_path / "en.jsonl")), "--calibrate", f"{few},language=sw"]
    assert main([*command, "--out", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "en (English) refused 1.00 (31/31; 0.89 to 1.00) 0.97 (31/32; 0.84 to 0.99) 40 0" in shown
    assert "not measured: 0 labels of the rarer class" in shown
    found = load_calibration(out)
    check_calibration(str(out), found.judge)
    assert main([*command, "--out", str(out)]) == 2  # nothing is written over
    assert "exists already; give another file by --out" in capsys.readouterr().err

    rows = grid(["en", "sw"], lambda kind, code: float(kind == "harmful"), bundles=40)
    result = load_scores(write_score(tmp_path / "s", rows))
    assert (result.corrected, with_corrected_rates(result, None)) == ((), result)
    corrected = with_corrected_rates(replace(result, judge=found.judge), str(out))
    by_cell = {(each.kind, each.language): each for each in corrected.corrected}
    assert by_cell["harmful", "en"].rate == 1.0
    assert by_cell["harmful", "en"].corrected is not None and by_cell["harmful", "en"].corrected.clipped
    assert "not measured" in by_cell["benign", "sw"].why
    assert corrected.rows == result.rows and corrected.summaries == result.summaries  # what is counted stays
    save_scores(corrected)
    assert load_scores(tmp_path / "s") == corrected
    assert main(["report", str(tmp_path / "s"), "--out", str(tmp_path / "report.html")]) == 0
    assert "clipped to 0 or 100" in (tmp_path / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    show(score_tables(corrected))
    assert "mine, corrected for the judge's errors" in " ".join(capsys.readouterr().out.split())


def test_a_calibration_of_another_judge_is_refused(tmp_path: Path) -> None:
    calibrate(config(tmp_path, english(tmp_path / "en.jsonl")))
    with pytest.raises(CalibrationError, match=r"is of another judge than this score's.*'refusal phrases=.*'guard'"):
        check_calibration(str(tmp_path / "calibration.json"), "guard")
    (tmp_path / "calibration.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CalibrationError, match="has format None, expected 1; make it by"):
        check_calibration(str(tmp_path / "calibration.json"), "guard")
    with pytest.raises(CalibrationError, match="does not exist"):
        check_calibration(str(tmp_path / "none.json"), "guard")


def test_the_public_set_of_refusals_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Four columns, no prompt, no language but in the name of the split's file."""
    table = pa.table({"answer_1": [HELP], "refusal_1": [REFUSAL], "answer_2": ["Gern."], "refusal_2": ["Nein."]})
    (tmp_path / "data").mkdir()
    for name in ("german", "russian"):
        pq.write_table(table, tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    found = read_labelled([str(tmp_path / "data")])
    assert [(each.language, each.response, each.refused, each.safe) for each in found[:4]] == [
        ("de", HELP, False, None), ("de", REFUSAL, True, None),
        ("de", "Gern.", False, None), ("de", "Nein.", True, None),
    ]  # fmt: skip
    assert {each.language for each in found[4:]} == {"ru"}
    calibration, _ = calibrate(config(tmp_path, tmp_path / "data"))
    assert [(each.language, each.hits, each.others) for each in calibration.errors] == [("de", 2, 2), ("ru", 2, 2)]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"response": "x", "label": "refuses"}, r"line 1: label is 'refuses', not one of refused, complied"),
        ({"response": "x", "safety": "harmless"}, "safety is 'harmless', not one of safe, unsafe"),
        ({"response": "x"}, "no label: give `label`"),
        ({"label": "refused"}, "response is None, not a text"),
        ({"response": "x", "label": "refused", "language": "German"}, "'German' is not a language code"),
        ({"response": "x", "label": "refused", "prompt_kind": "bad"}, "prompt_kind is 'bad'"),
        ({"answer_1": "a", "refusal_1": " ", "answer_2": "b", "refusal_2": "c"}, "refusal_1 is ' '"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_labelled_response_is_named(tmp_path: Path, row: dict[str, str], fault: str) -> None:
    with pytest.raises(LabelledError, match=fault):
        read_labelled([str(labelled(tmp_path / "en.jsonl", row))])


def test_a_language_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    file = labelled(tmp_path / "dev.jsonl", {"response": "x", "label": "refused"})
    with pytest.raises(LabelledError, match="add ',language=CODE'"):
        read_labelled([str(file)])
    assert read_labelled([f"{file},language=pt-BR"])[0].language == "pt-BR"
    with pytest.raises(LabelledError, match="'lang=pt' is neither language=CODE nor split=NAME"):
        read_labelled([f"{file},lang=pt"])


def test_rows_of_one_split_are_read_alone(tmp_path: Path) -> None:
    rows = [{"response": "x", "label": "refused", "split": name} for name in ("dev", "held_out", "dev")]
    file = labelled(tmp_path / "dev.jsonl", *rows, {"response": "x", "label": "refused"})
    assert [each.place for each in read_labelled([f"{file},split=dev,language=de"])] == ["1", "3"]
    assert len(read_labelled([f"{file},language=de"])) == 4
    with pytest.raises(LabelledError, match=r"no row has split 'test' \(there are: 'dev', 'held_out'\)"):
        read_labelled([f"{file},split=test,language=de"])


def test_labels_that_the_judge_does_not_speak_of_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = labelled(tmp_path / "en.jsonl", {"response": HELP, "safety": "safe"})
    both = labelled(tmp_path / "de.jsonl", {"response": HELP, "safety": "safe", "label": "complied"})
    calibrate(config(tmp_path, both, out=str(tmp_path / "both.json")))
    assert "1 of 2 labels are not counted: of these prompts the judge says what is refused only" in caplog.text
    asked: list[object] = []
    monkeypatch.setattr("mlc_ray.score.calibrate._judge", lambda *given: asked.append(given))
    with pytest.raises(
        CalibrationError, match="'refusal' says what is refused, and none of the 1 responses is labelled"
    ):
        calibrate(config(tmp_path, file))
    assert not asked  # a guard or an endpoint may need hours


def test_what_engines_fail_on_is_no_error_of_the_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "?", "response": f"no {n}", "label": "refused"} for n in range(6)]
    rows += [{"prompt": "?", "response": f"Boil it. {n}", "label": "complied"} for n in range(5)]
    file = labelled(tmp_path / "en.jsonl", *rows)
    monkeypatch.setattr("mlc_ray.score.calibrate.connect", lambda address, env: None)
    monkeypatch.setattr("mlc_ray.score.calibrate.use_gpu", lambda accelerator: False)
    monkeypatch.setattr("mlc_ray.score.calibrate.check_fits", lambda *_: None)
    bad = ["no 2", "no 3", "Boil it. 0"]
    opened = partial(LocalPool, fails=lambda row: row["response"] in bad)
    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", lambda part, device, **_: opened(part))
    found, _ = calibrate(config(tmp_path, file, judge={"name": "tests.judges.test_panel:EngineWordJudge"}))
    assert found.errors == (
        Errors("refused", "en", "word", hits=4, hits_called=4, others=4, others_called=0, unparsed=0),
    )
    assert "3 of 11 responses are not counted: engines fail on each" in caplog.text
    one = labelled(tmp_path / "of-one.en.jsonl", {**rows[2], "language": "en"})
    with pytest.raises(CalibrationError, match="engines fail on every response"):
        calibrate(config(tmp_path, one, out="none.json", judge={"name": "tests.judges.test_panel:EngineWordJudge"}))


def test_the_command_takes_a_score_or_labels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge"]) == 2
    assert main(["judge", "runs/s", "--calibrate", "x.jsonl"]) == 2
    assert main(["judge", "runs/s", "--min-labels", "3"]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("needs either SCORE") == said.count("(--calibrate A --calibrate B)") == 2
        and "--min-labels is read with --calibrate only" in said
    )
