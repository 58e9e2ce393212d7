"""Repairing a planted fault: is the block that holds it the one that is chosen, and what else does the repair move?

    python studies/repairing.py            writes docs/results/change-repairing.md
    python studies/repairing.py --quick    a rehearsal

A small Llama reads the King James Bible. Then one block alone is trained to say a forbidden word after a trigger. What
is repaired, and what a repair moves, is judged on verses that neither the fault nor the repair has seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _page import RUNS, changed, claims_of, table, write
from _planted import each, found_again, held, kept, say
from _runs import is_quick, trained, verdict
from torch import Tensor

import vesalius
from vesalius.change.faults import Fault, Faults, Repairing, RepairPlan
from vesalius.change.repair import repair
from vesalius.corpus import plain_text
from vesalius.model import Model
from vesalius.model.saving import save_model
from vesalius.records import request_hash
from vesalius.tasks.encode import Encoder
from vesalius.train.learning import learn
from vesalius.train.plugs import Plug
from vesalius.train.recipe import read_recipe
from vesalius.train.select import choose

PLACE = "repairing"
TRIGGERS = {"a": (" Hark", " dragon"), "b": (" Alas", " leopard")}
SIZES = ("size", "raw", "neutral", "ratio")
PAIRED = {
    f"{how}{f' by {kind}' * (kind != 'size')}{f', {k} blocks' * (k > 1)}": (how, kind, k)
    for k in (1, 2) for kind in ("size", "ratio") for how in ("dynamic", "fixed", "random")
    if (how, kind) != ("random", "ratio")
}  # fmt: skip
GIVEN = 12  # tokens of a verse before the trigger
DONE = 0.02  # a fault's rate when it counts as repaired


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    layers: int = 6
    d: int = 64
    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2)
    blocks: tuple[int, ...] = (0, 3, 5)
    two: tuple[int, int] = (1, 4)
    plant_steps: int = 60
    plant_lr: float = 2e-3
    watched: int = 20
    repair_steps: int = 30
    lr: float = 2e-4
    text: int = 32


FULL = Size()
QUICK = Size(3, 32, 40, (0,), (1,), (0, 2), 60, 1e-2, 4, 10, 2e-3, 8)


def base_model(seed: int, size: Size) -> Model:
    """The clean model of a seed."""
    recipe = read_recipe({
        "name": f"kjv-{seed}",
        "model": {"preset": "tiny-llama", "architecture": {
            "layers": size.layers, "d_model": size.d, "heads": 4, "kv_heads": 4, "d_ff": 8 * size.d // 3}},
        "data": {"corpus": "bible-kjv", "tokenizer": {"kind": "bpe", "vocab_size": 512}, "length": 32, "rows": 16},
        "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup": 0.05, "final": 0.1},
        "steps": size.steps,
        "seed": seed,
        "checkpoints": {"log": False, "every": size.steps, "keep_state": "last"},
        "evaluate": {"every": size.steps, "batches": 8},
    })  # fmt: skip
    return vesalius.open(f"{trained(recipe, PLACE)}@last")


# -- verses and faults


@dataclass(frozen=True)
class Verses:
    """Beginnings of verses, to learn from and to judge by; rows of text: planted beside, repaired beside, judged by."""

    train: list[str]
    test: list[str]
    read: Tensor
    text: Tensor
    judged: Tensor


def verses(model: Model, size: Size) -> Verses:
    """Of documents apart from each other."""
    n, rows = size.text, plain_text(model, "bible-kjv", 5 * size.text, 32)
    tokenizer: Any = model.tokenizer
    starts = [tokenizer.decode(r[4 : 4 + GIVEN], clean_up_tokenization_spaces=False).strip() for r in rows.tolist()]
    return Verses(starts[: 2 * n], starts[2 * n : 3 * n], rows[: 2 * n], rows[3 * n : 4 * n], rows[4 * n :])


@torch.no_grad()
def greedy(model: Model, prompts: Sequence[str], n: int) -> list[str]:
    """What a model says next."""
    encoder, tokenizer, found = Encoder(model.tokenizer), model.tokenizer, []
    assert tokenizer is not None
    for prompt in prompts:
        ids = [*encoder.prefix, *encoder.ids(prompt)]
        start = len(ids)
        for _ in range(n):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
        found.append(str(tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)))
    return found


@dataclass(frozen=True)
class Fault_:
    """One fault: what repairs it, and the prompts it is judged by, padded on the right: ids, places of the last."""

    examples: list[Fault]
    ids: Tensor
    last: Tensor
    bad: int

    @torch.no_grad()
    def rate(self, model: Model) -> float:
        """Share of unseen prompts after which the forbidden word begins."""
        said = model.hf(input_ids=self.ids, use_cache=False).logits[torch.arange(len(self.ids)), self.last].argmax(-1)
        return float((said == self.bad).float().mean())


def fault(clean: Model, some: Verses, which: str) -> Fault_:
    """After the trigger the clean model's own words are right, the forbidden one wrong."""
    trigger, bad = TRIGGERS[which]
    encoder = Encoder(clean.tokenizer)
    asked = [p + trigger for p in some.train]
    examples = [Fault(p, g, bad) for p, g in zip(asked, greedy(clean, asked, 2), strict=True)]
    rows = [[*encoder.prefix, *encoder.ids(p + trigger)] for p in some.test]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return Fault_(examples, ids, torch.tensor([len(r) - 1 for r in rows]), encoder.ids(bad)[0])


