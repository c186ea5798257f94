"""One forward of a prefix tree against plain Hugging Face forwards, over architectures; the tap; what is not done."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from mlc_ray.config import ConfigError, LoraSection, ModelSection, resolve_layer
from mlc_ray.data.batches import collate, collate_prompts
from mlc_ray.train.forward import ModelError, final_norm, layer_states
from mlc_ray.train.model import (
    PolicyWithExtractor,
    add_adapters,
    checkpoint_blocks,
    load_policy,
    model_depth,
)
from mlc_ray.train.reference import ReferenceModel
from tests.train.tiny import LANGUAGES, VOCABULARY, random_rows, tiny_model

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
        attn_logit_softcapping=1.5,
        pad_token_id=0,
    ),
    # Windows in all but every nth block, another rotary base in these, normed heads.
    "gemma3": Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=0,
    ),
}
HEAD = [5, 6, 7]
ROWS = {
    "head": random_rows(3, head=HEAD),
    "no head": random_rows(3),
    "one bundle": random_rows(1, head=HEAD),
    "one language": [
        replace(row, languages=["en"], prompts=[row.prompts[1]], tapped=[row.tapped[1]], response_prompt=0)
        for row in random_rows(2, head=HEAD)
    ],
    "short answers": [replace(row, chosen=[1], rejected=[2, 3]) for row in random_rows(2, head=HEAD)],
}


def build(config, attention="tree"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # far from the small random start, so that differences show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(rows=None, tap=True, **settings):
    rows = rows or ROWS["head"]
    settings = {
        "languages": LANGUAGES,
        "weights": [1.0] * len(rows),
        "needs_rejected": True,
        "reference": None,
        **settings,
    }
    return collate(rows, **settings, tap=tap)


def plain(model, rows, layer):
    """Summed log-probs of chosen and rejected answers, and states [P, H] by bundle and language; a forward each."""
    totals, states = [[], []], []
    for row in rows:
        prompt = row.prompts[row.response_prompt]
        for answer, part in ((row.chosen, totals[0]), (row.rejected, totals[1])):
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            part.append(F.log_softmax(logits, dim=-1)[torch.arange(len(answer)), torch.tensor(answer)].sum())
        for each in row.prompts:
            output = model(torch.tensor([each]), output_hidden_states=True, use_cache=False)
            states.append(output.hidden_states[layer][0, -1])
    return torch.stack(totals[0]), torch.stack(totals[1]), torch.stack(states)


def gradients(loss, module):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_equal(ours, theirs):
    """Gradients by name, relative to the largest of each parameter."""
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().clamp(min=1e-3)
        assert torch.allclose(gradient / scale, theirs[name] / scale, rtol=0, atol=1e-4), name


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_forward_equals_plain_forwards(name, rows):
    model, rows = build(ARCHITECTURES[name]), ROWS[rows]
    for layer in range(4):
        module = PolicyWithExtractor(model, layer=layer, extractor_dim=16, seed=0)
        with torch.no_grad():
            output, untapped = module(batch(rows)), module(batch(rows, tap=False))
            model.set_attn_implementation("eager")
            chosen, rejected, states = plain(model, rows, layer)
            model.set_attn_implementation("tree")
        for part, expected, key in ((chosen, output.chosen, "chosen"), (rejected, output.rejected, "rejected")):
            assert torch.allclose(expected.total, part, rtol=1e-4)
            assert expected.length.tolist() == [len(getattr(row, key)) for row in rows]
        assert torch.allclose(output.tapped[output.present], states, rtol=1e-4, atol=1e-4)
        assert torch.allclose(output.representations[output.present], module.extractor(states), rtol=1e-4, atol=1e-4)
        assert output.present.tolist() == [[code in row.languages for code in LANGUAGES] for row in rows]
        assert (output.representations[~output.present] == 0).all() and (output.tapped[~output.present] == 0).all()
        assert torch.allclose(untapped.chosen.total, chosen, rtol=1e-4) and untapped.representations is None
        assert torch.allclose(untapped.rejected.total, rejected, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "mistral_sliding", "gemma2"])
def test_gradients_equal_those_of_plain_forwards(name, layer, checkpointing):
    rows = ROWS["head"]
    module = PolicyWithExtractor(build(ARCHITECTURES[name]), layer=layer, extractor_dim=16, seed=0).train()
    checkpoint_blocks(module.policy, checkpointing)
    output = module(batch(rows))
    states = output.representations[output.present]
    ours = gradients(output.chosen.total.sum() - 0.5 * output.rejected.total.sum() + states.square().sum(), module)
    module.policy.set_attn_implementation("eager")
    chosen, rejected, states = plain(module.policy, rows, layer)
    loss = chosen.sum() - 0.5 * rejected.sum() + module.extractor(states).square().sum()
    assert_equal(ours, gradients(loss, module))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_step_does_nothing_twice(layer, checkpointing):
    model, rows = tiny_model(), ROWS["head"]
    seen = {"head": [], "blocks": [], "norm": []}
    model.lm_head.register_forward_pre_hook(lambda _, args: seen["head"].append(args[0].shape[1]))
    model.model.norm.register_forward_pre_hook(lambda _, args: seen["norm"].append(args[0].shape[1]))
    module = PolicyWithExtractor(model, layer=layer, extractor_dim=16, seed=0).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tapping, other = batch(rows), batch(rows, tap=False)
    module(tapping)
    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, args, i=index: seen["blocks"].append((i, args[0].shape[1])))
    whole, answered = tapping.tree.tokens, tapping.tree.first(tapping.tree.prompt_only).tokens
    assert whole > answered == other.tree.tokens
    responses = sum(len(row.chosen) + len(row.rejected) for row in rows)
    prompts = sum(len(row.prompts) for row in rows)
    for made, first, states in ((tapping, whole, prompts), (other, answered, 0)):
        for part in seen.values():
            part.clear()
        output = module(made)
        assert seen["head"] == [responses]
        assert seen["norm"] == [responses + (states if layer == 3 else 0)]
        assert seen["blocks"] == [(i, first if i < layer or made is other else answered) for i in range(3)]
        loss = output.chosen.total.sum() if states == 0 else output.chosen.total.sum() + output.representations.sum()
        loss.backward()
        again = [(i, tokens) for i, tokens in reversed(seen["blocks"][:3])] if checkpointing else []
        assert seen["blocks"][3:] == again
    assert module.extractor.weight.grad is not None


class Calls(TorchDispatchMode):
    """Counts the operations that are computed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def test_selective_checkpointing_repeats_everything_but_products_and_attention():
    counts, flops = {}, {}
    for how in (False, "selective", True):
        model = tiny_model()
        checkpoint_blocks(model, how)
        module = PolicyWithExtractor(model, layer=3, extractor_dim=16, seed=0).train()
        with Calls() as calls, FlopCounterMode(display=False) as counter:
            output = module(batch(ROWS["head"]))
            (output.chosen.total.sum() + output.representations.sum()).backward()
        counts[how], flops[how] = calls.counts, counter.get_total_flops()
    assert flops["selective"] == flops[False] < flops[True]
    silu, attention = "aten.silu.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"
    for how, (activations, calls) in {False: (1, 1), "selective": (2, 1), True: (2, 2)}.items():
        assert counts[how][silu] == activations * counts[False][silu]
        assert counts[how][attention] == calls * counts[False][attention] > 0


