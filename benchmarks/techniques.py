"""Our training step, and the same step with each of its techniques switched off in turn; all give the same losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from recipe import BETA, TEMPERATURE, WEIGHT, Losses
from step_data import LANGUAGES, batch_of
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from mlc_ray.config import ObjectiveConfig
from mlc_ray.data.batches import collate_prompts
from mlc_ray.data.trees import make_tree
from mlc_ray.losses.logprobs import response_log_probs
from mlc_ray.losses.objective import Objective
from mlc_ray.train.attention import TREE, TreeAttention
from mlc_ray.train.forward import final_norm, read_answers, read_tree, to_grid
from mlc_ray.train.loop import loss_of
from mlc_ray.train.model import ModelOutput, PolicyWithExtractor
from mlc_ray.train.reference import ReferenceModel, cached_reference
from mlc_ray.types import Answers, Batch, Prompts, TokenRow, Tree, move

OBJECTIVE = Objective(
    ObjectiveConfig(objective={"loss": "dpo", "beta": BETA}, mlc={"weight": WEIGHT, "temperature": TEMPERATURE})
)
MASKED = "tree_masked"


@dataclass(frozen=True)
class Given:
    """What every variant starts from: the modules, and one step's bundles."""

    module: PolicyWithExtractor
    reference: PreTrainedModel
    rows: Sequence[TokenRow]
    device: str

    def batch(self, rows: Sequence[TokenRow] | None = None, *, tap: bool = True) -> Batch:
        """Our batch of some or all of the rows, with what the reference says of them, on the device."""
        batch = move(batch_of(self.rows if rows is None else rows, len(self.rows), tap=tap), self.device)
        return asked(self.reference, batch)


@torch.no_grad()
def asked(reference: PreTrainedModel, batch: Batch) -> Batch:
    """`batch` with the reference's log-probs, which training computes once a bundle, before its first step."""
    reference.set_attn_implementation(TREE)
    said = ReferenceModel(reference)(batch, state=False)
    return replace(batch, reference_chosen=said.chosen, reference_rejected=said.rejected)


def learn(output: ModelOutput, batch: Batch) -> Losses:
    """Loss and backward as training has them."""
    result = loss_of(OBJECTIVE, batch, output, cached_reference(batch))
    result.loss.backward()
    metrics = {**result.metrics, **result.term_metrics}
    parts = {name: (metrics[f"loss/{name}"] * batch.weight).sum() for name in parts_of(batch)}
    return parts | {"total": result.loss.detach()}


def parts_of(batch: Batch) -> list[str]:
    """The parts of the loss that this batch's step has."""
    return ["alignment", "mlc"] if batch.taps else ["alignment"]


def our_step(module: PolicyWithExtractor, batch: Batch, attention: str = TREE) -> Losses:
    """Forward and backward as training does them."""
    module.language_model.set_attn_implementation(attention)
    return learn(module(batch), batch)


def ours(given: Given, *, tap: bool = True) -> Callable[[], Losses]:
    """Everything on."""
    return partial(our_step, given.module, given.batch(tap=tap))


def one_bundle_at_a_time(given: Given) -> Callable[[], Losses]:
    """A forward and a backward for each bundle; the head of the template is forwarded in each."""
    batches = [given.batch([row]) for row in given.rows]

    def step() -> Losses:
        losses = [our_step(given.module, batch) for batch in batches]
        return {name: torch.stack([part[name] for part in losses]).sum() for name in losses[0]}

    return step


def whole_sequences(given: Given) -> Callable[[], Losses]:
    """One row without padding, in which nothing is shared: the prompt of the answers lies there three times."""
    batch = given.batch()
    tree, answers, tapped = unshared(given.rows)
    assert batch.prompts is not None
    alone = replace(
        batch, tree=tree, chosen=answers[0], rejected=answers[1], prompts=replace(batch.prompts, tapped=tapped)
    )
    return partial(our_step, given.module, move(alone, given.device))


def unshared(rows: Sequence[TokenRow]) -> tuple[Tree, list[Answers], Tensor]:
    """Answers behind their prompts, then all prompts by bundle and language, each in the row from its first token on.

    Returns the row, the chosen and the rejected answers, and where the prompts' tapped tokens are.
    """
    sequences: list[list[int]] = []
    answers = []
    for name in ("chosen", "rejected"):
        predicting, targets, bundles = [], [], []
        for bundle, row in enumerate(rows):
            prompt, answer = row.prompts[row.response_prompt], getattr(row, name)
            start = sum(map(len, sequences))
            sequences.append(prompt + answer[:-1])  # the last token predicts nothing
            predicting += range(start + len(prompt) - 1, start + len(sequences[-1]))
            targets += answer
            bundles += [bundle] * len(answer)
        answers.append(Answers(*map(torch.tensor, (predicting, targets, bundles))))
    n_answers = len(sequences)
    sequences += [prompt for row in rows for _, prompt in sorted(zip(row.languages, row.prompts, strict=True))]
    lengths = np.array([len(sequence) for sequence in sequences])
    ids = np.array([token for sequence in sequences for token in sequence])
    tree = make_tree(ids, lengths, np.full(len(lengths), -1), answers=0, prompt_only=n_answers)
    return tree, answers, torch.from_numpy(np.cumsum(lengths)[n_answers:] - 1)


