"""Supervised fine-tuning across languages on a model's own answers: SDRRL, adapted to safety.

Source: "SDRRL", ACL 2024, arXiv 2402.12204, whose mixture of prompts and answers in two languages this is. Ours, since
the paper is not about safety: the four shares, and that answers are those which the bundles have as chosen ones; the
method wants the model's own there, which a judge found safe, translated.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import LossSettings
from mlc_ray.losses.base import Alignment, AlignmentLoss
from mlc_ray.losses.logprobs import mean_log_prob
from mlc_ray.types import AnswerRows, Pairing, ResponseLogProbs

Share = Annotated[float, Field(ge=0, le=1)]


@register("loss", "sdrrl")
class Sdrrl(Alignment):
    """`sdrrl_loss` with its settings."""

    class Settings(LossSettings):
        """SDRRL's pairings of prompts and answers, by their shares in a bundle's loss.

        "English" is the response language. With shares in `english` and `english_answers` alone, no answer need be
        translated: that is the variant with English answers.
        """

        english: Share = Field(0.25, description="Share of English answers to English prompts.")
        translated: Share = Field(0.25, description="Share of translated answers to prompts in their language.")
        english_answers: Share = Field(0.25, description="Share of English answers to prompts in other languages.")
        english_prompts: Share = Field(0.25, description="Share of translated answers to English prompts.")

        @model_validator(mode="after")
        def _shares_of_one(self) -> Sdrrl.Settings:
            if abs(sum(shares_of(self)) - 1) > 1e-6:
                raise ValueError(
                    f"english, translated, english_answers and english_prompts are {shares_of(self)}, which add up to "
                    f"{sum(shares_of(self)):g}; make that 1"
                )
            return self

    settings: Settings
    needs_rejected = False
    is_sft = True
    note = (
        "after arXiv 2402.12204; ours: the adaptation to safety, with these shares, and without the authors' parallel "
        "corpus and code-switched text"
    )
    needs_rows = True

    @property
    def pairing(self) -> Pairing:
        """The smallest that has all that count."""
        _, translated, english_answers, english_prompts = shares_of(self.settings)
        if english_prompts or (translated and english_answers):
            return "crossed"
        if translated:
            return "own"
        return "shared" if english_answers else "response"

    def __call__(self, chosen: ResponseLogProbs, rows: AnswerRows) -> AlignmentLoss:
        """The loss of each bundle [B]."""
        return sdrrl_loss(chosen, rows, shares=shares_of(self.settings))


def shares_of(settings: Sdrrl.Settings) -> tuple[float, float, float, float]:
    """The four shares, in the order of `sdrrl_loss`."""
    return settings.english, settings.translated, settings.english_answers, settings.english_prompts


def sdrrl_loss(
    chosen: ResponseLogProbs, rows: AnswerRows, *, shares: tuple[float, float, float, float]
) -> AlignmentLoss:
    """Sum over four pairings of share x mean negative log-prob a token of its answers, of each bundle [B].

    The pairings, each a mean over the languages t beside English e, with prompts x and answers y: (x_e, y_e),
    (x_t, y_t), (x_t, y_e), (x_e, y_t). One that a bundle has none of counts 0. Each is logged without its share.
    """
    losses = -mean_log_prob(chosen)
    english = rows.prompt[rows.response][rows.bundle]
    is_prompt, is_answer = rows.prompt == english, rows.answer == english
    names = ("english", "translated", "english_answers", "english_prompts")
    members = (is_prompt & is_answer, ~is_prompt & ~is_answer, ~is_prompt & is_answer, is_prompt & ~is_answer)
    number = losses.new_zeros(len(rows.response))

    def mean(of: Tensor) -> Tensor:
        counted = of.to(losses.dtype)
        count = number.index_add(0, rows.bundle, counted)
        return number.index_add(0, rows.bundle, losses * counted) / count.clamp(min=1)

    means = {name: mean(of) for name, of in zip(names, members, strict=True)}
    total = sum((share * value for share, value in zip(shares, means.values(), strict=True)), number)
    return AlignmentLoss(
        total,
        metrics={
            name: value.detach() for name, share, value in zip(names, shares, means.values(), strict=True) if share
        },
    )
