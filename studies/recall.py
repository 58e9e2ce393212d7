"""Factual recall in three steps and a last layer: planted, trained and on SmolLM2 (arXiv 2403.19521)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from _page import look_inside, table, write
from _runs import is_quick, trained, verdict
from torch import Tensor

import vesalius
from vesalius.build.recall import planted_recall
from vesalius.corpus.facts import BEGIN, IS, SAME, Facts
from vesalius.corpus.synthetic import synthetic_source
from vesalius.find.base import find
from vesalius.find.recall import Mixing, ask, last_block, mix, swapped, take_apart, task_heads, trace, writes
from vesalius.find.recall.trace import mix_all
from vesalius.model import Intervention, Model, Pairs
from vesalius.model.intervene import taps
from vesalius.parts import Part
from vesalius.tasks.metrics import LogitDiff
from vesalius.train.recipe import read_recipe

SCALES = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    toy_steps: int | None
    subjects: int
    prompts: int
    patched: int
    random: int  # draws of random heads
    sets: tuple[int, ...]  # numbers of task heads swapped
    real: bool


FULL = Size((0, 1, 2), None, 200, 48, 16, 10, (5, 10, 20, 30), True)
QUICK = Size((0,), 30, 40, 20, 4, 2, (2,), False)


# -- 7.1 planted


def planted(size: Size) -> tuple[list[str], list[list[str]]]:
    """Regressions with known weights, and a model whose steps are known."""
    off, cosine, nonlinear = [], [], []
    for seed in size.seeds:
        rng = np.random.default_rng(seed)
        inputs = rng.normal(size=(60, 13, 48)) + 0.7 * rng.normal(size=(60, 1, 48)) + 3 * rng.normal(size=(1, 13, 48))
        alpha, b = rng.choice([-1.0, 0.0, 1.5], 13), 4 * rng.normal(size=48)
        out = np.einsum("i,nid->nd", alpha, inputs)
        found = mix(inputs, out + b + 0.05 * out.std() * rng.normal(size=out.shape), [str(i) for i in range(13)])
        off.append(float(np.abs(found.weights - alpha).max()))
        cosine.append(float(found.intercept @ b / np.linalg.norm(found.intercept) / np.linalg.norm(b)))
        hidden = np.abs(inputs.sum(1) @ rng.normal(size=(48, 192))) @ rng.normal(size=(192, 48))
        curved = mix(inputs, hidden, [str(i) for i in range(13)], "L0.MLP")
        nonlinear.append((curved.r2, bool(curved.warning)))
    steps = []
    for base in ("gpt2", "llama"):
        for seed in size.seeds:
            made = planted_recall(base, seed=seed)  # type: ignore[arg-type]
            model = Model.wrap(made.hf, made.tokenizer)
            it = trace(model, "the capital of land3 is", relation=made.facts(), n=20, patched=4)
            best = it.machinery.vectors.sort_values("moved").iloc[-1]
            steps.append(
                it.machinery.heads.heads == [made.topic_head]
                and it.written_by == made.answer_mlp
                and best["part"] == str(made.task_mlp)
                and it.machinery.last.suppressors == [made.damper]
            )
    claims = [
        ["planted: weights within 0.05", f"{max(off):.3f} at most", verdict([o < 0.05 for o in off])],
        ["planted: intercept's cosine > 0.99", f"{min(cosine):.4f} at least", verdict([c > 0.99 for c in cosine])],
        ["a block that is not linear: R² < 0.5 and a warning", f"{max(r for r, _ in nonlinear):.2f} at most",
         verdict([r < 0.5 and w for r, w in nonlinear])],
        ["a planted model: every step is found", f"{sum(steps)} of {len(steps)} models", verdict(steps)],
    ]  # fmt: skip
    return ["## Planted", table(["what was asked", "what came out", ""], claims)], claims


# -- 7.2 a trained toy


def prompts(source: Facts, relation: int, subjects: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows that ask one relation (-1: SAME) of some subjects, and their answers."""
    rng = np.random.default_rng(seed)
    n = len(subjects)
    ids = source.first_noise + rng.integers(0, source.noise, (n, source.length))
    places = 1 + np.argsort(rng.random((n, source.length - 2)), axis=1)[:, :2]
    ids[:, 0], ids[:, -1] = BEGIN, IS
    ids[np.arange(n), places[:, 0]] = SAME if relation < 0 else 3 + relation
    ids[np.arange(n), places[:, 1]] = source.first_subject + subjects.numpy()
    return torch.from_numpy(ids), torch.from_numpy(source.asked(relation, subjects.numpy()))


def toy_pairs(ids: Tensor) -> Pairs:
    """Rows as pairs, for reading what is written at their end."""
    n, length = ids.shape
    one = [[0]] * n
    return Pairs(
        ids, ids, torch.ones_like(ids), torch.full((n, 1), length - 1), torch.ones(n, 1, dtype=torch.bool),
        torch.arange(n), torch.ones(n, dtype=torch.bool), one, one, LogitDiff(),
    )  # fmt: skip


