from __future__ import annotations

import pytest

from mlc_ray.stats.rates import Judged
from mlc_ray.stats.response_languages import in_language
from mlc_ray.stats.seeds import over_seeds
from mlc_ray.stats.study_languages import method_languages


def run(shift: int, benchmark: str = "own", codes: tuple[str, ...] = ("en", "fr", "sw")) -> list[Judged]:
    """Of 20 responses a language, those from the bundle `shift` on are English, every tenth is in none."""
    return [
        Judged(benchmark, f"b{bundle}", "harmful", code, "refused",
               response_language=None if bundle % 10 == 9 else code if bundle < shift else "en")
        for code in codes
        for bundle in range(20)
    ]  # fmt: skip


def test_one_seed_is_what_its_score_says_of_itself() -> None:
    records = run(12)
    (found,), told = method_languages({1: records}, ["en", "fr"]), in_language(records)
    assert found.avg == told.mean("own", "harmful")
    own = {row.language: row.rate for row in told.rows}
    assert own["en"] is not None and own["fr"] is not None and own["sw"] is not None
    assert found.trained is not None and found.trained.value == pytest.approx((own["en"].value + own["fr"].value) / 2)
    assert found.never is not None and found.never.value == pytest.approx(own["sw"].value)


def test_several_seeds_have_the_mean_and_a_wider_interval() -> None:
    runs: dict[int | None, list[Judged]] = {1: run(18), 2: run(6)}
    (found,) = method_languages(runs, None)
    each = [told.value for records in runs.values() if (told := in_language(records).mean("own", "harmful"))]
    assert found.avg.value == pytest.approx(sum(each) / 2) and found.trained is None and found.never is None
    value, low, _ = over_seeds(each, (found.avg.value, found.avg.value, found.avg.value))
    assert found.avg.low <= max(0.0, low) < value


def test_a_language_of_which_nothing_is_told_in_a_benchmark_is_left_out_there() -> None:
    none = [Judged("other", f"b{i}", "harmful", "ps", "refused") for i in range(5)]
    (found,) = method_languages({1: [*run(20), *run(0, "other", ("fr",)), *none]}, ["en"])
    assert found.avg.value == pytest.approx((100 + 0) / 2)
    assert method_languages({1: none}, None) == ()
