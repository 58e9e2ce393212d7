"""Training single heads: what lies outside their slices stays as it was to the last bit, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_hf
from train_helpers import small, weights

from vesalius.errors import PartError, VesaliusError
from vesalius.model.anatomy import read_anatomy
from vesalius.runs import Run
from vesalius.train.optimizers import make_optimizer
from vesalius.train.running import train
from vesalius.train.select import Slices, choose, slices


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "llama", "phi3"])
def test_fifty_steps_with_decay_move_the_head_alone(family: str) -> None:
    """Fused and transposed (GPT-2), fused and interleaved (NeoX), shared keys and values (Llama), fused and shared."""
    hf = tiny_hf(family)
    anatomy = read_anatomy(hf)
    before = {n: p.detach().clone() for n, p in hf.named_parameters()}
    heads = [(0, 1), (1, 3)]
    matrices = {
        (layer, side): anatomy.head_in(anatomy.block(layer), side)[0].detach().clone()
        for layer in (0, 1)
        for side in "qkv"
    }
    outs = {layer: anatomy.head_out(anatomy.block(layer)).detach().clone() for layer in (0, 1)}
    only = [f"L{layer}.H{head}" for layer, head in heads]
    trained = choose(hf, only=only)
    parts = slices(hf, only)
    plug = Slices(parts)
    optimizer = make_optimizer("adamw", hf, lr=1e-2, weight_decay=0.5)
    ids = torch.randint(5, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    for step in range(50):
        plug.begin(step)
        hf(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plug.end(step)
    moved = {n for n, p in hf.named_parameters() if not torch.equal(p, before[n])}
    assert len(moved) == len(parts)
    group = anatomy.group
    for layer, head in heads:
        block = anatomy.block(layer)
        for side in "qkv":
            now, was = anatomy.head_in(block, side)[0], matrices[layer, side]  # type: ignore[arg-type]
            for h in range(anatomy.n_heads):
                mine = h == head if side == "q" else h // group == head // group
                assert torch.equal(now[h], was[h]) != mine, (side, h)
                assert not mine or (now[h] != was[h]).all()
        for h in range(anatomy.n_heads):
            assert torch.equal(anatomy.head_out(block)[h], outs[layer][h]) == (h != head)
    inside = sum(int(s.inside.sum()) for s in parts)
    changed = sum(int((p != before[n]).sum()) for n, p in hf.named_parameters())
    assert changed == inside == trained


def test_a_recipe_names_heads_and_goes_on_to_the_bit(text: Path, tmp_path: Path) -> None:
    import shutil

    parent = train(small(text), tmp_path / "parent")
    recipe = small(
        text, name="heads", steps=4, model={"source": f"{parent}@step12"}, checkpoints__every=2,
        parameters={"only": ["L0.H1", "L1.MLP"]},
    )  # fmt: skip
    whole, cut = train(recipe, tmp_path / "a"), train(recipe, tmp_path / "b")
    before, after = weights(parent, 12), weights(whole, 4)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n.split(".")[2] + "." + n.split(".")[3] for n in changed} == {"0.attention", "1.mlp"}
    dense = next(n for n in changed if n.endswith("attention.dense.weight"))
    columns = (before[dense] != after[dense]).any(0)
    width = before[dense].shape[1] // 2 if columns.shape[0] < 32 else None
    assert 0 < int(columns.sum()) < columns.shape[0] and (width is None or int(columns.sum()) <= width)
    held = Run.open(whole).json("summary")["trained"]
    assert held < sum(before[n].numel() for n in changed)
    for step in (2, 4):
        if step > 2:
            shutil.rmtree(cut / "steps" / f"step{step}")
    train(recipe, tmp_path / "b")
    again = weights(cut, 4)
    assert all(torch.equal(after[n], again[n]) for n in after)


def test_what_is_no_head_of_the_model_is_refused() -> None:
    hf = tiny_hf("llama")
    for only, said in ((["L9.H0"], "L9.H0 does not exist"), (["L0.H99"], "block 0 has H0 to")):
        with pytest.raises(PartError, match=said):
            choose(hf, only=only)
    with pytest.raises(VesaliusError, match="one side of a head; name the head, L0.H1"):
        choose(hf, only=["L0.H1.q"])
    with pytest.raises(VesaliusError, match="none frozen"):
        choose(hf, freeze=["L0.H1"])
    with pytest.raises(VesaliusError, match="none frozen"):
        choose(hf, only=["L0.N1"])
