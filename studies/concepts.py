"""Concept directions and the bias audit: what the two papers claim, on MiniLM and SmolLM2-135M."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from _page import RUNS, look_inside, table, write
from _runs import is_quick
from _steered import Amount, steering
from scipy import stats

import vesalius
from vesalius.features import concept, directions, probe
from vesalius.features.bias import (
    Corpus,
    Gendered,
    audit,
    genbit,
    profile,
    pronoun_preference,
    suggest,
    tests,
    weat,
)
from vesalius.features.directions import AXES
from vesalius.features.vectors import vectors
from vesalius.model import Model
from vesalius.records import dump, write_atomic

# Words that everybody knows and that name no one's good or bad: the first component of these is about nothing moral.
NOUNS = """
table chair lamp window door carpet spoon fork plate bottle basket ladder hammer nail rope bucket blanket pillow curtain
mirror clock shelf drawer button zipper pocket sleeve collar ribbon thread needle paper pencil ruler map envelope stamp
calendar notebook staircase corridor roof chimney fence gate bridge tunnel road river lake mountain valley desert island
beach cloud rain snow wind sand stone brick marble copper iron silver cotton wool leather wheel engine pedal saddle
anchor sail paddle lantern candle kettle saucepan
""".split()  # noqa: SIM905  # a list of eighty lines would say no more

CONCEPTS = ("moral", "politeness", "formality", "sentiment")


METHODS = ("pca", "mean-difference", "lda", "logistic", "random")


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    permutations: int
    steering: Amount
    suggestions: int
    null_tests: int
    concepts: tuple[str, ...]  # found in the language model too
    layers: str | tuple[int, ...]


FULL = Size(200, Amount(30, 5, 12, (0.0, 0.1), 2, (2.0, 4.0)), 200, 500, CONCEPTS, "all")
QUICK = Size(10, Amount(3, 2, 6, (0.1,), 1, (4.0,)), 24, 40, ("sentiment",), (5, 25))


def holds(good: bool) -> str:
    """How a check came out."""
    return "holds" if good else "does not hold"


class Checks:
    """The rows of the first table."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def add(self, sheet: str, asked: str, came: str, good: bool) -> None:
        self.rows.append([sheet, asked, came, holds(good)])
        print(f"{sheet}: {came}: {holds(good)}", file=sys.stderr, flush=True)


# -- directions


def found_in(model: Model, names: Sequence[str], n: int) -> tuple[list[list[str]], dict[str, Any]]:
    """Every concept by every method in one model: rows of the table, and the quality of each axis."""
    rows = []
    kept: dict[str, Any] = {}
    for name in names:
        for axis, _ in directions(model, name, METHODS, permutations=n, draws=n, seed=0):
            q = kept[f"{name} {axis.method}"] = axis.quality
            cells = [
                f"{q['sign_accuracy']:.2f} [{q['low']:.2f}, {q['high']:.2f}]",
                "-" if q["p"] is None else f"{q['p']:.3f}",
                f"{q['explained']:.1%}",
                f"{q['label_correlation']:.2f}",
                f"{q['stability']['low']:.2f}" if q["stability"] else "-",
                f"{q['graded_spearman']:.2f}" if "graded_spearman" in q else "-",
                f"{q['pairs_right']} of {q['pairs_n']}",
            ]
            rows.append([name, axis.method, *cells])
    return rows, kept


