"""Mixtures of experts: the loss that balances their routers, which blocks hold experts, and how many a token meets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASKED = "output_router_logits"
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")
_MET = "num_experts_per_tok"


def gives_router_loss(model: PreTrainedModel) -> bool:
    """Whether it is a mixture of experts whose forward gives the load-balancing loss of its routers."""
    return has_experts(model.config.get_text_config()) and _ASKED in inspect.signature(type(model).forward).parameters


def has_experts(config: Any) -> bool:
    """Whether a model's text config is one of a mixture of experts."""
    return any((getattr(config, name, None) or 0) > 1 for name in _NUMBERS)


def share_met(config: Any) -> float | None:
    """The share of its experts that a token meets; 1 without experts, None where the config does not say."""
    if not has_experts(config):
        return 1.0
    number = next(int(getattr(config, name)) for name in _NUMBERS if getattr(config, name, None))
    met = getattr(config, _MET, None)
    return int(met) / number if met else None


def is_expert(name: str) -> bool:
    """Whether a parameter of this name is one of the experts among which routers choose."""
    return "experts" in name.split(".")


def expert_blocks(module: nn.Module) -> set[type[nn.Module]]:
    """The classes of the blocks that hold experts and their router.

    Which experts run depends on the tokens, so workers that gather parameters expert by expert would wait for each
    other for ever: such a block has to be gathered whole.
    """
    return {type(each) for each in module.modules() if any(name == "experts" for name, _ in each.named_children())}


@contextmanager
def router_losses(model: PreTrainedModel, *, wanted: bool) -> Iterator[list[Tensor]]:
    """Within, forwards of the model put their load-balancing loss, a scalar, into the list, if `wanted`.

    It is transformers' own (Fedus et al., arXiv 2101.03961, equations 4 to 6) of all tokens of all blocks: experts x
    the sum over experts of the share of tokens that it gets, times its mean probability; top-k if they are even.
    """
    found: list[Tensor] = []
    if not wanted:
        yield found
        return
    asking = model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, _ASKED: True}), with_kwargs=True)
    taking = model.register_forward_hook(lambda _, args, output: found.append(output.aux_loss))
    try:
        yield found
    finally:
        asking.remove()
        taking.remove()
