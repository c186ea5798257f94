"""One training step of this package against a rebuild of the published recipe's step, and each technique switched off.

Both steps compute DPO + lambda * MLC of the same bundles with the same weights and extractor, forward and backward, in
one process by turns. `recipe.py` is theirs, `techniques.py` ours and ours without each of its techniques, and
`step_data.py` makes the bundles. Exits with 1 if losses or gradients of any two disagree.

    python benchmarks/step.py --bundles 1 --repeats 5 --dtype float32 --out step.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from recipe import Losses, PaddedBatch, padded, their_step
from step_data import published_rows, sample_rows
from step_memory import read_peak, reset_peak
from techniques import WITHOUT, Given, batch_of, our_step, ours
from torch import Tensor
from transformers import PreTrainedModel

from mlc_ray.config import ModelSection, resolve_layer
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.storage import user_cache
from mlc_ray.train.forward import n_layers
from mlc_ray.train.model import PolicyWithExtractor, load_policy
from mlc_ray.types import ReferenceRows, TokenRow, move

# Largest relative difference allowed. In bfloat16 the two steps round at different places, and the gradient of DPO is
# a difference of two nearly equal ones: seen with SmolLM2 are 0.06 (loss), 0.06 (policy) and 0.006 (extractor). One of
# ten tapped tokens off by one is 0.07 in the extractor's gradient, an answer short of one token 0.7 in the policy's.
TOLERANCE = {
    "float32": {"loss": 1e-4, "policy": 1e-4, "extractor": 1e-4},
    "bfloat16": {"loss": 1e-1, "policy": 1e-1, "extractor": 3e-2},
}
EXTRACTOR_DIM = 512
LEARNING_RATE = 6e-7
SEED = 0
OURS, THEIRS = "ours", "the recipe"
Step = Callable[[], Losses]


def load_module(options: argparse.Namespace) -> PolicyWithExtractor:
    """The policy with a fresh extractor, in the type and on the device asked for."""
    policy = load_policy(ModelSection(path=options.model, dtype=options.dtype))
    layer = resolve_layer(options.layer, n_layers(policy))
    module = PolicyWithExtractor(policy, layer=layer, extractor_dim=EXTRACTOR_DIM, seed=SEED)
    return module.to(device=options.device, dtype=getattr(torch, options.dtype)).train()


def load_reference(options: argparse.Namespace) -> PreTrainedModel:
    """The frozen reference: the policy with 1 % of noise, so that the check is not of a loss of ln 2."""
    reference = load_policy(ModelSection(path=options.model, dtype=options.dtype)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(SEED)
    for parameter in reference.parameters():
        parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return reference.to(options.device)


def rows_of(options: argparse.Namespace, model: PreTrainedModel) -> list[list[TokenRow]]:
    """The bundles of every repeat, from the seed alone."""
    if options.text == "sample":
        return sample_rows(options.model, options.bundles, options.repeats, SEED)
    vocabulary = int(model.config.get_text_config().vocab_size)
    return published_rows(vocabulary, options.bundles, options.repeats, SEED)


def variants(given: Given, padded_batch: PaddedBatch, options: argparse.Namespace) -> dict[str, Step]:
    """The steps that are compared, by name; those that end in `, no term` are of a step without the MLC term."""
    steps: dict[str, Step] = {
        OURS: ours(given),
        THEIRS: partial(their_step, given.module, given.reference, padded_batch),
        f"{OURS}, no term": ours(given, tap=False),
        f"{THEIRS}, no term": partial(their_step, given.module, given.reference, padded_batch, term=False),
    }
    if options.techniques:
        last = given.module.layer == n_layers(given.module.language_model)
        for name, without in WITHOUT.items():
            if (name != "bundles together" or options.bundles > 1) and (name != "rows chosen before the head" or last):
                steps[f"without {name}"] = without(given)
    return steps


def gradients(module: PolicyWithExtractor) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, taken off the module."""
    taken = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return taken


