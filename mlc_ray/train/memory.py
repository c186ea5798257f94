"""`train.tokens_per_forward: auto`: how many tokens one worker forwards at once, counted from shapes and free memory.

Nothing here is measured: what is counted is what PyTorch keeps of a transformer block for its backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mlc_ray.config import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USED_SHARE = 0.7
"""Of the memory that is free once the model is there; the rest is for the allocator's gaps and what is not counted."""

_NARROW, _WIDE, _NORMS = 8, 4, 2
_SELECTED_NARROW, _SELECTED_WIDE = 7, 2


@dataclass(frozen=True)
class Costs:
    """Bytes that a forward keeps or needs: of each token, and of each row of logits."""

    token: int
    logit_row: int

    @classmethod
    def of(cls, model: PreTrainedModel, settings: ModelSection) -> Costs:
        """Counted from the model's shapes.

        A block keeps, for each token, 8 vectors of the hidden size (what went into both norms, into the three
        projections, out of the rotation and the attention, into the output projection), 4 of the feed-forward's (gate,
        up, activated gate, product), and 2 of the hidden size in float32 (of the norms). With gradient checkpointing it
        keeps 1 of the hidden size (its input), with the selective one 7 (its input, and what the four projections of
        the attention, the attention itself and the last product give) and 2 of the feed-forward's, twice that where
        each product has an adapter's beside it; and one block at a time has all that it keeps without. A row of logits
        is there once: its gradient is written over it.
        """
        config: Any = model.config.get_text_config()
        size = torch.finfo(getattr(torch, settings.dtype)).bits // 8
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        block = size * (_NARROW * config.hidden_size + _WIDE * wide) + 4 * _NORMS * config.hidden_size
        layers = int(config.num_hidden_layers)
        again, hidden = settings.gradient_checkpointing, int(config.hidden_size)
        selected = size * (_SELECTED_NARROW * hidden + _SELECTED_WIDE * wide) * (1 if settings.lora is None else 2)
        kept = selected if again == "selective" else size * hidden if again else block
        token = layers * kept + (block if again else 0)
        return cls(token, config.vocab_size * size)


def logit_rows(answers: float, *, prompts: float = 0.0, benign: float | None = None) -> float:
    """Rows of logits that are there at a time, for each token of a forward.

    One for each token that predicts an answer's next one, as its gradient is written over it. Where logits of benign
    bundles are compared with the reference's (`benign` is not None), the head reads the ends of their prompts too, and
    there are three more of what is compared (a copy, the reference's, the gradient) and one more of all, into which
    PyTorch puts that gradient.

    Args:
        answers: the share of tokens that predict an answer's next one.
        prompts: the share of those at the ends of benign prompts.
        benign: the share of bundles that are benign.
    """
    return answers if benign is None else 2 * (answers + prompts) + 3 * (benign * answers + prompts)


def tokens_in(free: int, costs: Costs, *, logits: float) -> int:
    """Tokens of a forward for which `free` bytes are enough.

    Args:
        free: free memory, what training still allocates being taken off.
        costs: of the model.
        logits: rows of logits for each token, as of `logit_rows`.
    """
    return int(USED_SHARE * max(0, free) / (costs.token + logits * costs.logit_row))
