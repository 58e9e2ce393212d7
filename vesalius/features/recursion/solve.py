"""What a solver answers when it runs freely, over a grid of sizes and depths.

A *solver* is anything that gives an output for each input: a trained model that decodes greedily from its own output
(`ModelSolver`), or any function. Nothing here is teacher-forced: where a model foretells the next symbol of the right
answer, a mistake is forgotten at once; where it has to go on from its own, it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pandas as pd
import torch

from vesalius.corpus.recursion import END, PAD, Recursive, Symbols
from vesalius.errors import VesaliusError
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap

Progress = Callable[[int, int], None]
Solver = Callable[[Sequence[Symbols]], list[Symbols]]
ROWS = 256  # inputs decoded at once
MORE = 2  # symbols beyond the longest right answer, after which a model is stopped


@dataclass(frozen=True)
class Case:
    """One input and what came of it.

    Attributes:
        x: the input as the task writes it. right: the right output. out: the solver's.
        size: symbols of the input. depth: of the recursion.
    """

    x: Symbols
    right: Symbols
    out: Symbols
    size: int
    depth: int

    @property
    def failed(self) -> bool:
        return self.out != self.right


@dataclass(frozen=True)
class ModelSolver:
    """A trained model as a solver; greedy decoding by transformers' own `generate`."""

    model: Model
    task: Recursive

    def __post_init__(self) -> None:
        size = int(self.model.hf.config.vocab_size)
        if size < self.task.vocab_size or self.model.kind not in ("causal", "encoder-decoder"):
            raise VesaliusError(
                f"{self.model.name} ({self.model.kind}, {size} symbols) cannot answer {self.task.name}; train a "
                "decoder or an encoder-decoder on it (`vesalius train successor`)"
            )

    def __call__(self, inputs: Sequence[Symbols], taps: Mapping[Site, Sequence[Tap]] | None = None) -> list[Symbols]:
        found: list[Symbols] = []
        for begin in range(0, len(inputs), ROWS):
            found += self._batch(inputs[begin : begin + ROWS], taps)
        return found

    def _batch(self, inputs: Sequence[Symbols], taps: Mapping[Site, Sequence[Tap]] | None) -> list[Symbols]:
        ids = torch.tensor([self.task.prompt(x) for x in inputs], device=self.model.device)
        room = int(getattr(self.model.hf.config, "n_positions", 0) or 0)  # learnt positions end; others need not
        most = self.task.longest + MORE
        if room and self.model.kind == "causal":
            most = min(most, room + 1 - ids.shape[1])
        options = {"do_sample": False, "num_beams": 1, "eos_token_id": END, "pad_token_id": PAD, "use_cache": True}
        with ExitStack() as stack:
            stack.enter_context(self.model.alone())
            stack.enter_context(torch.no_grad())
            if taps:
                stack.enter_context(Hooks(self.model.hf, self.model.anatomy, taps))
            out = self.model.hf.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **options
            )
        out = out[:, 1:] if self.model.kind == "encoder-decoder" else out[:, ids.shape[1] :]
        return [_until_end(row) for row in out.tolist()]


def _until_end(row: Sequence[int]) -> Symbols:
    return tuple(row[: row.index(END)] if END in row else row)


def cases(
    solver: Solver,
    task: Recursive,
    sizes: Iterable[int],
    depths: Iterable[int],
    n: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Case]:
    """Answers to up to `n` inputs of every size and depth that exist, none of them trained on.

    Raises:
        VesaliusError: if there is no such input.
    """
    wide = [(s, d) for s in sizes for d in depths if s <= task.width]
    inputs = [(x, s, d) for s, d in wide for x in task.inputs(s, d, n, seed)]
    if not inputs:
        raise VesaliusError(f"{task.name} has no input of these sizes and depths that training did not have; ask wider")
    found = []
    for begin in range(0, len(inputs), ROWS):
        group = inputs[begin : begin + ROWS]
        for (x, size, depth), out in zip(group, solver([x for x, _, _ in group]), strict=True):
            found.append(Case(x, task.answer(x), tuple(out), size, depth))
        if progress is not None:
            progress(min(begin + ROWS, len(inputs)), len(inputs))
    return found


def kind_of(task: Recursive, size: int, depth: int) -> str:
    """`trained`, `longer`, `deeper` or `both`: where inputs stand to those of training."""
    longer, deeper = size > task.size, depth > task.depth
    return "both" if longer and deeper else "longer" if longer else "deeper" if deeper else "trained"


def grid(found: Sequence[Case], task: Recursive) -> pd.DataFrame:
    """Exact match by size and depth: size, depth, n, right (share), where (see `kind_of`)."""
    table = pd.DataFrame({"size": [c.size for c in found], "depth": [c.depth for c in found]})
    table["right"] = [not c.failed for c in found]
    out = table.groupby(["size", "depth"])["right"].agg(n="count", right="mean").reset_index()
    out["where"] = [kind_of(task, s, d) for s, d in zip(out["size"], out["depth"], strict=True)]
    return out


def by_kind(found: Sequence[Case], task: Recursive) -> pd.DataFrame:
    """Exact match where inputs are as in training, longer, deeper, or both, with Wilson intervals: where, n, right."""
    from scipy.stats import binomtest

    rows = []
    for where in ("trained", "deeper", "longer", "both"):
        mine = [not c.failed for c in found if kind_of(task, c.size, c.depth) == where]
        if mine:
            low, high = binomtest(sum(mine), len(mine)).proportion_ci(0.95, "wilson")
            rows.append({"where": where, "n": len(mine), "right": sum(mine) / len(mine), "low": low, "high": high})
    return pd.DataFrame(rows)
