"""From config to one scalar: total = alignment + sum of weight * part, weighted sums over bundles; and its parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mlc_ray._registry import resolve
from mlc_ray.config import ConfigError, LossSettings, ObjectiveConfig, TermSettings
from mlc_ray.losses.base import Alignment, Decisions, Kept, Pooled, Tapped, Term, TermLoss, mean_over_answers
from mlc_ray.losses.logprobs import mean_log_prob
from mlc_ray.types import AnswerRows, LossOutput, ResponseLogProbs, Scope


class Objective:
    """The loss of a run: its alignment loss and its terms, those whose weight is not 0.

    Facts about it (does it need a reference, groups of bundles?) sit here, not in the loop. `sft_weight` is the factor
    of the SFT loss that is added to the alignment loss; 0 where there is none.

    Raises:
        ConfigError: A term's facts exclude each other.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config, self.sft_weight = config, config.objective.sft_weight
        self.alignment: Alignment = resolve("loss", config.objective.loss)(config.objective)
        self.terms: dict[str, Term] = {
            name: resolve("term", settings.name)(settings) for name, settings in config.active_terms.items()
        }
        for name, term in self.terms.items():
            _check_facts(name, term)

    @property
    def parts(self) -> list[str]:
        """What the total is made of, as metrics name it: `loss/alignment`, `loss/sft`, and `loss/NAME` of each term."""
        return [f"loss/{name}" for name in ("alignment", *(["sft"] if self.sft_weight else []), *self.terms)]

    def describe(self) -> list[str]:
        """A line for each part: its weight, its name and its settings, those that may be published."""
        loss = self.config.objective.loss
        said = {"loss", "sft_weight", *(["response_share"] if self.alignment.response_share is None else [])}
        lines = [_described(loss, public_settings(self.config.objective), said, self.alignment.note)]
        if self.sft_weight:
            lines.append(f"{self.sft_weight} x sft")
        for name, term in self.terms.items():
            settings = term.settings
            own = {"weight"} | ({"name"} if settings.name == name else set())
            own |= {key for key, value in (("start", settings.start), ("ramp", settings.ramp)) if not value}
            lines.append(_described(f"{settings.weight} x {name}", public_settings(settings), own, term.note))
        if self.widest_scope != "none":
            lines.append(f"openings of refusals: {self.config.openings.described}")
        return lines

    @property
    def needs_reference(self) -> bool:
        """Whether `total_loss` must be given anything of a frozen reference."""
        return self.alignment.needs_reference or self.needs_reference_state or self.needs_reference_logits

    @property
    def needs_reference_state(self) -> bool:
        """Whether `total_loss` must be given the reference's tapped states on steps that tap."""
        return any(term.needs_reference_state for term in self.terms.values())

    @property
    def needs_reference_logits(self) -> bool:
        """Whether it must be given next-token logits of policy and reference on steps that tap."""
        return any(term.needs_reference_logits for term in self.terms.values())

    @property
    def needs_group(self) -> bool:
        """Whether a term compares bundles of a group, which must then be forwarded at once."""
        return any(term.needs_group for term in self.terms.values())

    def factors(self, step: int, total_steps: int) -> dict[str, float]:
        """The terms of optimizer step `step` (from 0) of `total_steps`, each with what multiplies its weight there.

        The same on every worker; empty where the step has no terms.
        """
        if step % self.config.mlc.every:
            return {}
        factors = {name: term.settings.factor(step, total_steps) for name, term in self.terms.items()}
        return {name: factor for name, factor in factors.items() if factor > 0}

    def taps(self, step: int, total_steps: int) -> bool:
        """Whether optimizer step `step` (from 0) of `total_steps` has terms that read prompts in all languages."""
        return any(self.terms[name].needs_languages for name in self.factors(step, total_steps))

    def scope(self, step: int, total_steps: int) -> Scope:
        """Behind which prompts that step reads openings of responses."""
        return self._scope(self.factors(step, total_steps))

    @property
    def ever_taps(self) -> bool:
        """Whether any term reads prompts in all languages."""
        return any(term.needs_languages for term in self.terms.values())

    @property
    def widest_scope(self) -> Scope:
        """Behind which prompts openings are read where all terms are computed."""
        return self._scope(self.terms)

    def begins(self, total_steps: int) -> dict[int, list[str]]:
        """Steps done (0 .. `total_steps` - 1) before terms begin that relate languages, and which ones do then."""
        found: dict[int, list[str]] = {}
        for name, term in self.terms.items():
            steps = (
                step for step in range(0, total_steps, self.config.mlc.every) if term.settings.factor(step, total_steps)
            )
            if term.of_two and term.carries and (first := next(steps, None)) is not None:
                found.setdefault(first, []).append(name)
        return found

    def _scope(self, names: Iterable[str]) -> Scope:
        reading = [self.terms[name] for name in names if self.terms[name].needs_decisions]
        if not reading:
            return "none"
        return "all" if any(term.needs_languages for term in reading) else "response"

    def total_loss(
        self,
        *,
        weight: Tensor,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs | None = None,
        reference_chosen: Tensor | None = None,
        reference_rejected: Tensor | None = None,
        reference_state: Tensor | None = None,
        representations: Tensor | None = None,
        present: Tensor | None = None,
        tapped: Tensor | None = None,
        term_weight: Tensor | None = None,
        groups: Sequence[int] | None = None,
        rows: AnswerRows | None = None,
        pooled: Tensor | None = None,
        reference_pooled: Tensor | None = None,
        factors: Mapping[str, float] | None = None,
        decisions: Decisions | None = None,
        kept: Kept | None = None,
        harmful: Tensor | None = None,
    ) -> LossOutput:
        """Loss of B bundles, a scalar, and its parts for each of them, which the caller averages over a whole batch.

        It is a sum: with 1 / N for `weight`, N the bundles of the batch, the losses of all its parts, however they are
        cut, add up to the batch's mean.

        Args:
            weight: [B], the factor of each bundle.
            chosen: Log-probs of the A chosen answers.
            rejected: Those of the rejected ones.
            reference_chosen: [A], the reference's summed log-probs of the chosen answers; [B] where `reference_pairing`
                asks about those in the response language alone.
            reference_rejected: Those of the rejected ones.
            reference_state: [B, H], its tapped states of the response prompts.
            representations: [B, L, D], the extractor's outputs; given on steps that tap, and absent on others.
            present: [B, L], the languages that each bundle has; all of them if it is not given.
            tapped: [B, L, H], hidden states before the extractor.
            term_weight: [B], each bundle's factor in the terms (default: `weight`).
            groups: A number for each bundle; neighbours with the same one are a group, which some terms compare with
                each other (default: all are one).
            rows: Whose the answers are; without them, each bundle has one in the response language.
            pooled: [2, B, H], states pooled over whole sequences.
            reference_pooled: [2, B, H], those of the reference.
            factors: The terms to compute, each with what multiplies its weight (default: all, by 1).
            decisions: How likely responses are to open as refusals, where a term reads that.
            harmful: [B], whether each bundle is harmful, where a term reads that.
            kept: Next-token logits on benign bundles, where a term reads them.

        Returns:
            The scalar to differentiate; metrics are [B], one number per bundle: `parts`, without their weights, and
            what the components log beside them.

        Raises:
            ValueError: A component needs what was not given; the message names both.
        """
        alignment = self.alignment
        of_pooled = None if pooled is None or reference_pooled is None else Pooled(pooled, reference_pooled)
        of_reference = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
        needed = _needed(
            f"objective.loss={self.config.objective.loss!r}",
            (alignment.needs_rejected, "rejected answers, none were given", {"rejected": rejected}),
            (alignment.needs_reference, "the reference's log-probs, none were given", of_reference),
            (alignment.needs_rows, "to know whose the answers are, which was not given", {"rows": rows}),
            (
                alignment.pooling is not None,
                "pooled states of policy and reference, none were given",
                {"pooled": of_pooled},
            ),
        )
        aligned = alignment(chosen=chosen, **needed)
        # In the response language alone each bundle has one answer, and there is nothing to average.
        several = None if alignment.pairing == "response" else rows
        answers = None if alignment.needs_rows else several
        loss = mean_over_answers(aligned.loss, answers, alignment.response_share)
        total = (loss * weight).sum()
        metrics: dict[str, Tensor] = {"loss/alignment": loss.detach()}
        if self.sft_weight:
            fitted = mean_over_answers(-mean_log_prob(chosen), several, alignment.response_share)
            total = total + self.sft_weight * (fitted * weight).sum()
            metrics["loss/sft"] = fitted.detach()
        if aligned.chosen_reward is not None and aligned.rejected_reward is not None:
            margin = aligned.chosen_reward - aligned.rejected_reward
            rewards = {"chosen": aligned.chosen_reward, "rejected": aligned.rejected_reward, "margin": margin}
            rewards["accuracy"] = (margin > 0).to(margin.dtype)
            metrics |= {f"reward/{name}": mean_over_answers(values, answers) for name, values in rewards.items()}
        metrics |= {f"alignment/{name}": values.detach() for name, values in aligned.metrics.items()}
        here = None
        if representations is not None:
            if present is None:
                present = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
            here = Tapped(
                representations, present, tapped, None if rows is None else rows.prompt[rows.response], harmful
            )
        of_terms: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            factor = 1.0 if factors is None else factors.get(name, 0.0)
            # Steps that do not tap have no states; log-odds that are missing are an error.
            if not factor or (here is None and not term.needs_decisions):
                continue
            result = _term_loss(name, term, here, decisions, kept, reference_state, groups)
            own_weight = term_weight if term_weight is not None and term.of_two else weight
            of_bundles = factor * term.settings.weight * own_weight
            total = total + (result.loss.to(total.dtype) * of_bundles).sum()
            logged = of_terms if term.of_two else metrics
            logged[f"loss/{name}"] = result.loss.detach()
            logged |= {f"{name}/{key}": value.detach() for key, value in result.metrics.items()}
        return LossOutput(loss=total, metrics=metrics, term_metrics=of_terms)


