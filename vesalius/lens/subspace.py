"""Steering in a small subspace: the stream at END is moved over a grid in the space that a few channels write to.

With E (k, d) orthonormal rows that span the channels' v_i, and c a point of the grid,

    set    x' = x (I - E^T E) + c E        add    x' = x + c E        scale    x' = x + (s - 1) x E^T E

In GPT-2 small three components of inhibition heads span a space whose places stand for places in a list: moved over it,
the movers' attention goes from item to item (Merullo et al. 2024, arXiv 2406.09519, sec. 5-6). The control is a random
subspace of the same dimension, moved over the same distances.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import UnknownName, VesaliusError
from vesalius.lens.channels import Measured, measure
from vesalius.lens.wiring import Wiring
from vesalius.model import Intervention, Model, Pairs
from vesalius.model.intervene import locate
from vesalius.model.sweep import BATCH, Progress
from vesalius.parts import Part, parse_part
from vesalius.tasks.base import Task

Floats = NDArray[np.float64]
How = Literal["set", "add", "scale"]


@dataclass(frozen=True)
class Subspace:
    """Orthonormal directions of the residual stream, and where they were taken from.

    Attributes:
        basis: (dimension, d_model). origin: channels such as `L19.H2:0`, or `random, seed 3`.
    """

    basis: Tensor
    origin: tuple[str, ...] = ()

    @classmethod
    def of_channels(
        cls, model: Model | Wiring, channels: Sequence[tuple[Part | str, int]], dimension: int = 3
    ) -> Subspace:
        """The span of what components write; of more than `dimension` of them the principal directions.

        Args:
            channels: (head, number of the component).
        """
        wired = Wiring.of(model)
        if not 1 <= dimension <= len(channels):
            raise VesaliusError(
                f"{len(channels)} channels span no space of {dimension} dimensions; give at least as many"
            )
        rows, origin = [], []
        for head, number in channels:
            v = wired.components(head).v
            if not 0 <= number < v.shape[-1]:
                raise VesaliusError(f"{head} has components 0 to {v.shape[-1] - 1}, not {number}")
            rows.append(v[:, number])
            origin.append(f"{head}:{number}")
        _, s, basis = torch.linalg.svd(torch.stack(rows).double(), full_matrices=False)
        if float(s[dimension - 1]) < 1e-6 * float(s[0]):
            raise VesaliusError(f"the channels {', '.join(origin)} write to fewer than {dimension} directions")
        return cls(basis[:dimension].float(), tuple(origin))

    @classmethod
    def random(cls, model: Model, dimension: int = 3, seed: int = 0) -> Subspace:
        """Uniformly drawn."""
        drawn = torch.randn(
            model.d_model, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return cls(torch.linalg.qr(drawn).Q.T.float(), (f"random, seed {seed}",))

    @property
    def dimension(self) -> int:
        return self.basis.shape[0]

    def interventions(
        self, part: Part, point: Sequence[float], how: How = "set", positions: Tensor | None = None
    ) -> list[Intervention]:
        """The stream at a part (`L20.resid_pre`) moved to, by, or stretched by a point's coordinates."""
        if how not in get_args(How):
            raise UnknownName("way to steer", how, get_args(How))
        if len(point) != self.dimension:
            raise VesaliusError(f"a point of {len(point)} coordinates in a subspace of {self.dimension} dimensions")
        c, e = torch.tensor(point, dtype=torch.float32), self.basis
        if how == "scale":
            stretched = torch.eye(e.shape[1]) + e.T @ torch.diag(c - 1) @ e
            return [Intervention(part, "map", stretched, positions)]
        moved = Intervention(part, "add", c @ e, positions)
        if how == "add":
            return [moved]
        return [Intervention(part, "map", torch.eye(e.shape[1]) - e.T @ e, positions), moved]


def coordinates(model: Model, task: Task | Pairs, subspace: Subspace, part: Part | str) -> Floats:
    """Where the prompts lie in the subspace where the answer is read, (example, dimension)."""
    pairs = task if isinstance(task, Pairs) else task.pairs(model)
    where = locate(parse_part(part))
    found = []
    for group in pairs.batches(BATCH):
        run = model.run(group.clean, group.mask, capture=[where.site], decoder=group.decoder)
        x = run[where.site][torch.arange(group.n_rows), group.reads[:, 0]]
        found.append((x.float().cpu() @ subspace.basis.T).double().numpy())
    return np.concatenate(found)


