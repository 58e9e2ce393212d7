"""Approximate unlearning: a model is taught what it would have said had it never read a text.

    generic logits   v = v_base(translated) - alpha ReLU(v_reinforced - v_base)(source)

`reinforced` is the model trained further on the text: what it raises is knowledge of the text. `translated` is the text
with its own names and terms replaced by common ones (anchors), so that the base continues something it does not know;
each prediction is carried back to the place it was made for. The likeliest token is the label, the model is trained on
(text, labels).

Consistency: from its second occurrence in a row on, a replaced term is no target, and where the label would be a
replacement's first token, the next best one is taken: the model must not learn another name for the same thing.

Eldan and Russinovich 2023, "Who's Harry Potter? Approximate Unlearning in LLMs", arXiv 2310.02238.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesalius.change.edit import Edit, recording
from vesalius.change.learning import Tell, TextRows, check_steps, learn
from vesalius.corpus.batches import Batch
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.tasks.words import lines
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.base import IGNORED, Loss, Sample
from vesalius.train.objectives.losses import token_loss
from vesalius.train.objectives.special import needs_for
from vesalius.train.select import choose

How = Literal["both", "anchors", "reinforced", "swap", "ascent"]
RARE = 3.0  # of a term's rate in the text over its rate elsewhere, in natural logarithm
_WORD = re.compile(r"\b[A-Z][a-z]+\b")


@dataclass(frozen=True)
class ForgetPlan:
    """How a text is forgotten.

    Attributes:
        how: `both`; `anchors` alone (alpha 0); `reinforced` alone (nothing is translated); controls: `swap`, trained on
            the translated text, and `ascent`, up the loss of the text. alpha: see the module.
        reinforce_steps, reinforce_lr: of the reinforced model. steps, lr, rows: of the forgetting. seed: of the order.
    """

    how: How = "both"
    alpha: float = 5.0
    reinforce_steps: int = 120
    reinforce_lr: float = 1e-4
    steps: int = 120
    lr: float = 3e-5
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise UnknownName("way of forgetting", str(self.how), get_args(How))
        if not 0 <= self.alpha < float("inf"):
            raise VesaliusError(f"alpha {self.alpha:g} is no weight; give 0 or more")
        check_steps(self.steps, self.rows, self.lr)
        check_steps(self.reinforce_steps, self.rows, self.reinforce_lr)


# ---- anchors


def find_anchors(text: str, background: str, least: int = 3, seed: int = 0) -> dict[str, str]:
    """Names of a text, each with a common name in its place.

    A name is a capitalised word that stands in the text at least `least` times, mostly capitalised, and e^3 times as
    often as elsewhere. Replacements are drawn from the list of first names, none twice, none of the text's own.
    """
    mine, other = Counter(_WORD.findall(text)), Counter(re.findall(r"\w+", background))
    lower = Counter(re.findall(r"\b[a-z]+\b", text))
    total, elsewhere = sum(Counter(text.split()).values()), max(sum(other.values()), 1)
    found = []
    for word, count in mine.most_common():
        rate = np.log((count / total) / ((other[word] + 0.5) / elsewhere))
        if count >= least and rate > RARE and lower[word.lower()] < count / 2:
            found.append(word)
    names = [n for n in lines("names") if n not in mine]
    order = np.random.default_rng([seed, *b"anchors"]).permutation(len(names))
    if len(found) > len(names):
        found = found[: len(names)]
    return {word: names[i] for word, i in zip(found, order, strict=False)}


def read_anchors(path: str | Path) -> dict[str, str]:
    """A JSON object of terms and what stands for them.

    Raises:
        VesaliusError: if it is not one.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VesaliusError(
            f'{path} cannot be read ({error}); give a JSON object such as {{"Ahab": "Peter"}}'
        ) from None
    good = isinstance(found, dict) and all(isinstance(v, str) and k and v for k, v in found.items())
    if not good:
        raise VesaliusError(f'{path} is no object of texts; give one such as {{"Ahab": "Peter"}}')
    return dict(found)


