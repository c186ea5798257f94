"""One forward of a language model over a batch's prefix tree: log-probs of its answers, and states that are tapped.

Answers and prompts of a batch are one prefix tree (`types.Tree`), which one forward reads: log-probs of answers and
tapped states come out of it together, every block runs once, and in the same order whether a step taps or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mlc_ray.errors import MlcRayError
from mlc_ray.losses.logprobs import response_log_probs, token_log_probs
from mlc_ray.train.attention import Leaving, TreeAttention
from mlc_ray.types import Answers, Batch, BenignPlaces, Openings, Pooling, Prompts, ResponseLogProbs, Sequences, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class ModelError(MlcRayError):
    """A model cannot be loaded or trained as asked; the message quotes the path or layer and names the fix."""


class Read(NamedTuple):
    """What one forward says of a batch: summed log-probs of answers [A], tapped states [P, H], pooled ones [2, B, H]
    ([1, B, H] without rejected answers), log-probs of openings of responses [P], see `opening_log_probs`, and logits
    of benign bundles [K, V]."""

    chosen: ResponseLogProbs
    rejected: ResponseLogProbs | None
    states: Tensor | None
    pooled: Tensor | None
    refusals: Tensor | None
    benign: Tensor | None = None


def read_answers(
    model: PreTrainedModel,
    batch: Batch,
    tree: Tree,
    tapped: Tensor | None,
    layer: int,
    pooling: Pooling | None = None,
    openings: Openings | None = None,
    benign: BenignPlaces | None = None,
) -> Read:
    """The answers of a batch, and what else is asked for, from one forward.

    `tree` is the batch's, or as much of it as holds the answers; with `benign` the other prompts too, and all of it
    with `openings`.
    """
    answers = [batch.chosen] if batch.rejected is None else [batch.chosen, batch.rejected]
    predicting, targets = [part.predicting for part in answers], [part.targets for part in answers]
    if openings is not None:
        predicting, targets = _with_openings(predicting, targets, openings)
    if benign is not None:
        predicting, targets = _with_prompts(predicting, targets, benign)
    normed = _pooled_rows(batch, pooling) if pooling is not None else None
    stay = openings is not None or benign is not None
    logits, states, whole = read_tree(model, tree, torch.cat(predicting), tapped, layer, normed, all_stay=stay)
    assert logits is not None
    # A copy: `token_log_probs` overwrites what it is given.
    kept = None if benign is None else logits.index_select(0, _benign_rows(benign, len(logits)))
    log_probs = token_log_probs(logits, torch.cat(targets)).split([len(each) for each in targets])
    refusals = None
    if openings is not None:
        refusals = opening_log_probs(log_probs[len(answers)], openings)
        log_probs = tuple(own[:, 0] for own in log_probs[: len(answers)])
    scored = [
        response_log_probs(own, part.row_of_target, len(batch.rows.bundle))
        for own, part in zip(log_probs, answers, strict=False)
    ]
    pooled = _pooled(whole, batch, pooling) if whole is not None and pooling is not None else None
    return Read(scored[0], scored[1] if batch.rejected is not None else None, states, pooled, refusals, kept)


def _with_openings(
    predicting: list[Tensor], targets: list[Tensor], openings: Openings
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and targets of answers, and last those of openings; of the head's logits, which are read at once, a row of
    an answer has one target."""
    padded = [nn.functional.pad(each.unsqueeze(1), (0, openings.targets.shape[1] - 1), value=-1) for each in targets]
    return [*predicting, openings.predicting], [*padded, openings.targets]


