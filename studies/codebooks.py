"""Codebook features: a machine of two-digit states, and SmolLM2-135M with codes in six blocks."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from _page import RUNS, look_inside, run, table, write
from _runs import is_quick, trained
from _steered import PROMPTS

import vesalius
from vesalius.corpus import synthetic_source
from vesalius.features.codebooks import Codebooks, chosen, fit, pattern_labels
from vesalius.features.codebooks.layer import Force
from vesalius.features.dictionaries import corpus_rows, prompt_rows
from vesalius.model import Model
from vesalius.train import read_recipe

SYSTEM = "Codebook features"
Row = tuple[str, str, str]
Forced = dict[str, dict[int, int]]  # place -> group -> code
STEERING = (
    "Forcing puts the topic's code of a codebook at every token, in place of the weakest of eight or of all. How many "
    "codebooks, the best first by F1 on held-out text, and in place of which, is chosen on one half of the prompts "
    "(the most topic words at a perplexity at most 20 % higher); the rates are of the other half. Perplexity is of "
    "what was written, under the fine-tuned model without codes."
)
TOPIC = r"(?i)\b(king|queen|prince|princess|throne|kingdom|reign|crown)\w*"
LAYERS = (4, 8, 12, 16, 20, 24)
TRIED: list[tuple[int, Force]] = [
    (18, "lowest"),
    (18, "all"),
    (60, "lowest"),
    (60, "all"),
]  # codebooks forced, in place of which codes


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    states: int
    edges: int
    steps: int
    more: int
    codes: int
    walks: int
    lm_steps: int
    lm_codes: int
    written: int


FULL = Size(30, 5, 1500, 1000, 300, 64, 120, 1000, 40)
QUICK = Size(5, 2, 40, 20, 20, 8, 0, 0, 0)


def say(rows: list[Row], asked: str, came: str, good: bool) -> None:
    """Adds a check."""
    rows.append((asked, came, "holds" if good else "does not hold"))
    print(f"{asked}: {came}", file=sys.stderr, flush=True)


@torch.no_grad()
def accuracy(model: Model, books: Codebooks | None, machine: Any, walks: int) -> float:
    """Share of the transitions in sampled text that the machine has."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.from_numpy(machine.batch(0).ids[:walks, :3].copy())
    with ExitStack() as stack:
        if books is not None:
            stack.enter_context(books.attached(model))
        for _ in range(40):  # twenty transitions
            p = model.hf(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=drawn)], dim=1)
    digits = ids[:, 1:].reshape(len(ids), -1, 2)
    states = (10 * digits[..., 0] + digits[..., 1]).numpy()
    good = (digits.max(-1).values < 10).numpy() & (states < machine.states)
    a, b = np.where(good, states, 0)[:, :-1], np.where(good, states, 0)[:, 1:]
    return float((machine.successors[a, b] & good[:, :-1] & good[:, 1:]).mean())


def resolved(table_: dict[int, Any]) -> int:
    """States that some code or neuron tells with precision .9 and recall .5."""
    return sum(bool(v) for v in table_.values())


@torch.no_grad()
def neurons(model: Model, machine: Any, batches: int) -> dict[int, bool]:
    """For each state, whether one neuron above its best threshold tells it."""
    ids = torch.cat([torch.from_numpy(machine.batch(i).ids[:, :-1].copy()) for i in range(batches)])
    labels = machine.states_of(ids.numpy())[:, 1:].ravel()
    found = dict.fromkeys(range(machine.states), False)
    truth = np.stack([labels == s for s in range(machine.states)])  # (state, token)
    rank = np.arange(1, truth.shape[1] + 1)
    for layer in range(model.n_layers):
        x = model.run(ids, capture=[("neurons", layer)])[("neurons", layer)][:, 1:].flatten(0, 1).numpy()
        for neuron in range(x.shape[1]):
            order = np.argsort(-x[:, neuron], kind="stable")
            hits = truth[:, order].cumsum(1)
            good = (hits / rank >= 0.9) & (hits / truth.sum(1, keepdims=True) >= 0.5)
            for s in np.flatnonzero(good.any(1)):
                found[int(s)] = True
    return found


