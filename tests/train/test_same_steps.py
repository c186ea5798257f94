"""The mathematics knows no cluster: the same steps on 1, 2 and 3 workers, however a batch is cut into forwards."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from mlc_ray.data.order import Order
from mlc_ray.data.tables import keys_of
from tests.train.tiny import (
    LANGUAGES,
    ReferenceRow,
    on_workers,
    random_rows,
    run_engine,
    tiny_config,
    tiny_model,
    whole_weights,
)

HEAD = (5, 3, 8, 13)
BUNDLES, STEPS = 11, 6  # two epochs of batches of 11, 11 and 5 bundles
GROUPS = 3  # 3, 3, 3 and 2 bundles; 3 and 2 in the last batch of an epoch
BUDGETS = (106, 120, 240, 10**6)  # of a forward, in tokens; the largest group has 104
STAGES = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3, "persistence_threshold": 0},
    "offload": {"stage": 2, "offload_optimizer": True},
    "ddp": {"name": "examples.my_engine:TorchDdp", "stage": None},
}
ROUNDED = ("stage0", "stage2", "stage3")  # those trained in bfloat16 too


def single_language(rows):
    """The same, but that every fifth bundle is in English alone: the terms' mean is not over it."""
    return [
        replace(row, languages=["en"], prompts=[row.prompts[row.response_prompt]],
                tapped=[row.tapped[row.response_prompt]], response_prompt=0) if index % 5 == 1 else row
        for index, row in enumerate(rows)
    ]  # fmt: skip


ROWS = single_language(random_rows(27, head=HEAD))


def configured(budget, engine, **sections):
    return tiny_config(
        objective={"sft_weight": 0.2},
        mlc={"layer": 2, "every": 2, "extractor_dim": 16},
        terms={
            "contrast": {"weight": 0.5, "temperature": 0.3, "start": 0.3, "ramp": 0.5},
            "variance": {"weight": 0.5},
            "anchor": {"weight": 0.3},
        },
        train={"epochs": 2, "batch_bundles": BUNDLES, "group_bundles": GROUPS, "tokens_per_forward": budget},
        # AdamW makes more of rounding the larger it is: at 3e-3 weights differ by 2e-6.
        optimizer={"learning_rate": 5e-4},
        engine=engine,
        **sections,
    )


