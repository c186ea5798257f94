from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlc_ray.cli import main
from mlc_ray.report.write import write_report
from tests.report.html_checks import Page
from tests.report.runs import grid, response, steps, utility_row, write_run, write_score, write_utility


def make_run(folder: Path, languages: list[str]) -> Path:
    run = write_run(folder, steps())
    for i, name in enumerate(("before", "after")):
        rows = grid(languages, lambda kind, code, i=i: 0.2 + 0.7 * i, seed=i, bundles=4)  # type: ignore[misc]
        rows.append(response(99, "harmful", "en", behaviour="complied", response="x" * 1400))
        write_score(run / "scores" / name, rows, created=f"2026-01-0{i + 1}")
    return run


def test_the_command_writes_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(tmp_path / "run", ["en", "sw"]), tmp_path / "new" / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    Page(out.read_text(encoding="utf-8")).check_self_contained()
    assert main(["report", str(run), "--out", str(out)]) == 0, "an older report is replaced"
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_the_command_explains_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "empty"), "--out", str(out)]) == 2
    assert f"'{tmp_path}/empty' is neither a run" in capsys.readouterr().err
    assert not out.exists()
    run = make_run(tmp_path / "run", ["en"])
    assert main(["report", str(run), "--out", str(tmp_path / "report.pdf")]) == 2
    assert "report.pdf': the report is an HTML file" in capsys.readouterr().err


def test_for_papers_there_are_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, paper = make_run(tmp_path / "run", ["en", "sw"]), tmp_path / "paper"
    assert main(["report", str(run), "--out", str(tmp_path / "r.html"), "--paper", str(paper)]) == 0
    text = (paper / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert linked == ["languages-0.png", "slopes-0.png", "training.png"]
    assert {str(paper / name) for name in (*linked, "report.md")} < set(capsys.readouterr().out.split())
    for name in linked:
        assert (paper / name).read_bytes().startswith(b"\x89PNG")
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        assert row.count("|") >= 3
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables), "ragged table"
    assert "| sw |" in text
    assert "95 % intervals" in text


def test_the_paper_of_two_benchmarks_has_their_means_first(tmp_path: Path) -> None:
    rows = grid(["en", "sw"], lambda kind, code: 0.5) + grid(["en"], lambda kind, code: 0.9, benchmark="other")
    score = write_score(tmp_path / "s", rows)
    assert main(["report", str(score), "--out", str(tmp_path / "r.html"), "--paper", str(tmp_path / "p")]) == 0
    text = (tmp_path / "p" / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["all", "mine", "other"]
    first = text[: text.index("## mine")]
    assert re.findall(r"^\| (mine|other|sw) \|", first, re.MULTILINE) == ["mine", "other"]
    assert sorted(path.name for path in (tmp_path / "p").glob("*.png")) == [f"languages-{i}.png" for i in range(3)]


def test_the_paper_warns_and_escapes_as_well(tmp_path: Path) -> None:
    score = write_score(tmp_path / "s", grid(["en"], lambda kind, code: 1.0, kinds=["harmful"], benchmark="a|b <i>"))
    assert main(["report", str(score), "--out", str(tmp_path / "r.html"), "--paper", str(tmp_path / "p")]) == 0
    text = (tmp_path / "p" / "report.md").read_text(encoding="utf-8")
    assert "> **Warning:** Benign prompts were not scored" in text
    assert "## a\\|b &lt;i>" in text


def test_the_paper_has_utility_by_filter_with_its_settings(tmp_path: Path) -> None:
    score = write_score(tmp_path / "s", grid(["en"], lambda kind, code: 0.5))
    write_utility(
        score,
        utility_row("gsm8k", 0.125, metric="exact_match", filter="strict-match", limit=20),
        utility_row("gsm8k", 0.375, metric="exact_match", filter="flexible-extract", stderr=None),
    )
    assert main(["report", str(score), "--out", str(tmp_path / "r.html"), "--paper", str(tmp_path / "p")]) == 0
    text = (tmp_path / "p" / "report.md").read_text(encoding="utf-8")
    assert "| gsm8k (exact_match, strict-match) | 0.1250 (± 0.0100; n = 100; first 20 of each task, 5-shot) |" in text
    assert "| gsm8k (exact_match, flexible-extract) | 0.3750 (n = 100; 5-shot) |" in text


def test_a_report_loads_no_framework() -> None:
    names = {"torch", "ray", "vllm", "matplotlib", "transformers"}
    code = f"import sys, mlc_ray.report.write, mlc_ray.report.console; print({names} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_public_report_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for client in ("acme", "bolt"):
        write_score(Path(f"secret-client/{client}/base"), grid(["en", "sw"], lambda kind, code: 0.5, bundles=4))
        Path(f"secret-client/{client}/junk").mkdir()
    write_report(["secret-client/acme", "secret-client/bolt"], "r.html", public=True, paper="paper")
    for text in (Path("r.html").read_text("utf-8"), Path("paper/report.md").read_text("utf-8")):
        assert "base #2" in text
        for secret in ("secret-client", "acme", "bolt", "junk"):
            assert secret not in text
