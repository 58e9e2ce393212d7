"""Which parameters of a model change: all, some by role, name or part, single heads, or LoRA adapters beside the rest.

A head is a slice of matrices. Its slice of W_Q, W_K, W_V (biases included) and W_O is trained and the rest of these
tensors held: gradients are zero there, and what weight decay or an optimizer's state would still move is put back after
every step, so that it stays as it was to the last bit. Keys and values that several heads share are trained for all.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vesalius.checkpoints import save_tensors
from vesalius.errors import PartError, UnknownName, VesaliusError
from vesalius.model.anatomy import Anatomy, Side, read_anatomy
from vesalius.model.weights import matrix
from vesalius.parts import Part, parse_part
from vesalius.records import dump
from vesalius.train.plugs import Plug
from vesalius.train.roles import roles

LORA_SETTINGS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "fan_in_fan_out",
)  # fmt: skip
ADAPTER = "adapter"  # of a checkpoint, holds its adapters by themselves
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
        only: name patterns (`*mlp*`) or part addresses (`L3`, `L3.MLP`, `L3.attn`, `L3.H2`, `embed`, `unembed`) to
            train. Of heads only the slices change, if `Slices` watches over the training.
        freeze: the same, but no heads, to leave as they are.

    Raises:
        VesaliusError: if a pattern matches nothing, or nothing is left to train.
    """
    found = roles(model)
    chosen = {id(p.tensor) for p in found if by_role is None or p.role in by_role}
    parts = slices(model, only)
    if only is not None:
        whole = set[int]().union(*(matching(model, o) for o in only if _head(o) is None))
        chosen &= whole | {id(s.tensor) for s in parts}
    for pattern in freeze:
        chosen -= matching(model, pattern)
    for p in found:
        p.tensor.requires_grad_(id(p.tensor) in chosen)
    trained = sum(p.tensor.numel() for p in found if id(p.tensor) in chosen)
    trained -= sum(s.held for s in parts if id(s.tensor) in chosen)
    if not trained:
        raise VesaliusError("parameters: nothing is left to train; widen roles or only, or shorten freeze")
    return trained


@dataclass(frozen=True, eq=False)
class Slice:
    """Part of a tensor: `inside` is true where it may change, in the tensor's shape."""

    tensor: nn.Parameter
    inside: Tensor

    @property
    def held(self) -> int:
        """Numbers of the tensor that stay as they are."""
        return int((~self.inside).sum())


def slices(model: PreTrainedModel, only: Sequence[str] | None) -> list[Slice]:
    """The tensors that are trained in part: those of the heads named in `only`, but for tensors it names whole.

    Raises:
        VesaliusError: for a head the model does not have, or a side of one.
    """
    heads = [h for h in map(_head, only or ()) if h is not None]
    if not heads:
        return []
    anatomy = read_anatomy(model)
    whole = set[int]().union(*(matching(model, o) for o in only or () if _head(o) is None))
    found: dict[int, Slice] = {}
    for head in heads:
        if head.side is not None:
            raise VesaliusError(f"parameters: {head} is one side of a head; name the head, L{head.layer}.H{head.index}")
        for tensor, inside in _slices_of(anatomy, head):
            before = found.get(id(tensor))
            found[id(tensor)] = Slice(tensor, inside if before is None else before.inside | inside)
    return [s for key, s in found.items() if key not in whole]


def _head(text: str) -> Part | None:
    """The head that an address means, or None for any other pattern."""
    try:
        part = parse_part(text)
    except PartError:
        return None
    return part if part.kind in ("head", "xhead") else None


def _slices_of(anatomy: Anatomy, head: Part) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """A head's tensors, and where in them it is."""
    block = anatomy.attention_of(head)
    a, index = anatomy, head.index or 0
    sides: tuple[Side, ...] = ("q", "k", "v")
    for side in sides:
        module = block.projections[side]
        every = torch.arange(matrix(module).shape[1])
        fused = block.projections["q"] is block.projections["k"]
        by_head = a.split_qkv(every, side) if fused else every.unflatten(-1, (-1, a.d_head))  # (head, d_head)
        columns = by_head[index // (a.n_heads // len(by_head))]
        for name in ("weight", "bias"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, nn.Parameter):
                inside = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
                inside[(..., columns) if isinstance(module, Conv1D) else columns] = True  # nn.Linear keeps (out, in)
                yield tensor, inside
    tensor = block.o.weight
    if isinstance(tensor, nn.Parameter):
        inside = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        mine = slice(index * a.d_head, (index + 1) * a.d_head)
        if isinstance(block.o, Conv1D):
            inside[mine] = True
        else:
            inside[:, mine] = True
        yield tensor, inside


class Slices(Plug):
    """The plug that holds what of a tensor is not to change, to the last bit.

    Args:
        parts: from `slices`; their tensors are parameters of the model that is trained.
    """

    def __init__(self, parts: Sequence[Slice]) -> None:
        self.parts, self.kept = list(parts), list[Tensor]()
        for part in self.parts:
            part.tensor.register_hook(lambda g, inside=part.inside: g * inside)

    def begin(self, step: int) -> None:
        if not self.kept:
            self.kept = [s.tensor.detach().clone() for s in self.parts]

    @torch.no_grad()
    def end(self, step: int) -> None:
        for part, before in zip(self.parts, self.kept, strict=True):
            part.tensor.copy_(torch.where(part.inside, part.tensor, before))

    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        self.kept = []  # what the checkpoint holds outside is what the model had at first


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
            f"parameters: {text} is a slice of a matrix; of slices only heads can be trained "
            f"(only: [L{part.layer}.H0]), none frozen; name L{part.layer}.attn or L{part.layer}.MLP"
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


def save_adapter(model: Any, adapters: dict[str, Tensor], folder: Path) -> None:
    """Writes adapters as peft keeps them, for `PeftModel.from_pretrained(base, folder)` and what serves adapters.

    Args:
        model: has the adapters. adapters: as of `plain_state`. folder: is made.
    """
    from peft import get_peft_model_state_dict

    told = model.peft_config["default"].to_dict() | {"inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_bytes(dump({k: _listed(v) for k, v in told.items()}))
    own = {n.removeprefix(LORA): t for n, t in adapters.items()}
    named = get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)
    save_tensors(folder / "adapter_model.safetensors", {f"base_model.model.{n}": t for n, t in named.items()})


def _listed(value: Any) -> Any:
    """Sets in one order, so that two runs of one recipe leave the same bytes."""
    return sorted(value) if isinstance(value, set) else value
