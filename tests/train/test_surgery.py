"""New tokens: old logits stay, every new row has the origin it is said to have."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, some_ids, tiny_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vesalius.errors import VesaliusError
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.special import MODES, needs_for, sentinels
from vesalius.train.surgery import add_tokens


def a_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "extra": 2, "id": 3} | {f"w{i}": i for i in range(4, size)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize("how", ["mean", "random", "subword", "zero"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "bert", "t5", "t5-gated", "bloom"])
def test_old_logits_are_unchanged(family, how):
    model, tokenizer = tiny_hf(family), a_tokenizer()
    inputs = {"input_ids": some_ids()}
    if family.startswith("t5"):
        inputs["decoder_input_ids"] = some_ids(seed=1)
    before = model(**inputs).logits
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokens = [*sentinels(5), *MODES.values()] if how != "subword" else sentinels(5)
    done = add_tokens(model, tokenizer, tokens, how)
    after = model(**inputs).logits
    assert after.shape[-1] == VOCAB + len(tokens) == done.vocab_after == model.config.vocab_size
    assert torch.allclose(after[..., :VOCAB], before, atol=1e-6)
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == tied
    assert list(done.ids.values()) == list(range(VOCAB, VOCAB + len(tokens)))
    for table in (model.get_input_embeddings().weight.data, head.data):
        old, new = table[:VOCAB], table[VOCAB:]
        if how == "mean":
            assert torch.allclose(new, old.mean(0).expand_as(new), atol=1e-6)
        if how == "subword":
            pieces = [t for t in tokenizer("extra id 0", add_special_tokens=False)["input_ids"] if t]
            assert done.rows["pieces"][0] == pieces == [2, 3]
            assert torch.allclose(new[0], old[pieces].mean(0), atol=1e-6)
        if how == "random":
            assert ((new - old.mean(0)).abs() < 5 * old.std(0)).all() and new.std(0).min() > 0
        if how == "zero":
            assert (new == 0).all()
    assert set(done.rows["status"]) == {"added"} and set(done.rows["origin"]) == {how}


def test_known_tokens_and_spare_rows():
    model, tokenizer = tiny_hf("llama"), a_tokenizer(VOCAB - 3)  # a vocabulary padded to 97 rows
    before = model.get_input_embeddings().weight.data.clone()
    done = add_tokens(model, tokenizer, ["w9", "[A]", "[B]", "[C]", "[D]"])
    assert done.rows["status"].tolist() == ["known", "spare", "spare", "spare", "added"]
    assert done.rows["id"].tolist() == [9, VOCAB - 3, VOCAB - 2, VOCAB - 1, VOCAB]
    after = model.get_input_embeddings().weight.data
    assert torch.equal(after[: VOCAB - 3], before[: VOCAB - 3]) and len(after) == VOCAB + 1
    assert torch.allclose(after[VOCAB - 3 :], before[: VOCAB - 3].mean(0).expand(4, -1), atol=1e-6)
    again = add_tokens(model, tokenizer, ["[A]", "[D]"])
    assert set(again.rows["status"]) == {"known"} and again.vocab_after == again.vocab_before
    assert torch.equal(model.get_input_embeddings().weight.data, after)


def test_seed_and_refusals():
    rows = []
    for seed in (0, 0, 1):
        model, tokenizer = tiny_hf("gpt-neox"), a_tokenizer()
        add_tokens(model, tokenizer, ["[A]"], "random", seed=seed)
        rows.append(model.get_output_embeddings().weight.data[-1].clone())
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    model, tokenizer = tiny_hf("llama"), a_tokenizer()
    for tokens, how, words in [
        (["[A]", "[A]"], "mean", "twice"),
        (["[A]"], "means", "did you mean 'mean'"),
        (["<qqq>"], "subword", "no piece"),
    ]:
        with pytest.raises(VesaliusError, match=words):
            add_tokens(model, tokenizer, tokens, how)
    assert len(tokenizer) == VOCAB and len(model.get_input_embeddings().weight) == VOCAB


def test_added_tokens_make_an_objective_possible():
    model, tokenizer = tiny_hf("llama"), a_tokenizer()
    with pytest.raises(VesaliusError, match="add_tokens"):
        make_objective("ul2", needs_for(model, tokenizer))
    add_tokens(model, tokenizer, [*sentinels(20), *MODES.values()])
    needs = needs_for(model, tokenizer)
    assert needs.vocab_size == VOCAB + 23 and needs.kind == "causal"
    assert [needs.special[f"sentinel_{i}"] for i in range(20)] == list(range(VOCAB, VOCAB + 20))
    assert needs.special["mode_s"] == tokenizer.convert_tokens_to_ids("[S2S]")
    make_objective("ul2", needs)
