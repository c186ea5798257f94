"""One training step of this package against a plain rebuild of the published recipe's step.

Both steps compute DPO + lambda * MLC of the same bundles with the same weights and extractor, forward and backward:

- ours: answers and prompts as one prefix tree without padding, the LM head on response positions only, prompts only as
  deep as the tapped layer, the reference's log-probs cached before the run.
- theirs: policy *and* reference forward all 2 + L sequences of every bundle, padded to one length, with every layer's
  hidden states kept and all logits upcast to float32; the tapped token is the last unmasked one; singular values by
  an SVD. Built from a description of the published code, with nothing slower than it says: same sdpa kernels,
  the reference under no_grad, log-softmax of the answers' rows only.

Bundles are random tokens with the published lengths (`LENGTHS`). Exits with 1 if losses or gradients disagree.

    python benchmarks/step.py --bundles 1 --repeats 5 --dtype float32 --out step.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mlc_ray.config import ModelSection, ObjectiveConfig
from mlc_ray.data.batches import collate
from mlc_ray.losses.objective import Objective
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.runs import user_cache
from mlc_ray.train.attention import TREE
from mlc_ray.train.model import PolicyWithExtractor, load_policy, n_layers, resolve_layer
from mlc_ray.train.reference import ReferenceModel
from mlc_ray.types import Batch, ReferenceRow, TokenRow, move

# The published data has about 427 prompt tokens a bundle over ten languages. How they are shared out is our guess:
# scripts that the tokenizer knows less well take more tokens.
LENGTHS = {"en": 25, "zh": 23, "ru": 32, "ja": 30, "ar": 33, "bn": 75, "sw": 40, "ur": 53, "ps": 66, "ku": 50}
PROMPT_TOKENS = sum(LENGTHS.values())
# ... and about 208 preference tokens, read here as both preference sequences together, the English prompt included
# in each. (Reading it as the two answers alone would make the padded step longer and flatter us.)
PREFERENCE_TOKENS = 208

# Largest relative difference allowed. In bfloat16 the two steps round at different places, and the gradient of DPO is
# a difference of two nearly equal ones: seen with SmolLM2 are 0.02 (loss), 0.03 (policy) and 0.006 (extractor). One of
# ten tapped tokens off by one is 0.07 in the extractor's gradient, an answer short of one token 0.7 in the policy's.
TOLERANCE = {
    "float32": {"loss": 1e-4, "policy": 1e-4, "extractor": 1e-4},
    "bfloat16": {"loss": 5e-2, "policy": 1e-1, "extractor": 3e-2},
}

BETA, WEIGHT, TEMPERATURE = 0.1, 0.8, 0.2
OBJECTIVE = Objective(
    ObjectiveConfig(objective={"loss": "dpo", "beta": BETA}, mlc={"weight": WEIGHT, "temperature": TEMPERATURE})
)
EXTRACTOR_DIM = 512
LEARNING_RATE = 6e-7
SEED = 0

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class PaddedBatch:
    """What the rebuild forwards: B chosen rows, B rejected, then L prompts of each bundle, all of one length.

    `input_ids`, `attention_mask` and `labels` (-100 where nothing is predicted) are [2 B + B L, T], padded right.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    bundles: int


def random_rows(bundles: int, vocabulary: int, rng: random.Random) -> list[TokenRow]:
    """Bundles of random tokens, each of exactly the published mean size.

    Lengths of languages vary by a fifth and answers share their tokens between 40:60 and 60:40. Bundles of one step
    do not vary in total, which real ones do: more variation means more padding, so this is the cautious choice.
    """

    def tokens(n: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(n)]

    rows = []
    for _ in range(bundles):
        varied = {code: n * rng.uniform(0.8, 1.2) for code, n in LENGTHS.items() if code != "en"}
        scale = (PROMPT_TOKENS - LENGTHS["en"]) / sum(varied.values())
        lengths = {"en": LENGTHS["en"]} | {code: round(n * scale) for code, n in varied.items()}
        lengths["bn"] += PROMPT_TOKENS - sum(lengths.values())  # what rounding left over
        answers = PREFERENCE_TOKENS - 2 * LENGTHS["en"]
        chosen = round(answers * rng.uniform(0.4, 0.6))
        prompts = [tokens(n) for n in lengths.values()]
        rows.append(
            TokenRow(
                bundle_id=f"{rng.getrandbits(64):016x}",
                kind="harmful",
                languages=list(lengths),
                prompts=prompts,
                tapped=[len(prompt) - 1 for prompt in prompts],
                response_prompt=0,
                chosen=tokens(chosen),
                rejected=tokens(answers - chosen),
            )
        )
    return rows


