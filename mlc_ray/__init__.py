"""Multilingual-consistency (MLC) safety alignment on Ray: from prompts in many languages to a scored model.

The data flows one way, and this is the order in which to read the rooms:

    data/        a file of *bundles* (one prompt in many languages, an answer pair in one of them) is read and
                 validated (`formats`, `bundles`), tokenised with the model's own template (`tokens`), put in an order
                 that a seed decides (`order`), and packed into batches (`batches`); `prepare` wires it to Ray Data
    losses/      pure tensor functions: the alignment losses, the consistency term (`mlc`) and further terms, and the
                 objective that adds them up (`objective`)
    train/       one optimizer step after another: the policy (`model`) and its packed `attention`, the `engines`, the
                 frozen reference (`reference`), the loop (`loop`), what it watches (`watch`), what is saved and
                 exported (`checkpoint`); `run` starts the workers
    generate/    responses by vLLM (`engine`) from weights it can prove (`swap`), by actors that scores and searches
                 share (`pool`), and translation
    judges/      what a response is: refusal phrases, guard models, endpoints, likelihood
    stats/       rates, intervals and paired tests; pure
    score/       prompts -> responses -> verdicts -> scores (`run`): which stages there are and where they run (`plan`)
    search/      which fields vary (`space`), what a trial is worth (`objectives`), a trial, and how Ray Tune runs them
    report/      what folders of runs and scores say, as one HTML file, as tables and figures
    cli/         the command line; quickstart.py is the whole way on one small model
    api.py       the same as functions: `train`, `score`, `search`, `probe`

Beneath them lie `runs` (the layout of folders), `storage` (what is on disk, and whether to trust it), `cluster`,
`progress`, `types`, `config` and `errors`. `[tool.importlinter]` in pyproject.toml lists which may import which; train
and score meet only through a run's folder.

The names that this module offers are imported when they are first used: `import mlc_ray` loads nothing.
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
