from dataclasses import fields

import numpy as np
import pytest
import torch

from mlc_ray.data.batches import BatchError, collate, collate_prompts
from mlc_ray.types import ReferenceRows, TokenRow

LANGUAGES = ["ar", "en", "zh"]


def row(name, languages, prompts, chosen, rejected, response="en"):
    return TokenRow(
        bundle_id=name,
        kind="harmful",
        languages=languages,
        prompts=prompts,
        tapped=[len(p) - 1 for p in prompts],
        response_prompt=languages.index(response) if response in languages else -1,
        chosen=chosen,
        rejected=rejected,
    )


HEAD = [7, 8]
FIRST = row("a", ["zh", "en"], [[*HEAD, 31, 32], [*HEAD, 11, 12, 13]], [1, 2, 9], [3])
SECOND = row("b", ["ar", "en"], [[*HEAD, 21], [*HEAD, 14, 15]], [4, 9], [5, 6, 7])


def batch(rows=(FIRST, SECOND), **changes):
    settings = {"languages": LANGUAGES, "weights": [1.5, 0.0], "needs_rejected": True, "reference": None, "tap": True}
    return collate(list(rows), **settings | changes)


def sequence_to(tree, place):
    """Ids and positions of the sequence that ends at a place of the row, found by going up from parent to parent."""
    segment = max(i for i, start in enumerate(tree.starts) if start <= place)
    end, ids, positions = place + 1, [], []
    while segment >= 0:
        here = slice(tree.starts[segment], end)
        ids = tree.input_ids[0, here].tolist() + ids
        positions = tree.position_ids[0, here].tolist() + positions
        segment = tree.parents[segment]
        end = tree.starts[segment] + tree.lengths[segment]
    return ids, positions


def test_the_row_holds_every_beginning_once():
    tree = batch().tree
    assert tree.input_ids.tolist() == [[7, 8, 11, 12, 13, 14, 15, 1, 2, 4, 5, 6, 31, 32, 21]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 5, 6, 4, 4, 5, 2, 3, 2]]
    assert tree.lengths == (2, 3, 2, 2, 1, 2, 2, 1)  # head, prompts, chosen, rejected (one token: nothing), prompts
    assert tree.parents == (-1, 0, 0, 1, 2, 2, 0, 0)
    assert tree.starts == (0, 2, 5, 7, 9, 10, 12, 14)
    assert (tree.answers, tree.prompt_only, tree.tokens) == (3, 6, 15)


def test_keys_are_those_of_ancestors_and_own():
    tree = batch().tree
    paths = [[0, 1], [0, 1, 2, 3, 4], [0, 1, 5, 6], [0, 1, 2, 3, 4, 7, 8], [0, 1, 5, 6, 9], [0, 1, 5, 6, 10, 11],
             [0, 1, 12, 13], [0, 1, 14]]  # fmt: skip
    assert tree.keys.tolist() == [place for path in paths for place in path]
    assert tree.key_lengths == tuple(map(len, paths))
    assert tree.key_bounds.tolist() == [0, 2, 7, 11, 18, 23, 29, 33, 36]
    assert tree.query_bounds.tolist() == [*tree.starts, 15]
    assert tree.key_bounds.dtype == tree.query_bounds.dtype == torch.int32
    assert tree.input_ids.dtype == tree.position_ids.dtype == tree.keys.dtype == torch.int64


@pytest.mark.parametrize("rows", [(FIRST, SECOND), (SECOND,), (FIRST, FIRST, SECOND)])
@pytest.mark.parametrize("tap", [True, False])
def test_every_sequence_is_found_in_the_tree(rows, tap):
    made = batch(rows, weights=[1.0] * len(rows), tap=tap)
    for name, answers in (("chosen", made.chosen), ("rejected", made.rejected)):
        for index, given in enumerate(rows):
            mine = (answers.row_of_target == index).nonzero().flatten()
            answer = getattr(given, name)
            assert answers.targets[mine].tolist() == answer
            for step, place in enumerate(answers.predicting[mine].tolist()):
                ids, positions = sequence_to(made.tree, place)
                assert ids == given.prompts[given.response_prompt] + answer[:step]
                assert positions == list(range(len(ids)))
    assert made.taps is tap
    if not tap:
        assert made.prompts is None and made.tree.prompt_only == len(made.tree.lengths)
        return
    asked = zip(made.prompts.tapped, made.prompts.bundle_of_prompt, made.prompts.language_of_prompt, strict=True)
    found = [
        (int(bundle), LANGUAGES[language], sequence_to(made.tree, int(place))[0]) for place, bundle, language in asked
    ]
    expected = [(i, code, r.prompts[r.languages.index(code)])
                for i, r in enumerate(rows) for code in LANGUAGES if code in r.languages]  # fmt: skip
    assert found == expected


