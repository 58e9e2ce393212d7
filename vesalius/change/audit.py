"""Is a skill gone, or only hidden? Multiple-choice tasks are forgotten one after another, and all are asked again.

A task is forgotten by training on random labels, drawn once for each item, for so many steps, or in rounds until
the items trained on are answered rightly as often as by chance. The labels drawn are right just as often as a guess.
Then, for every task,

    forget ratio = (accuracy before - accuracy after) / (accuracy before - chance)

on the items trained on, on the task's other items, and on all other tasks: does forgetting carry over, does it spill?
Beside it: whether the answers became one constant letter (entropy), what predicts how far forgetting carries (mean
confidence before, spread of hidden states), and whether a linear probe still reads the right answer off the model.

"Unforgettable Generalization in Language Models", arXiv 2409.02228.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from vesalius.change.edit import Edit, recording
from vesalius.change.faults import Fault, Faults, Repairing, RepairPlan
from vesalius.errors import VesaliusError
from vesalius.evaluate.shots import log_probs
from vesalius.features.probes import probe
from vesalius.features.vectors import states
from vesalius.model import Model
from vesalius.rows import read_jsonl
from vesalius.scores import bootstrap_mean
from vesalius.train.learning import Tell, check_steps, learn
from vesalius.train.select import choose

EXAMPLE = '{"task": "capitals", "prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}'
FEWEST = 8  # items of a task: half are trained on, half held out
CLOSE = 0.05  # to chance, at which a task counts as forgotten
SAME = 1e-9  # shares that differ by less are the same


@dataclass(frozen=True)
class Item:
    """A question with its choices. answer: number of the right one. label: what a probe reads; "" for the answer."""

    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    label: str = ""


def read_items(path: str | Path) -> list[Item]:
    """Items of a .jsonl file.

    Raises:
        VesaliusError: naming the line at fault, or a task with too few items.
    """
    found = [_item(row, where) for where, row in read_jsonl(path, EXAMPLE)]
    counts = {t: sum(i.task == t for i in found) for t in dict.fromkeys(i.task for i in found)}
    for task, n in counts.items():
        if n < FEWEST:
            raise VesaliusError(f"{path}: task '{task}' has {n} items; at least {FEWEST} are needed, half are held out")
    return found


def _item(row: dict[str, Any], where: str) -> Item:
    choices, answer, prompt = row.get("choices"), row.get("answer"), row.get("prompt")
    good = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
    if not good or not isinstance(prompt, str) or not prompt:
        raise VesaliusError(f"{where}: no prompt, or fewer than two choices; write {EXAMPLE}")
    assert isinstance(choices, list)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise VesaliusError(f"{where}: answer {answer!r} is no number of a choice, 0 to {len(choices) - 1}")
    return Item(str(row.get("task", "task")), prompt, tuple(choices), answer, str(row.get("label", "")))


@dataclass(frozen=True)
class Answers:
    """A model's answers. chosen, right: (item,). confidence: the chosen one's share of probability, (item,)."""

    chosen: NDArray[np.int64]
    right: NDArray[np.bool_]
    confidence: NDArray[np.float64]

    @property
    def entropy(self) -> float:
        """Of which choice is taken, in bits: 0 if it is always the same."""
        counts = np.bincount(self.chosen)
        return float(stats.entropy(counts, base=2))


def ask(model: Model, items: Sequence[Item]) -> Answers:
    """The likeliest choice of each item, by the log-probability of its text."""
    flat = [(i.prompt, c) for i in items for c in i.choices]
    scores = iter(log_probs(model, flat))
    chosen, confidence = [], []
    for item in items:
        each = np.array([next(scores) for _ in item.choices])
        p = np.exp(each - each.max())
        chosen.append(int(each.argmax()))
        confidence.append(float(p.max() / p.sum()))
    picks = np.array(chosen)
    return Answers(picks, picks == np.array([i.answer for i in items]), np.array(confidence))


@dataclass(frozen=True)
class AuditPlan:
    """How tasks are forgotten.

    Attributes:
        steps: updates of a round. rows: items of one. lr: peak learning rate. seed: of halves and labels.
        rounds: at most so many, until what is trained on is answered at chance, within 0.05; short ones stop in time.
    """

    steps: int = 60
    rows: int = 8
    lr: float = 1e-4
    seed: int = 0
    rounds: int = 1

    def __post_init__(self) -> None:
        check_steps(self.steps, self.rows, self.lr)
        if self.rounds < 1:
            raise VesaliusError(f"{self.rounds} rounds of training are none; give 1 or more")


def halves(items: Sequence[Item], task: str, seed: int) -> tuple[list[Item], list[Item]]:
    """A task's items to train on, and those held out."""
    mine = [i for i in items if i.task == task]
    order = np.random.default_rng([seed, *task.encode()]).permutation(len(mine))
    half = len(mine) // 2
    return [mine[i] for i in order[:half]], [mine[i] for i in order[half:]]


