"""How a model tells order: vectors added to embeddings, angles for queries and keys, or biases on attention scores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vesalius.errors import VesaliusError

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture


class PositionScheme(nn.Module):
    """The positions of an architecture: at most one of `embed`, `rotary` and `bias` gives something."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.kind = a.positions.kind
        if self.kind == "learned":
            self.table = nn.Embedding(a.max_length, a.d_model)
        elif self.kind == "t5":
            self.biases = nn.Embedding(a.positions.buckets, a.heads)

    def check(self, position_ids: Tensor) -> None:
        """Refuses positions that have no vector."""
        longest = self.architecture.max_length
        if self.kind == "learned" and position_ids.numel() and int(position_ids.max()) >= longest:
            raise VesaliusError(
                f"position {int(position_ids.max())} does not exist: learned positions end at max_length={longest}; "
                "shorten the input, or build with a larger max_length or positions.kind='rotary' or 'alibi'"
            )

    def embed(self, position_ids: Tensor) -> Tensor | None:
        """Vectors to add to the embedding, (batch or 1, pos, d_model)."""
        if self.kind != "learned":
            return None
        self.check(position_ids)
        found: Tensor = self.table(position_ids)
        return found

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine for `mixers.attention.rotate`, (batch or 1, pos, rotary dims) each."""
        if self.kind != "rotary":
            return None
        return angles(position_ids, self.architecture, dtype)

    def bias(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention scores, (batch or 1, head, query, key).

        Args:
            query, key: positions, (batch or 1, query) and (batch or 1, key).
        """
        if self.kind not in ("alibi", "t5"):
            return None
        distance = query[:, :, None] - key[:, None, :]  # (batch or 1, query, key), positive for the past
        bidirectional = self.architecture.kind == "masked"
        if self.kind == "alibi":
            steep = alibi_slopes(self.architecture.heads).to(query.device)[:, None, None]
            # Relative to the query, not to position 0: equal after the softmax, and exact near it in low precision.
            return (-steep * (distance.abs() if bidirectional else distance)[:, None].float()).to(dtype)
        p = self.architecture.positions
        by_bucket: Tensor = self.biases(t5_buckets(distance, p.buckets, p.max_distance, bidirectional))
        return by_bucket.movedim(-1, 1).to(dtype)


def angles(position_ids: Tensor, architecture: Architecture, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions, computed in float32 (float64 for float64 models).

    Angle of plane i at position p: (p / scale) * base^(-2i / dims). Planes are (i, i + dims / 2), as in GPT-NeoX.
    """
    p, dims = architecture.positions, architecture.rotary_dims
    exact = torch.promote_types(dtype, torch.float32)
    speed = p.base ** -(torch.arange(0, dims, 2, device=position_ids.device, dtype=torch.float32) / dims).to(exact)
    turn = (position_ids.to(exact) / p.scale).unsqueeze(-1) * speed
    turn = torch.cat([turn, turn], dim=-1)
    return turn.cos().to(dtype), turn.sin().to(dtype)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of every head, (head,) (Press et al. 2021, arXiv 2108.12409).

    For n a power of two 2^(-8h/n), h = 1 to n; otherwise those of the power below, then every other one of the power
    above.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]

    below = 2 ** int(math.log2(heads))
    return torch.tensor(powers(below) + powers(2 * below)[::2][: heads - below], dtype=torch.float32)


def t5_buckets(distance: Tensor, buckets: int, longest: int, bidirectional: bool) -> Tensor:
    """Bucket of every distance (query - key): near ones one each, far ones on a log scale (arXiv 1910.10683).

    Both directions have half the buckets each if `bidirectional`; else the future shares bucket 0.
    """
    start = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        start = torch.where(distance < 0, buckets, 0)
        distance = distance.abs()
    else:
        distance = distance.clamp(min=0)
    near = buckets // 2
    far = near + (
        torch.log(distance.clamp(min=1).float() / near) / math.log(longest / near) * (buckets - near)
    ).long().clamp(min=0)
    return start + torch.where(distance < near, distance, far.clamp(max=buckets - 1))
