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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.change.edit import Edit, recording
from vesalius.errors import VesaliusError
from vesalius.evaluate.recite import recite
from vesalius.model import Model
from vesalius.model.memory import memory_errors
from vesalius.scores import bootstrap_mean
from vesalius.train.learning import Tell, TextRows, check_steps, learn
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.ditto import LONGEST, SHORTEST, sentence_ends
from vesalius.train.objectives.special import needs_for
from vesalius.train.select import choose

_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+|\n|$)")


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
    room = model.n_positions or 10**9
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


def loops(
    model: Model,
    rows: Tensor,
    prompt: int = 32,
    continuation: int = 128,
    progress: Callable[[int, int], object] | None = None,
) -> Loops:
    """Greedy continuations of rows of text.

    Args:
        model: causal. rows: (row, prompt or more) ids. prompt: tokens given. continuation: tokens written.
        progress: told (rows done, rows in all).
    """
    filled = torch.cat([rows[:, :prompt], torch.zeros(len(rows), continuation, dtype=rows.dtype)], 1)
    said = recite(model, filled, prompt, continuation, progress=progress).tokens
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
        check_steps(self.steps, self.rows, self.lr)


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
    made = make_objective("ditto", needs_for(model.hf, model.tokenizer), tokenizer=model.tokenizer, **settings)
    source = TextRows(text, plan.rows, plan.seed, int(model.hf.config.vocab_size))
    with recording(model, "ditto") as recorder:
        recorder.touch([n for n, _ in model.hf.named_parameters()], "trained against repeats")
        choose(model.hf)
        log = learn(model, source, made, plan.steps, plan.lr, plan.seed, tell=tell)
    return recorder.edit, log
