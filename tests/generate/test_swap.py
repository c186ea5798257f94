"""The proof that an engine serves the weights it was given: on tensors, and on a real engine that swaps."""

from __future__ import annotations

import json
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
from mlc_ray.generate.engine import Engine, EngineError, Warm
from mlc_ray.generate.swap import (
    EMBEDDING_ROWS,
    StaleWeightsError,
    WeightSampler,
    adapter_reach,
    compare_samples,
    file_sample,
    spread,
)

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
ATTENTION = "model.layers.0.self_attn"
VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD = 200, 8, 4, 2, 2


def folder_of(path: Path, seed: int, **changed: torch.Tensor) -> Path:
    """A tiny attention layer between an embedding and a head that shares its weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        EMBEDDING: draw(VOCABULARY, HIDDEN),
        NORM: draw(HIDDEN),
        f"{ATTENTION}.q_proj.weight": draw(HEADS * HEAD, HIDDEN),
        f"{ATTENTION}.k_proj.weight": draw(KV_HEADS * HEAD, HIDDEN),
        f"{ATTENTION}.v_proj.weight": draw(KV_HEADS * HEAD, HIDDEN),
        f"{ATTENTION}.o_proj.weight": draw(HIDDEN, HEADS * HEAD),
    }
    path.mkdir()
    save_file(tensors | changed, path / "model.safetensors")
    return path


class UnquantizedMethod:
    """As vLLM's on CPU: it multiplies with a copy that was packed when weights were loaded."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.detach().clone()

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.packed.T


def layer_of(weight: torch.Tensor, **facts: Any) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight.bfloat16())
    for name, value in facts.items():
        setattr(module, name, value)
    module.quant_method = UnquantizedMethod()
    module.quant_method.process_weights_after_loading(module)
    return module


class Runner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model


