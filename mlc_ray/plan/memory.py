"""Memory of a training run by part: what DeepSpeed holds at each ZeRO stage, and what forwards keep.

Sizes are of DeepSpeed 0.19 with the settings of `mlc_ray.train.engines.deepspeed`, and of the ZeRO paper (Rajbhandari
et al. 2020, section 5): with P parameters, T of them trained, W workers and elements of s bytes, a worker holds

    weights      s P, at stage 3 s P / W
    gradients    s T at stages 0 and 1, 4 T / W (float32; 2 with `engine.accumulate_dtype: bfloat16`) at 2 and 3
    master       4 T at stage 0 in bfloat16 (none in float32), 4 T / W at stages 1 to 3
    moments      8 T at stage 0, 8 T / W at stages 1 to 3

A step peaks where its largest forward ends (activations), where gradients are reduced (buckets), or in AdamW: `peak`
compares the sums, and a plan shows the highest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlc_ray.config import TrainConfig
from mlc_ray.plan.activations import (
    Row,
    block_bytes,
    head_bytes,
    kept_bytes,
    table_bytes,
    tap_bytes,
    working_bytes,
)
from mlc_ray.plan.records import Part
from mlc_ray.plan.shapes import Shape

BUCKET, PREFETCH, LIVE, PERSISTENT = 500_000_000, 50_000_000, 1_000_000_000, 100_000
"""DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_prefetch_bucket_size, stage3_max_live_parameters,
stage3_param_persistence_threshold."""

SUB_GROUP = 1_000_000_000
"""DeepSpeed's default of `sub_group_size`, in elements."""

CUDA_CONTEXT = 3 * 2**29
"""Assumed: CUDA's context, cuBLAS workspaces and NCCL's buffers, beside what PyTorch allocates."""

PROCESS = {"cpu": 3 * 2**28, "gpu": 2 * 2**30}
"""A worker with all it imports: 0.7 GB measured on a CPU; with CUDA's libraries assumed."""

RAY, RAY_TRAIN = round(1.6 * 2**30), round(0.8 * 2**30)
"""Measured with Ray 2.60 on a machine of its own: Ray's processes on a head with the command that started it (0.9 and
0.7 GiB); and what Ray Train has for a run beside its workers, a controller of 0.3 GiB and four actors of 0.12."""

HEAP_TENSOR = 32 * 2**20
"""glibc gives the memory of larger tensors back when they are freed (`DEFAULT_MMAP_THRESHOLD_MAX`), and keeps that of
smaller ones."""

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Holding:
    """What decides the memory of a worker, out of the settings and the shape.

    Attributes:
        stage: ZeRO's.
        workers: W.
        size: s, of an element of the model.
        whole: P, the extractor and adapters too.
        trained: T.
        offload_optimizer: whether master, moments and gradients are in the node's memory.
        offload_parameters: whether parameters are, at stage 3.
        secondary: workers that share a second copy of the parameters; 1 where there is none.
        bucket: elements that are reduced at a time.
        prefetch: elements that are gathered ahead.
        live: elements of gathered parameters that may be there at a time beside what is in use.
        again: elements that a checkpointed block gathers a third time: it keeps none from its second forward to its
            backward where `engine.persistence_threshold` is set.
        reference: whether a second model is asked at every step.
        reduced: of an element of a gradient that travels (`engine.reduce_dtype`).
        added: of one that is added up at stages 2 and 3 (`engine.accumulate_dtype`).
        overlaps: whether a second bucket fills while the first is reduced (`engine.overlap_comm`).
        device: what workers compute on.
    """

    stage: int
    workers: int
    size: int
    whole: int
    trained: int
    offload_optimizer: bool
    offload_parameters: bool
    secondary: int
    bucket: int
    prefetch: int
    live: int
    again: int
    reference: bool
    reduced: int
    added: int
    overlaps: bool
    device: Device


