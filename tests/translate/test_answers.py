"""A model's own answers: which of them are used, and what becomes of the others."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.config import ConfigError, TranslateConfig, load_config, parse_config
from mlc_ray.config.translate import ChecksSection, OnPolicySection
from mlc_ray.data.bundles import make_bundle, pair_number
from mlc_ray.data.labelled import read_labelled
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import ANSWERS, Generator
from mlc_ray.judges.base import UncoveredLanguageError
from mlc_ray.judges.languages import Identifier
from mlc_ray.storage import Place
from mlc_ray.translate.answers import (
    AnswerJudge,
    OwnAnswersError,
    answered_in,
    check_judge,
    check_refusals,
    own_answers,
    to_last_sentence,
    unlike_openings,
)
from mlc_ray.translate.asking import CostCapError, Work
from mlc_ray.translate.assemble import NO_OWN, Assembly
from mlc_ray.translate.checks import Tools
from mlc_ray.translate.drafts import Draft, Own, Shard, Text, remade
from mlc_ray.translate.quality import Counts, as_markdown
from mlc_ray.translate.texts import texts_of
from mlc_ray.types import AnswerPair, Bundle
from tests.generate.chat_server import Step, serving
from tests.score.local_pool import LocalPool

RICE = {"en": "How do I cook rice?", "es": "¿Cómo cocino arroz?"}
GOOD = {"en": "First wash the rice, then boil it in water.", "es": "Primero lava el arroz y después hiérvelo en agua."}
NO = {"en": "I'm sorry, but I can't help with that.", "es": "Lo siento, pero no puedo ayudarte con eso."}
LOST = "Lo siento, pero no puedo entender la pregunta."
MIXED = "To cook rice, lava el arroz, then boil it en agua until it is blando, y luego serve it with sal."
Said = Callable[[str, str], tuple[str, str]]


@pytest.fixture(scope="module")
def tools() -> Tools:
    return Tools(ChecksSection(), Identifier(["es"]))


def settings(**fields: Any) -> OnPolicySection:
    return parse_config(OnPolicySection, {"model": "m", "languages": "all", **fields})


def bundle(**fields: Any) -> Bundle:
    return remade(Bundle("", "benign", {}), **{"prompts": RICE, **fields})


def answered(
    given: Bundle, section: OnPolicySection, said: Said, folder: Path, tools: Tools
) -> tuple[dict[str, Own], list[str]]:
    """What became of the answers to a bundle, by a model that says `said(how, language)`, and what it was asked."""
    shard = Shard([Draft(given)])
    asked = answer_all(shard, section, ["en", "es"], said, folder, tools)
    return {own.language: own for own in shard.drafts[0].own}, asked


def answer_all(
    shard: Shard, section: OnPolicySection, languages: list[str], said: Said, folder: Path, tools: Tools
) -> list[str]:
    """Let the model answer a shard; returns what it was asked."""

    def work(table: pa.Table) -> pa.Table:
        rows = []
        for row in table.to_pylist():
            text, finish = said(row["benchmark"], row["language"])
            rows.append({"response": text, "finish": finish, "prompt_tokens": 5, "response_tokens": 5})
        return pa.Table.from_pylist(rows, schema=ANSWERS)

    part = Part("answering", Generator, {})
    pool = LocalPool(part, work=work)
    judge = AnswerJudge(section, languages, folder, Place(folder / "replies.parquet"))
    asking = Work(part, pool, Place(folder), "model")  # type: ignore[arg-type]
    own_answers(shard, "00000", section, languages, asking, judge, tools)
    return pool.asked


def good(how: str, language: str) -> tuple[str, str]:
    return (GOOD if how == "plain" else NO)[language], "stop"


def test_an_answer_is_chosen_and_a_refusal_rejected_in_each_language(tmp_path: Path, tools: Tools) -> None:
    own, asked = answered(bundle(), settings(), good, tmp_path, tools)
    assert asked[:2] == [RICE["en"], RICE["es"]]
    assert ["in English," in asked[2], "in Spanish," in asked[3]] == [True, True]
    assert {code: (each.answer, each.refusal, each.outcome) for code, each in own.items()} == {
        code: (GOOD[code], NO[code], "kept") for code in RICE
    }


def test_english_alone_is_asked_by_default_and_given_refusals_are_used(tmp_path: Path, tools: Tools) -> None:
    own, asked = answered(bundle(), settings(languages="english", refusals={"en": NO["en"]}), good, tmp_path, tools)
    assert asked == [RICE["en"]] and own.keys() == {"en"} and own["en"].refusal == NO["en"]
    for kinds in (["benign"], ["harmful", "benign"]):
        refusals = {"en": NO["en"]} if "harmful" in kinds else {}
        alone = settings(languages="english", pairs=False, kinds=kinds, refusals=refusals)
        own, asked = answered(bundle(), alone, good, tmp_path, tools)
        assert asked == [RICE["en"]] and own["en"].outcome == "kept" and own["en"].refusal is None


def test_one_other_language_of_each_bundle_is_asked_for_beside_english(tmp_path: Path, tools: Tools) -> None:
    one, codes = settings(languages="one_other"), ["en", "es", "fr", "ru", "zh"]
    own, asked = answered(bundle(), one, good, tmp_path, tools)
    assert asked[:2] == [RICE["en"], RICE["es"]] and own.keys() == {"en", "es"}
    found = Counter[str]()
    for number in range(400):
        drawn = pair_number(Bundle("", "harmful", {}, pair=f"p{number}"))
        found.update(answered_in(one, drawn, codes, codes))
        # A bundle that lacks a language that was not drawn is answered in the same one.
        (own,) = answered_in(one, drawn, codes, codes) - {"en"}
        fewer = [code for code in codes if code == own or code in ("en", "ru")]
        assert answered_in(one, drawn, fewer, codes) == {"en", own}
    assert found.pop("en") == 400 and sum(found.values()) == 400
    assert all(70 < found[code] < 130 for code in codes[1:])  # 100 on average; 3 standard deviations are 26
    assert answered_in(one, 7, ["en"], codes) == {"en"} and answered_in(settings(), 7, codes, codes) == {*codes}


def test_a_twin_that_was_written_is_answered_in_the_language_of_its_origin(tmp_path: Path) -> None:
    """It has no pair of its own yet; where one of both lacks a language, neither is answered in it."""
    codes = ["es", "fr", "ru", "zh"]
    checks = Tools(ChecksSection(), Identifier(codes))

    def prompts(text: str, lacking: str = "") -> dict[str, str]:
        return {"en": text, **{code: f"{text} {code}" for code in codes if code != lacking}}

    for number in range(12):
        origin = bundle(prompts=prompts(f"How do I cook rice {number}?", codes[number % 4]))
        twin = bundle(prompts=prompts(f"How do I cook soup {number}?"))
        drafts = [Draft(origin), Draft(twin, twin_of=origin.bundle_id)]
        shard = Shard(drafts)
        folder = tmp_path / str(number)
        folder.mkdir()
        answer_all(
            shard, settings(languages="one_other"), ["en", *codes], lambda *_: (GOOD["en"], "stop"), folder, checks
        )
        (first, second) = ({own.language for own in draft.own} for draft in drafts)
        assert first == second and len(first) == 2 and codes[number % 4] not in first


@pytest.mark.parametrize(
    ("plain", "decline", "outcome", "reason"),
    [
        ((NO["es"], "stop"), None, "refused", "says"),
        ((NO["en"], "stop"), None, "refused", "says"),
        ((GOOD["en"], "stop"), None, "other language", "it is 'en'"),
        (("", "stop"), None, "degenerate", "empty"),
        (("arroz " * 60, "stop"), None, "degenerate", ""),
        ((GOOD["es"], "prompt_too_long"), None, "no answer", "prompt_too_long"),
        (("Primero lava el arroz y después", "length"), None, "cut off", "answers.max_new_tokens=128"),
        ((GOOD["es"], "stop"), (GOOD["es"], "stop"), "no refusal", "asked to decline, it did not"),
        ((GOOD["es"], "stop"), (NO["en"], "stop"), "no refusal", "it is 'en'"),
        ((GOOD["es"], "stop"), (NO["es"], "length"), "no refusal", "ended with 'length'"),
        ((GOOD["es"], "stop"), (NO["es"] + " <|im_end|>", "stop"), "no refusal", "im_end"),
        ((GOOD["es"], "stop"), (LOST, "stop"), "no refusal", "only says that it did not understand"),
        ((MIXED, "stop"), None, "other language", "it is not clearly 'es'"),
    ],
)
def test_what_is_not_used_says_why(
    plain: tuple[str, str], decline: tuple[str, str] | None, outcome: str, reason: str, tmp_path: Path, tools: Tools
) -> None:
    def said(how: str, language: str) -> tuple[str, str]:
        if language == "en":
            return good(how, language)
        return plain if how == "plain" else decline or good(how, language)

    own, _ = answered(bundle(), settings(), said, tmp_path, tools)
    assert own["en"].outcome == "kept"
    assert (own["es"].outcome, own["es"].plain) == (outcome, "kept" if outcome == "no refusal" else outcome)
    assert reason in own["es"].reason


@pytest.mark.parametrize(
    ("language", "prompt", "answer", "refusal", "others"),
    [
        (
            "ku",
            "Ez çawa birinc bipêjim?",
            "Pêşî birincê baş bişo, paşê di avê de bikelîne.",
            "Bibore, lê ez nikarim di vê mijarê de alîkariya te bikim.",
            {"en": "it is English"},
        ),
        (
            "ps",
            "زه وریژې څنګه پخې کړم؟",
            "لومړی وریژې ښې ووینځه، بیا یې په اوبو کې وایشوه.",
            "بخښنه غواړم، خو زه په دې کې مرسته نه شم کولی.",
            {"en": "it is English", "es": "letters are not Arabic"},
        ),
    ],
)
def test_answers_in_a_language_that_lingua_does_not_know_are_not_english_nor_in_another_script(
    language: str, prompt: str, answer: str, refusal: str, others: dict[str, str], tmp_path: Path
) -> None:
    tools = Tools(ChecksSection(), Identifier([language]))
    given = bundle(prompts={"en": RICE["en"], language: prompt})

    def made(plain: str, declined: str) -> Draft:
        draft = Draft(given)

        def said(how: str, code: str) -> tuple[str, str]:
            return good(how, code) if code == "en" else (plain if how == "plain" else declined, "stop")

        answer_all(Shard([draft]), settings(), ["en", language], said, tmp_path, tools)
        return draft

    def of(draft: Draft) -> Own:
        return next(own for own in draft.own if own.language == language)

    kept = made(answer, refusal)
    assert (of(kept).outcome, of(kept).answer, of(kept).refusal) == ("kept", answer, refusal)
    for code, reason in others.items():
        own = of(made(GOOD[code], refusal))
        assert own.outcome == "other language" and reason in own.reason
    own = of(made(answer, NO["en"]))
    assert (own.outcome, own.reason) == ("no refusal", "asked to decline: it is English")

    counts = Counts("n")
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "answers": {"model": "m", "languages": "all"}}
    Assembly(parse_config(TranslateConfig, raw), tools, counts).shard(Shard([kept]))
    told = {
        row.split("|")[1].strip(): row
        for row in as_markdown(counts.result()).splitlines()
        if "benign" in row and "|" in row
    }
    assert ["language not confirmed" in told[name] for name in told] == ["English" not in name for name in told]
    assert len(told) == 2


def test_each_refusal_of_the_shipped_recipe_begins_with_an_opening_of_its_language() -> None:
    answers = load_config(TranslateConfig, "recipe:translate/own").answers
    assert answers is not None and len(answers.refusals) == 6 and unlike_openings(answers) == []


def test_an_answer_that_is_cut_off_ends_at_its_last_sentence_or_is_not_used(tmp_path: Path, tools: Tools) -> None:
    def cut(how: str, language: str) -> tuple[str, str]:
        return (f"{GOOD[language]} Y", "length") if how == "plain" else good(how, language)

    own, _ = answered(bundle(), settings(), cut, tmp_path, tools)
    assert own["es"].answer == GOOD["es"] and own["es"].shortened and own["es"].outcome == "kept"
    own, _ = answered(bundle(), settings(cut_off="reject"), cut, tmp_path, tools)
    assert own["es"].outcome == "cut off"
    assert to_last_sentence("It costs 3.5 dollars in all") is None
    assert (
        to_last_sentence("先把米洗干净，然后用水煮，等二十分钟左右就好了。然后")
        == "先把米洗干净，然后用水煮，等二十分钟左右就好了。"
    )
    assert to_last_sentence('He said: "Wash the rice first." And th') == 'He said: "Wash the rice first."'


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (
            "Do it in two steps:\n1. Wash the rice well.\n2. Boil it.\n3.",
            "Do it in two steps:\n1. Wash the rice well.\n2. Boil it.",
        ),
        ("First wash the rice. Take a pot, e.g. a", "First wash the rice."),
        ("First wash the rice. Then ask Dr. Rice", "First wash the rice."),
        ("پہلے چاول اچھی طرح دھو لیں۔ پھر", "پہلے چاول اچھی طرح دھو لیں۔"),
        ("Wash the rice. Then boil it.", "Wash the rice. Then boil it."),
        ("First wash the rice. It costs $3.", "First wash the rice."),
        ("It was built in the year 1990. Then", "It was built in the year 1990."),
        ("Lavez bien le riz froid. Ensuite 2. Faites-le", "Lavez bien le riz froid."),
        ("Run this program first.\n```\nprint('Hi.')\n# It says hi. Then", "Run this program first."),
        ("Run this first:\n```\nprint()\n```\nIt says hi. Then", "Run this first:\n```\nprint()\n```\nIt says hi."),
        ("መጀመሪያ ሩዙን በደንብ እጠበው። ከዚያ", "መጀመሪያ ሩዙን በደንብ እጠበው።"),
        ("ဆန်ကို အရင် သေချာ ဆေးပါ။ ပြီးရင်", "ဆန်ကို အရင် သေချာ ဆေးပါ။"),
        ("ដំបូងលាងអង្ករឱ្យស្អាត។ បន្ទាប់មក", "ដំបូងលាងអង្ករឱ្យស្អាត។"),
        ("पहले चावल अच्छी तरह धो लें। फिर", "पहले चावल अच्छी तरह धो लें।"),
    ],
)
def test_only_a_sentences_end_ends_an_answer(text: str, kept: str) -> None:
    assert to_last_sentence(text) == kept


def test_a_harmful_prompt_is_declined_and_what_complies_is_rejected(tmp_path: Path, tools: Tools) -> None:
    section = settings(kinds=["harmful"])
    own, _ = answered(bundle(kind="harmful"), section, good, tmp_path, tools)
    assert (own["es"].outcome, own["es"].answer, own["es"].refusal) == ("kept", GOOD["es"], NO["es"])

    def refuses(how: str, language: str) -> tuple[str, str]:
        return NO[language], "stop"

    own, _ = answered(bundle(kind="harmful"), section, refuses, tmp_path, tools)
    assert (own["es"].outcome, own["es"].plain) == ("kept", "refused")
    own, asked = answered(bundle(), section, refuses, tmp_path, tools)
    assert own == {} and asked == []  # a benign one, of which nothing is asked


def test_what_a_model_refuses_by_itself_is_its_refusal(tmp_path: Path, tools: Tools) -> None:
    """Also where it declines otherwise, or not at all, when it is asked to."""
    plainly = "Me niego a decirte cómo se hace eso, lo siento mucho."

    def said(how: str, language: str) -> tuple[str, str]:
        if language == "en":
            return good(how, language)
        return (plainly, "stop") if how == "plain" else (GOOD["es"], "stop")

    own, _ = answered(bundle(kind="harmful"), settings(kinds=["harmful"]), said, tmp_path, tools)
    assert (own["es"].outcome, own["es"].refusal, own["es"].plain) == ("kept", plainly, "refused")
    assert own["en"].refusal == NO["en"]
    given = settings(kinds=["harmful"], refusals={"es": NO["es"]})
    own, _ = answered(bundle(kind="harmful"), given, said, tmp_path, tools)
    assert own["es"].refusal == NO["es"]  # of the settings: as it is


def test_a_prompt_whose_refusal_is_all_that_is_used_is_not_asked(tmp_path: Path, tools: Tools) -> None:
    section = settings(kinds=["harmful"], pairs=False, refusals={"es": NO["es"]})
    own, asked = answered(bundle(kind="harmful"), section, good, tmp_path, tools)
    assert asked[0] == RICE["en"] and len(asked) == 2 and "in English," in asked[1]
    assert (own["es"].outcome, own["es"].refusal, own["es"].asked, own["es"].replies) == ("kept", NO["es"], False, [])
    counts = Counts("n")
    for each in own.values():
        counts.own(each, "harmful", identified=True)
    assert {each.language: (each.prompts, each.asked, each.kept) for each in counts.result().own} == {
        "en": (1, 1, 1), "es": (1, 0, 1),
    }  # fmt: skip
    told = settings(kinds=["harmful"], pairs=False, refusals=NO)
    assert answered(bundle(kind="harmful"), told, good, tmp_path, tools)[1] == []
    paired = settings(kinds=["harmful"], refusals=NO)  # what it says complies, and is rejected
    assert answered(bundle(kind="harmful"), paired, good, tmp_path, tools)[1] == [*RICE.values()]


def test_an_answer_that_was_cut_off_is_no_rejected_answer(tmp_path: Path, tools: Tools) -> None:
    def cut(how: str, language: str) -> tuple[str, str]:
        return (
            ("Primero lava el arroz y después", "length") if (how, language) == ("plain", "es") else good(how, language)
        )

    section = settings(kinds=["harmful"])
    given = bundle(kind="harmful", chosen="No way.", rejected="Sure.", answers={"es": AnswerPair("No.", "Claro.")})
    own, _ = answered(given, section, cut, tmp_path, tools)
    [line], _ = assembled(Draft(given, own=list(own.values())), tools, kinds=["harmful"])
    assert json.loads(line)["answers"]["es"] == {"chosen": NO["es"], "rejected": "Claro."}


def assembled(draft: Draft, tools: Tools, **fields: Any) -> tuple[list[str], list[str]]:
    section = {"model": "m", "languages": "all", **fields}
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "answers": section}
    config = parse_config(TranslateConfig, raw)
    files = Assembly(config, tools, Counts("n")).shard(Shard([draft]))
    return files.bundles, files.rejected


def test_own_answers_take_the_place_of_given_ones(tools: Tools) -> None:
    given = bundle(chosen="Wash it.", rejected="No.", answers={"es": AnswerPair("Lávalo.", "No.")})
    kept = [Own(code, GOOD[code], "kept", refusal=NO[code]) for code in RICE]
    [line], rejected = assembled(Draft(given, own=kept), tools)
    assert not rejected
    assert f'"chosen": "{GOOD["en"]}", "rejected": "{NO["en"]}"' in line
    assert GOOD["es"] in line and "Lávalo" not in line
    lost = [Own("en", NO["en"], "refused", "says so"), replace(kept[1])]
    lines, rejected = assembled(Draft(given, own=lost), tools)
    assert lines == [] and any(NO_OWN in row and "refused: says so" in row for row in rejected)
    lost[1] = kept[1]
    [line], rejected = assembled(Draft(given, own=lost), tools, otherwise="given")
    assert "Wash it." in line and GOOD["es"] in line and "Lávalo" not in line
    assert any('"part": "own answer"' in row for row in rejected)
    harmful = bundle(kind="harmful", chosen="No way.", rejected="Sure, wash it.")
    own = [Own("en", "", "kept", refusal=NO["en"], plain="refused")]
    [line], _ = assembled(Draft(harmful, own=own), tools, kinds=["harmful"])
    assert f'"chosen": "{NO["en"]}", "rejected": "Sure, wash it."' in line


def test_own_answers_are_translated_by_a_second_run(tools: Tools) -> None:
    """It translates what the first one wrote, which are the model's own answers and not the given ones."""
    given = bundle(prompts={"en": RICE["en"]}, chosen="Wash it.", rejected="No.")
    own = Own("en", GOOD["en"], "kept", refusal=NO["en"])
    [first], _ = assembled(Draft(given, own=[own]), tools, languages="english")
    draft = Draft(remade(make_bundle(json.loads(first))))
    draft.texts = texts_of(draft, ["es"], answers=True)
    spanish = {texts["en"]: texts["es"] for texts in (RICE, GOOD, NO)}
    for text in draft.texts:
        text.text = spanish[text.source]
    raw = {"name": "n", "sources": [{"path": "b"}], "languages": ["es"], "translator": {"model": "m"}}
    config = parse_config(TranslateConfig, {**raw, "translate_answers": True})
    [second] = Assembly(config, tools, Counts("n")).shard(Shard([draft])).bundles
    row = json.loads(second)
    assert (row["chosen"], row["rejected"], row["pair"]) == (GOOD["en"], NO["en"], json.loads(first)["pair"])
    assert row["answers"] == {"es": {"chosen": GOOD["es"], "rejected": NO["es"]}}


