"""Languini's protocol on a small scale: GPT and quasi-LSTM at equal measured seconds, scored without the tokenizer."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _page import RUNS, run, table, write
from torch import Tensor, nn

import vesalius
from vesalius.build import Architecture, build, preset
from vesalius.build.mixers import MIXERS, Context
from vesalius.build.mixers.qlstm import in_blocks
from vesalius.corpus import documents, train_tokenizer
from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.evaluate import text_score
from vesalius.train.assembly import data_of
from vesalius.train.curves import compute_class, crossing, fit_power_law, steps_for
from vesalius.train.objectives import Loss, Sample
from vesalius.train.optimizers import make_optimizer
from vesalius.train.recipe import read_recipe
from vesalius.train.running import train
from vesalius.train.schedules import make_schedule
from vesalius.train.trainer import Trainer

MODELS = ("tiny-languini-gpt", "tiny-qlstm")
GRID = "1,3,10,30"  # times the paper's 6e-4, on the first class
PUBLISHED = (
    ("GPT small", 55_416, "6h", 128, 18_265),
    ("GPT small", 55_416, "12h", 128, 36_529),
    ("GPT small", 55_416, "24h", 256, 36_529),
    ("GPT medium", 16_618, "48h", 256, 21_908),
    ("GPT medium", 16_618, "96h", 256, 43_817),
    ("qLSTM mini", 94_781, "6h", 80, 49_982),
    ("qLSTM tiny", 36_930, "12h", 80, 38_950),
    ("qLSTM small", 11_143, "24h", 84, 22_385),
    ("qLSTM small", 11_143, "48h", 80, 47_010),
    ("qLSTM small", 11_143, "96h", 160, 47_010),
)


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    classes: tuple[str, ...]
    seeds: str
    grid: str
    rounds: int
    characters: int  # scored of each text
    parity: int  # updates
    seed_list: tuple[int, ...] = (0, 1, 2)


FULL = Size(("30s", "60s", "120s"), "0,1,2", GRID, 7, 40_000, 1500)
QUICK = Size(("1s", "2s"), "0", "3", 3, 3_000, 20, (0,))


# -- exact, and fast -----------------------------------------------------------------------------------------------


def block_gap(block: int, length: int = 256) -> tuple[float, float]:
    """Largest gap of states, and of gradients, between blocks and one step after the other (float32)."""
    generator = torch.Generator().manual_seed(0)
    forget = torch.sigmoid(torch.randn(2, 4, length, 16, generator=generator) + 1)
    new = torch.randn(2, 4, length, 16, generator=generator)
    before = torch.randn(2, 4, 16, generator=generator)
    weight = torch.randn(2, 4, length, 16, generator=generator)

    def loop(f: Tensor, z: Tensor) -> Tensor:
        state, found = before, []
        for t in range(length):
            state = f[:, :, t] * state + z[:, :, t]
            found.append(state)
        return torch.stack(found, 2)

    results = []
    for way in (lambda f, z: in_blocks(f, z, before, block), loop):
        f, z = forget.clone().requires_grad_(), new.clone().requires_grad_()
        cells = way(f, z)
        (cells * weight).sum().backward()
        results.append((cells.detach(), f.grad, z.grad))
    a, b = results
    gaps = [float((x - y).abs().max()) for x, y in zip(a, b, strict=True)]  # type: ignore[operator]
    return gaps[0], max(gaps[1:])


def speeds(length: int, rounds: int, d: int = 64, rows: int = 8) -> dict[str, float]:
    """Tokens a second, forward and backward, of one layer alone: median over interleaved rounds."""
    shape = Architecture(layers=1, d_model=d, heads=4, vocab_size=16, max_length=512, mixers="qlstm")
    ours = {n: MIXERS.get(n)(shape.replace(mixers=n)) for n in ("qlstm", "lstm")}
    fused = nn.LSTM(d, d, batch_first=True)
    x = torch.randn(rows, length, d)
    ways: dict[str, Callable[[], Tensor]] = {
        "qlstm": lambda: ours["qlstm"](x, Context())[0],
        "lstm, stepped in Python": lambda: ours["lstm"](x, Context())[0],
        "nn.LSTM, fused": lambda: fused(x)[0],
    }
    times: dict[str, list[float]] = {n: [] for n in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way().square().mean().backward()
            times[name].append(time.perf_counter() - began)
    return {n: rows * length / statistics.median(t[1:]) for n, t in times.items()}


# -- what an input-only gate cannot do ----------------------------------------------------------------------------


class Symbols:
    """Rows of random symbols; a `Source`."""

    fingerprint, vocab_size = "symbols", 8

    def __init__(self, length: int, seed: int, rows: int = 32) -> None:
        self.length, self.seed, self.rows = length, seed, rows

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step, self.length])
        ids = rng.integers(0, 4, (self.rows, self.length + 1))
        return Batch(step, ids, np.zeros_like(ids))

    def describe(self) -> dict[str, Any]:
        return {"length": self.length, "seed": self.seed}


class Running:
    """At every position, of the symbols so far: the parity of the ones, or the last that is not 0. An `Objective`."""

    def __init__(self, task: str) -> None:
        self.task = task

    def sample(self, batch: Batch, seed: int) -> Sample:
        ids = batch.ids[:, :-1]
        if self.task == "parity":
            ids = ids % 2
            targets = ids.cumsum(1) % 2
        else:
            ids = ids * (np.random.default_rng([seed, batch.step]).random(ids.shape) < 0.3)
            at = np.maximum.accumulate(np.where(ids > 0, np.arange(ids.shape[1]), 0), axis=1)
            targets = np.take_along_axis(ids, at, 1)
        return Sample({"input_ids": torch.from_numpy(ids)}, torch.from_numpy(targets))

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        logits = outputs.logits.flatten(0, 1)
        right = (logits.argmax(-1) == sample.targets.flatten()).sum()
        total = nn.functional.cross_entropy(logits, sample.targets.flatten(), reduction="sum")
        return Loss(total, {"right": right})


def separation(name: str, task: str, updates: int, seed: int, solved: float = 2e-3) -> list[Any]:
    """Trains on 40 symbols, asks for the answer after 40 and after 200; stops early once the loss is `solved`."""
    shape = {"layers": 1, "d_model": 32, "heads": 1, "vocab_size": 8, "max_length": 256}
    model = build(preset(name, **shape), seed)
    objective, low = Running(task), 0
    optimizer = make_optimizer("adamw", model, lr=5e-3, weight_decay=0.0)
    schedule = make_schedule("cosine", updates, warmup=0.05, final=0.1)
    trainer = Trainer(model, Symbols(40, seed), objective, optimizer, schedule, seed=seed)
    for log in trainer.steps(updates):
        low = low + 1 if log.loss < solved else 0
        if low == 50:
            break
    model.eval()
    row: list[Any] = [task, name, seed, trainer.done]
    for length in (40, 200):
        source = Symbols(length, seed + 1000, rows=500)
        sample = objective.sample(source.batch(0), seed + 1000)
        with torch.no_grad():
            answers = model(**sample.inputs).logits[:, -10:].argmax(-1)
        row.append(f"{float((answers == sample.targets[:, -10:]).float().mean()):.3f}")
    return row


# -- equal seconds ------------------------------------------------------------------------------------------------


def races(size: Size) -> tuple[list[dict[str, Any]], dict[str, float], list[dict[str, Any]]]:
    """Laps of all classes, the learning rate of each model, and the standings; tuned on the first class."""
    laps, standings, rates = [], [], dict[str, float]()
    for number, name in enumerate(size.classes):
        own = "".join(f" --arm-set {m}:optimizer.lr={r}" for m, r in rates.items())
        grid = size.grid if not number else "1"
        found = run(
            f"race languini --models {','.join(MODELS)} --compute-class {name} --grid {grid} --seeds {size.seeds} "
            f"--threads 1{own}"
        )
        if not number:
            rates = {row["arm"]: row["lr"] for row in found["standings"]}
        laps += [row | {"class": name} for row in found["laps"]]
        standings += [row | {"class": name} for row in found["standings"]]
    return laps, rates, standings


def trained(place: Path, model: str, lr: float, steps: int, vocabulary: int = 2048) -> Any:
    """A model of the largest class with its checkpoints, seed 0."""
    changes = {
        "name": f"{model}-{vocabulary}",
        "model.preset": model,
        "optimizer.lr": lr,
        "steps": steps,
        "seed": 0,
        "data.tokenizer.vocab_size": vocabulary,
        "checkpoints.every": steps,
    }
    folder = train(read_recipe("languini", changes), place)
    return vesalius.open(f"{folder}@last")


def main() -> None:
    """Races, trains and writes docs/results/train-languini.md (half an hour of one quiet core)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rehearsal in less than a minute; prints the page")
    parser.add_argument("--classes", help="compute classes joined by commas, such as 8s,16s,32s")
    given = parser.parse_args()
    quick, size = given.quick, QUICK if given.quick else FULL
    if given.classes:
        size = replace(size, classes=tuple(given.classes.split(",")))
    torch.set_num_threads(1)
    place = RUNS / ("languini-quick" if quick else "languini")
    gaps = [(b, *block_gap(b)) for b in (1, 8, 16, 256)]
    speed = {n: speeds(n, size.rounds) for n in (256, 512)}
    laps, rates, standings = races(size)
    last = size.classes[-1]
    steps = {m: next(r["steps"] for r in standings if r["arm"] == m and r["class"] == last) for m in MODELS}
    parts = separation_rows(size)
    models = {m: trained(place, m, rates[m], steps[m]) for m in MODELS}
    held = data_of(read_recipe("languini")).held_out.store  # type: ignore[union-attr]
    inside = "\n".join(held.text(i) for i in range(held.n_documents))[: size.characters]
    texts = {"held-out KJV": inside}
    for name in ("bible-web", "foldoc"):
        texts[name] = "\n".join(d.text for d, _ in zip(documents(name), range(400), strict=False))[: size.characters]
    windows = [(256, 256, False), (256, 128, False), (256, 32, False), (256, 256, True)]
    scores = []
    for text_name, text in texts.items():
        for model_name, model in models.items():
            for window, n, carry in windows if text_name == "held-out KJV" else windows[:1] + windows[3:]:
                if not carry or model_name == "tiny-qlstm":
                    found = text_score(model.hf, model.tokenizer, text, window=window, last=n, carry=carry)
                    scores.append([text_name, model_name, n, "yes" if carry else "no", *_numbers(found)])
    small = models[MODELS[0]]
    per_token = characters_per_token(small.tokenizer, inside)
    large = _of_equal_text(place, rates[MODELS[0]], steps[MODELS[0]], per_token, inside)
    pair = [text_score(m.hf, m.tokenizer, inside, window=256, last=128) for m in (small, large)]
    body = page(size, gaps, speed, laps, standings, parts, scores, pair, rates, uniform())
    if quick:
        print("\n".join(body))
    else:
        seeds = f"seeds {size.seeds.replace(',', ', ')}"
        write("train-languini", "Languini in small: equal seconds", "python studies/languini.py", *body, seeds=seeds)