def test_prompts_without_a_common_beginning_have_no_head():
    first = row("a", ["zh", "en"], [[31, 32], [11, 12]], [1, 2], [3, 4])
    tree = batch([first], weights=[1.0]).tree
    assert tree.input_ids.tolist() == [[11, 12, 1, 3, 31, 32]]
    assert tree.parents == (-1, 0, 0, -1) and (tree.answers, tree.prompt_only) == (1, 3)


def test_a_prompt_keeps_a_token_of_its_own():
    same = row("a", ["zh", "en"], [[1, 2], [1, 2, 3]], [4, 5], [6, 7])
    made = batch([same], weights=[1.0])
    assert made.tree.input_ids.tolist() == [[1, 2, 3, 4, 6, 2]]
    assert [sequence_to(made.tree, place)[0] for place in made.prompts.tapped.tolist()] == [[1, 2, 3], [1, 2]]


def test_the_first_segments_are_a_tree_of_their_own():
    whole, short = batch().tree, batch(tap=False).tree
    assert whole.first(len(whole.lengths)).keys.equal(whole.keys)
    cut = whole.first(whole.prompt_only)
    for field in fields(short):
        mine, theirs = getattr(cut, field.name), getattr(short, field.name)
        assert mine.equal(theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


def test_prompts_alone():
    tree, prompts = collate_prompts([FIRST, SECOND], LANGUAGES)
    assert tree.input_ids.tolist() == [[7, 8, 11, 12, 13, 31, 32, 21, 14, 15]]
    assert tree.parents == (-1, 0, 0, 0, 0)
    assert prompts.tapped.tolist() == [4, 6, 7, 9]
    assert prompts.bundle_of_prompt.tolist() == [0, 0, 1, 1] and prompts.language_of_prompt.tolist() == [1, 2, 0, 1]
    with pytest.raises(BatchError, match="outside the grid"):
        collate_prompts([FIRST], ["en"])


def test_weights_of_terms_and_groups():
    plain = batch()
    assert plain.term_weight.tolist() == [1.5, 0.0] and plain.groups is None
    given = batch(term_weights=[0.0, 2.0], groups=[0, 1])
    assert given.term_weight.tolist() == [0.0, 2.0] and given.groups == (0, 1)


def test_parts_that_a_loss_does_not_need_are_absent():
    whole = ReferenceRows(chosen=np.array([-9.0, -1.0, -3.0]), rejected=np.array([-9.0, -2.0, -4.0]))
    both = whole.take([1, 2])
    small = batch(needs_rejected=False, reference=both)
    assert small.rejected is None
    assert small.reference_rejected is None
    assert small.reference_chosen.tolist() == [-1.0, -3.0]
    assert small.reference_state is None
    full = batch(reference=both)
    assert full.reference_rejected.tolist() == [-2.0, -4.0]
    assert full.kinds == ("harmful", "harmful")
    states = ReferenceRows(state=np.array([[1, 2], [3, 4]], dtype=np.float32))
    anchored = batch(reference=states)
    assert anchored.reference_state.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert anchored.reference_state.dtype == torch.float32
    assert anchored.reference_chosen is None and anchored.reference_rejected is None
    assert (full.bundle_ids, full.languages, full.weight.tolist()) == (("a", "b"), tuple(LANGUAGES), [1.5, 0.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": ["en", "zh"]}, r"bundle b has languages \['ar'\] outside the grid"),
        ({"rows": [FIRST, row("c", ["en"], [[1]], [2], None)]}, "bundle c has no 'rejected' answer"),
        ({"rows": [FIRST, row("c", ["zh"], [[1]], None, None)]}, "bundle c has no 'chosen' answer"),
        ({"rows": [], "weights": []}, "at least one bundle"),
        ({"weights": [1.0]}, "one weight per bundle"),
    ],
)
def test_what_is_missing_is_named(changes, message):
    with pytest.raises(BatchError, match=message):
        batch(**changes)


def test_a_bundle_without_rejected_answer_serves_losses_that_need_none():
    one = batch([row("c", ["en"], [[1]], [2], None)], weights=[1.0], needs_rejected=False)
    assert one.chosen.targets.tolist() == [2]