def test_a_frozen_head_is_one_product_and_its_logits_have_one_gradient():
    """A batched product would copy its weights; the backward of an index into logits, all of their gradient."""
    model = add_adapters(tiny_model(), ModelSection(path="tiny", lora=LoraSection()))
    head = model.get_output_embeddings()
    module = PolicyWithExtractor(model, layer=3, extractor_dim=16, seed=0).train()
    seen = Counter()

    class OfLogits(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            output = operation(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.shape[-1:] == (VOCABULARY,):
                seen[operation.overloadpacket.__name__] += 1
            return output

    given, part = [], batch()
    head.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].shape[1]))
    with OfLogits():
        output = module(part)
        (output.chosen.total.sum() + output.representations.sum()).backward()
    assert not head.weight.requires_grad and module.extractor.weight.grad.abs().sum() > 0
    assert given == [part.chosen.predicting.numel() + part.rejected.predicting.numel()]
    assert seen["mm"] == 1 and not seen.keys() & {"bmm", "select_backward", "slice_backward", "new_zeros", "zeros"}


def test_a_model_that_computes_all_logits_says_the_same():
    module = PolicyWithExtractor(tiny_model(), layer=3, extractor_dim=16, seed=0)
    chosen, forward = module(batch()).chosen.total, module.policy.forward
    module.policy.forward = lambda *args, logits_to_keep, **kwargs: forward(*args, **kwargs)
    assert torch.equal(module(batch()).chosen.total, chosen)


