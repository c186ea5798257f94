"""What a training step costs, counted and not timed: ours, before prefixes were shared, and the published recipe's.

Models of full shape are made on the meta device, which has shapes and no memory. Their steps run there in bfloat16,
forward and backward, while a mode counts the operations that start a kernel, the bytes they read and write, the FLOPs,
calls of the attention kernel, rows of the LM head, and forwards. Ours attends as it does on CUDA, and so does the rest.
What travels between workers follows from a formula, `traffic`. No GPU and no weights are needed.

    python benchmarks/step_counts.py --model qwen2.5-7b --bundles 1 4 --workers 8
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recipe import padded, their_step
from step_data import batch_of, published_rows, sample_rows
from techniques import our_step, split_step, unshared
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.storage import user_cache
from mlc_ray.train.attention import register_attention
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.types import Batch, TokenRow, Tree, move

META = "meta"
VARLEN, FUSED = "tree_varlen", "fused_on_meta"
EXTRACTOR_DIM = 512
aten = torch.ops.aten
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}
FORWARD_ATTENTION = {"_varlen_attn", "_scaled_dot_product_efficient_attention"}
VARLEN_COST = {"_varlen_attn": 4.0, "_varlen_attn_backward": 10.0}
"""FLOPs of the kernel for each head, dimension and pair of tokens."""


def qwen(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, tied: bool) -> Qwen2Config:
    """A Qwen2.5 of this shape."""
    return Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": lambda: qwen(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": lambda: qwen(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": lambda: qwen(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-72b": lambda: qwen(8192, 29568, 80, 64, 8, 152064, False),
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts what operations on the meta device would do, within its block.

    Args:
        modules: language models; their forwards and the rows of their heads are counted.
        pairs: by the number of tokens of a row, how many pairs of its tokens attend to one another.
    """

    def __init__(self, modules: Sequence[nn.Module], pairs: dict[int, int]) -> None:
        super().__init__()
        self.pairs = pairs
        self.total: Counter[str] = Counter()
        for module in modules:
            model: Any = module
            model.get_output_embeddings().register_forward_pre_hook(self._head)
            model.get_input_embeddings().register_forward_pre_hook(self._forward)

    def _head(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.total["head_rows"] += given[0].shape[:-1].numel()

    def _forward(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.total["forwards"] += 1
        self.total["tokens"] += given[0].numel()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        views = [value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns]
        if any(views) or name in NO_KERNEL:
            return result
        read, written = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in ((args, kwargs), result)
        )
        self.total["kernels"] += 1
        self.total["bytes"] += sum(leaf.numel() * leaf.element_size() for leaf in read + written)
        self.total["attention_calls"] += name in FORWARD_ATTENTION
        if name in VARLEN_COST:
            query = read[0] if name in FORWARD_ATTENTION else read[1]
            tokens, heads, size = query.shape
            self.total["flops"] += int(VARLEN_COST[name] * heads * size * self.pairs[tokens])
        elif function._overloadpacket in flop_registry:
            self.total["flops"] += flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
        return result


def attend_fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The kernel that sdpa takes on CUDA with a mask; on the meta device sdpa would be counted in its parts."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value))
    n, _, length, _ = query.shape
    bias = query.new_zeros(n, 1, length, length).expand(n, query.shape[1], length, length)
    output = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, attend_fused)
register_attention()


def pairs_of(tree: Tree) -> int:
    """How many pairs of tokens attend to one another."""
    lengths = zip(tree.lengths, tree.key_lengths, strict=True)
    return sum(own * (keys - own) + own * (own + 1) // 2 for own, keys in lengths)


def count(shape: str, rows: Sequence[TokenRow]) -> dict[str, dict[str, int]]:
    """Totals of one step with the term, by who takes it."""
    config = SHAPES[shape]()
    with torch.device(META):
        policy, reference = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for _ in range(2))
    reference.requires_grad_(False)
    batch = batch_of(rows, len(rows))
    zeros = torch.zeros(len(rows))
    batch = replace(batch, reference_chosen=zeros, reference_rejected=zeros)
    steps: dict[str, Callable[[PolicyWithExtractor], object]] = {
        "ours": lambda module: our_step(module, on_meta(batch), VARLEN),
        "before": partial(step_before, rows=rows, batch=batch),
        "recipe": lambda module: their_step(module, reference, on_meta(padded(rows)), attention=FUSED),
    }
    found = {}
    for name, step in steps.items():
        module = PolicyWithExtractor(policy, layer=config.num_hidden_layers, extractor_dim=EXTRACTOR_DIM, seed=0)
        module = module.to(device=META, dtype=torch.bfloat16).train()
        trees = [batch.tree] if name == "ours" else list(trees_before(rows))
        counting = Counting([policy, reference], {tree.tokens: pairs_of(tree) for tree in trees})
        with counting:
            step(module)
        found[name] = dict(counting.total)
    return found


