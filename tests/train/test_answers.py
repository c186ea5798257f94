"""Bundles that lack answers which the loss reads are named before a model is loaded, and without Ray."""

import json
from dataclasses import replace

import pytest

from mlc_ray.data.bundles import BundleFileError
from mlc_ray.data.sources import places_of, read_file, resolve_source
from mlc_ray.data.store import TokenArtifact, write_rows
from mlc_ray.data.tables import rows_to_table
from mlc_ray.train import run
from mlc_ray.train.answers import MissingAnswersError, check_answers
from tests.train.tiny import random_rows, tiny_config


@pytest.fixture
def made(tmp_path):
    """A source of nine bundles of which some lack answers (index -> the ones it has), its settings, and token rows."""

    def make(answers, **sections):
        file, rows = tmp_path / "bundles.jsonl", random_rows(9)
        with file.open("w", encoding="utf-8") as out:
            for index in range(len(rows)):
                given = {name: f"{name} {index}" for name in answers.get(index, ("chosen", "rejected"))}
                out.write(json.dumps({"kind": "benign", "prompts": {"en": f"Say {index}."}, **given}) + "\n")
        config = tiny_config(data={"train": [{"path": str(file)}]}, **sections)
        (source,) = resolve_source(config.data.train[0])
        bundles = [row.parsed for row in read_file(source)]
        stored = [
            replace(
                row,
                bundle_id=bundle.bundle_id,
                chosen=row.chosen if bundle.chosen is not None else None,
                rejected=row.rejected if bundle.rejected is not None else None,
            )
            for row, bundle in zip(rows, bundles, strict=True)
        ]
        folder = tmp_path / "tokens"
        folder.mkdir()
        write_rows(folder, [rows_to_table(stored[:4]), rows_to_table(stored[4:])], fingerprint="x", rejected={})
        return config, TokenArtifact.open(folder), [bundle.bundle_id for bundle in bundles], file

    return make


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo"])
def test_bundles_without_a_rejected_answer_are_named(made, loss):
    config, tokens, ids, file = made({2: ["chosen"], 7: ["chosen"]}, objective={"loss": loss})
    with pytest.raises(MissingAnswersError) as caught:
        check_answers(config, tokens, config.data.train)
    assert str(caught.value).splitlines() == [
        f"objective.loss='{loss}' needs chosen and rejected answers; bundles without a rejected answer: 2 of 9",
        f"  {file}:3: bundle {ids[2]} has no rejected answer",
        f"  {file}:8: bundle {ids[7]} has no rejected answer",
        "Complete these rows, leave them out, or choose a loss that needs no rejected answers: objective.loss=sft.",
    ]


def test_only_the_first_few_are_named(made):
    config, tokens, _, file = made({index: ["chosen"] for index in range(1, 9)})
    with pytest.raises(MissingAnswersError, match="without a rejected answer: 8 of 9") as caught:
        check_answers(config, tokens, config.data.train)
    lines = str(caught.value).splitlines()
    assert [line.partition(" bundle ")[0] for line in lines[1:6]] == [f"  {file}:{n}:" for n in range(2, 7)]
    assert lines[6] == "  and 3 more"


def test_a_loss_that_reads_no_rejected_answer_asks_for_none(made):
    config, tokens, _, file = made({2: ["chosen"]}, objective={"loss": "sft"})
    file.unlink()  # nothing but lengths is read
    check_answers(config, tokens, config.data.train)


def test_every_loss_needs_a_chosen_answer(made):
    config, tokens, ids, file = made({0: [], 5: ["chosen"]}, objective={"loss": "sft"})
    with pytest.raises(MissingAnswersError) as caught:
        check_answers(config, tokens, config.data.train)
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
        check_answers(config, tokens, config.data.train)
    assert f"  {file}:1: bundle {ids[0]} has no chosen and no rejected answer" in str(caught.value).splitlines()


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_it_is_found_before_the_reference_is_loaded(made, reference, tmp_path, monkeypatch):
    config, tokens, *_ = made({2: ["chosen"]}, reference=reference)
    monkeypatch.setattr(run, "prepare_token_rows", lambda *_, **__: tokens)
    monkeypatch.setattr(run, "prepare_reference", lambda *_, **__: pytest.fail("the reference was asked"))
    with pytest.raises(MissingAnswersError, match="without a rejected answer: 1 of 9"):
        run.prepare_data(config, cache_dir=tmp_path, layer=2, gpu=False)


def test_a_source_that_changed_meanwhile_is_said(made):
    config, _, ids, file = made({2: ["chosen"]})
    kept = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(kept[:2]) + "\n", encoding="utf-8")
    with pytest.raises(BundleFileError, match=f"bundle {ids[2]} is no longer in data.train"):
        places_of([ids[0], ids[2]], config.data.train)