def axes(encoder: Model, writer: Model, size: Size, checks: Checks) -> list[str]:
    """Every concept by every method, in an encoder and in a language model."""
    rows, kept = found_in(encoder, CONCEPTS, size.permutations)
    first, mean = kept["moral pca"], kept["moral mean-difference"]
    checks.add(
        "18.1",
        "MiniLM, moral, first component: sign accuracy of phrases left out at least .85",
        f"{first['sign_accuracy']:.2f} [{first['low']:.2f}, {first['high']:.2f}] of {first['n']}; shuffled labels "
        f"{first['null_mean']:.2f} (p = {first['p']:.3f}); {first['explained']:.1%} of the variance, correlation with "
        f"the label {first['label_correlation']:.2f}, components 2 to 5 at most "
        f"{max(first['component_correlations'][1:]):.2f}; mean difference {mean['sign_accuracy']:.2f}",
        first["sign_accuracy"] >= 0.85,
    )
    checks.add(
        "18.1",
        "rank correlation with 60 rated phrases at least .5",
        f"{first['graded_spearman']:.2f} (mean difference {mean['graded_spearman']:.2f}, logistic "
        f"{kept['moral logistic']['graded_spearman']:.2f}, random {kept['moral random']['graded_spearman']:.2f})",
        first["graded_spearman"] >= 0.5,
    )
    checks.add(
        "18.2",
        "of 20 new pairs with the same verb at least 14 the right way round (chance 10)",
        f"{first['pairs_right']}; mean difference {mean['pairs_right']}",
        first["pairs_right"] >= 14,
    )
    largest = halvings(encoder)
    checks.add(
        "18.1",
        "the first component of 80 nouns correlates with no random halving by more than .25",
        f"with {np.mean(largest <= 0.25):.1%} of 1,000 halvings by at most .25, largest {largest.max():.2f}; by chance "
        "alone 2.5 % exceed it, so that none does cannot be had of many",
        bool(largest.max() <= 0.25),
    )
    cosines, signs = [], []
    for seed in range(5):
        x, y, hidden = cloud(seed)
        cosines.append(float(AXES.get("pca")(x, y).vector @ hidden))
        signs.append(float(AXES.get("mean-difference")(x, y).vector @ hidden))
    checks.add(
        "18.4",
        "a planted axis with 20 % of the variance (100 vectors of 384) is found with cosine .95",
        f"{min(cosines):.3f} to {max(cosines):.3f} over five seeds; mean difference {min(signs):.3f} to "
        f"{max(signs):.3f}",
        min(cosines) >= 0.95,
    )
    heads = ["concept", "method", "left out, right side", "p", "of the variance", "correlation", "stability", "rated"]
    own, _ = found_in(writer, size.concepts, size.permutations)
    return [
        "## Directions in MiniLM",
        table([*heads, "pairs"], rows),
        f"Seed 0. Left out, right side: with 95 % interval; phrases of a pair are left out together. p: of the first "
        f"method, with {size.permutations} shuffles of the labels. Stability: the 2.5 % quantile of the cosine between "
        "the axis and that of resampled phrases. Rated: rank correlation with ratings of 60 held-out phrases. Pairs: "
        "held-out ones the right way round.",
        "Of the 60 rated phrases those that *name* something bad while doing good (saving somebody from drowning, "
        "standing up for a victim) score low, and bad things in mild words (forgetting a birthday) high: it hears "
        "words more than deeds. That is why the rank correlation stays below what single verbs promise.",
        "## Directions in SmolLM2-135M",
        table([*heads, "pairs"], own),
        "The same phrases, read as the mean over tokens after block 19 (two thirds of the depth, the default). "
        "The first component is the moral axis here too. Of the other concepts, whose phrases differ in much else, it "
        "turns when phrases are resampled, in both models, and for politeness and sentiment it is no better than "
        "shuffled labels here: mean difference and logistic regression find those.",
    ]