def test_all_that_a_model_said_is_kept_as_labelled_responses(tmp_path: Path, tools: Tools) -> None:
    """Its refusals and its help, used or not, and no refusal of the settings: `mlc-ray openings` reads them."""

    def said(how: str, code: str) -> tuple[str, str]:
        if code == "en":
            return NO["en"], "stop"
        return (GOOD["en"], "length") if how == "plain" else (NO["en"], "length")

    def labelled(own: dict[str, Own]) -> list[tuple[str, str, bool | None, str]]:
        files = Assembly(config, tools, Counts("n")).shard(Shard([Draft(given, own=list(own.values()))]))
        file = tmp_path / "answers.jsonl"
        file.write_text("".join(f"{line}\n" for line in files.answers), encoding="utf-8")
        [line] = files.bundles
        assert f'"chosen": "{NO["en"]}", "rejected": "Sure, wash it."' in line  # not what refuses already
        return [(each.language, each.response, each.refused, each.prompt) for each in read_labelled([str(file)])]

    raw = {"name": "n", "sources": [{"path": "sample:train"}], "answers": {"model": "m", "kinds": ["harmful"]}}
    config, given = (
        parse_config(TranslateConfig, raw),
        bundle(kind="harmful", chosen="No way.", rejected="Sure, wash it."),
    )
    own, _ = answered(given, settings(kinds=["harmful"]), said, tmp_path, tools)
    assert labelled(own) == [
        ("en", NO["en"], True, RICE["en"]),
        ("en", NO["en"], True, RICE["en"]),
        ("es", GOOD["en"], False, RICE["es"]),
        ("es", NO["en"], True, RICE["es"]),
    ]
    own, _ = answered(given, settings(kinds=["harmful"], refusals=NO), said, tmp_path, tools)
    assert labelled(own) == [("en", NO["en"], True, RICE["en"]), ("es", GOOD["en"], False, RICE["es"])]


