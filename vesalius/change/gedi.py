"""GeDi: a small class-conditional model steers a larger one, by Bayes' rule over all next tokens at once.

The guide reads the text after a code c and after the anti-code. With t tokens so far and v the next one,

    P(c | x_1:t, v) = softmax over the codes of ( a / (t + 1) * sum_j log P(x_j | x_<j, c) + b_c )

where the sum runs over x_1 .. x_t and v. The mean over the length keeps the posterior from saturating; a and b_c were
learned with the guide. Two forward passes of the guide give it for every v of the vocabulary; a classifier of whole
texts would need one for each. The larger model's distribution becomes

    P_w(v) ~ P(v) P(c | x_1:t, v)^w

and then, by falling posterior, the worst tokens go: those that hold less than `filter_p` of P_w together, unless their
own posterior is at least `target_p`. Guide and model must share a tokenizer.

Krause et al. 2020, arXiv 2009.06367 (EMNLP Findings 2021). Its settings: w 30, filter_p 0.8, target_p 0.8, greedy, a
repetition penalty of 1.2 on scores whose largest is shifted to 10 (`Repetition`, put before GeDi).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LogitsProcessor

from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.model.decode import Reader, left_padded
from vesalius.records import read_json
from vesalius.train.objectives.gedi import FILE
from vesalius.train.objectives.special import one_token

Ids = tuple[int, ...]


class Prefixes(NamedTuple):
    """What the guide reads before a text: for the class that is wanted, and against it."""

    wanted: Ids
    against: Ids


@dataclass(frozen=True)
class Guide:
    """A class-conditional model and what it learned beside its weights.

    Attributes:
        model: the guide. codes, ids: the two codes and their tokens. topics: those it was trained on; none for a guide
            whose codes are the classes themselves. scale: a. biases: b of the two codes.
    """

    model: Model
    codes: tuple[str, str]
    ids: tuple[int, int]
    topics: tuple[str, ...] = ()
    scale: float = 1.0
    biases: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def load(cls, spec: str | Path, model: Model | None = None) -> Guide:
        """A guide that `vesalius steer --train` or the objective `gedi` made: a checkpoint's folder, or `RUN@last`.

        Raises:
            VesaliusError: if it is no guide.
        """
        import vesalius
        from vesalius.model.sources import resolve

        folder = Path(resolve(str(spec)).folder)
        if not (folder / FILE).exists():
            raise VesaliusError(f"{spec} has no {FILE}, so it is no guide; train one with `vesalius steer --train`")
        told = read_json(folder / FILE, "train the guide again")
        return cls(
            model or vesalius.open(str(spec)), tuple(told["codes"]), tuple(told["ids"]), tuple(told["topics"]),
            float(told["scale"]), tuple(told["biases"]),
        )  # fmt: skip

    @property
    def classes(self) -> tuple[str, ...]:
        """What it was trained to steer toward."""
        return self.topics or self.codes

    def prefixes(self, toward: str) -> Prefixes:
        """What is read before a text to steer toward a class.

        A topic that the guide was not trained on may be asked for, if its word is one token.

        Raises:
            UnknownName: for a class that a guide without topics does not have.
        """
        if self.topics:
            topic = one_token(self.model.tokenizer, toward, self.codes[0])
            return Prefixes((self.ids[0], topic), (self.ids[1], topic))
        if toward not in self.codes:
            raise UnknownName("class of this guide", toward, self.codes)
        at = self.codes.index(toward)
        return Prefixes((self.ids[at],), (self.ids[1 - at],))


class Gedi(LogitsProcessor):
    """Steers toward a class, in `generate` and in the decoding stack.

    Args:
        guide: a `Guide`. toward: one of its classes, or a topic it never saw.
        model: the one that is steered; its tokenizer must be the guide's.
        w: weight of the posterior. filter_p, target_p: see the module; filter_p 0 drops nothing.
        prompt: whether what was given counts as text of the class, as in x_1:t; otherwise the mean is over what is
            written alone.
        cached: False reads everything again at each step.

    Attributes:
        reader: what the guide has read; `reader.row_passes` counts passes over single rows.
        posterior: of every next token at the last call, (row, vocabulary).

    Raises:
        VesaliusError: if the tokenizers differ, or a setting is out of range.
    """

    def __init__(
        self,
        guide: Guide,
        toward: str,
        model: Model | None = None,
        *,
        w: float = 30.0,
        filter_p: float = 0.8,
        target_p: float = 0.8,
        prompt: bool = True,
        cached: bool = True,
    ) -> None:
        if w < 0 or not 0 <= filter_p < 1 or not 0 <= target_p <= 1:
            raise VesaliusError(f"w {w}, filter_p {filter_p}, target_p {target_p}: give w >= 0, shares from 0 to 1")
        if model is not None:
            same_tokenizer(model, guide.model)
        self.guide, self.w, self.filter_p, self.target_p, self.prompt = guide, w, filter_p, target_p, prompt
        self.prefixes = guide.prefixes(toward)
        at = [guide.ids.index(p[0]) for p in self.prefixes]
        self._bias = guide.biases[at[0]] - guide.biases[at[1]]
        self.reader = Reader(guide.model, cached)
        self.posterior: Tensor = torch.zeros(0)
        self._known: dict[Ids, tuple[Tensor, int, Tensor]] = {}  # sums (code,), tokens, next log-probs (code, vocab)
        self._pad = getattr(guide.model.tokenizer, "pad_token_id", None)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (row, vocabulary) of rows that may be padded on the left with the tokenizer's pad token."""
        rows = input_ids.tolist()
        if self._pad is not None:
            rows = [row[next((i for i, t in enumerate(row) if t != self._pad), 0) :] for row in rows]
        return self.on_rows(rows, scores)

    def on_rows(self, rows: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """Scores of rows without padding."""
        self._read(rows)
        gaps = torch.stack([self._gap(tuple(row)) for row in rows]).to(scores)  # (row, vocabulary)
        size = scores.shape[-1]
        gaps = torch.nn.functional.pad(gaps, (0, max(0, size - gaps.shape[-1])), value=-torch.inf)[:, :size]
        self.posterior = gaps.sigmoid()
        weighted = scores + self.w * logsigmoid(gaps) if self.w else scores
        return self._filtered(weighted) if self.filter_p else weighted

    def _filtered(self, scores: Tensor) -> Tensor:
        share = scores.softmax(-1)
        order = self.posterior.argsort(dim=-1, stable=True)  # from the worst
        below = share.gather(-1, order).cumsum(-1) < self.filter_p
        drop = torch.zeros_like(below).scatter(-1, order, below) & (self.posterior < self.target_p)
        drop.scatter_(-1, scores.argmax(-1, keepdim=True) if bool(drop.all(-1).any()) else order[:, -1:], False)
        return scores.masked_fill(drop, -torch.inf)

    def _gap(self, row: Ids) -> Tensor:
        """Log-odds of the class after each next token, (vocabulary,)."""
        sums, count, after = self._known[row]
        return self.guide.scale * ((sums[0] + after[0]) - (sums[1] + after[1])) / (count + 1) + self._bias

    def _read(self, rows: Sequence[Sequence[int]]) -> None:
        """Brings the guide to these rows under both codes, each with its sum of log-probabilities."""
        wanted, against = self.prefixes
        readings = [[*p, *row] for row in rows for p in (wanted, against)]  # (row code)
        ids, mask = left_padded(readings)
        logs = self.reader.follow(ids, mask).log_softmax(-1)
        known: dict[Ids, tuple[Tensor, int, Tensor]] = {}
        for i, row in enumerate(rows):
            key, mine = tuple(row), logs[2 * i : 2 * i + 2]
            if mine.dim() == 2:
                sums, count, before = self._known[key[:-1]]
                known[key] = (sums + before[:, key[-1]], count + 1, mine)
                continue
            n, parent = len(key), self._known.get(key[:-1])
            if parent is not None:  # read anew, and not at its beginning
                known[key] = (parent[0] + parent[2][:, key[-1]], parent[1] + 1, mine[:, -1])
            elif self.prompt and n:
                token = torch.tensor(key, device=mine.device).expand(2, n)[..., None]
                known[key] = (mine[:, -n - 1 : -1].gather(-1, token)[..., 0].sum(-1), n, mine[:, -1])
            else:
                known[key] = (torch.zeros(2, device=mine.device), 0, mine[:, -1])
        self._known = known


class Repetition(LogitsProcessor):
    """The repetition penalty of GeDi's experiments: tokens that a row has already are made less likely.

        s' = s - max s + scale,   s'(v) = s'(v) / penalty if positive, s'(v) * penalty if not, for v in the row

    Shifted so, the penalty does not depend on where a model's logits lie. Keskar et al. 2019, arXiv 1909.05858.
    """

    def __init__(self, penalty: float = 1.2, scale: float = 10.0) -> None:
        if penalty < 1 or scale < 0:
            raise VesaliusError(f"penalty {penalty} and scale {scale}: give 1 or more, and 0 or more")
        self.penalty, self.scale = penalty, scale

    def on_rows(self, rows: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """Scores of rows without padding."""
        shifted = scores - scores.amax(-1, keepdim=True) + self.scale
        seen = torch.zeros_like(shifted, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, list(set(row))] = True
        less = torch.where(shifted > 0, shifted / self.penalty, shifted * self.penalty)
        return torch.where(seen, less, shifted)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of rows (row, pos)."""
        return self.on_rows(input_ids.tolist(), scores)


def same_tokenizer(model: Model, guide: Model) -> None:
    """Refuses a guide that reads other tokens than the model writes."""
    a: Any = model.tokenizer
    b: Any = guide.tokenizer
    if a is None or b is None or a.get_vocab() != b.get_vocab():
        raise VesaliusError(
            f"{model.name} and the guide {guide.name} do not share a tokenizer, and GeDi weighs token by token; "
            f"train a guide with this model's: vesalius steer --train FILE --model {model.spec}"
        )
