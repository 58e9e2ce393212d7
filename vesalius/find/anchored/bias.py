"""How far a model's letters follow the options' places rather than the options.

Measured on questions whose right option stands at each place equally often: how often each letter is chosen (the
likeliest of the letters), its distance from an even choice (total variation, and chi-square's p), accuracy by the
letter, and, beside it, accuracy by the options' own words after the bare question: what the model knows. Baseline:
prior calibration, the letters' log-probabilities less their mean over questions without content (Zhao et al. 2021,
arXiv 2102.09690).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from vesalius.errors import ModelError, TaskError, VesaliusError
from vesalius.find.anchored.questions import LETTERS, Choice
from vesalius.model import Model
from vesalius.model.hooks import Site, Tap
from vesalius.model.replay import Tape
from vesalius.model.sweep import BATCH
from vesalius.tasks.encode import Encoder

Floats = NDArray[np.float64]
Taps = dict[Site, list[Tap]]
EMPTY = ("N/A", "[MASK]", "nothing", "...")  # options without content


@dataclass(frozen=True)
class Bias:
    """What a model chose.

    Attributes:
        n: questions. choices: options of each. chosen: share of each place. variation: total variation from an even
            choice. p: of chi-square against an even choice. accuracy: by letter, with low and high (95 %, Wilson).
        calibrated, calibrated_variation: accuracy and variation after prior calibration. knows: accuracy by the
            options' own words; NaN if not asked. anchored: share of questions right elsewhere that get A.
    """

    n: int
    choices: int
    chosen: list[float]
    variation: float
    p: float
    accuracy: float
    low: float
    high: float
    calibrated: float
    calibrated_variation: float
    knows: float
    anchored: float


def letter_tokens(model: Model, choices: int) -> Tensor:
    """Tokens of " A", " B", ... after "Answer:", (letter,)."""
    encoder = encoder_of(model)
    found = [encoder.beyond("Answer:", f" {x}") or () for x in LETTERS[:choices]]
    if any(len(ids) != 1 for ids in found):
        raise VesaliusError(
            f"the letters A to {LETTERS[choices - 1]} after 'Answer:' are not one token each to this model's "
            "tokenizer; open another model"
        )
    return torch.tensor([ids[0] for ids in found])


def encoder_of(model: Model) -> Encoder:
    """Its tokenizer; refuses models that do not choose a next token."""
    if model.kind != "causal":
        raise ModelError(f"{model.name} is {model.kind}; multiple choice is asked of causal language models")
    if model.tokenizer is None:
        raise ModelError(f"{model.name} was opened without a tokenizer, and a question is text; open it with one")
    return Encoder(model.tokenizer)


@dataclass(frozen=True)
class Rows:
    """Prompts as tensors, padded on the left: ids and mask (row, pos), and where the letter is read (row, 1)."""

    ids: Tensor
    mask: Tensor
    reads: Tensor

    @property
    def n(self) -> int:
        return len(self.ids)

    def batches(self, size: int = BATCH) -> list[Rows]:
        """Consecutive rows."""
        return [
            Rows(self.ids[i : i + size], self.mask[i : i + size], self.reads[i : i + size])
            for i in range(0, self.n, size)
        ]


def rows_of(model: Model, prompts: Sequence[str]) -> Rows:
    """Prompts as one padded batch."""
    encoder = encoder_of(model)
    found = [(*encoder.prefix, *encoder.ids(p)) for p in prompts]
    width = max(map(len, found))
    most = model.n_positions
    if most and width > most:
        raise TaskError(f"a question has {width} tokens, and {model.name} reads at most {most}; shorten it")
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0
    ids = torch.tensor([[pad] * (width - len(f)) + list(f) for f in found])
    mask = torch.tensor([[0] * (width - len(f)) + [1] * len(f) for f in found])
    return Rows(ids, mask, torch.full((len(found), 1), width - 1))


@torch.no_grad()
def letter_logits(model: Model, questions: Sequence[Choice], taps: Taps | None = None) -> Floats:
    """Log-probabilities of the letters among themselves, (question, letter), with taps applied in the last pass."""
    tokens, found = letter_tokens(model, _choices(questions)), []
    for rows in rows_of(model, [q.prompt for q in questions]).batches():
        if taps:
            hidden = model.run(rows.ids, rows.mask, taps=taps, capture=[_last(model)])[_last(model)]
            hidden = hidden[torch.arange(rows.n), rows.reads[:, 0]]
        else:
            hidden = Tape(model, rows.ids, rows.mask, rows.reads).final[:, 0]
        found.append(model.readout(hidden, tokens).float().log_softmax(-1).cpu())
    out: Floats = torch.cat(found).double().numpy()
    return out


def _last(model: Model) -> Site:
    return Site("resid_post", model.n_layers - 1, model.anatomy.main.prefix)


def _choices(questions: Sequence[Choice]) -> int:
    sizes = {len(q.options) for q in questions}
    if len(sizes) != 1:
        raise VesaliusError(
            f"questions have {', '.join(map(str, sorted(sizes)))} options; ask those of one number at a time"
        )
    return sizes.pop()


def right_places(questions: Sequence[Choice]) -> NDArray[np.int64]:
    """Where the right option stands, (question,)."""
    return np.array([q.right for q in questions])


def variation(chosen: NDArray[np.int64], choices: int) -> float:
    """Total variation of the places chosen from an even choice: 0 to 1 - 1 / choices."""
    share = np.bincount(chosen, minlength=choices) / len(chosen)
    return float(0.5 * np.abs(share - 1 / choices).sum())


def content_free(questions: Sequence[Choice]) -> list[Choice]:
    """The same questions' form without content, one for each empty word."""
    size = _choices(questions)
    return [Choice("Which of these is it?", (word,) * size, 0) for word in EMPTY]


