"""The direct lens: terms that add up to what the model says, on every family and by an independent method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import ALL, some_ids, tiny
from lens_helpers import small
from pairs import PlainLogitDiff

from vesalius.build.planted import planted
from vesalius.errors import PartError, VesaliusError
from vesalius.find.base import find
from vesalius.lens import attribute
from vesalius.model import Model, Pairs

IDS = some_ids(1, 9)[0]
NONLINEAR = ("gemma2", "bert", "roberta", "distilbert")  # a soft-cap, or a layer after the final norm


def decoder_of(model: Model) -> torch.Tensor | None:
    return torch.tensor([7, 8]) if model.kind == "encoder-decoder" else None


def said(model: Model) -> torch.Tensor:
    decoder = decoder_of(model)
    more = {} if decoder is None else {"decoder_input_ids": torch.tensor([[0, 7, 8]])}
    with torch.no_grad():
        return model.hf(IDS[None], **more).logits[0, -1].double()


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("against", [None, 12])
def test_terms_sum_to_what_the_model_says(family: str, against: int | None) -> None:
    model = tiny(family)
    logits = said(model)
    want = float(logits[11] - (0 if against is None else logits[against]))
    found = attribute(model, IDS, 11, against, decoder=decoder_of(model))
    assert found.logit == pytest.approx(want, abs=1e-5)
    assert found.total == pytest.approx(want, abs=1e-4)
    frame = found.to_frame()
    assert frame["value"].sum() == pytest.approx(want, abs=1e-4)
    assert frame["running"].iloc[-1] == pytest.approx(want, abs=1e-4)
    assert found.by_layer()["value"].sum() == pytest.approx(want, abs=1e-4)
    assert (found.head != 0) == (family in NONLINEAR) == ("head" in set(frame["part"]))
    mine = {p for p in model.parts(("head", "xhead", "mlp", "embed")) if p.stack == model.anatomy.main.prefix}
    assert set(found.parts) == mine and len(found.parts) == len(mine)


@pytest.mark.parametrize("family", ALL)
def test_neurons_and_their_bias_are_their_mlp(family: str) -> None:
    model = tiny(family)
    whole = attribute(model, IDS, 11, 12, decoder=decoder_of(model))
    split = attribute(model, IDS, 11, 12, neurons=["L1.MLP"], decoder=decoder_of(model))
    assert split.total == pytest.approx(whole.logit, abs=1e-4)
    neurons = [v for p, v in zip(split.parts, split.values, strict=True) if p.kind == "neuron"]
    assert len(neurons) == model.d_mlp and np.abs(neurons).min() >= 0 < np.abs(neurons).max()
    by_part = dict(zip(whole.parts, whole.values, strict=True))
    mlp = next(v for p, v in by_part.items() if p.kind == "mlp" and p.layer == 1)
    assert sum(neurons) + split.biases - whole.biases == pytest.approx(mlp, abs=1e-4)
    for part, value in zip(split.parts, split.values, strict=True):
        if part.kind != "neuron":
            assert value == pytest.approx(by_part[part], abs=1e-5)


def test_a_neurons_term_is_its_activation_times_what_it_writes() -> None:
    model = tiny("llama")
    seen: list[torch.Tensor] = []
    layer = model.hf.model.layers[1]
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0])),
        model.hf.model.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0])),
    ]
    with torch.no_grad():
        model.hf(IDS[None])
    for handle in handles:
        handle.remove()
    act, final = (x[0, -1] for x in seen)
    scale = (final.square().mean() + model.hf.model.norm.variance_epsilon).rsqrt()
    direction = model.hf.lm_head.weight[11] * model.hf.model.norm.weight * scale
    want = act * (layer.mlp.down_proj.weight.T @ direction)
    split = attribute(model, IDS, 11, neurons=[1])
    neurons = [v for p, v in zip(split.parts, split.values, strict=True) if p.kind == "neuron"]
    assert np.allclose(neurons, want.numpy(), atol=1e-5)


def test_in_a_planted_model_the_mover_writes_the_answer_as_find_says() -> None:
    truth = planted("name-mover").for_task("ioi")
    model = Model.wrap(truth.hf, truth.tokenizer, name="mover")
    (example,) = truth.examples(1)
    answer, wrong = (model.tokenizer(t)["input_ids"][0] for t in (example.answer, example.wrong))
    found = attribute(model, example.clean, answer, wrong)
    scores = found.scores()
    mover = next(p for p, role in truth.roles.items() if role == "mover")
    assert scores.top(1).parts == [mover]
    assert scores[mover] == pytest.approx(found.logit, rel=0.1)  # the rest: the repeated name has 6 % directly
    clean, corrupted = model.tokenizer([example.clean, example.corrupted], return_tensors="pt")["input_ids"].split(1)
    pairs = Pairs(
        clean=clean,
        corrupted=corrupted,
        mask=torch.ones_like(clean),
        reads=torch.tensor([[clean.shape[1] - 1]]),
        read_mask=torch.ones(1, 1, dtype=torch.bool),
        row_example=torch.zeros(1, dtype=torch.long),
        row_right=torch.ones(1, dtype=torch.bool),
        answers=[[answer]],
        wrong=[[wrong]],
        metric=PlainLogitDiff(),
    )
    same = find("direct", model, pairs, parts="head,mlp,embed")
    assert same.per_example is not None
    assert np.allclose(same.per_example[:, 0], [scores[p] for p in same.parts], atol=1e-4)


def test_the_likeliest_token_is_asked_about_by_default() -> None:
    model = small()
    found = attribute(model, "w7 w8 w9", position=1)
    logits = model.logits(torch.tensor([[7, 8, 9]]))[0, 1]
    assert found.answer == f"w{int(logits.argmax())}" and found.logit == pytest.approx(float(logits.max()), abs=1e-5)
    assert found.tokens == ["w7", "w8", "w9"] and found.position == 1 and found.against is None


def test_bad_input() -> None:
    model = small()
    with pytest.raises(VesaliusError, match="'w7' against itself"):
        attribute(model, "w8", "w7", "w7")
    with pytest.raises(PartError, match="L9.MLP does not exist"):
        attribute(model, "w8", "w7", neurons=[9])
    with pytest.raises(PartError, match="'L1.H2' names no layer"):
        attribute(model, "w8", "w7", neurons=["L1.H2"])
    with pytest.raises(VesaliusError, match="no position -4"):
        attribute(model, "w7 w8 w9", position=-4)
