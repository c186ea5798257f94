"""The three ways to attend over a tree against attention written out with a mask over the whole row, and each other."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mlc_ray.data.trees import make_tree
from mlc_ray.train import attention
from mlc_ray.train.attention import TreeAttention, block_mask, tree_attention
from mlc_ray.train.model import PolicyWithExtractor
from tests.train.test_model import ARCHITECTURES, ROWS, assert_equal, batch, build, gradients

TREES = {  # lengths and parents
    "one": ([6], [-1]),
    "head, prompts, answers": ([4, 5, 3, 4, 1, 2, 6], [-1, 0, 0, 1, 1, 2, 0]),
    "no head": ([5, 3, 4], [-1, 0, -1]),
    "deep": ([2, 3, 1, 2, 3], [-1, 0, 1, 2, 2]),
    "openings": ([4, 5, 3, 2, 2, 1, 3, 2, 4], [-1, 0, 0, 1, 3, 3, 1, 2, 7], 3),  # the first segment of these
    "long": ([90, 60, 40, 130, 70, 20, 1], [-1, 0, 0, 1, 2, 0, 0]),  # over several of FlexAttention's blocks
}


def tree_of(name):
    lengths, parents, openings = (*TREES[name], None)[:3]
    ends, ids = len(lengths), np.arange(sum(lengths))
    return make_tree(ids, np.array(lengths), np.array(parents), answers=ends, prompt_only=ends, openings=openings)


def visible(tree, window=None):
    """[T, T]: which token attends to which, by walking up."""
    segment = [i for i, n in enumerate(tree.lengths) for _ in range(n)]
    position = tree.position_ids[0].tolist()
    mask = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for q in range(tree.tokens):
        line, at = set(), segment[q]
        while at >= 0:
            line.add(at)
            at = tree.parents[at]
        for k in range(q + 1):
            mask[q, k] = segment[k] in line and (window is None or position[q] - position[k] < window)
    return mask


def written_out(query, key, value, mask, scaling, softcap):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value).transpose(1, 2)


def tensors(tokens, heads=4, key_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, n, tokens, size, generator=generator).requires_grad_() for n in (heads, key_heads, key_heads)
    ]


def plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What `torch.nn.attention.varlen.varlen_attn` is documented to do, on any device."""
    assert query.is_contiguous() or query.stride(-1) == 1
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        left, right = window_size
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0).unsqueeze(1) - torch.arange(k1 - k0)
        seen = (distance >= -right) & ((distance <= left) if left >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[k0:k1]))
    return torch.cat(outputs)


@pytest.fixture(params=["grouped", "repeated"])
def varlen(request, monkeypatch):
    """The varlen way with the plain kernel, as of PyTorch 2.12 (heads may share keys) and 2.11 (they may not)."""
    calls = []

    def kernel(*arguments, **options):
        calls.append(options)
        return plain_varlen(*arguments, **options)

    options = {"enable_gqa": True} if request.param == "grouped" else {}
    monkeypatch.setattr(attention, "varlen_kernel", lambda: (kernel, options))
    return calls