def test_a_judge_is_checked_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(OwnAnswersError, match=r"answers\.refusals\.en='Sure!' is no refusal.*write another"):
        check_judge(settings(refusals={"en": "Sure!"}), ["en"], tmp_path)
    check_judge(settings(refusals=NO), ["en", "es"], tmp_path)
    with pytest.raises(OwnAnswersError, match=r"answers\.refusals has 'es', which no prompt is in, only en, fr"):
        check_refusals(settings(refusals=NO), ["en", "fr"])
    check_refusals(settings(refusals=NO), ["en", "es", "fr"])
    with pytest.raises(UncoveredLanguageError, match="'fi'"):  # of a refusal, before it is known what prompts are in
        check_judge(settings(refusals={**NO, "fi": "En voi auttaa."}), ["en"], tmp_path)
    with pytest.raises(UncoveredLanguageError, match="'fi'"):
        check_judge(settings(), ["en", "fi"], tmp_path)
    with pytest.raises(ConfigError, match=r"judge='likelihood' runs on prompts alone"):
        settings(judge={"name": "likelihood"})
    with pytest.raises(ConfigError, match=r"judge='qwen3guard' runs an engine.*set judge=refusal"):
        settings(judge={"name": "qwen3guard", "model": "g"})
    with pytest.raises(ConfigError, match=r"translate\.model='t' needs an engine"):
        settings(judge={"name": "refusal", "translate": {"model": "t"}})


