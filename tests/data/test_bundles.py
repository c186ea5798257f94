from collections import Counter

import pytest

from mlc_ray.data.bundles import BundleError, make_bundle, select_languages
from mlc_ray.data.tables import bundle_columns
from mlc_ray.types import AnswerPair, Bundle

GOOD = {
    "kind": "benign",
    "prompts": {"en": "How do I boil an egg?", "zh-Hant": "怎麼煮蛋？"},
    "chosen": "Eight minutes.",
    "rejected": "No.",
}


def test_a_good_row_becomes_a_bundle_and_a_row_of_the_table():
    bundle = make_bundle({**GOOD, "source": "handmade", "category": None, "pair": "7"})
    assert (bundle.kind, bundle.response_language, bundle.source, bundle.category) == ("benign", "en", "handmade", "")
    assert bundle.pair == "7" and make_bundle(GOOD).pair == ""
    row = bundle_columns(bundle)
    prompts = dict(zip(row.pop("languages"), row.pop("texts"), strict=True))
    assert row.pop("answers") == []
    assert Bundle(prompts=prompts, **row) == bundle
    assert bundle_columns(bundle, ["zh-Hant"])["texts"] == ["怎麼煮蛋？"]


def test_the_id_is_the_content_and_nothing_else():
    bundle = make_bundle(GOOD)
    labels = {"source": "elsewhere", "category": "x", "pair": "7"}
    reordered = {**GOOD, "prompts": dict(reversed(GOOD["prompts"].items())), **labels}
    assert make_bundle(reordered).bundle_id == bundle.bundle_id
    assert make_bundle({**GOOD, "bundle_id": bundle.bundle_id}) == bundle
    further = {"zh-Hant": {"chosen": "八分鐘。"}}
    for key, value in {"kind": "harmful", "chosen": "Nine.", "prompts": {"en": "How?"}, "answers": further}.items():
        assert make_bundle({**GOOD, key: value}).bundle_id != bundle.bundle_id
    with pytest.raises(BundleError, match=f"'0123'.*'{bundle.bundle_id}'"):
        make_bundle({**GOOD, "bundle_id": "0123"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompts": None}, "prompts is missing"),
        ({"prompts": {}}, "prompts is empty"),
        ({"prompts": "How?"}, "'How\\?', not a mapping"),
        ({"prompts": {"en": None}}, r"prompts\['en'\] is None, not text"),
        ({"prompts": {"en": 3}}, r"prompts\['en'\] is 3, not text"),
        ({"prompts": {"en": " \n"}}, r"prompts\['en'\] is blank: ' \\n'"),
        ({"prompts": {"english": "x"}}, "'english' is not a language code"),
        ({"prompts": {"zh-hant": "x"}}, "'zh-hant' is not a language code"),
        ({"prompts": {"zh_CN": "x"}}, "'zh_CN' is not a language code"),
        ({"prompts": {"en": "\ud83d"}}, "not valid Unicode"),
        ({"kind": None}, "kind is missing"),
        ({"kind": "harmles"}, "'harmles' is unknown; did you mean 'harmful'"),
        ({"kind": ["benign"]}, "is unknown"),
        ({"chosen": ""}, "chosen is blank: ''"),
        ({"chosen": ["a"]}, r"chosen is \['a'\], not text"),
        ({"chosen": None}, "rejected is given .* but chosen is not"),
        ({"chosen": "No. "}, "the same: 'No. '"),
        ({"response_language": "fr"}, "in 'fr', but there is no prompt in it"),
        ({"response_language": "French"}, "response_language: 'French'"),
        ({"category": 3}, "category is 3"),
        ({"answers": ["x"]}, r"answers is \['x'\], not a mapping"),
        ({"answers": {"zh-Hant": "八"}}, r"answers\['zh-Hant'\] is '八', not a mapping of chosen and rejected"),
        ({"answers": {"zh-Hant": {"chosen": "八", "x": "y"}}}, "not a mapping of chosen and rejected to texts"),
        ({"answers": {"zh-Hant": {"chosen": " "}}}, r"answers\['zh-Hant'\]\['chosen'\] is blank"),
        ({"answers": {"zh-Hant": {"rejected": "不"}}}, r"answers\['zh-Hant'\] has rejected \('不'\) but not chosen"),
        ({"answers": {"zh-Hant": {"chosen": "不", "rejected": "不 "}}}, "the same: '不'"),
        ({"answers": {"en": {"chosen": "x"}}}, "answers in 'en', the response_language, stand in chosen and rejected"),
        ({"answers": {"fr": {"chosen": "x"}}}, r"answers\['fr'\] answers no prompt: there is none in 'fr'"),
        ({"answers": {"chinese": {"chosen": "x"}}}, "answers: 'chinese' is not a language code"),
        (
            {"answers": {"zh-Hant": {"chosen": "x"}}, "chosen": None, "rejected": None},
            "answers are given in zh-Hant, but chosen is not, the answer in 'en'",
        ),
        ({"promts": {}}, "unknown key 'promts'; did you mean 'prompts'"),
    ],
)
def test_each_violation_is_refused_with_its_value(change, reason):
    with pytest.raises(BundleError, match=reason):
        make_bundle({**GOOD, **change})


