"""Reuse between IOI and Colored Objects in SmolLM2-135M-Instruct, and the transplant."""

from __future__ import annotations

import pandas as pd
from _page import estimate, run, table, write

COMMAND = "reuse --tasks ioi,colored-objects"


def main() -> None:
    """Runs the command (about ten minutes on two cores) and writes docs/results/reuse.md."""
    s = run(COMMAND)
    overlap = pd.read_parquet(f"{s['run']}/overlap.parquet")
    moved = pd.read_parquet(f"{s['run']}/transplant.parquet")
    alike = pd.read_parquet(f"{s['run']}/transplant_control.parquet")
    curve = pd.read_parquet(f"{s['run']}/transplant_curve.parquet")
    parts = pd.read_parquet(f"{s['run']}/parts.parquet")
    circuits = table(
        ["task", "accuracy (chance)", "heads", "MLPs", "faithfulness", "random, mean", "roles of its heads"],
        [
            [i["name"], f"{i['accuracy']:.2f} ({i['chance']:.2f})", i["size"]["heads"], i["size"]["mlps"]]
            + [estimate(i["faithfulness"]), estimate(i.get("random", {}).get("mean"))]
            + [", ".join(f"{n} {r or 'without a role'}" for r, n in i.get("roles", {}).items())]
            for i in s["items"]
        ],
    )
    shared = table(
        [
            "parts",
            "shared",
            "of",
            "Jaccard",
            "by chance",
            "95 % of chance",
            "p",
            "p, layer by layer",
            "Pearson of effects",
        ],
        [
            [r.kind, r.shared, f"{r.size_a} and {r.size_b}", f"{r.jaccard:.3f}", f"{r.chance_shared:.1f}"]
            + [f"{r.chance_high:.0f}", f"{r.p:.4f}", f"{r.p_layer:.4f}", f"{r.pearson:.3f}"]
            for r in overlap.itertuples()
        ],
    )
    blocks = []
    if "transplant" in s:
        t = s["transplant"]
        rows = []
        for metric, group in moved.groupby("metric", sort=False):
            before, after = (group[group["condition"] == c].iloc[0] for c in ("before", "after"))
            random = group[group["condition"] == "random"]["value"]
            chosen = alike[alike["metric"] == metric]["value"]
            rows.append(
                [metric, estimate(before[["value", "low", "high"]].rename({"value": "mean"}).to_dict())]
                + [estimate(after[["value", "low", "high"]].rename({"value": "mean"}).to_dict())]
                + [f"{random.mean():.2f} ({random.min():.2f} to {random.max():.2f})"]
                + [f"{chosen.mean():.2f} ({chosen.min():.2f} to {chosen.max():.2f})" if len(chosen) else "-"]
            )
        lift = estimate(t["lift"], 3)
        steps = [[r.heads, r.added, f"{r.accuracy:.3f}", f"{r.metric:.2f}"] for r in curve.itertuples()]
        blocks = [
            f"Heads made to look from END at the wrong candidates: {', '.join(t['heads'])}. They, their order and "
            f"their number were settled on {t['development_prompts']} other prompts; {t['n']} held-out prompts. "
            f"Accuracy changes by {lift}; with random heads of the same layers by {estimate(t['random_lift'], 3)}.",
            table(["", "before", "after", "random heads (range)", "random heads, chosen alike (range)"], rows),
            "The intervention uses each prompt's labels: the heads are told which candidates are wrong. So this shows "
            "what these heads do when they look at the right place, and that the second task lacks that guidance; it "
            "is no repair to ship. Random heads told the same do not help.",
            "One head after the other, held-out prompts:",
            table(["heads", "added", "accuracy", "logit difference"], steps),
        ]
    both = parts[parts["where"] == "shared"]
    columns = [c for c in both.columns if c.endswith((": role", ": score"))]
    top = both.assign(size=both[[c for c in columns if c.endswith("score")]].abs().max(axis=1))
    top = top.sort_values("size", ascending=False).head(15)
    rows = [
        [r["part"], *[f"{r[c]:.2f}" if c.endswith("score") else r[c] or "-" for c in columns]]
        for _, r in top.iterrows()
    ]
    write(
        "reuse",
        "Reuse between IOI and Colored Objects",
        "python studies/reuse.py",
        f"`vesalius {COMMAND}`. Both circuits are a quarter of the model's heads and MLPs, by size of exact effect.",
        circuits,
        "## Overlap",
        shared,
        "## The transplant",
        *(blocks or ["It could not be tried: " + "; ".join(s["notes"])]),
        "## The largest shared parts",
        table(["part", *columns], rows),
        "## Notes of the run",
        "\n".join(f"- {n}" for n in s["notes"]) or "None.",
    )


if __name__ == "__main__":
    main()
