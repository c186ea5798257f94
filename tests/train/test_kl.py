"""What the term on benign bundles reads: logits and gradients of plain forwards, and the same steps however cut."""

import pytest
import torch

from mlc_ray.data.batches import collate
from mlc_ray.data.branches import Branches
from mlc_ray.losses.base import Kept
from mlc_ray.losses.kl import kl_losses
from mlc_ray.train.loop import Progress
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.train.reference import ReferenceModel
from tests.train.tiny import (
    LANGUAGES,
    on_workers,
    random_rows,
    run_engine,
    tiny_config,
    tiny_model,
    translated,
    whole_weights,
)

ROWS = translated(random_rows(5, head=(5, 3, 8)))
STEPS = 3


def made(rows=ROWS, **changes):
    settings = {
        "keeps": True,
        "languages": LANGUAGES,
        "weights": [1.0] * len(rows),
        "needs_rejected": True,
        "reference": None,
        "tap": True,
    }
    return collate(rows, **settings | changes)


def plain(model, reference, rows, pairing):
    """The loss of each bundle, by a plain forward of every sequence."""
    losses = []
    for row in rows:
        answers = {row.response_prompt: row.chosen}
        if pairing == "own":
            answers |= {each["prompt"]: each["chosen"] for each in row.answers}
        of_languages = []
        for index, prompt in enumerate(row.prompts):
            answer = answers.get(index, [0])  # the last token of a sequence predicts nothing that is read
            ids = torch.tensor([prompt + answer])
            ours, theirs = (
                each(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for each in (model, reference)
            )
            of_languages.append((theirs.exp() * (theirs - ours)).sum(-1).mean())
        value = torch.stack(of_languages).mean()
        losses.append(value if row.kind == "benign" else 0 * value)
    return torch.stack(losses)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize(("pairing", "rejected"), [("response", True), ("own", True), ("response", False)])
def test_losses_and_gradients_are_those_of_plain_forwards(layer, pairing, rejected):
    batch = made(pairing=pairing, needs_rejected=rejected)
    ours, theirs, frozen = tiny_model(), tiny_model(), tiny_model(1).requires_grad_(False)
    output = PolicyWithExtractor(ours, layer=layer, extractor_dim=16, seed=0, keeps=True)(batch)
    asked = ReferenceModel(frozen, log_probs=rejected, layer=layer, pairing=pairing, keeps=True)
    with torch.no_grad():
        said = asked(batch, state=True)
        alone = ReferenceModel(frozen, log_probs=False, keeps=True)(batch, state=True)
    assert torch.allclose(alone.benign, said.benign, atol=1e-5) and asked(batch, state=False).benign is None
    places = batch.benign
    losses = kl_losses(Kept(output.benign, said.benign, places.bundle, places.share, len(ROWS)))
    expected = plain(theirs, frozen, ROWS, pairing)
    assert (
        torch.allclose(losses.double(), expected, atol=1e-5) and (losses[1::2] > 0).all() and (losses[::2] == 0).all()
    )
    # Beside a loss of the same logits, whose backward overwrites them.
    (losses.sum() + output.chosen.total.sum()).backward()
    chosen = [(row.prompts[row.response_prompt], row.chosen) for row in ROWS]
    if pairing == "own":
        chosen += [(row.prompts[each["prompt"]], each["chosen"]) for row in ROWS for each in row.answers]
    totals = [
        theirs(torch.tensor([prompt + answer]))
        .logits[0, len(prompt) - 1 : -1]
        .log_softmax(-1)[range(len(answer)), answer]
        .sum()
        for prompt, answer in chosen
    ]
    (expected.sum() + sum(totals)).backward()
    for (name, own), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(own.grad, their.grad, rtol=1e-4, atol=2e-5), name


def test_where_the_policy_is_the_reference_it_and_its_gradient_are_nothing():
    batch, model = made(), tiny_model()
    output = PolicyWithExtractor(model, layer=2, extractor_dim=16, seed=0, keeps=True)(batch)
    with torch.no_grad():
        said = ReferenceModel(tiny_model(), keeps=True)(batch, state=True)
    places = batch.benign
    losses = kl_losses(Kept(output.benign, said.benign, places.bundle, places.share, len(ROWS)))
    losses.sum().backward()
    assert float(losses.detach().abs().max()) < 1e-6
    assert max(float(each.grad.abs().max()) for each in model.parameters() if each.grad is not None) < 1e-5


@pytest.mark.parametrize("layer", [1, 3])
def test_beside_openings_of_responses_the_same_places_are_read(layer):
    branches = Branches({code: [[7, 8], [7, 9, 10]] for code in LANGUAGES})
    module = PolicyWithExtractor(tiny_model(), layer=layer, extractor_dim=16, seed=0, keeps=True)
    alone, beside = (module(made(**more)) for more in ({}, {"scope": "all", "branches": branches}))
    assert beside.refusals is not None and torch.allclose(beside.benign, alone.benign, atol=1e-5)
    torch.testing.assert_close(beside.chosen.total, alone.chosen.total)


def test_harmful_bundles_alone_cost_nothing_and_are_read_all_the_same():
    rows = ROWS[::2]
    batch = made(rows)
    output = PolicyWithExtractor(tiny_model(), layer=1, extractor_dim=16, seed=0, keeps=True)(batch)
    assert len(output.benign) == 1 and batch.benign.share.tolist() == [0.0]


def configured(budget, stage, lora):
    return tiny_config(
        objective={"loss": "sft"},
        mlc={"layer": 1, "every": 1, "weight": 0},
        terms={"kl": {"weight": 0.5}},
        model={"path": "tiny", "dtype": "float32", **({"lora": {"rank": 4}} if lora else {})},
        reference="online",
        train={"epochs": 1, "batch_bundles": 4, "tokens_per_forward": budget},
        optimizer={"learning_rate": 5e-3},
        engine={"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
    )


CUTS = [(10**6, 0, False), (110, 2, False), (110, 3, False), (10**6, 0, True), (110, 3, True)]


def trained(rank):
    found = []
    for budget, stage, lora in CUTS:
        engine, history = run_engine(configured(budget, stage, lora), random_rows(11), STEPS, progress=Progress())
        found.append(([row["loss/kl"] for row in history], whole_weights(engine)))
    return found


def test_steps_are_the_same_however_a_batch_is_cut_and_lora_needs_no_second_model(tmp_path):
    one, two = (on_workers(count, trained, tmp_path / str(count))[0] for count in (1, 2))
    for first in (0, 3):
        losses, weights = one[first]
        assert losses[0] == pytest.approx(0, abs=1e-6) and losses[-1] > 1e-4
        for others in (one, two):
            for index in [i for i, cut in enumerate(CUTS) if cut[2] == CUTS[first][2]]:
                assert others[index][0] == pytest.approx(losses, rel=1e-3, abs=1e-6), index
                for name, value in weights.items():
                    assert torch.allclose(others[index][1][name], value, atol=2e-4), (index, name)
