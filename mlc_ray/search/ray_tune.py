"""A search on Ray Tune: every trial is a run of `mlc-ray train`, scored at its checkpoints by engines that stay warm.

What all trials share is made once, before the first: token rows, the reference's log-probs, the prompts to score, the
engines, and the baseline (the model as it is). A search folder holds

    search.json      the settings as they were resolved, the layers a probe left, the baseline
    trials/ID/       one run folder a trial, with `scores/step-...` per checkpoint and `model/` when it is done
    tune/            Ray Tune's own state, from which `--resume` goes on
    trials.json, search.md, *.png, best.yaml, best/      what was found (`search.results`)
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search.optuna import OptunaSearch

from mlc_ray.artifacts import fingerprint_model, library_versions, write_json_atomic
from mlc_ray.config import ConfigError, SearchConfig, SearchObjectiveSection, TrainConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.ray_cluster import ClusterError, connect, use_gpu
from mlc_ray.score.generate import Device
from mlc_ray.score.models import resolve_model
from mlc_ray.score.ray_phases import prompts_of, read_benchmarks
from mlc_ray.score.ray_score import check_unparsed, plan_judging
from mlc_ray.score.registry import check_ready, judge_identity
from mlc_ray.score.results import RESPONSES_FILE, ScoreResult, count, load_scores, save_scores
from mlc_ray.search.objective import ANSWERED, HELD_BACK, VALUE, TrialScore, trial_score
from mlc_ray.search.ray_warm import PoolScore, WarmPool, prompts_fingerprint, start_pool
from mlc_ray.search.results import SearchResult, Trial, write_results
from mlc_ray.search.space import Space, distribution, make_space, restrict, values_of
from mlc_ray.train.checkpoint import export, find_checkpoint
from mlc_ray.train.model import model_depth, resolve_layer
from mlc_ray.train.ray_train import prepare_data, train

SEARCH_FILE = "search.json"
FINISHED = "finished"
TRIAL_CPUS = 0.1  # the process of a trial only waits for its workers


class SearchError(MlcRayError):
    """A search cannot start or go on; the message quotes the folder or the setting, and names the fix."""


def search(config: SearchConfig, *, resume: Path | None = None) -> SearchResult:
    """Run the search to its end, or with `resume` go on with the one in that folder; writes and returns what it found.

    Finished trials are not repeated; those that were running go on from their last checkpoint. Raises `ConfigError` for
    a space that no run can have, `ClusterError` for resources that the cluster can never give, `SearchError` for a
    folder that is there already (or, to resume, is not).
    """
    space = make_space(config)
    folder = _claim_folder(config, resume)
    base = space.run(next(iter(space.corners())), name="base", output_dir=str(folder / "trials"))
    connect(base.cluster.address)
    device: Device = "gpu" if use_gpu(base.cluster.accelerator) else "cpu"
    lora_rank = _lora_rank(space)
    check_feasible(config, base, device)

    space, skipped = _probed(config, space, base, folder, device)
    depth = model_depth(base.model.path, trust_remote_code=base.model.trust_remote_code)
    layer = resolve_layer(base.mlc.layer, depth)
    prepare_data(base, cache_dir=folder / "trials" / "cache", layer=layer, gpu=device == "gpu")
    prompts, pool = _warm_pool(config, base, folder, device, lora_rank)
    try:
        shared = Shared(
            config,
            space,
            folder,
            pool,
            prompts_fingerprint(prompts),
            resolve_model(base.model.path),
            lora_rank is not None,
        )
        baseline = shared.baseline()
        write_json_atomic(
            folder / SEARCH_FILE,
            {
                "config": config.model_dump(mode="json", exclude_unset=True),
                "base": base.model_dump(mode="json", exclude_unset=True),
                "skipped_layers": skipped,
                "baseline": vars(baseline),
                "prompts": shared.prompts,
                "versions": library_versions(),
            },
        )
        failed = _tune(config, space, shared, folder, resumed=resume is not None)
    finally:
        pool.close()
    trials = _finished(folder, config)
    if not trials:
        raise SearchError(f"no trial got as far as a score; the first fault: {failed[0] if failed else 'none'}")
    return write_results(folder, config, baseline, trials, skipped_layers=skipped, failed=failed)


# -------------------------------------------------------------------------------------------------- before the trials


def check_feasible(config: SearchConfig, base: TrainConfig, device: Device) -> None:
    """Raise `ClusterError` if the cluster can never hold the trials asked for beside the engines: Ray would only wait.

    Counted per trial: its own process and its workers; once: the engines, the judge, and a little for Ray Data.
    """
    resources = ray.cluster_resources()
    engine, judge = config.scoring.engine, config.scoring.judge
    trial_cpus = TRIAL_CPUS + base.cluster.workers * base.cluster.cpus_per_worker
    engine_cpus = engine.replicas * engine.cpus_per_replica + (judge.engine.cpus_per_replica if judge.is_guard else 0.1)
    needed = config.concurrency * trial_cpus + engine_cpus
    have = resources.get("CPU", 0)
    if needed >= have:
        raise ClusterError(
            f"concurrency={config.concurrency} trials of {trial_cpus:g} CPUs (cluster.workers x "
            f"cluster.cpus_per_worker + {TRIAL_CPUS}) and engines of {engine_cpus:g} need {needed:g} and some for "
            f"Ray Data; the Ray cluster has {have:g}: ask for less, or add nodes"
        )
    if device == "gpu":
        engines = 0 if config.share_gpu else engine.replicas * engine.tensor_parallel
        gpus = config.concurrency * base.cluster.workers + engines
        if gpus > resources.get("GPU", 0):
            raise ClusterError(
                f"concurrency={config.concurrency} trials of {base.cluster.workers} GPUs and {engines} for engines "
                f"need {gpus}; the Ray cluster has {resources.get('GPU', 0):g}: lower concurrency or cluster.workers, "
                "or let engines sleep beside training (share_gpu: true)"
            )
    elif config.share_gpu:
        raise ClusterError("share_gpu=True, but this search runs on CPU, where engines cannot sleep; remove it")


def _lora_rank(space: Space) -> int | None:
    """The largest rank of adapters in the space, None for whole models. Raises `ConfigError` where it has both."""
    loras = [space.run(corner, name="corner").model.lora for corner in space.corners()]
    if any(lora is None for lora in loras) and any(lora is not None for lora in loras):
        raise ConfigError("the space has runs with LoRA adapters and runs without; search them apart")
    ranks = [lora.rank for lora in loras if lora is not None]
    return max(ranks) if ranks else None


def _probed(
    config: SearchConfig, space: Space, base: TrainConfig, folder: Path, device: Device
) -> tuple[Space, list[Any]]:
    """The space without the layers that a probe ranks last, and which those are."""
    if config.probe is None:
        return space, []
    layers = space.parameters["mlc.layer"]
    every = values_of(layers)
    if (folder / SEARCH_FILE).is_file():  # resumed: what was left out then stays out
        skipped = json.loads((folder / SEARCH_FILE).read_text(encoding="utf-8"))["skipped_layers"]
    else:
        from mlc_ray.search.ray_probe import probe_run

        result = probe_run(base, folder / "probe", limit=config.probe.limit, gpu=device == "gpu")
        skipped = sorted(every, key=result.rank_of)[config.probe.keep :]
    kept = [layer for layer in every if layer not in skipped]
    print(f"probe: searching layers {kept} of {every}")
    parameters = {**space.parameters, "mlc.layer": restrict(layers, kept)}
    return replace(space, parameters=parameters), [layer for layer in every if layer in skipped]


def _warm_pool(
    config: SearchConfig, base: TrainConfig, folder: Path, device: Device, lora_rank: int | None
) -> tuple[pa.Table, WarmPool]:
    scoring = config.scoring
    check_ready(scoring.judge, folder / "cache")
    benchmarks = read_benchmarks(scoring, rejects=folder)
    prompts = prompts_of(benchmarks)
    judging = plan_judging(scoring.judge, set(prompts["language"].to_pylist()))
    pool = start_pool(
        resolve_model(base.model.path),
        scoring,
        prompts,
        device=device,
        ways=judging.ways,
        phrase_ways=judging.phrase_ways,
        cache_dir=str(folder / "cache"),
        lora_rank=lora_rank,
        sleeps=config.share_gpu,
        gpus_per_engine=0 if config.share_gpu else None,
    )
    return prompts, pool


def _claim_folder(config: SearchConfig, resume: Path | None) -> Path:
    folder = (Path(config.output_dir).expanduser() / config.name).resolve() if resume is None else resume.resolve()
    if resume is None and folder.exists() and any(folder.iterdir()):
        raise SearchError(
            f"search folder {str(folder)!r} exists already: choose another name, remove it, or go on with "
            f"`mlc-ray search --resume {folder}`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "config.json", config.model_dump(mode="json", exclude_unset=True))
    return folder


# ----------------------------------------------------------------------------------------------------------- the trials


@dataclass(frozen=True)
class Shared:
    """What every trial is given. Sent to the processes of trials and, within `ScoreCheckpoint`, to training workers."""

    config: SearchConfig
    space: Space
    folder: Path
    pool: WarmPool
    prompts: str
    model: str
    lora: bool

    def baseline(self) -> TrialScore:
        """The score of the model as it is: computed once for a search, and read from its folder when it is resumed."""
        folder = self.folder / "baseline"
        if not (folder / "scores.json").is_file():
            scored = self.pool.score(self.model) if not self.lora else self.pool.score("", lora=True)
            write_score(scored, folder, model=self.model, resolved=self.model, shared=self)
        return score_of(load_scores(folder), self.config.objective)


@dataclass(frozen=True)
class ScoreCheckpoint:
    """Called by a run's first worker after every checkpoint: scores it and returns the numbers that Tune compares."""

    shared: Shared

    def __call__(self, run_folder: Path, checkpoint: Path, step: int) -> dict[str, float]:
        """Score `checkpoint`; the score stays in `run_folder/scores/step-...`."""
        folder = run_folder / "scores" / f"step-{step:06d}"
        weights = checkpoint / ("adapter" if self.shared.lora else "model")
        scored = self.shared.pool.score(str(weights), lora=self.shared.lora)
        result = write_score(scored, folder, model=str(checkpoint), resolved=str(weights), shared=self.shared)
        return metrics_of(result, self.shared.config.objective)


