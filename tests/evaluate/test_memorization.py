"""Histories counted by hand, and place in training: planted Poisson passes, planted clusters fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from families import some_ids, tiny_hf
from scipy.stats import binomtest

from vesalius import checkpoints
from vesalius.corpus import Document, Order, TokenStore, Viewer, train_tokenizer
from vesalius.corpus.batches import Batch
from vesalius.errors import RunError, UnknownName, VesaliusError
from vesalius.evaluate import (
    Sequences,
    by_dose,
    by_exposures,
    by_step,
    documents_of,
    dose_response,
    forecasts,
    histogram,
    over_training,
    place_of,
    place_test,
    rows_of,
    texts_of,
    trajectories,
    wilson,
)
from vesalius.runs import Run


class Listed:
    """Batches written down by hand."""

    fingerprint, vocab_size, rows, length = "listed", 50, 2, 4

    def __init__(self, batches: list[list[list[int]]], padded: set[tuple[int, int]] = frozenset()) -> None:  # type: ignore[assignment]
        self.batches, self.padded = batches, padded

    def batch(self, step: int) -> Batch:
        ids = np.array(self.batches[step], dtype=np.int64)
        segments = np.zeros_like(ids)
        for where, row in self.padded:
            if where == step:
                segments[row, 2:] = -1
        return Batch(step, ids, segments)

    def describe(self) -> dict[str, Any]:
        return {}


A, B, C, D = [1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [7, 7, 7, 7, 9], [8, 8, 8, 8, 9]
A_TOO = [1, 2, 3, 4, 11]  # begins like A


def test_rows_and_the_steps_that_read_them_by_hand():
    order = Listed([[A, B], [C, A_TOO], [A, A], [B, D]], {(3, 1)})
    found = rows_of(order, 4, None, 2, 2)
    assert found.ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, 5], [7, 7, 7, 7]]
    assert [r.tolist() for r in found.reads] == [[0, 1, 2, 2], [0, 3], [1]]
    assert found.left_out == (("padded rows", 1),)
    assert found.first.tolist() == [0, 0, 1]
    # the checkpoint of step c has made updates 0..c-1: what step 1 reads is unseen by checkpoint 1
    assert [found.exposures(c).tolist() for c in range(5)] == [[0, 0, 0], [1, 1, 0], [2, 1, 1], [4, 1, 1], [4, 2, 1]]
    assert rows_of(order, 2, None, 2, 2).reads[0].tolist() == [0, 1]
    two = rows_of(order, 4, 2, 2, 2, seed=1)
    assert len(two) == 2 and two.ids.tolist() == rows_of(order, 4, 2, 2, 2, seed=1).ids.tolist()
    control = rows_of(order, 4, None, 2, 2, group="held-out", seen=False)
    assert (control.exposures(4) == 0).all()
    both = found + control
    assert both.group == ("row",) * 3 + ("held-out",) * 3 and both.exposures(4).tolist() == [4, 2, 1, 0, 0, 0]
    with pytest.raises(VesaliusError, match="5 tokens, too few for 4 \\+ 4"):
        rows_of(order, 4, None, 4, 4)


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Viewer:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 15)) for _ in range(12)]
    made = [Document(f"plain-{i}", t) for i, t in enumerate(texts)]
    made += [Document(f"canary-0/{i}", texts[3][::-1]) for i in range(3)]
    made += [Document("short", "abc")]
    tokenizer = train_tokenizer(made, "bytes")
    store = TokenStore.build(made, tokenizer, tmp_path_factory.mktemp("store") / "it")
    return Viewer(Order(store, 16, 4, seed=3))


def test_documents_are_counted_as_the_viewer_counts_them(viewer: Viewer):
    steps = 11  # more than two epochs
    found = documents_of(viewer, steps, ["plain-*", "canaries"], None, 8, 8)
    assert len(found) == 13  # the three copies of the canary are one
    for step in (0, 1, 3, 7, steps):
        for i, ids in enumerate(found.ids):
            assert ids[0] == viewer.store.separator
            text = "".join(chr(t) for t in ids[1:])
            assert found.exposures(step)[i] == viewer.exposures(text, step)
    canary = documents_of(viewer, steps, "canaries", None, 8, 8, group="canary")
    assert len(canary.reads[0]) > 2 * max(len(r) for r in found.reads[:12])
    unseen = documents_of(viewer, steps, "plain-1", None, 8, 8, seen=False)
    assert unseen.exposures(steps).tolist() == [0]
    mixed = documents_of(viewer, steps, ["plain-2", "short"], None, 8, 8)
    assert mixed.name == ("plain-2",) and mixed.left_out == (("documents of fewer than 15 tokens", 1),)
    with pytest.raises(UnknownName, match="did you mean 'plain-1'"):
        documents_of(viewer, steps, "plian-1", None, 8, 8)
    with pytest.raises(VesaliusError, match="none of 1 documents"):
        documents_of(viewer, steps, "short", None, 8, 8)


def test_rows_cut_in_two_are_told(viewer: Viewer):
    aligned = documents_of(viewer, 4, "plain-*", None, 8, 8)  # 15 letters and a separator fill rows of 16
    assert sum(aligned.cut) == 0
    askew = documents_of(Viewer(Order(viewer.store, 12, 4, seed=3)), 5, "plain-*", None, 8, 8)
    assert 0 < sum(askew.cut) <= sum(len(r) for r in askew.reads)


def scores(step: int, values: list[float], exposures: list[int], group: str = "row") -> pd.DataFrame:
    n = len(values)
    return pd.DataFrame(
        {"step": step, "sequence": np.arange(n), "group": group, "score": values}
        | {"extractible": [v == 1 for v in values], "exposures": exposures, "seen": [e > 0 for e in exposures]}
    )


def test_shares_by_step_and_exposures_by_hand():
    table = pd.concat([scores(1, [0.0, 0.5, 1.0, 0.0], [1, 0, 1, 0]), scores(4, [1.0, 1.0, 1.0, 0.5], [2, 1, 2, 1])])
    steps = by_step(table).set_index(["step", "among"])
    assert steps.loc[(1, "all"), "share"] == 0.25 and steps.loc[(1, "seen so far"), "share"] == 0.5
    assert steps.loc[(1, "not yet seen"), "n"] == 2 and steps.loc[(1, "not yet seen"), "share"] == 0
    assert (4, "not yet seen") not in steps.index
    doses = by_exposures(table).set_index(["step", "exposures"])
    assert doses.loc[(4, 2), "share"] == 1.0 and doses.loc[(4, 1), "share"] == 0.5
    assert doses.loc[(4, 1), "score"] == 0.75
    assert dose_response(table[table["step"] == 4]) == pytest.approx(1.0)
    many = scores(9, [0.0, 0.5, 1.0, 1.0, 1.0, 0.0], [0, 1, 2, 3, 4, 7])
    assert by_dose(many)[["dose", "n", "share"]].values.tolist() == [[0, 1, 0], [1, 1, 0], [2, 2, 1], [4, 2, 0.5]]
    bins = histogram(table, 4)
    last = bins[bins["step"] == 4]
    assert last["n"].tolist() == [0, 0, 1, 3] and last["share"].sum() == 1


def test_wilson_is_scipys():
    low, high = wilson([0, 3, 10], [10, 10, 10])
    for i, k in enumerate([0, 3, 10]):
        expected = binomtest(k, 10).proportion_ci(method="wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_forecasts_over_checkpoints_by_hand():
    early = scores(1, [1.0, 1.0, 0.0, 0.0], [1, 1, 1, 0])
    final = scores(8, [1.0, 0.5, 1.0, 1.0], [1, 1, 1, 1])
    small = scores(9, [1.0, 0.0, 0.0, 0.0], [1, 1, 1, 1])
    found = forecasts(pd.concat([early, final]), 8, {1: 10.0, 8: 80.0}, {"small": (small, 20.0)})
    assert [(f.predictor, f.among, f.flops) for f in found] == [
        ("step 1", "all", 10.0), ("step 1", "seen", 10.0), ("small", "all", 20.0), ("small", "seen", 20.0)
    ]  # fmt: skip
    every, seen, other, _ = found
    assert (every.precision, every.recall) == (0.5, pytest.approx(1 / 3))
    assert (seen.n, seen.precision, seen.recall) == (3, 0.5, 0.5)
    assert (other.precision, other.recall) == (1.0, pytest.approx(1 / 3))
    assert trajectories(pd.concat([final, early]), 8)[1].tolist() == [1.0, 0.5]
    with pytest.raises(VesaliusError, match="step 5 was not measured"):
        forecasts(early, 5, {1: 1.0})


def test_poisson_places_pass():
    rng = np.random.default_rng(0)
    verdicts, dispersions = [], []
    for _ in range(60):
        found = place_test(np.arange(3000), rng.random(3000) < 0.1)
        verdicts.append(found.poisson)
        dispersions.append(found.dispersion)
    assert np.mean(verdicts) >= 0.9  # two tests at 1 % each
    assert 0.9 < np.mean(dispersions) < 1.1


def test_clusters_and_drifts_fail():
    rng = np.random.default_rng(1)
    place = rng.permutation(3000)  # not in order of place: that is not asked of the caller
    for _ in range(10):
        bursts = rng.choice(3000, 12, replace=False)
        near = np.abs(place[:, None] - bursts).min(1) < 12
        clustered = place_test(place, near)
        assert clustered.poisson is False and clustered.dispersion > 3
        drift = place_test(place, rng.random(3000) < 0.2 * place / 3000)
        assert drift.poisson is False and drift.p_place < 0.01
    few = place_test(np.arange(100), np.arange(100) < 4)
    assert few.poisson is None and few.memorized == 4


def test_place_compares_only_what_was_read_equally_often():
    n = 400
    rng = np.random.default_rng(2)
    often = np.arange(n) >= 300  # the last hundred were read five times, and are all memorized
    reads = tuple(np.full(5, i) if often[i] else np.array([i]) for i in range(n))
    ids = np.zeros((n, 4), dtype=np.int64)
    asked = Sequences(ids, reads, ("row",) * n, tuple(map(str, range(n))), 2)
    once = rng.random(n) < 0.3
    table = scores(n, np.where(often | once, 1.0, 0.0).tolist(), asked.exposures(n).tolist())
    found = place_of(asked, table)
    assert found.n == 300 and found.poisson is True
    assert place_test(asked.first, often | once).poisson is False


def test_texts_too_short_are_counted():
    found = texts_of([range(10), range(3)], ["a", "b"], 4, 4)
    assert found.name == ("a",) and found.left_out == (("texts of fewer than 8 tokens", 1),)
    assert found.exposures(100).tolist() == [0]


def test_every_checkpoint_of_a_run_is_asked(tmp_path: Path):
    """Two checkpoints with other weights: each is scored by its own, and step 2's reading is unseen at step 2."""
    ids = some_ids(4, 12)
    with Run.start({"command": "train", "model": "tiny"}, tmp_path) as run:
        pass
    for step in (0, 2):
        place = run.folder / checkpoints.FOLDER / checkpoints.name_of(step)
        place.parent.mkdir(exist_ok=True)
        checkpoints.write(place, tiny_hf("llama", seed=step).save_pretrained)
    from vesalius.evaluate import recite
    from vesalius.model import Model

    own = [recite(Model.wrap(tiny_hf("llama", seed=s)), ids, 6, 6) for s in (0, 2)]
    learnt = np.concatenate([ids[:, :6].numpy(), own[1].tokens], axis=1)  # what the second checkpoint says
    asked = texts_of(learnt, "abcd", 6, 6, reads=[[1], [2], [0, 1], []], group="row")
    table = over_training(run.folder, asked)
    assert table["step"].tolist() == [0] * 4 + [2] * 4
    last = table[table["step"] == 2]
    assert last["extractible"].all() and not table[table["step"] == 0]["extractible"].any()
    assert last["exposures"].tolist() == [1, 0, 2, 0] and last["seen"].tolist() == [True, False, True, False]
    with pytest.raises(RunError, match="no checkpoint of step 7; it has 0, 2"):
        over_training(run.folder, asked, [7])
