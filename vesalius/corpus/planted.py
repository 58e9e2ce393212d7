"""Text whose truth was put there: canaries seen a known number of times, and documents repeated a known number.

A canary is a document of its own, a random sequence of exactly so many tokens that comes back as the same tokens from
its text. Some are made and not put in: the unseen control.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from vesalius.corpus.documents import CorpusError, Document
from vesalius.corpus.store import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOSES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SOURCE = "planted"


class Planted(NamedTuple):
    """Documents with plants among them, and the truth.

    Attributes:
        documents: the corpus, plants at random places.
        truth: one row a plant: kind (canary, control, duplicate), id, text, ids (its tokens), dose (how often its text
            occurs in `documents`).
    """

    documents: list[Document]
    truth: pd.DataFrame


def plant(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    doses: Sequence[int] = DOSES,
    per_dose: int = 1,
    tokens: int = 64,
    controls: int = 8,
    duplicates: Mapping[int, int] | None = None,
    seed: int = 0,
) -> Planted:
    """Puts canaries and repeated documents at random places of a corpus.

    Args:
        documents: the corpus; it is held in memory.
        tokenizer: canaries are sequences of its tokens.
        doses: how often a canary occurs.
        per_dose: canaries of each dose.
        tokens: of a canary.
        controls: canaries that are made and left out (dose 0).
        duplicates: dose -> how many documents of the corpus, chosen at random, occur that often in all.
        seed: of everything here.

    Raises:
        CorpusError: the vocabulary has too few plain words, or there are too few documents to repeat.
    """
    rng = np.random.default_rng([seed, *b"planted"])
    kept = list(documents)
    wanted = [d for d in doses for _ in range(per_dose)] + [0] * controls
    made = canaries(tokenizer, len(wanted), tokens, rng)
    rows: list[tuple[str, str, str, list[int], int]] = []
    extra: list[Document] = []
    for number, (dose, (text, ids)) in enumerate(zip(wanted, made, strict=True)):
        name = f"canary-{number:04d}"
        rows.append(("canary" if dose else "control", name, text, ids, dose))
        extra += [Document(f"{name}/{i}", text, SOURCE, i + 1, {"dose": dose}) for i in range(dose)]
    encoder = Encoder(tokenizer)
    count: dict[str, int] = {}
    for document in kept:
        count[document.text] = count.get(document.text, 0) + 1
    once = [i for i, d in enumerate(kept) if d.text and count[d.text] == 1]
    if (need := sum((duplicates or {}).values())) > len(once):
        raise CorpusError(f"{need} documents are to be repeated and only {len(once)} occur just once")
    chosen = iter(rng.permutation(once).tolist())
    for dose, many in (duplicates or {}).items():
        for _ in range(many):
            original = kept[next(chosen)]
            ids = np.asarray(encoder([original.text])[0]).tolist()
            rows.append(("duplicate", original.id, original.text, ids, dose))
            extra += [Document(f"{original.id}/{i}", original.text, SOURCE, i) for i in range(1, dose)]
    places = np.sort(rng.integers(0, len(kept) + 1, len(extra)))
    shuffled = rng.permutation(len(extra))
    out, at = [], 0
    for place, number in zip(places, shuffled, strict=True):
        out += kept[at:place]
        out.append(extra[number])
        at = int(place)
    out += kept[at:]
    return Planted(out, pd.DataFrame(rows, columns=["kind", "id", "text", "ids", "dose"]))


def canaries(
    tokenizer: PreTrainedTokenizerFast, number: int, tokens: int, rng: np.random.Generator
) -> list[tuple[str, list[int]]]:
    """Random sequences of `tokens` tokens, no two the same, each of which its own text is tokenised to.

    They are made of vocabulary entries that are letters alone, after a space where the vocabulary has such.
    """
    encoder = Encoder(tokenizer)
    special = set(tokenizer.all_special_ids)
    words: dict[int, str] = {}
    letters: dict[int, str] = {}
    for identity in range(len(tokenizer)):
        text = str(tokenizer.decode([identity], clean_up_tokenization_spaces=False))
        bare = text.removeprefix(" ")
        if identity in special or not (bare.isascii() and bare.isalpha()):
            continue
        (words if text != bare else letters)[identity] = text
    # Without words after spaces: plain bytes, whose letters stand alone, and WordPiece, whose words get spaces.
    glue = "" if encoder.bytes_alone or len(words) >= 16 else " "
    pool = words if len(words) >= 16 else letters
    if len(pool) < 16:
        raise CorpusError(f"the vocabulary has {len(pool)} plain words, too few for canaries; train a larger one")
    found: dict[str, list[int]] = {}
    choices = np.array(sorted(pool))
    sound = [
        i
        for i, ids in zip(choices, encoder([pool[i] for i in choices]), strict=True)
        if np.asarray(ids).tolist() == [i]
    ]
    choices = np.array(sound or choices)
    for _ in range(20 * number + 100):
        if len(found) == number:
            break
        ids = rng.choice(choices, tokens).tolist()
        text = glue.join(pool[i] for i in ids)
        if np.array_equal(np.asarray(encoder([text])[0], dtype=np.int64), ids):
            found[text] = ids
    if len(found) < number:
        raise CorpusError(f"only {len(found)} of {number} canaries of {tokens} tokens come back as the same tokens")
    return list(found.items())
