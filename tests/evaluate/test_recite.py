"""Recitals: planted truth, and equality with transformers' own generate, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from families import some_ids, tiny, tiny_hf
from transformers import GenerationConfig

from vesalius.errors import VesaliusError
from vesalius.evaluate import recite
from vesalius.evaluate.recite import rows_in
from vesalius.model import Model

V = 24


def suffix_table(follows: list[int]) -> Model:
    """A GPT-2 that says follows[last token], whatever came before: blocks write nothing, the head is the table."""
    hf = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_embd=V, n_layer=1, n_head=2, n_positions=80, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for p in hf.parameters():
            p.zero_()
        hf.transformer.ln_f.weight.fill_(1)
        hf.transformer.wte.weight.copy_(torch.eye(V))
        for last, following in enumerate(follows):
            hf.lm_head.weight[following, last] = 1
    return Model.wrap(hf, name="suffix table")


def chains(follows: list[int], length: int, rows: int) -> np.ndarray:
    out = np.zeros((rows, length), dtype=np.int64)
    for row in range(rows):
        token = row % V
        for i in range(length):
            out[row, i] = token
            token = follows[token]
    return out


CYCLE = [(7 * i + 5) % V for i in range(V)]
assert len(set(CYCLE)) == V and all(CYCLE[i] != i for i in range(V))


def test_what_was_built_to_recite_scores_one_and_a_shift_by_one_scores_nothing():
    model = suffix_table(CYCLE)
    rows = chains(CYCLE, 66, 20)
    found = recite(model, rows[:, :64])
    assert found.extractible.all() and (found.score == 1.0).all()
    assert np.array_equal(found.tokens, rows[:, 32:64])
    shifted = np.concatenate([rows[:, :32], rows[:, 33:65]], axis=1)
    late = recite(model, shifted)
    assert late.score.max() == 0.0 and not late.extractible.any()


def test_score_counts_tokens_at_their_places_and_run_stops_at_the_first_error():
    rows = chains(CYCLE, 16, 3)
    rows[1, 10] = (rows[1, 10] + 1) % V  # one wrong token of eight; what the model says does not depend on it
    rows[2, 8:] = (rows[2, 8:] + 1) % V
    table = recite(suffix_table(CYCLE), rows, 8, 8).to_frame()
    assert table["score"].tolist() == [1.0, 7 / 8, 0.0]
    assert table["run"].tolist() == [8, 2, 0]
    assert table["extractible"].tolist() == [True, False, False]


def alone(hf: tf.PreTrainedModel, row: torch.Tensor, count: int) -> torch.Tensor:
    """One row through transformers' generate, greedily, no token forbidden and none that ends it."""
    hf.generation_config.eos_token_id = None
    config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=None)
    out = hf.generate(row[None], attention_mask=torch.ones_like(row)[None], generation_config=config)
    return out[0, len(row) :]


def with_much_to_say(model: Model) -> Model:
    """Other embeddings and another output layer, so that a random model does not repeat one token."""
    generator = torch.Generator().manual_seed(0)
    for table in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings()):
        table.weight = torch.nn.Parameter(torch.randn(table.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "gptj", "opt", "bloom", "llama", "mistral", "gemma3", "phi3"])
def test_rows_together_say_what_generate_says_of_each_alone(family: str):
    model = with_much_to_say(tiny(family, seed=3))
    ids = some_ids(9, 26, seed=1)
    found = recite(model, ids, 11, 15, batch=4)  # 4 + 4 + 1 rows; mistral's and gemma's windows are passed
    expected = torch.stack([alone(model.hf, row[:11], 15) for row in ids]).numpy()
    sure = ~(found.margin < 1e-5)
    assert sure.sum() >= 7 and len(set(expected.ravel())) >= 8
    assert np.array_equal(found.tokens[sure], expected[sure])
    assert np.array_equal(found.right, found.tokens == ids[:, 11:26].numpy())


class Forgetful(tf.LlamaForCausalLM):
    """A model that keeps no cache."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None):  # type: ignore[no-untyped-def]
        return super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, return_dict=True
        )


def test_a_model_without_cache_says_the_same():
    hf = tiny_hf("llama", seed=5)
    plain = Forgetful(hf.config).eval()
    plain.load_state_dict(hf.state_dict())
    ids = some_ids(5, 20, seed=2)
    cached = recite(Model.wrap(hf), ids, 8, 12)
    assert len(set(cached.tokens.ravel())) > 3
    assert np.array_equal(recite(Model.wrap(plain), ids, 8, 12).tokens, cached.tokens)


def test_of_equal_logits_the_lowest_id_as_transformers():
    model = suffix_table(CYCLE)
    with torch.no_grad():
        model.hf.transformer.ln_f.bias.fill_(1)  # else a state sums to 0, and what is left of that is rounding
        model.hf.lm_head.weight.zero_()
        model.hf.lm_head.weight[[9, 4, 17]] = 1.0  # three tokens, always equal
    ids = torch.arange(6)[None]
    found = recite(model, ids, 3, 3)
    assert found.tokens.tolist() == [[4, 4, 4]] == [alone(model.hf, ids[0, :3], 3).tolist()]
    assert found.close.all()


def test_an_end_of_text_token_does_not_end_a_recital():
    model = suffix_table(CYCLE)
    rows = chains(CYCLE, 40, 1)
    model.hf.generation_config.eos_token_id = int(rows[0, 22])
    assert recite(model, rows, 20, 20).extractible.all()


def test_the_memory_decides_how_many_are_decoded_together():
    model = tiny("llama")
    few, many = rows_in(model, 64, 0.001), rows_in(model, 64, 0.01)
    assert 1 <= few < many
    ids = some_ids(6, 20)
    one, six = recite(model, ids, 10, 10, batch=1), recite(model, ids, 10, 10, batch=6)
    assert np.array_equal(one.tokens[~six.close], six.tokens[~six.close])


def test_a_planted_memory_is_told_from_a_stranger():
    torch.manual_seed(0)
    hf = tiny_hf("gpt-neox", seed=0).train()
    taught, strangers = some_ids(3, 24, seed=4), some_ids(3, 24, seed=5)
    optimizer = torch.optim.Adam(hf.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        hf(input_ids=taught, labels=taught).loss.backward()
        optimizer.step()
    model = Model.wrap(hf)
    assert recite(model, taught, 12, 12).extractible.all()
    assert recite(model, strangers, 12, 12).score.max() < 0.3


@pytest.mark.parametrize(
    ("family", "rows", "prompt", "told"),
    [
        ("bert", some_ids(2, 20), 10, "is masked"),
        ("t5", some_ids(2, 20), 10, "encoder-decoder"),
        ("gpt2", some_ids(2, 15), 10, "15 tokens, too few"),
        ("gpt2", some_ids(2, 90), 80, "64 positions"),
        ("gpt2", some_ids(2, 20) + 90, 10, "another tokenizer"),
        ("gpt2", some_ids(2, 20), 0, "1 or more"),
        ("gpt2", torch.zeros(0, 20, dtype=torch.long), 10, "at least one row"),
    ],
)
def test_refusals_name_what_is_wrong(family: str, rows: torch.Tensor, prompt: int, told: str):
    with pytest.raises(VesaliusError, match=told):
        recite(tiny(family), rows, prompt, 10)
