"""Made-up runs of realistic size and shape, for drawing: nothing in them was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vesalius.parts import Part
from vesalius.runs import Run
from vesalius.scores import Scores

ROLES = ["duplicate-token", "induction", "inhibition", "mover", "negative-mover", "previous-token"]
NAMES = ["Mary", "John", "Anna", "Paul", "Kate", "Mark"]


def made_scores(layers: int, heads: int, seed: int = 0, mlps: bool = True, n: int = 64) -> Scores:
    """Scores with a few large heads late in the model, a huge first MLP, and noise elsewhere."""
    rng = np.random.default_rng(seed)
    parts = [Part("head", layer, h) for layer in range(layers) for h in range(heads)]
    depth = np.array([p.layer or 0 for p in parts]) / layers
    values = rng.standard_t(1.5, len(parts)) * 0.03 * (0.3 + depth)
    strong = rng.choice(len(parts), 14, replace=False, p=(depth + 0.05) / (depth + 0.05).sum())
    values[strong] = rng.normal(0, 0.6, 14) + 0.35
    values = np.clip(values, -1.2, 1.9)
    if mlps:
        parts += [Part("mlp", layer) for layer in range(layers)]
        size = rng.normal(0.05, 0.25, layers)
        size[0] = 4.1
        values = np.concatenate([values, size])
    each = values[:, None] + rng.normal(0, 0.05 + 0.5 * np.abs(values)[:, None], (len(parts), n))
    info = {"task": "ioi", "model": "smollm2-135m", "method": "relp", "unit": "logit difference"}
    return Scores(parts, each.mean(1), each, info=info)


def made_circuit(scores: Scores, k_heads: int, k_mlps: int, n_edges: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    heads, mlps = scores.kind("head").top(k_heads), scores.kind("mlp")
    kept = [*zip(heads.parts, heads.values, strict=True)]
    if len(mlps):
        top = mlps.top(k_mlps)
        kept += [*zip(top.parts, top.values, strict=True)]
    parts = []
    for i, (part, value) in enumerate(kept):
        row = {"part": str(part), "score": float(value)}
        if i < 20 and ".H" in str(part):
            row["role"] = ROLES[i % len(ROLES)]
        parts.append(row)
    inner = [p for p, _ in kept if isinstance(p, Part)]
    nodes = sorted([Part("embed"), *inner, Part("unembed")], key=lambda p: p.order)
    edges: dict[tuple[str, str], float] = {}
    while len(edges) < n_edges:
        i, j = sorted(rng.choice(len(nodes), 2, replace=False))
        a, b = nodes[i], nodes[j]
        if a.layer == b.layer and a.kind == b.kind:
            continue
        side = f".{rng.choice(['q', 'k', 'v'])}" if b.kind == "head" else ""
        edges[(str(a), str(b) + side)] = float(rng.normal() * rng.exponential(0.3))
    return {"parts": parts, "edges": [{"sender": a, "receiver": b, "score": s} for (a, b), s in edges.items()]}


def made_curve(total: int, seed: int = 0, draws: int = 10) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    sizes = sorted({int(s) for s in np.geomspace(1, total, 14)})
    for ablation, ease in (("mean", 1.0), ("resample", 0.8)):
        for size in sizes:
            f = (
                1
                / (1 + np.exp(-(np.log(size) - np.log(total * 0.06) + ease - 1) * 1.7))
                * (1.08 if size < total else 1.0)
            )
            rows.append((ablation, size, size / total, f, f - 0.06, f + 0.05, "circuit", None))
            for draw in range(draws):
                g = (size / total) ** 2.2 + rng.normal(0, 0.05)
                rows.append((ablation, size, size / total, g, None, None, "random", draw))
    return pd.DataFrame(rows, columns=["ablation", "size", "fraction", "faithfulness", "low", "high", "kind", "draw"])


def made_examples(n: int = 8) -> list[dict[str, Any]]:
    rows = []
    for i in range(n):
        a, b, c = NAMES[i % 6], NAMES[(i + 1) % 6], NAMES[(i + 3) % 6]
        rows.append(
            {
                "clean": f"When {a} and {b} went to the store, {b} gave a drink to",
                "corrupted": f"When {a} and {b} went to the store, {c} gave a drink to",
                "answer": f" {a}",
                "wrong": [f" {b}"],
                "logit_diff": 5.2 - 0.9 * i,
            }
        )
    return rows


def made_patterns(parts: list[str], seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    tokens = [
        "When",
        "ĠMary",
        "Ġand",
        "ĠJohn",
        "Ġwent",
        "Ġto",
        "Ġthe",
        "Ġstore",
        ",",
        "ĠJohn",
        "Ġgave",
        "Ġa",
        "Ġdrink",
        "Ġto",
    ]
    found = []
    for i, part in enumerate(parts):
        logits = rng.normal(0, 1.6, (len(tokens), len(tokens)))
        logits[-1, 1] += 5
        logits[:, 0] += 2
        logits[np.triu_indices(len(tokens), 1)] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        found.append({"part": part, "tokens": tokens, "pattern": (weights / weights.sum(1, keepdims=True)).tolist()})
        if i % 2 == 0:
            found[-1]["role"] = ROLES[i % len(ROLES)]
    return found


def circuit_run(out: Path, layers: int = 30, heads: int = 9, edges: int = 0, **changes: Any) -> Run:
    """A finished circuit run with every table of the contract; `changes` replace keys of the summary."""
    scores = made_scores(layers, heads)
    k_heads, k_mlps = min(48, layers * heads // 3), min(12, layers // 2)
    circuit = made_circuit(scores, k_heads, k_mlps, edges)
    arguments = {
        "model": "smollm2-135m",
        "task": "ioi",
        "method": "relp",
        "level": "edge" if edges else "node",
        "n": 64,
    }
    request = {"command": "circuit", "arguments": {**arguments, "layers": layers}, "seeds": {"find": 0, "prove": 1}}
    request |= {"model_fingerprint": "sha256:5f1c0ab3", "task_fingerprint": "sha256:90fe11d2"}
    with Run.start(request, out, command_line="vesalius circuit --task ioi --method relp") as run:
        frame = scores.to_frame()
        frame["place_stability"] = scores.place_stability(k_heads)
        frame["verified"] = np.arange(len(frame)) % 3 == 0
        run.save_table("scores", frame)
        run.save_json("circuit", circuit)
        run.save_table("curve", made_curve(edges * 20 if edges else layers * (heads + 1)))
        run.save_json("examples", made_examples())
        run.save_json("patterns", made_patterns([p["part"] for p in circuit["parts"][:6]]))
        kinds = [("relp", "head", 0.953), ("relp", "mlp", 0.914), ("eap-ig", "head", 0.941), ("eap-ig", "mlp", 0.83)]
        kinds += [("attribution-patching", "head", 0.927), ("attribution-patching", "mlp", 0.712)]
        rows = [(m, k, p, p - 0.05, round(p, 1), 270 if k == "head" else 30) for m, k, p in kinds]
        columns = ["method", "kind", "pearson", "spearman", "top10_overlap", "n"]
        run.save_table("correlations", pd.DataFrame(rows, columns=columns))
        rng = np.random.default_rng(3)
        model = rng.uniform(-1, 5, 24)
        rows2 = [
            (f"random {i}" if i > 3 else ROLES[i], i % 7 + 1, m - abs(rng.normal(0, 0.4)), m)
            for i, m in enumerate(model)
        ]
        done = pd.DataFrame(rows2, columns=["subset", "removed", "circuit", "model"])
        run.save_table("completeness", done.assign(gap=(done["model"] - done["circuit"]).abs()))
        summary: dict[str, Any] = {
            "title": "Indirect objects in SmolLM2-135M-Instruct",
            "model": "smollm2-135m", "task": "ioi", "method": "relp", "level": arguments["level"],
            "n_find": 64, "n_prove": 100, "accuracy": 0.9833, "top1": 0.96,
            "logit_diff": {"mean": 5.1523, "low": 4.871, "high": 5.432},
            "corrupted_logit_diff": {"mean": 0.213, "low": -0.12, "high": 0.533},
            "faithfulness": {"mean": 0.8637, "low": 0.832, "high": 0.894}, "ablation": "mean",
            "size": {"heads": k_heads, "mlps": k_mlps} | ({"edges": edges} if edges else {}),
            "total": {"heads": layers * heads, "mlps": layers} | ({"edges": edges * 20} if edges else {}),
            "fraction_of_heads": k_heads / (layers * heads),
            "random": {"mean": 0.1043, "low": 0.02, "high": 0.19}, "random_draws": 10,
            "cpr": 0.92, "cmd": 0.08, "cpr_log": 0.61, "cmd_log": 0.41,
            "notes": ["Heads that share keys and values were scored one by one and kept tied."],
            "command": "vesalius circuit --task ioi --method relp",
        }  # fmt: skip
        run.save_json("summary", summary | changes)
    return Run.open(run.folder)


def reuse_run(out: Path, layers: int = 30, heads: int = 9) -> Run:
    """A finished reuse run of two tasks."""
    request = {
        "command": "reuse",
        "arguments": {"model": "smollm2-135m", "tasks": ["ioi", "colored-objects"]},
        "seeds": [0],
    }
    with Run.start(request, out, command_line="vesalius reuse --tasks ioi,colored-objects") as run:
        found = []
        for i, seed in enumerate((0, 0)):
            scores = made_scores(layers, heads, seed)
            noise = np.random.default_rng(i).normal(0, 0.08, len(scores))
            scores = Scores(scores.parts, scores.values + noise, info=scores.info)
            run.save_table(f"scores_{i}", scores.to_frame())
            found.append(made_circuit(scores, 30, 8, 0))
            run.save_json(f"circuit_{i}", found[-1])
        a, b = ({p["part"] for p in c["parts"]} for c in found)
        rows = []
        for kind, mark in (("all", ""), ("head", ".H"), ("mlp", "MLP")):
            mine, theirs = ({p for p in s if mark in p} for s in (a, b))
            chance = len(mine) * len(theirs) / {"all": 300, "head": 270, "mlp": 30}[kind]
            rows.append(
                (
                    "ioi",
                    "colored-objects",
                    kind,
                    len(mine & theirs),
                    len(mine),
                    len(theirs),
                    chance,
                    chance - 2,
                    chance + 3,
                )
            )
        columns = ["a", "b", "kind", "shared", "size_a", "size_b", "chance_shared", "chance_low", "chance_high"]
        run.save_table("overlap", pd.DataFrame(rows, columns=columns).assign(p=0.001))
        told = [("before", "accuracy", 0.30, 0.24, 0.36, None), ("after", "accuracy", 0.52, 0.45, 0.59, None)]
        told += [("random", "accuracy", 0.30 + 0.01 * d, None, None, d) for d in range(-3, 4)]
        told += [
            ("before", "logit difference", -0.4, -0.6, -0.2, None),
            ("after", "logit difference", 0.9, 0.6, 1.2, None),
        ]
        told += [("random", "logit difference", -0.4 + 0.05 * d, None, None, d) for d in range(-3, 4)]
        columns = ["condition", "metric", "value", "low", "high", "draw"]
        run.save_table("transplant", pd.DataFrame(told, columns=columns))
        item = {"model": "smollm2-135m", "size": {"heads": 30, "mlps": 8}, "total": {"heads": 270, "mlps": 30}}
        items = [
            item
            | {"name": "ioi", "task": "ioi", "accuracy": 0.98, "faithfulness": {"mean": 0.86, "low": 0.8, "high": 0.9}},
            item | {"name": "colored-objects", "task": "colored-objects", "accuracy": 0.30, "faithfulness": 0.71},
        ]
        told2 = {"source": "ioi", "target": "colored-objects", "heads": ["L17.H4", "L19.H2", "L20.H0", "L24.H4"]}
        run.save_json("summary", {"method": "relp", "items": items, "transplant": told2, "notes": []})
    return Run.open(run.folder)


def compare_run(out: Path) -> Run:
    """A finished comparison of four methods on one task."""
    names = ["activation-patching", "relp", "eap-ig", "attribution-patching"]
    with Run.start(
        {"command": "compare", "arguments": {"runs": names}}, out, command_line="vesalius compare a b c d"
    ) as run:
        rng = np.random.default_rng(0)
        base = made_scores(30, 9)
        tables = []
        for i, _ in enumerate(names):
            values = base.values + rng.normal(0, 0.04 * i, len(base))
            tables.append(Scores(base.parts, values, info=base.info))
        rows, tops = [], []
        for a, x in zip(names, tables, strict=True):
            for b, y in zip(names, tables, strict=True):
                for kind in ("head", "mlp"):
                    u, v = x.kind(kind), y.kind(kind)
                    rows.append(
                        (a, b, kind, u.correlation(v), u.correlation(v, "spearman"), u.overlap(v, 10), 10, len(u))
                    )
            top = x.top(15)
            tops += [(a, r + 1, str(p), s) for r, (p, s) in enumerate(zip(top.parts, top.values, strict=True))]
        columns = ["a", "b", "kind", "pearson", "spearman", "overlap", "k", "n"]
        run.save_table("matrix", pd.DataFrame(rows, columns=columns))
        run.save_table("top", pd.DataFrame(tops, columns=["name", "rank", "part", "score"]))
        items = [
            {"name": n, "model": "smollm2-135m", "task": "ioi", "method": n, "accuracy": 0.98,
             "faithfulness": 0.86 - 0.02 * i,
             "size": {"heads": 48, "mlps": 12}, "run": f"circuit-smollm2-135m-ioi-{n}-0123456789"}
            for i, n in enumerate(names)
        ]  # fmt: skip
        run.save_json("summary", {"runs": items, "notes": []})
    return Run.open(run.folder)


def training_run(out: Path, steps: int = 900, done: bool = True) -> Run:
    """A training run's tables, finished or stopped half way."""
    rng = np.random.default_rng(0)
    at = np.arange(steps if done else steps // 2)
    loss = 2 + 3 * np.exp(-at / 200) + rng.normal(0, 0.05, len(at))
    recipe = {"name": "small", "steps": steps, "model": {"preset": "tiny-pythia"}, "data": {"corpus": "bible-kjv"}}
    recipe |= {"objective": {"name": "causal-lm"}, "optimizer": {"name": "adamw"}}
    run = Run.start({"command": "train", "model": "small", "recipe": recipe}, out)
    log = {"step": at, "loss": loss, "lr": 1e-3 * np.minimum(1, at / 50), "grad_norm": rng.uniform(0.5, 2, len(at))}
    run.save_table("log", pd.DataFrame(log | {"tokens": 2048, "targets": 2048.0, "seconds": 0.1}))
    tests = at[::100]
    held_out = pd.DataFrame({"step": tests, "loss": loss[::100] + 0.1, "bits_per_byte": 1.5, "targets": 4096.0})
    run.save_table("evaluation", held_out)
    if not done:
        return run
    ledger = {"tokens": 2048 * steps, "flops": 10**12, "seconds": 90.0, "tokens_per_second": 20480.0}
    run.save_json(
        "summary",
        {"name": "small", "parameters": 10**6, "trained": 10**6, "flops_6nt": 9 * 10**11, "optimizer_bytes": 8 * 10**6,
         "ledger": ledger | {"peak_memory_bytes": 7 * 10**8}, "notes": ["a note"]},
    )  # fmt: skip
    run.finish()
    return Run.open(run.folder)


def dynamics_run(out: Path) -> Run:
    """A finding over seven checkpoints: one head of eight forms late."""
    steps = [0, 1, 4, 16, 64, 256, 1000]
    run = Run.start({"command": "dynamics", "model": "small", "task": "induction"}, out)
    parts = [f"L{n}.H{h}" for n in range(2) for h in range(4)]
    heads, scores = [], []
    for i, step in enumerate(steps):
        for j, part in enumerate(parts):
            high = 0.9 * (i / 6) ** 3 if part == "L1.H2" else 0.02
            heads.append({"part": part, "layer": j // 4, "index": j % 4, "step": step, "induction": high})
            heads[-1] |= {"previous-token": 0.05 * j, "duplicate-token": 0.01}
            scores.append(
                {"part": part, "score": 4 * high, "low": 4 * high - 0.1, "high": 4 * high + 0.1, "step": step}
            )
    numbers = {"step": steps, "held_out": np.linspace(5, 2, 7), "in_context": np.linspace(0, -0.4, 7)}
    numbers |= {"repeat_first": np.full(7, 5.0), "repeat_second": np.linspace(5, 1, 7)}
    numbers |= {"accuracy": np.linspace(0.5, 1, 7), "chance": np.full(7, 0.5), "metric": np.linspace(0, 6, 7)}
    run.save_table("numbers", pd.DataFrame(numbers))
    run.save_table("heads", pd.DataFrame(heads))
    run.save_table("scores_by_step", pd.DataFrame(scores))
    story = {
        "run": "small",
        "task": "induction",
        "method": "activation-patching",
        "unit": "logit",
        "lead": "L1.H2 forms",
    }
    run.save_json("summary", story | {"notes": []})
    run.finish()
    return Run.open(run.folder)


def race_run(out: Path) -> Run:
    """Two optimizers, two rates, two seeds."""
    request = {"command": "race", "model": "small", "arms": {"adamw": {}, "adan": {}}, "seconds": 30.0}
    run = Run.start(request, out)
    laps = [
        {"arm": arm, "lr": lr, "seed": seed, "steps": 100, "seconds": 30.0, "train_loss": 2.0, "held_out": 2.1 + i / 10,
         "bits_per_byte": 1.5, "optimizer_bytes": 8 * 10**6, "error": ""}
        for i, arm in enumerate(("adamw", "adan")) for lr in (0.001, 0.003) for seed in (0, 1)
    ]  # fmt: skip
    run.save_table("laps_table", pd.DataFrame(laps))
    curve = pd.DataFrame({"step": np.arange(10, 110, 10), "loss": np.linspace(5, 2, 10)})
    run.save_table("curves", pd.concat([curve.assign(lap=f"{r['arm']} {r['lr']}", arm=r["arm"]) for r in laps[::2]]))
    rows = [(a, 0.003, 2, 2.1 + 0.1 * i, 2.0, 2.3, "2.3, 2.1", False) for i, a in enumerate(("adamw", "adan"))]
    names = ["arm", "lr", "seeds", "loss", "low", "high", "grid", "edge"]
    run.save_table("standings", pd.DataFrame(rows, columns=names))
    run.save_json("summary", {"winner": "adamw", "seconds": 30.0, "notes": []})
    run.finish()
    return Run.open(run.folder)
