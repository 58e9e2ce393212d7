"""Token classification: an encoder is finetuned to name spans of text, and scored by entities found whole.

Spans are written over words as B-KIND, I-KIND, O. A word's first piece carries its label and its vote, the other
pieces none (as in Devlin et al. 2018, section 5.3). Precision, recall and F1 count an entity as found when its kind and
both its ends are right (Tjong Kim Sang and De Meulder 2003), in micro-average over kinds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from vesalius.errors import VesaliusError
from vesalius.model.global_attention import global_attention
from vesalius.train.objectives.base import IGNORED
from vesalius.train.schedules import make_schedule

WORD = re.compile(r"[^\W_]+|[^\w\s]|_")  # runs of letters and digits; every other sign alone


@dataclass(frozen=True)
class Sentence:
    """Words, and for each its label: O, B-KIND or I-KIND."""

    words: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words or len(self.words) != len(self.labels):
            raise VesaliusError(f"{len(self.words)} words with {len(self.labels)} labels; give one label for each word")


class Span(NamedTuple):
    """An entity: words start to end - 1."""

    kind: str
    start: int
    end: int


class EntityScore(NamedTuple):
    """Micro-averaged over kinds; 0 where nothing was found or nothing was there."""

    precision: float
    recall: float
    f1: float
    entities: int  # that are there


def tagged(text: str, spans: Sequence[tuple[int, int, str]]) -> Sentence:
    """A sentence from a text and the character spans of its entities (start, end, kind).

    Example:
        >>> tagged("Port 25 is open", [(5, 7, "PORT")]).labels
        ('O', 'B-PORT', 'O', 'O')
    """
    words, labels = [], []
    for match in WORD.finditer(text):
        words.append(match[0])
        inside = next((s for s in spans if s[0] <= match.start() and match.end() <= s[1]), None)
        if inside is None:
            labels.append("O")
        else:
            labels.append(("B-" if match.start() == inside[0] else "I-") + inside[2])
    return Sentence(tuple(words), tuple(labels))


def spans(labels: Sequence[str]) -> list[Span]:
    """The entities of a row of labels; I-KIND after something else opens one too, as in CoNLL's own script.

    Example:
        >>> spans(["B-A", "I-A", "O", "I-B", "B-B"])
        [Span(kind='A', start=0, end=2), Span(kind='B', start=3, end=4), Span(kind='B', start=4, end=5)]
    """
    found: list[Span] = []
    kind, start = "", 0
    for i, label in enumerate([*labels, "O"]):
        prefix, _, name = label.partition("-")
        if kind and (prefix != "I" or name != kind):
            found.append(Span(kind, start, i))
            kind = ""
        if prefix in ("B", "I") and not kind:
            kind, start = name, i
    return found


def entity_score(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> EntityScore:
    """Entities found whole, over all rows.

    Raises:
        VesaliusError: if rows or their lengths differ.
    """
    if len(truth) != len(found) or any(len(a) != len(b) for a, b in zip(truth, found, strict=True)):
        raise VesaliusError("truth and answers have different rows or lengths; give one answer for each word")
    counts: Counter[str] = Counter()
    for a, b in zip(truth, found, strict=True):
        there, said = set(spans(a)), set(spans(b))
        counts.update(there=len(there), said=len(said), both=len(there & said))
    precision = counts["both"] / counts["said"] if counts["said"] else 0.0
    recall = counts["both"] / counts["there"] if counts["there"] else 0.0
    f1 = 2 * precision * recall / (precision + recall) if counts["both"] else 0.0
    return EntityScore(precision, recall, f1, counts["there"])


def token_classifier(model: PreTrainedModel, labels: Sequence[str]) -> PreTrainedModel:
    """A new token classifier with the body of an encoder; its output layer is random (torch's generator).

    One that has these labels already keeps its output layer: so it is tuned further.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_labels, config.id2label = len(labels), dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    made: PreTrainedModel = AutoModelForTokenClassification.from_config(config)
    prefix = made.base_model_prefix
    body = getattr(model, prefix, model)
    made_body = getattr(made, prefix)
    kept = {n: w for n, w in body.state_dict().items() if n in made_body.state_dict()}
    missing = [n for n in made_body.state_dict() if n not in kept]
    if missing:
        raise VesaliusError(
            f"{type(model).__name__} lacks {missing[0]} of a token classifier; give an encoder like BERT"
        )
    made_body.load_state_dict(kept)
    if type(model) is type(made) and list(model.config.id2label.values()) == list(labels):
        made.load_state_dict(model.state_dict())
    return made.to(device=next(model.parameters()).device, dtype=torch.float32)


def encode(tokenizer: Any, sentences: Sequence[Sentence], labels: Sequence[str], length: int) -> dict[str, Tensor]:
    """Ids, mask, targets (row, pos) and the word of each target (-1 elsewhere); words beyond `length` are left out."""
    number = {name: i for i, name in enumerate(labels)}
    tokenizer.backend_tokenizer.no_truncation()
    plain = tokenizer([list(s.words) for s in sentences], is_split_into_words=True, add_special_tokens=False)
    width = min(length, 2 + max(len(ids) for ids in plain["input_ids"]))
    shape = (len(sentences), width)
    ids = torch.full(shape, tokenizer.pad_token_id)
    mask, targets, words = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED), torch.full(shape, -1)
    for row, sentence in enumerate(sentences):
        pieces = plain["input_ids"][row][: width - 2]
        ids[row, : len(pieces) + 2] = torch.tensor([tokenizer.cls_token_id, *pieces, tokenizer.sep_token_id])
        mask[row, : len(pieces) + 2] = 1
        before = None
        for place, word in enumerate(plain.word_ids(row)[: len(pieces)], start=1):
            if word is not None and word != before:
                targets[row, place], words[row, place] = number[sentence.labels[word]], word
            before = word
    return {"input_ids": ids, "attention_mask": mask, "targets": targets, "words": words}


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(row, pos, label)."""
    ids = batch["input_ids"]
    out: Tensor = model(input_ids=ids, attention_mask=batch["attention_mask"], **global_attention(model, ids)).logits
    return out


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    sentences: Sequence[Sentence],
    labels: Sequence[str],
    *,
    updates: int,
    lr: float,
    rows: int = 16,
    length: int = 128,
    seed: int = 0,
) -> PreTrainedModel:
    """Trains all weights of a token classifier (see `token_classifier`) and returns it, ready to answer.

    Args:
        model: an encoder, or a token classifier that is to learn more; it is left as it is.
        tokenizer: its fast tokenizer.
        sentences: what it learns from, in an order of its own in each pass.
        labels: all labels, O among them.
        updates: of AdamW, with a rate that rises over a tenth and falls to 0.
        lr: the peak.
        rows: of a batch. length: most tokens of a row. seed: of the output layer, the order and dropout.
    """
    if not sentences:
        raise VesaliusError("there are no sentences to learn from; give at least one")
    torch.manual_seed(seed)
    made = token_classifier(model, labels).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=lr, weight_decay=0.01)
    factor = make_schedule("linear", updates, warmup=0.1, final=0.0)
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for step in range(updates):
        while len(order) < min(rows, len(sentences)):
            order += rng.permutation(len(sentences)).tolist()
        chosen, order = order[:rows], order[rows:]
        batch = encode(tokenizer, [sentences[i] for i in chosen], labels, length)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor(step)
        logits = _logits(made, batch)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return made.eval()


@torch.no_grad()
def tag(
    model: PreTrainedModel,
    tokenizer: Any,
    sentences: Sequence[Sentence],
    labels: Sequence[str],
    rows: int = 64,
    length: int = 128,
) -> list[list[str]]:
    """A label for every word; O for words beyond `length` tokens."""
    found = [["O"] * len(s.words) for s in sentences]
    by_size = sorted(range(len(sentences)), key=lambda i: len(sentences[i].words))
    for at in range(0, len(by_size), rows):
        part = by_size[at : at + rows]
        batch = encode(tokenizer, [sentences[i] for i in part], labels, length)
        answers = _logits(model, batch).argmax(-1)
        for row, place in (batch["words"] >= 0).nonzero().tolist():
            found[part[row]][int(batch["words"][row, place])] = labels[int(answers[row, place])]
    return found
