"""What the processes of test_parallel.py compute: run as a program with a number of processes, writes JSON.

One program imports everything once and forks; each check returns numbers, and the test asserts on them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers as tf
from families import tiny_hf
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vesalius.train.parallel import (
    ParallelError,
    World,
    clip_grad_norm,
    gather_state,
    load_state,
    loss_sum,
    parallelize,
    unwrap,
)

VOCAB = 97
ALONE: dict[str, list[float]] = {}  # loss curves of one process


def batch(rows: int = 4, length: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and targets of which some carry no loss, unevenly over the rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :5] = -100
    targets[1, 2] = -100
    return ids[:, :-1], targets


def make(name: str) -> tf.PreTrainedModel:
    """A tiny model: a family of families.py, or one with SmolLM2's head counts, or with dropout."""
    if name == "9-3-heads":
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=VOCAB, hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=9,
                num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
            )
        )  # fmt: skip
    if name == "dropout":
        torch.manual_seed(0)
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.5, resid_pdrop=0.5,
                embd_pdrop=0.5, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
            )
        ).train()  # fmt: skip
    return tiny_hf(name)


def reference(name: str, z_loss: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one process, with torch's own cross-entropy."""
    model = make(name)
    ids, targets = batch()
    logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (targets != -100)).sum()
    (loss / (targets != -100).sum()).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def gathered_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients as one process would have them: they take the parameters' places, and those are gathered."""
    plain = unwrap(model)
    none = {n for n, p in plain.named_parameters() if p.grad is None}
    with torch.no_grad():
        for p in plain.parameters():
            if p.grad is not None:
                target = p.to_local() if isinstance(p, DTensor) else p
                target.copy_(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad)
    names = {n for n, _ in plain.named_parameters()}
    return {n: t for n, t in gather_state(plain).model.items() if n in names - none}


def step(model: torch.nn.Module, world: World, accumulate: int = 1, z_loss: float = 0.0) -> torch.Tensor:
    """Forward and backward of the batch; the logits of this process's rows."""
    ids, targets = batch()
    count = float((targets != -100).sum())
    rows = world.rows(len(ids))
    ids, targets = ids[rows], targets[rows]
    size = len(ids) // accumulate
    logits = []
    for i in range(accumulate):
        part = slice(i * size, (i + 1) * size)
        with world.local(model, last=i == accumulate - 1):
            out = model(ids[part], use_cache=False).logits
            total, _ = loss_sum(out, targets[part], z_loss)
        (total * world.scale(count)).backward()
        logits.append((out.full_tensor() if isinstance(out, DTensor) else out).detach())
    return torch.cat(logits)


