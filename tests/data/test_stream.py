"""A worker's batches: planned from the artefact's lengths, the right bundles with the right weights, made ahead."""

import threading
import time
from collections import Counter

import pytest
import torch

from mlc_ray.data.order import Order
from mlc_ray.data.plan import Cutting
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import ahead, plans, stream_steps
from mlc_ray.data.tables import rows_to_table
from tests.data.files import write_rows
from tests.train.tiny import random_rows, translated

ROWS = translated(random_rows(11))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Rows in several pieces of the file."""
    folder = tmp_path_factory.mktemp("tokens")
    write_rows(folder, [rows_to_table(ROWS[:4]), rows_to_table(ROWS[4:5]), rows_to_table(ROWS[5:])],
               fingerprint="x", rejected={})  # fmt: skip
    return TokenArtifact.open(folder)


def steps_of(artifact, world=1, rank=0, steps=range(6), budget=150, tap_every=2):
    order = Order(artifact.keys, seed=3, batch_bundles=4)
    cutting = Cutting(
        budget, world, head=artifact.head, rejected=True, taps=lambda step: step % tap_every == 0, ever_taps=True
    )
    return list(stream_steps(artifact, plans(artifact, order, cutting, steps), cutting, None, rank=rank))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_workers_together_have_every_bundle_once_an_epoch(artifact, world):
    streams = [steps_of(artifact, world, rank) for rank in range(world)]
    assert len({tuple(len(step) for step in stream) for stream in streams}) == 1
    for epoch in range(2):
        batches = [b for stream in streams for step in stream[3 * epoch : 3 * epoch + 3] for b in step]
        seen = Counter(name for b in batches for name, w in zip(b.bundle_ids, b.weight.tolist(), strict=True) if w)
        assert seen == Counter(row.bundle_id for row in ROWS)
    for number, step in enumerate(zip(*streams, strict=True)):
        assert {batch.taps for own in step for batch in own} == {number % 2 == 0}
        assert sum(float(batch.weight.sum()) for own in step for batch in own) == pytest.approx(world)
        assert sum(float(batch.term_weight.sum()) for own in step for batch in own) == pytest.approx(world)


def test_what_is_forwarded_is_what_was_planned(artifact):
    order = Order(artifact.keys, seed=3, batch_bundles=4)
    cutting = Cutting(150, 2, head=artifact.head, rejected=True, taps=lambda step: step % 2 == 0, ever_taps=True)
    for rank in range(2):
        for plan, step in zip(plans(artifact, order, cutting, range(6)), steps_of(artifact, 2, rank), strict=True):
            planned = [tokens[rank] for tokens in plan.tokens]
            # Random prompts begin alike by chance at most: the tree may be a few tokens smaller than its bound.
            assert all(0 <= most - batch.tree.tokens <= 3 for most, batch in zip(planned, step, strict=True))


def test_a_restarted_stream_goes_on_with_the_very_same_batches(artifact):
    whole, rest = steps_of(artifact), steps_of(artifact, steps=range(4, 6))
    for one, other in zip(whole[4:], rest, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.bundle_ids == theirs.bundle_ids
            assert torch.equal(mine.tree.input_ids, theirs.tree.input_ids)
            assert torch.equal(mine.chosen.targets, theirs.chosen.targets)


def test_lengths_are_read_from_offsets_of_any_rows(artifact):
    found = artifact.lengths(range(len(ROWS)))
    for index, row in enumerate(ROWS):
        answered = len(row.prompts[row.response_prompt])
        expected = (
            *(len(row.languages), sum(map(len, row.prompts)), answered, len(row.chosen), len(row.rejected)),
            *(sum(len(one[name]) for one in row.answers) for name in ("chosen", "rejected")),
            len(row.answers),
        )
        assert tuple(int(values[index]) for values in vars(found).values()) == expected
    some = [9, 0, 4, 5, 3, 4]
    for name, values in vars(artifact.lengths(some)).items():
        assert values.tolist() == getattr(found, name)[some].tolist()
    with pytest.raises(IndexError, match="row 11 of 11"):
        artifact.lengths([11])


@pytest.mark.parametrize(
    ("starts", "head"), [([[1, 2, 3]] * 3, 3), ([[1, 2, 3], [1, 2, 4], [1, 2, 3]], 2), ([[1], [2], [1]], 0)]
)
def test_the_head_is_what_all_prompts_of_all_pieces_begin_with(starts, head, tmp_path):
    from dataclasses import replace

    rows = [replace(row, prompts=[[*start, 50 + i, 40 + n] for n in range(len(row.languages))])
            for i, (row, start) in enumerate(zip(ROWS, starts, strict=False))]  # fmt: skip
    write_rows(tmp_path, [rows_to_table(rows[:2]), rows_to_table(rows[2:])], fingerprint="x", rejected={})
    assert TokenArtifact.open(tmp_path).head == head


def test_values_are_made_ahead_in_order_and_errors_come_in_their_turn():
    made, asked = [], threading.Event()

    def values():
        for number in range(10):
            made.append(number)
            yield number
        raise RuntimeError("at the end")

    stream = ahead(values(), 2)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:  # one taken, two ready
        asked.wait(0.01)
    assert made == [0, 1, 2]
    assert [next(stream) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(RuntimeError, match="at the end"):
        next(stream)


def test_the_thread_ends_with_the_one_who_asks():
    def forever():
        while True:
            yield 1

    before = threading.active_count()
    stream = ahead(forever())
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
