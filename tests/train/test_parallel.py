"""Several processes train as one does: the same logits, gradients, losses and files (Megatron-LM, arXiv 1909.08053).

The numbers come from `parallel_worker.py`, run once with two and four forked gloo processes and with three of torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_hf
from torch import nn

from vesalius.errors import UnknownName
from vesalius.model.anatomy import read_anatomy
from vesalius.train.parallel import (
    ParallelError,
    World,
    check_split,
    clip_grad_norm,
    gather_state,
    load_state,
    loss_sum,
    parallelize,
)

HERE = Path(__file__).parent
LOGITS, GRADIENTS = 1e-5, 1e-6  # float32, largest difference from one process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the processes found, by their number."""
    out = tmp_path_factory.mktemp("parallel")
    root = HERE.parents[1]
    paths = [str(root), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }
    worker = [str(HERE / "parallel_worker.py"), str(out)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    for command in ([*worker, "2", "4"], [*torchrun, *worker, "torchrun"]):
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return {int(path.stem): json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize(
    ("processes", "check"),
    [(2, "equal"), (2, "equal data"), (3, "equal"), (4, "equal"), (4, "equal shared heads")],
)
def test_logits_gradients_and_their_norm_are_those_of_one_process(found: Any, processes: int, check: str) -> None:
    cases = found[processes][check]
    assert cases
    for case, gap in cases.items():
        assert gap["logits"] < LOGITS, case
        assert gap["grads"] < GRADIENTS, (case, gap["worst"])
        assert gap["norm"] < 1e-6, case


@pytest.mark.parametrize("check", ["curves", "curves data"])
def test_fifty_clipped_adamw_steps_have_the_loss_curve_of_one_process(found: Any, check: str) -> None:
    for case, curve in found[2][check].items():
        assert curve["worst"] < 1e-4, case
        assert curve["last"] < curve["first"] - 0.5, case  # and it learned something


def test_two_processes_hold_half_of_the_matrices_each(found: Any) -> None:
    for family, fraction in found[2]["sizes"]["fractions"].items():
        assert 0.49 < fraction <= 0.51, family


def test_two_all_reduces_forward_and_two_backward_per_block(found: Any) -> None:
    sizes = found[2]["sizes"]
    for family in ("llama", "gpt2", "gpt-neox"):
        one, three = sizes["messages"][f"{family} 1"], sizes["messages"][f"{family} 3"]
        assert [b - a for a, b in zip(one, three, strict=True)] == [4, 0, 4], family
        assert one == [3, 2, 3], family  # with the embedding, the loss's maximum and sums, the output layer's input
    assert set(sizes["kinds"]) == {"all_reduce", "allreduce_"}


def test_whole_logits_are_never_made(found: Any) -> None:
    sizes = found[2]["sizes"]
    assert sizes["embedding"] < sizes["logits"] / 2
    assert sizes["largest"] <= sizes["logits"] / 2


def test_split_cross_entropy_is_torchs_own(found: Any) -> None:
    assert all(gap < 2e-6 for gap in found[2]["losses"].values()), found[2]["losses"]


def test_f_and_g_by_hand_agree_with_dtensor(found: Any) -> None:
    assert all(gap < 1e-14 for gap in found[2]["operators"].values())


def test_built_in_mistakes_are_seen(found: Any) -> None:
    mutations = found[2]["mutations"]
    assert mutations["none"]["logits"] < LOGITS and mutations["none"]["grads"] < GRADIENTS
    for mistake in ("swapped", "bias", "order", "no f"):
        gap = mutations[mistake]
        assert gap["logits"] > 100 * LOGITS or gap["grads"] > 100 * GRADIENTS, mistake
    assert mutations["no f"]["norm"] > 1e-3


def test_dropout_is_common_outside_split_regions_and_each_processs_own_inside(found: Any) -> None:
    dropout = found[2]["dropout"]
    assert dropout["inside"] > 0.1  # equal heads on two processes, different masks
    assert dropout["outside"] == 0
    assert dropout["inside with one stream"] == 0  # the mistake: the same masks on both
    assert dropout["positions"] > 0.1  # split positions: the pieces differ
    assert dropout["recomputed logits"] == dropout["recomputed grads"] == 0  # activation checkpointing
    assert dropout["recomputed logits, positions split"] == dropout["recomputed grads, positions split"] == 0
    assert dropout["stream after"] == 0


@pytest.mark.parametrize("processes", [2, 4])
def test_saved_state_is_that_of_one_process_to_the_bit(found: Any, processes: int) -> None:
    for case, saved in found[processes]["saved"].items():
        assert saved["untrained"], case  # splitting and gathering changes nothing
        assert saved["local pieces"], case  # loaded pieces are the pieces that were saved
        assert saved["one process"], case  # one process loads it, and would save the same
        assert saved["onward"] == 0, case  # training goes on as if nothing had happened
        assert saved["from truth"] < 1e-5 and saved["optimizer from truth"] < 1e-6, case


@pytest.mark.parametrize("processes", [2, 4])
def test_sums_rows_and_votes(found: Any, processes: int) -> None:
    helpers = found[processes]["helpers"]
    assert helpers["sum"] == [2.0, 1.0] and helpers["unchanged"] == [1.0, 0.0] and helpers["number"] == 1.0
    assert helpers["rows"] == [0, 4]
    assert helpers["refused"].startswith("5 rows do not divide among 2 data-parallel processes")
    assert helpers["any"] and not helpers["none"]


def test_torchrun_starts_a_world(found: Any) -> None:
    assert found[3]["backend"] == "gloo" and found[3]["grid"] == [1, 3]


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv", "width", "ranks", "works"),
    [(9, 3, 1536, 2, "1, 3"), (12, 4, 96, 5, "1, 2, 4, 12"), (4, 1, 64, 3, "1, 2, 4")],
)
def test_numbers_of_processes_that_do_not_divide_the_heads_are_refused(
    heads: int, kv: int, width: int, ranks: int, works: str
) -> None:
    import dataclasses

    anatomy = dataclasses.replace(read_anatomy(tiny_hf("llama")), n_heads=heads, n_kv_heads=kv, d_mlp=width)
    with pytest.raises(ParallelError, match=f"{heads} query heads, {kv} key-value heads.*these would: {works}$"):
        check_split(anatomy, ranks)
    for ok in map(int, works.split(", ")):
        check_split(anatomy, ok)


def test_unknown_families_are_refused_for_tensor_parallelism() -> None:
    with pytest.raises(ParallelError, match="does not know model type 'phi3'"):
        check_split(read_anatomy(tiny_hf("phi3")), 2)


def test_worlds_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParallelError, match="torchrun --nproc-per-node 2"):
        World.start(2)
    with pytest.raises(ParallelError, match="0 is not a number of processes"):
        World.start(0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ParallelError, match="4 does not divide 6 processes; these would: 1, 2, 3, 6"):
        World.start(4)


