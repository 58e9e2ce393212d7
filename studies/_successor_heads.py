"""Successor heads: planted, trained together and alone, and on SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _heads import Size, text_rows
from _page import table
from _runs import trained, verdict

import vesalius
from vesalius.build import planted
from vesalius.corpus.succession import BEGIN, NEXT, SAME, Succession
from vesalius.corpus.synthetic import synthetic_source
from vesalius.find.detectors import detect
from vesalius.find.detectors.kinds import Kind, kinds_of
from vesalius.find.detectors.lists import list_task, mean_ablated
from vesalius.find.detectors.modular import (
    arithmetic,
    decades_held_out,
    dictionary_features,
    mean_features,
    off_diagonal,
)
from vesalius.find.detectors.ov import bearing, embeddings, read_values
from vesalius.find.detectors.successor import succession
from vesalius.find.detectors.wild import KINDS, hurt_most
from vesalius.model import Intervention, Model, Site
from vesalius.model.intervene import taps
from vesalius.parts import Part
from vesalius.scores import Scores
from vesalius.tasks.performance import performance
from vesalius.train.recipe import read_recipe


def toy_kinds(source: Succession) -> list[Kind]:
    """The series of the trained model."""
    found = []
    for one in source.series.values():
        after = [(i + 1) % one.size if one.around else i + 1 if i + 1 < one.size else -1 for i in range(one.size)]
        tokens = tuple(range(one.first, one.first + one.size))
        found.append(Kind(one.name, tuple(map(str, range(one.size))), tokens, tuple(after), ""))
    return found


def answers(model: Model, source: Succession, without: Sequence[Part] = (), batches: int = 4) -> dict[str, float]:
    """Share of right answers to NEXT and to SAME, with some heads' outputs at their mean over the rows."""
    right: dict[int, list[float]] = {NEXT: [], SAME: []}
    for step in range(batches):
        ids = torch.from_numpy(source.batch(step).ids)
        sites = [Site("z", p.layer or 0) for p in without]
        seen = model.run(ids[:, :-1], capture=sites).sites
        cut = [
            Intervention(p, value=seen[Site("z", p.layer or 0)][:, :, p.index].mean((0, 1))[None, None])
            for p in without
        ]
        logits = model.run(ids[:, :-1], taps=taps([cut], len(ids)) if cut else None).logits
        assert logits is not None
        good = logits[:, -1].argmax(-1) == ids[:, -1]
        for question, found in right.items():
            found += good[ids[:, -2] == question].float().tolist()
    return {"NEXT": float(np.mean(right[NEXT])), "SAME": float(np.mean(right[SAME]))}


def by_head(model: Model, head: Part, tokens: Sequence[int]) -> Any:
    """Names the item that a head writes most for, given effective embeddings of its block's input."""
    layer, index = head.layer or 0, head.index or 0
    out = model.anatomy.head_out(model.anatomy.block(layer))[index]

    def name(x: Any) -> Any:
        v = read_values(model, layer, torch.from_numpy(x).float())[:, index]
        return bearing(model, layer, v @ out, tokens).argmax(-1).numpy()

    return name


def by_model(model: Model, head: Part, tokens: Sequence[int]) -> Any:
    """Names the item that the whole model answers to NEXT, the item's place in the stream before the head replaced."""
    layer = head.layer or 0

    def name(x: Any) -> Any:
        rows = len(x)
        ids = torch.full((rows, 7), 3)
        ids[:, 0], ids[:, 2], ids[:, -1] = BEGIN, tokens[0], NEXT

        def put(stream: torch.Tensor) -> torch.Tensor:
            stream = stream.clone()
            stream[:, 2] = torch.from_numpy(x).to(stream)
            return stream

        logits = model.run(ids, taps={Site("resid_pre", layer): [put]}).logits
        assert logits is not None
        return logits[:, -1, torch.tensor(list(tokens))].argmax(-1).numpy()

    return name


