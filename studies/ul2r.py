"""UL2R: a language model of look-ups learns to fill in, by a short continuation on a mixture of denoisers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _page import RUNS, table, write
from _runs import flops_a_step, interval, is_quick, trained, verdict

import vesalius
from vesalius.corpus.grammar import LookupGrammar
from vesalius.evaluate.infill import infill
from vesalius.model import Model
from vesalius.train.curves import steps_to
from vesalius.train.objectives.special import MODES, sentinels
from vesalius.train.recipe import Recipe, read_recipe

SENTINELS = sentinels(16)
SHAPE = {"layers": 2, "d_model": 64, "d_ff": 256, "heads": 4, "kv_heads": 4, "tied": False}
UL2R: dict[str, Any] = {"name": "ul2", "mixture": "ul2r", "cross_document": "mask"}
CAUSAL: dict[str, Any] = {"name": "causal-lm", "cross_document": "mask"}
LOOKS = 4  # checkpoints of a continuation


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    lm_steps: int
    branches: tuple[int, ...]  # steps that UL2R goes on from; all of them with the first seed, the last with each
    ul2r_steps: int
    documents: int
    rows: tuple[int, int]  # a batch of the language model's, of the continuations'


FULL = Size((0,), 8000, (500, 2000, 8000), 800, 200_000, (48, 128))
QUICK = Size((0,), 100, (50, 100), 12, 2000, (8, 8))


def lookup_corpus(folder: Path, size: Size) -> LookupGrammar:
    """Writes corpus.jsonl and tokenizer/ into the folder, unless they are there."""
    grammar = LookupGrammar(16, seed=0)
    if not (folder / "corpus.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        grammar.tokenizer((*SENTINELS, *MODES.values())).save_pretrained(folder / "tokenizer")
        lines = (json.dumps({"id": d.id, "text": d.text}) for d in grammar.documents(size.documents, 1))
        (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return grammar


def lookup_recipe(
    name: str, folder: Path, size: Size, seed: int, steps: int, source: str | None, objective: dict[str, Any]
) -> Recipe:
    """A Llama of 0.14 M parameters on look-ups: from scratch at a constant rate, or on from a checkpoint to its end."""
    fresh = source is None
    constant = {"name": "constant", "warmup": min(1.0, 60 / steps)}
    every = {"at": sorted({*size.branches, *(size.lm_steps // 2**k for k in range(6))})} if fresh else {}
    return read_recipe(
        {
            "name": name,
            "model": {"preset": "tiny-llama", "architecture": SHAPE} if fresh else {"source": source},
            "data": {
                "corpus": str(folder / "corpus.jsonl"),
                "tokenizer": str(folder / "tokenizer"),
                "length": 40,
                "rows": size.rows[0 if fresh else 1],
                "held_out": 0,  # there are 256 sentences, and all are asked about
                "seed": seed if fresh else 1000 + seed,
            },
            "objective": objective,
            "optimizer": {
                "name": "adamw",
                "lr": 3e-3 if fresh else 5e-3,
                "betas": [0.9, 0.99],
                "weight_decay": 0.01,
            },
            "schedule": constant if fresh else {"name": "cosine", "warmup": 0.05, "final": 0.0},
            "steps": steps,
            "checkpoints": {"log": False, "every": steps if fresh else steps // LOOKS, "keep_state": "last"} | every,
            "seed": seed,
        }
    )


class Asked:
    """What a model of look-ups is asked: every sentence there is."""

    def __init__(self, grammar: LookupGrammar, end: int) -> None:
        self.size, self.table = grammar.size, grammar.table
        ids = grammar.every()
        self.ids = np.concatenate([ids, np.full((len(ids), 1), end)], axis=1)
        self.middle = np.arange(grammar.size, 2 * grammar.size)

    def infill(self, model: Model, mode: Literal["R"] | None, mask: Literal["prefix", "causal"]) -> float:
        """Share of all sentences whose hidden m is told among the m's, a and b given."""
        at = np.ones(len(self.ids), dtype=np.int64)
        return infill(model, self.ids, at, mode=mode, mask=mask, among=self.middle).accuracy

    def lm_loss(self, model: Model) -> float:
        """Left-to-right loss over all sentences, nats a token; with U-PaLM's mode before them where that is better."""
        tokenizer: Any = model.tokenizer
        mode = tokenizer.convert_tokens_to_ids(MODES["mode_s"])
        return min(self._loss(model, first) for first in ([], [mode]))

    def _loss(self, model: Model, first: list[int]) -> float:
        ids = torch.from_numpy(np.insert(self.ids, 0, first[0], axis=1) if first else self.ids)
        chance = model.logits(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -float(chance[:, len(first) :].mean())

    def by_ranking(self, model: Model) -> float:
        """Share of sentences whose m makes the whole likeliest: what a left-to-right model knows without infilling."""
        every = np.repeat(self.ids[:, None], self.size, axis=1)  # (sentence, candidate, pos)
        every[:, np.arange(self.size), 1] = self.middle
        flat = torch.from_numpy(every.reshape(-1, every.shape[-1]))
        chance = model.logits(flat[:, :-1]).log_softmax(-1).gather(-1, flat[:, 1:, None])[..., 0].sum(1)
        best = chance.reshape(len(self.ids), -1).argmax(1).numpy()
        return float((self.middle[best] == self.ids[:, 1]).mean())


@dataclass(frozen=True)
class Branch:
    """A branch point of one seed: (infill accuracy, left-to-right loss) before, after UL2R, and of the causal twin."""

    seed: int
    step: int
    before: tuple[float, float]
    ranked: float
    after: tuple[float, float]
    twin: tuple[float, float]
    saved: float | None  # operations the language model takes to that loss, over those of branch and UL2R together
    path: tuple[float, ...]  # infill accuracy at each look of the continuation


def branches(size: Size, seed: int, name: str) -> list[Branch]:
    """The language model of a seed, and both continuations from each branch point."""
    folder = RUNS / name / "lookup"
    grammar = lookup_corpus(folder, size)
    base = trained(lookup_recipe(f"lookup-lm-{seed}", folder, size, seed, size.lm_steps, None, CAUSAL), name)
    tokenizer: Any = vesalius.open(f"{base}@last").tokenizer
    asked = Asked(grammar, tokenizer.eos_token_id)
    steps = [int(p.name[4:]) for p in sorted((base / "steps").iterdir()) if p.name.startswith("step")]
    curve = [(s, asked.lm_loss(vesalius.open(f"{base}@step{s}"))) for s in sorted(steps)]
    found = []
    for step in size.branches if seed == size.seeds[0] else size.branches[-1:]:
        start = f"{base}@step{step}"
        runs = {}
        for what, objective in (("ul2r", UL2R), ("twin", CAUSAL)):
            recipe = lookup_recipe(
                f"lookup-{what}-{step}-{seed}", folder, size, seed, size.ul2r_steps, start, objective
            )
            runs[what] = trained(recipe, name)
        models = {"before": vesalius.open(start)} | {k: vesalius.open(f"{r}@last") for k, r in runs.items()}
        # whatever way of asking suits a causal model best counts for it
        causal = {k: max(asked.infill(models[k], m, "causal") for m in (None, "R")) for k in ("before", "twin")}
        losses = {k: asked.lm_loss(m) for k, m in models.items()}
        looks = [size.ul2r_steps * i // LOOKS for i in range(1, LOOKS + 1)]
        path = [asked.infill(vesalius.open(f"{runs['ul2r']}@step{s}"), "R", "prefix") for s in looks]
        cost = step * flops_a_step(base) + size.ul2r_steps * flops_a_step(runs["ul2r"])
        reached = steps_to(np.array(curve).T, losses["ul2r"])
        saved = None if reached is None else reached * flops_a_step(base) / cost
        found.append(
            Branch(
                seed,
                step,
                (causal["before"], losses["before"]),
                asked.by_ranking(models["before"]),
                (path[-1], losses["ul2r"]),
                (causal["twin"], losses["twin"]),
                saved,
                tuple(path),
            )
        )
    return found


def ul2r(size: Size, folder: str) -> list[str]:
    """The page."""
    found = [b for seed in size.seeds for b in branches(size, seed, folder)]
    last = [b for b in found if b.step == size.branches[-1]]
    worse = [b.after[1] / b.before[1] - 1 for b in last]

    def means(values: list[float]) -> str:
        return f"{np.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"

    claims = [
        [
            "infill accuracy before at most 1/16 + .03",
            means([b.before[0] for b in last]),
            verdict([b.before[0] <= 1 / 16 + 0.03 for b in last]),
        ],
        [
            f"after UL2R at least .9 ({size.ul2r_steps} steps, {size.ul2r_steps / size.lm_steps:.0%} of the others)",
            means([b.after[0] for b in last]),
            verdict([b.after[0] >= 0.9 for b in last], bool(np.mean([b.after[0] for b in last]) >= 0.9)),
        ],
        [
            "the causal twin, continued as long, at most .15",
            means([b.twin[0] for b in last]),
            verdict([b.twin[0] <= 0.15 for b in last]),
        ],
        [
            "left-to-right loss at most 3 % worse",
            ", ".join(f"{w:+.1%}" for w in worse),
            verdict([w <= 0.03 for w in worse], bool(np.mean(worse) <= 0.03)),
        ],
    ]
    rows = [
        [b.seed, b.step, f"{b.before[0]:.2f}", f"{b.ranked:.2f}", f"{b.after[0]:.2f}", f"{b.twin[0]:.2f}"]
        + [f"{x[1]:.3f}" for x in (b.before, b.after, b.twin)]
        + ["not reached" if b.saved is None else f"{b.saved:.2f}"]
        for b in found
    ]
    ratios = [b.saved for b in found if b.saved is not None]
    if len(ratios) > 1:
        mean, low, high = interval(np.log(ratios).tolist())
        told = f"{math.exp(mean):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}] over {len(ratios)} pairs"
    else:
        told = f"{len(ratios)} pairs, too few for an interval"
    total = [size.rows[1] * size.ul2r_steps, size.rows[0] * size.lm_steps]
    return [
        "## UL2R on a language of look-ups",
        "A document is one sentence a m b with m = table[a, b], a Latin square of 16 x 16 (`vesalius.corpus.grammar`): "
        "from the left m is as uncertain as a, and b follows from both; filled in from both sides m is certain. "
        f"A Llama of 2 layers of 64 reads rows of 40 tokens, no document another; {size.lm_steps:,} steps of "
        f"{size.rows[0]} rows from the left at 3e-3, then {size.ul2r_steps} steps of {size.rows[1]} rows of `ul2` or, "
        "for the twin, of the same again, both at 5e-3 with a fresh optimizer and a cosine "
        f"({total[0] / total[1]:.0%} of the rows before, since few of the denoisers' spans hide just the m). The "
        "mixture is U-PaLM's. All 256 sentences are asked about, the m hidden behind a sentinel and chosen among the "
        "16 m's (chance .06); causal models are asked with and without a mode token, the better counts, and so for "
        "left-to-right loss.",
        table(["what was asked (last branch point)", "what came out", ""], claims),
        table(
            ["seed", "branch", "infill before", "ranked", "after UL2R", "twin", "loss before", "after UL2R", "twin"]
            + ["compute of equal loss"],
            rows,
        ),
        "`ranked` is the accuracy of the m that makes the whole sentence likeliest before UL2R: whether the language "
        "model knows the table, though it cannot be asked for it. Losses are left-to-right, nats a token "
        f"(at best {math.log(16) / 3:.3f}: the first token is not foretold, and m is uncertain). The last column is "
        "what the language model alone spends to come to the same left-to-right loss, over what was spent on the "
        f"branch and UL2R together: {told}. Below 1, UL2R saves nothing by this score: a language without redundancy "
        "has little to gain from infilling but infilling itself.",
        "Infilling by steps of UL2R; where it comes, it comes late and then at once:",
        table(
            ["seed", "branch", *(f"{size.ul2r_steps * i // LOOKS}" for i in range(1, LOOKS + 1))],
            [[b.seed, b.step, *(f"{x:.2f}" for x in b.path)] for b in found],
        ),
        "What decides is how long the language model was trained before: from 500 steps on, the look-ups are learnt "
        "the other way round within 800 steps; from 2,000 or 8,000 steps on, nothing stirs in as many (nor at two and "
        "four times the rate, tried with the last). A model whose loss could not fall for thousands of steps seems to "
        "have lost what it would learn with, as in work on loss of plasticity; U-PaLM's was still learning.",
    ]


def main() -> None:
    """Trains everything (a quarter of an hour on one core) and writes docs/results/train-ul2r.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    body = ul2r(size, "ul2r-quick" if quick else "ul2r")
    if quick:
        print("\n".join(body))
        return
    seeds = f"seed{'s' if len(size.seeds) > 1 else ''} {', '.join(map(str, size.seeds))}"
    write("train-ul2r", "UL2R in small", "python studies/ul2r.py", *body, seeds=seeds)


if __name__ == "__main__":
    main()
