"""Attention over packed sequences that costs what the sequences cost, not the square of the whole packed row.

transformers' `sdpa` keeps packed sequences apart by a mask: correct, but every token still meets every other. Here each
sequence gets a kernel call of its own. Registered under the name `packed` with transformers' own interfaces, so the
models themselves stay untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of `query` [1, heads, T, d] within each of the packed sequences, whose lengths sum to T.

    Returns [1, T, heads, d]. Without `sequence_lengths` (a forward that is not packed) it is transformers' `sdpa`.
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = []
    start = 0
    for q, k, v in zip(*(tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value)), strict=True):
        length = q.shape[2]
        # Only a sequence longer than a sliding window needs a mask of its own; it is cut out of the whole one.
        mask = None
        if sliding_window is not None and length > sliding_window:
            if attention_mask is None:
                raise ValueError("a sliding window shorter than a packed sequence needs the model's attention mask")
            mask = attention_mask[:, :, start : start + length, start : start + length]
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
        start += length
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