def worker_of(folder: Path, rank: int = 0, of: int = 1) -> WeightSampler:
    """A worker that holds the folder's weights in bfloat16, or its shard of them, laid out as vLLM does."""
    weights = load_file(folder / "model.safetensors")

    def rows(tensor: torch.Tensor, index: int, parts: int) -> torch.Tensor:
        return tensor.chunk(parts)[index]

    start, end = rank * VOCABULARY // of, (rank + 1) * VOCABULARY // of
    shard = type("Shard", (), {"org_vocab_start_index": start, "org_vocab_end_index": end})
    vocabulary = {"shard_indices": shard, "embedding_dim": HIDDEN}
    parallel = {"tp_rank": rank, "tp_size": of, "input_size": HIDDEN}
    replicas = max(1, of // KV_HEADS)
    q, k, v, o = (weights[f"{ATTENTION}.{name}_proj.weight"] for name in "qkvo")
    qkv = [rows(q, rank, of), *(rows(each, rank // replicas, min(of, KV_HEADS)) for each in (k, v))]

    model = nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    model.model = nn.Module()
    model.model.embed_tokens = layer_of(weights[EMBEDDING][start:end], **vocabulary)
    model.lm_head = layer_of(weights[EMBEDDING][start:end], **vocabulary)
    model.model.norm = nn.Module()
    model.model.norm.weight = nn.Parameter(weights[NORM].bfloat16())
    attention = nn.Module()
    attention.qkv_proj = layer_of(
        torch.cat(qkv), output_partition_sizes=[len(part) for part in qkv], input_size_per_partition=HIDDEN,
        num_kv_head_replicas=replicas, **parallel,
    )  # fmt: skip
    attention.o_proj = layer_of(
        rows(o.T, rank, of).T, output_partition_sizes=[HIDDEN], input_size_per_partition=HEADS * HEAD // of, **parallel
    )
    layer = nn.Module()
    layer.self_attn = attention
    model.model.layers = nn.ModuleList([layer])
    worker = WeightSampler()
    worker.model_runner = Runner(model)  # type: ignore[attr-defined]
    return worker


def compare(folder: Path, *workers: WeightSampler) -> None:
    expected = file_sample(folder, torch.bfloat16)
    compare_samples(expected, [worker.held_samples(**expected.wanted) for worker in workers], "folder")


def test_indices_are_spread_from_the_first_to_the_last() -> None:
    rows = spread(49_152, 64)
    assert (len(rows), rows[0], rows[-1]) == (64, 0, 49_151)
    assert spread(3, 64) == (0, 1, 2)


def test_a_sample_has_embedding_rows_norms_and_elements_of_every_matrix(tmp_path: Path) -> None:
    sample = file_sample(folder_of(tmp_path / "a", 1), torch.bfloat16)
    assert (set(sample.embedding), set(sample.norms)) == ({EMBEDDING}, {NORM})
    assert sample.embedding[EMBEDDING].values.shape == (EMBEDDING_ROWS, HIDDEN)
    assert set(sample.matrices) == {"lm_head.weight", *(f"{ATTENTION}.{name}_proj.weight" for name in "qkvo")}
    assert {block.values.dtype for block in sample.matrices.values()} == {torch.bfloat16}
    weights = load_file(tmp_path / "a" / "model.safetensors")
    block = sample.matrices[f"{ATTENTION}.q_proj.weight"]
    assert block.rows == (0, 2, 5, 7)
    expected = weights[f"{ATTENTION}.q_proj.weight"].bfloat16()[list(block.rows)][:, list(block.columns)]
    assert torch.equal(block.values, expected)
    assert sample.equals(file_sample(tmp_path / "a", torch.bfloat16))
    assert not sample.equals(file_sample(folder_of(tmp_path / "b", 2), torch.bfloat16))


@pytest.mark.parametrize("of", [1, 2, 4])
def test_the_right_weights_pass_whole_and_sharded(tmp_path: Path, of: int) -> None:
    folder = folder_of(tmp_path / "a", 1)
    workers = [worker_of(folder, rank, of) for rank in range(of)]
    compare(folder, *workers)
    if of > 1:
        with pytest.raises(StaleWeightsError, match="differs"):  # a shard is missing
            compare(folder, *workers[1:])
        with pytest.raises(StaleWeightsError, match="differs"):  # one worker was left behind
            compare(folder, *workers[1:], worker_of(folder_of(tmp_path / "old", 2), 0, of))


def test_other_weights_do_not(tmp_path: Path) -> None:
    old, new = folder_of(tmp_path / "old", 1), folder_of(tmp_path / "new", 2)
    with pytest.raises(StaleWeightsError, match=r"'folder' the engine does not serve its weights"):
        compare(new, worker_of(old))


@pytest.mark.parametrize("name", [NORM, EMBEDDING, *(f"{ATTENTION}.{name}_proj.weight" for name in "qkvo")])
@pytest.mark.parametrize("of", [1, 2])
def test_a_single_tensor_gives_it_away(tmp_path: Path, name: str, of: int) -> None:
    old = folder_of(tmp_path / "old", 1)
    weights = load_file(old / "model.safetensors")
    new = folder_of(tmp_path / "new", 1, **{name: weights[name] + 1})
    with pytest.raises(StaleWeightsError, match=name.replace(".", r"\.")):
        compare(new, *(worker_of(old, rank, of) for rank in range(of)))


def test_a_head_whose_kernel_kept_old_weights_is_found_out_and_renewed(tmp_path: Path) -> None:
    old, new = folder_of(tmp_path / "old", 1), folder_of(tmp_path / "new", 2)
    worker = worker_of(new)
    head = worker.model_runner.model.lm_head  # type: ignore[attr-defined]
    head.packed = load_file(old / "model.safetensors")[EMBEDDING].bfloat16()  # its parameter is the new one
    with pytest.raises(StaleWeightsError, match=r"lm_head\.weight"):
        compare(new, worker)
    worker.renew_heads()
    compare(new, worker)


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 1)
    worker = worker_of(folder)
    model = worker.model_runner.model  # type: ignore[attr-defined]
    model.model.layers[0].attn = model.model.layers[0].self_attn  # other names than the file's
    del model.model.layers[0].self_attn, model.lm_head.shard_indices
    with pytest.raises(StaleWeightsError, match="no matrix of the engine was found by its name"):
        compare(folder, worker)
    save_file({"wte": torch.zeros(4, 2), "scale": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with pytest.raises(StaleWeightsError, match="no token embedding"):
        file_sample(tmp_path, torch.bfloat16)


def test_the_reach_of_an_adapter_bounds_what_it_adds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{layer}.lora_{matrix}.weight": torch.randn(*shape, generator=generator)
        for layer in ("q", "v")
        for matrix, shape in (("A", (4, 32)), ("B", (16, 4)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    added = max(
        float((2 * tensors[f"base_model.model.{x}.lora_B.weight"] @ tensors[f"base_model.model.{x}.lora_A.weight"])
              .abs().max()) for x in ("q", "v")
    )  # fmt: skip
    assert added <= adapter_reach(tmp_path) < 10 * added


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


def apart(function: Callable[..., None], *arguments: str) -> None:
    """Run `function` in a process of its own: an engine leaves a process group and variables behind."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def answers(engine: Engine) -> tuple[Any, list[float]]:
    return engine.generate(IDS, 8), engine.log_probs(IDS, STARTS)


def swap_there_and_back(model: str, other: str) -> None:
    fresh = Engine(other, SETTINGS, device="cpu", warm=Warm())
    expected = answers(fresh)
    fresh.close()
    engine = Engine(model, SETTINGS, device="cpu", warm=Warm())
    before = answers(engine)
    seconds = engine.swap(other)
    assert min(seconds.values()) > 0
    # As an engine that was started with the weights, to the last bit: nothing in it is left from before.
    assert answers(engine) == expected != before
    engine.swap(model)
    assert answers(engine) == before
    engine.swap(model)  # the same weights once more are no fault

    # An engine that says it took new weights and did not, or not all of them, is found out.
    real = engine._llm.collective_rpc

    def without(left_out: str) -> Any:
        return lambda method, *args, **kwargs: None if method == left_out else real(method, *args, **kwargs)

    engine._llm.collective_rpc = without("renew_heads")
    with pytest.raises(StaleWeightsError, match=r"lm_head\.weight differs"):
        engine.swap(other)
    engine._llm.collective_rpc = without("reload_weights")
    with pytest.raises(StaleWeightsError, match="does not serve its weights"):
        engine.swap(model)
    # One whose every tensor is right and that goes on with what was captured before, too.
    engine._llm.collective_rpc = real
    engine.swap(model)
    kept = engine._canary
    real_log_probs = engine.log_probs
    engine.log_probs = lambda *_: kept  # type: ignore[method-assign]
    with pytest.raises(StaleWeightsError, match="the same log-probs as before"):
        engine.swap(other)
    engine.log_probs = real_log_probs  # type: ignore[method-assign]


def one_adapter_after_another(model: str, folder: str) -> None:
    engine = Engine(model, SETTINGS, device="cpu", warm=Warm(lora_rank=4))

    def served(adapter: str | None) -> list[float]:
        engine.swap_adapter(None if adapter is None else f"{folder}/{adapter}")
        return engine.log_probs(IDS, STARTS)

    alone, first, second = served(None), served("1"), served("2")
    assert len({*alone, *first, *second}) == 6
    assert served("1") == first
    assert served(None) == alone
    assert served("0") == alone  # it adds nothing, and that is what the engine serves

    # An engine that does not use the adapter it was given is found out.
    real = engine._llm.generate
    engine._llm.generate = lambda *args, lora_request, **kwargs: real(*args, **kwargs)
    with pytest.raises(StaleWeightsError, match=r"adds up to [\d.]+ to weights, the engine answers exactly as without"):
        served("1")
    engine._llm.generate = real
    assert served("1") == first


@pytest.mark.slow
def test_a_real_engine_swaps_there_and_back(smollm2: Path, other_weights: Path) -> None:
    apart(swap_there_and_back, str(smollm2), str(other_weights))


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
