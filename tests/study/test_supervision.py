"""Tokens of supervision, against counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlc_ray.config import TrainConfig, parse_config
from mlc_ray.data.store import TokenArtifact, write_rows
from mlc_ray.data.tables import rows_to_table
from mlc_ray.study.supervision import supervision_of
from mlc_ray.types import FurtherAnswers, TokenRow
