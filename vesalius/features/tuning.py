"""Find the few parts that do a task, prove it by knocking them out, and train those alone (Zhang et al. 2024).

    find      path patching of every head and MLP to the logits, on prompts the model answers rightly
    prove     each head writes its mean over plain text instead: how much of the task goes, how much of the text;
              as many other heads, drawn by chance, beside it
    change    the slices of these heads (W_Q, W_K, W_V, W_O) and these MLPs are trained on the task's answers, all else
              held to the last bit; beside it as many parts drawn by chance, and the whole model, for as many steps

Everything is measured on prompts that ask what no training prompt asks (for sums: other operands), and on plain text.

Paper: "Interpreting and Improving Large Language Models in Arithmetic Calculation", arXiv 2409.01659.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.corpus.batches import Batch
from vesalius.errors import TaskError, VesaliusError
from vesalius.find.base import find
from vesalius.model import Intervention, Model, Pairs, Site
from vesalius.model.intervene import taps
from vesalius.model.saving import origin_of, save_model
from vesalius.parts import Part
from vesalius.records import request_hash
from vesalius.scores import Scores
from vesalius.tasks.metrics import accuracy
from vesalius.train.learning import Tell, check_steps, learn
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.special import needs_for
from vesalius.train.select import Slices, choose, slices

BATCH = 16
TEXT_BATCH = 4
LEAST = 8  # prompts answered rightly, to find with


@dataclass(frozen=True)
class Prompts:
    """A task's prompts in two: what is asked in one is not asked in the other.

    Attributes:
        train, test: prompts with one-token answers. asked: different questions, in both together.
    """

    train: Pairs
    test: Pairs
    asked: int


def split(pairs: Pairs, seed: int = 0, share: float = 0.25) -> Prompts:
    """Holds out a share of the questions: the tokens at a task's named positions that differ, or the whole prompt.

    Raises:
        TaskError: if answers are several tokens, or there are fewer than four different questions.
    """
    if pairs.targets is not None:
        raise TaskError("answers of several tokens cannot be tuned on; give a task whose answers are one token")
    every = torch.arange(pairs.n_rows)
    named = [pairs.clean[every, pairs.positions[n]].tolist() for n in sorted(pairs.positions) if n != "END"]
    named = [tokens for tokens in named if len(set(tokens)) > 1]  # what is the same everywhere asks nothing
    questions: list[tuple[int, ...]] = (
        list(zip(*named, strict=True)) if named else [tuple(row) for row in pairs.clean.tolist()]
    )
    different = sorted(set(questions))
    if len(different) < 4:
        raise TaskError(f"the prompts ask {len(different)} different questions, too few to hold some out; raise --n")
    order = np.random.default_rng([seed, *b"tuning questions"]).permutation(len(different))
    out = {different[i] for i in order[: max(1, round(share * len(different)))]}
    kept = [i for i, q in enumerate(questions) if q not in out]
    held = [i for i, q in enumerate(questions) if q in out]
    return Prompts(pairs.take(kept), pairs.take(held), len(different))


def answered(model: Model, pairs: Pairs, changes: Sequence[Intervention] = ()) -> NDArray[np.bool_]:
    """Whether a right answer is the likeliest token of all, (example,)."""
    found = []
    for group in pairs.batches(BATCH):
        every = taps([list(changes)], rows=group.n_rows) if changes else None
        logits = model.run(group.clean, group.mask, taps=every).logits
        assert logits is not None
        at = group.reads[:, :1, None].to(logits.device).expand(-1, -1, logits.shape[-1])
        top = accuracy(logits.gather(1, at).float(), group).top1
        assert top is not None
        found.append(top.cpu().numpy())
    return np.concatenate(found)


@torch.no_grad()
def text_loss(model: Model, rows: Tensor | None, changes: Sequence[Intervention] = ()) -> float:
    """Mean loss on plain text, nats a token; NaN where there is none. rows: (row, pos)."""
    if rows is None:
        return math.nan
    total = 0.0
    for group in rows.split(TEXT_BATCH):
        every = taps([list(changes)], rows=len(group)) if changes else None
        logits = model.run(group, taps=every).logits
        assert logits is not None
        chance = logits[:, :-1].float().log_softmax(-1).gather(-1, group[:, 1:, None].to(logits.device))
        total -= float(chance.double().sum())
    return total / (rows.shape[0] * (rows.shape[1] - 1))


@dataclass(frozen=True)
class KeyParts:
    """What path patching found.

    Attributes:
        heads, mlps: the chosen parts, largest effect first. head_scores, mlp_scores: of all, as shares of the metric.
        n: prompts found with.
    """

    heads: list[Part]
    mlps: list[Part]
    head_scores: Scores
    mlp_scores: Scores
    n: int


def key_parts(
    model: Model,
    pairs: Pairs,
    share: float = 0.05,
    mlps: int = 3,
    n: int = 32,
    memory_gb: float = 1.0,
    tell: Tell = lambda text, share: None,
) -> KeyParts:
    """The heads and MLPs whose direct effect on the answer's logit is largest.

    Args:
        pairs: prompts; the first `n` answered rightly are taken. share: of all heads, rounded up. mlps: how many.

    Raises:
        VesaliusError: if the model answers fewer than 8 of the prompts, or no part helps.
    """
    if not 0 < share <= 1 or mlps < 0:
        raise VesaliusError(f"share={share} of the heads and mlps={mlps}; give a share above 0 up to 1, and 0 or more")
    right = np.flatnonzero(answered(model, pairs))[:n]
    if len(right) < LEAST:
        raise VesaliusError(
            f"{model.name} answers {len(right)} of {pairs.n_examples} prompts; parts are found on prompts that it "
            f"answers, {LEAST} or more: raise --n, or choose another task or model"
        )
    mine = pairs.take(right.tolist())

    def ranked(kind: str, wanted: int) -> tuple[list[Part], Scores]:
        say = lambda done, of: tell(f"{kind}s", done / of)  # noqa: E731
        scores = find("path-patching", model, mine, senders=kind, memory_gb=memory_gb, progress=say)
        order = np.argsort(-scores.values, kind="stable")[:wanted]
        parts: list[Any] = [scores.parts[i] for i in order if scores.values[i] > 0]
        return parts, scores

    heads, head_scores = ranked("head", math.ceil(share * len(model.parts(("head",)))))
    chosen, mlp_scores = ranked("mlp", mlps)
    if not heads:
        raise VesaliusError(f"no head of {model.name} helps this task by path patching; there is nothing to tune")
    return KeyParts(heads, chosen, head_scores, mlp_scores, len(right))


def others(model: Model, parts: Sequence[Part], rng: np.random.Generator) -> list[Part]:
    """As many parts of each kind, drawn among all others."""
    found: list[Part] = []
    for kind in ("head", "mlp"):
        mine = [p for p in parts if p.kind == kind]
        pool = [p for p in model.parts((kind,)) if p not in mine]
        found += [pool[i] for i in rng.choice(len(pool), min(len(mine), len(pool)), replace=False)]
    return found


def means(model: Model, heads: Sequence[Part], rows: Tensor) -> list[Intervention]:
    """Interventions that put each head's mean output over all tokens of some rows, (row, pos), in its place."""
    sites = sorted({Site("z", p.layer or 0, p.stack) for p in heads})
    total: dict[Site, Tensor] = {}
    for group in rows.split(TEXT_BATCH):
        captured = model.run(group, capture=sites)
        for site in sites:
            total[site] = total.get(site, 0) + captured[site].double().sum((0, 1))
    count = rows.numel()
    mean = {site: (x / count).to(model.dtype) for site, x in total.items()}  # (head, d_head)
    return [Intervention(p, value=mean[Site("z", p.layer or 0, p.stack)][p.index or 0]) for p in heads]