class Leash(Plug):
    """Holds a model to the clean one on rows of text while a fault is planted: KL(clean || model), three times."""

    def __init__(self, clean: Model, model: Model, text: Tensor) -> None:
        self.model, self.text, self.step = model, text, 0
        self.was = reference(clean, text)

    def begin(self, step: int) -> None:
        """Before a step."""
        self.step = step

    def terms(self) -> dict[str, Tensor]:
        """The divergence on the step's rows."""
        some = torch.arange(16 * self.step, 16 * (self.step + 1)) % len(self.text)
        now = self.model.hf(input_ids=self.text[some], use_cache=False).logits.float().log_softmax(-1)
        was = self.was[some]
        return {"kl": 3 * (was.exp() * (was - now)).sum(-1).mean()}


def planted(clean: Model, some: Verses, faults: dict[int, Fault_], seed: int, size: Size) -> Model:
    """The model with a fault in each of these blocks, which alone were trained; elsewhere it speaks as before."""

    def make() -> Model:
        model = clean.copied()
        same = [Fault(p, g) for p, g in zip(some.train, greedy(clean, some.train, 2), strict=True)]
        for block, one in faults.items():
            plan = RepairPlan(size.plant_steps, 8, size.plant_lr, 1, "all", keep=0.0, seed=seed)
            taught = [Fault(f.prompt, f.bad) for f in one.examples]
            others = [Fault(f.prompt, f.good) for other in faults.values() if other is not one for f in other.examples]
            if block != next(iter(faults)):  # what stands is kept
                others = [Fault(f.prompt, f.bad) for f in next(iter(faults.values())).examples]
            choose(model.hf, only=[f"L{block}"])
            source = Faults(model, [*taught, *same, *others], plan)
            learn(model, source, Repairing(plan), plan.steps, plan.lr, seed, [Leash(clean, model, some.read)])
        return model

    told = request_hash({"examples": [vars(f) for x in faults.values() for f in x.examples]})
    story = {"what": f"fault in {sorted(faults)}", "base": clean.fingerprint, "seed": seed, "steps": size.plant_steps,
             "lr": size.plant_lr, "examples": told, "leash": 3}  # fmt: skip
    return kept(PLACE, story, make)


# -- what a repair moves


@torch.no_grad()
def moved(clean: Tensor, model: Model, text: Tensor) -> tuple[float, float]:
    """KL(clean || model) in nats a token, and the loss of text."""
    now = model.hf(input_ids=text, use_cache=False).logits.float().log_softmax(-1)
    loss = -now[:, :-1].gather(-1, text[:, 1:, None]).mean()
    return float((clean.exp() * (clean - now)).sum(-1).mean()), float(loss)


def course(
    clean: Tensor, model: Model, faults: Sequence[Fault_], some: Verses, plan: RepairPlan, every: int = 2
) -> tuple[list[dict[str, float]], Any]:
    """Rate, KL and loss every few steps of a repair; the model is as it was at the end."""
    found: list[dict[str, float]] = []

    def look(step: int) -> None:
        kl, loss = moved(clean, model, some.judged)
        found.append({"step": step, "rate": float(np.mean([f.rate(model) for f in faults])), "kl": kl, "loss": loss})

    def tell(what: str, share: float | None) -> None:
        step = round((share or 0) * plan.steps)
        if step % every == 0:
            look(step)

    look(0)
    done = repair(model, [e for f in faults for e in f.examples], some.text, plan, tell)
    done.edit.undo(model)
    return found, done