def test_texts_that_fail_take_their_language_with_them() -> None:
    draft = Draft(
        bundle(prompts={"en": "How?"}, chosen="So.", rejected="No."),
        texts=[
            Text("es", "prompt", "How?", "¿Cómo?"),
            Text("es", "chosen", "So.", "Así."),
            Text("es", "rejected", "No.", "No.", faults={"copy": "it is the source itself"}),
            Text("fr", "prompt", "How?", None, faults={"no translation": "x"}),
            Text("fr", "chosen", "So.", "Ainsi."),
        ],
    )
    assert draft.prompts() == {"en": "How?", "es": "¿Cómo?"}
    assert draft.translated_answers() == {}
    draft.texts[2].faults.clear()
    assert draft.translated_answers() == {"es": AnswerPair("Así.", "No.")}


def test_an_answer_to_a_prompt_that_was_rejected_since_is_not_used(tools: Tools) -> None:
    german = bundle(prompts={**RICE, "de": "Wie koche ich Reis?"}, chosen="Koch ihn.", response_language="de")
    own = [Own(code, GOOD[code], "kept", refusal=NO[code]) for code in RICE] + [
        Own("fr", "Lavez.", "kept", refusal="Non.")
    ]
    [line], _ = assembled(Draft(german, own=own), tools, otherwise="given")
    made = make_bundle({key: value for key, value in json.loads(line).items() if key != "pair"})
    assert (made.response_language, made.chosen) == ("en", GOOD["en"])
    assert made.answers == {"de": AnswerPair("Koch ihn."), "es": AnswerPair(GOOD["es"], NO["es"])}


