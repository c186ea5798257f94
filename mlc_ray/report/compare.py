"""`mlc-ray compare`: two scores on the same prompts, as tables, as JSON, and as a gate."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from mlc_ray.errors import MlcRayError
from mlc_ray.report.changes import Change, compare_models
from mlc_ray.report.collect import Model, ReportError, collect
from mlc_ray.report.remarks import differing, unread, warnings
from mlc_ray.report.rules import Outcome, Rule, RuleError, outcome_of
from mlc_ray.report.summaries import change_table, language_changes
from mlc_ray.report.tables import cell, console, row, table
from mlc_ray.report.text import clean, short
from mlc_ray.stats.paired import Comparison
from mlc_ray.stats.rates import Interval, Summary
from mlc_ray.storage import Place


class CannotCompareError(MlcRayError):
    """Two scores cannot be compared, or too much of them has no verdict; the message says what differs."""

    exit_status = 3


class GateError(MlcRayError):
    """A rule of a gate failed; the message names each that did."""

    exit_status = 1


@dataclass(frozen=True)
class Compared:
    """`after` against `before` on the same prompts, measured alike, and what became of the rules."""

    before: Model
    after: Model
    comparison: Comparison
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The rules by which the gate fails."""
        return tuple(outcome for outcome in self.outcomes if outcome.failed)


def compare_scores(
    before: str | Path | Place,
    after: str | Path | Place,
    rules: Sequence[Rule] = (),
    *,
    one_sided: Collection[str] = (),
) -> Compared:
    """Compare two score folders, each its own or the only one of a run.

    Args:
        before: The score to compare with.
        after: The score that is judged.
        rules: What it is judged by.
        one_sided: Languages in which rules may judge one side alone. In any other that `after` was asked only one side
            in, a rule would pass a model that refuses everything there, or complies with everything.

    Raises:
        ReportError: A folder is no score, or has several.
        CannotCompareError: They are one score, were not measured alike, lack responses.parquet, or have too much
            without a verdict; a rule's benchmark lacks a side in a language that `one_sided` does not name.
        NotComparableError: They share no prompt.
        RuleError: A rule asks for what they do not have; `one_sided` names a language that `after` was not asked in.
    """
    first, second = (_only(collect([path]).models, path) for path in (before, after))
    if first.result.folder.absolute() == second.result.folder.absolute():
        raise CannotCompareError(
            f"{str(before)!r} and {str(after)!r} are one score, {str(first.result.folder)!r}: give two, such as "
            "those of a model before and after it was trained"
        )
    models = (replace(first, label="before"), replace(second, label="after"))
    if differences := list(differing(models)):
        raise CannotCompareError(
            f"{str(before)!r} and {str(after)!r} were not measured alike: {'; '.join(differences)}; "
            + _to_fix(differences, before, judges=first.result.judge != second.result.judge)
        )
    if missing := [str(model.result.folder) for model in models if not model.responses]:
        raise CannotCompareError(
            f"{' and '.join(map(repr, missing))} without responses.parquet: scores are compared response by response, "
            "so keep it beside scores.json"
        )
    if faults := list(unread(models)):
        raise CannotCompareError(f"{' '.join(faults)} Remove the cause, or score with a larger max_unparsed.")
    comparison = compare_models(*models)
    _check_codes(models[1], one_sided)
    for rule in rules:
        _check_sides(rule, models[1], one_sided)
    outcomes = tuple(_outcome(rule, models[1], comparison) for rule in rules)
    return Compared(*models, comparison, outcomes)


def _only(models: Sequence[Model], path: str | Path | Place) -> Model:
    if len(models) != 1:
        raise ReportError(
            f"{str(path)!r} has {len(models)} scores ({', '.join(model.label for model in models) or 'none'}); give "
            "the folder of one score"
        )
    return models[0]


def _to_fix(differences: Sequence[str], before: str | Path | Place, *, judges: bool) -> str:
    if not judges or len(differences) > 1:
        return "score both with the same settings"
    return (
        f"`mlc-ray judge {shlex.quote(str(before))}` judges its stored responses again, with --judge NAME by another "
        "judge: no new responses are needed"
    )


def _check_codes(after: Model, one_sided: Collection[str]) -> None:
    asked = {row.language for row in after.result.rows}
    if unknown := [code for code in one_sided if code not in asked]:
        raise RuleError(
            f"--one-sided {','.join(one_sided)!r}: no prompts are in {', '.join(map(repr, unknown))}; name languages "
            f"of the scores: {', '.join(sorted(asked))}"
        )


