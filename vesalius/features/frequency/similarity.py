"""Do a layer's units and a recording tell the same stimuli apart? Representational similarity.

For each layer and each recording channel a matrix of distances between all pairs of sentences is made, and the two are
compared by Spearman's correlation of their upper triangles. A layer's score is the mean over the 100 channels nearest
to it (or all, if there are fewer).

A file of recordings is `.npz` or `.h5` (HDF5, needs h5py) with

    stimuli      n texts, the sentences in the order of the recordings' first axis
    recordings   (n, channel, time), or (n, trial, channel, time)
    channels     names, optional
    rate         samples a second, optional; with trials needed: the phase at the sentence's rate is compared

Without trials the distance of two sentences in a channel is 1 - the correlation of their time courses (of fewer than
three samples, their Euclidean distance). With trials it is 1 - |mean over trials of exp(i (phase_a - phase_b))|, the
coherence of their phases between trials. Distances of units are Euclidean, over their standardised activations at all
words of a sentence.

After Kriegeskorte et al. 2008 and Zhang et al. 2025 (arXiv 2510.13255).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.stats import rankdata

from vesalius.errors import VesaliusError
from vesalius.features.frequency.spectrum import WORD_SECONDS
from vesalius.features.frequency.stimuli import Sentence, words_of
from vesalius.features.frequency.tagging import Tagged

Floats = NDArray[np.float64]
NEAREST = 100  # channels that a layer's score is the mean of
DRAWS = 200  # relabelled stimuli, for the null
LEAST = 8  # stimuli: 28 distances


@dataclass(frozen=True)
class Recordings:
    """What was recorded while the stimuli were given.

    Attributes:
        stimuli: the sentences. distances: (channel, pair) of `scipy.spatial.distance.pdist`'s order.
        channels: their names.
    """

    stimuli: tuple[Sentence, ...]
    distances: Floats
    channels: tuple[str, ...]

    @classmethod
    def of(
        cls,
        stimuli: Sequence[Sentence],
        data: NDArray[Any],
        channels: Sequence[str] = (),
        rate: float | None = None,
    ) -> Recordings:
        """From arrays (see the module).

        Raises:
            VesaliusError: for shapes that do not fit.
        """
        x = np.asarray(data, dtype=np.float64)
        if x.ndim not in (3, 4):
            raise VesaliusError(
                f"recordings have {x.ndim} axes; (stimulus, channel, time) or (stimulus, trial, channel, time) are read"
            )
        if len(x) != len(stimuli):
            raise VesaliusError(f"{len(stimuli)} stimuli but recordings of {len(x)}; the first axis is the stimulus")
        if len(x) < LEAST:
            raise VesaliusError(f"recordings of {len(x)} stimuli; {LEAST} or more are needed to compare distances")
        if not np.isfinite(x).all():
            raise VesaliusError("recordings hold values that are not finite numbers; leave out those trials")
        n = x.shape[-2]
        names = tuple(str(c) for c in channels) or tuple(f"channel {i}" for i in range(n))
        if len(names) != n:
            raise VesaliusError(f"{len(names)} channel names for {n} channels")
        if x.ndim == 4:
            if rate is None or not rate > 0:
                raise VesaliusError("recordings with trials need their rate (samples a second) to find a phase")
            found = [_incoherent(x[:, :, c], float(rate), len(stimuli[0])) for c in range(n)]
        elif x.shape[-1] < 3:
            found = [pdist(x[:, c]) for c in range(n)]
        else:
            found = [np.nan_to_num(pdist(x[:, c], "correlation"), nan=1.0) for c in range(n)]
        return cls(tuple(stimuli), np.stack(found), names)


def _incoherent(x: Floats, rate: float, words: int) -> Floats:
    """1 - phase coherence between trials at the sentence's rate, for every pair; x is (stimulus, trial, time)."""
    time = np.arange(x.shape[-1]) / rate
    wave = np.exp(-2j * np.pi * time / (words * WORD_SECONDS))
    phase = (x - x.mean(-1, keepdims=True)) @ wave
    phase = phase / np.maximum(np.abs(phase), 1e-30)  # (stimulus, trial)
    pairs = np.triu_indices(len(x), 1)
    return np.asarray(1 - np.abs((phase[pairs[0]] * phase[pairs[1]].conj()).mean(-1)))


