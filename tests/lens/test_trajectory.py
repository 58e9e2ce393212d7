"""What a lens reads at every layer: transformers' own ending on transformers' own hidden states."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import ALL, some_ids, tiny
from lens_helpers import DECODER, ENDINGS, ending, numbered, small, streams
from scipy import stats
from transformers import BertConfig, BertModel

from vesalius.errors import ModelError, UnknownName, VesaliusError
from vesalius.lens import LENSES, LogitLens, open_lens, trajectory
from vesalius.lens.base import layer_name, layers, residuals
from vesalius.model import Model

IDS = some_ids(1, 9)


def decoder_of(model: Model) -> torch.Tensor | None:
    return DECODER if model.kind == "encoder-decoder" else None


@pytest.mark.parametrize("family", ALL)
def test_the_last_layer_is_the_model(family: str) -> None:
    model = tiny(family)
    decoder = decoder_of(model)
    with torch.no_grad():
        logits = model.hf(IDS, **({} if decoder is None else {"decoder_input_ids": decoder})).logits[0].float()
    found = residuals(model, IDS, decoder=decoder)
    assert torch.equal(found.logits[0], logits)
    assert torch.equal(LogitLens()(model, found.states[-1], model.n_layers - 1)[0], logits)
    shown = trajectory(model, IDS, top=3, tokens=[11, 12], decoder=None if decoder is None else decoder[0, 1:])
    p = logits.softmax(-1).double().numpy()
    assert shown.layers == list(layers(model)) == [-1, 0, 1, 2] and shown.positions == list(range(len(p)))
    assert np.allclose(shown.top_probs[-1], np.sort(p)[:, ::-1][:, :3], atol=1e-6)
    assert np.array_equal(shown.top_ids[-1, :, 0], p.argmax(-1))
    assert np.allclose(shown.chosen_probs[-1], p[:, [11, 12]], atol=1e-6)
    assert not shown.kl[-1].any() and (shown.kl[:-1] > 1e-3).all()
    assert np.allclose(shown.entropy[-1], stats.entropy(p, axis=-1), atol=1e-5)


@pytest.mark.parametrize("family", ENDINGS)
def test_each_layer_is_read_with_the_models_own_ending(family: str) -> None:
    model = tiny(family)
    decoder = decoder_of(model)
    stream = streams(model, IDS, decoder)
    shown = trajectory(model, IDS, tokens=[11], decoder=None if decoder is None else decoder[0, 1:])
    final = ending(model, stream[-1])[0].detach().double().softmax(-1).numpy()
    assert len(stream) == 4
    for row, hidden in enumerate(stream):
        with torch.no_grad():
            p = ending(model, hidden)[0].double().softmax(-1).numpy()
        assert np.allclose(shown.top_probs[row, :, 0], p.max(-1), atol=1e-5)
        assert np.allclose(shown.entropy[row], stats.entropy(p, axis=-1), atol=1e-4)
        assert np.allclose(shown.kl[row], stats.entropy(final, p, axis=-1), atol=1e-3, rtol=1e-4)
        ranks = (p > p[:, [11]]).sum(-1) + 1
        assert np.array_equal(shown.chosen_ranks[row, :, 0], ranks)


def test_the_next_tokens_surprisal_is_the_loss() -> None:
    model = tiny("llama")
    shown = trajectory(model, IDS)
    with torch.no_grad():
        loss = float(model.hf(IDS, labels=IDS).loss)
    assert np.isnan(shown.nll[:, -1]).all()
    assert shown.nll[-1, :-1].mean() == pytest.approx(loss, abs=1e-5)
    part = trajectory(model, IDS, positions=[-1, 2])
    assert part.positions == [8, 2] and np.isnan(part.nll[-1, 0])
    assert np.allclose(part.nll[:, 1], shown.nll[:, 2], atol=1e-5)
    assert np.allclose(part.kl[:, 0], shown.kl[:, 8], atol=1e-5)
    assert np.isnan(trajectory(tiny("bert"), IDS).nll).all()  # it reads both ways: nothing comes next


def test_depth_is_the_first_layer_from_which_the_answer_stays() -> None:
    shown = trajectory(tiny("llama"), IDS, top=1)
    top = shown.top_ids[:, :, 0]
    for place, depth in enumerate(shown.depth):
        stays = [bool((top[row:, place] == top[-1, place]).all()) for row in range(4)]
        assert depth == shown.layers[stays.index(True)]
    assert len(set(shown.depth)) > 1


def test_text_tokens_and_the_table() -> None:
    model = small()
    shown = trajectory(model, "w7 w8 w9", tokens=["w11"])
    assert shown.tokens == ["w7", "w8", "w9"] and shown.chosen == ["w11"]
    frame = shown.to_frame()
    assert len(frame) == 12 and list(frame["name"][:4:3]) == ["embed", "L0"]
    last = frame[(frame["layer"] == 2) & (frame["position"] == 2)].iloc[0]
    p = torch.softmax(model.logits(torch.tensor([[7, 8, 9]]))[0, -1], -1)
    assert last["p w11"] == pytest.approx(float(p[11]), abs=1e-6) and last["top"] == f"w{int(p.argmax())}"
    assert shown.top(2)[0] == (f"w{int(p.argmax())}", pytest.approx(float(p.max()), abs=1e-6))
    assert [layer_name(n) for n in (-1, 0)] == ["embed", "L0"]


def test_a_long_prompt_is_read_in_pieces_like_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    whole = trajectory(model, IDS, tokens=[11])
    monkeypatch.setattr("vesalius.lens.base.CHUNK", 4)
    pieces = trajectory(model, IDS, tokens=[11])
    assert np.allclose(whole.kl, pieces.kl, atol=1e-5) and np.array_equal(whole.top_ids, pieces.top_ids)


def test_a_lens_of_ones_own() -> None:
    class Halved:
        name = "halved"

        def __call__(self, model: Model, hidden: torch.Tensor, layer: int, tokens: object = None) -> torch.Tensor:
            return model.readout(hidden) / 2

        def translate(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
            return hidden

    model = tiny("llama")
    shown = trajectory(model, IDS, lens=Halved())
    p = (model.logits(IDS)[0] / 2).softmax(-1).double().numpy()
    assert shown.lens == "halved" and np.allclose(shown.entropy[-1], stats.entropy(p, axis=-1), atol=1e-5)
    assert set(LENSES.names()) >= {"logit", "tuned"}


def test_bad_input(tmp_path: Path) -> None:
    model = small()
    for prompt, says in (("  ", "empty"), (torch.zeros(2, 3).long(), "one row"), (torch.arange(70), "70 tokens.*64")):
        with pytest.raises(VesaliusError, match=says):
            trajectory(model, prompt)
    with pytest.raises(VesaliusError, match="no position 3.*3 tokens"):
        trajectory(model, "w7 w8 w9", positions=[3])
    for layer, position, says in ((3, -1, "no layer 3.*L0 to L2"), (-2, 0, "no layer -2"), (0, 3, "no position 3")):
        with pytest.raises(VesaliusError, match=says):
            trajectory(model, "w7 w8 w9").top(layer, position)
    with pytest.raises(VesaliusError, match="'w7 w8' is 2 tokens.*'w7', 'w8'"):
        trajectory(model, "w7", tokens=["w7 w8"])
    with pytest.raises(VesaliusError, match="no token 97"):
        trajectory(model, "w7", tokens=[97])
    with pytest.raises(VesaliusError, match="ask for 1 to 97"):
        trajectory(model, "w7", top=98)
    with pytest.raises(VesaliusError, match="no tokenizer"):
        trajectory(tiny("llama"), "words")
    with pytest.raises(VesaliusError, match="no decoder"):
        trajectory(model, "w7", decoder=[3])
    with pytest.raises(UnknownName, match="did you mean 'logit'"):
        open_lens("logits", model)
    with pytest.raises(VesaliusError, match="not trained"):
        open_lens("logit", model, tmp_path)
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    with pytest.raises(ModelError, match="without a head"):
        trajectory(Model.wrap(BertModel(config), numbered(), name="headless"), "w7")
    assert math.isfinite(trajectory(model, "w7").kl.sum())  # one token is enough