def compare(
    ours: tuple[Losses, dict[str, Tensor]], theirs: tuple[Losses, dict[str, Tensor]], dtype: str
) -> dict[str, Any]:
    """Relative differences of losses and of the policy's and the extractor's gradient, against `TOLERANCE`."""
    (our_losses, our_grads), (their_losses, their_grads) = ours, theirs
    losses = {k: abs(float(our_losses[k]) - float(v)) / abs(float(v)) for k, v in their_losses.items()}
    squares = {"extractor": [0.0, 0.0], "policy": [0.0, 0.0]}
    for name in our_grads.keys() | their_grads.keys():  # on a step without the term, one has zeros and the other none
        part = squares["extractor" if name.startswith("extractor.") else "policy"]
        first, second = (side[name].float() if name in side else None for side in (our_grads, their_grads))
        if first is not None:
            part[0] += float((first if second is None else first - second).square().sum())
        if second is not None:
            part[1] += float(second.square().sum())
    grads = {part: (above / below) ** 0.5 if below else above**0.5 for part, (above, below) in squares.items()}
    tolerance = TOLERANCE[dtype]
    equal = all(value < tolerance["loss"] for value in losses.values()) and all(
        value < tolerance[part] for part, value in grads.items()
    )
    return {"loss_relative": losses, "gradient_relative": grads, "equal": equal}


