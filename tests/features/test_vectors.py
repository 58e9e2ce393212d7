"""Vectors read through hooks equal those taken by hand from transformers' own outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_hf
from features_helpers import spoken, words

from vesalius.errors import VesaliusError
from vesalius.features.vectors import Reading, default_reading, states, vectors
from vesalius.model import Model

TEXTS = [words(1, 2, 3), words(4), words(5, 6, 7, 8, 9, 10, 11), words(2, 4)]


def by_hand(model: Model, text: str, layer: int) -> torch.Tensor:
    """Hidden states of one text alone after a block, (pos, d), its start token included."""
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    if model.anatomy.main.causal and model.kind == "causal":
        ids = torch.cat([torch.tensor([[1]]), ids], dim=1)
    out = model.copied().hf(input_ids=ids, output_hidden_states=True)  # transformers leaves hooks of its own
    return out.hidden_states[layer + 1][0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma3", "bert"])
def test_pooled_states_are_those_of_transformers(family: str) -> None:
    model = spoken(family)
    first = 0 if family == "bert" else 1  # the start token put in front of causal models' texts
    for i, text in enumerate(TEXTS):
        x = by_hand(model, text, 1)
        n = len(text.split())
        own = x[1 : 1 + n] if family == "bert" else x[first:]
        for pool, expected in (("mean", own.mean(0)), ("last", own[-1])):
            found = vectors(model, TEXTS, f"{pool}@1")[i]  # type: ignore[arg-type]
            np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5, err_msg=f"{pool} {text}")


def test_a_word_is_read_where_it_last_stands() -> None:
    model = spoken("llama")
    text = words(3, 5, 7, 5, 9)
    x = by_hand(model, text, 1)
    found = vectors(model, [text], "word@1", words=["w5"])[0]
    np.testing.assert_allclose(found, x[4].detach().numpy(), atol=2e-5)


def test_sentence_vectors_have_length_one_and_count_special_tokens() -> None:
    model = spoken("bert")
    x = by_hand(model, TEXTS[2], 2).mean(0)
    found = vectors(model, TEXTS, "sentence")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found[2], (x / x.norm()).detach().numpy(), atol=1e-5)


def test_the_table_is_the_mean_of_a_words_rows() -> None:
    model = spoken("llama")
    weight = model.hf.get_input_embeddings().weight.detach()
    ids = model.tokenizer(words(3, 5), add_special_tokens=False)["input_ids"]
    np.testing.assert_allclose(vectors(model, [words(3, 5)], "table")[0], weight[ids].mean(0).numpy(), atol=1e-6)


def test_one_pass_gives_every_layer_and_heads_apart() -> None:
    model = spoken("llama")
    every = states(model, TEXTS, [0, 2, -1], pool="mean", site="z")
    assert every.shape == (3, len(TEXTS), model.n_heads, model.d_head)
    np.testing.assert_array_equal(every[1], every[2])
    again = states(model, TEXTS[::-1] + TEXTS, [2], pool="mean", site="z")[0]
    np.testing.assert_allclose(again[: len(TEXTS)][::-1], every[1], atol=1e-5)


def test_an_encoder_decoder_is_read_in_its_encoder() -> None:
    model = spoken("t5")
    ids = model.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    expected = model.copied().hf.get_encoder()(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
    own = expected[: len(TEXTS[0].split())].mean(0)
    np.testing.assert_allclose(vectors(model, TEXTS, "mean@1")[0], own.detach().numpy(), atol=2e-5)


@pytest.mark.parametrize("text", ["sentence", "table", "mean@12", "last@-1", "word@6:mlp_out"])
def test_readings_read_back(text: str) -> None:
    assert str(Reading.parse(text)) == text


@pytest.mark.parametrize(
    ("reading", "words_"),
    [
        ("meen@1", ["meen", "mean"]),
        ("mean", ["mean@12"]),
        ("sentence@3", ["has no block"]),
        ("mean@1:pattern", ["site 'pattern'"]),
        ("mean at 3", ["is not a reading"]),
        ("mean@9", ["no block 9", "0 to 2"]),
    ],
)
def test_unknown_readings_are_refused(reading: str, words_: list[str]) -> None:
    with pytest.raises(VesaliusError) as refused:
        vectors(spoken("llama"), TEXTS, reading)
    assert all(w in str(refused.value) for w in words_), refused.value


def test_texts_that_cannot_be_read_are_refused() -> None:
    model = spoken("llama")
    with pytest.raises(VesaliusError, match="empty text"):
        vectors(model, ["w1", "  "], "mean@1")
    with pytest.raises(VesaliusError, match="70 tokens.*takes \\(64\\)"):
        vectors(model, [words(*range(1, 70))], "mean@1")
    for reading in ("mean@1", "table", "sentence"):
        with pytest.raises(VesaliusError, match="'zebra' is unknown to the tokenizer"):
            vectors(model, ["w1", "zebra"], reading)
    assert np.isfinite(vectors(model, ["w1 zebra"], "mean@1")).all()  # something of it is known
    with pytest.raises(VesaliusError, match="'w9' does not occur"):
        vectors(model, ["w1 w2"], "word@1", words=["w9"])
    with pytest.raises(VesaliusError, match="needs the word"):
        vectors(model, ["w1 w2"], "word@1")
    with pytest.raises(VesaliusError, match="no tokenizer"):
        vectors(Model.wrap(tiny_hf("llama"), name="llama"), ["w1"], "mean@1")


def test_the_default_reading_follows_the_kind_of_model() -> None:
    assert str(default_reading(spoken("llama"))) == "mean@1"
