"""The shortcut a solver learnt, as a short program with fitted limits, judged by the failures it foretells.

A program gives an output for every input, right or wrong. Those tried for binary successors are the definition with one
thing changed; each has its parameters fitted to half of the cases:

    misjudged     the definition, with the depth read wrongly: a table from true to perceived depth
    limited       at most c steps of rewriting; then the rest is copied, or the answer ends
    stepwise      the definition symbol by symbol, with exceptions at single steps: (state, step, symbol) -> symbol; the
                  state, before, at or after the place where the recursion ends, is the input's (`global`) or what the
                  solver's own last step implies (`local`, for least significant first)

and for trees: nodes below some depth are left out, or the answer ends after so many labels. With them go a limit on the
answer's length. The program that foretells most exact outputs of a quarter, fitted on another, is kept.

It is scored on the other half: which inputs fail (recall, precision) and with which very output (exact), beside two
programs that know only what was trained: one that rewrites no deeper, one that answers no longer.

The measure is that of Zhang et al. 2023 (arXiv 2305.14699), who foretold 91 % of the failures on one function.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from vesalius.corpus.recursion import (
    CLOSE,
    END,
    FILL,
    LABEL,
    NONE,
    ONE,
    OPEN,
    X0,
    X1,
    BinarySuccessor,
    Recursive,
    Symbols,
    TreeTraversal,
)
from vesalius.errors import VesaliusError
from vesalius.features.recursion.solve import Case

LEAST = 20  # failures, below which halves of them say nothing
SUPPORT = 2  # cases that an exception needs
NAMES = {X0: "X0", X1: "X1", ONE: "01", FILL: "~", END: "<end>"}
Key = tuple[str, int, int]  # state, step, symbol


@dataclass(frozen=True)
class Program:
    """A solver that can be read.

    Attributes:
        name: which kind. lines: what it says, for people.
        run: the output for an input. size: how many numbers were fitted.
    """

    name: str
    lines: tuple[str, ...]
    run: Callable[[Symbols], Symbols] = field(repr=False)
    size: int = 0

    def __call__(self, inputs: Sequence[Symbols]) -> list[Symbols]:
        return [self.run(x) for x in inputs]


@dataclass(frozen=True)
class Reconstruction:
    """The program kept, and what it is worth.

    Attributes:
        program: the program. cutoff: the deepest recursion up to which it is right (None if it never fails).
        score: failures of the other half: a row a program (the kept one first, then baselines): cases, failures,
            foretold, recall, precision, exact. candidates: exact match of every kind tried, on the quarter left out.
    """

    program: Program
    cutoff: int | None
    score: pd.DataFrame
    candidates: pd.DataFrame
    info: dict[str, Any]


def reconstruct(found: Sequence[Case], task: Recursive, seed: int = 0) -> Reconstruction:
    """Fits the program to half of the cases and scores it on the other half.

    Raises:
        VesaliusError: if there are too few failures to fit to.
    """
    failures = sum(c.failed for c in found)
    if failures < LEAST:
        raise VesaliusError(
            f"{failures} of {len(found)} answers are wrong; a shortcut is reconstructed from {LEAST} failures or more: "
            "ask for longer and deeper inputs"
        )
    rng = np.random.default_rng([seed, *b"halves"])
    order = rng.permutation(len(found))
    fit = [found[i] for i in order[: len(found) // 2]]
    rest = [found[i] for i in order[len(found) // 2 :]]
    a, b = fit[: len(fit) // 2], fit[len(fit) // 2 :]
    rows = []
    for name, make in _kinds(task).items():
        for bound in (False, True):
            tried = []
            for one, other in ((a, b), (b, a)):
                program = _bounded(make(one, task), one, task) if bound else make(one, task)
                tried.append(_exact(program, other))
            whole = _bounded(make(fit, task), fit, task) if bound else make(fit, task)
            row = {"program": whole.name, "kind": name, "bounded": bound, "exact": float(np.mean(tried))}
            rows.append(row | {"fitted": whole.size})
    table = pd.DataFrame(rows).sort_values(["exact", "fitted"], ascending=[False, True], kind="stable")
    best = table.iloc[0]
    near = table[table["exact"] >= best["exact"] - 0.01].sort_values("fitted", kind="stable").iloc[0]  # the shorter one
    made = _kinds(task)[str(near["kind"])](fit, task)
    program = _bounded(made, fit, task) if near["bounded"] else made
    scores = [score(program, rest), *(score(p, rest) for p in baselines(task))]
    info = {
        "cases": len(found), "failures": failures, "fitted_on": len(fit), "scored_on": len(rest), "seed": seed,
        "lines": list(program.lines),
    }  # fmt: skip
    return Reconstruction(program, cutoff(program, task), pd.DataFrame(scores), table.reset_index(drop=True), info)


def _exact(program: Program, found: Sequence[Case]) -> float:
    """Share of outputs foretold exactly, failures and right answers weighing the same."""
    shares = []
    for failed in (True, False):
        mine = [c for c in found if c.failed == failed]
        if mine:
            shares.append(np.mean([program.run(c.x) == c.out for c in mine]))
    return float(np.mean(shares))


def score(program: Program, found: Sequence[Case]) -> dict[str, Any]:
    """How well a program foretells failures, and their outputs."""
    said = [program.run(c.x) for c in found]
    foretold = np.array([s != c.right for s, c in zip(said, found, strict=True)])
    failed = np.array([c.failed for c in found])
    both = int((foretold & failed).sum())
    exact = sum(s == c.out for s, c in zip(said, found, strict=True) if c.failed)
    return {
        "program": program.name,
        "cases": len(found),
        "failures": int(failed.sum()),
        "foretold": int(foretold.sum()),
        "recall": both / failed.sum() if failed.any() else float("nan"),
        "precision": both / foretold.sum() if foretold.any() else float("nan"),
        "exact": exact / failed.sum() if failed.any() else float("nan"),
    }


def cutoff(solver: Callable[[Sequence[Symbols]], list[Symbols]], task: Recursive, n: int = 12) -> int | None:
    """The deepest recursion up to which at least half of the inputs of trained size come out right; None: all do.

    Sizes are those of training, so that length is not mistaken for depth.
    """
    last = -1
    for depth in range(_deepest(task) + 1):
        inputs = [x for size in range(1, task.size + 1) for x in _any(task, size, depth, n)]
        if not inputs:
            continue
        right = np.mean([out == task.answer(x) for x, out in zip(inputs, solver(inputs), strict=True)])
        if right < 0.5:
            return last
        last = depth
    return None


def _deepest(task: Recursive) -> int:
    return task.size - 1 if isinstance(task, BinarySuccessor) else (task.size - 1) // 4


def _any(task: Recursive, size: int, depth: int, n: int) -> list[Symbols]:
    """Inputs of a size and depth, whether trained on or not."""
    if isinstance(task, BinarySuccessor):
        rng = np.random.default_rng([size, depth])
        return [task._number(size, depth, rng) for _ in range(n)] if depth < size else []
    return task.inputs(size, depth, n)


def baselines(task: Recursive) -> list[Program]:
    """What fails by what was trained alone: deeper inputs, longer inputs."""

    def shallow(x: Symbols) -> Symbols:
        if isinstance(task, BinarySuccessor):
            return _limited(x, task, task.depth, "copy")
        return _pruned(x, task, task.depth) if isinstance(task, TreeTraversal) else task.answer(x)

    def short(x: Symbols) -> Symbols:
        return task.answer(x)[: task.size] if len(x) > task.size else task.answer(x)

    return [
        Program(f"fails if deeper than {task.depth}", (), shallow),
        Program(f"fails if longer than {task.size}", (), short),
    ]


# -- kinds of programs


def _kinds(task: Recursive) -> dict[str, Callable[[Sequence[Case], Any], Program]]:
    if isinstance(task, TreeTraversal):
        return {"pruned": _fit_pruned, "definition": _definition}
    kinds: dict[str, Callable[[Sequence[Case], Any], Program]] = {
        "definition": _definition, "limited": _fit_limited, "misjudged": _fit_misjudged, "stepwise": _fit_global,
    }  # fmt: skip
    if isinstance(task, BinarySuccessor) and task.order == "least":
        kinds["stepwise, local"] = _fit_local
    return kinds


def _definition(found: Sequence[Case], task: Recursive) -> Program:
    return Program("the definition", ("as defined",), task.answer)


def _bounded(program: Program, found: Sequence[Case], task: Recursive) -> Program:
    """The program with a longest answer: the length after which most longer answers end."""
    lengths = Counter(len(c.out) for c in found if len(c.out) < len(program.run(c.x)))
    if not lengths:
        return program
    best, most = program, _exact(program, found)
    for length in sorted(lengths):
        for end in ((), (ONE,)):

            def run(x: Symbols, length: int = length, end: Symbols = end) -> Symbols:
                out = program.run(x)
                return out if len(out) <= length else (*out[: length - len(end)], *end)

            after = f"an answer has at most {length} symbols" + (", the last of them 01" if end else "")
            tried = Program(program.name + ", cut short", (*program.lines, after), run, program.size + 1)
            value = _exact(tried, found)
            if value > most:
                best, most = tried, value
    return best


def misjudged(x: Symbols, task: BinarySuccessor, depth: int) -> Symbols:
    """The definition, had the recursion this depth: what stands before is rewritten, what stands after copied."""
    x = task.written(x)
    depth = max(0, min(depth, len(x) - 1))
    end = (X0, ONE) if x[depth] == ONE else (X1, *x[depth + 1 :])
    return task.written((X0,) * depth + end)


def _limited(x: Symbols, task: BinarySuccessor, steps: int, then: str) -> Symbols:
    """At most so many steps of rewriting."""
    depth = task.depth_of(x)
    if depth <= steps:
        return task.answer(x)
    if then == "copy":
        return misjudged(x, task, steps)
    if then == "unchanged":
        return x
    inner = task.written(x)
    return task.written((X0,) * steps + ((ONE,) if then == "one" else inner[depth:] if then == "skip" else ()))


_THEN = {
    "copy": "then the rest is copied",
    "unchanged": "deeper inputs are copied as they are",
    "one": "then the answer ends with 01",
    "stop": "then the answer ends",
    "skip": "then it goes on after the recursion's end",
}


def _fit_limited(found: Sequence[Case], task: BinarySuccessor) -> Program:
    made = []
    for steps in range(task.width):
        for then, said in _THEN.items():
            lines = (f"rewrite at most {steps} steps", said)
            made.append(
                Program("limited", lines, lambda x, s=steps, t=then: _limited(x, task, s, t), 2)  # type: ignore[misc]
            )
    return max(made, key=lambda p: _exact(p, found))


def _fit_misjudged(found: Sequence[Case], task: BinarySuccessor) -> Program:
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    for case in found:
        for depth in range(case.size):
            if misjudged(case.x, task, depth) == case.out:
                votes[case.depth][depth] += 1
    table = {d: c.most_common(1)[0][0] for d, c in votes.items()}
    known = sorted(table)

    def run(x: Symbols) -> Symbols:
        depth = task.depth_of(x)
        if depth not in table and known:
            nearest = min(known, key=lambda d: abs(d - depth))
            return misjudged(x, task, depth if table[nearest] == nearest else table[nearest])
        return misjudged(x, task, table.get(depth, depth))

    wrong = [(d, table[d]) for d in known if table[d] != d]
    lines = tuple(f"depth {d} is taken for {p}" for d, p in wrong) or ("as defined",)
    return Program("misjudged", lines, run, len(wrong))


# -- step by step


def _state(task: BinarySuccessor, x: Symbols, step: int) -> str:
    """Where a step stands to the end of the recursion: before, at, after; `over` where the number grows."""
    depth = task.depth_of(x)
    at = depth if task.order == "least" else len(x) - 1 - depth
    grows = task.written(x)[depth] == ONE
    return "before" if step < at else "at" if step == at else "over" if grows else "after"


def _emitted(task: BinarySuccessor, state: str, symbol: int, last: int) -> int:
    """The definition, one symbol at a time."""
    if task.order == "least":
        if state == "before":
            return X0
        if state == "at":
            return X0 if symbol == ONE else X1
        return ONE if state == "over" and symbol == FILL and last == ONE else END if symbol == FILL else symbol
    if state == "before":
        return symbol
    if state == "at":
        return ONE if symbol == ONE else X1
    done = symbol == FILL and (state == "after" or last == FILL)
    return END if done else X0


def _symbol(x: Symbols, step: int) -> int:
    return x[step] if 0 <= step < len(x) else FILL


def _carries(before: bool, symbol: int, out: int) -> bool:
    """Whether, by its own last step, a solver is still inside the recursion."""
    return before and symbol == X1 and out == X0


def _walk(
    task: BinarySuccessor, x: Symbols, local: bool, emit: Callable[[str, int, int, int], int], most: int
) -> list[int]:
    """Symbols that `emit(state, step, symbol, last symbol)` gives, one step after another, until it ends."""
    out: list[int] = []
    inside, over = True, False
    for step in range(most):
        symbol, last = _symbol(x, step), _symbol(x, step - 1) if step else -1
        if local:
            state = ("before" if symbol == X1 else "at") if inside else "over" if over else "after"
        else:
            state = _state(task, x, step)
        said = emit(state, step, symbol, last)
        if said == END:
            break
        over = over or (state == "at" and symbol == ONE)
        inside = _carries(inside, symbol, said)
        out.append(said)
    return out


def _fit_steps(found: Sequence[Case], task: BinarySuccessor, local: bool) -> Program:
    votes: dict[Key, Counter[int]] = defaultdict(Counter)
    right: dict[Key, Counter[int]] = defaultdict(Counter)
    for case in found:
        told = (*case.out, END)

        def read(
            state: str,
            step: int,
            symbol: int,
            last: int,
            told: Symbols = told,  # what the solver said there
        ) -> int:
            votes[state, step, symbol][told[step]] += 1
            right[state, step, symbol][_emitted(task, state, symbol, last)] += 1
            return told[step]

        _walk(task, case.x, local, read, len(told))
    exceptions: dict[Key, int] = {}
    for key, count in votes.items():
        said, n = count.most_common(1)[0]
        if n >= SUPPORT and said != right[key].most_common(1)[0][0]:
            exceptions[key] = said

    def run(x: Symbols) -> Symbols:
        def emit(state: str, step: int, symbol: int, last: int) -> int:
            return exceptions.get((state, step, symbol), _emitted(task, state, symbol, last))

        return tuple(_walk(task, x, local, emit, task.longest + 2))

    name = "stepwise, local" if local else "stepwise"
    return Program(name, _told(exceptions), run, len(exceptions))


def _fit_global(found: Sequence[Case], task: BinarySuccessor) -> Program:
    return _fit_steps(found, task, False)


def _fit_local(found: Sequence[Case], task: BinarySuccessor) -> Program:
    return _fit_steps(found, task, True)


def _told(exceptions: Mapping[Key, int]) -> tuple[str, ...]:
    """Exceptions in words, runs of steps together."""
    groups: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for (state, step, symbol), said in exceptions.items():
        groups[state, symbol, said].append(step)
    where = {"before": "inside the recursion", "at": "at its end", "after": "after it", "over": "where it grows"}
    lines = []
    for (state, symbol, said), steps in sorted(groups.items(), key=lambda g: (g[0][0] != "before", min(g[1]))):
        shown = ", ".join(str(s) for s in sorted(steps))
        if len(steps) > 2 and sorted(steps) == list(range(min(steps), max(steps) + 1)):
            shown = f"{min(steps)} to {max(steps)}"
        lines.append(f"{where[state]}, at step {shown}: {NAMES.get(symbol, symbol)} gives {NAMES.get(said, said)}")
    return tuple(lines) or ("as defined",)


# -- trees


def _pruned(x: Symbols, task: TreeTraversal, depth: int) -> Symbols:
    """The walk of what is left when nodes below a depth are no trees."""
    kept: list[int] = []
    open_ = 0
    for s in x:
        open_ += s == OPEN
        if open_ <= depth:
            kept.append(s)
        elif s == OPEN and open_ == depth + 1:
            kept.append(NONE)
        open_ -= s == CLOSE
    return task.answer(kept)


def _fit_pruned(found: Sequence[Case], task: TreeTraversal) -> Program:
    made = []
    for depth in range(1, max(c.depth for c in found) + 1):
        lines = (f"nodes below depth {depth} are left out",)
        made.append(Program("pruned", lines, lambda x, d=depth: _pruned(x, task, d), 1))  # type: ignore[misc]
    return max(made, key=lambda p: _exact(p, found))


def shown(symbols: Symbols, task: Recursive) -> str:
    """Symbols as people write them."""
    if isinstance(task, BinarySuccessor):
        return " ".join(NAMES.get(s, str(s)) for s in symbols)
    letters = {OPEN: "(", CLOSE: ")", NONE: "."}
    return " ".join(letters.get(s, chr(ord("a") + s - LABEL) if s >= LABEL else NAMES.get(s, "?")) for s in symbols)
