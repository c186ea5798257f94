"""The packed forward against unpacked Hugging Face forwards, over architectures; the tap; what is not done."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from mlc_ray.config import ModelSection
from mlc_ray.data.batches import collate
from mlc_ray.train.model import (
    ModelError,
    PolicyWithExtractor,
    add_adapters,
    check_tap,
    final_norm,
    load_policy,
    resolve_layer,
    response_prompts,
    tapped_states,
)
from mlc_ray.train.reference import ReferenceModel
from tests.train.tiny import LANGUAGES, random_rows, tiny_model

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "mistral_sliding": MistralConfig(**SMALL, sliding_window=5),
    # Soft-capped logits, scaled embeddings, alternating sliding windows: what a hand-written head would get wrong.
    "gemma2": Gemma2Config(
        **SMALL,
        head_dim=8,
        sliding_window=5,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=None,
        pad_token_id=0,
    ),
}


def build(config, attention="packed"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # far from the small random start, so that differences show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(rows=None):
    rows = rows or random_rows(3)
    return collate(rows, languages=LANGUAGES, weights=[1.0] * len(rows), needs_rejected=True, reference=None)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_forward_equals_unpacked(name, attention):
    rows = random_rows(3)
    model = build(ARCHITECTURES[name], attention)
    for layer in range(4):
        module = PolicyWithExtractor(model, layer=layer, extractor_dim=16, seed=0)
        output = module(batch(rows), tap=True)
        for index, row in enumerate(rows):
            for answer, part in ((row.chosen, output.chosen), (row.rejected, output.rejected)):
                prompt = row.prompts[row.response_prompt]
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                each = F.log_softmax(logits, dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]
                assert part.total[index].item() == pytest.approx(each.sum().item(), rel=1e-4)
                assert part.length[index].item() == len(answer)
            for language, prompt in zip(row.languages, row.prompts, strict=True):
                states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
                expected = module.extractor(states[layer][0, -1])
                place = LANGUAGES.index(language)
                assert output.present[index, place]
                assert torch.allclose(output.representations[index, place], expected, atol=1e-4)
                assert torch.allclose(output.tapped[index, place], states[layer][0, -1], rtol=1e-4, atol=1e-4)
    absent = ~output.present
    assert absent.sum() == 1 and (output.representations[absent] == 0).all() and (output.tapped[absent] == 0).all()


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_capped_attention_needs_a_kernel_that_caps(attention, tmp_path):
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, pad_token_id=0))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"attention logits at 50.0.*model.attention='{attention}'.*use.*'eager'"):
        load_policy(ModelSection(path=str(tmp_path), attention=attention))
    load_policy(ModelSection(path=str(tmp_path), attention="eager"))


def test_packed_attention_gradients_equal_masked_ones():
    rows = random_rows(3)
    gradients = {}
    for attention in ("packed", "eager"):
        model = build(ARCHITECTURES["mistral_sliding"], attention)
        output = PolicyWithExtractor(model, layer=2, extractor_dim=16, seed=0)(batch(rows), tap=True)
        (output.chosen.total.sum() + output.representations.square().sum()).backward()
        gradients[attention] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients["packed"].items():
        assert torch.allclose(gradient, gradients["eager"][name], rtol=1e-3, atol=1e-3), name


def test_gradients_equal_those_of_unpacked_forwards():
    rows = random_rows(2)
    packed, plain = tiny_model(3), tiny_model(3)
    module = PolicyWithExtractor(packed, layer=2, extractor_dim=16, seed=0)
    output = module(batch(rows), tap=True)
    (output.chosen.total.sum() - output.rejected.total.sum() + output.representations.square().sum()).backward()
    total = 0.0
    for row in rows:
        for answer, sign in ((row.chosen, 1), (row.rejected, -1)):
            prompt = row.prompts[row.response_prompt]
            log_probs = F.log_softmax(plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1], dim=-1)
            total = total + sign * log_probs[torch.arange(len(answer)), torch.tensor(answer)].sum()
        for prompt in row.prompts:
            state = plain(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0, -1]
            total = total + module.extractor(state).square().sum()
    extractor_gradient = module.extractor.weight.grad.clone()
    module.extractor.weight.grad = None
    total.backward()
    for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4), name
    assert torch.allclose(extractor_gradient, module.extractor.weight.grad, rtol=1e-3, atol=1e-4)


def test_only_response_rows_reach_the_head_and_blocks_after_the_tap_do_not_run():
    model, rows = tiny_model(), random_rows(3)
    seen = {"head": [], "blocks": []}
    model.lm_head.register_forward_pre_hook(lambda _, args: seen["head"].append(args[0].shape[1]))
    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=index: seen["blocks"].append(i))
    module = PolicyWithExtractor(model, layer=1, extractor_dim=16, seed=0)
    module(batch(rows), tap=True)
    assert seen["head"] == [sum(len(row.chosen) + len(row.rejected) for row in rows)]
    assert seen["blocks"] == [0, 1, 2, 0]
    seen["blocks"].clear()
    output = module(batch(rows), tap=False)
    assert seen["blocks"] == [0, 1, 2]
    assert output.representations is None
    output.chosen.total.sum().backward()
    assert (module.extractor.weight.grad == 0).all()
    assert model.config.num_hidden_layers == 3


def test_extractor_depends_on_the_seed_alone():
    first, again, other = (
        PolicyWithExtractor(tiny_model(i), layer=1, extractor_dim=16, seed=seed).extractor.weight
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_extractor_product_is_not_rounded_to_bfloat16():
    module = PolicyWithExtractor(tiny_model(), layer=1, extractor_dim=16, seed=0).bfloat16()
    hidden = torch.randn(4, 32).bfloat16()
    exact = hidden.double() @ module.extractor.weight.double().T + module.extractor.bias.double()
    assert torch.allclose(module.extractor(hidden).double(), exact, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_tap_accepts_supported_architectures(name):
    model = build(ARCHITECTURES[name])
    for layer in range(4):
        check_tap(model, layer)


def test_check_tap_refuses_a_model_that_does_not_keep_packed_sequences_apart(monkeypatch):
    model = build(ARCHITECTURES["llama"])
    forward = model.model.forward

    def leaky(*args, position_ids=None, sequence_lengths=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", leaky)
    with pytest.raises(ModelError, match="LlamaForCausalLM: packed hidden states of layer 2 differ"):
        check_tap(model, 2)


def test_architecture_without_a_known_final_norm_is_refused():
    small = {"vocab_size": 67, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = AutoModelForCausalLM.from_config(OPTConfig(**small, word_embed_proj_dim=32, do_layer_norm_before=False))
    with pytest.raises(ModelError, match="OPTForCausalLM has no final norm"):
        final_norm(opt)


def test_architecture_that_runs_all_blocks_whatever_the_config_says_is_refused():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=67, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        check_tap(gpt2, 1)


@pytest.mark.parametrize(("layer", "index"), [("last", 30), (0.5, 15), (20, 20), (0, 0), (30, 30), (0.01, 0)])
def test_resolve_layer(layer, index):
    assert resolve_layer(layer, 30) == index


@pytest.mark.parametrize("layer", [31, -1])
def test_resolve_layer_out_of_range(layer):
    with pytest.raises(ModelError, match=rf"mlc.layer={layer} is outside 0..30"):
        resolve_layer(layer, 30)


def test_load_policy_names_a_missing_model(tmp_path):
    with pytest.raises(ModelError, match=r"model.path=.*nowhere"):
        load_policy(ModelSection(path=str(tmp_path / "nowhere")))


def test_pickled_weights_are_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_policy(ModelSection(path=str(tmp_path), dtype="float32"))


def test_lora_trains_adapters_and_extractor_only():
    settings = ModelSection.model_validate({"path": "tiny", "lora": {"rank": 4}})
    module = PolicyWithExtractor(add_adapters(tiny_model(), settings), layer=2, extractor_dim=16, seed=0)
    output = module(batch(), tap=True)
    (output.chosen.total.sum() + output.representations.sum()).backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name or name.startswith("extractor.") for name in trained)
    assert any("lora_B" in name for name in trained)


def test_lora_names_modules_that_do_not_exist():
    settings = ModelSection.model_validate({"path": "tiny", "lora": {"target_modules": ["query"]}})
    with pytest.raises(ModelError, match=r"model.lora.target_modules=\['query'\]"):
        add_adapters(tiny_model(), settings)


def test_response_prompts_are_cut_out_of_the_answers():
    rows = random_rows(4)
    for responses in (batch(rows).chosen, batch(rows).rejected):
        prompts = response_prompts(responses, 4)
        expected = [row.prompts[row.response_prompt] for row in rows]
        assert prompts.sequences.lengths == tuple(map(len, expected))
        assert prompts.sequences.input_ids[0].tolist() == [token for prompt in expected for token in prompt]
        assert prompts.sequences.position_ids[0].tolist() == [i for prompt in expected for i in range(len(prompt))]
        ends = [sum(map(len, expected[: i + 1])) - 1 for i in range(4)]
        assert prompts.tapped.tolist() == ends
        assert prompts.bundle_of_prompt.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("layer", range(4))
def test_the_reference_says_what_the_untrained_policy_would(layer):
    rows = random_rows(3)
    module = PolicyWithExtractor(tiny_model(), layer=layer, extractor_dim=16, seed=0)
    output = module(batch(rows), tap=True)
    said = ReferenceModel(tiny_model(), layer=layer)(batch(rows))
    english = LANGUAGES.index("en")
    assert torch.allclose(said.state, output.tapped[:, english], atol=1e-5)
    assert torch.allclose(said.chosen, output.chosen.total) and torch.allclose(said.rejected, output.rejected.total)
    states = ReferenceModel(tiny_model(), log_probs=False, layer=layer)
    assert states(batch(rows)).chosen is None and torch.equal(states(batch(rows)).state, said.state)
    assert states(batch(rows), tap=False).state is None


def test_tapped_states_leave_the_model_as_it_was():
    model = tiny_model()
    before = model(torch.tensor([[1, 2, 3]])).logits
    prompts = batch().prompts
    tapped_states(model, prompts, 1)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)
