"""Objectives: parity with transformers' own losses, sums that do not depend on micro-batches, seeds, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import VOCAB, tiny_hf

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.masks import PADDING, leaks
from vesalius.train.objectives import IGNORED, OBJECTIVES, Needs, Sample, make_objective
from vesalius.train.objectives.losses import token_loss
from vesalius.train.objectives.samples import MaskedSample, model_inputs, read_tokens
from vesalius.train.objectives.special import needs_for, word_starts

SPECIAL = {"pad": 0, "eos": 1, "mask": 2, "cls": 3, "sep": 4, "mode_r": 5, "mode_s": 6, "mode_x": 7} | {
    f"sentinel_{i}": 8 + i for i in range(12)
}
TEXT = 20  # ids from here on are text
CAUSAL = Needs(VOCAB, SPECIAL)
MASKED = Needs(VOCAB, SPECIAL, "masked")
SEQ2SEQ = Needs(VOCAB, SPECIAL, "encoder-decoder")
STARTS = np.arange(VOCAB) % 3 != 0


def a_batch(step: int = 0, rows: int = 4, width: int = 33, kind: str = "whole") -> Batch:
    """Random text; `kind` whole rows, padded rows, or several documents a row with padding."""
    rng = np.random.default_rng([7, step])
    ids = rng.integers(TEXT, VOCAB, (rows, width))
    segments = np.zeros((rows, width), dtype=np.int64)
    if kind == "packed":
        segments = np.cumsum(rng.random((rows, width)) < 0.12, 1) + 10 * np.arange(rows)[:, None]
    if kind != "whole":
        segments[np.arange(width) >= rng.integers(width // 2, width + 1, rows)[:, None]] = PADDING
    ids[segments == PADDING] = 0
    return Batch(step, ids, segments)


def answers(batch: Batch) -> Batch:
    """The last third of every document is an answer."""
    mask = np.zeros(batch.ids.shape, dtype=bool)
    for row, segments in enumerate(batch.segments):
        for document in set(segments) - {PADDING}:
            at = np.flatnonzero(segments == document)
            mask[row, at[-max(1, len(at) // 3) :]] = len(at) > 1
    return Batch(batch.step, batch.ids, batch.segments, mask)


CASES = [
    ("causal-lm", CAUSAL, {}),
    ("causal-lm", CAUSAL, {"cross_document": "mask", "restart_positions": True, "z_loss": 1e-2, "chunk": 1}),
    ("full-lm", CAUSAL, {"chunk": 3}),
    ("prefix-lm", CAUSAL, {}),
    ("prefix-lm", CAUSAL, {"mask": "causal", "cross_document": "mask"}),
    ("prefix-lm", SEQ2SEQ, {}),
    ("span-corruption", CAUSAL, {}),
    ("span-corruption", CAUSAL, {"cross_document": "mask", "mask": "causal"}),
    ("span-corruption", SEQ2SEQ, {}),
    ("ul2", CAUSAL, {}),
    ("ul2", CAUSAL, {"mixture": "ul2", "cross_document": "mask"}),
    ("ul2", SEQ2SEQ, {}),
    ("masked-lm", MASKED, {"word_start": STARTS}),
    ("masked-lm", MASKED, {"word_start": STARTS, "frame": True, "cross_document": "mask", "z_loss": 1e-3}),
    ("prompted", CAUSAL, {}),
    ("prompted", CAUSAL, {"normalise": "sequence", "mask": "prefix", "chunk": 1}),
]
MODELS = {"causal": "llama", "masked": "bert", "encoder-decoder": "t5"}
names = pytest.mark.parametrize(
    ("name", "needs", "settings"), CASES, ids=[f"{n}-{k.kind}-{i}" for i, (n, k, _) in enumerate(CASES)]
)


def same(a: Sample, b: Sample) -> bool:
    return (
        a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
        and torch.equal(a.targets, b.targets)
        and (a.weights is None) == (b.weights is None)
        and (a.weights is None or torch.equal(a.weights, b.weights))
    )


@names
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_sample_is_a_function_of_step_and_seed_and_its_loss_of_the_rows(name, needs, settings, kind):
    objective = make_objective(name, needs, **settings)
    batch = answers(a_batch(kind=kind)) if name == "prompted" else a_batch(kind=kind)
    if kind == "packed" and needs.kind == "encoder-decoder" and name == "prompted":
        return
    before = batch.ids.copy()
    sample = objective.sample(batch, seed=3)
    assert np.array_equal(batch.ids, before)
    objective.sample(a_batch(9) if name != "prompted" else answers(a_batch(9)), seed=3)
    assert same(sample, objective.sample(batch, seed=3))
    if name not in ("causal-lm", "full-lm", "prompted"):
        assert not same(sample, objective.sample(batch, seed=4))
        assert not same(sample, objective.sample(Batch(1, batch.ids, batch.segments), seed=3))

    model = tiny_hf(MODELS[needs.kind])
    assert same(sample[0:2].to("cpu"), sample[0:2])
    whole = objective.loss(model(**model_inputs(sample, model)), sample)
    parts = [objective.loss(model(**model_inputs(sample[s : s + 1], model)), sample[s : s + 1]) for s in range(4)]
    assert torch.allclose(whole.total, sum(p.total for p in parts), rtol=1e-5)
    for key in whole.logs:
        assert torch.allclose(whole.logs[key], sum(p.logs[key] for p in parts), rtol=1e-5)
    assert sample.count() == pytest.approx(sum(sample[s : s + 1].count() for s in range(4)))
    assert sample.count() > 0 and whole.total.isfinite() and not whole.logs["nll"].requires_grad
    # the mask as `inputs` has it is the one the model is given
    assert torch.equal(model(**sample.inputs).logits, model(**model_inputs(sample, model)).logits)
    assert read_tokens(sample) == sum(v.numel() for k, v in sample.inputs.items() if k.endswith("input_ids"))


@names
def test_no_target_can_be_read_off_the_input(name, needs, settings):
    """A changed target token changes no logit that foretells it."""
    if needs.kind == "encoder-decoder" or name == "masked-lm":
        return
    objective = make_objective(name, needs, **settings)
    batch = a_batch(kind="packed")
    sample = objective.sample(answers(batch) if name == "prompted" else batch, seed=0)
    model = tiny_hf("llama").double()
    given = model_inputs(sample, model)
    before = model(**given).logits
    rng = np.random.default_rng(0)
    at = (sample.targets != IGNORED).nonzero()
    for row, pos in at[rng.permutation(len(at))[:12]].tolist():
        if pos + 1 == sample.targets.shape[1]:
            continue
        ids = sample.inputs["input_ids"].clone()
        assert ids[row, pos + 1] == sample.targets[row, pos]
        ids[row, pos + 1] = TEXT + (ids[row, pos + 1] - TEXT + 1) % (VOCAB - TEXT)
        after = model(**given | {"input_ids": ids}).logits
        assert torch.allclose(after[row, : pos + 1][-1], before[row, pos], atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "bloom"])
def test_causal_lm_is_the_loss_of_transformers(family):
    model = tiny_hf(family)
    for kind in ("whole", "padded"):
        batch = a_batch(kind=kind)
        labels = torch.from_numpy(np.where(batch.segments == PADDING, IGNORED, batch.ids))
        theirs = model(torch.from_numpy(batch.ids), labels=labels, use_cache=False).loss
        expected = torch.autograd.grad(theirs, model.get_input_embeddings().weight)[0]
        for settings in ({}, {"chunk": 1}, {"z_loss": 1e-4}):
            objective = make_objective("causal-lm", CAUSAL, **settings)
            sample = objective.sample(batch, 0)
            loss = objective.loss(model(**sample.inputs), sample)
            assert float(loss.logs["nll"] / sample.count()) == pytest.approx(float(theirs.detach()), abs=1e-6)
            if not settings.get("z_loss"):
                ours = torch.autograd.grad(loss.total / sample.count(), model.get_input_embeddings().weight)[0]
                assert torch.allclose(ours, expected, atol=1e-6)


def test_documents_apart_are_documents_alone():
    """The loss of packed documents is the sum of each document's loss by itself."""
    model = tiny_hf("gpt2")
    objective = make_objective("causal-lm", CAUSAL, cross_document="mask", restart_positions=True)
    batch = a_batch(kind="packed")
    sample = objective.sample(batch, 0)
    together = objective.loss(model(**model_inputs(sample, model)), sample).total
    alone, count = 0.0, 0
    for row in range(4):
        for document in sorted(set(batch.segments[row]) - {PADDING}):
            ids = torch.from_numpy(batch.ids[row, batch.segments[row] == document])[None]
            if ids.shape[1] > 1:
                alone += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
    assert sample.count() == count
    assert float(together.detach()) == pytest.approx(alone, rel=1e-5)


