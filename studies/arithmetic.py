"""Parts that do sums: found, knocked out, trained alone; in a small model and in SmolLM2; three seeds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _page import RUNS, look_inside, run, table, write
from _runs import is_quick, trained, verdict

from vesalius.train.recipe import read_recipe

REAL = {"sums": "", "differences": " --task-set operation=subtract"}
LINES = 6  # of a document: sums, or differences


@dataclass(frozen=True)
class Size:
    """How large the study is: changes of the small model's recipe, its seeds, options of `vesalius tune`."""

    changes: dict[str, Any]
    seeds: tuple[int, ...]
    documents: int
    small: str
    real: str | None


FULL = Size({}, (1234, 1235, 1236), 4000, "--n 192 --draws 10", "--n 192 --steps 200 --rows 8 --also ioi")
QUICK = Size({"steps": 150, "checkpoints.every": 150}, (1234,), 400, "--n 64 --draws 2", None)
SUMS: dict[str, Any] = {
    "preset": "tiny-llama",
    "model": {
        "preset": "tiny-llama",
        "architecture": {"layers": 4, "d_model": 128, "heads": 8, "kv_heads": 8, "d_ff": 256},
    },
    "optimizer": {"name": "adamw", "lr": 2e-3},
    "steps": 1500,
    "checkpoints": {"log": False, "every": 1500, "keep_state": "last"},
    "evaluate": {"every": 500, "batches": 4},
}  # fmt: skip


def sums(documents: int) -> Path:
    """A file of one-digit sums and differences, a document of either kind."""
    rng = np.random.default_rng(0)
    folder = RUNS / "arithmetic"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sums-{documents}.jsonl"
    found = []
    for _ in range(documents):
        plus, lines = bool(rng.integers(2)), list[str]()
        while len(lines) < LINES:
            a, b = (int(x) for x in rng.integers(1, 10, 2))
            c = a + b if plus else a - b
            if 0 <= c <= 9:
                lines.append(f"{a} {'+' if plus else '-'} {b} = {c}")
        found.append(json.dumps({"text": "\n".join(lines)}))
    path.write_text("\n".join(found) + "\n")
    return path


def small_model(size: Size, seed: int) -> dict[str, Any]:
    """A model trained on sums: what `tune` finds for + and for -, and where the found heads look."""
    changes = {
        **size.changes, "seed": seed, "name": "sums", "data.corpus": str(sums(size.documents)), "data.length": 48,
        "data.rows": 32, "data.tokenizer": {"kind": "bpe", "vocab_size": 300},
    }  # fmt: skip
    folder = trained(read_recipe(SUMS, changes), "arithmetic")
    asked = f"tune --model {folder}@last --task arithmetic --corpus none --share 0.05 --mlps 3 --no-train {size.small}"
    found = {name: run(f"{asked} --task-set operation={name}") for name in ("add", "subtract")}
    looks = run(f"heads --model {folder}@last --detectors arithmetic --task none --detector-set arithmetic.n=32")
    score = {r["part"]: r["score"] for r in looks["scores"]}
    return {**found, "looks": [score[h] for h in found["add"]["heads"]]}


def accuracies(found: dict[str, Any], without: str) -> list[float]:
    """Accuracy on held-out questions with some heads knocked out."""
    return [float(r["accuracy"]) for r in found["knocked_out"] if r["without"] == without]


def measured(row: dict[str, Any]) -> list[str]:
    """Accuracy on sums, loss on text, and the control task, for a table."""
    return [f"{row['accuracy']:.2f}", f"{row['text_loss']:.3f}", f"{row['ioi']:.2f}"]


def jaccard(a: list[str], b: list[str]) -> float:
    """Heads in common over heads in either."""
    return len(set(a) & set(b)) / len(set(a) | set(b))


def told(values: Any) -> str:
    """Numbers of seeds."""
    return ", ".join(f"{v:.2f}" for v in values)


def judged_small(found: list[dict[str, Any]]) -> list[list[Any]]:
    """The heads of a trained toy."""
    uniform = 3 / 16  # a, sign and b, of the tokens of two solved sums and the asked one
    whole = [accuracies(f["add"], "nothing")[0] for f in found]
    out = [accuracies(f["add"], "found")[0] for f in found]
    random = [float(np.mean(accuracies(f["add"], "random"))) for f in found]
    share = [jaccard(f["add"]["heads"], f["subtract"]["heads"]) for f in found]
    looks = [float(np.mean(f["looks"])) / uniform for f in found]
    return [
        ["small model answers ≥ 98 %", told(whole), verdict([v >= 0.98 for v in whole])],
        ["without the top 5 % of heads ≤ 40 %, without as many others ≥ 90 %",
         ", ".join(f"{a:.2f} against {b:.2f}" for a, b in zip(out, random, strict=True)),
         verdict([a <= 0.4 and b >= 0.9 for a, b in zip(out, random, strict=True)])],
        ["they attend to operands and sign ≥ 3 × as much as evenly", told(looks),
         verdict([v >= 3 for v in looks])],
        ["heads of + and of -: Jaccard ≥ 0.5", told(share), verdict([v >= 0.5 for v in share])],
    ]  # fmt: skip