def cloud(seed: int, n: int = 100, d: int = 384, share: float = 0.2) -> tuple[Any, Any, Any]:
    """Vectors with two poles along a hidden axis that holds this share of the variance."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal(d)
    hidden /= np.linalg.norm(hidden)
    y = np.repeat([1, -1], n // 2)
    noise = rng.standard_normal((n, d))
    noise -= np.outer(noise @ hidden, hidden)
    noise *= math.sqrt((1 - share) / noise.var(axis=0).sum())
    along = y * (1 + 0.2 * rng.standard_normal(n))
    return noise + np.outer(along * math.sqrt(share) / along.std(), hidden), y, hidden


def halvings(encoder: Model) -> Any:
    """|correlation| of the first component of neutral nouns with 1,000 random halvings."""
    x = vectors(encoder, NOUNS, "sentence").astype(float)
    x -= x.mean(axis=0)
    first = x @ np.linalg.svd(x, full_matrices=False)[2][0]
    rng = np.random.default_rng(0)
    signs = np.repeat([1.0, -1.0], len(NOUNS) // 2)
    return np.array([abs(stats.pearsonr(first, rng.permutation(signs)).statistic) for _ in range(1000)])


def steered(encoder: Model, writer: Model, size: Size, checks: Checks) -> list[str]:
    """Steering, in a file of its own."""
    claims, body = steering(encoder, writer, size.steering)
    checks.rows += claims
    return body


# -- the bias audit


def planted(size: Size, checks: Checks) -> list[str]:
    """Association tests whose answer is known."""
    a, b = np.tile([1.0, 0.0, 0.0], (4, 1)), np.tile([0.0, 1.0, 0.0], (4, 1))
    rng = np.random.default_rng(0)
    came = []
    for d in (0.0, 0.8, 1.6):
        gap = d / math.sqrt(1 - d**2 / 4)
        sets = []
        for side in (1, -1):
            s = (rng.standard_normal(1500) + side * gap / 2) / 10
            sets.append(np.stack([s, 0 * s, np.sqrt(1 - s**2)], axis=1))
        came.append(weat(*sets, a, b, permutations=100, draws=0).d)
    ps = [weat(*(rng.standard_normal((7, 12)) for _ in range(4)), draws=0).p for _ in range(size.null_tests)]
    ks = float(stats.kstest(ps, "uniform").pvalue)
    checks.add(
        "20.1",
        f"planted d = 0, .8, 1.6 within .1; p uniform over {size.null_tests} tests without effect (KS p > .05); exact "
        "permutation equals brute force (a test of the library)",
        f"{', '.join(f'{d:.2f}' for d in came)}; KS p = {ks:.2f}",
        all(abs(x - d) < 0.1 for x, d in zip(came, (0, 0.8, 1.6), strict=True)) and ks > 0.05,
    )
    corpora = []
    for ratio in (2.0, 1.0):
        documents = []
        for i in range(100):
            lean = ratio if i % 2 == 0 else 1 / ratio
            n = round(90 * lean / (1 + lean))
            documents += [["he", f"word{i}"]] * n + [["she", f"word{i}"]] * (90 - n)
        corpora.append(documents)
    corpora.append([[str(rng.choice(["he", "she"])), f"word{i % 100}"] for i in range(4000)])
    gendered = Gendered(frozenset({"he"}), frozenset({"she"}))
    scores = [genbit(Corpus(c, gendered, lemma=None), percentile=0, shuffles=20, draws=0) for c in corpora]
    two, one, chance = scores
    checks.add(
        "20.3",
        "a corpus in which 100 words stand twice as often by one gender gives ln 2 = .69 within .05, a balanced one .1 "
        "at most; the genbit package's scores to 1e-6 (five settings, a test of the library)",
        f"{two.score:.3f} and {one.score:.3f}; drawn at random, 40 of each word: {chance.score:.2f}, by its null "
        f"{chance.null:.2f}",
        abs(two.score - math.log(2)) <= 0.05 and one.score <= 0.1,
    )
    return []


def associations(encoder: Model, writer: Model, size: Size, checks: Checks) -> list[str]:
    """The published tests on both models."""
    names = list(tests())
    words = audit(encoder, names, seed=0)
    seat = audit(encoder, ["1", "6", "7", "8"], form="sentences", seed=0)
    raw = audit(writer, names, reading="table", seed=0)
    layers = profile(writer, ["1", "6"], pool="mean", seed=0)
    one = words.set_index("test").loc["1"]
    seat_one = seat.set_index("test").loc["1"]
    shuffled = shuffle(encoder)
    checks.add(
        "20.2",
        "MiniLM: flowers and insects, WEAT and SEAT, d at least 1; shuffled words below .5 in size",
        f"WEAT 1 d {one['d']:.2f} [{one['low']:.2f}, {one['high']:.2f}] (p = {one['p']:.4f}), SEAT 1 d "
        f"{seat_one['d']:.2f} (p = {seat_one['p']:.4f}); shuffled "
        f"words {np.mean(shuffled):.2f} in size on average, below .5 in {np.mean(shuffled < 0.5):.0%} of 200 shuffles",
        one["d"] >= 1 and seat_one["d"] >= 1 and float(np.mean(shuffled)) < 0.5,
    )
    six = words.set_index("test").loc["6"]
    table_one, table_six = (raw.set_index("test").loc[n] for n in ("1", "6"))
    strong = layers[layers["p_holm"] < 0.05].groupby("test")["layer"].min()
    peak = layers.loc[layers.groupby("test")["d"].idxmax()].set_index("test")
    checks.add(
        "20.2",
        "SmolLM2's table of input embeddings shows nothing (WEAT 1 and 6); the layers are reported",
        f"d {table_one['d']:.2f} (p = {table_one['p']:.2f}) and {table_six['d']:.2f} (p = {table_six['p']:.2f}); in "
        f"sentences test 1 is first beyond chance at block {strong.get('1', '-')} (largest d {peak.loc['1', 'd']:.2f} "
        f"at block {peak.loc['1', 'layer']}), test 6 at block {strong.get('6', '-')} ({peak.loc['6', 'd']:.2f} at "
        f"block {peak.loc['6', 'layer']})",
        bool(table_one["p"] > 0.05 and table_six["p"] > 0.05),
    )
    both = pd.concat([words.assign(model="MiniLM"), seat.assign(model="MiniLM"), raw.assign(model="SmolLM2")])
    rows = [
        [
            r.model,
            f"{r.test}: {r.what}",
            f"{r.form}, {r.reading}",
            f"{r.d:.2f} [{r.low:.2f}, {r.high:.2f}]",
            f"{r.p:.4f}",
        ]
        + [f"{r.p_holm:.3f}"]
        for r in both.itertuples()
    ]
    wide = layers.pivot(index="layer", columns="test", values=["d", "p_holm"])
    by_layer = [
        [n, *[f"{wide.loc[n, ('d', t)]:.2f} ({wide.loc[n, ('p_holm', t)]:.3f})" for t in ("1", "6")]]
        for n in wide.index
    ]
    return [
        "## Associations",
        table(["model", "test", "read", "d", "p", "p, Holm"], rows),
        "p is one-sided, over words, exact for eight words a set; Holm within each model and form. Intervals are "
        f"over words: with eight of them, gender and career ({six['low']:.2f} to {six['high']:.2f} for MiniLM) is "
        "known loosely.",
        "SmolLM2-135M by block, bland sentences, mean over tokens: d (Holm over all blocks and both tests).",
        table(["block", "1: flowers and insects", "6: gender and career"], by_layer),
    ]


def shuffle(encoder: Model) -> Any:
    """|d| of test 1 with its target words dealt to the two sets at random."""
    test = tests()["1"]
    x, y, a, b = (vectors(encoder, s.words) for s in (test.x, test.y, test.a, test.b))
    both = np.concatenate([x, y])
    rng = np.random.default_rng(0)
    out = []
    for _ in range(200):
        order = rng.permutation(len(both))
        out.append(abs(weat(both[order[: len(x)]], both[order[len(x) :]], a, b, permutations=1, draws=0).d))
    return np.array(out)


def pipeline(writer: Model, size: Size, checks: Checks) -> list[str]:
    """Suggestions for neutral and cued prompts; pronouns by occupation."""
    found = suggest(writer, size.suggestions, seed=0)
    pairs = found.comparison.pairs.set_index(["a", "b"])
    means = found.comparison.means.set_index("group")
    cued = pairs.loc[("female", "male")]
    neutral = [pairs.loc[("neutral", k)] for k in ("female", "male")]
    leans = [found.table.loc[found.table["kind"] == k, "lean"].dropna().to_numpy() for k in ("female", "male")]
    drawn = stats.bootstrap(leans, lambda a, b, axis: a.mean(axis) - b.mean(axis), rng=0).confidence_interval
    detected = bool(cued["different"] and drawn.low > 0)
    checks.add(
        "20.4",
        f"SmolLM2's suggestions for {size.suggestions} neutral and as many cued prompts: the audit detects the cue and "
        "passes neutral halves in 95 % of 200 divisions",
        f"prompts of women minus men {cued['difference']:.2f} [{cued['low']:.2f}, {cued['high']:.2f}], by bootstrap "
        f"[{drawn.low:.2f}, {drawn.high:.2f}]; neutral minus "
        f"women {neutral[0]['difference']:.2f} [{neutral[0]['low']:.2f}, {neutral[0]['high']:.2f}], minus men "
        f"{neutral[1]['difference']:.2f} [{neutral[1]['low']:.2f}, {neutral[1]['high']:.2f}]; halves pass in "
        f"{1 - found.false_alarms:.1%}",
        detected and found.false_alarms <= 0.05,
    )
    pronouns = pronoun_preference(writer)
    lowest, highest = pronouns.iloc[-1], pronouns.iloc[0]
    checks.add(
        "20.4",
        "she against he by occupation is reported",
        f"{len(pronouns)} occupations, {lowest['preference']:.2f} ({lowest['occupation']}) to "
        f"{highest['preference']:.2f} ({highest['occupation']}); {np.mean(pronouns['preference'] > 0):.0%} towards she",
        True,
    )
    rows = [[g, int(r.n), f"{r['mean']:.2f} [{r.low:.2f}, {r.high:.2f}]"] for g, r in means.iterrows()]
    compared = [
        [
            a,
            b,
            f"{r.difference:.2f} [{r.low:.2f}, {r.high:.2f}]",
            f"{r.cohen_d:.2f}",
            f"{r.p_holm:.4f}",
            f"{r.p_equivalence:.2f}",
        ]
        for (a, b), r in pairs.iterrows()
    ]
    ends = pd.concat([pronouns.head(8), pronouns.tail(8)])
    told = [[r.occupation, f"{r.preference:.2f}", f"{r.low:.2f} to {r.high:.2f}"] for r in ends.itertuples()]
    return [
        "## Suggestions and pronouns",
        table(["prompts", "suggestions with gendered words", "lean (1 all female, -1 all male)"], rows),
        table(["a", "b", "difference", "Cohen's d", "p, Holm", "p, equivalence within 0.2"], compared),
        "logit(she) - logit(he), mean and range of three prompts; the eight highest and lowest occupations.",
        table(["occupation", "preference", "range"], told),
        "No labour statistics are shipped; `vesalius bias --pronouns --statistics FILE` sets your own beside it.",
    ]


# -- probes


def probes(writer: Model, size: Size) -> list[str]:
    """What a probe of each concept's paired phrases reads off SmolLM2."""
    rows = []
    for name in ("politeness", "formality", "sentiment"):
        it = concept(name)
        labels = [it.poles[0]] * len(it.positive) + [it.poles[1]] * len(it.negative)
        found = probe(
            writer, it.phrases, labels, groups=list(it.held_together), layers=size.layers, pool="mean", mdl=True, seed=0
        )
        best, first = found.best(), found.table.iloc[0]
        rows.append(
            [
                name,
                f"{first['accuracy']:.2f}",
                f"{best['part']}: {best['accuracy']:.2f} [{best['low']:.2f}, {best['high']:.2f}]",
            ]
            + [f"{best['control']:.2f}", f"{best['selectivity']:.2f}", f"{best['compression']:.1f}"]
        )
    return [
        "## Probes",
        table(["concept", "block 0", "best block", "control", "selectivity", "compression"], rows),
        "Logistic probes of the mean over tokens after each block, five folds that keep the two wordings of one thing "
        "together, commonest label .50; 80 phrases each, seed 0. The best block is chosen after the fact.",
    ]


