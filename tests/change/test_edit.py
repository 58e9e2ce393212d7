"""A recorded change is undone and made again to the last bit, and only on the weights it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import some_ids, tiny
from torch import Tensor

from vesalius.change import Edit, recording
from vesalius.errors import ModelError, RunError, UnknownName, VesaliusError
from vesalius.model import Model

DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def weights(model: Model) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.hf.named_parameters(remove_duplicate=False)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit: 0 and -0 differ."""
    return all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)


def changed(model: Model) -> Edit:
    """Ten numbers of one tensor, all of another, and a third that is put back."""
    with recording(model, "test") as recorder:
        few = model.hf.get_parameter(DOWN).clone()
        few.view(-1)[::150] += 1.0
        few.view(-1)[1] = -0.0
        recorder.set(DOWN, few, "L1.MLP: some")
        recorder.set(UP, model.hf.get_parameter(UP) * 2, "L0.MLP: all")
        recorder.touch("model.norm.weight", "nothing in the end")
    return recorder.edit


def test_undo_and_apply_give_the_same_bits(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.hf.get_parameter(DOWN).view(-1)[1] = 0.0
    before = weights(model)
    edit = changed(model)
    after, said = weights(model), model.logits(some_ids())
    assert not same(before, after)
    table = edit.to_frame().set_index("tensor")
    assert table.loc[DOWN, "changed"] == 12 and table.loc[UP, "share"] == 1 and len(table) == 2  # 0 to -0 counts
    edit = Edit.load(edit.save(tmp_path / "edit"))
    edit.undo(model)
    assert same(before, weights(model))
    edit.apply(model)
    assert same(after, weights(model)) and torch.equal(model.logits(some_ids()), said)


def test_an_error_puts_everything_back() -> None:
    model = tiny("gpt2")
    before = weights(model)
    with pytest.raises(ZeroDivisionError), recording(model, "test") as recorder:
        recorder.set("transformer.wte.weight", torch.zeros_like(model.hf.transformer.wte.weight), "all")
        _ = 1 / 0
    assert same(before, weights(model))


def test_a_tied_tensor_is_changed_once() -> None:
    model = tiny("gpt2")
    assert model.hf.lm_head.weight is model.hf.transformer.wte.weight
    before = weights(model)
    with recording(model, "test") as recorder:
        recorder.set("lm_head.weight", model.hf.lm_head.weight + 1, "once")
        recorder.set("lm_head.weight", model.hf.lm_head.weight + 1, "the same name again")
        with pytest.raises(VesaliusError, match=r"transformer.wte.weight and lm_head.weight are one tied tensor"):
            recorder.set("transformer.wte.weight", model.hf.lm_head.weight + 1, "twice")
    assert len(recorder.edit) == 1
    recorder.edit.undo(model)
    assert same(before, weights(model))


def test_other_weights_are_refused() -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    edit = changed(model)
    with pytest.raises(ModelError, match="fingerprints differ"):
        edit.apply(other)
    with pytest.raises(ModelError, match="led to"):
        edit.undo(other)
    with pytest.raises(ModelError, match="was recorded on"):
        edit.apply(model)  # it is changed already


def test_wrong_values_change_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    before = weights(model)
    with recording(model, "test") as recorder:
        with pytest.raises(UnknownName, match="did you mean"):
            recorder.set("model.layers.1.mlp.down.weight", torch.zeros(1), "no such name")
        with pytest.raises(VesaliusError, match=r"is \(32, 48\), the new value \(3,\)"):
            recorder.set(DOWN, torch.zeros(3), "wrong shape")
        with pytest.raises(VesaliusError, match="not finite"):
            recorder.set(DOWN, torch.full((32, 48), torch.inf), "overflow")
    assert same(before, weights(model)) and not len(recorder.edit)
    folder = changed(model).save(tmp_path / "edit")
    data = bytearray((folder / "edit.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "edit.safetensors").write_bytes(data)
    with pytest.raises(RunError, match="its sha256 differs"):
        Edit.load(folder)