def on_meta(value: Any) -> Any:
    """`value` without its numbers."""
    return move(value, torch.device(META))


def trees_before(rows: Sequence[TokenRow]) -> tuple[Tree, Tree]:
    """The two rows that were forwarded before prefixes were shared: answers, and prompts."""
    tree, _, _ = unshared(rows)
    n_answers = tree.prompt_only
    lengths, tokens = tree.lengths[n_answers:], sum(tree.lengths[:n_answers])
    prompts = replace(
        tree.first(len(tree.lengths)),
        input_ids=tree.input_ids[:, tokens:], position_ids=tree.position_ids[:, tokens:],
        starts=tuple(start - tokens for start in tree.starts[n_answers:]), lengths=lengths,
        parents=tree.parents[n_answers:], key_lengths=lengths, prompt_only=0,
        keys=tree.keys[tokens:] - tokens, query_bounds=tree.query_bounds[n_answers:] - tokens,
        key_bounds=tree.key_bounds[n_answers:] - tokens,
    )  # fmt: skip
    return tree.first(n_answers), prompts


def step_before(module: PolicyWithExtractor, *, rows: Sequence[TokenRow], batch: Batch) -> object:
    """Two packed forwards, each sequence whole, before one backward."""
    answers, prompts = trees_before(rows)
    _, (chosen, rejected), tapped = unshared(rows)
    assert batch.prompts is not None
    own = replace(
        batch, tree=answers, chosen=chosen, rejected=rejected,
        prompts=replace(batch.prompts, tapped=tapped - answers.tokens),
    )  # fmt: skip
    return split_step(module, on_meta(own), on_meta(prompts), VARLEN)


def traffic(parameters: int, workers: int, *, forwards: int, micro_batches: int, reduced: int) -> dict[str, float]:
    """Bytes that a worker receives in an optimizer step.

    Args:
        parameters: all of them, trained, in bfloat16.
        workers: the group over which they are sharded.
        forwards: of the policy, in all micro-batches; ZeRO-3 gathers every block once in each and once in its backward.
        micro_batches: backwards; ZeRO-2 reduces all gradients in each.
        reduced: bytes of a gradient on the way.
    """
    share = parameters * (workers - 1) / workers
    return {
        "zero2_reduced_bytes": reduced * share * micro_batches,
        "zero3_gathered_bytes": 2 * 2 * share * forwards,
    }


def table(shape: str, bundles: int, rows: Sequence[TokenRow], workers: int) -> dict[str, Any]:
    """Counts of a step of `bundles` bundles a worker: ours in one forward, the others as they are configured."""
    together = count(shape, rows)
    with torch.device(META):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(SHAPES[shape]()).parameters())
    policy_forwards = {"ours": 1, "before": 2 * bundles, "recipe": bundles}
    for name, found in together.items():
        backwards = 1 if name == "ours" else bundles
        found |= traffic(
            parameters, workers, forwards=policy_forwards[name], micro_batches=backwards,
            reduced=4 if name == "ours" else 2,  # float32, or the model's own type
        )  # fmt: skip
    return {"model": shape, "bundles": bundles, "workers": workers, "parameters": parameters, "steps": together}


def show(result: dict[str, Any]) -> None:
    """Print one table."""
    print("{model}, {bundles} bundles, {workers} workers, {parameters:,} parameters".format(**result))
    steps = result["steps"]
    print(f"{'':24}" + "".join(f"{name:>14}" for name in steps) + f"{'recipe / ours':>15}")
    for name in steps["ours"]:
        values = [found.get(name, 0) for found in steps.values()]
        print(f"{name:24}" + "".join(f"{value:>14.4g}" for value in values) + f"{values[-1] / values[0]:>15.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), nargs="+", default=["qwen2.5-7b"])
    parser.add_argument("--bundles", type=int, nargs="+", default=[1, 4], help="bundles of one worker in a step")
    parser.add_argument("--workers", type=int, default=8, help="workers that shard the model")
    parser.add_argument("--text", choices=("sample", "published"), default="sample")
    parser.add_argument("--tokenizer", help=f"folder of the text's tokenizer (default: {MODEL_NAME}'s)")
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    options = parser.parse_args(arguments)
    results = []
    for bundles in options.bundles:
        if options.text == "published":
            rows = published_rows(1000, bundles, 1)[0]
        else:
            folder = options.tokenizer or str(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
            rows = sample_rows(folder, bundles, 1)[0]
        for shape in options.model:
            results.append(table(shape, bundles, rows, options.workers))
            show(results[-1])
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
