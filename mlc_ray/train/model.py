"""The policy and its extractor as one module, whose forward does everything that a step needs.

One module, because an engine shards and reduces what it wraps: under DeepSpeed an extractor beside the wrapped model
is lost at ZeRO-2 and unusable at ZeRO-3.

To save computation, answers and prompts are *packed* (no padding); only the hidden states of response positions reach
the final norm and the LM head; prompts stop at the tapped layer, and of that layer only the tapped rows are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mlc_ray.config import ModelSection
from mlc_ray.device import resolved
from mlc_ray.errors import MlcRayError
from mlc_ray.losses.logprobs import response_log_probs, token_log_probs
from mlc_ray.train.attention import PACKED
from mlc_ray.types import Batch, PackedPrompts, PackedResponses, PackedSequences, ResponseLogProbs

FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class ModelError(MlcRayError):
    """A model cannot be loaded or trained as asked; the message quotes the path or layer and names the fix."""


@dataclass(frozen=True)
class ModelOutput:
    """What one forward gives: log-probs of answers, and on tapped steps what was tapped, on a [B, L] grid.

    `tapped` [B, L, H] are the hidden states and `representations` [B, L, D] the extractor's outputs, both float32 and
    zero where `present` [B, L] is false.
    """

    chosen: ResponseLogProbs
    rejected: ResponseLogProbs | None
    tapped: Tensor | None = None
    representations: Tensor | None = None
    present: Tensor | None = None


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
    """A causal language model, and the linear extractor on the tapped states of one of its layers."""

    def __init__(self, policy: PreTrainedModel, *, layer: int, extractor_dim: int, seed: int) -> None:
        super().__init__()
        self.policy = policy
        self.layer = layer
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
        return cast(PreTrainedModel, policy.get_base_model() if hasattr(policy, "get_base_model") else policy)

    def forward(self, batch: Batch, *, tap: bool) -> ModelOutput:
        """Log-probs of the batch's answers and, if `tap`, its representations.

        Every worker must pass the same `tap` at the same step: under ZeRO-3 a forward gathers parameters from all.
        """
        n_bundles = len(batch.bundle_ids)
        chosen, rejected = answer_log_probs(self.language_model, batch.chosen, batch.rejected, n_bundles)
        if not tap:
            # Zero gradients, not absent ones: whether an optimizer skips a parameter without gradient depends on
            # the ZeRO stage, and the same run must not.
            hidden = next(self.extractor.parameters()).new_zeros(1, self.extractor.in_features)
            idle = 0.0 * self.extractor(hidden).sum()
            return ModelOutput(ResponseLogProbs(chosen.total + idle, chosen.length), rejected)
        hidden = tapped_states(self.language_model, batch.prompts, self.layer)
        tapped, present = to_grid(hidden.float(), batch.prompts, n_bundles, len(batch.languages))
        grid, _ = to_grid(self.extractor(hidden), batch.prompts, n_bundles, len(batch.languages))
        return ModelOutput(chosen, rejected, tapped, grid, present)


def answer_log_probs(
    model: PreTrainedModel, chosen: PackedResponses, rejected: PackedResponses | None, n_bundles: int
) -> tuple[ResponseLogProbs, ResponseLogProbs | None]:
    """Summed log-probs of chosen and rejected answers [B], from one packed forward of both."""
    packs = [chosen] if rejected is None else [chosen, rejected]
    sequences = _join([pack.sequences for pack in packs])
    starts = [0, chosen.sequences.input_ids.shape[1]]
    predicting = torch.cat([pack.predicting + start for pack, start in zip(packs, starts, strict=False)])
    with _rows_into_final_norm(model, predicting):
        # Through the model's own head, so that soft-capping and logit scaling are whatever the architecture says.
        logits = model(**_inputs(model, sequences)).logits[0]
    log_probs = token_log_probs(logits, torch.cat([pack.targets for pack in packs]))
    split = log_probs.split([pack.targets.numel() for pack in packs])
    scored = [
        response_log_probs(part, pack.bundle_of_target, n_bundles) for part, pack in zip(split, packs, strict=True)
    ]
    return scored[0], scored[1] if rejected is not None else None


def tapped_states(model: PreTrainedModel, prompts: PackedPrompts, layer: int) -> Tensor:
    """Hidden states [P, H] of the tapped tokens at `layer`, an index into Hugging Face's `hidden_states`.

    No block after `layer` runs; the final norm is applied only where `layer` is the number of blocks, as there.
    """
    decoder = model.get_decoder()
    depth = n_layers(model)
    with _depth(decoder, layer), _rows_into_final_norm(model, prompts.tapped) as captured:
        normed = decoder(**_inputs(model, prompts.sequences)).last_hidden_state
    return normed[0] if layer == depth else captured[0][0]


def layer_states(model: PreTrainedModel, prompts: PackedPrompts) -> Tensor:
    """Hidden states [P, N + 1, H] of the tapped tokens at every layer, as Hugging Face's `hidden_states` has them."""
    output = model.get_decoder()(**_inputs(model, prompts.sequences), output_hidden_states=True)
    return torch.stack([state[0].index_select(0, prompts.tapped) for state in output.hidden_states], dim=1)


