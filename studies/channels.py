"""Channels between heads and observables pulled back through them: every check of the two systems, with its numbers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _observables import LABELLED, OCCUPATIONS, angles, couplings, exact, gender
from _page import RUNS, look_inside, table, write
from _runs import is_quick
from _talking_heads import ALLOWED, INDUCTION, SHIFT, STRETCH, induction, inhibiting, laundry, numerics, planted

import vesalius
from vesalius.records import dump, write_atomic

PAGE, COMMAND = "look-inside-channels", "python studies/channels.py"
Claims = list[list[str]]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    seeds: int
    prompts: int  # rows of repeated tokens, and prompts of IOI
    components: int  # of a sender that are taken out one by one
    lengths: tuple[int, ...]  # of laundry lists
    dev: int
    test: int
    random: int  # random subspaces
    text: int  # rows of plain text
    covariance: int  # tokens
    judged: int  # tokens that slopes are measured on
    samples: int  # of angles
    words: tuple[str, ...]
    draws: int


FULL = Size(10, 16, 64, (3, 4, 5, 6, 7, 8, 9, 10), 64, 128, 20, 16, 20_000, 1000, 2000, tuple(OCCUPATIONS), 20)
QUICK = Size(1, 2, 6, (3,), 4, 4, 1, 4, 600, 100, 100, tuple(dict.fromkeys([*OCCUPATIONS[::6], *LABELLED])), 2)


def kept(name: str, folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a part of the study, measured now or before."""
    path = folder / f"{name}.json"
    if not path.exists():
        began = time.process_time()
        found = make()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, dump(found | {"cpu_s": time.process_time() - began}))
        print(f"{name}: {time.process_time() - began:.0f} s of one core", file=sys.stderr, flush=True)
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def said(held: bool) -> str:
    """The verdict of a check."""
    return "holds" if held else "does not hold"


def percent(value: float, digits: int = 0, signed: bool = False) -> str:
    """A share as a percentage."""
    return f"{100 * value:{'+' if signed else ''}.{digits}f} %"


def points(row: dict[str, Any]) -> str:
    """A gain in accuracy with its interval."""
    return f"{100 * row['gain']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"


def rho(row: dict[str, float]) -> str:
    """A correlation with its interval."""
    return f"{row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


# -- the two systems' checks -----------------------------------------------------------------------------------------


