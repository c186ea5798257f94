"""Rules of a gate: `harmful.refused drops > 2`, asked of a comparison of two scores. docs/gate.md has the grammar."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from mlc_ray.errors import MlcRayError
from mlc_ray.stats.paired import MOST, BenchmarkChange, Consistency
from mlc_ray.stats.rates import Interval, Summary
from mlc_ray.stats.response_languages import InLanguage
from mlc_ray.types import Kind, Measure

Sign = Literal["<", ">", "drops", "rises"]
Basis = Literal["certain", "estimate", "possible"]
State = Literal["holds", "open", "broken"]
_RATES: dict[str, tuple[Kind, Measure]] = {
    "harmful.refused": ("harmful", "refused"),
    "harmful.safe": ("harmful", "safe"),
    "benign.complied": ("benign", "refused"),
    "benign.safe": ("benign", "safe"),
}
_COMPARED = ("harmful.refused", "harmful.safe", "benign.complied")
_IN_LANGUAGE: dict[str, Kind] = {"harmful.in_language": "harmful", "benign.in_language": "benign"}
QUANTITIES = (
    *_RATES, *_IN_LANGUAGE, "harmful.attack_success",
    *(f"{name}.{rate}" for name in get_args(Consistency) for rate in _COMPARED), "difference",
)  # fmt: skip
"""What a rule may be on: rates in %, responses in their prompt's language in %, attack success in % (degenerate and
unparsed responses counted), consistency, the difference."""
UNSURE_CHANGE = (
    "a change of the worst language: where languages lie further apart in one of the scores than in the other, its "
    "95 % interval may hold the truth in as little as 77 % (docs/metrics.md); give such a rule a wider margin"
)
"""Of rules on such a change."""
_NUMBER = r"-?\d+(?:\.\d+)?"
_RULE = re.compile(
    rf"(?:(?P<benchmark>.+):\s*)?(?P<quantity>[a-z_.]+)\s+"
    rf"(?:(?P<side>[<>])\s*(?P<bound>{_NUMBER})|(?P<move>drops|rises)(?:\s*>\s*(?P<by>{_NUMBER}))?)"
    rf"(?:\s+(?P<basis>{'|'.join(get_args(Basis))}))?"
)


class RuleError(MlcRayError):
    """A text is not a rule, or asks for what the scores do not have; the message quotes it and says what there is."""


@dataclass(frozen=True)
class Rule:
    """When a gate fails.

    `sign` says of which number: `<` and `>` of the second score's own, `drops` and `rises` of its change against the
    first. `bound` is in the number's unit. `basis` says what must break it: all of the 95 % interval (`certain`), the
    value (`estimate`) or any part of the interval (`possible`).
    """

    text: str
    benchmark: str | None
    quantity: str
    sign: Sign
    bound: float
    basis: Basis

    @property
    def caveat(self) -> str:
        """What its interval does not hold as often as it says; empty for most."""
        moved = self.sign in ("drops", "rises")
        return UNSURE_CHANGE if moved and self.quantity.startswith("worst.") else ""


@dataclass(frozen=True)
class Outcome:
    """What became of a rule: the number with its interval, where it stands, and whether the gate fails by it.

    `state` is `broken` if all of the interval breaks the rule, `holds` if none of it does, else `open`.
    """

    rule: Rule
    number: Interval
    state: State
    failed: bool


def parse_rule(text: str) -> Rule:
    """The rule that a text says.

    Raises:
        RuleError: It is not one.
    """
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise RuleError(
            f"--fail-if {text!r}: expected `[BENCHMARK:] QUANTITY < NUMBER`, `> NUMBER`, `drops [> POINTS]` or `rises "
            f"[> POINTS]`, then perhaps certain, estimate or possible; e.g. 'harmful.refused drops > 2 possible'"
        )
    quantity, sign = match["quantity"], match["side"] or match["move"]
    if quantity not in QUANTITIES:
        raise RuleError(f"--fail-if {text!r}: {quantity!r} is not one of {', '.join(QUANTITIES)}")
    if quantity == "harmful.attack_success" and match["move"]:
        raise RuleError(
            f"--fail-if {text!r}: attack success has a bound but no change; ask whether harmful.safe or "
            "harmful.refused drops"
        )
    bound = float(match["bound"] or match["by"] or 0)
    if match["move"] and bound < 0:
        raise RuleError(f"--fail-if {text!r}: {bound:g} is below 0; say 'rises' for what should not rise")
    _check_bound(text, quantity, bound, moved=bool(match["move"]))
    return Rule(text, match["benchmark"], quantity, cast(Sign, sign), bound, cast(Basis, match["basis"] or "certain"))


def _check_bound(text: str, quantity: str, bound: float, *, moved: bool) -> None:
    """Refuse a number that is in another unit: such a rule would hold of any model, or of none."""
    low, high = (-100.0, 100.0) if quantity == "difference" else (0.0, _most(quantity))
    if high == 100 and not moved and quantity != "difference" and 0 < bound < 1:
        raise RuleError(f"--fail-if {text!r}: {quantity} is in percent: write {100 * bound:g}")
    if moved:
        low, high = 0.0, high - low
    if not low <= bound <= high:
        what = f"a change of {quantity}" if moved else quantity
        raise RuleError(f"--fail-if {text!r}: {bound:g} is outside of what {what} can be, {low:g} to {high:g}")


def _most(quantity: str) -> float:
    return next((most for name, most in MOST.items() if quantity.startswith(f"{name}.")), 100.0)


def outcome_of(rule: Rule, after: Summary, change: BenchmarkChange, in_language: InLanguage) -> Outcome:
    """What becomes of a rule.

    Args:
        rule: The rule.
        after: The second score's summary of the rule's benchmark.
        change: Its change against the first there.
        in_language: How often the second score's responses are in their prompt's language.

    Raises:
        RuleError: The scores do not have what it asks for.
    """
    number = _number(rule.quantity, rule.sign, after, change, in_language)
    if number is None:
        there = [each for each in QUANTITIES if _number(each, rule.sign, after, change, in_language) is not None]
        raise RuleError(
            f"--fail-if {rule.text!r}: on {after.benchmark!r} these scores have no {rule.quantity}: it needs that kind "
            "of prompts, a judge that gives the measure; for worst, var and pag several languages; for in_language the "
            f"languages of responses, told in the same way; they have {', '.join(there) or 'none'}"
        )
    bound = -rule.bound if rule.sign == "drops" else rule.bound
    below = rule.sign in ("<", "drops")
    value, low, high = number.value, number.low, number.high
    broken = {
        "certain": high < bound if below else low > bound,
        "estimate": value < bound if below else value > bound,
        "possible": low < bound if below else high > bound,
    }
    state: State = "broken" if broken["certain"] else "open" if broken["possible"] else "holds"
    return Outcome(rule, number, state, broken[rule.basis])


def _number(
    quantity: str, sign: Sign, after: Summary, change: BenchmarkChange, in_language: InLanguage
) -> Interval | None:
    """What a rule of this sign on the quantity is asked of; None where the scores do not have it."""
    kind = _IN_LANGUAGE.get(quantity)
    if sign in ("<", ">"):
        return _level(quantity, after) if kind is None else in_language.mean(after.benchmark, kind)
    if kind is None:
        return _change(quantity, change)
    return next((each.change for each in change.in_language if each.kind == kind), None)


def _level(quantity: str, summary: Summary) -> Interval | None:
    if quantity == "difference":
        return summary.avg_difference
    if quantity == "harmful.attack_success":
        side = summary.side("harmful", summary.harmful_measure)
        return side.misses_most if side else None
    number, rate = _split(quantity)
    side = summary.side(*_RATES[rate])
    if side is None:
        return None
    if number is None:
        return side.misses_avg if rate == "benign.complied" else side.avg
    return {"var": side.var, "pag": side.pag, "worst": side.worst_rate}[number]


def _change(quantity: str, change: BenchmarkChange) -> Interval | None:
    if quantity == "difference":
        return change.difference
    if quantity == "harmful.attack_success":
        return None
    number, rate = _split(quantity)
    side = change.side(*_RATES[rate])
    if side is None or number is None:
        return side.change if side else None
    return next((each.change for each in side.consistency if each.name == number), None)


def _split(quantity: str) -> tuple[Consistency | None, str]:
    """`worst.harmful.safe` is the number `worst` of the rate `harmful.safe`."""
    if quantity in _RATES:
        return None, quantity
    number, _, rate = quantity.partition(".")
    return cast(Consistency, number), rate
