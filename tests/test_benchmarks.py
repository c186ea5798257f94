"""The benchmark runs, and the step it compares ours with gives the same losses and gradients."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlc_ray.generate.blocks import joined
from mlc_ray.generate.stage import ANSWERS, PROMPTS
from mlc_ray.score.kept import Kept
from mlc_ray.storage import Place


def test_step_benchmark(tmp_path: Path, repository: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    out = tmp_path / "step.json"
    options = ["--model", tmp_path / "model", "--out", out, "--text", "published", "--techniques"]
    plain = ["--bundles", "2", "--repeats", "1", "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    command = [sys.executable, repository / "benchmarks" / "step.py", *options, *plain]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    result = json.loads(out.read_text())
    steps = result["steps"]
    assert len([name for name in steps if name.startswith("without ")]) == 7
    ours, theirs = steps["ours"], steps["the recipe"]
    for side in (ours, theirs):
        assert side["peak_bytes"] - side["before_bytes"] == side["step_bytes"] >= 0
    for name, side in steps.items():
        assert len(side["seconds"]) == 1 and side["seconds_median"] > 0
        parts = {"alignment", "total"} if name.endswith("no term") else {"alignment", "mlc", "total"}
        assert set(side["losses"]) == parts
    for name, found in result["agreement"].items():
        assert found["equal"] is True and max(found["gradient_relative"].values()) < 1e-4, name
    assert result["agreement"].keys() == steps.keys() - {"the recipe", "the recipe, no term"}
    assert result["layer"] == 2
    # Every bundle has exactly the published numbers of tokens. Ours forwards the template's head once, its tail after
    # each prompt, the English prompt once instead of three times, and no answer's last token.
    assert ours["tokens_forwarded"] == 25 + 2 * (427 + 10 * 5 + 208 - 2 * 25 - 2)
    assert theirs["tokens_forwarded"] >= 2 * (2 * 12) * 104


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, repository: Path):
    """Counts of steps of a small model with this many layers and bundles."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    module = importlib.import_module("step_counts")
    data = importlib.import_module("step_data")

    def counted(layers: int, bundles: int) -> dict[str, dict[str, int]]:
        monkeypatch.setitem(module.SHAPES, "tiny", lambda: module.qwen(64, 128, layers, 4, 2, 1000, False))
        return module.count("tiny", data.published_rows(1000, bundles, 1)[0])

    return counted


def test_counts_of_a_step_that_must_not_grow(counts) -> None:
    one, three, deeper = counts(2, 1)["ours"], counts(2, 3)["ours"], counts(4, 1)["ours"]
    assert one["forwards"] == three["forwards"] == 1  # of the policy; the reference has none
    assert (one["attention_calls"], deeper["attention_calls"]) == (2, 4)  # one a layer, whatever the bundles
    assert one["attention_calls"] == three["attention_calls"]
    assert (one["head_rows"], three["head_rows"]) == (158, 3 * 158)  # response rows alone
    assert one["tokens"] == 25 + 427 + 10 * 5 + 208 - 2 * 25 - 2
    assert one["kernels"] == three["kernels"]  # no loop over bundles, languages or segments
    assert (deeper["kernels"] - one["kernels"]) / 2 <= 120  # a layer's, forward and backward
    assert one["kernels"] <= 487  # one of them copies the kinds of bundles


def test_the_recipe_and_the_step_before_cost_more(counts) -> None:
    steps = counts(2, 3)
    ours, before, recipe = (steps[name] for name in ("ours", "before", "recipe"))
    assert (before["forwards"], recipe["forwards"]) == (2, 2)  # answers and prompts; policy and reference
    assert recipe["head_rows"] == recipe["tokens"] > 3 * before["tokens"] > 3 * ours["tokens"]
    for name in ("flops", "bytes", "kernels"):
        assert ours[name] < before[name] and ours[name] < recipe[name], name


