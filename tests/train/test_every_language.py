"""Answers in every language: what one forward of the tree says of them, and steps that no cut and no worker changes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mlc_ray.data.batches import BatchError, collate
from mlc_ray.data.plan import Lengths
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.losses.objective import Objective
from mlc_ray.storage import Place
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.train.published import published_files
from mlc_ray.train.reference import ReferenceModel, asked_of_reference
from mlc_ray.train.reference_pass import Asking
from mlc_ray.train.reference_shards import StoredReference, write_shard
from tests.data.files import write_rows
from tests.train.tiny import (
    LANGUAGES,
    ReferenceRow,
    on_workers,
    random_rows,
    run_engine,
    tiny_config,
    tiny_model,
    translated,
    whole_weights,
)

ROWS = translated(random_rows(11, head=(5, 3, 8)))
LOSSES = {
    "mpo": {"loss": "mpo", "pool": "mean_all", "min_source_gap": 0.0},
    "dco": {"loss": "dco"},
    "dpo": {"loss": "dpo", "answers": "all", "response_share": 0.4},
    "sdrrl": {"loss": "sdrrl"},
    "english": {"loss": "sdrrl", "english": 0.5, "english_answers": 0.5, "translated": 0, "english_prompts": 0},
}
STEPS = 4
PARTLY = [replace(row, answers=row.answers[:number]) for row, number in zip(ROWS, (2, 0, 1, 2), strict=False)]
"""Bundles with answers in all, one and two of their languages."""


def made(rows=ROWS, **changes):
    settings = {"languages": LANGUAGES, "weights": [1.0] * len(rows), "needs_rejected": True, "reference": None}
    return collate(rows, **{**settings, "tap": False, **changes})


def pairs_of(row, pairing):
    """(prompt, answer) languages of what is read of a bundle, the response language's own first."""
    own = row.languages[row.response_prompt]
    others = [code for code in row.languages if code != own]
    given = [row.languages[further["prompt"]] for further in row.answers] if pairing == "given" else []
    return [
        (own, own),
        *([(code, code) for code in others] if pairing in ("own", "crossed") else [(code, code) for code in given]),
        *([(code, own) for code in others] if pairing in ("shared", "crossed") else []),
        *([(own, code) for code in others] if pairing == "crossed" else []),
    ]


def answer_in(row, code, name):
    index = row.languages.index(code)
    if index == row.response_prompt:
        return getattr(row, name)
    return next(further[name] for further in row.answers if further["prompt"] == index)


