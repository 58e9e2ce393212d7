"""AMP: heads and neurons are worth what they write on some prompts.

    head     mean over tokens of  || x_h W_O^h ||_1       x_h the head's output before W_O (token, d_head)
    neuron   mean over tokens of  | a_j |                 a_j the input of the MLP's last matrix (gated: act(gate) up)

each averaged over the prompts, in float32. `amp_out` weighs a neuron's mean size by the length of what it writes,
|a_j| ||W_down_j||, which the published score leaves out.

Paper: "Attention and MLP Pruning" (AMP), arXiv 2504.21174.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vesalius.change.calibration import Progress, calibrate, names_of
from vesalius.change.ranking import scores_of
from vesalius.model import Model
from vesalius.model.weights import matrix
from vesalius.scores import Scores


class _Mean:
    """The mean over rows of a row's mean."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(())
        self.rows = 0

    def add(self, x: Tensor) -> None:
        self.total, self.rows = self.total + self.of(x.float()).cpu(), self.rows + 1

    def of(self, x: Tensor) -> Tensor:
        return x.abs().mean(0)

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.rows, 1)


class _Writes(_Mean):
    """Of each head, the L1 norm of what it writes. out: W_O, (head, d_head, d_model)."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out.float()

    def of(self, x: Tensor) -> Tensor:
        by_head = x.unflatten(-1, self.out.shape[:2])  # (token, head, d_head)
        sizes = [(by_head[:, h] @ self.out[h]).abs().sum(-1).mean() for h in range(len(self.out))]
        return torch.stack(sizes)


def amp(model: Model, rows: Tensor, seed: int = 0, progress: Progress | None = None) -> Scores:
    """Scores of heads and neurons on rows of prompts (row, pos)."""
    return _amp(model, rows, progress, False)


def amp_out(model: Model, rows: Tensor, seed: int = 0, progress: Progress | None = None) -> Scores:
    """As `amp`, neurons weighed by the length of what they write."""
    return _amp(model, rows, progress, True)


def amp_reversed(model: Model, rows: Tensor, seed: int = 0, progress: Progress | None = None) -> Scores:
    """The opposite order, a control."""
    found = _amp(model, rows, progress, False)
    return Scores(found.parts, -found.values, info=found.info | {"method": "amp-reversed"})


def _amp(model: Model, rows: Tensor, progress: Progress | None, weighed: bool) -> Scores:
    a, names = model.anatomy, names_of(model)
    blocks = a.main.blocks
    heads = [_Writes(a.head_out(b).detach()) for b in blocks]
    neurons = [_Mean() for _ in blocks]
    wants = {names[id(b.o)]: [h] for b, h in zip(blocks, heads, strict=True)}
    downs = {names[id(b.down)]: [n] for b, n in zip(blocks, neurons, strict=True)}
    calibrate(model, rows, {**wants, **downs}, progress=progress)
    sizes = [n.mean for n in neurons]
    if weighed:
        sizes = [s * matrix(b.down).float().norm(dim=1).cpu() for s, b in zip(sizes, blocks, strict=True)]
    by_head, by_neuron = (np.stack([t.double().numpy() for t in x]) for x in ([h.mean for h in heads], sizes))
    found = scores_of(model, by_head, by_neuron, "amp-out" if weighed else "amp")
    return Scores(found.parts, found.values, info=found.info | {"n": len(rows)})
