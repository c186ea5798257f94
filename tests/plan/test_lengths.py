"""Lengths: of prepared rows, of a sample, or assumed and said so; and how they are cut."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from mlc_ray.config import ChatSection, OpeningsSection
from mlc_ray.data.batches import collate
from mlc_ray.data.branches import Branches
from mlc_ray.data.plan import Cutting
from mlc_ray.data.sources import sample_path
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import plans
from mlc_ray.data.tables import rows_to_table
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.plan.activations import Row
from mlc_ray.plan.cutting import cutting_of, order_of, steps_of
from mlc_ray.plan.lengths import assumed, cut, of_artifact, of_rows, row_of, weights_of
from mlc_ray.plan.openings import make_branches, opened
from mlc_ray.plan.seconds import attended, flops
from mlc_ray.plan.shapes import shape_of
from mlc_ray.train.flops import Work
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.types import Pairing
from tests.data.files import write_rows
from tests.plan.test_memory import run
from tests.train.tiny import LANGUAGES, random_rows, tiny_config, tiny_model, translated


def artifact(folder, rows):
    write_rows(folder, [rows_to_table(rows)], fingerprint="x", rejected={})
    return TokenArtifact.open(folder)


def test_prepared_rows_are_weighed_exactly(tmp_path):
    rows = random_rows(12, head=range(5))
    tokens = artifact(tmp_path / "tokens", rows)
    weights = of_artifact(tokens)
    assert (len(weights), weights.head) == (12, tokens.head)
    assert weights.lengths.prompts.sum() == sum(len(prompt) for row in rows for prompt in row.prompts)
    assert weights.said.startswith("measured: 12 prepared bundles")
    other = of_rows(rows)
    assert other.head == tokens.head
    for name, values in vars(other.lengths).items():
        assert np.array_equal(values, getattr(weights.lengths, name)), name


def test_a_forward_holds_what_the_batch_has(tmp_path):
    rows = random_rows(6, head=range(9))
    tokens = artifact(tmp_path / "tokens", rows)
    config = tiny_config(mlc={"every": 1}, train={"tokens_per_forward": 10_000, "batch_bundles": 6})
    cutting = cutting_of(config, tokens, tokens_per_forward=10_000, world_size=1)
    (plan,) = plans(tokens, order_of(config, tokens), cutting, range(1))
    (forward,), (said,) = plan.forwards[0], plan.tokens[0]
    counted = row_of(tokens.lengths(list(forward.rows)), cutting, plan, said)
    batch = collate(rows, languages=LANGUAGES, weights=[1.0] * 6, needs_rejected=True, reference=None, tap=True)
    assert counted.tokens == batch.tree.tokens
    assert counted.keys == pytest.approx(sum(batch.tree.key_lengths), abs=2)
    assert counted.head == len(batch.chosen.targets) + len(batch.rejected.targets)
    assert counted.tapped == len(batch.prompts.tapped)
    pairs = sum(q * k for q, k in zip(batch.tree.lengths, batch.tree.key_lengths, strict=True))
    assert counted.pairs == pytest.approx(pairs, rel=0.1)


OPENINGS = Branches({code: [[1, 2, 3], [1, 4, 5, 6]] for code in LANGUAGES})


@pytest.mark.parametrize("pairing", get_args(Pairing))
@pytest.mark.parametrize("scope", ["none", "response", "all"])
def test_answers_in_several_languages_openings_and_what_is_compared_are_counted(tmp_path, pairing, scope):
    rows = translated(random_rows(12, head=range(9)))
    tokens = artifact(tmp_path / "tokens", rows)
    cutting = Cutting(
        10**6, 1, head=tokens.head, rejected=True, taps=lambda _: True, ever_taps=True, pairing=pairing,
        scope=lambda _: scope, branches=OPENINGS, keeps=True,
    )  # fmt: skip
    lengths = tokens.lengths(range(12))
    plan = cutting.plan(0, range(12), lengths)
    counted = row_of(lengths, cutting, plan, plan.tokens[0][0], benign=0.5)
    batch = collate(
        rows, languages=LANGUAGES, weights=[1.0] * 12, needs_rejected=True, reference=None, tap=True, pairing=pairing,
        scope=scope, branches=OPENINGS, keeps=True,
    )  # fmt: skip
    tree, opened = batch.tree, {"none": 0, "response": 12, "all": len(batch.prompts.tapped)}[scope]
    answers = len(batch.chosen.targets) + len(batch.rejected.targets)
    read = len(batch.openings.predicting) if scope != "none" else 0
    assert read == opened * (1 + OPENINGS.tokens)
    ends = sum(len(row.languages) for row in rows) // 2
    assert counted.head == pytest.approx(answers + read + ends, abs=3)
    assert counted.compared == pytest.approx(answers + read + ends + 3 * (answers / 2 + ends), rel=0.05)
    own = sum(tree.key_lengths[: tree.openings])
    own += opened * (9 + 8 + OPENINGS.tokens)  # a prompt has 17 tokens
    assert 0.97 * own < counted.keys < 1.25 * own  # answers of one token, which are not in the row, are counted


def test_operations_are_those_that_a_run_logs():
    rows = random_rows(6, head=range(9))
    batch = collate(rows, languages=LANGUAGES, weights=[1.0] * 6, needs_rejected=True, reference=None, tap=True)
    module = PolicyWithExtractor(tiny_model(), layer=3, extractor_dim=16, seed=0)
    logged = Work.of(module, lambda parameter: tuple(parameter.shape)).step(batch)
    tree = batch.tree
    pairs = sum(q * k for q, k in zip(tree.lengths, tree.key_lengths, strict=True))
    answers = len(batch.chosen.targets) + len(batch.rejected.targets)
    row = Row(tree.tokens, sum(tree.key_lengths), pairs, answers, len(batch.prompts.tapped))
    shape = shape_of(module.language_model.config, "tiny")
    assert flops(shape, row, trained=1.0, head_trained=True, pairs=attended(row)) == pytest.approx(logged, rel=0.02)


def test_a_cut_has_the_mean_of_a_run_s_steps(tmp_path):
    tokens = artifact(tmp_path / "tokens", random_rows(40, head=range(5)))
    config = tiny_config(mlc={"every": 1}, train={"tokens_per_forward": 120, "batch_bundles": 8, "epochs": 4})
    found = cut(config, of_artifact(tokens), tokens_per_forward=120, workers=2)
    cutting = cutting_of(config, tokens, tokens_per_forward=120, world_size=2)
    whole = list(plans(tokens, order_of(config, tokens), cutting, range(steps_of(config, tokens))))
    mean = sum(sum(sum(micro) for micro in plan.tokens) for plan in whole) / len(whole)
    assert found.tokens == pytest.approx(mean, rel=0.05)
    assert found.forwards == pytest.approx(sum(len(plan.forwards) for plan in whole) / len(whole), rel=0.2)
    assert found.taps == 1.0


def test_a_term_that_starts_late_is_in_a_cut_by_its_share_and_in_memory_as_a_whole():
    """80 of 267 steps come before it; where the wide ones begin after all steps looked at, memory is theirs too."""

    def found(start, **more):
        terms = {"consistency": {"weight": 0.3, "start": start}}
        config = run(
            objective={"loss": "sft"}, mlc={"weight": 0, "every": 1}, terms=terms,
            train={"epochs": 3, "batch_bundles": 32, **more},
        )  # fmt: skip
        return cut(config, assumed(config), tokens_per_forward=16384, workers=8)

    plain = run(objective={"loss": "sft"}, mlc={"weight": 0}, train={"epochs": 3, "batch_bundles": 32})
    narrow = cut(plain, assumed(plain), tokens_per_forward=16384, workers=8)
    whole, late = found(0.0), found(0.3)
    assert narrow.tokens < whole.tokens / 3 and narrow.taps == 0 and whole.taps == 1
    share = 186 / 267  # steps from 0.3 x 267 on
    assert late.taps == pytest.approx(share, abs=0.01)
    assert late.tokens == pytest.approx(share * whole.tokens + (1 - share) * narrow.tokens, rel=0.02)
    of_step = late.mean.tokens * late.forwards * 8
    assert of_step == pytest.approx(late.tokens, rel=0.02)
    assert max(row.tokens for row in late.largest) == max(row.tokens for row in whole.largest)
    assert max(row.tapped for row in found(0.99, max_steps=20).largest) == max(row.tapped for row in whole.largest)


def test_a_long_run_s_share_of_steps_with_terms_is_that_of_its_period():
    config = run(objective={"loss": "sft"}, mlc={"weight": 0.8, "every": 4}, train={"epochs": 400, "batch_bundles": 32})
    assert cut(config, assumed(config), tokens_per_forward=16384, workers=8).taps == pytest.approx(0.25, abs=1e-3)


def test_sources_that_cannot_be_counted_are_assumed_beside_those_that_can(tmp_path):
    def found(*paths, share=1.0):
        return assumed(run(data={"train": [{"path": str(path), "share": share} for path in paths]}))

    beside = found("sample:train", "/not/here.jsonl")
    assert beside.bundles == 96 + 2835
    assert "of them 2,835 for /not/here.jsonl, which cannot be counted here" in beside.said
    both = found("/not/here.jsonl", "/nor/this.jsonl")
    assert both.bundles == 2 * 2835 and "of them 2,835 for /not/here.jsonl, 2,835 for /nor/this.jsonl" in both.said
    third = found("/not/here.jsonl", "/nor/this.jsonl", share=0.33)
    assert third.bundles == 2 * 936 and "936 for /not/here.jsonl" in third.said
    assert found("sample:train").bundles == 96 and "of them" not in found("sample:train").said


def test_without_data_and_tokenizer_the_published_means_are_said_to_be_assumed():
    weights = assumed(run())
    assert weights.said.startswith("assumed: 10 languages")
    assert len(weights) == 2835
    assert weights_of(run(), None).said == weights.said
    fewer = assumed(run(data={"train": [{"path": "sample:train"}], "other_languages": 2}))
    assert fewer.said.startswith("assumed: 3 languages") and fewer.lengths.languages.tolist() == [3]


def test_sources_are_tokenised_where_nothing_is_prepared(smollm2, tmp_path):
    config = run(model={"path": str(smollm2)}, data={"train": [{"path": "sample:train"}]})
    weights = weights_of(config, None)
    assert weights.said == "measured: 96 of 96 bundles, tokenised"
    assert weights.lengths.languages.mean() > 9
    fewer = run(model={"path": str(smollm2)}, data={"train": [{"path": "sample:train"}], "other_languages": 1})
    assert weights_of(fewer, None).lengths.languages.tolist() == [2] * 96
    (tmp_path / "own.jsonl").write_text("".join(sample_path("test").read_text().splitlines(keepends=True)[:10]))
    beside = run(
        model={"path": str(smollm2)}, data={"train": [{"path": "sample:train"}, {"path": str(tmp_path / "own.jsonl")}]}
    )
    assert weights_of(beside, None).said == "measured: 74 of 106 bundles, tokenised"


def test_openings_that_a_run_reads_are_counted_behind_prompts(smollm2):
    data = {"train": [{"path": "sample:train"}], "languages": ["en", "es", "zh"]}

    def planned(scope=None, **sections):
        terms = {} if scope is None else {"decision": {"weight": 1.0, "languages": scope}}
        config = run(
            model={"path": str(smollm2)}, data=data, objective={"loss": "sft"}, mlc={"weight": 0, "every": 1},
            terms=terms, train={"batch_bundles": 4}, **sections,
        )  # fmt: skip
        weights = weights_of(config, None)
        return weights, cut(config, weights, tokens_per_forward=100_000, workers=1)

    tokenizer = load_tokenizer(str(smollm2))
    branches = make_branches(OpeningsSection(), tokenizer, ChatSection(), ["en", "es", "zh"])
    behind = {code: len(branches.of(code).ids) for code in ("en", "es", "zh")}
    weights, without = planned()
    assert weights.opened == {"response": behind["en"], "all": round(sum(behind.values()) / 3)}
    _, response = planned("response")
    assert response.tokens - without.tokens == pytest.approx(4 * behind["en"], rel=1e-6)
    _, every = planned("all")
    prompts = 4 * float((weights.lengths.prompts - weights.lengths.answered - 2 * weights.head).mean())
    assert every.tokens - without.tokens == pytest.approx(prompts + 12 * weights.opened["all"], rel=0.05)
    assert max(row.head for row in every.largest) > 12 * weights.opened["all"]
    alone, _ = planned(openings={"english_everywhere": False}, scope="all")
    assert alone.opened["response"] == behind["en"] and alone.opened["all"] < weights.opened["all"]


def test_openings_are_counted_of_prepared_rows_as_of_a_sample(tmp_path, smollm2):
    rows = random_rows(12)
    tokens = artifact(tmp_path / "tokens", rows)
    further = {"further": {"xx": ["Which no bundle is in."]}}
    config = run(
        model={"path": str(smollm2)}, objective={"loss": "sft"}, terms={"decision": {"weight": 1.0}}, openings=further
    )
    tokenizer = load_tokenizer(str(smollm2))
    branches = make_branches(OpeningsSection(), tokenizer, ChatSection(), LANGUAGES)
    behind = [len(branches.of(code).ids) for row in rows for code in row.languages]
    assert of_artifact(tokens, config).opened == {
        "response": len(branches.of("en").ids),
        "all": round(sum(behind) / len(behind)),
    }
    none = [replace(row, languages=["qq", *row.languages[1:]]) for row in rows]
    alone = OpeningsSection(english_everywhere=False)
    assert opened(alone, tokenizer, ChatSection(), none) == {}  # a run that reads them is refused


def test_openings_are_assumed_where_no_tokenizer_is_here():
    terms = {"decision": {"weight": 1.0, "languages": "all"}}
    config = run(objective={"loss": "sft"}, mlc={"weight": 0, "every": 1}, terms=terms)
    whole = cut(config, assumed(config), tokens_per_forward=10**6, workers=1).tokens
    alone = run(
        objective={"loss": "sft"}, mlc={"weight": 0, "every": 1}, terms=terms, openings={"english_everywhere": False}
    )
    less = cut(alone, assumed(alone), tokens_per_forward=10**6, workers=1).tokens
    bundles = config.train.batch_bundles
    assert whole - less == bundles * 10 * (136 - 97)


def test_bundles_of_a_large_file_are_estimated_whatever_holds_them(smollm2, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in sample_path("train").read_text().splitlines()] * 4
    (tmp_path / "array.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "lines.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))

    def found(name):
        data = {"train": [{"path": str(tmp_path / name)}]}
        return weights_of(run(model={"path": str(smollm2)}, data=data), None)

    assert assumed(run(data={"train": [{"path": str(tmp_path / "array.json")}]})).bundles == 384
    monkeypatch.setattr("mlc_ray.plan.lengths.HASHED", 1000)  # all files are large
    for name in ("array.json", "folder"):
        assert found(name).said.startswith("measured: 128 of about")
        assert found(name).bundles == pytest.approx(384, rel=0.3)
        without = assumed(run(data={"train": [{"path": str(tmp_path / name)}]}))
        assert without.bundles == found(name).bundles, "a tokenizer is not needed for it"

    def kept(**settings):
        data = {"train": [{"path": str(tmp_path / "folder"), **settings}]}
        return [weights_of(run(model={"path": str(smollm2)}, data=data), None).bundles, assumed(run(data=data)).bundles]

    # Of a sample: a third of it within what a hash gives, and a half of it.
    assert kept(share=0.33) == pytest.approx([127, 127], rel=0.45)
    assert kept(only="benign") == pytest.approx([192, 192], rel=0.3)
