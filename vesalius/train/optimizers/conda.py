"""Conda: Adam run in the singular basis of its own momentum, for the hidden matrices.

    M <- b1 M + (1-b1) G
    every T steps: M = U S V', and Q = V (right, for rows >= columns) or U (left)
    G' = G Q or Q' G,  M' likewise
    N <- b2 N + (1-b2) G'^2
    W <- W - lr scale sqrt(1-b2^t) / (1-b1^t) (M' / (sqrt(N) + eps)) rotated back;  then W <- W (1 - lr decay)

M is kept as it is, N in the basis; N is neither rotated nor reset when the basis changes. Everything but hidden
matrices takes plain Adam. The basis is square, so nothing is lost in it: the "projection" is a rotation.
arXiv 2509.24218.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vesalius.errors import ModelError, VesaliusError
from vesalius.train.optimizers.base import TensorOptimizer, Work, by_step, local, use_foreach
from vesalius.train.roles import Parameter

Mode = Literal["short", "long", "left", "right", "full", "identity"]


class Pieces(NamedTuple):
    """How a fused matrix is made of others: along `axis` pieces of these sizes, or dealt out head by head."""

    axis: int
    sizes: tuple[int, ...]
    heads: int = 0  # of the interleaved layout (head, piece, d_head); 0 for pieces one after the other

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The pieces; views unless interleaved."""
        if not self.heads:
            return list(matrix.split(self.sizes, dim=self.axis))
        dealt = matrix.unflatten(self.axis, (self.heads, len(self.sizes), -1))
        return [part.flatten(self.axis, self.axis + 1) for part in dealt.unbind(self.axis + 1)]

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if not self.heads:
            return torch.cat(pieces, dim=self.axis)
        dealt = [piece.unflatten(self.axis, (self.heads, -1)) for piece in pieces]
        return torch.stack(dealt, dim=self.axis + 1).flatten(self.axis, self.axis + 2)


class Basis(NamedTuple):
    """An orthogonal basis on one side of a matrix, or both; None is the identity."""

    left: Tensor | None  # (rows, rows), columns are singular vectors
    right: Tensor | None  # (columns, columns), rows are singular vectors

    def project(self, matrix: Tensor) -> Tensor:
        """The matrix in the basis."""
        if self.left is not None:
            matrix = self.left.mT @ matrix.to(self.left.dtype)
        return matrix if self.right is None else matrix.to(self.right.dtype) @ self.right.mT

    def project_back(self, matrix: Tensor) -> Tensor:
        """The inverse of `project`."""
        if self.left is not None:
            matrix = self.left @ matrix
        return matrix if self.right is None else matrix @ self.right


def sides(mode: Mode, rows: int, columns: int) -> tuple[bool, bool]:
    """Which sides a mode rotates: (left, right)."""
    tall = rows >= columns
    table: dict[Mode, tuple[bool, bool]] = {
        "short": (not tall, tall),
        "long": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
        "identity": (False, False),
    }
    return table[mode]


def basis(momentum: Tensor, mode: Mode = "short") -> Basis:
    """The singular basis of a matrix, computed in float32 at least.

    Args:
        momentum: (rows, columns).
        mode: "short" rotates the shorter side (columns of a tall or square matrix), "long" the other (both of its
            singular vectors and their complement), "left" rows, "right" columns, "full" both, "identity" none.
    """
    left, right = sides(mode, *momentum.shape)
    if momentum.numel() == 0 or not (left or right):
        return Basis(None, None)
    rows, columns = momentum.shape
    m = momentum if momentum.dtype == torch.float64 else momentum.float()
    if not bool(torch.isfinite(m).all()):
        raise VesaliusError(
            f"the momentum of a {rows} x {columns} matrix is not finite: lower the learning rate or clip"
        )
    complete = (left and rows > columns) or (right and columns > rows)
    u, _, vh = torch.linalg.svd(m, full_matrices=complete)
    return Basis(u.contiguous() if left else None, vh.contiguous() if right else None)