@pytest.mark.slow
@pytest.mark.soak
def test_warm_scoring_benchmark(tmp_path: Path, repository: Path, smollm2: Path) -> None:
    out = tmp_path / "warm.json"
    plain = ["--rounds", "1", "--limit", "1", "--max-new-tokens", "8"]
    command = [
        sys.executable,
        repository / "benchmarks" / "warm_scoring.py",
        "--model",
        smollm2,
        "--out",
        out,
        *plain,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr  # warm and fresh engines gave the same responses
    result = json.loads(out.read_text())
    assert (result["prompts"], len(result["start"]), len(result["warm"]), len(result["fresh"])) == (24, 2, 1, 1)
    assert all(row["total"] >= row["answer"] + row["transfer"] + row["proof"] > 0 for row in result["warm"])
    assert "of an engine start" in done.stdout


@pytest.mark.slow
def test_reference_pass_benchmark(tmp_path: Path, repository: Path, small_llama: Path) -> None:
    out = tmp_path / "reference.json"
    command = [sys.executable, repository / "benchmarks" / "reference_pass.py", "--model", small_llama, "--out", out]
    done = subprocess.run([*map(str, command), "--only", "benign"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr  # both say the same
    result = json.loads(out.read_text())
    assert result["bundles"] == 48 and 0 < result["busy"] <= 1
    assert "48 bundles: the pass took" in done.stdout


def test_source_lines_of_functions_that_were_called_are_counted_beside_all_of_their_lines() -> None:
    narrow_path = importlib.import_module("benchmarks.narrow_path")
    text = '''class One:
    """Not a function's."""

    @property
    def called(self):
        """Two
        lines."""

        # Not source.
        def inside():
            """Counts with it."""
        return inside

    def never(self):
        """Nothing."""
'''
    decorated, plain = {4}, {5}
    for called in (decorated, plain):
        assert narrow_path.functions_that_run(text, called) == [("called", 4, 9)]
    assert narrow_path.functions_that_run(text, set()) == []


def test_rows_that_landed_are_found_by_what_they_answer(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    deaths = importlib.import_module("engine_deaths")
    prompts = pa.Table.from_pylist([{"bundle_id": code, "prompt": f"in {code}"} for code in "abc"], schema=PROMPTS)
    answers = pa.Table.from_pylist([{"response": code, "finish": "stop"} for code in "abc"], schema=ANSWERS)
    kept_of = Kept(Place(tmp_path), "answering", ["by"], PROMPTS.names, ANSWERS)
    kept_of.land(kept_of.look(prompts)[0][:2], answers.slice(0, 2))
    kept = {row["key"]: row for file in deaths.blocks_of(tmp_path) for row in pq.read_table(file).to_pylist()}
    assert len(kept) == 2
    assert deaths.astray(kept, joined(prompts, answers), ["by"]) == []
    swapped = joined(prompts, answers.take([1, 0, 2]))  # the same answers, to each other's prompts
    assert len(deaths.astray(kept, swapped, ["by"])) == 2


@pytest.mark.parametrize(
    "part", ["means", "worst", "several", "changes", "variance", "benchmarks", "corrected", "limits"]
)
def test_the_tables_of_coverage_are_whole(part: str) -> None:
    coverage = importlib.import_module("benchmarks.coverage")
    assert set(coverage.PARTS) >= {part} and len(coverage.PARTS) == 8
    head, *rows = coverage.PARTS[part](1)
    assert rows and {len(row) for row in rows} == {len(head)}
    shares = [int(cell.removesuffix(" %")) for row in rows for cell in row[-1:] if str(cell).endswith(" %")]
    assert all(share in (0, 100) for share in shares)  # of one interval


def test_the_texts_that_reading_is_timed_on_are_of_their_length_and_half_of_them_refuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = importlib.import_module("benchmarks.reading_speed")
    pairs = speed.texts_of("sw", 41, 120)
    assert (len(pairs), {len(text) for text, _ in pairs}, sum(refuses for _, refuses in pairs)) == (41, {120}, 21)
    assert len(dict(pairs)) > 35
    head, *rows = speed.phrases(200)
    assert len(rows) == 4 and all(len(row) == len(head) for row in rows)
    monkeypatch.setattr("sys.argv", ["reading_speed.py", "phrases", "paint"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "no such part: paint" in capsys.readouterr().err
