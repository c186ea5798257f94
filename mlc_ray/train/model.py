"""The policy and its extractor as one module, whose forward does everything that a step needs.

One module, because an engine shards and reduces what it wraps: under DeepSpeed an extractor beside the wrapped model
is lost at ZeRO-2 and unusable at ZeRO-3.

Answers and prompts of a batch are one prefix tree (`types.Tree`), which one forward reads: log-probs of answers and
tapped states come out of it together, every block runs once, and in the same order whether a step taps or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from mlc_ray.config import ModelSection
from mlc_ray.config.paths import scheme_of
from mlc_ray.device import resolved
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.logprobs import response_log_probs, token_log_probs
from mlc_ray.storage import HubModel, local_model
from mlc_ray.train.attention import TREE, Leaving, TreeAttention, register_attention
from mlc_ray.train.experts import gives_router_loss, router_losses
from mlc_ray.types import Answers, Batch, Openings, Pooling, Prompts, ResponseLogProbs, Sequences, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
_ATTENTION = ("aten._scaled_dot_product_", "torch_attn._varlen_attn", "flex_attention")


class ModelError(MlcRayError):
    """A model cannot be loaded or trained as asked; the message quotes the path or layer and names the fix."""


@dataclass(frozen=True)
class ModelOutput:
    """What one forward gives: log-probs of answers, and on tapped steps what was tapped, on a [B, L] grid.

    `tapped` [B, L, H] are the hidden states and `representations` [B, L, D] the extractor's outputs, both float32 and
    zero where `present` [B, L] is false. `pooled` [2, B, H], float32, are states of the last layer, after the final
    norm, pooled over the response-language prompt and its chosen or rejected answer, where the objective asks for them.
    `refusals` [B, L] are log-probs, in nats, of responses that open as refusals, where the batch has `openings` behind
    the prompt (`opened` [B, L]). `router`, a scalar, is a mixture's load-balancing loss times its weight.
    """

    chosen: ResponseLogProbs
    rejected: ResponseLogProbs | None
    tapped: Tensor | None = None
    representations: Tensor | None = None
    present: Tensor | None = None
    pooled: Tensor | None = None
    refusals: Tensor | None = None
    opened: Tensor | None = None
    router: Tensor | None = None


class Extractor(nn.Linear):
    """Trainable projection of hidden states [P, H] to [P, D]; trained jointly, dropped at export.

    The product is taken in float32 even where the weights are bfloat16: rounding its output to 8 bits would put a
    floor under how collinear two languages can look, right where training ends up.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Project [P, H] to [P, D], float32."""
        bias = self.bias.float() if self.bias is not None else None
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class PolicyWithExtractor(nn.Module):
    """A causal language model, and the linear extractor on the tapped states of one of its layers.

    Without `extractor_dim` there is no extractor: the tapped states are the representations. `pooling` says what of
    whole sequences is read, if anything; `router_weight` is the factor of a mixture's load-balancing loss.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        layer: int,
        extractor_dim: int | None,
        seed: int,
        pooling: Pooling | None = None,
        router_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.layer = layer
        self.pooling = pooling
        self.router_weight = router_weight
        self.extractor: Extractor | None = None
        if extractor_dim is None:
            return
        language_model = self.language_model
        hidden_size = language_model.config.get_text_config().hidden_size
        self.extractor = Extractor(hidden_size, extractor_dim)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # as nn.Linear does, but from the run's seed alone
            bound = hidden_size**-0.5
            for parameter in self.extractor.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal language model itself; peft injects adapters into it in place."""
        policy: Any = self.policy
        return cast("PreTrainedModel", policy.get_base_model() if hasattr(policy, "get_base_model") else policy)

    def forward(self, batch: Batch) -> ModelOutput:
        """Log-probs of the batch's answers and, if it taps, its representations; one forward of the language model.

        Every worker must be given batches that tap, or none, at the same step.
        """
        n_bundles, n_languages = len(batch.bundle_ids), len(batch.languages)
        prompts = batch.prompts
        tapped = prompts.tapped if prompts is not None else None
        with router_losses(self.language_model, wanted=self.router_weight > 0) as routed:
            read = read_answers(
                self.language_model, batch, batch.tree, tapped, self.layer, self.pooling, batch.openings
            )
        router = self.router_weight * routed[0].float() if routed else None
        chosen, rejected, hidden, pooled = read.chosen, read.rejected, read.states, read.pooled
        refusals = opened = None
        if read.refusals is not None and batch.openings is not None:
            grid, opened = to_grid(read.refusals.unsqueeze(1), batch.openings, n_bundles, n_languages)
            refusals = grid.squeeze(2)
        if prompts is None or hidden is None:
            if self.extractor is not None:
                # Zero gradients, not absent ones: whether an optimizer skips a parameter without gradient depends on
                # the ZeRO stage, and the same run must not.
                row = next(self.extractor.parameters()).new_zeros(1, self.extractor.in_features)
                idle = 0.0 * self.extractor(row).sum()
                chosen = ResponseLogProbs(chosen.total + idle, chosen.length)
            return ModelOutput(chosen, rejected, pooled=pooled, refusals=refusals, opened=opened, router=router)
        states, present = to_grid(hidden.float(), prompts, n_bundles, n_languages)
        grid = states
        if self.extractor is not None:
            grid, _ = to_grid(self.extractor(hidden), prompts, n_bundles, n_languages)
        return ModelOutput(chosen, rejected, states, grid, present, pooled, refusals, opened, router)


class Read(NamedTuple):
    """What one forward says of a batch: summed log-probs of answers [A], tapped states [P, H], pooled ones [2, B, H]
    ([1, B, H] without rejected answers), log-probs of openings of responses [P], see `opening_log_probs`."""

    chosen: ResponseLogProbs
    rejected: ResponseLogProbs | None
    states: Tensor | None
    pooled: Tensor | None
    refusals: Tensor | None


def read_answers(
    model: PreTrainedModel,
    batch: Batch,
    tree: Tree,
    tapped: Tensor | None,
    layer: int,
    pooling: Pooling | None = None,
    openings: Openings | None = None,
) -> Read:
    """The answers of a batch, and what else is asked for, from one forward.

    `tree` is the batch's, or as much of it as holds the answers; all of it with `openings`.
    """
    answers = [batch.chosen] if batch.rejected is None else [batch.chosen, batch.rejected]
    normed = None
    if pooling is not None:
        assert batch.sequences is not None
        normed = batch.sequences.last if pooling == "last" else batch.sequences.places
    predicting, targets = ([getattr(part, name) for part in answers] for name in ("predicting", "targets"))
    if openings is not None:
        predicting.append(openings.predicting)
        # Of the head's logits, which are read at once, a row of an answer has one target.
        targets = [
            nn.functional.pad(each.unsqueeze(1), (0, openings.targets.shape[1] - 1), value=-1) for each in targets
        ]
        targets.append(openings.targets)
    logits, states, whole = read_tree(
        model, tree, torch.cat(predicting), tapped, layer, normed, all_stay=openings is not None
    )
    assert logits is not None
    log_probs = token_log_probs(logits, torch.cat(targets)).split([len(each) for each in targets])
    scored = [
        response_log_probs(own if openings is None else own[:, 0], part.row_of_target, len(batch.rows.bundle))
        for own, part in zip(log_probs, answers, strict=False)
    ]
    pooled = None
    if pooling is not None and whole is not None and batch.sequences is not None:
        pooled = pool(whole, batch.sequences, pooling).unflatten(0, (len(answers), len(batch.bundle_ids)))
    refusals = opening_log_probs(log_probs[-1], openings) if openings is not None else None
    return Read(scored[0], scored[1] if batch.rejected is not None else None, states, pooled, refusals)


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
    last = layer == n_layers(model)
    leaving = None
    if tapped is not None and not last:
        leave_at(model, layer)
        staying = tree if all_stay else tree.first(tree.prompt_only if predicting is not None else 1)
        leaving = Leaving(layer, TreeAttention(staying))
    inputs = {"input_ids": tree.input_ids, "position_ids": tree.position_ids, "use_cache": False}
    inputs["tree"] = TreeAttention(tree, leaving)
    n_tapped = tapped.numel() if tapped is not None and last else 0
    n_normed = normed.numel() if normed is not None else 0
    rows = [tapped] if tapped is not None and last else []
    rows += [part for part in (normed, predicting) if part is not None]
    # The predicting rows last: the head of transformers' models keeps as many of the last rows as it is told.
    with _rows_into_final_norm(model, torch.cat(rows) if rows else tree.input_ids.new_zeros(1)) as given:
        if predicting is None:
            logits = None
            model.get_decoder()(**inputs)
        else:
            # Through the model's own head, so that soft-capping and logit scaling are whatever the architecture says.
            logits = model(**inputs, logits_to_keep=predicting.numel()).logits[0, -predicting.numel() :]
    whole = given[0][0, n_tapped : n_tapped + n_normed] if normed is not None else None
    if tapped is None:
        return logits, None, whole
    if leaving is None:
        return logits, given[0][0, :n_tapped], whole
    states = leaving.take()
    if states is None:
        raise ModelError(f"{type(model).__name__} is not supported: its blocks do not hand on the tree they are given")
    return logits, states[0].index_select(0, tapped), whole


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


def resolve_layer(layer: int | float | str, depth: int) -> int:
    """`mlc.layer` (an index, a fraction of the depth, or "last") as an index 0..N.

    Raises:
        ModelError: It is out of range.
    """
    index = depth if layer == "last" else round(layer * depth) if isinstance(layer, float) else int(layer)
    if not 0 <= index <= depth:
        raise ModelError(
            f"mlc.layer={layer!r} is outside 0..{depth}, the layers this model has; use 'last' for {depth}"
        )
    return index


def load_policy(settings: ModelSection) -> PreTrainedModel:
    """Load weights, from safetensors only.

    Raises:
        ModelError: They cannot be loaded; the message quotes the path and the reason.
        StorageFaultError: They lie on a store that cannot be read now.
    """
    from transformers import AutoModelForCausalLM  # takes 2 s, and drivers ask for a model's depth alone

    register_attention()
    transformers_logging.disable_progress_bar()  # in a worker's log it is noise
    folder = local_model(settings.path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, resolved(settings.dtype, gpu=torch.cuda.is_available())),
            attn_implementation=TREE if settings.attention == "auto" else f"{TREE}_{settings.attention}",
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.path={settings.path!r} cannot be loaded: {error}") from error
    if (named := HubModel.parse(settings.path)) is not None:
        model.name_or_path = named.name  # an adapter names its base by it, and not the folder in this machine's cache
    _check_attention(model, settings)
    check_device(settings, gpu=torch.cuda.is_available())
    if settings.kernels == "liger":
        use_liger(model, rotary=settings.gradient_checkpointing != "selective")
    router_weight(model, settings)
    final_norm(model)  # an unsupported architecture is refused here, not at the first step
    checkpoint_blocks(model, settings.gradient_checkpointing)
    return model


def checkpoint_blocks(model: PreTrainedModel, how: bool | Literal["selective"]) -> None:
    """Have blocks run again in the backward (`model.gradient_checkpointing`), whole or all but what is dear."""
    if how:
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _kept)} if how == "selective" else {}
        model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})


def _kept(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Matrix products and attention are nearly all of a block's operations, and what they give half of its memory."""
    name = str(operation)
    dear = name in _PRODUCTS or name.startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def use_liger(model: PreTrainedModel, *, rotary: bool = True) -> None:
    """Have Liger's kernels compute norms, gated activations and, with `rotary`, rotary embeddings.

    Functions of transformers are replaced for the whole process, so other models of the architecture compute with them
    too. Not `rotary` where selective checkpointing keeps the projections: Liger rotates them in place, unseen by
    PyTorch, and the second forward would rotate them again.

    Raises:
        ModelError: Liger is not installed here, or does not know the architecture.
    """
    asked = "model.kernels='liger'"
    try:
        from liger_kernel.transformers import monkey_patch as liger
    except ImportError as error:
        raise ModelError(
            f"{asked}: {error}; pip install 'mlc_ray[liger]' on every node, or use model.kernels='torch'"
        ) from None
    if model.config.model_type not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"{asked}: Liger has nothing for {type(model).__name__}; use model.kernels='torch'")
    # Its cross-entropy would take the place of the head, whose logits are read here.
    liger._apply_liger_kernel_to_instance(model, rope=rotary, cross_entropy=False, fused_linear_cross_entropy=False)