def test_strategies_that_cannot_be_are_refused() -> None:
    world = World.single("cpu")
    with pytest.raises(UnknownName, match="ddpp"):
        parallelize(nn.Linear(2, 2), world, "ddpp")
    with pytest.raises(UnknownName, match="ddp\\+fsdp"):
        parallelize(nn.Linear(2, 2), world, "ddp+fsdp")
    with pytest.raises(ParallelError, match="needs a tensor group"):
        parallelize(nn.Linear(2, 2), world, "tensor")
    with pytest.raises(ParallelError, match="sequence parallelism needs"):
        parallelize(nn.Linear(2, 2), world, "ddp", sequence_parallel=True)


def test_one_process_is_left_as_it_is() -> None:
    with World.single("cpu") as world:
        model = nn.Linear(2, 2)
        assert parallelize(model, world, "fsdp") is model
        assert world.rows(5) == slice(0, 5) and world.sum(1.5) == 1.5 and world.agree(True) and world.scale(4) == 0.25


def test_clipping_is_torchs_own() -> None:
    torch.manual_seed(0)
    mine, theirs = ([nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4))] for _ in range(2))
    for a, b in zip(mine, theirs, strict=True):
        a.grad = torch.randn(a.shape) * 3
        b.grad = a.grad.clone()
    norm, their_norm = clip_grad_norm(mine, 0.7), nn.utils.clip_grad_norm_(theirs, 0.7)
    assert torch.allclose(norm, their_norm)
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))  # type: ignore[arg-type]
    before = [p.grad.clone() for p in mine]  # type: ignore[union-attr]
    assert float(clip_grad_norm(mine, None)) == pytest.approx(0.7, rel=1e-4)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, mine, strict=True))  # type: ignore[arg-type]


def test_loss_of_whole_logits_is_torchs_own_and_half_precision_keeps_its_type() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 11, requires_grad=True), torch.randint(0, 11, (2, 5))
    targets[0, 0] = -100
    total, logs = loss_sum(logits, targets, z_loss=0.1)
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    z = 0.1 * (logits.logsumexp(-1).square() * (targets != -100)).sum()
    (mine,) = torch.autograd.grad(total, logits)
    (theirs,) = torch.autograd.grad(nll + z, logits)
    assert torch.allclose(total, nll + z) and torch.allclose(mine, theirs, atol=1e-6)
    assert float(logs["nll"]) == pytest.approx(float(nll.detach())) and not logs["nll"].requires_grad
    assert float(logs["z_loss"]) == pytest.approx(float(z.detach()))
    half = logits.detach().bfloat16().requires_grad_()
    loss_sum(half, targets).total.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_state_that_does_not_fit_is_refused() -> None:
    model = tiny_hf("gpt2")
    state = gather_state(model)
    assert state.model.keys() == model.state_dict().keys() and not state.optimizer
    name = "transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(KeyError, match="is missing"):
        load_state(model, None, {k: v for k, v in state.model.items() if k != name})
    with pytest.raises(KeyError, match="no weight of this model"):
        load_state(model, None, state.model | {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match="mlp.c_fc.weight is"):
        load_state(model, None, state.model | {name: torch.zeros(2, 2)})
    without_tied = {k: v for k, v in state.model.items() if k != "lm_head.weight"}
    load_state(model, None, without_tied)  # one name of tied weights is enough
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(KeyError, match="belongs to no parameter"):
        load_state(model, optimizer, state.model, {"nothing.exp_avg": torch.zeros(1)})


def test_optimizer_state_that_is_no_tensor_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.state[model.weight]["history"] = [1, 2]
    with pytest.raises(ParallelError, match="LBFGS keeps history of weight as list"):
        gather_state(model, optimizer)
