"""The card of a changed model: the same measures before and after, on the same prompts, with the change's interval.

    yard = Yardstick.of(model, tasks={"ioi": pairs})
    card([measure(model, yard), measure(smaller, yard, base=model)])

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

from vesalius.errors import VesaliusError
from vesalius.model import Model, Pairs
from vesalius.model.memory import memory_errors
from vesalius.model.sweep import BATCH, read_logits
from vesalius.scores import bootstrap_mean
from vesalius.tasks.metrics import accuracy

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
        model: causal. yard: from `Yardstick.of`. base: what it was made of, for the divergence.
        progress: told what is measured, and the share done.

    Raises:
        VesaliusError: if the model writes no next token, or its vocabulary is not the base's.
    """
    if model.kind != "causal" or not model.anatomy.main.head:
        raise VesaliusError(f"{model.name} is {model.kind}; a card tells of causal language models")
    losses, divergences = [], []
    for start in range(0, len(yard.text), TEXT_ROWS):
        progress("plain text", start / len(yard.text))
        ids = yard.text[start : start + TEXT_ROWS]
        with memory_errors("measure shorter or fewer rows"):
            log_p = model.logits(ids)[:, :-1].float().log_softmax(-1)  # (row, pos, vocabulary)
            losses.append(-log_p.gather(-1, ids[:, 1:, None].to(log_p.device))[..., 0].double().mean(1))
            if base is not None:
                log_q = base.logits(ids)[:, :-1].float().log_softmax(-1)
                if log_q.shape != log_p.shape:
                    raise VesaliusError(
                        f"{model.name} has {log_p.shape[-1]} tokens and {base.name} {log_q.shape[-1]}; a divergence "
                        "needs one vocabulary"
                    )
                divergences.append((log_q.exp() * (log_q - log_p)).sum(-1).double().mean(1))
    right = {}
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


def sizes_of(model: Model) -> dict[str, float]:
    """Parameters, those that are not zero, and bytes; of tied weights once."""
    tensors = list(model.hf.parameters())
    return {
        "parameters": sum(t.numel() for t in tensors),
        "not zero": sum(int(torch.count_nonzero(t)) for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
    }


def speed(model: Model, prefill: int = PREFILL, decode: int = DECODE) -> dict[str, float]:
    """Milliseconds to read a prompt, and for each token written after it with the cache: medians of seven turns."""
    longest = int(getattr(model.hf.config, "max_position_embeddings", 0) or prefill + decode)
    prefill = min(prefill, longest - decode)
    if prefill < 1:
        return {}
    ids = torch.randint(0, int(model.hf.config.vocab_size), (1, prefill), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    reading, writing = [], []

    def now() -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode(), model.alone():
        for _ in range(TURNS + 1):  # the first warms up
            begun = now()
            out = model.hf(input_ids=ids, use_cache=True)
            read = now()
            token = out.logits[:, -1:].argmax(-1)
            for _ in range(decode):
                out = model.hf(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            reading.append(1e3 * (read - begun))
            writing.append(1e3 * (now() - read) / decode)
    return {"prefill": statistics.median(reading[1:]), "decode": statistics.median(writing[1:])}


UNITS = {"parameters": "", "not zero": "", "bytes": "", "prefill": f"ms, {PREFILL} tokens", "decode": "ms a token"}


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
