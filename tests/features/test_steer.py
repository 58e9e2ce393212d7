"""Steering with a planted scorer: what is dropped, what is kept, and what a push adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from features_helpers import Plant, spoken, tokenizer

from vesalius.errors import VesaliusError
from vesalius.features import AxisGuard, Concept, direction, pushed
from vesalius.features.directions import Axis
from vesalius.model import Model

NAMES = [f"good{i}" for i in range(20)] + [f"bad{i}" for i in range(20)] + ["start."]


@pytest.fixture(scope="module")
def judge() -> tuple[Model, Axis]:
    """An encoder to which good words are good and bad ones bad, and its axis."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(NAMES), 24)) * 0.3
    x[:20, 0] += 2
    x[20:40, 0] -= 2
    model = Plant(dict(zip(NAMES, x, strict=True))).model
    axis = direction(model, Concept("good", tuple(NAMES[:20]), tuple(NAMES[20:40])), permutations=0, draws=0)
    return model, axis


@pytest.fixture(scope="module")
def writer() -> Model:
    """A random language model that knows the same words."""
    model = spoken("llama")
    return Model.wrap(model.hf, tokenizer(names=NAMES), name="writer")


def written(model: Model, rows: int = 6, **options: object) -> list[list[str]]:
    ids = torch.full((rows, 1), 3 + NAMES.index("start."))
    mask = torch.ones_like(ids)
    torch.manual_seed(0)
    out = model.hf.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=12, top_k=0, pad_token_id=2,
        bad_words_ids=[[i] for i in range(len(NAMES) + 3, 97)], **options,
    )  # fmt: skip
    return [text.split() for text in model.tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)]


def test_a_guard_lets_no_bad_word_through(judge: tuple[Model, Axis], writer: Model) -> None:
    encoder, axis = judge
    free = written(writer)
    assert any(w.startswith("bad") for row in free for w in row)
    guard = AxisGuard(axis, encoder, writer.tokenizer, threshold=0.2, top_k=40)
    kept = written(writer, logits_processor=[guard])
    firsts = [row[0] for row in kept if row]
    assert firsts and all(w.startswith("good") for w in firsts)
    assert 0 < guard.dropped < guard.candidates
    below = sum(
        float(axis.score(encoder, [" ".join(row[: i + 1])])[0]) < 0.2 - 1e-6 for row in kept for i in range(len(row))
    )
    assert below <= guard.rescued  # every word kept what was written above the threshold, but where none could


def test_what_is_kept_is_the_judges_verdict_on_each_candidate(judge: tuple[Model, Axis], writer: Model) -> None:
    encoder, axis = judge
    guard = AxisGuard(axis, encoder, writer.tokenizer, threshold=0.0, top_k=10)
    logits = torch.randn(2, 97, generator=torch.Generator().manual_seed(1))
    logits[:, :3] = logits[:, len(NAMES) + 3 :] = -50
    good, bad = (3 + NAMES.index(n) for n in ("good1", "bad1"))
    found = guard(torch.tensor([[good], [bad]]), logits)
    for row, before in enumerate(("good1", "bad1")):
        top = logits[row].topk(10).indices.tolist()
        scores = axis.score(encoder, [f"{before} {NAMES[t - 3]}" for t in top])
        expected = {t for t, s in zip(top, scores, strict=True) if s >= 0}
        assert set(torch.isfinite(found[row]).nonzero().flatten().tolist()) == expected
        assert all(found[row, t] == logits[row, t] for t in expected)


