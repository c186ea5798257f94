"""examples/my_engine.py, an engine from outside the package, trains as DeepSpeed does.

That it goes on exactly, from DeepSpeed's checkpoints too, is tested in tests/train/test_checkpoint.py.
"""

import pytest
import torch

from mlc_ray.config import ConfigError, parse_config
from mlc_ray.config.train import TrainConfig
from mlc_ray.train.engines.base import TrainingEngineError
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, tiny_config, whole_weights

NAME = "examples.my_engine:TorchDdp"
ENGINES = {"deepspeed": {"stage": 0}, "mine": {"name": NAME, "stage": None}}
ONLINE = {"reference": "online"}  # the engine's own reference too


def config_of(engine):
    return tiny_config(engine=ENGINES[engine], optimizer={"learning_rate": 1e-3}, **ONLINE)


def train(rank):
    results = {}
    for name in ENGINES:
        engine, history = run_engine(config_of(name), random_rows(7), 4)
        results[name] = history, whole_weights(engine)
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return on_workers(2, train, tmp_path_factory.mktemp("engines"))[0]


def test_it_trains_as_deepspeed_does(trained):
    (history, weights), (expected, whole) = (trained[name] for name in ("mine", "deepspeed"))
    for row, want in zip(history, expected, strict=True):
        for name in ("loss/total", "loss/alignment", "gradient_norm"):
            # Weights that differ by their rounding, 1e-7, move the norm of this model's gradient by up to 1.6e-6.
            later = name == "gradient_norm" and row["step"] > 1
            assert row[name] == pytest.approx(want[name], rel=5e-6 if later else 1e-6), name
    assert set(weights) == set(whole)
    for key, value in whole.items():
        assert torch.allclose(weights[key], value, rtol=2e-7, atol=2e-7), key


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
