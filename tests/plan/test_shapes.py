"""Shapes: the arithmetic counts what modules have, for every published shape."""

import pytest

from mlc_ray.cli import main
from mlc_ray.plan.shapes import ShapeError, config_of, counted, published, published_config, shape_of
from mlc_ray.storage import HubError

PUBLISHED = {  # what model cards and reports say, in billions
    "smollm2-135m": 0.1345, "gemma-3-270m": 0.268, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62, "qwen2.5-14b": 14.77, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71, "gemma-2-2b": 2.61,
    "gemma-2-9b": 9.24, "gemma-2-27b": 27.23, "llama-3.2-1b": 1.24, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55,
    "qwen3-30b-a3b": 30.53,
}  # fmt: skip


@pytest.mark.parametrize("name", list(published()))
def test_the_arithmetic_counts_what_modules_have(name):
    config, _ = config_of(name)
    assert shape_of(config, name).parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=5e-3)
    # All blocks are alike; making 80 of them takes a second even where they have no memory.
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    shape = shape_of(config, name)
    exact = counted(shape, config)
    assert (shape.parameters, shape.block) == (exact.parameters, exact.block)


def test_a_shape_is_found_by_the_end_of_its_name_and_by_the_hub_s():
    assert config_of("72b")[0].hidden_size == 8192
    assert config_of("Qwen/Qwen2.5-7B-Instruct")[0].hidden_size == 3584
    assert published_config("acme/8b") is None, "a model of another owner"
    assert config_of("meta-llama/Llama-3.1-8B-Instruct")[0].num_hidden_layers == 32


def test_an_unknown_shape_names_those_that_there_are(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ShapeError, match=r"qwen2\.5-72b"):
        config_of(str(tmp_path))


def test_a_size_that_no_published_shape_has_names_those_that_there_are():
    with pytest.raises(ShapeError, match=r"'671b' is the size of no published shape; name one of .*qwen2\.5-72b"):
        config_of("671b")


def test_what_transformers_cannot_build_is_an_error_of_the_shape():
    config, name = config_of("qwen2.5-0.5b")
    shape = shape_of(config, name)
    config.hidden_act = "none-such"
    with pytest.raises(ShapeError, match=r"'qwen2\.5-0\.5b': transformers cannot build .*none-such"):
        counted(shape, config)


def test_quantised_weights_are_not_planned_as_plain_ones(tmp_path, capsys):
    config, _ = config_of("qwen2.5-0.5b")
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    assert main(["plan", "--config", "recipe:quickstart", "--shape", str(tmp_path), "--gpus", "1"]) == 2
    assert "are quantised, whose memory is not planned" in capsys.readouterr().err


def test_a_shape_that_nobody_has_is_answered_by_those_that_are_published(monkeypatch, capsys):
    def unknown(path):
        raise HubError(f"{path!r}: the hub cannot be reached")

    monkeypatch.setattr("mlc_ray.plan.shapes.pinned_model", unknown)
    asked = ["plan", "--config", "recipe:quickstart", "--gpus", "1", "--shape"]
    assert main([*asked, "qwen-72b"]) == 2
    assert "'qwen-72b' is none of smollm2-135m, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*asked, " "])
    assert "--shape: it is empty" in capsys.readouterr().err
