"""Between the first forward and the optimizer's step, the host never waits for the device.

The step runs on the meta device, which has shapes but no values: what would need a value on the host (`.item()`,
`.tolist()`, `.cpu()`, a boolean index) raises there. A dispatch mode sees what travels between host and device, where
a copy that is not `non_blocking`, such as `torch.tensor(..., device=...)`, waits too. Two things are out of its sight:
`torch.linalg.eigvalsh` reads its own status on a GPU, once in a forward that taps; and DeepSpeed's waits, listed in
benchmarks/README.md.
"""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlc_ray.losses.objective import Objective
from mlc_ray.train.attention import TreeAttention, block_mask
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.flops import Work
from mlc_ray.train.loop import _accumulate
from mlc_ray.train.meter import StepMeter
from mlc_ray.train.reference import ReferenceModel, cached_reference
from mlc_ray.train.slow import Stopwatch
from mlc_ray.train.watch import StateWindow, TappedStep
from mlc_ray.types import move
from tests.train.tiny import random_rows, steps_of, tiny_config, tiny_model, wrapped

META = torch.device("meta")
TWO_FORWARDS = {"batch_bundles": 8, "tokens_per_forward": 200}


class Crossings(TorchDispatchMode):
    """Operations that take tensors of one device and give one of another, but for copies that do not wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, got = (
            {leaf.device.type for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor) and leaf.dim()}
            for part in ((args, kwargs), result)
        )
        if given and got - given and not kwargs.get("non_blocking"):
            self.seen.append(str(function))
        return result


class Literals(TorchFunctionMode):
    """Tensors that are made on the device from Python's numbers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.device == META:
            self.seen.append(str(function))
        return result


class OnMeta:
    """What the step needs of an engine, on a device without values."""

    def __init__(self, config):
        self.module, self.device = wrapped(config).to(META), META

    def begin(self, count):
        pass

    def forward(self, batch):
        return self.module(batch)

    def backward(self, loss):
        loss.backward()


def run(config, reference=cached_reference):
    engine, objective = OnMeta(config), Objective(config)
    batches = [
        replace(
            batch, reference_chosen=torch.zeros_like(batch.weight), reference_rejected=torch.zeros_like(batch.weight)
        )
        for batch in next(steps_of(config, random_rows(8), 0, 1))
    ]
    assert len(batches) == 2 and min(len(batch.bundle_ids) for batch in batches) > 2
    meter = StepMeter(TappedStep(512, StateWindow(64)), Work.of(engine.module, Engine.shape), Stopwatch(META))
    with Crossings() as crossings, Literals() as literals:
        _accumulate(engine, objective, objective.factors(0, 1), batches, reference, meter)
    assert all(parameter.grad is not None for parameter in engine.module.parameters())
    return crossings.seen + literals.seen, batches


@pytest.mark.parametrize("layer", [2, "last"])
def test_a_step_waits_for_nothing(layer):
    seen, batches = run(tiny_config(mlc={"layer": layer}, train=TWO_FORWARDS))
    assert batches[0].taps and seen == []


def test_nor_do_terms_that_compare_bundles():
    train = TWO_FORWARDS | {"group_bundles": 4}
    seen, batches = run(tiny_config(train=train, terms={"contrast": {"weight": 0.5}, "variance": {"weight": 0.5}}))
    assert batches[0].groups is not None and seen == []


def test_nor_does_a_step_without_the_term_or_with_a_reference_that_is_asked():
    frozen = ReferenceModel(tiny_model().to(META), layer=2)
    config = tiny_config(train=TWO_FORWARDS, terms={"anchor": {"weight": 0.3}})
    seen, _ = run(config, lambda batch: frozen(batch, state=batch.taps))
    assert seen == []
    seen, batches = run(tiny_config(mlc={"weight": 0}, train={**TWO_FORWARDS, "tokens_per_forward": 100}))
    assert not batches[0].taps and seen == []


@pytest.mark.parametrize("window", [None, 6])
def test_nor_does_the_mask_of_flexattention(window):
    (batch, *_) = next(steps_of(tiny_config(train=TWO_FORWARDS), random_rows(8), 0, 1))
    tree = move(batch, META).tree
    with Crossings() as crossings, Literals() as literals:
        made = block_mask(tree, TreeAttention(tree).paths, window)
    assert made.kv_indices.device == META and crossings.seen + literals.seen == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.bincount(x.long()),
        lambda x: bool(x.any()),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.tensor([1.0, 2.0]).to(x.device),
    ],
)
def test_the_measure_sees_every_way_to_wait(wait):
    with Crossings() as crossings, Literals() as literals:
        try:
            wait(torch.zeros(3, device=META))
        except (RuntimeError, NotImplementedError):
            return
    assert crossings.seen or literals.seen