def gaps(
    world: World, name: str, strategy: str, accumulate: int = 1, z_loss: float = 0.0,
    mutate: Callable[[Any], None] | None = None, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Largest differences of logits and gradients from one process."""
    logits, grads = reference(name, z_loss)
    model = parallelize(make(name), world, strategy, **options)
    if mutate is not None:
        mutate(model)
    mine = step(model, world, accumulate, z_loss)
    gap = (mine - logits[world.rows(4)]).abs().max().item()
    norm = float(clip_grad_norm(unwrap(model).parameters(), None))
    true_norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    found = gathered_gradients(model)
    if not world.is_main:
        return {}
    assert found.keys() == grads.keys(), found.keys() ^ grads.keys()
    by_name = {n: (found[n] - g).abs().max().item() for n, g in grads.items()}
    worst = max(by_name, key=lambda n: by_name[n])
    return {"logits": gap, "grads": by_name[worst], "worst": worst, "norm": abs(norm / true_norm - 1)}


# -- checks on two processes -------------------------------------------------------------------------------------


def equal(world: World, jobs: list[tuple[Any, ...]]) -> dict[str, Any]:
    return {f"{name} {strategy} {options}": gaps(world, name, strategy, **options) for name, strategy, options in jobs}


def curves(world: World, name: str, strategy: str) -> dict[str, Any]:
    """Losses of 50 AdamW steps with clipping, against one process's with torch's own clipping."""

    def losses(model: torch.nn.Module, here: World, clip: Callable[..., Any]) -> list[float]:
        optimizer = torch.optim.AdamW(unwrap(model).parameters(), lr=3e-3, weight_decay=0.1, fused=True)
        found = []
        for i in range(50):
            ids, targets = batch(seed=i % 10)
            count = float((targets != -100).sum())
            rows = here.rows(len(ids))
            with here.local(model, last=True):
                total, _ = loss_sum(model(ids[rows], use_cache=False).logits, targets[rows])
            (total * here.scale(count)).backward()
            clip(list(unwrap(model).parameters()), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(here.sum(total)) / count)
        return found

    mine = losses(parallelize(make(name), world, strategy), world, clip_grad_norm)
    if not world.is_main:
        return {}
    if name not in ALONE:
        ALONE[name] = losses(make(name), World.single("cpu"), torch.nn.utils.clip_grad_norm_)
    alone = ALONE[name]
    worst = max(abs(a / b - 1) for a, b in zip(mine, alone, strict=True))
    return {"worst": worst, "first": alone[0], "last": alone[-1]}


class Largest(TorchDispatchMode):
    """The largest tensor any operation makes, and how often one has a given number of entries."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                self.numel = max(self.numel, t.numel())
        return out


def sizes(world: World) -> dict[str, Any]:
    """Bytes of matrices held, messages sent, and the largest tensor made, by a model whose logits dwarf the rest."""
    messages, fractions = {}, {}
    for family in ("llama", "gpt2", "gpt-neox"):
        for layers in (1, 3):
            model = make(family)
            config = model.config
            config.num_hidden_layers = layers
            torch.manual_seed(0)
            whole = type(model)(config)
            total = sum(p.nbytes for p in whole.parameters() if p.ndim > 1)
            model = parallelize(whole, world, "tensor")
            held = [p.to_local() for p in model.parameters() if p.ndim > 1]
            positions = sum(m.weight.to_local().nbytes for n, m in model.named_modules() if n.endswith("wpe"))
            fractions[family] = (sum(p.nbytes for p in held) - positions) / (total - positions)
            ids, targets = batch()
            with CommDebugMode() as forward:
                logits = model(ids, use_cache=False).logits
            with CommDebugMode() as loss:
                total_loss, _ = loss_sum(logits, targets)
            with CommDebugMode() as backward:
                total_loss.backward()
            messages[f"{family} {layers}"] = [c.get_total_counts() for c in (forward, loss, backward)]
            kinds = {str(k).rsplit(".", 1)[-1] for c in (forward, loss, backward) for k in c.get_comm_counts()}
    model = make("llama")
    model.config.vocab_size = 4000
    model = parallelize(tf.LlamaForCausalLM(model.config), world, "tensor")
    ids, targets = batch(length=24)  # more positions than the embedding has columns
    with Largest() as largest:
        total_loss, _ = loss_sum(model(ids, use_cache=False).logits, targets)
        total_loss.backward()
    return {
        "fractions": fractions, "messages": messages, "kinds": sorted(kinds), "largest": largest.numel,
        "logits": ids.numel() * 4000, "embedding": 4000 * model.config.hidden_size,
    }  # fmt: skip


def losses(world: World) -> dict[str, float]:
    """Split cross-entropy against torch's own, whole and split (`loss_parallel`), with and without z-loss."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    assert world.mesh is not None
    mesh, found = world.mesh["tensor"], {}
    torch.manual_seed(0)
    for size in (96, 97, 1):  # dealt evenly, unevenly, and one rank left with nothing
        x, targets = torch.randn(6, size) * 5, torch.randint(0, size, (6,))
        targets[2] = -100
        whole = x.clone().requires_grad_()
        F.cross_entropy(whole, targets, reduction="sum").backward()
        split = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        total, _ = loss_sum(split, targets)
        total.backward()
        found[f"gradient {size}"] = (split.grad.full_tensor() - whole.grad).abs().max().item()
        if size == 96:
            theirs = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
            with loss_parallel():
                theirs_total = F.cross_entropy(theirs, targets, reduction="sum")
                theirs_total.backward()
            found["loss_parallel"] = (split.grad.to_local() - theirs.grad.to_local()).abs().max().item()
            found["loss_parallel total"] = abs(float(total.detach()) - float(theirs_total.detach().full_tensor()))
            weights = torch.rand(6)
            plain = x.clone().requires_grad_()
            z = (plain.logsumexp(-1).square() * weights * (targets != -100)).sum()
            (1e-2 * z + (F.cross_entropy(plain, targets, reduction="none") * weights).sum()).backward()
            split.grad = None
            loss_sum(split, targets, 1e-2, weights).total.backward()
            found["z"] = (split.grad.full_tensor() - plain.grad).abs().max().item()
    return found


def operators(world: World) -> dict[str, float]:
    """An MLP split by hand with f and g, against DTensor's and against the whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from vesalius.train.parallel.loss import f, g

    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    group, rank = mesh.get_group(), world.tensor_rank
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 6)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    results = {}

    def hand(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows = slice(rank * 4, rank * 4 + 4)
        local = F.gelu(F.linear(f(x, group), a[rows], net[0].bias[rows]))
        return g(F.linear(local, b[:, rows]), group) + net[2].bias

    for way in ("whole", "hand", "dtensor"):
        if way == "dtensor":
            parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        leaf = x.clone().requires_grad_()
        out = hand(leaf, net[0].weight, net[2].weight) if way == "hand" else net(leaf)
        out.pow(3).sum().backward()
        results[way] = (out.detach(), leaf.grad)
    return {
        f"{way} {part}": (results[way][i] - results["whole"][i]).abs().max().item()
        for way in ("hand", "dtensor")
        for i, part in enumerate(("forward", "backward"))
    }


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Any:
    """For a time."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def mutations(world: World) -> dict[str, Any]:
    """The equality test on split models with a mistake built in."""

    def swapped(model: Any) -> None:  # a square matrix cut along the wrong axis
        layer = model.model.layers[1].self_attn
        full = layer.o_proj.weight.full_tensor().detach()
        with torch.no_grad():
            layer.o_proj.weight.to_local().copy_(full.chunk(world.tensor)[world.tensor_rank].T)

    def bias_each(model: Any) -> None:  # added before the sum instead of after it
        out = model.model.layers[1].mlp.down_proj
        with torch.no_grad():
            out.bias.to_local().mul_(world.tensor)

    def order_lost(model: Any) -> None:  # a fused matrix cut in equal chunks without dealing its heads
        weight = model.transformer.h[0].attn.c_attn.weight
        whole = make("gpt2").transformer.h[0].attn.c_attn.weight
        with torch.no_grad():
            weight.to_local().copy_(whole.chunk(world.tensor, dim=1)[world.tensor_rank])

    found = {
        "none": gaps(world, "llama-bias", "tensor"),
        "swapped": gaps(world, "llama-bias", "tensor", mutate=swapped),
        "bias": gaps(world, "llama-bias", "tensor", mutate=bias_each),
        "order": gaps(world, "gpt2", "tensor", mutate=order_lost),
    }
    from vesalius.train.parallel import tensor

    class Unsummed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, mesh: Any) -> DTensor:
            return DTensor.from_local(x.detach(), mesh, [Replicate()], run_check=False)

        @staticmethod
        def backward(ctx: Any, *grads: DTensor) -> tuple[torch.Tensor, None]:
            return grads[0].to_local(), None

    def no_f(x: torch.Tensor, mesh: Any, layout: Any) -> Any:  # gradients of a split input are not summed
        return x if isinstance(x, DTensor) else Unsummed.apply(x, mesh)

    with replaced(tensor, "whole", no_f):
        found["no f"] = gaps(world, "llama", "tensor")
    return found


def dropout(world: World) -> dict[str, Any]:
    """With the same weights in all heads: are the masks inside a split region each process's own, outside common?"""
    from vesalius.train.parallel.dropout import Streams

    def run(checkpointing: bool = False, sequence: bool = False) -> tuple[float, float, Any]:
        model = make("dropout")
        with torch.no_grad():
            for block in model.transformer.h:  # heads 2, 3 like heads 0, 1
                for p in block.attn.c_attn.parameters():
                    sides = p.view(*p.shape[:-1], 3, 2, 16)
                    sides[..., 1, :] = sides[..., 0, :]
        model = parallelize(model, world, "tensor", sequence_parallel=sequence)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        seen: list[torch.Tensor] = []
        model.transformer.h[0].attn.c_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].detach().clone()), prepend=True
        )
        outside: list[torch.Tensor] = []
        model.transformer.h[1].register_forward_hook(lambda _, __, out: outside.append(out.detach().clone()))
        for _ in range(2):  # a second step sees what the first left behind
            model.zero_grad()
            torch.manual_seed(5)
            logits = step(model, world)

        def difference(t: torch.Tensor) -> float:
            other = t.clone()
            dist.broadcast(other, 0)
            gap = (other - t).abs().max()
            dist.all_reduce(gap, op=dist.ReduceOp.MAX)
            return float(gap)

        inside = difference(seen[0])
        grads = {n: g.clone() for n, g in gathered_gradients(model).items()}
        return inside, difference(outside[0]), (logits, grads, float(torch.rand(())))

    inside, outside, (logits, grads, after) = run()
    _, _, (logits_again, grads_again, after_again) = run(checkpointing=True)
    _, positions, (sp_logits, sp_grads, _) = run(sequence=True)
    _, _, (sp_logits_again, sp_grads_again, _) = run(sequence=True, checkpointing=True)
    with replaced(Streams, "enter", lambda self: None):
        inside_shared, _, _ = run()

    def gap(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        return max(((one[n] - two[n]).abs().max().item() for n in one), default=0.0)

    return {
        "inside": inside, "outside": outside, "inside with one stream": inside_shared, "positions": positions,
        "recomputed logits": (logits - logits_again).abs().max().item(), "recomputed grads": gap(grads, grads_again),
        "recomputed logits, positions split": (sp_logits - sp_logits_again).abs().max().item(),
        "recomputed grads, positions split": gap(sp_grads, sp_grads_again),
        "stream after": abs(after - after_again),
    }  # fmt: skip


# -- saving --------------------------------------------------------------------------------------------------------


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World, steps: range) -> float:
    loss = 0.0
    for i in steps:
        ids, targets = batch(seed=i)
        count = float((targets != -100).sum())
        rows = world.rows(len(ids))
        with world.local(model, last=True):
            total, _ = loss_sum(model(ids[rows], use_cache=False).logits, targets[rows])
        (total * world.scale(count)).backward()
        clip_grad_norm(unwrap(model).parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(world.sum(total)) / count
    return loss


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        unwrap(model).parameters(), lr=1e-2, eps=1e-4, foreach=True
    )  # rounding of zero gradients stays small


