"""Whole numbers in two small models: what 8 and 6 bits cost, which channels are outliers, and how fast it is."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import pandas as pd
from _page import ROOT, RUNS, table, write

from vesalius.runs import Run

MODELS = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}
SIZE = "--rows 8 --card-rows 12 --card-tasks="
QUICK = "--rows 2 --card-rows 4 --card-tasks= --no-time"
WAYS = {"LLM.int8()": "--method llm-int8", "OS+ W8A8": "--method os+ --no-time"}
ROWS = 10


def run(arguments: str) -> dict[str, Any]:
    """The result of a change that leaves its model in its run, found again if it is finished."""
    print(f"vesalius {arguments}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "vesalius", *arguments.split(), "--json", "--runs", str(RUNS)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"'vesalius {arguments}' ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cost(name: str, way: str, told: dict[str, Any], card: pd.DataFrame) -> list[list[Any]]:
    """Rows of the first table: this way, and the controls measured beside it."""
    rows = []
    for model, mine in card.groupby("model", sort=False):
        cell = mine.set_index("metric")
        first = not rows
        label = way if first else f"... {model}"
        ratio, kl = cell.loc["perplexity"], cell.loc["divergence"]
        tasks = [
            f"{m.removesuffix(' accuracy')} {r['change']:+.3f}" for m, r in cell.iterrows() if "accuracy" in str(m)
        ]
        rows.append(
            [name, label, f"{ratio['after']:.2f}", f"x {ratio['change']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]",
             f"{kl['after']:.4f}", ", ".join(tasks), f"{told['of_float16']:.3f}" if first else "",
             f"{told['in_whole_numbers']:.1%}" if first else ""]
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rehearsal with less text")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    asked = parser.parse_args()
    costs: list[list[Any]] = []
    speeds: list[list[Any]] = []
    outliers: list[str] = []
    claims: list[list[Any]] = []
    for spec in asked.models.split(","):
        name = MODELS[spec]
        for way, options in WAYS.items():
            told = run(f"quantize --model {spec} {options} {QUICK if asked.quick else SIZE}")
            found = Run.open(told["run"])
            card = found.table("card")
            costs += cost(name, way, told, card)
            if way != "LLM.int8()":
                continue
            if not asked.quick:
                for row in found.table("speed").to_dict("records"):
                    speeds.append([name, row["model"], f"{row['prefill']:.0f}", f"{row['decode']:.1f}"])
            cell = card[card["model"] == "llm-int8"].set_index("metric")
            change, kl = float(cell.loc["perplexity", "change"]), float(cell.loc["divergence", "after"])
            claims += [
                [
                    f"{name}: LLM.int8() changes perplexity by 0.5 % at most",
                    f"{change - 1:+.2%}",
                    verdict(change <= 1.005),
                ],
                [f"{name}: mean KL of LLM.int8() is 0.01 at most", f"{kl:.4f}", verdict(kl <= 0.01)],
            ]
            outliers += emergence(name, told, found)
    body = [
        "## What it cost\nPlain text of FOLDOC, 12 rows of 128 tokens, after the 8 rows that calibrate. 95 % intervals "
        "of the change over rows. Below each way the controls measured beside it: `naive` has one scale for a matrix and "
        "one for all the inputs of a pass, `threshold 0` is LLM.int8() with nothing kept apart, `plain` is the rounding "
        "of OS+ with nothing moved. Bytes: of the linear maps, against float16.\n\n"
        + table(["model", "way", "perplexity", "change", "KL, nats", "tasks", "bytes", "in whole numbers"], costs),
        "The weights of both come from 4-bit files: what is said of weights alone would look too good, inputs are as "
        "hard as in any model.",
        "## What was asked\n" + table(["asked", "came out", ""], claims),
        "## Outlier channels\n" + "\n".join(outliers),
    ]
    if speeds:
        body.append(
            "## Speed\nMilliseconds: 256 tokens read, one token written after them; medians of seven turns, one thread, "
            "on a shared machine with AVX-512 VNNI. The whole numbers are multiplied by `torch._int_mm`; finding "
            "outlier columns, rounding the inputs and bringing the sums back to floating point are plain torch.\n\n"
            + table(["model", "numbers", "reading 256", "writing one"], speeds)
        )
    write("change-quantization", "Change: quantization", "python studies/quantization.py", *body)


def verdict(holds: bool) -> str:
    """In words."""
    return "holds" if holds else "does not hold"


def emergence(name: str, told: dict[str, Any], found: Run) -> list[str]:
    """The lens of LLM.int8(): by state, and the features."""
    states, features = found.table("outliers"), found.table("features")
    worst = states.sort_values("channels", ascending=False).head(ROWS)
    rows = [
        [r["state"], r["channels"], r["later"], f"{r['largest']:.0f}", r["often"]] for r in worst.to_dict("records")
    ]
    both = [", ".join(map(str, told[k])) or "none" for k in ("emergent", "emergent_later")]
    text = (
        f"{name}: {len(features)} channels of {len(states)} states reach 6 somewhere. Emergent by the paper's criterion "
        f"(25 % of the states, 6 % of the positions): {both[0]}; without position 0: {both[1]}. The states with most:\n\n"
    )
    return [text + table(["state", "channels", "after position 0", "largest", "commonest after it"], rows)]


if __name__ == "__main__":
    main()
