"""Anchored answers: planted, and SmolLM2 on questions from lists (arXiv 2405.03205)."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from _page import look_inside, table, write
from _runs import is_quick, verdict

import vesalius
from vesalius.build.anchored import planted_anchor
from vesalius.corpus import plain_text
from vesalius.find.anchored import Examined, draw, examine, read
from vesalius.model import Model

NAME = "smollm2-135m"


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    dev: int
    test: int
    animals: int
    upper: int
    real: bool


FULL = Size((0, 1, 2), 60, 200, 40, 24, True)
QUICK = Size((0,), 16, 24, 0, 8, False)


def planted(size: Size) -> tuple[list[str], list[list[str]]]:
    """A model that knows the answer and says A."""
    good, rows = [], []
    for base in ("gpt2", "llama"):
        for seed in size.seeds:
            made = planted_anchor(base, seed=seed)  # type: ignore[arg-type]
            model = Model.wrap(made.hf, made.tokenizer)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "fine.jsonl"
                path.write_text("\n".join(json.dumps(r) for r in made.rows(48, seed)))
                asked = read(path)
            g = torch.Generator().manual_seed(seed)
            text = torch.randint(12, made.hf.config.vocab_size, (32, 12), generator=g)
            text[:, 0] = 3
            it = examine(model, asked[:24], asked[24:], text, neurons=1, upper=8, seed=seed)
            edited = it.row("value vectors")
            good.append(
                it.bias.variation == 0.75
                and it.diagnosis.scores.top(1, "value").parts == [made.mlp]
                and edited["accuracy"] == 1
                and edited["text"] <= 0.01
            )
            rows.append(
                [base, seed, it.bias.variation, edited["variation"], edited["accuracy"], f"{edited['text']:.4f}"]
            )
    claim = [
        "planted: the anchor is found, and lifting it gives every answer",
        f"{sum(good)} of {len(good)} models",
        verdict(good),
    ]
    head = ["base", "seed", "variation", "repaired", "accuracy", "plain-text loss"]
    return ["## Planted", table(head, rows)], [claim]


def real(size: Size) -> tuple[list[str], list[list[str]]]:
    """SmolLM2."""
    model = vesalius.open(NAME)
    text = plain_text(model)
    found: list[Examined] = []
    for seed in size.seeds:
        asked = draw(size.dev + size.test, seed=seed)
        found.append(examine(model, asked[: size.dev], asked[size.dev :], text, upper=size.upper, seed=seed))
    conditions = list(found[0].repairs["condition"])
    rows = []
    for condition in conditions:
        each = [it.row(condition) for it in found]
        rows.append(
            [
                condition,
                *(
                    " / ".join(f"{e[k]:.{d}f}" for e in each)
                    for k, d in (("variation", 2), ("accuracy", 3), ("text", 4))
                ),
            ]
        )
    bias = [it.bias for it in found]
    value = [it.row("value vectors") for it in found]
    plain = [it.row("as it is") for it in found]
    calibrated = [it.row("prior calibration") for it in found]
    random = [[it.row(c) for c in conditions if c.startswith("random neurons")] for it in found]
    moved = [max(abs(r["variation"] - p["variation"]) for r in rs) for rs, p in zip(random, plain, strict=True)]

    def each(values: list[float], digits: int = 2) -> str:
        return ", ".join(f"{v:.{digits}f}" for v in values)

    claims = [
        ["the bias: A chosen nearly always, accuracy near chance",
         "A " + each([b.chosen[0] for b in bias]) + "; accuracy "
         + each([b.accuracy for b in bias]) + "; variation " + each([b.variation for b in bias])
         + f"; chi-square p ≤ {max(b.p for b in bias):.0e}",
         verdict([b.chosen[0] >= 0.9 for b in bias])],
        ["terms add up to 1e-4", f"{max(it.diagnosis.residue for it in found):.1e} at most",
         verdict([it.diagnosis.residue <= 1e-4 for it in found])],
        ["the last three layers write ≥ 50 %", each([it.diagnosis.top_share for it in found]),
         verdict([it.diagnosis.top_share >= 0.5 for it in found])],
        ["label-free edit: variation ≤ 0.35 held out", each([v["variation"] for v in value]),
         verdict([v["variation"] <= 0.35 for v in value])],
        ["accuracy not lower",
         ", ".join(f"{p['accuracy']:.3f} → {v['accuracy']:.3f}" for p, v in zip(plain, value, strict=True)),
         verdict([v["accuracy"] >= p["accuracy"] for p, v in zip(plain, value, strict=True)])],
        ["accuracy ≥ 5 points up (the model knows " + each([b.knows for b in bias]) + " by words)",
         each([100 * (v["accuracy"] - p["accuracy"]) for p, v in zip(plain, value, strict=True)], 1) + " points",
         verdict([v["accuracy"] >= p["accuracy"] + 0.05 for p, v in zip(plain, value, strict=True)])],
        ["plain-text loss ≤ 0.01 up", each([v["text"] for v in value], 4),
         verdict([v["text"] <= 0.01 for v in value])],
        ["random edits as large change nothing (≤ 0.05)", each(moved), verdict([m <= 0.05 for m in moved])],
        ["matches prior calibration (variation, accuracy)",
         "; ".join(f"({v['variation']:.2f}, {v['accuracy']:.3f}) against ({c['variation']:.2f}, {c['accuracy']:.3f})"
                   for v, c in zip(value, calibrated, strict=True)),
         verdict([v["variation"] <= c["variation"] + 0.02 and v["accuracy"] >= c["accuracy"] - 0.02
                  for v, c in zip(value, calibrated, strict=True)])],
        ["the paper's label-aware edit (an upper bound): ≥ 70 % turn", each([it.upper for it in found]),
         verdict([it.upper >= 0.7 for it in found])],
    ]  # fmt: skip
    best = found[0].diagnosis.scores.top(6, "value")
    return [
        f"## {NAME}",
        f"{size.test} held-out questions of four options (“Which of these is a fruit?”, “What is the capital of "
        "Norway?”), "
        "the "
        f"right option at each place equally often; repairs are chosen on {size.dev} others without their labels. "
        "Three seeds.",
        table(["what was asked", "what came out", ""], claims),
        table(["condition", "variation", "accuracy", "plain-text loss"], rows),
        "Parts that write A most (seed 0): "
        + ", ".join(f"{p} {v:+.2f}" for p, v in zip(best.parts, best.values, strict=True))
        + f"; the difference is {found[0].diagnosis.difference:+.2f}. Neurons changed (seed 0): "
        + ", ".join(map(str, found[0].edit.neurons))
        + ". Heads with an even look: " + ", ".join(map(str, found[0].heads)) + ".",
    ], claims  # fmt: skip


def main() -> None:
    """Everything."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    text, claims = planted(size)
    if size.real:
        more, asked = real(size)
        text, claims = text + more, claims + asked
    if quick:
        print("\n\n".join(text))
        return
    write("look-inside-anchored", "Anchored answers", "python studies/anchored.py", *text, seeds="seeds 0, 1, 2")
    look_inside("Anchored answers", claims, "python studies/anchored.py", "look-inside-anchored")


if __name__ == "__main__":
    main()
