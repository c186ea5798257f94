from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from mlc_ray.stats.intervals import wilson
from mlc_ray.stats.paired import NotComparableError, compare, corrected
from mlc_ray.stats.rates import Judged
from mlc_ray.stats.significance import holm, mcnemar_p
from mlc_ray.stats.summaries import summarise
from mlc_ray.types import Behaviour, Kind

LETTERS: dict[str, Behaviour] = {"R": "refused", "C": "complied", "D": "degenerate", "U": "unparsed"}


def judged(verdicts: Mapping[str, str], kind: Kind = "harmful", benchmark: str = "b") -> list[Judged]:
    """Records from language -> a letter per bundle, . where the bundle lacks the language."""
    return [
        Judged(benchmark, f"{kind}{index}", kind, language, LETTERS[letter])
        for language, letters in verdicts.items()
        for index, letter in enumerate(letters)
        if letter != "."
    ]


BEFORE = judged({"en": "RRRRRRCC", "sw": "CCCCRCC.", "zh": "RCRCRCRC"}) + judged({"en": "CCCC", "sw": "CCCR"}, "benign")
AFTER = judged({"en": "RRRRRRRC", "sw": "RRCRRRU.", "zh": "RCRRRRRC"}) + judged({"en": "CCCC", "sw": "RCRR"}, "benign")


def test_changes_are_those_of_the_rates() -> None:
    comparison = compare(BEFORE, AFTER)
    change = comparison.benchmark()
    (before,), (after,) = summarise(BEFORE), summarise(AFTER)
    assert (change.benchmark, change.common, change.only_before, change.only_after) == ("b", 31, 0, 0)
    for kind in ("harmful", "benign"):
        side, old, new = change.side(kind), before.side(kind), after.side(kind)
        rates = [each.misses_avg.value if kind == "benign" else each.avg.value for each in (old, new)]
        assert (side.before, side.after) == pytest.approx(rates)
        assert side.change.value == pytest.approx(rates[1] - rates[0])
        assert side.change.low < side.change.value < side.change.high
        assert (side.n, side.bundles) == (old.n, old.bundles)
        for language in side.languages:
            assert language.change == pytest.approx(language.after - language.before)
            assert language.change == pytest.approx(100 * (language.gained - language.lost) / language.n)
    assert change.difference.value == pytest.approx(
        # only languages that both sides have: Chinese has no benign prompts
        sum(after.difference[code] - before.difference[code] for code in ("en", "sw")) / 2
    )
    assert comparison.not_compared == ()


def test_languages_have_mcnemars_test_with_holms_correction() -> None:
    change = compare(BEFORE, AFTER).benchmark()
    languages = change.side("harmful").languages
    assert [(change.language, change.n, change.gained, change.lost) for change in languages] == [
        ("en", 8, 1, 0), ("sw", 7, 4, 0), ("zh", 8, 2, 0),
    ]  # fmt: skip
    expected = [mcnemar_p(1, 0), mcnemar_p(4, 0), mcnemar_p(2, 0)]
    assert [change.p for change in languages] == expected == [1.0, 0.125, 0.5]
    family = [*expected, *(each.p for each in change.side("benign").languages)]  # of both sides, in one family
    assert [each.p_holm for each in languages] == holm(family)[:3]


def test_holms_family_is_all_that_is_compared() -> None:
    """Two models against the first: as many tests as there are of both."""
    alone, other = compare(BEFORE, AFTER), compare(BEFORE, BEFORE)
    both = corrected([alone, other])
    tests = [
        p
        for comparison in (alone, other)
        for change in comparison.benchmarks
        for side in change.sides
        for p in (side.p, *(number.p for number in side.consistency))
    ] + [comparison.benchmark().difference_p for comparison in (alone, other)]
    side = both[0].benchmark().side("harmful")
    assert (
        side.p_holm
        == holm([side.p, *(p for p in tests if p is not side.p)])[0]
        > alone.benchmark().side("harmful").p_holm
    )
    assert len(tests) == 2 * (2 + 2 * 3 + 1)
    assert corrected([alone]) == [alone]


