"""The proof that an engine serves the weights it was given: on tensors, and on a real engine that swaps."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mlc_ray.config import EngineSection
from mlc_ray.score.generate import Engine, EngineError, Warm
from mlc_ray.score.weights import ROWS, StaleWeightsError, WeightSampler, compare_samples, file_sample, sampled_rows

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def folder_of(path: Path, seed: int, vocabulary: int = 200) -> Path:
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    tensors = {
        EMBEDDING: torch.randn(vocabulary, 8, generator=generator),
        NORM: torch.randn(8, generator=generator),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8, generator=generator),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(8, generator=generator),
    }
    save_file(tensors, path / "model.safetensors")
    return path


class Runner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model


def worker_of(folder: Path, rows: range | None = None, norm: bool = True) -> WeightSampler:
    """A worker that holds the folder's weights in bfloat16, or a shard of the vocabulary."""
    weights = load_file(folder / "model.safetensors")
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Module()
    held = weights[EMBEDDING] if rows is None else weights[EMBEDDING][rows.start : rows.stop]
    model.model.embed_tokens.weight = nn.Parameter(held.bfloat16())
    if rows is not None:
        shard = type("Shard", (), {"org_vocab_start_index": rows.start, "org_vocab_end_index": rows.stop})
        model.model.embed_tokens.shard_indices = shard
    if norm:
        model.model.norm = nn.Module()
        model.model.norm.weight = nn.Parameter(weights[NORM].bfloat16())
    worker = WeightSampler()
    worker.model_runner = Runner(model)  # type: ignore[attr-defined]
    return worker


def compare(expected: Any, *workers: WeightSampler) -> None:
    names, rows = list(expected.tensors), list(expected.rows)
    compare_samples(expected, [worker.held_samples(names, rows) for worker in workers], "folder")


def test_rows_are_spread_from_the_first_to_the_last() -> None:
    rows = sampled_rows(49_152)
    assert (len(rows), rows[0], rows[-1]) == (ROWS, 0, 49_151)
    assert sampled_rows(3) == (0, 1, 2)


def test_a_sample_has_embedding_rows_and_norms_in_the_engines_type(tmp_path: Path) -> None:
    sample = file_sample(folder_of(tmp_path / "a", 1), torch.bfloat16)
    assert set(sample.tensors) == {EMBEDDING, NORM}
    assert sample.tensors[EMBEDDING].shape == (ROWS, 8)
    assert {tensor.dtype for tensor in sample.tensors.values()} == {torch.bfloat16}


def test_the_right_weights_pass_whole_and_sharded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 1)
    expected = file_sample(folder, torch.bfloat16)
    compare(expected, worker_of(folder))
    compare(expected, worker_of(folder, range(0, 120)), worker_of(folder, range(120, 200)))


def test_other_weights_do_not(tmp_path: Path) -> None:
    old, new = folder_of(tmp_path / "old", 1), folder_of(tmp_path / "new", 2)
    expected = file_sample(new, torch.bfloat16)
    with pytest.raises(StaleWeightsError, match=r"'folder' the engine does not serve its weights"):
        compare(expected, worker_of(old))
    with pytest.raises(StaleWeightsError, match="embed_tokens"):  # one worker of two was left behind
        compare(expected, worker_of(new, range(0, 120)), worker_of(old, range(120, 200)))
    with pytest.raises(StaleWeightsError, match="embed_tokens"):  # a shard is missing
        compare(expected, worker_of(new, range(0, 120)))


def test_a_norm_alone_gives_it_away(tmp_path: Path) -> None:
    old = folder_of(tmp_path / "old", 1)
    shutil.copytree(old, tmp_path / "new")
    weights = load_file(old / "model.safetensors")
    save_file({**weights, NORM: weights[NORM] + 1}, tmp_path / "new" / "model.safetensors")
    with pytest.raises(StaleWeightsError, match=r"model\.norm\.weight"):
        compare(file_sample(tmp_path / "new", torch.bfloat16), worker_of(old))


