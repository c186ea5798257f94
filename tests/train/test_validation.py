"""Held-out bundles: what is measured of them is what plain forwards give, and training does not notice."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlc_ray.data.plan import Cutting
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import stream_steps
from mlc_ray.data.tables import rows_to_table
from mlc_ray.losses.mlc import mlc_losses
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import cutting_of
from mlc_ray.train.answers import MissingAnswersError
from mlc_ray.train.loop import Progress
from mlc_ray.train.planning import check_groups, held_out_cutting
from mlc_ray.train.reference import cached_reference
from mlc_ray.train.run import prepare_data
from mlc_ray.train.validation import (
    Validation,
    ValidationError,
    batches_of,
    check_held_out,
    language_cosines,
    plans_of,
)
from tests.data.files import write_rows
from tests.train.tiny import (
    LANGUAGES,
    ReferenceRow,
    aligned,
    make_engine,
    on_workers,
    online_reference,
    random_rows,
    run_engine,
    tiny_config,
    translated,
    whole_weights,
    wrapped,
)

STEPS, EVERY = 5, 3
ROWS = random_rows(27, head=(5, 3, 8))
TRAINED, HELD_OUT = ROWS[:16], [*ROWS[16:]]
ALONE = HELD_OUT[4]
HELD_OUT[4] = replace(  # has no other language to compare with
    ALONE,
    languages=["en"],
    prompts=[ALONE.prompts[ALONE.response_prompt]],
    tapped=[ALONE.tapped[ALONE.response_prompt]],
    response_prompt=0,
)
ENGINES = {
    "stage2": {"stage": 2},
    "stage3": {"stage": 3, "persistence_threshold": 0},
    "ddp": {"name": "examples.my_engine:TorchDdp", "stage": None},
}


def configured(engine, **sections):
    return tiny_config(
        data={"validation": {"sources": [{"path": "none"}], "every": EVERY}}, engine=ENGINES[engine], **sections
    )


def log_probs(model, row):
    """Summed log-probs of both answers, by a plain forward each."""
    prompt, numbers = row.prompts[row.response_prompt], []
    for answer in (row.chosen, row.rejected):
        shares = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        numbers.append(sum(float(shares[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
    return numbers


def references():
    model = wrapped(configured("stage2")).language_model.eval()
    with torch.no_grad():
        return {row.bundle_id: ReferenceRow(*log_probs(model, row), None) for row in ROWS}


def trained_with(rank, engine, validated, table):
    """Rows of the metrics and the weights after training, with held-out bundles or without."""
    config = configured(engine)
    made, progress = make_engine(config), Progress()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), [rows_to_table(HELD_OUT)], fingerprint="held-out", rejected={})
        tokens = TokenArtifact.open(folder)
        cutting = Cutting(60, made.world_size, head=tokens.head, rejected=True, taps=lambda step: True, ever_taps=True)
        rows = batches_of(tokens, seed=config.seed, at_once=4)

        def batches():
            planned = plans_of(tokens, rows, cutting)
            return stream_steps(tokens, planned, cutting, aligned(table, HELD_OUT), rank=rank)

        measured = Validation(Objective(config), made, batches, cached_reference, ["benign", "harmful"], progress)
        _, history = run_engine(
            config, TRAINED, STEPS, table, engine=made, progress=progress, validate=measured if validated else None
        )
    return history, progress, whole_weights(made)


def all_runs(rank, table):
    return {
        (engine, validated): trained_with(rank, engine, validated, table)
        for engine in ENGINES
        for validated in (True, False)
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    table, folder = references(), tmp_path_factory.mktemp("validation")
    return {count: on_workers(count, all_runs, folder / str(count), table)[0] for count in (1, 2)}


@torch.no_grad()
def plain(weights):
    """What is expected with these weights, from a plain forward of every prompt and every answer."""
    module = wrapped(configured("stage2")).eval()
    module.load_state_dict(weights)
    model, table, found = module.language_model, references(), []
    for row in HELD_OUT:
        chosen, rejected = log_probs(model, row)
        before = table[row.bundle_id]
        margin = 0.1 * ((chosen - before.chosen) - (rejected - before.rejected))
        numbers = {
            "log_prob/chosen": chosen,
            "log_prob/chosen_change": chosen - before.chosen,
            "reward/chosen": 0.1 * (chosen - before.chosen),
            "reward/rejected": 0.1 * (rejected - before.rejected),
            "reward/margin": margin,
            "reward/accuracy": float(margin > 0),
            "loss/alignment": float(-torch.nn.functional.logsigmoid(torch.tensor(margin))),
        }
        states = [model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0, -1]
                  for prompt in row.prompts]  # fmt: skip
        if len(states) > 1:
            directions = torch.nn.functional.normalize(module.extractor(torch.stack(states)).double(), dim=1)
            losses, values = mlc_losses(directions.unsqueeze(0))
            numbers["loss/mlc"] = float(losses)
            numbers["mlc/leading_share"] = float(values[0, 0] ** 2 / (values[0] ** 2).sum())
            for index, language in enumerate(row.languages):
                others = [float((directions[index] @ it).abs()) for i, it in enumerate(directions) if i != index]
                numbers[f"mlc/cosine/{language}"] = sum(others) / len(others)
        found.append((row.kind, numbers))
    expected = {}
    for prefix, kinds in {"": {"harmful", "benign"}, "harmful/": {"harmful"}, "benign/": {"benign"}}.items():
        own = [numbers for kind, numbers in found if kind in kinds]
        for name in {name for numbers in own for name in numbers}:
            values = [numbers[name] for numbers in own if name in numbers]
            expected[f"validation/{prefix}{name}"] = sum(values) / len(values)
        expected[f"validation/{prefix}loss/total"] = (
            expected[f"validation/{prefix}loss/alignment"] + 0.8 * expected[f"validation/{prefix}loss/mlc"]
        )
    return expected


def held_out(row):
    return {name: value for name, value in row.items() if name.startswith("validation/")}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_measured_is_what_plain_forwards_give(runs, count, engine):
    history, _, weights = runs[count][engine, True]
    assert [row["step"] for row in history] == [0, *range(1, STEPS + 1)]
    assert [row["step"] for row in history if held_out(row)] == [0, EVERY, STEPS]
    expected = plain(weights)
    assert held_out(history[-1]).keys() == expected.keys()
    for name, value in expected.items():
        assert history[-1][name] == pytest.approx(value, rel=1e-5, abs=2e-5), name


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_training_does_not_notice(runs, count, engine):
    history, _, weights = runs[count][engine, True]
    without, _, wanted = runs[count][engine, False]
    for row, want in zip(history[1:], without, strict=True):
        for name in ("loss/total", "gradient_norm", "mlc/leading_share", "learning_rate"):
            assert row.get(name) == want.get(name), (row["step"], name)
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())


def test_the_first_row_is_the_model_before_training(runs):
    history, progress, _ = runs[1]["stage2", True]
    first, last = history[0], history[-1]
    assert set(first) == {"step", *held_out(first)} and first["validation/log_prob/chosen_change"] == 0
    assert first["validation/loss/alignment"] == pytest.approx(0.693147, abs=1e-4)
    assert progress.before == {
        name: first[f"validation/{name}"] for name in (f"{kind}log_prob/chosen" for kind in ("", "benign/", "harmful/"))
    }
    change = last["validation/log_prob/chosen"] - first["validation/log_prob/chosen"]
    assert last["validation/log_prob/chosen_change"] == pytest.approx(change) and abs(change) > 1e-3


CASES = {
    "a loss without rewards": {"objective": {"loss": "sft"}},
    "adapters": {"model": {"lora": {"rank": 4}}, "reference": "online"},
    "a reference asked at every step": {"reference": "online"},
    "terms that compare bundles": {
        "terms": {"contrast": {}, "variance": {}},
        "objective": {"loss": "simpo"},
        "train": {"group_bundles": 2, "tokens_per_forward": 10**6},
    },
}


def measured_in(rank, case):
    """What is measured of the held-out bundles before and after three steps, with one budget and with another."""
    config, found = configured("stage2", **CASES[case]), []
    for budget in (150, 10**6):
        made, progress = make_engine(config), Progress()
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder), [rows_to_table(HELD_OUT)], fingerprint="held-out", rejected={})
            tokens = TokenArtifact.open(folder)
            cutting = cutting_of(config, tokens, tokens_per_forward=budget, world_size=made.world_size)
            rows = batches_of(tokens, seed=config.seed, at_once=4)
            own = held_out_cutting(cutting, tokens)
            check_groups(tokens, rows, own)

            def batches(tokens=tokens, rows=rows, own=own):
                return stream_steps(tokens, plans_of(tokens, rows, own), own, None, rank=rank)

            reference = online_reference(config, made) if config.needs_reference else None
            kinds = ["benign", "harmful"]
            measured = Validation(Objective(config), made, batches, reference, kinds, progress)
            _, history = run_engine(
                config, TRAINED, 3, engine=made, progress=progress, validate=measured, reference=reference
            )
        found.append([held_out(row) for row in history if held_out(row)])
    return found


def all_cases(rank):
    return {case: measured_in(rank, case) for case in CASES}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return [on_workers(count, all_cases, tmp_path_factory.mktemp("cases"))[0] for count in (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_whatever_the_loss_and_the_cut_the_same_is_measured(case, cases):
    one, two = (found[case] for found in cases)
    expected = one[0]
    assert [row["validation/log_prob/chosen_change"] != 0 for row in expected] == [False, True]
    assert ("validation/reward/margin" in expected[0]) is (case != "a loss without rewards")
    if case == "terms that compare bundles":
        assert min(expected[0][f"validation/loss/{name}"] for name in ("contrast", "variance")) > 0.01
    for other in (one[1], *two):
        for row, want in zip(other, expected, strict=True):
            assert row == pytest.approx(want, rel=1e-5, abs=2e-5)


ANSWERED = translated(ROWS[16:])
ANSWERED[2] = replace(ANSWERED[2], answers=ANSWERED[2].answers[:1])  # has answers in some of its languages


def measured_by_language(rank):
    """What is measured of bundles with answers in several languages before training and after a change of weights."""
    config = configured("stage2", objective={"loss": "sft", "answers": "given"}, mlc={"weight": 0})
    made, progress = make_engine(config), Progress()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), [rows_to_table(ANSWERED)], fingerprint="held-out", rejected={})
        tokens = TokenArtifact.open(folder)
        cutting = cutting_of(config, tokens, tokens_per_forward=150, world_size=made.world_size)
        own = held_out_cutting(cutting, tokens)

        def batches():
            planned = plans_of(tokens, batches_of(tokens, seed=1, at_once=4), own)
            return stream_steps(tokens, planned, own, None, rank=rank)

        measured = Validation(Objective(config), made, batches, None, ["benign", "harmful"], progress)
        _, history = run_engine(config, translated(TRAINED), 3, engine=made, progress=progress, validate=measured)
    return [held_out(row) for row in history if held_out(row)], whole_weights(made)


@torch.no_grad()
def plain_by_language(weights=None):
    """Mean log-prob of the chosen answers to the prompts in each language, by kind, from a plain forward of each."""
    module = wrapped(configured("stage2")).eval()
    if weights is not None:
        module.load_state_dict(weights)
    found = {}
    for row in ANSWERED:
        others = [(each["prompt"], each["chosen"]) for each in row.answers]
        for index, answer in [(row.response_prompt, row.chosen), *others]:
            prompt = row.prompts[index]
            shares = module.language_model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            value = sum(float(shares[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            for prefix in ("", f"{row.kind}/"):
                found.setdefault((prefix, row.languages[index]), []).append(value)
    return {place: sum(values) / len(values) for place, values in found.items()}


def test_the_chosen_answers_of_each_language_are_measured_and_their_change(tmp_path):
    (first, last), weights = on_workers(2, measured_by_language, tmp_path)[0]
    before, after = plain_by_language(), plain_by_language(weights)
    assert {code for _, code in before} == set(LANGUAGES)
    for (prefix, code), value in after.items():
        assert first[f"validation/{prefix}log_prob/chosen/{code}"] == pytest.approx(before[prefix, code], rel=1e-5)
        assert last[f"validation/{prefix}log_prob/chosen/{code}"] == pytest.approx(value, rel=1e-5)
        change = last[f"validation/{prefix}log_prob/chosen_change/{code}"]
        assert change == pytest.approx(value - before[prefix, code], abs=1e-4) and change


def test_held_out_batches_are_alike_in_size_and_do_not_follow_the_file(tmp_path):
    write_rows(tmp_path, [rows_to_table(random_rows(33))], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    assert [len(rows) for rows in batches_of(tokens, seed=1, at_once=32)] == [33]
    parts = batches_of(tokens, seed=1, at_once=8)
    assert [len(rows) for rows in parts] == [9, 8, 8, 8]
    order = [row for rows in parts for row in rows]
    assert sorted(order) == list(range(33)) != order
    assert batches_of(tokens, seed=1, at_once=8) == parts != batches_of(tokens, seed=2, at_once=8)


def test_a_measure_that_is_not_finite_before_training_is_no_point_of_comparison(tmp_path):
    def broken(batch):
        output = forward(batch)
        return replace(output, chosen=replace(output.chosen, total=output.chosen.total * torch.nan))

    config, progress = configured("stage2", objective={"loss": "simpo"}), Progress()
    forward = wrapped(config)
    engine = SimpleNamespace(module=forward, forward=broken, device=torch.device("cpu"))
    write_rows(tmp_path, [rows_to_table(HELD_OUT)], fingerprint="x", rejected={})
    tokens = TokenArtifact.open(tmp_path)
    cutting = held_out_cutting(cutting_of(config, tokens, tokens_per_forward=100, world_size=1), tokens)

    def batches():
        plans = plans_of(tokens, batches_of(tokens, seed=1, at_once=8), cutting)
        return stream_steps(tokens, plans, cutting, None, rank=0)

    metrics = Validation(Objective(config), engine, batches, None, ["benign", "harmful"], progress)()
    assert progress.before == {} and math.isnan(metrics["validation/log_prob/chosen"])
    assert "validation/log_prob/chosen_change" not in metrics


def test_the_mean_cosine_of_two_languages_is_theirs_and_a_lone_one_has_none():
    rows = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [-3.0, 3.0]], [[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]]])
    present = torch.tensor([[True, False, True], [False, True, False]])
    cosines, others = language_cosines(rows, present)
    assert others.tolist() == [[True, False, True], [False] * 3]
    assert cosines[0, [0, 2]].tolist() == pytest.approx([0.5**0.5] * 2)


def test_bundles_that_are_trained_on_are_refused(tmp_path):
    stored = []
    for name, rows in {"trained": ROWS[:6], "held_out": ROWS[4:9]}.items():
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, [rows_to_table(rows)], fingerprint=name, rejected={})
        stored.append(TokenArtifact.open(tmp_path / name))
    trained, both = stored
    with pytest.raises(ValidationError, match=r"2 of its 5 bundles are in data.train too, the first is 'bundle-04'"):
        check_held_out(both, trained)


def test_held_out_bundles_need_the_answers_that_the_loss_needs(tmp_path, monkeypatch):
    config = tiny_config(
        data={"validation": {"sources": [{"path": str(tmp_path / "held.jsonl")}]}}, objective={"loss": "simpo"}
    )
    (tmp_path / "held.jsonl").write_text("", encoding="utf-8")
    lacking = [replace(row, rejected=None) for row in ROWS[16:20]]

    def stored(data, model, *, chat, cache_dir):
        rows = TRAINED if data.validation is not None else lacking
        folder = cache_dir / str(len(rows))
        folder.mkdir()
        write_rows(folder, [rows_to_table(rows)], fingerprint="x", rejected={})
        return TokenArtifact.open(folder)

    monkeypatch.setattr("mlc_ray.train.run.prepare_token_rows", stored)
    with pytest.raises(MissingAnswersError, match=r"row 1: bundle bundle-16 has no rejected answer"):
        prepare_data(config, cache_dir=tmp_path, layer=2, gpu=False)
