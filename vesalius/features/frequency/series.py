"""What every MLP unit does at every word of a stream of sentences.

A unit's activation at a word is the mean over the word's tokens of what the MLP's last matrix multiplies (for gated
MLPs: act(gate) * up). Streams longer than the model's context are cut into chunks; each begins with sentences that are
read and not measured, so that no sentence stands at a chunk's beginning. What grows or falls with the position alone is
taken out as a line through each chunk.

Every sentence is read in several random orders, and its activations are averaged over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import detrend

from vesalius.errors import ModelError, VesaliusError
from vesalius.features.frequency.stimuli import Sentence, control
from vesalius.features.vectors import Progress
from vesalius.model import Model, Site

Floats32 = NDArray[np.float32]
LEAD = 4  # sentences read and not measured at the beginning of a chunk
CHUNK_TOKENS = 1024  # of one pass, or the model's context if that is shorter


@dataclass(frozen=True)
class Series:
    """Activations of all units at all words.

    Attributes:
        by_sentence: (layer, unit, sentence, word), mean over the orders; halves: the same over every second order.
        by_time: (layer, unit, time), mean over the orders of what stood at that time, whatever the sentence.
        sentences: as given. orders: how many random orders. tokens: read in all of them. layers: numbers of the blocks.
    """

    by_sentence: Floats32
    halves: tuple[Floats32, Floats32]
    by_time: Floats32
    sentences: tuple[Sentence, ...]
    orders: int
    tokens: int
    layers: tuple[int, ...]


def unit_series(
    model: Model,
    sentences: Sequence[Sentence],
    orders: int = 20,
    seed: int = 0,
    kind: str = "",
    progress: Progress | None = None,
) -> Series:
    """Reads the sentences in random orders.

    Args:
        model: a causal model or an encoder, with its fast tokenizer.
        sentences: of one length. orders: random orders of them, 2 or more.
        kind: a control (see `stimuli`); "" for the sentences as they are.

    Raises:
        VesaliusError: if a few sentences do not fit into the model's context.
    """
    if orders < 2:
        raise VesaliusError(f"{orders} order of the sentences leaves no halves to compare; give 2 or more")
    stack = "enc" if "enc" in model.anatomy.stacks else model.anatomy.main.prefix
    layers = tuple(range(len(model.anatomy.stacks[stack].blocks)))
    n, k = len(sentences), len(sentences[0])
    rng = np.random.default_rng([seed, *f"orders/{kind}".encode()])
    place: list[Floats32] = []
    time: Floats32 | None = None
    tokens = 0
    words = control(kind, sentences, rng) if kind else list(sentences)  # once: every order reads the same sentences
    for turn in range(orders):
        order = rng.permutation(n)
        found, read = _stream(model, [words[i] for i in order], stack, layers)  # (layer, unit, time)
        tokens += read
        if time is None:
            time = np.zeros_like(found)
            place = [np.zeros((*found.shape[:2], n, k), dtype=np.float32) for _ in range(2)]
        time += found
        place[turn % 2][:, :, order] += found.reshape(*found.shape[:2], n, k)
        if progress is not None:
            progress(turn + 1, orders)
    assert time is not None

    def mean(total: Floats32, count: int) -> Floats32:
        return np.asarray(total / count, dtype=np.float32)

    halves = (mean(place[0], -(-orders // 2)), mean(place[1], orders // 2))
    whole = mean(np.asarray(place[0] + place[1], dtype=np.float32), orders)
    return Series(whole, halves, mean(time, orders), tuple(sentences), orders, tokens, layers)


def untrained(model: Model, seed: int = 0) -> Model:
    """A model of the same architecture whose weights are as they were before training: the class's own random ones."""
    before = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        made = type(model.hf)(model.hf.config)
    finally:
        torch.set_rng_state(before)
    made = made.to(device=model.device, dtype=model.dtype)
    return Model.wrap(made, model.tokenizer, name=f"{model.name}, random weights")


def _stream(model: Model, sentences: Sequence[Sentence], stack: str, layers: Sequence[int]) -> tuple[Floats32, int]:
    """Activations (layer, unit, time) over the words of the sentences in this order, and how many tokens were read."""
    tokenizer = model.tokenizer
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{model.name} has no fast tokenizer, so words and tokens cannot be matched")
    limit = model.n_positions
    room = min(limit or CHUNK_TOKENS, CHUNK_TOKENS) - 2  # a tokenizer may add special tokens on both sides
    lengths = [len(tokenizer(" " + " ".join(s), add_special_tokens=False)["input_ids"]) for s in sentences]
    n, k, lead = len(sentences), len(sentences[0]), min(LEAD, len(sentences))
    longest = max(lengths)
    if longest * (lead + 1) > room:
        raise VesaliusError(
            f"{lead + 1} sentences of up to {longest} tokens do not fit into the context of {model.name} ({room + 2} "
            "tokens at once); give shorter sentences"
        )
    pieces: list[Floats32] = []
    read = begin = 0
    while begin < n:
        before = [(begin - lead + i) % n for i in range(lead)]
        used, end = sum(lengths[i] for i in before), begin
        while end < n and used + lengths[end] <= room:
            used += lengths[end]
            end += 1
        words = [w for i in (*before, *range(begin, end)) for w in sentences[i]]
        found, count = _words(model, words, lead * k, stack, layers)
        pieces.append(np.asarray(detrend(found, axis=2, overwrite_data=True), dtype=np.float32))
        read += count
        begin = end
    return np.concatenate(pieces, axis=2), read


def _words(model: Model, words: Sequence[str], skip: int, stack: str, layers: Sequence[int]) -> tuple[Floats32, int]:
    """One pass: activations (layer, unit, word) of the words after the first `skip`."""
    text = " ".join(words)
    tokenizer: Any = model.tokenizer
    coded = tokenizer(text, add_special_tokens=model.kind != "causal", return_offsets_mapping=True)
    ends = np.cumsum([len(w) + 1 for w in words])  # where the next word begins
    weights = torch.zeros(len(words), len(coded["input_ids"]))
    for at, (low, high) in enumerate(coded["offset_mapping"]):
        if high > low and text[low:high].strip():
            first = low + len(text[low:high]) - len(text[low:high].lstrip())
            weights[int(np.searchsorted(ends, first, side="right")), at] = 1
    missing = (weights.sum(1) == 0).nonzero()
    if len(missing):
        raise VesaliusError(f"the word {words[int(missing[0])]!r} has no token of its own; leave out its sentence")
    known = torch.tensor([i != tokenizer.unk_token_id for i in coded["input_ids"]], dtype=weights.dtype)
    unknown = (weights @ known == 0).nonzero()
    if len(unknown):
        word = words[int(unknown[0])]
        raise VesaliusError(f"the word {word!r} is unknown to the tokenizer of {model.name}; leave out its sentence")
    weights = (weights / weights.sum(1, keepdim=True))[skip:]
    pooled: dict[int, Floats32] = {}

    def keep(x: torch.Tensor, layer: int) -> None:
        pooled[layer] = (weights.to(x.device) @ x[0].float()).T.cpu().numpy()  # (unit, word)

    taps = {Site("neurons", n, stack): [partial(keep, layer=n)] for n in layers}
    ids = torch.tensor([coded["input_ids"]])
    decoder = torch.zeros(1, 1, dtype=torch.long) if stack == "enc" else None
    with model.alone():
        model.run(ids, taps=taps, decoder=decoder)
    return np.stack([pooled[n] for n in layers]), len(coded["input_ids"])