def padded(rows: Sequence[TokenRow]) -> PaddedBatch:
    """The rebuild's batch of the same token rows."""
    answers = [(row.prompts[0], row.chosen or []) for row in rows] + [
        (row.prompts[0], row.rejected or []) for row in rows
    ]
    parts = answers + [(prompt, []) for row in rows for prompt in row.prompts]
    length = max(len(prompt) + len(answer) for prompt, answer in parts)
    ids = torch.zeros(len(parts), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(parts):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer, dtype=torch.long)
    return PaddedBatch(ids, mask, labels, len(rows))


def tree_batch(rows: Sequence[TokenRow], reference: Mapping[str, ReferenceRow] | None) -> Batch:
    """Our batch of the token rows."""
    weights = [1.0] * len(rows)
    return collate(rows, languages=list(LENGTHS), weights=weights, needs_rejected=True, reference=reference, tap=True)


def our_step(module: PolicyWithExtractor, batch: Batch) -> Losses:
    """Forward and backward as training does them, reference log-probs being in the batch."""
    module.language_model.set_attn_implementation(TREE)
    output = module(batch)
    result = OBJECTIVE.total_loss(
        weight=batch.weight,
        chosen=output.chosen,
        rejected=output.rejected,
        reference_chosen=batch.reference_chosen,
        reference_rejected=batch.reference_rejected,
        representations=output.representations,
        present=output.present,
    )
    result.loss.backward()
    parts = {name: result.metrics[f"loss/{name}"].mean() for name in ("alignment", "mlc")}
    return parts | {"total": result.loss.detach()}


def their_step(module: PolicyWithExtractor, reference: PreTrainedModel, batch: PaddedBatch) -> Losses:
    """Forward and backward as the published recipe's are described."""
    n = batch.bundles
    module.language_model.set_attn_implementation("sdpa")
    reference.set_attn_implementation("sdpa")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    policy = module.policy(**inputs, output_hidden_states=True)
    logits = policy.logits.float()
    with torch.no_grad():
        reference_logits = reference(**inputs, output_hidden_states=True).logits.float()
        reference_chosen, reference_rejected = answer_sums(reference_logits[: 2 * n], batch.labels[: 2 * n]).split(n)
    chosen, rejected = answer_sums(logits[: 2 * n], batch.labels[: 2 * n]).split(n)
    alignment = -F.logsigmoid(BETA * ((chosen - reference_chosen) - (rejected - reference_rejected))).mean()

    states = policy.hidden_states[module.layer][2 * n :]
    last = batch.attention_mask[2 * n :].sum(dim=1) - 1
    tapped = states[torch.arange(len(states), device=states.device), last]
    rows = F.normalize(module.extractor(tapped), dim=-1)
    values = torch.linalg.svdvals(rows.view(n, -1, rows.shape[-1]).float())
    scaled = values / values[:, :1].detach() / TEMPERATURE
    mlc = F.cross_entropy(scaled, torch.zeros(n, dtype=torch.long, device=scaled.device))
    total = alignment + WEIGHT * mlc
    total.backward()
    return {"alignment": alignment.detach(), "mlc": mlc.detach(), "total": total.detach()}


