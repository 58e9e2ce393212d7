"""The transplant: a few heads of one task's circuit are made to act, in another task, as they do in the first.

At END, where the answer is read, the attention pattern of each chosen head is overwritten by one that looks at the
wrong candidates, in equal shares; values, and everything downstream, are computed as ever. Heads that in the first task
look at what must not be said (inhibition, suppressor) or write against what they look at (negative movers) then do so
in the second task, whose own attention fails to guide them. Merullo et al. 2023 (arXiv 2310.08744, sec. 5): with four
heads changed, GPT-2 medium's accuracy on Colored Objects rose from 49.6 to 93.7 %.

    A_h[END, j] = 1 / |W| for j in W, else 0,   W: the wrong candidates' tokens

This uses the prompt's own labels (which candidates are wrong): it shows what the heads can do when they are told where
to look, not that the model could find out by itself. The control is the same done to other heads of the same layers,
and to other heads chosen by the same procedure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import PartError, UnknownName, VesaliusError
from vesalius.find.base import PairsSource
from vesalius.find.detectors.landmarks import Landmarks, landmarks
from vesalius.find.detectors.roles import Roles, watch_shares
from vesalius.model import Intervention, Model, Pairs
from vesalius.model.intervene import taps
from vesalius.model.replay import Tape
from vesalius.model.sweep import BATCH, Progress, metric_values
from vesalius.parts import Part
from vesalius.scores import Scores, bootstrap_mean
from vesalius.tasks.metrics import LogitDiff, accuracy

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Look = Literal["wrong", "right", "asked"]

DONOR_ROLES = ("inhibition", "suppressor", "negative-mover")
MOVER_ROLES = ("mover",)
MOST = 10  # heads at most
DRAWS = 20  # random sets of heads


class Outcome(NamedTuple):
    """What prompts give under one or several interventions, (variant, example)."""

    preferred: Bools  # the right answer is preferred to every other option
    metric: Floats  # in the task's unit
    to_right: Floats  # mean attention of the watched movers from END to the right answer
    to_wrong: Floats  # ... and to any mention of a wrong candidate


@dataclass(frozen=True)
class _Batch:
    pairs: Pairs
    tape: Tape
    marks: Landmarks
    rows: dict[Look, torch.Tensor]  # the pattern that is put in at END, (row, key)


class Bench:
    """Prompts recorded once, on which heads can be made to look elsewhere at END at little cost.

    Only END is computed again, against the recorded keys and values, so a variant costs one token a prompt.

    Args:
        model: a causal model. task: a task or pairs, answers of one token.
        movers: heads whose attention is watched.
        memory_gb: working memory for variants run together, GiB.
    """

    def __init__(
        self,
        model: Model,
        task: PairsSource | Pairs,
        movers: Sequence[Part] = (),
        memory_gb: float = DEFAULT_MEMORY_GB,
        progress: Progress | None = None,
    ) -> None:
        pairs = task if isinstance(task, Pairs) else task.pairs(model)
        if pairs.n_examples == 0:
            raise VesaliusError("there are no prompts for the transplant; give a task with n of at least 1")
        self.model, self.n, self.movers = model, pairs.n_examples, list(movers)
        self.memory_gb, self.unit = memory_gb, pairs.metric.unit
        groups = pairs.batches(BATCH)
        self._batches: list[_Batch] = []
        for number, group in enumerate(groups):
            marks = landmarks(model, group)
            tape = Tape(model, group.clean, group.mask, group.reads, start=int(group.reads.min()))
            shown: dict[Look, torch.Tensor] = {"wrong": marks.wrong, "right": marks.right, "asked": marks.asked}
            rows = {k: v.float() / v.sum(-1, keepdim=True).clamp(min=1) for k, v in shown.items()}
            self._batches.append(_Batch(group, tape, marks, rows))
            if progress:
                progress(number + 1, len(groups))

    def without_targets(self, look: Look) -> int:
        """Prompts without a token of that kind, which therefore stay as they are."""
        return sum(int((b.rows[look].sum(-1) == 0).sum()) for b in self._batches)

    def run(self, variants: Sequence[Sequence[Part]], look: Look = "wrong") -> Outcome:
        """The outcome when the heads of each variant look there from END; an empty variant changes nothing."""
        if look not in ("wrong", "right", "asked"):
            raise UnknownName("place to look at", look, ("wrong", "right", "asked"))
        pieces = [self._run_batch(b, variants, look) for b in self._batches]
        joined = [np.concatenate([p[i] for p in pieces], axis=1) for i in range(4)]
        return Outcome(joined[0].astype(bool), *joined[1:])

    def _run_batch(self, batch: _Batch, variants: Sequence[Sequence[Part]], look: Look) -> list[Floats]:
        tape, row = batch.tape, batch.rows[look]
        touched = torch.where(row.sum(-1) > 0, batch.marks.end, -1)
        value = row[:, None].expand(-1, tape.length, -1)  # (row, query, key)
        each = [[Intervention(h, value=value, positions=touched, pattern=True) for h in heads] for heads in variants]
        at_once = tape.copies_within(self.memory_gb)
        order = sorted(range(len(each)), key=lambda i: self._first(variants[i]))
        out = [np.zeros((len(each), batch.pairs.n_examples)) for _ in range(4)]
        for lo in range(0, len(order), at_once):
            chosen = order[lo : lo + at_once]
            preferred, metric = self._answers(batch, [each[i] for i in chosen], self._first(variants[chosen[0]]))
            out[0][chosen], out[1][chosen] = preferred, metric
            if self.movers:
                shares = watch_shares(self.model, tape, [each[i] for i in chosen], self.movers, batch.marks).mean(1)
                out[2][chosen], out[3][chosen] = shares[..., 0].numpy(), shares[..., 1].numpy()
        if not self.movers:
            out[2][:], out[3][:] = np.nan, np.nan
        return out

    def _first(self, heads: Sequence[Part]) -> int:
        return min((h.layer or 0 for h in heads), default=self.model.n_layers - 1)

    def _answers(
        self, batch: _Batch, interventions: Sequence[Sequence[Intervention]], layer: int
    ) -> tuple[Bools, Floats]:
        copies, tape = len(interventions), batch.tape
        with torch.no_grad():
            hidden = tape.replay(layer, copies, taps(interventions, tape.rows, tape.start))
            metric = metric_values(self.model, batch.pairs, hidden, copies).double().numpy()
            tokens = LogitDiff().tokens(batch.pairs)
            logits = self.model.readout(hidden, tokens).float().cpu().unflatten(0, (copies, -1))
        return np.stack([accuracy(one, batch.pairs).preferred.numpy() for one in logits]), metric


@dataclass(frozen=True)
class Transplant:
    """What became of a task when heads were made to act as in another.

    Attributes:
        heads: those intervened on, in the order they were chosen.
        look: where they are made to look from END.
        n: held-out prompts. before, after: accuracy and metric of each prompt, (1, example).
        random: of as many other heads of the same layers, (draw, example).
        random_chosen: of sets chosen from other heads of the same layers by the same procedure, (draw, example).
        curve: heads (their number), added, accuracy, low, high, metric, and the same on the development prompts.
        info: how the heads were chosen, development prompts, watched movers, seed, unit.
        notes: what could not be measured, and why.
    """

    heads: list[Part]
    look: Look
    n: int
    before: Outcome
    after: Outcome
    random: Outcome
    random_chosen: Outcome | None
    curve: pd.DataFrame
    info: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lift(self) -> float:
        """Accuracy after less before."""
        return float(self.after.preferred.mean() - self.before.preferred.mean())

    @property
    def random_lift(self) -> float:
        """The same for random heads, averaged over the draws; NaN without draws."""
        return float(self.random.preferred.mean() - self.before.preferred.mean()) if len(self.random.metric) else np.nan

    def lift_interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the lift over prompts, before and after paired."""
        change = self.after.preferred[0].astype(float) - self.before.preferred[0]
        low, high = bootstrap_mean(change, seed)
        return float(low), float(high)

    def to_frame(self) -> pd.DataFrame:
        """A row for each number: condition (before, after, random), metric, value, low, high, draw.

        The metrics are accuracy, the task's own, and the watched movers' attention to right and wrong candidates.
        Intervals are over prompts, for random heads too (the spread of draws is that of their values).
        """
        rows: list[dict[str, Any]] = []
        for condition, outcome in (("before", self.before), ("after", self.after), ("random", self.random)):
            rows += self._rows(condition, outcome)
        return pd.DataFrame(rows, columns=["condition", "metric", "value", "low", "high", "draw"])

    def chosen_frame(self) -> pd.DataFrame:
        """The stricter control in the same form: condition "random, chosen alike"."""
        rows = [] if self.random_chosen is None else self._rows("random, chosen alike", self.random_chosen)
        return pd.DataFrame(rows, columns=["condition", "metric", "value", "low", "high", "draw"])

    def _rows(self, condition: str, outcome: Outcome) -> list[dict[str, Any]]:
        unit = str(self.info.get("metric", "metric"))
        columns = {
            "accuracy": outcome.preferred.astype(float),
            unit: outcome.metric,
            "movers' attention to the right answer": outcome.to_right,
            "movers' attention to wrong candidates": outcome.to_wrong,
        }
        rows = []
        for name, values in columns.items():
            if values.size == 0 or np.isnan(values).any():
                continue
            low, high = bootstrap_mean(values, int(self.info.get("seed", 0)))
            for draw, (mean, a, b) in enumerate(zip(values.mean(1), low, high, strict=True)):
                number = draw if condition.startswith("random") else -1
                found = {"value": float(mean), "low": float(a), "high": float(b)}
                rows.append({"condition": condition, "metric": name, **found, "draw": number})
        return rows

    def __repr__(self) -> str:
        low, high = self.lift_interval()
        names = ", ".join(map(str, self.heads)) or "no heads"
        spread = f"{self.random_lift:+.3f}" if len(self.random.metric) else "not drawn"
        return (
            f"Transplant({names} looking at {self.look}: accuracy {self.before.preferred.mean():.3f} -> "
            f"{self.after.preferred.mean():.3f} ({low:+.3f} to {high:+.3f}) on {self.n} prompts; random heads {spread})"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().groupby(["metric", "condition"], sort=False)["value"].agg(["mean", "min", "max"])
        return f"<p>{self!r}</p>" + table.to_html(float_format=lambda v: f"{v:.3f}")


def donors(
    source: Roles, scores: Scores | None = None, roles: Sequence[str] = DONOR_ROLES, most: int = MOST
) -> list[Part]:
    """The heads to try: those with the right roles in the first task, the most important for it first.

    Args:
        source: roles in the first task.
        scores: importance in the first task; by default the effects that the roles were measured with.
        roles: which roles. most: how many at most.
    """
    known = dict(zip(source.frame["part"], source.frame["effect"], strict=True))
    if scores is not None:
        known = {str(p): float(v) for p, v in zip(scores.parts, scores.values, strict=True)}
    heads = source.heads(*roles)
    return sorted(heads, key=lambda p: -abs(known.get(str(p), 0.0)))[:most]


def choose(bench: Bench, candidates: Sequence[Part], most: int = MOST, look: Look = "wrong") -> list[Part]:
    """Adds, one at a time, the candidate that raises accuracy most (the metric breaks ties); none is left out.

    Returns:
        All candidates up to `most`, in the order they were added. Where to stop is the caller's: `best_prefix`.
    """
    taken: list[Part] = []
    left = list(candidates)
    while left and len(taken) < most:
        found = bench.run([[*taken, p] for p in left], look)
        key = [(a, m) for a, m in zip(found.preferred.mean(1), found.metric.mean(1), strict=True)]
        taken.append(left.pop(max(range(len(left)), key=lambda i: key[i])))
    return taken


def best_prefix(bench: Bench, order: Sequence[Part], look: Look = "wrong") -> tuple[list[Part], Outcome]:
    """The shortest prefix with the highest accuracy on these prompts, and the outcome of every prefix, 0 to all."""
    found = bench.run([list(order[:k]) for k in range(len(order) + 1)], look)
    best = int(found.preferred.mean(1)[1:].argmax()) + 1 if order else 0
    return list(order[:best]), found


def transplant(
    model: Model,
    development: PairsSource | Pairs,
    held_out: PairsSource | Pairs,
    candidates: Sequence[Part],
    *,
    movers: Sequence[Part] = (),
    look: Look = "wrong",
    most: int = MOST,
    greedy: bool = True,
    draws: int = DRAWS,
    chosen_draws: int = 5,
    exclude: Sequence[Part] = (),
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    stage: Callable[[str], Progress | None] | None = None,
) -> Transplant:
    """Makes heads of one task act likewise in another, and measures the second task before and after.

    The heads come from the first task (`donors`); which of them, in what order and how many is settled on the
    development prompts of the second; the numbers are of the held-out prompts, which nothing was chosen on.

    Args:
        development: a few prompts of the second task. held_out: others, to report.
        candidates: heads of the first task's circuit.
        movers: heads whose attention to right and wrong candidates is watched, candidates among them left out; those
            before the first changed head cannot move.
        look: where the heads are made to look: wrong candidates, the right one, or what is asked about.
        most: heads at most, and the length of the curve.
        greedy: order the candidates by what each adds on the development prompts; else keep their order.
        draws: sets of random heads: as many, of the same layers, none of the candidates or of `exclude`.
        chosen_draws: sets chosen on the development prompts, as the heads were, among as many random heads of the
            candidates' layers. 0 for none.
        exclude: heads that are no control either (such as the rest of the first circuit).
        stage: called with the name of each long step; returns its progress callback.

    Returns:
        A `Transplant`.

    Raises:
        VesaliusError: without candidates, or where no prompt has the tokens to look at.
    """
    heads = list(dict.fromkeys(candidates))
    known = set(model.parts(("head",)))
    for head in heads:
        if head not in known:
            raise PartError(f"{head} is not a head of {model.name}; heads look like {next(iter(known))}")
    if not heads:
        raise VesaliusError("there are no heads to transplant; the first task has none with the roles asked for")
    if most < 1 or draws < 0 or chosen_draws < 0:
        raise VesaliusError(f"most={most}, draws={draws}, chosen_draws={chosen_draws}: most is at least 1, draws 0")
    movers = [m for m in movers if m not in heads]

    def report(name: str) -> Progress | None:
        return stage(name) if stage else None

    dev = Bench(model, development, (), memory_gb, report("transplant: development prompts"))
    order = choose(dev, heads, most, look) if greedy else heads[:most]
    picked, on_dev = best_prefix(dev, order, look)
    rng = np.random.default_rng(seed)
    banned = {*heads, *exclude}
    random = [_others(model, picked, banned, rng) for _ in range(draws)]
    pools = [_others(model, heads, banned, rng) for _ in range(chosen_draws)]
    notes = []
    if any(len(r) < len(picked) for r in random):
        notes.append("some layers have too few other heads; random sets there are smaller than the transplanted one")
    alike = [best_prefix(dev, choose(dev, pool, most, look) if greedy else pool[:most], look)[0] for pool in pools]
    held = Bench(model, held_out, movers, memory_gb, report("transplant: held-out prompts"))
    missing = held.without_targets(look)
    if missing == held.n:
        raise VesaliusError(f"no held-out prompt has a token to look at ({look}); the transplant cannot be done")
    if missing:
        notes.append(f"{missing} of {held.n} held-out prompts have no {look} candidate and stay as they are")
    prefixes = [list(order[:k]) for k in range(len(order) + 1)]
    every = held.run([*prefixes, *random, *alike], look)

    def part(lo: int, hi: int) -> Outcome:
        return Outcome(every.preferred[lo:hi], every.metric[lo:hi], every.to_right[lo:hi], every.to_wrong[lo:hi])

    k, at = len(picked), len(prefixes)
    reachable = [m for m in movers if (m.layer or 0) > min(h.layer or 0 for h in picked)]
    if movers and not reachable:
        notes.append("every watched mover comes before the changed heads, so their attention cannot move")
    info = {
        "seed": seed,
        "unit": held.unit,
        "metric": "logit difference" if held.unit == "logit" else held.unit,
        "development_prompts": dev.n,
        "candidates": [str(h) for h in heads],
        "order": "greedy on the development prompts" if greedy else "as given",
        "movers": [str(m) for m in movers],
        "movers_downstream": [str(m) for m in reachable],
        "random": [[str(h) for h in r] for r in random],
        "random_chosen": [[str(h) for h in r] for r in alike],
    }
    return Transplant(
        picked,
        look,
        held.n,
        part(0, 1),
        part(k, k + 1),
        part(at, at + draws),
        part(at + draws, at + draws + len(alike)) if alike else None,
        _curve(order, part(0, at), on_dev, seed),
        info,
        tuple(notes),
    )


def _others(model: Model, like: Sequence[Part], banned: set[Part], rng: np.random.Generator) -> list[Part]:
    """As many heads of the same layers, none of them banned (fewer where a layer has no more)."""
    found: list[Part] = []
    for layer in sorted({p.layer for p in like}):  # type: ignore[type-var]
        pool = [p for p in model.parts(("head",)) if p.layer == layer and p not in banned]
        wanted = min(sum(p.layer == layer for p in like), len(pool))
        found += [pool[i] for i in rng.choice(len(pool), size=wanted, replace=False)]
    return found


def _curve(order: Sequence[Part], held: Outcome, dev: Outcome, seed: int) -> pd.DataFrame:
    right = held.preferred.astype(float)
    low, high = bootstrap_mean(right, seed)
    metric_low, metric_high = bootstrap_mean(held.metric, seed)
    return pd.DataFrame(
        {
            "heads": range(len(order) + 1),
            "added": ["", *map(str, order)],
            "accuracy": right.mean(1),
            "low": low,
            "high": high,
            "metric": held.metric.mean(1),
            "metric_low": metric_low,
            "metric_high": metric_high,
            "movers_to_right": held.to_right.mean(1),
            "movers_to_wrong": held.to_wrong.mean(1),
            "development_accuracy": dev.preferred.mean(1),
            "development_metric": dev.metric.mean(1),
        }
    )
