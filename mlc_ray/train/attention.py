"""Attention over a prefix tree: a token attends to its own sequence, which lies in the row in pieces (`types.Tree`).

Registered with transformers' own interface (`register_attention`), so that models stay untouched; the tree is an
argument of the forward, and models hand it through to every layer. There are three ways to the same numbers:

- `segments`: PyTorch's kernel for each segment, on its keys and its ancestors', and once for all openings behind a
  prompt. Any device and type.
- `varlen`: PyTorch's kernel for sequences of different lengths, once for all segments, on keys and values gathered by
  an index. CUDA in 16 bits, no soft-capping.
- `flex`: FlexAttention, once, with the tree as block mask. CUDA.

No mask over the whole row is ever made. Nor does transformers make any: an attention without a mask function gets none,
and its `position_ids` are not searched for sequences, for which the host would wait for the device. It gets no padding
mask either: rows here have no padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mlc_ray.types import Tree

TREE = "tree"
"""The attention that chooses a way; each way is also known by itself, as `tree_segments` and so on."""
BLOCK = 128
"""Side of FlexAttention's blocks, its default."""


class Asked(NamedTuple):
    """What a layer asks for besides causal attention: see `tree_attention`."""

    scaling: float | None
    window: int | None
    softcap: float | None
    dropout: float


