"""SGD-SaI and PaLM's Adafactor against their published rules."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from optimizer_rules import (
    DTYPES,
    PROBLEMS,
    ScalarPaLM,
    ScalarSaI,
    follow,
    gap,
    run,
    start,
    tiny_net,
    tolerance,
)
from torch import nn

from vesalius.train.optimizers.palm import PaLMAdafactor
from vesalius.train.optimizers.sgd_sai import SGDSaI, gsnr

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
