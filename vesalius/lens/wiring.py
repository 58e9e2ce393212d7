"""Which heads talk to which, from weights alone: composition scores, of whole matrices and of single components.

A head a writes x W_OV^a into the stream. A later head b reads it with its queries, keys or values:

    C_q = |W_OV^a W_QK^b| / (|W_OV^a| |W_QK^b|)      C_k: W_QK^b transposed      C_v: W_OV^b in its place

(Frobenius norms; Elhage et al. 2021, transformer-circuits.pub/2021/framework). For whole matrices this is mostly noise:
a channel of one dimension is lost among d_head. So the sender is taken apart, W_OV^a = sum_i s_i u_i v_i^T, and each
component scored by itself (Merullo et al. 2024, arXiv 2406.09519, sec. 4):

    C_i = |v_i^T M^b| / |M^b|,     M^b what the receiver reads with (W_QK^b, its transpose, or W_OV^b)

the share of the reader's norm that lies along what component i writes; s_i is left out. One component of a real channel
stands out among its head's d_head. How far is told by

    z_i = (C_i - mean of the sender's other components) / their standard deviation

which is leave-one-out since among n values no deviation from a mean that includes it exceeds sqrt(n - 1) deviations.
Two channels of equal strength in one head hide each other a little: neither z can then exceed about sqrt(d_head).
`p` is the share of all head pairs of the same two layers, the pair itself included, whose best component scores as
high: what random pairs of these layers give.

Norm gains are folded into both sides. Where the stream itself is normed after each sum (BERT), the write is carried
through the gains of the norms between the two heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import PartError, UnknownName, VesaliusError
from vesalius.lens.places import entry, norms_between, reads, written
from vesalius.model import Model
from vesalius.model.head_weights import head_weights, rotary_turns
from vesalius.model.low_rank import Components, LowRank
from vesalius.model.sweep import Progress
from vesalius.parts import Edge, Part, parse_part
from vesalius.scores import Scores

Floats = NDArray[np.float64]
KINDS = "qkv"
ENOUGH = 32  # components below which a z among them means little


class _Layer(NamedTuple):
    """All heads of one attention: what they write and what they read with."""

    parts: list[Part]
    ov: LowRank
    components: Components
    qk: LowRank


@dataclass(frozen=True)
class Wiring:
    """The heads of a model decomposed once, for any number of questions.

    Made by `Wiring.of(model)`; `composition` and `components_between` make one themselves if given a model.

    Attributes:
        model: the model. layers: attention layers in forward order, by (stack, layer, cross).
        fold, offsets: as asked.
    """

    model: Model
    fold: bool
    offsets: int
    layers: dict[tuple[str, int, bool], _Layer]

    @classmethod
    def of(cls, model: Model | Wiring, *, fold: bool = True, offsets: int = 0) -> Wiring:
        """The components of every head of a model; a wiring is given back as it is.

        Args:
            fold: put norm gains into the matrices.
            offsets: average rotary W_QK over keys 0 to so many positions back; 0 is the content part alone.
        """
        if isinstance(model, Wiring):
            return model
        layers = {}
        for prefix, stack in model.anatomy.stacks.items():
            turns = rotary_turns(model, offsets, prefix) if offsets else None
            for layer, block in enumerate(stack.blocks):
                for cross in (False, True) if block.cross is not None else (False,):
                    if getattr(block.attn, "recurrent", False) and not cross:
                        continue
                    found = head_weights(model, layer, prefix, cross=cross, fold=fold, offsets=offsets, turns=turns)
                    layers[prefix, layer, cross] = _Layer(found.parts, found.ov, found.ov.svd(), found.qk)
        if not layers:
            raise VesaliusError(f"{model.name} has no attention heads, so there are no channels between them")
        return cls(model, fold, offsets, layers)

    def locate(self, part: Part) -> tuple[_Layer, int]:
        """The layer that a head belongs to, and its place there."""
        self.model.anatomy.require(part)
        if part.kind not in ("head", "xhead"):
            raise PartError(f"{part} is not an attention head; channels run between heads, such as L3.H2")
        prefix = part.stack or self.model.anatomy.main.prefix
        return self.layers[prefix, part.layer or 0, part.kind == "xhead"], part.index or 0

    def components(self, head: Part | str) -> Components:
        """The components of one head: u (d_model, component), s, v (d_model, component)."""
        layer, index = self.locate(parse_part(head).output)
        return Components(*(x[index] for x in layer.components))


def composition(
    model: Model | Wiring,
    senders: Sequence[Part | str] | Part | str | None = None,
    receivers: Sequence[Part | str] | Part | str | None = None,
    *,
    kinds: str = KINDS,
    fold: bool = True,
    offsets: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """The composition score of every pair of heads, or of those asked for.

    Args:
        model: the model, or its `Wiring`.
        senders, receivers: heads; all by default. kinds: which sides of receivers, of `q`, `k` and `v`.
        fold, offsets: as in `Wiring.of`. progress: called with (done, total) layers.

    Returns:
        Scores of edges such as `L3.H2->L9.H6.k`: the largest C_i of the sender's components; beside it `component` (its
        number), `z`, `p` (best component against all pairs of the same two layers), `whole` (undecomposed) with
        `p_whole`, and `share` (the component's part of the sender's squared norm).

    Raises:
        PartError: for a part that is no head of this model. VesaliusError: if none of the pairs runs forward.

    Example:
        >>> composition(model, receivers="L18.H6", kinds="k").top(5)     # doctest: +SKIP
    """
    wired = Wiring.of(model, fold=fold, offsets=offsets)
    bench = wired.model
    for side in kinds:
        if side not in KINDS:
            raise UnknownName("kind of composition", side, KINDS, "all of them: qkv")
    wanted_from, wanted_to = _heads(wired, senders), _heads(wired, receivers)
    edges: list[Edge] = []
    columns: dict[str, list[Floats]] = {n: [] for n in ("score", "component", "z", "p", "whole", "p_whole", "share")}
    readers = [key for key in wired.layers if any(p in wanted_to for p in wired.layers[key].parts)]
    for done, key in enumerate(readers):
        for side in kinds:
            reading = _reader(wired.layers[key], side)
            for sending in _before(wired, wired.layers[key].parts[0], side, wanted_from):
                found = _pairs(bench, sending, wired.layers[key], reading)
                keep_from = [i for i, p in enumerate(sending.parts) if p in wanted_from]
                keep_to = [i for i, p in enumerate(wired.layers[key].parts) if p in wanted_to]
                edges += [
                    Edge(sending.parts[i], _sided(wired.layers[key].parts[j], side)) for i in keep_from for j in keep_to
                ]
                for name, values in found.items():
                    columns[name].append(values[np.ix_(keep_from, keep_to)].ravel())
        if progress is not None:
            progress(done + 1, len(readers))
    if not edges:
        raise VesaliusError(
            f"no channel runs from {_said(senders)} to {_said(receivers)} over {kinds}: what a head writes is read by "
            "heads of later blocks alone"
        )
    table = {name: np.concatenate(values) for name, values in columns.items()}
    info = {
        "method": "composition",
        "model": bench.name,
        "fingerprint": bench.fingerprint,
        "unit": "composition",
        "task": "weights alone",
        "fold": wired.fold,
        "offsets": wired.offsets,
        "kinds": kinds,
        "components": int(next(iter(wired.layers.values())).components.s.shape[-1]),
        "seed": 0,
    }
    return Scores(edges, table.pop("score"), info=info, columns=table)


def components_between(model: Model | Wiring, edge: Edge, *, fold: bool = True, offsets: int = 0) -> pd.DataFrame:
    """Every component of the sender as one receiver reads it: component, sigma, share, score, z."""
    wired = Wiring.of(model, fold=fold, offsets=offsets)
    side = edge.receiver.side
    if side not in ("q", "k", "v"):
        raise PartError(f"{edge} does not say what its receiver reads; write {edge}.q, .k or .v")
    sending, i = wired.locate(edge.sender)
    receiving, j = wired.locate(edge.receiver.output)
    if not reads(wired.model, sending.parts[i], receiving.parts[j], side):
        raise VesaliusError(f"no channel {edge}: what a head writes is read by heads of later blocks alone")
    through, length = _through(wired.model, sending, receiving, _reader(receiving, side))
    score = through[i, :, j] / length[i]
    sigma = sending.components.s[i].double().numpy()
    numbers = np.arange(len(score))
    share = sigma**2 / max(float((sigma**2).sum()), 1e-30)
    return pd.DataFrame({"component": numbers, "sigma": sigma, "share": share, "score": score, "z": outlying(score)})


def outlying(scores: Floats) -> Floats:
    """The z of each value of the last axis against the others (leave-one-out mean and standard deviation).

    Example:
        >>> outlying(np.array([1.0, 2.0, 3.0, 10.0]))[-1]
        8.0
    """
    n = scores.shape[-1]
    if n < 3:
        return np.full_like(scores, np.nan)
    total, squares = scores.sum(-1, keepdims=True), (scores**2).sum(-1, keepdims=True)
    mean = (total - scores) / (n - 1)
    variance = ((squares - scores**2) - (n - 1) * mean**2) / (n - 2)
    return np.asarray((scores - mean) / np.sqrt(np.maximum(variance, 1e-24)))


# -- inside ----------------------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """What all heads of a layer read with: |v matrix| of a row vector v is what each lets through."""

    matrix: Tensor  # (head, d_model, rank)
    norm: Tensor  # (head,)


def _reader(layer: _Layer, side: str) -> _Reading:
    read = {"q": layer.qk, "k": layer.qk.T, "v": layer.ov}[side]
    matrix = read.reader()
    return _Reading(matrix, matrix.norm(dim=(1, 2)))


def _before(wired: Wiring, receiver: Part, side: str, wanted: set[Part]) -> Iterator[_Layer]:
    for layer in wired.layers.values():
        if reads(wired.model, layer.parts[0], receiver, side) and any(p in wanted for p in layer.parts):
            yield layer


def _through(model: Model, sending: _Layer, receiving: _Layer, reading: _Reading) -> tuple[Floats, Floats]:
    """|v_i^T M| / |M| of every sender, component and receiver, and |v_i| of sender and component where M reads it.

    Components have length 1 where they are written; norms of the stream between the heads change that.
    """
    rows = sending.components.v.mT  # (sender, component, d_model)
    ends = written(model, sending.parts[0]), entry(model, receiving.parts[0])
    for norm in norms_between(model, *ends):
        rows = norm.linear(rows, torch.ones((), device=rows.device))
    flat = reading.matrix.movedim(0, 1).flatten(1)  # (d_model, receiver * rank)
    through = (rows @ flat).unflatten(-1, (reading.matrix.shape[0], -1)).norm(dim=-1)
    each = through.double() / reading.norm.clamp(min=1e-30)
    return each.cpu().numpy(), rows.norm(dim=-1).double().clamp(min=1e-20).cpu().numpy()


def _pairs(model: Model, sending: _Layer, receiving: _Layer, reading: _Reading) -> dict[str, Floats]:
    """The columns of `composition` for all pairs of two layers, (sender, receiver) each."""
    through, length = _through(model, sending, receiving, reading)  # (sender, component, receiver), (sender, component)
    each = through / length[..., None]
    z = np.moveaxis(outlying(np.moveaxis(each, 1, -1)), -1, 1)
    best = each.argmax(1)[:, None]  # (sender, 1, receiver)
    squared = sending.components.s.double().cpu().numpy() ** 2  # (sender, component)
    # |W_OV M|^2 = sum_i s_i^2 |v_i^T M|^2, since the u_i are orthonormal
    total = np.maximum((squared * length**2).sum(-1), 1e-60)
    whole = np.sqrt((squared[..., None] * through**2).sum(1) / total[:, None])
    top = np.take_along_axis(each, best, 1)[:, 0]
    return {
        "score": top,
        "component": best[:, 0].astype(float),
        "z": np.take_along_axis(z, best, 1)[:, 0],
        "p": _rank(top),
        "whole": whole,
        "p_whole": _rank(whole),
        "share": np.take_along_axis(squared / squared.sum(-1, keepdims=True).clip(min=1e-60), best[:, 0], 1),
    }


def _rank(values: Floats) -> Floats:
    """The share of all values that are at least as large, 1 / n for the largest of n."""
    flat = np.sort(values.ravel())
    return np.asarray((flat.size - np.searchsorted(flat, values, side="left")) / flat.size)


def _heads(wired: Wiring, asked: Sequence[Part | str] | Part | str | None) -> set[Part]:
    if asked is None:
        return {p for layer in wired.layers.values() for p in layer.parts}
    items = [asked] if isinstance(asked, (Part, str)) else list(asked)
    found = set()
    for item in items:
        layer, index = wired.locate(parse_part(item).output)
        found.add(layer.parts[index])
    if not found:
        raise VesaliusError("no head was named; leave it out for all heads, or give one such as L3.H2")
    return found


def _sided(part: Part, side: str) -> Part:
    return Part(part.kind, part.layer, part.index, side, part.stack)


def _said(asked: Any) -> str:
    if asked is None:
        return "any head"
    return str(asked) if isinstance(asked, (Part, str)) else ", ".join(map(str, asked))