def holding_of(config: TrainConfig, shape: Shape, *, workers: int, dtype: str, device: Device) -> Holding:
    """Those of a run with DeepSpeed."""
    engine: Any = config.engine
    extractor = config.mlc.extractor_dim
    head = (shape.hidden + 1) * extractor if extractor is not None else 0
    lora = config.model.lora
    added = head + (shape.adapters(lora.rank, lora.target_modules) if lora is not None else 0)
    keeps_none, extra = engine.persistence_threshold is not None, zero_extra(config)
    # PyTorch ends the second forward of a block before its last product, whose result no gradient needs.
    last = 0 if shape.experts else shape.inner * shape.hidden
    repeated = engine.stage == 3 and keeps_none and config.model.gradient_checkpointing is not False
    return Holding(
        stage=engine.stage,
        workers=workers,
        size=2 if dtype == "bfloat16" else 4,
        whole=shape.parameters + added,
        trained=added if lora is not None else shape.parameters + added,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        secondary=engine.secondary_partition,
        bucket=engine.bucket_size or extra.get("reduce_bucket_size", BUCKET),
        prefetch=engine.prefetch_size or extra.get("stage3_prefetch_bucket_size", PREFETCH),
        live=0 if keeps_none else extra.get("stage3_max_live_parameters", LIVE),
        again=shape.layers * (shape.block - last) if repeated else 0,
        reference=config.needs_reference and config.reference == "online" and lora is None,
        reduced=2 if engine.reduce_dtype == "bfloat16" else 4,
        added=2 if engine.accumulate_dtype == "bfloat16" else 4,
        overlaps=engine.stage >= 2 and engine.overlap_comm is not False,
        device=device,
    )


PLANNED = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters")
"""What a plan reads of `engine.extra.zero_optimization`."""


def zero_extra(config: TrainConfig) -> dict[str, Any]:
    """`zero_optimization` of `engine.extra`, which DeepSpeed reads beside the settings."""
    engine: Any = config.engine
    found: dict[str, Any] = engine.extra.get("zero_optimization", {})
    return found


