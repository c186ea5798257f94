"""`mlc-ray compare`: what it prints and writes, what it refuses, and its exit status."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from mlc_ray.cli import build_parser, main
from mlc_ray.report.rules import QUANTITIES, Rule, RuleError, outcome_of, parse_rule
from mlc_ray.stats.paired import compare
from mlc_ray.stats.rates import Judged
from mlc_ray.stats.response_languages import in_language
from mlc_ray.stats.summaries import summarise

from .runs import grid, write_score

LANGUAGES = ["en", "sw", "zh"]


def model(
    folder: Path, harmful: float, benign: float = 0.05, *, bundles: int = 60, seed: int = 1, **more: object
) -> Path:
    """A score whose model refuses these shares of harmful and benign prompts."""
    rates = {"harmful": harmful, "benign": benign}
    rows = grid(LANGUAGES, lambda kind, language: rates[kind], bundles=bundles, seed=seed)
    return write_score(folder, rows, **more)


def status(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


def test_the_exit_status_of_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, worse = model(tmp_path / "good", 0.95), model(tmp_path / "worse", 0.6, seed=2)
    assert status(good, worse) == 0, "without rules it only compares"
    assert status(worse, good, "--fail-if", "harmful.refused drops") == 0
    capsys.readouterr()
    drops = ["--fail-if", "harmful.refused drops > 2", "--fail-if", "benign.complied < 80"]
    assert status(good, worse, *drops, "--json", tmp_path / "out.json") == 1
    printed = capsys.readouterr()
    assert "1 of 2 rules failed: harmful.refused drops > 2 (" in printed.err
    assert re.search(r"harmful refused %.*→", printed.out)
    assert re.search(r"benign.complied < 80 +9\d\.\d, .* holds +certain +passes", printed.out)
    assert "worst language % of harmful refused" in printed.out and "harmful − benign refused" in printed.out
    assert all(re.search(rf"^ *{code} \(", printed.out, re.MULTILINE) for code in LANGUAGES)
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["passed"], [rule["failed"] for rule in written["rules"]]) == (False, [True, False])
    (benchmark,) = written["benchmarks"]
    assert benchmark["sides"][0]["change"]["value"] == written["rules"][0]["value"] < -20
    assert written["before"]["fingerprint"] == "0123456789abcdef"


def test_what_decides_is_certain_the_estimate_or_possible(tmp_path: Path) -> None:
    """A change of a few points on few bundles: its interval leaves both open."""
    before, after = model(tmp_path / "a", 0.9, bundles=12), model(tmp_path / "b", 0.8, bundles=12, seed=2)
    rule = "harmful.refused drops"
    found = [
        status(before, after, "--fail-if", f"{rule}{basis}") for basis in ("", " certain", " estimate", " possible")
    ]
    assert found == [0, 0, 1, 1]


def test_a_rule_whose_interval_is_less_sure_than_it_says_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The change of the worst language is; its own number is not (`tests/stats/test_lowest.py`)."""
    before, after = model(tmp_path / "a", 0.9, bundles=8), model(tmp_path / "b", 0.9, bundles=8, seed=2)
    own, change = "worst.harmful.refused < 10", "worst.harmful.refused drops > 90"
    assert status(before, after, "--fail-if", own) == 0
    assert "a change of the worst language" not in " ".join(capsys.readouterr().out.split())
    out = tmp_path / "out.json"
    assert status(before, after, "--fail-if", own, "--fail-if", change, "--json", out) == 0
    assert " ".join(capsys.readouterr().out.split()).count("a change of the worst language") == 1
    assert [bool(rule["caveat"]) for rule in json.loads(out.read_text())["rules"]] == [False, True]