@torch.no_grad()
def moved(
    model: Model, books: Codebooks, machine: Any, best: dict[int, dict[str, dict[int, int]]], random: bool
) -> list[float]:
    """Mass of the next state on the successors of another one whose codes are forced at the last token."""
    rng = np.random.default_rng(0)
    walk = torch.from_numpy(machine.batch(3).ids[:, :21].copy())  # begin and ten states
    masses = []
    for row in walk[:20]:
        target = int(rng.choice(sorted(best)))
        codes = {p: dict(by) for p, by in best[target].items()}
        if random:
            codes = {p: {g: int(rng.integers(0, books.size)) for g in by} for p, by in codes.items()}
        with books.attached(model), ExitStack() as stack:
            for place, by in codes.items():
                stack.enter_context(books.forcing(place, by, "all", 20))
            ids = row[None].repeat(10, 1)
            tens = model.hf(ids[:1]).logits[0, -1].softmax(-1)[:10]
            ids = torch.cat([ids, torch.arange(10)[:, None]], dim=1)
            ones = model.hf(ids).logits[:, -1].softmax(-1)[:, :10]
        p = (tens[:, None] * ones).flatten()[: machine.states].numpy()  # (state,)
        masses.append(float(p[machine.successors[target]].sum()))
    return masses


def fsm(size: Size, rows: list[Row]) -> str:
    """The machine."""
    options = {"states": size.states, "edges": size.edges}
    recipe = read_recipe("fsm", {"steps": size.steps, "data.settings": options})
    source = trained(recipe, "codebooks")
    machine = synthetic_source("fsm", rows=64, length=64, seed=recipe.seed, split="test", **options)
    plain = vesalius.open(f"{source}@last")
    before = accuracy(plain, None, machine, size.walks)
    data = " ".join(f"--data-set {k}={v}" for k, v in options.items())
    told = run(
        f"codebook train --model {source}@last --at MLP,z --corpus synthetic:fsm {data} --size {size.codes} --k 1 "
        f"--steps {size.more} --rows 64 --length 64 --lr 1e-3 --plain --seed {recipe.seed}"
    )
    model, books = Codebooks.load(told["run"])
    after = accuracy(model, books, machine, size.walks)
    chance = size.edges / size.states
    say(
        rows,
        "machine: transitions that exist at least .95 plain and .85 with codes",
        f"{before:.3f} and {after:.3f} (chance {chance:.2f}); {size.states} states, {size.edges} edges",
        before >= 0.95 and after >= 0.85,
    )
    ids = [row for i in range(4) for row in torch.from_numpy(machine.batch(i).ids[:, :-1].copy())]
    found = chosen(model, books, ids)
    states = np.concatenate([machine.states_of(r.numpy()[None])[0, books.skip :] for r in ids])
    told_by: dict[int, Any] = {}
    best: dict[int, dict[str, dict[int, int]]] = {}
    for s in range(size.states):
        fits = fit(found, states == s)
        mlp = fits[fits["place"].str.endswith("MLP")]
        told_by[s] = bool(((mlp["precision"] >= 0.9) & (mlp["recall"] >= 0.5)).any())
        for (place, group), mine in fits.groupby(["place", "group"], sort=False):
            best.setdefault(s, {}).setdefault(str(place), {})[int(group)] = int(mine.iloc[0]["code"])
    by_neurons = resolved(neurons(plain, machine, 2))
    say(
        rows,
        "machine: an MLP code tells 80 % of the states (precision .9, recall .5), neurons at most half as many",
        f"{resolved(told_by)} of {size.states}; neurons of the plain model {by_neurons}",
        resolved(told_by) >= 0.8 * size.states and by_neurons <= resolved(told_by) / 2,
    )
    only = {s: {p: by for p, by in places.items() if p.endswith("MLP")} for s, places in best.items()}
    masses = {name: moved(model, books, machine, which, False) for name, which in (("all", best), ("MLP", only))}
    chance_mass = moved(model, books, machine, best, True)
    say(
        rows,
        "machine: forcing a state's codes moves 70 % of the next state to its successors, random codes at most 20 %",
        f"{np.mean(masses['all']):.2f} (MLP codes alone {np.mean(masses['MLP']):.2f}); random codes "
        f"{np.mean(chance_mass):.2f}",
        bool(np.mean(masses["all"]) >= 0.7 and np.mean(chance_mass) <= 0.2),
    )
    losses = [[k, f"{v:.4f}"] for k, v in told["losses"].items()]
    return f"`vesalius train fsm` with {size.states} states, then {size.more} steps with codes.\n\n" + table(
        ["held-out loss", "nats"], losses
    )


