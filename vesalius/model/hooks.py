"""Reading and writing inside a forward pass with ordinary PyTorch hooks.

A *site* is a named tensor of one block. A *tap* is a function called with that tensor in its canonical shape; what it
returns (if not None) replaces it. With no tap set nothing is hooked and logits are those of transformers, bit for bit.

    resid_pre, resid_mid, resid_post, attn_out, mlp_out   (batch, pos, d_model)
    q, k, v, z      (batch, pos, head, d_head); k and v per query head; before any rotation and query-key norm
    pattern         (batch, head, query, key), after the softmax
    mlp_in          (batch, pos, d_model), the MLP's normed input
    neurons         (batch, pos, d_mlp), what the MLP's last matrix multiplies
    cross_q ... cross_z, cross_pattern   the same for cross-attention
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vesalius.errors import PartError
from vesalius.model.anatomy import Anatomy, Block

Tap = Callable[[Tensor], Tensor | None]

ATTENTION = "vesalius"
NAMES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "mlp_in",
    "neurons",
)
CROSS_NAMES = tuple(f"cross_{n}" for n in ("q", "k", "v", "z", "pattern", "out"))


class Site(NamedTuple):
    """A named tensor of one block."""

    name: str
    layer: int
    stack: str = ""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention that shows its pattern: query (batch, head, query, d_head), key and value with as many or fewer heads.

    Registered with transformers under the name "vesalius"; used only while a tap or a replay asks for it.
    """
    if key.shape[1] != value.shape[1]:  # one of them written per query head, the other still shared
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    taps: Sequence[Tap] = getattr(module, "_vesalius_pattern", ())
    bias = attention_mask
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if not taps and softcap is None:
        grouped = key.shape[1] != query.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    for tap in taps:
        new = tap(pattern)
        pattern = pattern if new is None else new
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)


