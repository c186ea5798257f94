"""Whether what is logged is kept as JSON lines."""

from __future__ import annotations

from pydantic import Field

from mlc_ray.config.base import Section


class LogSection(Section):
    """Logs as files; what the terminal shows and what libraries write is kept anyway."""

    json_lines: bool = Field(
        False,
        description="Write what driver, workers and engines log into `logs/` of the folder, as JSON lines with run, "
        "trial, worker and step (docs/monitoring.md).",
    )


class LoggedSection(Section):
    """Settings of a command that trains nothing, but may keep logs."""

    logging: LogSection = LogSection()
