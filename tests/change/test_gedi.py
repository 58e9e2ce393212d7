"""GeDi against the closed form of two known bigram models, its cache, its counters, and a guide the trainer makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import some_ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vesalius.change.gedi import Gedi, Guide, Repetition, same_tokenizer
from vesalius.change.guide import coded, guide_recipe
from vesalius.corpus.batches import Batch
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.model.decode import decode
from vesalius.train.objectives import Needs, make_objective
from vesalius.train.running import train

WORDS, A, B = 20, 20, 21  # ordinary words, and the two codes


class Bigrams(torch.nn.Module):
    """Logits that are a table's: after code A words follow table A, after B table B; the code is remembered."""

    def __init__(self, tables):
        super().__init__()
        self.tables = torch.nn.Parameter(tables)

    def forward(self, ids):
        code = (ids == B).any(-1).long()
        return self.tables[code[:, None], ids]


def bigram_guide(seed=0, scale=3.0, biases=(0.2, -0.2)):
    """A guide whose model is a tiny Llama with its forward replaced by the tables, and the tables."""
    model = tiny("llama")
    tables = torch.randn(2, 97, 97, generator=torch.Generator().manual_seed(seed)) * 2
    tables = tables.log_softmax(-1)
    inner = Bigrams(tables)

    class Out:
        def __init__(self, logits):
            self.logits = logits

    model.hf.forward = lambda input_ids, **_: Out(inner(input_ids).detach())
    return Guide(model, ("a", "b"), (A, B), (), scale, biases), tables


def closed_form(guide, tables, row, toward):
    """P(code | row, v) for every v, by the formula, one v at a time."""
    at = guide.codes.index(toward)
    found = []
    for v in range(97):
        logs = []
        for c in (0, 1):
            chain = [guide.ids[c], *row, v]
            total = sum(float(tables[c, x, y]) for x, y in zip(chain, chain[1:], strict=False))
            logs.append(guide.scale * total / (len(row) + 1) + guide.biases[c])
        found.append(math.exp(logs[at]) / sum(map(math.exp, logs)))
    return torch.tensor(found)


@pytest.mark.parametrize("toward", ["a", "b"])
def test_posteriors_of_all_tokens_are_the_closed_form_of_two_bigram_models(toward):
    guide, tables = bigram_guide()
    gedi = Gedi(guide, toward, filter_p=0, cached=False)
    row = [3, 7, 7, 1]
    for more in (5, 2, 11):
        gedi.on_rows([row], torch.zeros(1, 97))
        assert torch.allclose(gedi.posterior[0], closed_form(guide, tables, row, toward), atol=1e-5)
        row = [*row, more]


def test_the_cache_says_what_a_full_recomputation_says_for_rows_of_unequal_length():
    guide = Guide(tiny("llama"), ("a", "b"), (A, B), (), 5.0)
    cached, plain = Gedi(guide, "a"), Gedi(guide, "a", cached=False)
    rows, rng = [some_ids(1, n, n)[0].tolist() for n in (3, 8, 5)], np.random.default_rng(0)
    for step in range(6):
        scores = torch.randn(3, 97, generator=torch.Generator().manual_seed(step))
        one, two = cached.on_rows(rows, scores), plain.on_rows(rows, scores)
        assert torch.allclose(cached.posterior, plain.posterior, atol=1e-4)
        assert torch.equal(torch.isfinite(one), torch.isfinite(two))
        alone = Gedi(guide, "a")
        alone.on_rows(rows[1:2], scores[1:2])
        assert torch.allclose(alone.posterior[0], cached.posterior[1], atol=1e-4)
        rows = [[*row, int(rng.integers(5, 97))] for row in rows]


def test_without_weight_and_filter_the_model_writes_what_it_writes_and_two_passes_a_token_are_enough():
    model, guide = tiny("gpt2", 3), Guide(tiny("llama"), ("a", "b"), (A, B))
    prompts = [some_ids(1, n, n)[0].tolist() for n in (4, 9)]
    free = [line.tokens for line in decode(model, prompts, 15)]
    gedi = Gedi(guide, "a", w=0.0, filter_p=0.0)
    assert [line.tokens for line in decode(model, prompts, 15, [gedi])] == free
    assert gedi.reader.row_passes == 2 * 2 * 15
    steered = Gedi(guide, "a")
    assert [line.tokens for line in decode(model, prompts, 15, [steered])] != free
    assert steered.reader.row_passes == 2 * 2 * 15


def test_generate_of_transformers_steers_alike():
    model, guide = tiny("gpt2", 3), Guide(tiny("llama"), ("a", "b"), (A, B), (), 4.0)
    prompt = some_ids(1, 6)
    out = model.hf.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False,
        logits_processor=[Gedi(guide, "a")], eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert out[0].tolist() == decode(model, prompt.tolist(), 10, [Gedi(guide, "a")])[0].row


def test_the_filter_drops_the_worst_tokens_as_it_says():
    guide, tables = bigram_guide(1)
    gedi, scores = Gedi(guide, "a", w=2.0, filter_p=0.6, target_p=0.7, cached=False), torch.randn(1, 97)
    out = gedi.on_rows([[4, 9]], scores)[0]
    posterior = closed_form(guide, tables, [4, 9], "a")
    share = (scores[0].double() + 2 * posterior.double().log()).softmax(-1)
    total, kept = 0.0, set()
    for v in posterior.argsort().tolist():
        total += float(share[v])
        if total >= 0.6 or posterior[v] >= 0.7:
            kept.add(v)
    assert set(torch.isfinite(out).nonzero()[:, 0].tolist()) == kept and 0 < len(kept) < 97