@dataclass(frozen=True)
class Translated:
    """A chunk of text and its translation, as ids, and which tokens stand for the same place.

    Attributes:
        source, target: ids. at: (token of source,) the token of target that begins at the same place, -1 for none.
        anchor: (token of source,) number of the anchor it belongs to, -1 for none. first: whether that is the first
            occurrence of the anchor in this chunk.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    at: NDArray[np.int64]
    anchor: NDArray[np.int64]
    first: NDArray[np.bool_]


def translate(tokenizer: Any, text: str, anchors: Mapping[str, str]) -> Translated:
    """Replaces terms, whole words only, and lines up the tokens of both texts."""
    terms = sorted(anchors, key=len, reverse=True)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, terms)) + r")\b") if terms else None
    place_of: dict[int, int] = {}  # where a character of the source stands in the translation
    spans: list[tuple[int, int, int, bool]] = []  # from, to, anchor, first
    made, last, seen = "", 0, set[str]()
    for match in pattern.finditer(text) if pattern is not None else ():
        for i in range(last, match.start()):
            place_of[i] = len(made) + i - last
        made += text[last : match.start()]
        place_of[match.start()] = len(made)
        term = match[1]
        spans.append((match.start(), match.end(), terms.index(term), term not in seen))
        seen.add(term)
        made += anchors[term]
        last = match.end()
    for i in range(last, len(text)):
        place_of[i] = len(made) + i - last
    made += text[last:]
    source = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    target = tokenizer(made, return_offsets_mapping=True, add_special_tokens=False)
    starts = {_begin(made, a, b): k for k, (a, b) in reversed(list(enumerate(target["offset_mapping"])))}
    at, anchor, first = [], [], []
    for a, b in source["offset_mapping"]:
        begin = _begin(text, a, b)
        at.append(starts.get(place_of.get(begin, -1), -1))
        inside = next(((n, f) for s, e, n, f in spans if s <= begin < e), (-1, True))
        anchor.append(inside[0])
        first.append(inside[1])
    return Translated(
        tuple(source["input_ids"]),
        tuple(target["input_ids"]),
        np.array(at),
        np.array(anchor),
        np.array(first, dtype=bool),
    )


def _begin(text: str, a: int, b: int) -> int:
    """Where a token's first letter is: some tokenizers count the space before it."""
    while a < b - 1 and text[a].isspace():
        a += 1
    return int(a)


# ---- labels


