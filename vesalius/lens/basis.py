"""Causal basis extraction: the directions of a layer that a lens's predictions depend on most, and the model's.

For a direction v of length 1, ablating it replaces each state's component along v,

    r(h, v) = h + v v . (c - h),      c: the mean state, another one, or 0

and its influence is the mean KL(lens(h) || lens(r(h, v))). v_1 maximises it, v_2 does among directions orthogonal to
v_1, and so on (L-BFGS with strong-Wolfe line search, at most 100 iterations). Each search starts from the best of some
candidates: singular vectors of the translated unembedding, alone and weighted by how much the states vary.

A lens is only believed if the model agrees. So the same directions are ablated in the model's forward pass, at that
layer, and the model's own KL is set against the lens's: by rank (Spearman), and by what changes (stimulus-response
alignment: the cosine, in Aitchison's geometry weighted by the model's distribution, of the lens's change of log
probabilities with the model's). Belrose et al. 2023, arXiv 2303.08112, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from vesalius.errors import UnknownName, VesaliusError
from vesalius.lens.base import Lens, layer_name, layers, residual_sites
from vesalius.lens.divergence import Candidates, Final, candidates, final_side, kl_to_final, rows_at_once
from vesalius.lens.regression import ENORMOUS
from vesalius.model import Model

Floats = NDArray[np.float64]
Kind = Literal["mean", "resample", "zero"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FEWEST = 16  # states whose mean stands for all
CANDIDATES = 8  # starts of each kind that are tried
NOTHING = 1e-6  # a change of log-probability, nats, that float32 cannot tell from none
SITTING = 10  # iterations between looks at whether a search has come to rest
TOLERANCE = 1e-4  # of the influence, relative: when a search has come to rest


@dataclass(frozen=True)
class Sample:
    """States of a layer with the rows they were read from.

    Attributes:
        ids: (row, pos). at: which positions are read and ablated, (row, pos). layer: where.
        hidden: the stream there, (state, d_model), in the order of `at`. log_p: what the model foretells, (state,
            vocabulary).
        left_out: states over ten times as long as most, on which attention is parked: they would make up the mean.
    """

    ids: Tensor
    at: Tensor
    layer: int
    hidden: Tensor
    log_p: Tensor
    left_out: int = 0


@dataclass(frozen=True)
class CausalBasis:
    """Directions of a layer by their influence on a lens.

    Attributes:
        layer, lens, ablation: what was asked.
        directions: (k, d_model), orthonormal, in the order they were found. influence: of each, nats, (k,).
        evaluations: of the lens over all states, in each search.
    """

    layer: int
    lens: str
    ablation: Kind
    directions: Tensor
    influence: Floats
    evaluations: list[int]


@torch.no_grad()
def sample_states(model: Model, ids: Tensor, layer: int, *, skip: int | None = None) -> Sample:
    """Reads the states of a layer, and what the model foretells there.

    Args:
        model: any with a head; of an encoder-decoder give no rows (its decoder is not read here).
        ids: (row, pos). layer: -1 for the embedding.
        skip: first positions left out; 1 for causal models if None, where they hold parked attention.

    Raises:
        VesaliusError: if there are too few states, or there is no such layer.
    """
    if model.kind == "encoder-decoder":
        raise VesaliusError(f"{model.name} is encoder-decoder; a causal basis is extracted from models of one stack")
    if layer not in layers(model)[:-1]:
        blocks = f" and L0 to {layer_name(model.n_layers - 2)}" if model.n_layers > 1 else " alone"
        raise VesaliusError(f"layer {layer} has no causal basis: layers are the embedding (-1){blocks}")
    skip = (1 if model.kind == "causal" else 0) if skip is None else skip
    at = torch.ones_like(ids, dtype=torch.bool)
    at[:, :skip] = False
    if int(at.sum()) < FEWEST:
        raise VesaliusError(f"{int(at.sum())} states are too few for a causal basis; give at least {FEWEST}")
    run = model.run(ids, capture=[residual_sites(model)[layer + 1]])
    assert run.logits is not None
    (hidden,) = run.sites.values()
    lengths = hidden.float().norm(dim=-1).to(at.device)  # (row, pos)
    kept = at & (lengths <= ENORMOUS * lengths[at].median())
    log_p = run.logits[kept.to(run.logits.device)].float().log_softmax(-1)
    return Sample(ids, kept, layer, hidden[kept.to(hidden.device)].float(), log_p, int(at.sum() - kept.sum()))


def replacement(hidden: Tensor, kind: Kind, seed: int = 0) -> Tensor:
    """The c of `r(h, v)` for each state: the mean, another state (in a cycle drawn by the seed), or 0; (state, d)."""
    if kind not in KINDS:
        raise UnknownName("ablation", kind, KINDS)
    if kind == "zero":
        return torch.zeros_like(hidden)
    if kind == "mean":
        return hidden.mean(0, keepdim=True).expand_as(hidden)
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle, so that no state stands for itself
    return hidden[other.to(hidden.device)]


def ablated(hidden: Tensor, direction: Tensor, toward: Tensor) -> Tensor:
    """r(h, v): states (state, d) with their component along a direction (d,) of length 1 replaced by that of others."""
    return hidden + ((toward - hidden) @ direction).unsqueeze(-1) * direction


def causal_basis(
    model: Model,
    lens: Lens,
    sample: Sample,
    k: int,
    *,
    ablation: Kind = "mean",
    iterations: int = 100,
    words: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CausalBasis:
    """Directions of a layer by their influence on a lens's predictions.

    Args:
        model: opened. lens: read at the sample's layer.
        sample: from `sample_states`. k: how many directions.
        ablation: `mean`, `resample` or `zero`. iterations: of L-BFGS for each direction, at most.
        words: that stand for the vocabulary while searching (see `vesalius.lens.divergence`); None for all of it. The
            influence that comes back is always taken with all of it.
        seed: of the order for `resample`, and of the words.
        progress: called with (directions done, of).

    Raises:
        VesaliusError: if k is more than the width of the stream, or the ablation unknown.
    """
    hidden, d = sample.hidden, sample.hidden.shape[1]
    if not 1 <= k <= d:
        raise VesaliusError(f"{k} directions of a stream of width {d}: give 1 to {d}")
    toward = replacement(hidden, ablation, seed)
    own = final_side(model, lens.translate(hidden, sample.layer))  # the lens's own, unablated
    some = None
    if words is not None and model.unembedding is not None and words < len(own.mean):
        some = candidates(model.unembedding, own.mean, words, torch.Generator().manual_seed(seed))

    def influence(v: Tensor, by: Candidates | None = some) -> Tensor:
        return kl_to_final(model, lens.translate(ablated(hidden, v, toward), sample.layer), own, by).mean()

    starts = _starts(model, lens, sample, toward)
    found = hidden.new_zeros(0, d)
    values, evaluations = [], []
    for j in range(k):
        v, used = _search(influence, found, starts, iterations)
        found = torch.cat([found, v.unsqueeze(0)])
        values.append(float(influence(v, None)))
        evaluations.append(used)
        if progress is not None:
            progress(j + 1, k)
    return CausalBasis(sample.layer, lens.name, ablation, found, np.array(values), evaluations)


def _apart(v: Tensor, found: Tensor) -> Tensor:
    """The vector v made orthogonal to the directions found, and of length 1 (twice, for the last digits)."""
    for _ in range(2):
        v = v - (v @ found.T) @ found
        v = v / v.norm().clamp(min=1e-30)
    return v


def _search(
    influence: Callable[[Tensor], Tensor], found: Tensor, starts: Tensor, iterations: int
) -> tuple[Tensor, int]:
    """The direction orthogonal to `found` with the largest influence, and evaluations made."""
    with torch.no_grad():
        tried = [(_apart(s, found), s - (s @ found.T) @ found) for s in starts]
        usable = [v for v, rest in tried if float(rest.norm()) > 1e-3]
        best = max(usable, key=lambda v: float(influence(v)))
    v = best.clone().requires_grad_()
    used = len(usable)
    optimizer = torch.optim.LBFGS([v], max_iter=SITTING, line_search_fn="strong_wolfe", tolerance_change=0)
    last = 0.0

    def closure() -> Tensor:
        nonlocal used
        used += 1
        optimizer.zero_grad()
        loss = -influence(_apart(v, found))
        loss.backward()
        return loss

    for _ in range(max(1, iterations // SITTING)):  # in sittings, so that a search that has come to rest ends
        value = -float(optimizer.step(closure).detach())
        if abs(value - last) <= TOLERANCE * abs(value):
            break
        last = value
    return _apart(v.detach(), found), used


@torch.no_grad()
def _starts(model: Model, lens: Lens, sample: Sample, toward: Tensor) -> Tensor:
    """Candidates: singular vectors of the translated unembedding, plain and weighted by the states' spread; (n, d)."""
    d = sample.hidden.shape[1]
    zero = sample.hidden.new_zeros(1, d)
    eye = torch.eye(d, device=zero.device)
    turned = lens.translate(eye, sample.layer) - lens.translate(zero, sample.layer)  # rows: (I + A) e_i
    norm = model.anatomy.main.final_norm
    if norm is not None:
        turned = turned * norm.gain.to(turned.device)
    linear = model.unembedding
    if linear is not None and linear.weight.shape[1] == d:
        turned = turned @ linear.weight.float().T @ linear.weight.float() @ turned.T  # (d, d)
    else:
        turned = turned @ turned.T
    moved = toward - sample.hidden
    spread = moved.T @ moved / len(moved)
    roots, axes = torch.linalg.eigh(spread)
    half = axes * roots.clamp(min=0).sqrt() @ axes.T
    plain = torch.linalg.eigh(turned)[1].flip(1)[:, :CANDIDATES]
    weighted = half @ torch.linalg.eigh(half @ turned @ half)[1].flip(1)[:, :CANDIDATES]
    widest = axes.flip(1)[:, :CANDIDATES]
    found = torch.cat([plain, weighted, widest], dim=1).T
    drawn = torch.randn(CANDIDATES, d, generator=torch.Generator().manual_seed(0)).to(found)
    return torch.cat(
        [found / found.norm(dim=1, keepdim=True).clamp(min=1e-30), drawn / drawn.norm(dim=1, keepdim=True)]
    )


