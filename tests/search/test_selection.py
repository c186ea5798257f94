"""Which prompts choose and which confirm, and that what is reported of a search is true."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError

from mlc_ray.config import ConfigError, ConfirmSection
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.score.prompts import BenchmarkError, Prompts
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.score.scorer import ScorerDiedError
from mlc_ray.search.apart import apart_p, choice_p
from mlc_ray.search.confirm import best_of, confirm, confirmation_of, drop_models, finished_points
from mlc_ray.search.objectives.base import TrialScore, make_objective
from mlc_ray.search.results import Confirmed, Trial
from mlc_ray.search.selection import AskedPrompts, check_prompts, shortlist, split
from mlc_ray.search.space import make_space
from mlc_ray.stats.rates import Interval, Judged
from mlc_ray.storage import Place

from .test_objectives import GOOD, objective, records, scored
from .test_space import search_config

Row = tuple[str, str, str, str, str]
"""Benchmark, bundle id, kind, language, text."""


def prompts(rows: Sequence[Row]) -> Prompts:
    names = ("benchmark", "bundle_id", "kind", "language", "prompt")
    table = pa.Table.from_pylist(
        [{**dict(zip(names, row, strict=True)), "category": ""} for row in rows], schema=PROMPTS
    )
    return Prompts(table, "all")


def bundles(benchmark: str, kind: str, count: int, languages: Sequence[str] = ("en", "sw")) -> list[Row]:
    return [
        (benchmark, f"{kind}-{n}", kind, code, f"{benchmark} {kind} {n} in {code}")
        for n in range(count)
        for code in languages
    ]


def asked(part: Prompts) -> set[tuple[str, str]]:
    return set(zip(part.table["benchmark"].to_pylist(), part.table["bundle_id"].to_pylist(), strict=True))


ROWS = [*bundles("a", "harmful", 9), *bundles("a", "benign", 8), *bundles("b", "harmful", 4)]


def test_halves_are_disjoint_even_and_do_not_depend_on_order_or_ids() -> None:
    halves = split(prompts(ROWS))
    first, second = asked(halves.selection), asked(halves.confirmation)
    assert not first & second and len(first | second) == 21
    sizes = [Counter((name, bundle.split("-")[0]) for name, bundle in half) for half in (first, second)]
    assert all(abs(sizes[0][cell] - sizes[1][cell]) <= 1 for cell in sizes[0] | sizes[1])
    assert len(halves.selection.table) == 2 * len(first)  # every language of a bundle is in its half
    turned = split(prompts(ROWS[::-1]))
    assert asked(turned.selection) == first and turned.fingerprint == halves.fingerprint
    renamed = split(prompts([(name, bundle + "-new", *rest) for name, bundle, *rest in ROWS]))  # type: ignore[misc]
    assert {bundle.removesuffix("-new") for _, bundle in asked(renamed.selection)} == {bundle for _, bundle in first}
    assert halves.selection.fingerprint != halves.confirmation.fingerprint != "all"


def test_bundles_that_share_a_text_stay_together() -> None:
    # one after another they share a text: another benchmark's English, and one text with other spaces
    chain: list[Row] = [
        ("a", "one", "harmful", "en", "the same"),
        ("a", "one", "harmful", "sw", "own"),
        ("b", "two", "harmful", "en-GB", "the  same "),
        ("b", "two", "harmful", "fr", "both"),
        ("a", "three", "harmful", "fr", "both"),
    ]
    together = {("a", "one"), ("b", "two"), ("a", "three")}
    for extra in range(6):  # whatever else there is
        halves = split(prompts([*chain, *bundles("a", "harmful", extra)]))
        assert together <= asked(halves.selection) or together <= asked(halves.confirmation)


def test_the_same_bundle_never_chooses_and_confirms() -> None:
    other = [("c", "mine", kind, code, text) for _, _, kind, code, text in bundles("a", "harmful", 1)]
    confirming = prompts([*bundles("c", "harmful", 3), *bundles("c", "benign", 3), *other])
    with pytest.raises(BenchmarkError, match=r"1 bundles of confirm\.benchmarks .*'mine' of c.*name other bundles"):
        check_prompts(AskedPrompts(prompts(ROWS), confirming), ConfirmSection(), objective())
    check_prompts(split(prompts(ROWS)), ConfirmSection(), objective())


def test_a_language_with_one_side_is_refused_unless_it_is_named() -> None:
    rows = [*ROWS, *bundles("d", "harmful", 4, ["zh", "fr"]), *bundles("d", "benign", 4, ["ru"])]
    with pytest.raises(BenchmarkError, match=r"benchmarks: no benign prompts in fr, zh; no harmful .* in ru\."):
        check_prompts(split(prompts(rows)), ConfirmSection(), objective())
    check_prompts(split(prompts(rows)), ConfirmSection(), objective(one_sided_languages=["zh", "fr", "ru"]))
    check_prompts(split(prompts(rows)), ConfirmSection(), objective(name="safety_alone"))
    with pytest.raises(BenchmarkError, match=r"names en, of which scoring\.benchmarks has harmful and benign"):
        check_prompts(split(prompts(ROWS)), ConfirmSection(), objective(one_sided_languages=["en"]))
    # one bundle of a kind cannot be in both halves
    single = prompts([*bundles("a", "harmful", 4), *bundles("a", "benign", 1)])
    with pytest.raises(BenchmarkError, match=r"half of scoring\.benchmarks that confirms: no benign prompts in en, sw"):
        check_prompts(split(single), ConfirmSection(), objective())


# ------------------------------------------------------------------------------------------------------- who is chosen

TRUE_RATE, BENIGN_RATE, RESPONSES = 0.35, 0.90, 96
Z = NormalDist().inv_cdf(0.975)


def measured(generator: np.random.Generator) -> TrialScore:
    """A score of a model that truly refuses `TRUE_RATE` of harmful prompts, with Wilson's intervals."""
    sides = [wilson_percent(generator.binomial(RESPONSES, rate)) for rate in (TRUE_RATE, BENIGN_RATE)]
    harmful, benign = sides
    feasible = benign.low >= 75
    worth = harmful.low / 100 if feasible else benign.low / 100 - 0.75
    return TrialScore(
        "refused", harmful, benign, (worth,), feasible, worth, {"en": harmful}, {"en": benign}, harmful, "en"
    )