def states(held: Holding) -> list[Part]:
    """What is there between two steps, but for gradients."""
    s, part = held.size, held.workers if held.stage == 3 else 1
    share = held.workers if held.stage else 1
    where = f" / {part} workers" if part > 1 else ""
    parts = [] if held.offload_parameters else [
        Part("weights", s * held.whole // part, f"{s} B x {held.whole:,} parameters{where}")
    ]  # fmt: skip
    if held.secondary > 1:
        parts.append(
            Part("secondary copy", s * held.whole // held.secondary, f"{s} B x {held.whole:,} / {held.secondary} (hpZ)")
        )
    if held.offload_optimizer:
        return parts
    of = f"{held.trained:,} trained parameters{f' / {share} workers' if share > 1 else ''}"
    if held.stage or s == 2:
        parts.append(Part("master weights", 4 * held.trained // share, f"4 B x {of}"))
    return [*parts, Part("AdamW's moments", 8 * held.trained // share, f"8 B x {of}")]


def reference_part(held: Holding) -> list[Part]:
    """A frozen second model, sharded at stage 3."""
    if not held.reference:
        return []
    part = held.workers if held.stage == 3 else 1
    return [Part("reference", held.size * held.whole // part, f"{held.size} B x {held.whole:,} / {part}")]


def gradients(held: Holding) -> Part:
    """Of a step, once a backward has ended."""
    if held.offload_optimizer and held.stage >= 2:
        return Part("gradients", 0, "in the node's memory")
    if held.stage < 2:  # at stage 1 they are reduced, and offloaded, once the whole backward has ended
        return Part("gradients", held.size * held.trained, f"{held.size} B x {held.trained:,} trained parameters")
    return Part(
        "gradients",
        held.added * held.trained // held.workers,
        f"{held.added} B x {held.trained:,} trained parameters / {held.workers}",
    )


def gathered(held: Holding, shape: Shape) -> Part:
    """At stage 3 the parameters that are whole at a time: DeepSpeed keeps up to `stage3_max_live_parameters`."""
    if held.stage != 3 or held.workers == 1:
        return Part("gathered parameters", 0, "stage 3 gathers from other workers")
    # A block, the embedding or the head at least, and what is fetched ahead.
    least = max(shape.block, shape.embedding)
    elements = min(max(held.live, least + held.prefetch), held.whole)
    return Part("gathered parameters", held.size * elements, f"{held.size} B x {elements:,} live at a time")


def bucket(held: Holding) -> Part:
    """Where gradients are collected: in the model's type at stages 1 and 2, in float32 at 3.

    On a GPU it is there in full, and at stage 2, where communication overlaps, twice; on a CPU, what was written to.
    """
    elements = min(held.bucket, held.trained)
    if held.stage == 0:
        return Part("bucket", 0, "stages 1 to 3 have one")
    size = 4 if held.stage == 3 else held.size
    if held.device == "cpu" and held.stage == 1:
        return Part("bucket", 0, "gradients of stage 1 are reduced where they are")
    if held.device == "cpu":
        return Part("bucket", size * elements, f"{size} B x {elements:,} gradients")
    number = 2 if held.stage == 2 and held.overlaps else 1
    return Part("bucket", number * size * held.bucket, f"{number} x {size} B x {held.bucket:,} (engine.bucket_size)")


def reduction(held: Holding) -> Part:
    """What the reduction of a full bucket takes beside it.

    At stage 2 a flat copy, and at stages 1 and 2 one in the type in which gradients travel, if that is another; at
    stage 3 a flat copy in float32 and this worker's part of what comes back; without ZeRO, gradients of all in the type
    in which they travel.
    """
    elements = min(held.bucket, held.trained)
    travelling = held.reduced if held.reduced != held.size else 0
    if held.stage == 0:
        return Part("reduction", travelling * held.trained, f"{travelling} B x {held.trained:,} gradients that travel")
    if held.stage == 3:
        return Part(
            "reduction", 4 * elements + 4 * elements // held.workers, f"4 B x {elements:,} x (1 + 1 / {held.workers})"
        )
    copies = (held.size if held.stage == 2 else 0) + travelling
    return Part("reduction", copies * elements, f"{copies} B x {elements:,} gradients")


def activations(config: TrainConfig, shape: Shape, row: Row, size: int, kept_share: float = 1.0) -> list[Part]:
    """What the largest forward keeps, and what its backward works with.

    `kept_share` is what a calibration measured of it, in units of what is counted: an allocator's gaps come on top.
    """
    kept = round(kept_share * (kept_bytes(shape, row, config.model, size) + table_bytes(shape, row, size)))
    how = {True: "checkpointed", "selective": "selectively checkpointed", False: "all kept"}
    checkpointing = how[config.model.gradient_checkpointing]
    tapped = tap_bytes(shape, row, config.mlc.extractor_dim, size)
    return [
        Part("activations", kept, f"{kept // max(1, row.tokens):,} B x {row.tokens:,} tokens ({checkpointing})"),
        Part(
            "block in hand",
            round(kept_share * working_bytes(shape, row, config.model, size)),
            "what the backward has of one block",
        ),
        Part("head rows", head_bytes(shape, row, size), f"{row.head:,} rows of {shape.vocabulary:,} logits"),
        Part("tapped states", tapped, f"{row.tapped:,} prompts, extractor of {config.mlc.extractor_dim}"),
    ]


def _of_own(held: Holding) -> Part:
    """Reduced gradients of its part that a worker has at stage 1 beside those of all, which are gone before AdamW."""
    own = held.size * held.trained // held.workers if held.stage == 1 and held.workers > 1 else 0
    return Part("own gradients", own, f"{held.size} B x {held.trained:,} / {held.workers}")


def adamws_copy(held: Holding) -> Part:
    """Flat gradients for AdamW: in the type in which they were added up, and then in float32 where that is another.

    None is made of what is offloaded, nor at stage 2 of a model in bfloat16 whose gradients are added up in float32:
    they lie flat already. Stage 3 has at most `sub_group_size` of them at a time.
    """
    added = held.size if held.stage == 1 else max(held.added, held.size) if held.stage == 3 else held.added
    each = added if added == 4 else added + 4
    elements = held.trained // held.workers
    if held.stage == 3:
        elements = min(elements, SUB_GROUP)
    if held.stage == 0 or held.offload_optimizer or (held.stage == 2 and (held.size, held.added) == (2, 4)):
        each = 0
    return Part("AdamW's copy", each * elements, f"{each} B x {elements:,} flat gradients")


def peak(
    config: TrainConfig,
    shape: Shape,
    held: Holding,
    row: Row,
    *,
    forwards: float,
    kept_share: float = 1.0,
    grown: float = 0.0,
) -> tuple[Part, ...]:
    """The parts where a step is highest; `kept_share` and `grown` as calibrations measure them."""
    acts = activations(config, shape, row, held.size, kept_share)
    grads, live, collected, reduced = gradients(held), gathered(held, shape), bucket(held), reduction(held)
    if held.stage == 2 and held.size == 4 and forwards <= 1:  # nothing is added up: they stay in the bucket
        grads = Part("gradients", 0, "in the bucket")
    base = [*states(held), *reference_part(held), live]
    if held.device == "gpu":
        base.append(Part("CUDA context", CUDA_CONTEXT, "assumed"))
    elif grown:
        plainly = shape.layers * block_bytes(shape, row, held.size) + table_bytes(shape, row, held.size)
        base.append(Part("gaps", round(grown * plainly), f"{grown:.2f} of a forward that keeps all, as measured"))
    stays = held.device == "gpu" or held.stage == 3  # the bucket, also while nothing is reduced
    left = [] if held.device == "gpu" else [_left_on_the_heap(shape, row, acts, held.size)]
    own = _of_own(held)
    phases = [
        [*base, *([grads] if forwards > 1 or held.stage == 3 else []), *([collected] if stays else []), *acts],
        [*base, grads, own, collected, reduced, *left],
        [
            *base,
            own if own.bytes else grads,
            *([collected] if held.stage == 3 else []),
            adamws_copy(held),
            *left,
        ],
    ]
    if 0 < held.bucket < held.trained:  # the first bucket is full while most activations are there
        share = 1 - held.bucket / held.trained
        there = [Part(part.name, round(share * part.bytes), f"{share:.0%} of {part.formula}") for part in acts]
        phases.append([*base, grads, collected, reduced, *there])
    highest = max(phases, key=lambda parts: sum(part.bytes for part in parts))
    return tuple(part for part in highest if part.bytes)


def _left_on_the_heap(shape: Shape, row: Row, acts: list[Part], size: int) -> Part:
    """What a process on a CPU keeps of freed activations."""
    wide = size * shape.inner * max(1, shape.active) * row.tokens
    large = 4 * shape.layers * wide if wide > HEAP_TENSOR else 0
    logits = row.head * size * shape.vocabulary
    left = sum(part.bytes for part in acts if part.name in ("activations", "head rows", "block in hand")) - large
    return Part(
        "freed activations", max(0, left - (logits if logits > HEAP_TENSOR else 0)),
        "tensors below 32 MiB, whose memory glibc keeps for the next forward",
    )  # fmt: skip


def node_parts(
    config: TrainConfig, held: Holding, *, per_node: int, memory: int | None, workers: int = 0, resting: int = 0
) -> tuple[Part, ...]:
    """What a run holds in the memory of a node, which has `memory` bytes.

    Each node is taken for the one on which the command and its controller run. The copy of a checkpoint is there if it
    is asked for, or by `auto` where half of what is free between steps holds it.

    Args:
        config: the run's settings.
        held: what its workers hold.
        per_node: workers of the node.
        memory: bytes that it has; None where that is not known.
        workers: bytes that all of these hold where a step is highest, of workers on CPUs.
        resting: the same between steps.
    """
    share = per_node / held.workers
    each = PROCESS[held.device]
    parts = [
        Part("Ray", RAY, "its processes, and the command"),
        Part("Ray Train", RAY_TRAIN, "a run's controller and actors"),
        Part("processes", per_node * each, f"{each / 2**30:.2f} GiB x {per_node} workers"),
    ]
    if held.offload_optimizer:
        state = round((16 + held.size) * held.trained * share)
        formula = f"{16 + held.size} B x {held.trained:,} x {per_node}/{held.workers}"
        parts.append(Part("offloaded state", state, formula))
    if held.offload_parameters:
        weights = round(held.size * held.whole * share)
        parts.append(Part("offloaded weights", weights, f"{held.size} B x {held.whole:,} x {per_node}/{held.workers}"))
    free = None if memory is None else memory - resting - sum(part.bytes for part in parts)
    if held.device == "gpu" and held.stage != 3 and held.size == 4:  # files in bfloat16 are mapped, and shared
        loading = per_node * held.size * held.whole
        parts.append(Part("loading", loading, f"{held.size} B x {held.whole:,} x {per_node} workers, at the start"))
    if workers:
        parts.append(Part("workers", workers, f"{per_node} workers, as above"))
    copy, asked = round(12 * held.trained * share), config.checkpoint.background
    if asked is True or (asked == "auto" and (free is None or copy <= free / 2)):
        parts.append(Part("checkpoint copy", copy, f"12 B x {held.trained:,} x {per_node}/{held.workers}"))
    return tuple(parts)


def disk_parts(config: TrainConfig, held: Holding, *, steps: int, lora: bool) -> tuple[tuple[Part, ...], int]:
    """What a run writes: checkpoints of weights, master and moments; and the bytes of one."""
    weights = held.size * (held.trained if lora else held.whole)
    one = 12 * held.trained + weights
    every, for_good = config.checkpoint.every, config.checkpoint.keep_every
    number = min(config.checkpoint.keep, -(-steps // every)) if every else 1
    kept = steps // for_good if for_good else 0
    parts = [
        Part("checkpoints", number * one, f"{number} x (12 B x {held.trained:,} of state + {weights:,} B of weights)")
    ]
    if kept:
        parts.append(Part("kept for good", kept * one, f"{kept} x {one:,} B"))
    # The next one is written before the oldest is removed.
    return (*parts, Part("being written", one if every else 0, "before an older one is removed")), one
