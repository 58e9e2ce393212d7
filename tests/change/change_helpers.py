"""What tests of rounding share."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from vesalius.model import Model
from vesalius.model.weights import bias_of, matrix


def losses(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Nats a token of every row, of the tokens after the second, (row,)."""
    log_p = model.logits(ids)[:, 1:-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 2:, None])[..., 0].mean(1)


def perplexity(model: Model, ids: torch.Tensor) -> float:
    """Of the tokens after the second."""
    return float(losses(model, ids).mean().exp())


@torch.no_grad()
def scaled_norms(model: Model, channels: Sequence[int], scale: float, offset: float = 0.0) -> Model:
    """A model that says the same: some outputs of its LayerNorms scaled and offset, what reads them made up for it."""
    made = Model.wrap(copy.deepcopy(model.hf), model.tokenizer, f"{model.name}-planted")
    for block in made.anatomy.main.blocks:
        for norm, readers in (
            (block.norm_in.module, list({id(m): m for m in block.projections.values()}.values())),
            (block.norm_mid.module, made.anatomy.mlp_readers(block)),
        ):
            norm.weight[channels] *= scale
            norm.bias[channels] = norm.bias[channels] * scale + offset
            for module in readers:
                weight, bias = matrix(module), bias_of(module)
                assert bias is not None
                weight[channels] /= scale
                bias -= offset * weight[channels].sum(0)
    return Model.wrap(made.hf, model.tokenizer, made.name)