def test_drawing_one_by_one_is_drawing_among_those_kept(judge: tuple[Model, Axis], writer: Model) -> None:
    """The frequencies of drawn tokens are the softmax over the candidates that a guard without a generator keeps."""
    encoder, axis = judge
    logits = torch.randn(1, 97, generator=torch.Generator().manual_seed(3)) * 1.5
    logits[:, :3] = logits[:, len(NAMES) + 3 :] = -50
    ids = torch.tensor([[3 + NAMES.index("start.")]])
    every = AxisGuard(axis, encoder, writer.tokenizer, threshold=0.1, top_k=12)
    expected = every(ids, logits)[0].softmax(-1)
    some = AxisGuard(axis, encoder, writer.tokenizer, threshold=0.1, top_k=12, draw=torch.Generator().manual_seed(0))
    n = 4000
    drawn = some(ids.expand(n, 1), logits.expand(n, -1))
    assert (torch.isfinite(drawn).sum(1) == 1).all()
    frequency = torch.isfinite(drawn).float().mean(0)
    assert (frequency - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    assert 0 < every.dropped < 12 and some.candidates < n * 12 and some.rescued == 0
    strict = AxisGuard(axis, encoder, writer.tokenizer, threshold=9.0, top_k=12, draw=torch.Generator().manual_seed(0))
    best = AxisGuard(axis, encoder, writer.tokenizer, threshold=9.0, top_k=12)
    assert torch.equal(torch.isfinite(strict(ids, logits)), torch.isfinite(best(ids, logits)))
    assert strict.rescued == 1 and strict.candidates == strict.dropped == 12


def test_half_a_character_is_no_offence(judge: tuple[Model, Axis], writer: Model) -> None:
    guard = AxisGuard(judge[1], judge[0], writer.tokenizer, threshold=9.0)
    assert guard._scores(["\ufffd", "", '"']) == [np.inf] * 3


def test_where_nothing_is_good_enough_the_best_is_taken(judge: tuple[Model, Axis], writer: Model) -> None:
    encoder, axis = judge
    guard = AxisGuard(axis, encoder, writer.tokenizer, threshold=9.0, top_k=15)
    logits = torch.randn(1, 97, generator=torch.Generator().manual_seed(2))
    logits[:, :3] = logits[:, len(NAMES) + 3 :] = -50
    ids = torch.tensor([[3 + NAMES.index("start.")]])
    found = guard(ids, logits)
    top = logits[0].topk(15).indices.tolist()
    # The sentence ends with "start.", so that the candidate alone is judged.
    best = top[int(np.argmax(axis.score(encoder, [f"start. {NAMES[t - 3]}" for t in top])))]
    assert torch.isfinite(found[0]).nonzero().flatten().tolist() == [best] and guard.rescued == 1


def test_only_the_sentence_being_written_is_judged(judge: tuple[Model, Axis], writer: Model) -> None:
    guard = AxisGuard(judge[1], judge[0], writer.tokenizer)
    assert guard._judged("A bad thing. It was", "A bad thing. It was good") == "It was good"
    assert guard._judged("A bad thing.", "A bad thing. It") == "A bad thing. It"
    assert guard._judged('He "left." Then', 'He "left." Then he') == "Then he"
    whole = AxisGuard(judge[1], judge[0], writer.tokenizer, scope="text")
    assert whole._judged("A bad thing. It was", "A bad thing. It was good") == "A bad thing. It was good"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_push_adds_the_gap_at_every_position(family: str) -> None:
    model = spoken(family)
    numbers = [f"w{i}" for i in range(1, 33)]
    concept = Concept("halves", tuple(numbers[:16]), tuple(numbers[16:]))
    axis = direction(model, concept, "mean-difference", "mean@1", permutations=0, draws=0)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.run(ids, capture=[("resid_post", 1), ("resid_post", 2)])
    with pushed(model, axis, 2.0):
        changed = model.run(ids, capture=[("resid_post", 1), ("resid_post", 2)])
    added = changed[("resid_post", 1)] - plain[("resid_post", 1)]
    expected = torch.from_numpy(axis.vector) * 2.0 * axis.gap
    torch.testing.assert_close(added[0], expected.expand(4, -1), atol=1e-5, rtol=1e-4)
    assert not torch.equal(changed[("resid_post", 2)], plain[("resid_post", 2)])
    again = model.run(ids, capture=[("resid_post", 2)])
    torch.testing.assert_close(again[("resid_post", 2)], plain[("resid_post", 2)], atol=0, rtol=0)


def test_a_push_holds_while_generating_with_a_cache() -> None:
    """Token by token with a cache, the model writes what one whole pass with the same push would choose."""
    model = spoken("llama")
    numbers = [f"w{i}" for i in range(1, 33)]
    axis = direction(model, Concept("h", tuple(numbers[:16]), tuple(numbers[16:])), reading="mean@1", draws=0)
    ids = torch.tensor([[5, 6, 7]])
    with pushed(model, axis, 4.0):
        out = model.hf.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=2
        )
        whole = model.hf(input_ids=out).logits.argmax(-1)
    free = model.hf.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=2
    )
    assert whole[0, 2:-1].tolist() == out[0, 3:].tolist()
    assert out.tolist() != free.tolist()


def test_axes_of_other_models_and_places_are_refused(judge: tuple[Model, Axis], writer: Model) -> None:
    encoder, axis = judge
    with pytest.raises(VesaliusError, match="another space"):
        AxisGuard(axis, writer, writer.tokenizer)
    with pytest.raises(VesaliusError, match="another space"), pushed(writer, axis):
        pass
    with pytest.raises(VesaliusError, match="not a direction of a block's residual stream"), pushed(encoder, axis):
        pass
    with pytest.raises(VesaliusError, match="top_k 0"):
        AxisGuard(axis, encoder, writer.tokenizer, top_k=0)
