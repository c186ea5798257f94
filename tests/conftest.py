"""What every test may lean on: the real small model, and one real local Ray.

The environment is set before anything imports Ray or transformers, so it also reaches the workers they start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # else reports closer than 2 s block up to 1.9 s
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # else prints appear twice
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MLC_RAY_CACHE", str(REPOSITORY / ".cache"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout: where configs/, README.md and Makefile lie."""
    return REPOSITORY


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; converted on first use, cached afterwards."""
    from mlc_ray.quickstart import cache_folder, prepare_smollm2

    return prepare_smollm2(cache_folder() / "models" / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[Any]:
    """One real Ray for all tests that need one: a local node of 2 CPUs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
