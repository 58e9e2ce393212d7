"""Scores of text that do not depend on the tokenizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vesalius.build import build, preset
from vesalius.corpus import train_tokenizer
from vesalius.corpus.store import Encoder
from vesalius.errors import VesaliusError
from vesalius.evaluate.normalised import text_score

TEXT = "In the beginning was the word; na\u00efve caf\u00e9s \u2615 and the word was long. " * 6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([TEXT], "bpe", 280)


def model_of(name: str, vocab: int, length: int = 512) -> Any:
    changes = {"layers": 1, "d_model": 16, "heads": 2, "vocab_size": vocab, "max_length": length}
    model = build(preset(name, **changes), 0)
    with torch.no_grad():  # so that what stands before matters
        for p in model.parameters():
            p.mul_(3)
    return model


def test_a_uniform_model_of_bytes_scores_256() -> None:
    model = model_of("tiny-gpt2", 256)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    tokenizer = train_tokenizer([TEXT], "bytes", special=())
    found = text_score(model, tokenizer, TEXT, window=32, last=8)
    assert found.per_byte == pytest.approx(256, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(8)
    assert (found.tokens, found.bytes, found.characters) == (len(TEXT.encode()),) * 2 + (len(TEXT),)
    assert found.per_character > 256  # some characters are more than one byte


@pytest.mark.parametrize(("window", "last"), [(16, None), (16, 4), (16, 5), (17, 1), (1000, 7)])
def test_every_token_is_scored_once_with_what_stands_before_it(tokenizer: Any, window: int, last: int | None) -> None:
    model = model_of("tiny-gpt2", len(tokenizer))
    ids = [tokenizer.eos_token_id, *Encoder(tokenizer)([TEXT])[0]]
    expected, done = 0.0, 0
    with torch.no_grad():
        while done < len(ids) - 1:
            step = window if not done else (last or window)
            end = min(done + step, len(ids) - 1)
            piece = torch.tensor([ids[max(0, end - window) : end + 1]])
            nll = -model(piece[:, :-1]).logits.log_softmax(-1).gather(-1, piece[:, 1:, None])[0, :, 0]
            expected += float(nll[len(nll) - (end - done) :].sum())
            done = end
    found = text_score(model, tokenizer, TEXT, window=window, last=last, rows=3)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.token_perplexity == pytest.approx(math.exp(expected / (len(ids) - 1)), rel=1e-5)


def test_a_recurrent_model_reads_on_as_in_one_pass(tokenizer: Any) -> None:
    model = model_of("tiny-qlstm", len(tokenizer))
    whole = text_score(model, tokenizer, TEXT, window=10_000)
    carried = text_score(model, tokenizer, TEXT, window=16, carry=True)
    assert carried.nats == pytest.approx(whole.nats, rel=1e-5)
    assert abs(text_score(model, tokenizer, TEXT, window=16).nats - whole.nats) > 1e-3


def test_refusals(tokenizer: Any) -> None:
    model = model_of("tiny-gpt2", len(tokenizer))
    with pytest.raises(VesaliusError, match="last=0 of a window of 8"):
        text_score(model, tokenizer, TEXT, window=8, last=0)
    with pytest.raises(VesaliusError, match="recurrent layers alone"):
        text_score(model, tokenizer, TEXT, window=8, carry=True)
    with pytest.raises(VesaliusError, match="no tokens"):
        text_score(model, tokenizer, "", window=8)
