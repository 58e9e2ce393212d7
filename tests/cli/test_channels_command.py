"""`vesalius channels` and `vesalius observe`: what they print is what Python gives; wrong use is one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import vesalius
from families import tiny_hf
from transformers import AutoTokenizer

import vesalius as bench
from vesalius.build.planted import Planted
from vesalius.corpus import read
from vesalius.lens import (
    composition,
    coupling,
    head_features,
    inhibition,
    mean_states,
    moments,
    norm_scales,
    pull_back,
    token_rows,
)
from vesalius.lens.texts import states
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.runs import Run


@pytest.fixture(scope="module")
def prompts(mover: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted task with its two names' places."""
    rows = [json.loads(line) for line in (mover / "ioi.jsonl").read_text().splitlines()[:12]]
    for row in rows:
        right, wrong = row["answer"].strip(), row["wrong"].strip()
        ends = row["clean"].index(right) + len(right), row["clean"].rindex(wrong) + len(wrong)
        row["positions"] = {"IO": [ends[0] - len(right), ends[0]], "S2": [ends[1] - len(wrong), ends[1]]}
    path = tmp_path_factory.mktemp("task") / "ioi.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_channels_print_what_python_gives(mover: Path, prompts: Path, truth: Planted, tmp_path: Path) -> None:
    role = {name: str(part) for part, name in truth.roles.items()}
    asked = ("--model", mover, "--from", role["inhibition"], "--kind", "q", "--top", 3, "--out", tmp_path, "--json")
    found = vesalius("channels", *asked, "--task", prompts).json
    model = bench.open(str(mover))
    best = composition(model, role["inhibition"], kinds="q").top(8)
    assert [r["channel"] for r in found["channels"]] == [str(e) for e in best.parts[:3]]
    assert [r["score"] for r in found["channels"]] == pytest.approx(best.values[:3].tolist(), rel=1e-5)
    assert found["channels"][0]["channel"] == f"{role['inhibition']}->{role['mover']}.q"  # what was planted
    each = inhibition(model, bench.task(str(prompts)), list(best.parts)).to_frame()  # type: ignore[arg-type]
    assert len(found["effects"]) == len(best) < len(each)
    for row in found["effects"]:
        mine = each[each["part"] == row["channel"]].set_index("component")["score"]
        assert abs(row["inhibition"]) == pytest.approx(mine.abs().max(), abs=1e-6)
        assert row["inhibition"] == pytest.approx(mine[row["component"]], abs=1e-6)
    assert found["effects"][0]["to_right"] > 0.9 > 0.1 > found["effects"][0]["to_wrong"]
    page = Path(found["report"]).read_text()
    assert page.startswith("<!doctype html>") and "What happens without them" in page
    again = vesalius("channels", *asked, "--task", prompts).json
    assert again == found  # the finished run is found again


def test_observe_prints_what_python_gives(mover: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(json.loads(x)["clean"] for x in (mover / "ioi.jsonl").read_text().splitlines()))
    asked = ("mary - john", "--model", mover, "--with", "mary - tom", "--corpus", text, "--tokens", 400)
    found = vesalius("observe", *asked, "--through", "L2.MLP,L3.H0", "--out", tmp_path, "--json").json
    model = bench.open(str(mover))
    rows = token_rows(model, [d.text for d in read(text)], 400)
    given: dict[str, Any] = {"scales": norm_scales(model, rows), "points": mean_states(model, rows)}
    path = ["L2.MLP", "L3.H0"]
    first, second = (pull_back(model, o, path, **given) for o in ("mary - john", "mary - tom"))
    ranking, _ = head_features(model, "mary - john", path, **given)
    assert [r["part"] for r in found["heads"]] == [str(p) for p in ranking.top(10).parts]
    assert [r["length"] for r in found["heads"]] == pytest.approx(ranking.top(10).values.tolist(), rel=1e-5)
    assert found["at"] == "L2.resid_mid" and found["length"] == pytest.approx(first.norm, rel=1e-5)
    half = len(rows) // 2
    known, later = moments(model, rows[:half], first.at), states(model, rows[half:], first.at)
    told = found["coupling"]
    assert told["coefficient"] == pytest.approx(coupling(first, second).coefficient, rel=1e-4)
    assert told["weighted"] == pytest.approx(coupling(first, second, known).coefficient, rel=1e-4)
    slope = np.polyfit(first.scores(later).numpy(), second.scores(later).numpy(), 1)[0]
    assert told["slope"] == pytest.approx(slope, rel=1e-3)
    assert "Coupled with another observable" in Path(found["report"]).read_text()
    vector = Run.open(found["run"]).array("feature")["vector"]
    assert np.allclose(vector, first.vector.numpy(), atol=1e-6)


