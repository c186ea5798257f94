"""A tiny Llama, random bundles, and worker processes joined by gloo: the training code without Ray around it."""

import os
import socket
import tempfile
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from mlc_ray._registry import resolve
from mlc_ray.config import TrainConfig, resolve_layer
from mlc_ray.data.order import total_steps
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import plans, stream_steps
from mlc_ray.data.tables import rows_to_table
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import cutting_of, order_of, tokens_per_forward
from mlc_ray.train.attention import register_attention
from mlc_ray.train.engines.deepspeed import DeepSpeed
from mlc_ray.train.loop import Progress, train_loop
from mlc_ray.train.model import PolicyWithExtractor, add_adapters, cast_parameters, checkpoint_blocks
from mlc_ray.train.planning import check_groups, tapping
from mlc_ray.train.preemption import Notice
from mlc_ray.train.reference import ReferenceModel, asked_of_reference, cached_reference, policy_reference
from mlc_ray.types import ReferenceRows, TokenRow
from tests.data.files import write_rows

register_attention()
VOCABULARY = 67
LANGUAGES = ["ar", "en", "sw"]


@dataclass(frozen=True)
class ReferenceRow:
    """What the frozen reference says of one bundle; tests keep it by bundle_id."""

    chosen: float | None = None
    rejected: float | None = None
    state: np.ndarray | None = None
    pooled: np.ndarray | None = None


def aligned(table, rows):
    """What the reference says of each of `rows`, from a table by bundle_id."""
    if table is None:
        return None
    said = [table[row.bundle_id] for row in rows]
    columns = {name: [getattr(one, name) for one in said] for name in ("chosen", "rejected", "state", "pooled")}
    return ReferenceRows(**{name: np.array(v) for name, v in columns.items() if v[0] is not None})


def tiny_model(seed=0, tied=False):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attn_implementation="tree",
            initializer_range=0.2,
        )
    )


def random_rows(count, seed=1, head=()):
    """Bundles of random tokens, whose prompts all begin with `head`; every third one lacks a language."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for index in range(count):
        languages = [name for name in LANGUAGES if index % 3 or name != "sw"]
        prompts = [[*head, *tokens(4, 12)] for _ in languages]
        rows.append(
            TokenRow(
                bundle_id=f"bundle-{index:02d}",
                kind="benign" if index % 2 else "harmful",
                languages=languages,
                prompts=prompts,
                tapped=[len(prompt) - 1 for prompt in prompts],
                response_prompt=languages.index("en"),
                chosen=tokens(3, 8),
                rejected=tokens(3, 8),
            )
        )
    return rows


def translated(rows, seed=5):
    """The same bundles with random answers in all their other languages."""
    generator = torch.Generator().manual_seed(seed)

    def tokens():
        length = int(torch.randint(1, 6, (1,), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return [
        replace(
            row,
            answers=[
                {"prompt": index, "chosen": tokens(), "rejected": tokens()}
                for index in range(len(row.languages))
                if index != row.response_prompt
            ],
        )
        for row in rows
    ]


def tiny_config(**sections):
    """A config whose model path is never read: the tests hand the model over."""
    raw = {
        "name": "tiny",
        "model": {"path": "tiny", "dtype": "float32"},
        "data": {"train": [{"path": "sample:train"}]},
        "mlc": {"layer": 2, "every": 2, "extractor_dim": 16},
        "optimizer": {"learning_rate": 1e-2, "max_grad_norm": 1.0},
        "train": {"epochs": 2, "batch_bundles": 4, "tokens_per_forward": 50},  # about a bundle
        "engine": {"stage": 0},
    }
    for name, value in sections.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) and name in raw else value
    raw["engine"] = {name: value for name, value in raw["engine"].items() if value is not None}  # other engines' fields
    return TrainConfig.model_validate(raw)


def wrapped(config, seed=0):
    policy = tiny_model(seed)
    checkpoint_blocks(policy, config.model.gradient_checkpointing)
    layer = resolve_layer(config.mlc.layer, 3)
    module = PolicyWithExtractor(
        add_adapters(policy, config.model),
        layer=layer,
        extractor_dim=config.mlc.extractor_dim,
        seed=config.seed,
        pooling=Objective(config).alignment.pooling,
        keeps=Objective(config).needs_reference_logits,
    )
    cast_parameters(module, getattr(torch, config.model.dtype))
    return module


def steps_of(config, rows, rank, world_size, table=None, start_step=0, branches=None):
    """The micro-batches one worker has at each step, from a stored artefact as in a run."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), [rows_to_table(rows)], fingerprint="tiny", rejected={})
        tokens = TokenArtifact.open(folder)
        order = order_of(config, tokens)
        budget = tokens_per_forward(config, gpu=False)
        cutting = cutting_of(config, tokens, tokens_per_forward=budget, world_size=world_size, branches=branches)
        steps = total_steps(
            len(rows), epochs=config.train.epochs, batch_bundles=config.train.batch_bundles, max_steps=None
        )
        check_groups(tokens, tapping(order, cutting, steps), cutting)
        yield from stream_steps(
            tokens,
            plans(tokens, order, cutting, range(start_step, steps)),
            cutting,
            aligned(table, rows),
            rank=rank,
        )