def test_answers_in_further_languages_are_kept_with_their_prompts():
    """A column of Parquet has each language in every row, null where a row has none."""
    answers = {
        "zh-Hant": {"chosen": "八分鐘。", "rejected": None},
        "fr": None,
        "en": {"chosen": None, "rejected": None},
    }
    bundle = make_bundle({**GOOD, "answers": answers})
    assert bundle.answers == {"zh-Hant": AnswerPair("八分鐘。")}
    assert bundle_columns(bundle)["answers"] == [{"language": "zh-Hant", "chosen": "八分鐘。", "rejected": None}]
    assert bundle_columns(bundle, ["en"])["answers"] == []


@pytest.mark.parametrize("code", ["en", "yue", "zh-Hant", "pt-BR", "zh-Hant-TW", "es-419"])
def test_language_codes_of_any_language_are_taken(code):
    assert make_bundle({"kind": "harmful", "prompts": {code: "x"}}).prompts == {code: "x"}


def test_selecting_languages_never_orphans_an_answer():
    bundle = make_bundle(GOOD)
    assert select_languages(bundle, None) == ["en", "zh-Hant"]
    assert select_languages(bundle, ["fr", "en"]) == ["en"]
    with pytest.raises(BundleError, match=r"none of data\.languages=\['fr'\].*\['en', 'zh-Hant'\]"):
        select_languages(bundle, ["fr"])
    with pytest.raises(BundleError, match=r"data\.languages=\['zh-Hant'\] leaves out 'en'"):
        select_languages(bundle, ["zh-Hant"])
    unanswered = make_bundle({**GOOD, "chosen": None, "rejected": None})
    assert select_languages(unanswered, ["zh-Hant"]) == ["zh-Hant"]


def test_some_other_languages_are_those_with_answers_and_then_drawn_alike_for_twins():
    codes = ["ar", "en", "es", "fr", "sw"]
    drawn = Counter()
    for number in range(400):
        prompts = {code: f"{number} {code}" for code in codes}
        harmful, benign = (
            make_bundle({"kind": kind, "prompts": {c: f"{kind} {p}" for c, p in prompts.items()}, "pair": f"p{number}"})
            for kind in ("harmful", "benign")
        )
        one, two = (select_languages(harmful, None, others) for others in (1, 2))
        assert one == select_languages(benign, None, 1) and len(one) == 2 and len(two) == 3 and {*one} < {*two}
        drawn.update(one)
        raw = {**vars(harmful), "bundle_id": None}
        given = make_bundle({**raw, "chosen": "No.", "answers": {"fr": {"chosen": "Non."}}})
        assert select_languages(given, None, 1) == ["en", "fr"] and "fr" in select_languages(given, None, 3)
        assert select_languages(harmful, ["en", "sw"], 3) == ["en", "sw"]
        assert select_languages(harmful, None, 9) == codes
        # Drawn from the languages of the data: of one that this bundle lacks the next is taken, and others stay.
        lacking = make_bundle(
            {**raw, "prompts": {code: text for code, text in harmful.prompts.items() if code != "fr"}}
        )
        expected = select_languages(harmful, codes, 1)
        assert select_languages(lacking, codes, 1) == (["en", "sw"] if "fr" in expected else expected)
    assert drawn.pop("en") == 400 and all(70 < count < 130 for count in drawn.values()) and len(drawn) == 4