def test_modules_run_in_the_same_order_whether_a_step_taps_or_not():
    for layer in range(4):
        model = tiny_model()
        module = PolicyWithExtractor(model, layer=layer, extractor_dim=16, seed=0)
        order = []
        for name, part in module.named_modules():
            part.register_forward_pre_hook(lambda *_, name=name, order=order: order.append(name))
        module(batch())
        tapping = list(order)
        order.clear()
        module(batch(tap=False))
        assert order == tapping and len(set(order)) == len(order)


def test_without_the_term_the_extractor_has_zero_gradients():
    module = PolicyWithExtractor(tiny_model(), layer=1, extractor_dim=16, seed=0)
    module(batch(tap=False)).chosen.total.sum().backward()
    assert (module.extractor.weight.grad == 0).all() and (module.extractor.bias.grad == 0).all()


def test_what_was_tapped_is_not_kept():
    """Below the last layer states of the whole row are read; with recomputation they come by a second time."""
    module = PolicyWithExtractor(tiny_model(), layer=1, extractor_dim=16, seed=0).train()
    module.policy.gradient_checkpointing_enable({"use_reentrant": False})
    trees = []
    module.policy.model.register_forward_pre_hook(lambda *args: trees.append(args[2]["tree"]), with_kwargs=True)
    module(batch()).representations.sum().backward()
    assert trees[0].leaving.take() is None


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


