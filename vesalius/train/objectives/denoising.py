"""Denoisers: fill in spans, or go on from a prefix, each row by a denoiser drawn for it.

    span corruption   T5 (arXiv 1910.10683): 15 % of tokens, spans of 3 on average; cell MLM of arXiv 2204.05832
    mixtures          UL2 (arXiv 2205.05131), UL2R (arXiv 2210.11399): regular, sequential and extreme denoising

`splice` undoes it: inputs and targets give the text back, token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Sample, generator
from vesalius.train.objectives.losses import token_loss
from vesalius.train.objectives.ragged import (
    Bools,
    Floats,
    Ints,
    Texts,
    sample_of,
    span_counts,
    span_noise,
    split,
    texts,
)
from vesalius.train.objectives.special import MODES, require, sentinel_ids

Attention = Literal["prefix", "causal"]


@dataclass(frozen=True)
class Denoiser:
    """One way of making a text into inputs and targets.

    Attributes:
        kind: `R` regular, `X` extreme: spans; `S` sequential: the end of the text is foretold from its beginning.
        rate: share of tokens that are noise; None (S only): any share, drawn uniformly for each text.
        span: mean length of a span; not used by S.
        weight: how often it is drawn, relative to the others.
    """

    kind: Literal["R", "S", "X"]
    rate: float | None
    span: float = 3.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        settings.choice("denoiser", "kind", self.kind, ("R", "S", "X"))
        settings.number("denoiser", "span", self.span, 1)
        settings.number("denoiser", "weight", self.weight, 0)
        if self.rate is not None:
            settings.number("denoiser", "rate", self.rate, 0.0, 0.95)
        elif self.kind != "S":
            raise VesaliusError(f"denoiser {self.kind} needs a rate, the share of tokens that are noise")


MIXTURES: dict[str, tuple[Denoiser, ...]] = {
    # U-PaLM: half S, a quarter R, a quarter X, which is "mean span 32 or rate up to 50 %": here either, equally often
    "ul2r": (
        Denoiser("S", None, weight=0.5),
        Denoiser("R", 0.15, 3, weight=0.25),
        Denoiser("X", 0.15, 32, weight=0.125),
        Denoiser("X", 0.50, 3, weight=0.125),
    ),
    # UL2: seven, equally often
    "ul2": (
        Denoiser("R", 0.15, 3),
        Denoiser("R", 0.15, 8),
        Denoiser("S", 0.25),
        Denoiser("X", 0.50, 3),
        Denoiser("X", 0.50, 8),
        Denoiser("X", 0.15, 64),
        Denoiser("X", 0.50, 64),
    ),
}


@dataclass(frozen=True)
class _Drawn:
    """A denoiser for every example."""

    rate: Floats
    span: Floats
    is_sequential: Bools
    modes: Ints

    def __getitem__(self, keep: Bools) -> _Drawn:
        return _Drawn(self.rate[keep], self.span[keep], self.is_sequential[keep], self.modes[keep])

    def counts(self, lengths: Ints) -> tuple[Ints, Ints]:
        """(noise tokens, sentinels) of texts of these lengths."""
        noise, spans = span_counts(lengths, self.rate, self.span)
        return noise, np.where(self.is_sequential, 0, spans)


@dataclass(frozen=True)
class Mixture:
    """Objective `ul2`: each text is denoised by one denoiser of a mixture, drawn for it.

    For a decoder inputs and targets are joined before rows are filled up; a text too long for its row with its
    sentinels is cut at the end, so that rows stay as long as they came (R keeps about 10 in 11 tokens, X with rate .5
    and spans of 3 about 3 in 4). Loss is on targets alone.

    Attributes:
        needs: sentinels `sentinel_0`, ...; modes `mode_r`, `mode_s`, `mode_x`.
        mixture: a name in `MIXTURES`, or a list of denoisers (mappings with kind, rate, span, weight).
        mask: `prefix`: inputs are read both ways (non-causal decoder); `causal`: everything from the left.
        mode_tokens: whether a text begins with the token of its denoiser's kind.
        end: whether targets end with eos.
        cross_document: `allow`: a row is one text; `mask`: each document of a row is its own.
        restart_positions: count positions from the start of each text.
        z_loss: penalty of log^2 Z, see `losses`.
        chunk: rows whose float32 logits exist at once, see `losses`.
    """

    needs: Needs
    mixture: str | Sequence[Any] = "ul2r"
    mask: Attention = "prefix"
    mode_tokens: bool = True
    end: bool = True
    cross_document: Literal["allow", "mask"] = "allow"
    restart_positions: bool = False
    z_loss: float = 0.0
    chunk: int = 0
    denoisers: tuple[Denoiser, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._prepare("ul2", _denoisers(self.mixture))
        if self.mode_tokens:
            for kind in {d.kind for d in self.denoisers}:
                require(self.needs, f"mode_{kind.lower()}", "objective 'ul2' with mode_tokens")

    def _prepare(self, name: str, denoisers: tuple[Denoiser, ...]) -> None:
        settings.kinds(name, self.needs.kind, ("causal", "encoder-decoder"))
        settings.choice(name, "mask", self.mask, ("prefix", "causal"))
        settings.choice(name, "cross_document", self.cross_document, ("allow", "mask"))
        settings.flag(name, "mode_tokens", self.mode_tokens)
        settings.flag(name, "end", self.end)
        settings.number(name, "z_loss", self.z_loss, 0)
        settings.whole(name, "chunk", self.chunk, 0)
        object.__setattr__(self, "denoisers", denoisers)
        if any(d.kind != "S" for d in denoisers):
            require(self.needs, "sentinel_0", f"objective '{name}'")

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Inputs and targets of the whole batch; see `Objective.sample`."""
        rng = generator(seed, batch.step)
        given = texts(batch, by_document=self.cross_document == "mask")
        drawn = self._draw(given, rng)
        given, drawn = self._cut(given, drawn, batch.ids.shape[1])
        noise = self._noise(given, drawn, rng)
        inputs, told = split(given, noise, sentinel_ids(self.needs), ~drawn.is_sequential, drawn.modes, self._eos())
        return sample_of(given, inputs, told, self.needs, self.mask, self.restart_positions)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`."""
        return token_loss(outputs.logits, sample, self.z_loss, self.chunk)

    def _eos(self) -> int | None:
        return self.needs.special.get("eos") if self.end else None

    def _draw(self, given: Texts, rng: np.random.Generator) -> _Drawn:
        n = len(given.lengths)
        weights = np.array([d.weight for d in self.denoisers], dtype=np.float64)
        which = rng.choice(len(weights), size=n, p=weights / weights.sum())
        uniform = rng.random(n)
        rates = np.array([np.nan if d.rate is None else d.rate for d in self.denoisers])[which]
        modes = [self.needs.special[f"mode_{d.kind.lower()}"] if self.mode_tokens else -1 for d in self.denoisers]
        return _Drawn(
            np.where(np.isnan(rates), uniform, rates),
            np.array([d.span for d in self.denoisers], dtype=np.float64)[which],
            np.array([d.kind == "S" for d in self.denoisers])[which],
            np.array(modes, dtype=np.int64)[which],
        )

    def _cut(self, given: Texts, drawn: _Drawn, room: int) -> tuple[Texts, _Drawn]:
        """Texts shortened at the row's end until a decoder's rows hold what is added; texts below two tokens left out.

        A joined row holds `room` tokens, of which the last is only foretold.
        """
        lengths = given.lengths.copy()
        if self.needs.kind != "encoder-decoder":
            extra = (drawn.modes >= 0).astype(np.int64) + (self._eos() is not None)
            first = np.searchsorted(given.rows, given.rows)

            def joined(of: Ints) -> Ints:
                return of + 2 * drawn.counts(of)[1] + extra

            whole = joined(lengths)
            before = np.cumsum(whole) - whole
            budget = room - (before - before[first])
            while (over := joined(lengths) - budget).max(initial=0) > 0 and (lengths > 1).any():
                step = np.where(over > 0, np.maximum(over // 2, 1), 0)  # half: its sentinels go with a token
                shorter = np.maximum(lengths - step, 1)
                if np.array_equal(shorter, lengths):
                    break
                lengths = shorter
        lengths[lengths < 2] = 0
        return given.first(lengths), drawn[lengths > 0]

    def _noise(self, given: Texts, drawn: _Drawn, rng: np.random.Generator) -> Bools:
        noise, spans = drawn.counts(given.lengths)
        drawn_noise = span_noise(given.lengths, noise, np.maximum(spans, 1), rng)
        if not drawn.is_sequential.any():
            return drawn_noise
        left = np.repeat(given.starts + given.lengths, given.lengths) - np.arange(len(given.ids))  # tokens to the end
        return np.where(drawn.is_sequential[given.owners], left <= np.repeat(noise, given.lengths), drawn_noise)


@dataclass(frozen=True)
class SpanCorruption(Mixture):
    """Objective `span-corruption`: every text has spans replaced by sentinels, and the spans are foretold.

    Attributes:
        rate: share of tokens that are noise.
        span: mean length of a span.
    """

    mode_tokens: bool = False
    rate: float = 0.15
    span: float = 3.0
    mixture: str | Sequence[Any] = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        settings.number("span-corruption", "rate", self.rate, 0.0, 0.95)
        settings.number("span-corruption", "span", self.span, 1)
        self._prepare("span-corruption", (Denoiser("R", self.rate, self.span),))
        if self.mode_tokens:
            require(self.needs, "mode_r", "objective 'span-corruption' with mode_tokens")


def splice(inputs: ArrayLike, targets: ArrayLike, needs: Needs) -> Ints:
    """The text again, from what was given and what was foretold, both as token ids without padding.

    Targets that begin with a sentinel fill the inputs' sentinels; others (S) go on from the inputs' end. Modes, eos at
    the targets' end and -100 are left out.

    Raises:
        VesaliusError: if a sentinel of the inputs has no span in the targets.

    Example:
        >>> needs = Needs(20, {"sentinel_0": 18, "sentinel_1": 19})
        >>> splice([5, 18, 8, 19], [18, 6, 7, 19, 9], needs).tolist()
        [5, 6, 7, 8, 9]
    """
    given, told = np.asarray(inputs, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    told = told[told != IGNORED]
    modes = [needs.special[m] for m in MODES if m in needs.special]
    if len(given) and given[0] in modes:
        given = given[1:]
    if len(told) and told[-1] == needs.special.get("eos", -1):
        told = told[:-1]
    marks = sentinel_ids(needs)
    if not len(told) or told[0] not in marks:
        return np.concatenate([given, told])
    opens = np.flatnonzero(np.isin(told, marks))
    spans = dict(zip(told[opens].tolist(), np.split(told, opens)[1:], strict=True))
    holes = np.flatnonzero(np.isin(given, marks))
    if missing := [int(t) for t in given[holes] if int(t) not in spans]:
        raise VesaliusError(f"the targets have no span for sentinel {missing[0]}; give inputs and targets of one text")
    pieces = np.split(given, holes)
    filled = [pieces[0]] + [p for hole in pieces[1:] for p in (spans[int(hole[0])][1:], hole[1:])]
    return np.concatenate(filled)


def _denoisers(mixture: str | Sequence[Any]) -> tuple[Denoiser, ...]:
    if isinstance(mixture, str):
        settings.choice("ul2", "mixture", mixture, tuple(MIXTURES))
        return MIXTURES[mixture]
    made = []
    for one in mixture:
        if isinstance(one, Denoiser):
            made.append(one)
            continue
        if not isinstance(one, dict):
            raise VesaliusError(f"ul2.mixture holds {one!r}; give mappings like {{kind: R, rate: 0.15, span: 3}}")
        settings.known("denoiser", Denoiser, list(one))
        if "kind" not in one or ("rate" not in one and one["kind"] != "S"):
            raise VesaliusError(f"ul2.mixture holds {one!r}; a denoiser needs kind and rate")
        made.append(Denoiser(**dict[str, Any](one, rate=one.get("rate"))))
    if not made or not sum(d.weight for d in made):
        raise VesaliusError("ul2.mixture is empty, or all its weights are 0; give at least one denoiser")
    return tuple(made)
