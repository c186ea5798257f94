"""What a run makes sure of before its first step: that a model which would train on other numbers is refused."""

from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from mlc_ray.train import attention
from mlc_ray.train.checks import check_batch, check_tap
from mlc_ray.train.forward import ModelError, opening_log_probs
from tests.train.test_model import ARCHITECTURES, ROWS, batch, build


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_supported_architectures_are_accepted(name):
    model = build(ARCHITECTURES[name]).train()
    for layer in range(4):
        check_tap(model, layer, openings=layer % 2 == 1)
    for rows in ROWS.values():
        check_batch(model, batch(rows), 2)
        check_batch(model, batch(rows, tap=False, needs_rejected=False), 2)
    assert model.training and model.config._attn_implementation == "tree"


def without(name):
    """A llama whose decoder ignores one of its arguments."""
    model = build(ARCHITECTURES["llama"])
    forward = model.model.forward

    def deaf(*args, **kwargs):
        return forward(*args, **{key: value for key, value in kwargs.items() if key != name})

    model.model.forward = deaf
    return model


@pytest.mark.parametrize("ignored", ["tree", "position_ids"])
def test_a_model_that_ignores_what_the_tree_relies_on_is_refused(ignored):
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: .*hidden states of layer 3 .*differ"):
        check_tap(without(ignored), 3)
    with pytest.raises(ModelError, match=r"log-probs of bundle bundle-00 .*differ"):
        check_batch(without(ignored), batch(), 3)


def test_a_model_whose_blocks_see_no_tree_is_refused():
    with pytest.raises(ModelError, match="do not hand on the tree"):
        check_tap(without("tree"), 1)


def test_a_wrong_attention_is_refused(monkeypatch):
    """One that leaves out what the model's own attention does (here the cap of Gemma-2's scores)."""
    right = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *args, softcap, **options: right(*args, softcap=None, **options))
    with pytest.raises(ModelError, match="Gemma2ForCausalLM"):
        check_tap(build(ARCHITECTURES["gemma2"]), 2)


@pytest.mark.parametrize("layer", [1, 3])
def test_openings_that_are_read_elsewhere_are_refused(layer, monkeypatch):
    """The sum over an opening's tokens leaves out its last one."""
    right = opening_log_probs
    wrong = lambda log_probs, openings: right(log_probs, replace(openings, steps=openings.steps[:, :-1]))  # noqa: E731
    monkeypatch.setattr("mlc_ray.train.forward.opening_log_probs", wrong)
    model = build(ARCHITECTURES["llama"])
    check_tap(model, layer)
    with pytest.raises(ModelError, match=r"log-probs of openings of responses .*differ"):
        check_tap(model, layer, openings=True)


def test_a_wrong_row_is_refused():
    made = batch()
    shifted = replace(made, chosen=replace(made.chosen, predicting=made.chosen.predicting + 1))
    with pytest.raises(ModelError, match="log-probs of bundle"):
        check_batch(build(ARCHITECTURES["llama"]), shifted, 2)


@pytest.mark.parametrize("layer", [1, 3])
def test_an_architecture_that_cannot_lose_tokens_on_the_way_is_refused(layer):
    config = GPT2Config(vocab_size=67, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    gpt2 = AutoModelForCausalLM.from_config(config, attn_implementation="tree")
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not supported: its forward cannot be tapped"):
        check_tap(gpt2, layer)