def response_prompts(responses: PackedResponses, n_bundles: int) -> PackedPrompts:
    """The prompts that B answers continue, cut out of the packed answers: one a bundle, its last token tapped."""
    first = torch.searchsorted(responses.bundle_of_target, torch.arange(n_bundles, device=responses.targets.device))
    last = responses.predicting[first]  # the position that predicts an answer's first token
    starts = last.new_tensor([0, *responses.sequences.lengths[:-1]]).cumsum(0)
    lengths = tuple((last - starts + 1).tolist())
    rows = torch.cat([torch.arange(n, device=last.device) + start for start, n in zip(starts, lengths, strict=True)])
    sequences = PackedSequences(
        responses.sequences.input_ids[:, rows], responses.sequences.position_ids[:, rows], lengths
    )
    bundle = torch.arange(n_bundles, device=last.device)
    return PackedPrompts(sequences, last.new_tensor(lengths).cumsum(0) - 1, bundle, torch.zeros_like(bundle))


def to_grid(projected: Tensor, prompts: PackedPrompts, n_bundles: int, n_languages: int) -> tuple[Tensor, Tensor]:
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
    """
    transformers_logging.disable_progress_bar()  # in a worker's log it is noise
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.path,
            dtype=getattr(torch, resolved(settings.dtype, gpu=torch.cuda.is_available())),
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.path={settings.path!r} cannot be loaded: {error}") from error
    _check_soft_capping(model, settings)
    final_norm(model)  # an unsupported architecture is refused here, not at the first step
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _check_soft_capping(model: PreTrainedModel, settings: ModelSection) -> None:
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and settings.attention in (PACKED, "sdpa"):
        raise ModelError(
            f"{type(model).__name__} caps its attention logits at {cap}, which model.attention={settings.attention!r} "
            "would leave out; use model.attention='eager', or 'flash_attention_2' on a GPU"
        )


def add_adapters(model: PreTrainedModel, settings: ModelSection) -> Any:
    """`model` unchanged, or with trainable LoRA adapters and everything else frozen (a peft model)."""
    if settings.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=cast(int, lora.alpha),  # peft divides by the rank: any number does
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
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
    """Number of blocks from the model's config alone, without its weights."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path={str(path)!r} cannot be read: {error}") from error
    return int(config.get_text_config().num_hidden_layers)


@torch.no_grad()
def check_tap(model: PreTrainedModel, layer: int) -> None:
    """Compare the tapped states with Hugging Face's own `hidden_states[layer]` on three packed toy prompts.

    Run once at the start, on every worker: an architecture that ignores what the tap relies on (depth in the config,
    restarting positions, a final norm before the head) must stop here rather than train on other numbers.

    Raises:
        ModelError: The states differ, or the architecture cannot be tapped.
    """
    device = cast(Tensor, model.get_input_embeddings().weight).device
    lengths = (3, 5, 4)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = [torch.arange(7 + 11 * i, 7 + 11 * i + n, device=device) % vocabulary for i, n in enumerate(lengths)]
    sequences = PackedSequences(
        input_ids=torch.cat(ids).unsqueeze(0),
        position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0),
        lengths=lengths,
    )
    tapped = torch.tensor(lengths, device=device).cumsum(0) - 1
    grid = torch.arange(len(lengths), device=device)
    was_training = model.training
    model.eval()
    try:
        ours = tapped_states(model, PackedPrompts(sequences, tapped, grid, grid), layer)
    except RuntimeError as error:
        raise ModelError(f"{type(model).__name__} is not supported: its forward cannot be tapped ({error})") from error
    theirs = [
        model(input_ids=row.unsqueeze(0), output_hidden_states=True, use_cache=False).hidden_states[layer][0, -1]
        for row in ids
    ]
    model.train(was_training)
    expected = torch.stack(theirs).float()
    distance = (ours.float() - expected).norm() / expected.norm()
    tolerance = 5e-2 if ours.dtype == torch.bfloat16 else 1e-3
    if not distance < tolerance:
        raise ModelError(
            f"{type(model).__name__}: packed hidden states of layer {layer} differ from unpacked ones by "
            f"{float(distance):.2g} (relative); this architecture is not supported with model.attention="
            f"{model.config._attn_implementation!r}"
        )


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
    """Within, the final norm (and so the head) sees only `rows` of the packed row; yields what went into it."""
    captured: list[Tensor] = []

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        captured.append(arguments[0].index_select(1, rows))
        return (captured[-1], *arguments[1:])

    # Before any hook of DeepSpeed's: what is captured must not pass through the norm's own ZeRO-3 bookkeeping, which
    # expects a backward through the norm that a tap below it never has.
    handle = final_norm(model).register_forward_pre_hook(select, prepend=True)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def _depth(decoder: nn.Module, depth: int) -> Iterator[None]:
    """Within, the decoder runs its first `depth` blocks only: models loop over layers[: config.num_hidden_layers]."""
    config = cast(PreTrainedModel, decoder).config.get_text_config()
    full = config.num_hidden_layers
    config.num_hidden_layers = depth
    try:
        yield
    finally:
        config.num_hidden_layers = full


def _inputs(model: PreTrainedModel, sequences: PackedSequences) -> dict[str, Any]:
    inputs = {"input_ids": sequences.input_ids, "position_ids": sequences.position_ids, "use_cache": False}
    if model.config._attn_implementation == PACKED:  # other kernels find the sequences by the restarting positions
        inputs["sequence_lengths"] = sequences.lengths
    return inputs


def _join(sequences: list[PackedSequences]) -> PackedSequences:
    return PackedSequences(
        input_ids=torch.cat([s.input_ids for s in sequences], dim=1),
        position_ids=torch.cat([s.position_ids for s in sequences], dim=1),
        lengths=tuple(length for s in sequences for length in s.lengths),
    )
