"""Odd prompts by their trajectory: oddness that was planted is told, and its absence too."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lens_helpers import small
from sklearn.metrics import roc_auc_score

from vesalius.errors import UnknownName, VesaliusError
from vesalius.lens import LogitLens, TunedLens, detect, trajectory
from vesalius.lens.anomaly import area, feature_names, judge_ends, read_ends, read_prompts


def prompts(words: range, n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.choice(words)}" for _ in range(rng.randint(5, 9))) for _ in range(n)]


@pytest.mark.parametrize("detector", ["lof", "isolation-forest"])
def test_prompts_of_another_kind_are_told_from_more_of_the_same(detector: str) -> None:
    model = small()
    normal = prompts(range(5, 7), 100, 0)
    odd = detect(model, LogitLens(), normal, prompts(range(60, 97), 60, 1), detector=detector)
    same = detect(model, LogitLens(), normal, prompts(range(5, 7), 60, 2), detector=detector)
    assert odd.auroc["trajectory"]["auroc"] > 0.9
    assert same.auroc["trajectory"]["low"] < 0.5 < same.auroc["trajectory"]["high"]
    assert (odd.table["kind"] == "normal").sum() == 50 and odd.fitted == 50
    mine = odd.table[odd.table["kind"] == "normal"]
    assert set(mine["prompt"]) <= set(normal) and np.isfinite(odd.table["score"]).all()
    again = detect(model, LogitLens(), normal, prompts(range(60, 97), 60, 1), detector=detector)
    assert again.table.equals(odd.table) and again.auroc == odd.auroc


def test_features_are_the_trajectory_at_the_end_whatever_their_company() -> None:
    model = small("gpt2")
    texts = ["w7 w8", *prompts(range(5, 97), 20, 0)]
    ends = read_ends(model, [LogitLens()], texts)
    found, plain = ends.features["logit"], ends.plain
    names = feature_names(model)
    assert found.shape == (21, len(names)) and names[:4] == ["embed kl", "embed entropy", "embed nll", "L0 kl"]
    for i in (0, 3, 20):
        alone = trajectory(model, texts[i], tokens=[int(trajectory(model, texts[i]).top_ids[-1, -1, 0])])
        row = dict(zip(names, found[i], strict=True))
        for layer, name in ((0, "embed"), (2, "L1")):
            assert row[f"{name} kl"] == pytest.approx(alone.kl[layer, -1], abs=1e-4)
            assert row[f"{name} entropy"] == pytest.approx(alone.entropy[layer, -1], abs=1e-4)
            assert row[f"{name} nll"] == pytest.approx(-np.log(alone.chosen_probs[layer, -1, 0]), abs=1e-4)
        assert plain["entropy"][i] == pytest.approx(alone.entropy[-1, -1], abs=1e-4)
        assert plain["perplexity"][i] == pytest.approx(np.exp(alone.nll[-1, :-1].mean()), rel=1e-4)


def test_the_logit_lens_stands_beside_another_one_on_the_same_split() -> None:
    model = small()
    lens = TunedLens.for_model(model)
    with torch.no_grad():
        lens.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    normal, odd = prompts(range(5, 7), 60, 0), prompts(range(60, 97), 30, 1)
    both = detect(model, lens, normal, odd, seed=3)
    plain = detect(model, LogitLens(), normal, odd, seed=3)
    assert list(both.auroc) == ["trajectory", "logit", "entropy", "perplexity"]
    assert both.auroc["logit"] == plain.auroc["trajectory"] and "logit" not in plain.auroc
    assert not np.allclose(both.table["score"], plain.table["score"])
    ends = read_ends(model, [lens, LogitLens()], [*odd, *normal])  # the order in which they were read is nothing
    again = judge_ends(ends, "tuned", np.arange(30, 90), np.arange(30), seed=3)
    assert again.table["prompt"].tolist() == both.table["prompt"].tolist()
    assert np.allclose(again.table["score"], both.table["score"], rtol=1e-3)


def test_the_area_has_an_interval_and_the_control_may_turn_round() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    scores = labels + rng.normal(size=80)
    found = area(labels, scores)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["low"] < found["auroc"] < found["high"] and found["high"] - found["low"] < 0.3
    assert area(labels, -scores, either=True)["auroc"] == pytest.approx(found["auroc"])
    assert area(labels, -scores)["auroc"] == pytest.approx(1 - found["auroc"])


def test_files_of_prompts(tmp_path: Path) -> None:
    lines, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\n\ntwo, three\n")
    rows.write_text('{"text": "one"}\n"two, three"\n')
    assert read_prompts(lines) == read_prompts(rows) == ["one", "two, three"]
    for text, says in (("{}\n", "line 1 has no text"), ("no\n", "line 1 is not JSON"), ("\n", "holds no prompts")):
        rows.write_text(text)
        with pytest.raises(VesaliusError, match=says):
            read_prompts(rows)
    with pytest.raises(VesaliusError, match="none.txt"):
        read_prompts(tmp_path / "none.txt")


def test_bad_requests_are_refused() -> None:
    model, normal = small(), prompts(range(5, 9), 40, 0)
    with pytest.raises(VesaliusError, match="39 normal prompts are too few: 40 are needed"):
        detect(model, LogitLens(), normal[:39], ["w7"])
    with pytest.raises(VesaliusError, match="no prompts to test"):
        detect(model, LogitLens(), normal, [])
    with pytest.raises(UnknownName, match="did you mean 'lof'"):
        detect(model, LogitLens(), normal, ["w7"], detector="lef")
    with pytest.raises(VesaliusError, match="left to right"):
        detect(small("bert"), LogitLens(), normal, ["w7"])
