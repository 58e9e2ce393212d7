"""Whole numbers in two small models: what 8 and 6 bits cost, which channels are outliers, and how fast it is."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import pandas as pd
from _page import ROOT, RUNS, changed, table, write

import vesalius
from vesalius.change.llm_int8 import outlier_tables
from vesalius.corpus import plain_text
from vesalius.runs import Run

MODELS = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}
SIZE = "--rows 8 --card-rows 12 --card-tasks="
QUICK = "--rows 2 --card-rows 4 --card-tasks= --no-time"
WAYS = {"llm-int8": ("LLM.int8()", ""), "os+": ("OS+ W8A8", "--no-time ")}
ROWS = 10
WHAT = """## What it cost
Plain text of FOLDOC, 12 rows of 128 tokens, after the 8 rows that calibrate. 95 % intervals of the change over rows.
Below each way the controls measured beside it: `naive` has one scale for a matrix and one for all the inputs of a pass,
`threshold 0` is LLM.int8() with nothing kept apart, `plain` is the rounding of OS+ with nothing moved. Bytes: of the
linear maps, against float16.

"""
SPEED = """## Speed
Milliseconds: 256 tokens read, one token written after them; medians of seven turns, on one core of a busy machine,
with AVX-512 VNNI. The whole numbers are multiplied by `torch._int_mm`; finding outlier columns, rounding the inputs and
bringing the sums back to floating point are plain torch.

"""


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
        ratio, kl = cell.loc["perplexity"], cell.loc["divergence"]
        change = f"x {ratio['change']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"
        rows.append([name, f"... {model}", f"{ratio['after']:.2f}", change, f"{kl['after']:.4f}", "", ""])
    rows[0][1] = way
    rows[0][-2:] = [f"{told['of_float16']:.3f}", f"{told['in_whole_numbers']:.1%}"]
    return rows


def llm_int8(name: str, spec: str, found: Run, quick: bool) -> tuple[list[Any], list[Any], str]:
    """Claims, speeds, and the lens."""
    card = found.table("card")
    cell = card[card["model"] == "llm-int8"].set_index("metric")
    change, kl = float(cell.loc["perplexity", "change"]), float(cell.loc["divergence", "after"])
    claims = [
        [f"{name}: LLM.int8() changes perplexity by 0.5 % at most", f"{change - 1:+.2%}", verdict(change <= 1.005)],
        [f"{name}: mean KL of LLM.int8() is 0.01 at most", f"{kl:.4f}", verdict(kl <= 0.01)],
    ]
    rows = [] if quick else found.table("speed").to_dict("records")
    speeds = [[name, row["model"], f"{row['prefill']:.0f}", f"{row['decode']:.1f}"] for row in rows]
    return claims, speeds, emergence(name, spec, quick)


def main() -> None:
    """Runs what is not there yet, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a rehearsal with less text")
    every = ",".join(f"{model}:{method}" for model in MODELS for method in WAYS)
    parser.add_argument("--only", default=every, help="some of MODEL:METHOD, with commas between")
    asked = parser.parse_args()
    costs: list[list[Any]] = []
    speeds: list[list[Any]] = []
    lens: list[str] = []
    claims: list[list[Any]] = []
    for pair in asked.only.split(","):
        spec, method = pair.split(":")
        name, (way, options) = MODELS[spec], WAYS[method]
        told = run(f"quantize --model {spec} --method {method} {options}{QUICK if asked.quick else SIZE}")
        found = Run.open(told["run"])
        costs += cost(name, way, told, found.table("card"))
        if method == "llm-int8":
            more, times, text = llm_int8(name, spec, found, asked.quick)
            claims, speeds, lens = claims + more, speeds + times, [*lens, text]
    body = [
        WHAT + table(["model", "way", "perplexity", "change", "KL, nats", "bytes", "in whole numbers"], costs),
        "The weights of both models come from 4-bit files: what is said of weights alone would look too good; inputs "
        "are as hard as in any model.",
        "## What was asked\n" + table(["asked", "came out", ""], claims),
        "## Outlier channels\n" + "\n".join(lens),
    ]
    left = [p for p in every.split(",") if p not in asked.only.split(",")]
    if left:
        body.insert(1, f"Not measured this time: {', '.join(left)}.")
    if speeds:
        body.append(SPEED + table(["model", "numbers", "reading 256", "writing one"], speeds))
    write("change-quantization", "Change: quantization", "python studies/quantization.py", *body)
    if not left:
        changed("LLM.int8()", claims, "python studies/quantization.py", "change-quantization")


def verdict(holds: bool) -> str:
    """In words."""
    return "holds" if holds else "does not hold"


def emergence(name: str, spec: str, quick: bool) -> str:
    """The lens of LLM.int8() on 16 rows: by state, and the features."""
    model = vesalius.open(spec)
    states, features = outlier_tables(model, plain_text(model, "foldoc", 2 if quick else 16, 128))
    worst = states.sort_values("channels", ascending=False).head(ROWS).to_dict("records")
    rows = [[r["state"], r["channels"], r["later"], f"{r['largest']:.0f}", r["often"]] for r in worst]
    both = [", ".join(map(str, features["channel"][features[k]])) or "none" for k in ("emergent", "later_emergent")]
    text = (
        f"{name}: {len(features)} channels of {len(states)} states reach 6 somewhere. Emergent by the paper's "
        f"criterion (25 % of the blocks, 6 % of the positions): {both[0]}; without position 0: {both[1]}. The states "
        "with most:\n\n"
    )
    return text + table(["state", "channels", "after position 0", "largest", "commonest after it"], rows)


if __name__ == "__main__":
    main()