def check_device(settings: ModelSection, *, gpu: bool) -> None:
    """Refuse kernels that need a GPU where there is none.

    Raises:
        ModelError: They do.
    """
    if not gpu and settings.attention in ("varlen", "flex"):
        raise ModelError(
            f"model.attention={settings.attention!r}: it needs a GPU, and there is none here; use "
            "model.attention='auto'"
        )
    if not gpu and settings.kernels == "liger":
        raise ModelError("model.kernels='liger' needs a GPU, and there is none here; use model.kernels='torch'")


def _check_attention(model: PreTrainedModel, settings: ModelSection) -> None:
    text = model.config.get_text_config()
    cap, dropout = getattr(text, "attn_logit_softcapping", None), getattr(text, "attention_dropout", 0.0)
    refused = None
    if settings.attention == "varlen" and cap:
        refused = f"{type(model).__name__} caps its attention scores at {cap}, which it would leave out"
    elif settings.attention in ("varlen", "flex") and dropout:
        refused = f"{type(model).__name__} has an attention_dropout of {dropout}, which it would leave out"
    if refused:
        raise ModelError(f"model.attention={settings.attention!r}: {refused}; use model.attention='auto'")


def router_weight(model: PreTrainedModel, settings: ModelSection) -> float:
    """What the load-balancing loss of a mixture's routers is multiplied by; 0 where there are none.

    Raises:
        ModelError: A weight is asked for, and the model gives no such loss.
    """
    if not gives_router_loss(model):
        if settings.router_weight:
            raise ModelError(
                f"model.router_weight={settings.router_weight}: {type(model).__name__} gives no load-balancing loss of "
                "routers; remove it"
            )
        return 0.0
    if settings.router_weight is not None:
        return settings.router_weight
    return float(getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def add_adapters(model: PreTrainedModel, settings: ModelSection) -> Any:
    """`model` unchanged, or with trainable LoRA adapters and everything else frozen (a peft model)."""
    if settings.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora, named = settings.lora, HubModel.parse(settings.path)
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=cast(int, lora.alpha),  # peft divides by the rank: any number does
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
                revision=None if named is None else named.revision,
            ),
            # Adapters in the model's own type: DeepSpeed keeps float32 master copies of what it trains.
            autocast_adapter_dtype=False,
        )
    except ValueError as error:
        raise ModelError(
            f"model.lora.target_modules={lora.target_modules!r} does not fit the model: {error}"
        ) from error
    if settings.gradient_checkpointing:
        adapted.enable_input_require_grads()  # frozen embeddings would cut the graph of a checkpointed block
    return adapted


