"""How often responses are in their prompts' language: in tables, in a comparison, and as a rule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.cli import main
from mlc_ray.report.collect import collect
from mlc_ray.report.console import score_tables
from mlc_ray.report.in_language import in_language_table
from mlc_ray.report.tables import markdown
from mlc_ray.report.write import write_report
from mlc_ray.score.results import load_scores
from mlc_ray.show import show
from tests.report.runs import grid, write_score
from tests.report.test_console import text_of

LANGUAGES = ["en", "es", "ps"]


def rows(bundles: int = 20, refused: float = 1.0) -> list[dict[str, Any]]:
    return grid(LANGUAGES, lambda kind, language: refused if kind == "harmful" else 0.0, bundles=bundles, seed=1)


def score(folder: Path, spanish: float = 1.0, **more: Any) -> Path:
    """A score of which this share of the answers to harmful Spanish prompts is Spanish, the rest English."""
    made = rows()
    told = {"en": "en", "es": "es", "ps": None}
    languages = [
        "en" if (row["kind"], row["language"]) == ("harmful", "es") and index // 3 % 20 >= 20 * spanish
        else told[row["language"]]
        for index, row in enumerate(made)
    ]  # fmt: skip
    return write_score(folder, made, told=languages, **more)


def shown(*folders: Path, limits: bool = True) -> str:
    table = in_language_table(collect(folders).models, "mine", limits=limits)
    assert table is not None
    return "\n".join(markdown(table))


def test_the_table_has_shares_by_language_and_what_stands_there_instead(tmp_path: Path) -> None:
    said = shown(score(tmp_path / "a", 0.75))
    assert "| language | harmful % | benign % |" in said
    assert re.search(r"\*\*87\.5 \(\d+\.\d to \d+\.\d\)\*\* \| \*\*100\.0 \(\d+\.\d to 100\.0\)", said)
    assert re.search(r"es \(Spanish\) \| 75\.0 \(53\.1 to 88\.8; 15 of 20; instead en 5\)", said)
    assert "ps (Pashto) | not told | not told |" in said
    assert "**75.0**" not in shown(tmp_path / "a", limits=False) and "75.0 (en 5)" in shown(
        tmp_path / "a", limits=False
    )


def test_refusals_and_the_others_stand_apart_where_there_are_both(tmp_path: Path) -> None:
    made = rows(refused=0.5)
    refused = [row["behaviour"] == "refused" for row in made]
    told = ["en" if is_refused else row["language"] for row, is_refused in zip(made, refused, strict=True)]
    said = shown(write_score(tmp_path / "a", made, told=told))
    mine = [row for row in made if (row["kind"], row["language"]) == ("harmful", "es")]
    n = sum(row["behaviour"] == "refused" for row in mine)
    assert 0 < n < 20 and f"refusals 0 of {n}, others {20 - n} of {20 - n}; instead en {n}" in said
    assert re.search(r"refusals 33\.3, [\d.]+ to [\d.]+; others 100\.0, [\d.]+ to 100\.0", said)


def test_page_markdown_and_console_have_it_and_a_score_without_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, before = score(tmp_path / "told", 0.75), write_score(tmp_path / "before", rows())
    write_report([told, before], tmp_path / "out.html", paper=tmp_path / "paper")
    for text in ((tmp_path / "out.html").read_text(), (tmp_path / "paper" / "report.md").read_text()):
        assert "In the prompt's language" in text.replace("&#39;", "'") and "instead en 5" in text
        assert "not measured" in text and "was not told in the same way" in text
    write_report([before], tmp_path / "none.html")
    assert "<b>In the prompt" not in (tmp_path / "none.html").read_text()
    printed = text_of(score_tables(load_scores(told)))
    assert "In the prompt's language" in printed and "75.0 (en 5)" in printed
    assert "In the prompt's language" not in text_of(score_tables(load_scores(before)))
    (told / "responses.parquet").unlink()
    assert "no responses.parquet" in text_of(score_tables(load_scores(told)))


def test_show_has_a_line(tmp_path: Path) -> None:
    said = show(score(tmp_path / "told", 0.75))
    assert re.search(
        r"language +that of the prompt: harmful 87\.5 % \(.* to .*\), benign 100\.0 % \(.* to 100\.0\)", said
    )
    assert re.search("language +which one responses are in was not measured", show(write_score(tmp_path / "b", rows())))
    (tmp_path / "told" / "responses.parquet").unlink()
    assert "cannot be said without responses.parquet" in show(tmp_path / "told")


def test_compare_has_the_change_and_rules_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, worse = score(tmp_path / "good"), score(tmp_path / "worse", 0.5)
    gate = ["--fail-if", "harmful.in_language drops > 5", "--fail-if", "benign.in_language < 90 estimate"]
    assert main(["compare", str(good), str(worse), *gate, "--json", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 rules failed: harmful.in_language drops > 5 (−25, " in printed.err
    assert re.search(
        r"harmful in the prompt's language % +100\.0 → 75\.0 +−25\.0 \(−\d+\.\d to −\d+\.\d\) +40", printed.out
    )
    (found,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    harmful, benign = found["in_language"]
    assert (harmful["n"], harmful["before"], harmful["after"], harmful["change"]["value"]) == (40, 100, 75, -25)
    assert benign["change"]["value"] == 0 and benign["change"]["low"] < 0 < benign["change"]["high"]
    assert main(["compare", str(worse), str(good), "--fail-if", "harmful.in_language < 80"]) == 0


def test_languages_that_were_told_otherwise_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = score(tmp_path / "a"), score(tmp_path / "b", told_by="lingua 3")
    before = write_score(tmp_path / "c", rows())
    for second, said in ((other, "after: lingua 3"), (before, "after: not measured")):
        assert main(["compare", str(first), str(second)]) == 0
        printed = capsys.readouterr().out
        assert "was not told in the same way" in printed and said in printed
        assert "in the prompt's language %" not in printed
        assert main(["compare", str(first), str(second), "--fail-if", "harmful.in_language drops"]) == 2
        assert "told in the same way" in capsys.readouterr().err
