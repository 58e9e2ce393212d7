"""How well a model learns a language in its context, and whose guesses its own are like (Akyürek et al. 2024).

Every guess is a distribution over the symbols, given that the string goes on, held against the edges of the state the
row's automaton is in (`corpus.automata`):

    valid      the likeliest symbol is one of the edges
    tvd        1/2 sum_w |p(w) - p*(w)|, to the true distribution p*

Readers to compare with know the row's tokens alone: n-gram learners of order 1 to 4 with Witten and Bell's back-off,

    P_n(w | h) = (c(h w) + T(h) P_{n-1}(w | h')) / (c(h) + T(h)),       P_0 uniform over the symbols,

c counts in the row so far, T(h) the number of different symbols seen after h, h' = h without its first token; contexts
reach back to the string's beginning and no further. Whose guesses a model's are like is the mean TVD between the two.

Paper: arXiv 2401.12973, sec. 4 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.corpus.automata import RegularLanguages
from vesalius.errors import VesaliusError
from vesalius.model import Intervention, Model, Site
from vesalius.model.intervene import taps
from vesalius.parts import Part
from vesalius.scores import bootstrap_mean

Floats = NDArray[np.float64]
ORDERS = (1, 2, 3, 4)
BINS = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 10**9))  # strings complete before a symbol
ROWS = 32
UNIFORM = "uniform"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompts:
    """Rows to be read, and what is true of them.

    Attributes:
        ids: (row, pos), what is read. following: (row, pos), what comes next. scored: (row, pos), whether that is a
            symbol. truth: (row, pos, symbol), its distribution. said: (row, pos), strings complete before it.
    """

    ids: NDArray[np.int64]
    following: NDArray[np.int64]
    scored: NDArray[np.bool_]
    truth: Floats
    said: NDArray[np.int64]


def prompts_of(task: RegularLanguages, step: int = 0) -> Prompts:
    """The rows of a step of the task."""
    batch, rows = task.told(step)
    truth = np.stack([a.next[s] for a, s in zip(rows.languages, rows.states[:, :-1], strict=True)])
    ids = batch.ids
    return Prompts(ids[:, :-1], ids[:, 1:], ids[:, 1:] != task.separator, truth, rows.said[:, 1:])


def ngram_learner(ids: NDArray[np.int64], order: int, symbols: int) -> Floats:
    """What an n-gram learner says at every position from the row up to there, (row, pos, symbol).

    Args:
        ids: (row, pos): symbols from 0, and `symbols` itself between strings. order: 1 for the symbols' own
            frequencies, 2 for the last token, ...

    Example:
        >>> ngram_learner(np.array([[2, 0, 1, 0]]), 2, 2)[0, 3].tolist()      # 0 was followed by 1, once
        [0.1666..., 0.8333...]
    """
    rows, length = ids.shape
    now = torch.from_numpy(ids)
    target = torch.full_like(now, symbols)
    target[:, :-1] = now[:, 1:]
    target = torch.nn.functional.one_hot(target, symbols + 1)[..., :symbols].double()  # (row, pos, symbol)
    alike = torch.ones(rows, length, length, dtype=torch.bool).tril(-1)  # (row, query, earlier)
    p = torch.full((rows, length, symbols), 1 / symbols, dtype=torch.float64)
    context, ended = now.clone(), torch.zeros_like(now, dtype=torch.bool)
    for n in range(1, order + 1):
        if n > 1:  # one more token has to be the same; before the string's beginning there is nothing
            token = torch.where(ended, symbols, context)
            alike = alike & (token[:, :, None] == token[:, None, :])
            ended = ended | (token == symbols)
            context = torch.nn.functional.pad(context, (1, 0), value=symbols)[:, :-1]
        counts = alike.double() @ target  # (row, pos, symbol)
        kinds = (counts > 0).sum(-1, keepdim=True).double()
        total = counts.sum(-1, keepdim=True) + kinds
        p = torch.where(total > 0, (counts + kinds * p) / total.clamp(min=1), p)
    return p.numpy()


def model_guesses(
    model: Model, ids: NDArray[np.int64], symbols: int, run: Callable[[Tensor], Tensor | None] | None = None
) -> Floats:
    """A model's distribution over the symbols at every position, (row, pos, symbol).

    Args:
        run: gives logits of rows; the plain model if None.
    """
    found = []
    for group in torch.from_numpy(ids).split(ROWS):
        logits = model.logits(group) if run is None else run(group)
        assert logits is not None
        found.append(torch.softmax(logits[..., :symbols].double(), dim=-1).cpu().numpy())
    return np.concatenate(found)


def check_model(model: Model, task: RegularLanguages) -> None:
    """Refuses models that cannot read the task.

    Raises:
        VesaliusError: for models that are not causal, or know fewer tokens.
    """
    size = int(model.hf.config.vocab_size)
    if model.kind != "causal" or size < task.vocab_size:
        raise VesaliusError(
            f"{model.name} ({model.kind}, {size} tokens) cannot read icll ({task.vocab_size} tokens, next one asked); "
            "train a causal model on it (`vesalius train icll`)"
        )


@dataclass(frozen=True)
class Benchmark:
    """What readers make of the same prompts.

    Attributes:
        readers: reader, tvd, valid, right (each a mean over rows, with tvd_low, tvd_high, valid_low, valid_high), and
            away: mean TVD between this reader and the model.
        by_strings: reader, strings (complete before), n, tvd, valid.
        rows: TVD of every reader in each row, by name.
    """

    readers: pd.DataFrame
    by_strings: pd.DataFrame
    rows: Mapping[str, Floats]

    @property
    def nearest(self) -> str:
        """The learner whose guesses the model's are nearest to."""
        learners = self.readers[self.readers["reader"].str.endswith("-gram")]
        return str(learners.sort_values("away", kind="stable")["reader"].iloc[0])


