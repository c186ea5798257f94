"""What a run makes sure of before its first step: that the tree's forward gives what plain forwards give.

Plain forwards are of one sequence each, with transformers' own `eager` attention, so that nothing of ours is in them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mlc_ray.data.batches import collate
from mlc_ray.data.branches import Branches
from mlc_ray.losses.logprobs import token_log_probs
from mlc_ray.train.forward import ModelError, read_answers
from mlc_ray.types import Answers, Batch, TokenRow, move

TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest relative difference; 1e-3 in other types."""
_CODES = ("a", "b", "c")


@torch.no_grad()
def check_tap(model: PreTrainedModel, layer: int, *, openings: bool = False) -> None:
    """Compare log-probs and tapped states of two toy bundles with Hugging Face's own `logits` and `hidden_states`.

    With `openings`, which a run reads, those of two openings of responses behind each prompt too.

    Run once at the start, on every worker: an architecture that ignores what the tree relies on (positions, the tree
    handed through to its attention, a final norm before the head) must stop here rather than train on other numbers.

    Raises:
        ModelError: The numbers differ, or the architecture cannot be read in this way.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    rows, sequences = _toy_bundles(vocabulary), _toy_openings(vocabulary)
    batch = collate(
        rows,
        languages=_CODES,
        weights=[1.0, 1.0],
        needs_rejected=True,
        reference=None,
        tap=True,
        scope="all" if openings else "none",
        branches=Branches(dict.fromkeys(_CODES, sequences)),
    )
    batch = move(batch, _device(model))
    assert batch.prompts is not None
    with _evaluating(model):
        try:
            chosen, rejected, states, _, refusals, _ = read_answers(
                model, batch, batch.tree, batch.prompts.tapped, layer, openings=batch.openings
            )
        except (RuntimeError, TypeError) as error:
            raise ModelError(
                f"{type(model).__name__} is not supported: its forward cannot be tapped ({error})"
            ) from error
    assert rejected is not None and states is not None
    with _evaluating(model, attention="eager"):
        expected = torch.stack([_plain(model, prompt, layer)[1] for row in rows for prompt in row.prompts]).float()
        totals = torch.stack(
            [_plain_log_prob(model, row.prompts[1], answer or [], layer) for row in rows
             for answer in (row.chosen, row.rejected)]
        )  # fmt: skip
        if refusals is not None:
            expected_refusals = torch.stack(
                [torch.stack([_plain_log_prob(model, prompt, opening, layer) for opening in sequences]).logsumexp(dim=0)
                 for row in rows for prompt in row.prompts]
            )  # fmt: skip
            distance = float((refusals - expected_refusals).norm() / expected_refusals.norm())
            _compare(model, "log-probs of openings of responses", distance)
    _compare(model, f"hidden states of layer {layer}", float((states.float() - expected).norm() / expected.norm()))
    ours = torch.stack([chosen.total, rejected.total], dim=1).flatten()
    _compare(model, "log-probs of answers", float((ours - totals).norm() / totals.norm()))


@torch.no_grad()
def check_batch(model: PreTrainedModel, batch: Batch, layer: int) -> None:
    """Compare the log-probs of the first bundle's answers in a real batch with those of plain forwards.

    The number of forwards does not depend on the batch's size, so workers that shard parameters can all do it.

    Raises:
        ModelError: They differ.
    """
    tapped = batch.prompts.tapped if batch.prompts is not None else None
    with _evaluating(model):
        chosen, rejected, *_ = read_answers(model, batch, batch.tree, tapped, layer)
    pairs = [(batch.chosen, chosen)]
    if batch.rejected is not None and rejected is not None:
        pairs.append((batch.rejected, rejected))
    with _evaluating(model, attention="eager"):
        for answers, ours in pairs:
            prompt, answer = _first_sequence(batch, answers)
            plain = float(_plain_log_prob(model, prompt, answer, layer))
            # Per token at least a nat: of a log-prob near 0, a relative difference says nothing.
            _compare(
                model, f"log-probs of bundle {batch.bundle_ids[0]}",
                abs(float(ours.total[0]) - plain) / max(abs(plain), len(answer)),
            )  # fmt: skip


def _first_sequence(batch: Batch, answers: Answers) -> tuple[list[int], list[int]]:
    """The first bundle's prompt in its response language, and its answer, read off the tree."""
    tree = batch.tree
    last = int(answers.predicting[0])
    segment = bisect_right(tree.starts, last) - 1
    start = sum(tree.key_lengths[:segment])
    path = tree.keys[start : start + tree.key_lengths[segment]]
    prompt = tree.input_ids[0, path[path <= last]]
    return prompt.tolist(), answers.targets[answers.row_of_target == 0].tolist()


def _plain_log_prob(model: PreTrainedModel, prompt: list[int], answer: list[int], layer: int) -> Tensor:
    logits, _ = _plain(model, prompt + answer, layer)
    targets = torch.tensor(answer, device=logits.device)
    return token_log_probs(logits[len(prompt) - 1 : -1], targets).sum()


def _plain(model: PreTrainedModel, ids: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of one sequence, and the state [H] of its last token at `layer`."""
    output = model(input_ids=torch.tensor([ids], device=_device(model)), output_hidden_states=True, use_cache=False)
    return output.logits[0], output.hidden_states[layer][0, -1]


def _toy_bundles(vocabulary: int) -> list[TokenRow]:
    """Two bundles in three languages that share a head of three tokens, the second without one language."""

    def tokens(start: int, count: int) -> list[int]:
        return [(start + 7 * index) % vocabulary for index in range(count)]

    head = tokens(3, 3)
    return [
        TokenRow(
            bundle_id=str(index),
            kind="harmful",
            languages=list(_CODES[: 3 - index]),
            prompts=[head + tokens(11 * (i + 1) + 31 * index, 3 + i) for i in range(3 - index)],
            tapped=[5 + i for i in range(3 - index)],
            response_prompt=1,
            chosen=tokens(5 + index, 4),
            rejected=tokens(17 + index, 3 - 2 * index),
        )
        for index in range(2)
    ]


def _toy_openings(vocabulary: int) -> list[list[int]]:
    """Two openings that begin alike."""
    return [[start % vocabulary for start in each] for each in ([2, 19, 23], [2, 29])]


def _compare(model: PreTrainedModel, what: str, distance: float) -> None:
    if not distance < TOLERANCE.get(model.dtype, 1e-3):
        raise ModelError(
            f"{type(model).__name__}: {what} read from a prefix tree differ from those of plain forwards by "
            f"{distance:.2g} (relative), with model.attention="
            f"{model.config._attn_implementation!r}; this architecture is not supported in this way"
        )


def _device(model: PreTrainedModel) -> torch.device:
    return cast(Tensor, model.get_input_embeddings().weight).device


@contextmanager
def _evaluating(model: PreTrainedModel, attention: str | None = None) -> Iterator[None]:
    """Within, the model is not training, and attends by `attention`."""
    was_training, own = model.training, model.config._attn_implementation
    model.eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.train(was_training)
        model.set_attn_implementation(own)