# -- in the model


def influences(
    model: Model,
    lens: Lens,
    sample: Sample,
    directions: Tensor,
    *,
    ablation: Kind = "mean",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Ablates each direction in the lens and in the model's forward pass, at the same states.

    Args:
        model, lens, sample: as for `causal_basis`.
        directions: (n, d_model), each of length 1.
        ablation, seed: as for `causal_basis`.
        progress: called with (directions done, of).

    Returns:
        direction (its number), lens (mean KL of the lens, nats), model (mean KL of the model's own predictions),
        alignment (mean cosine of the two changes; NaN where nothing changes).
    """
    toward = replacement(sample.hidden, ablation, seed)
    own = final_side(model, lens.translate(sample.hidden, sample.layer))
    rows = []
    for number, v in enumerate(directions):
        moved = ablated(sample.hidden, v, toward)
        changed = _rerun(model, sample, moved)
        rows.append({"direction": number, **_compare(model, lens, sample, moved, changed, own)})
        if progress is not None:
            progress(number + 1, len(directions))
    return pd.DataFrame(rows)


def _rerun(model: Model, sample: Sample, moved: Tensor) -> Tensor:
    """The model's log-probabilities (state, vocabulary) when the sample's states are these at their layer."""
    site = residual_sites(model)[sample.layer + 1]

    def tap(x: Tensor) -> Tensor:
        new = x.clone()
        new[sample.at.to(x.device)] = moved.to(x)
        return new

    run = model.run(sample.ids, taps={site: [tap]})
    assert run.logits is not None
    return run.logits[sample.at.to(run.logits.device)].float().log_softmax(-1)


@torch.no_grad()
def _compare(model: Model, lens: Lens, sample: Sample, moved: Tensor, changed: Tensor, own: Final) -> dict[str, float]:
    """Mean KL of the lens and of the model, and the mean alignment of their changes."""
    lens_kl = kl_to_final(model, lens.translate(moved, sample.layer), own)
    p = sample.log_p.exp()
    model_kl = (p * (sample.log_p - changed)).sum(-1)
    cosines = []
    for at in _chunks(len(moved), changed.shape[1]):
        stimulus = _log_q(model, lens, moved[at], sample.layer) - _log_q(model, lens, sample.hidden[at], sample.layer)
        cosines.append(aitchison(stimulus, changed[at] - sample.log_p[at], p[at]))
    whole = torch.cat(cosines)
    known = whole[~whole.isnan()]
    alignment = float(known.mean()) if len(known) else float("nan")
    return {"lens": float(lens_kl.mean()), "model": float(model_kl.mean()), "alignment": alignment}


def _chunks(n: int, size: int) -> Iterator[slice]:
    step = rows_at_once(size)
    return (slice(i, i + step) for i in range(0, n, step))


def _log_q(model: Model, lens: Lens, hidden: Tensor, layer: int) -> Tensor:
    return lens(model, hidden.to(model.dtype), layer).float().log_softmax(-1)


def aitchison(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Cosine of two changes of log-probabilities (state, word) in Aitchison's geometry, words weighted; (state,).

    Changes are taken about their weighted mean (the centred log-ratio), so that a constant added to all words, which
    changes no distribution, counts nothing. NaN where one of them is nothing.
    """
    weights = weights / weights.sum(-1, keepdim=True)
    x = x - (weights * x).sum(-1, keepdim=True)
    y = y - (weights * y).sum(-1, keepdim=True)
    a, b = (weights * x * x).sum(-1).sqrt(), (weights * y * y).sum(-1).sqrt()
    changes = (a > NOTHING) & (b > NOTHING)
    return torch.where(changes, (weights * x * y).sum(-1) / (a * b), torch.nan)


def agreement(table: pd.DataFrame) -> dict[str, Any]:
    """Spearman correlation of the two influences over directions, with its p, and the mean alignment."""
    if len(table) < 3:
        return {"spearman": None, "p": None, "alignment": float(table["alignment"].mean()), "n": len(table)}
    found: Any = stats.spearmanr(table["lens"], table["model"])
    rho = None if np.isnan(found.statistic) else float(found.statistic)
    p = None if rho is None else float(found.pvalue)
    return {"spearman": rho, "p": p, "alignment": float(table["alignment"].mean()), "n": len(table)}


def random_directions(d: int, n: int, seed: int = 0) -> Tensor:
    """Orthonormal directions drawn at random, (n, d): the control."""
    drawn = torch.randn(d, n, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0].T.contiguous()


def principal_angles(a: Tensor, b: Tensor) -> Floats:
    """Angles between two subspaces given by orthonormal rows, degrees, ascending."""
    cosines = torch.linalg.svdvals(a.double() @ b.double().T).clamp(-1, 1)
    return np.degrees(np.arccos(cosines.cpu().numpy()))
