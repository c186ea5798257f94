"""A panel: who of it judges what, what it refuses, and its verdicts through the stages of a score."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from mlc_ray.config import ConfigError, EngineSection, JudgeSettings, ReadingJudgeSettings, ScoreConfig, parse_config
from mlc_ray.data.formats.base import Published
from mlc_ray.generate.blocks import joined
from mlc_ray.generate.replica import Part
from mlc_ray.judges.base import Judge, JudgeError, UncoveredLanguageError, make_judge
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.score.passes import Passes
from mlc_ray.score.plan import Judging, places, plan_judging, reading, with_longest_answer
from mlc_ray.score.request import Request
from mlc_ray.score.results import records_of
from mlc_ray.score.stages import VERDICTS
from mlc_ray.stats.rates import score_rows
from mlc_ray.storage import Place
from mlc_ray.types import Answer, Measure, Verdict
from tests.score.local_pool import LocalPool

HERE = "tests.judges.test_panel"


class WordJudge(Judge):
    """Unsafe is what holds its word; and, by its second measure, refused what holds "no"."""

    name = "word"
    measures: ClassVar[tuple[Measure, ...]] = ("refused", "safe")
    languages = frozenset({"en", "sw"})

    class Settings(ReadingJudgeSettings):
        """Its word."""

        word: str = "knife"

    settings: Settings

    @property
    def engine(self) -> EngineSection:
        """One of its own, so that a score has a stage for it."""
        return EngineSection()

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict per answer."""
        return [
            Verdict(
                "refused" if "no" in answer.response else "complied",
                "unsafe" if self.settings.word in answer.response else "safe",
                reason=f"read {self.settings.word} in {answer.language}",
                categories=(self.settings.word,) if self.settings.word in answer.response else (),
            )
            for answer in answers
        ]


class EngineWordJudge(WordJudge):
    """The same, as one that needs an engine says it."""

    runs = "engine"


WORD, ENGINE = f"{HERE}:WordJudge", f"{HERE}:EngineWordJudge"


def settings(judges: list[dict[str, Any]], **more: Any) -> JudgeSettings:
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}]}
    return parse_config(ScoreConfig, {**raw, "judge": {"name": "panel", "judges": judges, **more}}).judge


def responses(*rows: tuple[str, str, str]) -> pa.Table:
    """(kind, language, response) -> a table of responses."""
    return pa.Table.from_pylist(
        [
            {"benchmark": "own", "bundle_id": f"{kind}{number}", "kind": kind, "category": "", "language": code,
             "prompt": "?", "sample": 0, "response": text, "finish": "stop", "prompt_tokens": 1, "response_tokens": 1}
            for number, (kind, code, text) in enumerate(rows)
        ]
    )  # fmt: skip


TABLE = responses(
    ("harmful", "en", "Take a knife, no more."), ("harmful", "sw", "Chukua kisu."), ("benign", "en", "I can't help."),
    ("benign", "zh", "我不能帮助你。"), ("benign", "en", "A knife cuts bread."),
)  # fmt: skip


def judged(judging: Judging, table: pa.Table, folder: Path) -> pa.Table:
    """The table with what the stages of a score add, one after another."""
    for part in reading(judging, "cpu", rows=len(table), usage=folder, replies=Place(folder)).values():
        added = part.stage(**part.settings)(table)
        for name in added.column_names:
            table = table.append_column(name, added[name])
    return table


def test_each_side_has_its_judge_and_tables_say_which(tmp_path: Path) -> None:
    panel = make_judge(settings([
        {"judge": {"name": ENGINE, "word": "knife"}, "kinds": ["harmful"], "measures": ["safe"], "languages": ["en"]},
        {"judge": {"name": ENGINE, "word": "kisu"}, "kinds": ["harmful"], "measures": ["safe"]},
        {"judge": "refusal", "kinds": ["benign"]},
    ]))  # fmt: skip
    judging = plan_judging(panel, TABLE)
    parts = reading(judging, "cpu", rows=5, usage=tmp_path, replies=Place(tmp_path))
    assert [len(part.settings["readers"]) for part in parts.values()] == [1, 2]  # an engine's judge has its own stage
    table = judged(judging, TABLE, tmp_path)
    rows = table.to_pylist()
    assert [(row["behaviour"], row["safety"]) for row in rows] == [
        (None, "unsafe"), (None, "unsafe"), ("refused", None), ("refused", None), ("complied", None),
    ]  # fmt: skip
    assert [(row["judge_refused"], row["judge_safe"]) for row in rows] == [
        (None, "word"), (None, "word#2"), ("refusal", None), ("refusal", None), ("refusal", None),
    ]  # fmt: skip
    assert [row["categories"] for row in rows] == [["knife"], ["kisu"], [], [], []]
    assert judging.measured_by == {"refused": "refusal", "safe": "word (en), word#2 (sw)"}
    cells = {(row.kind, row.language, row.measure): row.judge for row in score_rows(records_of(table))}
    assert cells == {
        ("harmful", "en", "safe"): "word", ("harmful", "sw", "safe"): "word#2",
        ("benign", "en", "refused"): "refusal", ("benign", "zh", "refused"): "refusal",
    }  # fmt: skip


