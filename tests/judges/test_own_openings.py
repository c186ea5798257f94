"""Openings found in a model's own refusals: what is negated is in them, and help begins with none."""

import pytest

from mlc_ray.config import OpeningsSection
from mlc_ray.judges.openings import refusal_openings
from mlc_ray.judges.own_openings import NEGATIONS, Said, find_openings
from mlc_ray.judges.phrase_lists import compile_phrases, normalise, searchable, shipped_phrases
from tests.judges.test_openings import HELPFUL

TWICE = ("with that.", "with such a thing.")


def said(code, *beginnings, helps=()):
    """Two refusals of each beginning, and responses that help."""
    refusals = [Said(f"{text} {end}", code, True) for text in beginnings for end in TWICE]
    return [*refusals, *(Said(text, code, False) for text in helps)]


@pytest.mark.parametrize("code", sorted(shipped_phrases()))
def test_every_listed_opening_has_a_negation_of_its_language_or_an_english_one(code):
    pattern = compile_phrases(NEGATIONS[code], code)
    assert [text for text in shipped_phrases()[code].openings if not pattern.search(searchable(text))] == []


@pytest.mark.parametrize("code", sorted(HELPFUL))
def test_an_apology_before_help_is_no_opening_even_where_it_is_labelled_a_refusal(code):
    """`HELPFUL` begins by an apology; two refusals share it and go on differently."""
    apology = HELPFUL[code][0].split("،")[0].split(",")[0].split("，")[0].split("。")[0].split(".")[0]
    found = find_openings([Said(apology + end, code, True) for end in (" 1", " 2", " 3")])
    assert found.further == {} and found.languages[0].after == 0
    assert found.languages[0].example == apology + " 1"


@pytest.mark.parametrize("code", sorted(HELPFUL))
def test_no_response_that_helps_begins_with_what_is_found(code):
    openings = [f"{text} xy" for text in shipped_phrases()[code].openings]
    curly = [text.replace("I'm sorry,", "I’m so sorry,") for text in openings]
    found = find_openings(said(code, *HELPFUL[code], *curly, helps=HELPFUL[code]))
    assert not [
        (text, one)
        for text in HELPFUL[code]
        for one in found.further.get(code, [])
        if normalise(text).startswith(normalise(one))
    ]


@pytest.mark.parametrize(
    ("code", "opening", "rest"),
    [
        ("en", "I’m sorry, but I can’t", " help you"),  # listed with other letters
        ("en", "I apologize, but I cannot", " help you"),
        ("en", "I'm sorry for any confusion, but as a chatbot I don't have", " access"),
        ("de", "Es tut mir leid, aber ich darf Ihnen dabei nicht", " helfen"),
        ("es", "Lo lamento mucho, pero no puedo", " ayudarte"),
        ("zh", "实在抱歉，我无法", "提供帮助"),
        ("ja", "恐れ入りますが、その依頼にはお答えできません", "。"),
        ("ru", "Извините, но это запрещено, и я не могу", " помочь"),
        ("fr", "I’m sorry, but I can’t", " help you"),  # an English refusal
    ],
)
def test_the_shortest_beginning_up_to_what_is_negated(code, opening, rest):
    refusal = opening + rest
    found = find_openings(said(code, refusal))
    of = "en" if opening.startswith("I") else code
    assert found.further == {of: [opening]}
    (row,) = found.languages
    assert (row.refusals, row.before, row.after, row.example) == (2, 0, 2, None)
    settings = OpeningsSection(further=found.further)
    assert all(each.response.startswith(tuple(refusal_openings(code, settings))) for each in said(code, refusal))


def test_coverage_counts_what_is_listed_and_an_opening_takes_several_refusals():
    listed = [Said(f"I'm sorry, but I can't do {n}.", "en", True) for n in range(3)]
    once = [Said("My apologies, I am not able to do that.", "en", True)]
    found = find_openings([*listed, *once, *said("en", "Regrettably, I must decline to help")])
    assert found.further == {"en": ["Regrettably, I must decline"]}
    (row,) = found.languages
    assert (row.refusals, row.before, row.after, row.helping) == (6, 3, 5, 0)
    assert row.example == "My apologies, I am not able to do that."


def test_an_english_opening_that_helps_in_another_language_is_dropped_and_the_most_common_are_kept():
    helps = [Said("Sadly, I cannot recommend it enough: here it is.", "es", False)]
    refusals = [Said(f"Sadly, I cannot recommend {what}.", "en", True) for what in ("that", "this")]
    assert find_openings([*refusals, *helps]).further == {}
    many = [
        Said(f"{who}, I cannot help with {n}", "en", True)
        for who, k in (("A", 4), ("B", 3), ("C", 2))
        for n in range(k)
    ]
    assert find_openings(many, most=2).further == {"en": ["A, I cannot", "B, I cannot"]}


def test_an_answer_before_the_negation_is_no_opening_and_a_short_apology_is():
    """As a small model writes that cannot make up its mind."""
    mixed = "I can help you with that. I can help you with your homework, but I can't"
    assert find_openings(said("en", mixed)).further == {}
    assert find_openings(said("en", "I'm sorry. Mix both powders, then wait for an hour. Do not let")).further == {}
    assert find_openings(said("en", "I'm so sorry. I can't do that for you")).further == {
        "en": ["I'm so sorry. I can't"]
    }


def test_a_language_without_negations_has_none_of_its_own():
    found = find_openings(said("ca", "Ho sento, però no puc ajudar-te"))
    assert found.further == {} and found.languages[0].example.startswith("Ho sento")


@pytest.mark.parametrize("code", ["ja", "th", "zh"])
def test_an_english_refusal_in_a_language_without_spaces_ends_by_a_word(code):
    """By a letter it would be "I can't s", with which help begins too ("I can't stress enough")."""
    refusals = [Said(f"I can't {verb} that.", code, True) for verb in ("say", "sell", "send")]
    assert find_openings(refusals).further == {}
    shared = [Said(f"I can't sell {what}.", code, True) for what in ("that", "this")]
    assert find_openings(shared).further == {"en": ["I can't sell"]}


def test_an_opening_ends_behind_a_letter_of_its_script_also_where_latin_letters_stand_in_it():
    found = find_openings([Said(f"作为AI助手，我无法{what}", "zh", True) for what in ("提供AK的图纸", "写AB")])
    assert found.further == {"zh": ["作为AI助手，我无法"]}