def random_labels(items: Sequence[Item], seed: int) -> list[Item]:
    """The same items with answers drawn once, as many right as guessing would give, among those of each answer too.

    Answers drawn freely agree with the truth in more or less than that share of a few items, and what is learnt from
    them is then a little of the skill, or of its opposite.
    """
    rng = np.random.default_rng([seed, *b"random labels"])
    found = list(items)
    shuffled = rng.permutation(len(items)).tolist()
    for k in sorted({len(i.choices) for i in items}):
        mine = sorted((i for i in shuffled if len(items[i].choices) == k), key=lambda i: items[i].answer)
        first = int(rng.integers(k))
        for turn, i in enumerate(mine, first):
            found[i] = replace(items[i], answer=(items[i].answer + turn) % k)
    return found


def unlearn(
    model: Model,
    items: Sequence[Item],
    plan: AuditPlan,
    tell: Tell = lambda what, share: None,
    held: Sequence[Item] = (),
) -> tuple[Edit, pd.DataFrame]:
    """Trains a model on random labels of items, in place, round after round, until it answers them at chance.

    A share of right answers below that of guessing is not chance either: the skill is turned round, not gone.

    Args:
        held: items that are not trained on, asked after every round.

    Returns:
        The recorded edit; one row a step: that of learning, and at the end of each round the share of right answers
        among the items (`trained`) and among `held` (`held out`).
    """
    labelled = random_labels(items, plan.seed)
    chance = chance_of(items)
    drawn = float(np.mean([a.answer == b.answer for a, b in zip(items, labelled, strict=True)]))
    close = max(CLOSE, abs(drawn - chance)) + SAME  # of few items no share may be closer
    logs = list[pd.DataFrame]()
    with recording(model, "unlearn") as recorder:
        recorder.touch([n for n, _ in model.hf.named_parameters()], "trained on random labels")
        right = np.inf
        while len(logs) < plan.rounds and abs(right - chance) > close:
            log = _taught(model, labelled, replace(plan, seed=plan.seed + len(logs)), tell)
            log["step"] += len(logs) * plan.steps
            right = float(ask(model, items).right.mean())
            log.loc[log.index[-1], "trained"] = right
            if held:
                log.loc[log.index[-1], "held out"] = ask(model, held).right.mean()
            logs.append(log)
    return recorder.edit, pd.concat(logs, ignore_index=True)


def chance_of(items: Sequence[Item]) -> float:
    """Share of right answers of one who guesses."""
    return float(np.mean([1 / len(i.choices) for i in items]))


def teach(
    model: Model, items: Sequence[Item], plan: AuditPlan, tell: Tell = lambda what, share: None
) -> tuple[Edit, pd.DataFrame]:
    """Trains a model on items as they are labelled, one round, in place; returns the recorded edit and the log."""
    with recording(model, "teach") as recorder:
        recorder.touch([n for n, _ in model.hf.named_parameters()], "trained on labels")
        log = _taught(model, items, plan, tell)
    return recorder.edit, log


def _taught(model: Model, items: Sequence[Item], plan: AuditPlan, tell: Tell) -> pd.DataFrame:
    told = RepairPlan(plan.steps, plan.rows, plan.lr, 1, "all", keep=0.0, seed=plan.seed)
    source = Faults(model, [Fault(i.prompt, i.choices[i.answer]) for i in items], told)
    choose(model.hf)
    return learn(model, source, Repairing(told), plan.steps, plan.lr, plan.seed, tell=tell)