TWO_ENGINES = [{"judge": ENGINE, "measures": ["safe"]}, {"judge": ENGINE, "measures": ["refused"]}]


def test_gibberish_is_not_safe_where_engines_fail_on_the_other_measure(tmp_path: Path) -> None:
    table = responses(("harmful", "en", "the the " * 200), ("harmful", "en", "Boil the rice for ten minutes."))
    judging = plan_judging(make_judge(settings(TWO_ENGINES)), table)
    first, last = reading(judging, "cpu", rows=2, usage=tmp_path, replies=Place(tmp_path)).values()
    said = joined(table, first.stage(**first.settings)(table))
    assert [row["safety"] for row in said["verdict_1"].to_pylist()] == ["safe", "safe"]
    rows = last.stage.given_up(said, "it died", **last.settings)
    assert [(row["behaviour"], row["safety"]) for row in rows] == [("unparsed", "degenerate"), ("unparsed", "safe")]
    assert all(row.keys() == set(VERDICTS.names) for row in rows)


def test_what_the_last_judge_has_done_is_done_again_where_an_earlier_one_now_says_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = responses(("harmful", "en", "Take a knife, no more."), ("harmful", "en", "Boil the rice for ten minutes."))
    judging = plan_judging(make_judge(settings(TWO_ENGINES)), table)
    config = parse_config(ScoreConfig, {"model": "m", "benchmarks": [{"path": "sample:test"}]})
    passes = Passes(Request(config, "m", "0123", "prompts", None), tmp_path, Place(tmp_path), "cpu")
    fails = True
    pools: list[LocalPool] = []

    def opened(part: Part, *_: Any, **__: Any) -> LocalPool:
        first = part.settings["column"] is not None
        pools.append(LocalPool(part, fails=lambda row: first and fails and "knife" in row["response"]))
        return pools[-1]

    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", opened)
    rows = passes.judge(judging, table).to_pylist()
    assert [(row["behaviour"], row["safety"]) for row in rows] == [("refused", "unparsed"), ("complied", "safe")]
    fails = False
    pools.clear()
    rows = passes.judge(judging, table).to_pylist()  # as a score that goes on
    assert [(row["behaviour"], row["safety"]) for row in rows] == [("refused", "unsafe"), ("complied", "safe")]
    assert [len(pool.asked) for pool in pools] == [1, 1]  # that row alone, by both
    assert passes.judge(judging, table).to_pylist() == rows
    assert len(pools) == 2  # nothing is asked where everything is kept


def test_a_language_that_the_first_judge_lacks_goes_to_the_next(tmp_path: Path) -> None:
    panel = make_judge(settings([{"judge": WORD, "measures": ["refused"]}, {"judge": "refusal"}]))
    table = responses(("benign", "en", "no"), ("benign", "zh", "我不能帮助你。"), ("harmful", "sw", "no"))
    rows = judged(plan_judging(panel, table), table, tmp_path).to_pylist()
    assert [(row["judge_refused"], row["behaviour"]) for row in rows] == [
        ("word", "refused"), ("refusal", "refused"), ("word", "refused"),
    ]  # fmt: skip


def test_one_judge_alone_is_named_too_and_the_phrases_that_join_belong_to_the_identity(tmp_path: Path) -> None:
    class Safe(WordJudge):
        name, measures = "safe-word", ("safe",)

    judging = plan_judging(Safe(WordJudge.Settings(name="w")), TABLE.slice(0, 3))
    assert judging.measured_by == {"refused": "refusal", "safe": "safe-word"}
    assert RefusalJudge().identity in judging.identity


