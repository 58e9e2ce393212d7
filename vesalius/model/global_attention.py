"""Global attention of models whose other positions see a window: which positions see all and are seen by all.

Longformer (Beltagy et al. 2020, arXiv 2004.05150) is told with every input; transformers' own default is none at all.
Here it is the first positions of every row, [CLS] alone unless the config says otherwise (`global_tokens`), in training
and in use, so that a model is read as it was trained.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NAME = "global_attention_mask"


@cache
def _takes(kind: Any) -> bool:
    return NAME in inspect.signature(kind.forward).parameters


def global_tokens(config: Any) -> int:
    """How many first positions see all."""
    return int(getattr(config, "global_tokens", 1))


def global_attention(hf: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What to add to a model's inputs, ids (row, pos); nothing for models that know no global positions.

    Example:
        >>> global_attention(bert, ids), global_attention(longformer, ids[:, :3])    # doctest: +SKIP
        ({}, {'global_attention_mask': tensor([[1, 0, 0]])})
    """
    kind: Any = type(hf)
    if not _takes(kind):
        return {}
    found = torch.zeros_like(ids)
    found[:, : global_tokens(hf.config)] = 1
    return {NAME: found}