def answer_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed log-prob [N] of the labelled tokens of padded rows: `logits` [N, T, V], `labels` [N, T]."""
    targets = labels[:, 1:]
    log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (log_probs * (targets != -100)).sum(dim=1)


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


@torch.no_grad()
def with_reference(reference: PreTrainedModel, batch: Batch) -> Batch:
    """`batch` with the reference's log-probs, which training computes once per bundle before its first step."""
    said = ReferenceModel(reference)(batch, state=False)
    return replace(batch, reference_chosen=said.chosen, reference_rejected=said.rejected)


def batch_rows(options: argparse.Namespace, vocabulary: int) -> list[list[TokenRow]]:
    """The bundles of every repeat, from the seed alone."""
    rng = random.Random(SEED)
    return [random_rows(options.bundles, vocabulary, rng) for _ in range(options.repeats)]


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of token ids that the model knows."""
    return int(model.config.get_text_config().vocab_size)


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
    same_parameters = our_grads.keys() == their_grads.keys()
    squares = {"extractor": [0.0, 0.0], "policy": [0.0, 0.0]}
    for name in our_grads.keys() & their_grads.keys():
        part = squares["extractor" if name.startswith("extractor.") else "policy"]
        theirs_grad = their_grads[name].float()
        part[0] += float((our_grads[name].float() - theirs_grad).square().sum())
        part[1] += float(theirs_grad.square().sum())
    grads = {part: (above / below) ** 0.5 if below else float("nan") for part, (above, below) in squares.items()}
    tolerance = TOLERANCE[dtype]
    equal = (
        same_parameters
        and all(value < tolerance["loss"] for value in losses.values())
        and all(value < tolerance[part] for part, value in grads.items())
    )
    return {"loss_relative": losses, "gradient_relative": grads, "tolerance": tolerance, "equal": equal}


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
    """Check that both steps agree, then time them in turn in this process."""
    module, reference = load_module(options), load_reference(options)
    rows = batch_rows(options, vocabulary_of(module.language_model))
    ours = [with_reference(reference, move(tree_batch(batch, None), options.device)) for batch in rows]
    theirs = [move(padded(batch), options.device) for batch in rows]
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE) if options.with_optimizer else None

    # The first pair is the check and the warm-up; it is not timed.
    our_losses = our_step(module, ours[0])
    our_gradients = gradients(module)
    their_losses = their_step(module, reference, theirs[0])
    agreement = compare((our_losses, our_gradients), (their_losses, gradients(module)), options.dtype)
    del our_gradients

    def run(step: Callable[[], object]) -> tuple[float, float]:
        def whole() -> None:
            step()
            if optimizer is not None:
                optimizer.step()

        spent = timed(whole, options.device)
        module.zero_grad(set_to_none=True)
        return spent

    pairs = []
    for our_batch, their_batch in zip(ours, theirs, strict=True):
        first = run(partial(our_step, module, our_batch))
        second = run(partial(their_step, module, reference, their_batch))
        pairs.append((first, second))
    our_tokens = [batch.tree.tokens for batch in ours]
    their_tokens = [2 * batch.input_ids.numel() for batch in theirs]

    def side(index: int, tokens: list[int], losses: Losses) -> dict[str, Any]:
        seconds, cpu_seconds = zip(*(pair[index] for pair in pairs), strict=True)
        return {
            "seconds": seconds,
            "seconds_median": median(seconds),
            "cpu_seconds": cpu_seconds,
            "cpu_seconds_median": median(cpu_seconds),
            "tokens_forwarded": sum(tokens) / len(tokens),
            "losses": {name: float(value) for name, value in losses.items()},
        }

    ratios, cpu_ratios = ([second[i] / first[i] for first, second in pairs] for i in (0, 1))
    return {
        "layer": module.layer,
        "ours": side(0, our_tokens, our_losses),
        "theirs": side(1, their_tokens, their_losses),
        "ratio": {
            "seconds_pairs": ratios,
            "seconds_median": median(ratios),
            "cpu_seconds_median": median(cpu_ratios),
            "tokens_forwarded": sum(their_tokens) / sum(our_tokens),
        },
        "agreement": agreement,
    }


def peak_memory(options: argparse.Namespace, variant: str) -> dict[str, int]:
    """Peak bytes of one step of `variant`; runs in a process of its own, which loads only what that step needs.

    CUDA: `torch.cuda.max_memory_allocated`. CPU: the peak resident set, weights and libraries included, counted from
    after loading where the system can reset it (Linux). `before` is the same measure as the step begins.
    """
    prepare(options)
    module = load_module(options)
    rows = batch_rows(options, vocabulary_of(module.language_model))[0]
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE) if options.with_optimizer else None
    if variant == "ours":  # any log-probs do: memory does not depend on them
        batch = move(tree_batch(rows, {row.bundle_id: ReferenceRow(0.0, 0.0) for row in rows}), options.device)
        step = partial(our_step, module, batch)
    else:
        step = partial(their_step, module, load_reference(options), move(padded(rows), options.device))
    before = reset_peak(options.device)
    step()
    if optimizer is not None:
        optimizer.step()
    peak = read_peak(options.device)
    return {"peak_bytes": peak, "before_bytes": before, "step_bytes": peak - before}


def reset_peak(device: str) -> int:
    """Reset the peak where that is possible; returns the peak after that."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # resets VmHWM
    return read_peak(device)


