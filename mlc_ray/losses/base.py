"""Losses: an alignment loss on answers, or a term on tapped representations; each is one class in one file.

A component names what it needs in class attributes, and is called with exactly that, by keyword. It says what each
bundle costs; the sum over bundles, with its weights, and the weight of a term are taken in one place, by `Objective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mlc_ray.config import LossSettings, TermSettings


@dataclass(frozen=True)
class AlignmentLoss:
    """Loss [B] to differentiate, and the detached rewards [B] the loss implies (None where it has none)."""

    loss: Tensor
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None


class Alignment(ABC):
    """An alignment loss. Subclasses nest their `Settings`, and are registered by `@register("loss", NAME)`.

    `__call__` is given `chosen`; `rejected` if `needs_rejected`; and `reference_chosen` and `reference_rejected`, the
    frozen reference's summed log-probs [B], if `needs_reference`.
    """

    Settings: ClassVar[type[LossSettings]]
    settings: LossSettings
    needs_reference: ClassVar[bool] = False
    """Whether it compares the policy with a frozen reference."""
    needs_rejected: ClassVar[bool] = True
    """Whether bundles must have a rejected answer."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> AlignmentLoss:
        """The loss of each bundle."""


@dataclass(frozen=True)
class Tapped:
    """What was tapped of B bundles; rows count where `present` [B, L] is true.

    `representations` [B, L, D] are the extractor's outputs, `hidden` [B, L, H] the states before it, if they were kept.
    """

    representations: Tensor
    present: Tensor
    hidden: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """`hidden`.

        Raises:
            ValueError: The caller kept none.
        """
        if self.hidden is None:
            raise ValueError("tapped hidden states are needed, none were given")
        return self.hidden


@dataclass(frozen=True)
class TermLoss:
    """Loss of each bundle, [B], and detached numbers [B] to log beside it."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Term(ABC):
    """A further term of the total. Subclasses nest their `Settings`, and are registered by `@register("term", NAME)`.

    `__call__` is given `tapped`, and `reference_state` [B, H], the frozen reference's tapped states of the bundles'
    response prompts, if `needs_reference_state`. A term that `needs_group` is called for each group of a batch alone:
    the B bundles that it is given are the group, and it may compare them with each other.
    """

    Settings: ClassVar[type[TermSettings]]
    settings: TermSettings
    needs_reference_state: ClassVar[bool] = False
    """Whether it compares tapped states with those of a frozen reference."""
    needs_group: ClassVar[bool] = False
    """Whether it compares bundles with each other: those of a group, `train.group_bundles` consecutive ones of the
    batch."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> TermLoss:
        """The loss of each bundle, without the term's weight."""


def mean_over_languages(losses: Tensor, valid: Tensor, n_bundles: int) -> Tensor:
    """Mean over each bundle's rows that are `valid`, [B]; `losses` and `valid` are [B * L], 0 and false elsewhere."""
    counts = valid.view(n_bundles, -1).sum(dim=1)
    return losses.view(n_bundles, -1).sum(dim=1) / counts.clamp(min=1)
