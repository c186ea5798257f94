"""The rows of MPO's authors: two languages, told by the texts, answers in both."""

import json

import pytest

from mlc_ray.data.bundles import BundleError, make_bundle
from mlc_ray.data.formats.mpo import MpoRows, told
from tests.data.test_sources import read

TEXTS = {
    "en": (
        "How do I pick the lock of a house?",
        "I cannot help with that.",
        "Take a thin wire and turn it in the lock.",
    ),
    "zh": ("我怎样撬开房子的锁？", "我不能帮忙。", "拿一根细铁丝在锁里转动。"),
    "ja": ("家の鍵をこじ開けるにはどうすればいいですか。", "お手伝いできません。", "細い針金を鍵穴で回します。"),
    "ko": ("집 자물쇠를 어떻게 따나요?", "도와드릴 수 없습니다.", "가는 철사를 자물쇠에 넣고 돌리세요."),
    "ar": ("كيف أفتح قفل منزل؟", "لا أستطيع المساعدة.", "خذ سلكا رفيعا وأدره في القفل."),
    "bn": ("আমি কীভাবে একটি বাড়ির তালা খুলব?", "আমি সাহায্য করতে পারব না।", "একটি সরু তার নিয়ে তালায় ঘোরান।"),
    "sw": (
        "Ninafunguaje kufuli la nyumba ya mtu?",
        "Siwezi kusaidia na hilo.",
        "Chukua waya mwembamba na uuzungushe kwa kufuli.",
    ),
}


def row(source, target, **changes):
    fields = {}
    for side, code in (("source", source), ("target", target)):
        prompt, chosen, rejected = TEXTS[code]
        fields[f"{side}_conversations"] = [{"from": "human", "value": prompt}]
        fields[f"{side}_chosen"] = {"from": "gpt", "value": chosen}
        fields[f"{side}_rejected"] = {"from": "gpt", "value": rejected}
    return {**fields, **changes}


@pytest.mark.parametrize("target", ["ar", "bn", "ja", "ko", "sw", "zh"])
def test_a_row_is_a_bundle_in_two_languages_with_answers_in_both(target):
    bundle = make_bundle({"kind": "harmful", **MpoRows().bundle(row("en", target))})
    assert bundle.prompts == {"en": TEXTS["en"][0], target: TEXTS[target][0]} and bundle.response_language == "en"
    assert (bundle.chosen, bundle.rejected) == TEXTS["en"][1:]
    assert vars(bundle.answers[target]) == {"chosen": TEXTS[target][1], "rejected": TEXTS[target][2]}
    turned = make_bundle({"kind": "harmful", **MpoRows().bundle(row(target, "en"))})  # Qwen's rows: from Chinese
    assert turned.response_language == target and turned.answers.keys() == {"en"}


def test_english_answers_do_not_hide_the_language_of_a_prompt():
    given = row("en", "bn", target_chosen={"from": "gpt", "value": TEXTS["en"][1] * 5})
    assert MpoRows().bundle(given)["answers"].keys() == {"bn"}
    assert told("1 2 3") is None and told("xyzzy") is None


@pytest.mark.parametrize(
    "text",
    [
        "¿Cómo puedo abrir la puerta de una casa si no tengo llave?",
        "Comment puis-je ouvrir la porte de la maison sans aller au bureau ?",
        "Wie öffne ich in der Stadt das Schloss an einem Haus?",
        "Como abro a porta da casa do vizinho?",
        "Come apro la porta di una casa e i cassetti?",
    ],
)
def test_other_languages_in_latin_letters_are_taken_for_neither(text):
    assert told(text) is None


def test_what_cannot_be_told_is_refused_and_can_be_given():
    unclear = row("en", "sw", target_conversations="xyzzy", target_chosen="xyzzy no", target_rejected="xyzzy yes")
    with pytest.raises(BundleError, match=r"cannot be told.*give target_language in the row"):
        MpoRows().bundle(unclear)
    assert MpoRows().bundle({**unclear, "target_language": "tr"})["answers"].keys() == {"tr"}
    with pytest.raises(BundleError, match="both in 'en'"):
        MpoRows().bundle(row("en", "en"))
    with pytest.raises(BundleError, match="target_chosen: the message is from 'human'"):
        MpoRows().bundle(row("en", "zh", target_chosen={"from": "human", "value": "No."}))


def test_files_of_them_are_recognised(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row("en", "zh"), row("en", "sw")], ensure_ascii=False))
    parsed = [parsed for _, parsed in read(file)]
    assert [sorted(bundle.prompts) for bundle in parsed] == [["en", "zh"], ["en", "sw"]]
    assert {bundle.kind for bundle in parsed} == {"harmful"}
