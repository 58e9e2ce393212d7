"""Roles on models whose heads' roles were planted, and the numbers under them against plain forward passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from pairs import random_pairs
from reuse_helpers import known, subject

from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.detectors.landmarks import landmarks
from vesalius.find.detectors.roles import roles, watch_shares
from vesalius.model import Intervention, Model, Pairs, Site
from vesalius.model.replay import Tape
from vesalius.parts import Part, parse_part

PLANTED = [("induction", "induction"), ("name-mover", "ioi"), ("name-mover", "who-stayed")]


def answerable(model: Model, rows: int = 4, padded: bool = False) -> Pairs:
    """Random prompts whose right answer is token 3 and whose wrong one is tokens 5 and, in some rows, 6."""
    pairs = random_pairs(model, rows=rows, length=10)
    clean = pairs.clean.clone()
    clean[::2, 6] = clean[::2, 5]
    mask = pairs.mask.clone()
    if padded:
        mask[0, :2] = 0
    answers = [[int(t)] for t in clean[:, 3]]
    wrong = [[int(t)] for t in clean[:, 5]]
    return replace(pairs, clean=clean, mask=mask, answers=answers, wrong=wrong)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize(("name", "task"), PLANTED)
def test_every_planted_head_gets_its_role_and_no_idle_head_gets_one(
    name: str, task: str, base: str, seed: int, tmp_path: Path
) -> None:
    made = subject(name, tmp_path, base, seed)
    found = roles(made.model, made.tasks[task], seed=seed)
    labels = {parse_part(p): r for p, r in zip(found.frame["part"], found.frame["role"], strict=True) if r}
    assert labels == made.roles[task]
    given = found.frame[found.frame["role"] != ""]
    assert ((given["score"] > given["null"] + 0.1) & (given["score"] <= 1)).all()
    for part, role in made.roles[task].items():
        assert found[part] == role and found.heads(role) == [part]
    assert found.counts() == {r: 1 for r in labels.values()}


def test_a_head_that_serves_another_task_has_no_role_in_this_one(tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path)
    leaver = known(made, "who-stayed", "previous-token")
    assert roles(made.model, made.tasks["ioi"])[leaver] == ""
    assert roles(made.model, made.tasks["who-stayed"])[leaver] == "previous-token"


def test_without_movers_nothing_can_be_told_to_inhibit(tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path)
    mover = known(made, "ioi", "mover")
    assert made.model.anatomy.main.blocks[3].layer == mover.layer == 3 and mover.index is not None
    size = made.model.d_head
    with torch.no_grad():
        made.model.hf.model.layers[3].self_attn.o_proj.weight[:, mover.index * size : (mover.index + 1) * size] = 0
    found = roles(made.model, made.tasks["ioi"])
    assert found.heads("mover", "inhibition", "content-gatherer") == []
    assert any("inhibition" in note for note in found.notes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_that_of_a_plain_forward_pass(family: str, padded: bool) -> None:
    model = tiny(family)
    pairs = answerable(model, padded=padded)
    found = roles(model, pairs)
    run = model.run(pairs.clean, pairs.mask, capture=[Site("pattern", n) for n in range(model.n_layers)])
    rows = torch.arange(pairs.n_rows)
    last_wrong = torch.where(rows % 2 == 0, 6, 5)
    for layer in range(model.n_layers):
        pattern = run["pattern", layer]
        here = found.frame[found.frame["layer"] == layer]
        np.testing.assert_allclose(here["attends_right"], pattern[rows, :, 9, 3].mean(0), atol=1e-5)
        np.testing.assert_allclose(here["attends_wrong"], pattern[rows, :, 9, last_wrong].mean(0), atol=1e-5)


def test_landmarks_by_token_and_by_name() -> None:
    model = tiny("llama")
    pairs = answerable(model)
    marks = landmarks(model, pairs)
    assert marks.right.nonzero().tolist() == [[r, 3] for r in range(4)]
    assert marks.wrong.nonzero().tolist() == [[0, 6], [1, 5], [2, 6], [3, 5]]
    assert marks.mentions.nonzero().tolist() == [[0, 5], [0, 6], [1, 5], [2, 5], [2, 6], [3, 5]]
    named = replace(pairs, positions={"wrong-color": torch.tensor([1, 2, -1, 4]), "other-color": torch.full((4,), 7)})
    wrong = landmarks(model, named).wrong
    assert wrong.nonzero().tolist() == [[0, 1], [0, 7], [1, 2], [1, 7], [2, 7], [3, 4], [3, 7]]
    assert landmarks(model, named).named == {
        "right": "token identity", "wrong": "named by the task", "asked": "token identity"
    }  # fmt: skip


def test_movers_attention_under_a_change_is_that_of_a_full_pass() -> None:
    model = tiny("llama")
    pairs = answerable(model, padded=True)
    marks = landmarks(model, pairs)
    head, mover = Part("head", 0, 1), Part("head", 2, 3)
    value = torch.randn(1, 1, model.d_head, generator=torch.Generator().manual_seed(0))
    change = Intervention(head, value=value, positions=marks.end)
    tape = Tape(model, pairs.clean, pairs.mask, pairs.reads, start=int(pairs.reads.min()))
    found = watch_shares(model, tape, [[], [change]], [mover], marks)

    def overwrite(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, 9, 1] = value[0, 0]
        return z

    site = Site("pattern", 2)
    rows = torch.arange(pairs.n_rows)
    for i, taps in enumerate(({}, {Site("z", 0): [overwrite]})):
        pattern = model.run(pairs.clean, pairs.mask, capture=[site], taps=taps)[site][rows, 3, 9]
        for side, where in enumerate((marks.right, marks.mentions)):
            torch.testing.assert_close(found[i, 0, :, side], (pattern * where).sum(-1), atol=1e-5, rtol=0)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_the_same_seed_gives_the_same_table_and_parts_narrow_it() -> None:
    model = tiny("gpt2")
    pairs = answerable(model)
    whole = roles(model, pairs, seed=3)
    assert whole.frame.equals(roles(model, pairs, seed=3).frame)
    few = roles(model, pairs, parts=[Part("head", 1, 2)], seed=3).frame
    assert few.equals(whole.frame[whole.frame["part"] == "L1.H2"].reset_index(drop=True))


def test_refusals() -> None:
    with pytest.raises(VesaliusError, match="causal language models"):
        roles(tiny("t5"), random_pairs(tiny("t5")))
    model = tiny("llama")
    pairs = answerable(model)
    with pytest.raises(VesaliusError, match="one token"):
        roles(model, replace(pairs, targets=torch.zeros(4, 1, dtype=torch.long)))
    with pytest.raises(UnknownName, match="inhibition"):
        roles(model, pairs).heads("inhibitor")


@pytest.mark.real
@pytest.mark.slow
def test_roles_of_the_known_ioi_heads(smollm2: Model) -> None:
    from vesalius.tasks import task

    found = roles(smollm2, task("ioi", n=16))
    assert found["L23.H3"] == "suppressor" and found["L24.H4"] == "negative-mover"
    assert {"L23.H0", "L23.H1"} <= {str(p) for p in found.heads("mover")}
    assert "L20.H0" in {str(p) for p in found.heads("inhibition")}
    assert found["L17.H4"] == "induction"
