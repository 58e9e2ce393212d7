"""What a training run memorizes: which sequences its checkpoints recite, how often they were read, and when.

A training order is known, so each sequence has a history: the steps at which it was read. A sequence read at step s is
*seen* by the checkpoint of step c if s < c (that checkpoint has made c updates, of steps 0 to c - 1); its exposures at
c are the times it was read before. From scores over checkpoints and histories follow the share memorized by step and by
exposures, and whether place in training matters: if it does not, the number memorized in equal stretches of the order
is Poisson-distributed (binomial, to be exact, where a sizable share is memorized).

Biderman et al., "Pythia", arXiv 2304.01373 (the order of memorized sequences); "Emergent and Predictable Memorization",
arXiv 2304.11158.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from vesalius import checkpoints
from vesalius.errors import RunError, VesaliusError
from vesalius.evaluate.forecast import Forecast, forecast
from vesalius.evaluate.recite import recite
from vesalius.evaluate.sequences import Progress, Sequences
from vesalius.model import Model
from vesalius.run_index import find_run
from vesalius.runs import Run

LEAST_EXPECTED = 5.0  # memorized sequences a stretch of the order should hold, for the chi-square to be one
MOST_STRETCHES = 50
SIGNIFICANCE = 0.01  # of the two tests of place


def at_checkpoint(
    model: Model, step: int, sequences: Sequences, *, batch: int | None = None, progress: Progress | None = None
) -> pd.DataFrame:
    """Scores of all sequences by one checkpoint.

    Returns:
        step, sequence, group, score, extractible, run (right before the first error), margin, exposures, seen.
    """
    found = recite(model, sequences.ids, sequences.prompt, sequences.continuation, batch=batch, progress=progress)
    exposures = sequences.exposures(step)
    table = found.to_frame().drop(columns="right")
    table.insert(0, "group", list(sequences.group))
    table.insert(0, "sequence", np.arange(len(sequences)))
    table.insert(0, "step", step)
    return table.assign(exposures=exposures, seen=exposures > 0)


def over_training(
    run: Run | Path | str,
    sequences: Sequences,
    steps: Sequence[int] | None = None,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """`at_checkpoint` for the checkpoints of a training run, one below the other.

    Args:
        run: the run or its folder. sequences: what is asked about.
        steps: which checkpoints; all if None.

    Raises:
        RunError: if the run has no such checkpoint.
    """
    from vesalius.model import open_model

    folder = run.folder if isinstance(run, Run) else find_run(str(run)).folder
    known = checkpoints.steps_in(folder / checkpoints.FOLDER)
    wanted = known if steps is None else sorted(set(steps))
    if not wanted or (lacking := [s for s in wanted if s not in known]):
        what = f"checkpoint of step {lacking[0]}" if wanted else "checkpoints"
        raise RunError(f"{folder} has no {what}; it has {', '.join(map(str, known)) or 'none'}")
    tables = []
    for i, step in enumerate(wanted):
        tables.append(at_checkpoint(open_model(f"{folder.resolve()}@step{step}"), step, sequences, batch=batch))
        if progress is not None:
            progress(i + 1, len(wanted))
    return pd.concat(tables, ignore_index=True)


def share(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Share memorized and mean score in each group of rows.

    Args:
        table: of `at_checkpoint`. by: its columns that make the groups.

    Returns:
        The columns of `by`, n, memorized, score, share, low, high (95 %, Wilson's interval).
    """
    found = table.groupby(list(by), as_index=False).agg(
        n=("extractible", "size"), memorized=("extractible", "sum"), score=("score", "mean")
    )
    found["memorized"] = found["memorized"].astype(int)
    found["share"] = found["memorized"] / found["n"]
    found["low"], found["high"] = wilson(found["memorized"], found["n"])
    return found


def by_step(table: pd.DataFrame) -> pd.DataFrame:
    """Share memorized by checkpoint, among all sequences, those seen so far and those not yet, in each group."""
    kinds = [
        table.assign(among="all"),
        table[table["seen"]].assign(among="seen so far"),
        table[~table["seen"]].assign(among="not yet seen"),
    ]
    order = pd.concat([k for k in kinds if len(k)], ignore_index=True)
    return share(order, ["step", "group", "among"])