def _with_prompts(
    predicting: list[Tensor], targets: list[Tensor], benign: BenignPlaces
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and targets of the others, and last those of benign prompts, which have no target."""
    none = benign.prompts.new_full((len(benign.prompts), *targets[0].shape[1:]), -1)
    return [*predicting, benign.prompts], [*targets, none]


def _benign_rows(benign: BenignPlaces, number: int) -> Tensor:
    """Rows of a head's logits of benign places: chosen answers are the first, and prompts the last of `number`."""
    prompts = torch.arange(number - len(benign.prompts), number, device=benign.answers.device)
    return torch.cat([benign.answers, prompts])


def benign_logits(
    model: PreTrainedModel, batch: Batch, tapped: Tensor | None, layer: int
) -> tuple[Tensor, Tensor | None]:
    """Logits of a batch's benign places [K, V] without its answers' log-probs, and states of the rows `tapped`."""
    assert batch.benign is not None
    places = torch.cat([batch.chosen.predicting[batch.benign.answers], batch.benign.prompts])
    logits, states, _ = read_tree(model, batch.tree.first(batch.tree.openings), places, tapped, layer, all_stay=True)
    assert logits is not None
    return logits, states


def _pooled_rows(batch: Batch, pooling: Pooling) -> Tensor:
    """The rows whose states are pooled."""
    assert batch.sequences is not None
    return batch.sequences.last if pooling == "last" else batch.sequences.places


def _pooled(states: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """`pool` by answer and bundle: [2, B, H], [1, B, H] without rejected answers."""
    assert batch.sequences is not None
    whole = pool(states, batch.sequences, pooling)
    return whole.view(-1, len(batch.bundle_ids), whole.shape[-1])


def opening_log_probs(log_probs: Tensor, openings: Openings) -> Tensor:
    """Log-prob in nats that a response to each prompt begins with one of its openings [P], which exclude each other.

    `log_probs` [U, K] are of `openings.targets`.
    """
    whole = torch.cat([log_probs.flatten(), log_probs.new_zeros(1)])[openings.steps].sum(dim=1)
    return torch.cat([whole, whole.new_full((1,), -torch.inf)])[openings.of_prompt].logsumexp(dim=1)


def pool(states: Tensor, sequences: Sequences, pooling: Pooling) -> Tensor:
    """One float32 vector a sequence, [S, H], of the states of its last tokens [S, H] or of all its tokens [K, H]."""
    if pooling == "last":
        return states.float()
    counted = sequences.is_answer.float() if pooling == "mean_masked" else torch.ones_like(states[:, 0]).float()
    number = len(sequences.last)
    sums = counted.new_zeros(number, states.shape[1]).index_add(
        0, sequences.sequence, states.float() * counted.unsqueeze(1)
    )
    return sums / counted.new_zeros(number).index_add(0, sequences.sequence, counted).unsqueeze(1)


def read_tree(
    model: PreTrainedModel,
    tree: Tree,
    predicting: Tensor | None,
    tapped: Tensor | None,
    layer: int,
    normed: Tensor | None = None,
    *,
    all_stay: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Logits [R, V] at the rows `predicting` and states of the rows `tapped` [P, H] and `normed`, from one forward.

    States of `tapped` are those of `layer`, an index into Hugging Face's `hidden_states`; those of `normed` are the
    last layer's, after the final norm. Only the rows that are asked for reach
    the final norm, and only `predicting` the head. Where `layer` is below the last, prompts without answers leave the
    row there unless `all_stay`, and without `predicting` all but one segment: every module runs, once, whatever is
    asked.
    """
    if tapped is not None and layer < n_layers(model):
        return _read_below(model, tree, predicting, tapped, layer, normed, all_stay=all_stay)
    logits, last = _forward(model, TreeAttention(tree), predicting, tapped, normed)
    n_tapped = tapped.numel() if tapped is not None else 0
    states = last[:n_tapped] if tapped is not None else None
    return logits, states, last[n_tapped : n_tapped + normed.numel()] if normed is not None else None


def _read_below(
    model: PreTrainedModel,
    tree: Tree,
    predicting: Tensor | None,
    tapped: Tensor,
    layer: int,
    normed: Tensor | None,
    *,
    all_stay: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`read_tree` with a tap below the last layer, where what the head does not need leaves the row."""
    leave_at(model, layer)
    staying = tree if all_stay else tree.first(tree.prompt_only if predicting is not None else 1)
    leaving = Leaving(layer, TreeAttention(staying))
    logits, last = _forward(model, TreeAttention(tree, leaving), predicting, normed)
    states = leaving.take()
    if states is None:
        raise ModelError(f"{type(model).__name__} is not supported: its blocks do not hand on the tree they are given")
    return logits, states[0].index_select(0, tapped), last[: normed.numel()] if normed is not None else None


def _forward(
    model: PreTrainedModel, attention: TreeAttention, predicting: Tensor | None, *normed: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Logits at the rows `predicting`, and the states after the final norm: of `normed`, then of `predicting`."""
    tree = attention.tree
    inputs = {"input_ids": tree.input_ids, "position_ids": tree.position_ids, "use_cache": False, "tree": attention}
    # The predicting rows last: the head of transformers' models keeps as many of the last rows as it is told.
    rows = [part for part in (*normed, predicting) if part is not None] or [tree.input_ids.new_zeros(1)]
    with _rows_into_final_norm(model, torch.cat(rows)) as given:
        if predicting is None:
            logits = None
            model.get_decoder()(**inputs)
        else:
            # Through the model's own head, so that soft-capping and logit scaling are whatever the architecture says.
            logits = model(**inputs, logits_to_keep=predicting.numel()).logits.flatten(0, 1)
            if len(logits) != predicting.numel():
                # Only then: the backward of a slice makes a second gradient of the logits' size.
                logits = logits[-predicting.numel() :]
    return logits, given[0][0]


def layer_states(model: PreTrainedModel, tree: Tree, prompts: Prompts) -> Tensor:
    """Hidden states [P, N + 1, H] of the tapped tokens at every layer, as Hugging Face's `hidden_states` has them."""
    output = model.get_decoder()(
        input_ids=tree.input_ids, position_ids=tree.position_ids, use_cache=False, output_hidden_states=True,
        tree=TreeAttention(tree),
    )  # fmt: skip
    return torch.stack([state[0].index_select(0, prompts.tapped) for state in output.hidden_states], dim=1)


def response_prompts(answers: Answers, response: Tensor) -> Tensor:
    """Places in the row [B] of the last tokens of the prompts that the answers `response` [B] continue."""
    return answers.predicting[torch.searchsorted(answers.row_of_target, response)]


def to_grid(projected: Tensor, prompts: Prompts | Openings, n_bundles: int, n_languages: int) -> tuple[Tensor, Tensor]:
    """Place [P, D] on a [B, L, D] grid, zero where a bundle lacks a language; and the mask [B, L] of what is there."""
    index = (prompts.bundle_of_prompt, prompts.language_of_prompt)
    grid = projected.new_zeros(n_bundles, n_languages, projected.shape[-1]).index_put(index, projected)
    present = torch.zeros(n_bundles, n_languages, dtype=torch.bool, device=projected.device)
    present[index] = True
    return grid, present


def n_layers(model: PreTrainedModel) -> int:
    """Number of blocks N; `hidden_states` has N + 1 entries."""
    return int(model.config.get_text_config().num_hidden_layers)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last block.

    Raises:
        ModelError: The architecture has none under a known name.
    """
    decoder = model.get_decoder()
    for name in FINAL_NORM_NAMES:
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return norm
    raise ModelError(f"{type(model).__name__} has no final norm named any of {FINAL_NORM_NAMES}; it is not supported")


@contextmanager
def _rows_into_final_norm(model: PreTrainedModel, rows: Tensor) -> Iterator[list[Tensor]]:
    """Within, the final norm (and so the head) sees only `rows` [R] of the row; yields a list of what it gives."""
    given: list[Tensor] = []
    norm = final_norm(model)
    hooks = [
        norm.register_forward_pre_hook(lambda _, given: (given[0].index_select(1, rows), *given[1:]), prepend=True),
        # After the hooks of an engine that shards parameters, through which the gradient has to pass.
        norm.register_forward_hook(lambda _, arguments, output: given.append(output)),
    ]
    if (head := model.get_output_embeddings()) is not None:
        # Where only the last of `rows` reach the head, they keep the strides of all, for which torch takes a batched
        # product; of a head without gradient a CPU copies the weights for it, transposed (272 MB for Qwen2.5-0.5B in
        # bfloat16). To view them in the shape that they have sets their strides anew.
        hooks.append(
            head.register_forward_pre_hook(lambda _, given: (given[0].view(given[0].shape), *given[1:]), prepend=True)
        )
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def leave_at(model: PreTrainedModel, layer: int) -> None:
    """Have blocks from `layer` on do what a forward's `TreeAttention.leaving` says; done once a block.

    For good, not for a forward: with gradient checkpointing, blocks run again in the backward. What they do depends on
    their arguments alone, so the second run does what the first did.
    """
    for index, block in enumerate(blocks(model)):
        hooked = any(getattr(hook, "func", None) is _leave for hook in block._forward_pre_hooks.values())
        if index >= layer and not hooked:
            # Before the hooks of an engine that shards parameters: what leaves here must not count as the block's.
            block.register_forward_pre_hook(partial(_leave, index), prepend=True, with_kwargs=True)


def _leave(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """What block `index` is given, cut to the segments that stay."""
    tree = kwargs.get("tree")
    if tree is None or tree.leaving is None or index < tree.leaving.layer:
        return None
    if index == tree.leaving.layer:
        tree.leaving.read(args[0] if args else kwargs["hidden_states"])
    whole, rest = tree.tree.tokens, tree.leaving.rest

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part) for part in value)
        # States, positions and rotary tables are [1, T, ...].
        is_row = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == whole
        return value[:, : rest.tree.tokens] if is_row else value

    return cut(args), {**{name: cut(value) for name, value in kwargs.items()}, "tree": rest}


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks.

    Raises:
        ModelError: The architecture has no such list.
    """
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == n_layers(model):
            return child
    raise ModelError(f"{type(model).__name__} has no list of {n_layers(model)} blocks; it is not supported")
