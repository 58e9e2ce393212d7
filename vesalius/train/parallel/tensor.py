"""Splits every matrix of a transformers model over a tensor group (Megatron-LM, arXiv 1909.08053).

    Y_i = act(f(X) A_i),    Z = g(sum_i Y_i B_i)

A (queries, keys, values; the MLP's first matrices) is split by columns, B (attention output; the MLP's last matrix) by
rows; the embedding and the output layer over the vocabulary. f sums gradients, g sums activations: two all-reduces
forward and two backward per block. Parameters become DTensors that know both the whole and the local piece, so that an
optimizer, a norm or a save works on them as on the whole; norms and positions are held whole by every process.
Which module is which comes from the family files of `model/anatomy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vesalius.errors import ModelError
from vesalius.model.anatomy import Anatomy, Block, Stack, read_anatomy
from vesalius.train.parallel.dropout import Streams, drops, first_matrices, separate
from vesalius.train.parallel.world import ParallelError

# whose attention modules were checked to work on a part of the heads; others count heads by the config inside `forward`
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "gpt_neox", "bloom", "opt", "gptj", "phi", "gemma")
# counts of heads, or widths made of heads, that attention modules keep and reshape with
LOCAL_SIZES = ("num_heads", "num_attention_heads", "split_size")


# by parameter name, the axis and the order in which its entries were dealt to the processes, where that is not the
# stored order (fused query-key-value matrices)
Orders = dict[str, tuple[int, Tensor]]


# -- styles: how one module is split -------------------------------------------------------------------------------


class _Style(ParallelStyle):
    def __init__(self, done: dict[int, nn.Parameter]) -> None:
        super().__init__()
        self.done = done  # tied parameters are split once

    def place(self, module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
        """Replaces a parameter by its local piece, as a DTensor."""
        old = getattr(module, name, None)
        if old is None or isinstance(old, DTensor):
            return
        if id(old) not in self.done:
            piece = local_piece(old.detach(), mesh, (placement,)).clone()
            shared = DTensor.from_local(
                piece.to(mesh.device_type), mesh, [placement], run_check=False, shape=old.shape, stride=old.stride()
            )
            self.done[id(old)] = nn.Parameter(shared, requires_grad=old.requires_grad)
        module.register_parameter(name, self.done[id(old)])


class Columns(_Style):
    """Split by output features; whole input, local output. `take` narrows what every process computes in full."""

    def __init__(
        self, done: dict[int, nn.Parameter], layout: Placement, keep: bool = False, take: slice | None = None
    ) -> None:
        super().__init__(done)
        self.layout, self.keep, self.take = layout, keep, take

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight: Placement = Shard(1 if isinstance(module, Conv1D) else 0)
        bias: Placement = Shard(0)
        if self.take is not None:
            weight = bias = Replicate()
        self.place(module, "weight", device_mesh, weight)
        self.place(module, "bias", device_mesh, bias)
        module.register_forward_pre_hook(lambda _, args: (whole(args[0], device_mesh, self.layout), *args[1:]))
        module.register_forward_hook(lambda _, __, out: self._output(out))
        return module

    def _output(self, out: DTensor) -> Tensor:
        if self.keep:
            return out
        if self.take is None:
            return out.to_local()
        return out.to_local(grad_placements=[Partial()])[..., self.take]


class Rows(_Style):
    """Split by input features; local input, summed output, to which the bias is added once."""

    def __init__(self, done: dict[int, nn.Parameter], layout: Placement) -> None:
        super().__init__(done)
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.place(module, "weight", device_mesh, Shard(0 if isinstance(module, Conv1D) else 1))
        self.place(module, "bias", device_mesh, Replicate())
        module.register_forward_pre_hook(
            lambda _, args: (DTensor.from_local(args[0], device_mesh, [Shard(-1)], run_check=False), *args[1:])
        )
        module.register_forward_hook(lambda _, __, out: out.redistribute(placements=[self.layout]).to_local())
        return module


class Vocabulary(_Style):
    """An embedding split over its rows: each process looks up the ids it has, the sum is whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.place(module, "weight", device_mesh, Shard(0))
        module.register_forward_pre_hook(lambda _, args: (whole(args[0], device_mesh, Replicate()), *args[1:]))
        module.register_forward_hook(lambda _, __, out: out.redistribute(placements=[Replicate()]).to_local())
        return module