def by_exposures(table: pd.DataFrame) -> pd.DataFrame:
    """Share memorized by checkpoint, group and number of exposures so far."""
    return share(table, ["step", "group", "exposures"])


def by_dose(table: pd.DataFrame) -> pd.DataFrame:
    """As `by_exposures`, with exposures in groups that double: dose 0, 1, 2 (read 2 or 3 times), 4 (4 to 7), 8, ..."""
    dose = [0 if e == 0 else 1 << (int(e).bit_length() - 1) for e in table["exposures"]]
    return share(table.assign(dose=dose), ["step", "group", "dose"])


def dose_response(table: pd.DataFrame) -> float:
    """Spearman's correlation between exposures and mean score over the numbers of exposures that occur (unread: 0).

    Args:
        table: of one checkpoint, from `at_checkpoint`.
    """
    from scipy.stats import spearmanr

    means = table.groupby("exposures")["score"].mean()
    if len(means) < 2 or means.nunique() < 2:
        return float("nan")
    return float(spearmanr(means.index, means.to_numpy()).statistic)


def histogram(table: pd.DataFrame, bins: int = 16) -> pd.DataFrame:
    """How scores are distributed at each checkpoint: step, group, low, high (edges of the bin), n, share."""
    edges = np.linspace(0, 1, bins + 1)
    rows = []
    for (step, group), part in table.groupby(["step", "group"]):
        counts, _ = np.histogram(part["score"], edges)
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
            rows.append((step, group, low, high, int(n), n / len(part)))
    return pd.DataFrame(rows, columns=["step", "group", "low", "high", "n", "share"])


