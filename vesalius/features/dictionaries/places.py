"""Where a dictionary reads: a site of one block, by the address of a part or by the name other tools give its hook.

L12.resid_post, L12.resid_mid, L12.resid_pre    the residual stream, (pos, d_model)
L12.attn, L12.MLP                               what attention and the MLP write, (pos, d_model)
L12.z                                           all heads of a block before W_O, side by side, (pos, heads * d_head)
L12.neurons, L12.mlp_in                         what the MLP's last matrix multiplies, and what the MLP reads
"""

from __future__ import annotations

import re
from contextlib import suppress

import torch
from torch import Tensor, nn

from vesalius.errors import ModelError, PartError
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap
from vesalius.model.intervene import locate
from vesalius.model.memory import memory_errors
from vesalius.model.weights import matrix
from vesalius.parts import Part, parse_part

_SITE = re.compile(
    r"(?:(?P<stack>enc|dec)\.)?L(?P<layer>\d+)\.(?P<name>z|neurons|mlp_in|mlp_out|attn_out)", re.IGNORECASE
)
_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "neurons": "mlp.hook_post",
    "mlp_in": "ln2.hook_normalized",
}
_HOOK = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<hook>[\w.]+)")
_SHOWN = {"attn_out": "attn", "mlp_out": "MLP"}


def parse_place(text: str | Site) -> Site:
    """The site of an address or hook name.

    Raises:
        PartError: if it names none, or a single head or neuron, which is no vector of the whole site.

    Example:
        >>> parse_place("L12.resid_post").name, parse_place("blocks.3.attn.hook_z").layer, parse_place("L4.MLP").name
        ('resid_post', 3, 'mlp_out')
    """
    if isinstance(text, Site):
        return text
    text = text.strip()
    if found := _HOOK.fullmatch(text):
        names = [name for name, hook in _HOOKS.items() if hook == found["hook"]]
        if names:
            return Site(names[0], int(found["layer"]))
    if found := _SITE.fullmatch(text):
        return Site(found["name"].lower(), int(found["layer"]), found["stack"] or "")
    part = parse_part(text)
    if part.kind in ("head", "xhead", "neuron") or part.side:
        raise PartError(
            f"{part} is a slice of a site; a dictionary reads all of it, such as L{part.layer}.z or .neurons"
        )
    return locate(part).site


def place_name(site: Site) -> str:
    """The address of a site: `L12.resid_post`, `L4.MLP`, `L3.z`."""
    return f"{site.stack + '.' if site.stack else ''}L{site.layer}.{_SHOWN.get(site.name, site.name)}"


def hook_name(site: Site) -> str:
    """The name that TransformerLens and SAELens give the same tensor: `blocks.12.hook_resid_post`."""
    return f"blocks.{site.layer}.{_HOOKS[site.name]}"


def width_of(model: Model, site: Site) -> int:
    """Length of the vector at a site; PartError if this model has no such site."""
    model.anatomy.require(Part("resid_post", site.layer, stack=site.stack))
    if site.name == "resid_mid" and model.anatomy.parallel:
        raise PartError(f"{place_name(site)} does not exist: attention and MLP are parallel in this model's blocks")
    if site.name == "z":
        return model.n_heads * model.d_head
    if site.name == "neurons":
        return int(matrix(model.anatomy.block(site.layer, site.stack).down).shape[0])
    return model.d_model


def flat(x: Tensor, site: Site) -> Tensor:
    """A site's tensor as (row, pos, width)."""
    return x.flatten(-2) if site.name == "z" else x


def shaped(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `flat`, in the type of what stood there."""
    return x.reshape(like.shape).to(like.dtype)


def first_read(model: Model) -> int:
    """Positions at the start of a row that are left out: 1 for causal models, which park attention there."""
    return 1 if model.anatomy.main.causal else 0


class _Enough(Exception):
    """Raised where nothing after the recorded site is wanted."""


@torch.no_grad()
def read(model: Model, site: Site, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The vectors at a site, (row, pos, width) in float32; the blocks after it are not run.

    Raises:
        ModelError: if they are not finite.
    """
    found: list[Tensor] = []

    def keep(x: Tensor) -> None:
        found.append(flat(x, site).float().clone())
        raise _Enough

    decoder = torch.zeros(len(ids), 1, dtype=torch.long) if "dec" in model.anatomy.stacks else None
    if site.stack == "dec":
        decoder = ids
    taps: dict[Site, list[Tap]] = {site: [keep]}
    with model.alone(), memory_errors(), Hooks(model.hf, model.anatomy, taps), suppress(_Enough):
        model.hf(**model.inputs(ids, mask, decoder))
    x = found[0]
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(-1)).sum())
        raise ModelError(
            f"{model.name} has NaN or infinity at {place_name(site)} in {bad} of {x.shape[0] * x.shape[1]} tokens: its "
            "weights are damaged, or overflow; try --dtype float32"
        )
    return x


def writes(model: Model, site: Site, vectors: Tensor) -> Tensor | None:
    """What vectors (..., width) at a site add to the residual stream, (..., d_model); None where that is not linear."""
    block = model.anatomy.block(site.layer, site.stack)
    if site.name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        return vectors
    if site.name == "mlp_in" or block.norm_attn_out is not None or block.norm_mlp_out is not None:
        return None
    module: nn.Module = block.o if site.name == "z" else block.down
    weight = matrix(module)
    return vectors.to(weight) @ weight
