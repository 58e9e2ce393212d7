"""PST: a model learns a task while most of its weights go; which of them go is learnt too, in few numbers.

    y = x (W ⊙ M)^T + bias
    W = W0 + b U V                             W0 (out, in) frozen; U (out, r), V (r, in)
    S = |W| + a1 A B + a2 (R 1^T + 1 C)        A (out, r), B (r, in), R (out, 1), C (1, in)
    M = where S is largest, matrix by matrix: all but ceil(sparsity out in) of the numbers

A number's size is the part of its score that needs no data. The other part stands for movement, the sum of
-dL/dW W over training, which is low-rank and follows rows and columns: so it is learnt as A B + R 1^T + 1 C, by

    dL/dS := dL/d(W ⊙ M) ⊙ W                   straight through the mask, at kept and at dropped numbers alike

A and U begin as Gaussian, B, V, R and C as zero, so at first the mask goes by size alone. Of a matrix
(out + in)(2r + 1) numbers are trained. Sparsity rises from 0, with t from the end of a warm-up to 1 where the last
part begins,

    sparsity(t) = sparsity (1 - (1 - t)^3)

and in the last part the mask is held. Embeddings, norms and heads stay dense. What comes out is W ⊙ M as plain weights.

PST, Li et al. 2022, arXiv 2205.11005. Beside it, by the same code, with W trained whole: `movement` (Sanh et al. 2020,
arXiv 2005.07683), where S is a number learnt for every weight, from 0; `full`, the same and |W|, which is PST's score
without its thrift; `magnitude`, where the smallest are dropped at once. The paper's abstract gives neither a1, a2, b
nor the spread of A and U: here 1, and r^-1/2, with which a number of a product moves about as fast under Adam as a
number trained itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from vesalius.change.linears import merged, replaced
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.model.int8 import plain
from vesalius.model.weights import bias_of, matrix
from vesalius.train.learning import Tell, check_steps, learn
from vesalius.train.plugs import Plug
from vesalius.train.select import matching

How = Literal["pst", "full", "movement", "magnitude"]
FULL: tuple[How, ...] = ("full", "movement")  # a score for every weight


@dataclass(frozen=True)
class SparsePlan:
    """How a model becomes sparse.

    Attributes:
        sparsity: share of every matrix that goes. how: see the module. steps: updates. rows: of one. lr: peak.
        rank: r, of U V and of A B. by_product, by_lines, update: a1, a2 and b.
        warmup: share of the steps before anything goes. held: share of the steps, the last ones, with the mask held.
        seed: of A, U and the order of the rows.
    """

    sparsity: float = 0.9
    how: How = "pst"
    steps: int = 200
    rows: int = 8
    lr: float = 3e-4
    rank: int = 8
    by_product: float = 1.0
    by_lines: float = 1.0
    update: float = 1.0
    warmup: float = 0.1
    held: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise UnknownName("way of becoming sparse", str(self.how), get_args(How))
        if not 0 < self.sparsity < 1:
            raise VesaliusError(f"sparsity {self.sparsity:g} is no share that can go; give more than 0, less than 1")
        if self.rank < 1:
            raise VesaliusError(f"rank {self.rank} learns nothing; give 1 or more")
        if self.warmup < 0 or self.held < 0 or not self.warmup + self.held < 1:
            raise VesaliusError(
                f"warmup {self.warmup:g} and held {self.held:g} leave no step to become sparse in; give shares of the "
                "steps with a sum below 1"
            )
        check_steps(self.steps, self.rows, self.lr)

    def describe(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)

    @property
    def final(self) -> int:
        """The first step with the last mask; one step at least has it."""
        return 0 if self.how == "magnitude" else self.steps - max(1, round(self.held * self.steps))

    def sparsity_at(self, step: int) -> float:
        """The sparsity of a step."""
        first = round(self.warmup * self.steps)
        if step >= self.final:
            return self.sparsity
        if step < first:
            return 0.0
        return self.sparsity * (1 - (1 - (step - first) / (self.final - first)) ** 3)


def zeros_of(sparsity: float, numbers: int) -> int:
    """ceil(sparsity numbers), of the decimal number that was written.

    Example:
        >>> zeros_of(0.9, 16384), zeros_of(0.55, 100)     # 0.55 * 100 is 55.00000000000001 to a computer
        (14746, 55)
    """
    return math.ceil(Fraction(str(float(sparsity))) * numbers)


def largest(score: Tensor, zeros: int) -> Tensor:
    """Which numbers are left when the `zeros` smallest go, bool; among equal ones the first go."""
    kept = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    if zeros:
        flat = score.flatten()
        edge = flat.kthvalue(zeros).values
        kept = flat > edge
        equal = (flat == edge).nonzero()[:, 0]
        spare = len(flat) - zeros - int(kept.sum())
        kept[equal[len(equal) - spare :]] = True
    return kept.view(score.shape)


class _Kept(torch.autograd.Function):
    """W ⊙ M: W's gradient is that of what is kept, the score's goes straight through the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return torch.where(mask, g, 0.0) if wanted[0] else None, g * weight if wanted[1] else None, None