class TreeAttention:
    """What the attention of all layers needs of one tree; what it makes once is kept for the other layers.

    Args:
        tree: the row.
        leaving: what leaves the row on its way through the blocks; None where all of it stays.
    """

    def __init__(self, tree: Tree, leaving: Leaving | None = None) -> None:
        self.tree = tree
        self.leaving = leaving
        self.longest_query, self.longest_key = max(tree.lengths), max(tree.key_lengths)
        self._kept: dict[Any, Any] = {}
        self.paths: list[tuple[int, ...]] = []
        """Of each segment, its ancestors and itself, the first of its sequence first."""
        for index, parent in enumerate(tree.parents):
            self.paths.append((*self.paths[parent], index) if parent >= 0 else (index,))
        self.bushes = _bushes(tree) if tree.openings < len(tree.parents) else []
        """Of each prompt behind which openings are, the prompt, and their segments."""

    def mask(self, *asked: Any) -> Tensor | None:
        """`_mask(*asked)`, made for the first layer that asks."""
        if asked not in self._kept:
            self._kept[asked] = _mask(*asked)
        return cast("Tensor | None", self._kept[asked])

    def seen_by_bushes(self) -> list[tuple[int, ...]]:
        """The segments before each bush and, counted behind those that are none of openings, the bush itself."""
        return [(*self.paths[prompt], self.tree.openings + bush) for bush, (prompt, _) in enumerate(self.bushes)]

    def bush_mask(self, number: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The mask of a bush's tokens on those of its prompt's sequence and their own, made for the first layer."""
        asked = ("bush", number, window, dtype, device)
        if asked not in self._kept:
            prompt, segments = self.bushes[number]
            seen = _seen_in(self.tree, self.tree.key_lengths[prompt], segments, window)
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(torch.from_numpy(~seen), -torch.inf)
            self._kept[asked] = mask.to(device)
        return cast(Tensor, self._kept[asked])

    def blocks(self, window: int | None) -> Any:
        """`block_mask` with this window, made for the first layer that asks."""
        if window not in self._kept:
            self._kept[window] = block_mask(self.tree, self.paths, window)
        return self._kept[window]


Way: TypeAlias = Callable[[Tensor, Tensor, Tensor, TreeAttention, Asked], Tensor]
"""Query, key, value [1, heads, T, d] and the tree -> [1, T, heads, d]."""


@dataclass(eq=False)
class Leaving:
    """At block `layer`, the states of the whole row are read, and only the segments of `rest` go on."""

    layer: int
    rest: TreeAttention
    _states: Tensor | None = None
    _read: bool = False

    def read(self, states: Tensor) -> None:
        """Keep `states` [1, T, H] until `take`, the first time: blocks that are recomputed read them again."""
        if not self._read:
            self._states, self._read = states, True

    def take(self) -> Tensor | None:
        """What was read, and no longer kept; None where no block read anything."""
        states, self._states = self._states, None
        return states


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree: TreeAttention | None = None,
    way: Way | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [1, heads, T, d] on `key` and `value` [1, key heads, T, d]; returns [1, T, heads, d].

    Args:
        module: the layer; not read.
        query: after rotation, as are the keys.
        key: keys.
        value: values.
        attention_mask: not read: transformers makes none.
        dropout: probability.
        scaling: of the scores; None for 1 / sqrt(d).
        sliding_window: a token attends to tokens less than this many positions away; None for all.
        softcap: scores are capped to this by a tanh; None for no cap.
        tree: the row's segments; None for rows [n, heads, T, d] that are one whole sequence each.
        way: `by_segments`, `by_lengths` or `by_blocks`; None to choose.
        kwargs: what else transformers hands to attention functions.
    """
    asked = Asked(scaling, sliding_window, softcap, dropout)
    if tree is None:
        mask = _mask(query.shape[2], key.shape[2], sliding_window, query.dtype, query.device)
        return _attend(query, key, value, mask, asked).transpose(1, 2).contiguous(), None
    return (way or _way_for(query, asked))(query, key, value, tree, asked), None


def _way_for(query: Tensor, asked: Asked) -> Way:
    if not query.is_cuda or query.dtype == torch.float32 or asked.dropout:
        return by_segments
    return by_lengths if asked.softcap is None else by_blocks


def by_segments(query: Tensor, key: Tensor, value: Tensor, tree: TreeAttention, asked: Asked) -> Tensor:
    """Each segment by itself, and each prompt's openings, which are many and short, at once.

    Costs a call a segment or a bush of openings; of masks, only (its tokens) x (its sequence's).
    """
    row = tree.tree
    sizes = list(row.lengths[: row.openings])
    sizes += [sum(row.lengths[segments.start : segments.stop]) for _, segments in tree.bushes]
    queries, keys, values = (part.split(sizes, dim=2) for part in (query, key, value))
    seen = [*tree.paths[: row.openings], *tree.seen_by_bushes()] if tree.bushes else tree.paths
    outputs = []
    for index, path in enumerate(seen):
        k, v = (torch.cat([part[i] for i in path], dim=2) if len(path) > 1 else part[index] for part in (keys, values))
        about = (asked.window, query.dtype, query.device)
        bush = index - row.openings
        mask = tree.mask(sizes[index], k.shape[2], *about) if bush < 0 else tree.bush_mask(bush, *about)
        outputs.append(_attend(queries[index], k, v, mask, asked))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _bushes(tree: Tree) -> list[tuple[int, range]]:
    """The openings behind each prompt: the prompt, and their segments, which lie next to each other."""
    found: list[tuple[int, range]] = []
    for index in range(tree.openings, len(tree.parents)):
        parent = tree.parents[index]
        if parent < tree.openings and (not found or found[-1][0] != parent):
            found.append((parent, range(index, index + 1)))
        else:
            prompt, segments = found[-1]
            found[-1] = (prompt, range(segments.start, index + 1))
    return found


def _seen_in(tree: Tree, before: int, segments: range, window: int | None) -> NDArray[np.bool_]:
    """What tokens of these openings attend to, [q, k]: the `before` tokens up to their prompt, and their own."""
    count, first = len(segments), segments.start
    line = np.eye(count, dtype=bool)
    starts = np.full(count, before)  # positions
    for own, index in enumerate(segments):
        if (parent := tree.parents[index] - first) >= 0:
            line[own] |= line[parent]
            starts[own] = starts[parent] + tree.lengths[index - own + parent]
    lengths = np.array(tree.lengths[first : segments.stop])
    segment = np.repeat(np.arange(count), lengths)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    seen = np.concatenate([np.ones((len(segment), before), dtype=bool), line[segment][:, segment]], axis=1)
    positions = np.concatenate([np.arange(before), starts[segment] + within])
    distances = positions[before:, None] - positions
    found: NDArray[np.bool_] = seen & (distances >= 0) & (distances < (np.inf if window is None else window))
    return found


def _mask(n_queries: int, n_keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """0 where one of the last `n_queries` of `n_keys` positions attends to a key, else -inf; None where none is needed.

    None is plain causal attention, or that of a single query on all keys.
    """
    if (n_queries == n_keys or n_queries == 1) and (window is None or window >= n_keys):
        return None
    positions = torch.arange(n_keys, device=device)
    distance = positions[n_keys - n_queries :].unsqueeze(1) - positions
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(n_queries, n_keys, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, asked: Asked) -> Tensor:
    """Attention of [n, heads, q, d] on [n, key heads, k, d], by `_mask`'s mask of these q and k."""
    if asked.softcap is not None:
        return _attend_capped(query, key, value, mask, asked, asked.softcap)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=asked.dropout, is_causal=mask is None and query.shape[2] > 1,
        scale=asked.scaling, enable_gqa=query.shape[1] > key.shape[1],
    )  # fmt: skip


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, asked: Asked, softcap: float
) -> Tensor:
    """PyTorch's kernel knows no cap: written out."""
    n, heads, n_queries, size = query.shape
    groups = heads // key.shape[1]
    scaling, dropout = asked.scaling, asked.dropout
    if mask is None and n_queries > 1:
        mask = torch.full((n_queries, n_queries), -torch.inf, device=query.device).triu(1)
    # The heads that share keys as further rows of queries: keys are not repeated.
    folded = query.reshape(n, key.shape[1], groups * n_queries, size)
    scores = (folded @ key.transpose(2, 3)).float() * (size**-0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).view(n, -1, groups, n_queries, key.shape[2])
    weights = nn.functional.softmax(scores if mask is None else scores + mask, dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout).view(n, key.shape[1], -1, key.shape[2])
    return (weights @ value).view(n, heads, n_queries, -1)