def references():
    """What an unpacked forward of the frozen model says of each bundle."""
    model = tiny_model()
    table = {}
    with torch.no_grad():
        for row in ROWS:
            prompt, numbers = row.prompts[row.response_prompt], []
            for answer in (row.chosen, row.rejected):
                shares = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                numbers.append(sum(float(shares[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            table[row.bundle_id] = ReferenceRow(*numbers, states[2][0, -1].numpy())
    return table


def train(rank, table, plan):
    """History and weights of each (budget, engine, dtype)."""
    results = {}
    for budget, engine, dtype in plan:
        config = configured(budget, STAGES[engine], model={"path": "tiny", "dtype": dtype})
        trained, history = run_engine(config, ROWS, STEPS, table)
        results[budget, engine, dtype] = history, whole_weights(trained)
    return results


PLANS = {
    1: [(budget, "stage2", "float32") for budget in BUDGETS],
    2: [(budget, "stage2", "float32") for budget in BUDGETS]
    + [(BUDGETS[0], engine, "float32") for engine in STAGES if engine != "stage2"]
    + [(budget, engine, "bfloat16") for budget in (BUDGETS[0], BUDGETS[-1]) for engine in ROUNDED],
    3: [(budget, "stage2", "float32") for budget in BUDGETS] + [(BUDGETS[0], "stage3", "float32")],
}
RUNS = [(workers, *run) for workers, runs in PLANS.items() for run in runs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    table, folder = references(), tmp_path_factory.mktemp("steps")
    return {
        (workers, *run): result
        for workers, runs in PLANS.items()
        for run, result in on_workers(workers, train, folder / str(workers), table, runs)[0].items()
    }


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("run", [run for run in RUNS if run[3] == "float32"], ids=str)
def test_losses_and_weights_are_those_of_one_worker_with_one_forward(run, trained):
    (history, weights), (expected, wanted) = trained[run], trained[1, BUDGETS[-1], "stage2", "float32"]
    parts = ["loss/total", "loss/alignment", "loss/sft", "loss/mlc", "loss/contrast", "loss/variance", "loss/anchor"]
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    for row, want in zip(history, expected, strict=True):
        assert row.keys() == want.keys()
        for name in (*parts, "mlc/leading_share", "learning_rate"):
            if name in want:
                assert row[name] == pytest.approx(want[name], rel=1e-6), (row["step"], name)
        assert row["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-5)
        # A reward is a small difference of sums of some 20 nats.
        assert row["reward/margin"] == pytest.approx(want["reward/margin"], abs=1e-5)
        for name in (n for n in want if n.startswith("collapse/")):
            assert row[name] == pytest.approx(want[name], rel=1e-5), (row["step"], name)
    assert set(weights) == set(wanted)
    for name, value in wanted.items():
        assert distance(weights[name], value) < 1e-6, name


def test_what_was_compared_had_moved_and_every_term_had_a_part_in_it(trained):
    history, weights = trained[1, BUDGETS[-1], "stage2", "float32"]
    before = {f"policy.{name}": value for name, value in tiny_model().state_dict().items()}
    assert all(distance(weights[name], value) > 5e-4 for name, value in before.items())
    assert "loss/contrast" not in history[0]
    for row, contrast in zip(history[::2], (0, 2 / 3, 1), strict=True):  # it begins after the first step
        parts = row["loss/alignment"] + 0.2 * row["loss/sft"] + 0.8 * row["loss/mlc"]
        parts += contrast * 0.5 * row.get("loss/contrast", 0.0)
        parts += 0.5 * row["loss/variance"] + 0.3 * row["loss/anchor"]
        assert row["loss/total"] == pytest.approx(parts, rel=1e-6)
        assert min(row["loss/mlc"], row.get("loss/contrast", 1.0), row["loss/variance"]) > 0.01


def test_the_cut_is_another_one_and_what_it_costs_is_logged(trained):
    rows = {
        (workers, budget): trained[workers, budget, "stage2", "float32"][0] for workers in PLANS for budget in BUDGETS
    }

    def logged(name, workers, budget):
        return [row[name] for row in rows[workers, budget]]

    assert logged("forwards", 1, 106) == [4, 2, 2, 2, 4, 1] and logged("forwards", 1, 10**6) == [1] * STEPS
    assert logged("forwards", 2, 106) == [2, 1, 1, 1, 2, 1] and logged("forwards", 3, 106) == [2, 1, 1, 1, 2, 1]
    assert logged("idle_forwards", 1, 106) == [0] * STEPS
    assert logged("idle_forwards", 3, 106) == [2, 0, 1, 0, 2, 0]  # four groups for six forwards, two for three
    assert logged("idle_forwards", 3, 10**6) == [0, 0, 1, 0, 0, 0]
    assert logged("tokens_imbalance", 1, 106) == [1] * STEPS
    assert all(1 < value < 1.7 for value in logged("tokens_imbalance", 3, 10**6))
    whole, fine = logged("tokens", 1, 10**6), logged("tokens", 1, 106)
    assert whole[1] < 0.7 * whole[0]  # the second step leaves out the prompts that nothing answers
    assert [more - less for more, less in zip(fine, whole, strict=True)] == [12, 4, 4, 4, 12, 0]  # the head, each time
    batches = Order(keys_of(row.bundle_id for row in ROWS), seed=42, batch_bundles=BUNDLES)
    sizes = [len(batches.batch(step)) for step in range(STEPS)]
    assert logged("bundles_consumed", 3, 106) == list(accumulate(sizes))
    assert all(row["tflops_per_second"] > 0 and row["data_wait_seconds"] >= 0 for row in rows[2, 106])
    assert not any("mfu" in row for row in rows[2, 106])  # no CPU's peak is known


def test_terms_are_the_mean_over_bundles_with_two_languages_whose_number_is_logged(trained):
    order = Order(keys_of(row.bundle_id for row in ROWS), seed=42, batch_bundles=BUNDLES)
    several = [sum(len(ROWS[index].languages) > 1 for index in order.batch(step)) for step in range(STEPS)]
    assert several[0] < BUNDLES
    for run, (history, _) in trained.items():
        assert [row.get("term_bundles") for row in history] == [
            n if i % 2 == 0 else None for i, n in enumerate(several)
        ], run


@pytest.mark.parametrize("engine", ROUNDED)
def test_in_bfloat16_cuts_differ_by_rounding_alone(engine, trained):
    (fine, _), (whole, _) = (trained[2, budget, engine, "bfloat16"] for budget in (BUDGETS[0], BUDGETS[-1]))
    assert fine[0]["forwards"] > whole[0]["forwards"]
    for one, other in zip(fine, whole, strict=True):
        assert one["loss/total"] == pytest.approx(other["loss/total"], rel=2e-2)
    assert fine[0]["gradient_norm"] == pytest.approx(whole[0]["gradient_norm"], rel=5e-2)  # 3.5e-2 was seen


def test_languages_of_the_fixture():
    assert {len(row.languages) for row in ROWS} == {1, 2, len(LANGUAGES)}
