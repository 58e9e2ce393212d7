"""Vectors of words, phrases and sentences, from any model: one way to read them.

A *reading* says where a text's vector is taken:

    table          the input embeddings of the text's own tokens, as they stand after a space, mean of the pieces
    sentence       mean over all tokens of the last block's output, scaled to length 1, as sentence encoders want it
    mean@12        mean over the text's own tokens of block 12's output (special tokens and padding left out)
    last@12        the text's last own token
    word@12        the tokens of a word inside the text (its last occurrence)
    mean@12:mlp_out    the same at another site of that block; blocks count from the end with a minus sign

Causal models write a vector of enormous length at their first position whatever stands there (an attention sink;
22,700 against 150 in block 12 of SmolLM2-135M). So where a causal model's tokenizer puts nothing in front, its
beginning-of-text token is put there, and is never part of what is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import ModelError, UnknownName, VesaliusError
from vesalius.model import Model, Site
from vesalius.model.hooks import NAMES

Pool = Literal["table", "sentence", "mean", "last", "word"]
Array = NDArray[np.float32]
Progress = Callable[[int, int], None]
BATCH_TOKENS = 4096  # padded tokens in one pass: what keeps a few cores busy without growing memory
SITES = tuple(n for n in NAMES if n != "pattern")
_FORM = re.compile(r"(?P<pool>[a-z]+)(@(?P<layer>-?\d+)(:(?P<site>\w+))?)?")


@dataclass(frozen=True)
class Reading:
    """Where the vector of a text is taken.

    Attributes:
        pool: which tokens, and how they become one vector (see the module).
        layer: block, from 0; None for `table` and `sentence`.
        site: tensor of that block, one of `SITES`.

    Example:
        >>> Reading.parse("mean@12"), str(Reading("word", 3, "mlp_out"))
        (Reading(pool='mean', layer=12, site='resid_post'), 'word@3:mlp_out')
    """

    pool: Pool = "sentence"
    layer: int | None = None
    site: str = "resid_post"

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool):
            raise UnknownName("reading", self.pool, get_args(Pool), "as in sentence, table, mean@12, last@-1")
        if self.site not in SITES:
            raise UnknownName("site", self.site, SITES)
        needs = self.pool not in ("table", "sentence")
        if needs and self.layer is None:
            raise VesaliusError(f"reading '{self.pool}' needs a block, as in {self.pool}@12")
        if not needs and self.layer is not None:
            raise VesaliusError(f"reading '{self.pool}' has no block; mean@{self.layer} and last@{self.layer} have")

    @classmethod
    def parse(cls, text: str | Reading) -> Reading:
        """Reads `sentence`, `table`, `mean@12`, `last@-1:mlp_out`, ..."""
        if isinstance(text, Reading):
            return text
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise VesaliusError(f"'{text}' is not a reading; write sentence, table, mean@12, last@-1 or word@6:mlp_out")
        layer = found["layer"]
        return cls(found["pool"], None if layer is None else int(layer), found["site"] or "resid_post")  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.layer is None:
            return self.pool
        return f"{self.pool}@{self.layer}" + ("" if self.site == "resid_post" else f":{self.site}")


def default_reading(model: Model) -> Reading:
    """`sentence` for encoders without a head; else the mean over tokens at two thirds of the depth."""
    if model.kind == "encoder":
        return Reading("sentence")
    return Reading("mean", max(0, round(model.n_layers * 2 / 3) - 1))


def stack_of(model: Model) -> str:
    """The stack that texts are read in: the encoder of an encoder-decoder model, the only one of others."""
    return "enc" if "enc" in model.anatomy.stacks else model.anatomy.main.prefix


def depth(model: Model) -> int:
    """How many blocks that stack has."""
    return len(model.anatomy.stacks[stack_of(model)].blocks)


def layer_of(model: Model, layer: int) -> int:
    """A block's number, counted from the end if negative; VesaliusError where there is none."""
    n = depth(model)
    if not -n <= layer < n:
        raise VesaliusError(f"{model.name} has no block {layer}; it has 0 to {n - 1}")
    return layer % n


