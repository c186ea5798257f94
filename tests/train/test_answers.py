"""Bundles that lack answers which the loss reads are named before a model is loaded, and without Ray."""

from dataclasses import replace

import pytest

from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.train import run
from mlc_ray.train.answers import MissingAnswersError, check_answers
from tests.data.files import write_rows
from tests.train.tiny import random_rows, tiny_config, translated


@pytest.fixture
def made(tmp_path):
    """Token rows of nine bundles, some of which lack answers (index -> those it has), from nine lines of a file."""

    def make(answers, **sections):
        rows, file = random_rows(9), tmp_path / "bundles.jsonl"
        for index, given in answers.items():
            rows[index] = replace(rows[index], **{n: None for n in ("chosen", "rejected") if n not in given})
        table = rows_to_table(rows)
        table = table.append_column("file", [[str(file)] * 9]).append_column("line", [range(1, 10)])
        folder = tmp_path / "tokens"
        folder.mkdir()
        write_rows(folder, [table[:4], table[4:]], fingerprint="x", rejected={})
        return tiny_config(**sections), TokenArtifact.open(folder), [row.bundle_id for row in rows], file

    return make


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo"])
def test_bundles_without_a_rejected_answer_are_named(made, loss):
    config, tokens, ids, file = made({2: ["chosen"], 7: ["chosen"]}, objective={"loss": loss})
    with pytest.raises(MissingAnswersError) as caught:
        check_answers(config, tokens)
    assert str(caught.value).splitlines() == [
        f"objective.loss='{loss}' needs chosen and rejected answers; bundles without a rejected answer: 2 of 9",
        f"  {file}:3: bundle {ids[2]} has no rejected answer",
        f"  {file}:8: bundle {ids[7]} has no rejected answer",
        "Complete these rows, leave them out, or choose a loss that needs no rejected answers: objective.loss=sft.",
    ]


def test_only_the_first_few_are_named(made):
    config, tokens, _, file = made({index: ["chosen"] for index in range(1, 9)})
    with pytest.raises(MissingAnswersError, match="without a rejected answer: 8 of 9") as caught:
        check_answers(config, tokens)
    lines = str(caught.value).splitlines()
    assert [line.partition(" bundle ")[0] for line in lines[1:6]] == [f"  {file}:{n}:" for n in range(2, 7)]
    assert lines[6] == "  and 3 more"


def test_a_loss_that_reads_no_rejected_answer_asks_for_none(made):
    config, tokens, *_ = made({2: ["chosen"]}, objective={"loss": "sft"})
    check_answers(config, tokens)


def test_every_loss_needs_a_chosen_answer(made):
    config, tokens, ids, file = made({0: [], 5: ["chosen"]}, objective={"loss": "sft"})
    with pytest.raises(MissingAnswersError) as caught:
        check_answers(config, tokens)
    assert str(caught.value).splitlines() == [
        "objective.loss='sft' needs chosen answers; bundles without a chosen answer: 1 of 9",
        f"  {file}:1: bundle {ids[0]} has no chosen answer",
        "Complete these rows or leave them out.",
    ]


def test_both_answers_may_be_missing(made):
    config, tokens, ids, file = made({0: [], 5: ["chosen"]})
    with pytest.raises(
        MissingAnswersError, match="without a chosen answer: 1 of 9, without a rejected answer: 2 of 9"
    ) as caught:
        check_answers(config, tokens)
    assert f"  {file}:1: bundle {ids[0]} has no chosen and no rejected answer" in str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("objective", "answer"), [({"loss": "mpo"}, "rejected"), ({"loss": "sft", "answers": "all"}, "chosen")]
)
def test_a_language_without_an_answer_is_named(tmp_path, objective, answer):
    rows, file = translated(random_rows(6)), tmp_path / "bundles.jsonl"
    lacking = {
        "chosen": [one for one in rows[1].answers if rows[1].languages[one["prompt"]] != "sw"],
        "rejected": [{**one, "rejected": None} for one in rows[1].answers],
    }
    rows[1] = replace(rows[1], answers=lacking[answer])
    table = rows_to_table(rows).append_column("file", [[str(file)] * 6]).append_column("line", [range(1, 7)])
    write_rows(tmp_path, [table], fingerprint="x", rejected={})
    with pytest.raises(MissingAnswersError) as caught:
        check_answers(tiny_config(objective=objective), TokenArtifact.open(tmp_path))
    head, place, fix = str(caught.value).splitlines()
    assert head.startswith(f"objective.loss={objective['loss']!r} as it is set needs ")
    assert head.endswith(f"answers in each language of a bundle; bundles without a {answer} answer in one: 1 of 6")
    where = "sw" if answer == "chosen" else "ar, sw"
    assert place == f"  {file}:2: bundle {rows[1].bundle_id} has no {answer} answer in {where}"
    assert "data.languages" in fix
    check_answers(tiny_config(), TokenArtifact.open(tmp_path))  # English alone is all that DPO reads


