from __future__ import annotations

from pathlib import Path

import pytest

from mlc_ray.report.text import clean, fraction, percent, short, signed, variance, whole, without_paths


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.5, "13"), (37.5, "38"), (98.4, "98"), (0.0, "0"), (100.0, "100"), (1e-13, "0"), (100 - 1e-12, "100")],
)
def test_rates_are_rounded_with_halves_away_from_zero(value: float, text: str) -> None:
    assert whole(value) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (100 * 314 / 315, 0, ">99"), (0.3, 0, "<1"), (99.5, 0, ">99"), (0.5, 0, "1"), (99.4, 0, "99"),
        (99.96, 1, ">99.9"), (0.04, 1, "<0.1"), (99.94, 1, "99.9"), (100.0, 1, "100.0"), (0.0, 1, "0.0"),
    ],
)  # fmt: skip
def test_only_all_is_100_and_only_none_is_0(value: float, digits: int, text: str) -> None:
    assert percent(value, digits) == text


def test_differences_have_their_sign_and_what_is_missing_a_dot() -> None:
    assert (signed(12.0), signed(-3.25), signed(None), percent(None)) == ("+12.0", "−3.2", "·", "·")
    assert (signed(0.04), signed(-99.97), signed(-1e-13)) == ("+<0.1", "−>99.9", "+0.0")
    assert [fraction(x) for x in (1.0, 0.0, 0.9997, 0.0001, 0.1234)] == ["1.000", "0.000", ">0.999", "<0.001", "0.123"]
    assert [variance(x) for x in (0.0, 0.001, 13.138)] == ["0.00", "<0.01", "13.14"]
    assert (short(0.0), short(0.08333), short(-1e-6)) == ("0", "0.0833", "−1e−06")


def test_control_characters_are_replaced() -> None:
    assert clean("a\x1b[31m\u202eb\u2066c\n") == "a\ufffd[31m\ufffdb\ufffdc\n"
    turning = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]
    assert clean("".join(map(chr, turning))) == "\ufffd" * len(turning)
    assert clean("سوال 中文 é\u200d") == "سوال 中文 é\u200d", "joiners, which scripts need, stay"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("in 'secret-client/acme', no score", "in '…/acme', no score"), ("at http://internal.host/", "at …"),
        ("'/home/al ice/runs/x'", "'…/x'"), ("~/x/y is", "…/y is"), ("guard at 10.0.0.4:8000", "guard at …"),
        ("s3://user:pw@bucket/a/b", "…/b"), ("C:\\Users\\x", "…/x"), ("https://h:80?key=abc", "…"),
        ("gpu-17.lab.internal said", "… said"), ("on node-12:8265.", "on …."), ("by user@gpu17, it", "by …, it"),
        ("x.cs.uni-a.de and ip-10-0-0-4.compute.amazonaws.com", "… and …"), ("at [fe80::1]:8000", "at …"),
        ("me@example.org wrote", "… wrote"), ("at fe80::1, ::1 and 2001:db8::8a2e:7334.", "at …, … and …."),
        ("a:b:10.0.0.4", "…"), ("via fe80::1%eth0 or [fe80::1%eth0]:80 or ::ffff:10.0.0.4", "via … or … or …"),
        ("models/secret-llama-ft and runs/mine/", "…/secret-llama-ft and …/mine"), ("model=models/a.", "model=…/a."),
        ("secret/client/acme", "…/acme"), ("refused and/or safe, 98.1 to 99.2", "refused and/or safe, 98.1 to 99.2"),
    ],
)  # fmt: skip
def test_nothing_private_is_left_of_hosts_paths_and_urls(text: str, shown: str) -> None:
    assert without_paths(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "ASR@k and ASR@10, pass@1", "Qwen2.5-0.5B-Instruct, vllm 0.32.0+cpu", "engine.dtype=auto, judge.engine.options",
        "mlc_ray.judges.refusal:RefusalJudge", "sample:test at 12:30, 3:1, step 12", "scores.json, a.tar.gz, x.test.py",
        "within [0.1:0.9], rows[1:2], Foo::Bar a::b c :: d; work/life, home/away",
        "Qwen/Qwen2.5-7B-Instruct, meta-llama/Llama-3.1-8B#0e9e39f", "at 12:30:45, 1:2:3; std::vector; n/a, 3/4",
        "e.g. one, i.e. two", "zh-Hant: 98.1 (97.0 to 99.0)", "phrases=0a1b rules=9f",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_host_or_a_path_stays(text: str) -> None:
    assert without_paths(text) == text


def test_a_relative_path_that_looks_like_a_name_of_the_hub_is_one_where_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme/secret-ft").mkdir(parents=True)
    assert without_paths("model=acme/secret-ft, acme/other") == "model=…/secret-ft, acme/other"