def bias(logits: Floats, questions: Sequence[Choice], prior: Floats, knows: float = float("nan")) -> Bias:
    """What letters' log-probabilities (question, letter) say; `prior` (letter,): those without content."""
    choices, right = logits.shape[1], right_places(questions)
    chosen, better = logits.argmax(1), (logits - prior).argmax(1)
    counts = np.bincount(chosen, minlength=choices)
    hits = chosen == right
    wilson = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    away = right != 0
    return Bias(
        len(right), choices, (counts / len(right)).tolist(), variation(chosen, choices),
        float(stats.chisquare(counts).pvalue),
        float(hits.mean()), float(wilson.low), float(wilson.high), float((better == right).mean()),
        variation(better, choices), knows, float((chosen[away] == 0).mean()) if away.any() else float("nan"),
    )  # fmt: skip


def prior_of(model: Model, questions: Sequence[Choice], taps: Taps | None = None) -> Floats:
    """Mean log-probability of each letter where there is no content, (letter,)."""
    found: Floats = letter_logits(model, content_free(questions), taps).mean(0)
    return found


@torch.no_grad()
def knowledge(model: Model, questions: Sequence[Choice]) -> Floats:
    """Mean log-probability per token of each option's own words after the bare question, (question, option)."""
    encoder, texts, spans = encoder_of(model), [], []
    for q in questions:
        before = (*encoder.prefix, *encoder.ids(q.open))
        for option in q.options:
            tail = encoder.beyond(q.open, f" {option}") or encoder.ids(f" {option}")
            texts.append((*before, *tail))
            spans.append(len(tail))
    out: list[float] = []
    for lo in range(0, len(texts), BATCH):
        some, sizes = texts[lo : lo + BATCH], spans[lo : lo + BATCH]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(t)) + list(t) for t in some])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in some])
        most = max(sizes)
        reads = torch.arange(width - 1 - most, width - 1).expand(len(some), -1)
        logp = model.readout(Tape(model, ids, mask, reads).final).float().log_softmax(-1)
        each = logp.gather(-1, ids[:, width - most :, None])[..., 0]  # (row, most)
        out += [float(each[i, most - k :].mean()) for i, k in enumerate(sizes)]
    return np.array(out).reshape(len(questions), -1)


def known(scores: Floats, questions: Sequence[Choice]) -> float:
    """Share of questions whose right option's words are likeliest."""
    return float((scores.argmax(1) == right_places(questions)).mean())
