"""Entities found whole, and a finetuning that learns them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vesalius.build import build, preset
from vesalius.corpus import train_tokenizer
from vesalius.errors import VesaliusError
from vesalius.evaluate.tagging import Sentence, encode, entity_score, finetune, spans, tag, tagged, token_classifier

LABELS = ("O", "B-PORT", "I-PORT", "B-RFC", "I-RFC")


def test_spans_and_scores_are_those_of_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason="the oracle; pip install seqeval")
    rng = random.Random(0)
    truth = [[rng.choice(LABELS) for _ in range(rng.randint(1, 12))] for _ in range(300)]
    found = [[x if rng.random() < 0.8 else rng.choice(LABELS) for x in row] for row in truth]
    ours = entity_score(truth, found)
    assert ours.precision == pytest.approx(seqeval.precision_score(truth, found))
    assert ours.recall == pytest.approx(seqeval.recall_score(truth, found))
    assert ours.f1 == pytest.approx(seqeval.f1_score(truth, found))
    assert ours.entities == sum(len(spans(row)) for row in truth)


def test_an_entity_counts_only_whole() -> None:
    truth = [["B-RFC", "I-RFC", "O", "B-PORT"]]
    assert entity_score(truth, truth).f1 == 1
    assert entity_score(truth, [["B-RFC", "O", "O", "B-PORT"]])[:3] == (0.5, 0.5, 0.5)
    assert entity_score(truth, [["O"] * 4])[:3] == (0, 0, 0)
    with pytest.raises(VesaliusError, match="one answer for each word"):
        entity_score(truth, [["O"]])


def test_characters_become_words() -> None:
    text = "See RFC 822, port 25."
    found = tagged(text, [(4, 11, "RFC"), (18, 20, "PORT")])
    assert found.words == ("See", "RFC", "822", ",", "port", "25", ".")
    assert found.labels == ("O", "B-RFC", "I-RFC", "O", "O", "B-PORT", "O")
    with pytest.raises(VesaliusError, match="2 words with 1 labels"):
        Sentence(("a", "b"), ("O",))


def rule(rng: random.Random) -> Sentence:
    """Some words are entities, wherever they stand and whatever numbers stand between."""
    kinds = {"telnet": "B-PORT", "smtp": "B-PORT", "ietf": "B-RFC"}
    words = [rng.choice([*kinds, "the", "about", str(rng.randint(0, 9999))]) for _ in range(8)]
    return Sentence(tuple(words), tuple(kinds.get(w, "O") for w in words))


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any]:
    rng = random.Random(1)
    text = [" ".join(rule(rng).words) for _ in range(300)]
    tokenizer = train_tokenizer(text, "bioformer", 300)
    shape = {"layers": 2, "d_model": 32, "heads": 2, "vocab_size": len(tokenizer), "dropout": 0.0}
    return build(preset("tiny-bert", **shape), 0), tokenizer


def test_targets_stand_on_first_pieces(encoder: tuple[Any, Any]) -> None:
    _, tokenizer = encoder
    sentence = Sentence(("port", "82937465"), ("O", "B-PORT"))
    batch = encode(tokenizer, [sentence], LABELS, 32)
    pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    first = [p for p, t in zip(pieces, batch["targets"][0].tolist(), strict=True) if t >= 0]
    assert len(first) == 2 and not any(p.startswith("##") for p in first)
    assert len(pieces) > 4  # the number is in several pieces
    assert pieces[0] == "[CLS]" and pieces[-1] == "[SEP]"
    assert int(encode(tokenizer, [sentence], LABELS, 4)["attention_mask"].sum()) == 4


def test_a_rule_is_learned_and_the_encoder_left_alone(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    before = {n: w.clone() for n, w in model.state_dict().items()}
    rng = random.Random(0)
    train, test = [rule(rng) for _ in range(200)], [rule(rng) for _ in range(60)]
    made = finetune(model, tokenizer, train, LABELS, updates=80, lr=3e-3, seed=0)
    truth = [list(s.labels) for s in test]
    assert entity_score(truth, tag(made, tokenizer, test, LABELS)).f1 > 0.95
    blank = token_classifier(model, LABELS).eval()
    assert entity_score(truth, tag(blank, tokenizer, test, LABELS)).f1 < 0.3
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    again = finetune(model, tokenizer, train, LABELS, updates=3, lr=3e-3, seed=0)
    twice = finetune(model, tokenizer, train, LABELS, updates=3, lr=3e-3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), twice.parameters(), strict=True))


def test_a_token_classifier_of_the_same_labels_keeps_its_output_layer(encoder: tuple[Any, Any]) -> None:
    made = token_classifier(encoder[0], LABELS)
    kept, other = token_classifier(made, LABELS), token_classifier(made, [*LABELS, "B-OTHER"])
    assert all(torch.equal(w, kept.state_dict()[n]) for n, w in made.state_dict().items())
    assert kept is not made and other.classifier.weight.shape[0] == len(LABELS) + 1
    other = token_classifier(made, list(reversed(LABELS)))
    assert not torch.equal(other.classifier.weight, made.classifier.weight)