def tvd(p: Floats, q: Floats) -> Floats:
    """Total variation distance over the last axis."""
    found: Floats = 0.5 * np.abs(p - q).sum(-1)
    return found


def by_row(values: Floats, where: NDArray[np.bool_]) -> Floats:
    """Means over the positions of each row, (row,)."""
    found: Floats = (values * where).sum(1) / np.maximum(where.sum(1), 1)
    return found


def measure(model: Model, task: RegularLanguages, steps: int = 2, seed: int = 0) -> Benchmark:
    """Reads rows of the task with the model and with every reader.

    Args:
        task: `task.rows` languages a step. steps: of it. seed: of the intervals.

    Example:
        >>> task = RegularLanguages(rows=64, split="test")                   # doctest: +SKIP
        >>> measure(model, task).readers[["reader", "tvd", "valid"]]         # doctest: +SKIP
    """
    check_model(model, task)
    parts = [prompts_of(task, step) for step in range(steps)]
    p = Prompts(*(np.concatenate([getattr(x, f) for x in parts]) for f in Prompts.__dataclass_fields__))
    guesses: dict[str, Floats] = {"model": model_guesses(model, p.ids, task.symbols)}
    guesses |= {f"{n}-gram": ngram_learner(p.ids, n, task.symbols) for n in ORDERS}
    guesses[UNIFORM] = np.full_like(p.truth, 1 / task.symbols)
    readers, bins, rows = [], [], {}
    for name, q in guesses.items():
        best = q.argmax(-1)
        legal = np.take_along_axis(p.truth, best[..., None], axis=-1)[..., 0] > 0
        if name == UNIFORM:  # no symbol is likeliest: one by chance
            legal = (p.truth > 0).mean(-1)
        far = tvd(q, p.truth)
        rows[name] = by_row(far, p.scored)
        valid = by_row(legal.astype(np.float64), p.scored)
        right = by_row((best == p.following).astype(np.float64), p.scored)
        away = by_row(tvd(q, guesses["model"]), p.scored)
        (low, high), (least, most) = bootstrap_mean(rows[name], seed), bootstrap_mean(valid, seed)
        readers.append(
            {"reader": name, "tvd": rows[name].mean(), "tvd_low": low, "tvd_high": high, "valid": valid.mean(),
             "valid_low": least, "valid_high": most, "right": 1 / task.symbols if name == UNIFORM else right.mean(),
             "away": away.mean()}
        )  # fmt: skip
        for first, last in BINS:
            here = p.scored & (p.said >= first) & (p.said <= last)
            if here.any():
                told = f"{first}" if first == last else f"{first} to {last}" if last < 10**9 else f"{first} or more"
                bins.append({"reader": name, "strings": told, "n": int(here.sum()), "tvd": far[here].mean(),
                             "valid": legal[here].mean()})  # fmt: skip
    return Benchmark(pd.DataFrame(readers).astype({"tvd": float}), pd.DataFrame(bins), rows)


def without_heads(model: Model, task: RegularLanguages, step: int = 0) -> tuple[float, dict[str, float]]:
    """TVD of the whole model, and without each head: its output replaced by its mean over the prompts' tokens."""
    p = prompts_of(task, step)
    ids = torch.from_numpy(p.ids)

    def far(run: Callable[[Tensor], Tensor | None] | None) -> float:
        return float(by_row(tvd(model_guesses(model, p.ids, task.symbols, run), p.truth), p.scored).mean())

    found = {}
    with model.alone():
        for layer in range(model.n_layers):
            site = Site("z", layer, model.anatomy.main.prefix)
            mean = torch.stack([model.run(group, capture=[site])[site].mean((0, 1)) for group in ids.split(ROWS)]).mean(
                0
            )  # (head, d_head)
            for head in range(model.n_heads):
                part = Part("head", layer, head, stack=model.anatomy.main.prefix)
                change = [Intervention(part, value=mean[head])]

                def run(group: Tensor, change: list[Intervention] = change) -> Tensor | None:
                    return model.run(group, taps=taps([change], rows=len(group))).logits

                found[str(part)] = far(run)
        return far(None), found