def make_engine(config, module=None):
    """The engine that a config names, around the tiny model or another."""
    chosen = resolve("engine", config.engine.name)
    return chosen(module or wrapped(config), config, torch.device("cpu"))


def whole_weights(engine):
    """A copy of all weights on rank 0; None on other workers, which must call it too."""
    copied = {name: value.clone() for name, value in engine.weights()}
    return copied or None


class SavesAtOnce:
    """Calls `save(progress, metrics)` where a checkpoint is due; False means that it could not be written."""

    def __init__(self, save):
        self._save = save

    def save(self, progress, metrics, *, wait, needed):
        return self._save(progress, metrics) is not False

    at_the_end = True

    def score(self, progress, *, last):
        pass

    def writes(self):
        return False

    def settle(self):
        pass

    def finish(self):
        pass


def online_reference(config, engine):
    """The reference that is asked at every step: the policy without its adapters, or a second model."""
    objective = Objective(config)
    asked = asked_of_reference(objective, resolve_layer(config.mlc.layer, 3))
    if config.model.lora is not None:
        return policy_reference(engine.module, ReferenceModel(engine.module.language_model, **asked))
    model = tiny_model()
    cast_parameters(model, getattr(torch, config.model.dtype))
    return type(engine).frozen(ReferenceModel(model, **asked), config, engine.device)


def run_engine(
    config, rows, steps, table=None, save=None, engine=None, progress=None, validate=None, reference=None, noticed=None,
    history=None, saves=None, branches=None,
):  # fmt: skip
    """Train with a real engine in this worker; returns the engine and each step's metrics, which `history` gets too."""
    engine = engine or make_engine(config)
    if config.needs_reference and reference is None:
        reference = online_reference(config, engine) if config.reference == "online" else cached_reference
    progress = progress or Progress()
    history = [] if history is None else history
    train_loop(
        config,
        engine=engine,
        steps=steps_of(config, rows, engine.rank, engine.world_size, table, progress.step, branches),
        reference=reference,
        progress=progress,
        total_steps=steps,
        kinds={row.kind for row in rows},
        validate=validate,
        noticed=noticed or (lambda: Notice.NONE),
        log=lambda step, metrics: history.append({"step": step, **metrics}),
        saves=saves or SavesAtOnce(save or (lambda progress, metrics: None)),
    )
    return engine, history


def on_workers(count, function, folder, *arguments):
    """Run `function(rank, *arguments)` in `count` processes joined by gloo; returns what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Forked from one process that has imported all of it: else each worker spends 8 CPU seconds on imports.
    imported = ["tests.train.tiny", "deepspeed.runtime.zero.muon.muon_optimizer"]
    mp.get_context("forkserver").set_forkserver_preload(imported)
    mp.start_processes(_process, (count, port, function, folder, arguments), nprocs=count, start_method="forkserver")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank, count, port, function, folder, arguments):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
    }
    torch.set_num_threads(1)
    DeepSpeed.prepare(torch.device("cpu"))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        torch.save(function(rank, *arguments), folder / f"result-{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