def test_languages_that_no_bundle_has_are_named(tmp_path, caplog):
    write_rows(tmp_path, [rows_to_table(translated(random_rows(6)))], fingerprint="x", rejected={})
    check_answers(
        tiny_config(data={"train": [{"path": "x"}], "languages": ["en", "xx", "sw"]}), TokenArtifact.open(tmp_path)
    )
    assert "no bundle is read in xx, which data.languages names; bundles are in ar, en, sw" in caplog.text


def test_answers_may_be_given_in_some_languages_but_pairs_are_whole(tmp_path):
    rows = translated(random_rows(6))
    rows[1] = replace(rows[1], answers=[one for one in rows[1].answers if rows[1].languages[one["prompt"]] != "sw"])
    rows[2] = replace(rows[2], answers=[])
    rows[4] = replace(rows[4], answers=[{**rows[4].answers[0], "rejected": None}, *rows[4].answers[1:]])
    write_rows(tmp_path, [rows_to_table(rows)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    check_answers(tiny_config(objective={"loss": "sft", "answers": "given"}), tokens)
    with pytest.raises(MissingAnswersError) as caught:
        check_answers(tiny_config(objective={"loss": "dpo", "answers": "given"}), tokens)
    head, place, _ = str(caught.value).splitlines()
    assert head.endswith("in each language that has one; bundles without a rejected answer in one: 1 of 6")
    language = rows[4].languages[rows[4].answers[0]["prompt"]]
    assert place == f"  row 5: bundle {rows[4].bundle_id} has no rejected answer in {language}"


def test_another_dominant_language_than_that_of_the_answers_is_refused(tmp_path):
    write_rows(tmp_path, [rows_to_table(translated(random_rows(6)))], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    check_answers(tiny_config(objective={"loss": "mpo"}), tokens)
    with pytest.raises(
        MissingAnswersError, match=r"dominant language 'zh', but .*\(en: 6 of 6\); set objective\.dominant"
    ):
        check_answers(tiny_config(objective={"loss": "mpo", "dominant": "zh"}), tokens)


@pytest.mark.parametrize("loss", ["mpo", "dco", "sdrrl"])
def test_a_loss_between_languages_needs_a_bundle_with_two(tmp_path, loss):
    rows = translated(random_rows(6))
    alone = [
        replace(row, languages=["en"], prompts=[row.prompts[0]], tapped=row.tapped[:1], response_prompt=0, answers=[])
        for row in rows
    ]
    found = []
    for name, stored in {"alone": alone, "mixed": [*alone[:5], rows[5]]}.items():
        (tmp_path / name).mkdir()
        tables = [rows_to_table(stored[:3]), rows_to_table(stored[3:])]
        write_rows(tmp_path / name, tables, fingerprint=name, rejected={})
        found.append(TokenArtifact.open(tmp_path / name))
    assert [tokens.most_languages for tokens in found] == [1, 3]
    config = tiny_config(objective={"loss": loss})
    with pytest.raises(MissingAnswersError, match=f"loss='{loss}' relates .* none of the 6 bundles has two;"):
        check_answers(config, found[0])
    check_answers(config, found[1])
    english = {"english": 1, "translated": 0, "english_answers": 0, "english_prompts": 0}
    for objective in ({"loss": "sdrrl", **english}, {"loss": "dpo", "answers": "all"}):
        check_answers(tiny_config(objective=objective), found[0])  # these relate none


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_it_is_found_before_the_reference_is_loaded(made, reference, tmp_path, monkeypatch):
    config, tokens, *_ = made({2: ["chosen"]}, reference=reference)
    monkeypatch.setattr(run, "prepare_token_rows", lambda *_, **__: tokens)
    monkeypatch.setattr(run, "prepare_references", lambda *_, **__: pytest.fail("the reference was asked"))
    with pytest.raises(MissingAnswersError, match="without a rejected answer: 1 of 9"):
        run.prepare_data(config, cache_dir=tmp_path, layer=2, gpu=False)
