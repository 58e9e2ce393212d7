"""`vesalius frequency` as a user meets it: on a small model, and given nonsense."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Outcome, assert_same, vesalius

sys.path.append(str(Path(__file__).parents[1] / "features"))
from frequency_helpers import clock

from vesalius.features.frequency import made_sentences
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.runs import Run

SENTENCES = made_sentences(24)
QUICK = ("--orders", "2", "--permutations", "50", "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose unit 0 fires once a sentence, and unit 1 twice; its sentences; recordings to them."""
    folder = tmp_path_factory.mktemp("frequency")
    made = clock(sorted({w for s in SENTENCES for w in s}))
    with quiet_transformers():
        made.hf.save_pretrained(folder / "model")
        made.tokenizer.save_pretrained(folder / "model")
    texts = [" ".join(s) for s in SENTENCES]
    (folder / "s.txt").write_text("\n".join(texts))
    data = np.random.default_rng(0).standard_normal((24, 3, 5))
    np.savez(folder / "r.npz", stimuli=texts, recordings=data)
    np.savez(folder / "other.npz", stimuli=[*texts[:-1], "another one came late"], recordings=data)
    return folder


def asked(folder: Path, *more: object) -> Outcome:
    given = ("--model", folder / "model", "--sentences", folder / "s.txt", "--out", folder / "runs")
    return vesalius("frequency", *given, *QUICK, *more)


def test_the_planted_units_are_told_and_compared(folder: Path) -> None:
    told = asked(folder, "--recordings", folder / "r.npz").json
    row = {r["condition"]: r for r in told["conditions"]}
    assert (row["sentences"]["sentence"], row["sentences"]["phrase"]) == (1, 1)
    assert row["untrained"]["sentence"] == 0 and row["shuffled"]["sentence"] >= 1  # a clock hears no words
    run = Run.open(Path(told["run"]))
    units = run.table("units")
    assert dict(zip(units["unit"], units["set"], strict=True)) == {0: "sentence", 1: "phrase"}
    assert len(run.scores("scores")) == 16 and told["similarity"][0]["layer"] == 0
    page = Path(told["report"]).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and told["lead"][:40] in page


def test_the_same_request_gives_the_same_bytes(folder: Path) -> None:
    first = asked(folder, "--controls", "none").json
    other = vesalius(
        "frequency", "--model", folder / "model", "--sentences", folder / "s.txt", "--out", folder / "other", *QUICK,
        "--controls", "none",
    ).json  # fmt: skip
    assert_same(Run.open(Path(first["run"])), Run.open(Path(other["run"])))
    assert asked(folder, "--controls", "none").json["run"] == first["run"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sentences", "{}/uneven.txt"), "uneven.txt line 3 has 5 words and line 1 4; all sentences"),
        (("--sentences", "{}/none.txt"), "no file {}/none.txt; check the path"),
        (("--n", "6"), "6 sentences of 4 words are too few: the 10 bins beside the sentence's rate need 12 or more"),
        (("--n", "400"), "400 sentences cannot be made of 64 words of each kind; ask for 1 to 64"),
        (("--recordings", "{}/other.npz", "--sentences", "{}/s.txt"),
         "stimulus 24 of the recordings, 'another one came late', is not among the sentences the model reads"),
        (("--recordings", "{}/s.txt", "--sentences", "{}/s.txt"), "is neither .npz nor .h5"),
        (("--controls", "shufled"), "unknown control 'shufled'; did you mean 'shuffled'?"),
        (("--units", "phrase"), "--units chooses what is compared with recordings; give --recordings too"),
        (("--sentences", "{}/s.txt", "--corpus", "bible-web"), "--sentences and --corpus both say"),
        (("--corpus", "{}/s.txt", "--words", "9"), "the text has 0 sentences of 9 words, and 64 are needed"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    (folder / "uneven.txt").write_text("old men saw ships\nbad dogs bit cats\na small dog ran home\n")
    given = [a.replace("{}", str(folder)) for a in arguments]
    refused = vesalius("frequency", "--model", folder / "model", "--out", folder / "runs", *given)
    assert said.replace("{}", str(folder)) in refused.error


def test_json_is_strict(folder: Path) -> None:
    asked(folder, "--controls", "shuffled,shuffled").json  # noqa: B018  # a control that is named twice is taken once
    json.loads(asked(folder, "--controls", "none").out, parse_constant=lambda name: pytest.fail(name))
