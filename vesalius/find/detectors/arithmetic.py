"""Heads that read the numbers: attention from the end of a sum to its operands and its sign.

Prompts are those of task `arithmetic` ("2 + 5 = 7", "3 + 4 ="), with solved sums before the asked one. Null: the same
places in prompts whose operands and sign are other tokens, drawn by chance, so that a head that looks two tokens back,
whatever stands there, scores no higher.

Zhang et al., "Interpreting and Improving Large Language Models in Arithmetic Calculation", arXiv 2409.01659: few heads
carry operands and operator to the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.find.detectors.base import HeadContext, head_scores
from vesalius.find.detectors.looks import Look, attend, joined
from vesalius.find.detectors.significance import exchange
from vesalius.find.detectors.stimuli import usable_tokens
from vesalius.model import Model
from vesalius.scores import Scores
from vesalius.tasks import task

NAMES = ("a", "sign", "b")
CONTROLS = 4  # prompts without numbers, of each prompt
ROWS = 8  # prompts of a pass, each with its controls


def arithmetic(model: Model, context: HeadContext, *, n: int = 32, shots: int = 2, operation: str = "add") -> Scores:
    """Attention from the last token of "a + b =" to a, + and b.

    Args:
        n: prompts. shots: solved sums before the asked one. operation: add or subtract.
    """
    made = task("arithmetic", n=n, seed=context.seed, shots=shots, operation=operation)
    pairs = made.pairs(model)
    usable = torch.from_numpy(usable_tokens(model))
    rng = torch.Generator().manual_seed(context.seed)
    pieces = []
    for group in pairs.batches(ROWS):
        rows, places = torch.arange(group.n_rows)[:, None], torch.stack([group.positions[k] for k in NAMES], dim=1)
        controls = [_without_numbers(group.clean, rows, places, usable, rng) for _ in range(CONTROLS)]
        wanted = torch.zeros(group.n_rows, group.length, group.length, dtype=torch.bool)
        wanted[rows, group.reads[:, :1], places] = True
        others = rows + group.n_rows * torch.arange(1, CONTROLS + 1)  # (row, control)
        ids, mask = torch.cat([group.clean, *controls]), group.mask.repeat(1 + CONTROLS, 1)
        pieces.append(attend(model, ids, mask, {"operands": Look.of(wanted).in_prompts(others)}))
        if context.progress:
            context.progress(sum(p.score["operands"].shape[1] for p in pieces), pairs.n_rows)
    found = joined(pieces)
    values, chance = found.score["operands"].numpy(), found.chance["operands"].numpy()
    columns = exchange(values, chance, context.seed)
    null = "the same places, holding other words"
    notes = made.describe().get("notes", [])
    return head_scores(found.heads, values, columns, task="arithmetic", null_is=null, notes=notes)


def _without_numbers(ids: Tensor, rows: Tensor, places: Tensor, usable: Tensor, rng: torch.Generator) -> Tensor:
    """The prompts with random tokens for operands and sign, (row, pos)."""
    out = ids.clone()
    out[rows, places] = usable[torch.randint(len(usable), places.shape, generator=rng)]
    return out
