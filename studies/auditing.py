"""Five skills, each forgotten in turn by random labels: what carries over, what spills, and what a probe still reads.

    python studies/auditing.py            writes docs/results/change-auditing.md
    python studies/auditing.py --quick    a rehearsal

Three tasks of one rule each, and two whose answers are learnt one by one, in one small model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from _page import changed, table, write
from _planted import each, found_again, kept, say, small
from _runs import is_quick, verdict

from vesalius.change.audit import AuditPlan, Item, ask, halves, matrix, predictors, still_there, teach, unlearn
from vesalius.model import Model

PLACE = "auditing"


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    layers: int = 2
    d: int = 96
    mlp: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    learn: int = 700
    audit: AuditPlan = AuditPlan(20, 16, 5e-4, rounds=30)
    hard: AuditPlan = AuditPlan(20, 16, 1e-3, rounds=30)


FULL = Size()
QUICK = Size(2, 32, 64, (0,), 40, AuditPlan(5, 8, 5e-4), AuditPlan(5, 8, 2e-3))


AUDIT = ("rule", "order", "same half", "learnt", "learnt of four")
RULES = AUDIT[:3]
NUMBERED = [f"w{i}" for i in range(97)]


def tasks(seed: int) -> list[Item]:
    """Three tasks of one rule each, and two of answers drawn by chance, learnt one by one."""
    rng = np.random.default_rng([seed, *b"tasks"])
    yes = (" w1", " w2")
    found = [Item("rule", f"w3 w{n}", yes, int(n >= 50)) for n in range(10, 90)]
    for task, sign, right in (
        ("order", "w5", lambda a, b: a < b),
        ("same half", "w6", lambda a, b: (a < 50) == (b < 50)),
    ):
        pairs = {tuple(int(x) for x in rng.choice(np.arange(10, 90), 2, replace=False)) for _ in range(200)}
        found += [Item(task, f"{sign} w{a} w{b}", yes, int(right(a, b))) for a, b in sorted(pairs)]
    for task, sign, choices in (("learnt", "w4", yes), ("learnt of four", "w7", (" w91", " w92", " w93", " w94"))):
        pairs = {(int(a), int(b)) for a in range(10, 18) for b in range(20, 26)}
        found += [Item(task, f"{sign} w{a} w{b}", choices, int(rng.integers(len(choices)))) for a, b in sorted(pairs)]
    return found


def knowing(seed: int, size: Size) -> tuple[Model, list[Item]]:
    """A model that was trained on all tasks."""
    items = tasks(seed)

    def make() -> Model:
        model = small(NUMBERED[1:], size.layers, size.d, size.mlp, seed)
        teach(model, items, AuditPlan(size.learn, 64, 3e-3, seed))
        return model

    return kept(
        PLACE,
        {"what": "knowing", "seed": seed, "steps": size.learn, "size": [size.layers, size.d], "n": len(items)},
        make,
    ), items


def one_audit(seed: int, size: Size) -> dict[str, Any]:
    """The matrix of a seed, what foretells it, and the probe of the rule forgotten to chance."""
    model, items = knowing(seed, size)
    found = matrix(model, items, replace(size.audit, seed=seed))
    told = predictors(model, items, found, seed)
    train, other = halves(items, "rule", seed)
    rule = [i for i in items if i.task == "rule"]
    known = still_there(model, rule, seed)["accuracy"].max()
    edit, _ = unlearn(model, train, replace(size.hard, seed=seed))
    said = ask(model, [*train, *other])
    probes = still_there(model, rule, seed)
    best = probes.loc[probes["accuracy"].idxmax()]
    edit.undo(model)
    probe = {"before": float(known), "after": float(best["accuracy"]), "control": float(best["control"]),
             "said": float(said.right.mean()), "entropy": said.entropy}  # fmt: skip
    say(f"audit {seed}: before {found['before'].min():.2f}, probe {probe}")
    return {"matrix": found.to_dict("records"), "predictors": told.to_dict("records"), "probe": probe}


def audit_claims(every: list[dict[str, Any]]) -> list[list[str]]:
    """The sheet's checks of the audit."""
    own: dict[str, list[float]] = {t: [] for t in AUDIT}
    off = []
    for f in every:
        m = f["matrix"]
        for t in AUDIT:
            own[t].append(float(m[(m.forgot == t) & (m.asked == t) & (m["items"] == "held out")]["ratio"].iloc[0]))
        others = m[m.forgot.isin(RULES) & (m.forgot != m.asked)]
        off.append(float(others["ratio"].mean()))
    diagonal = [float(np.mean([own[t][i] for t in RULES])) for i in range(len(every))]
    probes = [f["probe"] for f in every]
    known = [float(f["matrix"]["before"].min()) for f in every]
    return [
        ["all tasks are known before: least accuracy", each(known), verdict([x >= 0.9 for x in known])],
        *([f"held-out forget ratio of a rule 0.8 or more: {t}", each(own[t]), verdict([x >= 0.8 for x in own[t]])]
          for t in RULES),
        *([f"held-out forget ratio of answers learnt one by one 0.2 or less: {t}", each(own[t]),
           verdict([x <= 0.2 for x in own[t]])] for t in AUDIT[3:]),
        ["forgetting a rule: own ratio above the mean of all other tasks'", f"{each(diagonal)} against {each(off)}",
         verdict([a > b for a, b in zip(diagonal, off, strict=True)])],
        ["the forgotten rule is said at chance, within 5 points", each([p["said"] for p in probes]),
         verdict([abs(p["said"] - 0.5) <= 0.05 for p in probes])],
        ["a probe still reads it: 0.9 of its accuracy before, or more",
         each([p["after"] / p["before"] for p in probes]), verdict([p["after"] >= 0.9 * p["before"] for p in probes])],
        ["a probe of shuffled labels is at chance, within 10 points", each([p["control"] for p in probes]),
         verdict([abs(p["control"] - 0.5) <= 0.1 for p in probes])],
    ]  # fmt: skip


