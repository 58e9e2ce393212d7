"""What every mixer promises, and what it is told about the sequence it works on.

y, losses = mixer(x, context)       x, y (batch, pos, d_model); losses: named scalars added to the training loss
y, cache = mixer.step(x, cache)     one position, x and y (batch, d_model)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vesalius.build.architecture import Section

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture

Growth = Literal["n2", "nlogn", "n", "nw"]


class NoOptions(Section):
    """For mixers without settings of their own."""


class Store:
    """A cache of one layer for `Mixer.step`: keys and values so far, or a state of constant size.

    It has the method of transformers' caches that mixers use, so that a mixer need not tell them apart.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.state: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values (batch, head, pos, d) and returns all so far."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values


@dataclass(frozen=True)
class Context:
    """What a mixer may know beside its input.

    Attributes:
        attention_mask: (batch or 1, head or 1, query, key), added to attention scores, position biases included; None
            where nothing is masked but, if `causal`, the future.
        position_ids: (batch or 1, pos); a recurrent mixer starts anew where one is 0, and skips where one is -1
            (padding). None: one sequence without padding.
        position_embeddings: cosine and sine of rotary positions, (batch or 1, pos, rotary dims) each.
        past: cache of what came before, or None. layer: which of its layers is this mixer's.
        source: an encoder's states, (batch, source, d_model), for cross-attention: keys and values come from them, and
            `past` is transformers' EncoderDecoderCache, which keeps them after the first call.
        input_ids, embedding: (batch, pos[, d_model]), for mixers that list them in `needs`.
    """

    causal: bool = True
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    position_embeddings: tuple[Tensor, Tensor] | None = None
    past: Any = None
    layer: int = 0
    source: Tensor | None = None
    input_ids: Tensor | None = None
    embedding: Tensor | None = None


class Mixer(nn.Module):
    """Base of all mixers.

    Class attributes:
        Options: its settings, checked with the architecture. causal, bidirectional: kinds of model it can serve.
        needs_positions: it cannot tell order by itself. growth: of its cost with length.
        recurrent: it keeps a state of constant size, and cannot follow masks between pairs of positions.
        hard_wired: whom its heads read is decided by token ids, not by queries and keys.
        needs: `input_ids`, `embedding`, if it wants them in its context.

    Attributes:
        o: the output projection; its input splits by heads, (batch, pos, head * d_head).
    """

    Options: ClassVar[type[Section]] = NoOptions
    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = False
    needs_positions: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False
    hard_wired: ClassVar[bool] = False
    growth: ClassVar[Growth] = "n2"
    needs: ClassVar[tuple[str, ...]] = ()
    o: nn.Linear

    def __init__(self, architecture: Architecture, config: Any = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.config = config  # transformers' own, for the attention function in use; none outside a model

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def init_cache(self, batch: int) -> Any:
        """An empty cache for `step`."""
        return Store()

    def step(self, x: Tensor, cache: Any, context: Context | None = None) -> tuple[Tensor, Any]:
        """One position x (batch, d_model) after those in the cache; returns the output and the cache."""
        y, _ = self(x.unsqueeze(1), replace(context or Context(), past=cache, layer=0))
        return y.squeeze(1), cache

    @classmethod
    def parameters_of(cls, architecture: Architecture) -> int:
        """How many numbers it learns."""
        raise NotImplementedError

    @classmethod
    def flops(cls, architecture: Architecture, length: int) -> int:
        """Multiplications and additions of matrix products for one sequence of this length, forward."""
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, architecture: Architecture, length: int, itemsize: int = 4) -> int:
        """Bytes kept for one sequence when the next token is to be generated."""
        raise NotImplementedError
