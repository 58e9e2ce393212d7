"""What small transformers learnt of recursive functions: where they fail, what fails alike, which head decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _page import look_inside, run, table, write
from _runs import is_quick, trained, verdict

from vesalius.corpus.recursion import BinarySuccessor, Symbols
from vesalius.features.recursion import cases, reconstruct
from vesalius.features.recursion.program import _limited
from vesalius.train.recipe import read_recipe

PLANTED = 5  # the cut-off of the hand-made solver


@dataclass(frozen=True)
class Size:
    """How large the study is: (name, recipe, changes, seeds) of each model, and inputs of a cell."""

    models: tuple[tuple[str, str, dict[str, Any], tuple[int, ...]], ...]
    n: int


LEAST: dict[str, Any] = {"data.settings.order": "least"}
MOST: dict[str, Any] = {"data.settings.order": "most"}
FULL = Size(
    (
        ("least first", "successor", LEAST, (1234, 1235, 1236)),
        ("least first, lr 5e-4", "successor", LEAST | {"optimizer.lr": 5e-4}, (1234,)),
        ("most first", "successor", MOST, (1234, 1235, 1236)),
        ("least first, encoder-decoder", "successor-seq2seq", LEAST, (1234, 1235, 1236)),
        ("pre-order", "traversal", {"data.settings.order": "pre"}, (1234,)),
    ),
    24,
)
QUICK = Size((("least first", "successor", LEAST | {"steps": 40, "data.rows": 32}, (1234,)),), 4)


def planted(n: int) -> tuple[list[str], list[list[Any]]]:
    """Solvers that rewrite at most five steps."""
    rows, good = [], []
    for order in ("least", "most"):
        task = BinarySuccessor(order=order)
        for then in ("copy", "unchanged", "one", "stop", "skip"):

            def solve(inputs: Any, task: BinarySuccessor = task, then: str = then) -> list[Symbols]:
                return [_limited(x, task, PLANTED, then) for x in inputs]

            it = reconstruct(cases(solve, task, range(1, 15), range(14), n), task)
            kept = it.score.iloc[0]
            good.append(it.cutoff == PLANTED)
            rows.append([order, then, it.cutoff, it.program.name, f"{kept['recall']:.2f}", f"{kept['precision']:.2f}",
                         f"{kept['exact']:.2f}"])  # fmt: skip
    claim = [f"hand-made solvers with cut-off {PLANTED}: the tool says {PLANTED}", f"{sum(good)} of {len(good)}",
             "holds" if all(good) else "does not hold"]  # fmt: skip
    return [
        "## Solvers whose cut-off is known",
        f"Functions that rewrite at most {PLANTED} steps; what they do then differs.",
        table(["order", "then", "cut-off found", "program", "recall", "precision", "exact"], rows),
    ], [claim]


def asked(name: str, recipe: str, changes: dict[str, Any], seed: int, n: int) -> dict[str, Any]:
    """One model, trained and asked."""
    slug = "".join(c if c.isalnum() else "-" for c in f"{recipe}-{name}")[:50].strip("-")
    folder: Path = trained(read_recipe(recipe, changes | {"seed": seed, "name": slug}), "recursion")
    return run(f"recursion {folder} --n {n}")


def share(found: dict[str, Any], where: str) -> float:
    """Exact match on one kind of input."""
    return next((float(r["right"]) for r in found["kinds"] if r["where"] == where), float("nan"))


def main() -> None:
    """Runs everything and writes docs/results/look-inside-recursion.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    first, claims = planted(size.n)
    rows: list[list[Any]] = []
    scores: list[list[Any]] = []
    heads: list[list[Any]] = []
    programs: list[str] = []
    results: dict[str, list[dict[str, Any]]] = {}
    for name, recipe, changes, seeds in size.models:
        for seed in seeds:
            found = asked(name, recipe, changes, seed, size.n)
            results.setdefault(name, []).append(found)
            rows.append([name, seed, *[f"{share(found, k):.3f}" for k in ("trained", "deeper", "longer", "both")]])
            for i, row in enumerate(found.get("score", [])):
                told = [name, seed, row["program"], row["failures"], row["foretold"]]
                scores.append([*told, *["-" if row[k] is None else f"{row[k]:.2f}"
                                        for k in ("recall", "precision", "exact")]])  # fmt: skip
                if not i:
                    lines = found["lines"]
                    cut = "none" if found["cutoff"] is None else found["cutoff"]
                    more = f" (and {len(lines) - 6} more)" if len(lines) > 6 else ""
                    programs.append(f"- {name}, seed {seed}: cut-off {cut}; {'; '.join(lines[:6])}{more}.")
            if "mechanism" in found:
                it = found["mechanism"]
                best = max((r["accuracy"] for r in found.get("modes", [])), default=float("nan"))
                heads.append([name, seed, it["marks"], f"{it['marker']:.2f}", it["decides"], f"{it['moved']:.2f}",
                              f"{it['others']:.2f}", f"{best:.2f}"])  # fmt: skip
    claims += judged(results)
    body = [
        table(["what was asked", "what came out", ""], claims),
        *first,
        "## Trained models",
        "Inputs of at most 10 symbols and depth at most 4 (trees: 37 symbols, height 3); exact match running freely on "
        "inputs that training did not have. The depths are drawn uniformly.",
        table(["model", "seed", "as trained", "deeper", "longer", "both"], rows),
        "## The program that fails alike",
        "Fitted to half of the cases; of the other half, failures foretold. Below each, what one would say knowing the "
        "training range alone: that it rewrites no more steps than were trained and copies the rest, that it answers "
        "no more symbols.",
        table(["model", "seed", "program", "failures", "foretold", "recall", "precision", "exact output"], scores),
        *programs,
        "## Which head decides",
        "Marks: the head that attends most from the answer to the recursion's end. Decides: the head whose forced "
        "place the switch follows most often, chosen on other inputs. Probe: accuracy for rewrite or copy, best layer.",
        table(["model", "seed", "marks", "by", "decides", "switch moves", "other heads", "probe"], heads),
    ]
    if quick:
        print("\n".join(body))
        return
    name, command = "look-inside-recursion", "python studies/recursion.py"
    write(name, "What small transformers learnt of recursion", command, *body, seeds="seeds 1234 to 1236")
    look_inside("Structural recursion", claims, command, name)