class SparseLinear(nn.Module):
    """A linear map that is becoming sparse: `zeros` of its numbers are dropped, or those that `hold` fixed.

    Made with `of`; nothing is dropped and nothing takes a gradient until it is told so. Whatever is learnt is float32.
    """

    def __init__(self, start: Tensor, bias: Tensor | None, plan: SparsePlan, name: str, transposed: bool) -> None:
        super().__init__()
        n_out, n_in = start.shape
        self.how, self.transposed, self.zeros = plan.how, transposed, 0
        self.scales = (plan.by_product, plan.by_lines, plan.update)
        self.out_features, self.in_features = n_out, n_in
        self.start = _held(
            start if plan.how == "pst" else start.detach().float().clone(memory_format=torch.contiguous_format)
        )
        self.register_parameter("bias", None if bias is None else _held(bias))
        self.register_buffer("mask_held", None)
        self.bias: nn.Parameter | None
        self.mask_held: Tensor | None
        if plan.how == "pst":
            drawn = np.random.default_rng([plan.seed, *name.encode(), *b"sparse"])
            self.U, self.A = (_held(_gaussian(drawn, n_out, plan.rank).to(start.device)) for _ in range(2))
            self.V, self.B = (_held(start.new_zeros(plan.rank, n_in, dtype=torch.float32)) for _ in range(2))
            self.R = _held(start.new_zeros(n_out, 1, dtype=torch.float32))
            self.C = _held(start.new_zeros(1, n_in, dtype=torch.float32))
        elif plan.how in FULL:
            self.scores = _held(torch.zeros_like(self.start))

    @classmethod
    def of(cls, module: nn.Module, plan: SparsePlan, name: str = "") -> SparseLinear:
        """What stands for an `nn.Linear` or `Conv1D`; its own weight is shared where it stays frozen.

        Args:
            module: the map. plan: how it becomes sparse. name: of the map, for its draws.

        Raises:
            VesaliusError: if the plan would leave no number of it.
        """
        start = matrix(module).T.detach()
        if zeros_of(plan.sparsity, start.numel()) == start.numel():
            raise VesaliusError(
                f"sparsity {plan.sparsity:g} leaves none of the {start.numel()} numbers of {name}; give less"
            )
        return cls(start, bias_of(module), plan, name, isinstance(module, Conv1D))

    def moved(self) -> Tensor:
        """W, (out, in), float32."""
        weight = self.start.float()
        return weight + self.scales[2] * (self.U @ self.V) if self.how == "pst" else weight

    def learnt_score(self) -> Tensor | None:
        """What the data say of every number, (out, in); None where nothing is learnt of it."""
        if self.how == "pst":
            return self.scales[0] * (self.A @ self.B) + self.scales[1] * (self.R + self.C)
        return self.scores if self.how in FULL else None

    def score(self) -> Tensor:
        """S, (out, in)."""
        return self._score(self.moved())

    def _score(self, weight: Tensor) -> Tensor:
        learnt = self.learnt_score()
        if learnt is None:
            return weight.detach().abs()
        return learnt if self.how == "movement" else weight.detach().abs() + learnt

    def mask(self) -> Tensor:
        """M, (out, in) bool, in training and evaluation alike."""
        return self.mask_held if self.mask_held is not None else largest(self.score().detach(), self.zeros)

    def kept(self) -> Tensor:
        """W ⊙ M, (out, in), differentiable."""
        weight = self.moved()
        if self.mask_held is not None:
            return torch.where(self.mask_held, weight, 0.0)
        score = self._score(weight)
        kept: Tensor = _Kept.apply(  # type: ignore[no-untyped-call]
            weight, score, largest(score.detach(), self.zeros)
        )
        return kept

    @torch.no_grad()
    def hold(self) -> None:
        """From now on the mask stays what it is; scores learn no more."""
        self.mask_held = self.mask()
        for p in self.scoring():
            p.requires_grad_(False)

    def scoring(self) -> list[nn.Parameter]:
        """What of the scores is learnt."""
        if self.how == "pst":
            return [self.A, self.B, self.R, self.C]
        return [self.scores] if self.how in FULL else []

    def learnt(self) -> list[nn.Parameter]:
        """All that is learnt."""
        return [*([self.U, self.V] if self.how == "pst" else [self.start]), *self.scoring()]

    @property
    def weight(self) -> Tensor:
        """The plain map's weight, (out, in): W ⊙ M."""
        return self.kept().detach()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The plain map, `nn.Linear` or `Conv1D`, with zeros where the mask has them."""
        return plain(self.kept(), self.bias, self.transposed)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.kept().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.how}, zeros={self.zeros}"


def _held(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _gaussian(drawn: np.random.Generator, rows: int, rank: int) -> Tensor:
    return torch.from_numpy(drawn.standard_normal((rows, rank), dtype=np.float32)) * rank**-0.5


def trained_numbers(n_out: int, n_in: int, rank: int) -> int:
    """Numbers PST trains in a matrix: (out + in)(2 rank + 1).

    Example:
        >>> round(trained_numbers(768, 768, 8) / 768**2, 3)
        0.044
    """
    return (n_out + n_in) * (2 * rank + 1)


def sparse(model: Model, plan: SparsePlan, names: Iterable[str] | None = None) -> Model:
    """A model whose linear maps (those of its blocks, or `names`) can become sparse; outputs are still the same."""
    return replaced(model, lambda name, module: SparseLinear.of(module, plan, name), names)


def sparse_maps(model: Model) -> dict[str, SparseLinear]:
    """The maps of a model that are becoming sparse, by name."""
    return {name: m for name, m in model.hf.named_modules() if isinstance(m, SparseLinear)}


class Thinning(Plug):
    """Raises the sparsity by the plan's schedule, and holds the mask for the last part."""

    def __init__(self, maps: Sequence[SparseLinear], plan: SparsePlan) -> None:
        self.maps, self.plan = list(maps), plan

    def begin(self, step: int) -> None:
        share = self.plan.sparsity_at(step)
        for one in self.maps:
            one.zeros = zeros_of(share, one.start.numel())
            if step >= self.plan.final and one.mask_held is None:
                one.hold()