def test_an_endpoint_judges_all_shards_in_one_session_under_one_cap(tmp_path: Path, tools: Tools) -> None:
    def verdict(messages: list[dict[str, str]], number: int) -> Step:
        code = re.search(r'"check": "(\w+)"', messages[0]["content"])[1]  # type: ignore[index]
        refuses = "sorry" in messages[1]["content"] or "Lo siento" in messages[1]["content"]
        said = {"check": code, "response": "refuses" if refuses else "answers", "verdict": "safe"}
        return Step(json.dumps(said))

    with serving(verdict) as server:
        endpoint = {"base_url": server.base_url, "model": "m", "cache_dir": str(tmp_path / "replies")}
        own, _ = answered(bundle(), settings(judge={"name": "endpoint", "endpoint": endpoint}), good, tmp_path, tools)
        assert {each.outcome for each in own.values()} == {"kept"} and len(server.bodies) == 4
        price = {"usd_per_million_input_tokens": 1.0, "usd_per_million_output_tokens": 1.0, "max_cost_usd": 1e-6}
        section = settings(judge={"name": "endpoint", "endpoint": {**endpoint, **price, "model": "other"}})
        with pytest.raises(CostCapError, match="4 of 4 requests"):
            answered(bundle(), section, good, tmp_path, tools)