def staged(size: Size, seed: int) -> Model:
    """Copying learnt first, with one head of block 1; then successors, by the other head alone."""
    few = {"steps": size.toy_steps} if size.toy_steps else {}
    first = {"only": ["embed", "unembed", "L0.MLP", "L1.H0", "*ln*"]}
    changes = {"seed": 1234 + seed, "data.settings": {"successors": 0.0}, "parameters": first, "steps": 400}
    copier = trained(read_recipe("succession", {**changes, "name": "copying", **few}), "heads")
    told = read_recipe("succession").model_dump(mode="json", exclude_unset=True)
    told |= {"name": "then-successors", "model": {"source": f"{copier}@last"}, "parameters": {"only": ["L1.H1"]}}
    return vesalius.open(f"{trained(read_recipe(told, {'seed': 1234 + seed, 'steps': 1500, **few}), 'heads')}@last")


@dataclass(frozen=True)
class Judged:
    """What is asked of a successor head.

    Attributes:
        row: of the page: head, score, masked, centred, median of the others, NEXT and SAME without it.
        passes: `score`, `centred`, `median`, `lost`, `kept`.
    """

    row: list[str]
    passes: dict[str, bool]


def judged(model: Model, source: Succession, scores: Scores, head: Part) -> Judged:
    """A head's scores, and what the model answers without it."""
    place = list(scores.parts).index(head)
    rest, columns = np.delete(scores.values, place), scores.columns
    whole, cut = answers(model, source), answers(model, source, [head])
    row = [str(head), f"{scores[head]:.2f}", f"{columns['masked'][place]:.2f}", f"{columns['centred'][place]:.2f}",
           f"{np.median(rest):.2f}", *(f"{whole[k]:.2f} → {cut[k]:.2f}" for k in ("NEXT", "SAME"))]  # fmt: skip
    return Judged(row, {
        "score": scores[head] >= 0.9, "centred": float(columns["centred"][place]) >= 0.9,
        "median": float(np.median(rest)) < 0.1, "lost": whole["NEXT"] - cut["NEXT"] >= 0.5,
        "kept": whole["SAME"] - cut["SAME"] <= 0.05,
    })  # fmt: skip


def claims_of_judged(told: str, found: Sequence[Judged], centred: bool) -> list[list[str]]:
    """The claims about a head in models trained in one way."""
    asked = [
        ("the head scores ≥ 0.9", 1, "score"), ("the same, what it says whatever it reads taken off", 3, "centred"),
        ("median of the others < 0.1", 4, "median"), ("without it succession falls ≥ 50 points", 5, "lost"),
        ("without it copying falls ≤ 5 points", 6, "kept"),
    ]  # fmt: skip
    return [
        [f"{told}: {claim}", ", ".join(j.row[i] for j in found), verdict([j.passes[name] for j in found])]
        for claim, i, name in asked if centred or name != "centred"
    ]  # fmt: skip


def held_out() -> Succession:
    """Rows of the task that nobody was trained on."""
    source = synthetic_source("succession", rows=256, seed=77, split="test")
    assert isinstance(source, Succession)
    return source


def alone_successor(size: Size) -> list[Judged]:
    """Models in which the head that learnt successors is known."""
    found, source = [], held_out()
    for seed in size.seeds:
        model = staged(size, seed)
        scores = succession(model, toy_kinds(source), seed=seed)
        head = next(p for p in scores.parts if str(p) == "L1.H1")
        assert isinstance(head, Part)
        found.append(judged(model, source, scores, head))
    return found