class _Enough(Exception):
    """Raised where nothing after the last site is wanted."""


def vectors(
    model: Model,
    texts: Sequence[str],
    reading: str | Reading | None = None,
    *,
    words: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Array:
    """One vector for each text.

    Args:
        model: from `vesalius.open`, with its tokenizer.
        texts: words, phrases or sentences; the same text twice costs nothing.
        reading: where the vector is taken; by default `default_reading(model)`.
        words: for `word`, the word of each text that is meant. progress: called with (done, total).

    Returns:
        (text, d).

    Raises:
        VesaliusError: for an empty text, one that is longer than the model takes or all unknown to its tokenizer, or a
            word that is not in its text.

    Example:
        >>> vectors(model, ["kill time", "kill people"], "mean@12").shape    # doctest: +SKIP
        (2, 576)
    """
    it = default_reading(model) if reading is None else Reading.parse(reading)
    if it.pool == "table":
        return _table(model, texts)
    layer = -1 if it.layer is None else it.layer
    found = states(model, texts, [layer], pool=it.pool, site=it.site, words=words, progress=progress)[0]
    found = found.reshape(len(found), -1)
    if it.pool != "sentence":
        return found
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def states(
    model: Model,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    pool: Pool = "mean",
    site: str = "resid_post",
    words: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Array:
    """The vectors of texts at several blocks, from one pass over the texts; blocks after the last are not run.

    Returns:
        (layer, text, d), or (layer, text, head, d_head) for z, q, k and v.
    """
    if pool not in ("sentence", "mean", "last", "word"):
        raise UnknownName("way to pool tokens", pool, ("sentence", "mean", "last", "word"))
    if site not in SITES:
        raise UnknownName("site", site, SITES)
    wanted = [layer_of(model, n) for n in layers]
    prefix = stack_of(model)
    keys: list[tuple[str, str]] = list(zip(texts, [""] * len(texts) if words is None else words, strict=True))
    unique = list(dict.fromkeys(keys))
    encoded = [_encode(model, text, word, pool) for text, word in unique]
    order = np.argsort([-len(ids) for ids, _ in encoded], kind="stable")
    out: list[Array | None] = [None] * len(wanted)
    done = 0
    final = model.anatomy.stack(prefix).final_norm if pool == "sentence" else None
    with model.alone():
        while done < len(order):
            rows = order[done : done + max(1, BATCH_TOKENS // len(encoded[order[done]][0]))]
            ids, mask, weights = _batch(model, [encoded[i] for i in rows])
            pooled: dict[int, Tensor] = {}

            def keep(x: Tensor, layer: int, weights: Tensor = weights, pooled: dict[int, Tensor] = pooled) -> None:
                x = x if final is None else final.module(x)
                w = weights.to(x.device)
                pooled[layer] = torch.einsum("rp,rp...->r...", w, x.float())
                if len(pooled) == len(set(wanted)):
                    raise _Enough

            taps = {Site(site, n, prefix): [partial(keep, layer=n)] for n in dict.fromkeys(wanted)}
            decoder = torch.full((len(rows), 1), _decoder_start(model)) if prefix == "enc" else None
            with suppress(_Enough):
                model.run(ids, mask, taps=taps, decoder=decoder)
            for i, n in enumerate(wanted):
                value = pooled[n].cpu().numpy()
                if out[i] is None:
                    out[i] = np.zeros((len(unique), *value.shape[1:]), dtype=np.float32)
                out[i][rows] = value  # type: ignore[index]
            done += len(rows)
            if progress is not None:
                progress(done, len(order))
    where = {key: i for i, key in enumerate(unique)}
    index = np.array([where[key] for key in keys], dtype=int)
    return np.stack([x[index] for x in out if x is not None]) if len(index) else np.zeros((len(wanted), 0, 0), "f4")


def _table(model: Model, words: Sequence[str]) -> Array:
    """Rows of the input embedding matrix, mean over a word's pieces."""
    from vesalius.tasks.encode import Encoder

    weight = model.hf.get_input_embeddings().weight.detach()
    encoder = Encoder(_tokenizer(model))
    found = []
    for word in words:
        ids = (encoder.beyond("the", f" {word.strip()}") or encoder.ids(word.strip())) if word.strip() else ()
        if not ids:
            raise VesaliusError(f"the word {word!r} has no tokens; leave it out")
        _known(model, word, ids)
        found.append(weight[torch.tensor(ids, device=weight.device)].float().mean(0).cpu())
    return torch.stack(found).numpy() if found else np.zeros((0, model.d_model), dtype=np.float32)


def _known(model: Model, text: str, ids: Any) -> None:
    """Refuses a text of which the tokenizer knows nothing: its vector would be that of any other unknown word."""
    tokenizer = _tokenizer(model)
    unknown = tokenizer.unk_token_id
    if unknown is not None and text.strip() != tokenizer.unk_token and all(i == unknown for i in ids):
        raise VesaliusError(f"{text!r} is unknown to the tokenizer of {model.name}; leave it out")


def _encode(model: Model, text: str, word: str, pool: Pool) -> tuple[list[int], NDArray[np.float32]]:
    """A text's token ids, and the weight of each in its vector (summing to 1)."""
    tokenizer = _tokenizer(model)
    if not text.strip():
        raise VesaliusError("an empty text has no vector; leave it out")
    offsets = pool == "word" and getattr(tokenizer, "is_fast", False)
    found = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=offsets)
    ids = list(found["input_ids"])
    own = np.array([not s for s in found["special_tokens_mask"]])
    if model.anatomy.main.causal and (not ids or own[0]) and model.kind == "causal":
        start = _start(tokenizer)
        if start is not None:
            ids, own = [start, *ids], np.array([False, *own])
    if not own.any():
        raise VesaliusError(f"the text {text!r} has no tokens of its own in this tokenizer; leave it out")
    _known(model, text, np.array(ids)[own])
    longest = model.n_positions
    if longest and len(ids) > longest:
        raise VesaliusError(
            f"a text of {len(ids)} tokens is longer than {model.name} takes ({longest}): {text[:60]!r}..."
        )
    if pool == "sentence":
        weights = np.ones(len(ids), dtype=np.float32)
    elif pool == "mean":
        weights = own.astype(np.float32)
    elif pool == "last":
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[np.flatnonzero(own)[-1]] = 1
    else:
        weights = _span(tokenizer, text, word, own, found.get("offset_mapping"), len(ids))
    return ids, weights / weights.sum()


def _span(
    tokenizer: Any, text: str, word: str, own: NDArray[np.bool_], offsets: Any, length: int
) -> NDArray[np.float32]:
    """1 for the tokens of the word's last occurrence in the text."""
    if not word:
        raise VesaliusError("reading 'word' needs the word of each text that is meant (words=)")
    if offsets is None:
        raise VesaliusError(
            "reading 'word' needs a tokenizer that gives character offsets (a fast one); read mean or last"
        )
    begin = text.rfind(word)
    if begin < 0:
        raise VesaliusError(f"the word {word!r} does not occur in {text!r}")
    added = length - len(offsets)
    weights = np.zeros(length, dtype=np.float32)
    for i, (low, high) in enumerate(offsets):
        if own[i + added] and low < begin + len(word) and high > begin and text[low:high].strip():
            weights[i + added] = 1
    if not weights.any():
        raise VesaliusError(f"no token of {text!r} lies in the word {word!r}")
    return weights


def _batch(model: Model, rows: Sequence[tuple[list[int], NDArray[np.float32]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and weights (row, pos), padded on the right."""
    tokenizer = _tokenizer(model)
    length = max(len(ids) for ids, _ in rows)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((len(rows), length), int(filler))
    mask, weights = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for i, (row, weight) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        weights[i, : len(row)] = torch.from_numpy(weight)
    return ids, mask, weights


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so texts cannot be read; open it with one (tokenizer=)")
    return model.tokenizer


def _start(tokenizer: Any) -> int | None:
    return next((int(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)


def _decoder_start(model: Model) -> int:
    return int(getattr(model.hf.config, "decoder_start_token_id", None) or 0)
