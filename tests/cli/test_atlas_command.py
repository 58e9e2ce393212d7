"""`vesalius atlas` on a model whose mechanism is known, and given nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import vesalius

from vesalius.build.planted import Planted


def test_the_page_names_the_planted_heads_and_the_commands_behind_it(
    mover: Path, truth: Planted, tmp_path: Path
) -> None:
    page = tmp_path / "atlas.md"
    done = vesalius(
        "atlas",
        "--model",
        mover,
        "--tasks",
        mover / "ioi.jsonl",
        "--n",
        "8",
        "--page",
        page,
        "--out",
        tmp_path,
        "--json",
    )
    assert done.code == 0, done.err
    text = page.read_text()
    circuit = text.split("## What circuits need")[1].split("## ")[0]
    heads = [str(p) for p in truth.circuits["ioi"].roles if p.kind == "head"]
    assert heads and all(head in circuit for head in heads)
    assert set(done.json["runs"]) == {line for line in text.splitlines() if line.startswith("vesalius ")}
    assert all(Path(run, "summary.json").is_file() for run in done.json["runs"].values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tasks", "ioy"], "ioi"),
        (["--tasks", ","], "--tasks is empty"),
        (["--page", "."], "is a folder"),
    ],
)
def test_nonsense_is_refused_before_anything_is_measured(given: list[str], said: str) -> None:
    assert said in vesalius("atlas", *given).error


def test_what_a_command_refuses_is_said_once(mover: Path, tmp_path: Path) -> None:
    asked = ("atlas", "--model", mover, "--tasks", mover / "ioi.jsonl", "--n", "100000", "--out", tmp_path)
    assert "100000" in vesalius(*asked).error
