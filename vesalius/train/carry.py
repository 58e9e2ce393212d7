"""Recurrent state that goes on from batch to batch, where a row of text goes on (Languini, arXiv 2309.11197).

In a document-ordered stream each row of a step reads on where it stopped in the step before, and a recurrent model
starts there with the state it had, without a gradient. Rows that do not go on start from nothing. The state is part of
what a checkpoint keeps, so that a run that goes on carries what it would have carried.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vesalius.corpus.batches import Source
from vesalius.errors import VesaliusError
from vesalius.train.parallel import World, unwrap

CARRIED = "carried/"  # before the layer's number, in a checkpoint's tensors


class Carry:
    """The states of all rows of a batch, layer by layer; `commit` makes those after a step those before the next.

    Args:
        model: all of whose layers keep a state of constant size.
        source: with `carries(step)`.
        world: each process has the states of its own rows, and zeros for the others'.
    """

    def __init__(self, model: nn.Module, source: Any, world: World) -> None:
        if world.tensor > 1:
            raise VesaliusError(
                "the state of a recurrent model cannot be carried under tensor parallelism; use --tensor-parallel 1, "
                "or rows without order (data.shuffle: rows)"
            )
        self.model, self.source, self.world = model, source, world
        self.before: dict[int, Tensor] = {}  # by layer, (row, ...)
        self.after: dict[int, Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module, source: Source, world: World) -> Carry | None:
        """For a recurrent model and a source whose rows go on; None otherwise."""
        layers = getattr(getattr(unwrap(model), "config", None), "layer_types", None) or []
        goes_on = getattr(source, "carries", None)
        if goes_on is None or not layers or set(layers) != {"hybrid"} or not goes_on(1).any():
            return None
        return cls(unwrap(model), source, world)

    def cache(self, step: int, rows: slice) -> DynamicCache:
        """What the model is given for some rows of a step; it has no positions, only states."""
        cache = DynamicCache(config=self.model.config)
        keep = torch.from_numpy(self.source.carries(step))[rows]
        if keep.any():
            for layer, state in self.before.items():
                state = state[rows]
                flags = keep.to(state.device).view(-1, *[1] * (state.dim() - 1))
                cache.layers[layer].update_recurrent_state(torch.where(flags, state, 0.0))
        return cache

    def keep(self, cache: DynamicCache, rows: slice) -> None:
        """Takes the states of some rows after a step."""
        for layer, home in enumerate(cache.layers):
            state = home.recurrent_states[0].detach()
            if layer not in self.after:
                self.after[layer] = state.new_zeros(self.source.rows, *state.shape[1:])
            self.after[layer][rows] = state

    def commit(self) -> None:
        """The step was made."""
        self.before, self.after = self.after, {}

    def tensors(self) -> dict[str, Tensor]:
        """The states of all processes' rows, for a checkpoint; called by all."""
        return {f"{CARRIED}{layer}": self.world.sum(state) for layer, state in self.before.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` gave; states of another number of rows (a branch's) are let go."""
        device = next(self.model.parameters()).device
        found = {int(n.removeprefix(CARRIED)): t.to(device) for n, t in tensors.items() if len(t) == self.source.rows}
        self.before = found
