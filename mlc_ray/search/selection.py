"""Which prompts choose a search's trials and which confirm them, which is never the same bundle, and who is chosen.

The best of many trials is the luckiest as well: of 50 that are all truly 35 %, the best shows 55 % on 96 prompts. So
the few best are asked other prompts, and only those numbers are the result.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlc_ray.config import ConfirmSection, SearchConfig
from mlc_ray.data.bundles import NAMED_FIRST
from mlc_ray.score.counted_prompts import Prompts as Counted
from mlc_ray.score.counted_prompts import prompts_of
from mlc_ray.score.prompts import BenchmarkError, Prompts, read_prompts
from mlc_ray.search.objectives.base import Objective, TrialScore, languages_of_kinds
from mlc_ray.storage import fingerprint

BundleKey = tuple[str, str, str]
"""Benchmark, bundle id and kind of a bundle of prompts."""


@dataclass(frozen=True)
class AskedPrompts:
    """The prompts that every trial is asked, and those that confirm the best; no bundle is in both."""

    selection: Prompts
    confirmation: Prompts

    @property
    def fingerprint(self) -> str:
        """Names both."""
        return fingerprint([self.selection.fingerprint, self.confirmation.fingerprint])


def read_asked(config: SearchConfig, objective: Objective, *, rejects: Path) -> AskedPrompts:
    """The prompts of a search, in the same languages; invalid rows go into files in the folder `rejects`.

    Raises:
        BenchmarkError: `check_prompts` refuses them, or `confirm.benchmarks` lacks a language of `scoring.benchmarks`.
        MlcRayError: what `read_prompts` raises.
    """
    chosen, confirm = read_prompts(config.scoring, rejects=rejects), config.confirm
    if confirm.benchmarks is None:
        asked = split(chosen)
    else:
        changes = {"benchmarks": confirm.benchmarks, "limit": confirm.limit}
        other = read_prompts(config.scoring.model_copy(update=changes), rejects=rejects / "confirm")
        if absent := sorted(set(chosen.languages) - set(other.languages)):
            raise BenchmarkError(
                f"confirm.benchmarks has no prompts in {', '.join(absent)}, which scoring.benchmarks has: what was "
                "chosen there could not be confirmed; add such prompts, or leave these out of scoring.languages"
            )
        mask = np.isin(other.table["language"].to_pylist(), chosen.languages)
        asked = AskedPrompts(chosen, _part(other, mask))
    check_prompts(asked, config.confirm, objective)
    return asked


def count_asked(config: SearchConfig) -> tuple[Counted, Counted]:
    """The prompts that choose and those that confirm, by `prompts_of`."""
    scoring, confirm = config.scoring, config.confirm
    chosen = prompts_of(scoring.benchmarks, scoring, scoring.limit)
    if confirm.benchmarks is None:  # every second bundle is kept for it
        kept = Counter({of: number // 2 for of, number in chosen.cells.items()})
        return Counted(chosen.cells - kept, chosen.assumed), Counted(kept, chosen.assumed)
    return chosen, prompts_of(confirm.benchmarks, scoring, confirm.limit)


def split(prompts: Prompts) -> AskedPrompts:
    """Half of the bundles of each benchmark and kind to select, the other half to confirm.

    Bundles that share a text, in whatever language, stay together. In the order of the hash of its texts, each goes
    where there are fewer of its benchmark and kind: so the halves do not depend on the order or the ids of the files.
    """
    texts = _texts(prompts.table)
    groups = _connected(texts)
    by_hash = sorted(groups, key=lambda group: fingerprint(sorted(text for bundle in group for text in texts[bundle])))
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    confirming: set[BundleKey] = set()
    for group in by_hash:
        select, confirm = counts[group[0][0], group[0][2]]
        side = int(confirm < select)
        for benchmark, _, kind in group:
            counts[benchmark, kind][side] += 1
        confirming.update(group if side else ())
    mask = np.array([bundle in confirming for bundle in _bundles(prompts.table)])
    return AskedPrompts(_part(prompts, ~mask), _part(prompts, mask))


def _part(prompts: Prompts, mask: NDArray[np.bool_]) -> Prompts:
    table = prompts.table.filter(pa.array(mask))
    asked = zip(_bundles(table), table["language"].to_pylist(), strict=True)
    return Prompts(table, fingerprint([prompts.fingerprint, sorted((*bundle, code) for bundle, code in asked)]))


def check_prompts(asked: AskedPrompts, confirm: ConfirmSection, objective: Objective) -> None:
    """Refuse prompts that cannot choose a model, or that would confirm it on what it was chosen by.

    Raises:
        BenchmarkError: a bundle is in both sets, harmful prompts are not in the same languages, or a language lacks
            harmful or benign prompts without being named in `objective.one_sided_languages`, or is named there without
            lacking any.
    """
    _check_disjoint(asked)
    settings = {"selection": "scoring.benchmarks", "confirmation": "confirm.benchmarks"}
    if confirm.benchmarks is None:
        settings["confirmation"] = "the half of scoring.benchmarks that confirms"
    if objective.needs_benign:
        for name, where in settings.items():
            _check_both_sides(getattr(asked, name), where, objective.settings.one_sided_languages)
    harmful = {name: _harmful_languages(getattr(asked, name)) for name in settings}
    for name, other in (("selection", "confirmation"), ("confirmation", "selection")):
        lacking = harmful[other] - harmful[name] - set(objective.settings.one_sided_languages)
        if lacking or not harmful[name]:
            raise BenchmarkError(
                f"{settings[name]}: no harmful prompts in {', '.join(sorted(lacking)) or 'any language'}, so that "
                "trials would be chosen by one number and confirmed by another: add such prompts, or leave the "
                "languages out (scoring.languages)"
            )


def _harmful_languages(prompts: Prompts) -> set[str]:
    kinds, languages = (prompts.table[name].to_pylist() for name in ("kind", "language"))
    return set(languages_of_kinds(zip(kinds, languages, strict=True))[0])


def _check_disjoint(asked: AskedPrompts) -> None:
    selecting = {text for texts in _texts(asked.selection.table).values() for text in texts}
    twice = [bundle for bundle, texts in _texts(asked.confirmation.table).items() if not selecting.isdisjoint(texts)]
    if twice:
        named = ", ".join(f"{name!r} of {benchmark}" for benchmark, name, _ in twice[:NAMED_FIRST])
        raise BenchmarkError(
            f"{len(twice)} bundles of confirm.benchmarks are among those that choose the trials ({named}"
            f"{', ...' if len(twice) > NAMED_FIRST else ''}): the best of many trials is the luckiest on what chose "
            "it; name other bundles, or leave out confirm.benchmarks, and those of scoring.benchmarks are split"
        )


def _check_both_sides(prompts: Prompts, where: str, allowed: Sequence[str]) -> None:
    table = prompts.table
    harmful, benign = languages_of_kinds(zip(table["kind"].to_pylist(), table["language"].to_pylist(), strict=True))
    lacking = {"benign": [code for code in harmful if code not in benign]}
    lacking["harmful"] = [code for code in benign if code not in harmful]
    if faults := [
        f"no {kind} prompts in {', '.join(found)}"
        for kind, codes in lacking.items()
        if (found := [code for code in codes if code not in allowed])
    ]:
        raise BenchmarkError(
            f"{where}: {'; '.join(faults)}. A model that refuses everything there, or nothing, would not be told from "
            "a good one: add such prompts, leave the languages out (scoring.languages), or name them in "
            "objective.one_sided_languages, and they count on neither side"
        )
    if two_sided := [code for code in allowed if code in harmful and code in benign]:
        raise BenchmarkError(
            f"objective.one_sided_languages names {', '.join(two_sided)}, of which {where} has harmful and benign "
            "prompts: leave out what is not one-sided"
        )


def _bundles(table: pa.Table) -> list[BundleKey]:
    """The bundle of each row."""
    return list(zip(*(table[name].to_pylist() for name in ("benchmark", "bundle_id", "kind")), strict=True))


def _texts(table: pa.Table) -> dict[BundleKey, list[str]]:
    """The texts of each bundle, with single spaces; the language does not matter, `en` and `en-GB` being the same."""
    found: dict[BundleKey, list[str]] = defaultdict(list)
    for bundle, text in zip(_bundles(table), table["prompt"].to_pylist(), strict=True):
        found[bundle].append(" ".join(text.split()))
    return found


def _connected(texts: Mapping[BundleKey, Iterable[str]]) -> list[list[BundleKey]]:
    """Groups of bundles that share a text, directly or by others of the group."""
    group_of: dict[str, list[BundleKey]] = {}
    for bundle, own in texts.items():
        merged = [bundle]
        for group in {id(group_of[text]): group_of[text] for text in own if text in group_of}.values():
            merged += group
        for each in merged:
            group_of.update(dict.fromkeys(texts[each], merged))
    return list({id(group): group for group in group_of.values()}.values())


# ------------------------------------------------------------------------------------------------------------ choosing


def shortlist(scores: Sequence[TrialScore], keep: int) -> list[int]:
    """The `keep` scores that are worth confirming, best first: those of the highest lower bounds.

    Where some are at or above the floor, by the lower end of the benign side, only those are.
    """
    return sorted(cleared(scores), key=lambda index: -scores[index].rank)[:keep]


def cleared(scores: Sequence[TrialScore]) -> list[int]:
    """Those at or above the floor, by the lower end of the benign side; all where none is."""
    return [index for index, score in enumerate(scores) if score.feasible] or list(range(len(scores)))