def wilson_percent(hits: int) -> Interval:
    p, n = hits / RESPONSES, RESPONSES
    centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n))
    return Interval(100 * p, *(100 * (centre + sign * half) / (1 + Z**2 / n) for sign in (-1, 1)))


def test_what_is_reported_of_fifty_equal_trials_is_true_though_the_best_of_them_looks_better() -> None:
    selected, reported, held = [], [], 0
    for seed in range(200):
        generator = np.random.default_rng([35, seed])
        trials = [measured(generator) for _ in range(50)]
        chosen = shortlist(trials, 3)
        assert all(trials[index].feasible for index in chosen)
        selected.append(trials[chosen[0]].harmful.value)
        confirmed = [measured(generator) for _ in chosen]
        p_values = [_p_value(confirmed[0], other) for other in confirmed[1:]]
        best = confirmed[best_of(confirmed, p_values)]
        reported.append(best.harmful.value)
        held += best.harmful.low <= 100 * TRUE_RATE <= best.harmful.high
    assert np.mean(selected) > 45  # the winner's curse: ten points that are not there
    assert abs(np.mean(reported) - 35) < 1.5
    assert held >= 184, held  # 95 % of 200 less two standard errors


def test_so_it_is_by_the_intervals_and_the_choice_of_a_search_itself() -> None:
    average = objective(min_benign_compliance=0.5)
    values = search_config().enqueue or [{}]

    def judged(generator: np.random.Generator) -> list[Judged]:
        sides = zip(("harmful", "benign"), ("RC", "CR"), (TRUE_RATE, BENIGN_RATE), strict=True)
        found = []
        for kind, letters, rate in sides:
            text = "".join(letters[int(draw > rate)] for draw in generator.random(RESPONSES))
            found += records(kind, en=text)  # type: ignore[arg-type]
        return found

    selected, reported = [], []
    for seed in range(16):
        generator = np.random.default_rng([36, seed])
        trials = [average.score(judged(generator)) for _ in range(12)]
        chosen = shortlist(trials, 2)
        selected.append(trials[chosen[0]].harmful)
        confirming = [judged(generator) for _ in chosen]
        found = [
            (Confirmed(str(index), (str(index),), values[0], average.score(each)), {1: each})
            for index, each in zip(chosen, confirming, strict=True)
        ]
        reported.append(confirmation_of(average, found, None).best.score.harmful)
    assert np.mean([each.value for each in selected]) > 39
    assert abs(np.mean([each.value for each in reported]) - 35) < 4  # three standard errors
    for each in reported:  # no narrower than those whose share that holds the truth is counted above
        wilson = wilson_percent(round(each.value * RESPONSES / 100))
        assert each.low <= wilson.low + 1e-9 and each.high >= wilson.high - 1e-9, (each, wilson)
    # Sixteen are too few to count a share, and enough to tell these from the intervals of the selection.
    before, held = (sum(each.low <= 100 * TRUE_RATE <= each.high for each in some) for some in (selected, reported))
    assert before < 14 <= held, (before, held)