def judged_real(what: str, found: list[dict[str, Any]]) -> list[list[Any]]:
    """Precise tuning of the real model, on sums or on differences."""
    by = [{r["tuned"]: r for r in f["tuned"]} for f in found]

    def gain(name: str) -> np.ndarray:
        return np.array([b[name]["accuracy"] - b["before"]["accuracy"] for b in by])

    def rise(name: str) -> np.ndarray:
        return np.array([b[name]["text_loss"] - b["before"]["text_loss"] for b in by])

    before = [b["before"]["accuracy"] for b in by]
    return [
        [f"SmolLM2, ≤ 5 % of heads and 3 MLPs trained: held-out {what} + ≥ 25 points",
         f"{told(gain('found'))} (from {told(before)})", verdict(gain("found") >= 0.25)],
        [f"{what}: loss on plain text + ≤ 0.02", ", ".join(f"{v:.3f}" for v in rise("found")),
         verdict(rise("found") <= 0.02)],
        [f"{what}, the whole model trained: plain text suffers more",
         ", ".join(f"{a:.3f} against {b:.3f}" for a, b in zip(rise("full"), rise("found"), strict=True)),
         verdict(rise("full") > rise("found"))],
        [f"{what}, as many random parts gain less than two thirds",
         ", ".join(f"{a:.2f} against {b:.2f}" for a, b in zip(gain("random"), gain("found"), strict=True)),
         verdict(gain("random") < gain("found") * 2 / 3)],
    ]  # fmt: skip


def main() -> None:
    """Runs everything and writes docs/results/look-inside-arithmetic.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    small = [small_model(size, seed) for seed in size.seeds]
    asked = f"tune --model smollm2-135m --task arithmetic --share 0.05 --mlps 3 {size.real}"
    real = {} if size.real is None else {k: [run(f"{asked}{v} --seed {s}") for s in range(3)] for k, v in REAL.items()}
    claims = judged_small(small) + [row for what, found in real.items() for row in judged_real(what, found)]
    rows, knocked, tuned = list[list[Any]](), list[list[Any]](), list[list[Any]]()
    for seed, found in zip(size.seeds, small, strict=True):
        for name in ("add", "subtract"):
            f = found[name]
            rows.append([seed, name, " ".join(f["heads"]), " ".join(f["mlps"]), f"{accuracies(f, 'nothing')[0]:.2f}",
                         f"{accuracies(f, 'found')[0]:.2f}", f"{np.mean(accuracies(f, 'random')):.2f}"])  # fmt: skip
    for what, found_real in real.items():
        for seed, f in enumerate(found_real):
            knocked += [[what, seed, r["without"], *measured(r)] for r in f["knocked_out"]]
            tuned += [[what, seed, r["tuned"], f"{r['trained']:,}", *measured(r)] for r in f["tuned"]]
    body = [
        table(["what was asked", "what came out", ""], claims),
        "## A small model trained on sums",
        "Four layers of eight heads, trained on one-digit sums and differences. Heads by path patching on + and on -; "
        "accuracy on operands held out from finding, as it is, without these heads, without as many others (mean).",
        table(["seed", "task", "heads", "MLPs", "whole", "without them", "without others"], rows),
    ]
    if real:
        body += [
            "## SmolLM2: heads knocked out",
            "Each head writes its mean over plain text. `ioi`: indirect objects, another ability.",
            table(["task", "seed", "without", "right", "loss on text", "ioi"], knocked),
            "## SmolLM2: parts trained alone",
            "200 steps of 8 prompts from the same weights; operands that no training prompt asks for. They may stand, "
            "solved, among the examples before the asked one. Of sums below ten the model knows most beforehand, so "
            "that little can be gained there; of differences it knows a third.",
            table(["task", "seed", "trained", "numbers", "right", "loss on text", "ioi"], tuned),
        ]
    if quick:
        print("\n".join(body))
        return
    name, command = "look-inside-arithmetic", "python studies/arithmetic.py"
    write(name, "Parts that do sums", command, *body, seeds="three seeds")
    look_inside("Arithmetic", claims, command, name)


if __name__ == "__main__":
    main()
