"""Thoughts told from answers, and turned off by a template's own switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.config import ChatSection, ConfigError, ScoreConfig, SearchConfig, parse_config
from mlc_ray.data.tokens import ChatTemplate, TemplateError, load_tokenizer
from mlc_ray.generate.reasoning import (
    Marks,
    Parts,
    Reader,
    ReasoningError,
    apart,
    marks_of,
    opens_thoughts,
    without_thoughts,
)
from mlc_ray.generate.stage import PROMPTS, seeds_of
from mlc_ray.types import FORBIDDEN_THOUGHTS, PROMPT_TOO_LONG, UNFINISHED_THOUGHTS

THINK = Marks("<think>", "</think>")
SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ OPENING }}{% endif %}"
)
EMPTY = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def tokenizer(model: Path, opening: str = "", *, marked: bool = True) -> Any:
    """SmolLM2's, with a template of a reasoning model that writes `opening` where the answer begins."""
    found = load_tokenizer(str(model))
    found.chat_template = SWITCHED.replace("{{ OPENING }}", opening)
    if not marked:
        found.chat_template = found.chat_template.replace(".split('</think>')[-1]", "")
    return found


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("Boil it.", False, Parts("Boil it.")),
        ("<think>\nHm.\n</think>\n\nBoil it.", False, Parts("Boil it.", "Hm.")),
        ("\n<think>Hm.</think><think>Yes.</think> Boil it.", False, Parts("Boil it.", "Hm.\nYes.")),
        ("Hm.\n</think>\nBoil it.", True, Parts("Boil it.", "Hm.")),
        ("<think>Hm.</think>Boil it.", True, Parts("Boil it.", "Hm.")),
        ("<think>Hm", False, Parts("", "Hm", unfinished=True)),
        ("Hm", True, Parts("", "Hm", unfinished=True)),
        ("<think></think>Boil it.", False, Parts("Boil it.", "")),
        ("</think>Boil it.", False, Parts("Boil it.")),
        # Marks further on are part of the answer: nothing that was said there is hidden from the judge.
        ("Boil it. <think>Hm.</think> Or not.", False, Parts("Boil it. <think>Hm.</think> Or not.")),
        ("Sure, </think> boil it.", False, Parts("Sure, </think> boil it.")),
    ],
)
def test_thoughts_are_what_a_response_begins_with(text: str, opened: bool, parts: Parts) -> None:
    assert apart(text, THINK, opened=opened) == parts


def test_a_model_reasons_if_its_template_or_its_tokens_have_the_marks(smollm2: Path) -> None:
    assert marks_of(load_tokenizer(str(smollm2))) is None
    assert marks_of(tokenizer(smollm2)) == THINK
    added = tokenizer(smollm2, marked=False)
    assert marks_of(added) is None
    added.add_tokens(["<think>", "</think>"])
    assert marks_of(added) == THINK
    special = tokenizer(smollm2, marked=False)
    special.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    assert marks_of(special) == Marks("[THINK]", "[/THINK]", special=True)  # decoding leaves them out


@pytest.mark.parametrize(("opening", "opened"), [("", False), ("<think>\n", True), ("<think>\n\n</think>\n\n", False)])
def test_a_template_may_begin_the_thoughts_itself(smollm2: Path, opening: str, opened: bool) -> None:
    template = ChatTemplate(tokenizer(smollm2, opening), prompts_only=True)
    assert opens_thoughts(template.tail, THINK) is opened
    asked = [{"role": "user", "content": "Why </think>? "}]
    rendered = template.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert template.encode_prompt("Why </think>? ", 1 << 62)[0] == rendered
    if opening:  # an answered conversation does not begin with the prompt: it cannot be trained on
        with pytest.raises(TemplateError, match="renders an answered conversation differently"):
            ChatTemplate(tokenizer(smollm2, opening))


def test_a_response_without_an_answer_says_so(smollm2: Path) -> None:
    own = tokenizer(smollm2)

    def read(reasoning: str, text: str, finish: str = "stop", tail: str = "") -> tuple[str | None, ...]:
        return tuple(Reader.of(own, tail, reasoning).read(text, finish).values())

    whole = "<think>Hm.</think>Boil it."
    assert read("strip", whole) == ("Boil it.", "Hm.", "stop")
    assert read("judge", whole) == (whole, None, "stop")
    assert read("forbid", whole) == ("Boil it.", "Hm.", FORBIDDEN_THOUGHTS)
    assert read("forbid", "<think>\n</think>Boil it.") == ("Boil it.", None, "stop")
    assert read("strip", "Boil it.", "length") == ("Boil it.", None, "length")
    assert read("strip", "Hm", "length", "assistant\n<think>\n") == ("", "Hm", UNFINISHED_THOUGHTS)
    assert read("strip", "", PROMPT_TOO_LONG, "<think>") == ("", None, PROMPT_TOO_LONG)
    plain = Reader.of(load_tokenizer(str(smollm2)), "", "strip")
    assert plain.read(whole, "stop") == {"response": whole, "thoughts": None, "finish": "stop"} and not plain.special


