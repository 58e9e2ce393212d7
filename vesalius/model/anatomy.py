"""Where each family keeps its parts: module paths read from `families/*.yaml`, resolved on an opened model.

Nothing above `model/` names a module path. A family file says which modules are the blocks, the query, key, value and
output projections, the MLP's first and last matrix, the norms; this module turns that into `Block` views with the
weights of single heads as matrices (row-vector convention: output = input @ weight).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal, cast

import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from vesalius.errors import ModelError, PartError
from vesalius.model.norms import NormKind, NormView
from vesalius.model.weights import bias_of, matrix
from vesalius.parts import Part

Side = Literal["q", "k", "v"]


class BlockSpec(BaseModel):
    """Module paths inside one block; a trailing `?` marks one that may be absent."""

    model_config = ConfigDict(extra="forbid")
    attn: str
    o: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    pattern: str | None = None
    cross_attn: str | None = None
    cross_q: str | None = None
    cross_k: str | None = None
    cross_v: str | None = None
    cross_o: str | None = None
    norm_cross: str | None = None
    mlp_in: str
    act: str | None = None
    up: str | None = None
    down: str
    norm_in: str
    norm_mid: str
    norm_attn_out: str | None = None
    norm_mlp_out: str | None = None


class StackSpec(BaseModel):
    """One stack of blocks; encoder-decoder models have two."""

    model_config = ConfigDict(extra="forbid")
    prefix: str = ""
    blocks: str
    final_norm: str | None = None
    project_out: str | None = None
    head: str | list[str] | None = None
    unembed: str | None = None
    logit_scale: bool | str = False
    causal: bool | None = None
    block: BlockSpec


class Sizes(BaseModel):
    """What a family's config calls its sizes; None where its class takes no other than it has.

    `heads` alone, without `head_dim`, means that a head's width follows from their number: none can be taken out.
    """

    model_config = ConfigDict(extra="forbid")
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    head_dim: str | None = None
    mlp: str | None = "intermediate_size"


class FamilySpec(BaseModel):
    """A family file. Values such as `config.use_parallel_residual` are read from the model's config."""

    model_config = ConfigDict(extra="forbid")
    model_types: list[str]
    norm: NormKind | str
    parallel: bool | str = False
    post_norm: bool | str = False
    gated: bool | str = False
    causal: bool | str = True
    attention: Literal["interface", "dropout", "closed"] = "interface"
    qkv_layout: Literal["concat", "interleaved"] | None = None
    kv_heads_attribute: str | None = None
    refuse: dict[str, str] = {}
    sizes: Sizes = Sizes()
    stacks: list[StackSpec]


@cache
def families() -> dict[str, FamilySpec]:
    """Family by transformers' `model_type`, from every file in `families/`."""
    table: dict[str, FamilySpec] = {}
    for path in sorted(resources.files("vesalius.model").joinpath("families").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".yaml"):
            spec = FamilySpec.model_validate(yaml.safe_load(path.read_text("utf-8")))
            for model_type in spec.model_types:
                if model_type in table:
                    raise ValueError(f"{path.name}: model type '{model_type}' is described twice")
                table[model_type] = spec
    return table


