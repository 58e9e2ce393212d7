from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from corpus.corpora import texts, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from vesalius.corpus import CorpusError, Document, TokenStore, sample, statistics, train_tokenizer
from vesalius.corpus.store import Encoder
from vesalius.corpus.viewer import token_bytes
from vesalius.errors import UnknownName

LOSSLESS = ["bpe", "unigram", "bytes", "bloom", "palm"]
TRICKY = ["", " ", "  a", "a  \n\n b\t", "<0x41>", "<|endoftext|> x <unk>", "▁▁", "e\u0301 क्षि", "\r\n\u00a0", "123456"]


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=80, deadline=None)
@given(text=st.one_of(st.text(), st.sampled_from(TRICKY)))
def test_any_text_comes_back(kind: str, text: str) -> None:
    made = tokenizer(kind)
    ids = made(text, add_special_tokens=False)["input_ids"]
    assert made.decode(ids, clean_up_tokenization_spaces=False) == text
    plain = list(Encoder(made)([text])[0])
    assert made.decode(plain, clean_up_tokenization_spaces=False) == text
    table = token_bytes(made)
    assert table is not None and b"".join(table[i] for i in plain) == text.encode()


def test_bytes_are_their_own_ids() -> None:
    made = tokenizer("bytes")
    assert made("é☕", add_special_tokens=False)["input_ids"] == list("é☕".encode())
    assert (len(made), made.eos_token_id) == (257, 256)


def test_digits_stand_alone_and_the_vocabulary_is_padded() -> None:
    many = [f"{n} {n * 7919}" for n in range(400)]
    apart = train_tokenizer(many, "unigram", 500, digits=True)
    assert all(sum(c.isdigit() for c in piece) <= 1 or piece.startswith("<0x") for piece in apart.get_vocab())
    assert any(sum(c.isdigit() for c in piece) > 1 for piece in train_tokenizer(many, "bpe", 300).get_vocab())
    padded = train_tokenizer(many, "bloom", 300)
    assert len(padded) == 384 and padded.pad_token == "<pad>"


def test_wordpiece_is_cased_marks_continuations_and_knows_every_sign() -> None:
    made = train_tokenizer([*(d.text for d in texts()), "α→β ∮"], "wordpiece", 400)
    assert made.tokenize("stone Ünï∮") == ["stone", *made.tokenize("Ünï∮")]
    assert made.unk_token not in made.tokenize("α→β∮ Ünï")
    ids = made("stone")["input_ids"]
    assert ids[0] == made.cls_token_id and ids[-1] == made.sep_token_id
    assert any(p.startswith("##") for p in made.get_vocab()) and "[UNK]" in made.tokenize("ж")
    assert not any(t.startswith("##") for t in made.all_special_tokens)


def test_the_same_corpus_gives_the_same_tokenizer_in_another_process() -> None:
    code = (
        "import hashlib; from corpus.corpora import tokenizer\n"
        "for k in ('bpe', 'unigram', 'wordpiece'):\n"
        "    print(hashlib.sha256(tokenizer(k).backend_tokenizer.to_str().encode()).hexdigest())"
    )
    here = str(Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": here, "PYTHONHASHSEED": "7"}
    runs = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()) == 3, runs[0].stderr


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes", "wordpiece"])
def test_statistics_equal_a_count_by_hand(kind: str) -> None:
    made = tokenizer(kind)
    sentences = [d.text for d in texts()[:8]] + ["e\u0301e\u0301 क्षि 👩\u200d👧 ok", "ok then"]
    got = statistics(made, sentences)
    tokens = split = graphemes = exact = 0
    for text in sentences:
        encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
        tokens += len(encoding.ids)
        exact += made.decode(encoding.ids) == text
        for match in regex.finditer(r"\X", text):
            touching = [t for t, (a, b) in enumerate(encoding.offsets) if a < match.end() and b > match.start()]
            graphemes += 1
            split += len(touching) > 1
    assert (got.tokens, got.graphemes, got.graphemes_split, got.exact) == (tokens, graphemes, split, exact)
    assert got.fertility == tokens / sum(len(t.split()) for t in sentences)
    assert got.bytes_per_token == sum(len(t.encode()) for t in sentences) / tokens
    if kind == "bytes":
        assert got.bytes_per_token == 1 and got.round_trip == 1 and split > 0


def test_a_sample_has_the_shares_asked_for() -> None:
    big = [Document(f"a{i}", "x" * 90, "a") for i in range(1000)]
    small = [Document(f"b{i}", "y" * 90, "b") for i in range(10)]
    drawn = sample({"a": big, "b": small}, alpha=0.3, seed=1)
    wanted = 1000**0.3 / (1000**0.3 + 10**0.3)
    mix = drawn.mix.set_index("language")
    assert mix.loc["a", "share"] == pytest.approx(wanted, abs=2e-3)
    assert sum(len(d.text) for d in drawn.documents) == mix["bytes_drawn"].sum()
    assert mix.loc["b", "repeats"] > 15 and [d.id for d in drawn.documents] == [
        d.id for d in sample({"b": small, "a": big}, alpha=0.3, seed=1).documents
    ]
    assert sample({"a": big, "b": small}, alpha=1.0).mix["share"].tolist() == pytest.approx([1000 / 1010, 10 / 1010])


def test_refusals() -> None:
    with pytest.raises(CorpusError, match="no text"):
        train_tokenizer([], "bpe", 300)
    with pytest.raises(CorpusError, match="too small for bpe: at least 257"):
        train_tokenizer(["x"], "bpe", 200)
    with pytest.raises(UnknownName, match="did you mean 'unigram'"):
        train_tokenizer(["x"], "unigrams")
    with pytest.raises(UnknownName, match="digits"):
        train_tokenizer(["x"], "bpe", digit=True)
    with pytest.raises(CorpusError, match="no text for b"):
        sample({"a": texts(), "b": []})


def test_text_that_looks_special_does_not_end_a_document(tmp_path: Path) -> None:
    made = tokenizer("bpe")
    store = TokenStore.build([Document("x", "a <|endoftext|> b")], made, tmp_path / "s")
    assert (store.at(range(store.n_tokens)) == made.eos_token_id).sum() == 1
    assert store.text(0) == "a <|endoftext|> b"
