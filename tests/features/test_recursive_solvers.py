"""Reconstructed shortcuts where the shortcut is known, and interventions where the head that decides is planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from vesalius.corpus.recursion import ONE, X0, X1, BinarySuccessor, Symbols, TreeTraversal
from vesalius.corpus.symbols import symbol_tokenizer
from vesalius.errors import VesaliusError
from vesalius.features.recursion import ModelSolver, by_kind, cases, cutoff, grid, markers, moved, reconstruct
from vesalius.features.recursion.program import _limited, _pruned, misjudged, shown
from vesalius.features.recursion.switch import forcing, inputs_for, marker_place
from vesalius.model import Model
from vesalius.parts import Part

LEAST, MOST = BinarySuccessor(), BinarySuccessor(order="most")


def noisy(solve, share: float, seed: int = 0):  # type: ignore[no-untyped-def]
    """A solver that gives a random symbol more in some answers."""
    rng = np.random.default_rng(seed)

    def run(inputs: list[Symbols]) -> list[Symbols]:
        return [(*solve(x), X1) if rng.random() < share else solve(x) for x in inputs]

    return run


@pytest.mark.parametrize("task", [LEAST, MOST], ids=["least", "most"])
@pytest.mark.parametrize("then", ["copy", "unchanged", "one", "stop", "skip"])
def test_a_planted_cut_off_is_reported(task: BinarySuccessor, then: str) -> None:
    """A solver that rewrites five steps and no more: the program says 5, and foretells every output."""
    found = cases(noisy(lambda x: _limited(x, task, 5, then), 0.02), task, range(1, 15), range(14), n=12)
    it = reconstruct(found, task)
    assert it.cutoff == 5
    kept = it.score.iloc[0]
    assert kept["recall"] >= 0.85 and kept["precision"] >= 0.85 and kept["exact"] >= 0.85
    assert it.score.iloc[1]["precision"] < kept["precision"]  # deeper than trained (4) is too early by one
    assert it.score.iloc[2]["exact"] < 0.2  # and length has nothing to do with it


def test_a_depth_that_is_read_wrongly_is_told() -> None:
    """Depths 6 and 7 are taken for 3: no limit of steps can say that."""

    def solve(x: Symbols) -> Symbols:
        depth = MOST.depth_of(x)
        return misjudged(x, MOST, 3 if depth in (6, 7) else depth)

    it = reconstruct(cases(noisy(solve, 0), MOST, range(1, 15), range(14), n=12), MOST)
    assert it.cutoff == 5 and it.score.iloc[0]["exact"] == 1 and it.score.iloc[0]["precision"] == 1
    assert it.program.lines == ("depth 6 is taken for 3", "depth 7 is taken for 3")


def test_exceptions_at_single_steps_are_told() -> None:
    """At steps 6 and on, X1 inside the recursion is copied, and it goes on rewriting after."""

    def solve(x: Symbols) -> Symbols:
        right = list(LEAST.answer(x))
        for step in range(6, min(LEAST.depth_of(x), len(right))):
            right[step] = X1 if step % 2 == 0 else X0
        return tuple(right)

    it = reconstruct(cases(noisy(solve, 0), LEAST, range(1, 15), range(14), n=12), LEAST)
    assert it.program.name == "stepwise" and it.cutoff == 6 and it.score.iloc[0]["exact"] == 1
    assert it.program.lines == ("inside the recursion, at step 6, 8, 10: X1 gives X1",)


def test_a_limit_of_length_is_found_beside_that_of_depth() -> None:
    def solve(x: Symbols) -> Symbols:
        return _limited(x, LEAST, 5, "copy")[:11]

    it = reconstruct(cases(noisy(solve, 0), LEAST, range(1, 15), range(13), n=8), LEAST)
    assert it.cutoff == 5 and it.score.iloc[0]["exact"] == 1
    assert it.program.lines[-1] == "an answer has at most 11 symbols"


def test_a_tree_walk_that_goes_no_deeper_is_found() -> None:
    task = TreeTraversal(depth=2, size=29)
    found = cases(noisy(lambda x: _pruned(x, task, 3), 0), task, task.sizes, range(1, 6), n=8)
    it = reconstruct(found, task)
    assert it.program.lines == ("nodes below depth 3 are left out",) and it.cutoff == 3
    assert it.score.iloc[0]["exact"] == 1 and it.score.iloc[1]["exact"] < 0.5


def test_a_solver_without_failures_has_no_shortcut() -> None:
    found = cases(noisy(LEAST.answer, 0), LEAST, range(8, 11), range(10), n=6)
    with pytest.raises(VesaliusError, match="0 of .* answers are wrong; .* from 20 failures or more"):
        reconstruct(found, LEAST)
    assert cutoff(noisy(LEAST.answer, 0), LEAST) is None


def test_the_grid_counts_what_was_right() -> None:
    found = cases(noisy(lambda x: _limited(x, LEAST, 5, "copy"), 0), LEAST, (9, 10, 12), range(9), n=6)
    table = grid(found, LEAST).set_index(["size", "depth"])
    assert table.loc[(10, 5), "right"] == 1 and table.loc[(10, 6), "right"] == 0
    assert table.loc[(10, 6), "where"] == "deeper" and table.loc[(12, 2), "where"] == "longer"
    kinds = by_kind(found, LEAST).set_index("where")
    assert kinds.loc["trained", "right"] == 1 and kinds.loc["longer", "right"] == 1
    assert kinds.loc["deeper", "n"] == sum(c.size <= 10 and c.depth > 4 for c in found)


def test_symbols_are_shown_as_they_are_written() -> None:
    assert shown((X1, X0, ONE), LEAST) == "X1 X0 01"
    assert shown((5, 8, 7, 7, 6), TreeTraversal()) == "( a . . )"


# -- a model: random weights, whose answers mean nothing, but whose patterns can be set and read


@pytest.fixture(scope="module")
def random_solver() -> ModelSolver:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=None, eos_token_id=None,
        initializer_range=0.6,
    )  # fmt: skip
    return ModelSolver(Model.wrap(GPT2LMHeadModel(config), symbol_tokenizer(8), name="random"), LEAST)


def test_free_running_is_decoding_from_its_own_output(random_solver: ModelSolver) -> None:
    """Against a plain loop that reads everything again at every step."""
    inputs = inputs_for(LEAST, 16)
    for x, out in zip(inputs, random_solver(inputs), strict=True):
        ids = LEAST.prompt(x)
        for _ in range(LEAST.longest + 2):
            said = int(random_solver.model.logits(torch.tensor([ids]))[0, -1].argmax())
            ids.append(said)
            if said == 1:
                break
        plain = ids[LEAST.width + 2 :]
        assert out == tuple(plain[:-1] if plain[-1] == 1 else plain)


def test_a_forced_head_looks_where_it_is_told_and_nowhere_else(random_solver: ModelSolver) -> None:
    head = Part("head", 1, 2)
    taps = forcing(random_solver, head, [3, 5])
    ids = torch.tensor([[*LEAST.prompt(x), X0, X1] for x in inputs_for(LEAST, 2)])
    model = random_solver.model
    plain = model.run(ids, capture=[("pattern", 1)])[("pattern", 1)]
    forced = model.run(ids, taps=taps, capture=[("pattern", 1)])[("pattern", 1)]
    start = LEAST.width + 1
    for row, place in enumerate((3, 5)):
        assert torch.equal(forced[row, 2, start:].argmax(-1), torch.full((3,), 1 + place))
        assert torch.allclose(forced[row, 2, start:].max(-1).values, torch.ones(3))
    assert torch.equal(forced[:, 2, :start], plain[:, 2, :start])
    assert torch.equal(forced[:, [0, 1, 3]], plain[:, [0, 1, 3]])


def test_a_head_that_is_made_to_mark_scores_highest(
    random_solver: ModelSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its attention is put where each input's recursion ends: marker is 1, whatever the others do."""
    inputs = inputs_for(LEAST, 16)
    taps = forcing(random_solver, Part("head", 0, 1), [marker_place(LEAST, x) for x in inputs])
    run = Model.run
    monkeypatch.setattr(Model, "run", lambda self, ids, **options: run(self, ids, taps=taps, **options))
    table = markers(random_solver, inputs)
    assert table.loc[0, "part"] == "L0.H1" and table.loc[0, "marker"] == pytest.approx(1, abs=1e-5)
    assert table.loc[1, "marker"] < 0.5


def test_a_random_model_does_not_follow_a_forced_head(random_solver: ModelSolver) -> None:
    told = moved(random_solver, Part("head", 1, 0), inputs_for(LEAST, 32))
    assert (told["depth"] != told["forced"]).all() and told["switched"].mean() <= 0.1


def test_a_model_of_another_vocabulary_is_refused(random_solver: ModelSolver) -> None:
    with pytest.raises(VesaliusError, match=r"random \(causal, 8 symbols\) cannot answer tree_traversal"):
        ModelSolver(random_solver.model, TreeTraversal())
