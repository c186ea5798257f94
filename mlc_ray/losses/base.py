"""Losses: an alignment loss on answers, or a term on tapped representations; each is one class in one file.

A component names what it needs in class attributes, and is called with exactly that, by keyword. It says what each
bundle costs; the sum over bundles, with its weights, and the weight of a term are taken in one place, by `Objective`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlc_ray.config import AnswerSettings, LossSettings, TermSettings
from mlc_ray.losses.answers import weighted_mean
from mlc_ray.types import AnswerRows, Pairing, Pooling


@dataclass(frozen=True)
class AlignmentLoss:
    """Loss [A] to differentiate, of each answer or of each pair of answers to the same prompt.

    Beside it the detached rewards [A] that it implies (None where it has none). Of an alignment that `needs_rows` all
    are [B], and so are `metrics`, further numbers to log.
    """

    loss: Tensor
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pooled:
    """States [2, B, H] of the policy and of the frozen reference, pooled over the response-language prompt with its
    chosen and with its rejected answer (`types.Pooling`)."""

    policy: Tensor
    reference: Tensor


class Alignment(ABC):
    """An alignment loss. Subclasses nest their `Settings`, and are registered by `@register("loss", NAME)`.

    `__call__` is given `chosen`; `rejected` if `needs_rejected`; `reference_chosen` and `reference_rejected`, the
    frozen reference's summed log-probs, if `needs_reference`; `rows` if `needs_rows`; and `pooled` if `pooling` is not
    None.
    """

    Settings: ClassVar[type[LossSettings]]
    settings: LossSettings
    note: ClassVar[str] = ""
    """What a model card says beside the settings: the source, and what is not the authors'."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares the policy with a frozen reference."""
    needs_rejected: ClassVar[bool] = True
    """Whether bundles must have a rejected answer."""
    is_sft: ClassVar[bool] = False
    """Whether it is the likelihood of the answers that it is given: `sft_weight` would add the same once more."""
    needs_rows: ClassVar[bool] = False
    """Whether it relates answers of a bundle to each other: it is given whose they are, `AnswerRows`, and says what
    each bundle costs. The loss of other alignments is of each answer, and a bundle's the mean over its answers."""
    response_share: float | None = None
    """What the answer in the response language weighs in that mean (`answers.weighted_mean`); None: as the others."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def pairing(self) -> Pairing:
        """Which answers it reads, behind which prompts."""
        return "response"

    @property
    def reference_pairing(self) -> Pairing:
        """Which of them the frozen reference is asked about: the same, or those in the response language alone.

        A cached reference keeps one number of each answer: `shared` and `crossed` need `reference: online`.
        """
        return self.pairing

    @property
    def pooling(self) -> Pooling | None:
        """How states of the response-language sequences are pooled, where it reads them."""
        return None

    @property
    def response_language(self) -> str | None:
        """What the response language of all bundles must be, if it is tied to one."""
        return None

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> AlignmentLoss:
        """The loss of each answer, or of each bundle."""


_PAIRINGS: dict[str, Pairing] = {"response": "response", "all": "own", "given": "given"}


class PerAnswer(Alignment):
    """A loss of answers in one language: the response language, or each that has answers; in all, the upper bound."""

    settings: AnswerSettings

    @property
    def note(self) -> str:  # type: ignore[override]
        """That answers in several languages are not the loss's authors'."""
        several = {"all": "every language of a bundle", "given": "each language that a bundle has answers in"}
        return f"ours: answers in {several[self.settings.answers]}" if self.settings.answers in several else ""

    @property
    def pairing(self) -> Pairing:
        """As `objective.answers` says."""
        return _PAIRINGS[self.settings.answers]

    @property
    def response_share(self) -> float | None:  # type: ignore[override]
        """As the settings say."""
        return self.settings.response_share


@dataclass(frozen=True)
class Tapped:
    """What was tapped of B bundles; rows count where `present` [B, L] is true.

    `representations` [B, L, D] are the extractor's outputs, `hidden` [B, L, H] the states before it, if they were kept,
    `response` [B] the columns of the response languages, and `harmful` [B] says of which kind the bundles are.
    """

    representations: Tensor
    present: Tensor
    hidden: Tensor | None = None
    response: Tensor | None = None
    harmful: Tensor | None = None

    @property
    def response_columns(self) -> Tensor:
        """`response`.

        Raises:
            ValueError: The caller gave none.
        """
        if self.response is None:
            raise ValueError("the columns of the response languages are needed, none were given")
        return self.response

    def __getitem__(self, bundles: slice) -> Tapped:
        """What was tapped of some of the bundles."""
        return Tapped(*(None if value is None else value[bundles] for value in vars(self).values()))  # type: ignore[arg-type]

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
class Decisions:
    """How likely B bundles' responses are to open as refusals, where `present` [B, L] is true.

    `log_odds` [B, L] in nats, float64, see `refusal_log_odds`; `response` [B] are the columns of the response
    languages, where they always are, and `harmful` [B] says of which kind the bundles are.
    """

    log_odds: Tensor
    present: Tensor
    response: Tensor
    harmful: Tensor

    @property
    def in_response(self) -> Tensor:
        """Those in the response language, [B]."""
        return self.log_odds[torch.arange(len(self.log_odds), device=self.log_odds.device), self.response]


@dataclass(frozen=True)
class Kept:
    """Next-token logits [K, V] of the policy and of the frozen reference at K places of B benign bundles.

    `bundle` [K] says whose each place is, `share` [K] what it counts in that bundle's mean; `bundles` is B.
    """

    policy: Tensor
    reference: Tensor
    bundle: Tensor
    share: Tensor
    bundles: int


def refusal_log_odds(log_probs: Tensor) -> Tensor:
    """logit p of log p, in nats and float64: m = log p - log(1 - p).

    p rounds to 1 where a refusal is nearly certain. There p is taken for 1 - 1e-6 (m = 13.8), and the gradient for what
    it is there, so that a benign prompt that is refused at odds of 14 nats is still taught with 0.8 of the gradient.
    Beyond that it falls as p's own does, to 0.002 at 20 nats.
    """
    exact = log_probs.double()
    bounded = exact + (exact.detach().clamp(max=_MOST_LOG_PROB) - exact.detach())
    return bounded - torch.log(-torch.expm1(bounded))


_MOST_LOG_PROB = math.log1p(-1e-6)


@dataclass(frozen=True)
class TermLoss:
    """Loss of each bundle, [B], and detached numbers [B] to log beside it."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Term(ABC):
    """A further term of the total. Subclasses nest their `Settings`, and are registered by `@register("term", NAME)`.

    `__call__` is given one of three things:

    - `tapped` by default; and `reference_state` [B, H], the frozen reference's tapped states of the bundles' response
      prompts, if it `needs_reference_state`. If it `needs_group` it is called for each group of a batch alone: the B
      bundles that it is given are the group, and it may compare them with each other.
    - `decisions`, if it `needs_decisions`; then alone may `needs_languages` be false.
    - `kept`, if it `needs_reference_logits`.
    """

    Settings: ClassVar[type[TermSettings]]
    settings: TermSettings
    note: ClassVar[str] = ""
    """What a model card says beside the settings: the source, and what is not the authors'."""
    needs_reference_state: ClassVar[bool] = False
    """Whether it compares tapped states with those of a frozen reference."""
    needs_group: ClassVar[bool] = False
    """Whether it compares bundles with each other: those of a group, `train.group_bundles` consecutive ones of the
    batch."""
    needs_decisions: ClassVar[bool] = False
    """Whether it reads how likely responses are to open as refusals (`openings`)."""
    needs_languages: bool = True
    """Whether it reads all of a bundle's languages; else the response language alone."""
    relates_languages: ClassVar[bool] = True
    """Whether one that `needs_languages` relates them to each other: its mean is then over the bundles that have two,
    and else over all."""
    needs_reference_logits: ClassVar[bool] = False
    """Whether it compares whole distributions of next tokens with those of a frozen reference, on benign bundles:
    that one is asked at every step then (`reference: online`)."""
    carries: ClassVar[bool] = True
    """Whether one that `relates_languages` carries into the others what the response language has learned."""
    needs_kinds: ClassVar[bool] = False
    """Whether it needs bundles of both kinds."""
    needs_pairs: ClassVar[bool] = False
    """Whether bundles of a pair are to come together in a batch."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def of_two(self) -> bool:
        """Whether its mean is over the bundles that have two languages."""
        return self.needs_languages and self.relates_languages

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> TermLoss:
        """The loss of each bundle, without the term's weight."""


def mean_over_answers(values: Tensor, rows: AnswerRows | None, share: float | None = None) -> Tensor:
    """Mean over each bundle's answers [B] of values [A] (`weighted_mean`); without `rows`, each bundle has one."""
    return values if rows is None else weighted_mean(values, rows, share)


def mean_over_languages(losses: Tensor, valid: Tensor, n_bundles: int) -> Tensor:
    """Mean over each bundle's rows that are `valid`, [B]; `losses` and `valid` are [B * L], 0 and false elsewhere."""
    counts = valid.view(n_bundles, -1).sum(dim=1)
    return losses.view(n_bundles, -1).sum(dim=1) / counts.clamp(min=1)