def talking_heads(found: dict[str, dict[str, Any]], size: Size) -> Claims:
    """What was asked, what came out, verdict."""
    p, n, i, w = (found[k] for k in ("planted", "numerics", "induction", "laundry"))
    every, values = p["rows"], [r for r in p["rows"] if r["side"] == "v"]
    z, other = min(r["z"] for r in every), max(r["z_other"] for r in every)
    whole = min(r["p_whole"] for r in every)
    left, moved = max(abs(1 - r["lost"]) for r in values), max(r["lost_other"] for r in values)
    ranks = [r["rank"] for r in i["rows"]]
    fall, random = [r["fall"] for r in i["rows"]], float(np.mean([r["fall_mean"] for r in i["rows"]]))
    edits = [(r, r[k]) for r in w["rows"] for k in ("free", "mild") if r[k]]
    row, most = max(edits, key=lambda e: e[1]["gain"])
    good = [(r, e) for r, e in edits if e["gain"] >= 0.1 and e["loss"] <= ALLOWED]
    control = [float(np.mean(r["random"])) for r in w["rows"] if r["random"]]
    return [
        [
            "a planted component has z > 10, others < 3; the whole score of its pair is not in the top 10 %; without "
            "it no effect is left, without another less than 1 % changes",
            f"z at least {z:.0f}, others at most {other:.2f}; whole score in the top {percent(whole)} at best; "
            f"{percent(left, 4)} left without it, at most {percent(moved, 2)} moved without another "
            f"({len(every)} models, seeds 0 to {size.seeds - 1})",
            said(z > 10 and other < 3 and whole > 0.1 and left < 1e-3 and moved < 0.01),
        ],
        [
            "components rebuild W_OV to 1e-5; factored scores equal dense ones to 1e-5 and are 20 times as fast at "
            "d = 576",
            f"{n['rebuilt']:.0e}; {n['gap']:.0e}; {1000 * n['factored_s']:.1f} ms a pair against "
            f"{1000 * n['dense_s']:.0f}, {n['dense_s'] / n['factored_s']:.0f} times; all {n['all_pairs']:,} channels "
            f"of SmolLM2 in {n['all_pairs_s']:.0f} s",
            said(n["rebuilt"] < 1e-5 and n["gap"] < 1e-5 and n["dense_s"] > 20 * n["factored_s"]),
        ],
        [
            "previous-token head to induction heads by keys: in the top 1 % of all pairs by best component",
            f"{i['previous']['head']} to {', '.join(INDUCTION)}: ranks {', '.join(map(str, ranks))} of {i['pairs']:,}",
            said(max(ranks) <= 0.01 * i["pairs"]),
        ],
        [
            "that component at its mean lowers induction by 30 % or more, a random one by 3 % or less",
            f"{', '.join(percent(f, 1) for f in fall)}; a random one {percent(random, 1)}; the whole head "
            f"{percent(min(r['fall_head'] for r in i['rows']))} or more",
            said(min(fall) >= 0.3 and random <= 0.03),
        ],
        [
            f"laundry list: a dev-chosen subspace edit gains 10 points at some length at a text loss of at most "
            f"+{ALLOWED}; random subspaces at most 2 points",
            f"{len({r['items'] for r, _ in good})} of {len(w['rows'])} lengths; most {points(most)} points at "
            f"{row['items']} items (text loss {most['loss']:+.3f}); {size.random} random subspaces "
            f"{', '.join(f'{100 * c:+.1f}' for c in control)} points on average",
            said(bool(good) and max(control) <= 0.02),
        ],
    ]


def observables(found: dict[str, dict[str, Any]]) -> Claims:
    """What was asked, what came out, verdict."""
    e, a, c, g = (found[k] for k in ("exact", "angles", "couplings", "gender"))
    first, without = g["rows"][0], g["without"][0]
    slopes = [abs(r["weighted"] / r["slope"] - 1) for r in c["rows"]]
    plain = [abs(r["plain"] / r["slope"] - 1) for r in c["rows"]]
    most = max(r["random_r"] for r in c["rows"])
    by_kind = {k: [r["times"] for r in a["rows"] if r["kind"] == k] for k in ("layer", "rms")}
    return [
        [
            "all paths of heads add up to n · logits to 1e-5",
            ", ".join(f"{v:.0e} {k}" for k, v in e["gaps"].items()) + f" ({e['paths']} paths, seeds 0 to 2)",
            said(max(e["gaps"].values()) < 1e-5),
        ],
        [
            "mean angle of a norm's gradient below 2 arccos √(1 − 1/(d − 1)), shrinking as 1/√d; RMSNorm too",
            "; ".join(f"{r['kind']} d {r['d']}: {r['angle']:.4f} < {r['bound']:.4f}" for r in a["rows"]),
            said(all(r["angle"] < r["bound"] for r in a["rows"]) and max(map(np.ptp, by_kind.values())) < 0.1),
        ],
        [
            "isotropic states: fitted slope = C within 2 %",
            f"at most {percent(c['isotropic'], 1)} off (20 pairs, d 576, 40,000 states)",
            said(c["isotropic"] < 0.02),
        ],
        [
            "SmolLM2: covariance-weighted C within 20 % of the slope of her − him on she − he, and better than plain C",
            "; ".join(
                f"{r['path']}: slope {r['slope']:.2f}, weighted {r['weighted']:.2f}, plain {r['plain']:.2f}"
                for r in c["rows"]
            ),
            said(all(mine < min(0.2, theirs) for mine, theirs in zip(slopes, plain, strict=True))),
        ],
        [
            "features of random observable pairs: |r| < 0.2",
            "; ".join(
                f"{r['path']}: mean {r['random_r']:.2f}, {percent(r['random_over'])} of pairs above 0.2"
                for r in c["rows"]
            ),
            said(most < 0.2 and all(r["random_over"] == 0 for r in c["rows"])),
        ],
        [
            "occupations: Spearman 0.5 or more between score and answer, without training data",
            f"{rho(first)} over {g['n']} occupations ({first['head']}, the longest feature); from four labelled words "
            f"{', '.join(rho(b) + ' ' + b['way'].replace('_', ' ') for b in g['baselines'])}",
            said(first["rho"] >= 0.5),
        ],
        [
            "without the feature |she − he| falls by 30 % or more, without a random direction by 3 % or less",
            f"{percent(without['lowers'])} (one head); random {percent(without['random'], 1)}, at most "
            f"{percent(without['random_most'], 1)}",
            said(without["lowers"] >= 0.3 and abs(without["random"]) <= 0.03),
        ],
    ]