def knock_out(
    model: Model,
    heads: Sequence[Part],
    pairs: Pairs,
    rows: Tensor | None,
    controls: Mapping[str, Pairs] | None = None,
    draws: int = 5,
    seed: int = 0,
    tell: Tell = lambda text, share: None,
) -> pd.DataFrame:
    """What goes without the found heads, and without as many others.

    Args:
        pairs: prompts of the task. rows: plain text (row, pos); without any, means are over the counterfactual prompts.
        controls: prompts of other tasks, by name. draws: of other heads.

    Returns:
        without ("nothing", "found", "random"), draw, heads, accuracy, text_loss, and a column for each control.
    """
    reference = rows if rows is not None else pairs.corrupted
    rng = np.random.default_rng([seed, *b"knock out"])
    variants: list[tuple[str, int, list[Part]]] = [("nothing", 0, []), ("found", 0, list(heads))]
    variants += [("random", i, others(model, heads, rng)) for i in range(draws)]
    found = []
    with model.alone():
        for number, (name, draw, mine) in enumerate(variants):
            tell(f"without {name}", number / len(variants))
            changes = means(model, mine, reference) if mine else []
            row: dict[str, Any] = {"without": name, "draw": draw, "heads": " ".join(map(str, mine))}
            row["accuracy"] = float(answered(model, pairs, changes).mean())
            row["text_loss"] = text_loss(model, rows, changes)
            row |= {k: float(answered(model, p, changes).mean()) for k, p in (controls or {}).items()}
            found.append(row)
    return pd.DataFrame(found)


# ---- training


