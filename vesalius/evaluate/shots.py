"""Few-shot questions: k examples, then a question whose likeliest answer among some is taken.

    ask -> answer        (k times)
    ask ->               log p(option | all before it), the option of the largest wins

A model that reads what the examples have in common answers better with them than without, and worse when their answers
are exchanged among them. Brown et al. 2020 (arXiv 2005.14165); Chowdhery et al. 2022, PaLM (arXiv 2204.02311); shuffled
labels: Min et al. 2022 (arXiv 2202.12837).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import yaml

from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model

Labels = Literal["true", "shuffled"]
ROWS = 64  # read together
PATTERN = "{ask} -> {answer}\n"


@dataclass(frozen=True)
class Item:
    """A question with its options, the right one first.

    Attributes:
        ask: what is asked about. options: answers, the right one first. group: the relation it belongs to.
    """

    ask: str
    options: tuple[str, ...]
    group: str = ""

    @property
    def answer(self) -> str:
        """The right one."""
        return self.options[0]


@cache
def relations() -> dict[str, tuple[Item, ...]]:
    """The items that come with Vesalius by relation: plural, capital, antonym; four options each."""
    text = resources.files("vesalius.evaluate").joinpath("data/relations.yaml").read_text("utf-8")
    found = {}
    for group, lines in yaml.safe_load(text).items():
        found[group] = tuple(Item(str(a), (*map(str, options), str(a)), group) for a, options in lines.items())
    return found


def relation(name: str, held_back: int = 8) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """(items to ask, items to show) of a relation that comes with Vesalius.

    Raises:
        UnknownName: if there is none of that name.
    """
    known = relations()
    if name not in known:
        raise UnknownName("relation", name, known)
    return known[name][:-held_back], known[name][-held_back:]


def examples(
    items: Sequence[Item], k: int, seed: int = 0, labels: Labels = "true", pattern: str = PATTERN
) -> tuple[str, tuple[Item, ...]]:
    """The text of k examples, and the items drawn for it.

    Args:
        items: to draw from.
        k: how many; 0 gives no text.
        seed: of the draw. Shuffled labels keep it, and move every answer to another question.
        labels: true, or shuffled.
        pattern: one example, with {ask} and {answer}.

    Example:
        >>> shown = [Item("hot", ("cold",)), Item("up", ("down",))]
        >>> examples(shown, 2, seed=1, labels="shuffled")[0].split()
        ['hot', '->', 'down', 'up', '->', 'cold']
    """
    if labels not in ("true", "shuffled"):
        raise UnknownName("labels", labels, ("true", "shuffled"))
    if k > len(items) or (labels == "shuffled" and k == 1):
        raise VesaliusError(f"{k} examples of {len(items)} items, labels {labels}: give more items, or another k")
    rng = np.random.default_rng([seed, *b"shots"])
    drawn = tuple(items[i] for i in rng.permutation(len(items))[:k])
    answers = [item.answer for item in drawn]
    if labels == "shuffled" and k:
        answers = answers[1:] + answers[:1]
    text = "".join(pattern.format(ask=i.ask, answer=a) for i, a in zip(drawn, answers, strict=True))
    return text, drawn


def few_shot(
    model: Model,
    items: Sequence[Item],
    shown: Sequence[Item] = (),
    k: int = 0,
    *,
    seed: int = 0,
    labels: Labels = "true",
    pattern: str = PATTERN,
    normalise: Literal["none", "token"] = "none",
    batch: int = ROWS,
) -> pd.DataFrame:
    """Asks every item after k examples.

    Args:
        model: a causal language model with its tokenizer.
        items: what is asked.
        shown: what examples are drawn from; none of it may be asked.
        k: how many examples.
        seed: of the examples. labels: true, or shuffled among the examples.
        pattern: one example; a question is the pattern up to its answer.
        normalise: log-probabilities as they are, or a token.
        batch: rows read together.

    Returns:
        group, ask, answer, said, right, margin (nats between the right option and the best wrong one).

    Raises:
        VesaliusError: if an item is both asked and shown, or the model has no tokenizer.

    Example:
        >>> ask, show = relation("capital")
        >>> few_shot(model, ask, show, k=5)["right"].mean()                          # doctest: +SKIP
        0.9
    """
    if both := {i.ask for i in items} & {i.ask for i in shown}:
        raise VesaliusError(f"'{sorted(both)[0]}' is both asked and shown; take it out of one")
    head, gap = examples(shown, k, seed, labels, pattern)[0], pattern.index("{answer}")
    before = pattern[:gap]
    space = " " if before.endswith(" ") else ""  # a word's space belongs to the word's token
    prompts = [head + before.removesuffix(" ").format(ask=item.ask) for item in items]
    flat = [(p, space + o) for p, item in zip(prompts, items, strict=True) for o in item.options]
    scores = iter(log_probs(model, flat, normalise, batch))
    rows = []
    for item in items:
        each = np.array([next(scores) for _ in item.options])
        best = int(each.argmax())
        margin = float(each[0] - each[1:].max(initial=-np.inf))
        rows.append((item.group, item.ask, item.answer, item.options[best], best == 0, margin))
    return pd.DataFrame(rows, columns=["group", "ask", "answer", "said", "right", "margin"])


def log_probs(
    model: Model,
    pairs: Sequence[tuple[str, str]],
    normalise: Literal["none", "token"] = "none",
    batch: int = ROWS,
) -> np.ndarray[Any, Any]:
    """The log p(answer | prompt) of each (prompt, answer), nats, (pair,).

    What all prompts begin with is read once. A prompt and its answer are tokenised together; the answer's tokens are
    those after the longest beginning that the prompt alone has too.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise VesaliusError(f"{model.name} has no tokenizer, so it cannot be asked in words")
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind}; only a causal language model is asked here")
    whole = [tokenizer(p + a, add_special_tokens=False)["input_ids"] for p, a in pairs]
    alone = [tokenizer(p, add_special_tokens=False)["input_ids"] for p, _ in pairs]
    starts = [_common(w, p) for w, p in zip(whole, alone, strict=True)]  # of the answer's tokens
    if (
        none := next((i for i, (w, s) in enumerate(zip(whole, starts, strict=True)) if s in (0, len(w))), None)
    ) is not None:
        raise VesaliusError(f"the pair {pairs[none]!r} has no prompt or no answer in tokens; give both some text")
    shared = min(min(starts) - 1, min(_common(whole[0], w) for w in whole))
    found = np.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: len(whole[i]))  # rows of a batch are about as long
    with torch.inference_mode(), model.alone():
        past = (
            model.hf(**model.inputs(torch.tensor([whole[0][:shared]])), use_cache=True).past_key_values
            if shared
            else None
        )
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            found[chosen] = _read(model, [whole[i] for i in chosen], [starts[i] for i in chosen], shared, past)
    if normalise == "token":
        found /= [len(w) - s for w, s in zip(whole, starts, strict=True)]
    return found


def _read(model: Model, rows: list[list[int]], starts: list[int], shared: int, past: Any) -> np.ndarray[Any, Any]:
    """Summed log-probabilities of each row from its start on, the first `shared` tokens being read already."""
    width = max(map(len, rows))
    ids = torch.tensor(
        [row[shared:] + [row[-1]] * (width - len(row)) for row in rows]
    )  # what fills up is not looked at
    mine = copy.deepcopy(past)
    if mine is not None:
        mine.batch_repeat_interleave(len(rows))
    more = {} if mine is None else {"past_key_values": mine, "use_cache": True}
    logits = model.hf(**model.inputs(ids), **more).logits.float()  # (row, pos, vocabulary)
    chance = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0].cpu()
    place = torch.arange(shared + 1, width)  # of each token foretold
    inside = (place >= torch.tensor(starts)[:, None]) & (place < torch.tensor([len(r) for r in rows])[:, None])
    return np.asarray((chance.double() * inside).sum(1).numpy())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
