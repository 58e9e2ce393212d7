"""A codebook: a vector becomes the mean of the k codes nearest to it (Tamkin et al. 2023, arXiv 2310.17230).

    similarity(x, c) = x . c / |c|        out = mean of the k most similar codes, as they are

The output replaces the vector, so what passes on is k numbers out of n. The input's gradient is the output's (straight
through); codes learn from the loss that the model has anyway, and from |out - x|^2, by which they stay near what they
stand for. With groups each part of the vector (each head) has a codebook of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vesalius.errors import UnknownName, VesaliusError

Force = Literal["all", "lowest"]


class Codebook(nn.Module):
    """Codes for vectors at one site.

    Args:
        groups: parts of the vector, each with its own codes. size: codes of each. width: of each part. k: on at once.
        seed: of the first codes, which `start` replaces.

    Attributes:
        codes: (group, code, width). uses: how often each was chosen since the last look, (group, code).
        chosen: of the last pass, (row, pos, group, k), the most similar first; None before.
        missed: mean squared distance of output and input in the last pass.
        forced: group -> code that takes part where the codebook is used, or at position `place` alone.
        offset: position of the first vector that is handed in.
    """

    def __init__(self, groups: int, size: int, width: int, k: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= k <= size:
            raise VesaliusError(f"a codebook of {size} codes cannot have {k} on at once; give k from 1 to {size}")
        drawn = torch.Generator().manual_seed(seed)
        self.codes = nn.Parameter(torch.randn(groups, size, width, generator=drawn))
        self.register_buffer("uses", torch.zeros(groups, size))
        self.uses: Tensor
        self.groups, self.size, self.width, self.k = groups, size, width, k
        self.chosen: Tensor | None = None
        self.missed: Tensor | None = None
        self.forced: dict[int, int] = {}
        self.how: Force = "all"
        self.place: int | None = None
        self.offset = 0
        self.pool: Tensor | None = None  # some inputs of the last training pass, (n, group, width)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (row, pos, group, width) as means of their codes."""
        chosen = self.choose(x)
        out = self.mean(chosen)
        self.chosen = chosen.detach()
        self.missed = (out.float() - x.detach().float()).pow(2).mean()
        if self.training:
            self._count(chosen, x)
        if self.forced:
            out = self.mean(self._with_forced(chosen))
        return out.to(x.dtype) + (x - x.detach())  # the second term is zero and carries the gradient

    def choose(self, x: Tensor) -> Tensor:
        """The k most similar codes of each vector, (row, pos, group, k)."""
        unit = nn.functional.normalize(self.codes.detach(), dim=-1)
        return torch.einsum("rpgd,gcd->rpgc", x.detach().float(), unit.float()).topk(self.k, dim=-1).indices

    def mean(self, chosen: Tensor) -> Tensor:
        """The mean of codes by number, (row, pos, group, width)."""
        groups = torch.arange(self.groups, device=chosen.device)[:, None].expand(chosen.shape)
        return self.codes[groups, chosen].mean(-2)

    def _with_forced(self, chosen: Tensor) -> Tensor:
        chosen = chosen.clone()
        at = (
            slice(None) if self.place is None else slice(max(0, self.place - self.offset), self.place - self.offset + 1)
        )
        for group, code in self.forced.items():
            if self.how == "all":
                chosen[:, at, group] = code
            else:
                has = (chosen[:, at, group] == code).any(-1)
                chosen[:, at, group, -1] = torch.where(has, chosen[:, at, group, -1], code)
        return chosen

    @torch.no_grad()
    def _count(self, chosen: Tensor, x: Tensor) -> None:
        for group in range(self.groups):
            self.uses[group] += torch.bincount(chosen[:, :, group].flatten(), minlength=self.size).to(self.uses)
        flat = x.detach().flatten(0, 1).float()
        self.pool = flat[:: max(1, len(flat) // 1024)]

    def force(self, codes: Mapping[int, int], how: Force = "all", place: int | None = None) -> None:
        """Puts codes in, by group: in the place of all k, or of the least similar; an empty mapping ends it.

        Args:
            codes: group -> code. how: which of the k it stands for. place: one position; None for all.

        Raises:
            VesaliusError: for a group or code that there is not.
        """
        if how not in get_args(Force):
            raise UnknownName("way to force a code", how, get_args(Force))
        for group, code in codes.items():
            if not 0 <= group < self.groups or not 0 <= code < self.size:
                raise VesaliusError(
                    f"there is no code {code} of group {group}: groups are 0 to {self.groups - 1}, codes 0 to "
                    f"{self.size - 1}"
                )
        self.forced, self.how, self.place = dict(codes), how, place

    @torch.no_grad()
    def start(self, x: Tensor, seed: int = 0) -> None:
        """Sets the codes to k-means centres of vectors (n, group, width); fewer vectors than codes: to vectors.

        Raises:
            VesaliusError: if the vectors are not finite.
        """
        from sklearn.cluster import MiniBatchKMeans

        if not bool(torch.isfinite(x).all()):
            raise VesaliusError("some activations are NaN or infinite, so no codes can start from them; try float32")
        for group in range(self.groups):
            mine = x[:, group].float().cpu()
            drawn = torch.Generator().manual_seed(seed + group)
            spread = float(mine.std()) or 1.0
            if len(mine) <= self.size:
                rows = torch.arange(self.size) % len(mine)
                noise = 0.01 * spread * torch.randn(self.size, self.width, generator=drawn)
                self.codes[group] = (mine[rows] + noise).to(self.codes)
                continue
            made = MiniBatchKMeans(self.size, random_state=seed + group, n_init=1, batch_size=4096, max_iter=20)
            centres = torch.from_numpy(made.fit(mine.numpy()).cluster_centers_)
            self.codes[group] = centres.to(self.codes)

    @torch.no_grad()
    def replace_dead(self, optimizer: torch.optim.Optimizer, rng: object, least: float) -> int:
        """Puts an input of the last pass in the place of each code used less than `least` times; how many they were."""
        import numpy as np

        assert isinstance(rng, np.random.Generator)
        dead = (self.uses < least).nonzero()
        self.uses.zero_()
        if not len(dead) or self.pool is None:
            return 0
        rows = torch.from_numpy(rng.integers(0, len(self.pool), len(dead)))
        self.codes[dead[:, 0], dead[:, 1]] = self.pool[rows, dead[:, 0]].to(self.codes)
        for value in optimizer.state.get(self.codes, {}).values():
            if isinstance(value, Tensor) and value.shape == self.codes.shape:
                value[dead[:, 0], dead[:, 1]] = 0.0
        return len(dead)
