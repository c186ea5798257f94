"""The language that a response is in, by real lingua on real texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlc_ray.judges import languages
from mlc_ray.judges.languages import Identifier

ROWS = [json.loads(line) for line in (Path(__file__).parent / "languages" / "texts.jsonl").open(encoding="utf-8")]
SAMPLE = ("ar", "bn", "en", "es", "fr", "ja", "ku", "ps", "ru", "sw", "ur", "zh")
ENGLISH = "I'm sorry, but I can't help you make a weapon."


@pytest.fixture(scope="module")
def identifier() -> Identifier:
    return Identifier({row["language"] for row in ROWS})


@pytest.fixture(scope="module")
def sample() -> Identifier:
    return Identifier(SAMPLE)


def labelled() -> list[dict[str, str]]:
    """The labelled responses that are no gibberish; no threshold was fitted to them."""
    files = sorted((Path(__file__).parent / "labelled").glob("*.jsonl"))
    rows = [{**json.loads(line), "asked": file.stem} for file in files for line in file.open(encoding="utf-8")]
    return [row for row in rows if row["label"] != "degenerate"]


def test_labelled_responses_are_told_right_also_where_they_are_in_another_language() -> None:
    rows = labelled()
    identifier = Identifier({row["asked"] for row in rows})
    rows = [row for row in rows if identifier.reads(row["asked"])]
    told = identifier.told([row["response"] for row in rows], [row["asked"] for row in rows])
    found = list(zip(rows, told, strict=True))
    own = [(row, code) for row, code in found if row["kind"] not in ("english_refusal", "other_language_help")]
    wrong = [(row["asked"], code, row["response"]) for row, code in own if code not in (row["asked"], None)]
    assert len({row["asked"] for row in rows}) == 21 and len(own) > 1400 and len(wrong) <= 1, wrong
    untold = [row["response"] for row, code in own if code is None]
    assert len(untold) < 0.03 * len(own) and sum(len(text) < 30 for text in untold) > len(untold) / 2
    assert {code for row, code in found if row["kind"] == "english_refusal"} == {"en"}
    assert all(code not in (row["asked"], None) for row, code in found if row["kind"] == "other_language_help")


def test_none_of_the_texts_is_told_wrong_and_nearly_all_are_told(identifier: Identifier) -> None:
    texts = [row for row in ROWS if identifier.reads(row["language"])]
    told = identifier.told([row["text"] for row in texts], [row["language"] for row in texts])
    assert [(row, code) for row, code in zip(texts, told, strict=True) if code not in (row["language"], None)] == []
    assert told.count(None) <= 0.06 * len(told)  # Danish or Norwegian, Persian or Urdu, sentences full of names


@pytest.mark.parametrize("language", sorted(set(SAMPLE) - {"ku", "ps"}))
def test_the_languages_of_the_sample_are_told(language: str, sample: Identifier) -> None:
    texts = [row["text"] for row in ROWS if row["language"] == language]
    told = sample.told(texts, [language] * len(texts))
    assert len(texts) >= 10 and set(told) <= {language, None} and told.count(None) <= 1


def test_what_a_text_is_asked_in_changes_nothing_but_the_name_of_what_is_one(identifier: Identifier) -> None:
    texts = ["Lo siento, pero no puedo ayudarte con eso.", "很抱歉，我无法提供这方面的帮助。", ENGLISH]
    for asked in ("ja", "en-GB", "zh-Hant", "es"):
        assert identifier.told(texts, [asked] * 3) == ["es", "zh", "en"]
    norwegian = "Beklager, men jeg kan ikke hjelpe deg med å lage noe slikt."
    assert identifier.told([norwegian] * 4, ["no", "nb", "nn", "en"]) == ["no", "nb", "nn", "nb"]
    croatian = "Žao mi je, ali ne mogu pomoći s tim. Ulazak u tuđu kuću protuzakonit je."
    assert identifier.told([croatian] * 3, ["sr-Latn", "bs", "es"]) == ["sr", "bs", "hr"]


def test_nothing_is_told_where_there_is_little_to_go_by(identifier: Identifier) -> None:
    code = "```python\ndef mean(values):\n    return sum(values) / len(values)\n```"
    cut = "```\nfor line in open(name):\n    print(line)"
    for text in ("", "1, 2, 3, 5, 8, 13", "42", "Paris.", code, cut, "`rm -r build`", "https://example.org/about-us"):
        assert identifier.told([text], ["es"]) == [None], text
    assert identifier.told([f"Esta función calcula la media de los valores:\n{code}"], ["es"]) == ["es"]
    assert identifier.told(["አዝናለሁ፣ በዚህ ጉዳይ ልረዳዎት አልችልም።"], ["es"]) == [None]  # in no language that is compared


def test_loan_words_and_names_do_not_change_the_language(identifier: Identifier) -> None:
    for asked, text in (
        ("ja", "Pythonのlistにはappendメソッドがあり、for loopで各itemを処理できます。"),
        ("zh", "你可以在 GitHub 上 fork 这个 repository，然后提交 pull request。"),
        ("hi", "आप अपने Windows laptop पर Settings खोलकर Wi-Fi को फिर से चालू कर सकते हैं।"),
        ("ru", "Откройте редактор Visual Studio Code и установите в нём расширение для языка Python."),
        ("de", "Das Meeting mit dem Team ist gecancelt, wir machen morgen ein Update per Mail."),
    ):
        assert identifier.told([text], [asked]) == [asked], text


def test_languages_that_lingua_does_not_know_are_not_told_whatever_the_response(identifier: Identifier) -> None:
    unknown = [row for row in ROWS if row["language"] in ("ku", "ps")]
    told = identifier.told([row["text"] for row in unknown], [row["language"] for row in unknown])
    assert told == [None] * len(unknown) and len(unknown) >= 6
    assert identifier.told([ENGLISH, ENGLISH], ["ps", "ku"]) == [None, None]
    assert identifier.unknown == {"ku", "ps"}


@pytest.mark.parametrize("language", ["ku", "ps", "jv"])
def test_of_a_language_that_lingua_does_not_know_english_alone_is_a_fault(
    language: str, identifier: Identifier
) -> None:
    """Kurdish is Turkish to lingua, and Javanese Indonesian; none of it is English."""
    rows = [row for row in labelled() if row["asked"] == language]
    english = [row["response"] for row in rows if row["kind"] == "english_refusal"]
    own = [row["response"] for row in rows if row["kind"] not in ("english_refusal", "other_language_help")]
    own += [row["text"] for row in ROWS if row["language"] == language]
    sample = (Path(languages.__file__).parents[1] / "data" / "sample" / "test.jsonl").open(encoding="utf-8")
    own += [prompts[language] for line in sample if language in (prompts := json.loads(line)["prompts"])]
    assert len(english) > 1 and len(own) > 40
    little = ("", "Sure.", "```\nfor line in open(name): print(line.strip())\n```", "https://example.org/about/us")
    for compared in (Identifier([language]), identifier):  # which compares more, so that each has a smaller share
        if language in compared.unknown:
            assert {compared.fault(text, language, 0.2) for text in english} == {"it is English"}
            assert [text for text in (*own, *little) if compared.fault(text, language, 0.2) is not None] == []


def test_the_identity_names_what_is_compared() -> None:
    few, more = Identifier(["en", "es"]), Identifier(["en", "es", "hi"])
    assert few.identity == Identifier(["es", "en-GB"]).identity != more.identity
    assert few.identity.startswith("lingua 2.") and " pt " in few.identity and " mr " in more.identity
    assert " ps " not in few.identity and " ku " not in few.identity