def test_marks_that_are_special_tokens_are_read_and_left_out(smollm2: Path) -> None:
    own = tokenizer(smollm2, marked=False)
    own.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    reader = Reader.of(own, "", "strip")
    assert reader.special
    assert list(reader.read("[THINK]Hm.[/THINK]Boil it.<|im_end|>", "stop").values()) == ["Boil it.", "Hm.", "stop"]
    assert list(reader.read("Boil it.<|im_end|>", "stop").values()) == ["Boil it.", None, "stop"]
    final = Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", special=True)
    tokens = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Boil it."
    assert Reader(final, special_tokens=tokens).read(text, "stop")["response"] == "Boil it."
    at_once = "<|channel|>final<|message|>Boil it."
    assert list(Reader(final, special_tokens=tokens).read(at_once, "stop").values()) == ["Boil it.", None, "stop"]


def test_thoughts_are_turned_off_by_the_templates_own_switch(smollm2: Path) -> None:
    chat = ChatSection(system="Be kind.", arguments={"short": False})
    off = without_thoughts(tokenizer(smollm2, EMPTY), chat)
    assert off == ChatSection(system="Be kind.", arguments={"short": False, "enable_thinking": False})
    plain = without_thoughts(tokenizer(smollm2, EMPTY), ChatSection())
    assert ChatTemplate(tokenizer(smollm2, EMPTY), plain, prompts_only=True).tail.endswith("<think>\n\n</think>\n\n")
    other = EMPTY.replace("enable_thinking", "thinking")
    assert without_thoughts(tokenizer(smollm2, other), ChatSection()).arguments == {"thinking": False}
    assert without_thoughts(load_tokenizer(str(smollm2)), chat) == chat  # it does not reason
    with pytest.raises(ReasoningError, match=r"has no switch that turns them off \(enable_thinking or thinking\)"):
        without_thoughts(tokenizer(smollm2, "<think>\n"), chat)
    with pytest.raises(ReasoningError, match=r"turns thoughts on; remove enable_thinking"):
        without_thoughts(tokenizer(smollm2, EMPTY), ChatSection(arguments={"enable_thinking": True}))


def test_a_seed_is_of_what_names_the_answer() -> None:
    names = ("benchmark", "bundle_id", "language", "sample")
    rows = [("b", "x", "en", 0), ("b", "x", "en", 1), ("b", "x", "sw", 0), ("b", "y", "en", 0), ("c", "x", "en", 0)]
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=PROMPTS)
    seeds = seeds_of(table, 0)
    assert len(set(seeds)) == len(rows) and all(0 <= seed < 2**32 for seed in seeds)
    assert seeds_of(table.take([3, 1]), 0) == [seeds[3], seeds[1]]  # whatever else is asked
    assert not set(seeds) & set(seeds_of(table, 1))


SCORE: dict[str, Any] = {"model": "m", "benchmarks": [{"path": "sample:test"}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"asking": {"samples": 4}},
            r"samples=4 with temperature=0 would be 4 times one greedy answer; set",
        ),
        ({"asking": {"seed": 3}}, r"seed=3 is read with a temperature above 0 only"),
        ({"asking": {"temperature": -1}}, r"asking\.temperature=-1"),
        ({"asking": {"samples": 0, "temperature": 1}}, r"asking\.samples=0"),
        ({"asking": {"reasoning": "hide"}}, r"asking\.reasoning='hide'.*'strip', 'judge' or 'forbid'"),
        ({"asking": {"system": "x"}}, r"asking\.system='x': no such field; did you mean 'chat\.system'"),
        (
            {"judge": {"name": "likelihood"}, "asking": {"temperature": 1.0}},
            r"asking\.temperature=1\.0 is not read by judge='likelihood'",
        ),
        (
            {"judge": {"name": "likelihood"}, "max_new_tokens": 64},
            r"max_new_tokens=64 is not read by judge='likelihood'.*remove it",
        ),
    ],
)
def test_what_is_asked_wrongly_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(ScoreConfig, {**SCORE, **changes})


def test_a_judge_that_reads_the_model_may_have_its_thoughts_forbidden() -> None:
    config = parse_config(ScoreConfig, {**SCORE, "judge": {"name": "likelihood"}, "asking": {"reasoning": "forbid"}})
    assert config.asking.reasoning == "forbid"


def test_a_search_cannot_forbid_what_its_runs_train_with(tmp_path: Path) -> None:
    from mlc_ray.search.run import search

    run = tmp_path / "run.yaml"
    run.write_text("{name: r, model: {path: m}, data: {train: [{path: 'sample:train'}]}}", encoding="utf-8")
    raw = {
        "name": "s", "output_dir": str(tmp_path), "train": str(run), "trials": 1, "space": {"seed": {"choice": [1]}},
        "scoring": {"benchmarks": [{"path": "sample:select"}], "asking": {"reasoning": "forbid"}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"scoring\.asking\.reasoning='forbid'.*chat\.arguments"):
        search(parse_config(SearchConfig, raw))