@contextmanager
def own_attention(hf: PreTrainedModel) -> Iterator[None]:
    """Routes attention through our function, with explicit masks, for the duration."""
    configs = {
        id(m.config): m.config for m in hf.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _replace(output: Any, new: Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple) else new


class Hooks:
    """Installs taps for the duration of a `with` block; everything is removed on the way out, also after an error.

    Args:
        hf: the model. anatomy: its anatomy.
        taps: functions by site; several at one site run in order.
    """

    def __init__(self, hf: PreTrainedModel, anatomy: Anatomy, taps: Mapping[Site, Sequence[Tap]]) -> None:
        self.hf, self.anatomy, self.taps = hf, anatomy, taps
        self._handles: list[RemovableHandle] = []
        self._exit = ExitStack()

    def __enter__(self) -> Hooks:
        try:
            by_block: dict[tuple[str, int], dict[str, Sequence[Tap]]] = {}
            for site, functions in self.taps.items():
                if functions:
                    by_block.setdefault((site.stack, site.layer), {})[site.name] = functions
            for (stack, layer), sites in by_block.items():
                self._hook_block(self.anatomy.block(layer, stack), sites)
            if self._needs_own_attention(by_block):
                self._exit.enter_context(own_attention(self.hf))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._exit.close()

    def _needs_own_attention(self, by_block: Mapping[tuple[str, int], Mapping[str, Any]]) -> bool:
        if self.anatomy.attention != "interface":
            return False
        names = {name for sites in by_block.values() for name in sites}
        shared = {"k", "v", "cross_k", "cross_v"} if self.anatomy.group > 1 else set()
        return bool(names & {"pattern", "cross_pattern", *shared})

    # -- one block -----------------------------------------------------------------------------------------------

    def _hook_block(self, block: Block, sites: dict[str, Sequence[Tap]]) -> None:
        unknown = set(sites) - set(NAMES) - set(CROSS_NAMES)
        if unknown:
            raise PartError(f"unknown site {sorted(unknown)}; sites are {', '.join(NAMES + CROSS_NAMES)}")
        shape: dict[str, Any] = {}
        a = self.anatomy

        def note_shape(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            shape["batch"], shape["resid_pre"] = hidden.shape[:-1], hidden

        def run(functions: Sequence[Tap], x: Tensor, unflatten: bool = False) -> Tensor | None:
            """Runs taps on x; restores the (batch, pos) axes that some MLPs flatten away. None if nothing changed."""
            view = x.view(*shape["batch"], x.shape[-1]) if unflatten and x.dim() == 2 else x
            new = view
            for tap in functions:
                out = tap(new)
                new = new if out is None else out
            return None if new is view else new.reshape(x.shape)

        def on_output(module: nn.Module, functions: Sequence[Tap], unflatten: bool = False) -> None:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                new = run(functions, _first(output), unflatten)
                return None if new is None else _replace(output, new)

            self._handles.append(module.register_forward_hook(hook))

        def on_input(module: nn.Module, functions: Sequence[Tap], unflatten: bool = False) -> None:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
                if args:
                    new = run(functions, args[0], unflatten)
                    return None if new is None else ((new, *args[1:]), kwargs)
                new = run(functions, kwargs["hidden_states"], unflatten)
                return None if new is None else (args, {**kwargs, "hidden_states": new})

            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        def heads(functions: Sequence[Tap]) -> list[Tap]:
            """Taps on (batch, pos, head, d_head) as taps on the flat (batch, pos, head * d_head)."""

            def tap(flat: Tensor) -> Tensor | None:
                view = flat.unflatten(-1, (-1, a.d_head))
                new = view
                for f in functions:
                    out = f(new)
                    new = new if out is None else out
                return None if new is view else new.flatten(-2)

            return [tap]

        if "resid_pre" in sites:
            on_input(block.module, sites["resid_pre"])
        if "mlp_in" in sites or "neurons" in sites or "mlp_out" in sites or "resid_mid" in sites:  # after its taps
            self._handles.append(block.module.register_forward_pre_hook(note_shape, with_kwargs=True))
        attn_end = block.norm_attn_out.module if block.norm_attn_out else block.o
        mlp_end = block.norm_mlp_out.module if block.norm_mlp_out else block.down
        if "z" in sites:
            on_input(block.o, heads(sites["z"]))
        if "attn_out" in sites:
            on_output(attn_end, sites["attn_out"])
        if "resid_mid" in sites:
            self._hook_resid_mid(block, sites["resid_mid"], attn_end, shape, on_output)
        if "mlp_in" in sites:
            on_input(block.mlp_in, sites["mlp_in"], unflatten=True)
        if "neurons" in sites:
            on_input(block.down, sites["neurons"], unflatten=True)
        if "mlp_out" in sites:
            on_output(mlp_end, sites["mlp_out"], unflatten=True)
        if "resid_post" in sites:
            on_output(block.module, sites["resid_post"])
        self._hook_attention(block, {n: sites[n] for n in ("q", "k", "v", "pattern") if n in sites})
        if block.cross is not None:
            cross = {n.removeprefix("cross_"): f for n, f in sites.items() if n.startswith("cross_")}
            if "z" in cross:
                on_input(block.cross.o, heads(cross["z"]))
            if "out" in cross:
                on_output(block.cross.o, cross["out"])
            self._hook_attention(block.cross, {n: cross[n] for n in ("q", "k", "v", "pattern") if n in cross})
        elif set(sites) & set(CROSS_NAMES):
            raise PartError(f"block {block.layer} has no cross-attention")

    def _hook_resid_mid(
        self,
        block: Block,
        functions: Sequence[Tap],
        attn_end: nn.Module,
        shape: dict[str, Any],
        on_output: Callable[..., None],
    ) -> None:
        """resid_mid is a sum no module outputs: attention's write is moved so that the sum becomes the new value."""
        if self.anatomy.parallel:
            raise PartError(f"L{block.layer}.resid_mid does not exist: attention and MLP are parallel in this model")
        if self.anatomy.post_norm:
            on_output(block.norm_in.module, functions)
            return

        def tap(write: Tensor) -> Tensor | None:
            mid = shape["resid_pre"] + write
            new = mid
            for f in functions:
                out = f(new)
                new = new if out is None else out
            return None if new is mid else new - shape["resid_pre"]

        on_output(
            attn_end if block.cross is None else block.cross.o,
            [tap] if block.cross is None else [self._cross_mid(block, functions, shape)],
        )

    def _cross_mid(self, block: Block, functions: Sequence[Tap], shape: dict[str, Any]) -> Tap:
        """With cross-attention the middle is after both attentions: the self-attention's write is remembered first."""

        def remember(_: nn.Module, __: Any, output: Any) -> None:
            shape["self_out"] = _first(output)

        self._handles.append(block.o.register_forward_hook(remember))

        def tap(write: Tensor) -> Tensor | None:
            before = shape["resid_pre"] + shape["self_out"]
            mid = before + write
            new = mid
            for f in functions:
                out = f(new)
                new = new if out is None else out
            return None if new is mid else new - before

        return tap

    def _hook_attention(self, block: Block, sites: dict[str, Sequence[Tap]]) -> None:
        a = self.anatomy
        if sites and a.attention == "closed":
            raise PartError(
                f"{a.family} shows no {', '.join(sorted(sites))} of its heads: its attention works on pieces of rows; "
                "read the residual stream, attention's output or the MLP"
            )
        sides = {n: f for n, f in sites.items() if n != "pattern"}
        fused = block.projections["q"] is block.projections["k"]

        def per_query_head(x: Tensor) -> Tensor:
            """(batch, pos, kv head, d_head) as seen by each query head."""
            if x.shape[-2] == a.n_heads:
                return x
            return x.unsqueeze(-2).expand(*x.shape[:-1], a.group, x.shape[-1]).flatten(-3, -2)

        def run(functions: Sequence[Tap], x: Tensor) -> Tensor:
            for f in functions:
                out = f(x)
                x = x if out is None else out
            return x

        if sides and not fused:
            for side, functions in sides.items():

                def hook(_: nn.Module, __: Any, out: Tensor, functions: Sequence[Tap] = functions) -> Tensor | None:
                    view = per_query_head(out.unflatten(-1, (-1, a.d_head)))
                    new = run(functions, view)
                    return None if new is view and a.group == 1 else new.flatten(-2)

                self._handles.append(block.projections[side].register_forward_hook(hook))  # type: ignore[index]
        elif sides:

            def fused_hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
                new = [run(sides.get(s, ()), per_query_head(a.split_qkv(out, s))) for s in ("q", "k", "v")]
                return a.join_qkv(*new)

            self._handles.append(block.projections["q"].register_forward_hook(fused_hook))
            if a.group > 1 and a.spec.kv_heads_attribute:
                name, old = a.spec.kv_heads_attribute, getattr(block.attn, a.spec.kv_heads_attribute)
                setattr(block.attn, name, a.n_heads)
                self._exit.callback(setattr, block.attn, name, old)
        if "pattern" in sites:
            if block.pattern is not None:

                def pattern_hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
                    return run(sites["pattern"], out)

                self._handles.append(block.pattern.register_forward_hook(pattern_hook))
            else:
                block.attn._vesalius_pattern = tuple(sites["pattern"])  # type: ignore[assignment]
                self._exit.callback(delattr, block.attn, "_vesalius_pattern")