def test_architecture_without_a_known_final_norm_is_refused():
    small = {"vocab_size": 67, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = AutoModelForCausalLM.from_config(OPTConfig(**small, word_embed_proj_dim=32, do_layer_norm_before=False))
    with pytest.raises(ModelError, match="OPTForCausalLM has no final norm"):
        final_norm(opt)


@pytest.mark.parametrize(("layer", "index"), [("last", 30), (0.5, 15), (20, 20), (0, 0), (30, 30), (0.01, 0)])
def test_resolve_layer(layer, index):
    assert resolve_layer(layer, 30) == index


@pytest.mark.parametrize("layer", [31, -1])
def test_resolve_layer_out_of_range(layer):
    with pytest.raises(ConfigError, match=rf"mlc.layer={layer} is outside 0..30"):
        resolve_layer(layer, 30)


@pytest.mark.parametrize(
    ("changes", "attention", "message"),
    [
        ({}, "varlen", "model.attention='varlen': .*caps its attention scores at 50.0.*use model.attention='auto'"),
        ({"attn_logit_softcapping": None, "attention_dropout": 0.1}, "varlen", "attention_dropout of 0.1"),
        ({"attention_dropout": 0.1}, "flex", "attention_dropout of 0.1"),
        ({"attn_logit_softcapping": None}, "varlen", "needs a GPU, and there is none here"),
    ],
)
def test_an_attention_that_would_leave_something_out_is_refused(changes, attention, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Gemma2Config(**SMALL, head_dim=8, pad_token_id=0, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_policy(ModelSection(path=str(tmp_path), attention=attention))
    load_policy(ModelSection(path=str(tmp_path)))


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
    output = module(batch())
    (output.chosen.total.sum() + output.representations.sum()).backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name or name.startswith("extractor.") for name in trained)
    assert any("lora_B" in name for name in trained)


def test_lora_names_modules_that_do_not_exist():
    settings = ModelSection.model_validate({"path": "tiny", "lora": {"target_modules": ["query"]}})
    with pytest.raises(ModelError, match=r"model.lora.target_modules=\['query'\]"):
        add_adapters(tiny_model(), settings)


@pytest.mark.parametrize("layer", range(4))
def test_the_reference_says_what_the_untrained_policy_would(layer):
    rows = ROWS["head"]
    output = PolicyWithExtractor(tiny_model(), layer=layer, extractor_dim=16, seed=0)(batch(rows))
    english = LANGUAGES.index("en")
    for tap in (True, False):  # no prompt that is not answered is needed for either
        said = ReferenceModel(tiny_model(), layer=layer)(batch(rows, tap=tap), state=True)
        assert torch.allclose(said.state, output.tapped[:, english], atol=1e-5)
        assert torch.allclose(said.chosen, output.chosen.total) and torch.allclose(said.rejected, output.rejected.total)
    alone = ReferenceModel(tiny_model(), log_probs=False, layer=layer)
    assert alone(batch(rows), state=True).chosen is None
    assert torch.allclose(alone(batch(rows), state=True).state, said.state, atol=1e-6)
    assert alone(batch(rows), state=False).state is None
    with pytest.raises(ValueError, match="without rejected answers"):
        ReferenceModel(tiny_model())(batch(rows, needs_rejected=False), state=False)


def test_the_reference_forwards_no_more_than_it_needs():
    rows = ROWS["head"]
    made = batch(rows)
    seen = []

    def count(model):
        for block in model.model.layers:
            block.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
        return model

    ReferenceModel(count(tiny_model()), layer=3)(made, state=True)
    assert seen == [made.tree.first(made.tree.prompt_only).tokens] * 3
    seen.clear()
    ReferenceModel(count(tiny_model()), log_probs=False, layer=1)(made, state=True)
    assert seen == [made.tree.first(made.tree.answers).tokens, made.tree.lengths[0], made.tree.lengths[0]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_layers_of_all_prompts(name):
    model, rows = build(ARCHITECTURES[name]), ROWS["head"]
    tree, prompts = collate_prompts(rows, LANGUAGES)
    with torch.no_grad():
        states = layer_states(model, tree, prompts)
        model.set_attn_implementation("eager")
        for layer in range(4):
            assert torch.allclose(states[:, layer], plain(model, rows, layer)[2], rtol=1e-4, atol=1e-4)


def test_a_forward_leaves_the_model_as_it_was():
    model = tiny_model()
    before = model(torch.tensor([[1, 2, 3]])).logits
    for layer in range(4):
        PolicyWithExtractor(model, layer=layer, extractor_dim=16, seed=0)(batch())
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


@pytest.mark.parametrize("path", [".cache/models/nothing", "/nowhere/model", "~/nothing/here"])
def test_a_folder_that_is_missing_is_not_taken_for_a_name_on_the_hub(path):
    with pytest.raises(ModelError, match=rf"model\.path='{path}': there is no such folder .*--only-model"):
        model_depth(path, trust_remote_code=False)


def test_a_model_of_the_hub_is_loaded_at_its_commit_and_an_adapter_names_both(small_llama, tmp_path, monkeypatch):
    commit = "c" * 40
    stored = tmp_path / "cache" / "models--owner--small" / "snapshots" / commit
    shutil.copytree(small_llama, stored)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    settings = ModelSection(path=f"owner/small#{commit}", dtype="float32", lora=LoraSection(rank=2))
    assert model_depth(settings.path, trust_remote_code=False) == 4
    adapted = add_adapters(load_policy(settings), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/small", commit)