def test_masked_lm_is_the_loss_of_transformers():
    model = tiny_hf("bert")
    objective = make_objective("masked-lm", MASKED, word_start=STARTS)
    for kind in ("whole", "padded"):
        sample = objective.sample(a_batch(kind=kind), 0)
        outputs = model(**sample.inputs, labels=sample.targets)
        assert float(objective.loss(outputs, sample).total.detach() / sample.count()) == pytest.approx(
            float(outputs.loss.detach()), abs=1e-6
        )


def test_encoder_decoder_is_the_loss_of_transformers():
    model = tiny_hf("t5")
    sample = make_objective("span-corruption", SEQ2SEQ).sample(a_batch(kind="padded"), 0)
    assert "attention_mask" in sample.inputs
    theirs = model(
        input_ids=sample.inputs["input_ids"], attention_mask=sample.inputs["attention_mask"], labels=sample.targets
    )
    assert torch.equal(
        model(**sample.inputs).logits[sample.targets != IGNORED], theirs.logits[sample.targets != IGNORED]
    )
    ours = token_loss(model(**sample.inputs).logits, sample)
    assert float(ours.total.detach() / sample.count()) == pytest.approx(float(theirs.loss.detach()), abs=1e-6)


def test_weights_and_half_precision():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    targets[0, :2] = IGNORED
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(2))
    valid = targets != IGNORED
    by_hand = -(logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0] * weights)[valid].sum()
    sample = Sample({}, targets, weights)
    for z in (0.0, 1e-9):
        assert torch.allclose(token_loss(logits, sample, z).logs["nll"], by_hand, atol=1e-5)
        assert torch.allclose(token_loss(logits, sample, z, chunk=2).logs["nll"], by_hand, atol=1e-5)
    half = token_loss(logits.bfloat16(), sample)
    assert half.total.dtype == torch.float32
    assert torch.allclose(half.total, token_loss(logits.bfloat16().float(), sample).total)
    assert sample.count() == pytest.approx(float(weights[valid].sum()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_change_neither_loss_nor_gradient(dtype):
    logits = torch.randn(5, 4, 13, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    targets = torch.randint(0, 13, (5, 4), generator=torch.Generator().manual_seed(1))
    targets[1, 2:] = IGNORED
    for weights in (None, torch.rand(5, 4, generator=torch.Generator().manual_seed(2))):
        for z in (0.0, 0.2):
            sample = Sample({}, targets, weights)
            whole, parts = token_loss(logits, sample, z), token_loss(logits, sample, z, chunk=2)
            assert torch.allclose(whole.total, parts.total) and parts.total.dtype == whole.total.dtype
            assert all(torch.allclose(whole.logs[k], parts.logs[k]) for k in whole.logs)
            expected = torch.autograd.grad(whole.total / 7, logits)[0]
            found = torch.autograd.grad(parts.total / 7, logits, retain_graph=True)[0]
            assert found.dtype == dtype
            assert torch.allclose(found, expected, atol=4e-3 if dtype == torch.bfloat16 else 1e-6)
            with pytest.raises(RuntimeError, match="chunk"):
                torch.autograd.grad(parts.total / 7, logits)
            with torch.no_grad():
                assert torch.allclose(token_loss(logits, sample, z, chunk=2).total, whole.total)


def test_z_loss_gradient():
    logits = torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True)
    sample = Sample({}, torch.randint(0, 9, (2, 6)))
    for chunk in (0, 1):
        plain = torch.autograd.grad(token_loss(logits, sample, 0.0, chunk).total, logits)[0]
        with_z = torch.autograd.grad(token_loss(logits, sample, 0.3, chunk).total, logits)[0]
        expected = 2 * 0.3 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1)
        assert torch.allclose(with_z - plain, expected, atol=1e-6)


def test_cross_entropy_is_blind_to_a_shift_and_z_loss_is_not():
    """Softmax regression under SGD: the mean of the bias, started at +5, is conserved, or falls with z-loss."""
    means = {}
    for z in (0.0, 1e-2):
        rng = torch.Generator().manual_seed(0)
        inputs, targets = torch.randn(64, 8, generator=rng), torch.randint(0, 10, (1, 64), generator=rng)
        weight = torch.zeros(10, 8, requires_grad=True)
        bias = torch.full((10,), 5.0, requires_grad=True)
        means[z] = [5.0]
        for _ in range(500):
            loss = token_loss((inputs @ weight.T + bias)[None], Sample({}, targets), z).total / 64
            for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
                parameter.data -= 0.5 * gradient
            means[z].append(float(bias.detach().mean()))
    assert max(abs(m - 5) for m in means[0.0]) < 1e-4
    assert (np.diff(means[1e-2]) < 0).all() and means[1e-2][-1] < 4


def test_prefix_lm_draws_its_point_uniformly_and_puts_loss_after_it():
    objective = make_objective("prefix-lm", CAUSAL)
    batch = a_batch(rows=4000, width=17)
    sample = objective.sample(batch, 0)
    assert isinstance(sample, MaskedSample)
    prefix = sample.mask.both_ways.sum(1)
    points = np.bincount(prefix.numpy(), minlength=17)
    assert points[0] == 0 and points[1:].min() > 180  # 250 expected of each of 16 points, deviation 15
    foretold = (sample.targets != IGNORED).sum(1)
    assert torch.equal(foretold, 17 - prefix)
    first = (sample.targets != IGNORED).int().argmax(1)
    assert torch.equal(first, prefix - 1)  # the prefix's last token foretells the first after it
    assert leaks(tiny_hf("llama"), sample[0:3].mask, sample[0:3].given["input_ids"]) == (0, 0)


def test_prompted_normalisation():
    """An answer of one token and one of a hundred weigh alike by sequence, and .01 to .99 by token."""
    ids = np.full((2, 121), TEXT)
    segments = np.zeros((2, 121), dtype=np.int64)
    segments[0, 21:] = PADDING
    mask = np.zeros((2, 121), dtype=bool)
    mask[0, 20], mask[1, 21:] = True, True
    logits = torch.randn(1, 120, VOCAB, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    logits = logits[:, :1].expand(2, 120, -1).clone().requires_grad_()  # the same loss everywhere
    shares = {}
    for normalise in ("token", "sequence"):
        objective = make_objective("prompted", CAUSAL, normalise=normalise)
        sample = objective.sample(Batch(0, ids, segments, mask), 0)
        total = objective.loss(SimpleNamespace(logits=logits), sample).total
        (gradient,) = torch.autograd.grad(total, logits)
        touched = gradient.abs().sum(-1) > 0
        assert torch.equal(touched, torch.from_numpy(mask[:, 1:]))  # prompts have no loss
        assert sample.count() == pytest.approx(101 if normalise == "token" else 2)
        size = gradient.abs().sum((1, 2))
        shares[normalise] = float(size[0] / size.sum())
    assert shares["sequence"] == pytest.approx(0.5, abs=1e-6)
    assert shares["token"] == pytest.approx(1 / 101, abs=1e-6)


def test_prompted_encoder_decoder_splits_prompt_and_answer():
    batch = answers(a_batch(kind="padded"))
    sample = make_objective("prompted", SEQ2SEQ, normalise="sequence").sample(batch, 0)
    for row in range(4):
        shown = sample.inputs["input_ids"][row][sample.inputs["attention_mask"][row] == 1]
        told = sample.targets[row][sample.targets[row] != IGNORED]
        real = batch.segments[row] != PADDING
        assert torch.cat([shown, told]).tolist() == batch.ids[row][real].tolist()
        assert float(sample.weights[row].sum()) == pytest.approx(1)
    with pytest.raises(VesaliusError, match="no mask"):
        make_objective("prompted", CAUSAL).sample(a_batch(), 0)
    turns = Batch(0, batch.ids, np.zeros_like(batch.segments), np.arange(33)[None, :].repeat(4, 0) % 8 == 3)
    with pytest.raises(VesaliusError, match="prompt after an answer"):
        make_objective("prompted", CAUSAL, mask="prefix").sample(turns, 0)
    assert make_objective("prompted", CAUSAL).sample(turns, 0).count() == 4 * 4


def weighed(batch, needs, student, **settings):
    """The loss of `distil` and its sample, with hidden states as the trainer asks for them."""
    objective = make_objective("distil", needs, **settings)
    sample = objective.sample(batch, 0)
    return objective.loss(student(**sample.inputs, **objective.asks), sample), sample


def test_distil():
    student, teacher = tiny_hf("llama"), tiny_hf("llama", seed=1)
    batch = a_batch(kind="padded")

    def loss(of, **settings):
        return weighed(batch, CAUSAL, of, **{"cosine": 0.0, **settings})

    own, sample = loss(student, teacher=tiny_hf("llama"), hard=0.0, temperature=3.0)
    assert float(own.total.detach()) == pytest.approx(0, abs=1e-3)
    half, _ = loss(student, teacher=teacher, soft=0.25, hard=0.75)
    valid = sample.targets != IGNORED
    mine, theirs = student(**sample.inputs).logits[valid], teacher(**sample.inputs).logits[valid]
    divergence = torch.nn.functional.kl_div(
        (mine / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), reduction="sum", log_target=True
    )
    nll = torch.nn.functional.cross_entropy(mine, sample.targets[valid], reduction="sum")
    assert torch.allclose(half.total, 0.75 * nll + 0.25 * 4 * divergence, rtol=1e-5)
    two, _ = loss(student, teacher=[teacher, teacher], soft=0.25, hard=0.75)
    assert torch.allclose(two.total, half.total)
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(VesaliusError, match="vocabulary"):
        loss(student, teacher=lambda s: torch.zeros(4, 32, 5))
    with pytest.raises(VesaliusError, match="needs a teacher"):
        make_objective("distil", CAUSAL)
    with pytest.raises(VesaliusError, match="give one, or cosine: 0"):
        loss(student, teacher=lambda s: torch.zeros(4, 32, 5), cosine=1.0)
    with pytest.raises(VesaliusError, match="all 0"):
        loss(student, teacher=teacher, soft=0.0, hard=0.0)
    with pytest.raises(VesaliusError, match="not a encoder-decoder one"):
        make_objective("distil", SEQ2SEQ, teacher=teacher)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_distil_is_the_sum_of_three_terms(family, everywhere):
    """Against sums over single tokens: hard words, soft words at T, and the direction of the last hidden states."""
    student, teacher = tiny_hf(family), tiny_hf(family, seed=1)
    masked = family == "bert"
    text = {"word_start": STARTS} if masked else {}
    batch, needs = a_batch(kind="padded"), MASKED if masked else CAUSAL
    found, sample = weighed(batch, needs, student, teacher=teacher, text=text, everywhere=everywhere)
    with torch.no_grad():
        mine, theirs = (m(**sample.inputs, output_hidden_states=True) for m in (student, teacher))
    read = sample.inputs["attention_mask"].bool() if masked else sample.targets != IGNORED
    nll = soft = turned = 0.0
    for row in range(len(sample)):
        targets = [i for i in range(sample.targets.shape[1]) if int(sample.targets[row, i]) != IGNORED]
        tokens = [i for i in range(sample.targets.shape[1]) if read[row, i]]
        for i in targets:
            nll -= float(mine.logits[row, i].log_softmax(-1)[sample.targets[row, i]])
        wide = masked and everywhere
        for i in tokens if wide else targets:
            p, q = (x.logits[row, i].div(2).softmax(-1).double() for x in (theirs, mine))
            soft += float((p * (p / q).log()).sum()) * (len(targets) / len(tokens) if wide else 1)
        for i in tokens:
            a, b = mine.hidden_states[-1][row, i].double(), theirs.hidden_states[-1][row, i].double()
            turned += (1 - float(a @ b / (a.norm() * b.norm()))) * len(targets) / len(tokens)
    assert float(found.logs["nll"]) == pytest.approx(nll, rel=1e-4)
    assert float(found.logs["divergence"]) == pytest.approx(soft, rel=1e-4)
    assert float(found.logs["cosine"]) == pytest.approx(turned, rel=1e-4)
    assert float(found.total.detach()) == pytest.approx(2 * nll + 5 * 4 * soft + turned, rel=1e-4)
    objective = make_objective("distil", needs, teacher=teacher, text=text, everywhere=everywhere)
    parts = [sample[slice(i, i + 2)] for i in (0, 2)]
    halves = [objective.loss(student(**p.inputs, **objective.asks), p).total.detach() for p in parts]
    assert float(sum(halves)) == pytest.approx(float(found.total.detach()), rel=1e-5)  # no matter how rows are shared


def test_masking_shares():
    """Over 10 000 rows: 15 % of words, whole; 80/10/10; special tokens never; another step, other words."""
    rng = np.random.default_rng(0)
    vocab = 2000
    starts = np.arange(vocab) % 5 < 3
    special = {"pad": 0, "mask": 1, "cls": 2, "sep": 3, "unk": 4}
    ids = rng.integers(5, vocab, (10_000, 65))
    ids[:, 0], ids[:, 40] = 2, 3
    segments = np.zeros_like(ids)
    segments[::3, 50:] = PADDING
    ids[segments == PADDING] = 0
    objective = make_objective("masked-lm", Needs(vocab, special, "masked"), word_start=starts)
    batch = Batch(0, ids, segments)
    sample = objective.sample(batch, 0)
    told, read = sample.targets.numpy(), sample.inputs["input_ids"].numpy()
    hidden, shown = told != IGNORED, ids[:, :-1]
    assert (told[hidden] == shown[hidden]).all() and (read[~hidden] == shown[~hidden]).all()
    ordinary = shown >= 5
    assert not (hidden & ~ordinary).any()
    opens = ordinary & starts[shown]
    opens[:, 1:] |= ordinary[:, 1:] & ~ordinary[:, :-1]
    word = np.cumsum(opens.ravel()).reshape(opens.shape)
    size = np.bincount(word[ordinary])
    hit = np.bincount(word[ordinary], weights=hidden[ordinary])
    assert np.isin(hit[size > 0] / size[size > 0], (0, 1)).all()  # whole words
    words = opens.sum(1)
    chosen = (opens & hidden).sum(1)  # whole words are hidden, so their first tokens count them
    assert ((chosen == np.floor(0.15 * words)) | (chosen == np.floor(0.15 * words) + 1)).all()
    assert (hit > 0).sum() / (size > 0).sum() == pytest.approx(0.15, abs=0.003)
    assert hidden.sum() / ordinary.sum() == pytest.approx(0.15, abs=0.003)
    masked, kept = (read == 1)[hidden].mean(), (read == shown)[hidden].mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1, abs=0.01)
    assert 1 - masked - kept == pytest.approx(0.1, abs=0.01)
    assert (read[hidden][read[hidden] != 1] >= 5).all()
    again = objective.sample(Batch(1, ids, segments), 0).targets.numpy() != IGNORED
    assert (again & hidden).sum() / hidden.sum() == pytest.approx(0.15, abs=0.01)


def test_frame_puts_cls_before_and_sep_after():
    batch = a_batch(kind="padded")
    sample = make_objective("masked-lm", MASKED, word_start=STARTS, frame=True, rate=0.0).sample(batch, 0)
    for row in range(4):
        real = batch.ids[row][batch.segments[row] != PADDING][:30]
        framed = [3, *real.tolist(), 4]
        assert sample.inputs["input_ids"][row].tolist() == framed + [0] * (32 - len(framed))
        assert int(sample.inputs["attention_mask"][row].sum()) == len(framed)


def test_word_starts_of_three_kinds_of_tokenizer():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    del decoders
    special = {"[UNK]": 0, "[MASK]": 1}
    for marked in (["run", "##ning", "##s", "the"], ["Ġrun", "ning", "s", "Ġthe"], ["▁run", "ning", "s", "▁the"]):
        vocabulary = special | {w: i + 2 for i, w in enumerate(marked)}
        fast = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
            unk_token="[UNK]",
            mask_token="[MASK]",
        )
        assert word_starts(fast).tolist() == [True, True, True, False, False, True]
        assert make_objective("masked-lm", needs_for(tiny_hf("bert"), fast), tokenizer=fast) is not None
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )
    with pytest.raises(VesaliusError, match="whole_words: false"):
        word_starts(plain)


