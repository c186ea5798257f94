"""The shipped sample keeps the promises of its data card."""

import json
from collections import Counter, defaultdict
from itertools import combinations
from statistics import mean

import pytest

from mlc_ray.data.bundles import make_bundle
from mlc_ray.data.sources import sample_path
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.types import Answer

COUNTS = {"train": 96, "large": 720, "select": 120, "test": 120}
LANGUAGES = {"en", "zh", "ru", "ja", "ar", "bn", "sw", "ur", "ps", "ku", "es", "fr"}
SIX = {"en", "zh", "ru", "ja", "ar", "es"}
SCRIPTS = {  # a range that most letters of the language lie in
    "zh": ("\u4e00", "\u9fff"),
    "ja": ("\u3040", "\u9fff"),
    "ru": ("\u0400", "\u04ff"),
    "ar": ("\u0600", "\u06ff"),
    "ur": ("\u0600", "\u06ff"),
    "ps": ("\u0600", "\u06ff"),
    "bn": ("\u0980", "\u09ff"),
}


def load(split):
    return [json.loads(line) for line in sample_path(split).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def splits():
    return {split: load(split) for split in COUNTS}


def shingles(text, size=5):
    text = " ".join(text.casefold().split())
    return {text[i : i + size] for i in range(len(text) - size + 1)}


def test_counts_kinds_and_languages(splits):
    assert {split: len(rows) for split, rows in splits.items()} == COUNTS
    for split, rows in splits.items():
        assert Counter(row["kind"] for row in rows) == {"harmful": len(rows) // 2, "benign": len(rows) // 2}
        for row in rows:
            assert row["prompts"].keys() == (SIX if split == "large" else LANGUAGES)
            bundle = make_bundle({key: value for key, value in row.items() if key != "split"})
            assert bundle.chosen and bundle.rejected


def test_every_pair_is_a_harmful_and_a_benign_bundle_of_one_form(splits):
    for rows in splits.values():
        pairs = defaultdict(dict)
        for row in rows:
            pairs[row["pair"]][row["kind"]] = row
        for name, pair in pairs.items():
            assert pair.keys() == {"harmful", "benign"}, name
            for language in pair["benign"]["prompts"]:
                first, second = (pair[kind]["prompts"][language] for kind in ("harmful", "benign"))
                assert 0.7 < len(first) / len(second) < 1.4, (name, language)
                assert first[-1] == second[-1], (name, language)


def test_length_does_not_tell_the_kinds_apart(splits):
    for rows in splits.values():
        for language in rows[0]["prompts"]:
            lengths = {
                kind: [len(row["prompts"][language]) for row in rows if row["kind"] == kind]
                for kind in ("harmful", "benign")
            }
            assert mean(lengths["harmful"]) == pytest.approx(mean(lengths["benign"]), rel=0.08)
        for answer in ("chosen", "rejected"):
            words = {
                kind: mean(len(row[answer].split()) for row in rows if row["kind"] == kind)
                for kind in ("harmful", "benign")
            }
            assert words["harmful"] == pytest.approx(words["benign"], rel=0.15)


def test_files_share_no_near_duplicates(splits):
    for one, other in combinations(splits, 2):
        theirs = [shingles(row["prompts"]["en"]) for row in splits[one]]
        for row in splits[other]:
            mine = shingles(row["prompts"]["en"])
            nearest = max(len(mine & each) / len(mine | each) for each in theirs)
            assert nearest < 0.5, row["prompts"]["en"]
    everything = [row["prompts"]["en"] for rows in splits.values() for row in rows]
    assert len(set(everything)) == len(everything)
    closest = max(len(a & b) / len(a | b) for a, b in combinations(map(shingles, everything), 2))
    assert closest < 0.7


def test_prompts_are_in_the_script_of_their_language(splits):
    for rows in splits.values():
        for row in rows:
            for language, (low, high) in [(code, ends) for code, ends in SCRIPTS.items() if code in row["prompts"]]:
                letters = [c for c in row["prompts"][language] if c.isalpha()]
                assert sum(low <= c <= high for c in letters) > 0.85 * len(letters), row["prompts"][language]


def test_answers_are_what_they_should_be(splits):
    judge = RefusalJudge()
    wanted = {
        ("harmful", "chosen"): "refused",
        ("harmful", "rejected"): "complied",
        ("benign", "chosen"): "complied",
        ("benign", "rejected"): "refused",
    }
    for rows in splits.values():
        for row in rows:
            for answer in ("chosen", "rejected"):
                (verdict,) = judge.judge([Answer(row["prompts"]["en"], row[answer], "en", row["kind"])])
                assert verdict.behaviour == wanted[row["kind"], answer], row[answer]