def test_scores_that_were_not_measured_alike_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = model(tmp_path / "a", 0.9)
    assert status(first, model(tmp_path / "b", 0.9, prompts="others", judge="guard@1")) == 3
    error = capsys.readouterr().err
    assert "the prompts differ (feedfacecafebeef: before; others: after)" in error
    assert "the judges differ (refusal: before; guard@1: after)" in error
    assert "score both with the same settings" in error
    assert status(first, model(tmp_path / "f", 0.9, judge="guard@1")) == 3
    error = capsys.readouterr().err
    assert f"`mlc-ray judge {first}` judges its stored responses again" in error and "no new responses" in error
    assert "same settings" not in error
    other = {"python": "3.12.1", "vllm": "0.31.0", "mlc_ray": "9"}
    assert status(first, model(tmp_path / "d", 0.9, versions=other)) == 3
    assert "the engines' versions differ (vllm 0.30.0: before; vllm 0.31.0: after)" in capsys.readouterr().err
    assert status(first, model(tmp_path / "e", 0.9, versions={**other, "vllm": "0.30.0"})) == 0
    assert "different versions of mlc_ray (before: unknown; after: 9)" in capsys.readouterr().out
    unread = model(tmp_path / "c", 0.9)
    rows = grid(LANGUAGES, lambda kind, language: 0.9, bundles=60)
    for row in rows[:60]:
        row["behaviour"] = "unparsed"
    unread = write_score(tmp_path / "unread", rows)
    assert status(first, unread) == 3
    assert "got no verdict" in capsys.readouterr().err
    (first / "responses.parquet").unlink()
    assert status(first, tmp_path / "c") == 3
    assert "without responses.parquet" in capsys.readouterr().err


def test_a_score_is_not_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = model(tmp_path / "run" / "scores" / "test", 0.9)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    for other in (score, tmp_path / "run" / "scores" / ".." / "scores" / "test"):
        assert status(score, other) == 3
        assert "are one score, " in capsys.readouterr().err


