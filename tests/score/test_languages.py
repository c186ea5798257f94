"""The language of each response of a score, by real lingua, in the table that is kept and counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray.judges.degenerate import settle
from mlc_ray.score.languages import with_languages
from mlc_ray.score.results import records_of
from mlc_ray.types import ENGINE_FAULT, Answer, Behaviour, Verdict
from tests.report.runs import SCHEMA, response

REFUSED = {
    "zh": "很抱歉，我无法提供这方面的帮助。",
    "ar": "عذرًا، لا أستطيع مساعدتك في ذلك.",
    "es": "Lo siento, pero no puedo ayudarte con eso.",
}
LOOP = "I will not say that I will not say that I will not say that " * 20


def scored(*texts: tuple[str, str, Behaviour, str]) -> pa.Table:
    """A table of responses as they are judged: language, response, behaviour and finish of each."""
    rows = []
    for index, (language, text, behaviour, finish) in enumerate(texts):
        verdict = settle(Verdict(behaviour), Answer("", text, language, "harmful", finish))
        columns = {"response": text, "finish": finish, "behaviour": verdict.behaviour, "reason": verdict.reason}
        rows.append(response(index, "harmful", language, **columns))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_each_response_is_told_and_kept_with_its_language(tmp_path: Path) -> None:
    table = scored(
        *((language, text, "refused", "stop") for language, text in REFUSED.items()),
        ("ja", "I'm sorry, but I can't help with that.", "refused", "length"),
        ("fr", REFUSED["zh"], "complied", "stop"),  # degenerate by its script, and in a language all the same
        ("en", LOOP, "complied", "stop"),
        ("en", "", "unparsed", ENGINE_FAULT),
        ("en", "I'm sorry, but I can't help with that.", "unparsed", "unfinished_thoughts"),
        ("es", "", "complied", "stop"),
        ("ps", "I'm sorry, but I can't help with that.", "refused", "stop"),
    )
    assert table["behaviour"].to_pylist()[4:6] == ["degenerate", "degenerate"]
    told, by = with_languages(table, tmp_path)
    expected = ["zh", "ar", "es", "en", "zh", None, None, None, None, None]
    assert told["response_language"].to_pylist() == expected
    assert pq.read_table(tmp_path / "responses.parquet").equals(told) and told.drop("response_language").equals(table)
    assert [record.response_language for record in records_of(told)] == expected
    assert by.startswith("lingua ") and " ar " in by and " ps " not in by
    assert records_of(table)[0].response_language is None


def test_nothing_is_told_where_nothing_was_answered(tmp_path: Path) -> None:
    table = scored(("en", "", "refused", "not_generated"))
    assert with_languages(table, tmp_path) == (table, "") and not list(tmp_path.iterdir())


def test_without_lingua_a_warning_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "lingua", None)
    monkeypatch.setattr("mlc_ray.score.languages.find_spec", lambda name: None)
    table = scored(("es", REFUSED["es"], "refused", "stop"))
    assert with_languages(table, tmp_path) == (table, "")
    assert "pip install 'mlc_ray[score]'" in caplog.text