def _p_value(first: TrialScore, other: TrialScore) -> float:
    """Of two independent rates, by a normal approximation."""
    a, b = first.harmful.value / 100, other.harmful.value / 100
    pooled = (a + b) / 2
    return 2 * NormalDist().cdf(-abs(a - b) / math.sqrt(2 * pooled * (1 - pooled) / RESPONSES))


def test_another_is_the_best_only_where_it_is_told_apart() -> None:
    benign = records("benign", en=32 * "C")
    low, high = (scored(records("harmful", en=n * "R" + (32 - n) * "C") + benign) for n in (8, 28))
    assert best_of([low, high], [0.001]) == 1
    assert best_of([low, high], [0.06]) == 0
    assert best_of([low, high, low], [0.03, 0.5]) == 0  # Holm: 0.06
    assert best_of([high, low], [0.001]) == 0


def test_only_those_that_clear_the_floor_are_confirmed_and_the_nearest_where_none_does() -> None:
    good, better, below = (
        scored(GOOD, min_benign_compliance=0.7),
        scored(records("harmful", en=32 * "R", sw=24 * "R" + 8 * "C") + GOOD[64:], min_benign_compliance=0.7),
        scored(records("harmful", en=32 * "R", sw=32 * "R") + records("benign", en=32 * "C", sw=32 * "R")),
    )
    assert shortlist([good, below, better], 3) == [2, 0]
    assert shortlist([good, below, better], 1) == [2]
    assert shortlist([below, replace(below, rank=below.rank + 0.1)], 1) == [1]


def test_models_are_told_apart_by_pairs_and_by_the_seed_that_tells_them_apart_least() -> None:
    average = objective(min_benign_compliance=0.7)
    none = records("harmful", en=32 * "C", sw=32 * "C") + GOOD[64:]
    best = average.score(GOOD)
    for test in (choice_p, apart_p):
        assert test(average, best, {1: none}, {1: GOOD}) <= 0.001
        assert test(average, best, {1: none, 2: GOOD}, {1: GOOD, 2: GOOD}) == 1.0
        assert test(average, best, {1: none, 2: GOOD}, {1: GOOD}) <= 0.001  # only the first seed is common
        assert test(average, best, {3: none}, {1: GOOD, 2: GOOD}) <= 0.001  # none is
    # The harmful sides are alike: nobody is chosen by them, and the benign side tells the two apart.
    refusing = GOOD[:64] + records("benign", en=32 * "R", sw=32 * "R")
    assert choice_p(average, best, {1: refusing}, {1: GOOD}) == 1.0
    assert apart_p(average, best, {1: refusing}, {1: GOOD}) < 0.001
    pareto = objective(name="pareto")
    assert choice_p(pareto, best, {1: refusing}, {1: GOOD}) <= 0.001
    # Where nothing is sure to be above the floor, what is nearest to it ranks first.
    high = objective(min_benign_compliance=0.95)
    assert choice_p(high, high.score(GOOD), {1: refusing}, {1: GOOD}) < 0.001


def test_three_points_of_one_sum_are_not_told_apart_by_what_they_trade() -> None:
    """Their true sums of both sides are 135, so the first stays the best, but for 5 % of the repeats."""
    pareto, true = objective(name="pareto"), ((0.35, 1.0), (0.6, 0.75), (0.85, 0.5))
    values = search_config().enqueue or [{}]
    replaced = 0
    for seed in range(10):
        generator = np.random.default_rng([135, seed])
        found = []
        for name, rates in zip("abc", true, strict=True):
            judged: list[Judged] = []
            for kind, letters, rate in zip(("harmful", "benign"), ("RC", "CR"), rates, strict=True):
                text = "".join(letters[int(draw > rate)] for draw in generator.random(RESPONSES))
                judged += records(kind, en=text)  # type: ignore[arg-type]
            found.append((Confirmed(name, (name,), values[0], pareto.score(judged)), {1: judged}))
        replaced += confirmation_of(pareto, found, None).best.trial != "a"
    assert replaced <= 1, replaced
    better = records("harmful", en=96 * "R") + records("benign", en=72 * "C" + 24 * "R")  # a sum of 175
    found.append((Confirmed("d", ("d",), values[0], pareto.score(better)), {1: better}))
    assert confirmation_of(pareto, found, None).best.trial == "d"