def public_settings(settings: LossSettings | TermSettings) -> dict[str, Any]:
    """The settings of a loss or a term that may be published: all of one that is shipped.

    Of one from outside, whose texts may be paths or names of people, its own name, the numbers and the booleans.
    """
    whole = settings.model_dump(mode="json")
    if type(settings).__module__.startswith("mlc_ray."):
        return whole
    by = "loss" if isinstance(settings, LossSettings) else "name"
    return {key: value for key, value in whole.items() if key == by or isinstance(value, bool | int | float)}


def _described(title: str, settings: dict[str, Any], said: set[str], note: str) -> str:
    values = ", ".join(f"{key}={value}" for key, value in settings.items() if key not in said)
    return (f"{title} ({values})" if values else title) + (f": {note}" if note else "")


def _needed(component: str, *wants: tuple[bool, str, dict[str, Any]]) -> dict[str, Any]:
    """The arguments of each of `wants` that the component wants, which must be there then."""
    given: dict[str, Any] = {}
    for wanted, what, arguments in wants:
        if wanted and any(value is None for value in arguments.values()):
            raise ValueError(f"{component} needs {what}")
        given |= arguments if wanted else {}
    return given


def _check_facts(name: str, term: Term) -> None:
    """Refuse a term that is to be given what no term is given."""
    given = [fact for fact in ("needs_decisions", "needs_reference_logits") if getattr(term, fact)]
    others = given[1:] or [fact for fact in ("needs_group", "needs_reference_state") if given and getattr(term, fact)]
    if not (term.needs_languages or term.needs_decisions):
        others.append("needs_languages=False")
    if not (term.relates_languages or term.needs_decisions):
        others.append("relates_languages=False")
    if others:
        raise ConfigError(
            f"term {name!r} ({type(term).__name__}) has {' and '.join([*given[:1], others[0]])}: a term is given "
            "either log-odds of each bundle by itself, or next-token logits, or tapped states, of all its languages; "
            "make two terms"
        )