class Whole(_Style):
    """Parameters that every process holds whole: norms, positions.

    They are DTensors all the same, since optimizers work on lists of one kind. Where the module sees only a part of the
    heads or positions (`layout`), its gradients are addends of the true ones, which DTensor then knows to sum.
    """

    def __init__(self, done: dict[int, nn.Parameter], layout: Placement | None = None, gather: bool = False) -> None:
        super().__init__(done)
        self.layout, self.gather = layout or Replicate(), gather

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters(recurse=False)):
            self.place(module, name, device_mesh, Replicate())

        def shared(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, DTensor):
                return x
            return DTensor.from_local(x, device_mesh, [self.layout], run_check=False)

        def local(_: nn.Module, __: Any, out: DTensor) -> Tensor:
            return (out.redistribute(placements=[Replicate()]) if self.gather else out).to_local()

        module.register_forward_pre_hook(
            lambda _, args, kwargs: (tuple(map(shared, args)), {k: shared(v) for k, v in kwargs.items()}),
            with_kwargs=True,
        )
        module.register_forward_hook(local)
        return module


def whole(x: Tensor, mesh: DeviceMesh, layout: Placement) -> DTensor:
    """A local tensor in this layout as a replicated DTensor; its gradient is summed on the way back."""
    if isinstance(x, DTensor):
        return x
    shared = DTensor.from_local(x, mesh, [layout], run_check=False)
    return shared if layout == Replicate() else shared.redistribute(placements=[Replicate()])