def read_peak(device: str) -> int:
    """Peak bytes of this process since the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
    ours, theirs, ratio, agreement = (result[key] for key in ("ours", "theirs", "ratio", "agreement"))
    asked = ("model", "device", "dtype", "layer", "bundles", "repeats", "threads", "with_optimizer")
    print("  ".join(f"{key}={result[key]}" for key in asked))
    print(f"{'':24}{'ours':>12}{'theirs':>12}{'ratio':>8}")

    def line(title: str, key: str, unit: float, form: str) -> None:
        print(f"{title:24}{ours[key] / unit:>12{form}}{theirs[key] / unit:>12{form}}{ratio[key]:>8.2f}")

    line("seconds, median", "seconds_median", 1, ".3f")
    if result["device"] == "cpu":
        line("CPU seconds, median", "cpu_seconds_median", 1, ".3f")
    line("tokens forwarded", "tokens_forwarded", 1, ".0f")
    line("peak memory, MB", "peak_bytes", 1e6, ".0f")
    line("  of it the step's, MB", "step_bytes", 1e6, ".0f")
    for name, value in ours["losses"].items():
        print(f"{'loss ' + name:24}{value:>12.6f}{theirs['losses'][name]:>12.6f}")
    for kind in ("loss", "gradient"):
        parts = agreement[f"{kind}_relative"].items()
        allowed = agreement["tolerance"]
        text = (f"{name} {value:.1e} (allowed {allowed.get(name, allowed['loss']):.0e})" for name, value in parts)
        print(f"relative difference of each {kind}: " + ", ".join(text))
    print("time ratio of each pair: " + " ".join(f"{value:.2f}" for value in ratio["seconds_pairs"]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line -> options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hugging Face folder (default: {MODEL_NAME}, prepared as the quickstart does)")
    parser.add_argument("--bundles", type=int, default=1, help="bundles per step (default: 1, the published value)")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs of steps, each on bundles of its own")
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
    """Run it; 0 if both steps agree, else 1."""
    options = parse(arguments)
    # Before this process takes memory on the device.
    memory = {variant: in_child(peak_memory, options, variant) for variant in ("ours", "theirs")}
    prepare(options)
    result = {
        "model": options.model,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "dtype": options.dtype,
        "bundles": options.bundles,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "with_optimizer": options.with_optimizer,
        "torch": torch.__version__,
        "prompt_tokens_per_bundle": PROMPT_TOKENS,
        "preference_tokens_per_bundle": PREFERENCE_TOKENS,
        "memory_measure": "max_memory_allocated" if options.device == "cuda" else "peak resident set",
    } | compare_and_time(options)
    for variant, figures in memory.items():
        result[variant] |= figures
    for measure in ("peak_bytes", "step_bytes"):
        result["ratio"][measure] = memory["theirs"][measure] / max(memory["ours"][measure], 1)
    show(result)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result["agreement"]["equal"]:
        print("the two steps disagree: their times cannot be compared", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