def saved(world: World, name: str, strategy: str) -> dict[str, Any]:
    """Untrained and trained, to one process and back: are all weights and optimizer tensors the same to the bit?"""
    model = parallelize(make(name), world, strategy)
    optimizer = optimizer_of(model)
    fresh = gather_state(model)
    train(model, optimizer, world, range(3))
    state = gather_state(model, optimizer)
    shared = [[dict(state.model), dict(state.optimizer)]]
    dist.broadcast_object_list(shared, 0)
    weights, tensors = shared[0]
    again = parallelize(make(name), world, strategy)
    optimizer_again = optimizer_of(again)
    load_state(again, optimizer_again, weights, tensors)

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if isinstance(a, DTensor) and isinstance(b, DTensor):
            return a.placements == b.placements and torch.equal(a.to_local(), b.to_local())
        return torch.equal(a, b)

    pairs = list(zip(unwrap(model).parameters(), unwrap(again).parameters(), strict=True))
    local = all(same(a, b) for a, b in pairs)
    inner = all(same(v, optimizer_again.state[b][k]) for a, b in pairs for k, v in optimizer.state[a].items())
    onward = train(model, optimizer, world, range(3, 5)) - train(again, optimizer_again, world, range(3, 5))
    if not world.is_main:
        return {}
    one = make(name)
    untouched = all(torch.equal(fresh.model[n], t) for n, t in one.state_dict().items())
    one_optimizer = optimizer_of(one)
    load_state(one, one_optimizer, weights, tensors)
    back = gather_state(one, one_optimizer)
    truth = make(name)
    truth_optimizer = optimizer_of(truth)
    train(truth, truth_optimizer, World.single("cpu"), range(3))
    expected = gather_state(truth, truth_optimizer)
    one.tie_weights()
    return {
        "untrained": untouched and fresh.model.keys() == one.state_dict().keys(),
        "local pieces": local and inner,
        "onward": onward,
        "one process": all(torch.equal(back.model[n], t) for n, t in weights.items())
        and all(torch.equal(back.optimizer[n], t) for n, t in tensors.items())
        and back.optimizer.keys() == tensors.keys() == expected.optimizer.keys(),
        "from truth": max((expected.model[n] - t).abs().max().item() for n, t in weights.items()),
        "optimizer from truth": max((expected.optimizer[n] - t).abs().max().item() for n, t in tensors.items()),
    }