class Conda(TensorOptimizer):
    """Adam in the singular basis of its momentum.

    Groups with `project=True` hold what is rotated: their matrices of two axes; `pieces` of a group says how its fused
    matrices are split first. `groups` of this package sets both by the parameters' roles. The basis is part of the
    state, in float32: one square of the shorter side a matrix.

    Args:
        params: parameters or groups.
        lr: .01 for LLaMA of 60 M to 350 M parameters, .006 for GPT-2, in the paper.
        betas: of the momentum and of the second moment.
        eps: added to the root.
        weight_decay: decoupled, after the update.
        period: steps between two bases, T; it must shrink with the run (20 of 250). 0 keeps the first one.
        scale: of the rotated updates; plain Adam's are not scaled.
        mode: which side is rotated, see `basis`.
        project: whether groups that do not say so are rotated.
        max_grad_norm: the norm of all gradients together is brought down to this; 0 leaves them.
        foreach: for what is not rotated, lists of tensors through one kernel; by default on accelerators.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
        >>> Conda([w], lr=0.1, scale=1.0, project=True).step()
        >>> [[round(x, 4) for x in row] for row in w.tolist()]
        [[-0.1, 0.0], [0.0, -0.1]]
    """

    buffers = 1

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        period: int = 2000,
        scale: float = 0.25,
        mode: Mode = "short",
        project: bool = False,
        max_grad_norm: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        keys = ("lr", "eps", "weight_decay", "period", "scale", "mode", "project", "max_grad_norm", "foreach")
        values = (lr, eps, weight_decay, period, scale, mode, project, max_grad_norm, foreach)
        defaults = {"betas": tuple(betas), **dict(zip(keys, values, strict=True)), "pieces": None}
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["mode"] not in get_args(Mode):
            raise VesaliusError(f"unknown mode '{group['mode']}' of Conda; known: {', '.join(get_args(Mode))}")
        if group["period"] < 0:
            raise VesaliusError(
                f"period = {group['period']} of Conda: give steps between bases, or 0 to keep the first"
            )

    def bases(self, parameter: Tensor) -> list[Basis]:
        """The bases now in use for a parameter, one for each piece; none before the first step."""
        state = self.state.get(parameter, {})
        numbers = sorted({int(k.rsplit("_", 1)[1]) for k in state if k.startswith("basis")})
        return [Basis(state.get(f"basis_left_{i}"), state.get(f"basis_right_{i}")) for i in numbers]

    def _start(self, group: dict[str, Any], p: Tensor, state: dict[str, Tensor]) -> None:
        state["m"], state["n"] = torch.zeros_like(p), torch.zeros_like(p)

    def _group(self, index: int, group: dict[str, Any], work: Work) -> None:
        for done, items in by_step(work).items():
            plain = []
            for item in items:
                if group["project"] and item[0].ndim == 2 and item[0].numel():
                    self._rotated(group, done, *item)
                else:
                    plain.append(item)
            if plain:
                self._plain(group, done + 1, plain)

    def _rotated(self, group: dict[str, Any], done: int, p: Tensor, g: Tensor, state: dict[str, Tensor]) -> None:
        if hasattr(p, "to_local"):
            raise VesaliusError("Conda needs whole matrices, and this one is sharded; train replicated, or with AdamW")
        (b1, b2), lr = group["betas"], float(group["lr"])
        state["m"].lerp_(g, 1 - b1)
        made = Pieces(*group["pieces"]) if group["pieces"] else Pieces(0, (p.shape[0],))
        size = lr * group["scale"] * math.sqrt(1 - b2 ** (done + 1)) / (1 - b1 ** (done + 1))
        due = done == 0 or (group["period"] and done % group["period"] == 0)
        new_n, steps = [], []
        parts = zip(made.split(g), made.split(state["m"]), made.split(state["n"]), strict=True)
        for i, (gradient, momentum, n) in enumerate(parts):
            if due:
                for side, vectors in basis(momentum, group["mode"])._asdict().items():
                    if vectors is not None:
                        state[f"basis_{side}_{i}"] = vectors
            q = Basis(state.get(f"basis_left_{i}"), state.get(f"basis_right_{i}"))
            g_rotated = q.project(gradient)
            n = (n * b2).addcmul_(g_rotated.to(n.dtype), g_rotated.to(n.dtype), value=1 - b2)
            steps.append(q.project_back(q.project(momentum) / (n.sqrt() + group["eps"])).to(p.dtype))
            new_n.append(n)
        state["n"].copy_(made.join(new_n))
        p.add_(made.join(steps), alpha=-size)
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])

    def _plain(self, group: dict[str, Any], t: int, items: Work) -> None:
        (b1, b2), lr = group["betas"], float(group["lr"])
        size, shrink = lr * math.sqrt(1 - b2**t) / (1 - b1**t), 1 - lr * group["weight_decay"]
        rows = [[local(x) for x in (p, g, s["m"], s["n"])] for p, g, s in items]
        if use_foreach(group, (row[0] for row in rows)):
            p_, g_, m_, n_ = (list(column) for column in zip(*rows, strict=True))
            torch._foreach_lerp_(m_, g_, 1 - b1)
            torch._foreach_mul_(n_, b2)
            torch._foreach_addcmul_(n_, g_, g_, value=1 - b2)
            root = torch._foreach_sqrt(n_)
            torch._foreach_add_(root, group["eps"])
            torch._foreach_addcdiv_(p_, m_, root, value=-size)
            if shrink != 1:
                torch._foreach_mul_(p_, shrink)
            return
        for row in rows:
            for (p, g, m, n), (root_,) in self._blocks(*row):
                m.lerp_(g, 1 - b1)
                n.mul_(b2).addcmul_(g, g, value=1 - b2)
                torch.sqrt(n, out=root_).add_(group["eps"])
                p.addcdiv_(m, root_, value=-size)
                if shrink != 1:
                    p.mul_(shrink)


