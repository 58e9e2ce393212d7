"""Sentence-level repetition: how a model talks itself into a loop, and a short training that talks it out of it.

Diagnosis. A sentence stands n times after a prefix. Of the tokens of repeat n, with p_n their probabilities:

    TP_n   mean p_n                                       token probability
    IP_n   share with p_n > p_n-1                          increased probability
    WR_n   share that is the likeliest token of all        winner rate

All rise with n where repetition reinforces itself. `loops` counts greedy continuations in which a sentence follows on
itself. The cure is the objective `ditto`.

Xu et al. 2022, "Learning to Break the Loop", arXiv 2206.02369, sec. 2 and 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.change.edit import Edit, recording
from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.evaluate.recite import recite
from vesalius.model import Model
from vesalius.model.memory import memory_errors
from vesalius.records import request_hash
from vesalius.scores import bootstrap_mean
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.ditto import LONGEST, SHORTEST, sentence_ends
from vesalius.train.objectives.special import needs_for
from vesalius.train.optimizers import make_optimizer
from vesalius.train.parallel import World
from vesalius.train.schedules import make_schedule
from vesalius.train.select import choose
from vesalius.train.trainer import Trainer, deterministic, is_exact

_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+|\n|$)")
Tell = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Repeated:
    """A sentence with what stood before it, as ids."""

    prefix: tuple[int, ...]
    sentence: tuple[int, ...]


def sentences(model: Model, rows: Tensor, n: int) -> list[Repeated]:
    """The first whole sentence of each row that has one, after the sentence before it.

    Raises:
        VesaliusError: if fewer than n rows have one.
    """
    ends = set(sentence_ends(model.tokenizer))
    found = []
    for row in rows.tolist():
        stops = [i for i, t in enumerate(row) if t in ends]
        for a, b in zip(stops, stops[1:], strict=False):
            if SHORTEST <= b - a <= LONGEST:
                found.append(Repeated(tuple(row[: a + 1]), tuple(row[a + 1 : b + 1])))
                break
        if len(found) == n:
            return found
    raise VesaliusError(f"the text has {len(found)} rows with a whole sentence, and {n} are needed; give more text")


def drawn_sentences(vocabulary: int, n: int, length: int = 12, seed: int = 0) -> list[Repeated]:
    """Random tokens in place of sentences, a control."""
    rng = np.random.default_rng([seed, *b"random sentences"])
    return [Repeated((int(rng.integers(vocabulary)),), tuple(rng.integers(0, vocabulary, length))) for _ in range(n)]


@torch.no_grad()
def reinforcement(model: Model, repeated: Sequence[Repeated], times: int = 10) -> pd.DataFrame:
    """TP, IP and WR by repeat: one row each, with 95 % intervals of TP over sentences.

    Args:
        model: causal. repeated: sentences. times: repeats, as far as the model has positions.
    """
    tp = np.full((len(repeated), times), np.nan)
    ip, wr = tp.copy(), tp.copy()
    room = int(getattr(model.hf.config, "max_position_embeddings", 0) or 10**9)
    for row, one in enumerate(repeated):
        size = len(one.sentence)
        count = min(times, (room - len(one.prefix)) // size)
        ids = torch.tensor([[*one.prefix, *one.sentence * count]])
        with memory_errors("fewer repeats or shorter sentences need less"):
            logits = model.logits(ids)[0, :-1].float()
        first = len(one.prefix)
        aim = ids[0, first:].to(logits.device)
        at = logits[first - 1 :]  # (token, vocabulary)
        p = at.softmax(-1).gather(-1, aim[:, None])[:, 0].view(count, size)
        best = (at.argmax(-1) == aim).view(count, size)
        tp[row, :count] = p.mean(1).double().cpu().numpy()
        wr[row, :count] = best.float().mean(1).cpu().numpy()
        ip[row, 1:count] = (p[1:] > p[:-1]).float().mean(1).cpu().numpy()
    rows = []
    for n in range(times):
        here = tp[:, n][~np.isnan(tp[:, n])]
        if not len(here):
            break
        low, high = bootstrap_mean(here[None])
        rows.append({"repeat": n + 1, "TP": here.mean(), "low": float(low[0]), "high": float(high[0]), "IP":
                     np.nanmean(ip[:, n]) if n else np.nan, "WR": np.nanmean(wr[:, n]), "n": len(here)})  # fmt: skip
    return pd.DataFrame(rows)


def has_loop(text: str) -> bool:
    """Whether a sentence of three words or more follows on itself."""
    found = [" ".join(s.split()).casefold() for s in _SENTENCE.findall(text)]
    found = [s for s in found if s]
    return any(a == b and len(a.split()) >= 3 for a, b in zip(found, found[1:], strict=False))


@dataclass(frozen=True)
class Loops:
    """Greedy continuations of prompts. texts: what was written. looped: whether a sentence follows on itself."""

    texts: list[str]
    looped: NDArray[np.bool_]
    distinct: float  # share of different ones among groups of four tokens, mean over texts

    @property
    def rate(self) -> float:
        return float(self.looped.mean())


def loops(model: Model, rows: Tensor, prompt: int = 32, continuation: int = 128) -> Loops:
    """Greedy continuations of rows of text.

    Args:
        model: causal. rows: (row, prompt or more) ids. prompt: tokens given. continuation: tokens written.
    """
    filled = torch.cat([rows[:, :prompt], torch.zeros(len(rows), continuation, dtype=rows.dtype)], 1)
    said = recite(model, filled, prompt, continuation).tokens
    tokenizer: Any = model.tokenizer
    texts = [tokenizer.decode(t, skip_special_tokens=True) for t in said]
    fours = [[tuple(t[i : i + 4]) for i in range(len(t) - 3)] for t in said.tolist()]
    return Loops(texts, np.array([has_loop(t) for t in texts]), float(np.mean([len(set(f)) / len(f) for f in fours])))


@dataclass(frozen=True)
class DittoPlan:
    """How a model is trained against loops: updates, rows of a batch, peak learning rate, gamma, share of repeats."""

    steps: int = 60
    rows: int = 8
    lr: float = 5e-5
    gamma: float = 0.5
    rate: float = 0.5
    kind: str = "nl"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or not 0 < self.lr < float("inf"):
            raise VesaliusError(f"steps={self.steps}, rows={self.rows}, lr={self.lr}; give numbers above 0")


class TextRows:
    """Rows of text as a `Source`: each step takes the next ones, round and round in a drawn order."""

    def __init__(self, text: Tensor, rows: int, seed: int, vocab_size: int) -> None:
        self.text, self.rows, self.seed, self.vocab_size = text.numpy(), rows, seed, vocab_size
        self.length = text.shape[1] - 1
        self.fingerprint = request_hash(self.describe())

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "rows", "text": int(self.text.sum()), "shape": self.text.shape, "rows": self.rows,
                "seed": self.seed}  # fmt: skip

    def batch(self, step: int) -> Batch:
        every = len(self.text)
        places = np.arange(step * self.rows, (step + 1) * self.rows)
        epochs, within = places // every, places % every
        orders = {e: np.random.default_rng([self.seed, int(e), *b"rows"]).permutation(every) for e in set(epochs)}
        chosen = np.array([orders[e][i] for e, i in zip(epochs, within, strict=True)])
        segments = np.repeat(places[:, None], self.text.shape[1], axis=1)
        return Batch(step, self.text[chosen].astype(np.int64), segments)


def break_loops(
    model: Model, text: Tensor, plan: DittoPlan, tell: Tell = lambda what, share: None
) -> tuple[Edit, pd.DataFrame]:
    """Trains a model against loops, in place.

    Args:
        model: causal. text: (row, pos) ids to train on. plan: how. tell: told of every step.

    Returns:
        The recorded edit, and one row a step: step, loss, lr, repeat (mean probability of repeated tokens).
    """
    settings = {"gamma": plan.gamma, "rate": plan.rate, "kind": plan.kind}
    with recording(model, "ditto") as recorder:
        recorder.touch([n for n, _ in model.hf.named_parameters()], "trained against repeats")
        choose(model.hf)
        log = trained(model, text, make_objective("ditto", needs_for(model.hf, model.tokenizer),
                                                  tokenizer=model.tokenizer, **settings), plan, tell)  # fmt: skip
    return recorder.edit, log


def trained(model: Model, text: Tensor, objective: Any, plan: DittoPlan, tell: Tell) -> pd.DataFrame:
    """Updates of the parameters that are free, on rows of text."""
    source = TextRows(text, plan.rows, plan.seed, int(model.hf.config.vocab_size))
    trainer = Trainer(
        model.hf,
        source,  # type: ignore[arg-type]
        objective,
        make_optimizer("adamw", model.hf, lr=plan.lr, weight_decay=0.0),
        make_schedule("linear", plan.steps, warmup=0.1, final=0.0),
        seed=plan.seed,
        world=World.single(model.device),
    )
    rows = []
    try:
        with deterministic(is_exact(None, model.device)):
            for one in trainer.steps(plan.steps):
                rows.append(
                    {"step": one.step, "loss": one.loss, "lr": one.lr, "repeat": one.logs.get("repeat", np.nan)}
                )
                tell(f"step {one.step + 1} of {plan.steps}: loss {one.loss:.3f}", (one.step + 1) / plan.steps)
    finally:
        model.hf.eval().requires_grad_(False)
    return pd.DataFrame(rows)


def told(plan: DittoPlan) -> dict[str, Any]:
    """The plan, for a record."""
    return asdict(plan)
