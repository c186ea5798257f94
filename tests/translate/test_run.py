"""Translations as a whole, through a real local server; only the small model's own answers need an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlc_ray import api
from tests.translate.worlds import settings, translator, write


def test_smoke(ray_local: Any, tmp_path: Path) -> None:
    with translator() as server:
        made = api.translate(settings(server, write(tmp_path / "en.jsonl"), tmp_path, translate_answers=True, twins={}))
    print((made.folder / "quality.md").read_text())
    for f in (*made.bundles.iterdir(), *(made.folder / "rejected").iterdir()):
        print(f.read_text())
    print(made.folder.sizes())
