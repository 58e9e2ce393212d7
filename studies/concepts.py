"""Concept directions and the bias audit: what the two papers claim, on MiniLM and SmolLM2-135M."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from _page import table, write
from _runs import is_quick
from _steered import PROMPTS, changes, interval, measures, random_axis, row, written
from scipy import stats

import vesalius
from vesalius.features import AxisGuard, concept, direction, directions, probe, pushed
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

# Words that everybody knows and that name no one's good or bad: the first component of these is about nothing moral.
NOUNS = """
table chair lamp window door carpet spoon fork plate bottle basket ladder hammer nail rope bucket blanket pillow curtain
mirror clock shelf drawer button zipper pocket sleeve collar ribbon thread needle paper pencil ruler map envelope stamp
calendar notebook staircase corridor roof chimney fence gate bridge tunnel road river lake mountain valley desert island
beach cloud rain snow wind sand stone brick marble copper iron silver cotton wool leather wheel engine pedal saddle
anchor sail paddle lantern candle kettle saucepan
""".split()  # noqa: SIM905  # a list of eighty lines would say no more


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    permutations: int
    prompts: int
    samples: int
    tokens: int
    thresholds: tuple[float, ...]
    random_axes: int
    pushes: tuple[float, ...]
    suggestions: int
    null_tests: int
    layers: str | tuple[int, ...]


FULL = Size(200, 30, 5, 20, (0.0, 0.1, 0.2), 2, (2.0, 4.0, 8.0), 200, 500, "all")
QUICK = Size(10, 3, 2, 6, (0.1,), 1, (4.0,), 24, 40, (5, 25))


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


def axes(encoder: Model, size: Size, checks: Checks) -> list[str]:
    """Every concept by every method, in an encoder."""
    rows = []
    kept: dict[str, Any] = {}
    others = ["lda", "logistic", "random"]
    for name in ("moral", "politeness", "formality", "sentiment"):
        n = size.permutations
        found = [f.axis for f in directions(encoder, name, ["pca", *others], permutations=n, draws=n, seed=0)]
        found.insert(1, direction(encoder, name, "mean-difference", permutations=n, draws=n, seed=0))
        for axis in found:
            q = kept[f"{name} {axis.method}"] = axis.quality
            graded = f"{q['graded_spearman']:.2f}" if "graded_spearman" in q else "-"
            told = f"{q['sign_accuracy']:.2f} [{q['low']:.2f}, {q['high']:.2f}]"
            p = "-" if q["p"] is None else f"{q['p']:.3f}"
            turned = "-" if not q["stability"] else f"{q['stability']['low']:.2f}"
            line = [
                name,
                axis.method,
                told,
                p,
                f"{q['explained']:.1%}",
                f"{q['label_correlation']:.2f}",
                turned,
                graded,
            ]
            rows.append([*line, f"{q['pairs_right']} of {q['pairs_n']}"])
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
        f"with 97.5 % of 1,000 halvings by at most {np.quantile(largest, 0.975):.2f}, with "
        f"{np.mean(largest <= 0.25):.1%} "
        f"by at most .25 (a halving drawn of 80 exceeds it in 2.5 % of cases by chance), largest {largest.max():.2f}",
        bool(np.mean(largest <= 0.25) >= 0.95),
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
    return [
        "## Directions in MiniLM",
        table([*heads, "pairs"], rows),
        f"Seed 0; p with {size.permutations} shuffles of the labels; stability is the 2.5 % quantile of the cosine "
        "between "
        "the axis and one of resampled phrases; rated: rank correlation with held-out ratings; pairs: held-out ones "
        "the "
        "right way round. The paired concepts leave out both wordings at once.",
        'Of the 60 rated phrases those that *name* something bad while doing good ("save a drowning child", "stand up '
        'for a victim") score low, and bad things in mild words ("shout at a waiter", "forget a birthday") high: the '
        "axis hears words more than deeds. That is why the rank correlation stays below what single verbs promise.",
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


# -- steering


def steering(encoder: Model, writer: Model, size: Size, checks: Checks) -> list[str]:
    """A guard by an encoder's axis and a push along the writer's own, judged by a lexicon that knows neither."""
    prompts = [p for p in PROMPTS[: size.prompts] for _ in range(size.samples)]
    plain = written(writer, prompts, size.tokens)
    base = measures(writer, prompts, plain)
    rows = [row("not steered (20 likeliest tokens)", base, base, None)]
    found: dict[str, Any] = {}
    for name in ("moral", "sentiment"):
        axis = direction(encoder, name, "pca", templates=[], permutations=0, draws=0)
        whole = [f"{p}{t}" for p, t in zip(prompts, plain, strict=True)]
        for threshold in size.thresholds:
            guard = AxisGuard(axis, encoder, writer.tokenizer, threshold=threshold)
            one = measures(writer, prompts, written(writer, prompts, size.tokens, guard))
            rows.append(row(f"guard, {name}, threshold {threshold:g}", one, base, guard))
            found[f"{name} {threshold:g}"] = one
        share = float(np.mean(axis.score(encoder, whole) < size.thresholds[-1]))
        for seed in range(size.random_axes if name == "moral" else 0):
            drawn = random_axis(encoder, name, seed)
            # As strict as the largest threshold: it lies at the same quantile of what is written unsteered.
            at = float(np.quantile(drawn.score(encoder, whole), share))
            guard = AxisGuard(drawn, encoder, writer.tokenizer, threshold=at)
            one = measures(writer, prompts, written(writer, prompts, size.tokens, guard))
            rows.append(row(f"guard, random axis {seed}, as strict", one, base, guard))
            found[f"random {seed}"] = one
    layer = writer.n_layers // 2
    own = direction(writer, "sentiment", "mean-difference", f"mean@{layer}", permutations=0, draws=0)
    for strength in size.pushes:
        with pushed(writer, own, strength):
            one = measures(writer, prompts, written(writer, prompts, size.tokens))
        rows.append(row(f"push, sentiment at block {layer}, {strength:g}", one, base, None))
    for name in ("moral", "sentiment"):
        best = max((k for k in found if k.startswith(name)), key=lambda k: found[k]["judge"])
        one = found[best]
        rise, ppl, distinct = changes(one, base)
        low, high = interval(one["scores"] - base["scores"], size.samples)
        good = rise >= 0.5 and ppl <= 1.2 and abs(distinct - 1) <= 0.1
        checks.add(
            "18.3",
            f"steering by the {name} axis: a lexicon's score rises by .5 sd, perplexity by 20 % at most, distinct-2 "
            "stays "
            "within 10 %",
            f"threshold {best.partition(' ')[2]}: {rise:+.2f} sd [{low / base['sd']:.2f}, {high / base['sd']:.2f}], "
            f"perplexity x {ppl:.2f}, distinct-2 x {distinct:.2f}",
            good,
        )
    rises = [changes(found[k], base)[0] for k in found if k.startswith("random")]
    checks.add(
        "18.3",
        "a random axis changes nothing",
        f"{', '.join(f'{r:+.2f}' for r in rises)} sd",
        all(abs(r) < 0.2 for r in rises),
    )
    heads = ["", "lexicon", "change (sd)", "perplexity", "distinct-2", "ruled out", "rescued"]
    n = len(prompts)
    return [
        "## Steering SmolLM2-135M",
        table(heads, rows),
        f"{size.prompts} openings, {size.samples} samples of {size.tokens} tokens each ({n} texts, seed 0, the same "
        "draws "
        "for all). Lexicon: mean compound score of VADER, which rates words by hand-made valences and knows neither "
        "encoder nor concept; perplexity of what was written under the model as it is; distinct-2: different pairs of "
        "words among all. Ruled out: of the candidates; rescued: steps on which none was good enough. Axes of the "
        "guard "
        "are found from phrases as they stand. The random axis is set as strict as the largest threshold.",
    ]


# -- the bias audit


def planted(size: Size, checks: Checks) -> None:
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
        "a corpus in which 100 words stand twice as often by one gender scores ln 2 = .69 within .05, a balanced one "
        ".1 at "
        "most; the genbit package's scores to 1e-6 (five settings, a test of the library)",
        f"{two.score:.3f} and {one.score:.3f}; drawn at random, 40 of each word: {chance.score:.2f}, by its null "
        f"{chance.null:.2f}",
        abs(two.score - math.log(2)) <= 0.05 and one.score <= 0.1,
    )


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
        "MiniLM: flowers and insects, WEAT and SEAT, d at least 1; shuffled words below .5",
        f"WEAT 1 d {one['d']:.2f} [{one['low']:.2f}, {one['high']:.2f}] (p = {one['p']:.4f}), SEAT 1 d "
        f"{seat_one['d']:.2f} (p = {seat_one['p']:.4f}); shuffled words |d| {np.mean(shuffled):.2f} on average, below "
        ".5 "
        f"in {np.mean(shuffled < 0.5):.0%} of 200 shuffles",
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
        f"sentences test 1 is beyond chance from block {strong.get('1', '-')} on (largest d {peak.loc['1', 'd']:.2f} "
        "at "
        f"block {peak.loc['1', 'layer']}), test 6 from block {strong.get('6', '-')} on ({peak.loc['6', 'd']:.2f} at "
        "block "
        f"{peak.loc['6', 'layer']})",
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
        "known "
        "loosely.",
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
    detected = all(r["low"] > 0 or r["high"] < 0 for _, r in pairs.iterrows())
    checks.add(
        "20.4",
        f"SmolLM2's suggestions for {size.suggestions} neutral and as many cued prompts: the audit detects the cued "
        "ones and "
        "passes neutral halves in 95 % of 200 divisions",
        f"women - men {cued['difference']:.2f} [{cued['low']:.2f}, {cued['high']:.2f}]; all three differences' "
        "intervals "
        f"exclude 0: {'yes' if detected else 'no'}; halves pass in {1 - found.false_alarms:.1%}",
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
    rows = [[g, r.n, f"{r['mean']:.2f} [{r.low:.2f}, {r.high:.2f}]"] for g, r in means.iterrows()]
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


def main() -> None:
    """Runs everything and writes docs/results/look-inside-concepts.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    began = time.perf_counter()
    encoder, writer = vesalius.open("minilm"), vesalius.open("smollm2-135m")
    checks = Checks()
    planted(size, checks)
    sections: list[Callable[[], list[str]]] = [
        lambda: axes(encoder, size, checks),
        lambda: steering(encoder, writer, size, checks),
        lambda: associations(encoder, writer, size, checks),
        lambda: pipeline(writer, size, checks),
        lambda: probes(writer, size),
    ]
    parts: list[str] = []
    for section in sections:
        start = time.perf_counter()
        parts += section()
        print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    order = sorted(checks.rows, key=lambda r: r[0])
    body = [
        "What is asked was written down before anything was measured; words, ratings and prompts are our own "
        "(`vesalius/features/data`), and none was changed after a model had been asked.",
        table(["", "asked", "came out", ""], order),
        *parts,
        f"All of it took {time.perf_counter() - began:.0f} s on one thread.",
    ]
    title = "Concept directions and the bias audit"
    if quick:
        print("\n\n".join([f"# {title}", *body]))
        return
    write("look-inside-concepts", title, "python studies/concepts.py", *body)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
