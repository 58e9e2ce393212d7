"""The graph that circuits live in: senders, receivers, and the edges between them.

It is that of edge attribution patching as the MIB benchmark fixes it (arXiv 2504.13151; Syed et al. 2310.10348):

    senders     embed, every head's output, every MLP's output
    receivers   every head's q, k and v input (per query head, also where key-value heads are shared), every MLP's
                input, and unembed
    an edge     from each sender to each receiver that is computed after it

`Universe` holds that rule for one shape of model and numbers the edges without making an object for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import ModelError, PartError, VesaliusError
from vesalius.model.model import Model
from vesalius.parts import Edge, Part
from vesalius.scores import Scores

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Level = Literal["node", "edge"]
SIDES = "qkv"


def universe_of(model: Model) -> Universe:
    """The graph of an opened model.

    Raises:
        ModelError: for encoder-decoder models and those that normalise the residual stream itself: their parts do not
            add up in one stream, so edges are not defined.
    """
    a = model.anatomy
    if a.post_norm or model.kind == "encoder-decoder":
        why = "normalises the residual stream after each sum" if a.post_norm else "has two stacks"
        raise ModelError(f"{model.name} {why}, so edges between its parts are not defined; use --level node")
    return Universe(a.n_layers, a.n_heads, a.parallel)


@dataclass(frozen=True)
class Universe:
    """All parts and edges a circuit of one model can be made of.

    Senders are numbered in the order of computation: embed, then for each block its heads and its MLP. Receivers: for
    each block the q inputs of its heads, the k inputs, the v inputs, the MLP's input; last unembed. So matrices
    (n_senders, n_receivers) mean the same as in MIB's files. Edges are numbered by receiver, then sender.

    Attributes:
        n_layers: number of blocks.
        n_heads: query heads a block.
        parallel: the MLP reads what the block reads, so not its own block's heads (GPT-J, NeoX, Phi).
        attention_only: the model has no MLPs.

    Example:
        >>> Universe(n_layers=12, n_heads=12).n_edges
        32491
    """

    n_layers: int
    n_heads: int
    parallel: bool = False
    attention_only: bool = False

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.n_heads < 1:
            raise VesaliusError(f"{self.n_layers} layers x {self.n_heads} heads is no model; both must be at least 1")

    @property
    def _mlps(self) -> int:
        return 0 if self.attention_only else 1

    @property
    def n_senders(self) -> int:
        """Rows of an edge matrix: embed, heads, MLPs."""
        return 1 + self.n_layers * (self.n_heads + self._mlps)

    @property
    def n_receivers(self) -> int:
        """Columns of an edge matrix: q, k, v of heads, MLPs, unembed."""
        return self.n_layers * (3 * self.n_heads + self._mlps) + 1

    @property
    def n_edges(self) -> int:
        """Number of edges, as MIB counts them."""
        return int(self._offsets[-1])

    @cached_property
    def limits(self) -> Ints:
        """How many senders each receiver reads, (n_receivers,): it reads the first so many."""
        first = 1 + np.arange(self.n_layers) * (self.n_heads + self._mlps)  # senders before each block
        columns = [np.repeat(first[:, None], 3 * self.n_heads, axis=1)]
        if not self.attention_only:
            columns.append((first + (0 if self.parallel else self.n_heads))[:, None])
        return np.append(np.concatenate(columns, axis=1).ravel(), self.n_senders).astype(np.int64)

    @cached_property
    def _offsets(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.limits)]).astype(np.int64)

    @cached_property
    def owner(self) -> Ints:
        """Sender number of the node each receiver belongs to, (n_receivers,); n_senders for unembed."""
        first = 1 + np.arange(self.n_layers)[:, None] * (self.n_heads + self._mlps)
        columns = [first + np.tile(np.arange(self.n_heads), 3)[None]]
        if not self.attention_only:
            columns.append(first + self.n_heads)
        return np.append(np.concatenate(columns, axis=1).ravel(), self.n_senders).astype(np.int64)

    @cached_property
    def exists(self) -> Bools:
        """True where a sender-receiver pair is an edge, (n_senders, n_receivers)."""
        found: Bools = np.arange(self.n_senders)[:, None] < self.limits[None, :]
        return found

    @cached_property
    def senders(self) -> tuple[Part, ...]:
        """The senders, in order of computation."""
        found = [Part("embed")]
        for layer in range(self.n_layers):
            found += [Part("head", layer, h) for h in range(self.n_heads)]
            found += [Part("mlp", layer)] * self._mlps
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Part, ...]:
        """The receivers, in order of computation."""
        found: list[Part] = []
        for layer in range(self.n_layers):
            found += [Part("head", layer, h, side) for side in SIDES for h in range(self.n_heads)]
            found += [Part("mlp", layer)] * self._mlps
        return (*found, Part("unembed"))

    def block_columns(self, layer: int) -> slice:
        """Columns of a block's receivers: q, k, v of its heads, then its MLP."""
        width = 3 * self.n_heads + self._mlps
        return slice(layer * width, (layer + 1) * width)

    def before_block(self, layer: int) -> int:
        """How many senders write before a block reads."""
        return 1 + layer * (self.n_heads + self._mlps)

    def before_mlp(self, layer: int) -> int:
        """How many senders write before a block's MLP reads."""
        return self.before_block(layer) + (0 if self.parallel else self.n_heads)

    @property
    def nodes(self) -> tuple[Part, ...]:
        """Heads and MLPs."""
        return self.senders[1:]

    def sender_index(self, part: Part) -> int:
        """Row of a sender.

        Raises:
            PartError: if the model has no such sender.
        """
        layer, width = part.layer or 0, self.n_heads + self._mlps
        if part.stack or part.side or layer >= self.n_layers:
            raise PartError(f"{part} is no sender of {self}; senders look like {self.senders[:3]}")
        if part.kind == "embed":
            return 0
        if part.kind == "head" and (part.index or 0) < self.n_heads:
            return 1 + layer * width + (part.index or 0)
        if part.kind == "mlp" and self._mlps:
            return 1 + layer * width + self.n_heads
        raise PartError(f"{part} is no sender of {self}; senders look like {self.senders[:3]}")

    def receiver_index(self, part: Part) -> int:
        """Column of a receiver.

        Raises:
            PartError: if the model has no such receiver (a head needs its side: L9.H6.q, .k or .v).
        """
        layer, width = part.layer or 0, 3 * self.n_heads + self._mlps
        if not part.stack and layer < self.n_layers:
            if part.kind == "unembed":
                return self.n_receivers - 1
            if part.kind == "head" and part.side in tuple(SIDES) and (part.index or 0) < self.n_heads:
                return layer * width + SIDES.index(part.side or "q") * self.n_heads + (part.index or 0)
            if part.kind == "mlp" and self._mlps:
                return layer * width + 3 * self.n_heads
        raise PartError(f"{part} is no receiver of {self}; receivers look like {self.receivers[0]}, L0.MLP, unembed")

    def edge_index(self, edge: Edge) -> int:
        """Number of an edge, 0 to n_edges - 1.

        Raises:
            PartError: if the model has no such edge.

        Example:
            >>> u = Universe(2, 2)
            >>> u.edges[u.edge_index(parse("L0.H1->L1.H0.q"))]
            L0.H1->L1.H0.q
        """
        sender, receiver = self.sender_index(edge.sender), self.receiver_index(edge.receiver)
        if sender >= self.limits[receiver]:
            raise PartError(f"{edge} is no edge: {edge.sender} is not computed before {edge.receiver} in {self}")
        return int(self._offsets[receiver]) + sender

    def receiver_of(self, numbers: Ints) -> Ints:
        """Column of each edge number, (edge,)."""
        found: Ints = np.searchsorted(self._offsets, numbers, side="right") - 1
        return found

    def edge_indices(self, edges: Iterable[Edge]) -> Ints:
        """Numbers of many edges, (edge,)."""
        if isinstance(edges, EdgeList) and edges.universe == self:
            return np.arange(self.n_edges, dtype=np.int64)
        return np.fromiter((self.edge_index(e) for e in edges), dtype=np.int64)

    @property
    def edges(self) -> EdgeList:
        """All edges, as a sequence that makes each one when it is asked for."""
        return EdgeList(self)

    def mask(self, edges: Iterable[Edge]) -> Tensor:
        """Boolean matrix of a set of edges, (n_senders, n_receivers)."""
        return torch.from_numpy(self.matrix(np.isin(np.arange(self.n_edges), self.edge_indices(edges)), False))

    def edge_set(self, mask: Tensor | Bools) -> frozenset[Edge]:
        """The edges that are True in a matrix (n_senders, n_receivers).

        Raises:
            VesaliusError: if the matrix has another shape, or is True where the model has no edge.
        """
        found = as_numpy(mask)
        if found.shape != (self.n_senders, self.n_receivers):
            raise VesaliusError(f"an edge mask of {self} is {(self.n_senders, self.n_receivers)}, not {found.shape}")
        if (found & ~self.exists).any():
            s, r = np.argwhere(found & ~self.exists)[0]
            raise VesaliusError(f"the mask holds {self.senders[s]}->{self.receivers[r]}, which is no edge of {self}")
        return frozenset(Edge(self.senders[s], self.receivers[r]) for s, r in np.argwhere(found))

    @overload
    def matrix(self, values: Bools, fill: bool) -> Bools: ...
    @overload
    def matrix(self, values: Floats, fill: float) -> Floats: ...
    def matrix(self, values: Any, fill: Any) -> Any:
        """Spreads one value an edge, (n_edges,), over a matrix (n_senders, n_receivers)."""
        out = np.full((self.n_receivers, self.n_senders), fill, dtype=values.dtype)
        out[self.exists.T] = values
        return np.ascontiguousarray(out.T)

    def flat(self, matrix: Any) -> Any:
        """The inverse of `matrix`: (n_edges,) by edge number."""
        return matrix.T[self.exists.T]

    def values(self, scores: Scores) -> Floats:
        """Scores by edge number, (n_edges,); NaN where an edge has none."""
        if isinstance(scores.parts, EdgeList) and scores.parts.universe == self:
            return np.asarray(scores.values, dtype=float)
        out = np.full(self.n_edges, np.nan)
        rows = [i for i, p in enumerate(scores.parts) if isinstance(p, Edge)]
        out[self.edge_indices(p for p in scores.parts if isinstance(p, Edge))] = np.asarray(scores.values)[rows]
        return out

    def induced(self, nodes: Iterable[Part]) -> Tensor:
        """All edges among these nodes, embed and unembed, as a mask: what a node-level circuit keeps."""
        kept = np.zeros(self.n_senders + 1, dtype=bool)
        kept[[0, -1, *(self.sender_index(p.output) for p in nodes if p.kind != "unembed")]] = True
        return torch.from_numpy(self.exists & kept[:-1, None] & kept[self.owner][None, :])

    def prune(self, mask: Tensor | Bools) -> Tensor:
        """Drops dead ends: an edge stays if its sender is reached from embed and its receiver leads to unembed.

        A head is reached when any of its q, k, v inputs is. The same fixed point as repeatedly dropping nodes without
        incoming or without outgoing edges.
        """
        found = as_numpy(mask) & self.exists
        reached = np.zeros(self.n_senders, dtype=bool)
        reached[0] = True
        for nodes, columns in self._stages():
            fed = (found[:, columns] & reached[:, None]).any(axis=0)
            reached[nodes] = fed.reshape(-1, nodes.stop - nodes.start).any(axis=0)  # (side, head) -> (head,)
        leads = np.zeros(self.n_receivers, dtype=bool)
        leads[-1] = True
        for nodes, columns in reversed(list(self._stages())):
            useful = (found[nodes] & leads[None, :]).any(axis=1)
            leads[columns] = np.tile(useful, (columns.stop - columns.start) // len(useful))
        return torch.from_numpy(found & reached[:, None] & leads[None, :])

    def _stages(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of what is computed at once: a block's heads, then its MLP."""
        s, r = 1, 0
        for _ in range(self.n_layers):
            for rows, columns in [(self.n_heads, 3 * self.n_heads), (1, 1)][: 1 + self._mlps]:
                yield slice(s, s + rows), slice(r, r + columns)
                s, r = s + rows, r + columns

    def strata(self, level: Level, match: Literal["kind", "layer"]) -> Ints:
        """Group of each item, for matched random draws: (n_senders,) with -1 for embed, or (n_edges,).

        `kind` groups heads and MLPs (edges: by kind of sender, kind and side of receiver); `layer` also by layer.
        """
        width = self.n_layers + 1

        def group(parts: Sequence[Part]) -> Ints:
            return np.array([_kind(p) * width + (1 + (p.layer or 0) if match == "layer" else 0) for p in parts])

        sender = group(self.senders)
        if level == "node":
            return np.where(np.arange(self.n_senders) == 0, -1, sender).astype(np.int64)
        found: Ints = self.flat(sender[:, None] * (7 * width) + group(self.receivers)[None, :]).astype(np.int64)
        return found

    def __str__(self) -> str:
        notes = [n for n, on in (("parallel", self.parallel), ("attention only", self.attention_only)) if on]
        return f"{self.n_layers} layers x {self.n_heads} heads" + "".join(f", {n}" for n in notes)


class EdgeList(Sequence[Edge]):
    """The edges of a universe by number, made one at a time: fits where a list of a million edges would not."""

    def __init__(self, universe: Universe) -> None:
        self.universe = universe

    def __len__(self) -> int:
        return self.universe.n_edges

    @overload
    def __getitem__(self, i: int) -> Edge: ...
    @overload
    def __getitem__(self, i: slice) -> list[Edge]: ...
    def __getitem__(self, i: int | slice) -> Edge | list[Edge]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"edge {i} of {len(self)}")
        offsets = self.universe._offsets
        receiver = int(np.searchsorted(offsets, i % len(self), side="right")) - 1
        return Edge(self.universe.senders[i % len(self) - int(offsets[receiver])], self.universe.receivers[receiver])

    def __iter__(self) -> Iterator[Edge]:
        for receiver, limit in zip(self.universe.receivers, self.universe.limits, strict=True):
            for sender in self.universe.senders[:limit]:
                yield Edge(sender, receiver)

    def __contains__(self, edge: object) -> bool:
        try:
            return isinstance(edge, Edge) and self.universe.edge_index(edge) >= 0
        except PartError:
            return False

    def __repr__(self) -> str:
        return f"EdgeList({len(self)} edges of {self.universe})"


def _kind(part: Part) -> int:
    return {"embed": 0, "head": 1, "mlp": 2, "unembed": 3}[part.kind] + {None: 0, "q": 0, "k": 3, "v": 4}[part.side]


def as_numpy(mask: Tensor | Bools) -> Bools:
    """A mask as a boolean array."""
    found = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    return found.astype(bool)
