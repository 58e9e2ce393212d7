"""Norms that stand by constants: their place in a model, and a checkpoint in which nothing depends on the input's size.

    real      y = g * centred(x) / s(x) + b,  s(x)^2 = mean(centred(x)^2) + eps     (RMSNorm: not centred, no b)
    constant  y = g * centred(x) / s    + b,  s a number

A checkpoint of a stock class has no place for s. But with eps = 2^50 the mean square, below 2^26, is less than half of
eps's last digit in float32: their sum is eps, its root is 2^25, and division by a power of two rounds nothing. So with
g' = g 2^25 / s the stock class itself computes the constant norm, whatever the input: its only error is g' rounded.
Heimersheim 2024 (arXiv 2409.13710) and Baroni et al. 2025 (arXiv 2507.02559) remove norms; the huge eps is theirs.

One eps serves all norms of a stock class. Where some are still real, the checkpoint keeps their constants beside it, in
`norms.json`: Vesalius reads it, and transformers alone opens the model with all of its norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vesalius.errors import ModelError
from vesalius.model.anatomy import Anatomy
from vesalius.model.norms import NormKind, NormView
from vesalius.records import read_json

FILE = "norms.json"  # beside a checkpoint some of whose norms are constants
EPS = 2.0**50
ROOT = 2.0**25
KEYS = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")


class ConstantNorm(nn.Module):
    """Stands for a norm, with its parameters under their own names; it is that norm until it is told otherwise.

    Args:
        norm: the real one. kind: its formula. name: of the module in the model.

    Attributes:
        state: `real`, `constant`, or `split`: constant for what reads it but `values`, which is given the real output.
        sizes: (3,) constants for tokens, for the first position, and for separators.
        shared: what the forward pass knows of its tokens: `kinds` (row, pos), 0 to 2 as in `sizes`, or None.
    """

    def __init__(self, norm: nn.Module, kind: NormKind, name: str, shared: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.weight, self.bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        self.eps = NormView(norm, kind).eps
        self.kind, self.name, self.state = kind, name, "real"
        self.shared: dict[str, Any] = {} if shared is None else shared
        self.register_buffer("sizes", torch.full((3,), torch.nan), persistent=False)
        self.sizes: Tensor
        self.values: Tensor | None = None  # the real output, for a split norm
        self.seen: Tensor | None = None  # sizes of the last input, while `watch` is set, (row, pos)
        self.watch = False
        self._real = (norm,)  # not a part of this module: its parameters are counted once

    @property
    def constant(self) -> float | None:
        """What all tokens are divided by; None while that depends on the input or the position."""
        same = bool(torch.isfinite(self.sizes[0])) and bool((self.sizes == self.sizes[0]).all())
        return float(self.sizes[0]) if self.state == "constant" and same else None

    def size(self, x: Tensor) -> Tensor:
        """s(x), (row, pos), float32."""
        x = x.float()
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return (x.pow(2).mean(-1) + self.eps).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """X (row, pos, d_model)."""
        if self.watch:
            self.seen = self.size(x)
        if self.state == "real":
            return self._real[0](x)
        self.values = self._real[0](x) if self.state == "split" else None
        view = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.kind == "layer":
            view = view - view.mean(-1, keepdim=True)
        view = view / self._divisor(x).to(view)
        if self.weight is not None:
            view = view * (self.weight + 1 if self.kind == "rms+1" else self.weight)
        return (view if self.bias is None else view + self.bias).to(x.dtype)

    def _divisor(self, x: Tensor) -> Tensor:
        if bool((self.sizes == self.sizes[0]).all()):
            return self.sizes[0]
        kinds = self.shared.get("kinds")
        if kinds is None or kinds.shape != x.shape[:-1]:
            kinds = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
            if x.ndim == 3:
                kinds[:, 0] = 1
        return self.sizes[kinds].unsqueeze(-1)

    def folded(self) -> Tensor:
        """g', the gain of the same norm in a checkpoint with eps = 2^50."""
        assert self.constant is not None and self.weight is not None
        gain = self.weight.detach() + 1 if self.kind == "rms+1" else self.weight.detach()
        gain = (gain.double() * (ROOT / self.constant)).to(self.weight.dtype)
        return gain - 1 if self.kind == "rms+1" else gain


