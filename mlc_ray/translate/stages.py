"""The stage that asks a translator anything: requests in, whole replies out."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from mlc_ray.config import TranslatorSection
from mlc_ray.generate.engine import Device
from mlc_ray.generate.stage import Stage
from mlc_ray.generate.translate import make_translator
from mlc_ray.score.stages import Asking
from mlc_ray.storage import user_cache

REQUESTS = pa.schema({"request": pa.string()})
REPLIES = pa.schema({"reply": pa.string(), "fault": pa.string(), "lost": pa.bool_()})
"""The whole reply, or null and why there is none; and whether that is because none came."""


class AskStage(Stage):
    """`REQUESTS` -> `REPLIES`, by a model in an engine or by an endpoint.

    What an endpoint did and cost is written to `usage_file`; its replies are taken from `replies_file` and added to it.
    """

    columns = REPLIES

    def __init__(
        self,
        settings: TranslatorSection,
        *,
        device: Device,
        usage_file: str | None = None,
        replies_file: str | None = None,
    ) -> None:
        self.translator = make_translator(settings, device, user_cache())
        self.asking = Asking(self.translator, usage_file, replies_file)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """A reply per request."""
        with self.asking.noted():
            replies = self.translator.ask(table["request"].to_pylist())
        return [{"reply": reply.text, "fault": reply.reason or None, "lost": reply.lost} for reply in replies]

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **_: Any) -> list[dict[str, Any]]:
        """No reply."""
        return [{"fault": fault}] * len(table)

    def close(self) -> None:
        """Free the engine's memory, or publish an endpoint's replies."""
        self.asking.publish()
        self.translator.close()
