"""An honest race: several optimizers (or models, or recipes) at equal cost, each tuned over a grid of the same size.

Every arm trains by the same recipe but for what names the arm. It is tuned on the first seed over its grid of learning
rates (the recipe's or the optimizer's own default times the same factors); the best one then runs with every other seed
on the same batches as the other arms. With a compute class each arm gets as many steps as fit into the class at its own
measured throughput (Languini, arXiv 2309.11197: median of rounds after a warm-up), otherwise all get the recipe's
steps. Every run is reported, lost ones too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vesalius.errors import RunError, VesaliusError
from vesalius.train.assembly import assemble
from vesalius.train.curves import steps_for, throughput
from vesalius.train.optimizers import settings as optimizer_settings
from vesalius.train.optimizers import state_bytes
from vesalius.train.parallel import World
from vesalius.train.recipe import Recipe
from vesalius.train.trainer import deterministic, is_exact

WARM_UP, ROUNDS = 5, 15  # steps before and while throughput is measured, as Languini does
POINTS = 100  # of a stored curve


@dataclass(frozen=True)
class Arm:
    """One competitor: its name, its recipe at the default learning rate, and the factors of its grid."""

    name: str
    recipe: Recipe
    factors: tuple[float, ...]

    def at(self, factor: float, seed: int, steps: int) -> Recipe:
        """The recipe of one run."""
        lr = learning_rate(self.recipe) * factor
        chosen = self.recipe.optimizer.model_copy(update={"lr": lr})
        return self.recipe.model_copy(update={"optimizer": chosen, "seed": seed, "steps": steps})


class Lap(NamedTuple):
    """One finished run of a race."""

    row: dict[str, Any]
    curve: pd.DataFrame  # step, loss (training, smoothed over the gap between points)


def learning_rate(recipe: Recipe) -> float:
    """The recipe's learning rate, or its optimizer's default."""
    named = recipe.optimizer
    given = named.settings.get("lr")
    try:
        rate = float(optimizer_settings(named.name)["lr"] if given is None else given)
    except (TypeError, ValueError):
        raise VesaliusError(f"optimizer.lr {given!r} is no number") from None
    if not 0 < rate < float("inf"):
        raise VesaliusError(f"optimizer.lr {rate:g} is no learning rate to race with; give one above 0")
    return rate


def speed_of(recipe: Recipe) -> float:
    """Tokens a second of the recipe's own training step: median of 15 rounds after 5 (3 at least, of 40 seconds)."""
    made = assemble(recipe, World.single())
    logs = []
    began = time.perf_counter()
    with deterministic(is_exact(recipe.deterministic, made.trainer.device)):
        for log in made.trainer.steps(WARM_UP + ROUNDS):
            logs.append(log)
            if len(logs) >= WARM_UP + 3 and time.perf_counter() - began > 40:
                break
    found = throughput([log.tokens for log in logs], [log.seconds for log in logs], WARM_UP)
    del made
    gc.collect()
    return found.median