def test_what_passes_and_is_not_in_a_written_bundle_says_why(tools: Tools) -> None:
    texts = [
        Text("es", "prompt", "How?", RICE["es"]),
        Text("es", "chosen", "So.", "No lo haré."),
        Text("es", "rejected", "No.", "No lo haré."),
    ]
    given = bundle(prompts={"en": RICE["en"]}, chosen="So.", rejected="No.")
    [line], rejected = assembled(Draft(given, texts=texts), tools, kinds=["harmful"])
    assert "answers" not in json.loads(line) and "es" in json.loads(line)["prompts"]
    assert [json.loads(row)["checks"].keys() for row in rejected] == [{"incomplete answers"}] * 2

    # With `complete` the language is left out, and all three texts say why.
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "languages": ["es"], "translator": {"model": "m"}}
    for least, written in ((0, 1), (1, 0)):
        complete = parse_config(TranslateConfig, {**raw, "translate_answers": "complete", "min_languages": least})
        draft = Draft(given, texts=[replace(text, faults={}) for text in texts])
        files = Assembly(complete, tools, Counts("n")).shard(Shard([draft]))
        assert len(files.bundles) == written
        assert all(json.loads(line)["prompts"].keys() == {"en"} for line in files.bundles)
        told = [json.loads(row) for row in files.rejected]
        assert [row["part"] for row in told] == ([] if written else ["bundle"]) + ["prompt", "chosen", "rejected"]
    french = bundle(prompts={"en": RICE["en"], "fr": "Comment ?"}, chosen="So.", rejected="No.")
    complete = parse_config(TranslateConfig, {**raw, "translate_answers": "complete", "min_languages": 0})
    files = Assembly(complete, tools, Counts("n")).shard(Shard([Draft(french)]))
    assert json.loads(files.bundles[0])["prompts"].keys() == {"en"}
    (row,) = map(json.loads, files.rejected)
    assert (row["language"], row["part"], row["text"]) == ("fr", "prompt", "Comment ?")
    assert "has no answers in this language" in row["checks"]["incomplete answers"]

    own = [Own("en", NO["en"], "refused", "says so", plain="refused"), Own("es", GOOD["es"], "kept", refusal=NO["es"])]
    draft = Draft(given, texts=[Text("es", "prompt", "How?", RICE["es"])], own=own)
    lines, rejected = assembled(draft, tools)
    assert not lines and [(row["part"], set(row["checks"])) for row in map(json.loads, rejected)] == [
        ("bundle", {NO_OWN}),
        ("prompt", {"bundle rejected"}),
        ("own answer", {"refused"}),
        ("own answer", {"bundle rejected"}),
    ]


