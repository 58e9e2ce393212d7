"""Direct logit attribution: what each part itself writes towards the answer.

The residual stream after the last block is a sum of parts' writes; with the final norm's scale held at its actual value
the logits are linear in it, so every part has its own term: score = (frozen norm of the write) . (answer direction).
The terms of all parts, and of the biases, sum to the metric (a logit difference) exactly. Elhage et al. 2021.
"""

from __future__ import annotations

import torch

from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.base import Context, per_example, table
from vesalius.model import Model, Pairs
from vesalius.model.contributions import contributions, normed
from vesalius.model.sweep import BATCH
from vesalius.model.weights import bias_of
from vesalius.scores import Scores

KINDS = ("head", "xhead", "mlp", "embed")


def direct(
    model: Model, pairs: Pairs, context: Context, *, contrast: bool = False, parts: str = "head,mlp,embed"
) -> Scores:
    """Direct contribution of every part to the metric on the clean prompts.

    Args:
        contrast: subtract the same on the corrupted prompts. parts: kinds of part to report.

    Returns:
        Scores with, in `info`, `bias`: the mean term of biases, and `sum`: the mean of all terms.

    Raises:
        VesaliusError: if answers are scored over several tokens: there is no one logit to write to.
    """
    kinds = {k.strip() for k in parts.split(",")}
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownName("kind of part that writes to the answer", kind, KINDS)
    if pairs.targets is not None:
        raise VesaliusError(
            "direct reads the logits of one token, and these answers are scored over several; choose single-token "
            "answers, or another method"
        )
    pieces, biases, sums = [], [], []
    groups = pairs.batches(BATCH)
    for number, group in enumerate(groups):
        values, bias, names = _terms(model, group, clean=True)
        if contrast:
            other, other_bias, _ = _terms(model, group, clean=False)
            values, bias = values - other, bias - other_bias
        sums.append(per_example((values.sum(0) + bias)[None], group)[0])
        keep = [i for i, p in enumerate(names) if p.kind in kinds]
        pieces.append(per_example(values[keep], group))
        biases.append(per_example(bias[None], group)[0])
        chosen = [names[i] for i in keep]
        if context.progress:
            context.progress(number + 1, len(groups))
    import numpy as np

    return table(
        chosen,
        np.concatenate(pieces, axis=1),
        bias=float(np.concatenate(biases).mean()),
        sum=float(np.concatenate(sums).mean()),
        direction="contrast" if contrast else "clean",
    )


def _terms(model: Model, pairs: Pairs, clean: bool) -> tuple[torch.Tensor, torch.Tensor, list]:  # type: ignore[type-arg]
    """Terms of every part (part, row) and of the biases (row,)."""
    ids = pairs.clean if clean else pairs.corrupted
    found = normed(model, contributions(model, ids, pairs.mask, pairs.reads, pairs.decoder))
    direction, offset = _answer_direction(model, pairs, found.final)  # (row, read, d), (row,)
    values = (found.values * direction.unsqueeze(1)).sum((2, 3)).T
    return values, (found.bias * direction).sum((1, 2)) + offset, found.parts


def _answer_direction(model: Model, pairs: Pairs, final: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The metric's gradient at the normed residual stream, and the term of the unembedding's bias where it has one.

    For a logit difference these are the differences of the unembedding's rows and of its biases (GPT-J, Phi).
    """
    tokens = pairs.metric.tokens(pairs)
    with torch.enable_grad():
        leaf = final.detach().requires_grad_()
        logits = model.head(leaf, tokens).float()
        direction, of_logits = torch.autograd.grad(pairs.value(logits).sum(), (leaf, logits))
    unembed = model.anatomy.main.unembed
    bias = None if unembed is None else bias_of(unembed)
    if bias is None:
        return direction, direction.new_zeros(direction.shape[0])
    bias = bias if tokens is None else bias[tokens.to(bias.device)]
    return direction, (of_logits * bias.to(of_logits)).sum((1, 2))
