"""Propagation rules of relevance patching, as changed backward passes; every forward value stays as it is, bit for bit.

RelP (Jafari et al. 2025, arXiv 2508.21258) replaces the gradient of attribution patching by layer-wise relevance
coefficients:

    LN-rule        a norm's scale is constant (Ali et al. 2022): dy/dx = gain * scale (centred for LayerNorm)
    identity rule  y = f(v) for GELU and SiLU counts as y = v * [f(v) / v], the bracket constant
    half rule      a gate's product y = g * u sends half of its relevance to each factor
    AH-rule        the attention pattern is constant (off by default: it hides query and key paths)

Linear maps keep their gradient (the 0-rule).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.model.hooks import Hooks, Site
from vesalius.model.model import Model
from vesalius.model.norms import NormView

_STABLE = 1e-6  # keeps f(v) / v finite; the reference implementation's value


@dataclass(frozen=True)
class Rules:
    """Which propagation rules are on."""

    norm: bool = True
    identity: bool = True
    half: bool = True
    pattern: bool = False


class _Norm(torch.autograd.Function):
    """Forward: the norm's own output. Backward: its scale held fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, view: NormView) -> Tensor:
        ctx.save_for_backward(x)
        ctx.view = view
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        g = grads[0]
        return ctx.view.vjp(g.float(), x, frozen=True).to(g.dtype), None, None


class _Ratio(torch.autograd.Function):
    """Forward: f(v) as computed. Backward: times f(v) / v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y / (v + torch.where(v < 0, -_STABLE, _STABLE)))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return grads[0] * ratio, None


class _Scale(torch.autograd.Function):
    """Forward: the identity. Backward: times a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


@contextmanager
def relevance(model: Model, rules: Rules | None = None) -> Iterator[None]:
    """Backward passes inside this block follow the rules; forward values do not change."""
    rules = rules or Rules()
    a = model.anatomy
    with ExitStack() as exits:

        def on_output(module: nn.Module, hook: Any) -> None:
            exits.callback(module.register_forward_hook(hook).remove)

        norms = [n for s in a.stacks.values() for b in s.blocks for n in b.norms]
        norms += [s.final_norm for s in a.stacks.values() if s.final_norm is not None]
        for view in {id(n.module): n for n in norms}.values() if rules.norm else ():

            def norm_hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, view: NormView = view) -> Tensor:
                return _Norm.apply(args[0], out.detach(), view)  # type: ignore[no-untyped-call]

            on_output(view.module, norm_hook)
        blocks = [b for s in a.stacks.values() for b in s.blocks]
        acts = {id(b.act): b.act for b in blocks if b.act is not None and not isinstance(b.act, nn.ReLU)}
        for act in acts.values() if rules.identity else ():
            on_output(act, lambda _, args, out: _Ratio.apply(args[0], out.detach()))  # type: ignore[no-untyped-call]
        if rules.half and a.gated:
            for block in blocks:
                handle = block.down.register_forward_pre_hook(lambda _, args: (_Scale.apply(args[0], 0.5), *args[1:]))  # type: ignore[no-untyped-call]
                exits.callback(handle.remove)
        if rules.pattern:
            sites: dict[Site, list[Any]] = {}
            for block in blocks:
                sites[Site("pattern", block.layer, block.stack)] = [Tensor.detach]
                if block.cross is not None:
                    sites[Site("cross_pattern", block.layer, block.stack)] = [Tensor.detach]
            exits.enter_context(Hooks(model.hf, a, sites))
        yield
