"""Optimizers against scalar references in float64, against other implementations, and a contract for every one."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vesalius.errors import VesaliusError
from vesalius.train.optimizers import OPTIMIZERS, groups, make_optimizer, settings, state_bytes
from vesalius.train.optimizers.adan import Adan
from vesalius.train.optimizers.base import BLOCK
from vesalius.train.optimizers.conda import Basis, Conda, Pieces, basis
from vesalius.train.optimizers.palm import PaLMAdafactor
from vesalius.train.optimizers.sgd_sai import SGDSaI, gsnr

STEPS = 50
Vector = list[float]


# -- the published rules, one number at a time ----------------------------------------------------------------------


def clipped(gradients: list[Vector], limit: float, eps: float) -> list[Vector]:
    norm = math.sqrt(sum(x * x for g in gradients for x in g))
    factor = min(1.0, limit / (norm + eps)) if limit else 1.0
    return [[x * factor for x in g] for g in gradients]


class ScalarAdan:
    def __init__(self, lr: float, decay: float, no_prox: bool, limit: float) -> None:
        self.lr, self.decay, self.no_prox, self.limit, self.t = lr, decay, no_prox, limit, 0
        self.b, self.eps = (0.98, 0.92, 0.99), 1e-8

    def step(self, tensors: list[Vector], gradients: list[Vector]) -> None:
        gradients = clipped(gradients, self.limit, self.eps)
        if self.t == 0:
            self.m, self.v, self.n = ([[0.0] * len(g) for g in gradients] for _ in range(3))
            self.before = copy.deepcopy(gradients)
        self.t += 1
        b1, b2, b3 = self.b
        for k, gs in enumerate(gradients):
            for i, g in enumerate(gs):
                d = g - self.before[k][i]
                self.m[k][i] = b1 * self.m[k][i] + (1 - b1) * g
                self.v[k][i] = b2 * self.v[k][i] + (1 - b2) * d
                self.n[k][i] = b3 * self.n[k][i] + (1 - b3) * (g + b2 * d) ** 2
                m_hat = self.m[k][i] / (1 - b1**self.t)
                v_hat = self.v[k][i] / (1 - b2**self.t)
                root = math.sqrt(self.n[k][i]) / math.sqrt(1 - b3**self.t)
                update = self.lr * (m_hat + b2 * v_hat) / (root + self.eps)
                if self.no_prox:
                    tensors[k][i] = tensors[k][i] * (1 - self.lr * self.decay) - update
                else:
                    tensors[k][i] = (tensors[k][i] - update) / (1 + self.lr * self.decay)
                self.before[k][i] = g


class ScalarSaI:
    def __init__(self, lr: float, decay: float, momentum: float, limit: float) -> None:
        self.lr, self.decay, self.mu, self.limit, self.t = lr, decay, momentum, limit, 0

    def step(self, tensors: list[Vector], gradients: list[Vector]) -> None:
        gradients = clipped(gradients, self.limit, 1e-8)
        if self.t == 0:
            self.ratio, self.m = [], copy.deepcopy(gradients)
            for g in gradients:
                mean = sum(g) / len(g)
                std = math.sqrt(sum((x - mean) ** 2 for x in g) / (len(g) - 1))
                self.ratio.append(math.sqrt(sum(x * x for x in g)) / (std + 1e-8))
        self.t += 1
        for k, gs in enumerate(gradients):
            for i, g in enumerate(gs):
                if self.t > 1:
                    self.m[k][i] = self.mu * self.m[k][i] + (1 - self.mu) * g
                shrunk = (1 - self.lr * self.decay) * tensors[k][i]
                tensors[k][i] = shrunk - self.lr * self.ratio[k] * self.m[k][i]


class ScalarPaLM:
    def __init__(self, lr: float, decay: float, clip: float, limit: float) -> None:
        self.lr, self.decay, self.clip, self.limit, self.t = lr, decay, clip, limit, 0

    def step(self, tensors: list[Vector], gradients: list[Vector]) -> None:
        gradients = clipped(gradients, self.limit, 1e-8)
        if self.t == 0:
            self.m, self.v = ([[0.0] * len(g) for g in gradients] for _ in range(2))
        self.t += 1
        b2 = 1 - self.t**-0.8
        for k, gs in enumerate(gradients):
            size = max(1e-3, math.sqrt(sum(x * x for x in tensors[k]) / len(tensors[k])))
            self.v[k] = [b2 * v + (1 - b2) * (g * g + 1e-30) for v, g in zip(self.v[k], gs, strict=True)]
            u = [g / math.sqrt(v) for g, v in zip(gs, self.v[k], strict=True)]
            rms = math.sqrt(sum(x * x for x in u) / len(u))
            u = [x / max(1.0, rms / self.clip) for x in u] if self.clip else u
            for i, x in enumerate(u):
                self.m[k][i] = 0.9 * self.m[k][i] + 0.1 * self.lr * size * x
                tensors[k][i] -= self.m[k][i] + self.decay * self.lr**2 * tensors[k][i]


class MatrixConda:
    """Conda on numpy matrices, its products written out; vectors take Adam.

    Singular vectors are unique only up to sign and complement, so the bases are taken from `bases`, a function of the
    tensor's number, at multiples of the period, and checked to be what they must be: orthogonal, and singular for the
    reference's own momentum.
    """

    def __init__(
        self, lr: float, decay: float, period: int, mode: str, limit: float, bases: Callable[[int], Basis]
    ) -> None:
        self.lr, self.decay, self.period, self.mode, self.limit, self.t = lr, decay, period, mode, limit, 0
        self.bases, self.q = bases, dict[int, tuple[Any, Any]]()

    def look_up(self, k: int) -> None:
        rows, columns = self.m[k].shape
        wide = columns > rows
        wanted = {"short": (wide, not wide), "long": (not wide, wide), "left": (True, False), "right": (False, True)}
        sides = {**wanted, "full": (True, True)}[self.mode]
        q = [None if x is None else x.numpy().copy() for x in self.bases(k)]
        assert [x is not None for x in q] == list(sides)
        for x, square in zip(q, (self.m[k] @ self.m[k].T, self.m[k].T @ self.m[k]), strict=True):
            if x is not None:
                x = x if square.shape[0] == rows and x is q[0] else x.T
                assert np.abs(x.T @ x - np.eye(len(x))).max() < 1e-12
                turned = x.T @ square @ x
                assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-10 * np.abs(square).max()
        self.q[k] = (q[0], q[1])

    def step(self, tensors: list[Any], gradients: list[Any]) -> None:
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        factor = min(1.0, self.limit / (norm + 1e-8)) if self.limit else 1.0
        if self.t == 0:
            self.m, self.n = ([np.zeros_like(g) for g in gradients] for _ in range(2))
        for k, g in enumerate(gradients):
            g = g * factor
            self.m[k] = 0.9 * self.m[k] + (1 - 0.9) * g
            if g.ndim == 2 and self.mode != "identity" and self.t % self.period == 0:
                self.look_up(k)
            left, right = self.q.get(k, (None, None))

            def turn(x: Any, left: Any = left, right: Any = right) -> Any:
                x = x if left is None else left.T @ x
                return x if right is None else x @ right.T

            self.n[k] = 0.99 * self.n[k] + (1 - 0.99) * turn(g) ** 2
            t = self.t + 1
            size = self.lr * math.sqrt(1 - 0.99**t) / (1 - 0.9**t)
            step = turn(self.m[k]) / (np.sqrt(self.n[k]) + 1e-8)
            step = step if left is None else left @ step
            step = step if right is None else step @ right
            tensors[k] -= size * (0.25 if g.ndim == 2 else 1.0) * step
            tensors[k] *= 1 - self.lr * self.decay
        self.t += 1


# -- problems -------------------------------------------------------------------------------------------------------


def quadratic(tensors: list[Tensor]) -> Tensor:
    """A bowl with unequal axes and a tilt, so that no gradient has mean zero."""
    total = tensors[0].new_zeros(())
    for k, x in enumerate(tensors):
        axes = torch.linspace(0.1, 3.0 + k, x.numel(), dtype=x.dtype).reshape(x.shape)
        total = total + (0.5 * axes * x * x + (0.3 + 0.1 * k) * x).sum()
    return total


def tiny_net(tensors: list[Tensor]) -> Tensor:
    """A two-layer network's loss on fixed data; tensors (5, 3), (5,), (2, 5)."""
    x = torch.sin(0.7 * torch.arange(24, dtype=tensors[0].dtype) ** 2).reshape(8, 3)  # of full rank
    y = torch.cos(torch.arange(16, dtype=tensors[0].dtype)).reshape(8, 2)
    return ((torch.tanh(x @ tensors[0].T + tensors[1]) @ tensors[2].T - y) ** 2).mean()