def by_lengths(query: Tensor, key: Tensor, value: Tensor, tree: TreeAttention, asked: Asked) -> Tensor:
    """All segments in one call of the kernel for sequences of different lengths.

    A segment's queries are the last of its sequence, and the kernel's causal mask is aligned to the last key.

    Raises:
        ValueError: dropout or a soft-cap is asked for, which the kernel does not know.
    """
    if asked.dropout or asked.softcap is not None:
        raise ValueError(f"the varlen kernel knows no dropout ({asked.dropout}) and no soft-cap ({asked.softcap})")
    row, window = tree.tree, asked.window
    kernel, options = varlen_kernel()
    # squeeze, not [0], whose backward fills a whole tensor with zeros first.
    k, v = (part.squeeze(0).transpose(0, 1).index_select(0, row.keys) for part in (key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not options:
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    before = -1 if window is None or window >= tree.longest_key else window - 1
    output: Tensor = kernel(
        query.squeeze(0).transpose(0, 1), k, v, row.query_bounds, row.key_bounds, tree.longest_query, tree.longest_key,
        scale=asked.scaling, window_size=(before, 0), **options,
    )  # fmt: skip
    return output.unsqueeze(0)


@cache
def varlen_kernel() -> tuple[Callable[..., Any], dict[str, Any]]:
    """PyTorch's `varlen_attn`, and the argument that lets query heads share keys (none in PyTorch 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def by_blocks(query: Tensor, key: Tensor, value: Tensor, tree: TreeAttention, asked: Asked) -> Tensor:
    """The whole row in one call of FlexAttention, which leaves out blocks in which nothing attends to anything.

    Raises:
        ValueError: dropout is asked for, which the kernel does not know.
    """
    if asked.dropout:
        raise ValueError(f"FlexAttention knows no dropout ({asked.dropout})")
    output: Tensor = flex_kernel()(
        query, key, value, score_mod=_capped(asked.softcap), block_mask=tree.blocks(asked.window),
        scale=asked.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2).contiguous()


@cache
def flex_kernel() -> Callable[..., Any]:
    """FlexAttention, compiled for rows of any length."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


@cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    """A score modification that caps, the same object each time: another would be compiled again."""
    if softcap is None:
        return None

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def block_mask(row: Tree, paths: list[tuple[int, ...]], window: int | None) -> Any:
    """FlexAttention's mask of a tree: which of its blocks hold anything, and a rule for the tokens in them."""
    from torch.nn.attention.flex_attention import BlockMask

    device = row.keys.device
    n_blocks = -(-row.tokens // BLOCK)
    filled = np.zeros((n_blocks, n_blocks), dtype=bool)
    ancestor = np.zeros((len(row.lengths), len(row.lengths)), dtype=bool)
    first = np.array(row.starts) // BLOCK
    last = (np.array(row.starts) + np.array(row.lengths) - 1) // BLOCK
    for index, path in enumerate(paths):
        ancestor[index, list(path)] = True
        for above in path:
            filled[first[index] : last[index] + 1, first[above] : last[above] + 1] = True
    filled &= np.tri(n_blocks, dtype=bool)  # ancestors lie before
    related = _sent(ancestor, device)
    position = row.position_ids[0]
    places = torch.arange(row.tokens, dtype=torch.int32, device=device)
    segment = torch.bucketize(places, row.query_bounds[1:], right=True)

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = related[segment[query], segment[key]] & (key <= query)
        return seen if window is None else seen & (position[query] - position[key] < window)

    counts, order = filled.sum(axis=1), np.argsort(~filled, axis=1, kind="stable")
    return BlockMask.from_kv_blocks(
        _sent(counts.astype(np.int32), device)[None, None],
        _sent(order.astype(np.int32), device)[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=attends,
        seq_lengths=(row.tokens, row.tokens),
    )


def _sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` on a device, for which the host does not wait."""
    here = torch.from_numpy(values)
    return (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)


WAYS: dict[str, Way] = {"segments": by_segments, "varlen": by_lengths, "flex": by_blocks}


@cache
def register_attention() -> None:
    """Have transformers know this attention by its names, before a model is made that is given one of them."""
    from transformers import AttentionInterface  # takes 2 s, and drivers make no model

    AttentionInterface.register(TREE, tree_attention)
    for name, way in WAYS.items():
        AttentionInterface.register(f"{TREE}_{name}", partial(tree_attention, way=way))
