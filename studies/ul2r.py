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
from _runs import flops_a_step, held_out, interval, is_quick, trained, verdict

import vesalius
from vesalius.corpus.grammar import LookupGrammar
from vesalius.evaluate.infill import infill
from vesalius.model import Model
from vesalius.train.assembly import data_of
from vesalius.train.curves import steps_to
from vesalius.train.objectives.special import MODES, sentinels
from vesalius.train.recipe import Recipe, read_recipe

SENTINELS = sentinels(16)
# Two tied layers of 64 learn the look-ups late and lose them again at the rate they need.
SHAPE = {"layers": 3, "d_model": 96, "d_ff": 384, "heads": 4, "kv_heads": 4, "tied": False}
UL2R: dict[str, Any] = {"name": "ul2", "mixture": "ul2r"}
UL2R_TOLD = "The mixture is U-PaLM's."


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    lm_steps: int
    branches: tuple[int, ...]  # steps that UL2R goes on from
    ul2r_steps: int
    grammar_documents: int
    asked: int  # rows to fill in


FULL = Size((0, 1, 2), 4000, (1000, 2000, 4000), 400, 20_000, 512)
QUICK = Size((0,), 100, (50, 100), 10, 400, 64)


def lookup_corpus(folder: Path, size: Size) -> LookupGrammar:
    """Writes corpus.jsonl and tokenizer/ into the folder, unless they are there."""
    grammar = LookupGrammar(16, seed=0)
    if not (folder / "corpus.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        grammar.tokenizer((*SENTINELS, *MODES.values())).save_pretrained(folder / "tokenizer")
        lines = (json.dumps({"id": d.id, "text": d.text}) for d in grammar.documents(size.grammar_documents, 16))
        (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return grammar


def lookup_recipe(
    name: str, folder: Path, size: Size, seed: int, steps: int, source: str | None, objective: dict[str, Any]
) -> Recipe:
    """A Llama of 0.5 M parameters on look-ups: from scratch at a constant rate, or on from a checkpoint to its end."""
    fresh = source is None
    constant = {"name": "constant", "warmup": min(1.0, 60 / steps)}
    return read_recipe(
        {
            "name": name,
            "model": {"preset": "tiny-llama", "architecture": SHAPE} if fresh else {"source": source},
            "data": {
                "corpus": str(folder / "corpus.jsonl"),
                "tokenizer": str(folder / "tokenizer"),
                "length": 32,
                "rows": 48,
                "seed": seed if fresh else 1000 + seed,
            },
            "objective": objective,
            "optimizer": {"name": "adamw", "lr": 4e-3, "betas": [0.9, 0.99], "weight_decay": 0.01},
            "schedule": constant if fresh else {"name": "cosine", "warmup": 0.05, "final": 0.05},
            "steps": steps,
            "checkpoints": {"log": False, "every": steps, "at": list(size.branches), "keep_state": "last"},
            "evaluate": {"every": max(1, steps // 40), "batches": 8},
            "seed": seed,
        }
    )


class Asked:
    """What a model of look-ups is asked; the same for all."""

    def __init__(self, grammar: LookupGrammar, recipe: Recipe, rows: int) -> None:
        self.grammar = grammar
        self.ids, self.starts = grammar.rows(rows, 10)
        order = data_of(recipe).held_out
        assert order is not None
        self.batches = [order.batch(step) for step in range(8)]
        self.middle = np.arange(grammar.size, 2 * grammar.size)

    def infill(self, model: Model, mode: Literal["R"] | None, mask: Literal["prefix", "causal"]) -> float:
        """Accuracy of the hidden m among the m's, a and b given."""
        return infill(model, self.ids, self.starts, mode=mode, mask=mask, among=self.middle).accuracy

    def lm_loss(self, model: Model) -> float:
        """Left-to-right loss on held-out text, nats a token."""
        total = count = 0.0
        for batch in self.batches:
            ids = torch.from_numpy(np.ascontiguousarray(batch.ids))
            keep = torch.from_numpy(batch.segments[:, 1:] >= 0)
            chance = model.logits(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            total, count = total - float(chance[keep].sum()), count + float(keep.sum())
        return total / count

    def by_ranking(self, model: Model, rows: int = 64) -> float:
        """Accuracy of the m that makes the whole text likeliest: what a left-to-right model knows without infilling."""
        ids, at = self.ids[:rows], self.starts[:rows]
        every = np.repeat(ids[:, None], self.grammar.size, axis=1)  # (row, candidate, pos)
        every[np.arange(len(ids))[:, None], np.arange(self.grammar.size), at[:, None]] = self.middle
        flat = torch.from_numpy(every.reshape(-1, ids.shape[1]))
        chance = model.logits(flat[:, :-1]).log_softmax(-1).gather(-1, flat[:, 1:, None])[..., 0].sum(1)
        best = chance.reshape(len(ids), -1).argmax(1).numpy()
        return float((self.middle[best] == ids[np.arange(len(ids)), at]).mean())


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


def branches(size: Size, seed: int, name: str) -> list[Branch]:
    """The language model of a seed, and both continuations from each branch point."""
    folder = RUNS / name / "lookup"
    grammar = lookup_corpus(folder, size)
    first = lookup_recipe(f"lookup-lm-{seed}", folder, size, seed, size.lm_steps, None, {"name": "causal-lm"})
    base = trained(first, name)
    asked = Asked(grammar, first, size.asked)
    found = []
    for step in size.branches:
        start = f"{base}@step{step}"
        runs = {}
        for what, objective in (("ul2r", UL2R), ("twin", {"name": "causal-lm"})):
            recipe = lookup_recipe(
                f"lookup-{what}-{step}-{seed}", folder, size, seed, size.ul2r_steps, start, objective
            )
            runs[what] = trained(recipe, name)
        models = {"before": vesalius.open(start)} | {k: vesalius.open(f"{r}@last") for k, r in runs.items()}
        # whatever way of asking suits a causal model best counts for it
        causal = {k: max(asked.infill(models[k], m, "causal") for m in (None, "R")) for k in ("before", "twin")}
        losses = {k: asked.lm_loss(m) for k, m in models.items()}
        cost = step * flops_a_step(base) + size.ul2r_steps * flops_a_step(runs["ul2r"])
        reached = steps_to(held_out(base), losses["ul2r"])
        saved = None if reached is None else reached * flops_a_step(base) / cost
        found.append(
            Branch(
                seed,
                step,
                (causal["before"], losses["before"]),
                asked.by_ranking(models["before"]),
                (asked.infill(models["ul2r"], "R", "prefix"), losses["ul2r"]),
                (causal["twin"], losses["twin"]),
                saved,
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
    return [
        "## UL2R on a language of look-ups",
        "Sentences a m b with m = table[a, b], a Latin square of 16 x 16 (`vesalius.corpus.grammar`). "
        f"A Llama of 3 layers of 96, 48 rows of 32 tokens a step, AdamW at 4e-3; {size.lm_steps} steps from the "
        f"left, then {size.ul2r_steps} steps of `ul2` or, for the twin, of the same again, both with a fresh "
        f"optimizer, the same rows and a cosine. {UL2R_TOLD} {size.asked} rows of 10 sentences, one inner m hidden "
        "behind a sentinel, chosen among the 16 m's (chance .06); causal models are asked with and without a mode "
        "token, the better counts.",
        table(["what was asked (last branch point)", "what came out", ""], claims),
        table(
            ["seed", "branch", "infill before", "ranked", "after UL2R", "twin", "loss before", "after UL2R", "twin"]
            + ["compute of equal loss"],
            rows,
        ),
        "`ranked` is the accuracy of the m that makes the whole text likeliest before UL2R: whether the language "
        "model knows the table, though it cannot be asked for it. Losses are left-to-right, nats a token "
        f"(the entropy of the text is about {2 * math.log(16) / 3:.2f}). The last column is what the language model "
        "alone spends to come to the "
        f"same left-to-right loss, over what was spent on the branch and UL2R together: {told}. Below 1, UL2R saves "
        "nothing by this score: a language without redundancy has little to gain from infilling but infilling itself.",
    ]


def main() -> None:
    """Trains everything (ten minutes on one core) and writes docs/results/train-ul2r.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    body = ul2r(size, "ul2r-quick" if quick else "ul2r")
    if quick:
        print("\n".join(body))
        return
    seeds = f"seeds {', '.join(map(str, size.seeds))}"
    write("train-ul2r", "UL2R in small", "python studies/ul2r.py", *body, seeds=seeds)


if __name__ == "__main__":
    main()