def agree(steps: Mapping[str, Step], module: PolicyWithExtractor, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """How far each variant is from the recipe (with or without the term); and the losses of all."""
    agreement, losses = {}, {}
    for suffix in ("", ", no term"):
        if f"{THEIRS}{suffix}" not in steps:
            continue
        theirs = steps[f"{THEIRS}{suffix}"](), gradients(module)
        losses[f"{THEIRS}{suffix}"] = {name: float(value) for name, value in theirs[0].items()}
        for name, step in steps.items():
            if name.endswith(", no term") == bool(suffix) and name != f"{THEIRS}{suffix}":
                own = step(), gradients(module)
                losses[name] = {part: float(value) for part, value in own[0].items()}
                agreement[name] = compare(own, theirs, dtype)
    return agreement, losses


def timed(step: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call, the device's queue drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare_and_time(options: argparse.Namespace) -> dict[str, Any]:
    """Check that all variants agree, then time them in turn in this process, on bundles of each repeat."""
    module, reference = load_module(options), load_reference(options)
    all_rows = rows_of(options, module.language_model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True) if options.with_optimizer else None
    seconds: dict[str, list[tuple[float, float]]] = {}
    tokens: dict[str, list[int]] = {OURS: [], THEIRS: []}
    agreement: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    for rows in all_rows:
        theirs = move(padded(rows), options.device)
        steps = variants(Given(module, reference, rows, options.device), theirs, options)
        if not agreement:  # also the warm-up
            agreement, losses = agree(steps, module, options.dtype)
        tokens[OURS].append(batch_of(rows, len(rows)).tree.tokens)
        tokens[THEIRS].append(2 * theirs.input_ids.numel())
        for name, step in steps.items():

            def whole(step: Step = step) -> None:
                step()
                if optimizer is not None:
                    optimizer.step()

            seconds.setdefault(name, []).append(timed(whole, options.device))
            module.zero_grad(set_to_none=True)
    figures = {
        name: {
            "seconds": [wall for wall, _ in spent],
            "seconds_median": median(wall for wall, _ in spent),
            "cpu_seconds_median": median(cpu for _, cpu in spent),
            "times_ours": median(wall / own for (wall, _), (own, _) in zip(spent, seconds[OURS], strict=True)),
            "cpu_times_ours": median(cpu / own for (_, cpu), (_, own) in zip(spent, seconds[OURS], strict=True)),
            "losses": losses[name],
        }
        for name, spent in seconds.items()
    }
    for name, counted in tokens.items():
        figures[name]["tokens_forwarded"] = sum(counted) / len(counted)
    return {
        "layer": module.layer,
        "steps": figures,
        "every_2": every_2(seconds, 0),
        "every_2_cpu": every_2(seconds, 1),
        "agreement": agreement,
    }


def every_2(seconds: Mapping[str, list[tuple[float, float]]], clock: int) -> float:
    """Median ratio of two steps, of which one has the term: what `mlc.every: 2` gives over a run, by one clock."""
    own, theirs = (
        [a[clock] + b[clock] for a, b in zip(seconds[side], seconds[f"{side}, no term"], strict=True)]
        for side in (OURS, THEIRS)
    )
    return median(b / a for a, b in zip(own, theirs, strict=True))


def peak_memory(options: argparse.Namespace, variant: str) -> dict[str, int]:
    """Peak bytes of one step of `variant`; runs in a process of its own, which loads only what that step needs."""
    prepare(options)
    module = load_module(options)
    rows = rows_of(options, module.language_model)[0]
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, fused=True) if options.with_optimizer else None
    step: Step
    if variant == OURS:  # any log-probs do: memory does not depend on them
        said = ReferenceRows(chosen=np.zeros(len(rows)), rejected=np.zeros(len(rows)))
        step = partial(our_step, module, move(batch_of(rows, len(rows), reference=said), options.device))
    else:
        step = partial(their_step, module, load_reference(options), move(padded(rows), options.device))
    before = reset_peak(options.device)
    step()
    if optimizer is not None:
        optimizer.step()
    peak = read_peak(options.device)
    return {"peak_bytes": peak, "before_bytes": before, "step_bytes": peak - before}


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepare(options: argparse.Namespace) -> None:
    """Process-wide settings, in the parent and in each child."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def show(result: Mapping[str, Any]) -> None:
    """Print the figures."""
    asked = ("model", "device", "dtype", "layer", "text", "bundles", "repeats", "threads", "with_optimizer")
    print("  ".join(f"{key}={result[key]}" for key in asked))
    columns = ("seconds", "x ours", "CPU s", "x ours", "loss", "off by", "gradient")
    print(f"{'':40}" + "".join(f"{column:>10}" for column in columns))
    for name, figures in result["steps"].items():
        found = result["agreement"].get(name)
        distance = "".join(
            f"{max(found[key].values()):>10.0e}" if found else f"{'':10}"
            for key in ("loss_relative", "gradient_relative")
        )
        keys = ("seconds_median", "times_ours", "cpu_seconds_median", "cpu_times_ours")
        numbers = "".join(f"{figures[key]:>10.3f}" for key in keys)
        print(f"{name:40}{numbers}{figures['losses']['total']:>10.5f}{distance}")
    own, theirs = (result["steps"][side] for side in (OURS, THEIRS))
    every = f"{result['every_2']:.2f} times as fast as the recipe ({result['every_2_cpu']:.2f} by CPU seconds)"
    print(f"averaged over mlc.every: 2, {every}")
    pairs = " ".join(f"{b / a:.2f}" for a, b in zip(own["seconds"], theirs["seconds"], strict=True))
    print(f"the recipe's time over ours, each pair: {pairs}")
    for title, key, unit in (
        ("tokens forwarded", "tokens_forwarded", 1),
        ("peak memory, MB", "peak_bytes", 1e6),
        ("of it the step's, MB", "step_bytes", 1e6),
    ):
        share = own[key] / max(theirs[key], 1)
        print(f"{title:24}{own[key] / unit:>12.0f} of {theirs[key] / unit:.0f} ({share:.0%})")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line -> options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hugging Face folder (default: {MODEL_NAME}, prepared as the quickstart does)")
    text_help = "the shipped sample in ten languages (default), or random tokens of the published lengths"
    parser.add_argument("--text", choices=("sample", "published"), default="sample", help=text_help)
    parser.add_argument("--bundles", type=int, default=1, help="bundles per step (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of steps, each on bundles of its own")
    parser.add_argument("--techniques", action="store_true", help="also time ours with each technique switched off")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    layer_help = "'last' or an index into hidden_states (default: last, as published)"
    parser.add_argument("--layer", type=lambda s: s if s == "last" else int(s), default="last", help=layer_help)
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: its own choice)")
    parser.add_argument("--with-optimizer", action="store_true", help="include a step of AdamW in time and memory")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    if options.bundles < 1 or options.repeats < 1:
        parser.error("--bundles and --repeats must be at least 1")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model is None:
        options.model = str(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if all steps agree, else 1."""
    options = parse(arguments)
    # Before this process takes memory on the device.
    memory = {variant: in_child(peak_memory, options, variant) for variant in (OURS, THEIRS)}
    prepare(options)
    asked = ("model", "text", "dtype", "bundles", "repeats", "with_optimizer")
    result = {
        **{name: getattr(options, name) for name in asked},
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "memory_measure": "max_memory_allocated" if options.device == "cuda" else "peak resident set",
        "tolerance": TOLERANCE[options.dtype],
    } | compare_and_time(options)
    for variant, figures in memory.items():
        result["steps"][variant] |= figures
    show(result)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if wrong := [name for name, found in result["agreement"].items() if not found["equal"]]:
        print(
            f"these steps disagree with the recipe's, so that times mean nothing: {', '.join(wrong)}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
