"""Decisions in training: the same steps however a batch is cut, what the terms teach, and what held-out bundles say."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlc_ray.config import CollapseSection, ConfigError
from mlc_ray.data.branches import Branches
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import stream_steps
from mlc_ray.data.tables import rows_to_table
from mlc_ray.judges import openings
from mlc_ray.judges.phrase_lists import shipped_phrases
from mlc_ray.losses.measures import auc
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import cutting_of
from mlc_ray.storage import Place
from mlc_ray.train.loop import Progress, loss_of
from mlc_ray.train.planning import check_kinds, held_out_cutting
from mlc_ray.train.reference import ReferenceOutput
from mlc_ray.train.run import fingerprints_of
from mlc_ray.train.settings import SettingsChangedError, refuse_other_content
from mlc_ray.train.validation import Validation, batches_of, plans_of
from mlc_ray.train.watch import Watch
from tests.data.files import write_rows
from tests.train.test_openings import OPENINGS, plain
from tests.train.tiny import (
    LANGUAGES,
    make_engine,
    on_workers,
    random_rows,
    run_engine,
    steps_of,
    tiny_config,
    whole_weights,
    wrapped,
)

BRANCHES = Branches(OPENINGS)
ROWS = random_rows(11, head=(5, 3, 8))
HELD_OUT = random_rows(6, seed=9, head=(5, 3, 8))
STEPS = 4  # consistency begins with the third
WHOLE, PARTS = 10**6, 110
TERMS = {"consistency": {"weight": 0.3, "start": 0.5, "bound": 3.0}}


def configured(budget=WHOLE, stage=0, dtype="float32", lora=False, languages="response", **sections):
    adapters = {"lora": {"rank": 4}} if lora else {}
    settings = {
        "objective": {"loss": "sft"},
        "mlc": {"layer": 1, "every": 1, "extractor_dim": 16, "weight": 0},
        "terms": {**TERMS, "decision": {"weight": 0.5, "languages": languages}},
        "train": {"epochs": 2, "batch_bundles": 6, "tokens_per_forward": budget},
        "optimizer": {"learning_rate": 5e-4},
        "model": {"path": "tiny", "dtype": dtype, **adapters},
        "engine": {"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
    }
    return tiny_config(**{**settings, **sections})


def train(rank, plan):
    results = {}
    for run in plan:
        trained, history = run_engine(configured(*run), ROWS, STEPS, branches=BRANCHES)
        results[run] = history, whole_weights(trained)
    return results


PLANS = {
    1: [
        (WHOLE, 0, "float32", False),
        (WHOLE, 0, "float32", True),
        (WHOLE, 0, "bfloat16", False),
        (WHOLE, 0, "float32", False, "all"),
    ],
    2: [
        (PARTS, 2, "float32", False),
        (PARTS, 3, "float32", False),
        (PARTS, 2, "float32", True),
        (PARTS, 2, "bfloat16", False),
        (PARTS, 2, "float32", False, "all"),
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decision")
    return {
        (workers, *run): result
        for workers, plan in PLANS.items()
        for run, result in on_workers(workers, train, folder / str(workers), plan)[0].items()
    }


@pytest.mark.parametrize("run", PLANS[2], ids=str)
def test_steps_are_those_of_one_worker_with_one_forward(run, trained):
    (history, weights), (expected, wanted) = trained[2, *run], trained[1, WHOLE, 0, *run[2:]]
    exact = run[2] == "float32"
    assert max(row["forwards"] for row in history) > 1 == max(row["forwards"] for row in expected)
    taps = [False, "all" in run]
    assert [["loss/consistency" in row, "term_bundles" in row] for row in history] == [taps] * 2 + [[True, True]] * 2
    for row, want in zip(history, expected, strict=True):
        for name in (n for n in want if n.startswith(("loss/", "decision/", "consistency/"))):
            assert row[name] == pytest.approx(want[name], rel=1e-5 if exact else 5e-2, abs=1e-5 if exact else 2e-2), (
                name
            )
        assert row["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-4 if exact else 5e-2)
    if exact:
        for name, value in wanted.items():
            assert float((weights[name] - value).norm() / value.norm()) < 1e-5, name


def plain_loss(model, rows, begun, languages):
    """The loss of a batch written out: SFT, the decision in English or in all languages, consistency of two or more."""
    fitted, decided, drawn = [], [], []
    for row in rows:
        prompt = row.prompts[row.response_prompt]
        shares = model(torch.tensor([prompt + row.chosen])).logits[0].log_softmax(-1)
        fitted.append(-sum(shares[len(prompt) - 1 + i, t] for i, t in enumerate(row.chosen)) / len(row.chosen))
        m = {
            c: torch.logit(plain(model, p, OPENINGS[c]).double().exp())
            for c, p in zip(row.languages, row.prompts, strict=True)
        }
        read = m.values() if languages == "all" else [m["en"]]
        right = [torch.sigmoid(v if row.kind == "harmful" else -v) for v in read]
        decided.append(-sum(map(torch.log, right)) / len(right))
        english = m.pop("en")
        target = english.detach().clamp(-3, 3)
        far = [v for v in m.values() if not (abs(float(target)) == 3 and float(v.detach() * target) >= 9)]
        if m:
            errors = [torch.nn.functional.smooth_l1_loss(v, target, reduction="none") for v in far]
            drawn.append(sum(errors) / len(m) if errors else torch.zeros(()))
    total = sum(fitted) / len(rows) + 0.5 * sum(decided) / len(rows)
    return total + (0.3 * sum(drawn) / len(drawn) if begun else 0)


@pytest.mark.parametrize("languages", ["response", "all"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_step_s_loss_and_gradient_are_those_of_plain_forwards(step, languages):
    """SFT + decision + consistency, rebuilt with one forward of transformers for each prompt and opening."""
    config = configured(languages=languages)
    objective = Objective(config)
    module, theirs = wrapped(config), wrapped(config).language_model
    (batch,) = next(steps_of(config, ROWS, 0, 1, branches=BRANCHES, start_step=step))
    by_id = {row.bundle_id: row for row in ROWS}
    expected = plain_loss(theirs, [by_id[name] for name in batch.bundle_ids], begun=step >= 2, languages=languages)
    result = loss_of(objective, batch, module(batch), ReferenceOutput(), objective.factors(step, STEPS))
    assert float(result.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    result.loss.backward()
    expected.backward()
    for (name, own), their in zip(module.language_model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(own.grad, their.grad, rtol=1e-3, atol=2e-5), name


def test_terms_teach_what_they_say():
    """Of random weights: English tells the kinds apart, and the other languages follow it."""
    config = configured(train={"epochs": 24, "batch_bundles": 11, "tokens_per_forward": WHOLE})
    objective, module = Objective(config), wrapped(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    seen = []
    for step, (batch,) in enumerate(steps_of(config, ROWS, 0, 1, branches=BRANCHES)):
        result = loss_of(objective, batch, module(batch), ReferenceOutput(), objective.factors(step, 24))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        means = {name: float(value.mean()) for name, value in {**result.metrics, **result.term_metrics}.items()}
        seen.append(means)
    assert seen[-1]["loss/decision"] < 0.3 * seen[0]["loss/decision"] and seen[-1]["decision/accuracy"] > 0.9
    assert seen[-1]["consistency/gap"] < 0.5 * seen[12]["consistency/gap"]


def test_data_of_one_kind_are_refused(tmp_path):
    write_rows(tmp_path, [rows_to_table([row for row in ROWS if row.kind == "harmful"])], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    with pytest.raises(ConfigError, match=r"all 6 of data\.train are harmful: add bundles of the other kind"):
        check_kinds(configured(), tokens)
    check_kinds(configured(terms={}), tokens)


def test_a_run_goes_on_with_the_openings_that_it_began_with(tmp_path, monkeypatch):
    write_rows(tmp_path, [rows_to_table(ROWS)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)

    def said(config):
        return fingerprints_of(config, tokens, None, model="m")

    before, again = said(configured()), said(configured())
    assert before == again and said(configured(terms={})).keys() == {"model", "tokens"}
    english = shipped_phrases()["en"]
    other = {**shipped_phrases(), "en": replace(english, openings=english.openings[1:])}
    monkeypatch.setattr(openings, "shipped_phrases", lambda: other)
    after = said(configured())
    assert {name for name in before if before[name] != after[name]} == {"openings"}
    with pytest.raises(SettingsChangedError, match="openings had the fingerprint"):
        refuse_other_content(before, after, [], Place(tmp_path))
    with pytest.raises(ConfigError, match=r"openings\.further has 'xx'"):
        said(configured(openings={"further": {"xx": ["No."]}}))


def measured(rank, terms):
    config = configured(PARTS, terms=terms)
    engine = make_engine(config)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), [rows_to_table(HELD_OUT)], fingerprint="x", rejected={})
        tokens = TokenArtifact.open(folder)
        cutting = cutting_of(config, tokens, tokens_per_forward=PARTS, world_size=engine.world_size, branches=BRANCHES)
        cutting = held_out_cutting(cutting, tokens)

        def batches():
            plans = plans_of(tokens, batches_of(tokens, seed=1, at_once=4), cutting)
            return stream_steps(tokens, plans, cutting, None, rank=rank)

        return Validation(Objective(config), engine, batches, None, ["benign", "harmful"], Progress())()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("terms", [TERMS, {}], ids=["all", "none"])
def test_held_out_bundles_say_how_well_the_kinds_are_told_apart(workers, terms, tmp_path):
    metrics = on_workers(workers, measured, tmp_path, terms)[0]
    model = wrapped(configured()).language_model
    with torch.no_grad():
        m = {
            (index, code): float(torch.logit(plain(model, prompt, OPENINGS[code]).double().exp()))
            for index, row in enumerate(HELD_OUT)
            for code, prompt in zip(row.languages, row.prompts, strict=True)
        }
    for code in LANGUAGES if terms else ["en"]:
        own = [(m[index, code], row.kind == "harmful") for index, row in enumerate(HELD_OUT) if (index, code) in m]
        values, harmful = torch.tensor([v for v, _ in own]), torch.tensor([h for _, h in own])
        assert metrics[f"validation/refusal/auc/{code}"] == pytest.approx(auc(values, harmful))
        assert metrics[f"validation/refusal/log_odds/{code}"] == pytest.approx(float(values.mean()), abs=1e-4)
        assert metrics[f"validation/refusal/likeliest/{code}"] == pytest.approx(float(values[harmful].max()), abs=1e-4)
        benign = float(values[~harmful].mean())
        assert metrics[f"validation/benign/refusal/log_odds/{code}"] == pytest.approx(benign, abs=1e-4)
    assert metrics["validation/refusal/auc"] == metrics["validation/refusal/auc/en"]
    of_harmful = sum(row.kind == "harmful" for row in HELD_OUT)
    assert metrics["validation/refusal/per_kind"] == min(of_harmful, len(HELD_OUT) - of_harmful)
    assert ("validation/refusal/auc/sw" in metrics) is bool(terms)


def test_a_term_that_begins_before_english_tells_the_kinds_apart_is_warned_of():
    def rows(values, per_kind):
        return [
            {"step": step, "validation/refusal/auc": value, "validation/refusal/per_kind": float(per_kind)}
            for step, value in values
        ]

    def said(watch, values, per_kind=8):
        return [warning for row in rows(values, per_kind) for warning in watch.see(row)]

    begins = {0: ["mlc"], 4: ["consistency", "anchor"]}
    watch = Watch(CollapseSection(), min_decision_auc=0.75, begins=begins)
    first, second = said(watch, [(0, 0.5), (2, 0.1), (4, 0.7), (6, 0.2)])
    assert first.startswith("mlc begins after step 0") and "AUC of 0.50 only" in first
    assert second.startswith("consistency, anchor begin after step 4") and "min_decision_auc=0.75" in second
    assert said(Watch(CollapseSection(), min_decision_auc=0.75, begins=begins), [(0, 0.75), (4, 0.9)]) == []
    assert said(Watch(CollapseSection(), min_decision_auc=None, begins=begins), [(0, 0.1)]) == []
    assert Watch(CollapseSection(), min_decision_auc=0.75, begins=begins).see({"step": 0}) == []
    (few,) = said(Watch(CollapseSection(), min_decision_auc=0.75, begins=begins), [(0, 0.1), (4, 0.9)], per_kind=7)
    assert "7 bundles of its rarer kind, too few (below 8) to tell whether mlc begins too early" in few


def test_openings_that_a_model_never_writes_are_warned_of():
    likeliest = {f"validation/refusal/likeliest/{code}": value for code, value in (("ar", -9.0), ("en", -2.0))}
    watch = Watch(CollapseSection(), reads_decisions=True)
    (warning,) = watch.see({"step": 0, **likeliest})
    assert warning.startswith("the openings of refusals in ar are next to impossible behind every held-out harmful")
    assert "openings.further" in warning
    assert watch.see({"step": 4, **likeliest}) == []  # training has changed them since
    assert Watch(CollapseSection()).see({"step": 0, **likeliest}) == []  # nothing trains them


def measured_at(rank):
    """The steps after which held-out bundles are measured, of a run that measures them every 50 steps."""
    section = {"train": [{"path": "sample:train"}], "validation": {"sources": [{"path": "x"}], "every": 50}}
    _, history = run_engine(
        configured(data=section), ROWS, STEPS, branches=BRANCHES, validate=lambda: {"validation/refusal/auc": 0.5}
    )
    return [row["step"] for row in history if "validation/refusal/auc" in row]


def test_held_out_bundles_are_measured_when_a_term_begins(tmp_path):
    assert on_workers(1, measured_at, tmp_path)[0] == [0, 2, 4]
