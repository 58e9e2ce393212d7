"""Decoding: rows of tokens read step by step with the model's own cache, and one loop that writes.

`Reader` holds what a model has read. Reading on, going back (`crop`) and taking rows again, in another order or several
times (`select`), give the logits of a whole forward pass over the same tokens; where a model's cache cannot be cropped
(a sliding window that was passed, a recurrent state) or there is none, the tokens are read again. Rows of unequal
length are padded on the left, and padding is masked.

`decode` writes: logits of the last token (float32), a `Stack` of rules and processors, a choice. The choice is the
largest score (of equal ones the lowest id) or a draw with a generator of its own. Where a row has no token left that
may come next, it goes back to a place that the caller names, what led there is barred at that place, and after so many
times it stops and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model.memory import memory_errors
from vesalius.model.model import Model
from vesalius.model.stack import Rule, Stack

TRIES = 20  # times a row may go back
Stop = Literal["count", "end", "whole", "dead end"]


def takes(hf: Any, name: str) -> bool:
    """Whether a transformers model's forward has an argument of that name."""
    return name in inspect.signature(type(hf).forward).parameters


class Reader:
    """What a causal model has read of some rows, and what it expects next.

    Args:
        model: a causal language model. cached: False reads everything again at each step (slow, for comparison).

    Attributes:
        ids: all tokens read, (row, pos). passes: forward passes made; row_passes: rows of them, summed.

    Raises:
        VesaliusError: if the model does not continue text.
    """

    def __init__(self, model: Model, cached: bool = True) -> None:
        if model.kind != "causal" or not model.anatomy.main.head:
            what = "has no output layer" if model.kind == "causal" else f"is {model.kind}"
            raise VesaliusError(f"{model.name} {what}; only a causal language model can go on with a text")
        self.model = model
        self.cached = cached and takes(model.hf, "past_key_values") and takes(model.hf, "use_cache")
        self._last = {"logits_to_keep": 1} if takes(model.hf, "logits_to_keep") else {}
        self.passes = self.row_passes = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything that was read."""
        self.ids: Tensor = torch.zeros((0, 0), dtype=torch.long)
        self.mask: Tensor | None = None
        self._past: Any = None

    def read(self, new: Tensor, mask: Tensor | None = None, every: bool = False) -> Tensor:
        """Logits (row, vocabulary), float32, after the last of some more tokens (row, pos).

        Args:
            new: token ids. mask: 1 for real tokens, (row, pos); padding stands on the left of a row's first tokens.
            every: after each of the new tokens, (row, pos, vocabulary).
        """
        new = new.to(self.model.device)
        if mask is not None and self.mask is None and bool((mask == 0).any()):
            self.mask = torch.ones_like(self.ids)
        if self.mask is not None:
            ones = torch.ones_like(new) if mask is None else mask.to(new)
            self.mask = torch.cat([self.mask.to(new), ones], 1) if self.ids.numel() else ones
        self.ids = torch.cat([self.ids, new], 1) if self.ids.numel() else new
        count = new.shape[1] if self._past is not None else self.ids.shape[1]
        kwargs = {**self.model.inputs(self.ids, self.mask), **({} if every else self._last)}
        for name in ("input_ids", "position_ids"):
            if name in kwargs:
                kwargs[name] = kwargs[name][:, -count:]
        if self.cached:
            kwargs |= {"use_cache": True, "past_key_values": self._past}
        with torch.inference_mode(), memory_errors(), self.model.alone():
            out = self.model.hf(**kwargs)
        self._past = getattr(out, "past_key_values", None) if self.cached else None
        self.passes += 1
        self.row_passes += len(self.ids)
        return (out.logits[:, -new.shape[1] :] if every else out.logits[:, -1]).float()

    def crop(self, length: int) -> None:
        """Forgets all but the first so many positions of every row."""
        if not 0 < length <= self.ids.shape[1]:
            raise VesaliusError(f"{self.ids.shape[1]} positions were read, so {length} cannot be kept; give 1 or more")
        less = length - self.ids.shape[1]
        self.ids = self.ids[:, :length]
        self.mask = None if self.mask is None else self.mask[:, :length]
        if self._past is None or not less:
            return
        if not hasattr(self._past, "crop") or not getattr(self._past, "is_croppable", True):
            self._past = None  # it is read again with what comes next
            return
        try:
            with torch.inference_mode():
                self._past.crop(less)
        except (NotImplementedError, RuntimeError):  # a sliding window that was passed
            self._past = None

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Goes on with these rows, in this order; a row may be named several times."""
        index = torch.as_tensor(rows, device=self.ids.device)
        self.ids = self.ids[index]
        self.mask = None if self.mask is None else self.mask[index]
        if self._past is not None:
            try:
                with torch.inference_mode():
                    self._past.reorder_cache(index)
            except (AttributeError, NotImplementedError):
                self._past = None

    def follow(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits after exactly these rows, reading as little as may be: what `generate` hands a processor.

        Rows may have been reordered, dropped or repeated since the last call, each then having one token more; of
        anything else all tokens are read.

        Returns:
            (row, vocabulary) where one token was read; (row, pos, vocabulary) where all were.
        """
        ids = ids.to(self.model.device)
        if self.ids.numel() and ids.shape[1] == self.ids.shape[1] + 1:
            known = {tuple(row): i for i, row in enumerate(self.ids.tolist())}
            places = [known.get(tuple(row)) for row in ids[:, :-1].tolist()]
            if None not in places:
                if places != list(range(len(self.ids))):
                    self.select([int(p) for p in places if p is not None])
                return self.read(ids[:, -1:])
        self.clear()
        return self.read(ids, mask, every=True)


@dataclass(frozen=True)
class Draw:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest. top_k: of so many likeliest; 0 for all. top_p: of the likeliest that have
            this share together. generator: of the draws, on the CPU.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise VesaliusError(f"temperature {self.temperature} is below 0; give 0 for the likeliest token, or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise VesaliusError(f"top_k {self.top_k} and top_p {self.top_p}: give 0 or more, and above 0 up to 1")

    def __call__(self, scores: Tensor) -> Tensor:
        """Tokens (row,) for scores (row, vocabulary); every row has a finite one."""
        if self.temperature == 0:
            return scores.argmax(-1)
        share = (scores.float() / self.temperature).softmax(-1).cpu()
        if self.top_k or self.top_p < 1:
            values, order = share.sort(dim=-1, descending=True, stable=True)
            cut = values.cumsum(-1) - values >= self.top_p
            if self.top_k:
                cut[:, self.top_k :] = True
            share = torch.zeros_like(share).scatter(-1, order, values.masked_fill(cut, 0.0))
        return torch.multinomial(share, 1, generator=self.generator)[:, 0].to(scores.device)


GREEDY = Draw()


@dataclass
class Line:
    """What was written after one prompt.

    Attributes:
        tokens: new ones. stop: `count` tokens, an `end` token, `whole` by a rule, or a `dead end`.
        log_probs: of each token under the model alone, before any rule.
        allowed: how many tokens might have come at each step.
        went_back: tokens taken back at dead ends. margin: least gap, in scores, between the chosen token and the next.
    """

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    stop: Stop = "count"
    log_probs: list[float] = field(default_factory=list)
    allowed: list[int] = field(default_factory=list)
    went_back: int = 0
    margin: float = float("inf")

    @property
    def row(self) -> list[int]:
        """Prompt and tokens."""
        return [*self.prompt, *self.tokens]


class Step(NamedTuple):
    """A step of decoding, before its tokens are taken up.

    Attributes:
        lines: all rows. rows: those still written, prompt and tokens. stack: with the states of these rows.
        logits: of the model alone, (row, vocabulary). scores: after the stack. tokens: chosen, (row,).
    """

    lines: list[Line]
    rows: list[list[int]]
    stack: Stack
    logits: Tensor
    scores: Tensor
    tokens: Tensor


Back = Callable[[Sequence[int]], int]
Seen = Callable[[Step], object]


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    count: int,
    stack: Stack | Sequence[Any] = (),
    draw: Draw = GREEDY,
    *,
    ends: Sequence[int] = (),
    back: Back | None = None,
    tries: int = TRIES,
    cached: bool = True,
    seen: Seen | None = None,
) -> list[Line]:
    """Writes after some prompts, all rows together.

    Args:
        model: a causal language model. prompts: token ids, of any lengths. count: most tokens written after each.
        stack: rules and processors. draw: how a token is chosen. ends: tokens that end a row (they are kept).
        back: at a dead end, how many of the tokens written to take back (at least 1); None stops there.
        tries: times a row may go back. seen: told of each step.

    Raises:
        VesaliusError: for an empty prompt, or one that leaves no room for the tokens.
    """
    stack = stack if isinstance(stack, Stack) else Stack(list(stack))
    _fits(model, prompts, count)
    lines = [Line(tuple(map(int, p))) for p in prompts]
    stack.begin([line.prompt for line in lines])
    spent: dict[tuple[int, ...], set[int]] = {}
    left = dict.fromkeys(range(len(lines)), tries)
    reader, alive = Reader(model, cached), list(range(len(lines)))
    logits = _whole(reader, [lines[i].row for i in alive])
    while alive and count > 0:
        rows = [lines[i].row for i in alive]
        scores = stack.apply(rows, reader.ids, logits)
        for place, row in enumerate(rows):
            if taken := spent.get(tuple(row)):
                scores = scores.clone()
                scores[place, sorted(taken)] = -torch.inf
        open_ = torch.isfinite(scores).sum(-1).tolist()
        dead = [p for p, n in enumerate(open_) if not n]
        if dead:
            for place in dead:
                _go_back(lines[alive[place]], back, spent, left, alive[place])
            alive = [i for i in alive if lines[i].stop != "dead end"]
            if alive:
                logits = _rewound(reader, [lines[i].row for i in alive])
            continue
        tokens = draw(scores)
        if seen is not None:
            seen(Step(lines, rows, stack, logits, scores, tokens))
        own = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        gaps = margins(scores, tokens).tolist()
        for place, i in enumerate(alive):
            line = lines[i]
            line.tokens.append(int(tokens[place]))
            line.log_probs.append(own[place])
            line.allowed.append(open_[place])
            line.margin = min(line.margin, gaps[place])
            if line.tokens[-1] in ends:
                line.stop = "end"
            elif stack.ended(line.row):
                line.stop = "whole"
        going = [p for p, i in enumerate(alive) if lines[i].stop == "count" and len(lines[i].tokens) < count]
        if going and len(going) < len(alive):
            reader.select(going)
            tokens = tokens[going]
        alive = [alive[p] for p in going]
        if alive:
            logits = reader.read(tokens[:, None])
    return lines


def margins(scores: Tensor, token: Tensor) -> Tensor:
    """How far each chosen token's score is above the best other's, (row,)."""
    best = scores.gather(1, token[:, None])[:, 0]
    return best - scores.scatter(1, token[:, None], -torch.inf).amax(1)


def _go_back(
    line: Line, back: Back | None, spent: dict[tuple[int, ...], set[int]], left: dict[int, int], i: int
) -> None:
    """Takes tokens back and bars what led here; or stops the row."""
    if back is None or not line.tokens or not left[i]:
        line.stop = "dead end"
        return
    left[i] -= 1
    n = min(max(1, back(line.tokens)), len(line.tokens))
    line.went_back += n
    kept = len(line.tokens) - n
    spent.setdefault((*line.prompt, *line.tokens[:kept]), set()).add(line.tokens[kept])
    parts: tuple[list[Any], ...] = (line.tokens, line.log_probs, line.allowed)
    for held in parts:
        del held[kept:]


def _rewound(reader: Reader, rows: list[list[int]]) -> Tensor:
    """The reader brought to these rows, each a beginning of what was read or all of it."""
    if len(rows) == 1 and len(reader.ids) == 1 and reader.mask is None and len(rows[0]) > 1:
        reader.crop(min(len(rows[0]) - 1, reader.ids.shape[1]))
        return reader.read(torch.tensor([rows[0][reader.ids.shape[1] :]]))
    reader.clear()
    return _whole(reader, rows)


def _whole(reader: Reader, rows: Sequence[Sequence[int]]) -> Tensor:
    ids, mask = left_padded(rows)
    return reader.read(ids, mask)


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """(row, longest) token ids padded on the left, and 1 where they are real."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def _fits(model: Model, prompts: Sequence[Sequence[int]], count: int) -> None:
    if not prompts or not all(len(p) for p in prompts):
        raise VesaliusError("an empty prompt gives a model nothing to go on from; give at least one token")
    longest, room = max(map(len, prompts)), model.n_positions
    if room and longest + count - 1 > room:
        raise VesaliusError(
            f"{model.name} has {room} positions, too few for {longest} + {count} tokens; lower one of the two"
        )


__all__ = ["GREEDY", "Draw", "Line", "Reader", "Rule", "Stack", "Step", "decode", "left_padded", "margins", "takes"]