def test_the_mark_is_of_all_tensors_and_of_values_only(tmp_path: Path) -> None:
    old = folder_of(tmp_path / "old", 1)
    weights = load_file(old / "model.safetensors")
    marks = {file_sample(old, torch.bfloat16).mark}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"):
        (tmp_path / name).mkdir()
        save_file({**weights, name: weights[name] + 1}, tmp_path / name / "model.safetensors")
        marks.add(file_sample(tmp_path / name, torch.bfloat16).mark)
    assert len(marks) == 3
    (tmp_path / "rounded").mkdir()  # what the engine will hold is the same
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "rounded" / "model.safetensors")
    assert file_sample(tmp_path / "rounded", torch.bfloat16).mark in marks


def test_a_model_without_a_known_embedding_cannot_be_checked(tmp_path: Path) -> None:
    save_file({"wte": torch.zeros(4, 2), "scale": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with pytest.raises(StaleWeightsError, match="no token embedding"):
        file_sample(tmp_path, torch.bfloat16)


def test_ranks_that_vllm_has() -> None:
    assert Warm(lora_rank=4).options["max_lora_rank"] == 8
    assert Warm(lora_rank=100).options["max_lora_rank"] == 128
    assert "enable_lora" not in Warm().options
    with pytest.raises(EngineError, match="rank 1000"):
        _ = Warm(lora_rank=1000).options


@pytest.fixture(scope="module")
def other_weights(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with every matrix scaled a little: another model of the same shape."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(smollm2, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.05 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


SETTINGS = EngineSection(max_model_len=256, cpu_kv_cache_gib=1)
IDS, STARTS = [[1, 9906, 1917, 338], [1, 2683, 260, 905, 30]], [1, 1]


MATRIX = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def another_matrix(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with one matrix changed, and that only a little: neither its embedding nor a norm tells it apart."""
    folder = tmp_path_factory.mktemp("matrix") / "model"
    shutil.copytree(smollm2, folder)
    weights = load_file(folder / "model.safetensors")
    weights[MATRIX] = weights[MATRIX] * 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def apart(function: Callable[..., None], *arguments: str) -> None:
    """Run `function` in a process of its own: an engine leaves a process group and variables behind."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def swap_there_and_back(model: str, other: str, another_matrix: str) -> None:
    engine = Engine(model, SETTINGS, device="cpu", warm=Warm())
    before, log_probs = engine.generate(IDS, 8), engine.log_probs(IDS, STARTS)
    seconds = engine.swap(other)
    assert min(seconds.values()) > 0
    assert engine.log_probs(IDS, STARTS) != log_probs
    engine.swap(another_matrix)
    assert engine.log_probs(IDS, STARTS) != log_probs
    engine.swap(model)
    assert engine.generate(IDS, 8) == before
    assert engine.log_probs(IDS, STARTS) == log_probs
    engine.swap(model)  # the same weights once more are no fault

    # An engine that says it took new weights and did not is found out.
    real = engine._llm.collective_rpc
    engine._llm.collective_rpc = lambda method, *args, **kwargs: (
        None if method == "reload_weights" else real(method, *args, **kwargs)
    )
    with pytest.raises(StaleWeightsError, match="does not serve its weights"):
        engine.swap(other)
    with pytest.raises(StaleWeightsError, match="the same log-probs as before"):
        engine.swap(another_matrix)


def one_adapter_after_another(model: str, folder: str) -> None:
    engine = Engine(model, SETTINGS, device="cpu", warm=Warm(lora_rank=4))

    def served(adapter: str | None) -> list[float]:
        engine.swap_adapter(None if adapter is None else f"{folder}/{adapter}")
        return engine.log_probs(IDS, STARTS)

    alone, first, second = served(None), served("1"), served("2")
    assert len({*alone, *first, *second}) == 6
    assert served("1") == first
    assert served(None) == alone
    with pytest.raises(StaleWeightsError, match="answers exactly as without it"):
        served("0")


@pytest.mark.slow
def test_a_real_engine_swaps_there_and_back(smollm2: Path, other_weights: Path, another_matrix: Path) -> None:
    apart(swap_there_and_back, str(smollm2), str(other_weights), str(another_matrix))


@pytest.mark.slow
def test_a_real_engine_takes_one_adapter_after_another(smollm2: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed in (1, 2, 0):  # 0 leaves B at zero: an adapter that changes nothing
        torch.manual_seed(seed)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(smollm2), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
        for name, parameter in adapted.named_parameters():
            if seed and "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path / str(seed))
    apart(one_adapter_after_another, str(smollm2), str(tmp_path))