class Answers:
    """Prompts with their answers as a `Source`: drawn anew at every step, the answer the only target.

    Args:
        pairs: prompts. rows: of a step. seed: of the draws. vocab_size: of the model. padding: a token's id.
    """

    def __init__(self, pairs: Pairs, rows: int, seed: int, vocab_size: int, padding: int) -> None:
        self.pairs, self.rows, self.seed, self.vocab_size, self.padding = pairs, rows, seed, vocab_size, padding
        self.length = pairs.length
        self.fingerprint = request_hash(self.describe())

    def describe(self) -> dict[str, Any]:
        """All that decides the batches."""
        return {"kind": "answers", "pairs": self.pairs.fingerprint, "rows": self.rows, "seed": self.seed}

    def batch(self, step: int) -> Batch:
        """The rows of a step."""
        chosen = np.random.default_rng([self.seed, step, *b"answers"]).integers(0, self.pairs.n_examples, self.rows)
        ids = np.full((self.rows, self.length + 1), self.padding, dtype=np.int64)
        segments = np.full(ids.shape, -1, dtype=np.int64)
        mask = np.zeros(ids.shape, dtype=bool)
        for row, example in enumerate(chosen.tolist()):
            prompt = self.pairs.clean[example][self.pairs.mask[example].bool()].numpy()
            n = len(prompt)
            ids[row, :n], ids[row, n] = prompt, self.pairs.answers[example][0]
            segments[row, : n + 1] = step * self.rows + row
            mask[row, n] = True
        return Batch(step, ids, segments, mask)


@dataclass(frozen=True)
class Plan:
    """How parts are trained: updates, prompts of each, peak learning rate, weight decay, seed."""

    steps: int = 200
    rows: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps(self.steps, self.rows, self.lr)


@contextmanager
def restored(model: Model) -> Iterator[None]:
    """Puts the model's weights back, and freezes them, when the block ends."""
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in model.hf.named_parameters():
                p.copy_(before[name])
        model.hf.eval().requires_grad_(False)


def tune(
    model: Model, pairs: Pairs, parts: Sequence[Part] | None, plan: Plan, tell: Tell = lambda text, share: None
) -> tuple[int, pd.DataFrame]:
    """Trains these parts of a model in place (all of it if None) to answer; returns how many numbers changed hands.

    Returns:
        numbers trained, and a row a step: step, loss, lr.
    """
    only = None if parts is None else [str(p) for p in parts]
    trained = choose(model.hf, only=only)
    held = [] if only is None else slices(model.hf, only)
    padding = getattr(model.tokenizer, "pad_token_id", None) or 0
    source = Answers(pairs, plan.rows, plan.seed, int(model.hf.config.vocab_size), padding)
    objective = make_objective("prompted", needs_for(model.hf, model.tokenizer), tokenizer=model.tokenizer)
    plugs = [Slices(held)] if held else []
    log = learn(model, source, objective, plan.steps, plan.lr, plan.seed, plugs, tell, weight_decay=plan.weight_decay)
    return trained, log


def compare(
    model: Model,
    parts: Sequence[Part],
    prompts: Prompts,
    rows: Tensor | None,
    plan: Plan,
    *,
    controls: Mapping[str, Pairs] | None = None,
    variants: Sequence[str] = ("found", "random", "full"),
    save: Path | None = None,
    tell: Tell = lambda text, share: None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trains the found parts, as many random ones, and everything, each from the model's own weights.

    Args:
        variants: which, in this order. save: an empty or missing folder for the model whose found parts were trained.

    Returns:
        tuned ("before" and the variants), parts, trained (numbers), accuracy, train_accuracy, text_loss, and a column
        for each control; and the log: tuned, step, loss, lr. The model is as it was.
    """
    rng = np.random.default_rng([plan.seed, *b"random parts"])
    chosen: dict[str, list[Part] | None] = {"found": list(parts), "random": others(model, parts, rng), "full": None}
    table, logs = [], []

    def measured(name: str, trained: int) -> None:
        mine = chosen.get(name)
        row: dict[str, Any] = {"tuned": name, "parts": "" if mine is None else " ".join(map(str, mine))}
        row |= {"trained": trained, "accuracy": float(answered(model, prompts.test).mean())}
        row["train_accuracy"] = float(answered(model, prompts.train).mean())
        row["text_loss"] = text_loss(model, rows)
        row |= {k: float(answered(model, p).mean()) for k, p in (controls or {}).items()}
        table.append(row)

    with model.alone():
        measured("before", 0)
        for name in variants:
            with restored(model):
                say = lambda text, share, name=name: tell(f"{name}: {text}", share)  # noqa: E731
                trained, log = tune(model, prompts.train, chosen[name], plan, say)
                logs.append(log[["step", "loss", "lr"]].assign(tuned=name))
                measured(name, trained)
                if name == "found" and save is not None:
                    story = {"edit": "parts trained", "of": origin_of(model), "parts": [str(p) for p in parts]}
                    save_model(model, save, story | {"plan": asdict(plan), "task": prompts.train.fingerprint})
    return pd.DataFrame(table), pd.concat(logs, ignore_index=True)[["tuned", "step", "loss", "lr"]]
