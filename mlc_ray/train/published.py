"""The weights of a checkpoint as they are published, a plain Hugging Face folder, file by file.

The model is never whole on one machine: weights are gathered one after another, and a file's are dropped when it is
written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from mlc_ray.storage import scratch_folder
from mlc_ray.train.engines.base import Engine, each_once
from mlc_ray.train.tensor_files import Parts, parts_of

FILE_BYTES = 2**30
"""The most that a file of `model/` holds, but for one weight or, where transformers merges weights as it loads them
(experts), one block that is larger."""

_POLICY, _EXTRACTOR = "policy.", "extractor."


def published_files(engine: Engine, beside: Sequence[tuple[str, Parts]], *, lora: bool) -> Iterator[tuple[str, Parts]]:
    """Names and contents of the extractor's file (if there is one), and those in `model/`, or with `lora` `adapter/`.

    Every worker goes through all of them; rank 0 alone gets any. `beside` the weights are `small_files`.
    """
    extractor: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    model = None if lora else _Model(engine)
    for name, value in engine.weights(trainable_only=lora):
        copy = value.to("cpu", copy=True)
        if name.startswith(_EXTRACTOR):
            extractor[name.removeprefix(_EXTRACTOR)] = copy
        elif model is None:
            adapter[name.removeprefix(_POLICY)] = copy
        else:
            yield from model.add(name.removeprefix(_POLICY), copy)
        del copy
    if engine.rank == 0:
        if extractor:
            yield "extractor.safetensors", parts_of(extractor)
        yield from _adapter(engine.module.policy, adapter) if model is None else model.index()
        yield from beside


def published_bytes(engine: Engine, *, lora: bool) -> int:
    """Bytes of all these weights."""
    return sum(_bytes(engine, value) for _, value in each_once(engine.module, trainable_only=lora))


class _Model:
    """Collects weights into the files that they belong to."""

    def __init__(self, engine: Engine) -> None:
        self.policy: Any = engine.module.policy
        nothing: dict[str, Tensor] = {}
        merged = revert_weight_conversion(self.policy, nothing) is not nothing
        own = [
            (name, value) for name, value in each_once(engine.module, trainable_only=False) if name.startswith(_POLICY)
        ]
        self.files: dict[str, int] = {}
        number = size = 0
        for _, unit in groupby(own, key=lambda each: _block_of(each[0]) if merged else each[0]):
            together = list(unit)
            more = sum(_bytes(engine, value) for _, value in together)
            if size and size + more > FILE_BYTES:
                number, size = number + 1, 0
            size += more
            self.files |= {name.removeprefix(_POLICY): number for name, _ in together}
        self.count = number + 1
        self.left = [list(self.files.values()).count(number) for number in range(self.count)]
        self.held: dict[int, dict[str, Tensor]] = {}
        self.map: dict[str, str] = {}
        self.bytes = 0

    def add(self, name: str, value: Tensor) -> Iterator[tuple[str, Parts]]:
        """The file that this weight completes, if it does."""
        number = self.files[name]
        self.held.setdefault(number, {})[name] = value
        self.left[number] -= 1
        if self.left[number] == 0:
            weights = revert_weight_conversion(self.policy, self.held.pop(number))
            file = "model.safetensors" if self.count == 1 else f"model-{number + 1:05d}-of-{self.count:05d}.safetensors"
            self.map |= dict.fromkeys(weights, file)
            self.bytes += sum(weight.nbytes for weight in weights.values())
            yield f"model/{file}", parts_of(weights, of_model=True)

    def index(self) -> Iterator[tuple[str, Parts]]:
        """Where there are several files, the one that says which weight is in which."""
        if self.count > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": self.map}
            yield "model/model.safetensors.index.json", [json.dumps(index, indent=2).encode()]


def _adapter(policy: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Parts]]:
    from peft import get_peft_model_state_dict

    named = get_peft_model_state_dict(policy, state_dict=dict(weights))
    yield "adapter/adapter_model.safetensors", parts_of(named, of_model=True)


def small_files(policy: Any, tokenizer: PreTrainedTokenizerBase, *, lora: bool) -> list[tuple[str, Parts]]:
    """What transformers and peft write beside weights: the same at every step, so made once, before training.

    At a step, a temporary folder on a full /tmp would end the worker.
    """
    target = "adapter" if lora else "model"
    with scratch_folder() as scratch:
        policy.save_pretrained(scratch, state_dict={})
        tokenizer.save_pretrained(scratch)
        return [
            (f"{target}/{path.relative_to(scratch).as_posix()}", [path.read_bytes()])
            for path in sorted(scratch.rglob("*"))
            if path.is_file() and path.suffix != ".safetensors"
        ]


def _bytes(engine: Engine, value: Any) -> int:
    return int(math.prod(engine.shape(value)) * value.element_size())


def _block_of(name: str) -> str:
    """The name up to the first number in it, which counts blocks."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
