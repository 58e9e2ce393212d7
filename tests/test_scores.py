"""Tables of scores against scipy, closed cases and simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vesalius.errors import PartError, VesaliusError
from vesalius.parts import Part, parse
from vesalius.scores import Scores, bootstrap_mean, concat


def heads(n: int) -> list[Part]:
    return [Part("head", i // 4, i % 4) for i in range(n)]


def some(n: int = 12, prompts: int = 20, seed: int = 0, **more: object) -> Scores:
    per = np.random.default_rng(seed).normal(size=(n, prompts)) + np.linspace(-1, 1, n)[:, None]
    return Scores(heads(n), per.mean(1), per, info={"method": "m", "task": "t", "unit": "logit"}, **more)


def test_the_frame_has_a_row_a_part_and_the_columns_promised() -> None:
    frame = some().to_frame()
    assert list(frame.columns) == ["part", "kind", "layer", "index", "score", "low", "high", "sign_stability"]
    assert frame["part"].tolist() == [str(p) for p in heads(12)]
    assert frame["layer"].tolist() == [p.layer for p in heads(12)] and frame["index"].tolist() == [0, 1, 2, 3] * 3
    assert ((frame["low"] <= frame["score"]) & (frame["score"] <= frame["high"])).all()
    full = some(positions=["end"] * 12, verified=np.arange(12) % 2 == 0).to_frame()
    assert set(full.columns) - set(frame.columns) == {"position", "verified"}
    mixed = Scores([parse("embed"), parse("L2.MLP"), parse("L0.H1->L3.H2.q")], np.array([1.0, 2, 3])).to_frame()
    assert mixed["kind"].tolist() == ["embed", "mlp", "edge"]
    assert mixed["layer"].tolist() == [pd.NA, 2, 3] or mixed["layer"].isna().tolist() == [True, False, False]
    assert mixed["low"].isna().all() and mixed["sign_stability"].isna().all()


@pytest.mark.parametrize(("kind", "oracle"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_correlation_is_scipys_over_common_parts_in_any_order(kind, oracle) -> None:
    a, b = some(seed=1), some(seed=2)
    assert a.correlation(b, kind) == pytest.approx(oracle(a.values, b.values).statistic)
    order = np.random.default_rng(0).permutation(12).tolist()
    assert a.correlation(b.select(order), kind) == pytest.approx(oracle(a.values, b.values).statistic)
    part = a.select(order[:7]).correlation(b, kind)
    assert part == pytest.approx(oracle(a.values[order[:7]], b.values[order[:7]]).statistic)


def test_correlation_that_means_nothing_is_missing_or_refused() -> None:
    a = some()
    assert np.isnan(a.correlation(Scores(a.parts, np.ones(12))))
    with pytest.raises(VesaliusError, match="only 2 parts"):
        a.correlation(a.select([0, 1]))
    with pytest.raises(VesaliusError, match="score both alike"):
        a.correlation(some(positions=["end"] * 12))


def test_positions_are_part_of_what_a_row_is() -> None:
    part = Part("head", 0, 0)
    a = Scores([part] * 4, np.array([4.0, 3, 2, 1]), positions=list("abcd"))
    b = Scores([part] * 4, np.array([1.0, 2, 3, 4]), positions=list("dcba"))
    assert a.correlation(b) == pytest.approx(1)
    assert a.overlap(a, 4) == 1 and a.overlap(a, 2) == 1
    assert a.select([0, 1]).overlap(a.select([2, 3]), 2) == 0


def test_overlap_is_the_share_of_the_top_in_common() -> None:
    a = Scores(heads(6), np.array([6.0, -5, 4, 3, 2, 1]))
    b = Scores(heads(6), np.array([1.0, -6, 5, 2, 3, 4]))
    assert a.overlap(b, 1) == 0 and a.overlap(b, 2) == 0.5 and a.overlap(b, 3) == pytest.approx(2 / 3)
    assert a.overlap(b, 6) == 1 and a.overlap(b, 60) == 1 and a.overlap(b, 3) == b.overlap(a, 3)


def test_top_is_by_size_and_ties_keep_the_order_of_the_model() -> None:
    s = Scores(heads(6), np.array([1.0, -2, 2, -1, 2, 0]))
    assert [str(p) for p in s.top(4).parts] == ["L0.H1", "L0.H2", "L1.H0", "L0.H0"]
    assert [str(p) for p in s.top(3, by="value").parts] == ["L0.H2", "L1.H0", "L0.H0"]
    assert len(s.top(99)) == 6 and len(s.top(0)) == 0
    assert [str(p) for p in s.above(2).parts] == ["L0.H1", "L0.H2", "L1.H0"]
    s = some()
    top = s.top(3)
    assert np.allclose(top.per_example.mean(1), top.values)  # everything else is reordered along


def test_one_score_by_its_address() -> None:
    s = some()
    assert s["L1.H2"] == s.values[6] and s["a1.h2"] == s.values[6]
    with pytest.raises(PartError, match=r"L9\.H9 has no score"):
        s["L9.H9"]
    with pytest.raises(VesaliusError, match="2 parts but 3 values"):
        Scores(heads(2), np.zeros(3))


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    """400 samples of 40 from a skewed distribution of mean 1: between 90 % and 98 % of 95 % intervals hold it."""
    samples = np.random.default_rng(0).exponential(size=(400, 40))
    low, high = bootstrap_mean(samples, seed=1)
    assert 0.90 <= ((low <= 1) & (high >= 1)).mean() <= 0.98
    normal = np.random.default_rng(1).normal(size=(400, 40))
    low, high = bootstrap_mean(normal, seed=1)
    width = (high - low) / (2 * stats.norm.ppf(0.975) * normal.std(axis=1) / np.sqrt(40))
    assert width.mean() == pytest.approx(1, abs=0.03)
    low80, high80 = bootstrap_mean(normal, seed=1, level=0.8)
    assert 0.74 <= ((low80 <= 0) & (high80 >= 0)).mean() <= 0.86


def test_intervals_repeat_with_their_seed_and_are_missing_where_there_is_one_prompt() -> None:
    s = some()
    assert all(np.array_equal(a, b) for a, b in zip(s.interval(3), s.interval(3), strict=True))
    assert not np.array_equal(s.interval(3)[0], s.interval(4)[0])
    assert np.isnan(some(prompts=1).interval()).all()


def test_sign_stability_in_closed_cases() -> None:
    per = np.array([[1.0] * 4, [-2.0] * 4, [3.0, 3, 3, -5], [0.0] * 4])
    got = Scores(heads(4), per.mean(1), per).sign_stability(draws=40_000)
    # row 2: the mean of a resample is positive unless -5 is drawn twice or more (3 and 1: 4/4; 2 and 2: -4/4)
    wanted = stats.binom.cdf(1, 4, 0.25)
    assert got[0] == got[1] == got[3] == 1
    assert got[2] == pytest.approx(wanted, abs=0.01)
    assert np.isnan(Scores(heads(2), np.ones(2)).sign_stability()).all()


def test_place_stability_in_closed_cases() -> None:
    per = np.array([[9.0] * 4, [-8.0] * 4, [1.0] * 4, [0.0] * 4])
    s = Scores(heads(4), per.mean(1), per)
    assert s.place_stability(2).tolist() == [1, 1, 0, 0]
    assert s.place_stability(4).tolist() == [1, 1, 1, 1] and s.place_stability(0).tolist() == [0, 0, 0, 0]
    noisy = some(n=12)
    assert noisy.place_stability(5).sum() == pytest.approx(5)  # k places are given in every resample
    # one row is first exactly when its lucky prompt is drawn: 1 - (3/4)^4
    per = np.array([[4.0, 0, 0, 0], [0.9] * 4])
    s = Scores(heads(2), per.mean(1), per)
    assert s.place_stability(1, draws=40_000)[0] == pytest.approx(1 - 0.75**4, abs=0.01)


@pytest.mark.parametrize("full", [True, False])
def test_what_is_saved_is_what_is_loaded(tmp_path, full: bool) -> None:
    more = {"positions": list("abcdefghijkl"), "verified": np.arange(12) % 3 == 0} if full else {}
    s = some(**more)
    s.save(tmp_path / "new" / "run")
    back = Scores.load(tmp_path / "new" / "run")
    assert list(back.parts) == list(s.parts) and back.info == s.info
    assert np.array_equal(back.values, s.values) and np.array_equal(back.per_example, s.per_example)
    assert back.positions == s.positions
    assert (back.verified is None) == (not full) and (not full or np.array_equal(back.verified, s.verified))
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == ["scores.json", "scores.parquet"]


def test_edges_and_tables_without_prompts_are_saved_too(tmp_path) -> None:
    s = Scores([parse("embed->L0.H1.q"), parse("L0.H1->L1.MLP"), parse("unembed")], np.array([1.0, -2, 0.5]))
    s.save(tmp_path)
    back = Scores.load(tmp_path)
    assert list(back.parts) == list(s.parts) and back.per_example is None
    assert np.array_equal(back.values, s.values)


@pytest.mark.parametrize("name", ["scores.parquet", "scores.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_truncated_or_missing_file_is_refused(tmp_path, name: str, keep: float) -> None:
    some().save(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(VesaliusError, match="no readable scores in") as caught:
        Scores.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    path.unlink()
    with pytest.raises(VesaliusError, match="no readable scores in"):
        Scores.load(tmp_path)


def test_joining_keeps_prompts_only_if_all_have_them() -> None:
    a, b = some().select(range(4)), some().select(range(4, 12))
    assert np.array_equal(concat([a, b]).per_example, some().per_example)
    assert concat([a, Scores(b.parts, b.values)]).per_example is None


def test_scores_show_themselves() -> None:
    s = some()
    assert "m on t" in repr(s) and "12 rows" in repr(s) and "L2.H3" in s._repr_html_()