def helpers(world: World) -> dict[str, Any]:
    """Sums, rows and votes."""
    try:
        world.rows(world.data * 2 + 1)
        refused = ""
    except ParallelError as error:
        refused = str(error)
    value = torch.tensor([1.0, float(world.data_rank)])
    total = world.sum(value)
    return {
        "sum": total.tolist(), "number": world.sum(0.5), "unchanged": value.tolist(), "refused": refused,
        "rows": [world.rows(8).start, world.rows(8).stop], "any": world.agree(world.rank == 1),
        "none": world.agree(False),
    }  # fmt: skip


PLAN: dict[int, list[tuple[str, int, Callable[[World], Any]]]] = {
    2: [
        ("equal", 2, lambda w: equal(w, [(n, "tensor", {}) for n in (
            "llama", "gpt2", "gpt-neox", "gpt-neox-serial", "bloom", "opt", "gptj", "phi", "gemma", "mistral", "qwen2",
            "qwen3", "llama-bias")]
            + [("llama", "tensor", {"accumulate": 2, "z_loss": 0.01})]
            + [(n, "tensor", {"sequence_parallel": True}) for n in ("llama", "gpt2", "gpt-neox", "bloom", "qwen3")])),
        ("equal data", 1, lambda w: equal(w, [
            (n, s, {"accumulate": a}) for n in ("llama", "gpt2", "bert") for s in ("ddp", "fsdp") for a in (1, 2)])),
        ("curves", 2, lambda w: {n: curves(w, n, "tensor") for n in ("llama", "gpt-neox")}),
        ("curves data", 1, lambda w: {s: curves(w, "llama", s) for s in ("ddp", "fsdp")}),
        ("sizes", 2, sizes),
        ("losses", 2, losses),
        ("operators", 2, operators),
        ("mutations", 2, mutations),
        ("dropout", 2, dropout),
        ("saved", 1, lambda w: {s: saved(w, "gpt2", s) for s in ("ddp", "fsdp")}),
        ("helpers", 1, helpers),
    ],
    3: [("equal", 3, lambda w: equal(w, [("9-3-heads", "tensor", {})]))],
    4: [
        ("equal", 2, lambda w: equal(w, [
            (n, s, {"accumulate": 2}) for n, s in (
                ("llama", "ddp+tensor"), ("llama", "fsdp+tensor"), ("gpt2", "fsdp+tensor"), ("qwen3", "ddp+tensor"))])),
        ("equal shared heads", 4, lambda w: equal(w, [(n, "tensor", {}) for n in ("llama", "qwen3")])),
        ("saved", 2, lambda w: {f"{n} {s}": saved(w, n, s)
                                for n, s in (("llama", "ddp+tensor"), ("gpt2", "fsdp+tensor"))}),
        ("helpers", 2, helpers),
    ],
}  # fmt: skip


def process(rank: int, size: int, store: str, out: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="", MASTER_PORT="")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for name, tensor_parallel, check in PLAN[size]:
        began = time.perf_counter()
        world = World.start(tensor_parallel, device="cpu")
        results[name] = check(world)
        results.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 2)
    if rank == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    world.close()


def main() -> None:
    """`parallel_worker.py OUT_FOLDER 2 4` forks so many processes; `OUT_FOLDER torchrun` is one of torchrun's."""
    out = sys.argv[1]
    if sys.argv[2] == "torchrun":
        torch.set_num_threads(1)
        with World.start(3, device="cpu") as world:
            results = {name: check(world) for name, _, check in PLAN[3]}
            world.barrier()
            if world.is_main:
                with open(f"{out}/3.json", "w") as file:
                    json.dump(results | {"backend": world.backend, "grid": [world.data, world.tensor]}, file)
        return
    for size in map(int, sys.argv[2:]):
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(
                process, (size, f"{folder}/store", f"{out}/{size}.json"), nprocs=size, start_method="fork"
            )


if __name__ == "__main__":
    main()
