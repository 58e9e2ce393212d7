"""How exact direct attribution is: each part's term against what the logit really loses without its write.

    term      (frozen norm of the write) . (row of the unembedding), see `vesalius.model.contributions`
    measured  logit of the final state - logit of the final state without the write

They differ because taking a write out changes the scale of the final norm, which the term holds fixed. In a model whose
final norm is a constant they are the same number (Baroni et al. 2025, arXiv 2507.02559).
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.contributions import contributions, normed
from vesalius.model.weights import bias_of


class Exactness(NamedTuple):
    """Terms beside measurements.

    Attributes:
        parts: part, term and measured (means over positions of absolute values), error (mean absolute difference),
            relative (error over measured).
        of_sum: largest difference between a logit and the sum of its terms.
        largest: largest difference between a term and its measurement.
        relative: mean absolute difference over mean absolute measurement, over parts and positions.
    """

    parts: pd.DataFrame
    of_sum: float
    largest: float
    relative: float


@torch.no_grad()
def exactness(model: Model, ids: Tensor, tokens: Tensor | None = None) -> Exactness:
    """Compares every head's and MLP's direct term with its measured direct effect, at every position but the first.

    Args:
        model: a causal one without a soft cap.
        ids: (row, pos). tokens: (row, pos) whose logits are asked for; the next token of each position if None.

    Raises:
        VesaliusError: if logits are not linear in the state after the final norm.

    Example:
        >>> exactness(model, ids).relative                                          # doctest: +SKIP
    """
    unembedding = model.unembedding
    if model.kind != "causal" or unembedding is None:
        raise VesaliusError(
            f"the logits of {model.name} are no linear map of the normed state; there are no exact terms"
        )
    aims = ids.roll(-1, 1) if tokens is None else tokens
    reads = torch.arange(1, ids.shape[1] - (tokens is None)).expand(len(ids), -1)  # (row, read)
    raw = contributions(model, ids, torch.ones_like(ids), reads)
    found = normed(model, raw)
    aims = aims.gather(1, reads)
    rows = model.stem(unembedding.weight.new_ones(())) * unembedding.weight[aims].float()  # (row, read, d)
    offset = bias_of(unembedding)
    own = rows.new_zeros(()) if offset is None else offset[aims].float()

    def logit(state: Tensor) -> Tensor:
        return model.readout(state).gather(-1, aims.unsqueeze(-1))[..., 0]

    whole = logit(raw.final)
    terms = torch.einsum("rpsd,rsd->prs", found.values, rows)  # (part, row, read)
    of_sum = float((terms.sum(0) + (found.bias * rows).sum(-1) + own - whole).abs().max())
    kept = [i for i, p in enumerate(found.parts) if p.kind in ("head", "mlp")]
    measured = torch.stack([whole - logit(raw.final - raw.values[:, i]) for i in kept])
    terms = terms[kept]
    error = (terms - measured).abs()
    table = pd.DataFrame(
        {
            "part": [str(found.parts[i]) for i in kept],
            "term": terms.abs().mean((1, 2)).tolist(),
            "measured": measured.abs().mean((1, 2)).tolist(),
            "error": error.mean((1, 2)).tolist(),
        }
    )
    table["relative"] = table["error"] / table["measured"]
    return Exactness(table, of_sum, float(error.max()), float(error.mean() / measured.abs().mean()))
