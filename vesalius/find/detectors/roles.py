"""What each attention head does in a task: measured from where it looks and what its output changes.

    previous-token    from every token to the one before it (or only from what is asked about, if that is more)
    duplicate-token   from a token of the task to an earlier occurrence of the same token
    induction         from a token of the task, or from END, to what followed its earlier occurrence
    mover             from END to the right answer, and its own write raises the answer
    negative-mover    from END to the right answer, and its own write lowers it
    suppressor        from END to a wrong candidate, and its own write lowers that candidate
    inhibition        from END to a wrong candidate; writes little to the logits itself, and without it the movers
                      look more at wrong candidates and less at the right one. Also a head that does this from what is
                      asked about, if it moves the wrong candidates more than the right one
    content-gatherer  the same from END to what is asked about, moving the right answer more

A role's score is the share of attention, 0 to 1, averaged over prompts; it counts only where the stated effect on the
answer or on the movers is there too. Its null is the same share at random tokens of the same prompts (any but the
first, which heads rest on), drawn 64 times. A head has the role of its largest score among those that exceed the upper
97.5 % of their null by `margin`; else none. The first three say nothing of the answer and idle heads may look anywhere,
so they also need an effect on the task: `MATTERS` of all heads' effects. END is where the answer is read.

Wang et al. 2022 (arXiv 2211.00593, sec. 3: mover, inhibition, duplicate-token, negative mover), Olsson et al. 2022
(transformer-circuits.pub/2022/in-context-learning-and-induction-heads: induction, previous-token), Merullo et al. 2023
(arXiv 2310.08744: content-gatherer). "Suppressor" is our word for a mover's mirror image: it looks at the wrong answer
and writes against it, as the copy suppression heads of McDougall et al. 2023 (arXiv 2310.04625) do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import UnknownName, VesaliusError
from vesalius.find import find
from vesalius.find.base import PairsSource
from vesalius.find.detectors.landmarks import LOOKS, Landmarks, landmarks, looks_of
from vesalius.find.detectors.looks import NULL_DRAWS, attend, joined, run
from vesalius.model import Intervention, Model, Pairs, Site
from vesalius.model.intervene import taps as intervention_taps
from vesalius.model.replay import Tape
from vesalius.model.sweep import BATCH, Progress
from vesalius.parts import Part, parse_part
from vesalius.scores import Array, Scores, bootstrap_mean

Floats = NDArray[np.float64]

ROLES = (
    "previous-token",
    "duplicate-token",
    "induction",
    "mover",
    "negative-mover",
    "suppressor",
    "inhibition",
    "content-gatherer",
)
MARGIN = 0.1  # attention by which a role's score must exceed its null
NOTABLE = 0.01  # a direct effect counts from this share of all heads' direct effects (taken absolutely) on
MATTERS = 0.002  # a head takes part from this share of all heads' effects (taken absolutely) on
SHIFT = 0.1  # nats by which the movers' log odds, wrong over right, must rise for inhibition or gathering


@dataclass(frozen=True)
class Roles:
    """What heads do in one task of one model.

    Attributes:
        frame: a row for each head, in model order: part, layer, index, role ("" for none), score (of that role) and
            null (97.5 % of it); for every role its score (0 where its effect is missing, NaN where the prompts have no
            such tokens) and its null; `direct` (mean direct effect, in the metric's unit) with low and high;
            `attends_right`, `attends_wrong`, `attends_asked` from END; `wrong_shift` and `right_shift`: how much the
            movers' log odds of attending there rise when the head is knocked out at END, NaN where not measured.
            `effect`: score of the head in the task, by the method in `info`.
        info: what was measured on, margins, draws, how the tokens were found.
        notes: what could not be measured, and why.
    """

    frame: pd.DataFrame
    info: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, part: str | Part) -> str:
        """The role of one head, "" if it has none or is no head."""
        found = self.frame.loc[self.frame["part"] == str(parse_part(str(part))), "role"]
        return str(found.iloc[0]) if len(found) else ""

    def heads(self, *roles: str) -> list[Part]:
        """The heads with any of these roles, largest score first."""
        for role in roles:
            if role not in ROLES:
                raise UnknownName("role", role, ROLES)
        chosen = self.frame[self.frame["role"].isin(roles)].sort_values("score", ascending=False, kind="stable")
        return [parse_part(p) for p in chosen["part"]]

    def counts(self) -> dict[str, int]:
        """How many heads have each role, in the order of `ROLES`."""
        found = self.frame["role"].value_counts()
        return {role: int(found[role]) for role in ROLES if role in found}

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def __repr__(self) -> str:
        said = ", ".join(f"{n} {role}" for role, n in self.counts().items()) or "no head has a role"
        return f"Roles({self.info.get('task', '?')}, {self.info.get('model', '?')}, {len(self.frame)} heads: {said})"

    def _repr_html_(self) -> str:
        shown = self.frame[self.frame["role"] != ""][["part", "role", "score", "null", "direct"]]
        return f"<p>{self!r}</p>" + shown.to_html(index=False, float_format=lambda v: f"{v:.3g}")


def roles(
    model: Model,
    task: PairsSource | Pairs,
    *,
    parts: Sequence[Part] | None = None,
    scores: Scores | None = None,
    seed: int = 0,
    margin: float = MARGIN,
    progress: Progress | None = None,
) -> Roles:
    """Measures the role of every head in a task; see the module for what each role means.

    Args:
        model: a causal model. task: a task, or ready pairs, with answers of one token.
        parts: the heads to report (others are still measured, since roles hang together); by default all.
        scores: how much every head matters for the task; by default attribution patching, two passes and one back.
        seed: of the random tokens of the null, and of the intervals.
        margin: attention by which a score must exceed its null.

    Returns:
        The roles of the heads, with the numbers they rest on.

    Example:
        >>> roles(model, vesalius.task("ioi", n=32)).heads("inhibition")   # doctest: +SKIP
        [Part('L20.H0'), Part('L19.H2')]
    """
    it = measure(model, task, scores=scores, seed=seed, margin=margin, progress=progress)
    found, heads, score, null = it.found, it.heads, it.found.score, it.found.null
    mean, low, high, effect = it.effects.mean(1), it.low, it.high, it.effect
    helps, harms, matters, moves, shifts = it.helps, it.harms, it.matters, it.moves, it.shifts
    inhibits, gathers = it.inhibits, it.gathers
    earlier = np.fmax(score["previous"] - null["previous"], score["previous_asked"] - null["previous_asked"])
    there = earlier > score["previous"] - null["previous"]
    table: dict[str, tuple[Floats, Floats]] = {
        "previous-token": (
            _gate(np.where(there, score["previous_asked"], score["previous"]), matters),
            np.where(there, null["previous_asked"], null["previous"]),
        ),
        "duplicate-token": (_gate(score["duplicate"], matters), null["duplicate"]),
        "induction": (_gate(score["induction"], matters), null["induction"]),
        "mover": (_gate(score["right"], helps), null["right"]),
        "negative-mover": (_gate(score["right"], harms), null["right"]),
        "suppressor": (_gate(score["wrong"], helps), null["wrong"]),
        "inhibition": (_gate(score["asked_or_wrong"], inhibits), null["asked_or_wrong"]),
        "content-gatherer": (_gate(score["asked"], gathers), null["asked"]),
    }
    stacked = np.stack([np.where(s >= n + margin, s, -np.inf) for s, n in table.values()])
    best = stacked.argmax(0)
    has = np.isfinite(stacked.max(0))
    frame = pd.DataFrame(
        {
            "part": [str(p) for p in heads],
            "layer": [p.layer for p in heads],
            "index": [p.index for p in heads],
            "role": [ROLES[b] if on else "" for b, on in zip(best, has, strict=True)],
            "score": [table[ROLES[b]][0][i] if has[i] else np.nan for i, b in enumerate(best)],
            "null": [table[ROLES[b]][1][i] if has[i] else np.nan for i, b in enumerate(best)],
            "effect": effect,
            "direct": mean,
            "direct_low": low,
            "direct_high": high,
            "attends_right": score["right"],
            "attends_wrong": score["wrong"],
            "attends_asked": score["asked"],
            "wrong_shift": shifts.wrong,
            "right_shift": shifts.right,
        }
        | {role: s for role, (s, _) in table.items()}
        | {f"{role} null": n for role, (_, n) in table.items()}
    )
    if parts is not None:
        wanted = {str(p) for p in parts}
        frame = frame[frame["part"].isin(wanted)].reset_index(drop=True)
    info = {
        "task": getattr(task, "name", "pairs"),
        "model": model.name,
        "n": it.effects.shape[1],
        "seed": seed,
        "margin": margin,
        "null_draws": NULL_DRAWS,
        "effects_by": it.effects_by,
        "found_by": dict(it.found_by),
        "unit": it.unit,
    }
    return Roles(frame, info, tuple(_missing(found, int(moves.sum()), it.candidates)))


@dataclass(frozen=True)
class Measured:
    """What roles rest on, of every head.

    Attributes:
        heads: in model order. found: attention where each look asks.
        effects: direct effect on the metric in each prompt, (head, example); low, high: interval of its mean.
        effect: score of the head in the task. shifts: what knocking it out does to the movers' attention.
        helps, harms: its direct effect is notable and positive, negative. matters: it takes part in the task at all.
        moves: it looks at the right answer and writes to the logits. inhibits, gathers: see the module.
        candidates: how many heads were knocked out. found_by, unit, effects_by: how tokens and effects were found.
    """

    heads: list[Part]
    found: Attention
    effects: Floats
    low: Array
    high: Array
    effect: Floats
    shifts: Shifts
    helps: NDArray[np.bool_]
    harms: NDArray[np.bool_]
    matters: NDArray[np.bool_]
    moves: NDArray[np.bool_]
    inhibits: NDArray[np.bool_]
    gathers: NDArray[np.bool_]
    candidates: int
    found_by: Mapping[str, str]
    unit: str
    effects_by: str


def measure(
    model: Model,
    task: PairsSource | Pairs,
    *,
    scores: Scores | None = None,
    seed: int = 0,
    margin: float = MARGIN,
    progress: Progress | None = None,
) -> Measured:
    """Attention, direct effects and knock-outs of every head in a task; `roles` says what they mean."""
    pairs = task if isinstance(task, Pairs) else task.pairs(model)
    if pairs.n_examples == 0:
        raise VesaliusError("there are no prompts to measure roles on; give a task with n of at least 1")
    marks = landmarks(model, pairs)
    heads = model.parts(("head",))
    groups = pairs.batches(BATCH)
    steps = 3 * len(groups)
    found = _attention(model, pairs, heads, seed, lambda n: progress(n, steps) if progress else None)
    direct = find("direct", model, pairs, parts="head")
    assert direct.per_example is not None
    order = {p: i for i, p in enumerate(direct.parts)}
    effects = direct.per_example[[order[p] for p in heads]].astype(np.float64)  # (head, example)
    low, high = bootstrap_mean(effects, seed)
    mean = effects.mean(1)
    notable = np.abs(mean) >= NOTABLE * max(float(np.abs(mean).sum()), 1e-12)
    if scores is None:
        scores = find("attribution-patching", model, pairs, parts="head")
    known = dict(zip(scores.parts, np.asarray(scores.values, dtype=float).tolist(), strict=True))
    effect = np.array([known.get(p, np.nan) for p in heads])
    matters = np.abs(effect) >= MATTERS * max(float(np.nansum(np.abs(effect))), 1e-12)
    helps, harms = notable & (low > 0), notable & (high < 0)
    passes = {k: found.score[k] >= found.null[k] + margin for k in LOOKS}  # NaN compares as False
    moves = passes["right"] & (helps | harms)
    candidates = [i for i in np.flatnonzero(passes["asked_or_wrong"] & ~notable).tolist()]
    shifts = _knock_out(model, pairs, heads, candidates, np.where(moves, np.abs(mean), 0.0), seed, progress, steps)
    guides = (shifts.contrast_low > 0) & (shifts.contrast >= SHIFT)  # without it movers prefer the wrong ones more
    inhibits = guides & (passes["wrong"] | (shifts.wrong >= -shifts.right))
    gathers = guides & ~inhibits & passes["asked"]
    return Measured(
        heads, found, effects, low, high, effect, shifts, helps, harms, matters, moves, inhibits, gathers,
        len(candidates), dict(marks.named), pairs.metric.unit, str(scores.info.get("method", "given")),
    )  # fmt: skip


def _gate(score: Floats, on: NDArray[np.bool_]) -> Floats:
    return np.where(on | np.isnan(score), score, 0.0)


def _missing(found: Attention, movers: int, candidates: int) -> list[str]:
    said = {
        "duplicate": ("no token of the task occurs twice", "duplicate-token"),
        "induction": ("no token of the task, nor the last one, follows an earlier occurrence of itself", "induction"),
        "right": ("the right answer does not stand in the prompts", "mover and negative-mover"),
        "wrong": ("no wrong candidate stands in the prompts", "suppressor"),
        "asked": ("nothing that is asked about was found", "content-gatherer"),
    }
    notes = [f"{why}: no {what} could be found" for k, (why, what) in said.items() if not found.rows[k]]
    if not movers and found.rows["right"]:
        notes.append(
            f"no head looks at the right answer and writes towards or against it: of {candidates} heads that look from "
            "END at what is asked about, none can be told to be inhibition or content-gatherer"
        )
    return notes


class Attention(NamedTuple):
    """Attention of the heads where each look asks, and at random tokens.

    Attributes:
        score: mean over prompts, (head,). null: of random tokens, upper 97.5 %, (head,). rows: prompts that have such
        tokens. each: of every prompt, (head, row). chance: of every prompt and draw, (head, row, draw).
    """

    score: dict[str, Floats]
    null: dict[str, Floats]
    rows: dict[str, int]
    each: dict[str, Floats]
    chance: dict[str, Floats]


def _attention(
    model: Model, pairs: Pairs, heads: Sequence[Part], seed: int, progress: Callable[[int], None]
) -> Attention:
    """Attention of every head where each look asks, and at random tokens."""
    rng = torch.Generator().manual_seed(seed)
    pieces = []
    for number, group in enumerate(pairs.batches(BATCH)):
        pieces.append(attend(model, group.clean, group.mask, looks_of(group, landmarks(model, group), rng)))
        progress(number + 1)
    found = joined(pieces)
    place = {p: i for i, p in enumerate(found.heads)}
    order = [place[p] for p in heads]
    each = {k: v[order].double().numpy() for k, v in found.score.items()}
    chance = {k: v[order].double().numpy() for k, v in found.chance.items()}
    score, null, rows = {}, {}, {}
    nothing = np.full(len(heads), np.nan)
    for name in LOOKS:
        there = ~np.isnan(each[name][0])
        rows[name] = int(there.sum())
        score[name], null[name] = nothing, nothing
        if rows[name]:
            score[name] = each[name][:, there].mean(1)
            null[name] = np.quantile(chance[name][:, there].mean(1), 0.975, axis=1)
    return Attention(score, null, rows, each, chance)


class Shifts(NamedTuple):
    """Change of the movers' log odds of attending to wrong and right candidates when a head is knocked out, (head,)."""

    wrong: Floats
    right: Floats
    contrast: Floats  # wrong less right
    contrast_low: Floats  # of its 95 % interval
    each: Floats  # the contrast in every prompt, (head, row); NaN for heads that were not knocked out


def _knock_out(
    model: Model,
    pairs: Pairs,
    heads: Sequence[Part],
    candidates: Sequence[int],
    weight: Floats,
    seed: int,
    progress: Progress | None,
    steps: int,
) -> Shifts:
    """Replaces each candidate's output at END by its mean over counterfactual prompts and watches the movers.

    Args:
        candidates: which heads to knock out. weight: how much each head counts as a mover, (head,), 0 for none.
    """
    nan, every = np.full(len(heads), np.nan), np.full((len(heads), pairs.n_rows), np.nan)
    movers = np.flatnonzero(weight > 0).tolist()
    last = max((heads[m].layer or 0 for m in movers), default=-1)
    tried = [c for c in candidates if (heads[c].layer or 0) < last]
    if not tried:
        return Shifts(nan, nan.copy(), nan.copy(), nan.copy(), every)
    groups = pairs.batches(BATCH)
    means = _end_means(model, groups, [heads[c] for c in tried])
    pieces = []
    for number, group in enumerate(groups):
        marks = landmarks(model, group)
        tape = Tape(model, group.clean, group.mask, group.reads, start=int(group.reads.min()))
        variants: list[list[Intervention]] = [[]]
        variants += [[Intervention(heads[c], value=means[heads[c]], positions=marks.end)] for c in tried]
        odds = watch(model, tape, variants, [heads[m] for m in movers], marks)  # (variant, mover, row, side)
        pieces.append((odds[1:] - odds[:1]).numpy())
        if progress:
            progress(2 * len(groups) + number + 1, steps)
    shift = np.concatenate(pieces, axis=2)  # (candidate, mover, example, side)
    later = np.array([[(heads[m].layer or 0) > (heads[c].layer or 0) for m in movers] for c in tried])
    share = later * weight[movers]
    share = share / share.sum(1, keepdims=True)
    each = np.einsum("cmes,cm->sce", shift, share)  # (side, candidate, example): right, wrong
    contrast = each[1] - each[0]
    low, _ = bootstrap_mean(contrast, seed)
    wrong, right, mean, least = (nan.copy() for _ in range(4))
    wrong[tried], right[tried], mean[tried], least[tried] = each[1].mean(1), each[0].mean(1), contrast.mean(1), low
    every[tried] = contrast
    return Shifts(wrong, right, mean, least, every)


def _end_means(model: Model, groups: Sequence[Pairs], parts: Sequence[Part]) -> dict[Part, Tensor]:
    """Mean output of heads at END over the counterfactual prompts, (1, 1, d_head)."""
    prefix = model.anatomy.main.prefix
    sites = [Site("z", layer, prefix) for layer in sorted({p.layer or 0 for p in parts})]
    total: dict[Site, Tensor] = {}
    rows = 0
    for group in groups:
        end = group.reads[:, 0].to(model.device)

        def add(x: Tensor, site: Site, end: Tensor = end) -> None:
            z = x[torch.arange(len(end), device=x.device), end.to(x.device)].sum(0)
            total[site] = total[site] + z if site in total else z

        run(model, group.corrupted, group.mask, {s: [lambda x, s=s: add(x, s)] for s in sites})  # type: ignore[misc]
        rows += group.n_rows
    return {p: (total[Site("z", p.layer or 0, prefix)][p.index] / rows)[None, None] for p in parts}


def watch(
    model: Model, tape: Tape, variants: Sequence[Sequence[Intervention]], movers: Sequence[Part], marks: Landmarks
) -> Tensor:
    """Log odds of each mover attending, from END, to right and to wrong candidates rather than elsewhere.

    Returns:
        (variant, mover, row, 2), the last axis right, wrong; -inf never (shares below 1e-6 count as 1e-6).
    """
    shares = watch_shares(model, tape, variants, movers, marks)
    rest = (1 - shares.sum(-1, keepdim=True)).clamp(min=1e-6)
    return (shares.clamp(min=1e-6) / rest).log()


def watch_shares(
    model: Model, tape: Tape, variants: Sequence[Sequence[Intervention]], movers: Sequence[Part], marks: Landmarks
) -> Tensor:
    """Attention of each mover, from END, to right and to wrong candidates, (variant, mover, row, 2)."""
    out = torch.zeros(len(variants), len(movers), tape.rows, 2)
    touched = [i.where.site.layer for v in variants for i in v]
    start = min([*touched, *[m.layer or 0 for m in movers]])
    both = {s: list(f) for s, f in intervention_taps(variants, tape.rows, tape.start).items()}
    sides = torch.stack([marks.right, marks.mentions], dim=-1).float()  # (row, key, side)
    for layer in {m.layer or 0 for m in movers}:
        mine = [(i, m.index or 0) for i, m in enumerate(movers) if m.layer == layer]

        def tap(pattern: Tensor, mine: Sequence[tuple[int, int]] = mine) -> None:
            x = pattern.float().cpu().unflatten(0, (len(variants), tape.rows))  # (variant, row, head, query, key)
            at = x[:, torch.arange(tape.rows), :, marks.end - tape.start]  # (row, variant, head, key)
            found = torch.einsum("rvhk,rks->vhrs", at, sides)
            for i, head in mine:
                out[:, i] = found[:, head]

        both.setdefault(Site("pattern", layer, model.anatomy.main.prefix), []).append(tap)
    with torch.no_grad():
        tape.replay(start, len(variants), both)
    return out
