"""Utility: general ability of a model, by lm-evaluation-harness; results in `utility.json`.

The harness (package `lm-eval`) loads tasks and counts. What it asks goes to a pool of engines (`generate.pool`), as
prompts of scores do. By plain transformers it asks by itself, in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from mlc_ray.checkpoints import verify_weights
from mlc_ray.cluster import check_fits, connect, use_gpu, with_dtype
from mlc_ray.config import PLAIN_CHAT, UtilityConfig
from mlc_ray.device import resolved
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, Warm, check_positions, engine_environment
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part
from mlc_ray.monitoring import told_of
from mlc_ray.runs import KEPT_FOLDER, UTILITY_FILE, chat_of, output_folder, pinned_weights
from mlc_ray.score.kept import Kept
from mlc_ray.score.plan import counted
from mlc_ray.score.results import ScoresFileError, load_scores
from mlc_ray.storage import Place, fingerprint_model, installed_engines, library_versions, local_model, scratch_folder
from mlc_ray.utility.file import Utility, UtilityError, UtilityRow, load_utility, save_utility
from mlc_ray.utility.stage import ASKED, SAID, Completer

logger = logging.getLogger(__name__)

LOG_FILE = "utility.log"
_LAST_LINES = 12
_HF_BATCH = "8"
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


def measure_utility(config: UtilityConfig, pool: EnginePool | None = None) -> Utility:
    """Run the harness on `config.tasks` and write its results into `utility.json`; returns all that the file then has.

    The file goes into the score folder, or into a new folder under `output_dir`. Results of other tasks that it has
    already are kept; those of the same task are replaced.

    Args:
        config: What to measure.
        pool: Engines that are up (`open_pool`); they are given the model's weights, and stay open. By default engines
            are started, and end after it.

    Raises:
        UtilityError: The harness is not installed, or fails (what it said is in `utility.log`), engines fail on a
            question, the score folder is of another model, `pool` was opened for other settings, or there is one with
            `backend: hf`; or see `with_chat`.
        ModelPathError, IncompleteArtifactError: There is no model, or its weights are damaged.
        EngineError: It has fewer positions than `engine.max_model_len`, or an engine does not start.
        ClusterError: The cluster can never hold the engines.
        EngineDiedError: Engines die, hang or fail whatever is done.
    """
    if config.backend == "hf" and pool is not None:
        raise UtilityError("backend='hf' asks no pool of engines; set backend=vllm, or leave pool out")
    _require_harness()
    model = pinned_weights(config.model)
    verify_weights(model)
    check_positions(model, config.engine)
    config = with_chat(config, model)
    name = fingerprint_model(model)
    folder = _folder(config, name)
    told_of(run=folder.name)
    earlier = load_utility(folder) if (folder / UTILITY_FILE).is_file() else None
    if earlier is not None and earlier.fingerprint != name:
        raise UtilityError(
            f"{str(folder / UTILITY_FILE)!r} is of another model, {earlier.resolved!r}; remove it, or leave out scores"
        )
    logger.info("lm-evaluation-harness: %s; its output goes to %s", ", ".join(config.tasks), folder / LOG_FILE)
    run = _by_transformers if config.backend == "hf" else partial(_by_pool, pool=pool, fingerprint=name)
    rows = rows_of(run(config, model, folder / LOG_FILE), config)
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
    (Place(folder) / KEPT_FOLDER).remove()
    return utility


def with_chat(config: UtilityConfig, model: str) -> UtilityConfig:
    """`config` with the conversation that questions stand in: if it says none, the one that its model was trained in.

    Raises:
        UtilityError: transformers run `model`, and its chat template writes today's date, which only engines are told.
        TemplateError: The chat template does not use what it is given, or transformers run a model that has none.
    """
    if not config.chat_template:
        return config
    chat = chat_of(config.chat, config.model)
    if config.backend == "hf" or chat.arguments or chat.system is not None:
        from mlc_ray.data.tokens import ChatTemplate, load_tokenizer  # takes 4 s

        tokenizer = load_tokenizer(model, trust_remote_code=config.engine.trust_remote_code)
        if config.backend == "hf" and "strftime_now" in (tokenizer.chat_template or ""):
            raise UtilityError(
                f"model={config.model!r}: its chat template writes today's date, so that backend='hf' would ask other "
                "questions tomorrow; set backend=vllm, or chat_template=false"
            )
        ChatTemplate(tokenizer, chat, prompts_only=True)
    return config.model_copy(update={"chat": chat})


def open_pool(config: UtilityConfig) -> EnginePool:
    """Engines with the weights of `config.model`, for several measurements: `measure_utility(config, pool)`.

    One of another model, with the same settings of `engine`, swaps and proves its weights (`generate.swap`) instead of
    starting an engine. Close the pool when done; it is a context manager.

    Raises:
        MlcRayError: As `measure_utility`, before anything is asked.
    """
    if config.backend == "hf":
        raise UtilityError("backend='hf' has no pool of engines; set backend=vllm")
    model = pinned_weights(config.model)
    verify_weights(model)
    return _opened(config, model, Warm())


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
                    chat=None if config.chat is None else config.chat.model_dump(mode="json"),
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
    """Where transformers run the model: they look for CUDA unless the setting says otherwise."""
    import torch  # takes seconds

    found: Device = "gpu" if torch.cuda.is_available() else "cpu"
    if (config.accelerator, found) == ("gpu", "cpu"):
        raise UtilityError(
            "accelerator='gpu', but torch finds no CUDA device here; set accelerator=cpu or auto, or install torch "
            "for CUDA where there is a GPU"
        )
    return found if config.accelerator == "auto" else config.accelerator


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


def _by_pool(
    config: UtilityConfig, model: str, log: Path, *, pool: EnginePool | None, fingerprint: str
) -> dict[str, Any]:
    """The harness's results, by a pool of engines. What the harness logs goes to `log` too."""
    handler = logging.FileHandler(log, encoding="utf-8")  # behind what an earlier measurement said
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(min(level or logging.INFO, logging.INFO))
    harness.addHandler(handler)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable

        from mlc_ray.utility.model import PooledLM

        manager = TaskManager(include_path=_task_folder(config))
        tasks = manager.match_tasks(config.tasks)
        if unknown := [name for name in config.tasks if not manager.match_tasks([name])]:
            raise UtilityError(
                f"tasks has {unknown[0]!r}, which lm-evaluation-harness does not have; `python -m lm_eval ls tasks` "
                "lists those that it has, and include_path adds your own"
            )
        with _opened(config, model) if pool is None else nullcontext(pool) as engines, _random_state_kept():
            _serve(engines, config, model)
            lm = PooledLM(
                engines,
                model,
                max_length=config.engine.max_model_len,
                chat=config.chat or PLAIN_CHAT,
                # A folder of its own is another one the next time: nobody would look there for what was answered.
                kept=None if config.scores is None else _kept(engines, fingerprint, log.parent),
                trust_remote_code=config.engine.trust_remote_code,
            )
            found = simple_evaluate(
                lm,
                tasks=tasks,
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                apply_chat_template=config.chat_template,
                system_instruction=None if config.chat is None else config.chat.system,
                task_manager=manager,
                log_samples=False,
            )
        return dict(json.loads(json.dumps(found, default=handle_non_serializable)))
    except MlcRayError:
        raise
    except Exception as error:  # whatever a task's own code raises
        harness.exception("it failed")
        raise UtilityError(
            f"lm-evaluation-harness failed by {type(error).__name__}: {error}; where, is in {str(log)!r}"
        ) from error
    finally:
        harness.removeHandler(handler)
        harness.setLevel(level)
        handler.close()