# -- the page --------------------------------------------------------------------------------------------------------


def induction_page(i: dict[str, Any]) -> list[str]:
    """Channels into induction heads."""
    rows = [
        [r["edge"], f"{r['score']:.3f}", r["component"], f"{r['z']:.1f}", f"{r['p']:.3f}", r["rank"], r["rank_whole"]]
        + [percent(r["fall"], 1), f"{percent(r['fall_mean'], 1)} ({percent(r['fall_max'], 1)})"]
        + [percent(r["fall_head"]), f"{r['correlation']:.2f}"]
        for r in i["rows"]
    ]
    head = ["channel", "score", "component", "z", "p", "rank", "rank of whole", "fall", "of any one: mean (most)"]
    sets = [[r["k"], *(percent(r[name]) for name in ("top", "random", "most"))] for r in i["sets"]]
    return [
        "## Channels into induction heads",
        f"`vesalius channels --from {i['previous']['head']} --kind k`. {i['previous']['head']} has the most "
        f"previous-token attention of all heads ({i['previous']['attention']:.2f}). Rank: among all {i['pairs']:,} "
        "channels into keys. Fall: of the receiver's induction attention on repeated random tokens (seed 1) with "
        "components of the sender at their mean.",
        table([*head, "of all", "score against fall, r"], rows),
        "Weights alone put the pair among the first, and foretell which components matter (last column). But the "
        "channel is not one component: a key that says which token came before takes many dimensions, so the whole "
        "score ranks the pair as high. With the k components that the four heads read most of:",
        table(["k", "mean fall", "k random ones", "most of 5 draws"], sets),
    ]


def ioi_page(o: dict[str, Any]) -> list[str]:
    """Single components in IOI."""
    rows = [
        [r["edge"], f"{r['head_lost']:.2f}", f"{r['gap']:.2f}", r["component"]]
        + [f"{r['effect']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]", f"{r['median']:.4f}", f"{r['logits']:+.2f}"]
        + [f"{r['rank']} of 64", f"{r['rho']:.2f}"]
        for r in o["rows"]
    ]
    return [
        "## Single components in IOI",
        f"The three heads that look most at IO rather than S2 from END, and the three earlier heads whose removal at "
        f"END costs most ({o['n']} prompts, seed 3). Inhibition: what a component adds to the receiver's attention to "
        "IO less that to S2, for the component that adds or takes most. Rank: of that component by composition score "
        "(queries) among the sender's; ρ: Spearman of score and |inhibition| over all components. A large effect of a "
        "single component beside a median near 0 is a channel of one dimension; scores leave out how strongly a "
        "component is written, so they foretell the effect only in part.",
        table(
            ["channel", "logits lost without the sender", "receiver's attention gap", "component", "inhibition"]
            + ["median of all", "logits lost without it", "rank by score", "ρ"],
            rows,
        ),
    ]


