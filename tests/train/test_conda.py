"""Conda against its published rule: the basis, its period, and what a rotation does to a spectrum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from optimizer_rules import (
    PROBLEMS,
    STEPS,
    MatrixConda,
    gap,
    run,
    start,
)
from torch import Tensor, nn

from vesalius.train.optimizers import make_optimizer
from vesalius.train.optimizers.conda import Conda, Pieces, basis

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
