"""Checkpoints of rounded models, in a format that plain transformers reads where there is one.

    int8.json            which maps are rounded, how, and which of the layouts below the weights have
    bitsandbytes         N.weight int8, N.SCB: transformers opens it where bitsandbytes is installed (LLM.int8())
    compressed-tensors   N.weight int8, N.weight_scale, N.input_scale...: where compressed-tensors is installed
    vesalius             int8.safetensors instead of model.safetensors: what neither can hold; plain transformers
                         finds no weights there and says so

`vesalius.open` opens all three, with neither library, and computes in whole numbers. transformers with
compressed-tensors computes the same in floating-point numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vesalius import checkpoints
from vesalius.errors import ModelError
from vesalius.model.int8 import Grid, Int8Linear, Parts, Scheme
from vesalius.model.sources.checkpoint import ROUNDED
from vesalius.records import dump, read_json

NOTE = "int8.json"
FORMAT = 1
Layout = Literal["bitsandbytes", "compressed-tensors", "vesalius"]


@dataclass(frozen=True)
class Holder:
    """What can hold a rounded model.

    Attributes:
        layout: of its files. why: what the libraries' formats cannot hold, if neither can.
    """

    layout: Layout
    why: str = ""


def rounded_maps(hf: nn.Module) -> dict[str, Int8Linear]:
    """The rounded maps of a model, by name."""
    return {n: m for n, m in hf.named_modules() if isinstance(m, Int8Linear)}


def holder_of(hf: nn.Module) -> Holder:
    """The layout that fits a rounded model."""
    maps = list(rounded_maps(hf).values())
    schemes = {m.scheme for m in maps}
    if len({replace(s, threshold=0.0) for s in schemes}) == 1 < len(schemes):
        return Holder("vesalius", "its maps have thresholds of their own, and bitsandbytes knows one for all")
    if len(schemes) != 1:
        return Holder("vesalius", "its maps are rounded in different ways")
    if any(m.kept is not None for m in maps):
        return Holder("vesalius", "columns of its weights are kept in float16")
    if any(m.stretch is not None for m in maps):
        return Holder("vesalius", "inputs are shifted and divided before they are rounded")
    scheme = next(iter(schemes))
    if scheme.weight_zero:
        return Holder("vesalius", "its weights have zero points")
    if (scheme.bits, scheme.weights, scheme.inputs, scheme.input_zero) == (8, "channel", "row", False) and (
        scheme.threshold or any(m.transposed for m in maps)
    ):
        return Holder("bitsandbytes")
    if scheme.threshold:
        return Holder("vesalius", "bitsandbytes knows outlier columns with 8 bits and no zero points alone")
    if any(m.transposed for m in maps):
        return Holder("vesalius", "compressed-tensors knows no Conv1D, of which this family is made")
    if scheme.input_zero and scheme.inputs != "fixed":
        return Holder("vesalius", "zero points of inputs are found anew at every pass")
    return Holder("compressed-tensors")


# ---- writing


def save(hf: PreTrainedModel, folder: Path) -> None:
    """Writes config and weights of a rounded model into a folder that is there."""
    holder, maps = holder_of(hf), rounded_maps(hf)
    if holder.layout == "vesalius":
        hf.config.architectures = [type(hf).__name__]
        hf.config.save_pretrained(folder)
        if hf.can_generate() and hf.generation_config is not None:
            hf.generation_config.save_pretrained(folder)
        once = {id(t): n for n, t in reversed(hf.state_dict(keep_vars=True).items())}
        state = hf.state_dict()
        checkpoints.save_tensors(folder / ROUNDED, {n: state[n].contiguous() for n in once.values()})
    else:
        hf.save_pretrained(folder, state_dict=_state(hf, maps, holder.layout), max_shard_size="1000GB")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["quantization_config"] = _told(hf, maps, holder.layout)
        (folder / "config.json").write_bytes(dump(config))
    groups: dict[Scheme, list[str]] = {}
    for name, module in maps.items():
        groups.setdefault(module.scheme, []).append(name)
    told = {
        "format": FORMAT, "layout": holder.layout, "why": holder.why,
        "groups": [{"scheme": asdict(scheme), "modules": names} for scheme, names in groups.items()],
        "transposed": [n for n, m in maps.items() if m.transposed],
    }  # fmt: skip
    (folder / NOTE).write_bytes(dump(told))


def _state(hf: PreTrainedModel, maps: Mapping[str, Int8Linear], layout: Layout) -> dict[str, Tensor]:
    """The model's tensors under the names a library gives them."""
    state = {}
    for name, tensor in hf.state_dict().items():
        module = maps.get(name.rpartition(".")[0])
        if module is None:
            state[name] = tensor
    for name, module in maps.items():
        state[f"{name}.weight"] = module.codes.detach()
        if module.added is not None:
            state[f"{name}.bias"] = module.added.detach()
        if layout == "bitsandbytes":
            state[f"{name}.SCB"] = (module.scale[:, 0] * 127).contiguous()
            state[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
            continue
        tensorwise = module.scheme.weights == "tensor"
        state[f"{name}.weight_scale"] = module.scale.detach().view(1) if tensorwise else module.scale.detach()
        if module.fixed is not None:
            grid = _fixed_grid(module)
            state[f"{name}.input_scale"] = grid.scale.view(1)
            if grid.zero is not None:
                state[f"{name}.input_zero_point"] = grid.zero.view(1).to(torch.int8)
    return state


def _fixed_grid(module: Int8Linear) -> Grid:
    assert module.fixed is not None
    low, high = module.fixed.unbind()
    return Grid.of(low, high, module.scheme.bits, module.scheme.input_zero)


def _told(hf: PreTrainedModel, maps: Mapping[str, Int8Linear], layout: Layout) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    scheme = next(iter(maps.values())).scheme
    left = [n for n, m in hf.named_modules() if isinstance(m, nn.Linear)]
    if layout == "bitsandbytes":
        return {
            "quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False,
            "llm_int8_threshold": scheme.threshold, "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": left or ["lm_head"],
        }  # fmt: skip
    inputs = None
    if scheme.inputs != "none":
        inputs = {
            "num_bits": scheme.bits, "type": "int", "symmetric": not scheme.input_zero,
            "strategy": "token" if scheme.inputs == "row" else "tensor", "dynamic": scheme.inputs != "fixed",
        }  # fmt: skip
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": scheme.weights, "dynamic": False
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": left,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }  # fmt: skip


# ---- reading


def is_rounded(folder: Path) -> bool:
    """Whether a folder holds a rounded model that Vesalius wrote."""
    return (folder / NOTE).is_file()


def read(
    folder: Path, files: list[Path], auto: Any, config: Any, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, its maps rounded, and transformers' report on what was missing.

    Args:
        folder: that `save` filled. files: its weight files. auto: the Auto class. config: read by transformers.
        options: of `from_pretrained`.

    Raises:
        ModelError: if the note and the weights do not fit.
    """
    note = read_json(folder / NOTE, "quantize the model again")
    if note.get("format") != FORMAT:
        raise ModelError(f"{folder / NOTE} has format {note.get('format')}; this version reads {FORMAT}")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    made: dict[str, Int8Linear] = {}
    for group in note["groups"]:
        scheme = Scheme(**group["scheme"])
        for name in group["modules"]:
            made[name] = _module(name, state, scheme, note)
    dense = {n: t for n, t in state.items() if n.rpartition(".")[0] not in made}
    for name, module in made.items():
        weight, bias = module.weight, module.bias
        dense[f"{name}.weight"] = (weight.T if module.transposed else weight).contiguous()
        if bias is not None:
            dense[f"{name}.bias"] = bias
    given = {**options, "config": config, "state_dict": dense}
    given.pop("trust_remote_code", None)  # of the Auto class, which opens folders alone
    hf, info = auto._model_mapping[type(config)].from_pretrained(None, **given)
    for name, module in made.items():
        parent, _, leaf = name.rpartition(".")
        if module.added is not None:
            module.added.data = module.added.data.to(hf.dtype)
        setattr(hf.get_submodule(parent), leaf, module)
    return hf, info


def _module(name: str, state: Mapping[str, Tensor], scheme: Scheme, note: Mapping[str, Any]) -> Int8Linear:
    def found(field: str) -> Tensor | None:
        return state.get(f"{name}.{field}")

    def need(field: str) -> Tensor:
        tensor = found(field)
        if tensor is None:
            raise ModelError(f"{name}.{field} is missing from the rounded model; quantize the model again")
        return tensor

    transposed = name in note["transposed"]
    if note["layout"] == "vesalius":
        rest = [found("added" if f == "bias" else f) for f in Parts._fields[2:]]
        return Int8Linear(Parts(need("codes"), need("scale"), *rest), scheme, transposed)
    codes, bias = need("weight"), found("bias")
    if note["layout"] == "bitsandbytes":
        return Int8Linear(Parts(codes, need("SCB")[:, None] / 127, bias=bias), scheme, transposed)
    fixed = None
    if scheme.inputs == "fixed":
        zero = found("input_zero_point")
        at = torch.zeros(1) if zero is None else zero.float()
        top = 2 ** (scheme.bits - 1)
        ends = torch.tensor([-top if scheme.input_zero else 1 - top, top - 1])
        fixed = ((ends - at) * need("input_scale")).view(2)
    scale = need("weight_scale")
    return Int8Linear(Parts(codes, scale.view(-1, 1), bias=bias, fixed=fixed), scheme, transposed)