def wilson(successes: ArrayLike, n: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    k, m = np.broadcast_arrays(np.asarray(successes, dtype=int), np.asarray(n, dtype=int))
    found = [
        binomtest(int(a), int(b)).proportion_ci(0.95, "wilson") if b else (np.nan, np.nan)
        for a, b in zip(k.flat, m.flat, strict=True)
    ]
    both = np.array([tuple(f) for f in found], dtype=float).reshape(*k.shape, 2)
    return both[..., 0], both[..., 1]


@dataclass(frozen=True)
class Place:
    """Whether place in training matters for what is memorized.

    Attributes:
        n: sequences asked about, all read equally often. memorized: of them. stretches: of the order.
        dispersion: variance of the counts over what chance gives; 1 for a Poisson process, more for clusters.
        p_dispersion: of counts so unequal by chance (chi-square). p_place: of places so unlike those of all sequences
            (Kolmogorov-Smirnov, two samples).
        poisson: whether neither is below 0.01; None where too few are memorized to tell.
        counts: one row a stretch: stretch, first, last (place in the order), n, memorized, expected.
        quantiles: observed counts against the Poisson's: probability, poisson, observed.
    """

    n: int
    memorized: int
    stretches: int
    dispersion: float
    p_dispersion: float
    p_place: float
    poisson: bool | None
    counts: pd.DataFrame
    quantiles: pd.DataFrame

    def to_json(self) -> dict[str, Any]:
        """Without the tables."""
        return {k: v for k, v in asdict(self).items() if k not in ("counts", "quantiles")}


def place_test(place: ArrayLike, memorized: ArrayLike, stretches: int | None = None) -> Place:
    """Tests whether memorized sequences lie in the order of training like a Poisson process.

    The order is cut into stretches with equally many of the sequences asked about. Given how many are memorized in all,
    the counts of a process without preference are those of drawing without regard to place; their chi-square has
    `stretches - 1` degrees of freedom. Clusters make it large, and a drift over training (late ones remembered better)
    shows in the Kolmogorov-Smirnov test.

    Args:
        place: of each sequence in the order of training; those read equally often, or dose is taken for place.
        memorized: whether the model recites it.
        stretches: as many as leave 5 memorized sequences in each, at most 50, if None.
    """
    from scipy.stats import chi2, ks_2samp, poisson

    at, truth = np.asarray(place), np.asarray(memorized, dtype=bool)
    order = np.argsort(at, kind="stable")
    at, truth = at[order], truth[order]
    n, total = len(truth), int(truth.sum())
    rare = min(total, n - total)
    cuts = min(MOST_STRETCHES, int(rare // LEAST_EXPECTED)) if stretches is None else stretches
    nan = float("nan")
    if cuts < 2:
        empty = pd.DataFrame(columns=["stretch", "first", "last", "n", "memorized", "expected"], dtype=float)
        return Place(
            n, total, 0, nan, nan, nan, None, empty, pd.DataFrame(columns=["probability", "poisson", "observed"])
        )
    rate = total / n
    rows = []
    for i, piece in enumerate(np.array_split(np.arange(n), cuts)):
        rows.append((i, at[piece[0]], at[piece[-1]], len(piece), int(truth[piece].sum()), rate * len(piece)))
    counts = pd.DataFrame(rows, columns=["stretch", "first", "last", "n", "memorized", "expected"])
    gap = (counts["memorized"] - counts["expected"]) ** 2 / (counts["expected"] * (1 - rate))
    statistic = float(gap.sum())
    p_dispersion = float(chi2.sf(statistic, cuts - 1))
    p_place = float(ks_2samp(at[truth], at[~truth]).pvalue)
    probability = (np.arange(cuts) + 0.5) / cuts
    quantiles = pd.DataFrame(
        {
            "probability": probability,
            "poisson": poisson.ppf(probability, counts["memorized"].mean()),
            "observed": np.sort(counts["memorized"].to_numpy()),
        }
    )
    fits = p_dispersion >= SIGNIFICANCE and p_place >= SIGNIFICANCE
    return Place(n, total, cuts, statistic / (cuts - 1), p_dispersion, p_place, fits, counts, quantiles)


def place_of(sequences: Sequences, table: pd.DataFrame) -> Place:
    """`place_test` at one checkpoint, over the sequences that were read as often as most were.

    Args:
        table: of one checkpoint, from `at_checkpoint` with the same sequences.
    """
    seen = table[table["seen"]]
    if not len(seen):
        return place_test([], [])
    usual = seen["exposures"].mode().iloc[0]
    alike = seen[seen["exposures"] == usual]
    return place_test(sequences.first[alike["sequence"]], alike["extractible"])


def forecasts(
    table: pd.DataFrame,
    target: int,
    flops: dict[int, float],
    others: dict[str, tuple[pd.DataFrame, float]] | None = None,
) -> list[Forecast]:
    """How well each checkpoint before the target, and other models, foretell what the target memorized.

    Args:
        table: of several checkpoints, from `over_training`.
        target: the step whose set is foretold.
        flops: what training up to each step took.
        others: further predictors by name: their scores of the same sequences (`at_checkpoint`), and their FLOPs.

    Returns:
        Two for each predictor: among all sequences, and among those it had seen.
    """
    final = _at(table, target)
    truth = final["extractible"].to_numpy()
    predictors = [(f"step {s}", _at(table, s), flops[s]) for s in sorted(set(table["step"])) if s < target]
    predictors += [(name, rows.sort_values("sequence"), cost) for name, (rows, cost) in (others or {}).items()]
    found = []
    for name, rows, cost in predictors:
        if not np.array_equal(rows["sequence"], final["sequence"]):
            raise VesaliusError(f"{name} was asked about other sequences than step {target}")
        seen, scores = rows["seen"].to_numpy(), rows["score"].to_numpy()
        found.append(forecast(scores, truth, predictor=name, among="all", flops=cost))
        found.append(forecast(scores[seen], truth[seen], predictor=name, among="seen", flops=cost))
    return found


def trajectories(table: pd.DataFrame, until: int) -> NDArray[np.float64]:
    """Scores of the checkpoints up to a step, (sequence, checkpoint): what `trajectory_forecast` takes."""
    wide = table[table["step"] <= until].pivot(index="sequence", columns="step", values="score")
    return wide.sort_index().to_numpy()


def _at(table: pd.DataFrame, step: int) -> pd.DataFrame:
    found = table[table["step"] == step].sort_values("sequence")
    if not len(found):
        raise VesaliusError(f"step {step} was not measured; measured: {sorted(set(table['step']))}")
    return found
