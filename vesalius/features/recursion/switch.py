"""How a trained model does it: the head that marks where the recursion ends, and whether it decides the switch.

While the answer is written, the model changes once between rewriting (X1 becomes X0) and copying. A head *marks* the
end of the recursion if, at steps other than that one, it attends from there to the input symbol where the recursion
ends (the first that is not X1, counted from the least significant). Its score is that attention, less the mean over the
other input symbols.

Marking may be idle. So the head is forced: from the answer's beginning on, all of its attention is put on another
symbol p of the input, and the answer decoded freely. If the head decides, the switch moves to p: the answer is the
definition's for an input whose recursion ends at p. The share of such answers is compared with that of every other
head.

What the stream says at a step, rewrite or copy, is read by a linear probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vesalius.corpus.recursion import BinarySuccessor, Symbols
from vesalius.errors import VesaliusError
from vesalius.features.probes import probe
from vesalius.features.recursion.program import misjudged
from vesalius.features.recursion.solve import ModelSolver, Progress
from vesalius.model import Site
from vesalius.model.hooks import Tap
from vesalius.parts import Part

LEAST = 16  # inputs
FEWEST_STATES = 40  # steps of each mode, for the probe


def marker_place(task: BinarySuccessor, x: Symbols) -> int:
    """Where, in the input as it is written, the recursion ends."""
    depth = task.depth_of(x)
    return depth if task.order == "least" else len(x) - 1 - depth


def readers(solver: ModelSolver) -> list[Part]:
    """Heads that can look at the input while the answer is written."""
    return solver.model.parts(("xhead",) if solver.model.kind == "encoder-decoder" else ("head",))


def _site(head: Part) -> Site:
    name = "cross_pattern" if head.kind == "xhead" else "pattern"
    return Site(name, head.layer or 0, head.stack)


def inputs_for(task: BinarySuccessor, n: int, seed: int = 0) -> list[Symbols]:
    """Inputs as in training (held-out or not) with room to move the switch: of the largest size."""
    rng = np.random.default_rng([seed, *b"mechanism"])
    found: dict[Symbols, None] = {}
    for _ in range(50 * n):
        found[task._number(task.size, int(rng.integers(0, task.depth + 1)), rng)] = None
        if len(found) == n:
            return list(found)
    raise VesaliusError(f"{task.name} of size {task.size} has {len(found)} inputs; {n} are needed")


def markers(solver: ModelSolver, inputs: Sequence[Symbols]) -> pd.DataFrame:
    """Every head's attention from the answer to where the recursion ends: part, marker, attention, others."""
    task, model = solver.task, solver.model
    assert isinstance(task, BinarySuccessor)
    if len(inputs) < LEAST:
        raise VesaliusError(f"{len(inputs)} inputs tell little of a head; give {LEAST} or more")
    outs = solver(inputs)
    prompts = torch.tensor([task.prompt(x) for x in inputs])
    width = max(1, *map(len, outs))
    told = torch.zeros(len(inputs), width, dtype=torch.long)
    for i, out in enumerate(outs):
        told[i, : len(out)] = torch.tensor(out, dtype=torch.long)
    heads = readers(solver)
    sites = list(dict.fromkeys(_site(h) for h in heads))
    start = prompts.shape[1] - 1
    if model.kind == "encoder-decoder":
        begin = torch.full((len(inputs), 1), int(model.hf.config.decoder_start_token_id or 0))
        seen = model.run(prompts, capture=sites, decoder=torch.cat([begin, told[:, :-1]], 1)).sites
        start = 0
    else:
        seen = model.run(torch.cat([prompts, told[:, :-1]], 1), capture=sites).sites
    rows = []
    for head in heads:
        pattern = seen[_site(head)][:, head.index].float().cpu().numpy()  # (row, query, key)
        on, off = [], []
        for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
            place = marker_place(task, x)
            for step in range(len(out)):
                if step == place:
                    continue
                weights = pattern[i, start + step, 1 : 1 + len(x)]  # the input follows <begin>
                on.append(weights[place])
                off.append(np.delete(weights, [place, step] if step < len(x) else [place]).mean())
        mean = float(np.mean(on))
        rows.append({"part": str(head), "marker": mean - float(np.mean(off)), "attention": mean})
    return pd.DataFrame(rows).sort_values("marker", ascending=False, kind="stable", ignore_index=True)


def forcing(solver: ModelSolver, head: Part, places: Sequence[int]) -> dict[Site, list[Tap]]:
    """Puts all attention of a head, while it answers, on one input symbol a row."""
    start = 0 if head.kind == "xhead" else solver.task.width + 1  # where <gives> stands

    def tap(pattern: Tensor) -> Tensor:
        rows, _, queries, keys = pattern.shape
        pattern = pattern.clone()
        first = (0 if head.kind == "xhead" else keys - queries) + torch.arange(queries, device=pattern.device)
        forced = torch.zeros(rows, keys, device=pattern.device, dtype=pattern.dtype)
        forced[torch.arange(rows), 1 + torch.tensor(list(places), device=pattern.device)] = 1
        answering = (first >= start)[None, :, None]
        pattern[:, head.index] = torch.where(answering, forced[:, None], pattern[:, head.index])
        return pattern

    return {_site(head): [tap]}


