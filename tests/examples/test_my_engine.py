"""examples/my_engine.py, an engine from outside the package, trains as DeepSpeed does and goes on exactly."""

import pytest
import torch

from mlc_ray.config import ConfigError, parse_config
from mlc_ray.config.train import TrainConfig
from mlc_ray.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from mlc_ray.train.engines.base import TrainingEngineError
from tests.train.test_checkpoint import tokenizer
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, tiny_config, wrapped

NAME = "examples.my_engine:TorchDdp"
ENGINES = {"deepspeed": {"stage": 0}, "mine": {"name": NAME, "stage": None}}
ONLINE = {"reference": "online"}  # the engine's own reference too
FINGERPRINTS = {"tokens": "t"}


def config_of(engine):
    return tiny_config(engine=ENGINES[engine], checkpoint={"every": 2}, optimizer={"learning_rate": 1e-3}, **ONLINE)


def train(rank, folder):
    results = {}
    for name in ENGINES:
        config = config_of(name)
        engine = make_engine(config)

        def save(progress, metrics, config=config, engine=engine, name=name):
            if name == "mine":
                save_checkpoint(
                    folder / "run", engine=engine, tokenizer=tokenizer(), config=config, progress=progress,
                    fingerprints=FINGERPRINTS,
                )  # fmt: skip

        _, history = run_engine(config, random_rows(7), 4, engine=engine, save=save)
        results[name] = history, engine.full_weights()
    return results


def go_on(rank, run):
    config = config_of("mine")
    engine = make_engine(config, wrapped(config, seed=9))
    checkpoint = find_checkpoint(run, "checkpoint_000002")
    progress = load_checkpoint(checkpoint, engine=engine, config=config, fingerprints=FINGERPRINTS)
    _, history = run_engine(config, random_rows(7), 4, engine=engine, progress=progress)
    return [row["loss/total"] for row in history], engine.full_weights()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    first = on_workers(2, train, folder / "first", folder)
    return first, {n: on_workers(n, go_on, folder / f"again-{n}", folder / "run") for n in (1, 2, 3)}


def test_it_trains_as_deepspeed_does(trained):
    (history, weights), (expected, whole) = (trained[0][0][name] for name in ("mine", "deepspeed"))
    for row, want in zip(history, expected, strict=True):
        for name in ("loss/total", "loss/alignment", "gradient_norm"):
            # Weights that differ by their rounding, 1e-7, move the norm of this model's gradient by up to 1.6e-6.
            later = name == "gradient_norm" and row["step"] > 1
            assert row[name] == pytest.approx(want[name], rel=5e-6 if later else 1e-6), name
    assert set(weights) == set(whole)
    for key, value in whole.items():
        assert torch.allclose(weights[key], value, rtol=2e-7, atol=2e-7), key


def test_it_goes_on_from_its_checkpoint_exactly(trained):
    (history, weights), (losses, resumed) = trained[0][0]["mine"], trained[1][2][0]
    assert losses == [row["loss/total"] for row in history][2:]
    for key, value in weights.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("workers", [1, 3])
def test_it_goes_on_with_another_number_of_workers(workers, trained):
    (history, weights), (losses, resumed) = trained[0][0]["mine"], trained[1][workers][0]
    assert losses == pytest.approx([row["loss/total"] for row in history][2:], rel=1e-6)
    for key, value in weights.items():
        assert float((resumed[key] - value).norm() / value.norm()) < 1e-6, key


def test_its_settings_are_its_own():
    raw = {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
    config = parse_config(TrainConfig, {**raw, "engine": {"name": NAME, "bucket_mb": 5}})
    assert config.model_dump()["engine"] == {"name": NAME, "bucket_mb": 5}
    with pytest.raises(ConfigError, match=r"engine\.stage=2: no such field \(valid here: bucket_mb, name\)"):
        parse_config(TrainConfig, {**raw, "engine": {"name": NAME, "stage": 2}})
    with pytest.raises(
        ConfigError, match=r"engine\.bucket_mb=2: no such field; did you mean 'bucket_size'.*persistence_threshold"
    ):
        parse_config(TrainConfig, {**raw, "engine": {"bucket_mb": 2}})
    with pytest.raises(ConfigError, match=r"no engine is called 'deepsped'; did you mean 'deepspeed'"):
        parse_config(TrainConfig, {**raw, "engine": {"name": "deepsped"}})


def test_it_refuses_what_it_cannot_train():
    with pytest.raises(TrainingEngineError, match=r"model\.dtype='bfloat16'"):
        make_engine(tiny_config(engine=ENGINES["mine"], model={"dtype": "bfloat16"}))