def grid(spread: Floats, points: int = 5, reach: float = 2.0) -> list[tuple[float, ...]]:
    """Points over a box around the middle: `reach` standard deviations to each side in each dimension.

    Args:
        spread: coordinates of actual prompts, (example, dimension).

    Example:
        >>> len(grid(np.random.default_rng(0).normal(size=(10, 3)), points=5))
        125
    """
    if points < 2:
        raise VesaliusError(f"a grid of {points} points a side; give at least 2")
    middle, size = spread.mean(0), spread.std(0)
    axes = [np.linspace(m - reach * s, m + reach * s, points) for m, s in zip(middle, size, strict=True)]
    return [tuple(float(v) for v in point) for point in itertools.product(*axes)]


@dataclass(frozen=True)
class Steering:
    """What a task gives over the points of a grid.

    Attributes:
        points: as asked. how: what was done. part: where. measured: variant 0 is the untouched run, then the points.
    """

    points: list[tuple[float, ...]]
    how: How
    part: Part
    measured: Measured
    watch: tuple[Part, ...]

    @property
    def accuracy(self) -> Floats:
        """Of each point, (point,); the first is the untouched run."""
        return self.measured.preferred.mean(1).astype(float)

    def best(self) -> int:
        """The point with the best accuracy, then the best metric; counted from 0."""
        order = sorted(
            range(len(self.points)), key=lambda i: (-self.accuracy[1 + i], -self.measured.metric[1 + i].mean())
        )
        return order[0]

    def to_frame(self) -> pd.DataFrame:
        """A row for each point, the untouched run first: coordinates, accuracy, metric, attention of watched heads."""
        rows = []
        for i, point in enumerate([None, *self.points]):
            row: dict[str, object] = {f"c{k}": None if point is None else v for k, v in enumerate(self.points[0])}
            if point is not None:
                row |= {f"c{k}": v for k, v in enumerate(point)}
            row |= {"accuracy": float(self.accuracy[i]), "metric": float(self.measured.metric[i].mean())}
            for h, head in enumerate(self.watch):
                for p, place in enumerate(self.measured.places):
                    row[f"{head} to {place}"] = _mean(self.measured.attention[i, h, :, p])
            rows.append(row)
        return pd.DataFrame(rows)


def _mean(values: Floats) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def steer(
    model: Model,
    task: Task | Pairs,
    subspace: Subspace,
    part: Part | str,
    points: Sequence[Sequence[float]],
    *,
    how: How = "set",
    watch: Sequence[Part | str] = (),
    places: Sequence[str] = (),
    memory_gb: float = DEFAULT_MEMORY_GB,
    progress: Progress | None = None,
) -> Steering:
    """Moves the stream where the answer is read over the points, and measures answers and attention at each.

    Args:
        part: where the stream is moved, such as `L20.resid_pre`: before the heads that read the channels.
        points: coordinates in the subspace (for `scale`, factors). watch: heads. places: named positions of the task.

    Example:
        >>> space = Subspace.of_channels(model, [("L19.H2", 0), ("L20.H0", 1), ("L17.H5", 0)])   # doctest: +SKIP
        >>> here = coordinates(model, task, space, "L23.resid_pre")                              # doctest: +SKIP
        >>> steer(model, task, space, "L23.resid_pre", grid(here)).to_frame()                    # doctest: +SKIP
    """
    if not points:
        raise VesaliusError("no points to steer to; make some with grid(...)")
    where = parse_part(part)
    model.anatomy.require(where)
    heads = [parse_part(h) for h in watch]
    chosen = [tuple(float(v) for v in p) for p in points]

    def variants(group: Pairs) -> list[list[Intervention]]:
        end = group.reads[:, :1]
        return [[], *[subspace.interventions(where, p, how, end) for p in chosen]]

    found = measure(model, task, variants, watch=heads, places=places, memory_gb=memory_gb, progress=progress)
    return Steering(chosen, how, where, found, tuple(heads))