def moved(solver: ModelSolver, head: Part, inputs: Sequence[Symbols], seed: int = 0) -> pd.DataFrame:
    """What the model answers when a head is made to look elsewhere: a row an input.

    Returns:
        depth, forced (the depth whose end the head is shown), switched (the answer is the definition's for it),
        unchanged (it is what it was), switch (the depth whose answer it is, -1 for none).
    """
    task = solver.task
    assert isinstance(task, BinarySuccessor)
    rng = np.random.default_rng([seed, *b"force"])
    aims = []
    for x in inputs:
        others = [d for d in range(min(task.depth, len(x) - 2) + 1) if d != task.depth_of(x)]
        aims.append(int(rng.choice(others)))
    places = [d if task.order == "least" else len(x) - 1 - d for x, d in zip(inputs, aims, strict=True)]
    before = solver(inputs)
    after = solver(inputs, forcing(solver, head, places))
    rows = []
    for x, aim, plain, out in zip(inputs, aims, before, after, strict=True):
        known = {misjudged(x, task, d): d for d in range(len(x))}
        rows.append(
            {"depth": task.depth_of(x), "forced": aim, "switched": out == misjudged(x, task, aim),
             "unchanged": out == plain, "switch": known.get(out, -1)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def mechanism(
    solver: ModelSolver, n: int = 64, seed: int = 0, progress: Progress | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every head: how it marks the recursion's end, and how often the switch follows it.

    The head that decides is chosen on half of the inputs; its share, and that of the others, are of the other half.

    Returns:
        A row a head (part, marker, attention, chosen_on: share on the first half, moved, low, high: on the second,
        unchanged), and a summary.
    """
    from scipy.stats import binomtest

    task = solver.task
    assert isinstance(task, BinarySuccessor)
    inputs = inputs_for(task, n, seed)
    table = markers(solver, inputs)
    heads = readers(solver)
    share: dict[str, list[Any]] = {}
    for i, head in enumerate(heads):
        first, second = (moved(solver, head, half, seed) for half in (inputs[: n // 2], inputs[n // 2 :]))
        hits = int(second["switched"].sum())
        interval = binomtest(hits, len(second)).proportion_ci(0.95, "wilson")
        share[str(head)] = [
            float(first["switched"].mean()), hits / len(second), float(interval.low), float(interval.high),
            float(second["unchanged"].mean()),
        ]  # fmt: skip
        if progress is not None:
            progress(i + 1, len(heads))
    for j, name in enumerate(("chosen_on", "moved", "low", "high", "unchanged")):
        table[name] = [share[p][j] for p in table["part"]]
    best = table.iloc[int(table["chosen_on"].to_numpy().argmax())]
    rest = table[table["part"] != best["part"]]
    told = {
        "decides": str(best["part"]),
        "moved": float(best["moved"]),
        "others": float(rest["moved"].mean()) if len(rest) else float("nan"),
        "marks": str(table.iloc[0]["part"]),
        "marker": float(table.iloc[0]["marker"]),
        "n": n,
    }
    return table, told


def modes(solver: ModelSolver, n: int = 64, seed: int = 0) -> pd.DataFrame:
    """A probe at every layer for whether the step is one of rewriting or of copying; inputs are held out whole.

    Only steps that are sometimes one and sometimes the other are asked, as many of each.

    Raises:
        VesaliusError: for an encoder-decoder, or if there are too few steps.
    """
    task, model = solver.task, solver.model
    assert isinstance(task, BinarySuccessor)
    if model.kind != "causal" or model.tokenizer is None:
        raise VesaliusError("rewriting and copying are probed in decoders with their tokenizer")
    inputs = inputs_for(task, n, seed)
    texts, labels, groups = [], [], []
    for i, (x, out) in enumerate(zip(inputs, solver(inputs), strict=True)):
        place = marker_place(task, x)
        for step in range(min(task.depth + 1, len(out))):
            s = step if task.order == "least" else len(x) - 1 - step
            if s == place or s >= len(out):
                continue
            texts.append(str(model.tokenizer.decode([*task.prompt(x), *out[:s]])))
            labels.append("rewrite" if (s < place) == (task.order == "least") else "copy")
            groups.append(i)
    if min(labels.count("rewrite"), labels.count("copy")) < FEWEST_STATES:
        raise VesaliusError(f"too few steps of both modes to probe: {len(labels)}; ask for more inputs")
    found = probe(model, texts, labels, groups=groups, pool="last", balance=True, seed=seed)
    return found.table