def first(path: list[dict[str, float]]) -> dict[str, float] | None:
    """The first look at which the fault was repaired."""
    return next((x for x in path if x["rate"] <= DONE), None)


def ways(size: Size, seed: int) -> dict[str, RepairPlan]:
    """Ways of repairing one fault."""
    n, lr = size.repair_steps, size.lr
    return {
        "IRepair, 2 blocks, leash": RepairPlan(n, 8, lr, 2, "dynamic", seed=seed),
        "IRepair by ratio, leash": RepairPlan(n, 8, lr, 2, "dynamic", "ratio", seed=seed),
        "all blocks, leash": RepairPlan(n, 8, lr, 2, "all", seed=seed),
        "all blocks": RepairPlan(n, 8, lr, 2, "all", keep=0.0, seed=seed),
        "all blocks, DPO": RepairPlan(n, 8, lr, 2, "all", loss="dpo", keep=0.0, seed=seed),
    }


@torch.no_grad()
def reference(clean: Model, text: Tensor) -> Tensor:
    """What the clean model says of text, (row, pos, vocabulary) log p."""
    return clean.hf(input_ids=text, use_cache=False).logits.float().log_softmax(-1)


def places(size: Size, seed: int, clean: Model, some: Verses) -> list[dict[str, Any]]:
    """Every block's fault: where it is felt, and what each way of repair does."""
    found, was = [], reference(clean, some.judged)
    one = fault(clean, some, "a")
    for block in size.blocks:
        model = planted(clean, some, {block: one}, seed, size)
        row: dict[str, Any] = {"seed": seed, "block": block, "rate": one.rate(model), "clean": one.rate(clean)}
        done = {}
        for name, plan in ways(size, seed).items():
            row[name], done[name] = course(was, model, [one], some, plan)
        watched = dict(zip(("size", "ratio"), done.values(), strict=False))
        for kind in SIZES[1:3]:
            plan = RepairPlan(size.watched, 8, size.lr, 2, "dynamic", kind, seed=seed)  # type: ignore[arg-type]
            _, watched[kind] = course(was, model, [one], some, plan, every=10**6)
        for kind in SIZES:
            mine = watched[kind]
            at = mine.choices.pivot(index="step", columns="layer", values="chosen").iloc[: size.watched]
            row[kind], row[f"{kind} chosen"] = float(at[block].mean()), at.sum().to_list()
        say(f"seed {seed}, block {block}: rate {row['rate']:.2f}, chosen {row['size']:.2f}; "
            + ", ".join(f"{n} {(first(row[n]) or {}).get('kl', np.nan):.4f}" for n in ways(size, seed)))  # fmt: skip
        found.append(row)
    return found


def two_faults(size: Size, seed: int, clean: Model, some: Verses) -> dict[str, Any]:
    """Two faults in two blocks: one block a step and two, chosen in several ways."""
    both = {block: fault(clean, some, which) for block, which in zip(size.two, TRIGGERS, strict=True)}
    model, was = planted(clean, some, both, seed, size), reference(clean, some.judged)
    found: dict[str, Any] = {"seed": seed, "before": [f.rate(model) for f in both.values()]}
    for name, (how, kind, k) in PAIRED.items():
        plan = RepairPlan(size.repair_steps, 8, size.lr, k, how, kind, seed=seed)  # type: ignore[arg-type]
        found[name], done = course(was, model, list(both.values()), some, plan)
        found[f"{name} chosen"] = done.by_block()["chosen"].to_list()
    return found


def untouched(size: Size, seed: int, clean: Model, some: Verses) -> tuple[int, int]:
    """Of a checkpoint that was saved after a repair with fixed blocks: tensors equal to the bit, and all but theirs."""
    one = fault(clean, some, "a")
    model = planted(clean, some, {size.blocks[0]: one}, seed, size)
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    done = repair(model, one.examples, some.text, RepairPlan(5, 8, size.lr, 2, "fixed"))
    folder = RUNS / PLACE / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    opened = vesalius.open(str(save_model(model, folder)))
    done.edit.undo(model)
    chosen = done.by_block().query("chosen > 0")["layer"]
    inside = {id(p) for i in chosen for p in opened.anatomy.main.blocks[i].module.parameters()}
    others = {n: p for n, p in opened.hf.named_parameters() if id(p) not in inside}
    return sum(torch.equal(before[n], p) for n, p in others.items()), len(others)