def swapped(records: tuple[list[Judged], list[Judged]], bundles: set[str]) -> tuple[list[Judged], list[Judged]]:
    """Both models' records with the two models exchanged in some bundles."""
    old, new = records
    return (
        [b if a.bundle_id in bundles else a for a, b in zip(old, new, strict=True)],
        [a if a.bundle_id in bundles else b for a, b in zip(old, new, strict=True)],
    )


def test_p_values_against_every_exchange_of_the_two_models() -> None:
    change = compare(BEFORE, AFTER).benchmark()
    for kind in ("harmful", "benign"):
        mine = tuple([r for r in records if r.kind == kind] for records in (BEFORE, AFTER))
        names = sorted({record.bundle_id for record in mine[0]})
        reached = total = 0
        for flags in itertools.product((False, True), repeat=len(names)):
            old, new = swapped(mine, {name for name, flag in zip(names, flags, strict=True) if flag})
            rates = [summarise_average(records) for records in (old, new)]
            reached += abs(rates[1] - rates[0]) >= abs(change.side(kind).change.value) / 100 - 1e-9
            total += 1
        assert change.side(kind).p == pytest.approx(reached / total)


def summarise_average(records: list[Judged]) -> float:
    by_language: dict[str, list[bool]] = {}
    for record in records:
        by_language.setdefault(record.language, []).append(record.behaviour == "refused")
    return sum(sum(hits) / len(hits) for hits in by_language.values()) / len(by_language)


def test_p_value_of_the_difference_against_every_exchange() -> None:
    old = judged({"en": "RCC", "sw": "CCR"}) + judged({"en": "CCR", "sw": "CCC"}, "benign")
    new = judged({"en": "RRR", "sw": "RCR"}) + judged({"en": "CCC", "sw": "CRR"}, "benign")
    names = sorted({record.bundle_id for record in old})
    values = []
    for flags in itertools.product((False, True), repeat=len(names)):
        pair = swapped((old, new), {name for name, flag in zip(names, flags, strict=True) if flag})
        before, after = pair
        sides = [
            summarise_average([r for r in records if r.kind == kind])
            for records in (after, before)
            for kind in ("harmful", "benign")
        ]
        values.append((sides[0] - sides[1]) - (sides[2] - sides[3]))
    change = compare(old, new).benchmark()
    assert change.difference.value == pytest.approx(100 * values[0])
    assert change.difference_p == pytest.approx(sum(abs(v) >= abs(values[0]) - 1e-9 for v in values) / len(values))


def test_only_common_prompts_are_compared_and_the_others_counted() -> None:
    more_before = judged({"fr": "RRRR"})
    more_after = judged({"en": "........RR"}) + judged({"en": "R"}, benchmark="other")
    comparison = compare(BEFORE + more_before, AFTER + more_after)
    change = comparison.benchmark()
    assert (change.common, change.only_before, change.only_after) == (31, 4, 2)
    assert change.sides == compare(BEFORE, AFTER).benchmark().sides
    assert comparison.not_compared == ("other",)


def test_what_cannot_be_compared_is_refused_or_named() -> None:
    elsewhere = judged({"en": "RC"}, benchmark="c")
    with pytest.raises(NotComparableError, match=r"share 0 prompts, of 31 and 2.*before: 'b'; after: 'c'"):
        compare(BEFORE, elsewhere)
    guarded = [replace(record, behaviour=None, safety="safe") for record in AFTER]
    with pytest.raises(NotComparableError, match=r"31 prompts but no measure \(before: refused; after: safe\)"):
        compare(BEFORE, guarded)
    half = [record if record.kind == "harmful" else replace(record, behaviour=None, safety="safe") for record in AFTER]
    comparison = compare(BEFORE, half)
    assert comparison.benchmark().side("benign") is None
    assert (comparison.benchmark().difference, comparison.benchmark().difference_p) == (None, None)
    assert set(comparison.not_compared) == {"b benign refused", "b benign safe"}
    with pytest.raises(ValueError, match="twice"):
        compare([*BEFORE, BEFORE[0]], AFTER)


def test_the_two_sides_are_resampled_apart() -> None:
    # Nearly the same verdicts on both sides: drawn together they would cancel, and next to nothing would be left open.
    old, new = "RC" * 20, "RR" * 10 + "RC" * 10
    before = judged({"en": old, "sw": old}) + judged({"en": old, "sw": old}, "benign")
    after = judged({"en": new, "sw": new}) + judged({"en": new, "sw": new[:-1] + "R"}, "benign")
    change = compare(before, after).benchmark()
    widths = [each.high - each.low for each in (change.side("harmful").change, change.difference)]
    assert widths[1] == pytest.approx(2**0.5 * widths[0], rel=0.15)


