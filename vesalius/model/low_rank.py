"""Matrices kept as two thin factors: what a head does to the residual stream, without a d_model x d_model array.

    M = L R,   L (rows, rank), R (rank, columns)

Row-vector convention, as everywhere: x M = (x L) R. Everything below costs what the factors cost. The singular value
decomposition is that of a small square: with L = Q1 R1 and R^T = Q2 R2, M = Q1 (R1 R2^T) Q2^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Components(NamedTuple):
    """M = sum over i of s_i u_i v_i^T, the largest s first. The sign makes the largest entry of each v_i positive.

    Attributes:
        u: what each component reads, (..., rows, component). s: (..., component).
        v: what it writes, (..., columns, component). Columns of u and of v are orthonormal.
    """

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class LowRank:
    """One matrix, or a batch of them (one a head), as two factors.

    Attributes:
        left: (..., rows, rank). right: (..., rank, columns).

    Example:
        >>> m = LowRank(torch.ones(4, 1), torch.ones(1, 3))
        >>> m.shape, float(m.reader().norm()), (m @ m.T).shape
        ((4, 3), 3.464101791381836, (4, 4))
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.shape[-1] != self.right.shape[-2]:
            raise ValueError(f"factors {tuple(self.left.shape)} and {tuple(self.right.shape)} do not multiply")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, batch axes first."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """Of the factors; the matrix has at most this."""
        return self.left.shape[-1]

    @property
    def T(self) -> LowRank:
        """The transpose."""
        return LowRank(self.right.mT, self.left.mT)

    def __getitem__(self, index: int | slice | Tensor) -> LowRank:
        """Of the first batch axis: one head, or some."""
        return LowRank(self.left[index], self.right[index])

    def __matmul__(self, other: LowRank) -> LowRank:
        """The product, kept at the smaller of the two ranks; batch axes broadcast."""
        inner = self.right @ other.left  # (..., rank, rank of other)
        if self.rank <= other.rank:
            return LowRank(self.left, inner @ other.right)
        return LowRank(self.left @ inner, other.right)

    def apply(self, x: Tensor) -> Tensor:
        """The product x M of row vectors (..., vector, rows): (..., vector, columns)."""
        return (x @ self.left) @ self.right

    def dense(self) -> Tensor:
        """The whole matrix; for small models and tests."""
        return self.left @ self.right

    def svd(self) -> Components:
        """Singular vectors and values, as many as the smaller of rank, rows and columns."""
        q1, r1 = torch.linalg.qr(self.left)
        q2, r2 = torch.linalg.qr(self.right.mT)
        a, s, b = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
        u, v = q1 @ a, q2 @ b.mT
        sign = v.gather(-2, v.abs().argmax(-2, keepdim=True)).sign()
        return Components(u * sign, s, v * sign)

    def reader(self) -> Tensor:
        """A thin matrix (..., rows, rank) with |x reader| = |x M| for every row vector x, and |reader| = |M|."""
        return self.left @ torch.linalg.qr(self.right.mT, mode="r").R.mT

    def eigenvalues(self) -> Tensor:
        """The eigenvalues of a square matrix that can differ from 0, complex, (..., rank)."""
        return torch.linalg.eigvals(self.right @ self.left)