def _check_sides(rule: Rule, after: Model, allowed: Collection[str]) -> None:
    summary = _summary(rule, after)
    lacking = {code: kind for code, kind in summary.one_sided.items() if code not in allowed}
    if not lacking:
        return
    each = "; ".join(
        f"no {kind} prompts in {', '.join(code for code, missing in lacking.items() if missing == kind)}"
        for kind in dict.fromkeys(lacking.values())
    )
    raise CannotCompareError(
        f"--fail-if {rule.text!r}: {summary.benchmark!r} has {each}: a model that treats all prompts alike there would "
        f"pass. Score both kinds in these languages, or say that one is enough: --one-sided "
        f"{','.join(summary.one_sided)}"
    )


def _summary(rule: Rule, after: Model) -> Summary:
    try:
        return after.result.summary(rule.benchmark)
    except KeyError as error:
        raise RuleError(f"--fail-if {rule.text!r}: {error.args[0]}") from None


def _outcome(rule: Rule, after: Model, comparison: Comparison) -> Outcome:
    try:
        return outcome_of(rule, _summary(rule, after), comparison.benchmark(rule.benchmark), after.in_language)
    except KeyError as error:
        raise RuleError(f"--fail-if {rule.text!r}: {error.args[0]}") from None


def check_json(file: Place) -> None:
    """Check before anything is compared that `file` can be written.

    Raises:
        ReportError: It is a folder, or its folder cannot be made or written to.
    """
    if file.is_dir():
        raise ReportError(f"--json {str(file)!r} is a folder; give a file name")
    if not file.is_local:
        return
    folder = next(parent for parent in Path(file).absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ReportError(f"--json {str(file)!r}: {str(folder)!r} is no folder that can be written to; give another")


def require(compared: Compared) -> None:
    """Fail if a rule failed.

    Raises:
        GateError: It did.
    """
    if failed := compared.failed:
        named = "; ".join(f"{each.rule.text} ({_number(each.number)})" for each in failed)
        raise GateError(f"{len(failed)} of {len(compared.outcomes)} rules failed: {named}")


def comparison_tables(compared: Compared) -> Group:
    """The comparison on a terminal: per benchmark the sides, their differences and each language; then the rules."""
    change = Change(compared.before, compared.after, compared.comparison)
    parts: list[RenderableType] = [
        Text(clean(f"{model.label}: {model.result.name} ({model.result.model})"))
        for model in (compared.before, compared.after)
    ]
    for found in compared.comparison.benchmarks:
        parts += [Text(clean(found.benchmark), "bold"), console(change_table(change, found))]
        parts += map(console, language_changes(found))
    parts += [Text(f"WARNING: {clean(line)}", "bold red") for line in warnings((compared.before, compared.after))]
    if compared.outcomes:
        rows = [
            row(
                cell(each.rule.text),
                [_number(each.number), each.state, each.rule.basis,
                 cell("fails" if each.failed else "passes", tone="alarm" if each.failed else "")],
            )
            for each in compared.outcomes
        ]  # fmt: skip
        heads = ["fail if", "found", "state", "basis", "gate"]
        notes = ["open: the 95 % interval leaves both possible; more prompts would decide"]
        notes += dict.fromkeys(each.rule.caveat for each in compared.outcomes if each.rule.caveat)
        parts.append(console(table("Rules", heads, rows, "; ".join(notes))))
    return Group(*parts)


def _number(number: Interval) -> str:
    return f"{short(number.value)}, {short(number.low)} to {short(number.high)}"


def as_json(compared: Compared) -> dict[str, Any]:
    """Everything that was compared, as JSON values; rates and points as in `stats.paired`, unrounded.

    `one_sided` of each score maps benchmarks to the languages that lack a kind of prompts there, and to which.
    """
    scores = {
        model.label: {
            **{name: getattr(model.result, name) for name in ("name", "model", "fingerprint", "prompts", "judge")},
            "one_sided": {summary.benchmark: dict(summary.one_sided) for summary in model.result.summaries},
        }
        for model in (compared.before, compared.after)
    }
    rules = [
        {"rule": each.rule.text, **asdict(each.number), "state": each.state, "basis": each.rule.basis,
         "failed": each.failed, "caveat": each.rule.caveat}
        for each in compared.outcomes
    ]  # fmt: skip
    return {
        **scores,
        "warnings": warnings((compared.before, compared.after)),
        **asdict(compared.comparison),
        "rules": rules,
        "passed": not compared.failed,
    }