def laundry_page(w: dict[str, Any], size: Size) -> list[str]:
    """The laundry list."""
    rows = []
    for r in w["rows"]:
        for name in ("free", "mild"):
            if e := r[name]:
                told = [r["items"], f"{r['before']:.3f}"] if name == "free" else ["", ""]
                chance = ["", ""]
                if name == "free" and r["random"]:
                    chance = [f"{100 * of(r['random']):+.1f}" for of in (np.mean, np.max)]
                rows.append([*told, e["edit"], f"{e['after']:.3f}", points(e), f"{e['loss']:+.3f}", *chance])
    places = {(r["items"], r["place"]): f"{r['before']:.2f} → {r['after']:.2f}" for r in w["places"]}
    across = range(1, max(size.lengths) + 1)
    steps = [f"{s['head']} component {s['component']} × {s['factor']:g}" for s in w["weights"]["steps"]]
    return [
        "## Laundry list",
        f"Channels, chosen on {size.dev} prompts of four items (seed 11) by the logits lost without them at END: "
        + "; ".join(
            f"{c['head']} component {c['best'][0]} ({c['component_lost']:.2f} of the head's {c['lost']:.2f})"
            for c in w["channels"]
        )
        + f". An edit stretches or shifts the stream at {w['where']} at END in the space they span; the best of "
        f"{len(STRETCH) ** 3 + len(SHIFT) ** 3} on {size.dev} dev prompts (seed 1) is judged on {size.test} held-out "
        f"ones; a second row is the best that costs plain text at most {ALLOWED} nats. Loss: change on "
        f"{w['tokens']:,} tokens of `anarchism` with the edit at every position, from "
        f"{w['loss']:.3f} nats. {size.random} random subspaces choose among the same edits on the same prompts, "
        "whatever text they cost (at three lengths).",
        table(
            ["items", "before", "edit", "after", "gain, points [95 %]", "text loss", "random", "best random"],
            rows,
        ),
        "Accuracy by the place of the missing item, before and after the first edit:",
        table(["items", *map(str, across)], [[n, *(places.get((n, at), "") for at in across)] for n in size.lengths]),
        f"In the weights instead, singular values scaled one after the other by what helps dev prompts (seed 2): "
        f"{'; '.join(steps) or 'none helps'}. Loss on plain text {w['weights']['loss']:+.4f} nats.",
        table(
            ["items", "before", "after", "gain, points [95 %]"],
            [
                [r["items"], f"{r['before']:.3f}", f"{r['after']:.3f}", points(r | {"gain": r["after"] - r["before"]})]
                for r in w["weights"]["rows"]
            ],
        ),
    ]


def couplings_page(c: dict[str, Any]) -> list[str]:
    """Couplings of features on real text."""
    rows = [
        [r["path"], r["at"], *(f"{r[k]:.2f}" for k in ("slope", "weighted", "plain", "r", "weighted_r", "cosine"))]
        + [f"{r['random_r']:.2f} ({r['random_most']:.2f}; {percent(r['random_over'])})"]
        + [f"{r['foretold']:.2f}", f"{r['foretold_plain']:.2f}"]
        for r in c["rows"]
    ]
    return [
        "## Couplings",
        f"Features of `she - he` and `her - him`; covariance of {c['tokens']:,} tokens of FOLDOC, slopes on "
        f"{c['judged']:,} tokens of another text. Foretold: correlation over 20 random pairs of observables between "
        "the measured r and the predicted one (plain: the cosine). States of a real stream are far from isotropic, so "
        "features of unrelated observables share some of their variance; the covariance foretells how much.",
        table(
            ["path", "at", "slope", "weighted C", "plain C", "r", "weighted r", "cosine"]
            + ["random pairs: size of r, mean (most; over 0.2)", "foretold", "plain"],
            rows,
        ),
    ]