def _kept(pool: EnginePool, fingerprint: str, folder: Path) -> Kept:
    """What is there of a measurement of the same model by the same engines that ended early."""
    by = [fingerprint, *pool.part.settings["settings"].computing, installed_engines()]
    return Kept(Place(folder), "utility", by, ASKED.names, SAID)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The harness seeds the process, since some tasks draw from it; the caller's numbers go on where they were."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def _opened(config: UtilityConfig, model: str, warm: Warm | None = None) -> EnginePool:
    connect(config.address, config.env)
    device: Device = "gpu" if use_gpu(config.accelerator) else "cpu"
    part = _part(config, model, device, warm)
    check_fits("engine (replicas x cpus_per_replica)", part.places(device))
    return EnginePool.open(part, device)


def _part(config: UtilityConfig, model: str, device: Device, warm: Warm | None) -> Part:
    engine = with_dtype(config.engine, gpu=device == "gpu")
    settings = {"model": model, "settings": engine, "device": device, "warm": warm}
    return Part("utility", Completer, settings, counted(engine, device))


def _serve(pool: EnginePool, config: UtilityConfig, model: str) -> None:
    """Have the pool serve the model.

    Raises:
        UtilityError: it was opened for something else.
    """
    own = _part(config, model, pool.device, pool.part.settings.get("warm"))
    if (own.stage, {**own.settings, "model": None}) != (pool.part.stage, {**pool.part.settings, "model": None}):
        raise UtilityError("the pool was opened for other settings of engine, or is no pool of `utility.run.open_pool`")
    if pool.weights != model:
        pool.swap(model)


def _by_transformers(config: UtilityConfig, model: str, log: Path) -> dict[str, Any]:
    """The harness's own results file, as read. All that the process prints goes to `log`."""
    device = _device(config)
    with scratch_folder() as scratch:
        command = [*harness_command(config, model, device), "--output_path", str(scratch / "results")]
        environment = {**os.environ, **engine_environment(config.engine, device)}
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
    """The harness's command line where transformers run the model, without where its results go."""
    engine = config.engine
    arguments: dict[str, Any] = {"pretrained": local_model(model), "dtype": resolved(engine.dtype, gpu=device == "gpu")}
    if engine.trust_remote_code:
        arguments["trust_remote_code"] = True
    if config.chat is not None and config.chat.arguments:
        arguments["chat_template_args"] = config.chat.arguments
    arguments["max_length"] = engine.max_model_len
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", json.dumps(arguments), "--tasks", ",".join(config.tasks)]
    command += ["--batch_size", _HF_BATCH, "--device", "cpu" if device == "cpu" else "cuda:0"]
    if config.limit is not None:
        command += ["--limit", str(config.limit)]
    if config.num_fewshot is not None:
        command += ["--num_fewshot", str(config.num_fewshot)]
    if config.chat_template:
        command.append("--apply_chat_template")
    if config.chat is not None and config.chat.system is not None:
        command += ["--system_instruction", config.chat.system]
    if (folder := _task_folder(config)) is not None:
        command += ["--include_path", folder]
    return command


def _task_folder(config: UtilityConfig) -> str | None:
    if config.include_path is None:
        return None
    folder = Path(config.include_path).expanduser().absolute()
    if not any(folder.rglob("*.yaml")):
        raise UtilityError(f"include_path={config.include_path!r} holds no task file (*.yaml)")
    return str(folder)