def toy_successor(size: Size) -> tuple[list[str], list[list[str]]]:
    """The head and the numbers modulo ten on the trained model, and the head on the planted ones."""
    together, modular_rows, probes, controls = list[Judged](), [], [], []
    moved: dict[str, list[bool]] = {"dictionary": [], "means": []}
    for seed in size.seeds:
        changes = {"seed": 1234 + seed} | ({"steps": size.toy_steps} if size.toy_steps else {})
        made = trained(read_recipe("succession", changes), "heads")
        model = vesalius.open(f"{made}@last")
        source = held_out()
        scores = succession(model, toy_kinds(source), seed=seed)
        best = scores.top(1, "value").parts[0]
        assert isinstance(best, Part)
        together.append(judged(model, source, scores, best))
        numbers = source.series["numbers"]
        tokens = list(range(numbers.first, numbers.first + numbers.size))
        x = embeddings(model, tokens, "contextual", best.layer or 0).numpy().astype(float)
        index = np.arange(len(tokens))
        right, chance = decades_held_out(x, index), decades_held_out(x, index, shuffled=True, seed=seed)
        probes.append(right >= 0.9)
        controls.append(chance <= 0.2)
        line = [seed, f"{right:.2f}", f"{chance:.2f}"]
        for features in (dictionary_features(x, index, seed=seed), mean_features(x, index)):
            for through in (by_head, by_model):
                shares = arithmetic(x, index, features, through(model, best, tokens), len(tokens) - 1)
                line.append(f"{off_diagonal(shares):.2f} ({np.nanmean(np.diag(shares)):.2f})")
                if through is by_model:
                    moved["means" if features.atoms[0] < 0 else "dictionary"].append(off_diagonal(shares) >= 0.8)
            said = by_head(model, best, tokens)(features.alone(x, index))
            line.append(f"{np.mean((said % 10 == (index + 1) % 10)[:-1]):.2f}")
            line.append(f"{features.auc.min():.2f}")
        modular_rows.append(line)
    bases = []
    for base in ("gpt2", "llama"):
        for seed in size.seeds:
            plant = planted("successor", base, seed=seed)
            scores = detect(Model.wrap(plant.hf, plant.tokenizer), "successor")["successor"]
            (truth,) = plant.roles
            others = np.delete(scores.values, list(scores.parts).index(truth))
            bases.append((scores[truth], float(np.median(others)), float(others.max())))
    alone = alone_successor(size)
    claims = [
        ["planted: the head scores ≥ 0.9, median of the others < 0.1", f"{min(b[0] for b in bases):.2f} at least; "
         f"median {max(b[1] for b in bases):.2f} at most, {len(bases)} models",
         verdict([b[0] >= 0.9 and b[1] < 0.1 for b in bases])],
        *claims_of_judged("trained together", together, centred=False),
        *claims_of_judged("trained alone after copying", alone, centred=True),
        ["probe for n mod 10, held-out decades ≥ 90 %", ", ".join(r[1] for r in modular_rows), verdict(probes)],
        ["the same, shuffled labels ≤ 20 %", ", ".join(r[2] for r in modular_rows), verdict(controls)],
        ["arithmetic with mod-10 features of a sparse dictionary ≥ 80 %, by the model's answer",
         ", ".join(r[4] for r in modular_rows), verdict(moved["dictionary"])],
        ["the same with differences of means ≥ 80 %", ", ".join(r[8] for r in modular_rows),
         verdict(moved["means"])],
    ]  # fmt: skip
    ways = (("together", together), ("alone after copying", alone))
    rows = [[f"{s}, {way}", *j.row] for way, found in ways for s, j in zip(size.seeds, found, strict=True)]
    return [
        "## Successor heads, planted and trained",
        "Recipe `succession` (GPT-2 class, 2 blocks of 2 heads; block 0 may not attend, block 1 has no MLP of its own: "
        "see the recipe), seeds 1234 on. Together: both questions at once, and the two heads share the work. Alone "
        "after copying: 400 steps of SAME alone, in which only L1.H0 of the heads learns, then 1,500 steps of both "
        "questions, in which only L1.H1 learns. Centred: what a head says whatever item it reads taken off, which "
        "what stands beside it in the stream can undo. Ablation is by the head's mean.",
        table(["what was asked", "what came out", ""], claims),
        table(["seed", "head", "score", "masked", "centred", "median of others", "NEXT", "SAME"], rows),
        "Index modulo ten in what the head reads at a number, of 100 numbers. Arithmetic: share of shifts i → j "
        "(i ≠ j) after which j + 1 of the same decade is named, in brackets without a shift. Alone: all but an item's "
        "own feature ablated, share of items after which the head names the right residue (chance 0.10). AUC of the "
        "worst residue's feature.",
        table(
            ["seed", "probe, held-out decades", "shuffled labels", "dictionary, by the head",
             "dictionary, by the model", "it alone", "its worst AUC", "means, by the head", "means, by the model",
             "they alone", "their worst AUC"],
            modular_rows,
        ),
    ], claims  # fmt: skip