@pytest.fixture
def flex(monkeypatch):
    """The flex way without compiling, which takes a minute; on CPU, FlexAttention has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "flex_kernel", lambda: flex_attention)


def attend(way, query, key, value, tree, window, softcap=None, scaling=0.3):
    output, _ = tree_attention(
        None, query, key, value, None, scaling=scaling, sliding_window=window, softcap=softcap,
        tree=TreeAttention(tree), way=attention.WAYS[way],
    )  # fmt: skip
    return output


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("name", TREES)
def test_segments(name, window, softcap):
    tree = tree_of(name)
    ours, theirs = tensors(tree.tokens), tensors(tree.tokens)
    output = attend("segments", *ours, tree, window, softcap)
    expected = written_out(*theirs, visible(tree, window), 0.3, softcap)
    assert torch.allclose(output, expected, atol=1e-5)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("name", TREES)
def test_varlen(name, window, varlen):
    tree = tree_of(name)
    ours, theirs = tensors(tree.tokens), tensors(tree.tokens)
    output = attend("varlen", *ours, tree, window)
    expected = written_out(*theirs, visible(tree, window), 0.3, None)
    assert torch.allclose(output, expected, atol=1e-5)
    assert len(varlen) == 1
    output.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-4)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 0.7)])
@pytest.mark.parametrize("name", TREES)
@torch.no_grad()
def test_flex(name, window, softcap, flex):
    tree = tree_of(name)
    inputs = [part.detach() for part in tensors(tree.tokens)]
    output = attend("flex", *inputs, tree, window, softcap)
    assert torch.allclose(output, written_out(*inputs, visible(tree, window), 0.3, softcap), atol=1e-5)


def test_blocks_in_which_nothing_attends_to_anything_are_left_out():
    tree = tree_of("long")
    mask = visible(tree)
    blocks = block_mask(tree, TreeAttention(tree).paths, None).to_dense()[0, 0].bool()
    side = attention.BLOCK
    for i in range(blocks.shape[0]):
        for j in range(blocks.shape[1]):
            here = mask[i * side : (i + 1) * side, j * side : (j + 1) * side]
            assert bool(blocks[i, j]) or not here.any(), (i, j)
    assert not blocks.all() and not blocks.triu(1).any()
    # Two long sequences that share nothing, a block each:
    apart = make_tree(np.arange(256), np.array([128, 128]), np.array([-1, -1]), answers=2, prompt_only=2)
    assert block_mask(apart, TreeAttention(apart).paths, None).to_dense()[0, 0].tolist() == [[1, 0], [0, 1]]


def test_the_varlen_kernel_of_this_pytorch_takes_what_it_is_given():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    kernel, options = attention.varlen_kernel()
    assert kernel is varlen_attn and options == {"enable_gqa": True}
    inspect.signature(kernel).bind(0, 1, 2, 3, 4, 5, 6, scale=1.0, window_size=(-1, 0), **options)


def test_what_a_kernel_does_not_know_is_refused():
    tree = tree_of("one")
    for way in ("varlen", "flex"):
        with pytest.raises(ValueError, match="dropout"):
            attention.WAYS[way](*tensors(6), TreeAttention(tree), attention.Asked(None, None, None, 0.1))
    with pytest.raises(ValueError, match="soft-cap"):
        attend("varlen", *tensors(6), tree, None, softcap=3.0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_without_a_tree_rows_are_whole_sequences(window, softcap):
    query, key, value = (torch.cat([part, part.flip(2)]) for part in tensors(7))
    output, _ = tree_attention(
        None, query, key, value, None, scaling=0.3, sliding_window=window, softcap=softcap
    )  # fmt: skip
    mask = visible(make_tree(np.arange(7), np.array([7]), np.array([-1]), answers=1, prompt_only=1), window)
    assert torch.allclose(output, written_out(query, key, value, mask, 0.3, softcap), atol=1e-5)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("name", ["qwen2", "mistral_sliding"])
def test_varlen_in_a_model_is_one_call_a_layer_and_equals_segments(name, layer, varlen):
    found = []
    for implementation in ("tree", "tree_varlen"):
        module = PolicyWithExtractor(build(ARCHITECTURES[name], implementation), layer=layer, extractor_dim=16, seed=0)
        output = module(batch(ROWS["head"]))
        loss = output.chosen.total.sum() - output.rejected.total.sum() + output.representations.square().sum()
        found.append(gradients(loss, module))
    assert_equal(*found)
    assert len(varlen) == 3


def test_no_mask_over_the_row_is_made(monkeypatch):
    """Of all tensors that a forward makes, none has as many numbers as the row has pairs of tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows = [row for row in ROWS["no head"] for _ in range(20)]
    model = build(ARCHITECTURES["mistral_sliding"])
    made = batch(rows)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            output = function(*arguments, **(options or {}))
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.numel())
            return output

    module = PolicyWithExtractor(model, layer=3, extractor_dim=16, seed=0)
    with torch.no_grad(), Sizes():
        module(made)
    assert made.tree.tokens > 1000 and largest < made.tree.tokens**2 / 10