def test_a_harmful_bundle_needs_a_rejected_answer_unless_pairs_is_false(tools: Tools) -> None:
    own = Own("en", "", "kept", "it is 'es'", NO["en"], plain="other language")
    harmful = Draft(bundle(kind="harmful", prompts={"en": RICE["en"]}), own=[own])
    lines, rejected = assembled(harmful, tools, kinds=["harmful"])
    assert not lines and any("no rejected answer" in row for row in rejected)
    given = bundle(kind="harmful", prompts={"en": RICE["en"]}, chosen="No.", rejected=NO["en"])
    lines, rejected = assembled(Draft(given, own=[Own("en", "", "kept", refusal=NO["en"])]), tools, kinds=["harmful"])
    assert not lines and any("equal answers" in row for row in rejected)
    own = Own("en", "Sure, wash it.", "kept", refusal=NO["en"])
    [line], _ = assembled(Draft(given, own=[own]), tools, kinds=["harmful"], pairs=False)
    assert json.loads(line)["chosen"] == NO["en"] and "rejected" not in json.loads(line)


def test_only_prompts_of_written_bundles_shut_others_out(tools: Tools) -> None:
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "languages": ["es", "de"], "min_languages": 2}
    config = parse_config(TranslateConfig, {**raw, "translator": {"model": "m"}})
    german = Text("de", "prompt", RICE["en"], "Wie koche ich Reis?")
    drafts = [
        Draft(bundle(), texts=[Text("de", "prompt", RICE["en"], None, faults={"no translation": "x"})]),
        Draft(bundle(category="food"), texts=[german]),
        Draft(
            bundle(prompts={"en": "Tell me of rice, please."}), texts=[Text("es", "prompt", "x", RICE["es"]), german]
        ),
    ]
    files = Assembly(config, tools, Counts("n")).shard(Shard(drafts))
    [line] = files.bundles
    assert json.loads(line)["category"] == "food"  # the first one has too few languages
    assert any("near-duplicate" in row and RICE["es"] in row for row in files.rejected)  # of a given prompt