def local_piece(full: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """The piece of a whole tensor that this process holds; later axes of the mesh cut first, as FSDP does."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for axis in reversed(range(mesh.ndim)):
        placement = placements[axis]
        if not isinstance(placement, Replicate):
            dim: int = placement.dim  # type: ignore[attr-defined]
            chunk = -(-full.shape[dim] // mesh.size(axis))
            start = min(coordinate[axis] * chunk, full.shape[dim])
            full = full.narrow(dim, start, min(chunk, full.shape[dim] - start))
    return full


# -- the plan --------------------------------------------------------------------------------------------------------


def check_split(anatomy: Anatomy, ranks: int) -> None:
    """Refuses a number of processes that the model's heads or MLP do not divide by.

    Raises:
        ParallelError: with the counts, and the numbers that would work.
    """
    if anatomy.family not in FAMILIES:
        raise ParallelError(
            f"tensor parallelism does not know model type '{anatomy.family}' (it knows {', '.join(FAMILIES)}); "
            "data parallelism works for any"
        )
    heads, kv, width = anatomy.n_heads, anatomy.n_kv_heads, anatomy.d_mlp

    def fits(t: int) -> bool:
        return heads % t == 0 and (kv % t == 0 or t % kv == 0) and width % t == 0

    if not fits(ranks):
        works = ", ".join(str(t) for t in range(1, heads + 1) if fits(t))
        raise ParallelError(
            f"--tensor-parallel {ranks} does not divide this model's {heads} query heads, {kv} key-value heads and "
            f"{width} MLP neurons; these would: {works}"
        )


def split_model(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, sequence: bool = False) -> Orders:
    """Splits a model in place over a mesh of one axis.

    Args:
        model: an ordinary transformers model with an output layer over the vocabulary.
        mesh: the tensor group.
        device: where activations live.
        sequence: between split regions, also split the positions (Korthikanti et al., arXiv 2205.05198): the sums
            become reduce-scatters, the same bytes travel, and the memory for norms and residuals falls by the ranks.

    Returns:
        The order in which fused matrices were dealt, by parameter name; needed to put them together again.

    Raises:
        ParallelError: if the model cannot be split so.
    """
    try:
        anatomy = read_anatomy(model)
    except ModelError as error:
        raise ParallelError(f"tensor parallelism cannot read this model: {error}") from error
    ranks, rank = mesh.size(), mesh.get_local_rank()
    check_split(anatomy, ranks)
    if len(anatomy.stacks) > 1 or anatomy.main.unembed is None:
        raise ParallelError(f"tensor parallelism needs a decoder with one output matrix; this is {anatomy.family}")
    orders: Orders = {}
    done: dict[int, nn.Parameter] = {}
    names = {id(module): name for name, module in model.named_modules()}
    layout: Placement = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {}
    for block in anatomy.main.blocks:
        ins = first_matrices(block)
        for module in (*block.projections.values(), block.o, *ins, block.down):
            if not isinstance(module, nn.Linear | Conv1D):
                raise ParallelError(
                    f"tensor parallelism cannot split {names[id(module)]} ({type(module).__name__}); merge adapters "
                    "into the model, or train it with --tensor-parallel 1"
                )
        for side, module in block.projections.items():
            take = None if side == "q" else _shared_heads(anatomy, ranks, rank)
            plan[names[id(module)]] = Columns(done, layout, take=take)
        _deal_heads(anatomy, block, names, ranks, orders)
        plan |= {names[id(module)]: Columns(done, layout) for module in ins}
        plan |= {names[id(module)]: Rows(done, layout) for module in (block.o, block.down)}
        _adapt(anatomy, block, mesh, layout, ranks, rank)
        head_norms = {id(n.module) for n in block.head_norms}
        for norm in block.norms:
            if id(norm.module) in head_norms:
                plan[names[id(norm.module)]] = Whole(done, Shard(2))  # (row, pos, head, d)
            elif sequence:
                plan[names[id(norm.module)]] = Whole(done, Shard(1))
    stack = anatomy.main
    assert stack.unembed is not None
    embedding = model.get_input_embeddings()
    plan[names[id(embedding)]] = Vocabulary(done)
    plan[names[id(stack.unembed)]] = Columns(done, Replicate(), keep=True)
    if sequence:
        if stack.final_norm is None:
            raise ParallelError(f"sequence parallelism needs a norm after the last block; {anatomy.family} has none")
        plan[names[id(stack.final_norm.module)]] = Whole(done, Shard(1), gather=True)
        _cut_positions(stack, mesh)
    for name, module in model.named_modules():
        if name not in plan and any(True for _ in module.parameters(recurse=False)):
            plan[name] = Whole(done)
    parallelize_module(model, mesh, plan)
    if drops(model):
        separate(model, stack, Streams(device, rank), sequence)
    return orders


def _shared_heads(anatomy: Anatomy, ranks: int, rank: int) -> slice | None:
    """With fewer key-value heads than processes, every process computes them all and uses the one its queries read."""
    if anatomy.n_kv_heads % ranks == 0:
        return None
    head = rank * anatomy.n_kv_heads // ranks
    return slice(head * anatomy.d_head, (head + 1) * anatomy.d_head)


def _deal_heads(anatomy: Anatomy, block: Block, names: dict[int, str], ranks: int, orders: Orders) -> None:
    """Reorders a fused [Q | K | V] so that equal chunks hold the same heads of each; interleaved ones already do."""
    module = block.projections["q"]
    if module is not block.projections["k"] or anatomy.spec.qkv_layout == "interleaved":
        return
    axis = 1 if isinstance(module, Conv1D) else 0
    order = torch.arange(anatomy.d_head * (anatomy.n_heads + 2 * anatomy.n_kv_heads))
    q, k, v = (anatomy.split_qkv(order, side) for side in ("q", "k", "v"))  # (head, d_head)
    parts = zip(*(t.chunk(ranks) for t in (q, k, v)), strict=True)
    order = torch.cat([t.flatten() for part in parts for t in part])
    with torch.no_grad():
        for name, parameter in module.named_parameters(recurse=False):
            dim = axis if parameter.ndim > 1 else 0
            parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))
            orders[f"{names[id(module)]}.{name}"] = (dim, order)


def _adapt(anatomy: Anatomy, block: Block, mesh: DeviceMesh, layout: Placement, ranks: int, rank: int) -> None:
    """Tells a block's modules that they have a part of the heads, and gives their matrices one shared input."""
    for name in LOCAL_SIZES:
        if isinstance(getattr(block.attn, name, None), int):
            setattr(block.attn, name, getattr(block.attn, name) // ranks)
    if hasattr(block.attn, "num_key_value_groups"):
        local_kv = max(anatomy.n_kv_heads // ranks, 1)
        setattr(block.attn, "num_key_value_groups", anatomy.n_heads // ranks // local_kv)  # noqa: B010

    def share(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": whole(kwargs["hidden_states"], mesh, layout)}
        else:
            args = (whole(args[0], mesh, layout), *args[1:])
        if "alibi" in kwargs:  # (row x head, 1, key): the slopes of this process's heads
            slopes = kwargs["alibi"].unflatten(0, (-1, anatomy.n_heads))
            mine = anatomy.n_heads // ranks
            kwargs["alibi"] = slopes[:, rank * mine : (rank + 1) * mine].flatten(0, 1)
        return args, kwargs

    for module in {block.attn, block.mlp_in}:
        if not isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(share, with_kwargs=True)


def _cut_positions(stack: Stack, mesh: DeviceMesh) -> None:
    """Splits the positions before the first block; the output layer gathers them."""

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if x.shape[1] % mesh.size():
            raise ParallelError(
                f"sequences of {x.shape[1]} positions do not divide among {mesh.size()} processes; make the length a "
                "multiple of them, or leave the positions whole"
            )
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)]).to_local()
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": x}
        return (x, *args[1:]), kwargs

    stack.blocks[0].module.register_forward_pre_hook(cut, with_kwargs=True)
