"""`mlc-ray openings`: from scores, translations and labelled responses to settings that a run reads."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray import api
from mlc_ray.cli import main
from mlc_ray.cli.commands import parse_openings
from mlc_ray.config import ConfigError
from mlc_ray.judges.openings import refusal_openings
from mlc_ray.report.collect import Response
from mlc_ray.runs import ANSWERS_FOLDER, REQUEST_FILE, RESPONSES_FILE, TRANSLATION_FILE
from mlc_ray.translate.openings import OpeningsSourceError, as_settings, openings, openings_table

NO = "Lo lamento mucho, pero no puedo"
SORRY = "Regrettably, I am unable to"


def rows(language, opening, label, count=2):
    return [
        {"prompt": "?", "prompt_kind": "harmful", "language": language, "response": f"{opening} {n}.", "label": label}
        for n in range(count)
    ]


def written(file, found):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(each) + "\n" for each in found))
    return str(file)


def score_folder(folder, found):
    folder.mkdir()
    (folder / REQUEST_FILE).write_text("{}")
    names = [*Response.__dataclass_fields__]
    given = [
        {
            **dict.fromkeys(names), "benchmark": "b", "bundle_id": str(n), "kind": "harmful", "sample": 0,
            "categories": [], "language": each["language"], "response": each["response"], "behaviour": each["label"],
        }
        for n, each in enumerate(found)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(given), folder / RESPONSES_FILE)
    return str(folder)


def test_a_file_is_written_that_runs_and_probes_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    score = score_folder(tmp_path / "score", [*rows("es", NO, "refused"), *rows("es", "Claro", "complied")])
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / TRANSLATION_FILE).write_text("{}")
    written(tmp_path / "made" / ANSWERS_FOLDER / "answers-00000.jsonl", rows("en", SORRY, "refused"))
    labelled = written(tmp_path / "labelled.jsonl", rows("en", "Regrettably, I am unable to 0 and 1", "complied", 1))
    assert main(["openings", score, "made", labelled]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "openings of refusals" in shown and "few responses" in shown
    settings = parse_openings("openings.yaml")
    assert settings.further == {"es": [NO]}  # what a response that helps begins with, too, is none
    assert NO in refusal_openings("es", settings)
    text = (tmp_path / "openings.yaml").read_text()
    assert "# es: 0 and 2 of 2\n" in text and NO in text
    assert main(["openings", score]) == 2 and "exists already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected the section `openings` alone"):
        (tmp_path / "other.yaml").write_text("further: {}\n")
        parse_openings("other.yaml")


def test_what_holds_no_refusal_is_refused(tmp_path):
    file = written(tmp_path / "labelled.jsonl", rows("en", "Sure", "complied"))
    with pytest.raises(OpeningsSourceError, match="none of 2 responses"):
        openings([file])
    (tmp_path / TRANSLATION_FILE).write_text("{}")
    with pytest.raises(OpeningsSourceError, match="has no answers/"):
        api.openings([tmp_path])


def test_the_table_shows_what_no_opening_covers(tmp_path):
    file = written(tmp_path / "labelled.jsonl", [*rows("es", NO, "refused"), *rows("es", "Ni hablar", "refused", 1)])
    found = openings([file])
    (row,) = openings_table(found).rows
    assert [cell.text for cell in row.cells] == ["3", "0", "67", "1", "0", "few responses", "Ni hablar 0."]
    assert as_settings(found).endswith(f"openings:\n  further:\n    es:\n    - {NO}\n")