def said(model: Model, ids: Tensor, added: dict[int, Tensor] | None = None) -> Tensor:
    """The likeliest token, with vectors added to some MLPs' outputs at the end."""
    end = torch.full((len(ids),), ids.shape[1] - 1)
    change = [Intervention(Part("mlp", layer), "add", v.float(), end) for layer, v in (added or {}).items()]
    logits = model.run(ids, taps=taps([change], len(ids)) if change else None).logits
    assert logits is not None
    return logits[:, -1].argmax(-1)


def toy(size: Size) -> tuple[list[str], list[list[str]]]:
    """Intercepts as function vectors, scale chosen on half of the subjects and measured on the other half."""
    rows, right_all, wrong_all, accuracies = [], [], [], []
    for seed in size.seeds:
        run = trained(
            read_recipe("facts", {"seed": 1234 + seed} | ({"steps": size.toy_steps} if size.toy_steps else {})),
            "recall",
        )
        model = vesalius.open(f"{run}@last")
        source = synthetic_source("facts")
        assert isinstance(source, Facts)
        every = torch.arange(size.subjects)
        order = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))]
        dev, test = order[: len(order) // 2], order[len(order) // 2 :]
        accuracy = np.mean(
            [
                float((said(model, ids) == a).float().mean())
                for ids, a in (prompts(source, r, every, seed) for r in range(-1, source.relations))
            ]
        )
        accuracies.append(float(accuracy))
        mixed: dict[int, list[Mixing]] = {}
        for relation in range(-1, source.relations):
            ids, _ = prompts(source, relation, dev[:80], seed + 1)
            mixed[relation] = mix_all(model, writes(model, toy_pairs(ids)), seed)
        share = np.zeros((source.relations, source.relations))
        chosen = []
        for how in ("one MLP", "one MLP, less SAME's", "all MLPs", "all MLPs, less SAME's"):
            for relation in range(source.relations):
                for scale in SCALES:
                    layers = range(model.n_layers)
                    b = {
                        n: torch.from_numpy(mixed[relation][n].intercept - ("less" in how) * mixed[-1][n].intercept)
                        for n in layers
                    }
                    options = (
                        [{n: scale * v for n, v in b.items()}]
                        if "all" in how
                        else [{n: scale * v} for n, v in b.items()]
                    )
                    for added in options:
                        chosen.append(
                            (relation, how, scale, tuple(added), hit(model, source, dev, added, relation, seed), added)
                        )
        best = [max((c for c in chosen if c[0] == r), key=lambda c: c[4]) for r in range(source.relations)]
        plain = [
            max((c for c in chosen if c[0] == r and c[1] == "one MLP"), key=lambda c: c[4])
            for r in range(source.relations)
        ]
        for r in range(source.relations):
            for other in range(source.relations):
                share[r, other] = hit(model, source, test, best[other][5], r, seed)
        own, others = float(np.diag(share).mean()), float(share[~np.eye(len(share), dtype=bool)].mean())
        right_all.append(own)
        wrong_all.append(others)
        single = float(np.mean([hit(model, source, test, plain[r][5], r, seed) for r in range(source.relations)]))
        r2 = [mixed[0][n].r2 for n in range(model.n_layers)]
        rows.append([seed, f"{accuracy:.3f}", f"{own:.2f}", f"{others:.2f}", f"{single:.2f}",
                     "; ".join(f"{b[1]}, x {b[2]:g}, L{'+'.join(map(str, b[3]))}" for b in best),
                     ", ".join(f"{x:.2f}" for x in r2)])  # fmt: skip
    claims = [
        ["T-facts: accuracy ≥ 95 %", ", ".join(f"{a:.3f}" for a in accuracies),
         verdict([a >= 0.95 for a in accuracies])],
        ["the relation's intercept turns ≥ 60 % of SAME prompts into its answers",
         ", ".join(f"{x:.2f}" for x in right_all),
         verdict([x >= 0.6 for x in right_all])],
        ["another relation's intercept ≤ 10 %", ", ".join(f"{x:.2f}" for x in wrong_all),
         verdict([x <= 0.1 for x in wrong_all])],
    ]  # fmt: skip
    return [
        "## A trained model (T-facts)",
        "Recipe `facts`: GPT-2 class, 4 blocks of 4 heads, 3 relations of 200 subjects with 50 answers each, and SAME, "
        "which "
        "asks "
        "for the subject itself. The intercept of a relation (regressions on 80 subjects) is added at the end of SAME "
        "prompts; "
        "MLP, scale and whether SAME's own intercept is taken off are chosen on half of the subjects, shares are of "
        "the other half.",
        table(
            ["seed", "accuracy", "own relation", "another's", "one MLP, nothing taken off", "chosen", "R² by layer"],
            rows,
        ),
        table(["what was asked", "what came out", ""], claims),
    ], claims


def hit(model: Model, source: Facts, subjects: Tensor, added: dict[int, Tensor], relation: int, seed: int) -> float:
    """Share of SAME prompts that say the relation's answer with these vectors added."""
    ids, _ = prompts(source, -1, subjects, seed + 2)
    wanted = torch.from_numpy(source.asked(relation, subjects.numpy()))
    return float((said(model, ids, added) == wanted).float().mean())


# -- 7.3, 7.4 a real model


def real(size: Size, name: str) -> tuple[list[str], list[list[str]]]:
    """Task heads swapped between countries, and the last block."""
    model = vesalius.open(name)
    question = take_apart(model, "The capital of France is")
    asked = ask(model, question, size.prompts, seed=0)
    found = writes(model, asked.pairs)
    heads = task_heads(model, asked.pairs, found, k=max(size.sets), patched=size.patched)
    pairs = replace(asked.pairs, metric=LogitDiff())
    ranked = [str(p) for p in heads.heads]
    rng = np.random.default_rng(0)
    pool = [p for p in model.parts(("head",)) if p not in heads.heads]
    sets = [list(heads.heads[:k]) for k in size.sets]
    for k in size.sets:
        sets += [[pool[i] for i in rng.choice(len(pool), k, replace=False)] for _ in range(size.random)]
    flips = (swapped(model, pairs, sets) < 0).mean(1)
    rows = []
    for i, k in enumerate(size.sets):
        other = flips[len(size.sets) + i * size.random : len(size.sets) + (i + 1) * size.random]
        rows.append([k, f"{flips[i]:.2f}", f"{other.mean():.2f} ({other.max():.2f})"])
    direct = find("direct", model, asked.pairs, parts="head,mlp,embed")
    last = last_block(model, asked.pairs, direct)
    frame = last.scores.to_frame().sort_values("score")
    it = last.mitigation
    remedy = "not offered: nothing is below 0" if it is None else (
        f"{', '.join(it.parts)} x {it.scale:g}: p(right) {it.before.mean:.3f} → {it.after.mean:.3f}, "
        f"top-1 {it.first_before:.2f} → {it.first_after:.2f} (n {it.n})"
    )  # fmt: skip
    index = [str(p) for p in heads.scores.parts]
    shown = [
        [h, *(f"{heads.scores.columns[c][index.index(h)]:.2f}" for c in ("to_mlps", "attention")),
         *(f"{heads.scores.columns[c][index.index(h)]:.0f}" for c in ("topic_rank", "other_rank")),
         f"{heads.scores[h]:.2f}"]
        for h in ranked[:10]
    ]  # fmt: skip
    best = max(range(len(size.sets)), key=lambda i: flips[i])
    randoms = flips[len(size.sets) + best * size.random : len(size.sets) + (best + 1) * size.random].mean()
    claims = [
        [f"{name}: swapping the top task heads' z flips ≥ 60 % of pairs",
         f"{flips[best]:.2f} with {size.sets[best]} heads, "
         f"n {asked.pairs.n_examples}", "holds" if flips[best] >= 0.6 else "does not hold"],
        [f"{name}: as many random heads ≤ 10 %", f"{randoms:.2f}", "holds" if randoms <= 0.1 else "does not hold"],
        [f"{name}: sign and size of the last block",
         f"{last.total.mean:+.2f} [{last.total.low:+.2f}, {last.total.high:+.2f}] "
         f"logits; p(right) {last.before.mean:.3f} before, {last.after.mean:.3f} after", "reported"],
        [f"{name}: remedy only where negative, p(right) ≥ 5 % up, top-1 kept", remedy,
         "not offered" if it is None else "holds" if it.helps else "does not hold"],
    ]  # fmt: skip
    return [
        f"## {name}",
        f"{asked.pairs.n_examples} prompts answered rightly, of {asked.tried} tried ({asked.own} in the wording "
        f"“The capital "
        f"of ... "
        f"is”); path patching on {size.patched}. MLPs that write the answer: {', '.join(map(str, heads.writers))}.",
        table(["head", "through writers", "looks at topic", "topic's rank", "other topics' rank", "effect"], shown),
        "Heads' outputs at the end as on the counterfactual prompt; share of pairs whose logit difference turns:",
        table(["heads", "top task heads", f"random heads, mean (largest) of {size.random}"], rows),
        "Last block, direct contribution to the lead over the other answers:",
        table(["part", "mean", "95 % interval"],
              [[r["part"], f"{r['score']:+.3f}", f"[{r['low']:+.3f}, {r['high']:+.3f}]"]
              for r in frame.to_dict("records")]),
        table(["what was asked", "what came out", ""], claims),
    ], claims  # fmt: skip


def main() -> None:
    """Everything."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    text, claims = planted(size)
    for more, asked in (toy(size), *((real(size, name) for name in ("smollm2-135m",)) if size.real else ())):
        text, claims = text + more, claims + asked
    if quick:
        print("\n\n".join(text))
        return
    write("look-inside-recall", "Factual recall", "python studies/recall.py", *text, seeds="seeds 0, 1, 2")
    look_inside("Factual recall", claims, "python studies/recall.py", "look-inside-recall")


if __name__ == "__main__":
    main()
