"""Which parameters of a model change: all, some by role, name or part, or LoRA adapters beside frozen weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vesalius.errors import PartError, UnknownName, VesaliusError
from vesalius.model.anatomy import Anatomy, read_anatomy
from vesalius.parts import parse_part
from vesalius.train.roles import roles

LORA_SETTINGS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "fan_in_fan_out",
)  # fmt: skip
LORA = "lora:"  # before the name of an adapter's tensor in the trainer's state


def choose(
    model: PreTrainedModel,
    by_role: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    freeze: Sequence[str] = (),
) -> int:
    """Lets the chosen parameters take gradients and freezes the rest; returns how many numbers are trained.

    Args:
        model: changed in place.
        by_role: roles to train (see `roles`); all if None.
        only: name patterns (`*mlp*`) or part addresses (`L3`, `L3.MLP`, `L3.attn`, `embed`, `unembed`) to train.
        freeze: the same, to leave as they are.

    Raises:
        VesaliusError: if a pattern matches nothing, or nothing is left to train.
    """
    found = roles(model)
    chosen = {id(p.tensor) for p in found if by_role is None or p.role in by_role}
    if only is not None:
        chosen &= set[int]().union(*(matching(model, o) for o in only))
    for pattern in freeze:
        chosen -= matching(model, pattern)
    for p in found:
        p.tensor.requires_grad_(id(p.tensor) in chosen)
    trained = sum(p.tensor.numel() for p in found if id(p.tensor) in chosen)
    if not trained:
        raise VesaliusError("parameters: nothing is left to train; widen roles or only, or shorten freeze")
    return trained


def matching(model: PreTrainedModel, pattern: str) -> set[int]:
    """Identities of the parameters a name pattern or a part address means."""
    named = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    hits = {id(p) for n, p in named.items() if fnmatch.fnmatchcase(n, pattern)}
    if hits:
        return hits
    modules = _of_address(model, pattern)
    hits = {id(p) for m in modules for p in m.parameters()}
    if not hits:
        shown = ", ".join(list(named)[:4])
        raise VesaliusError(
            f"parameters: '{pattern}' matches no parameter; use a pattern of names ({shown}, ...) or a part (L3, "
            "L3.MLP, L3.attn, embed, unembed)"
        )
    return hits


def _of_address(model: PreTrainedModel, text: str) -> list[nn.Module]:
    anatomy = read_anatomy(model)
    stack, _, rest = text.rpartition(".") if text.startswith(("enc.", "dec.")) else ("", "", text)
    if text.startswith(("enc.", "dec.")):
        stack, _, rest = text.partition(".")
    if rest[:1] == "L" and rest[1:].isdigit():  # a whole block
        return [_block(anatomy, int(rest[1:]), stack).module]
    try:
        part = parse_part(text)
    except PartError:
        return []
    if part.kind in ("head", "neuron"):
        raise VesaliusError(
            f"parameters: {text} is a slice of a matrix; whole tensors are trained or frozen here ({part.stack and ''}"
            f"L{part.layer}.attn, L{part.layer}.MLP)"
        )
    if part.kind == "embed":
        return [model.get_input_embeddings()]
    if part.kind == "unembed":
        return [m for m in (model.get_output_embeddings(),) if m is not None]
    block = _block(anatomy, part.layer or 0, part.stack)
    if part.kind == "attn":
        return [block.attn]
    if part.kind == "mlp":
        return [block.mlp_in, block.down]
    return []


def _block(anatomy: Anatomy, layer: int, stack: str) -> Any:
    blocks = anatomy.stack(stack).blocks
    if not 0 <= layer < len(blocks):
        raise PartError(f"L{layer} does not exist: this model has blocks L0 to L{len(blocks) - 1}")
    return blocks[layer]


# ---- LoRA


def add_lora(model: PreTrainedModel, settings: dict[str, Any], seed: int) -> int:
    """Puts LoRA adapters into a model, which stays what it was until they are trained; returns their size.

    Hu et al., "LoRA", arXiv 2106.09685, by peft. The base weights are frozen.

    Args:
        model: changed in place.
        settings: of peft's `LoraConfig`; `target_modules` is every linear layer of the blocks if left out.
        seed: of the adapters' first weights.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise VesaliusError("LoRA needs peft: pip install 'vesalius[adapters]'") from None
    if strange := sorted(set(settings) - set(LORA_SETTINGS)):
        if strange[0] in LoraConfig.__dataclass_fields__:
            raise VesaliusError(
                f"parameters.lora: {strange[0]} is not offered, since checkpoints are the merged model; these are: "
                f"{', '.join(LORA_SETTINGS)}"
            )
        raise UnknownName("LoRA setting", strange[0], LORA_SETTINGS)
    if not isinstance(settings.get("init_lora_weights", True), bool):
        raise VesaliusError("parameters.lora: init_lora_weights that change the frozen weights are not offered here")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = LoraConfig(**({"target_modules": _linear_names(model)} | settings))
            inject_adapter_in_model(config, model)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise VesaliusError(f"parameters.lora: {' '.join(str(error).split())}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last names of the blocks' matrices, whatever the family calls them."""
    anatomy = read_anatomy(model)
    wanted: set[int] = set()
    for stack in anatomy.stacks.values():
        for block in stack.blocks:
            inside = [block.mlp_in] if not list(block.mlp_in.children()) else list(block.mlp_in.modules())
            wanted |= {id(m) for m in (*block.projections.values(), block.o, block.down, *inside)}
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if id(m) in wanted and hasattr(m, "weight")}
    return sorted(found)


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are in the model."""
    return any("lora_" in n for n, _ in model.named_parameters())


def plain_state(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict with adapters as (ordinary merged weights, the adapters' own tensors)."""
    from peft.tuners.lora import LoraLayer

    adapters = {LORA + n: t for n, t in state.items() if "lora_" in n}
    merged = {n.replace(".base_layer", ""): t for n, t in state.items() if "lora_" not in n}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and f"{name}.weight" in merged:
            layer: Any = module
            for adapter in layer.active_adapters:
                merged[f"{name}.weight"] = merged[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return merged, adapters