class ScoreReports(TuneReportCallback):
    """Hands scores, and nothing else that a run reports, to Tune, whose schedulers count reports."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass on a report that carries a score."""
        if VALUE in metrics[0]:
            super().after_report(run_context, metrics, None)


def write_score(scored: PoolScore, folder: Path, *, model: str, resolved: str, shared: Shared) -> ScoreResult:
    """A warm score as a score folder, which `mlc-ray report` reads.

    Raises `TooManyUnparsedError` when it is written and too few responses got a verdict, as any score does.
    """
    scoring = shared.config.scoring
    judging = plan_judging(scoring.judge, {record.language for record in scored.records})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(scored.responses, folder / RESPONSES_FILE)
    result = count(
        scored.records,
        folder=folder,
        seen_languages=None,
        model=model,
        resolved=resolved,
        fingerprint=fingerprint_model(resolved),
        prompts=shared.prompts,
        judge=judge_identity(scoring.judge),
        measured_by=judging.measured_by,
        finish=dict(Counter(scored.responses["finish"].to_pylist())),
        config={**scoring.model_dump(mode="json"), "seconds": dict(scored.seconds)},
        versions=library_versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    save_scores(result)
    check_unparsed(result, scoring.max_unparsed)
    return result


def score_of(result: ScoreResult, objective: SearchObjectiveSection) -> TrialScore:
    """The worth of a score folder's last summary, which is over all its benchmarks."""
    summary = result.summary()
    rows = [row for row in result.rows if row.benchmark == summary.benchmark]
    return trial_score(summary, rows, objective)


def metrics_of(result: ScoreResult, objective: SearchObjectiveSection) -> dict[str, float]:
    """The numbers of a score that Tune is told."""
    score = score_of(result, objective)
    return {
        VALUE: score.value,
        HELD_BACK: score.held_back,
        ANSWERED: score.answered,
        "score_step": float(int(result.name.rpartition("-")[2])),
    }


def run_trial(values: dict[str, Any], *, shared: Shared) -> None:
    """One trial, in a process of its own: train, scoring at checkpoints; then keep the model and drop the rest."""
    settings: SearchConfig = shared.config
    identity = ray.tune.get_context().get_trial_id()
    trials = shared.folder / "trials"
    folder = trials / identity
    config = shared.space.run(values, name=identity, output_dir=str(trials))
    started = (folder / "config.yaml").is_file()
    if not (folder / "model").exists():
        train(
            config,
            resume=folder if started else None,
            score=ScoreCheckpoint(shared),
            callbacks=[ScoreReports()],
            display=False,
        )
        last = find_checkpoint(folder)
        step = int(json.loads((last / "manifest.json").read_text(encoding="utf-8"))["step"])
        if not (folder / "scores" / f"step-{step:06d}" / "scores.json").is_file():
            # it died between its last checkpoint and the score of it
            ray.tune.report(ScoreCheckpoint(shared)(folder, last, step))
        write_json_atomic(folder / "values.json", values)
        export(folder, folder / "model")
        if not settings.keep_checkpoints:
            shutil.rmtree(folder / "train")
    scores = sorted((folder / "scores").iterdir())
    # Once more, so that a trial which was finished before a stop has a result as well.
    ray.tune.report({**metrics_of(load_scores(scores[-1]), shared.config.objective), FINISHED: True})


def _tune(config: SearchConfig, space: Space, shared: Shared, folder: Path, *, resumed: bool) -> list[str]:
    """Run all trials; returns the last line of the fault of each one that failed."""
    trainable = ray.tune.with_resources(ray.tune.with_parameters(run_trial, shared=shared), {"cpu": TRIAL_CPUS})
    if resumed and ray.tune.Tuner.can_restore(str(folder / "tune")):
        tuner = ray.tune.Tuner.restore(
            str(folder / "tune"), trainable=trainable, resume_unfinished=True, restart_errored=True
        )
    else:
        modes = {"metric": [HELD_BACK, ANSWERED], "mode": ["max", "max"]} if config.objective.pareto else {
            "metric": VALUE, "mode": "max",
        }  # fmt: skip
        tuner = ray.tune.Tuner(
            trainable,
            tune_config=ray.tune.TuneConfig(
                search_alg=OptunaSearch(
                    space={name: distribution(p) for name, p in space.parameters.items()},
                    sampler=make_sampler(config, space),
                    **modes,
                ),
                scheduler=make_scheduler(config),
                num_samples=number_of_trials(config, space),
                max_concurrent_trials=config.concurrency,
            ),
            run_config=ray.tune.RunConfig(name="tune", storage_path=str(folder), verbose=0, callbacks=[TrialLines()]),
        )
    return [str(error).strip().splitlines()[-1] for error in tuner.fit().errors]


def make_sampler(config: SearchConfig, space: Space) -> optuna.samplers.BaseSampler:
    """Optuna's sampler, seeded. The first trials of TPE are random: as many as there are parameters, at least three."""
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=config.seed)
    if config.sampler == "grid":
        names = list(space.parameters)
        grid = space.grid()
        values = {name: list(dict.fromkeys(point[name] for point in grid)) for name in names}
        return optuna.samplers.GridSampler(values, seed=config.seed)
    return optuna.samplers.TPESampler(
        seed=config.seed, n_startup_trials=max(3, len(space.parameters)), constant_liar=config.concurrency > 1
    )