def test_what_tells_models_apart_is_the_number_that_ranks_them() -> None:
    worst = objective(name="worst_language", min_benign_compliance=0.7)
    benign = records("benign", en=60 * "C", sw=60 * "C", th=60 * "C")
    even = records("harmful", en=30 * "RC", sw=30 * "RC", th=30 * "RC") + benign
    uneven = records("harmful", en=60 * "R", sw=60 * "R", th=30 * "RC") + benign
    assert objective(min_benign_compliance=0.7).score(uneven).harmful.value > 80
    assert choice_p(worst, worst.score(even), {1: uneven}, {1: even}) > 0.9  # 50 % in Thai, both
    lowest = records("harmful", en=60 * "R", sw=60 * "R", th=6 * "RCCCCCCCCC") + benign  # with the same mean
    assert choice_p(worst, worst.score(even), {1: lowest}, {1: even}) < 0.001


def test_a_model_that_refuses_everything_is_never_the_best_where_another_clears_the_floor() -> None:
    average = objective(min_benign_compliance=0.7)
    refuser = records("harmful", en=59 * "R" + "C") + records("benign", en=60 * "R")
    good = records("harmful", en=58 * "R" + "CC") + records("benign", en=60 * "C")
    values = search_config().enqueue or [{}]
    found = [
        (Confirmed(name, (name,), values[0], average.score(judged)), {1: judged})
        for name, judged in (("refuser", refuser), ("good", good))
    ]
    confirmation = confirmation_of(average, found, None)
    assert confirmation.best.trial == "good" and confirmation.best.score.feasible
    (other,) = confirmation.points[1:]
    assert other.trial == "refuser" and other.change is not None and other.change.told_apart


def test_the_change_is_the_difference_of_the_mean_rates_over_seeds() -> None:
    average = make_objective(search_config().objective)
    none = records("harmful", en=32 * "C", sw=32 * "C") + GOOD[64:]
    half = records("harmful", en=16 * "RC", sw=16 * "RC") + GOOD[64:]
    seeds = {1: GOOD, 2: half}
    best, base = average.score(*seeds.values()), average.score(none)
    values = search_config().enqueue or [{}]
    found = confirmation_of(average, [(Confirmed("a", ("a", "b"), values[0], best), seeds)], (base, none))
    assert found.change.harmful.value == pytest.approx(best.harmful.value - base.harmful.value) == 62.5
    assert found.change.harmful.low < 62.5 < found.change.harmful.high and found.change.told_apart
    assert found.change.benign is not None and found.change.benign.value == 0.0


def test_a_baseline_with_too_few_verdicts_is_told_and_what_is_confirmed_stays(
    tmp_path: Path,
) -> None:
    config = search_config(confirm={"keep": 1}, trials=1)
    space, best = make_space(config), scored(GOOD)
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "scores" / "step-000002").mkdir(parents=True)
    (tmp_path / "a" / "scores" / "step-000002" / "scores.json").touch()

    def records_in(folder: Place) -> list[Judged]:
        if folder == Place(tmp_path) / "confirmation":
            raise TooManyUnparsedError("9 of 10 responses got no verdict")
        return GOOD

    shared: Any = SimpleNamespace(
        config=config, space=space, folder=Place(tmp_path), model="m", lora=False, records_in=records_in,
        trial_folder=lambda name: Place(tmp_path / name), score=lambda *folder, **settings: None,
        score_in=lambda *folders: [records_in(folder) for folder in folders] and best,
    )  # fmt: skip
    trial = Trial("a", {"mlc.layer": 20, "mlc.weight": 0.5}, best, 2, "finished", 1.0)
    found = confirm(shared, SimpleNamespace(), [trial])  # type: ignore[arg-type]  # asked of nobody
    assert found is not None and found.best.trial == "a"
    assert (found.baseline, found.change) == (None, None)
    assert found.left_out == ("the model before training: 9 of 10 responses got no verdict",)