PROBLEMS: dict[str, tuple[Callable[[list[Tensor]], Tensor], list[tuple[int, ...]]]] = {
    "quadratic": (quadratic, [(4, 3), (7,)]),
    "net": (tiny_net, [(5, 3), (5,), (2, 5)]),
}


def start(problem: str, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in PROBLEMS[problem][1]]


def run(
    problem: str, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = STEPS
) -> list[list[Tensor]]:
    loss, path = PROBLEMS[problem][0], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(list(parameters)).backward()
        optimizer.step()
        path.append([p.detach().clone() for p in parameters])
    return path


def follow(problem: str, rule: Any, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
    """The largest distance from the rule in 50 steps.

    In float64 each goes its own way, with the gradients of its own point. In float32 each step is compared: both get
    the rule's gradients and start from its point, with their own state, so that neither the network's rounding nor
    that of adding up fifty steps is counted as the optimizer's.
    """
    loss, shapes = PROBLEMS[problem]
    values = [p.detach().flatten().tolist() for p in start(problem)]
    worst = 0.0
    for _ in range(STEPS):
        at = [torch.tensor(v, dtype=torch.float64).reshape(s) for v, s in zip(values, shapes, strict=True)]
        grads = torch.autograd.grad(loss([x.requires_grad_() for x in at]), at)
        if parameters[0].dtype == torch.float64:
            run(problem, optimizer, parameters, 1)
        else:
            for p, x, g in zip(parameters, at, grads, strict=True):
                p.data, p.grad = x.detach().to(p.dtype), g.to(p.dtype)
            optimizer.step()
        rule.step(values, [g.flatten().tolist() for g in grads])
        wanted = [torch.tensor(v, dtype=torch.float64).reshape(s) for v, s in zip(values, shapes, strict=True)]
        worst = max(worst, gap([list(parameters)], [wanted]))
    return worst


def gap(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """The largest distance, relative to values above 1."""
    pairs = [
        (x.detach().double(), y.detach().double()) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    ]
    return max(float(((x - y).abs() / y.abs().clamp(min=1)).max()) for x, y in pairs)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-6


DTYPES = [torch.float64, torch.float32]


# -- Adan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_adan_is_the_published_rule(
    problem: str, no_prox: bool, limit: float, foreach: bool, dtype: torch.dtype
) -> None:
    p = start(problem, dtype)
    made = Adan(p, lr=1e-2, weight_decay=0.1, no_prox=no_prox, max_grad_norm=limit, foreach=foreach)
    assert follow(problem, ScalarAdan(1e-2, 0.1, no_prox, limit), made, p) < tolerance(dtype)


def test_the_two_decays_and_the_clip_are_not_the_same_thing() -> None:
    for other in (
        ScalarAdan(1e-2, 0.1, True, 0.0),
        ScalarAdan(1e-2, 0.1, False, 0.1),
        ScalarAdan(1e-2, 0.0, False, 0.0),
    ):
        p = start("net")
        assert follow("net", other, Adan(p, lr=1e-2, weight_decay=0.1), p) > 1e-6


def test_adan_agrees_with_other_implementations() -> None:
    package = pytest.importorskip("adan_pytorch")  # optional: the scalar reference above is the standard
    p = start("net")
    theirs = run("net", package.Adan(p, lr=1e-2, betas=(0.02, 0.08, 0.01), weight_decay=0.02), p, 1)
    q = start("net")
    ours = run("net", Adan(q, lr=1e-2), q, 1)
    # its first step leaves the moments at zero, so it does not move but for the decay: the published code moves
    assert gap(theirs, ours) > 1e-3
    states = []
    for module, cls, betas in ((p, package.Adan, (0.02, 0.08, 0.01)), (q, Adan, (0.98, 0.92, 0.99))):
        for t in module:
            t.data = torch.linspace(-1, 1, t.numel(), dtype=torch.float64).reshape(t.shape)
        made = cls(module, lr=1e-2, betas=betas, weight_decay=0.02)
        run("net", made, module, 1)
        states.append(made)
    for t, u in zip(p, q, strict=True):  # from one state on, both take the same path
        u.data = t.data.clone()
        mine, other = states[1].state[u], states[0].state[t]
        for key, name in (("m", "m"), ("v", "v"), ("n", "n"), ("before", "prev_grad")):
            mine[key].copy_(other[name])
    assert gap(run("net", states[0], p), run("net", states[1], q)) < 1e-9


def test_adan_agrees_with_timm() -> None:
    timm = pytest.importorskip("timm.optim")  # optional
    for no_prox in (False, True):
        p, q = start("net"), start("net")
        theirs = run("net", timm.Adan(p, lr=1e-2, weight_decay=0.02, no_prox=no_prox), p)
        assert gap(theirs, run("net", Adan(q, lr=1e-2, no_prox=no_prox), q)) < 1e-12


def test_adan_is_nesterovs_method() -> None:
    """With constant denominators: theta - lr b m follows accelerated gradient descent with look-ahead gradients."""
    b, rate, huge = 0.9, 0.05, 1e16
    a = torch.diag(torch.linspace(0.1, 4.0, 6, dtype=torch.float64))
    x0 = torch.linspace(-1, 1, 6, dtype=torch.float64)
    p = nn.Parameter(x0.clone())
    made = Adan([p], lr=rate * huge, betas=(b, b, 0.5), eps=huge, weight_decay=0.0)
    zeros = {k: torch.zeros_like(p) for k in ("m", "v", "n", "before")}
    made.state[p] = {"step": torch.tensor(100_000), **zeros}  # bias corrections are 1, no gradient before
    theta, m = x0.clone(), torch.zeros(6, dtype=torch.float64)
    for _ in range(STEPS):
        p.grad = a @ p.detach()
        made.step()
        m = b * m + (1 - b) * (a @ (theta - rate * b * m))  # the gradient ahead
        theta = theta - rate * m
        assert float((p.detach() - (theta - rate * b * m)).abs().max()) < 1e-10


def test_adan_restarts_as_new() -> None:
    p, q = start("net"), start("net")
    made = Adan(p, lr=1e-2)
    run("net", made, p, 10)
    made.restart()
    for a, b in zip(q, p, strict=True):
        a.data = b.data.clone()
    assert gap(run("net", made, p, 10), run("net", Adan(q, lr=1e-2), q, 10)) == 0
    p, q = start("net"), start("net")
    every = run("net", Adan(p, lr=1e-2, restart_every=10), p, 25)
    by_hand = Adan(q, lr=1e-2)
    path = run("net", by_hand, q, 10)
    by_hand.restart()
    path += run("net", by_hand, q, 10)
    by_hand.restart()
    assert gap(every, path + run("net", by_hand, q, 5)) == 0


def test_a_skipped_step_keeps_the_gradient_before() -> None:
    p = nn.Parameter(torch.ones(3))
    made = Adan([p])
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    made.step()
    p.grad = None  # the trainer skips: an overflow, or nothing flowed here
    made.step()
    assert made.state[p]["before"].tolist() == [1.0, 2.0, 3.0] and int(made.state[p]["step"]) == 1


def test_gradients_are_not_changed_by_clipping() -> None:
    for cls in (Adan, SGDSaI, Conda, PaLMAdafactor):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.tensor([10.0, 20.0, 30.0])
        cls([p], max_grad_norm=0.1).step()
        assert p.grad.tolist() == [10.0, 20.0, 30.0]


# -- SGD-SaI --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_sai_is_the_published_rule(
    problem: str, momentum: float, limit: float, foreach: bool, dtype: torch.dtype
) -> None:
    p = start(problem, dtype)
    made = SGDSaI(p, lr=1e-2, momentum=momentum, weight_decay=0.1, max_grad_norm=limit, foreach=foreach)
    assert follow(problem, ScalarSaI(1e-2, 0.1, momentum, limit), made, p) < tolerance(dtype)


