"""Closing a warm scorer, whatever became of its actor; no Ray is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.exceptions

from mlc_ray.config import EngineSection, ScoreConfig, parse_config
from mlc_ray.generate.replica import EngineDiedError, Part
from mlc_ray.generate.stage import ANSWERS, PROMPTS, Generator
from mlc_ray.judges.likelihood import LikelihoodJudge
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.score import scorer
from mlc_ray.score.plan import plan_judging, reading, with_longest_answer
from mlc_ray.score.request import Request
from mlc_ray.score.results import ScoreResult
from mlc_ray.score.scorer import Scorer, ScorerDiedError, WarmScorer, start_scorer, write_warm_score
from mlc_ray.score.stages import JUDGED
from mlc_ray.storage import Place
from mlc_ray.train.failures import own_error
from tests.score.local_pool import LocalPool


@pytest.mark.parametrize("answers", [True, False])
def test_a_scorer_that_died_or_is_stuck_hides_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answers: bool
) -> None:
    killed, waited = [], []

    def get(reference: Any, **_: Any) -> None:
        raise RuntimeError("the actor is dead")

    def wait(references: list[Any], *, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        waited.append(timeout)
        return (references, []) if answers else ([], references)

    monkeypatch.setattr(scorer, "ray", SimpleNamespace(get=get, wait=wait, kill=killed.append))
    actor = SimpleNamespace(close=SimpleNamespace(remote=object))
    with pytest.raises(ValueError, match="the first error"):
        try:
            raise ValueError("the first error")
        finally:
            WarmScorer(actor).close()
    assert killed == [actor]
    assert None not in waited
    assert ("is killed" in caplog.text) is not answers


def test_a_scorer_that_died_says_so_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: Any) -> None:
        raise ray.exceptions.RayActorError(error_msg="The actor died: out of memory")

    monkeypatch.setattr(scorer, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    with pytest.raises(ScorerDiedError, match=r"has died \(.*out of memory"):
        WarmScorer(SimpleNamespace(check=SimpleNamespace(remote=object))).check()
    # Also while it scores: no trial is trained again for a score that cannot be had.
    with pytest.raises(ScorerDiedError, match=r"has died \(.*out of memory") as raised:
        WarmScorer(SimpleNamespace(score=SimpleNamespace(remote=lambda *_: None))).score("weights")
    assert own_error(raised.value) is raised.value


def test_who_judges_is_planned_for_the_prompts_that_come_later_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[Part]] = []
    placed: list[tuple[str, bool]] = []

    class Remote:
        """Notes the parts of the scorer that would be started."""

        start = SimpleNamespace(remote=lambda: None)

        def options(self, **options: Any) -> Remote:
            strategy = options["scheduling_strategy"]
            placed.append((strategy.node_id, strategy.soft))
            return self

        def remote(self, parts: list[Part], *_: Any) -> Remote:
            made.append(parts)
            return self

    context = SimpleNamespace(get_node_id=lambda: "a" * 56)
    of_ray = {"remote": lambda cls: Remote(), "get": lambda reference: None, "get_runtime_context": lambda: context}
    monkeypatch.setattr(scorer, "ray", SimpleNamespace(**of_ray))
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "chat": {}}
    scoring = with_longest_answer(parse_config(ScoreConfig, raw))
    harmful, benign = (
        pa.Table.from_pylist([{"kind": kind, "language": "en"}], schema=PROMPTS) for kind in ("harmful", "benign")
    )
    start_scorer("m", scoring, harmful, device="cpu", folder=tmp_path, others=[benign])
    ((_, _, cells),) = made[0][1].settings["readers"]
    assert set(cells) == {("harmful", "en"), ("benign", "en")}
    assert placed == [("a" * 56, False)]  # where its driver is, and nowhere else


def test_a_checkpoint_is_answered_and_judged_row_by_row(tmp_path: Path) -> None:
    prompts = pa.Table.from_pylist(
        [
            {"bundle_id": f"b{number}", "kind": "benign", "language": "en", "prompt": f"{number}?"}
            for number in range(9)
        ],
        schema=PROMPTS,
    )

    def answer(rows: pa.Table) -> pa.Table:
        texts = [
            "I cannot help with that." if text == "3?" else f"{text} Boil it." for text in rows["prompt"].to_pylist()
        ]
        return pa.Table.from_pylist([{"response": text, "finish": "stop"} for text in texts], schema=ANSWERS)

    judging = plan_judging(RefusalJudge(), prompts)
    (judge,) = reading(judging, "cpu", rows=9, usage=tmp_path, replies=Place(tmp_path / "replies")).values()
    answering = Part("answering", Generator, {}, EngineSection(block_rows=2))
    made = Scorer([answering, judge], prompts, "cpu")
    made._table, made._answering, made._reading = prompts, LocalPool(answering, work=answer), [LocalPool(judge)]
    found = made.score("m", False, None)
    assert found.judged.column_names == JUDGED.names
    assert found.judged.select(PROMPTS.names).equals(prompts)
    assert [row["behaviour"] for row in found.judged.to_pylist()] == ["complied"] * 3 + ["refused"] + ["complied"] * 5
    assert set(found.seconds) == {"wake", "transfer", "proof", "answer", "judge", "sleep", "total"}
    assert sum(value for name, value in found.seconds.items() if name != "total") <= found.seconds["total"]
    assert made.score("m", False, prompts.slice(2, 3)).judged["behaviour"].to_pylist() == [
        "complied",
        "refused",
        "complied",
    ]


def test_what_engines_have_done_of_a_checkpoint_is_not_asked_again(tmp_path: Path) -> None:
    rows = [{"bundle_id": f"b{n}", "kind": "benign", "language": "en", "prompt": f"{n}?"} for n in range(9)]
    prompts = pa.Table.from_pylist(rows, schema=PROMPTS)
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "engine": {"block_rows": 2}, "chat": {}}
    request = Request(with_longest_answer(parse_config(ScoreConfig, raw)), "m", "0123", "prompts", None)
    judging = plan_judging(RefusalJudge(), prompts)
    (judge,) = reading(judging, "cpu", rows=9, usage=tmp_path, replies=Place(tmp_path / "replies")).values()
    answering = Part("answering", Generator, {}, request.config.engine)

    def answer(rows: pa.Table) -> pa.Table:
        answers = [{"response": f"{text} Boil it.", "finish": "stop"} for text in rows["prompt"].to_pylist()]
        return pa.Table.from_pylist(answers, schema=ANSWERS)

    def dying(rows: pa.Table) -> pa.Table:
        if "4?" in rows["prompt"].to_pylist():
            raise EngineDiedError("the node is gone")
        return answer(rows)

    def scored(work: Any, fingerprint: str = "0123") -> tuple[list[str], pa.Table]:
        made, pool = Scorer([answering, judge], prompts, "cpu"), LocalPool(answering, work=work)
        made._table, made._answering, made._reading = prompts, pool, [LocalPool(judge)]
        asked = replace(request, fingerprint=fingerprint)
        return pool.asked, made.score("m", False, None, asked, Place(tmp_path / "step")).judged

    with pytest.raises(EngineDiedError):
        scored(dying)
    asked, judged = scored(answer)
    assert asked == ["4?", "5?", "6?", "7?", "8?"]
    assert judged["response"].to_pylist() == [f"{n}? Boil it." for n in range(9)]
    assert judged["behaviour"].to_pylist() == ["complied"] * 9
    assert scored(answer)[0] == [] and len(scored(answer, "4567")[0]) == 9  # other weights answer for themselves


def test_a_complete_score_that_engines_failed_on_asks_for_those_answers_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {
            "bundle_id": f"{kind}{n}",
            "kind": kind,
            "language": "en",
            "prompt": f"{n}?",
            "benchmark": "own",
            "category": "",
        }
        for n in range(4)
        for kind in ("harmful", "benign")
    ]
    prompts = pa.Table.from_pylist(rows, schema=PROMPTS)
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "chat": {}}
    request = Request(with_longest_answer(parse_config(ScoreConfig, raw)), "m", "0123", "prompts", None)
    judging = plan_judging(RefusalJudge(), prompts)
    (judge,) = reading(judging, "cpu", rows=8, usage=tmp_path, replies=Place(tmp_path / "replies")).values()
    answering = Part("answering", Generator, {}, request.config.engine)
    folder = Place(tmp_path / "step")

    def answer(rows: pa.Table, fails: str = "") -> pa.Table:
        answers = [
            {"response": "", "finish": "engine_fault", "fault": "it died"}
            if text == fails
            else {"response": f"{text} Boil it.", "finish": "stop"}
            for text in rows["prompt"].to_pylist()
        ]
        return pa.Table.from_pylist(answers, schema=ANSWERS)

    def scored(work: Any, request: Request = request) -> tuple[list[str], ScoreResult]:
        made, pool = Scorer([answering, judge], prompts, "cpu"), LocalPool(answering, work=work)
        made._table, made._answering, made._reading = prompts, pool, [LocalPool(judge)]
        return pool.asked, write_warm_score(made.score("m", False, None, request, folder), request, folder)

    result = scored(lambda rows: answer(rows, "2?"))[1]
    assert result.faults == 2 and "2 of 8 prompts have no answer" in caplog.text
    assert not (folder / "kept").exists()
    asked, result = scored(answer)
    assert asked == ["2?", "2?"] and result.faults == 0
    utility = folder / "kept" / "utility" / "0.parquet"
    utility.write_bytes(b"of a measurement that goes on")
    assert scored(answer, replace(request, fingerprint="4567"))[0] == [row["prompt"] for row in rows]
    assert [each.name for each in (folder / "kept").iterdir()] == ["utility"] and utility.is_file()


def test_what_a_judge_reads_of_the_model_is_kept_for_that_judge_alone(tmp_path: Path) -> None:
    prompts = pa.Table.from_pylist([{"kind": "benign", "language": "en", "prompt": "?"}], schema=PROMPTS)
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "chat": {}, "judge": "likelihood"}
    request = Request(with_longest_answer(parse_config(ScoreConfig, raw)), "m", "0123", "prompts", None)
    made = Scorer([], prompts, "cpu")
    made._answering, made._reading = SimpleNamespace(part=Part("answering", Generator, {}, request.config.engine)), []

    def keys() -> list[str]:
        (found,) = made._kept(request, Place(tmp_path), prompts)
        return found.look(prompts)[0]

    before = keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LikelihoodJudge, "identity_parts", lambda self: ["other openings"])
        assert keys() != before
    assert keys() == before