@pytest.mark.parametrize(
    ("error", "left_out"),
    [
        (ConfigError("no memory for 8 workers\nmore"), "a with seed 9: no memory for 8 workers"),
        (ActorDiedError(), "a with seed 9: a worker died: The actor died unexpectedly before finishing this task."),
        (OSError(28, "No space left"), "a with seed 9: OSError: [Errno 28] No space left"),
        (ScorerDiedError("it is gone"), None),
    ],
)
def test_a_seed_that_fails_is_left_out_and_the_others_are_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, left_out: str | None
) -> None:
    def fails(*_: Any) -> Place:
        raise error

    monkeypatch.setattr("mlc_ray.search.confirm._trained_again", fails)
    config = search_config(confirm={"keep": 1, "seeds": [9]}, trials=1)
    (tmp_path / "a" / "model").mkdir(parents=True)
    shared: Any = SimpleNamespace(
        config=config, space=make_space(config), folder=Place(tmp_path), model="m", lora=False,
        trial_folder=lambda name: Place(tmp_path / name), score=lambda *folder, **settings: None,
        records_in=lambda folder: GOOD, score_in=lambda *folders: scored(GOOD),
    )  # fmt: skip
    trial = Trial("a", {"mlc.layer": 20, "mlc.weight": 0.5}, scored(GOOD), 2, "finished", 1.0)
    asked: Any = SimpleNamespace()
    if left_out is None:  # nothing more can be scored
        with pytest.raises(ScorerDiedError):
            confirm(shared, asked, [trial])
        return
    found = confirm(shared, asked, [trial])
    assert found is not None and found.best.runs == ("a",)
    assert found.left_out == (left_out,)


def test_the_models_of_the_best_trials_are_kept(tmp_path: Path) -> None:
    config = search_config(keep_models=2, confirm={"keep": 1}, repeats=2, trials=2)
    shared: Any = SimpleNamespace(
        config=config, space=make_space(config), trial_folder=lambda name: Place(tmp_path / name),
        score_in=lambda *folders: worth[folders[0].parent.parent.name],
    )  # fmt: skip
    ranks = {"a": 0.1, "b": 0.3, "c": 0.2}
    worth = {f"{point}{seed}": replace(scored(GOOD), rank=rank) for point, rank in ranks.items() for seed in "12"}
    trials = []
    for name, score in worth.items():
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "scores" / "step-000001").mkdir(parents=True)
        (tmp_path / name / "scores" / "step-000001" / "scores.json").touch()
        values = {"mlc.layer": 20, "mlc.weight": ranks[name[0]], "seed": int(name[1])}
        trials.append(Trial(name, values, score, 1, "finished", 1.0))
    drop_models(shared, trials[:3])  # the second point lacks a repeat, and is not judged yet
    assert all((tmp_path / name / "model").is_dir() for name in ("a1", "a2", "b1"))
    drop_models(shared, trials)
    assert sorted(path.parent.name for path in tmp_path.glob("*/model")) == ["b1", "b2"]
    assert [point.trials[0].name for point in finished_points(shared, trials)] == ["b1", "c1", "a1"]


def test_of_equal_trials_one_keeps_its_model_whatever_their_order(tmp_path: Path) -> None:
    config = search_config(keep_models=1, confirm={"keep": 1}, trials=2)
    shared: Any = SimpleNamespace(
        config=config, space=make_space(config), trial_folder=lambda name: Place(tmp_path / name)
    )
    trials = []
    for name, layer in (("9f", 10), ("2a", 20)):
        (tmp_path / name / "model").mkdir(parents=True)
        trials.append(Trial(name, {"mlc.layer": layer, "mlc.weight": 1.0}, scored(GOOD), 1, "finished", 1.0))
    assert [point.trials[0].name for point in finished_points(shared, trials)] == ["2a", "9f"]
    shutil.rmtree(tmp_path / "2a" / "model")  # the only model that is left stays, and is what is confirmed
    for order in (trials, trials[::-1]):
        drop_models(shared, order)
        assert [path.parent.name for path in tmp_path.glob("*/model")] == ["9f"]
        assert finished_points(shared, order)[0].trials[0].name == "9f"


def test_harmful_prompts_choose_and_confirm_in_the_same_languages() -> None:
    alone = objective(name="safety_alone")
    benign = AskedPrompts(prompts(ROWS), prompts(bundles("c", "benign", 3)))
    with pytest.raises(BenchmarkError, match=r"^confirm\.benchmarks: no harmful prompts in en, sw,"):
        check_prompts(benign, ConfirmSection(benchmarks=[{"path": "c"}]), alone)  # type: ignore[list-item]
    with pytest.raises(BenchmarkError, match=r"the half of scoring.* confirms: no harmful prompts in en"):
        check_prompts(split(prompts(bundles("a", "harmful", 1))), ConfirmSection(), alone)


def test_what_no_search_can_select_on_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("sample:test, which is never selected on")):
        search_config(scoring={"benchmarks": [{"path": "sample:test"}]})
