"""Retrieval heads: planted, trained, and on SmolLM2."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _heads import Size, text_rows
from _page import table
from _runs import trained, verdict
from scipy.stats import rankdata
from statsmodels.stats.proportion import proportion_confint

import vesalius
from vesalius.build import planted
from vesalius.find.detectors import HeadContext, detect
from vesalius.find.detectors.needles import Needle, make_needles, retrieved
from vesalius.find.detectors.retrieval import THRESHOLD, of_needles
from vesalius.model import Intervention, Model
from vesalius.model.intervene import taps
from vesalius.scores import Scores
from vesalius.tasks import task
from vesalius.train.recipe import read_recipe

BEST_INDUCTION = ("L18.H6", "L17.H3", "L17.H4", "L18.H7", "L23.H2", "L23.H7", "L17.H5", "L20.H6")  # of the sheet


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
    text = torch.tensor(text_rows(model, min(32, size.text_rows), 128))
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