@pytest.mark.parametrize(
    ("name", "needs", "settings", "words"),
    [
        ("causal-lm", CAUSAL, {"zloss": 1}, "did you mean 'z_loss'"),
        ("cusal-lm", CAUSAL, {}, "did you mean 'causal-lm'"),
        ("causal-lm", CAUSAL, {"cross_document": "masked"}, "did you mean 'mask'"),
        ("causal-lm", CAUSAL, {"z_loss": "much"}, "z_loss is 'much'"),
        ("causal-lm", CAUSAL, {"chunk": 1.5}, "whole number"),
        ("causal-lm", MASKED, {}, "not a masked one"),
        ("masked-lm", CAUSAL, {}, "not a causal one"),
        ("masked-lm", MASKED, {}, "word_start"),
        ("masked-lm", Needs(9, {}, "masked"), {"whole_words": False}, "'mask'"),
        ("span-corruption", Needs(9), {}, "'sentinel_0'.*add_tokens"),
        ("span-corruption", CAUSAL, {"rate": 2}, "from 0.0 to 0.95"),
        ("ul2", Needs(9, {"sentinel_0": 1}), {}, "mode_"),
        ("ul2", CAUSAL, {"mixture": "ul3"}, "did you mean"),
        ("ul2", CAUSAL, {"mixture": [{"kind": "R", "rat": 0.1}]}, "did you mean 'rate'"),
        ("ul2", CAUSAL, {"mixture": [{"kind": "R"}]}, "kind and rate"),
        ("ul2", CAUSAL, {"mixture": []}, "empty"),
    ],
)
def test_refusals(name, needs, settings, words):
    with pytest.raises(VesaliusError, match=words):
        make_objective(name, needs, **settings)


def test_every_objective_is_registered_with_words():
    known = {e.name for e in OBJECTIVES}
    assert known >= {n for n, _, _ in CASES} | {"distil"}
    assert all(e.summary and e.paper for e in OBJECTIVES)