def folder(family: str, tmp_path: Path, words: Path) -> Path:
    """A tiny random model of a family beside the tokenizer of another folder."""
    with quiet_transformers():
        tiny_hf(family).save_pretrained(tmp_path / family)
        AutoTokenizer.from_pretrained(words).save_pretrained(tmp_path / family)
    return tmp_path / family


REFUSED: list[tuple[str, tuple[str, ...], str]] = [
    ("llama", ("channels", "--from", "L7.H0"), "L7.H0 does not exist: this model has blocks L0 to L2"),
    ("llama", ("channels", "--to", "L1.H9"), "L1.H9 does not exist: block 1 has H0 to H3"),
    ("llama", ("channels", "--to", "L1.MLP"), "L1.MLP is not an attention head"),
    ("llama", ("channels", "--from", "mover"), "'mover'"),
    ("llama", ("channels", "--from", "L2.H0"), "no channel runs from L2.H0 to any head"),
    ("llama", ("channels", "--from", "L1.H0", "--to", "L1.H1"), "no channel runs from L1.H0 to L1.H1"),
    ("llama", ("channels", "--kind", "o"), "unknown kind of composition 'o'"),
    ("gpt-neox", ("channels", "--from", "L1.H0", "--to", "L1.H1"), "no channel runs from L1.H0 to L1.H1"),
    ("llama", ("observe", "zzyzx - w5"), "zzyzx is unknown to the tokenizer"),
    ("llama", ("observe", "w5 - "), "is no observable"),
    ("llama", ("observe", "w5 - w5"), "of the other side"),
    ("llama", ("observe", "#99999"), "is no token"),
    ("llama", ("observe", "w5", "--through", "L0.H7"), "L0.H7 does not exist"),
    ("llama", ("observe", "w5", "--through", "L2.H0,L1.H0"), "the path is not forward"),
    ("llama", ("observe", "w5", "--through", "L1.MLP"), "L1.MLP is not linear"),
    ("llama", ("observe", "w5", "--through", "L1.H0", "--at", "L1.H0"), "L1.H0 is no place in the stream"),
    ("llama", ("observe", "w5", "--through", "L1.H0", "--at", "L2.resid_pre"), "lies behind the beginning"),
    ("llama", ("observe", "w5", "--through", "L1.MLP", "--between", "w5 w6"), "is not two prompts"),
    ("llama", ("observe", "w5", "--corpus", "nowhere.txt"), "nowhere.txt"),
    ("gpt-neox", ("observe", "w5", "--through", "L1.H0,L1.MLP"), "attention and MLP of a block of"),
    ("bert", ("observe", "w5 - w6"), "is more than a matrix"),
]


@pytest.fixture(scope="module")
def models(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {"llama": random_llama} | {f: folder(f, place, random_llama) for f in ("gpt-neox", "bert")}


@pytest.mark.parametrize(("family", "words", "says"), REFUSED, ids=[" ".join([f, *w]) for f, w, _ in REFUSED])
def test_wrong_use_is_one_line(
    family: str, words: tuple[str, ...], says: str, models: dict[str, Path], tmp_path: Path
) -> None:
    done = vesalius(*words, "--model", models[family], "--out", tmp_path / "runs")
    assert says in done.error


def test_words_of_several_tokens_and_small_heads_are_noted(tmp_path: Path, mover: Path, random_llama: Path) -> None:
    found = vesalius("observe", "mary john - tom", "--model", mover, "--out", tmp_path, "--json").json
    assert any("mary john is" in n and "only the first piece" in n for n in found["notes"])
    notes = vesalius("channels", "--model", random_llama, "--out", tmp_path, "--json").json["notes"]
    assert any("too few for their z" in n for n in notes) and any("share a value matrix" in n for n in notes)


def test_scores_that_do_not_vary_have_no_slope(random_llama: Path, tmp_path: Path) -> None:
    for name, word in (("one.txt", "w5"), ("many.txt", None)):
        (tmp_path / name).write_text(" ".join(word or f"w{1 + 7 * i % 90}" for i in range(200)))
        asked = ("observe", "w3 - w4", "--with", "w5 - w6", "-m", random_llama, "--corpus", tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = vesalius(*asked, "--tokens", 100, "--at", "L0.resid_pre", "--out", tmp_path, "--json").json
        same = word is not None
        assert ("slope" in found["coupling"]) is not same
        assert any("the same for all tokens" in note for note in found["notes"]) is same
        shown = (Path(found["run"]) / "report.html").read_text("utf-8")
        assert ("no text on which both vary" in shown) is same