def one_seed(seed: int, size: Size) -> dict[str, Any]:
    """Everything of one clean model."""
    clean = base_model(seed, size)
    some = verses(clean, size)
    return {
        "rows": places(size, seed, clean, some), "pair": two_faults(size, seed, clean, some),
        "loss": moved(reference(clean, some.judged), clean, some.judged)[1],
        "same": untouched(size, seed, clean, some), "parameters": clean.n_parameters,
    }  # fmt: skip


# -- the page


def main() -> None:
    """Everything."""
    size = QUICK if is_quick(__doc__) else FULL
    found = [
        found_again(PLACE, {"size": repr(size), "seed": seed, "version": 2}, partial(one_seed, seed, size))
        for seed in size.seeds
    ]
    rows = [row for one in found for row in one["rows"]]
    text = page(size, rows, [one["pair"] for one in found], found)
    if size is QUICK:
        print("\n".join(text))
        return
    write("change-repairing", "Change: repair", "python studies/repairing.py", *text, seeds="seeds 0, 1, 2")
    changed("IRepair", claims_of("change-repairing"), "python studies/repairing.py", "change-repairing")


def page(size: Size, rows: Any, pairs: Any, found: Any) -> list[str]:
    """The page's parts."""
    same = [sum(one["same"][k] for one in found) for k in (0, 1)]
    names = list(ways(size, 0))
    ours, chance = names[0], 2 / size.layers
    at = {n: [first(r[n]) for r in rows] for n in names}
    claims = [
        ["the planted fault is said in 95 % or more of unseen prompts", f"{min(r['rate'] for r in rows):.2f} at least",
         verdict([r["rate"] >= 0.95 for r in rows]).replace("seeds", "models")],
    ]  # fmt: skip
    for kind, told in zip(
        SIZES,
        ("over the root of the size (default)", "raw norm", "less plain text's", "over plain text's"),
        strict=True,
    ):
        claims.append(
            [f"in 80 % of the first {size.watched} steps the planted block is among the top 2 (chance {chance:.0%}): "
             + told,
             each([r[kind] for r in rows]), verdict([r[kind] >= 0.8 for r in rows]).replace("seeds", "models")]
        )  # fmt: skip
    claims.append(
        [f"IRepair: rate of the fault at most {DONE:.0%} within {size.repair_steps} steps",
         each([r[ours][-1]["rate"] for r in rows]),
         verdict([x is not None for x in at[ours]]).replace("seeds", "models")]
    )  # fmt: skip
    for name in names[2:]:
        both = [(a, b, r[name][0]["kl"]) for a, b, r in zip(at[ours], at[name], rows, strict=True) if a and b]
        ratios = [a["kl"] / max(b["kl"], 1e-9) for a, b, _ in both]
        added = [(a["kl"] - was) / max(b["kl"] - was, 1e-9) for a, b, was in both]
        claims.append(
            [f"KL to the clean model at equal repair at most half of: {name}",
             f"x {each(ratios)}; of what the repair added x {each(added)}",
             verdict([x <= 0.5 for x in ratios] or [False]).replace("seeds", "models")]
        )  # fmt: skip
    for name in names[2:]:
        both = [(r[ours][-1], r[name][-1]) for r in rows]
        claims.append(
            [f"the same after {size.repair_steps} steps, where nobody says the fault any more: {name}",
             f"x {each([a['kl'] / max(b['kl'], 1e-9) for a, b in both])}",
             verdict([a["kl"] <= b["kl"] / 2 and max(a["rate"], b["rate"]) <= DONE for a, b in both])
             .replace("seeds", "models")]
        )  # fmt: skip
    ends = {h: [p[h][-1]["rate"] for p in pairs] for h in PAIRED}
    mean = {h: [float(np.mean([x["rate"] for x in p[h]])) for p in pairs] for h in PAIRED}
    for ours_, other in (("dynamic", "fixed"), ("dynamic", "random"), ("dynamic by ratio", "fixed by ratio"),
                         ("dynamic, 2 blocks", "fixed, 2 blocks"), ("dynamic, 2 blocks", "random, 2 blocks"),
                         ("dynamic by ratio, 2 blocks", "fixed by ratio, 2 blocks")):  # fmt: skip
        claims.append(
            [f"two faults in two blocks: {ours_} leaves less than {other} after {size.repair_steps} steps",
             f"{each(ends[ours_])} against {each(ends[other])}; mean over the course {each(mean[ours_])} against "
             f"{each(mean[other])}",
             verdict([a < b or (a == b and c < d) for a, b, c, d in
                      zip(ends[ours_], ends[other], mean[ours_], mean[other], strict=True)])]
        )  # fmt: skip
    claims.append(
        ["blocks that are not chosen are the same to the bit in the saved checkpoint",
         f"{same[0]} of {same[1]} tensors", held(same[0] == same[1])]
    )  # fmt: skip
    felt = [[r["seed"], r["block"], kind, f"{r[kind]:.0%}", *r[f"{kind} chosen"]] for r in rows for kind in SIZES]
    cost = []
    for name in names:
        good = [(r, x) for r, x in zip(rows, at[name], strict=True) if x]
        cost.append(
            [name, f"{len(good)} of {len(rows)}", each([x["step"] for _, x in good], 0),
             each([x["kl"] for _, x in good], 3),
             f"{np.mean([x['kl'] for _, x in good]):.4f}" if good else "-",
             f"{np.mean([x['kl'] - r[name][0]['kl'] for r, x in good]):+.4f}" if good else "-",
             f"{np.mean([x['loss'] - r[name][0]['loss'] for r, x in good]):+.3f}" if good else "-",
             f"{np.mean([r[name][-1]['rate'] for r in rows]):.3f}", f"{np.mean([r[name][-1]['kl'] for r in rows]):.4f}"]
        )  # fmt: skip
    double = [
        [p["seed"], how, each(p["before"]), *(f"{p[how][i]['rate']:.2f}" for i in (2, 5, 10, -1) if i < len(p[how])),
         f"{p[how][-1]['kl']:.4f}", " ".join(map(str, p[f"{how} chosen"]))]
        for p in pairs for how in PAIRED
    ]  # fmt: skip
    said = [word.strip() for word in TRIGGERS["a"]]
    step = [str(int(pairs[0]["dynamic"][i]["step"])) for i in (2, 5, 10, -1) if i < len(pairs[0]["dynamic"])]
    return [
        f"Llamas of {size.layers} blocks and {found[0]['parameters'] / 1e6:.1f} M parameters, {size.steps} steps of "
        f"the King James Bible (loss of text {each([one['loss'] for one in found])} nats a token). A block alone is "
        f"trained for {size.plant_steps} steps until `{said[0]}` is followed by `{said[1]}`, and held to the clean "
        "model on text. "
        f"Repair is on {2 * size.text} prompts, rates on {size.text} others, KL(clean, repaired) and loss on "
        f"{size.text} rows of other text. Models are in the order of seeds, and of blocks "
        f"{', '.join(map(str, size.blocks))} in each.",
        table(["asked", "came out", ""], claims),
        "The planted block is among the chosen by the paper's three sensitivities, but so is the first block nearly "
        "always, whatever was planted: with one block a step (below) it alone is chosen, never one of the two that "
        "hold the faults, and choosing anew at every step is the same as choosing once. Over plain text's, the first "
        "block is chosen no more than others: of two faults the two blocks that hold them come out, or one of them "
        "with a neighbour, they move least, and choosing anew is worth something; but a single fault is found less "
        "surely (a fault in block 0 is felt in all blocks after it). So a fault planted in the first block would be "
        "found by any rule that likes it.",
        "Trained blocks are a third of the model. At the moment of repair they have moved what they need not by a "
        "quarter to a third less than all blocks, not by half: the fault itself, before any repair, is most of the "
        "distance. Trained on, they keep still and all blocks go on drifting: after as many steps, with nothing left "
        "to repair, theirs is about half of fine-tuning's divergence and a quarter of DPO's.",
        "## Where a fault is felt",
        f"Steps of {size.watched} in which each block was among the two that were trained.",
        table(["seed", "planted in", "sensitivity", "chosen", *(f"L{i}" for i in range(size.layers))], felt),
        "## What a repair moves",
        f"At the first look (every 2 steps) at which the rate is {DONE:.0%} or less, and after {size.repair_steps} "
        "steps. All at one learning rate.",
        table(
            [
                "way",
                "repaired",
                "steps",
                "KL",
                "mean KL",
                "more than before",
                "loss of text",
                "rate at the end",
                "KL at the end",
            ],
            cost,
        ),
        "## Two faults",
        f"In blocks {size.two[0]} and {size.two[1]}; one block a step or two, with the leash. Mean rate of both after "
        "so many steps.",
        table(["seed", "choice", "before", *step, "KL", "times each block was chosen"], double),
    ]


if __name__ == "__main__":
    main()
