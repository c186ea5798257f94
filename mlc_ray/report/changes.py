"""Each later model against the first, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlc_ray.report.collect import Collection, Model
from mlc_ray.stats.agreement import JudgeAgreement, judge_agreement
from mlc_ray.stats.paired import BenchmarkChange, Comparison, NotComparableError, compare, corrected


@dataclass(frozen=True)
class Change:
    """A model against the first one; `comparison` is None where it could not be made, and `why` says why.

    If both are scores of the same responses by two judges, nothing of the model changed: then there is no comparison
    but the judges' `agreement`.
    """

    before: Model
    after: Model
    comparison: Comparison | None
    why: str = ""
    agreement: tuple[JudgeAgreement, ...] = ()

    @property
    def title(self) -> str:
        """Which model against which."""
        return f"{self.after.label} against {self.before.label}"

    def on(self, benchmark: str) -> BenchmarkChange | None:
        """The changes on a benchmark, None without common prompts there."""
        found = self.comparison.benchmarks if self.comparison else ()
        return next((item for item in found if item.benchmark == benchmark), None)

    def lacking(self, benchmark: str) -> str:
        """Why there is no comparison on a benchmark, as a sentence."""
        if self.comparison is None:
            return f"not compared prompt by prompt, {self.why}."
        return f"no common prompts in {benchmark}."


def changes(collection: Collection) -> list[Change]:
    """Each later model against the first, prompt by prompt; Holm's correction is over all of them."""
    first, *rest = collection.models or (None,)
    found = [_change(first, model) for model in rest] if first is not None else []
    comparisons = iter(corrected([change.comparison for change in found if change.comparison is not None]))
    return [change if change.comparison is None else replace(change, comparison=next(comparisons)) for change in found]


def compare_models(before: Model, after: Model) -> Comparison:
    """Two models prompt by prompt.

    Raises:
        NotComparableError: They share no prompt, or no measure.
    """
    old, new = ([response.judged for response in model.responses] for model in (before, after))
    if before.result.told_by != after.result.told_by:  # verdicts compare, and languages told otherwise do not
        old, new = ([replace(record, response_language=None) for record in records] for records in (old, new))
    return compare(old, new)


def before_and_after(models: Sequence[Model]) -> bool:
    """Whether a line may join them: two models, not two judges of one, and not more, which have no order in time."""
    return len(models) == 2 and not rejudged(*models)


def rejudged(before: Model, after: Model) -> bool:
    """Whether the second score is of the same responses as the first, by another judge."""
    old, new = before.result, after.result
    if (old.fingerprint, old.prompts) != (new.fingerprint, new.prompts) or old.judge == new.judge:
        return False
    if not before.responses or not after.responses:
        return False  # nothing shows that they are the same
    texts = [{(r.benchmark, r.bundle_id, r.kind, r.language): r.response for r in m.responses} for m in (before, after)]
    return texts[0] == texts[1]


def _change(before: Model, after: Model) -> Change:
    if lacking := [model.label for model in (before, after) if not model.responses]:
        return Change(before, after, None, f"the responses of {' and '.join(lacking)} are not there")
    if rejudged(before, after):
        agreement = judge_agreement([r.judged for r in before.responses], [r.judged for r in after.responses])
        return Change(before, after, None, "these are the same responses by another judge", tuple(agreement))
    try:
        comparison = compare_models(before, after)
    except NotComparableError as error:
        return Change(before, after, None, str(error))
    return Change(before, after, comparison)
