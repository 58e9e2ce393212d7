"""What may come next: rules and processors one after another, each ban with its reason.

A `Rule` says which tokens are barred after the tokens written so far. It is an automaton: a state that can be hashed,
`start` of a prompt and `advance` by one token. So the state of a row is a function of the row's own tokens, and nothing
has to be carried along when `generate` of transformers reorders beams, drops rows or goes back. Anything else with the
interface of a `LogitsProcessor` may stand between rules; it works on the scores it is given, in order.

    p'(v) = p(v) / sum of p(u) over the tokens u that no rule bars,   0 for the others

A `Stack` is itself a `LogitsProcessor`:

    generate(**inputs, logits_processor=[Stack([rule, RepetitionPenaltyLogitsProcessor(1.2)])])
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import LogitsProcessor

from vesalius.errors import VesaliusError

MASKS_KEPT = 256  # of joint states; a vocabulary of 50 000 takes 50 kB each

Processor = Callable[[Tensor, Tensor], Tensor]


class Rule:
    """Bars nothing; a subclass says what is barred in which state.

    Attributes:
        name: as it stands in tables of what was barred.
    """

    name: str = "rule"

    def start(self, prompt: Sequence[int]) -> Hashable:
        """The state before the first token is written."""
        return None

    def advance(self, state: Hashable, token: int) -> Hashable:
        """The state after one more token, which was not barred."""
        return state

    def barred(self, state: Hashable) -> Tensor | None:
        """Which tokens are barred, (vocabulary,) bool; None for none. It must not be changed afterwards."""
        return None

    def reason(self, state: Hashable, token: int) -> str:
        """Why a barred token is barred, as a person reads it."""
        return "barred"

    def ended(self, state: Hashable) -> bool:
        """Whether all that was asked for is written."""
        return False


class Barred(NamedTuple):
    """One reason for which a token may not come next."""

    token: int
    rule: str
    reason: str


class Stack(LogitsProcessor):
    """Rules and processors in order, for any number of rows or beams.

    Args:
        parts: `Rule`s, and processors that map (ids (row, pos), scores (row, vocabulary)) to scores. One with a method
            `on_rows` is given lists of token ids without their padding instead.

    A row whose tokens but the last were never seen begins at that row: the first call of a `generate` takes what it is
    given for the prompt. `begin` says so beforehand.

    Example:
        >>> class Even(Rule):
        ...     name = "even"
        ...     def barred(self, state): return torch.arange(4) % 2 == 1
        ...     def reason(self, state, token): return f"{token} is odd"
        >>> stack = Stack([Even()])
        >>> stack(torch.tensor([[0]]), torch.zeros(1, 4)).tolist()
        [[0.0, -inf, 0.0, -inf]]
        >>> stack.explain([0])["reason"].tolist()
        ['1 is odd', '3 is odd']
    """

    def __init__(self, parts: Sequence[Rule | Processor]) -> None:
        for part in parts:
            if not isinstance(part, Rule) and not callable(part):
                raise VesaliusError(f"{part!r} is neither a rule nor a processor of scores; give a Rule or a function")
        self.parts = tuple(parts)
        self.rules = tuple(p for p in parts if isinstance(p, Rule))
        self._states: dict[tuple[int, ...], tuple[Hashable, ...]] = {}
        self._masks: OrderedDict[tuple[Hashable, ...], Tensor | None] = OrderedDict()
        self._foreign: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}

    # -- states

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Forgets all rows, and takes these for the prompts."""
        self._states.clear()
        for prompt in prompts:
            self._states[tuple(prompt)] = tuple(rule.start(prompt) for rule in self.rules)

    def states(self, row: Sequence[int]) -> tuple[Hashable, ...]:
        """The state of each rule after the tokens of a row."""
        key = tuple(row)
        if key not in self._states:
            before = self._states.get(key[:-1])
            self._states[key] = (
                tuple(rule.start(key) for rule in self.rules)
                if before is None
                else tuple(r.advance(s, key[-1]) for r, s in zip(self.rules, before, strict=True))
            )
        return self._states[key]

    def ended(self, row: Sequence[int]) -> bool:
        """Whether a rule says that the row is whole."""
        return any(r.ended(s) for r, s in zip(self.rules, self.states(row), strict=True))

    # -- scores

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (row, vocabulary) with what is barred at minus infinity."""
        return self.apply(input_ids.tolist(), input_ids, scores)

    def apply(self, rows: Sequence[Sequence[int]], ids: Tensor, scores: Tensor) -> Tensor:
        """As a call, where the rows without their padding are at hand."""
        self._foreign = {tuple(row): [] for row in rows}
        if len(self.rules) == len(self.parts):  # rules alone: one mask of each row's joint state
            return self._masked(rows, scores)
        for number, part in enumerate(self.parts):
            if isinstance(part, Rule):
                scores = self._masked(rows, scores, number)
                continue
            was = torch.isfinite(scores)
            scores = part.on_rows(rows, scores) if hasattr(part, "on_rows") else part(ids, scores)
            lost = was & ~torch.isfinite(scores)  # (row, vocabulary)
            for row, mine in zip(rows, lost, strict=True):
                if bool(mine.any()):
                    self._foreign[tuple(row)].append((type(part).__name__, mine.cpu()))
        return scores

    def _masked(self, rows: Sequence[Sequence[int]], scores: Tensor, number: int | None = None) -> Tensor:
        masks = []
        for row in rows:
            states = self.states(row)
            if number is None:
                mask = self._joint(states)
            else:
                at = self.rules.index(self.parts[number])
                mask = self.rules[at].barred(states[at])
            if mask is not None and mask.shape[-1] != scores.shape[-1]:
                raise VesaliusError(
                    f"a rule knows {mask.shape[-1]} tokens and the model scores {scores.shape[-1]}; make the rule for "
                    "this model"
                )
            masks.append(mask)
        if all(m is None for m in masks):
            return scores
        if all(m is masks[0] for m in masks) and masks[0] is not None:
            return scores.masked_fill(masks[0].to(scores.device), -torch.inf)
        none = torch.zeros(scores.shape[-1], dtype=torch.bool)
        return scores.masked_fill(torch.stack([none if m is None else m for m in masks]).to(scores.device), -torch.inf)

    def _joint(self, states: tuple[Hashable, ...]) -> Tensor | None:
        """What any rule bars, (vocabulary,); those of the last joint states are remembered."""
        if states in self._masks:
            self._masks.move_to_end(states)
            return self._masks[states]
        found: Tensor | None = None
        for rule, state in zip(self.rules, states, strict=True):
            mask = rule.barred(state)
            if mask is not None:
                found = mask if found is None else found | mask
        self._masks[states] = found
        if len(self._masks) > MASKS_KEPT:
            self._masks.popitem(last=False)
        return found

    # -- reasons

    def why(self, row: Sequence[int], token: int) -> list[Barred]:
        """Every reason for which a token may not follow a row; empty if it may.

        What processors ruled out is known for the rows of the last call.
        """
        found = [
            Barred(token, rule.name, rule.reason(state, token))
            for rule, state in zip(self.rules, self.states(row), strict=True)
            if (mask := rule.barred(state)) is not None and bool(mask[token])
        ]
        lost = self._foreign.get(tuple(row), [])
        return found + [Barred(token, name, f"{name} ruled it out") for name, mask in lost if bool(mask[token])]

    def explain(self, row: Sequence[int], tokens: Sequence[int] | None = None) -> pd.DataFrame:
        """token, rule, reason: one row a reason, for every barred token (or for those of `tokens`)."""
        if tokens is None:
            barred = self.bans(row)
            every: set[int] = set()
            for mask in barred.values():
                every |= set(mask.nonzero()[:, 0].tolist())
            tokens = sorted(every)
        return pd.DataFrame([b for t in tokens for b in self.why(row, t)], columns=["token", "rule", "reason"])

    def bans(self, row: Sequence[int]) -> Mapping[str, Tensor]:
        """Which tokens each part bars after a row, (vocabulary,), by the part's name."""
        found: dict[str, Tensor] = {}
        pairs = [(r.name, r.barred(s)) for r, s in zip(self.rules, self.states(row), strict=True)]
        for name, mask in [*pairs, *self._foreign.get(tuple(row), [])]:
            if mask is not None:
                found[name] = found[name] | mask if name in found else mask
        return found
