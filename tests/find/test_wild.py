"""Lists of items and running text without one head, where it is known what that head does."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_hf
from test_path_patching import subject
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vesalius.build import planted
from vesalius.errors import VesaliusError
from vesalius.find.detectors.kinds import Kind, kinds_of
from vesalius.find.detectors.lists import list_task, mean_ablated
from vesalius.find.detectors.wild import hurt_most, kind_of
from vesalius.model import Model

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from task_helpers import bpe


def test_lists_ask_for_the_successor() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(r"\d", ["<eos>"]), eos_token="<eos>")
    kinds = {k.name: k for k in kinds_of(Model.wrap(tiny_hf("llama"), tokenizer))}
    examples = list_task(list(kinds.values()), shown=2, n=24).examples(tokenizer)
    groups = [e.group for e in examples]
    assert groups[: len(set(groups))] == list(dict.fromkeys(groups)) and {"days", "letters"} <= set(groups)  # in turn
    for example in examples:
        names = [t.strip() for t in kinds[example.group].texts]
        follows = kinds[example.group].follows
        said = [names.index(w) for w in example.clean.replace(",", " ").split()]
        assert follows[said[0]] == said[1] and example.wrong[0].strip() == names[said[1]]
        assert example.answer[0].strip() == names[follows[said[1]]]


def test_without_the_planted_head_nothing_is_counted_on() -> None:
    truth, model, pairs = subject("successor", "llama")
    heads = model.parts(("head",))
    drops = mean_ablated(model, pairs, heads).mean(1)
    assert {heads[i] for i in np.flatnonzero(drops > 0.1 * drops.max())} == set(truth.roles)


def test_series_without_two_runs_are_refused() -> None:
    short = Kind("short", (" a", " b", " c"), (1, 2, 3), (1, 2, -1), " ")
    with pytest.raises(VesaliusError, match="no series has two runs of 3"):
        list_task([short])


def copies(model: Model, rows: int) -> Tensor:
    """Prompts of the planted induction model: some nouns, then the same again."""
    rng = torch.Generator().manual_seed(0)
    made = planted("induction", "llama")
    words = [
        i
        for w, i in sorted(made.tokenizer.get_vocab().items())
        if w.isalpha() and w not in ("when", "while", "after", "since")
    ]
    half = torch.stack([torch.tensor(words)[torch.randperm(len(words), generator=rng)[:9]] for _ in range(rows)])
    return torch.cat([half, half], dim=1)


def test_without_the_induction_head_copies_are_foretold_worst() -> None:
    made = planted("induction", "llama")
    model = Model.wrap(made.hf, made.tokenizer, name="induction")
    ids = copies(model, 10)
    roles = {role: part for part, role in made.roles.items()}
    hurt = hurt_most(model, roles["induction"], ids, top=30)
    assert (hurt["kind"] == "copying").all() and (hurt["pos"] > 9).all()
    assert hurt["increase"].is_monotonic_decreasing and hurt["increase"].min() > 1
    assert (hurt["without"] - hurt["loss"]).to_list() == pytest.approx(hurt["increase"].to_list())
    idle = next(p for p in model.parts(("head",)) if p not in made.roles)
    assert hurt_most(model, idle, ids, top=5)["increase"].max() < 0.1


def test_the_loss_without_a_head_is_that_of_a_model_whose_head_writes_its_mean() -> None:
    """By transformers itself: the head's columns of the output matrix cut, and what they make of the mean added."""
    made = planted("induction", "llama")
    model = Model.wrap(made.hf, made.tokenizer, name="induction")
    ids = copies(model, 3)
    part = next(p for p, role in made.roles.items() if role == "induction")
    hurt = hurt_most(model, part, ids, top=12).set_index(["row", "pos"])
    attention = made.hf.model.layers[part.layer].self_attn
    d = model.d_head
    mine = slice(d * part.index, d * (part.index + 1))
    seen: list[Tensor] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    made.hf(ids)
    hook.remove()
    mean = seen[0][..., mine].mean((0, 1))

    def replace(_: object, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., mine] = mean
        return (z,)

    hook = attention.o_proj.register_forward_pre_hook(replace)
    with torch.no_grad():
        loss = -made.hf(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    hook.remove()
    for (row, pos), found in hurt.iterrows():
        assert found["without"] == pytest.approx(float(loss[row, pos - 1]), abs=1e-3)


@pytest.mark.parametrize(
    ("before", "token", "kind"),
    [
        (["On", " Monday", " and", " on"], " Tuesday", "succession"),
        ([" from", " Sunday", " to"], " Monday", "succession"),  # days begin again
        ([" from", " X", " to"], " Y", "succession"),
        ([" from", " 2", " to"], " 5", "greater-than"),
        ([" from", " 5", " to"], " 2", "other"),  # smaller, not greater
        ([" the", " United", " Nations", " ("], "UN", "acronym"),
        ([" the", " dog", " saw", " the"], " dog", "copying"),
        ([" the", " dog", *[" x"] * 40], " dog", "other"),  # too far back
    ],
)
def test_kinds_of_tokens(before: list[str], token: str, kind: str) -> None:
    assert kind_of(before, token) == kind