def _term_loss(
    name: str,
    term: Term,
    tapped: Tapped | None,
    decisions: Decisions | None,
    kept: Kept | None,
    reference_state: Tensor | None,
    groups: Sequence[int] | None,
) -> TermLoss:
    if term.needs_decisions:
        return term(**_needed(f"term {name!r}", (True, "to know how responses open", {"decisions": decisions})))
    if term.needs_reference_logits:
        return term(**_needed(f"term {name!r}", (True, "next-token logits of policy and reference", {"kept": kept})))
    assert tapped is not None
    what, arguments = "the reference's tapped states, none were given", {"reference_state": reference_state}
    given = {"tapped": tapped, **_needed(f"term {name!r}", (term.needs_reference_state, what, arguments))}
    return term(**given) if not term.needs_group or groups is None else _by_group(term, given, groups)


def _by_group(term: Term, given: Mapping[str, Any], groups: Sequence[int]) -> TermLoss:
    results = [term(**{key: value[part] for key, value in given.items()}) for part in _slices(groups)]
    return TermLoss(
        torch.cat([result.loss for result in results]),
        {key: torch.cat([result.metrics[key] for result in results]) for key in results[0].metrics},
    )


def _slices(groups: Sequence[int]) -> Iterator[slice]:
    """Where each run of equal numbers stands."""
    start = 0
    for _, same in groupby(groups):
        stop = start + len(list(same))
        yield slice(start, stop)
        start = stop
