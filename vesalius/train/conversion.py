"""Conversion between cells of the grid {causal, non-causal decoder} x {full, prefix, masked language modelling}.

A causal decoder (CD) and a non-causal one (ND) have the same weights: what differs is the attention mask over the
inputs and what is foretold (Wang et al. 2022, arXiv 2204.05832). So a conversion is an objective with its settings, and
changes no tensor. Conversions from or into an encoder-decoder would, and are not made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.errors import UnknownName, VesaliusError
from vesalius.train.masks import PADDING, Mask, attention_inputs

_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "CD:FLM": ("causal-lm", {}),
    "CD:PLM": ("prefix-lm", {"mask": "causal"}),
    "CD:MLM": ("span-corruption", {"mask": "causal"}),
    "CD:UL2": ("ul2", {"mask": "causal"}),
    "ND:PLM": ("prefix-lm", {"mask": "prefix"}),
    "ND:MLM": ("span-corruption", {"mask": "prefix"}),
    "ND:UL2": ("ul2", {"mask": "prefix"}),
}
# Share of the tokens read that carry loss: all; half; with noise r and spans of k, r (1 + 1/k) of 1 + 2r/k.
_SHARE = {"FLM": "all tokens", "PLM": "about half of the tokens", "MLM": "about 2 in 11 tokens (15 %, spans of 3)"}


@dataclass(frozen=True)
class Conversion:
    """What it takes to train on as another cell.

    Attributes:
        source: the cell the model comes from, such as `CD:FLM`.
        target: the cell it goes to.
        objective: name in `OBJECTIVES`.
        settings: of the objective.
        changes: what is different from now on, one sentence each.
        keeps: what is not.
    """

    source: str
    target: str
    objective: str
    settings: dict[str, Any]
    changes: tuple[str, ...]
    keeps: tuple[str, ...]


def conversion(source: str, target: str, model: Any = None) -> Conversion:
    """How a decoder trained in one cell is trained on in another.

    Args:
        source: ARCHITECTURE:OBJECTIVE, of CD, ND and FLM, PLM, MLM, UL2.
        target: likewise.
        model: if given, refused when its family cannot attend as the target asks.

    Raises:
        VesaliusError: for a cell that does not exist, or a model that cannot be converted.

    Example:
        >>> made = conversion("CD:FLM", "ND:MLM")
        >>> made.objective, made.settings
        ('span-corruption', {'mask': 'prefix'})
        >>> made.changes[0]
        'inputs are read both ways, targets from the left (mask: prefix)'
    """
    for cell in (source, target):
        if cell.startswith("ED"):
            raise VesaliusError(f"{cell}: an encoder-decoder has other weights than a decoder; build one and train it")
        if cell == "ND:FLM":
            raise VesaliusError("ND:FLM has no inputs to read both ways; use CD:FLM, or ND:PLM for a prefix")
        if cell not in _CELLS:
            raise UnknownName("cell", cell, _CELLS)
    objective, settings = _CELLS[target]
    if model is not None and target.startswith("ND"):
        document = torch.zeros(1, 2, dtype=torch.long)
        attention_inputs(Mask.prefix(document, torch.tensor([2])), model)
    (old, learnt), (new, learns) = source.split(":"), target.split(":")
    changes = []
    if old != new:
        way = "both ways, targets from the left" if new == "ND" else "from the left, like targets"
        changes.append(f"inputs are read {way} (mask: {settings.get('mask', 'causal')})")
    if learnt != learns:
        share, was = (_SHARE.get(o, "the targets of each denoiser") for o in (learns, learnt))
        changes.append(f"loss is on {share}; was on {was}")
        if learns in ("MLM", "UL2"):
            changes.append(
                "the vocabulary needs sentinels" + (" and modes" if learns == "UL2" else "") + " (add_tokens)"
            )
    keeps = ("all weights and their number", "positions", "logits of a text with no prefix, under the causal mask")
    return Conversion(source, target, objective, dict(settings), tuple(changes), keeps)


@torch.no_grad()
def prefix_logits(model: nn.Module, ids: Tensor, prefix: Tensor, segments: Tensor | None = None) -> Tensor:
    """Logits of a decoder that reads the first tokens of each row both ways.

    Args:
        model: a decoder.
        ids: (row, pos).
        prefix: (row,) lengths; all 0 gives the causal model.
        segments: (row, pos), -1 for padding; none if None.

    Returns:
        (row, pos, vocabulary).
    """
    documents = torch.zeros_like(ids) if segments is None else segments.clamp(PADDING, 0)
    logits: Tensor = model(ids, **attention_inputs(Mask.prefix(documents, prefix), model)).logits
    return logits