def judged(results: dict[str, list[dict[str, Any]]]) -> list[list[Any]]:
    """What is asked of each kind of binary model."""
    claims: list[list[Any]] = []
    for name, found in results.items():
        if name == "pre-order":
            continue

        def told(values: list[float]) -> str:
            return ", ".join(f"{v:.2f}" for v in values)

        inside, deeper = ([share(f, k) for f in found] for k in ("trained", "deeper"))
        claims.append([f"{name}: as trained ≥ 99 %", told(inside), verdict([v >= 0.99 for v in inside])])
        claims.append([f"{name}: deeper ≤ 50 %", told(deeper), verdict([v <= 0.5 for v in deeper])])
        judge = [f["score"] for f in found if f.get("score")]
        if judge:
            both = [(s[0]["recall"] or 0.0, s[0]["precision"] or 0.0) for s in judge]
            claims.append(
                [f"{name}: failures foretold ≥ 85 %, precision ≥ 85 %",
                 ", ".join(f"{r:.2f} and {p:.2f}" for r, p in both),
                 verdict([r >= 0.85 and p >= 0.85 for r, p in both])]
            )  # fmt: skip
            exact = [(s[0]["exact"], max(r["exact"] for r in s[1:])) for s in judge]
            claims.append(
                [f"{name}: exact wrong output ≥ 60 %, better baseline ≤ 20 %",
                 ", ".join(f"{a:.2f} against {b:.2f}" for a, b in exact),
                 verdict([a >= 0.6 and b <= 0.2 for a, b in exact])]
            )  # fmt: skip
        moved = [(f["mechanism"]["moved"], f["mechanism"]["others"]) for f in found if "mechanism" in f]
        if moved:
            claims.append(
                [f"{name}: the switch follows the forced head ≥ 70 %, other heads ≤ 10 %",
                 ", ".join(f"{a:.2f}, {b:.2f}" for a, b in moved),
                 verdict([a >= 0.7 and b <= 0.1 for a, b in moved])]
            )  # fmt: skip
    return [[a, b, c] for a, b, c in claims if np.size(b)]


if __name__ == "__main__":
    main()
