"""Where a tuned lens may start: the affine map that best foretells the last state from an earlier one.

    A_l, b_l = argmin  sum_t  r_t^2 |h_L,t - h_l,t - A h_l,t - b|^2  +  ridge |A|^2

with r the final norm's scale at the last state, so that each state weighs by what the unembedding sees of it. The sums
are streamed over a corpus and solved once: a forward pass a token and no softmax, which on a CPU reads many times the
text that gradient steps could in the same time. Least squares on states is not KL on distributions (it is too sure of
itself), so gradient steps follow. The map alone is the "linear shortcut" of Din et al. 2023, arXiv 2303.09435.

States more than ten times the median length are left out, and counted: a causal model parks attention on a few tokens
by making them enormous, and least squares would see nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vesalius.lens.tuned import TunedLens
from vesalius.model import Model

RIDGE = 1e-2  # of the mean squared coordinate; from 1e-3 to 1e-1 the divergence moves by 4 % (24k tokens of text)
ENORMOUS = 10.0


class Regression:
    """Sums over states, from which every layer's map is solved.

    Attributes:
        gram: (layer, d + 1, d + 1), products of (h / s, 1) with itself. cross: (layer, d + 1, d), with h_L - h.
        scale: s, the typical size of a coordinate, (layer,), from the first batch. counts: states in, left out.
    """

    def __init__(self, model: Model) -> None:
        n, d, device = model.n_layers, model.d_model, model.device
        self.model = model
        self.gram = torch.zeros(n, d + 1, d + 1, device=device)
        self.cross = torch.zeros(n, d + 1, d, device=device)
        self.scale = torch.zeros(n, device=device)
        self.counts = torch.zeros(2, dtype=torch.long)

    @torch.no_grad()
    def add(self, states: list[Tensor]) -> None:
        """Adds some states, one (state, d) a layer, the last layer last."""
        lengths = torch.stack([h.float().norm(dim=-1) for h in states])  # (layer, state)
        kept = (lengths <= ENORMOUS * lengths.median(dim=1, keepdim=True).values).all(0)
        self.counts += torch.tensor([int(kept.sum()), int((~kept).sum())])
        last = states[-1][kept].float()
        if not len(last):
            return
        if not bool(self.scale.any()):
            self.scale = typical_size([h[kept] for h in states[:-1]])
        norm = self.model.anatomy.main.final_norm
        weight = torch.ones_like(last[:, :1]) if norm is None else norm.scale(last)
        weight = weight / weight.mean()
        for layer, h in enumerate(states[:-1]):
            x = h[kept].float()
            rows = torch.cat([x / self.scale[layer], torch.ones_like(x[:, :1])], dim=1) * weight  # (state, d + 1)
            self.gram[layer].addmm_(rows.T, rows)
            self.cross[layer].addmm_(rows.T, (last - x) * weight)

    @torch.no_grad()
    def solve(self, lens: TunedLens) -> None:
        """Sets the translators."""
        d = lens.d_model
        lens.scale.copy_(self.scale)
        for layer in range(lens.n_layers):
            gram, cross = self.gram[layer].double(), self.cross[layer].double()
            if lens.bias_only:
                lens.bias[layer] = (cross[d] / gram[d, d] / self.scale[layer]).float()
                continue
            typical = float(gram.diagonal()[:d].mean()) or 1.0  # states of nothing but zeros: any map does
            ridge = torch.full((d + 1,), RIDGE * typical, dtype=gram.dtype)
            ridge[d] = 0
            map_ = torch.linalg.solve(gram + ridge.to(gram.device).diag(), cross)  # (d + 1, d)
            weight = map_[:d].T / self.scale[layer]
            lens.bias[layer] = (map_[d] / self.scale[layer]).float()
            if lens.rank is None:
                lens.weight[layer] = weight.float()
                continue
            # what of the map is largest on actual states (reduced-rank regression), about their mean
            mean = gram[d, :d] / gram[d, d]
            spread = gram[:d, :d] / gram[d, d] - mean.outer(mean)
            roots, axes = torch.linalg.eigh(spread)
            left = torch.linalg.svd(weight * self.scale[layer] @ (axes * roots.clamp(min=0).sqrt()))[0][:, : lens.rank]
            thin = left.T @ weight
            size = thin.norm() / lens.rank**0.5 * d**0.5  # rows as long as at a random start
            size = size if float(size) > 0 else torch.ones_like(size)
            lens.up[layer], lens.down[layer] = (left * size).float(), (thin / size).float()
            dropped = (weight - left @ thin) @ (mean * self.scale[layer])
            lens.bias[layer] += (dropped / self.scale[layer]).float()

    # -- keeping

    def tensors(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint."""
        return {"gram": self.gram, "cross": self.cross, "scale": self.scale, "counts": self.counts}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` gave."""
        for name, value in tensors.items():
            getattr(self, name).copy_(value)


def typical_size(states: list[Tensor]) -> Tensor:
    """The root mean square of a coordinate at each layer, (layer,); never 0."""
    return torch.stack([h.float().square().mean().sqrt() for h in states]).clamp(min=1e-12)


def describe(counts: Tensor) -> dict[str, Any]:
    """How many states were read and left out."""
    return {"states": int(counts[0]), "left_out": int(counts[1])}
