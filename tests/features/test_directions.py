"""Axes: a planted one is found by every method, shuffled labels and random directions are seen through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from features_helpers import Plant, spoken, words

from vesalius.errors import VesaliusError
from vesalius.features import AXES, Axis, Concept, concept, concepts, cosines, direction, directions
from vesalius.features.directions import _judged

D, N = 48, 40
FOUND = ("pca", "mean-difference", "lda", "logistic")


def cloud(share: float, n: int = 200, d: int = D, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points with labels along a hidden axis that holds this share of the variance: (x, y, axis)."""
    rng = np.random.default_rng(seed)
    axis = rng.standard_normal(d)
    axis /= np.linalg.norm(axis)
    y = np.repeat([1, -1], n // 2)
    noise = rng.standard_normal((n, d))
    noise -= np.outer(noise @ axis, axis)
    noise *= np.sqrt((1 - share) / noise.var(axis=0).sum())
    along = y * (1 + 0.2 * rng.standard_normal(n))
    return noise + np.outer(along * np.sqrt(share) / along.std(), axis), y, axis


@pytest.fixture(scope="module")
def plant() -> Plant:
    """An encoder whose words lie along a hidden axis (20 % of the variance): 40 high, 40 low, 20 rated ones."""
    x, _, axis = cloud(0.2, n=2 * N)
    rng = np.random.default_rng(1)
    rated = rng.standard_normal((20, D)) * 0.1 + np.outer(np.linspace(-0.6, 0.6, 20), axis)
    names = [f"w{i}" for i in range(2 * N + 20)]
    made = Plant(dict(zip(names, np.concatenate([x, rated]), strict=True)))
    made.axis = axis  # type: ignore[attr-defined]
    return made


def planted_concept(**more: object) -> Concept:
    names = [f"w{i}" for i in range(2 * N + 20)]
    rated = dict(zip(names[2 * N :], range(20), strict=True))
    pairs = tuple((names[2 * N + 10 + i], names[2 * N + i]) for i in range(10))
    return Concept("planted", tuple(names[:N]), tuple(names[N : 2 * N]), graded=rated, pairs=pairs, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", FOUND)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_axis_with_a_fifth_of_the_variance_is_found(method: str, seed: int) -> None:
    x, y, axis = cloud(0.2, n=200 if method in ("pca", "mean-difference") else 100, seed=seed)
    span, line, _, quality = _judged(x, y, [str(i) for i in range(len(y))], AXES.get(method), 0, 0, 0)
    assert line.vector @ span @ axis >= (0.95 if method in ("pca", "mean-difference") else 0.9)
    assert quality["sign_accuracy"] > 0.97
    if method == "pca":
        assert quality["explained"] == pytest.approx(0.2, abs=0.02)
        assert quality["components"][0] == pytest.approx(quality["explained"], rel=1e-6)


def test_pca_is_scikit_learns_and_blind_to_labels() -> None:
    from sklearn.decomposition import PCA

    x, y, _ = cloud(0.3)
    line = AXES.get("pca")(x, y)
    theirs = PCA(5, svd_solver="full").fit(x)
    assert abs(line.vector @ theirs.components_[0]) == pytest.approx(1, abs=1e-9)
    shuffled = AXES.get("pca")(x, np.random.default_rng(0).permutation(y))
    assert abs(shuffled.vector @ line.vector) == pytest.approx(1, abs=1e-9)
    assert AXES.get("pca")(x, -y).vector @ line.vector == pytest.approx(-1, abs=1e-9)


@pytest.mark.parametrize("method", FOUND)
def test_labels_without_meaning_are_seen_through(method: str) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((40, 20)), np.repeat([1, -1], 20)
    _, _, _, quality = _judged(x, y, [str(i) for i in range(40)], AXES.get(method), 20, 0, 0)
    assert quality["p"] > 0.05 and quality["low"] < 0.5 < 0.75
    if method != "pca":
        assert quality["sign_accuracy_seen"] > quality["sign_accuracy"] + 0.2  # why left-out phrases are what counts


def test_p_is_small_where_there_is_an_axis_and_resampling_hardly_turns_it() -> None:
    x, y, _ = cloud(0.2)
    _, _, _, quality = _judged(x, y, [str(i) for i in range(len(y))], AXES.get("mean-difference"), 99, 99, 0)
    assert quality["p"] == 0.01 and quality["null_mean"] == pytest.approx(0.5, abs=0.05)
    assert quality["stability"]["low"] > 0.9


def test_pairs_are_left_out_together() -> None:
    """Twins share all but their label: with the twin in the training set a phrase would be put on the wrong side."""
    rng = np.random.default_rng(0)
    topic = np.repeat(rng.standard_normal((20, 400)), 2, axis=0) * 3
    y = np.tile([1, -1], 20)
    x = topic + 0.5 * rng.standard_normal((40, 400))
    x[:, 0] += 3 * y
    fit = AXES.get("mean-difference")
    _, _, _, together = _judged(x, y, [str(i // 2) for i in range(40)], fit, 0, 0, 0)
    _, _, _, apart = _judged(x, y, [str(i) for i in range(40)], fit, 0, 0, 0)
    assert together["sign_accuracy"] >= apart["sign_accuracy"]


def test_a_model_with_a_planted_axis_gives_it_back(plant: Plant) -> None:
    every = directions(plant.model, planted_concept(), [*FOUND, "random"], permutations=20, draws=20)
    hidden = plant.axis  # type: ignore[attr-defined]
    for axis, phrases in every[:2]:
        # The encoder's layer norms take the mean out of each vector and scale it; neither turns the axis much.
        assert axis.vector @ hidden > 0.93, axis.method
        assert axis.quality["graded_spearman"] > 0.9 and axis.quality["pairs_right"] == 10
        scores = dict(zip(phrases["phrase"], phrases["score"], strict=True))
        again = axis.score(plant.model, ["w3", "w70", "w99"])
        assert again == pytest.approx([scores[w] for w in ("w3", "w70", "w99")], abs=1e-6)
        labelled = phrases[phrases["use"].isin(["positive", "negative"])]["score"].abs()
        assert labelled.max() == pytest.approx(1, abs=1e-6)
    assert every[-1].axis.quality["sign_accuracy"] < 0.8
    table = cosines([f.axis for f in every]).pivot(index="a", columns="b", values="cosine")
    assert table.loc["planted, pca", "planted, mean-difference"] > 0.9
    assert abs(table.loc["planted, pca", "planted, random"]) < 0.6


def test_the_same_seed_gives_the_same_and_methods_do_not_see_each_other(plant: Plant) -> None:
    one = direction(plant.model, planted_concept(), "mean-difference", permutations=10, draws=10, seed=3)
    two = directions(plant.model, planted_concept(), ["mean-difference", "pca"], permutations=10, draws=10, seed=3)[
        0
    ].axis
    np.testing.assert_array_equal(one.vector, two.vector)
    assert one.quality == two.quality


def test_an_axis_is_saved_and_belongs_to_its_model(plant: Plant, tmp_path: Path) -> None:
    axis = direction(plant.model, planted_concept(), permutations=0, draws=0)
    path = axis.save(tmp_path / "planted.v1")
    again = Axis.load(path)
    np.testing.assert_array_equal(axis.vector, again.vector)
    assert again.score(plant.model, ["w1"]) == pytest.approx(axis.score(plant.model, ["w1"]))
    assert json.loads(path.read_text())["fingerprint"] == plant.model.fingerprint
    with pytest.raises(VesaliusError, match="is of plant.*and llama .* has another space"):
        again.score(spoken("llama"), ["w1"])
    path.with_suffix(".safetensors").write_bytes(b"nothing")
    with pytest.raises(VesaliusError, match="no readable axis"):
        Axis.load(path)


def test_templates_are_averaged_over(plant: Plant) -> None:
    it = planted_concept(templates=("{}", "{} w1", "w2 {} w3"))
    axis = direction(plant.model, it, permutations=0, draws=0)
    from vesalius.features.vectors import vectors

    by_hand = vectors(plant.model, ["w9", "w9 w1", "w2 w9 w3"]).mean(axis=0)
    assert axis.score(plant.model, ["w9"])[0] == pytest.approx(float(axis.project(by_hand)), abs=1e-6)


def test_the_shipped_concepts_are_whole() -> None:
    for name in concepts():
        it = concept(name)
        every = [*it.phrases, *it.graded, *(t for pair in it.pairs for t in pair)]
        assert len(it.positive) == len(it.negative) >= 40 and len(it.pairs) >= 10
        assert len(set(every)) == len(every), "a held-out phrase is among those the axis is found from"
        assert not it.paired or len(set(it.held_together)) == len(it.positive)


def test_a_users_file_is_a_concept(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = [f"w{i},{'warm' if i % 2 else 'cold'},{i // 2}," for i in range(20)]
    path.write_text("\n".join(["text,label,pair,rating", *rows, "w30,,,2.5", "w31,,,1", "w32,,,0"]))
    it = concept(path)
    assert it.poles == ("cold", "warm") and it.positive[0] == "w0" and it.graded == {"w30": 2.5, "w31": 1, "w32": 0}
    assert it.held_together[0] == it.held_together[10] == "0"
    path.write_text("\n".join(["text,label", *(f"w{i},{int(i % 2)}" for i in range(20))]))
    assert concept(path).positive[0] == "w1"  # 1 is the positive pole whatever comes first


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\na,1\nb,0\n", "1 1 phrases; an axis needs 8"),
        ("text,label\n" + "a,1\n" * 9, "1 labels \\(1\\)"),
        ("text,label\n" + "".join(f"a{i},x{i % 3}\n" for i in range(30)), "3 labels"),
        ("text,label\n" + "".join(f"a{i},{int(i < 8)}\n" for i in range(60)), "needs 13, a quarter"),
        ("text,label\n" + "".join(f"a{i % 9},{int(i < 10)}\n" for i in range(20)), "stands on both sides"),
        ("text,mark\na,1\n", "line 2: neither a label nor a rating"),
        ("text,rating\na,high\n", "line 2: rating 'high' is not a number"),
        ("", "holds no rows"),
    ],
)
def test_files_that_are_no_concept_are_refused(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(VesaliusError, match=told):
        concept(path)


def test_unknown_names_are_refused(plant: Plant) -> None:
    with pytest.raises(VesaliusError, match="unknown concept 'morale'; did you mean 'moral'"):
        concept("morale")
    with pytest.raises(VesaliusError, match="no file .*nowhere.csv"):
        concept("nowhere.csv")
    with pytest.raises(VesaliusError, match="unknown way to find an axis 'pcs'"):
        direction(plant.model, planted_concept(), "pcs")
    with pytest.raises(VesaliusError, match="same vector"):
        same = tuple(words(*[1] * n) for n in range(1, 9)), tuple(words(*[1] * n) for n in range(9, 17))
        direction(Plant({"w1": np.arange(D) * 1.0}).model, Concept("same", *same))