def test_sai_agrees_with_its_package(capsys: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip("sgd_sai")  # optional
    p, q = start("net"), start("net")
    theirs = run("net", package.SGD_sai(p, lr=1e-2, weight_decay=0.1), p)
    assert gap(theirs, run("net", SGDSaI(q, lr=1e-2, weight_decay=0.1), q)) < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_ratio_of_a_normal_gradient_is_the_root_of_its_size(scale: float) -> None:
    g = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    assert abs(gsnr(g * scale).value - 100.0) < 0.5
    assert gsnr(g * scale).value == pytest.approx(gsnr(g).value, rel=1e-4)


def test_the_ratio_is_the_identity_of_its_mean() -> None:
    parameters = start("net")
    tiny_net(list(parameters)).backward()
    for p in parameters:
        g = p.grad
        assert g is not None
        d, mean = g.numel(), float(g.mean())
        assert gsnr(g, 0.0).value == pytest.approx(
            math.sqrt((d - 1) / (1 - d * mean**2 / float((g**2).sum()))), rel=1e-10
        )
    assert gsnr(torch.randn(100, generator=torch.Generator().manual_seed(0)) + 1).value > math.sqrt(99)


def test_gradients_without_a_ratio_get_a_finite_one_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    gradients = {
        "one number": torch.tensor([3.0]),
        "constant gradient": torch.full((17,), 0.1),
        "zero gradient": torch.zeros(5),
        "not finite": torch.tensor([1.0, math.inf]),
    }
    parameters = [nn.Parameter(torch.ones_like(g)) for g in gradients.values()]
    for p, g in zip(parameters, gradients.values(), strict=True):
        p.grad = g
    made = SGDSaI(parameters)
    with caplog.at_level(logging.WARNING):
        made.step()
    assert [why for _, why in made.fallbacks] == list(gradients) and len(caplog.records) == 4
    assert [float(made.state[p]["gsnr"]) for p in parameters] == [1.0, 4.0, 2.0, 1.0]
    assert all(torch.isfinite(p).all() for p in parameters[:3])


def test_a_resumed_run_does_not_measure_again() -> None:
    p, q = start("net"), start("net")
    made = SGDSaI(p)
    run("net", made, p, 3)
    other = SGDSaI(q)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for t, u in zip(p, q, strict=True):
        u.data = t.data.clone()
    q[0].grad = torch.randn_like(q[0]) * 5 + 9
    other.step()
    assert torch.equal(other.state[q[0]]["gsnr"], made.state[p[0]]["gsnr"])


# -- PaLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("clip", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_palm_is_the_published_rule(problem: str, clip: float, limit: float, dtype: torch.dtype) -> None:
    p = start(problem, dtype)
    made = PaLMAdafactor(p, lr=0.05, weight_decay=1.0, update_clip=clip, max_grad_norm=limit)
    assert follow(problem, ScalarPaLM(0.05, 1.0, clip, limit), made, p) < tolerance(dtype)


# -- Conda ----------------------------------------------------------------------------------------------------------

MODES = ["short", "long", "left", "right", "full", "identity"]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_conda_is_the_published_rule(problem: str, mode: Any, limit: float, foreach: bool) -> None:
    p = start(problem)
    made = Conda(p, lr=1e-2, weight_decay=0.1, period=20, mode=mode, project=True, max_grad_norm=limit, foreach=foreach)
    rule = MatrixConda(1e-2, 0.1, 20, mode, limit, lambda k: made.bases(p[k])[0])
    values = [t.detach().numpy().copy() for t in p]
    worst = 0.0
    for _ in range(STEPS):
        run(problem, made, p, 1)
        at = [torch.tensor(v, requires_grad=True) for v in values]
        rule.step(values, [g.numpy() for g in torch.autograd.grad(PROBLEMS[problem][0](at), at)])
        worst = max(worst, *(float(np.abs(v - t.detach().numpy()).max()) for v, t in zip(values, p, strict=True)))
    # where the momentum has directions of size zero, eps is all that is below the rounding of the products
    assert worst < (1e-12 if mode in ("short", "identity") else 1e-9)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
@pytest.mark.parametrize("mode", MODES)
def test_the_projection_loses_nothing(shape: tuple[int, int], mode: Any) -> None:
    g = torch.Generator().manual_seed(0)
    m, x = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    q = basis(m, mode)
    assert torch.allclose(q.project_back(q.project(x)), x, atol=1e-5)
    assert (q.left is not None) == (
        mode in ("left", "full") or (mode == "short") == (shape[0] < shape[1]) and mode in ("short", "long")
    )
    if mode == "full":
        off = q.project(m) - torch.zeros(shape).fill_diagonal_(1) * q.project(m)
        assert off.abs().max() < 1e-5  # its own basis makes a matrix diagonal


def test_the_basis_changes_at_multiples_of_the_period_alone() -> None:
    p = start("quadratic")
    made = Conda(p, lr=1e-2, period=4, project=True)
    seen = []
    for _ in range(13):
        run("quadratic", made, p, 1)
        seen.append(made.bases(p[0])[0].right.clone())  # type: ignore[union-attr]
    changed = [0] + [k for k in range(1, 13) if not torch.equal(seen[k], seen[k - 1])]
    assert changed == [0, 4, 8, 12]
    assert made.bases(p[1]) == []  # vectors have none
    frozen = Conda(start("quadratic"), project=True, period=0)
    q = frozen.param_groups[0]["params"]
    run("quadratic", frozen, q, 1)
    first = frozen.bases(q[0])[0].right.clone()  # type: ignore[union-attr]
    run("quadratic", frozen, q, 30)
    assert torch.equal(first, frozen.bases(q[0])[0].right)


def test_in_an_identity_basis_conda_is_adam() -> None:
    for problem in PROBLEMS:
        p, q = start(problem), start(problem)
        # eps is added before the bias correction by one and after it by the other; tiny, it does not tell them apart
        ours = Conda(p, lr=0.04, scale=0.25, eps=1e-14, mode="identity", project=True)
        ours.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        rates = [{"params": [t], "lr": 0.01 if t.ndim == 2 else 0.04} for t in q]
        theirs = torch.optim.Adam(rates, betas=(0.9, 0.99), eps=1e-14)
        assert gap(run(problem, ours, p), run(problem, theirs, q)) < 1e-7


def stable_rank(x: Tensor) -> float:
    s = torch.linalg.svdvals(x)
    return float((s**2).sum() / s[0] ** 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_conda_lifts_a_planted_spectrum(seed: int) -> None:
    """Gradients (U + noise) S V' with S from 1 to 1e-3: the stable rank of the update after 200 steps."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(64, 64, generator=g))[0] for _ in range(2))
    spectrum = torch.diag(torch.logspace(0, -3, 64))
    ranks = {}
    for name in ("conda", "adam"):
        w = nn.Parameter(torch.zeros(64, 64))
        adam = torch.optim.Adam([w], lr=1e-2, betas=(0.9, 0.99))
        made = Conda([w], project=True, period=20) if name == "conda" else adam
        noise = torch.Generator().manual_seed(seed + 10)
        for _ in range(200):
            w.grad = (u + torch.randn(64, 64, generator=noise) / 8) @ spectrum @ v.T
            before = w.detach().clone()
            made.step()
        ranks[name] = stable_rank(w.detach() - before)
    assert ranks["conda"] >= 3 * ranks["adam"], ranks


@pytest.mark.parametrize(
    "pieces", [Pieces(0, (4, 2, 2)), Pieces(1, (2, 2, 2)), Pieces(0, (3, 3, 3), heads=3), Pieces(1, (2, 2, 2), heads=2)]
)
def test_fused_matrices_come_apart_and_together(pieces: Pieces) -> None:
    total = sum(pieces.sizes)
    shape = (total, 5) if pieces.axis == 0 else (5, total)
    x = torch.arange(5.0 * total).reshape(shape)
    parts = pieces.split(x)
    assert [p.shape[pieces.axis] for p in parts] == list(pieces.sizes)
    assert torch.equal(pieces.join(parts), x)


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "bloom", "llama"])
def test_a_fused_matrix_moves_as_its_parts_would(family: str) -> None:
    from families import tiny

    hf = tiny(family).hf
    hf.requires_grad_(True)
    made = make_optimizer("conda", hf, lr=1e-2)
    rotated = [g for g in made.param_groups if g.get("project")]
    fused = [g for g in rotated if g["pieces"]]
    assert bool(fused) == (family != "llama")
    assert all(p.ndim == 2 for g in rotated for p in g["params"])
    assert not any(g.get("project") for g in made.param_groups if g["role"] != "matrix")
    for p in hf.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    if not fused:
        return
    group = fused[0]
    p, pieces = group["params"][0], Pieces(*group["pieces"])
    alone = [nn.Parameter(x.detach().clone()) for x in pieces.split(p)]
    for q, x in zip(alone, pieces.split(p.grad), strict=True):
        q.grad = x.clone()
    made.step()
    Conda(alone, lr=1e-2, project=True).step()
    assert torch.allclose(pieces.join([q.detach() for q in alone]), p.detach(), atol=1e-7)
    assert len(made.bases(p)) == 3  # type: ignore[attr-defined]
    layout = read(hf, group["names"][0])
    assert all(torch.equal(a, b) for a, b in zip(pieces.split(p.detach()), layout, strict=True))


def read(hf: Any, name: str) -> list[Tensor]:
    """Query, key and value matrices as the bench's anatomy reads them, in the parameter's own orientation."""
    from vesalius.model.anatomy import read_anatomy

    a = read_anatomy(hf)
    block = a.main.blocks[int(next(w for w in name.split(".") if w.isdigit()))]
    weight = dict(hf.named_parameters())[name].detach()
    inward = weight if name.split(".")[-2] == "c_attn" else weight.T
    found = [a.split_qkv(inward, side).flatten(-2) for side in ("q", "k", "v")]
    assert block.projections["q"] is block.projections["v"]
    return [f if inward is weight else f.T for f in found]


# -- sizes and forms ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, odd: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 11)
        if odd:
            self.temperature = nn.Parameter(torch.tensor(0.5))
            self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.idle = nn.Parameter(torch.ones(4, 4))  # never takes a gradient
        self.to(dtype)

    def loss(self, step: int, rows: slice = slice(None)) -> Tensor:
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (64, 2), generator=g)[rows]
        h = self.norm(torch.tanh(self.up(self.embed(ids[:, 0]))))
        logits = self.down(h)
        if hasattr(self, "temperature"):
            logits = logits * self.temperature
        exact = logits.float() if logits.dtype == torch.bfloat16 else logits
        return nn.functional.cross_entropy(exact, ids[:, 1])


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range, micro: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        for k in range(micro):
            (net.loss(step, slice(k * 64 // micro, (k + 1) * 64 // micro)) / micro).backward()
        optimizer.step()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    ("name", "copies"), [("adan", 4.0), ("sgd-sai", 1.0), ("adamw", 2.0), ("palm", 2.0), ("sgdm", 1.0)]
)
def test_the_state_is_as_large_as_published(name: str, copies: float) -> None:
    model = nn.Linear(300, 200)
    model(torch.randn(4, 300)).square().mean().backward()
    made = make_optimizer(name, model)
    made.step()
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    assert state_bytes(made) / bytes_ == pytest.approx(copies, abs=0.005)


def test_sai_keeps_half_of_adamws_state() -> None:
    sizes = {}
    for name in ("sgd-sai", "adamw"):
        model = nn.Linear(300, 200)
        model(torch.randn(4, 300)).square().mean().backward()
        made = make_optimizer(name, model)
        made.step()
        sizes[name] = state_bytes(made)
    assert abs(sizes["sgd-sai"] / sizes["adamw"] - 0.50) < 0.01


@pytest.mark.parametrize("name", ["adan", "sgd-sai", "conda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_and_blocks_are_one_rule(name: str, dtype: torch.dtype) -> None:
    """A tensor longer than a block, one that is not contiguous, and a small one."""
    g = torch.Generator().manual_seed(0)
    shapes = [torch.randn(BLOCK + 77, generator=g), torch.randn(6, 4, generator=g).T, torch.randn(3, generator=g)]
    ends = []
    for foreach in (False, True):
        p = [nn.Parameter(t.to(dtype, copy=True)) for t in shapes]
        made = OPTIMIZERS.get(name)(p, foreach=foreach, weight_decay=0.1, lr=1e-4)
        for k in range(5):
            for t, x in zip(p, shapes, strict=True):
                t.grad = torch.sin(x * (k + 1)).to(dtype) + 0.1
            made.step()
        ends.append([t.detach().clone() for t in p])
        assert not p[1].is_contiguous()
    worst = max(float(((a - b).abs() / (1 + a.abs())).max()) for a, b in zip(*ends, strict=True))
    assert worst < (1e-12 if dtype == torch.float64 else 1.5e-7)  # float32 itself is 1.2e-7 apart


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_accumulated_gradients_take_the_same_path(name: str) -> None:
    nets = []
    for micro in (1, 4):
        net = Net(torch.float64)
        train(net, make_optimizer(name, net), range(10), micro)
        nets.append(weights(net))
    assert float((nets[0] - nets[1]).abs().max()) < 1e-5


# -- the contract of every optimizer --------------------------------------------------------------------------------


def through_safetensors(optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """The state dict after its tensors went through a file, which takes tensors alone."""
    saved = optimizer.state_dict()
    flat = {f"{i}.{k}": v.contiguous() for i, s in saved["state"].items() for k, v in s.items()}
    assert all(isinstance(v, Tensor) for v in flat.values())
    save_file(flat, path)
    state: dict[int, dict[str, Tensor]] = {i: {} for i in saved["state"]}
    for name, value in load_file(path).items():
        number, key = name.split(".", 1)
        state[int(number)][key] = value
    return {"state": state, "param_groups": saved["param_groups"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_resumes_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    extra = {"period": 4} if name == "conda" else {}
    whole = Net(dtype)
    train(whole, make_optimizer(name, whole, **extra), range(14))
    first = Net(dtype)
    made = make_optimizer(name, first, **extra)
    train(first, made, range(7))
    second = Net(dtype)
    second.load_state_dict(first.state_dict())
    other = make_optimizer(name, second, **extra)
    other.load_state_dict(through_safetensors(made, tmp_path / "state.safetensors"))
    assert state_bytes(other) == state_bytes(made)
    train(second, other, range(7, 14))
    assert torch.equal(weights(second), weights(whole))
    assert all(p.dtype == dtype for p in second.parameters())
    train(first, made, range(7, 14))  # loading did not tie the two together
    assert torch.equal(weights(first), weights(whole))


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_learns(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net)

    def held() -> float:
        return float(net.loss(0).detach())

    before = held()
    for _ in range(60):
        train(net, made, range(1))
    assert held() < before - 0.05


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_leaves_alone_what_has_no_gradient(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net, weight_decay=0.0)
    train(net, made, range(3))
    assert torch.equal(net.idle.detach(), torch.ones(4, 4)) and net.idle not in {p for p, s in made.state.items() if s}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    fresh = Net()
    quiet = make_optimizer(name, fresh, weight_decay=0.0)
    before = weights(fresh)
    for p in fresh.parameters():
        p.grad = torch.zeros_like(p)
    quiet.step()
    assert torch.equal(weights(fresh), before)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_decays_only_what_should_decay(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net, no_decay=("vector", "embedding"), weight_decay=0.1, lr=0.5)
    for p in net.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    made.step()
    moved = {n: float(p.detach().mean()) for n, p in net.named_parameters()}
    still = {"embed.weight", "up.bias", "norm.weight", "norm.bias", "down.bias"}
    assert all(moved[n] == 1.0 for n in still)
    assert all(moved[n] < 1.0 for n in moved.keys() - still)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_takes_odd_shapes(name: str) -> None:
    net = Net(odd=True)
    made = make_optimizer(name, net)
    train(net, made, range(5))
    assert float(net.temperature.detach()) != 0.5 and bool(torch.isfinite(weights(net)).all())
    if name in ("adan", "conda", "palm", "sgd-sai"):  # and on their own, empty ones too
        p = nn.Parameter(torch.zeros(0, 3))
        p.grad = torch.zeros(0, 3)
        OPTIMIZERS.get(name)([{"params": [p], "project": True}] if name == "conda" else [p]).step()


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_same_run_same_bits_and_copies_stand_alone(name: str) -> None:
    ends = []
    for _ in range(2):
        net = Net()
        made = make_optimizer(name, net)
        train(net, made, range(6))
        ends.append(weights(net))
    assert torch.equal(*ends)
    twin = copy.deepcopy({"net": net, "optimizer": made})
    for p, q in zip(net.parameters(), twin["net"].parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()  # copying a parameter leaves its gradient behind
    loss = made.step(lambda: net.loss(9))
    assert loss is not None and float(loss.detach()) > 0  # a closure's loss comes back
    twin["optimizer"].step()
    assert torch.equal(weights(net), weights(twin["net"])) and not torch.equal(weights(net), ends[0])


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_follows_a_rate_set_from_outside(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net)
    train(net, made, range(3))
    before = weights(net)
    for group in made.param_groups:
        group["lr"] = 0.0
    train(net, made, range(3, 4))
    moved = float((weights(net) - before).abs().max())
    assert moved == 0.0 if name != "palm" else moved > 0  # PaLM averages updates: those of earlier rates go on
    assert settings(name)["lr"] > 0 and OPTIMIZERS.entry(name).paper and OPTIMIZERS.entry(name).summary


def test_groups_are_in_order_and_complete() -> None:
    net = Net(odd=True)
    net.up.weight.requires_grad_(False)
    made = groups(net, 0.1)
    assert [g["role"] for g in made] == ["embedding", "matrix", "vector"]
    assert [g["names"] for g in made][1:] == [
        ["idle", "down.weight"],
        ["temperature", "up.bias", "norm.weight", "norm.bias", "down.bias"],
    ]
    assert [g["weight_decay"] for g in made] == [0.1, 0.1, 0.0]
    listed = [id(p) for g in made for p in g["params"]]
    wanted = {id(p) for p in net.parameters() if p.requires_grad and p.numel()}
    assert len(listed) == len(set(listed)) and set(listed) == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_optimizer("adn", Net()), "did you mean 'adan'"),
        (
            lambda: make_optimizer("adan", Net(), beta=1),
            "unknown setting of optimizer adan 'beta'; did you mean 'betas'",
        ),
        (lambda: make_optimizer("adan", Net(), lr=-1.0), "lr = -1.0 of Adan"),
        (lambda: make_optimizer("adan", Net(), lr=float("nan")), "lr = nan of Adan"),
        (lambda: make_optimizer("adan", Net(), betas=(0.9, 0.9)), "three betas"),
        (lambda: make_optimizer("conda", Net(), betas=(0.9, 1.0)), "1.0 for Conda"),
        (lambda: make_optimizer("conda", Net(), mode="shrt"), "mode 'shrt'"),
        (lambda: make_optimizer("conda", Net(), period=-1), "period = -1"),
        (lambda: make_optimizer("sgd-sai", Net(), momentum=1.5), "1.5 for SGDSaI"),
        (lambda: make_optimizer("adamw", Net().requires_grad_(False)), "nothing to train"),
        (lambda: make_optimizer("adamw", Net(), no_decay=("vectors",)), "did you mean 'vector'"),
    ],
)
def test_nonsense_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(VesaliusError, match=message):
        call()


def test_a_momentum_that_is_not_finite_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.full((3, 3), math.nan)
    with pytest.raises(VesaliusError, match="3 x 3 matrix is not finite"):
        Conda([p], project=True).step()
