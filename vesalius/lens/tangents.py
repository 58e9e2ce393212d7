"""MLPs on a path: linear at a point, which is chosen between two prompts or as the mean of a text.

    y <- grad_x [ y . MLP(norm(x)) ]

On the boundary between a prompt that leads to the observable's first side and one that leads to the second, the MLP
tells the two apart (Dunefsky and Cohan 2024, arXiv 2312.16291, sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vesalius.lens.places import entry, named
from vesalius.lens.texts import states, token_rows
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap
from vesalius.model.memory import memory_errors
from vesalius.parts import Part, parse_part

Points = Callable[[Part, Tensor], Tensor]  # of an MLP and a functional of its write, the state to take the tangent at
STEPS = 64


def between_prompts(model: Model, positive: str, negative: str) -> Points:
    """Tangents on the boundary between the last tokens of two prompts, for `pull_back`."""

    def point(part: Part, y: Tensor) -> Tensor:
        place = named(model, entry(model, part))
        rows = [token_rows(model, [text], None, length=10**6) for text in (positive, negative)]
        return boundary(model, part, y, *(states(model, some, place)[-1] for some in rows))

    return point


def mean_states(model: Model, rows: Sequence[Tensor]) -> Points:
    """Tangents at the mean state over rows of token ids (1, pos), for `pull_back`."""
    return lambda part, y: states(model, rows, named(model, entry(model, part))).mean(0)


def mlp_tangent(model: Model, part: Part | str, y: Tensor, point: Tensor) -> Tensor:
    """grad_x [ y . MLP(norm(x)) ] at one state x (d_model,) of the stream before the MLP's norm, (d_model,)."""
    x = point.detach().to(model.device, torch.float32, copy=True).requires_grad_(True)
    with torch.enable_grad():
        written = mlp_output(model, parse_part(part), x[None])[0].float()
        (grad,) = torch.autograd.grad(written @ y.to(written), [x])
    return grad


def boundary(model: Model, part: Part | str, y: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The state between two where an MLP's write stops raising the functional y and begins to lower it.

    The first x(t) = (1 - t) negative + t positive with y . MLP(norm(x(t))) = 0, or, where both ends have one sign,
    midway between its values there.

    Args:
        y: functional of the MLP's write, (d_model,). positive, negative: states (d_model,) before the MLP's norm.
    """
    t = torch.linspace(0, 1, STEPS)
    x = negative.float().cpu() + t[:, None] * (positive - negative).float().cpu()
    with torch.no_grad():
        values = (mlp_output(model, parse_part(part), x.to(model.device)).float().cpu() @ y.float().cpu()).double()
    first, last = float(values[0]), float(values[-1])
    values = values - (0.0 if first * last < 0 else (first + last) / 2)
    crossed = (values[1:].sign() != values[:-1].sign()).nonzero().flatten()
    if not len(crossed):
        return x[STEPS // 2]
    i = int(crossed[0])
    share = float(values[i] / (values[i] - values[i + 1]))
    return torch.lerp(x[i], x[i + 1], share)


class _Stop(Exception):
    """Ends a forward pass once the MLP has written."""


def mlp_output(model: Model, part: Part, x: Tensor) -> Tensor:
    """What an MLP writes for states (n, d_model) of the stream before its norm; differentiable."""
    out: list[Tensor] = []

    def stop(written: Tensor) -> None:
        out.append(written)
        raise _Stop

    layer, prefix = part.layer or 0, part.stack or model.anatomy.main.prefix
    norm = None if model.anatomy.post_norm else model.anatomy.block(layer, prefix).norm_mid
    taps: dict[Site, list[Tap]] = {
        Site("mlp_in", layer, prefix): [lambda read: (x if norm is None else norm.module(x)).to(read.dtype)[:, None]],
        Site("mlp_out", layer, prefix): [stop],
    }
    ids = torch.zeros(len(x), 1, dtype=torch.long)
    decoder = ids if model.kind == "encoder-decoder" else None
    try:
        with model.alone(), memory_errors(), Hooks(model.hf, model.anatomy, taps):
            model.hf(**model.inputs(ids, decoder=decoder))
    except _Stop:
        pass
    return out[0][:, 0]