@dataclass(frozen=True)
class Sparsified:
    """What came of it.

    Attributes:
        model: ordinary, its zeros in its weights. trained: the same as it was trained, masks and factors apart.
        log: one row a step: step, loss, lr, sparsity, and what the objective logs.
        maps: one row a map: name, out, in, zeros, trained (numbers), and otherwise (share of what is kept that would
            have gone by size alone).
        trained_numbers: in all maps. scoring: those of them that are scores. also: trained beside the maps.
    """

    model: Model
    trained: Model
    log: pd.DataFrame
    maps: pd.DataFrame
    trained_numbers: int
    scoring: int
    also: int


def sparsify(
    model: Model,
    source: Any,
    objective: Any,
    plan: SparsePlan,
    also: Sequence[str] = (),
    names: Iterable[str] | None = None,
    tell: Tell = lambda what, share: None,
) -> Sparsified:
    """Trains a model to do a task with few of its weights; the model given stays as it is.

    Args:
        model: any. source, objective: as of the trainer; `vesalius.train.labels` has those of classifiers.
        plan: how. also: patterns of parameters that train beside the maps, and stay dense (`classifier*`).
        names: of the maps; all linear ones of the blocks if None.

    Raises:
        VesaliusError: for a pattern that means nothing, or a sparsity that leaves nothing.

    Example:
        >>> done = sparsify(model, TextRows(text, 8, 0, vocab), objective, SparsePlan(0.9))     # doctest: +SKIP
    """
    trained = sparse(model, plan, names)
    maps = sparse_maps(trained)
    beside = _own(trained.hf, also)
    learnt = [p for one in maps.values() for p in one.learnt()]
    for p in (*learnt, *beside):
        p.requires_grad_(True)
    scoring = sum(p.numel() for one in maps.values() for p in one.scoring())
    log = learn(trained, source, objective, plan.steps, plan.lr, plan.seed, [Thinning(list(maps.values()), plan)], tell)
    log["sparsity"] = [plan.sparsity_at(step) for step in log["step"]]
    return Sparsified(
        merged(trained), trained, log, _maps(model, maps), sum(p.numel() for p in learnt), scoring,
        sum(p.numel() for p in beside),
    )  # fmt: skip


def _own(hf: Any, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters meant, each now a copy of its own: the first model keeps its."""
    wanted = set[int]().union(*(matching(hf, one) for one in patterns))
    copies: dict[int, nn.Parameter] = {}
    for module in hf.modules():
        if isinstance(module, SparseLinear):
            continue
        for name, p in module.named_parameters(recurse=False):
            if id(p) in wanted:
                setattr(module, name, copies.setdefault(id(p), _held(p.detach().clone())))
    return list(copies.values())


@torch.no_grad()
def _maps(model: Model, maps: dict[str, SparseLinear]) -> pd.DataFrame:
    first, rows = dict(model.hf.named_modules()), []
    for name, one in maps.items():
        mask = one.mask()
        by_size = largest(matrix(first[name]).T.float().abs(), one.zeros)
        rows.append({
            "name": name, "out": one.out_features, "in": one.in_features, "zeros": int((~mask).sum()),
            "trained": sum(p.numel() for p in one.learnt()),
            "otherwise": float((mask & ~by_size).sum() / mask.sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)
