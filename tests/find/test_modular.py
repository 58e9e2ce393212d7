"""Index features and arithmetic with them, on embeddings that were put together from known ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vesalius.errors import VesaliusError
from vesalius.find.detectors.modular import (
    Modular,
    arithmetic,
    decades_held_out,
    dictionary_features,
    mean_features,
    off_diagonal,
)

Floats = NDArray[np.float64]
INDEX = np.arange(100)


def numbers(seed: int, noise: float = 0.05) -> tuple[Floats, Floats]:
    """Embeddings of 0 to 99, (item, d): a vector for the tens, one for the units, noise; and the units' vectors."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    units, tens = axes[:10], axes[10:20]
    return units[INDEX % 10] + tens[INDEX // 10] + noise * rng.normal(size=(100, 32)), units


def successor_of(x: Floats) -> NDArray[np.int64]:
    """The number after the one whose clean embedding is nearest."""
    clean, _ = numbers(0, noise=0)
    return (x @ clean.T).argmax(1) + 1


def test_differences_of_means_are_the_features_that_were_put_in() -> None:
    x, units = numbers(0)
    found = mean_features(x, INDEX)
    wanted = units - units.mean(0)
    assert np.abs(found.features - wanted).max() < 0.06 and found.auc.min() > 0.99
    assert off_diagonal(arithmetic(x, INDEX, found, successor_of, 99)) == 1.0


def test_a_sparse_dictionary_has_an_atom_for_each_residue() -> None:
    x, units = numbers(0)
    found = dictionary_features(x, INDEX, seed=0)
    assert len(set(found.atoms.tolist())) == 10 and found.auc.min() > 0.95
    likeness = (found.features / np.linalg.norm(found.features, axis=1, keepdims=True)) @ units.T
    assert (likeness.argmax(1) == np.arange(10)).all()
    assert off_diagonal(arithmetic(x, INDEX, found, successor_of, 99)) > 0.9


def test_features_of_other_residues_move_nothing_to_the_right_place() -> None:
    x, units = numbers(0)
    wrong = Modular(10, np.roll(units, 3, axis=0), np.ones(10), np.arange(10))
    assert off_diagonal(arithmetic(x, INDEX, wrong, successor_of, 99)) < 0.1


def test_arithmetic_asks_only_where_there_is_an_answer() -> None:
    """After 99 comes no item; the diagonal is what happens anyway."""
    x, _ = numbers(0)
    asked: list[int] = []

    def name(shifted: Floats) -> NDArray[np.int64]:
        asked.append(len(shifted))
        return successor_of(shifted)

    shares = arithmetic(x, INDEX, mean_features(x, INDEX), name, 99)
    assert asked == [100] * 10 and shares.shape == (10, 10) and np.diag(shares) == pytest.approx(1.0)
    one = arithmetic(x[:20], INDEX[:20], mean_features(x[:20], INDEX[:20]), successor_of, 10)
    assert np.isfinite(one[:, 0]).all() and not np.isnan(one).all()
    few = arithmetic(x, INDEX, mean_features(x, INDEX), successor_of, 0)
    assert np.isnan(few).all()


def test_a_probe_reads_units_in_decades_it_never_saw_and_nothing_from_shuffled_ones() -> None:
    x, _ = numbers(1)
    assert decades_held_out(x, INDEX) > 0.95
    assert decades_held_out(x, INDEX, shuffled=True) < 0.3
    rng = np.random.default_rng(0)
    assert decades_held_out(rng.normal(size=(100, 32)), INDEX) < 0.25


def test_a_series_that_is_too_short_is_refused() -> None:
    x, _ = numbers(0)
    with pytest.raises(VesaliusError, match="residue 9 modulo 10 has 1 items; 2 or more"):
        mean_features(x[:19], INDEX[:19])
