"""Rates of methods over seeds and their tests, against plain loops and against what one score says of itself."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from mlc_ray.stats.paired import compare
from mlc_ray.stats.rates import Judged, language_order
from mlc_ray.stats.seeds import over_seeds, student_quantile
from mlc_ray.stats.significance import holm
from mlc_ray.stats.study import (
    MethodTest,
    StudyVerdictsError,
    corrected,
    method_rates,
    method_tests,
    read_verdicts,
    sides_by_benchmark,
)
from mlc_ray.stats.summaries import summarise
from mlc_ray.types import Kind

LANGUAGES = ("en", "fr", "sw")
BUNDLES = 24


def verdicts(seed: int, *, refuses: float = 0.5, spread: float = 0.1, samples: int = 1) -> list[Judged]:
    """One model's verdicts: bundles differ, languages too, and the model's own rate is around `refuses`."""
    own = np.random.default_rng([1, seed])
    shift = own.normal(0, spread)
    records = []
    for kind, base in (("harmful", refuses), ("benign", refuses / 3)):
        for bundle in range(BUNDLES):
            ease = np.random.default_rng([2, bundle]).normal(0, 0.2)
            for place, code in enumerate(LANGUAGES):
                for sample in range(samples):
                    draw = own.random()
                    refused = draw < base + shift + ease - 0.1 * place
                    behaviour = "unparsed" if draw > 0.97 else "refused" if refused else "complied"
                    records.append(
                        Judged("bench", f"{kind}-{bundle}", kind, code, behaviour, sample=sample)  # type: ignore[arg-type]
                    )
    return records


def rate(records: list[Judged], kind: Kind, code: str, behaviour: str) -> float:
    mine = [r for r in records if (r.kind, r.language) == (kind, code)]
    return sum(r.behaviour == behaviour for r in mine) / len(mine)


def agreement(records: list[Judged], kind: Kind) -> float:
    said = {(r.bundle_id, r.language): r.behaviour for r in records if r.kind == kind}
    bundles = {bundle for bundle, _ in said}
    shares = [
        sum(said[b, one] == said[b, other] != "unparsed" for b in bundles) / len(bundles)
        for one, other in itertools.combinations(LANGUAGES, 2)
    ]
    return statistics.mean(shares)


@pytest.mark.parametrize(
    ("freedom", "known"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, known: float) -> None:
    assert student_quantile(freedom) == pytest.approx(known, abs=5e-5)


def test_both_parts_of_an_interval_are_combined_by_square_and_add() -> None:
    half = 4.302653 * statistics.stdev([1.0, 2.0, 6.0]) / math.sqrt(3)
    assert over_seeds([1.0, 2.0, 6.0], (3.0, 2.0, 5.0)) == pytest.approx(
        (3.0, 3 - math.sqrt(1 + half**2), 3 + math.sqrt(4 + half**2)), rel=1e-6
    )
    assert over_seeds([3.0], (3.0, 2.0, 5.0)) == (3.0, 2.0, 5.0)
    assert over_seeds([3.0, 3.0], (3.0, 2.0, 5.0)) == (3.0, 2.0, 5.0)


def test_every_number_is_the_mean_over_seeds_of_what_plain_loops_give() -> None:
    runs = {seed: verdicts(seed) for seed in (1, 2, 3)}
    found = method_rates(read_verdicts(runs), ["en", "fr"])
    for side, kind, behaviour in ((found.harmful, "harmful", "refused"), (found.benign, "benign", "complied")):
        by_seed = [[rate(run, kind, code, behaviour) for code in LANGUAGES] for run in runs.values()]  # type: ignore[arg-type]
        assert side.avg.value == pytest.approx(100 * np.mean(by_seed))
        assert side.languages["sw"].value == pytest.approx(100 * np.mean(by_seed, axis=0)[2])
        assert side.trained is not None and side.never is not None
        assert side.trained.value == pytest.approx(100 * np.mean(by_seed, axis=0)[:2].mean())
        assert side.never == side.languages["sw"]
        assert side.var is not None and side.pag is not None
        assert side.var.value == pytest.approx(100 * np.mean([np.var(rates) for rates in by_seed]))
        assert side.pag.value == pytest.approx(np.mean([agreement(run, kind) for run in runs.values()]))  # type: ignore[arg-type]
    differences = [
        np.mean([100 * (rate(r, "harmful", c, "refused") - rate(r, "benign", c, "refused")) for c in LANGUAGES])
        for r in runs.values()
    ]
    assert found.difference.value == pytest.approx(np.mean(differences))
    assert found.seeds == 3


def test_each_of_several_benchmarks_has_its_own_sides() -> None:
    """A hard one that asks two languages and an easy one that asks three: their mean flatters the third language."""

    def run(seed: int) -> list[Judged]:
        hard = [replace(r, benchmark="hard") for r in verdicts(seed, refuses=0.2) if r.language != "sw"]
        easy = [replace(r, benchmark="easy") for r in verdicts(seed, refuses=0.8) if r.kind == "harmful"]
        return [*hard, *easy]

    runs = {seed: run(seed) for seed in (1, 2)}
    both = method_rates(read_verdicts(runs), None)
    found = sides_by_benchmark(read_verdicts(runs), None)
    assert {name: [side.kind for side in sides] for name, sides in found.items()} == {
        "hard": ["harmful", "benign"], "easy": ["harmful"],
    }  # fmt: skip
    hard, easy = found["hard"][0], found["easy"][0]
    assert list(hard.languages) == ["en", "fr"] and list(easy.languages) == ["en", "fr", "sw"]
    alone = method_rates(
        read_verdicts({s: [r for r in each if r.benchmark == "hard"] for s, each in runs.items()}), None
    )
    assert hard == alone.harmful
    assert both.harmful.languages["en"].value == pytest.approx(
        (hard.languages["en"].value + easy.languages["en"].value) / 2
    )
    assert both.harmful.languages["sw"].value > both.harmful.languages["en"].value
    assert easy.languages["sw"].value < easy.languages["en"].value
    assert sides_by_benchmark(read_verdicts({1: verdicts(1)}), None) == {}


def test_one_seed_has_the_numbers_and_intervals_of_its_own_score() -> None:
    # In this order, so that the resamples of both draw the same bundles.
    records = sorted(verdicts(5), key=lambda r: (language_order(r.language), r.bundle_id))
    found, (summary,) = method_rates(read_verdicts({5: records}), ["en", "fr"]), summarise(records, ["en", "fr"])
    harmful, benign = summary.side("harmful"), summary.side("benign")
    assert harmful is not None and benign is not None
    for mine, own in (
        (found.harmful.avg, harmful.avg),
        (found.harmful.var, harmful.var),
        (found.harmful.pag, harmful.pag),
        (found.harmful.trained, harmful.seen),
        (found.harmful.never, harmful.unseen),
        (found.benign.avg, benign.misses_avg),
        (found.difference, summary.avg_difference),
    ):
        assert mine is not None and own is not None
        assert (mine.value, mine.low, mine.high) == pytest.approx((own.value, own.low, own.high))


def test_the_part_of_seeds_is_added_to_that_of_bundles() -> None:
    runs = {seed: verdicts(seed) for seed in (1, 2, 3)}
    found = method_rates(read_verdicts(runs), None)
    values = [100 * np.mean([rate(run, "harmful", code, "refused") for code in LANGUAGES]) for run in runs.values()]
    half = student_quantile(2) * statistics.stdev(map(float, values)) / math.sqrt(3)

    # The part of bundles, by drawing whole bundles in plain Python.
    ids = sorted({r.bundle_id for r in runs[1] if r.kind == "harmful"})
    hits = {(s, b): 0.0 for s in runs for b in ids}
    for seed, run in runs.items():
        for r in run:
            if r.kind == "harmful":
                hits[seed, r.bundle_id] += (r.behaviour == "refused") / len(LANGUAGES)
    generator = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        drawn = [ids[i] for i in generator.integers(0, len(ids), len(ids))]
        means.append(100 * sum(hits[s, b] for s in runs for b in drawn) / (len(runs) * len(ids)))
    bundles = 1.96 * statistics.stdev(means)
    width = found.harmful.avg.high - found.harmful.avg.low
    assert width / 2 == pytest.approx(math.hypot(half, bundles), rel=0.05)
    assert width / 2 > half and width / 2 > 0.95 * bundles
    assert found.harmful.trained is None and found.harmful.never is None


def test_seeds_that_all_comply_are_no_surer_than_one_of_them() -> None:
    records = [Judged("b", f"{kind}{n}", kind, "en", "complied") for kind in ("harmful", "benign") for n in range(8)]  # type: ignore[arg-type]
    one, two = (method_rates(read_verdicts(dict.fromkeys(seeds, records)), None) for seeds in ((1,), (1, 2)))
    assert two.benign.avg == one.benign.avg and two.harmful.avg == one.harmful.avg


def test_tests_are_those_of_paired_scores_the_largest_over_the_seeds() -> None:
    one = {seed: verdicts(seed, refuses=0.3) for seed in (1, 2)}
    other = {seed: verdicts(seed + 50, refuses=0.7) for seed in (1, 2)}
    tests = method_tests("m", {"a": read_verdicts(one), "b": read_verdicts(other)})
    assert [(t.first, t.second, t.compared, t.seeds) for t in tests] == [
        ("a", "b", side, 2) for side in ("harmful", "benign", "difference")
    ]
    pairs = [compare(one[seed], other[seed]).benchmark() for seed in (1, 2)]
    for test, kind in zip(tests[:2], ("harmful", "benign"), strict=True):
        sides = [pair.side(kind) for pair in pairs]  # type: ignore[arg-type]
        assert all(side is not None for side in sides)
        assert test.change.value == pytest.approx(np.mean([side.change.value for side in sides if side]))
        assert test.p == pytest.approx(max(side.p for side in sides if side), abs=0.01)
    assert tests[2].change.value == pytest.approx(np.mean([p.difference.value for p in pairs if p.difference]))
    assert tests[2].p == pytest.approx(max(p.difference_p for p in pairs if p.difference_p is not None), abs=0.01)


def test_the_model_before_training_stands_beside_every_seed_and_no_common_seed_is_no_test() -> None:
    before, trained = verdicts(9), {seed: verdicts(seed, refuses=0.8) for seed in (1, 2)}
    tests = method_tests("m", {"untouched": read_verdicts({None: before}), "a": read_verdicts(trained)})
    changes = [compare(before, run).benchmark().side("harmful") for run in trained.values()]
    assert tests[0].seeds == 2
    assert tests[0].change.value == pytest.approx(np.mean([each.change.value for each in changes if each]))
    apart = {"a": read_verdicts({1: verdicts(1)}), "b": read_verdicts({2: verdicts(2)})}
    assert method_tests("m", apart) == []


def test_a_method_beside_itself_is_not_told_apart() -> None:
    runs = {seed: verdicts(seed) for seed in (1, 2)}
    tests = corrected(method_tests("m", {"a": read_verdicts(runs), "b": read_verdicts(runs)}))
    assert all(test.p == test.p_holm == 1.0 and not test.told_apart for test in tests)
    assert all(test.change.value == 0 and test.change.low < 0 < test.change.high for test in tests)


def said(benchmark: str, kind: Kind, code: str, refused: bool, n: int = 20) -> list[Judged]:
    behaviour = "refused" if refused else "complied"
    return [Judged(benchmark, f"{benchmark}-{kind}-{b}", kind, code, behaviour) for b in range(n)]  # type: ignore[arg-type]


def test_seeds_that_move_in_opposite_directions_tell_nothing_apart() -> None:
    def run(refused: bool) -> list[Judged]:
        return [*said("b", "harmful", "en", refused), *said("b", "benign", "en", refused=False)]

    one, other = {1: run(False), 2: run(True)}, {1: run(True), 2: run(False)}
    tests = method_tests("m", {"a": read_verdicts(one), "b": read_verdicts(other)})
    assert [(test.compared, test.p) for test in tests] == [("harmful", 1), ("benign", 1), ("difference", 1)]
    same = method_tests("m", {"a": read_verdicts({1: one[1]}), "b": read_verdicts({1: other[1]})})
    assert same[0].p < 0.001 and same[2].p < 0.001


def test_the_difference_is_taken_by_language_whatever_benchmarks_ask_it() -> None:
    def run(english: bool) -> list[Judged]:
        """Both harmful benchmarks have English, one Spanish, the other French; one benign benchmark has all."""
        found = [r for name, code in (("h1", "es"), ("h2", "fr")) for r in said(name, "harmful", code, False)]
        found += [r for name in ("h1", "h2") for r in said(name, "harmful", "en", english)]
        return found + [r for code in ("en", "es", "fr") for r in said("ok", "benign", code, english and code == "en")]

    none, english = read_verdicts({1: run(False)}), read_verdicts({1: run(True)})
    found = method_rates(english, None)
    assert found.harmful.avg.value == pytest.approx(50) and found.benign.avg.value == pytest.approx(100 * 2 / 3)
    assert found.difference.value == pytest.approx(0)  # it refuses all in English, and has no judgement
    difference = method_tests("m", {"a": none, "b": english})[2]
    assert difference.change.value == pytest.approx(0) and difference.p == 1


def test_trained_and_never_trained_languages_are_compared_within_benchmarks_that_have_both() -> None:
    easy = [r for code in ("en", "fr") for r in said("both", "harmful", code, refused=True)]
    hard = said("hard", "harmful", "fr", refused=False)
    benign = [r for code in ("en", "fr") for r in said("ok", "benign", code, refused=False)]
    side = method_rates(read_verdicts({1: [*easy, *hard, *benign]}), ["en"]).harmful
    assert side.trained is not None and side.never is not None
    assert (side.trained.value, side.never.value) == (100, 100) and side.languages["fr"].value == 50
    apart = [*said("one", "harmful", "en", refused=True), *said("other", "harmful", "fr", refused=False), *benign]
    side = method_rates(read_verdicts({1: apart}), ["en"]).harmful
    assert side.trained is None and side.never is None  # no benchmark has both


def test_holms_correction_is_over_all_tests_of_the_study() -> None:
    methods = {name: read_verdicts({1: verdicts(n, refuses=r)}) for n, (name, r) in enumerate([("a", 0.1), ("b", 0.9)])}
    tests: list[MethodTest] = [*method_tests("m", methods), *method_tests("n", methods)]
    found = corrected(tests)
    assert [test.p_holm for test in found] == holm([test.p for test in tests])
    assert len(found) == 6 and found[0].told_apart
    assert found[0].p_holm == pytest.approx(6 * min(test.p for test in tests))


def test_seeds_that_differ_much_tell_nothing_apart_however_sure_each_is() -> None:
    def run(refused: int) -> list[Judged]:
        some = [replace(r, behaviour="refused") for r in said("b", "harmful", "en", refused=False)[:refused]]
        return [*some, *said("b", "harmful", "en", refused=False)[refused:], *said("b", "benign", "en", refused=False)]

    first = read_verdicts({seed: run(0) for seed in (1, 2, 3)})
    apart, alike = read_verdicts({1: run(8), 2: run(9), 3: run(20)}), read_verdicts({s: run(8 + s) for s in (1, 2, 3)})
    for second, told in ((apart, False), (alike, True)):
        harmful = corrected(method_tests("m", {"a": first, "b": second}))[0]
        assert harmful.p_holm < 0.05 and harmful.told_apart is told  # by bundles each seed is sure
        assert (harmful.change.low < 0) is not told


@pytest.mark.parametrize(("seeds", "times", "wide"), [(2, 300, 85), (3, 300, 59), (5, 60, 35)])
def test_intervals_hold_what_other_seeds_and_bundles_would_give(seeds: int, times: int, wide: int) -> None:
    """Coverage, as docs/study.md has it: models whose true rate is 50 %, drawn with their own shift, on bundles that
    are drawn, too. Five seeds are drawn less often, since they take longest."""
    held, widths = 0, []
    for time in range(times):
        generator = np.random.default_rng([7, time])
        ease = generator.normal(0, 0.15, 30)
        runs = {}
        for seed in range(seeds):
            chance = np.clip(0.5 + generator.normal(0, 0.08) + ease, 0, 1)
            records = []
            for kind in ("harmful", "benign"):
                for bundle, p in enumerate(chance):
                    said = "refused" if generator.random() < p else "complied"
                    records.append(Judged("b", f"{kind}{bundle}", kind, "en", said))  # type: ignore[arg-type]
            runs[seed] = records
        avg = method_rates(read_verdicts(runs), None).harmful.avg
        held += avg.low <= 50 <= avg.high
        widths.append(avg.high - avg.low)
    assert held / times >= 0.98
    assert statistics.mean(widths) == pytest.approx(wide, abs=1.5)


def test_other_prompts_or_a_missing_side_are_refused() -> None:
    whole = verdicts(1)
    with pytest.raises(StudyVerdictsError, match=r"seeds 1, 2 were not all asked the same prompts \(144, 143\)"):
        read_verdicts({1: whole, 2: whole[1:]})
    with pytest.raises(StudyVerdictsError, match="no benign prompt"):
        read_verdicts({1: [record for record in whole if record.kind == "harmful"]})
    with pytest.raises(StudyVerdictsError, match="no language has prompts of both kinds"):
        read_verdicts({1: [record for record in whole if (record.kind == "harmful") == (record.language == "en")]})