# -- which matrices are made of several -----------------------------------------------------------------------------

FUSED_QKV = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv")
FUSED_GATE = ("gate_up_proj",)


def fused(model: nn.Module, parameters: list[Parameter]) -> Iterator[tuple[Parameter, Pieces | None]]:
    """Each matrix with its pieces: query, key and value, or gate and up, where one tensor holds them.

    The layout comes from the model's anatomy. A model without one is judged by its modules' names: three equal parts
    of an axis that is three times the other, two of `gate_up_proj`.
    """
    known = _layouts(model)
    for parameter in parameters:
        if id(parameter.tensor) in known:
            yield parameter, known[id(parameter.tensor)]
            continue
        words = parameter.name.split(".")
        module = words[-2] if len(words) > 1 else ""
        pieces = None
        if parameter.tensor.ndim == 2:
            rows, columns = parameter.tensor.shape
            if module in FUSED_QKV and rows == 3 * columns:
                pieces = Pieces(0, (columns,) * 3)
            elif module in FUSED_QKV and columns == 3 * rows:
                pieces = Pieces(1, (rows,) * 3)
            elif module in FUSED_GATE and rows % 2 == 0:
                pieces = Pieces(0, (rows // 2,) * 2)
        yield parameter, pieces


def _layouts(model: nn.Module) -> dict[int, Pieces]:
    from transformers import PreTrainedModel

    from vesalius.model.anatomy import read_anatomy

    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        a = read_anatomy(model)
    except ModelError:
        return {}
    found = {}
    for stack in a.stacks.values():
        for block in stack.blocks:
            module = block.projections["q"]
            weight = getattr(module, "weight", None)
            if module is not block.projections["k"] or not isinstance(weight, Tensor) or weight.ndim != 2:
                continue
            sizes = (a.n_heads * a.d_head, a.n_kv_heads * a.d_head, a.n_kv_heads * a.d_head)
            axis = 1 if weight.shape[1] == sum(sizes) and weight.shape[0] != sum(sizes) else 0
            if weight.shape[axis] == sum(sizes):
                found[id(weight)] = Pieces(axis, sizes, a.n_heads if a.spec.qkv_layout == "interleaved" else 0)
    return found