def separation_rows(size: Size) -> list[list[Any]]:
    """Both tasks, both LSTMs; the full one on parity with every seed."""
    rows = []
    for task, updates in (("parity", size.parity), ("last symbol", size.parity // 5)):
        for name in ("tiny-lstm", "tiny-qlstm"):
            rows += [separation(name, task, updates, seed) for seed in size.seed_list]
    return rows


def characters_per_token(tokenizer: Any, text: str) -> float:
    """Of a text."""
    return len(text) / len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _of_equal_text(place: Path, lr: float, steps: int, per_token: float, text: str) -> Any:
    """The GPT with a vocabulary of 8,192, trained on as many characters as the one with 2,048."""
    recipe = read_recipe("languini", {"data.tokenizer.vocab_size": 8192})
    longer = characters_per_token(data_of(recipe).tokenizer, text)
    return trained(place, MODELS[0], lr, max(1, round(steps * per_token / longer)), 8192)


def uniform() -> float:
    """Normalised perplexity of a model that finds all bytes alike, on ASCII text."""
    tokenizer = train_tokenizer(["abc"], "bytes", special=())
    model = build(preset("tiny-languini-gpt", vocab_size=256), 0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    text = "".join(next(iter(documents("bible-kjv"))).text)
    assert text.isascii()
    return text_score(model, tokenizer, text, window=256, last=64).per_byte


def _numbers(found: Any) -> list[str]:
    return [f"{found.token_perplexity:.1f}", f"{found.per_character:.3f}", f"{found.bits_per_character:.3f}"]


def crossing_of(laps: list[dict[str, Any]]) -> str:
    """Where the two models' laws meet, in words."""
    points = []
    for model in MODELS:
        mine = [r for r in laps if r["arm"] == model]
        points.append(([compute_class(r["class"]) for r in mine], [float(r["bits_per_byte"]) for r in mine]))
    try:
        laws = {m: fit_power_law(x, y, irreducible=False) for m, (x, y) in zip(MODELS, points, strict=True)}
        met = crossing(points[0], points[1])
    except VesaliusError as error:  # a rehearsal has too few points
        return str(error)
    told = ", ".join(f"{m} falls with exponent {laws[m].exponent:.3f}" for m in MODELS)
    if met.x is None:
        return f"{told}; {met.reason}"
    return f"{told}; they meet at {met.x:.3g} s [{met.low:.3g}, {met.high:.3g}] {met.reason}"


def page(
    size: Size,
    gaps: list[tuple[int, float, float]],
    speed: dict[int, dict[str, float]],
    laps: list[dict[str, Any]],
    standings: list[dict[str, Any]],
    parts: list[list[Any]],
    scores: list[list[Any]],
    pair: list[Any],
    rates: dict[str, float],
    alike: float,
) -> list[str]:
    """The page's parts."""
    calculated = [
        [n, f"{s:,}", c, b, f"{p:,}", f"{steps_for(s, compute_class(c), b * 512):,}"] for n, s, c, b, p in PUBLISHED
    ]
    rows = []
    for r in laps:
        if abs(r["lr"] / rates[r["arm"]] - 1) < 1e-6:
            off = r["seconds"] / compute_class(r["class"]) - 1
            normal = np.exp(r["bits_per_byte"] * np.log(2))
            told = [f"{r['class_tokens_per_second']:,.0f}", r["steps"], f"{r['seconds']:.1f} ({off:+.0%})"]
            rows.append([r["class"], r["arm"], r["seed"], *told, f"{r['bits_per_byte']:.3f}", f"{normal:.3f}"])
    tuned = [[r["arm"], f"{r['lr']:.1e}", r["grid"], "yes" if r["edge"] else "no"] for r in standings[: len(MODELS)]]
    meeting = crossing_of([r for r in laps if abs(r["lr"] / rates[r["arm"]] - 1) < 1e-6])
    factor = {n: s["qlstm"] / s["lstm, stepped in Python"] for n, s in speed.items()}
    ratio = pair[1].token_perplexity / pair[0].token_perplexity
    apart = pair[1].bits_per_character / pair[0].bits_per_character - 1
    return [
        "Corpus: King James Bible by chapters, byte-level BPE of 2,048; two layers of 64, 4 heads, length 256, 8 "
        "ordered streams; the quasi-LSTM's state goes on from batch to batch. AdamW .9/.95, eps 1e-9, no weight decay, "
        "no clipping, cosine to 1 %. One thread.",
        "## Step calculator",
        table(["model", "tokens/s", "class", "batch", "published steps", "ours"], calculated),
        "## The quasi-LSTM in blocks",
        "Largest gap to one step after the other, float32, length 256 (asked: 1e-5):",
        table(["block", "states", "gradients"], [[b, f"{s:.1e}", f"{g:.1e}"] for b, s, g in gaps]),
        "Tokens/s of one layer of width 64, forward and backward, median of interleaved rounds (asked: 3 times the "
        f"stepped LSTM at length 256; came out: {factor[256]:.0f} times, and {factor[512]:.0f} times at 512):",
        table(["length", *speed[256]], [[n, *(f"{v:,.0f}" for v in s.values())] for n, s in speed.items()]),
        "## Equal seconds",
        f"`vesalius race languini --models {','.join(MODELS)} --compute-class {size.classes[-1]}`; learning rates were "
        "tuned on the first class (held-out loss by rising rate):",
        table(["model", "rate", "grid", "best at its edge"], tuned),
        "Normalised perplexity is per UTF-8 byte of held-out text (windows of 256, all tokens scored, no state "
        "carried). The seconds are those the steps took, and how far they are from the class: other work on the "
        "machine shows there, while the number of steps comes from the measured median alone.",
        table(["class", "model", "seed", "tokens/s", "steps", "seconds", "bits/byte", "norm. ppl"], rows),
        f"Power laws through these points (bits/byte against seconds): {meeting}.",
        f"A model that finds all bytes alike scores {alike:.4f} on ASCII text (asked: 256).",
        "## Windows, and text of another kind",
        "The models of the largest class, seed 0; `last` tokens scored of windows of 256; per character.",
        table(
            ["text", "model", "last", "state carried", "token ppl", "norm. ppl / character", "bits/character"], scores
        ),
        "## Two tokenizers",
        "The GPT trained on equal text with vocabularies of 2,048 and 8,192 (asked: token perplexities 2 times apart, "
        f"bits/character within 15 %; came out: {ratio:.2f} times, {apart:+.1%}):",
        table(
            ["vocabulary", "tokens", "token ppl", "norm. ppl / character", "bits/character"],
            [[v, f"{s.tokens:,}", *_numbers(s)] for v, s in zip((2048, 8192), pair, strict=True)],
        ),
        "The Bible's own 2,048 tokens cover it so well that 8,192 save few more: token perplexity, which longer tokens "
        "raise, has little to grow by. Text of many domains would set the two further apart.",
        "## What gates that see the input only cannot do",
        "One layer of 32, one head, trained on the answer at each of 40 positions; share right over the last ten "
        "positions of 500 rows (asked at 200: full LSTM .99 and quasi-LSTM at most .6 on parity, "
        "both .95 on the last symbol seen):",
        table(["task", "model", "seed", "updates", "after 40", "after 200"], parts),
    ]


if __name__ == "__main__":
    main()
