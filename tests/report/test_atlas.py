"""The atlas says what the runs say, and chance as it is."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from vesalius.parts import parse
from vesalius.report.atlas import Needed, agreement, circuits, closely, head_map
from vesalius.scores import Scores

HEADS = [f"L{layer}.H{head}" for layer in range(3) for head in range(2)]


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def scores(*values: float) -> Scores:
    return Scores([parse(h) for h in HEADS], np.array(values))


def test_agreement_counts_what_is_shared_and_gives_the_chance_of_as_much() -> None:
    exact = scores(3, -2, 0.1, 0.2, 0, 0.3)
    circuit = ["L0.H0", "L0.H1"]
    found = rows(agreement(exact, circuit, {"same": exact}, {"mover": ["L0.H0", "L2.H0"], "none": []}))
    assert found[0] == ["same, its 2 largest", "2", "2", "0.7", "0.07", "1.00", "1.00"]
    draws = [len({*circuit} & {*drawn}) for drawn in itertools.combinations(HEADS, 2)]
    assert found[1][:4] == ["mover heads", "2", "1", f"{np.mean(draws):.1f}"]
    assert float(found[1][4]) == pytest.approx(np.mean([d >= 1 for d in draws]), abs=0.05)
    assert found[2][1:5] == ["0", "0", "0.0", "-"]


def test_every_head_stands_in_the_map_at_its_layer_and_index() -> None:
    leading = pd.DataFrame(
        {
            "part": HEADS,
            "layer": [0, 0, 1, 1, 2, 2],
            "index": [0, 1] * 3,
            "role": ["", "induction", "", "", "mover", ""],
        }
    )
    drawn = [line.split() for line in head_map(leading).splitlines() if line.startswith("L")]
    assert drawn == [["L0", ".", "I"], ["L1", ".", "."], ["L2", "M", "."]]


def test_circuits_tell_roles_and_what_was_refused() -> None:
    summary = {
        "accuracy": 0.9,
        "chance": 0.5,
        "size": {"heads": 2},
        "total": {"heads": 6},
        "faithfulness": {"mean": 0.8, "low": 0.7, "high": 0.9},
        "random": {"mean": 0.1},
    }
    it = Needed("ioi", summary, {"L0.H0": 3.0, "L0.H1": -1.5})
    text = circuits([it], {"docstring": "too hard"}, {"L0.H1": "mover"})
    assert rows(text)[0][1:6] == ["0.90 (0.50)", "2 of 6", "0.80 [0.70, 0.90]", "0.10", "1 of 2"]
    assert "- docstring: too hard" in text
    table = pd.DataFrame({"detector": ["mover"], "part": ["L0.H1"], "score": [0.6], "found": [True]})
    leading = pd.DataFrame({"part": HEADS, "role": ["", "mover", "", "", "", ""]})
    found = rows(closely([it], table, leading))
    assert found == [["**L0.H0**", "-", "none", "ioi +3.00"], ["**L0.H1**", "mover", "mover 0.60", "ioi -1.50"]]
