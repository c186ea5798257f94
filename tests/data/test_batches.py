import numpy as np
import pytest
import torch

from mlc_ray.data.batches import BatchError, collate
from mlc_ray.types import ReferenceRow, TokenRow

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


FIRST = row("a", ["zh", "en"], [[31, 32], [11, 12, 13]], [1, 2], [3])
SECOND = row("b", ["ar", "en"], [[21], [14, 15]], [4], [5, 6, 7])


def batch(rows=(FIRST, SECOND), **changes):
    settings = {"languages": LANGUAGES, "weights": [1.5, 0.0], "needs_rejected": True, "reference": None, **changes}
    return collate(list(rows), **settings)


def test_answers_are_packed_behind_their_prompts():
    chosen, rejected = batch().chosen, batch().rejected
    assert chosen.sequences.input_ids.tolist() == [[11, 12, 13, 1, 2, 14, 15, 4]]
    assert chosen.sequences.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert rejected.sequences.input_ids.tolist() == [[11, 12, 13, 3, 14, 15, 5, 6, 7]]
    assert rejected.sequences.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert chosen.bundle_of_target.tolist() == [0, 0, 1]
    assert rejected.bundle_of_target.tolist() == [0, 1, 1, 1]


def test_every_target_is_the_token_behind_its_predictor():
    for responses in (batch().chosen, batch().rejected):
        ids = responses.sequences.input_ids[0]
        assert torch.equal(ids[responses.predicting + 1], responses.targets)
    assert batch().chosen.targets.tolist() == [1, 2, 4]
    assert batch().chosen.predicting.tolist() == [2, 3, 6]


def test_prompts_are_sorted_by_bundle_and_language_with_their_tapped_tokens():
    prompts = batch().prompts
    assert prompts.sequences.input_ids.tolist() == [[11, 12, 13, 31, 32, 21, 14, 15]]
    assert prompts.sequences.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert prompts.tapped.tolist() == [2, 4, 5, 7]
    assert prompts.bundle_of_prompt.tolist() == [0, 0, 1, 1]
    assert prompts.language_of_prompt.tolist() == [1, 2, 0, 1]


def test_parts_that_a_loss_does_not_need_are_absent():
    both = {"a": ReferenceRow(-1.0, -2.0), "b": ReferenceRow(-3.0, -4.0)}
    small = batch(needs_rejected=False, reference=both)
    assert small.rejected is None
    assert small.reference_rejected is None
    assert small.reference_chosen.tolist() == [-1.0, -3.0]
    assert small.reference_state is None
    full = batch(reference=both)
    assert full.reference_rejected.tolist() == [-2.0, -4.0]
    assert full.kinds == ("harmful", "harmful")
    states = {
        name: ReferenceRow(state=np.array(state, dtype=np.float32)) for name, state in (("a", [1, 2]), ("b", [3, 4]))
    }
    anchored = batch(reference=states)
    assert anchored.reference_state.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert anchored.reference_state.dtype == torch.float32
    assert anchored.reference_chosen is None and anchored.reference_rejected is None
    assert (full.bundle_ids, full.languages, full.weight.tolist()) == (("a", "b"), tuple(LANGUAGES), [1.5, 0.0])
    assert full.chosen.sequences.input_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": {"a": ReferenceRow(-1.0, -2.0)}}, "bundle b is not among the 1 that the reference was cached"),
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