def read_recordings(path: Path | str) -> Recordings:
    """Reads a file of recordings (see the module). Pickled arrays are refused.

    Raises:
        VesaliusError: for a file that is not there, is neither kind, or lacks one of its arrays.
    """
    path = Path(path)
    if not path.exists():
        raise VesaliusError(f"no file {path}; check the path")
    if path.suffix == ".npz":
        found = _npz(path)
    elif path.suffix in (".h5", ".hdf5"):
        found = _hdf5(path)
    else:
        raise VesaliusError(f"{path} is neither .npz nor .h5; save stimuli and recordings as one of them")
    for name in ("stimuli", "recordings"):
        if name not in found:
            raise VesaliusError(f"{path.name} has no '{name}' (it has {', '.join(sorted(found)) or 'nothing'})")
    texts = [t.decode("utf-8") if isinstance(t, bytes) else str(t) for t in np.asarray(found["stimuli"]).ravel()]
    names = [t.decode("utf-8") if isinstance(t, bytes) else str(t) for t in np.asarray(found.get("channels", ()))]
    try:
        rate = float(np.asarray(found["rate"])) if "rate" in found else None
        data = np.asarray(found["recordings"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise VesaliusError(f"{path.name} holds recordings that are no numbers: {error}") from None
    return Recordings.of([words_of(t) for t in texts], data, names, rate)


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # whatever is wrong with the file, or an array that needs pickle
        raise VesaliusError(f"{path.name} cannot be read: {' '.join(str(error).split())[:120]}") from None


def _hdf5(path: Path) -> dict[str, Any]:
    try:
        import h5py
    except ImportError:
        raise VesaliusError("reading .h5 recordings needs h5py: pip install 'vesalius[recordings]'") from None
    try:
        with h5py.File(path, "r") as file:
            return {name: file[name][()] for name in file if isinstance(file[name], h5py.Dataset)}
    except OSError as error:
        raise VesaliusError(f"{path.name} cannot be read: {' '.join(str(error).split())[:120]}") from None


def check_stimuli(recordings: Recordings, sentences: Sequence[Sentence]) -> list[int]:
    """Where each recorded stimulus stands among the sentences.

    Raises:
        VesaliusError: naming the first stimulus that the model does not read.
    """
    places = {tuple(w.lower() for w in s): i for i, s in enumerate(sentences)}
    found = []
    for number, stimulus in enumerate(recordings.stimuli, 1):
        at = places.get(tuple(w.lower() for w in stimulus))
        if at is None:
            raise VesaliusError(
                f"stimulus {number} of the recordings, '{' '.join(stimulus)}', is not among the sentences the model "
                "reads; give the recordings' own with --sentences"
            )
        found.append(at)
    return found


def similarity(
    tagged: Tagged, recordings: Recordings, units: str = "all", seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How near each layer is to the recordings.

    Args:
        tagged: of the same sentences. units: "all", or "sentence" or "phrase" for those that follow them.

    Returns:
        layers (layer, units, score, null_high, p: against stimuli in another order) and channels (layer, channel, rho).
    """
    at = check_stimuli(recordings, tagged.series.sentences)
    x = tagged.series.by_sentence[:, :, at]  # (layer, unit, stimulus, word)
    member = np.ones(x.shape[:2], bool) if units == "all" else tagged.members(units).reshape(x.shape[:2])
    brain = _standard(rankdata(recordings.distances, axis=1))  # (channel, pair)
    n = len(at)
    square = np.zeros((n, n), dtype=int)
    upper = np.triu_indices(n, 1)
    square[upper] = np.arange(len(upper[0]))
    square = square + square.T
    rng = np.random.default_rng([seed, *b"stimuli"])
    orders = [rng.permutation(n) for _ in range(DRAWS)]
    rows, every = [], []
    for i, layer in enumerate(tagged.series.layers):
        mine = np.moveaxis(x[i][member[i]], 0, -1).reshape(n, -1).astype(float)  # (stimulus, word x unit)
        if not mine.shape[1]:
            rows.append({"layer": layer, "units": 0, "score": np.nan, "null_high": np.nan, "p": np.nan})
            continue
        scale = mine.std(0)
        z = (mine - mine.mean(0))[:, scale > 0] / scale[scale > 0]
        ranks = _standard(rankdata(pdist(z))[None])[0]
        rho = brain @ ranks
        nearest = np.argsort(-rho, kind="stable")[:NEAREST]
        score = float(rho[nearest].mean())
        null = []
        for order in orders:
            other = np.sort(brain @ ranks[square[np.ix_(order, order)][upper]])[::-1]
            null.append(float(other[:NEAREST].mean()))
        p = (1 + sum(v >= score for v in null)) / (1 + DRAWS)
        high = float(np.quantile(null, 0.95))
        rows.append({"layer": layer, "units": int(member[i].sum()), "score": score, "null_high": high, "p": p})
        every.append(pd.DataFrame({"layer": layer, "channel": recordings.channels, "rho": rho}))
    if not every:
        raise VesaliusError(f"no unit follows {units}s, so none can be compared; compare all units")
    return pd.DataFrame(rows), pd.concat(every, ignore_index=True)


def _standard(ranks: Floats) -> Floats:
    """Rows of mean 0 and length 1, so that a product of two is a correlation."""
    ranks = ranks - ranks.mean(1, keepdims=True)
    return np.asarray(ranks / np.maximum(np.linalg.norm(ranks, axis=1, keepdims=True), 1e-30))