def model_depth(path: str | Path, *, trust_remote_code: bool) -> int:
    """Number of blocks from the model's config alone, without its weights.

    Raises:
        ModelError: There is no such model; the message quotes the path.
        StorageFaultError: It lies on a store that cannot be read now.
    """
    text = str(path)
    # A hub's name is `owner/name` at most; of anything else the hub would say that it is a bad name.
    name = text.partition("#")[0]
    is_path = scheme_of(text) is None and (text.startswith((".", "/", "~")) or name.count("/") > 1)
    if is_path and not Path(text).expanduser().exists():
        raise ModelError(
            f"model.path={text!r}: there is no such folder (looked for from {str(Path.cwd())!r}); "
            "`mlc-ray quickstart --only-model` makes a small model and prints its folder"
        )
    folder = local_model(text, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path={str(path)!r} cannot be read: {error}") from error
    return int(config.get_text_config().num_hidden_layers)


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
    before = norm.register_forward_pre_hook(lambda _, given: (given[0].index_select(1, rows), *given[1:]), prepend=True)
    # After the hooks of an engine that shards parameters, through which the gradient has to pass.
    after = norm.register_forward_hook(lambda _, arguments, output: given.append(output))
    try:
        yield given
    finally:
        before.remove()
        after.remove()


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
