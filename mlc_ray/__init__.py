"""Multilingual-consistency (MLC) safety alignment on Ray: from prompts in many languages to a scored model.

Data flows one way, and this is the order in which to read the packages:

    data/        sources of *bundles* (a prompt in many languages, an answer pair in one of them) are found (`sources`,
                 `hub`; `given` for those in memory), read in their `formats` and validated (`bundles`), tokenised with
                 the model's own template (`tokens`), stored (`tables`, `store`), put in an order that a seed decides
                 (`order`), cut into forwards (`plan`), and read ahead by each worker (`stream`) as batches (`batches`),
                 each a prefix tree (`trees`, `branches`, `ragged`); `prepare` makes the stored token rows, on Ray Data
    losses/      pure tensor functions: the alignment losses, the consistency term (`mlc`) and further terms, their sum
                 (`objective`), and measures of collapse (`measures`)
    train/       `run` starts the `workers` once the data have what the loss needs (`answers`), by an `entry` that Ray's
                 controller reads too; `worker` is what each of them does: the policy (`model`) with its `attention`
                 over a tree, the `checks` at the start, how batches are cut (`planning`), the `openings` of
                 refusals that terms read, the `engines`, the frozen reference (`reference`; cached by a pass of its
                 own: `reference_cache`, `reference_pass`, `reference_shards`), the training loop (`loop`), what the
                 workers exchange (`collectives`), held-out bundles (`validation`), what is measured, watched and logged
                 (`meter`, `flops`, `watch`, `tracking`, `console`), how a run fails (`failures`, `divergence`),
                 checkpoints (`checkpoint`, `shards`, `random_state`) and the `export` of a plain model
    generate/    responses by vLLM (`engine`) from weights that are verified (`swap`), by a `pool` of Ray actors that
                 each run a `stage`; endpoints (`client`, `replies`) and translation (`translate`)
    judges/      verdicts on responses: refusal phrases, guard models, endpoints, likelihood, degenerate text
    stats/       rates, intervals and paired tests; pure
    score/       prompts -> responses -> verdicts -> scores (`run`): the `prompts`, the `stages`, where each stage runs
                 (`plan`), the pools kept open during a search (`scorer`), and what is saved (`request`, `results`)
    translate/   bundles made from English ones: translations, twins, a model's own answers, each checked
    utility/     general ability of a model, measured by lm-evaluation-harness
    plan/        what a run, a score or a search takes of memory and time, before it is started, and a `simulate`d run
    search/      which fields vary (`space`), how a trial is valued (`objectives`), a `trial`, Ray Tune (`tune`, `run`),
                 the `results`, and the `probe` of every layer
    study/       methods x models x seeds: the `cells`, the `folder`, how they `run`, and what is counted (`record`)
    report/      folders of runs and scores as one HTML file, as tables and as figures

Ways in:

    cli/            the command line
    api.py          the same as functions: `train`, `score`, `search`, `study`, `scale`, `probe`, `openings`,
                    `translate`
    quickstart.py   the whole pipeline on one small model
    doctor.py       what a machine or a cluster lacks for a run, with the fix
    show/           what a folder is, how far it got, and what to do next

All of them use `config`, `types`, `errors`, `_registry` (components by name), `runs` (the layout of folders),
`checkpoints` (whether one is whole), `storage` (reading and writing safely), `lease` (one driver a folder), `cluster`,
`nodes` (whether each sees what it needs), `capacity` (what a cluster can hold), `environment` (variables of workers),
`secrets` (what is never written down), `device` (the native number type), `monitoring`, `progress`, `logs`,
`json_logs`, `log_files` and `result_files` (what another version wrote is told).
`[tool.importlinter]` in pyproject.toml lists which package may import which; train and score meet only through a run's
folder.

The names that this module exports are imported when they are first used: `import mlc_ray` loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlc_ray import errors
    from mlc_ray._registry import register
    from mlc_ray.errors import MlcRayError
    from mlc_ray.losses.anchor import anchor_losses
    from mlc_ray.losses.base import Alignment, Term
    from mlc_ray.losses.contrast import contrast_losses
    from mlc_ray.losses.mlc import mlc_loss
    from mlc_ray.losses.variance import variance_losses
    from mlc_ray.types import Bundle, Verdict

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "Bundle",
    "MlcRayError",
    "Term",
    "Verdict",
    "__version__",
    "anchor_losses",
    "contrast_losses",
    "errors",
    "mlc_loss",
    "register",
    "variance_losses",
]

_PLACES = {
    "Alignment": "mlc_ray.losses.base",
    "Bundle": "mlc_ray.types",
    "MlcRayError": "mlc_ray.errors",
    "Term": "mlc_ray.losses.base",
    "Verdict": "mlc_ray.types",
    "anchor_losses": "mlc_ray.losses.anchor",
    "contrast_losses": "mlc_ray.losses.contrast",
    "mlc_loss": "mlc_ray.losses.mlc",
    "register": "mlc_ray._registry",
    "variance_losses": "mlc_ray.losses.variance",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("mlc_ray.errors")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