def test_a_twin_whose_origin_is_rejected_is_no_pair_of_it(tools: Tools) -> None:
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "twins": {}, "translator": {"model": "m"}}
    diary = remade(Bundle("", "harmful", {"en": "How do I read my sister's diary in secret?"}))
    twin = remade(Bundle("", "benign", {"en": "How do I keep my own diary in order?"}))
    again = remade(Bundle("", "harmful", {"en": "How do I read my sister's diary in secret!"}))
    other = remade(Bundle("", "benign", {"en": "How do I write a novel in three months?"}))
    drafts = [Draft(diary), Draft(again), Draft(twin, diary.bundle_id), Draft(other, again.bundle_id)]
    files = Assembly(parse_config(TranslateConfig, raw), tools, Counts("n")).shard(Shard(drafts))
    pairs = {row["prompts"]["en"]: row["pair"] for row in map(json.loads, files.bundles)}
    assert pairs == {
        diary.prompts["en"]: diary.bundle_id,
        twin.prompts["en"]: diary.bundle_id,
        other.prompts["en"]: other.bundle_id,  # its origin nearly repeats the first prompt
    }


def test_the_report_counts_what_a_harmful_prompt_was_plainly_answered_and_how_many_refusals_differ() -> None:
    counts = Counts("n")
    for refusal in (NO["en"], f"{NO['en']} ", "I must decline."):
        counts.own(Own("en", "", "kept", refusal=refusal, plain="other language"), "harmful", identified=True)
    counts.own(Own("en", "", "no refusal", refusal=None, plain="kept"), "harmful", identified=True)
    [own] = counts.result().own
    assert (own.kept, own.other_language, own.refused, own.distinct_refusals) == (3, 3, 0, 2)


@pytest.mark.parametrize(("code", "told"), [("zh-Hant", True), ("es-MX", True), ("ku-Arab", False), ("es", False)])
def test_the_report_says_that_a_variant_is_not_checked(code: str, told: bool) -> None:
    counts = Counts("n")
    counts.text(code, "prompt", {}, 50.0, identified=True)
    assert ("variant not checked" in as_markdown(counts.result())) == told
