"""What every optimizer promises: sizes of state, one rule in two forms, the contract, groups and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_rules import (
    DTYPES,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vesalius.errors import VesaliusError
from vesalius.train.optimizers import OPTIMIZERS, groups, make_optimizer, settings, state_bytes
from vesalius.train.optimizers.base import BLOCK
from vesalius.train.optimizers.conda import Conda

# -- sizes and forms ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, odd: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 11)
        if odd:
            self.temperature = nn.Parameter(torch.tensor(0.5))
            self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.idle = nn.Parameter(torch.ones(4, 4))  # never takes a gradient
        self.to(dtype)

    def loss(self, step: int, rows: slice = slice(None)) -> Tensor:
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (64, 2), generator=g)[rows]
        h = self.norm(torch.tanh(self.up(self.embed(ids[:, 0]))))
        logits = self.down(h)
        if hasattr(self, "temperature"):
            logits = logits * self.temperature
        exact = logits.float() if logits.dtype == torch.bfloat16 else logits
        return nn.functional.cross_entropy(exact, ids[:, 1])


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range, micro: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        for k in range(micro):
            (net.loss(step, slice(k * 64 // micro, (k + 1) * 64 // micro)) / micro).backward()
        optimizer.step()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    ("name", "copies"), [("adan", 4.0), ("sgd-sai", 1.0), ("adamw", 2.0), ("palm", 2.0), ("sgdm", 1.0)]
)
def test_the_state_is_as_large_as_published(name: str, copies: float) -> None:
    model = nn.Linear(300, 200)
    model(torch.randn(4, 300)).square().mean().backward()
    made = make_optimizer(name, model)
    made.step()
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    assert state_bytes(made) / bytes_ == pytest.approx(copies, abs=0.005)


def test_sai_keeps_half_of_adamws_state() -> None:
    sizes = {}
    for name in ("sgd-sai", "adamw"):
        model = nn.Linear(300, 200)
        model(torch.randn(4, 300)).square().mean().backward()
        made = make_optimizer(name, model)
        made.step()
        sizes[name] = state_bytes(made)
    assert abs(sizes["sgd-sai"] / sizes["adamw"] - 0.50) < 0.01


@pytest.mark.parametrize("name", ["adan", "sgd-sai", "conda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_and_blocks_are_one_rule(name: str, dtype: torch.dtype) -> None:
    """A tensor longer than a block, one that is not contiguous, and a small one."""
    g = torch.Generator().manual_seed(0)
    shapes = [torch.randn(BLOCK + 77, generator=g), torch.randn(6, 4, generator=g).T, torch.randn(3, generator=g)]
    ends = []
    for foreach in (False, True):
        p = [nn.Parameter(t.to(dtype, copy=True)) for t in shapes]
        made = OPTIMIZERS.get(name)(p, foreach=foreach, weight_decay=0.1, lr=1e-4)
        for k in range(5):
            for t, x in zip(p, shapes, strict=True):
                t.grad = torch.sin(x * (k + 1)).to(dtype) + 0.1
            made.step()
        ends.append([t.detach().clone() for t in p])
        assert not p[1].is_contiguous()
    worst = max(float(((a - b).abs() / (1 + a.abs())).max()) for a, b in zip(*ends, strict=True))
    assert worst < (1e-12 if dtype == torch.float64 else 1.5e-7)  # float32 itself is 1.2e-7 apart


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_accumulated_gradients_take_the_same_path(name: str) -> None:
    nets = []
    for micro in (1, 4):
        net = Net(torch.float64)
        train(net, make_optimizer(name, net), range(10), micro)
        nets.append(weights(net))
    assert float((nets[0] - nets[1]).abs().max()) < 1e-5


# -- the contract of every optimizer --------------------------------------------------------------------------------


def through_safetensors(optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """The state dict after its tensors went through a file, which takes tensors alone."""
    saved = optimizer.state_dict()
    flat = {f"{i}.{k}": v.contiguous() for i, s in saved["state"].items() for k, v in s.items()}
    assert all(isinstance(v, Tensor) for v in flat.values())
    save_file(flat, path)
    state: dict[int, dict[str, Tensor]] = {i: {} for i in saved["state"]}
    for name, value in load_file(path).items():
        number, key = name.split(".", 1)
        state[int(number)][key] = value
    return {"state": state, "param_groups": saved["param_groups"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_resumes_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    extra = {"period": 4} if name == "conda" else {}
    whole = Net(dtype)
    train(whole, make_optimizer(name, whole, **extra), range(14))
    first = Net(dtype)
    made = make_optimizer(name, first, **extra)
    train(first, made, range(7))
    second = Net(dtype)
    second.load_state_dict(first.state_dict())
    other = make_optimizer(name, second, **extra)
    other.load_state_dict(through_safetensors(made, tmp_path / "state.safetensors"))
    assert state_bytes(other) == state_bytes(made)
    train(second, other, range(7, 14))
    assert torch.equal(weights(second), weights(whole))
    assert all(p.dtype == dtype for p in second.parameters())
    train(first, made, range(7, 14))  # loading did not tie the two together
    assert torch.equal(weights(first), weights(whole))


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_learns(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net)

    def held() -> float:
        return float(net.loss(0).detach())

    before = held()
    for _ in range(60):
        train(net, made, range(1))
    assert held() < before - 0.05


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_leaves_alone_what_has_no_gradient(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net, weight_decay=0.0)
    train(net, made, range(3))
    assert torch.equal(net.idle.detach(), torch.ones(4, 4)) and net.idle not in {p for p, s in made.state.items() if s}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    fresh = Net()
    quiet = make_optimizer(name, fresh, weight_decay=0.0)
    before = weights(fresh)
    for p in fresh.parameters():
        p.grad = torch.zeros_like(p)
    quiet.step()
    assert torch.equal(weights(fresh), before)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_decays_only_what_should_decay(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net, no_decay=("vector", "embedding"), weight_decay=0.1, lr=0.5)
    for p in net.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    made.step()
    moved = {n: float(p.detach().mean()) for n, p in net.named_parameters()}
    still = {"embed.weight", "up.bias", "norm.weight", "norm.bias", "down.bias"}
    assert all(moved[n] == 1.0 for n in still)
    assert all(moved[n] < 1.0 for n in moved.keys() - still)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_takes_odd_shapes(name: str) -> None:
    net = Net(odd=True)
    made = make_optimizer(name, net)
    train(net, made, range(5))
    assert float(net.temperature.detach()) != 0.5 and bool(torch.isfinite(weights(net)).all())
    if name in ("adan", "conda", "palm", "sgd-sai"):  # and on their own, empty ones too
        p = nn.Parameter(torch.zeros(0, 3))
        p.grad = torch.zeros(0, 3)
        OPTIMIZERS.get(name)([{"params": [p], "project": True}] if name == "conda" else [p]).step()


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_same_run_same_bits_and_copies_stand_alone(name: str) -> None:
    ends = []
    for _ in range(2):
        net = Net()
        made = make_optimizer(name, net)
        train(net, made, range(6))
        ends.append(weights(net))
    assert torch.equal(*ends)
    twin = copy.deepcopy({"net": net, "optimizer": made})
    for p, q in zip(net.parameters(), twin["net"].parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()  # copying a parameter leaves its gradient behind
    loss = made.step(lambda: net.loss(9))
    assert loss is not None and float(loss.detach()) > 0  # a closure's loss comes back
    twin["optimizer"].step()
    assert torch.equal(weights(net), weights(twin["net"])) and not torch.equal(weights(net), ends[0])


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_contract_follows_a_rate_set_from_outside(name: str) -> None:
    net = Net()
    made = make_optimizer(name, net)
    train(net, made, range(3))
    before = weights(net)
    for group in made.param_groups:
        group["lr"] = 0.0
    train(net, made, range(3, 4))
    moved = float((weights(net) - before).abs().max())
    assert moved == 0.0 if name != "palm" else moved > 0  # PaLM averages updates: those of earlier rates go on
    assert settings(name)["lr"] > 0 and OPTIMIZERS.entry(name).paper and OPTIMIZERS.entry(name).summary


def test_groups_are_in_order_and_complete() -> None:
    net = Net(odd=True)
    net.up.weight.requires_grad_(False)
    made = groups(net, 0.1)
    assert [g["role"] for g in made] == ["embedding", "matrix", "vector"]
    assert [g["names"] for g in made][1:] == [
        ["idle", "down.weight"],
        ["temperature", "up.bias", "norm.weight", "norm.bias", "down.bias"],
    ]
    assert [g["weight_decay"] for g in made] == [0.1, 0.1, 0.0]
    listed = [id(p) for g in made for p in g["params"]]
    wanted = {id(p) for p in net.parameters() if p.requires_grad and p.numel()}
    assert len(listed) == len(set(listed)) and set(listed) == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_optimizer("adn", Net()), "did you mean 'adan'"),
        (
            lambda: make_optimizer("adan", Net(), beta=1),
            "unknown setting of optimizer adan 'beta'; did you mean 'betas'",
        ),
        (lambda: make_optimizer("adan", Net(), lr=-1.0), "lr = -1.0 of Adan"),
        (lambda: make_optimizer("adan", Net(), lr=float("nan")), "lr = nan of Adan"),
        (lambda: make_optimizer("adan", Net(), betas=(0.9, 0.9)), "three betas"),
        (lambda: make_optimizer("conda", Net(), betas=(0.9, 1.0)), "1.0 for Conda"),
        (lambda: make_optimizer("conda", Net(), mode="shrt"), "mode 'shrt'"),
        (lambda: make_optimizer("conda", Net(), period=-1), "period = -1"),
        (lambda: make_optimizer("sgd-sai", Net(), momentum=1.5), "1.5 for SGDSaI"),
        (lambda: make_optimizer("adamw", Net().requires_grad_(False)), "nothing to train"),
        (lambda: make_optimizer("adamw", Net(), no_decay=("vectors",)), "did you mean 'vector'"),
    ],
)
def test_nonsense_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(VesaliusError, match=message):
        call()


def test_a_momentum_that_is_not_finite_is_refused() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.full((3, 3), math.nan)
    with pytest.raises(VesaliusError, match="3 x 3 matrix is not finite"):
        Conda([p], project=True).step()
