"""What a forward keeps: the formula against the tensors that autograd saves."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from mlc_ray.config import ModelSection
from mlc_ray.data.batches import collate
from mlc_ray.plan.activations import (
    Row,
    block_bytes,
    head_bytes,
    kept_bytes,
    table_bytes,
    tap_bytes,
    working_bytes,
)
from mlc_ray.plan.shapes import shape_of
from mlc_ray.train.attention import register_attention
from mlc_ray.train.model import PolicyWithExtractor, checkpoint_blocks
from tests.train.tiny import LANGUAGES, random_rows

WIDTH = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {"llama": (LlamaConfig, {}), "gemma2": (Gemma2Config, {"head_dim": 32})}


def model_of(kind, layers, dtype):
    register_attention()
    schema, more = CONFIGS[kind]
    config = schema(
        vocab_size=67, num_hidden_layers=layers, max_position_embeddings=64, attn_implementation="tree", **WIDTH, **more
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="tree")


def batch_of(model, number):
    """A module and a batch of so many bundles, and what its row holds."""
    module = PolicyWithExtractor(model, layer=model.config.num_hidden_layers, extractor_dim=16, seed=0)
    module.to(next(model.parameters()).dtype)
    rows = random_rows(number, head=range(9))
    batch = collate(rows, languages=LANGUAGES, weights=[1.0] * number, needs_rejected=True, reference=None, tap=True)
    tree = batch.tree
    pairs = sum(q * k for q, k in zip(tree.lengths, tree.key_lengths, strict=True))
    answers = len(batch.chosen.targets) + len(batch.rejected.targets)
    return module, batch, Row(tree.tokens, sum(tree.key_lengths), pairs, answers, len(batch.prompts.tapped))


def saved(model):
    """Bytes of all tensors that a forward of some bundles saves, each memory once; and the row."""
    module, batch, row = batch_of(model, 6)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # kept, so that its place is not used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch)
    return sum(storage.nbytes() for storage in found.values()), row


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_block_keeps_what_the_formula_counts(kind, dtype, size):
    shallow, deep = model_of(kind, 2, dtype), model_of(kind, 4, dtype)
    (less, row), (more, _) = saved(shallow), saved(deep)
    counted = block_bytes(shape_of(shallow.config, kind), row, size)
    assert counted == pytest.approx((more - less) / 2, rel=0.01)


def test_beside_the_blocks_are_tables_masks_and_the_rows_of_the_head():
    model = model_of("llama", 2, torch.bfloat16)
    shape = shape_of(model.config, "llama")
    whole, row = saved(model)
    counted = kept_bytes(shape, row, ModelSection(path="x"), 2) + table_bytes(shape, row, 2)
    counted += head_bytes(shape, row, 2) + tap_bytes(shape, row, 16, 2)
    assert counted == pytest.approx(whole, rel=0.05)


def test_checkpointing_keeps_less_and_adapters_more():
    shape = shape_of(model_of("llama", 2, torch.bfloat16).config, "llama")
    row = Row(tokens=100, keys=150, pairs=3000, head=10, tapped=5)

    def kept(**settings):
        return kept_bytes(shape, row, ModelSection(path="x", **settings), 2)

    blocks_inputs = 2 * 2 * 128 * 100
    assert kept(gradient_checkpointing=True) == blocks_inputs < kept(gradient_checkpointing="selective") < kept()
    assert kept(lora={"rank": 8}) - kept() == 2 * 7 * 2 * 8 * 100


@pytest.mark.parametrize(
    ("kind", "again"), [("llama", False), ("llama", "selective"), ("llama", True), ("gemma2", True)]
)
def test_a_forward_and_backward_never_hold_more_than_is_counted(kind, again):
    """By PyTorch's tracker of live tensors; each gradient is dropped, as an engine does that reduces it at once."""
    model = model_of(kind, 4, torch.bfloat16)
    checkpoint_blocks(model, again)
    module, batch, row = batch_of(model, 8)
    module.train()
    for weight in module.parameters():
        weight.register_post_accumulate_grad_hook(dropped)
    tracker = MemTracker()
    tracker.track_external(module)
    with tracker:
        said = module(batch)
        (said.chosen.total.sum() - said.rejected.total.sum() + said.representations.sum()).backward()
    most = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    most -= sum(weight.nbytes for weight in module.parameters())
    shape, settings = shape_of(model.config, kind), ModelSection(path="x", gradient_checkpointing=again)
    counted = kept_bytes(shape, row, settings, 2) + working_bytes(shape, row, settings, 2)
    counted += table_bytes(shape, row, 2) + head_bytes(shape, row, 2) + tap_bytes(shape, row, 16, 2)
    assert most <= counted <= 1.2 * most


def dropped(weight):
    weight.grad = None
