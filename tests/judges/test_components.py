"""Judges as components: names and settings, and a judge from outside the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mlc_ray._registry import UnknownComponentError, names, resolve
from mlc_ray.config import ConfigError, JudgeSettings, ReadingJudgeSettings, ScoreConfig, SearchConfig, parse_config
from mlc_ray.judges.base import BaseJudge, Judge, JudgeError, make_judge, make_reader
from mlc_ray.judges.likelihood import LikelihoodJudge
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.types import Answer

OUTSIDE = "examples.my_judge:ShortAnswerJudge"


def settings(**judge: Any) -> JudgeSettings:
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "judge": judge}
    return parse_config(ScoreConfig, raw).judge


def test_every_shipped_judge_is_found_by_its_name() -> None:
    found = {name: resolve("judge", name) for name in names("judge")}
    assert {"refusal", "likelihood", "endpoint", "qwen3guard", "llama-guard", "wildguard"} <= set(found)
    for name, judge in found.items():
        assert issubclass(judge, BaseJudge)
        assert judge.name == name == judge.Settings.model_fields["name"].default
        assert judge.measures and judge.runs in ("inline", "engine", "service", "prompts")


def test_the_default_judge_reads_phrases() -> None:
    assert isinstance(make_judge(settings()), RefusalJudge)


def test_a_judge_that_does_not_exist_is_an_error_and_not_the_default() -> None:
    with pytest.raises(ConfigError, match=r"name='refusl'.*did you mean 'refusal'"):
        settings(name="refusl")
    with pytest.raises(UnknownComponentError, match="no judge is called 'refusl'"):
        make_judge(ReadingJudgeSettings(name="refusl"))
    with pytest.raises(ConfigError, match=r"name='refusl'"):
        search_settings(name="refusl")


@pytest.mark.parametrize(
    ("judge", "fault"),
    [
        ({"name": "refusal", "protocol": "attack"}, r"judge\.protocol='attack': no such field"),
        ({"name": "refusal", "model": "x"}, r"judge\.model='x': no such field"),
        ({"name": "llama-guard", "model": "x", "controversial": "safe"}, r"judge\.controversial='safe': no such field"),
        ({"name": "likelihood", "translate": {"model": "x"}}, r"judge\.translate=.*no such field"),
        ({"name": "llama-guard"}, r"judge\.model: required"),
        ({"name": "endpoint"}, r"judge\.endpoint: required"),
        ({"name": OUTSIDE, "words": 0}, r"judge\.words=0"),
        ({"name": "pathlib:PurePath"}, r"pathlib:PurePath.*Settings"),
        (
            {"name": "refusal", "translate": {"endpoint": {"base_url": "http://h/v1", "model": "m"}, "engine": {}}},
            r"judge\.translate: engine is read with a translator's model only, not with an endpoint",
        ),
    ],
)  # fmt: skip
def test_a_field_of_another_judge_does_not_exist(judge: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        settings(**judge)


def test_the_name_is_kept_where_only_given_fields_are_written_down() -> None:
    config = parse_config(ScoreConfig, {"model": "m", "benchmarks": [{"path": "sample:test"}]})
    config = config.model_copy(update={"judge": LikelihoodJudge.Settings()})
    again = parse_config(ScoreConfig, config.model_dump(mode="json", exclude_unset=True))
    assert again.judge == config.judge


def test_a_judge_of_a_model_has_no_responses_to_read() -> None:
    with pytest.raises(JudgeError, match="the likelihood judge reads a model, not responses"):
        make_reader(settings(name="likelihood"))


def test_what_is_no_judge_is_refused() -> None:
    with pytest.raises(JudgeError, match="extends neither Judge nor PromptJudge"):
        make_judge(JudgeSettings(name="mlc_ray.judges.likelihood:LikelihoodScorer"))


def test_a_judge_from_outside(tmp_path: Path) -> None:
    judge = make_judge(settings(name=OUTSIDE, words=3))
    assert isinstance(judge, Judge)
    assert (judge.name, judge.runs, judge.engine) == ("short-answer", "inline", None)
    assert re.fullmatch(f"{OUTSIDE} words=3 rules=[0-9a-f]{{16}}", judge.identity)
    assert judge.coverage(["en", "fr-CA"]) == {"en": "", "fr-CA": ""}
    judge.check_ready(tmp_path)
    judge.start("cpu", tmp_path)
    verdicts = judge.judge([Answer("?", text, "en", "harmful") for text in ("I cannot.", "Boil it in water.", "")])
    assert [verdict.behaviour for verdict in verdicts] == ["refused", "complied", "unparsed"]


def search_settings(**judge: Any) -> SearchConfig:
    scoring = {"benchmarks": [{"path": "sample:select"}], "judge": judge}
    space = {"mlc.layer": {"choice": [1, 2]}}
    return parse_config(
        SearchConfig, {"name": "s", "train": "t", "space": space, "sampler": "grid", "scoring": scoring}
    )


def test_a_search_takes_it_too() -> None:
    assert make_judge(search_settings(name=OUTSIDE).scoring.judge).name == "short-answer"
