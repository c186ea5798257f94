"""What a model is made of: counted from its config by arithmetic, or exactly from modules on the meta device.

The arithmetic is what commands ask before they start, since it imports no model; tests compare it with the modules of
every shape in `published.json`.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_ray.config.paths import scheme_of
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import HubError, local_model, pinned_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

KINDS = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"}
"""Kinds of models whose parameters the arithmetic counts exactly; of others it is a guess."""

_BIASES = {"qwen2", "qwen2_moe"}
_NORMED_HEADS = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text"}


class ShapeError(MlcRayError):
    """A shape is not known, or a model's config cannot be read; the message names what is known."""


@dataclass(frozen=True)
class Shape:
    """A causal language model of transformer blocks with gated feed-forwards.

    Attributes:
        name: as it is spoken of.
        kind: transformers' `model_type`.
        layers: blocks.
        hidden: the hidden size.
        inner: of the feed-forward, or of one expert.
        heads: of queries.
        key_heads: of keys and values.
        head_size: of each.
        vocabulary: tokens.
        tied: whether the head is the embedding.
        experts: of a block; 0 where it has one feed-forward.
        active: experts that a token meets.
        softcap: whether attention scores are capped.
        block: parameters of a block.
        parameters: of the model, a shared one counted once.
        counted: whether `parameters` are of modules, and not of arithmetic.
    """

    name: str
    kind: str
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    experts: int
    active: int
    softcap: bool
    block: int
    parameters: int
    counted: bool = False

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Query heads x their size."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Key heads x their size."""
        return self.key_heads * self.head_size

    @property
    def matrices(self) -> int:
        """Parameters of a block's matrices that a token meets."""
        feed = 3 * self.hidden * self.inner * (self.active if self.experts else 1) + self.hidden * self.experts
        return 2 * self.hidden * (self.attention + self.keys) + feed

    def adapters(self, rank: int, targets: list[str] | str) -> int:
        """Parameters of LoRA adapters of this rank: rank x (inputs + outputs) of each linear layer that gets one."""
        linear = {
            "q_proj": self.hidden + self.attention,
            "k_proj": self.hidden + self.keys,
            "v_proj": self.hidden + self.keys,
            "o_proj": self.attention + self.hidden,
        }
        if not self.experts:  # transformers keeps experts in one parameter, which is no linear layer
            linear |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.hidden + self.inner)
        named = linear if isinstance(targets, str) else {name: linear.get(name, 0) for name in targets}
        return self.layers * rank * sum(named.values())


