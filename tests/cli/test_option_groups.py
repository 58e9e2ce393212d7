"""A dataclass among a command's parameters stands as options of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

from vesalius.cli.groups import expanded


@dataclass(frozen=True)
class Place:
    """Where."""

    out: Annotated[Path | None, typer.Option("--to", help="The folder.")] = None
    rows: Annotated[int, typer.Option(min=2)] = 8


@dataclass(frozen=True)
class Wide(Place):
    """With another default."""

    rows: Annotated[int, typer.Option(min=2)] = 64


def told(*given: str) -> tuple[str, int, Place] | str:
    """What a command with two groups is called with, or what is refused."""
    app, called = typer.Typer(), []

    def command(name: Annotated[str, typer.Argument()], *, place: Place, seed: int = 3) -> None:
        """Does it."""
        called.append((name, seed, place))

    app.command()(expanded(command))
    found = CliRunner().invoke(app, list(given))
    return called[0] if called else found.output


def test_fields_are_options_with_their_own_checks_and_defaults() -> None:
    assert told("a") == ("a", 3, Place(None, 8))
    assert told("a", "--to", "b", "--rows", "5", "--seed", "4") == ("a", 4, Place(Path("b"), 5))
    refused = told("a", "--rows", "1")
    assert isinstance(refused, str) and "--rows" in refused and "greater than or equal" in refused
    shown = told("--help")
    assert isinstance(shown, str) and all(x in shown for x in ("Does it.", "--to", "The folder.", "--rows", "--seed"))


def test_a_group_may_change_anothers_default() -> None:
    app, called = typer.Typer(), []

    def command(*, place: Wide) -> None:
        called.append(place)

    app.command()(expanded(command))
    CliRunner().invoke(app, [])
    assert called == [Wide(None, 64)]
