"""The card of a changed model: the same measures before and after, on the same prompts, with the change's interval.

    yard = Yardstick.of(model, tasks={"ioi": pairs})
    card([measure(model, yard), measure(smaller, yard, base=model)])

A causal model foretells each next token of the text, a masked one (BERT) words that are hidden, the same for all.
Losses are compared row by row and answers prompt by prompt, so the interval (95 %, bootstrap) is of the *change*.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.model import Model, Pairs
from vesalius.model.global_attention import global_attention
from vesalius.model.memory import Tally, memory_errors
from vesalius.model.sweep import BATCH, read_logits
from vesalius.scores import bootstrap_mean
from vesalius.tasks.metrics import accuracy
from vesalius.train.masks import PADDING
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.base import IGNORED, Sample
from vesalius.train.objectives.special import masking_for, needs_for

Floats = NDArray[np.float64]
TURNS = 7  # timings, of which the median is told
PREFILL, DECODE = 256, 32  # tokens
TEXT_ROWS = 4  # of a forward pass
COLUMNS = ("metric", "unit", "before", "after", "change", "low", "high", "n")


@dataclass(frozen=True)
class Yardstick:
    """What models are measured on.

    Attributes:
        text: rows of plain text, (row, pos). tasks: prompts by name.
        seed: of the bootstrap. timed: whether speed is measured (otherwise size alone).
    """

    text: Tensor
    tasks: Mapping[str, Pairs] = field(default_factory=dict)
    seed: int = 0
    timed: bool = True

    @classmethod
    def of(
        cls,
        model: Model,
        corpus: str = "foldoc",
        rows: int = 32,
        length: int = 128,
        tasks: Mapping[str, Pairs] | None = None,
        *,
        skip: int = 0,
        seed: int = 0,
        timed: bool = True,
    ) -> Yardstick:
        """Text of a corpus after its first `skip` documents, and tasks."""
        from vesalius.corpus import plain_text

        return cls(plain_text(model, corpus, rows, length, skip), dict(tasks or {}), seed, timed)


@dataclass(frozen=True)
class Measured:
    """One model on a yardstick.

    Attributes:
        name: the model. loss: nats a token of each row. divergence: KL(base || model) of each row, or None.
        right: whether each prompt of a task is answered rightly. sizes: parameters, bytes, milliseconds.
    """

    name: str
    loss: Floats
    divergence: Floats | None
    right: dict[str, NDArray[np.bool_]]
    sizes: dict[str, float]


def measure(
    model: Model,
    yard: Yardstick,
    base: Model | None = None,
    progress: Callable[[str, float | None], object] = lambda text, share: None,
) -> Measured:
    """Measures a model.

    Args:
        model: causal or masked. yard: from `Yardstick.of`. base: what it was made of, for the divergence.
        progress: told what is measured, and the share done.

    Raises:
        VesaliusError: if the model foretells no tokens, or its vocabulary is not the base's.
    """
    if model.kind not in ("causal", "masked") or not model.anatomy.main.head:
        raise VesaliusError(f"{model.name} is {model.kind}; a card tells of models that foretell tokens")
    asked, losses, divergences, hits = foretold(model, yard), [], [], []
    for start in range(0, len(asked), TEXT_ROWS):
        progress("plain text", start / len(asked))
        part = asked[slice(start, start + TEXT_ROWS)].to(model.device)
        valid = part.targets != IGNORED
        with memory_errors("measure shorter or fewer rows"):
            log_p = _log_p(model, part)  # (row, pos, vocabulary)
            nll = -log_p.gather(-1, part.targets.clamp_min(0)[..., None])[..., 0]
            losses.append(_row_means(nll, valid))
            hits.append((log_p.argmax(-1) == part.targets)[valid])
            if base is not None:
                log_q = _log_p(base, part)
                if log_q.shape != log_p.shape:
                    raise VesaliusError(
                        f"{model.name} has {log_p.shape[-1]} tokens and {base.name} {log_q.shape[-1]}; a divergence "
                        "needs one vocabulary"
                    )
                divergences.append(_row_means((log_q.exp() * (log_q - log_p)).sum(-1), valid))
    right = {"hidden words": torch.cat(hits).cpu().numpy()} if model.kind == "masked" else {}
    for name, pairs in yard.tasks.items():
        progress(name, None)
        found = [accuracy(read_logits(model, g, "clean")[0], g).preferred for g in pairs.batches(BATCH)]
        right[name] = torch.cat(found).cpu().numpy()
    sizes = sizes_of(model)
    if yard.timed:
        progress("speed", None)
        sizes |= speed(model)
    kl = torch.cat(divergences).cpu().numpy() if divergences else None
    return Measured(model.name, torch.cat(losses).cpu().numpy(), kl, right, sizes)


def foretold(model: Model, yard: Yardstick) -> Sample:
    """What the text asks of a model: every next token; of a masked one, words hidden by the yardstick's seed.

    A masked model reads [CLS] before a row and [SEP] after it in as many positions, where its tokenizer has both.
    """
    ids = yard.text
    if model.kind == "causal":
        end = torch.full_like(ids[:, :1], IGNORED)
        return Sample({"input_ids": ids}, torch.cat([ids[:, 1:], end], 1))
    if model.tokenizer is None:
        raise VesaliusError(f"{model.name} was opened without a tokenizer, so no words can be hidden; open it with one")
    needs = needs_for(model.hf, model.tokenizer)
    how = masking_for(model.tokenizer)
    objective = make_objective("masked-lm", needs, tokenizer=model.tokenizer, **how)
    text = ids.cpu().numpy()
    if how["frame"] and (text[:, 0] == model.tokenizer.cls_token_id).all():
        text = text[:, 1:]  # the objective puts its own before each row
    rows = np.pad(text, ((0, 0), (0, ids.shape[1] + 1 - text.shape[1])))  # it reads all but the last column
    segments = np.where(np.arange(rows.shape[1]) < text.shape[1], 0, PADDING) + np.zeros_like(rows)
    found: Sample = objective.sample(Batch(0, rows, segments), yard.seed)
    if not found.count():
        raise VesaliusError(f"no word of {len(ids)} rows of {ids.shape[1]} tokens is hidden; give more or longer rows")
    return found


def _log_p(model: Model, part: Sample) -> Tensor:
    return model.logits(part.inputs["input_ids"], part.inputs.get("attention_mask")).float().log_softmax(-1)


def _row_means(each: Tensor, valid: Tensor) -> Tensor:
    """Mean over the targets of each row; rows without any are left out."""
    some = valid.any(1)
    return (each.double() * valid).sum(1)[some] / valid.sum(1)[some]


def sizes_of(model: Model) -> dict[str, float]:
    """Parameters, those that are not zero, and bytes; of tied weights once."""
    tensors = list(model.hf.parameters())
    return {
        "parameters": sum(t.numel() for t in tensors),
        "not zero": sum(int(torch.count_nonzero(t)) for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def speed(model: Model, prefill: int = PREFILL, decode: int = DECODE) -> dict[str, float]:
    """Milliseconds to read a prompt, and for each token a causal model writes after it: medians of seven turns.

    With them the bytes of weights and of all tensors alive at one time while the prompt is read.
    """
    writes = model.kind == "causal"
    decode = decode if writes else 0
    prefill = min(prefill, (model.n_positions or prefill + decode) - decode)
    if prefill < 1:
        return {}
    ids = torch.randint(0, int(model.hf.config.vocab_size), (1, prefill), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    given = {"input_ids": ids, **({"use_cache": True} if writes else global_attention(model.hf, ids))}
    reading, writing = [], []

    def now() -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode(), model.alone():
        for _ in range(TURNS + 1):  # the first warms up
            begun = now()
            out = model.hf(**given)
            read = now()
            reading.append(1e3 * (read - begun))
            if not writes:
                continue
            token = out.logits[:, -1:].argmax(-1)
            for _ in range(decode):
                out = model.hf(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            writing.append(1e3 * (now() - read) / decode)
    with torch.no_grad(), model.alone(), Tally(model.hf) as tally:
        model.hf(**given)
    times = {"prefill": statistics.median(reading[1:])}
    if writes:
        times["decode"] = statistics.median(writing[1:])
    return times | {"peak memory": sizes_of(model)["bytes"] + tally.peak}


UNITS = {
    "parameters": "", "not zero": "", "bytes": "", "peak memory": "bytes, reading", "prefill": f"ms, {PREFILL} tokens",
    "decode": "ms a token",
}  # fmt: skip


def card(before: Measured, after: Measured, seed: int = 0) -> pd.DataFrame:
    """One row a measure: metric, unit, before, after, change, low, high, n.

    Change is after minus before; of perplexity, and of sizes and times, it is the ratio after / before. low, high: 95 %
    interval of the change over rows of text or prompts; none for sizes and times.

    Raises:
        VesaliusError: if the two were not measured on the same yardstick.
    """
    if len(before.loss) != len(after.loss) or {k: len(v) for k, v in before.right.items()} != {
        k: len(v) for k, v in after.right.items()
    }:
        raise VesaliusError(f"{before.name} and {after.name} were measured on different text or prompts")
    rows: list[dict[str, Any]] = []

    def row(metric: str, unit: str, values: Sequence[float], interval: Any = (np.nan, np.nan), n: int = 0) -> None:
        low, high = interval
        rows.append(dict(zip(COLUMNS, (metric, unit, *values, float(low), float(high), n), strict=True)))

    both = [float(np.exp(m.loss.mean())) for m in (before, after)]
    interval = np.exp(bootstrap_mean(after.loss - before.loss, seed))
    row("perplexity", "ratio", [*both, both[1] / both[0]], interval, len(after.loss))
    if after.divergence is not None:
        mean = float(after.divergence.mean())
        row("divergence", "nats a token", [0.0, mean, mean], bootstrap_mean(after.divergence, seed), len(after.loss))
    for name, right in after.right.items():
        was, now = before.right[name].astype(float), right.astype(float)
        values = [was.mean(), now.mean(), (now - was).mean()]
        row(f"{name} accuracy", "share", values, bootstrap_mean(now - was, seed), len(now))
    for name, value in after.sizes.items():
        if name in before.sizes:
            row(name, UNITS.get(name, ""), [before.sizes[name], value, value / before.sizes[name]])
    return pd.DataFrame(rows, columns=list(COLUMNS))


def cards(before: Measured, others: Mapping[str, Measured], seed: int = 0) -> pd.DataFrame:
    """Several changed models beside the same one: the rows of `card`, with a first column `model`."""
    found = [card(before, m, seed).assign(model=name) for name, m in others.items()]
    return pd.concat(found, ignore_index=True)[["model", *COLUMNS]]
