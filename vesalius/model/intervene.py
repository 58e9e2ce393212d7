"""Interventions: replace, add to, scale, map, zero a part, at chosen positions; and what to put in its place.

An `Intervention` is data; `taps` turns several of them, for several variants of a batch, into functions for `Hooks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vesalius.errors import PartError
from vesalius.model.hooks import Site, Tap
from vesalius.model.model import Capture, Model
from vesalius.parts import Part

Op = Literal["set", "add", "scale", "zero", "map"]
Ablation = Literal["zero", "mean", "resample", "counterfactual"]


@dataclass(frozen=True)
class Where:
    """The site a part lives in, and its slice there."""

    site: Site
    head: int | None = None
    neuron: int | None = None

    def read(self, x: Tensor) -> Tensor:
        """The part's own slice of a site tensor."""
        if self.head is not None:
            return x[:, self.head] if self.site.name.endswith("pattern") else x[:, :, self.head]
        return x[..., self.neuron] if self.neuron is not None else x


def locate(part: Part) -> Where:
    """Where a part is read and written."""
    layer = part.layer if part.layer is not None else 0
    if part.kind == "head":
        return Where(Site(part.side or "z", layer, part.stack), head=part.index)
    if part.kind == "xhead":
        return Where(Site(f"cross_{part.side or 'z'}", layer, part.stack), head=part.index)
    if part.kind == "neuron":
        return Where(Site("neurons", layer, part.stack), neuron=part.index)
    if part.kind == "embed":
        return Where(Site("resid_pre", 0, part.stack))
    name = {"mlp": "mlp_out", "attn": "attn_out"}.get(part.kind, part.kind)
    if name == "unembed":
        raise PartError(
            "unembed is where the residual stream is read; intervene on the last block's resid_post instead"
        )
    return Where(Site(name, layer, part.stack))


@dataclass(frozen=True)
class Intervention:
    """One change to one part.

    Attributes:
        part: what is changed.
        op: `set` to a value, `add` a value, `scale` by a value, `zero`, or `map`: the activation times a matrix (d, d),
            such as I - u u^T, which projects a direction out.
        value: a number, or a tensor that broadcasts against the part's activation (row, pos, d), all positions.
        positions: positions to change, (row,) or (row, k), -1 for none in that row; None for all.
        pattern: the change is to the head's attention pattern (row, query, key) instead of its output.
    """

    part: Part
    op: Op = "set"
    value: Tensor | float | None = None
    positions: Tensor | None = None
    pattern: bool = False

    @property
    def where(self) -> Where:
        if not self.pattern:
            return locate(self.part)
        prefix = "cross_" if self.part.kind == "xhead" else ""
        return Where(Site(f"{prefix}pattern", self.part.layer or 0, self.part.stack), head=self.part.index)

    def changed(self, old: Tensor, start: int = 0) -> Tensor:
        """The new activation, given the old one (row, pos - start, ...), at positions from `start` on."""
        value = self.value
        if isinstance(value, Tensor):
            value = value.to(old.device, old.dtype)
            axis = 1  # position (or query) axis; a value may cover all positions or only those computed
            if value.dim() == old.dim() and start and value.shape[axis] == old.shape[axis] + start:
                value = value.narrow(axis, start, old.shape[axis])
        if self.op == "zero":
            new = torch.zeros_like(old)
        elif value is None:
            raise PartError(f"intervention '{self.op}' on {self.part} needs a value")
        elif self.op == "set":
            new = value.expand_as(old) if isinstance(value, Tensor) else torch.full_like(old, float(value))
        elif self.op == "add":
            new = old + value
        elif self.op == "map":
            if not isinstance(value, Tensor) or value.shape != (old.shape[-1],) * 2 or old.dim() < 3 or self.pattern:
                found, d = tuple(value.shape) if isinstance(value, Tensor) else value, old.shape[-1]
                raise PartError(f"'map' on {self.part} needs a matrix of its width, ({d}, {d}), not {found}")
            new = old @ value
        else:
            new = old * value
        if self.positions is None:
            return new
        keep = position_mask(self.positions, old.shape[1] + start)[:, start:].to(old.device)
        return torch.where(keep.view(*keep.shape, *[1] * (old.dim() - 2)), new, old)


def position_mask(positions: Tensor, length: int) -> Tensor:
    """Positions (row,) or (row, k), -1 for none, as a boolean mask (row, length)."""
    positions = positions.unsqueeze(1) if positions.dim() == 1 else positions
    mask = torch.zeros(positions.shape[0], length + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(positions < 0, length, positions).cpu(), True)
    return mask[:, :length]


def taps(variants: Sequence[Sequence[Intervention]], rows: int, start: int = 0) -> dict[Site, list[Tap]]:
    """Functions for `Hooks` that apply variant i's interventions to rows [i * rows, (i + 1) * rows).

    Args:
        variants: for each variant of the batch, its interventions in order.
        rows: rows of one variant. start: first position the pass computes.
    """
    by_site: dict[Site, list[tuple[int, Intervention]]] = {}
    for i, interventions in enumerate(variants):
        for item in interventions:
            by_site.setdefault(item.where.site, []).append((i, item))

    def make(items: Sequence[tuple[int, Intervention]]) -> Tap:
        def tap(x: Tensor) -> Tensor:
            x = x.clone()
            for i, item in items:
                mine = x[i * rows : (i + 1) * rows]
                where = item.where
                view = where.read(mine)
                view.copy_(item.changed(view, start))
            return x

        return tap

    return {site: [make(items)] for site, items in by_site.items()}


def first_layer(interventions: Sequence[Intervention]) -> int:
    """The first block that any of these touches."""
    return min(item.where.site.layer for item in interventions)


def sites_of(parts: Sequence[Part]) -> list[Site]:
    """The distinct sites of these parts, in order."""
    return list(dict.fromkeys(locate(p).site for p in parts))


def ablation_value(
    source: Mapping[Site, Tensor] | Capture, part: Part, kind: Ablation, order: Tensor | None = None
) -> Tensor:
    """What replaces a part under an ablation, from activations recorded on the counterfactual prompts.

    Args:
        source: sites recorded on the counterfactual (or any reference) prompts, aligned by row.
        kind: `zero`; `mean` over rows at each position; `resample` another row's (a fixed permutation `order`);
            `counterfactual` the same row's.

    Returns:
        (row or 1, pos, ...).
    """
    sites = source.sites if isinstance(source, Capture) else source
    where = locate(part)
    x = where.read(sites[where.site])
    if kind == "zero":
        return torch.zeros_like(x[:1])
    if kind == "mean":
        return x.mean(dim=0, keepdim=True)
    if kind == "resample":
        if order is None:
            raise ValueError("resample ablation needs an order")
        return x[order.to(x.device)]
    return x


def capture_parts(
    model: Model, ids: Tensor, mask: Tensor, parts: Sequence[Part], decoder: Tensor | None = None
) -> Capture:
    """One forward pass recording what `parts` need."""
    return model.run(ids, mask, capture=sites_of(parts), decoder=decoder)