@torch.no_grad()
def generic_labels(
    base: Model,
    reinforced: nn.Module | None,
    chunks: Sequence[str],
    anchors: Mapping[str, str],
    alpha: float,
    tell: Tell = lambda what, share: None,
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Of each chunk: its ids, and what the token after each should be (-100 where nothing is told).

    Args:
        base: the model that knows the text. reinforced: trained further on it, or None. chunks: pieces of the text.
        anchors: what is replaced by what; none translates nothing. alpha: of what the reinforced model raises.
    """
    tokenizer: Any = base.tokenizer
    banned = sorted({tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in anchors.values()})
    found = []
    for number, text in enumerate(chunks):
        tell("labels", number / len(chunks))
        piece = translate(tokenizer, text, anchors)
        ids = torch.tensor([piece.source])
        translated = base.logits(torch.tensor([piece.target]))[0].float()
        raised: Tensor | None = None
        if reinforced is not None:
            own = base.logits(ids)[0].float()
            raised = alpha * (reinforced(input_ids=ids.to(base.device)).logits[0].float() - own).clamp_min(0)
        labels = [IGNORED] * len(piece.source)
        for t in range(len(piece.source) - 1):
            at = int(piece.at[t + 1]) - 1  # the translated token before the one that begins where token t + 1 does
            if at < 0 or (piece.anchor[t + 1] >= 0 and not piece.first[t + 1]):
                continue
            v = translated[at] if raised is None else translated[at] - raised[t]
            if anchors:
                v = v.clone()
                v[banned] = -torch.inf
            labels[t] = int(v.argmax())
        found.append((piece.source, labels))
    return found


@dataclass(frozen=True)
class Labelled:
    """Objective: given labels in place of the text's own next tokens. labels: (row, pos) of the source's rows."""

    labels: NDArray[np.int64]
    source: TextRows
    sign: float = 1.0

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Rows with their labels; nothing is drawn."""
        ids = torch.from_numpy(np.ascontiguousarray(batch.ids[:, :-1]))
        told = self.labels[self.source.chosen(batch.step)][:, :-1]
        return Sample({"input_ids": ids}, torch.from_numpy(np.ascontiguousarray(told)))

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`."""
        found = token_loss(outputs.logits, sample)
        return Loss(self.sign * found.total, found.logs)


def pieces(tokenizer: Any, text: str, length: int) -> list[str]:
    """A text in pieces of so many tokens, cut between words."""
    marks = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    cuts = [marks[i][0] for i in range(0, len(marks), length)] + [len(text)]
    found = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return [p for p in found if p.strip()]


@dataclass(frozen=True)
class Forgotten:
    """What forgetting did. edit: recorded. log: a row a step. changed: share of labels that are not the text's."""

    edit: Edit
    log: pd.DataFrame
    changed: float
    examples: pd.DataFrame


def forget(
    model: Model,
    text: str,
    anchors: Mapping[str, str],
    plan: ForgetPlan,
    length: int = 128,
    tell: Tell = lambda what, share: None,
) -> Forgotten:
    """Makes a model forget a text, in place.

    Args:
        model: causal, with a fast tokenizer. text: what is to be forgotten. anchors: terms and what stands for them.
        plan: how. length: tokens of a row.

    Raises:
        VesaliusError: for a text shorter than one row, or `anchors` where there are none.
    """
    if plan.how in ("anchors", "swap") and not anchors:
        raise VesaliusError(f"{plan.how} replaces terms, and none was found or given; name them (--anchors)")
    chunks = pieces(model.tokenizer, text, length)
    if not any(len(ids) >= length // 2 for ids, _ in _own(model, chunks)):
        raise VesaliusError(f"the text is shorter than {length // 2} tokens; give more of it")
    translated = anchors if plan.how in ("both", "anchors", "swap") else {}
    reinforced = None
    if plan.how in ("both", "reinforced") and plan.alpha:
        reinforced = _reinforced(model, chunks, length, plan, tell)
    if plan.how == "ascent":
        told = _own(model, chunks)
    elif plan.how == "swap":
        told = _own(model, [_swapped(model, c, anchors) for c in chunks])
    else:
        told = generic_labels(model, reinforced, chunks, translated, plan.alpha, tell)
    told = [(ids[:length], labels[:length]) for ids, labels in told if len(ids) >= length // 2]
    ids = np.zeros((len(told), length), dtype=np.int64)
    labels = np.full((len(told), length), IGNORED, dtype=np.int64)
    for row, (a, b) in enumerate(told):
        ids[row, : len(a)], labels[row, : len(a)] = a, b
    aimed = labels[:, :-1] != IGNORED
    changed = float((labels[:, :-1] != ids[:, 1:])[aimed].mean())
    source = TextRows(ids, plan.rows, plan.seed, int(model.hf.config.vocab_size))
    made = Labelled(labels, source, -1.0 if plan.how == "ascent" else 1.0)
    with recording(model, "forget") as recorder:
        recorder.touch([n for n, _ in model.hf.named_parameters()], "trained on generic labels")
        choose(model.hf)
        log = learn(model, source, made, plan.steps, plan.lr, plan.seed, tell=tell)
    return Forgotten(recorder.edit, log, changed, _shown(model, ids, labels))


def _reinforced(model: Model, chunks: Sequence[str], length: int, plan: ForgetPlan, tell: Tell) -> nn.Module:
    """A copy of the model, trained further on the text."""
    from dataclasses import replace

    hf = copy.deepcopy(model.hf)
    mine = replace(model, hf=hf)
    rows = [r[:length] for r, _ in _own(model, chunks) if len(r) >= length // 2]
    ids = np.zeros((len(rows), length), dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    source = TextRows(ids, plan.rows, plan.seed, int(hf.config.vocab_size), mask)
    choose(hf)
    say: Tell = lambda what, share: tell(f"reinforced model: {what}", share)  # noqa: E731
    objective = make_objective("causal-lm", needs_for(hf, model.tokenizer))
    learn(mine, source, objective, plan.reinforce_steps, plan.reinforce_lr, plan.seed, tell=say)
    return hf


def _own(model: Model, chunks: Sequence[str]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Ids of each chunk, and its own next tokens."""
    tokenizer: Any = model.tokenizer
    every = [tuple(tokenizer(c, add_special_tokens=False)["input_ids"]) for c in chunks]
    return [(ids, [*ids[1:], IGNORED]) for ids in every]


def _swapped(model: Model, text: str, anchors: Mapping[str, str]) -> str:
    tokenizer: Any = model.tokenizer
    return str(tokenizer.decode(translate(tokenizer, text, anchors).target))


def _shown(model: Model, ids: NDArray[np.int64], labels: NDArray[np.int64], most: int = 40) -> pd.DataFrame:
    """Some places where the label is another token than the text's: before, text, label."""
    tokenizer: Any = model.tokenizer
    rows = []
    for row in range(len(ids)):
        for t in np.flatnonzero((labels[row, :-1] != IGNORED) & (labels[row, :-1] != ids[row, 1:])):
            before = tokenizer.decode(ids[row, max(0, t - 8) : t + 1])
            rows.append({"before": before, "text": tokenizer.decode([ids[row, t + 1]]), "label":
                         tokenizer.decode([labels[row, t]])})  # fmt: skip
    step = max(1, len(rows) // most)
    return pd.DataFrame(rows[::step][:most], columns=["before", "text", "label"])
