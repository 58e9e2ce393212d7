"""Which tokens of a prompt a task is about, and where a head would look if it played a role there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.find.detectors.looks import Look, require_causal
from vesalius.model import Model, Pairs

# Names under which tasks list these tokens; where a task has none of them, they are found by token identity.
RIGHT_NAMES = ("IO", "right-color", "right")
WRONG_NAMES = ("S2", "wrong-color", "other-color", "wrong")
ASKED_NAMES = ("S2", "query", "asked")

LOOKS = ("previous", "previous_asked", "duplicate", "induction", "right", "wrong", "asked", "asked_or_wrong")


@dataclass(frozen=True)
class Landmarks:
    """Where the tokens are that roles are defined by.

    Attributes:
        end: where the answer is read, (row,).
        right: tokens that are the right answer, (row, pos).
        wrong: of each wrong candidate the last mention, (row, pos).
        mentions: every mention of a wrong candidate, (row, pos).
        asked: what is asked about: named by the task, else tokens that the counterfactual changes and that are not the
            right answer, (row, pos).
        focus: tokens of the task: all of these, and whatever the counterfactual changes, (row, pos).
        named: for right, wrong and asked, how they were found.
    """

    end: Tensor
    right: Tensor
    wrong: Tensor
    mentions: Tensor
    asked: Tensor
    focus: Tensor
    named: Mapping[str, str]


def landmarks(model: Model, pairs: Pairs) -> Landmarks:
    """Finds the tokens of a task in its clean prompts.

    Raises:
        VesaliusError: for models that are not causal, and answers of several tokens.
    """
    require_causal(model, "roles")
    if pairs.targets is not None:
        raise VesaliusError("roles need answers of one token; build the task with scoring='single'")
    end = pairs.reads[:, 0]
    columns = torch.arange(pairs.length)
    before = pairs.mask.bool() & (columns[None] < end[:, None])  # (row, pos)
    alike = _alike(model)

    def named(names: Sequence[str]) -> Tensor | None:
        known = [pairs.positions[n] for n in names if n in pairs.positions]
        if not known:
            return None
        found = torch.zeros(pairs.n_rows, pairs.length + 1, dtype=torch.bool)
        for at in known:
            found[torch.arange(pairs.n_rows), torch.where(at < 0, pairs.length, at)] = True
        return found[:, :-1] & before

    def holding(row: int, token: int) -> Tensor:
        exact = (pairs.clean[row] == token) & before[row]
        if bool(exact.any()):
            return exact
        text = alike(token)
        return torch.tensor([text != "" and alike(int(t)) == text for t in pairs.clean[row]]) & before[row]

    right, wrong, mentions = (torch.zeros_like(before) for _ in range(3))
    for row in range(pairs.n_rows):
        example = int(pairs.row_example[row])
        answers = set(pairs.answers[example])
        others = pairs.wrong[example] if pairs.options is None else pairs.options[example]
        for token in answers:
            right[row] |= holding(row, token)
        for token in set(others) - answers:
            at = holding(row, token).nonzero().flatten()
            wrong[row, at[-1:]] = True
            mentions[row, at] = True
    differs = (pairs.clean != pairs.corrupted) & before
    by_name = {"right": named(RIGHT_NAMES), "wrong": named(WRONG_NAMES), "asked": named(ASKED_NAMES)}
    by_token = {"right": right, "wrong": wrong, "asked": differs & ~right}
    found = {k: by_token[k] if v is None else v for k, v in by_name.items()}
    found["wrong"] = found["wrong"] & ~found["right"]
    mentions = (mentions | found["wrong"]) & ~found["right"]
    how = {k: "token identity" if v is None else "named by the task" for k, v in by_name.items()}
    focus = differs | found["right"] | mentions | found["asked"]
    return Landmarks(end, found["right"], found["wrong"], mentions, found["asked"], focus, how)


def _alike(model: Model) -> Callable[[int], str]:
    """The text of a token without case and space around it, "" where there is no tokenizer."""
    known: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in known:
            known[token] = "" if model.tokenizer is None else str(model.tokenizer.decode([token])).strip().casefold()
        return known[token]

    return text


def looks_of(pairs: Pairs, marks: Landmarks, rng: torch.Generator) -> dict[str, Look]:
    """For each of `LOOKS`, from which positions to which a head of that kind looks, and its null."""
    rows, length = pairs.clean.shape
    column = torch.arange(length)
    real = pairs.mask.bool()
    first = real.long().argmax(1)
    causal = real[:, :, None] & real[:, None, :] & (column[None, :, None] >= column[None, None, :])
    allowed = causal & (column[None, None, :] > first[:, None, None])
    earlier = allowed & (column[:, None] > column[None, :])
    end = torch.zeros_like(real)
    end[torch.arange(rows), marks.end] = True
    same = earlier & (pairs.clean[:, :, None] == pairs.clean[:, None, :])  # an earlier occurrence of the same token
    follows = torch.zeros_like(same)
    follows[:, :, 1:] = same[:, :, :-1]
    follows &= earlier
    focus, from_end = marks.focus[:, :, None], end[:, :, None]
    before = earlier & (column[:, None] == column[None, :] + 1)
    asked = marks.asked & (column[None] < marks.end[:, None])
    wanted = {
        "previous": before,
        "previous_asked": before & marks.asked[:, :, None],
        "duplicate": same & focus,
        "induction": follows & (focus | from_end),
        "right": earlier & from_end & marks.right[:, None, :] & ~follows,
        "wrong": earlier & from_end & marks.wrong[:, None, :],
        "asked": earlier & from_end & asked[:, None, :],
        "asked_or_wrong": earlier & from_end & (asked | marks.wrong)[:, None, :],
    }
    return {name: Look.of(pairs_, allowed, rng) for name, pairs_ in wanted.items()}
