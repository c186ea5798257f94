"""What every test may lean on: the real small model, and one real local Ray.

The environment is set before anything imports Ray or transformers, so it also reaches the workers they start.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell without job control starts what it puts into the background with Ctrl-C ignored; every child inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # else reports closer than 2 s block up to 1.9 s
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # else prints appear twice
# Else a call of Ray's without one starts it, or waits for minutes for one that has ended meanwhile.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
# Else whatever runs beside the tests starves their workers.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, Ray's own spelling
# Nothing is compiled on CPU, but DeepSpeed's Muon would be: 3 s of imports in every worker that trains.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
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
    from mlc_ray.quickstart import prepare_smollm2
    from mlc_ray.storage import user_cache

    return prepare_smollm2(user_cache() / "models" / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def small_llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four small layers with SmolLM2's tokenizer: trains in no time, and vLLM's kernels take it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)  # what it answers, and whether it loops, should not differ from day to day
    folder = tmp_path_factory.mktemp("small-llama")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ray_local(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One real Ray for all tests that need one: a local node of 2 CPUs, whose workers have imported what they need."""
    import ray

    from tests.warm_workers import running

    if any({"ray_local", "s3"} <= set(item.fixturenames) for item in request.session.items):  # type: ignore[attr-defined]
        request.getfixturevalue("s3")  # its workers get the environment that is there when it starts
    ray.shutdown()  # of one that a test of this process started without asking for this fixture
    # With the dashboard, as any real cluster has it: Ray Train asks it which runs have died, to free what they held.
    with running() as python:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            log_to_driver=False,
            runtime_env={"py_executable": python},
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty bucket of a real S3 server (SeaweedFS) on this machine; the environment names the server."""
    from tests.s3_server import running

    with running(tmp_path_factory.mktemp("s3")) as server:
        previous = {name: os.environ.get(name) for name in server.environment}
        os.environ.update(server.environment)
        yield server.make_bucket("test")
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
