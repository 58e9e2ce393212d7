"""Circuits side by side on planted models, whose shared and private parts are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reuse_helpers import known, subject

import vesalius
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.prove.overlap import overlap
from vesalius.prove.reuse import Reuse, reuse
from vesalius.report import report
from vesalius.runs import Run

SHARE = 0.15  # three of sixteen heads and four MLPs


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Reuse:
    made = subject("name-mover", tmp_path_factory.mktemp("planted"), damage=0.35)
    return reuse(made.model, [made.tasks["who-stayed"], made.tasks["ioi"]], share=SHARE, held_out=24)


@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_overlap_is_exactly_the_planted_fraction(base: str, tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path, base)
    found = reuse(made.model, [made.tasks["who-stayed"], made.tasks["ioi"]], share=SHARE, with_transplant=False)
    for item, task in zip(found.items, ("who-stayed", "ioi"), strict=True):
        assert item.name == task and item.circuit.nodes == set(made.roles[task])
        assert {p: item.role(p) for p in item.circuit.nodes} == made.roles[task]
        assert item.performance.accuracy == 1
        assert item.faithfulness is not None and item.faithfulness["mean"] == pytest.approx(1, abs=0.02)
        assert item.faithfulness["mean"] > item.random.max()
    frame = found.overlap_frame().set_index("kind")
    assert frame.loc["all", "jaccard"] == 0.5 and frame.loc["head", "shared"] == 2
    assert frame.loc["all", "of_a"] == frame.loc["all", "of_b"] == 2 / 3
    # 3 of 16 heads in either: 9 / 16 expected in common, by the closed form
    assert frame.loc["head", "chance_shared"] == pytest.approx(9 / 16)
    parts = found.parts_frame().set_index("part")
    shared = {str(known(made, "ioi", role)) for role in ("inhibition", "mover")}
    assert set(parts.index[parts["where"] == "shared"]) == shared
    assert parts.loc[str(known(made, "ioi", "duplicate-token")), "where"] == "ioi"


def test_the_transplant_goes_from_the_first_task_to_the_second(repaired: Reuse) -> None:
    done = repaired.transplant
    assert done is not None and done.lift == 1 and done.random_lift == 0
    summary = repaired.summary()
    assert (summary["transplant"]["source"], summary["transplant"]["target"]) == ("who-stayed", "ioi")
    assert summary["transplant"]["lift"] == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert [i["accuracy"] for i in summary["items"]] == [1, 0]


def test_the_report_draws_all_of_it(repaired: Reuse, tmp_path: Path) -> None:
    with Run.start(
        {"command": "reuse", "tasks": ["who-stayed", "ioi"]}, tmp_path, command_line="vesalius reuse"
    ) as run:
        for name, value in repaired.tables().items():
            if isinstance(value, dict):
                run.save_json(name, value)
            else:
                run.save_table(name, value)
    page = report(run).read_text()
    for text in ("who-stayed", "inhibition", "The transplant", "2 parts shared by all; 1 of them in the same role"):
        assert text in page
    assert "no transplant was tried" not in page and "not computed" not in page


def test_a_finished_run_is_read_back_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path, n=8)
    kept: dict[str, np.ndarray] = {}

    class Shelf:
        puts = 0

        def get(self, key: str) -> np.ndarray | None:
            return kept.get(key)

        def put(self, key: str, values: np.ndarray) -> None:
            Shelf.puts += 1
            kept[key] = values

    tasks = [made.tasks["who-stayed"], made.tasks["ioi"]]
    first = reuse(made.model, tasks, share=SHARE, with_transplant=False, store=Shelf())
    puts = Shelf.puts
    again = reuse(made.model, tasks, share=SHARE, with_transplant=False, store=Shelf())
    assert puts > 0 and Shelf.puts == puts
    assert first.overlap_frame().equals(again.overlap_frame()) and first.parts_frame().equals(again.parts_frame())
    # what one task stored is never taken for the other's
    assert not np.allclose(first.items[0].scores.values, first.items[1].scores.values)


def test_without_heads_to_move_a_note_says_so(tmp_path: Path) -> None:
    made = subject("induction", tmp_path)
    task, same = (vesalius.task(made.tasks["induction"].name) for _ in range(2))  # all rows: halved by reuse itself
    found = reuse(made.model, [task, same], share=0.3)
    assert found.transplant is None and found.transplant_frame() is None
    assert any("no inhibition head" in note for note in found.notes)
    assert [i.name for i in found.items] == ["induction (1)", "induction (2)"]
    assert found.overlap_frame().set_index("kind").loc["all", "jaccard"] == 1


def test_several_models_on_one_task(tmp_path: Path) -> None:
    one = subject("name-mover", tmp_path / "one", seed=0)
    two = subject("name-mover", tmp_path / "two", seed=2)
    task = one.tasks["ioi"]
    found = reuse([one.model, two.model], task, share=SHARE)
    assert [i.name for i in found.items] == ["name-mover (1)", "name-mover (2)"]
    by_hand = overlap(found.items[0].circuit, found.items[1].circuit, found.items[0].circuit.universe, match="kind")  # type: ignore[arg-type]
    assert (
        found.overlaps[0, 1].total.shared == by_hand.total.shared == len(set(one.roles["ioi"]) & set(two.roles["ioi"]))
    )
    assert any("trained from the other" in n for n in found.notes) and any(
        "two tasks in one model" in n for n in found.notes
    )
    assert [i.summary()["roles"] for i in found.items] == [{"duplicate-token": 1, "mover": 1, "inhibition": 1}] * 2
    depth = found.depth_frame()
    assert depth.groupby("name")["heads"].sum().tolist() == [3, 3]


def test_models_of_different_shape_are_compared_by_depth_and_role(tmp_path: Path) -> None:
    from vesalius.build import planted

    one = subject("name-mover", tmp_path / "one")
    made = planted("name-mover", "llama", idle_heads=5)
    wide = Model.wrap(made.hf, made.tokenizer, name="wide")
    found = reuse([one.model, wide], one.tasks["ioi"], share=SHARE)
    assert found.overlaps == {} and len(found.overlap_frame()) == 0
    assert any("different shapes" in n for n in found.notes)
    tables = found.tables()
    deep = tables["depth"].groupby(["name", "depth"])["roles"].first().unstack()
    assert (deep.loc["name-mover"] == deep.loc["wide"]).all()


def test_refusals(tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path, n=4)
    tasks = list(made.tasks.values())
    with pytest.raises(VesaliusError, match="nothing to be compared with"):
        reuse(made.model, tasks[0])
    with pytest.raises(VesaliusError, match="2 tasks in 2 models"):
        reuse([made.model, made.model], tasks)
    with pytest.raises(VesaliusError, match="acdc scores edges"):
        reuse(made.model, tasks, method="acdc")
