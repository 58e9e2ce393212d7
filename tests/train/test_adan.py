"""Adan against its published rule, other implementations, and Nesterov's method."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from optimizer_rules import (
    DTYPES,
    PROBLEMS,
    STEPS,
    ScalarAdan,
    follow,
    gap,
    run,
    start,
    tolerance,
)
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from vesalius.errors import VesaliusError
from vesalius.train.optimizers.adan import Adan
from vesalius.train.optimizers.conda import Conda
from vesalius.train.optimizers.palm import PaLMAdafactor
from vesalius.train.optimizers.sgd_sai import SGDSaI

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


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_one_compiled_kernel_is_the_published_rule() -> None:
    for no_prox, limit in ((False, 0.0), (True, 0.5)):
        p = start("net", torch.float32)
        made = Adan(p, lr=1e-2, weight_decay=0.1, no_prox=no_prox, max_grad_norm=limit, fused=True)
        assert follow("net", ScalarAdan(1e-2, 0.1, no_prox, limit), made, p) < tolerance(torch.float32)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise TorchDynamoException("no g++ here")

    monkeypatch.setattr("vesalius.train.optimizers.adan._kernel", lambda: missing)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(VesaliusError, match="compiler .* leave fused out"):
        Adan([p], fused=True).step()
    assert p.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(VesaliusError, match="either fused or foreach"):
        Adan([p], fused=True, foreach=True)


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
