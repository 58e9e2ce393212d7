"""What studies of training share: recipes become runs under runs/studies, and are found again."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _page import RUNS

from vesalius.records import read_json
from vesalius.train.recipe import Recipe
from vesalius.train.running import train


def is_quick(what: str | None) -> bool:
    """Whether the study was asked for its rehearsal; one thread, so that times and bits are the same everywhere."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="a rehearsal of less than a minute; prints the page")
    torch.set_num_threads(1)
    return bool(parser.parse_args().quick)


def trained(recipe: Recipe, folder: str) -> Path:
    """The run of a recipe below runs/studies/FOLDER, trained now or before."""
    began = time.perf_counter()
    run = train(recipe, RUNS / folder)
    print(f"{recipe.name}: {recipe.steps} steps, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return run


def held_out(run: Path, column: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """A run's held-out curve: (steps, values)."""
    found = pd.read_parquet(run / "evaluation.parquet")
    return found["step"].to_numpy(dtype=float), found[column].to_numpy(dtype=float)


def flops_a_step(run: Path) -> float:
    """Counted operations of one step."""
    summary: dict[str, Any] = read_json(run / "summary.json", "train it again")
    return float(summary["ledger"]["flops"]) / float(summary["ledger"]["steps"])


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the interval of Student's t over seeds."""
    from scipy import stats

    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(x.mean()), math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def verdict(each: Iterable[bool], mean: bool | None = None) -> str:
    """`holds` if the mean and two thirds of the seeds do; how many seeds do."""
    held = list(each)
    good = sum(held) * 3 >= 2 * len(held) and mean is not False
    return f"{'holds' if good else 'does not hold'} ({sum(held)} of {len(held)} seeds)"