def shape_of(config: PretrainedConfig, name: str) -> Shape:
    """By arithmetic, from a config of transformers.

    Raises:
        ShapeError: It is no model of transformer blocks.
    """
    text: Any = config.get_text_config()
    needed = ("hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers")
    if lacking := [each for each in needed if getattr(text, each, None) is None]:
        raise ShapeError(
            f"{name!r}: its config ({text.model_type}) has no {', '.join(lacking)}, as a model of transformer blocks "
            "has, so what it needs cannot be planned"
        )

    def read(*names: str, default: Any = None) -> Any:
        found = (getattr(text, each, None) for each in names)
        return next((value for value in found if value is not None), default)

    kind = str(text.model_type)
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    size = int(read("head_dim", default=hidden // heads))
    key_heads = int(read("num_key_value_heads", default=heads))
    experts = int(read("num_experts", "num_local_experts", "n_routed_experts", default=0))
    inner = int(
        read("moe_intermediate_size")
        if experts and read("moe_intermediate_size")
        else read("intermediate_size", default=4 * hidden)
    )
    vocabulary, layers = int(text.vocab_size), int(text.num_hidden_layers)
    queries, keys = heads * size, key_heads * size
    block = 2 * hidden * (queries + keys) + 3 * hidden * inner * max(1, experts) + hidden * experts
    block += hidden * (4 if kind in _FOUR_NORMS else 2)
    block += queries + 2 * keys if kind in _BIASES or read("attention_bias") else 0
    block += 2 * size if kind in _NORMED_HEADS else 0
    tied = bool(read("tie_word_embeddings", default=getattr(config, "tie_word_embeddings", False)))
    return Shape(
        name=name, kind=kind, layers=layers, hidden=hidden, inner=inner, heads=heads, key_heads=key_heads,
        head_size=size, vocabulary=vocabulary, tied=tied, experts=experts,
        active=int(read("num_experts_per_tok", default=0)) if experts else 0,
        softcap=bool(read("attn_logit_softcapping")), block=block,
        parameters=layers * block + hidden + vocabulary * hidden * (1 if tied else 2),
    )  # fmt: skip


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether weights take fewer bytes than their type says, so that no plan counts them."""
    return getattr(config, "quantization_config", None) is not None


def counted(shape: Shape, config: PretrainedConfig, *, trust_remote_code: bool = False) -> Shape:
    """The same with the parameters of modules on the meta device, which have shapes and no memory; takes seconds.

    Raises:
        ShapeError: Transformers cannot build the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # code of a model of any kind
        raise ShapeError(
            f"{shape.name!r}: transformers cannot build a model of its config ({str(error).strip().splitlines()[0]}); "
            "name another shape by --shape, or set trust_remote_code where the model has code of its own"
        ) from error
    blocks = next(part for part in model.get_decoder().children() if len(list(part.children())) == shape.layers)
    return replace(
        shape,
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks.children()),
        parameters=sum(p.numel() for p in model.parameters()),
        counted=True,
    )


@cache
def published() -> dict[str, dict[str, Any]]:
    """Fields of published configs, by the names that `--shape` takes."""
    text = (files("mlc_ray.plan") / "published.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def published_config(name: str) -> PretrainedConfig | None:
    """The config of a published shape: `qwen2.5-72b`, or the end of its name where only one has it (`72b`).

    A name with an owner, as the hub's, is compared as a whole: `acme/8b` is another model.

    Raises:
        ShapeError: Several names end so.
    """
    from transformers import AutoConfig

    wanted = name.lower().rpartition("/")[2].removesuffix("-instruct").removesuffix("-it").removeprefix("meta-")
    names = [each for each in published() if each == wanted] or [
        each for each in published() if "/" not in name and each.endswith(f"-{wanted}")
    ]
    if len(names) > 1:
        raise ShapeError(f"--shape {name}: that may be {' or '.join(names)}; give one of them")
    if not names:
        return None
    fields = dict(published()[names[0]])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def config_of(path: str, *, trust_remote_code: bool = False) -> tuple[PretrainedConfig, str]:
    """The config of a published shape, a config.json, a folder, a URL, or a hub name; and the shape's name.

    Nothing is downloaded for a name in the table of published shapes.

    Raises:
        ShapeError: There is none.
    """
    from transformers import AutoConfig

    file = Path(path).expanduser()
    here = file.exists() or scheme_of(path) is not None
    if not here and (known := published_config(path.partition("#")[0])) is not None:
        return known, path.partition("#")[0]
    if not here and re.fullmatch(r"[\d.]+[bm]", path.lower()):
        raise ShapeError(f"{path!r} is the size of no published shape; name one of {', '.join(published())}")
    try:
        source = str(file) if file.exists() else local_model(pinned_model(path), weights=False)
    except HubError as error:
        raise ShapeError(
            f"{path!r} is none of {', '.join(published())}, and no model that can be read: {error}"
        ) from None
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ShapeError(
            f"{path!r} is no folder or config.json with a model's config, and none of {', '.join(published())}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    return config, file.parent.name if file.is_file() else file.name if file.exists() else path


@cache  # asked for every corner of a search
def known_shape(path: str, *, trust_remote_code: bool) -> Shape | None:
    """The model's shape; of a kind that the arithmetic does not know counted, and None where that fails or weights
    are quantised.

    Raises:
        ShapeError: There is no config.
    """
    config, name = config_of(path, trust_remote_code=trust_remote_code)
    if is_quantised(config):
        logger.info("memory is not planned: the weights of %s are quantised", path)
        return None
    try:
        shape = shape_of(config, name)
        return shape if shape.kind in KINDS else counted(shape, config, trust_remote_code=trust_remote_code)
    except Exception as error:  # code of a model of any kind: the command itself will say what is wrong, if it is
        logger.info("memory is not planned: the shape of %s is not known (%s)", path, error)
        return None