class Place(NamedTuple):
    """A norm of a model and what reads it: `mlp`, `attn` or `unembed`, in which block."""

    name: str
    view: NormView
    reads: str
    layer: int | None

    @property
    def address(self) -> str:
        """As people write it: `L3.MLP`, `L3.attn`, `unembed`."""
        return "unembed" if self.layer is None else f"L{self.layer}.{'MLP' if self.reads == 'mlp' else 'attn'}"


def places(hf: PreTrainedModel, anatomy: Anatomy) -> list[Place]:
    """The norms that can be taken out, in forward order; one that attention and MLP share counts as attention's."""
    names = {id(m): n for n, m in hf.named_modules()}
    found: list[Place] = []
    for block in anatomy.main.blocks:
        for view, reads in ((block.norm_in, "attn"), (block.norm_mid, "mlp")):
            if view.kind != "none" and all(p.view.module is not view.module for p in found):
                found.append(Place(names[id(view.module)], view, reads, block.layer))
    final = anatomy.main.final_norm
    if final is not None and final.kind != "none":
        found.append(Place(names[id(final.module)], final, "unembed", None))
    return found


def lasting(hf: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """Names of the norms that are none of `places`: on queries and keys, on writes, on the embedding."""
    mine = {id(p.view.module) for p in places(hf, anatomy)}
    kinds = {type(p.view.module) for p in places(hf, anatomy)} | {nn.LayerNorm}
    return [n for n, m in hf.named_modules() if type(m) in kinds and id(m) not in mine]


def eps_key(hf: PreTrainedModel, eps: float) -> tuple[str, ...] | None:
    """Where the model's configuration keeps the eps of its norms; None if it keeps none."""
    shape = getattr(hf.config, "architecture", None)
    if isinstance(shape, Mapping):
        return ("architecture", "norm", "eps")
    return next(((k,) for k in KEYS if getattr(hf.config, k, None) == eps), None)


def is_norm_free(anatomy: Anatomy) -> bool:
    """Whether no norm of the model depends on its input's size: they are constants, absent, or have a huge eps."""
    views = [v for b in anatomy.main.blocks for v in b.norms]
    views += [anatomy.main.final_norm] if anatomy.main.final_norm is not None else []
    return all(v.fixed for v in views)


def install(hf: PreTrainedModel, chosen: list[Place], shared: dict[str, Any] | None = None) -> list[ConstantNorm]:
    """Puts a `ConstantNorm` in the place of each chosen norm; read the anatomy anew afterwards."""
    made = []
    for place in chosen:
        parent, _, leaf = place.name.rpartition(".")
        norm = ConstantNorm(place.view.module, place.view.kind, place.name, shared).to(next(hf.parameters()).device)
        norm.train(place.view.module.training)
        setattr(hf.get_submodule(parent), leaf, norm)
        made.append(norm)
    return made


def constants_of(hf: nn.Module) -> list[ConstantNorm]:
    """The stand-ins in a model."""
    return [m for m in hf.modules() if isinstance(m, ConstantNorm)]


def restore(hf: PreTrainedModel, folder: Path, anatomy: Anatomy) -> None:
    """Makes constants of the norms that the checkpoint's `norms.json` names.

    Raises:
        ModelError: if the checkpoint was saved while norms were being taken out.
    """
    if not (folder / FILE).exists():
        return
    told = read_json(folder / FILE, "train the run again")
    if told["between"]:
        raise ModelError(
            f"{folder} was saved while norms were being taken out ({len(told['constants'])} of {told['of']} so far), "
            f"and its constants differ by position; open a step from {told['until']} on"
        )
    known = {p.name: p for p in places(hf, anatomy)}
    if lost := [n for n in told["constants"] if n not in known]:
        raise ModelError(f"{folder / FILE} names the norm {lost[0]}, which the model has not; train the run again")
    for norm in install(hf, [known[n] for n in told["constants"]]):
        norm.sizes.fill_(float(told["constants"][norm.name]))
        norm.state = "constant"