def lap(recipe: Recipe, progress: Callable[[int, int], None] | None = None) -> Lap:
    """Trains by a recipe in memory and measures it on the held-out batches at the end."""
    made = assemble(recipe, World.single())
    trainer = made.trainer
    losses: list[float] = []
    tokens = 0
    began = time.perf_counter()
    error = ""
    with deterministic(is_exact(recipe.deterministic, trainer.device)):
        try:
            for log in trainer.steps(recipe.steps):
                losses.append(log.loss)
                tokens += log.tokens
                if progress:
                    progress(log.step + 1, recipe.steps)
        except RunError as problem:  # it diverged: that is a result
            error = str(problem)
        seconds = time.perf_counter() - began
        found = {"loss": float("nan")}
        if not error and made.held_out is not None:
            found = trainer.evaluate(made.held_out, recipe.evaluate.batches)
    tail = losses[-max(1, len(losses) // 20) :]
    row = {
        "steps": len(losses),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else float("nan"),
        "train_loss": float(np.mean(tail)) if tail and not error else float("nan"),
        "held_out": found["loss"],
        "bits_per_byte": found["loss"] / np.log(2) / made.bytes_per_token if made.bytes_per_token else float("nan"),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "optimizer_bytes": state_bytes(trainer.optimizer),
        "error": error,
    }
    curve = _thinned(losses)
    del made, trainer
    gc.collect()
    return Lap(row, curve)


def _thinned(losses: Sequence[float]) -> pd.DataFrame:
    size = max(1, -(-len(losses) // POINTS))
    points = [(min(i + size, len(losses)), float(np.mean(losses[i : i + size]))) for i in range(0, len(losses), size)]
    return pd.DataFrame(points, columns=["step", "loss"])


def race(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    seconds: float | None = None,
    known: Callable[[str], Lap | None] = lambda key: None,
    progress: Callable[[str, int, int], None] | None = None,
    speeds: Callable[[Arm], float] | None = None,
) -> Iterator[tuple[str, Lap]]:
    """Runs a race, one (key, lap) at a time; the caller keeps them.

    Args:
        arms: who runs. seeds: the first one tunes.
        seconds: compute class of one run; None for the recipe's steps.
        known: laps an earlier sitting finished, by key. progress: told (key, steps made, steps).
        speeds: measured tokens a second of an arm, if not `speed_of`.

    Yields:
        Laps in order; `row` has arm, lr, factor and seed beside what was measured.
    """
    measure = speeds or (lambda arm: speed_of(arm.recipe))
    for arm in arms:
        speed = None
        steps = arm.recipe.steps
        if seconds is not None:
            speed = measure(arm)
            steps = max(1, steps_for(speed, seconds, arm.recipe.data.rows * arm.recipe.data.length))

        def go(
            factor: float, seed: int, arm: Arm = arm, steps: int = steps, speed: float | None = speed
        ) -> tuple[str, Lap]:
            plan = arm.at(factor, seed, steps)
            key = f"{arm.name} lr {learning_rate(plan):.6g} seed {seed}"
            found = known(key)
            if found is None:
                tell = (lambda done, total: progress(key, done, total)) if progress else None
                found = lap(plan, tell)
            row = {"arm": arm.name, "lr": learning_rate(plan), "factor": factor, "seed": seed, **found.row}
            row["class_tokens_per_second"] = speed
            return key, Lap(row, found.curve)

        tried = []
        for factor in arm.factors:
            key, found = go(factor, seeds[0])
            tried.append((measured(found.row), factor))
            yield key, found
        best = min(tried)[1]
        for seed in seeds[1:]:
            yield go(best, seed)


def measured(row: Mapping[str, Any]) -> float:
    """What a lap is judged by: held-out loss, or training loss where nothing was held out; infinity if it diverged."""
    for name in ("held_out", "train_loss"):
        if np.isfinite(row[name]):
            return float(row[name])
    return float("inf")


def standings(laps: pd.DataFrame) -> pd.DataFrame:
    """Each arm at its best learning rate over its seeds: mean and range of the held-out loss, best first.

    Args:
        laps: rows of `race`.

    Returns:
        Columns arm, lr, seeds, loss, low, high (over seeds), bits_per_byte, steps, seconds, optimizer_mb, grid (the
        grid's losses on the first seed, in order of learning rate), edge (whether the best lies at the grid's end, so
        that a wider grid may do better).
    """
    rows = []
    for name, mine in laps.groupby("arm", sort=False):
        judged = mine.assign(judged=[measured({str(k): v for k, v in r.items()}) for r in mine.to_dict("records")])
        first = judged[judged["seed"] == mine["seed"].iloc[0]].sort_values("lr")
        best = float(first.loc[first["judged"].idxmin(), "lr"])
        chosen = judged[judged["lr"] == best]
        rows.append(
            {
                "arm": name,
                "lr": best,
                "seeds": len(chosen),
                "loss": float(chosen["judged"].mean()),
                "low": float(chosen["judged"].min()),
                "high": float(chosen["judged"].max()),
                "bits_per_byte": float(chosen["bits_per_byte"].mean()),
                "steps": int(chosen["steps"].median()),
                "seconds": float(chosen["seconds"].median()),
                "optimizer_mb": float(chosen["optimizer_bytes"].iloc[0]) / 2**20,
                "grid": ", ".join(f"{x:.3f}" for x in first["judged"]),
                "edge": len(first) > 1 and best in (float(first["lr"].min()), float(first["lr"].max())),
            }
        )
    return pd.DataFrame(rows).sort_values("loss", kind="stable", ignore_index=True)