def test_several_benchmarks_are_averaged() -> None:
    second = judged({"en": "CC"}, benchmark="c"), judged({"en": "RR"}, benchmark="c")  # no benign prompts
    comparison = compare(BEFORE + second[0], AFTER + second[1])
    assert [change.benchmark for change in comparison.benchmarks] == ["b", "c", "all"]
    first, third, whole = (change.side("harmful") for change in comparison.benchmarks)
    assert (comparison.benchmark().common, whole.n) == (33, 25)
    assert third.change.value == 100.0
    assert whole.change.value == pytest.approx((first.change.value + 100) / 2)
    assert whole.change.low < whole.change.value < whole.change.high
    assert all(side.languages == () for side in comparison.benchmark().sides)  # not compared across benchmarks
    assert whole.consistency[0].change == first.consistency[0].change  # of the benchmark with several languages
    with pytest.raises(KeyError, match="nothing"):
        comparison.benchmark("nothing")


def test_changes_of_consistency_are_those_of_the_summaries() -> None:
    side = compare(BEFORE, AFTER).benchmark().side("harmful")
    old, new = (summarise(records)[0].side("harmful") for records in (BEFORE, AFTER))
    numbers = {number.name: number for number in side.consistency}
    for name, before, after in (
        ("var", old.var, new.var), ("pag", old.pag, new.pag), ("worst", old.worst_rate, new.worst_rate),
    ):  # fmt: skip
        found = numbers[name]
        assert (found.before, found.after) == pytest.approx((before.value, after.value))
        assert found.change.value == pytest.approx(after.value - before.value)
        assert found.change.low < found.change.high and 0 < found.p <= 1


def test_a_language_that_became_like_the_others_is_told_and_chance_is_not() -> None:
    generator = random.Random(3)
    english = "".join(generator.choice("RRRRC") for _ in range(100))
    poor = "".join(generator.choice("RCCCC") for _ in range(100))
    before = judged({"en": english, "sw": poor})
    mended = compare(before, judged({"en": english, "sw": english})).benchmark().side("harmful")
    for number, sign in zip(mended.consistency, (-1, 1, 1), strict=True):
        assert sign * number.change.low > 0 and sign * number.change.high > 0, number
        assert number.p_holm < 0.01
    again = "".join(generator.choice("RCCCC") for _ in range(100))
    chance = compare(before, judged({"en": english, "sw": again})).benchmark().side("harmful")
    for number in chance.consistency:
        assert number.change.low <= 0 <= number.change.high, number
        assert number.p > 0.05


def test_nothing_changed() -> None:
    same = judged({"en": "R" * 50, "sw": "R" * 50})
    side = compare(same, same).benchmark().side("harmful")
    assert (side.change.value, side.p) == (0.0, 1.0)
    bound = 100 * wilson(0, 50)[1]  # what 50 bundles without a change still leave open, either way
    assert (side.change.low, side.change.high) == (pytest.approx(-bound), pytest.approx(bound))
    assert all((language.p, language.p_holm) == (1.0, 1.0) for language in side.languages)


def test_unreadable_and_degenerate_answers_are_no_hits() -> None:
    side = compare(judged({"en": "RRCU"}), judged({"en": "UDRR"})).benchmark().side("harmful")
    assert (side.before, side.after) == (50.0, 50.0)
    assert (side.languages[0].gained, side.languages[0].lost) == (2, 2)


def test_pairs_are_worth_more_than_two_separate_scores() -> None:
    """The interval of the change is much narrower than what the two intervals leave open."""
    generator = random.Random(1)
    letters = "".join(generator.choice("RC") for _ in range(80))
    changed = letters.replace("C", "R", 6)
    before, after = judged({"en": letters, "sw": letters}), judged({"en": changed, "sw": changed})
    side = compare(before, after).benchmark().side("harmful")
    separate = [summarise(records)[0].side("harmful").avg for records in (before, after)]
    assert side.change.low > 0 and side.p < 0.05
    assert separate[0].high > separate[1].low
