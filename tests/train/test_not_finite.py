"""A step whose loss or gradients are not finite has not happened, at every ZeRO stage and in both types."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from mlc_ray.errors import MlcRayError
from mlc_ray.train.divergence import DivergedError
from mlc_ray.train.loop import Progress, _with_telling_gradient
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, steps_of, tiny_config, whole_weights

STEPS = 4
LORA = {"rank": 4, "dropout": 0.5, "target_modules": "all-linear"}
RUNS = {
    f"stage{stage}_{dtype}": {
        "engine": {"stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
        "model": {"dtype": dtype},
    }
    for stage in (0, 1, 2, 3)
    for dtype in ("float32", "bfloat16")
}
RUNS["stage2_offload"] = {"engine": {"stage": 2, "offload_optimizer": True}}
RUNS["dropout"] = {"engine": {"stage": 2}, "model": {"lora": LORA}}
RUNS["torch_ddp"] = {"engine": {"name": "examples.my_engine:TorchDdp", "stage": None}}
LOCAL = {"step_seconds", "tokens_per_second", "tflops_per_second", "data_wait_seconds", "peak_memory_gib", "retries"}


def config_of(name):
    config = {**RUNS[name], "objective": {"loss": "simpo"}, "checkpoint": {"every": 1}, "optimizer": {"max_retries": 2}}
    return tiny_config(**config)


@dataclass
class Poison:
    """Makes the gradient of the first block's output NaN in the forwards that are listed, or in all from one on."""

    forwards: set = field(default_factory=set)
    always: bool = False
    seen: int = 0

    def __call__(self, block, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        self.seen += 1
        if hidden.requires_grad and (self.always or self.seen in self.forwards):
            hidden.register_hook(lambda gradient: gradient * math.nan)


def numbers(history):
    return [{name: value for name, value in row.items() if name not in LOCAL} for row in history]


def undisturbed(rank, name):
    """History, and the weights after three steps."""
    torch.manual_seed(rank)
    config, weights = config_of(name), {}
    engine = make_engine(config)

    def save(progress, metrics):
        state = whole_weights(engine)
        if progress.step == 3 and state is not None:
            weights.update(state)

    _, history = run_engine(config, random_rows(7), STEPS, engine=engine, save=save)
    return numbers(history), weights


def disturbed(rank, name):
    """The first micro-batch of step 2 is poisoned once, on the last worker alone; from step 4 on, everything is."""
    torch.manual_seed(rank)
    config, progress, saved, history = config_of(name), Progress(), [], []
    engine = make_engine(config)
    poison = Poison()
    engine.module.language_model.get_decoder().layers[0].register_forward_hook(poison)

    def save(at, metrics):
        history.append({"step": at.step, **metrics})
        saved.append(at.step)
        if rank == engine.world_size - 1:
            poison.forwards = {poison.seen + 1} if at.step == 1 else set()
            poison.always = at.step == 3

    try:
        run_engine(config, random_rows(7), STEPS, engine=engine, save=save, progress=progress)
        message = None
    except DivergedError as error:
        message = str(error)
    where = (progress.step, progress.bundles)
    retries = [row["retries"] for row in history]
    ids = [name for batch in list(steps_of(config, random_rows(7), rank, engine.world_size))[3]
           for name, weight in zip(batch.bundle_ids, batch.weight.tolist(), strict=True) if weight]  # fmt: skip
    return numbers(history), whole_weights(engine), saved, message, where, retries, ids


def everything(rank):
    return {name: (undisturbed(rank, name), disturbed(rank, name)) for name in RUNS}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return on_workers(2, everything, tmp_path_factory.mktemp("poisoned"))


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_fails_once_is_tried_again_and_changes_nothing(name, done):
    for worker in done:
        (expected, weights), (history, found, _, _, where, retries, _) = worker[name]
        assert history == expected[:3]
        assert retries == [0, 1, 0]
        assert where == (3, 11)
        for key, value in weights.items():
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_fails_every_time_ends_the_run_before_it_is_saved(name, done):
    bundles = [bundle for worker in done for bundle in worker[name][1][-1]]
    assert len(bundles) == 3  # the last batch of an epoch
    for worker in done:
        _, _, saved, message, _, _, _ = worker[name][1]
        assert saved == [1, 2, 3]
        assert message == done[0][name][1][3]
        assert message.startswith(
            "step 4: the loss or its gradients are not finite, after 3 tries (optimizer.max_retries=2), with bundles "
            f"{', '.join(bundles)}. "
        )
        assert "lower optimizer.learning_rate" in message
        assert ("use model.dtype=float32" in message) == ("bfloat16" in name)
    assert issubclass(DivergedError, MlcRayError)


@pytest.mark.parametrize(("value", "finite"), [(2.0, True), (0.0, False)])
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not(value, finite):
    """A loss that is infinite at 0, with gradient 0."""
    plain, told = (torch.tensor([value], requires_grad=True) for _ in range(2))
    for x, tell in ((plain, lambda loss, log_probs: loss), (told, _with_telling_gradient)):
        loss = torch.where(x > 0, -x.log() if finite else x, math.inf).mean()
        tell(loss, -x).backward()
    assert plain.grad.isfinite()
    assert torch.equal(told.grad, plain.grad) if finite else told.grad.isnan()
