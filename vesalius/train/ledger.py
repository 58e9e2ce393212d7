"""The compute ledger of a run: tokens, floating-point operations, seconds, memory."""

from __future__ import annotations

import resource
import statistics
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vesalius.train.objectives.base import Sample
from vesalius.train.objectives.samples import model_inputs
from vesalius.train.roles import count

WARM_UP = 5  # steps left out of the throughput


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Both products of attention over all pairs, masked ones too, from the shapes (batch, head, pos, d_head)."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


_MORE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch does not count this one


def flops_per_step(model: nn.Module, sample: Sample, **always: Any) -> int:
    """Floating-point operations of one forward and backward pass over a sample, counted on one of its rows.

    A multiply-add counts as two. The backward pass is taken as twice the forward one.
    """
    device = next(model.parameters()).device
    row = sample[slice(0, 1)].to(device)
    was = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        model(**model_inputs(row, model), **always)
    model.train(was)
    return 3 * int(counter.get_total_flops()) * len(sample)


def six_n_t(model: nn.Module, tokens: int) -> int:
    """The usual estimate 6 N T with N the parameters in matrix products: matrices and the output layer."""
    table = count(model).set_index("role")["parameters"]
    inside: Any = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    output: Any = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    n = int(table["matrix"] + table["head"] + table["adapter"])
    if inside is not None and output is inside:  # tied
        n += int(inside.numel())
    return 6 * n * tokens


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far; on a GPU, what was allocated there at most."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if sys.platform == "darwin" else used * 1024)


@dataclass
class Ledger:
    """What was spent so far; `seconds` counts training steps alone, over all sittings of the run."""

    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    steps: int = 0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=200), repr=False)
    _sitting: int = 0

    def add(self, tokens: int, flops: int, seconds: float) -> None:
        """Counts one step."""
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds
        self.steps += 1
        self._sitting += 1
        if self._sitting > WARM_UP:
            self._recent.append(tokens / seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the last 200 steps after warm-up; None before."""
        return statistics.median(self._recent) if self._recent else None

    def to_json(self) -> dict[str, Any]:
        """For the run's record."""
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            "steps": self.steps,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": peak_memory_bytes(),
        }