def test_a_model_that_refuses_all_but_english_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Benign prompts are English alone: every rule holds of the model, and the gate says why it cannot tell."""

    def score(name: str, harmful: float) -> Path:
        rows = grid(LANGUAGES, lambda kind, language: harmful if kind == "harmful" else 0.03, bundles=60, seed=3)
        return write_score(tmp_path / name, [r for r in rows if r["kind"] == "harmful" or r["language"] == "en"])

    good, collapsed = score("good", 0.8), score("collapsed", 1.0)
    rules = ["harmful.refused drops > 2 possible", "benign.complied drops > 8 possible", "difference < 60"]
    arguments = [good, collapsed, *(part for rule in rules for part in ("--fail-if", rule))]
    assert status(*arguments) == 3
    error = capsys.readouterr().err
    assert "no benign prompts in sw, zh" in error and "--one-sided sw,zh" in error
    assert status(*arguments, "--one-sided", "sw") == 3
    assert "no benign prompts in zh:" in capsys.readouterr().err
    assert status(*arguments, "--one-sided", "sw,zh", "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["after"]["one_sided"] == {"mine": {"sw": "benign", "zh": "benign"}}
    assert any("No benign prompts in sw, zh" in line for line in found["warnings"])
    assert status(*arguments, "--one-sided", "sw,xx") == 2
    assert (
        "--one-sided 'sw,xx': no prompts are in 'xx'; name languages of the scores: en, sw, zh"
        in capsys.readouterr().err
    )
    assert status(good, collapsed) == 0, "without rules it only compares"


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for file, fault in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.json", "is no folder")):
        assert status(tmp_path / "a", tmp_path / "b", "--json", file) == 2
        assert fault in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ("harmful.refused", "expected `[BENCHMARK:] QUANTITY < NUMBER`"),
        ("harmful.refused drops 2", "expected `[BENCHMARK:]"),
        ("harmful.refuse < 2", "'harmful.refuse' is not one of harmful.refused"),
        ("harmful.refused drops > -2", "-2 is below 0; say 'rises'"),
        ("harmful.attack_success rises", "has a bound but no change"),
        ("benign.complied < 0.8", "benign.complied is in percent: write 80"),
        ("worst.harmful.refused > 0.25", "worst.harmful.refused is in percent: write 25"),
        ("harmful.refused < 101", "101 is outside of what harmful.refused can be, 0 to 100"),
        ("harmful.refused drops > 200", "200 is outside of what a change of harmful.refused can be, 0 to 100"),
        ("difference < -150", "-150 is outside of what difference can be, -100 to 100"),
        ("difference drops > 201", "201 is outside of what a change of difference can be, 0 to 200"),
        ("pag.harmful.refused < 80", "80 is outside of what pag.harmful.refused can be, 0 to 1"),
        ("var.harmful.refused > 26", "26 is outside of what var.harmful.refused can be, 0 to 25"),
        ("harmful.refused < 2 surely", "expected `[BENCHMARK:]"),
        ("harmful.safe < 80", "on 'mine' these scores have no harmful.safe"),
        ("harmful.safe < 80", "; they have harmful.refused, benign.complied, harmful.attack_success, var.harmful"),
        ("harmful.safe drops > 2", "; they have harmful.refused, benign.complied, var.harmful.refused"),
        ("other: harmful.refused < 80", "'other' was not scored; there are ['mine']"),
    ],
)
def test_a_rule_that_cannot_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, fault: str) -> None:
    folders = [model(tmp_path / name, 0.9, bundles=4) for name in ("a", "b")]
    assert status(*folders, "--fail-if", rule) == 2
    error = capsys.readouterr().err
    assert f"--fail-if {rule!r}" in error and fault in error


def test_a_run_with_several_scores_is_not_guessed_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        model(tmp_path / name, 0.9, bundles=4)
    assert status(tmp_path, tmp_path / "a") == 2
    assert "has 2 scores (a, b); give the folder of one score" in capsys.readouterr().err


def test_rules_are_read() -> None:
    text = "PKU/Safe:test: worst.harmful.safe drops > 2.5 possible"
    assert parse_rule(text) == Rule(text, "PKU/Safe:test", "worst.harmful.safe", "drops", 2.5, "possible")
    for written in (
        "benign.complied < 1",
        "harmful.attack_success > 0",
        "harmful.refused drops > 0.5",
        "pag.harmful.safe < 0.8",
    ):
        assert parse_rule(written).bound == float(written.split()[-1])
    assert parse_rule("difference < 40") == Rule("difference < 40", None, "difference", "<", 40, "certain")


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_quantity_has_its_number(quantity: str) -> None:
    """Both kinds in two languages, by both measures: half of the after-responses moved for the worse."""

    def records(hit: int) -> list[Judged]:
        return [
            Judged(
                "b", f"{kind}{bundle}", kind, code,
                "refused" if (bundle < hit) == (kind == "harmful") else "complied",
                "safe" if bundle < hit else "unsafe",
                response_language=code if bundle < hit else "fr",
            )
            for kind in ("harmful", "benign")
            for code in ("en", "sw")
            for bundle in range(20)
        ]  # fmt: skip

    before, after = records(20), records(10)
    (summary,), change = summarise(after), compare(before, after).benchmark()
    expected = {"harmful.attack_success": 50.0, "difference": 0.0, "var": 0.0, "pag": 1.0}
    level = expected.get(quantity, expected.get(quantity.partition(".")[0], 50.0))
    told = in_language(after)
    assert outcome_of(parse_rule(f"{quantity} < 1"), summary, change, told).number.value == pytest.approx(level)
    if quantity != "harmful.attack_success":
        moved = {"difference": -100.0, "var": 0.0, "pag": 0.0}.get(quantity.partition(".")[0], -50.0)
        outcome = outcome_of(parse_rule(f"{quantity} drops estimate"), summary, change, told)
        assert outcome.number.value == pytest.approx(moved)
        assert outcome.failed == (moved < 0)


def test_the_example_for_ci_asks_what_can_be_asked(repository: Path) -> None:
    page = (repository / "docs" / "gate.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    jobs = yaml.safe_load(snippet)["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = [part for run in lines for part in run.replace("\\\n", " ").splitlines() if "mlc-ray" in part]
    parsed = [build_parser().parse_args(shlex.split(command)[1:]) for command in commands]
    rules = [rule for arguments in parsed for rule in getattr(arguments, "fail_if", [])]
    assert len(rules) >= 3
    assert all(parse_rule(rule) for rule in rules)
    assert all(f"`{quantity}`" in page for quantity in QUANTITIES)
    with pytest.raises(RuleError):
        parse_rule(f"{rules[0]} never")
