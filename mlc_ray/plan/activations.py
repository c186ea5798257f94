"""What a forward keeps for its backward, in bytes: counted tensor by tensor, as PyTorch's autograd keeps them.

For each block of a Llama, and of what is built like it, with elements of s bytes (2 in bfloat16), hidden size h,
queries q = heads x size, keys k = key heads x size, feed-forward f, of each token:

    norms         2 x (4 h + s h)    the input in float32, and what it becomes before its weight
    projections   2 x s h            the inputs of query, key and value, and of gate and up
    attention     3 s q + 2 s k      queries, keys and values after rotation; what the kernel gives; the last input
    feed-forward  4 s f              gate, its activation, up, their product
    kernel        4 heads + 8        log-sum-exp of the scores, and of each norm its scale

and of each token of the sequences as they would be without sharing 2 s k: a segment's keys and values are laid beside
its ancestors'. `tests/plan/test_activations.py` counts the same from the tensors that autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlc_ray.config import ModelSection
from mlc_ray.plan.shapes import Shape

_GEMMA = {"gemma2", "gemma3", "gemma3_text"}


@dataclass(frozen=True)
class Row:
    """What one forward holds, as numbers of rows.

    Attributes:
        tokens: of the prefix tree.
        keys: of all its segments' sequences, as they would be if nothing were shared.
        pairs: of a token and what its segment's kernel compares it with, masked ones too.
        head: rows that reach the LM head.
        tapped: prompts whose states are tapped.
        compared: further rows of logits that are there at once, where next tokens are compared with the reference's.
    """

    tokens: int
    keys: int
    pairs: int
    head: int
    tapped: int
    compared: int = 0

    def times(self, factor: float) -> Row:
        """A row of so many times as much of everything."""
        return Row(*(round(value * factor) for value in vars(self).values()))


def block_bytes(shape: Shape, row: Row, size: int) -> int:
    """What one block keeps of a row without checkpointing; `size` is of an element."""
    h, q, k = shape.hidden, shape.attention, shape.keys
    gemma = shape.kind in _GEMMA
    # Gemma multiplies its norms in float32, and has four of them, of which two are followed by no projection.
    norms = 4 * 8 * h if gemma else 2 * (4 + size) * h
    feed = 4 * size * shape.inner * (shape.active if shape.experts else 1)
    routed = 2 * size * h * shape.active if shape.experts else 0  # a token's copies for its experts, and what they give
    token = norms + 2 * size * h + 3 * size * q + 2 * size * k + feed + routed + 4 * shape.heads + 8
    if shape.softcap:  # PyTorch's own operations: scores after tanh and softmax in float32, and weights
        token -= size * q + 4 * shape.heads
        return token * row.tokens + (8 + (size if size < 4 else 0)) * shape.heads * row.pairs + 2 * size * k * row.keys
    return token * row.tokens + 2 * size * k * row.keys


def kept_bytes(shape: Shape, row: Row, model: ModelSection, size: int) -> int:
    """What all blocks keep of a row, by `model.gradient_checkpointing`."""
    how = model.gradient_checkpointing
    block = block_bytes(shape, row, size)
    if not how:
        return shape.layers * block + _adapters_bytes(shape, row, model, size)
    if how == "selective":  # the block's input, and what products and attention give
        feed = 3 if shape.experts else 2
        outputs = 2 * shape.attention + 2 * shape.keys + 2 * shape.hidden + feed * shape.inner * max(1, shape.active)
        kept = size * (shape.hidden + outputs * (1 if model.lora is None else 2)) + 4 * shape.heads
        return shape.layers * kept * row.tokens
    return shape.layers * size * shape.hidden * row.tokens


def working_bytes(shape: Shape, row: Row, model: ModelSection, size: int) -> int:
    """What the backward has of one block at a time: its gradients, and with checkpointing all that it keeps.

    Of what the selective one recomputes a part is there already, so that the gradients are within the block.
    """
    block = block_bytes(shape, row, size)
    return {False: block // 2, "selective": block, True: block + block // 4}[model.gradient_checkpointing]


def head_bytes(shape: Shape, row: Row, size: int) -> int:
    """The final norm of the rows that reach the head, and their logits, over which their gradient is written."""
    return row.head * (4 + 2 * size) * shape.hidden + (row.head + row.compared) * size * shape.vocabulary


def table_bytes(shape: Shape, row: Row, size: int) -> int:
    """What all blocks share: tables of the rotation, and masks of segments that continue another."""
    return 2 * size * shape.head_size * row.tokens + size * row.pairs


def tap_bytes(shape: Shape, row: Row, extractor: int | None, size: int) -> int:
    """Tapped states in float32 and in the model's type, what the extractor makes of them, and its gradient."""
    return row.tapped * ((8 + size) * shape.hidden + 8 * (extractor or 0))


def _adapters_bytes(shape: Shape, row: Row, model: ModelSection, size: int) -> int:
    """LoRA keeps of each adapted layer the product with its first matrix."""
    if model.lora is None:
        return 0
    layers = 7 if model.lora.target_modules == "all-linear" else len(model.lora.target_modules)
    return shape.layers * layers * size * model.lora.rank * row.tokens
