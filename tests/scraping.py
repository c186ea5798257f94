"""What Ray exposes of our metrics while something runs."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Seen = set[tuple[str, str]]
"""Names of metrics, each with the run that it is of."""


def target_of(ray_local: Any) -> str:
    """Where the one node of a Ray exposes its metrics."""
    (node,) = ray_local.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def scraped(target: str) -> Seen:
    """What is exposed now, by prometheus_client's parser."""
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(each.name, each.labels.get("run", "")) for family in families for each in family.samples}


@contextmanager
def watching(target: str) -> Iterator[Seen]:
    """All that is exposed while the block runs, looked at every two seconds: an actor's metrics end with it."""
    seen: Seen = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(2.0):
            with suppress(OSError):
                seen.update(scraped(target))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