def number_of_trials(config: SearchConfig, space: Space) -> int:
    """Trials to run: those asked for, but of a grid no more than it has points."""
    if config.sampler != "grid":
        return config.trials or 1
    return min(config.trials or len(space.grid()), len(space.grid()))


def make_scheduler(config: SearchConfig) -> Any:
    """Tune's scheduler."""
    if config.scheduler == "asha":
        return ASHAScheduler(metric=VALUE, mode="max", grace_period=config.grace_scores, max_t=10_000)
    if config.scheduler == "median":
        return MedianStoppingRule(
            metric=VALUE, mode="max", time_attr="training_iteration", grace_period=config.grace_scores,
            min_samples_required=2,
        )  # fmt: skip
    return FIFOScheduler()


class TrialLines(ray.tune.Callback):
    """A line on the console for every score and every trial that ends."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print a trial's latest score."""
        if result.get(FINISHED):
            return  # it was printed when it was made
        print(
            f"trial {trial.trial_id}  {_values(trial.config)}  step {result.get('score_step', float('nan')):.0f}  "
            f"held back {100 * result[HELD_BACK]:5.1f} %  answered {100 * result[ANSWERED]:5.1f} %",
            flush=True,
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial failed."""
        print(f"trial {trial.trial_id}  {_values(trial.config)}  failed", flush=True)


def _values(values: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _finished(folder: Path, config: SearchConfig) -> list[Trial]:
    """All trials of a search folder that have a score, by their names; the last score counts."""
    found = []
    for path in sorted((folder / "trials").glob("*/config.yaml")):
        scores = sorted((path.parent / "scores").glob("step-*/scores.json"))
        if scores:
            found.append(Trial.read(path.parent, load_scores(scores[-1]), config))
    return found