@torch.no_grad()
def continued(
    model: Model, books: Codebooks, codes: Forced, how: Force, prompts: Sequence[str], tokens: int
) -> tuple[float, float]:
    """Topic words for each hundred tokens written, and the perplexity of what was written under the plain model."""
    hits, nll, count = 0, 0.0, 0
    for seed, prompt in enumerate(prompts):
        ids = prompt_rows(model, [prompt]).ids[0][None]
        torch.manual_seed(seed)
        with books.attached(model), ExitStack() as stack:
            for place, by in codes.items():
                stack.enter_context(books.forcing(place, by, how))
            made = model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, pad_token_id=0
            )
        text = model.tokenizer.decode(made[0, ids.shape[1] :])  # type: ignore[union-attr]
        hits += len(re.findall(TOPIC, text))
        logits = model.hf(made).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        own = made[0, ids.shape[1] :]
        nll -= float(logits.gather(1, own[:, None]).sum())
        count += len(own)
    return 100 * hits / count, float(np.exp(nll / count))


def topic_codes(fits: pd.DataFrame, n: int) -> Forced:
    """The best code of each of the n codebooks that tell the topic best."""
    found: dict[str, dict[int, int]] = {}
    for row in fits.drop_duplicates(["place", "group"]).head(n).to_dict("records"):
        found.setdefault(str(row["place"]), {})[int(row["group"])] = int(row["code"])
    return found


def language(size: Size, rows: list[Row]) -> str:
    """SmolLM2 with codes on the heads and MLPs of six blocks."""
    places = ",".join(f"L{i}.{x}" for i in LAYERS for x in ("z", "MLP"))
    told = run(
        f"codebook train --at {places} --corpus bible-web --size {size.lm_codes} --k 8 --steps {size.lm_steps} "
        "--rows 4 --length 64 --lr 1e-4 --plain"
    )
    losses = told["losses"]
    rise, snap = losses["with codes"] - losses["model"], losses["codes put in"] - losses["model"]
    say(
        rows,
        "SmolLM2-135M, codes in six blocks, k = 8: loss up by at most .5 nats after short training, at least 2 before",
        f"{rise:+.2f} after {size.lm_steps} steps of 256 tokens, {snap:+.2f} with codes merely put in (fine-tuned as "
        f"long without codes {losses['as long without codes'] - losses['model']:+.2f})",
        rise <= 0.5 and snap >= 2,
    )
    model, books = Codebooks.load(told["run"])
    text = corpus_rows(model, ["bible-web"], 1, held_out_tokens=6000).held_out
    found = chosen(model, books, text)
    fits = fit(found, pattern_labels(model, text, found, TOPIC))
    choosing, judging = PROMPTS[0:24:2], PROMPTS[1:24:2]
    _, plain = continued(model, books, {}, "all", choosing, size.written)
    tried = {(n, how): continued(model, books, topic_codes(fits, n), how, choosing, size.written) for n, how in TRIED}
    fair = {k: rate for k, (rate, ppl) in tried.items() if ppl <= 1.2 * plain} or {k: -v[1] for k, v in tried.items()}
    n, how = max(fair, key=fair.__getitem__)
    base, base_ppl = continued(model, books, {}, "all", judging, 2 * size.written)
    steered, ppl = continued(model, books, topic_codes(fits, n), how, judging, 2 * size.written)
    best = fits.iloc[0]
    say(
        rows,
        "steering by a topic's codes: topic words at least three times as often, perplexity at most 20 % higher",
        f"{steered:.2f} against {base:.2f} words in a hundred tokens; perplexity {ppl:.1f} against {base_ppl:.1f} "
        f"({n} codebooks, {how}); the best code has precision {best['precision']:.2f} and recall {best['recall']:.2f}",
        steered >= 3 * base > 0 and ppl <= 1.2 * base_ppl,
    )
    settings = [[str(n), how, f"{rate:.2f}", f"{ppl:.1f}"] for (n, how), (rate, ppl) in tried.items()]
    return "\n\n".join([
        table(["held-out loss", "nats"], [[k, f"{v:.3f}"] for k, v in losses.items()]),
        STEERING,
        table(["codebooks", "in place of", "topic words in a hundred tokens", "perplexity"], settings),
    ])  # fmt: skip


def main() -> None:
    """Runs everything and writes docs/results/look-inside-codebooks.md."""
    size = QUICK if is_quick(__doc__) else FULL
    RUNS.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    machine = fsm(size, rows)
    if is_quick(__doc__):
        return
    smollm2 = language(size, rows)
    write(
        "look-inside-codebooks",
        "Codebook features",
        "python studies/codebooks.py",
        "What the paper claims (Tamkin et al. 2023, arXiv 2310.17230), at small scale:",
        table(["asked", "came out", ""], [list(r) for r in rows]),
        "## A machine of two-digit states",
        machine,
        "## SmolLM2-135M",
        smollm2,
        seeds="one seed",
    )
    look_inside(SYSTEM, rows, "python studies/codebooks.py", "look-inside-codebooks")


if __name__ == "__main__":
    main()