def occupations_page(g: dict[str, Any]) -> list[str]:
    """Occupations."""
    rows = [[r["head"], f"{r['length']:.1f}", rho(r), f"{r['attention']:.3f}"] for r in g["rows"]]
    taken = [
        [r["heads"], percent(r["lowers"]), percent(r["spread"]), percent(r["random"], 1), percent(r["random_most"], 1)]
        for r in g["without"]
    ]
    return [
        "## Occupations",
        "`The {occupation} said that`, she − he. The ten heads whose features are longest (weights alone), how well "
        "each feature's score at the occupation orders the answers, and how much the head looks there from END:",
        table(["head", "length", "Spearman [95 %]", "attention"], rows),
        f"The first forty weighted by attention: {rho(g['weighted'])}. Baselines at the first head's place, from "
        f"{', '.join(LABELLED)} alone, judged on the others (the feature itself there: {rho(g['mine'])}): "
        + "; ".join(
            f"{b['way'].replace('_', ' ')} {rho(b)} (best of all layers, chosen afterwards: {b['best']:.2f})"
            for b in g["baselines"]
        )
        + ". Mean difference from more labels: "
        + ", ".join(f"{r['n']} words {r['rho']:.2f} ± {r['sd']:.2f} ({r['draws']} draws)" for r in g["more"])
        + ".",
        f"The feature taken out of what heads read ({g['single']} occupations of one token, mean |she − he| "
        f"{g['size']:.2f}); random: the same with random directions.",
        table(["heads", "size of she − he falls by", "its spread by", "random", "random, most"], taken),
        f"Lengths against path patching to the logits on one pair of prompts: Spearman {g['ranks']['spearman']:.2f} "
        f"over {g['ranks']['heads']} heads, {g['ranks']['top20']} of the first twenty in common.",
    ]


def main() -> None:
    """Measures and writes docs/results/look-inside-channels.md (about 35 minutes of one core)."""
    quick = is_quick(__doc__)
    size, folder = (QUICK, RUNS / "channels-quick") if quick else (FULL, RUNS / "channels")
    model = vesalius.open("smollm2-135m")
    s = size
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "planted": lambda: planted(s.seeds),
        "exact": exact,
        "angles": lambda: angles(s.samples),
        "numerics": lambda: numerics(model),
        "couplings": lambda: couplings(model, s.covariance, s.judged),
        "gender": lambda: gender(model, s.words, s.draws),
        "induction": lambda: induction(model, s.prompts, s.components),
        "inhibiting": lambda: inhibiting(model, 2 * s.prompts, s.components),
        "laundry": lambda: laundry(model, s.lengths, s.dev, s.test, s.random, s.components, s.text),
    }
    found = {name: kept(name, folder, make) for name, make in parts.items()}
    heads, observed = talking_heads(found, size), observables(found)
    body = [
        "On SmolLM2-135M-Instruct from 4-bit weights, opened as float32. The commands are `vesalius channels` and "
        "`vesalius observe` ([how to](../howto/channels.md)). Merullo et al. 2024, arXiv 2406.09519; Dunefsky and "
        "Cohan 2024, arXiv 2312.16291.",
        table(["what was asked", "what came out", ""], [*heads, *observed]),
        *induction_page(found["induction"]),
        *ioi_page(found["inhibiting"]),
        *laundry_page(found["laundry"], size),
        *couplings_page(found["couplings"]),
        *occupations_page(found["gender"]),
    ]
    if quick:
        print("\n".join(body))
        return
    write(PAGE, "Look inside: channels and observables", COMMAND, *body, seeds="seeds as stated")
    look_inside("Talking Heads", heads, COMMAND, PAGE)
    look_inside("Observable Propagation", observed, COMMAND, PAGE)


if __name__ == "__main__":
    main()
