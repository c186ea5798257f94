"""The policy and its extractor as one module, whose forward does everything that a step needs.

One module, because an engine shards and reduces what it wraps: under DeepSpeed an extractor beside the wrapped model
is lost at ZeRO-2 and unusable at ZeRO-3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from mlc_ray.config import LoraSection, ModelSection
from mlc_ray.config.paths import scheme_of
from mlc_ray.device import resolved
from mlc_ray.storage import HubModel, local_model
from mlc_ray.train.attention import TREE, register_attention
from mlc_ray.train.experts import gives_router_loss, router_losses
from mlc_ray.train.forward import ModelError, final_norm, read_answers, to_grid
from mlc_ray.types import Batch, Openings, Pooling, ResponseLogProbs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEED_GPU = ("varlen", "flex")  # ways of attention
_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
_ATTENTION = ("aten._scaled_dot_product_", "torch_attn._varlen_attn", "flex_attention")


@dataclass(frozen=True)
class ModelOutput:
    """What one forward gives: log-probs of answers, and on steps that tap what was tapped, on a [B, L] grid.

    `tapped` [B, L, H] are the hidden states and `representations` [B, L, D] the extractor's outputs, both float32 and
    zero where `present` [B, L] is false. `pooled` [2, B, H], float32, are states of the last layer, after the final
    norm, pooled over the response-language prompt and its chosen or rejected answer, where the objective asks for them.
    `refusals` [B, L] are log-probs, in nats, of responses that open as refusals, where the batch has `openings` behind
    the prompt (`opened` [B, L]). `benign` [K, V] are logits at the batch's `benign` places, where those are read.
    `router`, a scalar, is a mixture's load-balancing loss times its weight.
    """

    chosen: ResponseLogProbs
    rejected: ResponseLogProbs | None
    tapped: Tensor | None = None
    representations: Tensor | None = None
    present: Tensor | None = None
    pooled: Tensor | None = None
    refusals: Tensor | None = None
    opened: Tensor | None = None
    benign: Tensor | None = None
    router: Tensor | None = None


class Extractor(nn.Linear):
    """Trainable projection of hidden states [P, H] to [P, D]; trained jointly, dropped at export.

    The product is taken in float32 even where the weights are bfloat16: rounding its output to 8 bits would put a
    floor under how collinear two languages can look, right where training ends up.
    """

    def __init__(self, hidden_size: int, size: int, *, seed: int) -> None:
        super().__init__(hidden_size, size)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # as nn.Linear does, but from the run's seed alone
            bound = hidden_size**-0.5
            for parameter in self.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, hidden: Tensor) -> Tensor:
        """Project [P, H] to [P, D], float32."""
        bias = self.bias.float() if self.bias is not None else None
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class PolicyWithExtractor(nn.Module):
    """A causal language model, and the linear extractor on the tapped states of one of its layers.

    Without `extractor_dim` there is no extractor: the tapped states are the representations. `pooling` says what of
    whole sequences is read, if anything, and `keeps` whether logits of benign bundles are where the batch taps;
    `router_weight` is the factor of a mixture's load-balancing loss.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        layer: int,
        extractor_dim: int | None,
        seed: int,
        pooling: Pooling | None = None,
        keeps: bool = False,
        router_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.layer = layer
        self.pooling = pooling
        self.keeps = keeps
        self.router_weight = router_weight
        hidden_size = self.language_model.config.get_text_config().hidden_size
        self.extractor = None if extractor_dim is None else Extractor(hidden_size, extractor_dim, seed=seed)

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal language model itself; peft injects adapters into it in place."""
        policy: Any = self.policy
        return cast("PreTrainedModel", policy.get_base_model() if hasattr(policy, "get_base_model") else policy)

    def forward(self, batch: Batch) -> ModelOutput:
        """Log-probs of the batch's answers and, if it taps, its representations; one forward of the language model.

        Every worker must be given batches that tap, or none, at the same step.
        """
        prompts, size = batch.prompts, (len(batch.bundle_ids), len(batch.languages))
        tapped = prompts.tapped if prompts is not None else None
        benign = batch.benign if self.keeps else None
        with router_losses(self.language_model, wanted=self.router_weight > 0) as routed:
            read = read_answers(
                self.language_model, batch, batch.tree, tapped, self.layer, self.pooling, batch.openings, benign
            )
        router = self.router_weight * routed[0].float() if routed else None
        output = ModelOutput(read.chosen, read.rejected, pooled=read.pooled, router=router)
        if read.refusals is not None and batch.openings is not None:
            output = _with_refusals(output, read.refusals, batch.openings, size)
        if prompts is None or read.states is None:
            return output if self.extractor is None else _with_idle(output, self.extractor)
        states, present = to_grid(read.states.float(), prompts, *size)
        grid = states if self.extractor is None else to_grid(self.extractor(read.states), prompts, *size)[0]
        return replace(output, tapped=states, representations=grid, present=present, benign=read.benign)


def _with_refusals(output: ModelOutput, refusals: Tensor, openings: Openings, size: tuple[int, int]) -> ModelOutput:
    grid, opened = to_grid(refusals.unsqueeze(1), openings, *size)
    return replace(output, refusals=grid.squeeze(2), opened=opened)


def _with_idle(output: ModelOutput, extractor: Extractor) -> ModelOutput:
    """A step that does not tap gives the extractor zero gradients, not none: whether an optimizer skips a parameter
    without gradient depends on the ZeRO stage, and the same run must not."""
    row = next(extractor.parameters()).new_zeros(1, extractor.in_features)
    idle = 0.0 * extractor(row).sum()
    return replace(output, chosen=ResponseLogProbs(output.chosen.total + idle, output.chosen.length))


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Have the parameters in `dtype`, and buffers as they were loaded.

    The frequencies of rotary embeddings are a buffer in float32. Rounded to bfloat16 they are off by up to 0.2 %, and
    an angle of SmolLM2 at position 1,000 by 1.4 rad: the policy would be another model than its reference, and than
    what is served.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


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
    _restore_frequencies(model)
    if (named := HubModel.parse(settings.path)) is not None:
        model.name_or_path = named.name  # an adapter names its base by it, and not the folder in this machine's cache
    if settings.attention in _NEED_GPU:
        _check_attention(model, settings)
    check_device(settings, gpu=torch.cuda.is_available())
    if settings.kernels == "liger":
        use_liger(model, rotary=settings.gradient_checkpointing != "selective")
    router_weight(model, settings)
    final_norm(model)  # an unsupported architecture is refused here, not at the first step
    checkpoint_blocks(model, settings.gradient_checkpointing)
    return model


def _restore_frequencies(model: PreTrainedModel) -> None:
    """Have rotary embeddings' frequencies in float32 where a model was made in another type.

    At ZeRO-3 DeepSpeed gives every floating tensor that is made with a model the parameters' type, so that they are
    even computed in it.
    """
    for name, module in model.named_modules():
        own = {key: buffer for key, buffer in module.named_buffers(recurse=False) if key.endswith("inv_freq")}
        if all(buffer.dtype == torch.float32 for buffer in own.values()):
            continue
        if not hasattr(module, "config"):
            raise ModelError(
                f"{type(model).__name__}: the frequencies of {name} are {next(iter(own.values())).dtype} at "
                "engine.stage=3, and how they are computed is not known; use another stage, or model.dtype=float32"
            )
        anew = dict(type(module)(module.config).named_buffers(recurse=False))
        for key, buffer in own.items():
            module.register_buffer(key, anew[key].to(buffer.device), persistent=False)


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
    if not gpu and settings.attention in _NEED_GPU:
        raise _without_gpu("attention", settings.attention, "auto")
    if not gpu and settings.kernels == "liger":
        raise _without_gpu("kernels", settings.kernels, "torch")


def _without_gpu(setting: str, value: str, instead: str) -> ModelError:
    return ModelError(f"model.{setting}={value!r} needs a GPU, and there is none here; use model.{setting}={instead!r}")


def _check_attention(model: PreTrainedModel, settings: ModelSection) -> None:
    text = model.config.get_text_config()
    cap, dropout = getattr(text, "attn_logit_softcapping", None), getattr(text, "attention_dropout", 0.0)
    refused = None
    if settings.attention == "varlen" and cap:
        refused = f"{type(model).__name__} caps its attention scores at {cap}, which it would leave out"
    elif dropout:
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
    return model if settings.lora is None else _add_lora(model, settings, settings.lora)


def _add_lora(model: PreTrainedModel, settings: ModelSection, lora: LoraSection) -> Any:
    from peft import LoraConfig, get_peft_model

    named = HubModel.parse(settings.path)
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
        raise _no_folder(text)
    folder = local_model(text, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path={text!r} cannot be read: {error}") from error
    return int(config.get_text_config().num_hidden_layers)


def _no_folder(path: str) -> ModelError:
    return ModelError(
        f"model.path={path!r}: there is no such folder (looked for from {str(Path.cwd())!r}); "
        "`mlc-ray quickstart --only-model` makes a small model and prints its folder"
    )
