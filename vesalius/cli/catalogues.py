"""`vesalius corpora`, `presets`, `optimizers`, `objectives` and `schedules`: what a recipe may name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (corpora, presets, optimizers, objectives, schedules):
        app.command(command.__name__)(command)


def corpora(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """Real text by name, and synthetic tasks: what a recipe's data may be."""
    from vesalius.corpus import SYNTHETIC
    from vesalius.corpus import corpora as listing

    found = listing()
    shown = found[["name", "what", "language", "licence"]].assign(
        fetch=[f"{b / 2**20:.0f} MB" for b in found["download_bytes"]],
        cached=["yes" if c else "no" for c in found["cached"]],
    )
    tasks = pd.DataFrame(
        [
            {"synthetic": e.name, "what": e.summary, "settings": _settings(SYNTHETIC.get(e.name).defaults)}
            for e in SYNTHETIC
        ]
    )
    notices = [f"{r['name']}: {r['notice']}" for r in found.to_dict("records") if r["notice"]]
    rows = {"corpora": found.to_dict("records"), "synthetic": tasks.to_dict("records")}
    Screen(as_json).show(rows, shown, "", tasks, *notices, "", "or a .txt, .jsonl, .gz or .parquet file, or a folder")


def presets(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """Architectures by name: what a recipe's model may start from."""
    from vesalius.build import presets as listing

    found = listing()
    shown = found.assign(parameters=[f"{n / 1e6:,.1f} M" for n in found["parameters"]])
    Screen(as_json).show(found.to_dict("records"), shown)


def optimizers(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """Optimizers and their settings."""
    from vesalius.train.optimizers import OPTIMIZERS, settings

    _registered(as_json, "optimizer", OPTIMIZERS, settings)


def objectives(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """What a model may be trained to do, and the settings."""
    from vesalius.train.objectives import OBJECTIVES

    def settings(name: str) -> dict[str, Any]:
        fields = dataclasses.fields(OBJECTIVES.get(name))
        return {f.name: f.default for f in fields if f.init and f.default is not dataclasses.MISSING}

    _registered(as_json, "objective", OBJECTIVES, settings)


def schedules(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """Schedules of the learning rate, and their settings."""
    from vesalius.train.schedules import SCHEDULES, schedule_settings

    _registered(as_json, "schedule", SCHEDULES, schedule_settings)


def _registered(as_json: bool, kind: str, registry: Any, settings: Any) -> None:
    rows = [
        {kind: e.name, "what": e.summary, "settings": _settings(settings(e.name)), "paper": e.paper} for e in registry
    ]
    Screen(as_json).show(rows, pd.DataFrame(rows), "", f"in a recipe: {kind}: {{name: NAME, SETTING: VALUE}}")


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in values.items() if v is not inspect.Parameter.empty)
