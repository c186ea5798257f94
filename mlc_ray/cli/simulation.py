"""`mlc-ray plan --simulate`: a whole run of any size, simulated."""

from __future__ import annotations

import argparse
import json

from mlc_ray.config import SimulationConfig, load_config
from mlc_ray.plan.simulate import growth, run_of
from mlc_ray.report.console import show
from mlc_ray.report.simulation import as_json, findings, tables
from mlc_ray.report.tables import console


def simulate_command(arguments: argparse.Namespace) -> None:
    """Its tables and findings, or all of it as JSON."""
    config = load_config(SimulationConfig, arguments.simulate, arguments.overrides)
    best, grown = run_of(config), growth(config)
    if arguments.json:
        print(json.dumps(as_json(config, best, grown), indent=2))
        return
    for shown in tables(config, best, grown):
        show(console(shown))
    for line in findings(config, best, grown):
        print(line)
