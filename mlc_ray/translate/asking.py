"""Asking models for a shard: each request once, what engines did kept block by block, endpoints by their own cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlc_ray.config import TranslatorSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device
from mlc_ray.generate.pool import EnginePool, work
from mlc_ray.generate.replica import Part
from mlc_ray.generate.translate import ENDPOINT_FAULT, Translation
from mlc_ray.runs import REPLIES_FILE
from mlc_ray.score.chain import Pass, chain
from mlc_ray.score.kept import Kept
from mlc_ray.score.plan import counted, usage_file
from mlc_ray.storage import Place, installed_engines
from mlc_ray.translate.stages import REQUESTS, AskStage

logger = logging.getLogger(__name__)
NOT_ASKED = f"{ENDPOINT_FAULT}not asked"
"""How the reason begins where an endpoint's cap did not allow a request."""


class CostCapError(MlcRayError):
    """An endpoint's cost cap does not allow what is left to be asked; what was answered is kept."""


@dataclass(frozen=True)
class Work:
    """The engines or the endpoint of one part, open, and where what they do is kept.

    `made_by` is what their columns follow from, beside the rows they read. `lost` gets the requests to which no reply
    came, after all retries.
    """

    part: Part
    pool: EnginePool
    place: Place
    made_by: Any
    lost: list[str] = field(default_factory=list)

    def rows(self, name: str, table: pa.Table, unit: str) -> pa.Table:
        """`table` with the part's columns; `name` says which rows they are, in the folder of what is kept."""
        kept = Kept(self.place, name, self.made_by, table.column_names, self.part.columns)
        has_engine = self.part.engine is not None  # an endpoint's replies are in its cache
        one = Pass(self.part, self.pool.device, len(table), kept=kept, keeps=has_engine, unit=unit)
        chain([one], table)
        if one.done < len(table):
            with one.lasting:
                one.show()
                work([(self.pool, one.job)])
        else:
            one.job.ended()
        return one.table

    def ask(self, name: str, requests: Sequence[str]) -> list[Translation]:
        """The whole reply to each request, in order, or why there is none; equal ones are asked once.

        Raises:
            CostCapError: the endpoint's cap is reached.
        """
        distinct = list(dict.fromkeys(requests))
        if not distinct:
            return []
        table = self.rows(name, pa.table({"request": distinct}, schema=REQUESTS), "requests")
        columns = (table[column].to_pylist() for column in ("request", "reply", "fault", "lost"))
        found = {
            text: Translation(reply, fault or "", bool(lost)) for text, reply, fault, lost in zip(*columns, strict=True)
        }
        self.lost.extend(text for text, reply in found.items() if reply.lost)
        if left := sum(reply.reason.startswith(NOT_ASKED) for reply in found.values()):
            raise cap_reached(left, len(distinct))
        return [found[request] for request in requests]


def cap_reached(left: int, asked: int) -> CostCapError:
    """The error that so many of the requests asked were not sent."""
    return CostCapError(
        f"{left} of {asked} requests were not sent, because they could have exceeded max_cost_usd of the endpoint; "
        "raise it, and go on with resume=auto: replies are kept"
    )


def with_what_is_left(settings: TranslatorSection, usage: Path) -> TranslatorSection:
    """A translator whose endpoint may spend what its cap leaves after an earlier step, by that step's file of usage."""
    endpoint = settings.endpoint
    if endpoint is None or endpoint.max_cost_usd is None or not usage.is_file():
        return settings
    used = json.loads(usage.read_text(encoding="utf-8"))
    left = endpoint.max_cost_usd - used["cost_usd"] - used["unconfirmed_usd"]
    return settings.model_copy(update={"endpoint": endpoint.model_copy(update={"max_cost_usd": left})})


@contextmanager
def asking(
    settings: TranslatorSection, place: Place, device: Device, *, name: str, made_by: Any, usage: Path
) -> Iterator[Work]:
    """A translator's engines or endpoint while the block runs.

    Args:
        settings: the translator's, everything decided.
        place: the folder of what is made.
        device: what engines run on.
        name: what progress calls it, and the file of what an endpoint did and cost.
        made_by: as of `Work`.
        usage: the folder of that file, on this machine.
    """
    endpoint = settings.endpoint is not None
    part = Part(
        name,
        AskStage,
        {
            "settings": settings,
            "device": device,
            "usage_file": str(usage / usage_file(name)),
            "replies_file": str(place / REPLIES_FILE),
        },
        None if endpoint else counted(settings.engine, device),
        once=endpoint,
    )
    with working(part, place, device, made_by) as work:
        yield work


@contextmanager
def working(part: Part, place: Place, device: Device, made_by: Any) -> Iterator[Work]:
    """The actors of a part while the block runs."""
    with EnginePool.open(part, device) as pool:
        yield Work(part, pool, place, [made_by, installed_engines()])