def test_repeated_tokens_are_made_less_likely_wherever_the_logits_lie():
    scores = torch.tensor([[3.0, 1.0, -20.0]])
    out = Repetition(1.25, 10.0).on_rows([[0, 2]], scores)
    assert torch.allclose(out, torch.tensor([[8.0, 8.0, -16.25]]))
    assert torch.allclose(Repetition(1.25, 10.0).on_rows([[0, 2]], scores + 100), out)


def test_the_loss_is_the_formula_and_padding_pairs_change_nothing():
    needs = Needs(97, {"pad": 0})
    objective = make_objective("gedi", needs, ids=(A, B), lam=0.3, scale=2.0)
    rows = np.array([[A, 5, 6, 7, B, 8, 9, 10], [11, 12, A, 13, 14, 15, B, 16]])
    segments = np.array([[0, 0, 0, 0, 1, 1, 1, 1], [2, 2, 3, 3, 3, 3, 4, 4]])
    sample = objective.sample(Batch(0, rows, segments), 0)
    assert len(sample) == 16 and sample.count() == 3 + 3 + 3 + 1  # the text that has no code is left out
    logits = torch.randn(*sample.targets.shape, 97, generator=torch.Generator().manual_seed(0))

    class Out:
        pass

    out = Out()
    out.logits = logits
    found = objective.loss(out, sample)
    logs = logits.log_softmax(-1)
    total = 0.0
    for i, text in enumerate([[5, 6, 7], [8, 9, 10], [13, 14, 15], [16]]):
        own, other = (sum(float(logs[2 * i + r, j, t]) for j, t in enumerate(text)) for r in (0, 1))
        n = len(text)
        apart = -math.log(1 / (1 + math.exp(2.0 * (other - own) / n)))
        total += 0.3 * -own + 0.7 * n * apart
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)
    halves = [objective.loss(_out(logits[s]), sample[s]).total for s in (slice(0, 8), slice(8, 16))]
    assert float(sum(halves).detach()) == pytest.approx(total, rel=1e-5)


def _out(logits):
    class Out:
        pass

    out = Out()
    out.logits = logits
    return out


def test_topics_are_made_binary_and_given():
    tokenizer = word_tokenizer(["true", "false", "sea", "sky", "fire"])
    rows = [("w1 w2", "sea"), ("w3", "sky"), ("w4 w5", "fire")]
    made = coded(rows, tokenizer)
    assert made["codes"] == ("true", "false") and made["topics"] == ("fire", "sea", "sky")
    assert made["texts"][0] == "true sea w1 w2"
    wrong = [t.split() for t in made["texts"][1::2]]
    assert all(w[0] == "false" and w[1] != label for w, (_, label) in zip(wrong, rows, strict=True))
    objective = make_objective("gedi", Needs(97), tokenizer=tokenizer, topics=["sea", "sky"])
    sample = objective.sample(Batch(0, np.array([[1, 3, 7, 8, 9]]), np.zeros((1, 5), int)), 0)
    assert sample.inputs["input_ids"][:2].tolist() == [[1, 3, 7, 8], [2, 3, 7, 8]]
    assert sample.targets[0].tolist() == [-100, 7, 8, 9]
    with pytest.raises(VesaliusError, match="'under water' is"):
        coded([("w1", "under water"), ("w2", "sky"), ("w3", "sea")], tokenizer)
    with pytest.raises(VesaliusError, match="1 label"):
        coded(rows[:1], tokenizer)


def word_tokenizer(words):
    vocabulary = {"<unk>": 0} | {w: i + 1 for i, w in enumerate([*words, *(f"w{i}" for i in range(1, 80))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="w79")


def test_a_guide_is_trained_kept_and_steers(tmp_path):
    """Class sea writes w1..w10, class sky w11..w20, both at random: the guide must tell a text by its words."""
    tokenizer = word_tokenizer(["sea", "sky"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rng = np.random.default_rng(0)

    def text(low):
        return " ".join(f"w{i}" for i in rng.integers(low, low + 10, 12))

    rows = [(text(1 + 10 * (i % 2)), ("sea", "sky")[i % 2]) for i in range(300)]
    recipe = guide_recipe(
        coded(rows, tokenizer), tmp_path / "coded",
        {"preset": "tiny-llama", "architecture": {"layers": 1, "d_model": 32, "heads": 2, "kv_heads": 2}},
        steps=60, lr=1e-2, rows=8, length=60, tokenizer=str(tmp_path / "tokenizer"),
    )  # fmt: skip
    run = train(recipe, tmp_path / "runs")
    guide = Guide.load(f"{run}@last")
    assert guide.classes == ("sea", "sky") and guide.scale != 1.0
    base = Model.wrap(guide.model.hf, tokenizer)
    for toward, low in (("sea", 1), ("sky", 11)):
        gedi, end = Gedi(guide, toward, w=30), torch.tensor([tokenizer.eos_token_id])
        prompt = tokenizer("w30 w31", add_special_tokens=False)["input_ids"]
        equal = [lambda ids, s, end=end: torch.zeros_like(s).index_fill(-1, end, -torch.inf), gedi]
        words = tokenizer.decode(decode(base, [prompt], 10, equal)[0].tokens).split()
        own = [w for w in words if w[1:].isdigit() and low <= int(w[1:]) < low + 10]
        assert len(own) >= 9, words
    with pytest.raises(UnknownName, match="see"):
        guide.prefixes("see")
    with pytest.raises(VesaliusError, match="do not share a tokenizer"):
        same_tokenizer(Model.wrap(tiny("llama").hf, word_tokenizer(["other"])), guide.model)
