"""The round over several workers: two workers with one bundle each against one worker with both."""

import pytest
import torch
import torch.distributed as dist

from mlc_ray.data.batches import collate
from mlc_ray.losses.objective import Objective
from mlc_ray.train.collectives import gather, gather_round
from mlc_ray.types import ReferenceRow
from tests.train.tiny import LANGUAGES, on_workers, random_rows, run_engine, tiny_config, tiny_model, wrapped

TERMS = {
    "contrast": {"weight": 0.5, "temperature": 0.3},
    "variance": {"weight": 2.0},
    "anchor": {"weight": 0.3},
}
STAGES = {"stage0": {"stage": 0}, "stage2": {"stage": 2}, "stage3": {"stage": 3, "persistence_threshold": 0}}
WEIGHTS = {"both real": [1.0, 1.0], "one is padding": [2.0, 0.0]}
STEPS = 3


def configured(term, workers, stage="stage0", **sections):
    """The same round of four bundles, in two forwards: two at once, by one worker or by two."""
    return tiny_config(
        objective={"loss": "simpo"},
        mlc={"layer": 2, "every": 2, "extractor_dim": 16},
        terms={term: TERMS[term]},
        train={"bundles_per_worker": 2 // workers},
        cluster={"workers": workers},
        engine=STAGES[stage],
        **sections,
    )


def references(layer=2):
    """The frozen state of each bundle's English prompt, by an unpacked forward."""
    model = tiny_model()
    return {
        row.bundle_id: ReferenceRow(
            state=model(torch.tensor([row.prompts[row.response_prompt]]), output_hidden_states=True)
            .hidden_states[layer][0, -1]
            .detach()
            .numpy()
        )
        for row in random_rows(7)
    }


def gradients_of_a_round(rank, term, weights):
    """Gradient of the total loss of bundles 0 and 1, averaged over workers as DeepSpeed does."""
    workers = dist.get_world_size()
    config = configured(term, workers)
    rows, module = random_rows(2), wrapped(config)
    mine = slice(rank, rank + 1) if workers == 2 else slice(0, 2)
    batch = collate(
        rows[mine],
        languages=LANGUAGES,
        weights=weights[mine],
        needs_rejected=True,
        reference=references(),
        tap=True,
    )
    output = module(batch)
    result = Objective(config).total_loss(
        weight=batch.weight,
        chosen=output.chosen,
        rejected=output.rejected,
        reference_state=batch.reference_state,
        representations=output.representations,
        present=output.present,
        tapped=output.tapped,
        together=gather_round(output.representations, output.present, batch.weight),
    )
    result.loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= workers
    return gradients, gather(result.metrics[f"loss/{term}"])


def train_terms(table):
    workers = dist.get_world_size()
    results = {}
    for term in TERMS:
        for stage in STAGES if workers == 2 else ["stage0"]:
            online = {"reference": "online"} if term == "anchor" and stage != "stage0" else {}
            config = configured(term, workers, stage, **online)
            cached = table if term == "anchor" and not online else None
            engine, history = run_engine(config, random_rows(7), STEPS, cached)
            results[term, stage] = (history, engine.full_weights())
    return results


def everything(rank, table):
    gradients = {
        (term, padding): gradients_of_a_round(rank, term, WEIGHTS[padding]) for term in TERMS for padding in WEIGHTS
    }
    return gradients, train_terms(table)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What one worker has, and what each of two has."""
    table, folder = references(), tmp_path_factory.mktemp("terms")
    return on_workers(1, everything, folder / "one", table)[0], on_workers(2, everything, folder / "two", table)


@pytest.mark.parametrize("padding", WEIGHTS)
@pytest.mark.parametrize("term", TERMS)
def test_two_workers_with_one_bundle_have_the_gradient_of_one_worker_with_two(term, padding, done):
    (single, _), pair = done
    expected, expected_losses = single[term, padding]
    for gradients, _ in pair:
        found, losses = gradients[term, padding]
        assert torch.allclose(losses, expected_losses, rtol=1e-5)
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
    if padding == "both real":
        assert (expected_losses > 0).all()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("term", TERMS)
def test_two_workers_train_as_one_at_every_stage_cached_or_online(term, stage, done):
    (_, alone), ((_, together), _) = done
    expected, weights = alone[term, "stage0"]
    history, state = together[term, stage]
    assert [f"loss/{term}" in row for row in history] == [True, False, True]
    for row, want in zip(history, expected, strict=True):
        assert row["loss/total"] == pytest.approx(want["loss/total"], rel=2e-5)
        assert row.get(f"loss/{term}", 0) == pytest.approx(want.get(f"loss/{term}", 0), rel=2e-5)
        assert row["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-3)
    first = expected[0]
    assert first["loss/total"] == pytest.approx(
        first["loss/alignment"] + 0.8 * first["loss/mlc"] + TERMS[term]["weight"] * first[f"loss/{term}"]
    )
    for key, value in weights.items():
        assert torch.allclose(state[key].float(), value.float(), atol=2e-4), key