def log_prob(model, prompt, answer):
    shares = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(shares[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("pairing", ["response", "own", "given", "shared", "crossed"])
@pytest.mark.parametrize("tap", [True, False])
def test_log_probs_are_those_of_plain_forwards(pairing, tap):
    model, rows = tiny_model(), PARTLY if pairing == "given" else ROWS[:4]
    batch = made(rows, pairing=pairing, tap=tap)
    module = PolicyWithExtractor(model, layer=2, extractor_dim=16, seed=0)
    with torch.no_grad():
        output = module(batch)
        found = {}
        for index in range(len(batch.rows.bundle)):
            bundle, prompt, answer = (
                int(part[index]) for part in (batch.rows.bundle, batch.rows.prompt, batch.rows.answer)
            )
            key = (bundle, LANGUAGES[prompt], LANGUAGES[answer])
            found[key] = float(output.chosen.total[index]), float(output.rejected.total[index])
        expected = {
            (bundle, prompt, answer): tuple(
                log_prob(model, row.prompts[row.languages.index(prompt)], answer_in(row, answer, name))
                for name in ("chosen", "rejected")
            )
            for bundle, row in enumerate(rows)
            for prompt, answer in pairs_of(row, pairing)
        }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-4), key
    first = [
        (int(batch.rows.bundle[i]), int(batch.rows.prompt[i]), int(batch.rows.answer[i])) for i in batch.rows.response
    ]
    english = LANGUAGES.index("en")
    assert first == [(bundle, english, english) for bundle in range(len(rows))]
    assert (output.representations is not None) is tap


@pytest.mark.parametrize("pairing", ["response", "own", "shared", "crossed"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_forward_has_as_many_tokens_as_it_is_planned_with(pairing, whole, tmp_path):
    write_rows(tmp_path, [rows_to_table(ROWS)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    for tap in (True, False):
        asked = {"head": tokens.head, "taps": tap, "rejected": True, "pairing": pairing, "whole": whole}
        own = tokens.counted(partial(Lengths.own_tokens, **asked))
        batch = made(tokens.table(range(len(ROWS))), pairing=pairing, whole=whole, tap=tap)
        assert batch.tree.tokens == tokens.head + int(own.sum())
        assert own.tolist() == tokens.lengths(range(len(ROWS))).own_tokens(**asked).tolist()


@pytest.mark.parametrize("pooling", ["mean_all", "mean_masked", "last"])
@pytest.mark.parametrize("tap", [True, False])
def test_pooled_states_are_those_of_plain_forwards(pooling, tap):
    model, rows = tiny_model(), ROWS[:4]
    batch = made(rows, pairing="own", whole=True, tap=tap)
    layer = 3 if tap else 2  # at the last layer, tapped rows pass the final norm beside the pooled ones
    module = PolicyWithExtractor(model, layer=layer, extractor_dim=16, seed=0, pooling=pooling)
    with torch.no_grad():
        pooled = module(batch).pooled
        for bundle, row in enumerate(rows):
            prompt = row.prompts[row.response_prompt]
            for name, found in (("chosen", pooled[0, bundle]), ("rejected", pooled[1, bundle])):
                ids = torch.tensor([prompt + getattr(row, name)])
                states = model(ids, output_hidden_states=True).hidden_states[-1][0]
                expected = {
                    "mean_all": states.mean(dim=0), "mean_masked": states[len(prompt):].mean(dim=0), "last": states[-1]
                }[pooling]  # fmt: skip
                assert torch.allclose(found, expected, atol=1e-5), (bundle, name)


@pytest.mark.parametrize("tap", [True, False])
def test_a_forward_of_the_answers_given_has_no_more_tokens_than_it_is_planned_with(tap, tmp_path):
    write_rows(tmp_path, [rows_to_table(PARTLY)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    asked = {"head": tokens.head, "taps": tap, "rejected": True, "pairing": "given"}
    planned = tokens.head + int(tokens.lengths(range(4)).own_tokens(**asked).sum())
    found = made(tokens.table(range(4)), pairing="given", tap=tap).tree.tokens
    unanswered = sum(
        len(row.prompts[index]) - tokens.head
        for row in PARTLY
        for index in range(len(row.prompts))
        if index != row.response_prompt and index not in [further["prompt"] for further in row.answers]
    )
    assert found == planned - (0 if tap else unanswered) and unanswered > 0


def test_a_given_answer_without_its_rejected_one_is_named():
    rows = [PARTLY[1], replace(PARTLY[2], answers=[{**PARTLY[2].answers[0], "rejected": None}])]
    made(rows, pairing="given", weights=[1, 1], needs_rejected=False)
    said = f"{rows[1].bundle_id} has no 'rejected' answer in each language that has a chosen one"
    with pytest.raises(BatchError, match=said):
        made(rows, pairing="given", weights=[1, 1])


def test_a_bundle_without_an_answer_in_a_language_is_named():
    rows = [ROWS[0], replace(ROWS[1], answers=ROWS[1].answers[:1])]
    made(rows, pairing="shared", weights=[1, 1])
    with pytest.raises(BatchError, match=f"{rows[1].bundle_id} has no 'chosen' answer in each of its languages"):
        made(rows, pairing="own", weights=[1, 1])


def reference_rows(config, rows=ROWS):
    """What plain forwards of the frozen model say, as the cached reference has it."""
    objective, model, table = Objective(config), tiny_model(), {}
    with torch.no_grad():
        for row in rows:
            prompt = row.prompts[row.response_prompt]
            if objective.alignment.reference_pairing == "response":
                totals = [log_prob(model, prompt, getattr(row, name)) for name in ("chosen", "rejected")]
            else:
                totals = np.full((2, len(LANGUAGES)), np.nan)
                answered = {row.response_prompt, *(further["prompt"] for further in row.answers)}
                for code in (row.languages[index] for index in answered):
                    own = row.prompts[row.languages.index(code)]
                    for index, name in enumerate(("chosen", "rejected")):
                        totals[index, LANGUAGES.index(code)] = log_prob(model, own, answer_in(row, code, name))
            pooled = None
            if objective.alignment.pooling is not None:
                ids = [torch.tensor([prompt + getattr(row, name)]) for name in ("chosen", "rejected")]
                states = [model(each, output_hidden_states=True).hidden_states[-1][0].mean(dim=0) for each in ids]
                pooled = torch.stack(states).numpy()
            table[row.bundle_id] = ReferenceRow(*totals, pooled=pooled)
    return table


def configured(name, budget, stage, reference="cached"):
    objective = {**LOSSES, "given": {"loss": "dpo", "answers": "given"}}[name]
    own = {"reference": reference} if name not in ("sdrrl", "english") else {}
    return tiny_config(
        objective=objective,
        mlc={"layer": 3, "every": 2, "extractor_dim": None, "centring": True},
        train={"epochs": 2, "batch_bundles": 6, "group_bundles": 2, "tokens_per_forward": budget},
        optimizer={"learning_rate": 5e-4},
        engine={"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
        **own,
    )


def train(rank, plan):
    """History, weights and published files of each (loss, budget, stage, reference)."""
    results = {}
    for run in plan:
        config = configured(*run)
        table = reference_rows(config) if config.needs_reference and config.reference == "cached" else None
        trained, history = run_engine(config, ROWS, STEPS, table)
        files = [file for file, _ in published_files(trained, [], lora=False)]
        results[run] = history, whole_weights(trained), files
    return results


WHOLE = 10**6
PARTS = 120  # tokens: more than the largest group of two bundles has
PLANS = {
    1: [(name, WHOLE, 0, "cached") for name in LOSSES],
    2: [(name, PARTS, 3 if name in ("mpo", "sdrrl") else 2, "cached") for name in LOSSES]
    + [("mpo", PARTS, 2, "online"), ("dco", PARTS, 3, "online")],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("languages")
    return {
        (workers, *run): result
        for workers, plan in PLANS.items()
        for run, result in on_workers(workers, train, folder / str(workers), plan)[0].items()
    }


@pytest.mark.parametrize("run", PLANS[2], ids=str)
def test_steps_are_those_of_one_worker_with_one_forward(run, trained):
    (history, weights, _), (expected, wanted, files) = trained[2, *run], trained[1, run[0], WHOLE, 0, "cached"]
    assert max(row["forwards"] for row in history) > 1
    for row, want in zip(history, expected, strict=True):
        for name in (n for n in want if n.startswith(("loss/", "alignment/")) or n == "reward/margin"):
            assert row[name] == pytest.approx(want[name], rel=1e-5, abs=1e-5), (row["step"], name)
        assert row["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-4)
    before = {f"policy.{name}": value for name, value in tiny_model().state_dict().items()}
    assert wanted.keys() == before.keys() and "extractor.safetensors" not in files  # there is none
    for name, value in wanted.items():
        assert float((weights[name] - value).norm() / value.norm()) < 1e-5, name
        assert float((value - before[name]).norm() / value.norm()) > 1e-5, name


def test_the_first_step_s_loss_is_known_beforehand(trained):
    """Where the policy is the reference: MPO's anchor is 0, and DPO's loss the logarithm of 2."""
    first = trained[1, "mpo", WHOLE, 0, "cached"][0][0]
    assert first["alignment/anchor"] < 1e-9 < 0.01 < first["alignment/regression"]
    assert 0 < first["alignment/teaches"] < 1
    assert trained[1, "dpo", WHOLE, 0, "cached"][0][0]["loss/alignment"] == pytest.approx(np.log(2), abs=1e-5)


def test_the_reference_says_of_answers_in_every_language_what_it_says_of_each():
    batch = made(pairing="own", whole=True)
    model = ReferenceModel(tiny_model(), pairing="own")
    with torch.no_grad():
        said = model(batch, state=False)
        alone = ReferenceModel(tiny_model(), pooling="last")(batch, state=False)
    assert said.chosen.shape == (sum(len(row.languages) for row in ROWS),)
    assert torch.equal(said.chosen[batch.rows.response], alone.chosen) and alone.pooled.shape == (2, len(ROWS), 32)


def test_of_a_reference_that_gives_states_alone_no_further_answers_are_asked():
    asked = asked_of_reference(Objective(tiny_config(objective={"loss": "sdrrl"}, terms={"anchor": {}})), 2)
    assert asked == {"log_probs": False, "layer": 2, "pairing": "response", "pooling": None, "keeps": False}
    assert asked_of_reference(Objective(tiny_config(objective={"loss": "dco"})), 2)["pairing"] == "own"


@pytest.mark.parametrize("name", ["mpo", "dco", "given"])
def test_what_a_reference_pass_stores_is_what_batches_bring_along(name, tmp_path):
    """From token rows by forwards of any size, through a shard on disk, to the rows of a batch in another order."""
    config = configured(name, WHOLE, 0)
    bundles = [replace(row, answers=row.answers[: i % 3]) if name == "given" else row for i, row in enumerate(ROWS)]
    objective, expected = Objective(config), reference_rows(config, bundles)
    write_rows(tmp_path, [rows_to_table(bundles)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    asked = asked_of_reference(objective, 2)
    model = ReferenceModel(tiny_model(), **asked)
    asking = Asking(
        torch.no_grad()(lambda batch: model(batch, state=False)), True, False, 90, torch.device("cpu"),
        asked["pairing"], asked["pooling"] is not None,
    )  # fmt: skip
    said = asking.ask(tokens, np.arange(len(ROWS)), lambda _: None)
    shard, _ = write_shard(Place(tmp_path), 0, said)
    picked = [7, 2, 5]
    stored = StoredReference([tmp_path / shard], len(ROWS)).take(picked)
    batch = collate(
        tokens.table(picked), languages=LANGUAGES, weights=[1.0] * 3, needs_rejected=True, reference=stored, tap=False,
        pairing=objective.alignment.pairing, whole=objective.alignment.pooling is not None,
    )  # fmt: skip
    for name_of, found in (("chosen", batch.reference_chosen), ("rejected", batch.reference_rejected)):
        rows = [getattr(expected[ROWS[row].bundle_id], name_of) for row in picked]
        pairs = zip(batch.rows.bundle.tolist(), batch.rows.answer.tolist(), strict=True)
        wanted = (
            rows
            if objective.alignment.reference_pairing == "response"
            else [rows[bundle][code] for bundle, code in pairs]
        )
        assert found.tolist() == pytest.approx(wanted, abs=1e-4)
    if objective.alignment.pooling is None:
        assert batch.reference_pooled is None
    else:
        wanted = np.stack([expected[ROWS[row].bundle_id].pooled for row in picked], axis=1)
        assert np.allclose(batch.reference_pooled.numpy(), wanted, atol=1e-5)
