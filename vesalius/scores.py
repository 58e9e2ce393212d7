"""One table for every finding: a score for each part or edge, with how it was measured.

Sign convention, everywhere: a score is positive when the part *helps* the metric (restoring it from the clean run
raises the metric; removing it lowers the metric).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.errors import PartError, VesaliusError
from vesalius.parts import Address, Edge, Part, parse
from vesalius.records import dump

Array = NDArray[np.floating[Any]]
_OWN = {"part", "position", "kind", "layer", "index", "score", "low", "high", "sign_stability", "verified"}
_PROMPT = re.compile(r"^x\d+$")  # columns of stored per-prompt values


def bootstrap_mean(values: Array, seed: int = 0, draws: int = 1000, level: float = 0.95) -> tuple[Array, Array]:
    """Percentile bootstrap interval of the mean over the last axis (prompts): (low, high), shape values.shape[:-1]."""
    n = values.shape[-1]
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n  # (draw, example)
    means = values @ weights.T  # (..., draw)
    tail = (1 - level) / 2
    return np.quantile(means, tail, axis=-1), np.quantile(means, 1 - tail, axis=-1)


@dataclass(frozen=True)
class Scores:
    """Scores of parts (or edges) of one model on one task by one method.

    Attributes:
        parts: addresses, one a row.
        values: mean score over the prompts, (row,).
        per_example: score of every prompt, (row, example), or None where the method gives the mean alone.
        positions: token position or position name of each row, or None when summed over positions.
        verified: True where the value was measured by intervention, not estimated, (row,), or None for all alike.
        info: task, method, model, fingerprint, seed, unit, direction and whatever else the method records.
        columns: more numbers beside each row's score, by name, (row,) each: what its null gives, p-values.
    """

    parts: Sequence[Address]
    values: Array
    per_example: Array | None = None
    positions: Sequence[str] | None = None
    verified: NDArray[np.bool_] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.values):
            raise VesaliusError(f"{len(self.parts)} parts but {len(self.values)} values")
        for name, values in self.columns.items():
            if name in _OWN or _PROMPT.match(name) or len(values) != len(self.parts):
                raise VesaliusError(
                    f"column '{name}' ({len(values)} values) cannot stand beside {len(self.parts)} scores"
                )

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, part: str | Address) -> float:
        """The score of one part or edge."""
        wanted = parse(part)
        for p, v in zip(self.parts, self.values, strict=True):
            if p == wanted:
                return float(v)
        raise PartError(f"{wanted} has no score here; there are {len(self)} rows, such as {self.parts[:3]}")

    @property
    def unit(self) -> str:
        return str(self.info.get("unit", "metric"))

    def kind(self, kind: Literal["head", "mlp", "neuron", "edge", "embed"] | str) -> Scores:
        """Only the rows of that kind of part."""
        keep = [i for i, p in enumerate(self.parts) if ("edge" if isinstance(p, Edge) else p.kind) == kind]
        return self.select(keep)

    def select(self, rows: Sequence[int]) -> Scores:
        """Only these rows, in this order."""
        index = np.asarray(rows, dtype=int)
        return Scores(
            [self.parts[i] for i in index],
            self.values[index],
            None if self.per_example is None else self.per_example[index],
            None if self.positions is None else [self.positions[i] for i in index],
            None if self.verified is None else self.verified[index],
            dict(self.info),
            {name: np.asarray(values)[index] for name, values in self.columns.items()},
        )

    def top(self, k: int, by: Literal["magnitude", "value"] = "magnitude") -> Scores:
        """The k largest rows, by |score| (default) or by signed score; ties keep model order."""
        key = np.abs(self.values) if by == "magnitude" else self.values
        return self.select(np.argsort(-key, kind="stable")[:k].tolist())

    def above(self, threshold: float) -> Scores:
        """Rows whose |score| is at least the threshold."""
        return self.select(np.flatnonzero(np.abs(self.values) >= threshold).tolist())

    def interval(self, seed: int = 0) -> tuple[Array, Array]:
        """95 % bootstrap interval over prompts of each row's mean; NaN where there are no per-prompt values."""
        if self.per_example is None or self.per_example.shape[1] < 2:
            nan = np.full(len(self), np.nan)
            return nan, nan
        return bootstrap_mean(self.per_example, seed)

    def sign_stability(self, seed: int = 0, draws: int = 1000) -> Array:
        """Share of bootstrap resamples of the prompts in which a row keeps the sign of its mean, (row,)."""
        if self.per_example is None:
            return np.full(len(self), np.nan)
        n = self.per_example.shape[1]
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n
        signs: Array = (np.sign(self.per_example @ weights.T) == np.sign(self.values)[:, None]).mean(axis=1)
        return signs

    def place_stability(self, k: int, seed: int = 0, draws: int = 200) -> Array:
        """Share of bootstrap resamples of the prompts in which a row is among the k largest by magnitude, (row,)."""
        if self.per_example is None:
            return np.full(len(self), np.nan)
        n = self.per_example.shape[1]
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n
        ranks = (-np.abs(self.per_example @ weights.T)).argsort(axis=0, kind="stable").argsort(axis=0, kind="stable")
        share: Array = (ranks < k).mean(axis=1)
        return share

    def split_half(self, seed: int = 0, draws: int = 100) -> float:
        """Reliability: mean Pearson correlation of the scores on one random half of the prompts with the other half's.

        NaN without per-prompt values, or where one half gives every row the same score.
        """
        from scipy import stats

        if self.per_example is None or self.per_example.shape[1] < 2:
            return float("nan")
        n, rng, found = self.per_example.shape[1], np.random.default_rng(seed), []
        for _ in range(draws):
            order = rng.permutation(n)
            a, b = (self.per_example[:, half].mean(1) for half in (order[: n // 2], order[n // 2 :]))
            if np.ptp(a) > 0 and np.ptp(b) > 0:
                found.append(float(stats.pearsonr(a, b).statistic))
        return float(np.mean(found)) if found else float("nan")

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: part, kind, layer, index, score, low, high, sign_stability; position, verified; `columns`."""
        low, high = self.interval()
        nodes = [p.receiver if isinstance(p, Edge) else p for p in self.parts]
        frame = pd.DataFrame(
            {
                "part": [str(p) for p in self.parts],
                "kind": ["edge" if isinstance(p, Edge) else p.kind for p in self.parts],
                "layer": pd.array([n.layer for n in nodes], dtype="Int64"),
                "index": pd.array([n.index for n in nodes], dtype="Int64"),
                "score": self.values,
                "low": low,
                "high": high,
                "sign_stability": self.sign_stability(),
            }
        )
        if self.positions is not None:
            frame.insert(1, "position", list(self.positions))
        if self.verified is not None:
            frame["verified"] = self.verified
        return frame.assign(**self.columns)

    def _keys(self, other: Scores) -> list[Any]:
        """What makes a row the same row in another table: its part, and its position where there are positions."""
        if self.positions is None and other.positions is None:
            return list(self.parts)
        if self.positions is None or other.positions is None:
            raise VesaliusError("one table has a score for each position and the other has none; score both alike")
        return list(zip(self.parts, self.positions, strict=True))

    def _aligned(self, other: Scores) -> tuple[Array, Array]:
        mine = dict(zip(self._keys(other), self.values, strict=True))
        theirs = dict(zip(other._keys(self), other.values, strict=True))
        common = [k for k in mine if k in theirs]
        if len(common) < 3:
            raise VesaliusError(f"only {len(common)} parts are scored in both tables; nothing to compare")
        return np.array([mine[k] for k in common]), np.array([theirs[k] for k in common])

    def correlation(self, other: Scores, kind: Literal["pearson", "spearman"] = "pearson") -> float:
        """Correlation over the parts (and positions) both tables score; NaN if either is constant."""
        from scipy import stats

        a, b = self._aligned(other)
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            return float("nan")
        result = stats.pearsonr(a, b) if kind == "pearson" else stats.spearmanr(a, b)
        return float(result.statistic)

    def overlap(self, other: Scores, k: int) -> float:
        """Share of the k largest (by magnitude) that both tables have in common."""
        mine, theirs = set(self.top(k)._keys(other)), set(other.top(k)._keys(self))
        return len(mine & theirs) / max(1, min(k, len(self), len(other)))

    def save(self, folder: Path) -> None:
        """Writes `scores.parquet` (and per-prompt values as columns `x0`, `x1`, ...) and `scores.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        frame = self.to_frame()
        if self.per_example is not None:
            extra = pd.DataFrame(self.per_example, columns=[f"x{i}" for i in range(self.per_example.shape[1])])
            frame = pd.concat([frame, extra], axis=1)
        for name, write in (
            ("scores.parquet", lambda p: frame.to_parquet(p)),
            ("scores.json", lambda p: p.write_bytes(dump(self.info))),
        ):
            part = folder / (name + ".part")
            write(part)
            part.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Reads what `save` wrote."""
        folder = Path(folder)
        try:
            frame = pd.read_parquet(folder / "scores.parquet")
            info = json.loads((folder / "scores.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise VesaliusError(f"no readable scores in {folder}: {error}") from error
        columns = [c for c in frame.columns if _PROMPT.match(c)]
        own = {*_OWN, *columns}
        more = [c for c in frame.columns if c not in own and pd.api.types.is_numeric_dtype(frame[c])]
        return cls(
            [parse(p) for p in frame["part"]],
            frame["score"].to_numpy(float),
            frame[columns].to_numpy(float) if columns else None,
            frame["position"].tolist() if "position" in frame else None,
            frame["verified"].to_numpy(bool) if "verified" in frame else None,
            info,
            {c: frame[c].to_numpy(float) for c in more},
        )

    def _summary(self) -> str:
        return f"{self.info.get('method', 'scores')} on {self.info.get('task', '?')}, {self.info.get('model', '?')}"

    def __repr__(self) -> str:
        head = self.top(10).to_frame()[["part", "score", "low", "high"]]
        return f"Scores({self._summary()}; {len(self)} rows; unit {self.unit})\n{head.to_string(index=False)}"

    def _repr_html_(self) -> str:
        table = self.top(20).to_frame().to_html(index=False, float_format=lambda v: f"{v:.4g}")
        summary, unit = html.escape(self._summary()), html.escape(self.unit)
        return f"<p><b>{summary}</b>: {len(self)} rows, unit {unit}; the 20 largest</p>{table}"


def concat(tables: Iterable[Scores]) -> Scores:
    """Joins tables of one method over different kinds of part; per-prompt values are kept if all have them."""
    items = list(tables)
    both = all(t.per_example is not None for t in items)
    names = [n for n in items[0].columns if all(n in t.columns for t in items)]
    return Scores(
        [p for t in items for p in t.parts],
        np.concatenate([t.values for t in items]),
        np.concatenate([t.per_example for t in items if t.per_example is not None]) if both else None,
        [s for t in items for s in t.positions or []] if items[0].positions is not None else None,
        np.concatenate([t.verified for t in items if t.verified is not None])
        if items[0].verified is not None
        else None,
        dict(items[0].info),
        {n: np.concatenate([t.columns[n] for t in items]) for n in names},
    )


__all__ = ["Part", "Scores", "bootstrap_mean", "concat"]
