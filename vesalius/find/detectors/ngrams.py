"""n-gram heads: attention to the tokens that stood after an earlier occurrence of the last n tokens.

Prompts are strings of random automata, each with symbols of its own (`stimuli.strings`), so that matches of one, two
and three tokens differ. Score = attention on matches, a mean over queries that have a match. Null = attention on the
same places in the other prompts, whose tokens do not match there ("shuffled"), as a head has that looks at places.

A head that matches one token also covers the matches of two and three, which lie among them: read the three together.

Akyürek et al., "In-Context Language Learning: Architectures and Algorithms", arXiv 2401.12973, sec. 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.find.detectors.base import HeadContext, head_scores
from vesalius.find.detectors.looks import Attended, Look, attend
from vesalius.find.detectors.significance import exchange
from vesalius.find.detectors.stimuli import STRING_LENGTH, STRING_ROWS, after_ngram, strings
from vesalius.model import Model
from vesalius.scores import Scores

ORDERS = (1, 2, 3)


def matched(model: Model, context: HeadContext, rows: int, length: int) -> Attended:
    """The pass that all orders share; looks are called 1-gram, 2-gram, 3-gram."""
    return context.once(
        ("strings", rows, length), lambda: _attended(model, strings(model, context.seed, rows, length).ids)
    )


def in_prompts(model: Model, ids: Tensor, seed: int = 0) -> dict[str, Scores]:
    """The scores of every order on prompts of one's own, ids (row, pos), by `1-gram`, `2-gram`, `3-gram`."""
    found = _attended(model, ids)
    return {f"{n}-gram": _tested(n, found, seed) for n in ORDERS}


def _attended(model: Model, ids: Tensor) -> Attended:
    rows = len(ids)
    others = torch.tensor([[r for r in range(rows) if r != row] for row in range(rows)])  # (row, row - 1)
    looks = {f"{n}-gram": Look.of(after_ngram(ids, n)).in_prompts(others) for n in ORDERS}
    return attend(model, ids, None, looks)


def _tested(n: int, found: Attended, seed: int) -> Scores:
    each, chance = found.score[f"{n}-gram"].numpy(), found.chance[f"{n}-gram"].numpy()
    columns = exchange(each, chance, seed)
    return head_scores(found.heads, each, columns, null_is="the same places in other prompts")


def _scores(n: int, model: Model, context: HeadContext, rows: int, length: int) -> Scores:
    return _tested(n, matched(model, context, max(2, rows), length), context.seed)


def one_gram(model: Model, context: HeadContext, *, rows: int = STRING_ROWS, length: int = STRING_LENGTH) -> Scores:
    """Attention to tokens after an earlier copy of the last token.

    Args:
        rows: prompts, each of an automaton of its own. length: tokens of a prompt.
    """
    return _scores(1, model, context, rows, length)


def two_gram(model: Model, context: HeadContext, *, rows: int = STRING_ROWS, length: int = STRING_LENGTH) -> Scores:
    """Attention to tokens after an earlier copy of the last two tokens.

    Args:
        rows: prompts, each of an automaton of its own. length: tokens of a prompt.
    """
    return _scores(2, model, context, rows, length)


def three_gram(model: Model, context: HeadContext, *, rows: int = STRING_ROWS, length: int = STRING_LENGTH) -> Scores:
    """Attention to tokens after an earlier copy of the last three tokens.

    Args:
        rows: prompts, each of an automaton of its own. length: tokens of a prompt.
    """
    return _scores(3, model, context, rows, length)