def _find(root: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a dotted path (`a.b|c.d?` tries both, and may be absent); negative numbers index from the end."""
    if path is None:
        return None
    optional = path.endswith("?")
    for choice in path.rstrip("?").split("|"):
        node: Any = root
        for name in choice.split("."):
            if node is None:
                break
            node = node[int(name)] if name.lstrip("-").isdigit() else getattr(node, name, None)
        if node is not None:
            return node
    if optional:
        return None
    raise ModelError(f"{type(root).__name__} has no module '{path}'; its family file does not fit this model")


def _flag(value: bool | str, config: Any) -> bool:
    if isinstance(value, bool):
        return value
    name = value.removeprefix("not ").removeprefix("config.")
    return bool(getattr(config, name, False)) != value.startswith("not ")


@dataclass(frozen=True)
class Block:
    """One block's modules, resolved. `norm_in` feeds attention (or follows its sum in post-norm families)."""

    layer: int
    stack: str
    module: nn.Module
    attn: nn.Module
    o: nn.Module
    projections: dict[Side, nn.Module]  # one module under all three keys when fused
    mlp_in: nn.Module
    down: nn.Module
    act: nn.Module | None
    norm_in: NormView
    norm_mid: NormView
    norm_attn_out: NormView | None
    norm_mlp_out: NormView | None
    head_norms: tuple[NormView, ...]  # query and key norms
    pattern: nn.Module | None
    cross: Block | None = None
    extra_norms: tuple[NormView, ...] = ()
    up: nn.Module | None = (
        None  # of a gated MLP, what the activated gate multiplies; the second half where one has both
    )

    @property
    def norms(self) -> list[NormView]:
        found = [
            self.norm_in,
            self.norm_mid,
            self.norm_attn_out,
            self.norm_mlp_out,
            *self.head_norms,
            *self.extra_norms,
        ]
        unique: dict[int, NormView] = {id(n.module): n for n in found if n is not None}
        return list(unique.values())


@dataclass(frozen=True)
class Stack:
    """A stack of blocks with what follows it."""

    prefix: str
    causal: bool
    blocks: list[Block]
    final_norm: NormView | None
    project_out: nn.Module | None
    head: list[nn.Module]  # what turns the final hidden state into logits, in order
    unembed: nn.Module | None  # the linear map among them, if it can be read row by row
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one opened model are, and its sizes.

    Attributes:
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp: sizes of the main (decoder) stack.
        parallel: attention and MLP read the same residual stream.
        post_norm: the residual stream is normalised after each sum.
    """

    family: str
    spec: FamilySpec
    stacks: dict[str, Stack]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    parallel: bool
    post_norm: bool
    gated: bool
    softcap: float | None
    attention: Literal["interface", "dropout", "closed"]
    notes: tuple[str, ...] = field(default=())

    @property
    def main(self) -> Stack:
        """The stack that ends in the logits."""
        return self.stacks.get("") or self.stacks["dec"]

    @property
    def group(self) -> int:
        """Query heads sharing one key-value head."""
        return self.n_heads // self.n_kv_heads

    def block(self, layer: int, stack: str = "") -> Block:
        return self.stack(stack).blocks[layer]

    def attention_of(self, head: Part) -> Block:
        """The attention a head belongs to: its block, or that block's cross-attention."""
        block = self.block(self.require(head).layer or 0, head.stack or self.main.prefix)
        return block.cross if head.kind == "xhead" and block.cross is not None else block

    def stack(self, prefix: str = "") -> Stack:
        if prefix in self.stacks:
            return self.stacks[prefix]
        known = ", ".join(f"'{p}.'" if p else "none" for p in self.stacks)
        raise PartError(f"this model has no stack '{prefix}'; the prefixes of its parts are: {known}")

    # -- weights of single heads -------------------------------------------------------------------------------

    def split_qkv(self, fused: Tensor, side: Side, heads: int | None = None) -> Tensor:
        """One side of a fused projection's last axis as (..., kv or query head, d_head) (a view where possible)."""
        n_kv = heads or self.n_kv_heads
        if self.spec.qkv_layout == "interleaved":
            by_head = fused.unflatten(-1, (self.n_heads, 3, self.d_head))
            return by_head[..., "qkv".index(side), :]
        sizes = [self.n_heads * self.d_head, n_kv * self.d_head, n_kv * self.d_head]
        return fused.split(sizes, dim=-1)["qkv".index(side)].unflatten(-1, (-1, self.d_head))

    def join_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The inverse of `split_qkv`: three (..., head, d_head) tensors as the fused projection would give them."""
        if self.spec.qkv_layout == "interleaved":
            return torch.stack([q, k, v], dim=-2).flatten(-3)
        return torch.cat([q.flatten(-2), k.flatten(-2), v.flatten(-2)], dim=-1)

    def head_in(self, block: Block, side: Side) -> tuple[Tensor, Tensor | None]:
        """W_Q, W_K or W_V of every *query* head, (head, d_model, d_head), and its bias (head, d_head) or None.

        Key and value weights are views of the shared key-value heads; nothing is copied or untied.
        """
        module = block.projections[side]
        weight, bias = matrix(module), bias_of(module)
        if block.projections["q"] is block.projections["k"]:
            weight = self.split_qkv(weight, side)
            bias = None if bias is None else self.split_qkv(bias, side)
        else:
            weight = weight.unflatten(-1, (-1, self.d_head))
            bias = None if bias is None else bias.unflatten(-1, (-1, self.d_head))
        weight = weight.movedim(-2, 0)  # (head, d_model, d_head)
        if weight.shape[0] != self.n_heads:
            index = torch.arange(self.n_heads, device=weight.device) // self.group
            weight = weight[index]
            bias = None if bias is None else bias[index]
        return weight, bias

    def head_out(self, block: Block) -> Tensor:
        """W_O of every head, (head, d_head, d_model)."""
        return matrix(block.o).unflatten(0, (self.n_heads, self.d_head))

    def mlp_readers(self, block: Block) -> list[nn.Module]:
        """The MLP's first matrices, d_model to one or (gate and up fused) two numbers a neuron."""
        found = []
        for module in block.mlp_in.modules():
            weight = getattr(module, "weight", None)
            if module is block.down or not isinstance(weight, Tensor) or weight.dim() != 2:
                continue
            if matrix(module).shape[1] % self.d_mlp == 0:
                found.append(module)
        return found

    # -- parts ---------------------------------------------------------------------------------------------------

    def parts(self, kinds: tuple[str, ...] = ("head", "mlp")) -> list[Part]:
        """Every part of these kinds in forward order (kinds as in `Part.kind`)."""
        found = []
        for prefix, stack in self.stacks.items():
            for layer, block in enumerate(stack.blocks):
                if "head" in kinds:
                    found += [Part("head", layer, h, stack=prefix) for h in range(self.n_heads)]
                if "xhead" in kinds and block.cross is not None:
                    found += [Part("xhead", layer, h, stack=prefix) for h in range(self.n_heads)]
                if "neuron" in kinds:
                    found += [Part("neuron", layer, i, stack=prefix) for i in range(self.d_mlp)]
                for kind in ("attn", "mlp", "resid_pre", "resid_mid", "resid_post"):
                    if kind in kinds and not (kind == "resid_mid" and self.parallel):
                        found.append(Part(kind, layer, stack=prefix))
            if "embed" in kinds:
                found.append(Part("embed", stack=prefix))
        if "unembed" in kinds:
            found.append(Part("unembed", stack=self.main.prefix))
        return sorted(found, key=lambda p: p.order)

    def require(self, part: Part) -> Part:
        """The part itself if this model has it; PartError saying what it has otherwise."""
        stack = self.stack(part.stack)
        if part.layer is not None and part.layer >= len(stack.blocks):
            raise PartError(f"{part} does not exist: this model has blocks L0 to L{len(stack.blocks) - 1}")
        limit = {"head": self.n_heads, "xhead": self.n_heads, "neuron": self.d_mlp}.get(part.kind)
        if limit is not None and (part.index or 0) >= limit:
            letter = {"head": "H", "xhead": "X", "neuron": "N"}[part.kind]
            raise PartError(f"{part} does not exist: block {part.layer} has {letter}0 to {letter}{limit - 1}")
        if part.kind == "xhead" and part.layer is not None and stack.blocks[part.layer].cross is None:
            raise PartError(f"{part} does not exist: this stack has no cross-attention")
        if part.kind == "resid_mid" and self.parallel:
            raise PartError(f"{part} does not exist: attention and MLP are parallel in this model's blocks")
        return part


def read_anatomy(hf: PreTrainedModel) -> Anatomy:
    """The anatomy of an opened transformers model.

    Raises:
        ModelError: if no family file describes the model's type, with the types that are described.
    """
    config = hf.config
    model_type = config.model_type
    table = families()
    if model_type not in table:
        raise ModelError(
            f"no anatomy for model type '{model_type}' ({type(hf).__name__}); known: {', '.join(sorted(table))}. "
            "A new family is one file in vesalius/model/families/ (see CONTRIBUTING)"
        )
    spec = table[model_type]
    if spec.norm.startswith("config."):
        spec = spec.model_copy(update={"norm": getattr(config, spec.norm.removeprefix("config."))})
    for flag, why in spec.refuse.items():
        if _flag(flag, config):
            raise ModelError(f"{model_type} with {flag.removeprefix('config.')} {why}; this variant is not supported")
    post_norm = _flag(spec.post_norm, config)
    stacks = {s.prefix: _read_stack(hf, spec, s, post_norm) for s in spec.stacks}
    n_heads = int(getattr(config, "num_attention_heads", None) or config.n_head)
    n_kv = int(getattr(config, "num_key_value_heads", None) or n_heads)
    main = stacks.get("") or stacks["dec"]
    if not main.blocks:
        raise ModelError(f"{type(hf).__name__} has no blocks")
    first = main.blocks[0]
    width_heads, d_model = matrix(first.o).shape
    return Anatomy(
        family=model_type,
        spec=spec,
        stacks=stacks,
        n_layers=len(main.blocks),
        n_heads=n_heads,
        n_kv_heads=n_kv,
        d_model=d_model,
        d_head=width_heads // n_heads,
        d_mlp=matrix(first.down).shape[0],
        parallel=_flag(spec.parallel, config),
        post_norm=post_norm,
        gated=_flag(spec.gated, config),
        softcap=getattr(config, "final_logit_softcapping", None),
        attention=spec.attention,
    )


def _read_stack(hf: PreTrainedModel, family: FamilySpec, spec: StackSpec, post_norm: bool) -> Stack:
    kind = cast(NormKind, family.norm)

    def view(module: nn.Module) -> NormView:
        return NormView(module, "none" if isinstance(module, nn.Identity) else kind)

    def norm(module: nn.Module | None) -> NormView | None:
        return None if module is None else view(module)

    def need(module: nn.Module, path: str) -> nn.Module:
        found = _find(module, path)
        assert found is not None
        return found

    blocks = []
    for layer, module in enumerate(need(hf, spec.blocks)):  # type: ignore[arg-type,var-annotated]
        b = spec.block
        if b.qkv is not None:
            fused = need(module, b.qkv)
            projections: dict[Side, nn.Module] = {"q": fused, "k": fused, "v": fused}
        else:
            assert b.q and b.k and b.v
            projections = {"q": need(module, b.q), "k": need(module, b.k), "v": need(module, b.v)}
        norm_in, norm_mid = view(need(module, b.norm_in)), view(need(module, b.norm_mid))
        shared: dict[str, Any] = {
            "layer": layer,
            "stack": spec.prefix,
            "module": module,
            "mlp_in": need(module, b.mlp_in),
            "down": need(module, b.down),
            "act": _find(module, b.act),
            "up": _find(module, b.up) if _flag(family.gated, hf.config) else None,
            "norm_mid": norm_mid,
            "norm_attn_out": norm(_find(module, b.norm_attn_out)),
            "norm_mlp_out": norm(_find(module, b.norm_mlp_out)),
        }
        head_norms = tuple(n for n in (norm(_find(module, b.q_norm)), norm(_find(module, b.k_norm))) if n is not None)
        cross, extra = None, []
        if b.cross_attn and b.cross_q and b.cross_k and b.cross_v and b.cross_o and b.norm_cross:
            norm_cross = view(need(module, b.norm_cross))
            extra.append(norm_cross)
            cross = Block(
                **shared,
                attn=need(module, b.cross_attn),
                o=need(module, b.cross_o),
                projections={"q": need(module, b.cross_q), "k": need(module, b.cross_k), "v": need(module, b.cross_v)},
                norm_in=norm_cross,
                head_norms=(),
                pattern=None,
            )
        blocks.append(
            Block(
                **shared,
                attn=need(module, b.attn),
                o=need(module, b.o),
                projections=projections,
                norm_in=norm_in,
                head_norms=head_norms,
                pattern=_find(module, b.pattern),
                cross=cross,
                extra_norms=tuple(extra),
            )
        )
    paths = spec.head if isinstance(spec.head, list) else [spec.head or spec.unembed]
    head = [m for m in (_find(hf, p) for p in paths if p is not None) if m is not None]
    unembed = _find(hf, spec.unembed)
    final_norm = None if post_norm and spec.final_norm is None else norm(_find(hf, spec.final_norm))
    scale = float(hf.config.d_model) ** -0.5 if _flag(spec.logit_scale, hf.config) else 1.0
    return Stack(
        prefix=spec.prefix,
        causal=_flag(family.causal, hf.config) if spec.causal is None else spec.causal,
        blocks=blocks,
        final_norm=final_norm,
        project_out=_find(hf, spec.project_out),
        head=head,
        unembed=unembed if len(head) == 1 and head[0] is unembed else None,
        logit_scale=scale,
    )
