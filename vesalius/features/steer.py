"""Steering a language model by an axis: by dropping next tokens that lead the wrong way, or by pushing its states.

`AxisGuard` (Schramowski et al. 2022, arXiv 2103.11790) works with any language model and an axis of an *encoder*: of
the k likeliest next tokens those stay whose continuation scores at least t, and the best one if none does. `pushed`
adds the axis of the *same* model to its residual stream at one block (Turner et al. 2023, arXiv 2308.10248). Both go
with `model.hf.generate`:

    generate(**inputs, logits_processor=[AxisGuard(axis, encoder, model.tokenizer)])
    with pushed(model, axis, 2.0): generate(**inputs)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from vesalius.errors import VesaliusError
from vesalius.features.directions import Axis
from vesalius.features.vectors import layer_of
from vesalius.model import Intervention, Model
from vesalius.model.hooks import Hooks
from vesalius.parts import Part

REMEMBERED = 100_000  # judged texts kept: about 10 MB
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")

Scope = Literal["sentence", "text"]


class AxisGuard(LogitsProcessor):
    """Keeps those of the k likeliest next tokens that lead to text above a threshold on an axis.

    Args:
        axis: of the concept, found in `judge`; best with no templates, since running text is judged.
        judge: the encoder. tokenizer: of the model that writes.
        threshold: least score, in the axis's units (the clearest labelled phrase has 1).
        top_k: candidates a step; all other tokens are ruled out.
        scope: judge the `sentence` being written, or the whole `text` so far.
        draw: without a generator all candidates are judged, and `generate` chooses among those kept. With one the guard
            draws the token itself (temperature 1) and judges candidates in the order of the draw until one is good
            enough: the same distribution for a fraction of the judging.

    Attributes:
        candidates, dropped, rescued: tokens judged, ruled out by the threshold, and steps on which only the best of
            the ruled-out ones was kept.
    """

    def __init__(
        self,
        axis: Axis,
        judge: Model,
        tokenizer: Any,
        *,
        threshold: float = 0.0,
        top_k: int = 20,
        scope: Scope = "sentence",
        draw: torch.Generator | None = None,
    ) -> None:
        axis.check(judge)
        if top_k < 1:
            raise VesaliusError(f"top_k {top_k} leaves no candidate; give 1 or more")
        if math.isnan(threshold):
            raise VesaliusError("threshold nan is no score; give a number, such as 0")
        self.axis, self.judge, self.tokenizer = axis, judge, tokenizer
        self.threshold, self.top_k, self.scope, self.draw = threshold, top_k, scope, draw
        self.candidates = self.dropped = self.rescued = 0
        self._known: dict[str, float] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (row, vocabulary) with everything but the kept candidates at minus infinity."""
        k = min(self.top_k, scores.shape[-1])
        values, tokens = scores.topk(k, dim=-1)  # (row, candidate)
        possible = torch.isfinite(values)
        before = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        whole = torch.cat([input_ids.repeat_interleave(k, 0), tokens.reshape(-1, 1)], dim=1)
        after = self.tokenizer.batch_decode(whole, skip_special_tokens=True)
        texts = [self._judged(before[i // k], text) for i, text in enumerate(after)]  # (row * candidate)
        keep = self._kept(texts, possible) if self.draw is None else self._drawn(texts, possible, values)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, values.masked_fill(~keep, -torch.inf))

    def _kept(self, texts: list[str], possible: Tensor) -> Tensor:
        """Which candidates stay, (row, candidate): those above the threshold, or the best."""
        judged = torch.tensor(self._scores(texts), device=possible.device).view(possible.shape)
        good = (judged >= self.threshold) & possible
        best = torch.zeros_like(good)
        best.scatter_(1, judged.masked_fill(~possible, -torch.inf).argmax(1, keepdim=True), True)
        none = ~good.any(1, keepdim=True)
        self.candidates += int(possible.sum())
        self.dropped += int((possible & ~good).sum())
        self.rescued += int(none.sum())
        return torch.where(none, best, good)

    def _drawn(self, texts: list[str], possible: Tensor, values: Tensor) -> Tensor:
        """One candidate of each row: the first good one in the order of logits with Gumbel noise, or the best."""
        rows, k = possible.shape
        noise = torch.empty(rows, k).exponential_(generator=self.draw).log()
        order = (values.float().cpu() - noise).argsort(dim=1, descending=True).tolist()
        left = possible.sum(1).tolist()  # impossible ones have logits of minus infinity and come last
        best = [(-np.inf, order[i][0]) for i in range(rows)]
        waiting = list(range(rows))
        for place in range(k):
            waiting = [i for i in waiting if place < left[i] and best[i][0] < self.threshold]
            judged = self._scores([texts[i * k + order[i][place]] for i in waiting])
            for i, score in zip(waiting, judged, strict=True):
                best[i] = max(best[i], (score, order[i][place]))
            self.candidates += len(waiting)
            self.dropped += sum(score < self.threshold for score in judged)
        self.rescued += sum(score < self.threshold for score, _ in best)
        keep = torch.zeros_like(possible)
        keep[range(rows), [at for _, at in best]] = True
        return keep

    def _judged(self, before: str, after: str) -> str:
        """The part of the text that is judged: with `sentence`, from where the sentence being written began."""
        if self.scope == "text":
            return after.strip()
        begun = [m.end() for m in _END.finditer(before)]
        return after[begun[-1] if begun else 0 :].strip()

    def _scores(self, texts: list[str]) -> list[float]:
        """Scores from memory where known; a text without a word yet, or with half a character, is no offence."""
        wordy = [t for t in dict.fromkeys(texts) if any(c.isalnum() for c in t)]
        if len(self._known) + len(wordy) > REMEMBERED:
            self._known.clear()
        new = [t for t in wordy if t not in self._known]
        if new:
            self._known.update(zip(new, self.axis.score(self.judge, new).tolist(), strict=True))
        return [self._known.get(t, np.inf) for t in texts]


@contextmanager
def pushed(model: Model, axis: Axis, strength: float = 1.0, layer: int | None = None) -> Iterator[None]:
    """Adds `strength` times the difference of the two poles, along the axis, to the residual stream, at every position.

    Args:
        model: the axis's own model. strength: 1 is the distance between the poles' means; negative for the other way.
        layer: the block after which it is added; the one the axis was read at if None.

    Raises:
        VesaliusError: if the axis is of another model, or was not read from the residual stream of a block.
    """
    axis.check(model)
    if not math.isfinite(strength):
        raise VesaliusError(f"a push of {strength:g} leaves no state to go on from; give a number, such as 2 or -2")
    if axis.reading.site != "resid_post" or axis.reading.pool in ("table", "sentence"):
        raise VesaliusError(
            f"an axis read at '{axis.reading}' is not a direction of a block's residual stream; find it with mean@LAYER"
        )
    at = layer_of(model, layer if layer is not None else int(axis.reading.layer or 0))
    push = torch.from_numpy(axis.vector).float() * (strength * axis.gap)
    change = Intervention(Part("resid_post", at, stack=model.anatomy.main.prefix), "add", push)
    with model.alone(), Hooks(model.hf, model.anatomy, {change.where.site: [change.changed]}):
        yield
