"""Which settings a run keeps when it goes on, and which may change: `KINDS` alone says it, of every field.

A run that goes on must take the steps that it would have taken. So what decides them is FIXED. Where it runs, how its
work is cut, what it logs and what it keeps is FREE. Names of the model and of the data are CONTENT: they may change
where the fingerprint of what they name stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlc_ray.config import TrainConfig
from mlc_ray.config.base import by_dotted_name
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place


class SettingsChangedError(MlcRayError):
    """A run cannot go on with other settings or another content; the message names each, as it was and as it is now."""


class Kind(Enum):
    """What going on with a run asks of a field."""

    FIXED = "must be what it was"
    FREE = "may change"
    CONTENT = "may name the same content otherwise"


KINDS: Mapping[str, Kind] = {
    "name": Kind.FIXED,
    "output_dir": Kind.FREE,
    "seed": Kind.FIXED,
    "resume": Kind.FREE,
    "reference": Kind.FIXED,
    "model.path": Kind.CONTENT,
    "model.dtype": Kind.FIXED,
    "model.attention": Kind.FREE,
    "model.kernels": Kind.FREE,
    "model.trust_remote_code": Kind.FREE,
    "model.gradient_checkpointing": Kind.FREE,
    "model.router_weight": Kind.FIXED,
    "model.lora.rank": Kind.FIXED,
    "model.lora.alpha": Kind.FIXED,
    "model.lora.dropout": Kind.FIXED,
    "model.lora.target_modules": Kind.FIXED,
    "chat": Kind.CONTENT,
    "data.train": Kind.CONTENT,
    "data.validation.sources": Kind.CONTENT,
    "data.validation.every": Kind.FREE,
    "data.validation.max_chosen_drop": Kind.FREE,  # it warns
    "data.validation.min_decision_auc": Kind.FREE,
    "data.on_invalid": Kind.CONTENT,
    "data.languages": Kind.CONTENT,
    "data.other_languages": Kind.CONTENT,
    "data.max_prompt_tokens": Kind.CONTENT,
    "data.max_response_tokens": Kind.CONTENT,
    "objective": Kind.FIXED,
    "mlc": Kind.FIXED,
    "terms": Kind.FIXED,
    "openings": Kind.FIXED,
    "optimizer.learning_rate": Kind.FIXED,
    "optimizer.weight_decay": Kind.FIXED,
    "optimizer.betas": Kind.FIXED,
    "optimizer.eps": Kind.FIXED,
    "optimizer.schedule": Kind.FIXED,
    "optimizer.warmup_ratio": Kind.FIXED,
    "optimizer.max_grad_norm": Kind.FIXED,
    "optimizer.max_retries": Kind.FREE,
    "train.epochs": Kind.FIXED,
    "train.max_steps": Kind.FIXED,
    "train.batch_bundles": Kind.FIXED,
    "train.tokens_per_forward": Kind.FREE,
    "train.group_bundles": Kind.FIXED,
    "engine": Kind.FREE,
    "engine.extra": Kind.FIXED,
    "cluster": Kind.FREE,
    "checkpoint": Kind.FREE,
    "collapse": Kind.FREE,
    "logging": Kind.FREE,
}
"""The kind of each field by its dotted name; that of a section is the kind of all its fields, a component's too."""


@dataclass(frozen=True)
class Change:
    """A setting by dotted name, and its resolved values as JSON has them; None where there is no such field."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} was {self.before!r}, now {self.now!r}"


def kind_of_field(name: str) -> Kind:
    """The kind of a field, by the longest part of its dotted name that `KINDS` has.

    Raises:
        KeyError: No part of it is there.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (kind := KINDS.get(".".join(parts[:length]))) is not None:
            return kind
    raise KeyError(f"{name}: say in mlc_ray.train.settings.KINDS whether it may change when a run goes on")


def changes(before: Mapping[str, Any], now: TrainConfig) -> list[Change]:
    """The settings that differ, by name; `before` are resolved ones as JSON has them."""
    old, new = by_dotted_name(before), by_dotted_name(now.model_dump(mode="json"))
    return [
        Change(name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _only_a_section(name, old, new)
    ]


def refuse_fixed(changed: Iterable[Change], run_folder: Place) -> None:
    """Refuse to go on with a run where settings differ that must not.

    Raises:
        SettingsChangedError: There are some.
    """
    fixed = [change for change in changed if kind_of_field(change.field) is Kind.FIXED]
    if fixed:
        raise SettingsChangedError(
            f"run folder {str(run_folder)!r} holds a run with other settings ({', '.join(map(str, fixed))}): they "
            "decide what its steps compute; go on with the values that it has, or give the new ones to a run of "
            "another name"
        )


def refuse_other_content(
    before: Mapping[str, str], now: Mapping[str, str], changed: Iterable[Change], run_folder: Place
) -> None:
    """Refuse to go on with a run whose model or bundles have another content, wherever they are.

    Args:
        before: fingerprints by what they are of, as the run recorded them.
        now: the same of what it would go on with.
        changed: the settings that differ; those that name contents are part of the message.
        run_folder: the run.

    Raises:
        SettingsChangedError: A fingerprint differs.
    """
    differ = [
        f"{name} had the fingerprint {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differ:
        named = [str(change) for change in changed if kind_of_field(change.field) is Kind.CONTENT]
        because = f"; {', '.join(named)}" if named else ""
        raise SettingsChangedError(
            f"run folder {str(run_folder)!r} holds a run of another content ({', '.join(differ)}{because}): go on with "
            "the model and the bundles that it has, or start a run of another name"
        )


def _only_a_section(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `name` is no field but a section that is absent in one of both, where its fields are listed anyway."""
    return any(other.startswith(f"{name}.") for other in (*old, *new))