def real_successor(model: Model, size: Size) -> tuple[list[str], list[list[str]]]:
    """Successor heads of the real model."""
    kinds = kinds_of(model)
    rows, contextual = [], None
    for form in ("contextual", "embedding+mlp0", "mlp0"):
        scores = succession(model, kinds, form)  # type: ignore[arg-type]
        contextual = contextual or scores
        parts = [str(p) for p in scores.parts]
        at, masked = parts.index("L23.H3"), scores.columns["masked"]
        best, alone = int(np.argmax(scores.values)), int(np.argmax(masked))
        rows.append(
            [form, f"{parts[best]} {scores.values[best]:.2f} (q {scores.columns['q'][best]:.3f})",
             f"{parts[alone]} {masked[alone]:.2f} (q {scores.columns['masked_q'][alone]:.4f})",
             f"{scores.values[at]:.2f}", f"{masked[at]:.2f}", f"{scores.columns['greater'][at]:.2f}",
             f"{np.median(scores.values):.2f}", f"{np.median(masked):.2f}"]
        )  # fmt: skip
    assert contextual is not None
    parts = [str(p) for p in contextual.parts]
    first = parts[int(np.argmax(contextual.values))]
    at, (low, high) = parts.index("L23.H3"), contextual.interval()
    p = float(contextual.columns["p"][at])
    made = list_task(kinds, n=200)
    pairs = made.pairs(model)
    able = performance(model, pairs)
    groups = [e.group for e in made.examples(model.tokenizer)]
    top1 = {g: [] for g in dict.fromkeys(groups)}  # type: ignore[var-annotated]
    logits = model.logits(pairs.clean, pairs.mask)
    for row, group in enumerate(groups):
        top1[group].append(int(logits[row, pairs.reads[row, 0]].argmax()) in pairs.answers[row])
    late = [h for h in model.parts(("head",)) if 20 <= (h.layer or 0) <= 27]
    drops = mean_ablated(model, pairs, late).mean(1)
    names = [str(h) for h in late]
    ranked = sorted(zip(drops, names, strict=True), reverse=True)
    share, bias = (float(np.mean(np.delete(drops, i) < drops[i])) for i in map(names.index, ("L23.H3", "L24.H7")))
    text = torch.tensor(text_rows(model, size.text_rows, 128))
    wild = []
    for head in ("L23.H3", "L24.H7"):
        hurt = hurt_most(model, vesalius.parse(head), text, top=50)  # type: ignore[arg-type]
        counts = hurt["kind"].value_counts()
        examples = "; ".join(
            f"…{r['before'][-40:]}**{r['token']}** (+{r['increase']:.1f} nats)".replace("\n", " ").replace("|", "/")
            for r in hurt.head(3).to_dict("records")
        )
        wild.append([head, *[int(counts.get(k, 0)) for k in KINDS], examples])
    claims = [
        ["SmolLM2: L23.H3 first of 270, contextual", f"first is {first}", verdict([first == "L23.H3"])],
        ["its score ≥ 0.30", f"{rows[0][3]} [{low[at]:.2f}, {high[at]:.2f}]",
         verdict([contextual["L23.H3"] >= 0.30])],
        ["permutation p < 0.01", f"{p:.4f}", verdict([p < 0.01])],
        ["mean-ablating it lowers successor − current more than 95 % of the other heads of layers 20–27",
         f"more than {share:.0%}; the copier with a bias, L24.H7, more than {bias:.0%}", verdict([share >= 0.95])],
    ]  # fmt: skip
    return [
        "## Successor heads on SmolLM2",
        f"{sum(len(k.pairs) for k in kinds)} items of {', '.join(f'{k.name} ({len(k.pairs)})' for k in kinds)}; "
        "numbers beyond 9 are several tokens here. Score: share of items whose successor has the top logit in its "
        "series; masked: the item itself out of the race; greater: chance that a later item gets more than an earlier.",
        table(["what was asked", "what came out", ""], claims),
        table(["form", "first", "first, masked", "L23.H3", "its masked", "its greater", "median", "masked"], rows),
        f"List prompts (“ A, B, C,”, {pairs.n_examples} of all series): successor preferred to the current item on "
        f"{able.accuracy:.2f}, likeliest of all tokens on {able.top1:.2f} (by series: "
        f"{', '.join(f'{g} {np.mean(v):.2f}' for g, v in top1.items())}). Heads of layers 20–27 whose mean-ablation "
        f"lowers the logit difference most: {', '.join(f'{n} {d:.2f}' for d, n in ranked[:6])}.",
        "In the wild (Bible, 50 tokens that are foretold worst without the head, by kind):",
        table(["head", *KINDS, "the worst three"], wild),
    ], claims  # fmt: skip