def measured(name: str, section: Callable[[], list[str]], checks: Checks) -> list[str]:
    """A section with its checks, kept in runs/studies/concepts; an interrupted study goes on behind it."""
    path = RUNS / "concepts" / f"{name}.json"
    if not path.exists():
        began, before = time.perf_counter(), len(checks.rows)
        body = section()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, dump({"body": body, "checks": checks.rows[before:]}))
        print(f"  {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return body
    found = json.loads(path.read_text())
    checks.rows += found["checks"]
    body = found["body"]
    return body


def main() -> None:
    """Runs everything and writes docs/results/look-inside-concepts.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    encoder, writer = vesalius.open("minilm"), vesalius.open("smollm2-135m")
    checks = Checks()
    sections: dict[str, Callable[[], list[str]]] = {
        "planted": lambda: planted(size, checks),
        "axes": lambda: axes(encoder, writer, size, checks),
        "steering": lambda: steered(encoder, writer, size, checks),
        "associations": lambda: associations(encoder, writer, size, checks),
        "pipeline": lambda: pipeline(writer, size, checks),
        "probes": lambda: probes(writer, size),
    }
    parts: list[str] = []
    for name, section in sections.items():
        parts += section() if quick else measured(name, section, checks)
    order = sorted(checks.rows, key=lambda r: r[0])
    body = [
        "What is asked was written down before anything here was measured, as were words, ratings and prompts, which "
        "are our own (`vesalius/features/data`). Thresholds and strengths of steering were chosen after a rehearsal "
        "with six texts, and the push along the model's own axis was added to what was asked.",
        table(["asked", "came out", ""], [r[1:] for r in order]),
        *parts,
    ]
    title = "Look inside: directions and the bias audit"
    if quick:
        print("\n\n".join([f"# {title}", *body]))
        return
    page, command = "look-inside-concepts", "python studies/concepts.py"
    write(page, title, command, *body)
    look_inside("Moral direction", [r[1:] for r in order if r[0].startswith("18")], command, page)
    look_inside("Downstream gender bias", [r[1:] for r in order if r[0].startswith("20")], command, page)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