def two_forwards(given: Given) -> Callable[[], Losses]:
    """Answers and prompts forwarded one after the other, each as a tree, before one backward."""
    batch = given.batch(tap=False)
    tree, prompts = (move(part, given.device) for part in collate_prompts(given.rows, LANGUAGES))
    return partial(split_step, given.module, replace(batch, prompts=prompts), tree)


def split_step(module: PolicyWithExtractor, batch: Batch, prompts: Tree, attention: str = TREE) -> Losses:
    """A forward of the batch's tree for its answers, one of the tree of `prompts` for its taps, and one backward."""
    assert batch.prompts is not None
    model = module.language_model
    model.set_attn_implementation(attention)
    chosen, rejected, *_ = read_answers(model, batch, batch.tree, None, 0)
    _, hidden, _ = read_tree(model, prompts, None, batch.prompts.tapped, module.layer)
    return learn(gridded(module, chosen, rejected, hidden, batch.prompts, len(batch.bundle_ids)), batch)


def gridded(
    module: PolicyWithExtractor, chosen: Any, rejected: Any, hidden: Tensor | None, prompts: Prompts, n_bundles: int
) -> ModelOutput:
    """What the module's own forward makes of log-probs and tapped states."""
    assert hidden is not None
    grid, present = to_grid(module.extractor(hidden), prompts, n_bundles, len(LANGUAGES))
    return ModelOutput(chosen, rejected, None, grid, present)


def head_on_every_row(given: Given) -> Callable[[], Losses]:
    """Final norm and LM head on all rows, of which the answers' are then taken. For a tap at the last layer."""
    batch = given.batch()

    def step() -> Losses:
        module, n_bundles, prompts, tree = given.module, len(batch.bundle_ids), batch.prompts, batch.tree
        assert prompts is not None and batch.rejected is not None
        model = module.language_model
        model.set_attn_implementation(TREE)
        kept: list[Tensor] = []
        handle = final_norm(model).register_forward_hook(lambda _, given, output: kept.append(output))
        logits = model(
            input_ids=tree.input_ids, position_ids=tree.position_ids, use_cache=False, tree=TreeAttention(tree)
        ).logits[0]
        handle.remove()
        scored = []
        for part in (batch.chosen, batch.rejected):
            log_probs = plain(logits.index_select(0, part.predicting), part.targets)
            scored.append(response_log_probs(log_probs, part.row_of_target, n_bundles))
        return learn(gridded(module, *scored, kept[0][0].index_select(0, prompts.tapped), prompts, n_bundles), batch)

    return step


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs by PyTorch's cross-entropy of a float32 copy of all logits."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def logits_at_once(given: Given) -> Callable[[], Losses]:
    """A float32 copy of the answers' logits, their log-softmax and its gradient, all rows at once."""
    step = ours(given)

    def patched() -> Losses:
        with mock.patch("mlc_ray.train.forward.token_log_probs", plain):
            return step()

    return patched


def masked_attention(given: Given) -> Callable[[], Losses]:
    """One call of the kernel a layer, in which every token meets every other and a mask hides most of them."""
    return partial(our_step, given.module, given.batch(), MASKED)


def attend_masked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, tree: TreeAttention,
    scaling: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention over a tree by a mask over the whole row."""
    if "whole" not in tree._kept:  # made for the first layer, as the others' masks are
        tree._kept["whole"] = whole_mask(tree).to(query.device)
    mask = tree._kept["whole"]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def whole_mask(tree: TreeAttention) -> Tensor:
    """Which token of the row [T, T] attends to which."""
    lengths = torch.tensor(tree.tree.lengths)
    related = torch.zeros(len(lengths), len(lengths), dtype=torch.bool)
    for index, path in enumerate(tree.paths):
        related[index, list(path)] = True
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return related[segment][:, segment].tril()


AttentionInterface.register(MASKED, attend_masked)


def reference_online(given: Given) -> Callable[[], Losses]:
    """The reference forwarded in every step, as a tree."""
    batch = given.batch()
    return lambda: our_step(given.module, asked(given.reference, batch))


WITHOUT = {
    "sharing prefixes": whole_sequences,
    "one forward": two_forwards,
    "rows chosen before the head": head_on_every_row,
    "log-probs by pieces": logits_at_once,
    "attention by segments": masked_attention,
    "a cached reference": reference_online,
    "bundles together": one_bundle_at_a_time,
}
"""Each technique's name, and our step without it."""
