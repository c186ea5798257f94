"""What is said of a run's batches at its start; operations counted from shapes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlc_ray.config import ConfigError
from mlc_ray.data.batches import collate
from mlc_ray.data.plan import BudgetError
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.device import peak_tflops
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import CPU_TOKENS, cutting_of, order_of, steps_of, tokens_per_forward
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.flops import Work
from mlc_ray.train.planning import (
    check_groups,
    check_kinds,
    check_terms,
    look_ahead,
    not_measured,
    said_of,
    tapping,
)
from tests.data.files import write_rows
from tests.train.tiny import LANGUAGES, random_rows, tiny_config, wrapped

ROWS = random_rows(30, head=(1, 2, 3))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_rows(folder, [rows_to_table(ROWS)], fingerprint="x", rejected={})
    return TokenArtifact.open(folder)


def looked_at(tokens, budget, workers=1, **sections):
    config = tiny_config(train={"batch_bundles": 8, "tokens_per_forward": budget}, **sections)
    cutting = cutting_of(config, tokens, tokens_per_forward=budget, world_size=workers)
    order = order_of(config, tokens)
    check_groups(tokens, tapping(order, cutting, 8), cutting)
    return look_ahead(tokens, order, cutting, 8), cutting


def test_the_start_says_how_batches_are_cut(tokens):
    outlook, cutting = looked_at(tokens, 10**6)
    assert (outlook.steps, outlook.forwards, outlook.idle, outlook.oversized) == (8, 8, 0, 0)
    assert said_of(outlook, cutting, 8) == [
        "1 forward a step, of at most 1000000 tokens, on each of 1 worker, for 8 bundles (mean of the first 8 steps)"
    ]


def test_the_start_says_how_many_forwards_have_nothing_that_counts(tokens):
    outlook, cutting = looked_at(tokens, 10**6, workers=10)  # six batches of 8, two of 6
    assert outlook.idle == 6 * 2 + 2 * 4
    assert said_of(outlook, cutting, 8)[1].startswith(
        "20 of 80 forwards have no bundle left, and forward one at weight 0"
    )


def test_the_start_says_how_many_bundles_are_larger_than_a_forward(tokens):
    lengths = tokens.lengths(range(len(tokens))).own_tokens(head=3, taps=True, rejected=True)
    budget = 3 + sorted(lengths.tolist())[-3]
    outlook, cutting = looked_at(tokens, budget)
    assert 1 <= outlook.oversized <= 2 and outlook.oversized == int((lengths + 3 > budget).sum())
    assert f"{outlook.oversized} bundles have more tokens than train.tokens_per_forward={budget}" in "".join(
        said_of(outlook, cutting, 8)
    )


def test_a_budget_that_the_largest_group_exceeds_is_refused_with_both_numbers(tokens):
    config = {"terms": {"contrast": {}}}
    with pytest.raises(BudgetError) as caught:
        looked_at(tokens, 100, **config)
    assert isinstance(caught.value, MlcRayError)
    assert "train.tokens_per_forward=100 is too small for a group of train.group_bundles=8" in str(caught.value)
    needed = int(str(caught.value).split("the largest takes ")[1].split(" ")[0])
    with pytest.raises(BudgetError, match=f"the largest takes {needed} tokens"):
        looked_at(tokens, needed - 1, **config)
    assert looked_at(tokens, needed, **config)[0].forwards == 8
    # A term that is off, or compares nothing, needs no group.
    for terms in ({"contrast": {"weight": 0}}, {"anchor": {}}):
        looked_at(tokens, 100, terms=terms)


def test_a_term_without_a_step_is_refused(tokens):
    late = tiny_config(
        train={"batch_bundles": 8, "epochs": 1, "max_steps": 5}, mlc={"every": 4, "start": 0.9}, terms={"anchor": {}}
    )
    assert steps_of(late, tokens) == 4
    with pytest.raises(ConfigError, match=r"mlc.start=0.9 with mlc.every=4 leaves no step of 4 that has the term"):
        check_terms(late, 4)
    check_terms(late, 5)  # steps 0 and 4
    cutting = cutting_of(late, tokens, tokens_per_forward=10**6, world_size=1)
    assert [cutting.taps(step) for step in range(4)] == [True, False, False, False]  # those of the anchor alone
    alone = tiny_config(train={"batch_bundles": 8, "epochs": 1}, mlc={"every": 1, "start": 0.5})
    cutting = cutting_of(alone, tokens, tokens_per_forward=10**6, world_size=1)
    assert [cutting.taps(step) for step in range(4)] == [False, False, True, True] and cutting.ever_taps


def test_a_weight_of_the_other_kind_is_refused_where_there_is_none(tmp_path):
    one = [row for row in ROWS if row.kind == "benign"]
    write_rows(tmp_path, [rows_to_table(one)], fingerprint="x", rejected={})
    alone = TokenArtifact.open(tmp_path)
    with pytest.raises(ConfigError, match=r"terms.contrast needs harmful and benign bundles, but all .* are benign"):
        check_kinds(tiny_config(terms={"contrast": {"other_kind": 4}}), alone)
    check_kinds(tiny_config(terms={"contrast": {}}), alone)


def test_twins_come_together_where_a_term_tells_the_kinds_apart(tmp_path):
    rows = [replace(row, pair=f"p{index // 2}") for index, row in enumerate(ROWS)]
    write_rows(tmp_path, [rows_to_table(rows)], fingerprint="x", rejected={})
    twins = TokenArtifact.open(tmp_path)

    def parted(**terms):
        order = order_of(tiny_config(train={"batch_bundles": 4}, terms=terms), twins)
        batches = [order.batch(step) for step in range(order.steps_per_epoch)]
        return sum(row ^ 1 not in batch for batch in batches for row in batch)

    assert parted(contrast={"other_kind": 4}) == 0 < parted(contrast={})
    assert len(set(twins.pairs.tolist())) == len(ROWS) // 2


def test_auto_is_a_fixed_number_on_a_cpu_and_left_to_the_workers_on_gpus():
    auto = tiny_config(train={"tokens_per_forward": "auto"})
    assert (
        (tokens_per_forward(auto, gpu=False), tokens_per_forward(auto, gpu=True)) == (CPU_TOKENS, None) == (2048, None)
    )
    said = tiny_config(train={"tokens_per_forward": 777})
    assert tokens_per_forward(said, gpu=True) == tokens_per_forward(said, gpu=False) == 777


@pytest.mark.parametrize("taps", [True, False])
@pytest.mark.parametrize("layer", ["last", 2])
def test_operations_are_those_that_pytorch_counts(taps, layer):
    config = tiny_config(mlc={"layer": layer})
    module = wrapped(config)
    work, objective = Work.of(module, Engine.shape), Objective(config)
    batch = collate(ROWS[:4], languages=LANGUAGES, weights=[0.25] * 4, needs_rejected=True, reference=None, tap=taps)
    with FlopCounterMode(display=False) as counter:
        output = module(batch)
        zeros = torch.zeros(4)
        objective.total_loss(
            weight=batch.weight, chosen=output.chosen, rejected=output.rejected, reference_chosen=zeros,
            reference_rejected=zeros, representations=output.representations, present=output.present,
        ).loss.backward()  # fmt: skip
    counts = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    matrices = sum(number for name, number in counts.items() if "attention" not in name)
    # PyTorch's counter has the extractor and the Gram matrices too, and no attention on a CPU.
    assert replace(work, attention=0).step(batch) == pytest.approx(matrices, rel=0.02)
    assert work.step(batch) - replace(work, attention=0).step(batch) == pytest.approx(attended(batch, module.layer))


def attended(batch, layer):
    """4 operations a pair and dimension forward, 8 backward; of each block, over the rows that are still there."""
    tree, total = batch.tree, 0
    for block in range(3):
        for segment in range(len(tree.lengths) if block < layer else tree.prompt_only):
            before = tree.key_lengths[segment] - tree.lengths[segment]
            total += sum(before + own + 1 for own in range(tree.lengths[segment])) * 12 * 32
    return total


def test_adapters_are_trained_and_what_is_below_them_is_not():
    whole = Work.of(wrapped(tiny_config()), Engine.shape)
    lora = {"lora": {"rank": 2, "target_modules": "all-linear"}}
    adapted = Work.of(wrapped(tiny_config(model=lora)), Engine.shape)
    assert whole.trained == 1 and whole.head_trained and whole.head == 67 * 32
    assert 0 < adapted.trained < 0.15 and not adapted.head_trained
    assert adapted.blocks == pytest.approx(whole.blocks / (1 - adapted.trained))


def test_a_mixture_that_does_not_say_how_many_experts_a_token_meets_has_no_count():
    module = wrapped(tiny_config())
    module.language_model.config.num_local_experts = 8
    assert Work.of(module, Engine.shape) is None


def test_peaks_of_gpus_by_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "bfloat16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312
    assert (peak_tflops("NVIDIA L40S", "bfloat16"), peak_tflops("NVIDIA L4", "bfloat16")) == (362, 121)
    assert peak_tflops("NVIDIA L40", "bfloat16") is peak_tflops("NVIDIA H100 80GB HBM3", "float32") is None


def test_the_start_says_what_only_held_out_bundles_tell():
    said = not_measured(tiny_config(mlc={"start": 0.5}), 20)
    assert said is not None and "when mlc begins and whether the chosen answers themselves lose" in said
    assert not_measured(tiny_config(objective={"loss": "sft"}, mlc={"weight": 0}), 20) is None
    only = not_measured(tiny_config(mlc={"weight": 0}), 20)
    assert only is not None and "begin" not in only and "data.validation" in only
    held_out = tiny_config(data={"train": [{"path": "x"}], "validation": {"sources": [{"path": "y"}]}})
    assert not_measured(held_out, 20) is None
