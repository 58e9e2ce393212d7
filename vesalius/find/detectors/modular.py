"""What a successor head reads: features of the index of an item modulo ten, and arithmetic with them.

`x` is the effective embedding of items (`ov.embeddings`), one row an item; its index is the item's place in its series.
A dictionary of sparse, positive codes is fitted to x (scikit-learn); the feature of residue k is the atom that tells
items of index k mod 10 from the others best. Taking the feature of i off and putting that of j on should turn what a
successor head names from i + 1 to j + 1, decade and kind kept.

Gould et al. 2023, arXiv 2312.09230, sec. 3 (a sparse autoencoder of MLP0 outputs, mod-10 features, vector arithmetic).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import DictionaryLearning
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vesalius.errors import VesaliusError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ATOMS, PENALTY = 20, 0.1  # with more of either, atoms of single items displace planted features (tests)
LEAST = 2  # items of a residue, so that a feature is more than one item


@dataclass(frozen=True)
class Modular:
    """Features of an index modulo a number.

    Attributes:
        modulus: the number. features: one a residue, in the units of the embedding, (residue, d).
        auc: how well each tells its items from the others, 0.5 to 1, (residue,).
        atoms: which atom of the dictionary it is, (residue,), or -1 for a difference of means.
    """

    modulus: int
    features: Floats
    auc: Floats
    atoms: Ints

    def shift(self, x: Floats, now: Ints, then: Ints) -> Floats:
        """The embeddings with the feature of residue `now` taken off and that of `then` put on, (item, d)."""
        moved: Floats = x - self.features[now % self.modulus] + self.features[then % self.modulus]
        return moved

    def alone(self, x: Floats, index: Ints) -> Floats:
        """The mean of x plus each item's own feature: all other features ablated, (item, d)."""
        kept: Floats = x.mean(0) + self.features[index % self.modulus]
        return kept


def dictionary_features(
    x: Floats, index: Ints, modulus: int = 10, atoms: int = ATOMS, penalty: float = PENALTY, seed: int = 0
) -> Modular:
    """Features from a sparse dictionary, one atom a residue.

    Args:
        x: effective embeddings, (item, d). index: place of each in its series, (item,).
        atoms: of the dictionary. penalty: weight of the L1 term, the embedding scaled to one.

    Raises:
        VesaliusError: if a residue has fewer than two items.
    """
    residues = _residues(index, modulus)
    centre, scale = x.mean(0), float(np.linalg.norm(x - x.mean(0), axis=1).mean())
    fitted = DictionaryLearning(
        min(atoms, len(x)), alpha=penalty, fit_algorithm="cd", transform_algorithm="lasso_cd", positive_code=True,
        transform_alpha=penalty, random_state=seed, max_iter=60,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codes = fitted.fit_transform((x - centre) / scale)  # (item, atom)
    auc = np.array([[roc_auc_score(residues == k, code) for code in codes.T] for k in range(modulus)])
    best = auc.argmax(1)
    features = np.stack([codes[residues == k, a].mean() * fitted.components_[a] * scale for k, a in enumerate(best)])
    return Modular(modulus, features, auc.max(1), best.astype(np.int64))


def mean_features(x: Floats, index: Ints, modulus: int = 10) -> Modular:
    """The plain rival: the mean of a residue's items less the mean of all."""
    residues = _residues(index, modulus)
    features = np.stack([x[residues == k].mean(0) for k in range(modulus)]) - x.mean(0)
    side = (x - x.mean(0)) @ features.T  # (item, residue)
    auc = np.array([roc_auc_score(residues == k, side[:, k]) for k in range(modulus)])
    return Modular(modulus, features, auc, np.full(modulus, -1))


def _residues(index: Ints, modulus: int) -> Ints:
    residues = np.asarray(index) % modulus
    counts = np.bincount(residues, minlength=modulus)
    if counts.min() < LEAST:
        raise VesaliusError(
            f"residue {counts.argmin()} modulo {modulus} has {counts.min()} items; {LEAST} or more of each are needed, "
            "so a series of twice the modulus"
        )
    return residues


def probe(x: Floats, index: Ints, held_out: NDArray[np.bool_], modulus: int = 10, labels: Ints | None = None) -> float:
    """Accuracy, on held-out items, of a linear probe for the index modulo ten that was fitted to the others.

    Args:
        held_out: items to test on, (item,). labels: other residues than the true ones (shuffled ones, for a control).
    """
    wanted = np.asarray(index) % modulus if labels is None else labels
    fitted = LogisticRegression(max_iter=2000).fit(x[~held_out], wanted[~held_out])
    return float(fitted.score(x[held_out], (np.asarray(index) % modulus)[held_out]))


def decades_held_out(x: Floats, index: Ints, modulus: int = 10, shuffled: bool = False, seed: int = 0) -> float:
    """Mean accuracy of the probe over all ways to hold out two decades next to each other; chance is 1 / modulus."""
    decade, found = np.asarray(index) // modulus, []
    rng = np.random.default_rng(seed)
    for first in range(0, int(decade.max()) + 1, 2):
        labels = rng.permutation(np.asarray(index) % modulus) if shuffled else None
        found.append(probe(x, index, (decade == first) | (decade == first + 1), modulus, labels))
    return float(np.mean(found))


def arithmetic(
    x: Floats,
    index: Ints,
    modular: Modular,
    name: Callable[[Floats], Ints],
    last: int,
    fair: Sequence[bool] | None = None,
) -> Floats:
    """How often moving an item's feature from residue i to j moves what is named to the successor, (i, j).

    Args:
        name: given embeddings, the index of the item that is named after each.
        last: the largest index that can be named. fair: items to ask about; by default all.

    Returns:
        Shares, NaN where no item can be asked; the diagonal (j = i) changes nothing and is what the head does anyway.
    """
    m, index = modular.modulus, np.asarray(index)
    right, asked = np.zeros((m, m)), np.zeros((m, m))
    use = np.ones(len(x), dtype=bool) if fair is None else np.asarray(fair)
    for then in range(m):
        said = name(modular.shift(x, index, np.full_like(index, then)))
        wanted = m * (index // m) + then + 1
        for i in np.flatnonzero(use & (wanted <= last)):
            asked[index[i] % m, then] += 1
            right[index[i] % m, then] += said[i] == wanted[i]
    return np.divide(right, asked, out=np.full((m, m), np.nan), where=asked > 0)


def off_diagonal(table: Floats) -> float:
    """Mean share over true shifts (i != j)."""
    return float(np.nanmean(table[~np.eye(len(table), dtype=bool)]))