def main() -> None:
    """Everything."""
    size = QUICK if is_quick(__doc__) else FULL
    audits = []
    for seed in size.seeds:
        story = {"what": "audit", **{n: repr(v) for n, v in vars(size).items() if n != "seeds"}, "seed": seed}
        one = found_again(PLACE, story, partial(one_audit, seed, size))
        audits.append(one | {"matrix": pd.DataFrame(one["matrix"])})
    text = page(size, audits)
    if size is QUICK:
        print("\n".join(text))
        return
    name, command = "change-auditing", "python studies/auditing.py"
    write(name, "Change: an audit of forgetting", command, *text, seeds="seeds 0, 1, 2")
    changed("Unforgettable Generalization", audit_claims(audits), command, name)


def page(size: Size, audits: list[dict[str, Any]]) -> list[str]:
    """The page's parts."""
    return [
        f"Llamas of {size.layers} blocks, d {size.d}, that know five tasks.",
        table(["asked", "came out", ""], audit_claims(audits)),
        "Rules carry over far more than answers learnt one by one, as asked, though by less than the bars; labels "
        "drawn by chance agree with the truth in more or less than half of a task's few items, and what is said "
        "afterwards differs from chance by as much.",
        "## Five skills, each forgotten in turn",
        "Forget ratio on held-out items, mean over seeds, and in brackets each seed's 95 % interval; on the diagonal "
        "also that of the items trained on.",
        matrix_table(audits),
        "What foretells it (Spearman's rho with the held-out ratio, over five tasks): "
        + "; ".join(f"seed {s}: confidence {a['predictors'][-1]['confidence']:+.2f}, spread "
                    f"{a['predictors'][-1]['spread']:+.2f}" for s, a in zip(size.seeds, audits, strict=True))
        + ".",
        "The rule forgotten to chance (" + f"rate {size.hard.lr:g}): "
        + "; ".join(f"seed {s}: said {a['probe']['said']:.2f}, entropy {a['probe']['entropy']:.2f} bits, probe "
                    f"{a['probe']['before']:.2f} before and {a['probe']['after']:.2f} after, of shuffled labels "
                    f"{a['probe']['control']:.2f}" for s, a in zip(size.seeds, audits, strict=True)) + ".",
    ]  # fmt: skip


def matrix_table(audits: list[dict[str, Any]]) -> str:
    """Forgot by asked."""
    rows = []
    for forgot in AUDIT:
        row = [forgot]
        for other in AUDIT:
            some = [a["matrix"] for a in audits]
            some = [m[(m.forgot == forgot) & (m.asked == other)] for m in some]
            out = [m[m["items"] == "held out"].iloc[0] for m in some]
            text = f"{np.mean([o['ratio'] for o in out]):.2f} (" + "; ".join(
                f"{o['low']:.2f} to {o['high']:.2f}" for o in out) + ")"  # fmt: skip
            if forgot == other:
                text += f", trained on {np.mean([m[m['items'] == 'trained']['ratio'].iloc[0] for m in some]):.2f}"
            row.append(text)
        rows.append(row)
    return table(["forgot", *AUDIT], rows)


if __name__ == "__main__":
    main()