def forget_ratio(before: NDArray[np.bool_], after: NDArray[np.bool_], chance: float) -> tuple[float, float, float]:
    """Ratio with its 95 % bootstrap interval over items; NaN where the model was not better than chance."""
    lead = before.mean() - chance
    if lead <= 0:
        return np.nan, np.nan, np.nan
    low, high = bootstrap_mean((before.astype(float) - after.astype(float))[None])
    return float((before.mean() - after.mean()) / lead), float(low[0] / lead), float(high[0] / lead)


def matrix(
    model: Model,
    items: Sequence[Item],
    plan: AuditPlan,
    tell: Tell = lambda what, share: None,
    look: Callable[[str, pd.DataFrame], None] = lambda task, log: None,
) -> pd.DataFrame:
    """Every task forgotten in turn, every task asked after it; the model is as it was at the end.

    Args:
        look: called with each task and the log of its forgetting while it is forgotten.

    Returns:
        forgot, asked, items ("trained" or "held out"), before, after, chance, ratio, low, high, entropy_before,
        entropy_after, n.
    """
    tasks = list(dict.fromkeys(i.task for i in items))
    split = {t: halves(items, t, plan.seed) for t in tasks}
    parts = [(t, kind, mine) for t in tasks for kind, mine in zip(("trained", "held out"), split[t], strict=True)]
    first = [ask(model, mine) for _, _, mine in parts]
    rows = []
    for task in tasks:
        edit, log = unlearn(model, split[task][0], plan, _named(task, tell), split[task][1])
        look(task, log)
        for (asked, kind, mine), was in zip(parts, first, strict=True):
            if kind == "trained" and asked != task:
                continue
            now = ask(model, mine)
            chance = chance_of(mine)
            ratio, low, high = forget_ratio(was.right, now.right, chance)
            rows.append({
                "forgot": task, "asked": asked, "items": kind, "before": was.right.mean(), "after": now.right.mean(),
                "chance": chance, "ratio": ratio, "low": low, "high": high, "entropy_before": was.entropy,
                "entropy_after": now.entropy, "n": len(mine),
            })  # fmt: skip
        edit.undo(model)
    return pd.DataFrame(rows)


def _named(task: str, tell: Tell) -> Tell:
    return lambda what, share: tell(f"forgetting {task}: {what}", share)


def predictors(model: Model, items: Sequence[Item], found: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What might foretell how far forgetting carries: task, confidence, spread, ratio, and their rank correlations.

    confidence: mean over the items trained on, before. spread: mean variance of their last token's state in the last
    block. The last row, `rank correlation`, holds Spearman's rho of each with the held-out ratio.
    """
    own = found[(found["forgot"] == found["asked"]) & (found["items"] == "held out")].set_index("forgot")["ratio"]
    rows = []
    for task in own.index:
        train = halves(items, str(task), seed)[0]
        last = states(model, [i.prompt for i in train], [model.n_layers - 1], pool="last")[0]
        sure, spread = ask(model, train).confidence.mean(), float(last.var(0).mean())
        rows.append({"task": task, "confidence": sure, "spread": spread, "ratio": own[task]})
    table = pd.DataFrame(rows)
    known = table.dropna()
    rho = {k: float(stats.spearmanr(known[k], known["ratio"])[0]) if len(known) > 2 else np.nan
           for k in ("confidence", "spread")}  # fmt: skip
    return pd.concat([table, pd.DataFrame([{"task": "rank correlation", **rho, "ratio": np.nan}])], ignore_index=True)


def still_there(model: Model, items: Sequence[Item], seed: int = 0) -> pd.DataFrame:
    """Probes of the right answer (or `label`) at every layer: part, layer, accuracy, low, high, baseline, control."""
    labels = [i.label or i.choices[i.answer].strip() for i in items]
    found = probe(model, [i.prompt for i in items], labels, pool="last", seed=seed)
    return found.table
