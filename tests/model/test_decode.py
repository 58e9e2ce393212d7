"""The decoding floor against transformers' own `generate`, and against reading everything again."""

from __future__ import annotations

import pytest
import torch
from families import some_ids, tiny
from transformers import NoRepeatNGramLogitsProcessor

from vesalius.errors import VesaliusError
from vesalius.model.decode import Draw, Reader, decode, left_padded
from vesalius.model.stack import Rule, Stack

SEVERAL = ["llama", "gpt2", "gemma3", "mistral", "bloom", "opt"]


class Parity(Rule):
    """After an even token only odd ones, and the other way round; so the state is the last token's."""

    name = "parity"

    def start(self, prompt):
        return prompt[-1] % 2

    def advance(self, state, token):
        return token % 2

    def barred(self, state):
        return torch.arange(97) % 2 == state

    def reason(self, state, token):
        return f"{token} is {'odd' if state else 'even'} as the one before"


class Nothing(Rule):
    """A dead end after a token."""

    name = "nothing"

    def __init__(self, after):
        self.after = after

    def start(self, prompt):
        return prompt[-1]

    def advance(self, state, token):
        return token

    def barred(self, state):
        return torch.full((97,), state == self.after)


@pytest.mark.parametrize("family", SEVERAL)
def test_reading_on_going_back_and_choosing_rows_equal_a_whole_pass(family):
    model, ids = tiny(family), some_ids(3, 14)
    reader = Reader(model)
    reader.read(ids[:, :9])
    whole = model.logits(ids[:, :10])[:, -1]
    assert torch.allclose(reader.read(ids[:, 9:10]), whole, atol=1e-4)
    reader.crop(5)
    assert torch.allclose(reader.read(ids[:, 5:14]), model.logits(ids)[:, -1], atol=1e-4)
    reader.crop(9)
    reader.select([2, 0, 0])
    again = ids[[2, 0, 0], :10]
    assert torch.allclose(reader.read(again[:, 9:]), model.logits(again)[:, -1], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt"])
def test_after_going_back_only_what_is_new_is_read(family):
    model, ids, read = tiny(family), some_ids(3, 14), []
    handle = model.hf.get_input_embeddings().register_forward_pre_hook(lambda m, args: read.append(args[0].shape[1]))
    reader = Reader(model)
    reader.read(ids[:, :9])
    reader.crop(5)
    reader.read(ids[:, 5:14])
    reader.select([2, 0, 0])
    reader.read(ids[[2, 0, 0], :1])
    handle.remove()
    assert read == [9, 9, 1]


@pytest.mark.parametrize("family", SEVERAL)
def test_rows_padded_on_the_left_read_as_each_alone(family):
    model, rows = tiny(family), [some_ids(1, n, n)[0].tolist() for n in (4, 7, 6)]
    reader = Reader(model)
    ids, mask = left_padded(rows)
    first, new = reader.read(ids, mask), torch.tensor([[7], [8], [9]])
    then = reader.read(new)
    for i, row in enumerate(rows):
        assert torch.allclose(first[i], model.logits(torch.tensor([row]))[0, -1], atol=1e-4)
        grown = torch.tensor([[*row, int(new[i])]])
        assert torch.allclose(then[i], model.logits(grown)[0, -1], atol=1e-4)


def test_what_generate_hands_a_processor_is_followed_through_reordered_beams():
    model, ids = tiny("llama"), some_ids(4, 8)
    reader = Reader(model)
    reader.follow(ids[:, :6])
    moved = torch.cat([ids[[3, 1, 1, 0], :6], ids[:, 6:7]], 1)
    assert torch.allclose(reader.follow(moved), model.logits(moved)[:, -1], atol=1e-4)
    assert reader.passes == 2 and reader.ids.shape == (4, 7)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_stack_in_generate_says_what_the_loop_says(beams):
    model, prompt = tiny("gpt2"), some_ids(1, 6)
    stack = Stack([Parity(), NoRepeatNGramLogitsProcessor(2)])
    out = model.hf.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, num_beams=beams,
        logits_processor=[stack], eos_token_id=None, pad_token_id=0,
    )[0].tolist()  # fmt: skip
    written = out[5:]
    assert all((a + b) % 2 for a, b in zip(written, written[1:], strict=False))
    if beams == 1:
        line = decode(model, prompt.tolist(), 12, [Parity(), NoRepeatNGramLogitsProcessor(2)])[0]
        assert line.row == out


def test_every_banned_token_has_a_reason_and_the_mask_renormalises():
    model, prompt = tiny("llama"), some_ids(2, 6).tolist()
    stack, told = Stack([Parity(), NoRepeatNGramLogitsProcessor(1)]), []

    def seen(step):
        kept = torch.isfinite(step.scores)
        for row, mine in zip(step.rows, kept, strict=True):
            barred = set((~mine).nonzero()[:, 0].tolist())
            table = step.stack.explain(row)
            assert set(table["token"]) == barred and table["reason"].str.len().min() > 0
            told.append(len(barred))
        base = step.logits.softmax(-1) * kept
        assert torch.allclose(step.scores.softmax(-1), base / base.sum(-1, keepdim=True), atol=1e-6)

    decode(model, prompt, 8, stack, seen=seen)
    assert len(told) == 16 and min(told) > 40


def test_a_dead_end_is_left_by_going_back_and_otherwise_told():
    model, prompt = tiny("llama"), some_ids(1, 6).tolist()
    free = decode(model, prompt, 6)[0]
    after = free.tokens[2]
    stuck = decode(model, prompt, 6, [Nothing(after)])[0]
    assert stuck.stop == "dead end" and stuck.tokens == free.tokens[: free.tokens.index(after) + 1]
    out = decode(model, prompt, 6, [Nothing(after)], back=lambda tokens: 1)[0]
    assert out.stop == "count" and len(out.tokens) == 6 and after not in out.tokens[:-1] and out.went_back >= 1
    both = decode(model, prompt * 2, 6, [Nothing(after)], back=lambda tokens: 1)
    assert [line.tokens for line in both] == [out.tokens] * 2


def test_a_draw_has_the_shares_it_should():
    scores = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]]).repeat(20_000, 1)
    share = scores[0].softmax(-1)
    drawn = Draw(1.0, generator=torch.Generator().manual_seed(0))(scores)
    assert torch.allclose(drawn.bincount(minlength=4) / 20_000, share, atol=0.015)
    two = Draw(1.0, top_k=2, generator=torch.Generator().manual_seed(0))(scores).bincount(minlength=4)
    assert two[2] == two[3] == 0 and abs(two[0] / 20_000 - share[0] / share[:2].sum()) < 0.015
    first = Draw(1.0, top_p=0.6, generator=torch.Generator().manual_seed(0))(scores)
    assert set(first.tolist()) == {0}  # the likeliest has two thirds by itself


def test_what_cannot_be_is_refused():
    with pytest.raises(VesaliusError, match="is masked; only a causal"):
        Reader(tiny("bert"))
    with pytest.raises(VesaliusError, match="64 positions, too few for 60"):
        decode(tiny("gpt2"), some_ids(1, 60).tolist(), 9)
    with pytest.raises(VesaliusError, match="empty prompt"):
        decode(tiny("gpt2"), [[]], 9)
    with pytest.raises(VesaliusError, match="knows 97 tokens and the model scores 5"):
        Stack([Parity()])(torch.tensor([[1]]), torch.zeros(1, 5))
