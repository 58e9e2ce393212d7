"""The tuned lens as an object: zero is the logit lens, what is saved is what is read, another model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import ALL, some_ids, tiny
from lens_helpers import small

from vesalius.errors import RunError, VesaliusError
from vesalius.lens import LogitLens, TunedLens, open_lens, trajectory
from vesalius.lens.base import layers, residuals
from vesalius.lens.tuned import NOTE, TENSORS, ending_hash
from vesalius.model import Model

DECODER = torch.tensor([[0, 7, 8], [0, 9, 3], [0, 5, 6]])
FORMS = [{}, {"rank": 5}, {"bias_only": True}]


def scrambled(lens: TunedLens, seed: int = 0) -> TunedLens:
    """The same with translators that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lens.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        lens.scale.mul_(3.0)
    return lens


@pytest.mark.parametrize("family", ALL)
def test_at_zero_it_is_the_logit_lens_bit_for_bit(family: str) -> None:
    model = tiny(family)
    found = residuals(model, some_ids(), decoder=DECODER if model.kind == "encoder-decoder" else None)
    for form in FORMS:
        lens = TunedLens.for_model(model, **form)
        for layer, hidden in zip(layers(model), found.states, strict=True):
            assert torch.equal(lens(model, hidden, layer), LogitLens()(model, hidden, layer))
    moved = scrambled(TunedLens.for_model(model))
    last = model.n_layers - 1
    assert torch.equal(moved(model, found.states[-1], last), found.logits)  # the last layer is the model, always
    assert not torch.allclose(moved(model, found.states[1], 0), LogitLens()(model, found.states[1], 0), atol=1e-2)


def test_half_precision_keeps_the_identity() -> None:
    model = tiny("llama")
    model = Model.wrap(model.hf.to(torch.bfloat16), name="llama")
    hidden = residuals(model, some_ids()).states[1]
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(TunedLens.for_model(model)(model, hidden, 0), LogitLens()(model, hidden, 0))


@pytest.mark.parametrize("form", FORMS)
def test_the_formula(form: dict[str, int | bool]) -> None:
    model = tiny("gpt2")
    lens = scrambled(TunedLens.for_model(model, **form))
    hidden = residuals(model, some_ids()).states[2]
    want = hidden + hidden @ lens.matrix(1).T + lens.shift(1)
    assert torch.allclose(lens.translate(hidden, 1), want, atol=1e-5)
    with torch.no_grad():
        logits = model.hf.lm_head(model.hf.transformer.ln_f(want))
    assert torch.allclose(lens(model, hidden, 1), logits, atol=1e-4)
    some = lens(model, hidden, 1, torch.tensor([5, 6]))
    assert torch.allclose(some, logits[..., 5:7], atol=1e-4)
    for layer in (-2, 3):
        with pytest.raises(VesaliusError, match="no layer"):
            lens.translate(hidden, layer)
    with pytest.raises(VesaliusError, match="rank 33"):
        TunedLens.for_model(model, rank=33)


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_read_it_is_the_same(form: dict[str, int | bool], tmp_path: Path) -> None:
    model = small()
    lens = scrambled(TunedLens.for_model(model, **form))
    lens.save(tmp_path / "a", model)
    lens.save(tmp_path / "b", model)
    again = TunedLens.load(tmp_path / "a", model)
    for name in (TENSORS, NOTE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in lens.state_dict().items())
    ids = some_ids(1)
    a, b = trajectory(model, ids, lens=lens), trajectory(model, ids, lens=tmp_path / "a")
    assert b.lens == "tuned" and (a.kl == b.kl).all()
    note = json.loads((tmp_path / "a" / NOTE).read_text())
    assert note["fingerprint"] == model.fingerprint and note["ending"] == ending_hash(model)


def test_another_model_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    model, tuned, wide = small(), small(seed=1), small("gpt2")
    lens = scrambled(TunedLens.for_model(model))
    lens.save(tmp_path, model)
    with pytest.raises(VesaliusError) as refusal:
        open_lens("tuned", tuned, tmp_path)
    told = str(refusal.value)
    assert model.fingerprint in told and tuned.fingerprint in told and "--transfer" in told and "another norm" in told
    moved = open_lens("tuned", tuned, tmp_path, transfer=True)
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(moved.translate(hidden, 0), lens.translate(hidden, 0))
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight.add_(0.1)  # a fine-tuned copy keeps its ending
    with pytest.raises(VesaliusError, match="has the same norm and unembedding"):
        TunedLens.load(tmp_path, Model.wrap(model.hf, name="tuned"))
    narrow = TunedLens(2, 32)
    narrow.save(tmp_path / "narrow", wide)
    for transfer in (False, True):
        with pytest.raises(VesaliusError, match="2 blocks of width 32.*3 of 32"):
            TunedLens.load(tmp_path / "narrow", wide, transfer=transfer)


def test_damaged_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    TunedLens.for_model(model).save(tmp_path / "lens", model)
    with pytest.raises(RunError, match="no trained lens.*lens train"):
        TunedLens.load(tmp_path, model)
    path = tmp_path / "lens" / TENSORS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="lens.safetensors is missing or was changed"):
        TunedLens.load(tmp_path / "lens", model)
    (tmp_path / "lens" / NOTE).write_text("{}")
    with pytest.raises(RunError, match="not of a tuned lens"):
        TunedLens.load(tmp_path / "lens", model)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no tuned lens of llama-0.*vesalius lens train"):
        open_lens("tuned", model)
