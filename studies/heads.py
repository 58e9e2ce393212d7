"""Head detectors, and what the papers on successor heads and retrieval heads claim, planted, trained and on SmolLM2."""

from __future__ import annotations

import numpy as np
from _heads import FULL, QUICK, Size
from _page import look_inside, run, table, write
from _retrieval_heads import real_retrieval, toy_retrieval
from _runs import is_quick
from _successor_heads import real_successor, toy_successor

import vesalius
from vesalius.find.detectors.base import MARGIN

MODEL = "smollm2-135m"


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