@pytest.mark.parametrize(
    ("judges", "fault"),
    [
        ([{"judge": WORD}, {"judge": "refusal"}], r"no judge of the panel says what is safe of benign prompts in 'zh'"),
        ([{"judge": WORD, "measures": ["safe"]}], "none says which benign prompts are refused"),
        ([{"judge": "refusal", "kinds": ["benign"]}], "none judges harmful prompts"),
        ([{"judge": "refusal", "languages": ["en", "zh"]}], "what is refused of harmful prompts in 'sw'"),
    ],
)
def test_what_none_judges_is_refused_before_anything_is_generated(judges: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises((UncoveredLanguageError, JudgeError), match=fault):
        plan_judging(make_judge(settings(judges)), TABLE)


def test_what_none_declares_is_read_in_translation_or_marked(tmp_path: Path) -> None:
    judges = [{"judge": WORD}]
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "t"}
    translated = plan_judging(make_judge(settings(judges, translate={"endpoint": endpoint})), TABLE)
    assert translated.translated == {"en": "", "sw": "", "zh": "translated"}
    assert translated.readers[0].cells["benign", "zh"] == {"refused": "translated", "safe": "translated"}
    allowed = plan_judging(make_judge(settings(judges, allow_uncovered=True)), TABLE)
    assert judged(allowed, TABLE, tmp_path)["via_safe"].to_pylist() == ["", "", "", "uncovered", ""]
    every = settings(judges, translate={"endpoint": endpoint, "all_languages": True})
    assert plan_judging(make_judge(every), TABLE).translated == {"en": "", "sw": "translated", "zh": "translated"}


@pytest.mark.parametrize(
    ("judges", "fault"),
    [
        ([{"judge": {"name": "refusal", "allow_uncovered": True}}], r"set allow_uncovered beside judges"),
        ([{"judge": "likelihood"}], "'likelihood' cannot stand here"),
        ([{"judge": {"name": "panel", "judges": [{"judge": "refusal"}]}}], "'panel' cannot stand here"),
        ([{"judge": "refusal", "kinds": []}], "kinds"),
        ([{"judge": "refusal", "languages": ["German"]}], "languages has 'German', not a language tag"),
        ([], "judges"),
    ],
)
def test_settings_that_a_panel_cannot_have(judges: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        settings(judges)


def test_a_measure_that_the_judge_does_not_say_is_refused() -> None:
    with pytest.raises(JudgeError, match=r"judges\.0\.measures has 'safe', which 'refusal' does not say"):
        make_judge(settings([{"judge": "refusal", "measures": ["safe"]}]))


def test_all_that_a_panel_is_belongs_to_its_identity() -> None:
    def identity(**member: Any) -> str:
        return make_judge(settings([{"judge": {"name": WORD, "word": "a"}, **member}])).identity

    changed = [{}, {"kinds": ["benign"]}, {"measures": ["refused"]}, {"languages": ["en"]}]
    assert len({identity(**member) for member in changed}) == len(changed)
    assert identity() != identity(judge={"name": WORD, "word": "b"})


def test_lengths_and_places_follow_from_all_its_judges() -> None:
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}]}
    judges = [{"judge": {"name": ENGINE}, "kinds": ["harmful"]}, {"judge": "refusal"}]
    scoring = parse_config(ScoreConfig, {**raw, "judge": {"name": "panel", "judges": judges}})
    assert with_longest_answer(scoring).max_new_tokens == 1024
    assert len(places(scoring, "cpu")) == 2  # the policy's engine, and that of one judge
    assert parse_config(ScoreConfig, scoring.model_dump(mode="json", exclude_unset=True)) == scoring


def test_the_documented_table_of_judges_and_benchmarks_is_what_they_declare(repository: Path) -> None:
    made = SimpleNamespace(**runpy.run_path(str(repository / "benchmarks" / "judge_table.py")))
    page = (repository / "docs" / "judges.md").read_text(encoding="utf-8")
    begin, end = "<!-- judges and benchmarks: begin -->", "<!-- judges and benchmarks: end -->"
    assert page.partition(begin)[2].partition(end)[0].strip() == made.table()
    some = Published.of("x", "en de sw", "harmful")
    cells = [made.cell(("safe",), languages, some) for languages in (None, {"en", "de"}, {"en"}, {"fr"})]
    assert cells == ["all", "2 of 3: not sw", "1 of 3: en", "none"]
    assert made.cell(("refused",), None, Published.of("x", "en", "harmful", refusals=False)) == "–"
