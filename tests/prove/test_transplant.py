"""The transplant: on a model it must repair by construction, and its shortcuts against plain forward passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from reuse_helpers import known, subject
from test_roles import answerable

from vesalius.errors import PartError, UnknownName, VesaliusError
from vesalius.find.detectors.landmarks import landmarks
from vesalius.find.detectors.roles import roles
from vesalius.model import Model, Pairs, Site
from vesalius.parts import Part, parse_part
from vesalius.prove.transplant import Bench, best_prefix, choose, donors, transplant
from vesalius.tasks.metrics import LogitDiff

DAMAGE = 0.35  # see reuse_helpers.subject


def test_the_shared_inhibition_head_repairs_the_damaged_task_and_random_heads_do_not(tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path, damage=DAMAGE)
    source, target = made.tasks["who-stayed"], made.tasks["ioi"]
    found = roles(made.model, source)
    candidates = donors(found)
    shared = known(made, "ioi", "inhibition")
    assert candidates == [shared]
    done = transplant(made.model, target, target.held_out(24), candidates, movers=found.heads("mover"))
    assert done.heads == [shared] and done.n == 24
    assert done.before.preferred.mean() == 0 and done.after.preferred.mean() == 1 and done.lift == 1
    assert done.lift_interval() == pytest.approx((1, 1))
    # downstream: the mover itself turns away from the wrong name
    assert done.before.to_wrong.mean() > 0.55 and done.after.to_wrong.mean() < 0.4
    assert done.after.to_right.mean() > done.before.to_right.mean() + 0.2
    assert len(done.random.preferred) == 20 and not done.random.preferred.any() and done.random_lift == 0
    assert done.random_chosen is not None and not done.random_chosen.preferred.any()
    layer = {parse_part(h).layer for draw in done.info["random"] for h in draw}
    assert layer == {shared.layer} and all(str(shared) not in draw for draw in done.info["random"])
    # looking at the right name instead does not help: only what is written at the repeated name tells
    wrongly = transplant(made.model, target, target.held_out(24), candidates, look="right", draws=0, chosen_draws=0)
    assert wrongly.lift == 0 and np.isnan(wrongly.random_lift)


def test_the_wrong_head_is_not_taken_for_the_right_one(tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path, damage=DAMAGE)
    target = made.tasks["ioi"]
    shared = known(made, "ioi", "inhibition")
    idle = [p for p in made.model.parts(("head",)) if p.layer == shared.layer and p != shared]
    order = choose(Bench(made.model, target), [*idle, shared])
    assert order[0] == shared
    picked, outcome = best_prefix(Bench(made.model, target), order)
    assert picked == [shared] and outcome.preferred.mean(1).tolist()[:2] == [0, 1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bloom", "gptj"])
@pytest.mark.parametrize("padded", [False, True])
def test_looking_elsewhere_is_a_plain_forward_pass_with_the_pattern_overwritten(family: str, padded: bool) -> None:
    model = tiny(family)
    pairs = answerable(model, padded=padded)
    variants = [[], [Part("head", 1, 2)], [Part("head", 0, 0), Part("head", 2, 3), Part("head", 2, 1)]]
    mover = Part("head", 2, 0)
    found = Bench(model, pairs, [mover]).run(variants)
    marks = landmarks(model, pairs)
    rows = torch.arange(pairs.n_rows)
    tokens = LogitDiff().tokens(pairs)
    for i, heads in enumerate(variants):
        taps = {}
        for layer in {h.layer for h in heads}:

            def overwrite(x: torch.Tensor, layer: int | None = layer) -> torch.Tensor:
                x = x.clone()
                for h in heads:  # noqa: B023
                    if h.layer == layer:
                        x[:, h.index, 9] = torch.nn.functional.one_hot(marks.wrong.long().argmax(1), 10).float()
                return x

            taps[Site("pattern", layer)] = [overwrite]
        run = model.run(pairs.clean, pairs.mask, capture=[Site("pattern", 2)], taps=taps)
        assert run.logits is not None and tokens is not None
        logits = run.logits[:, 9][:, tokens][:, None]
        np.testing.assert_allclose(found.metric[i], LogitDiff()(logits, pairs).numpy(), atol=2e-4)
        right = torch.tensor([a[0] for a in pairs.answers])
        wrong = torch.tensor([w[0] for w in pairs.wrong])
        prefers = run.logits[rows, 9, right] > run.logits[rows, 9, wrong]
        assert found.preferred[i].tolist() == prefers.tolist()
        np.testing.assert_allclose(found.to_right[i], run["pattern", 2][rows, 0, 9, 3], atol=1e-5)
    assert not np.allclose(found.metric[0], found.metric[2], atol=1e-3)


def test_working_memory_changes_nothing(tmp_path: Path) -> None:
    made = subject("name-mover", tmp_path, damage=DAMAGE)
    variants = [[p] for p in made.model.parts(("head",))] + [[]]
    one, two = (Bench(made.model, made.tasks["ioi"], memory_gb=gb).run(variants) for gb in (1.0, 1e-9))
    np.testing.assert_allclose(one.metric, two.metric, atol=1e-3)
    assert (one.preferred == two.preferred).all()


def without_wrong(pairs: Pairs, rows: list[int]) -> Pairs:
    """The pairs with the wrong answer of some rows replaced by a token that the prompt does not hold."""
    wrong = [[95] if i in rows else w for i, w in enumerate(pairs.wrong)]
    clean = torch.where(pairs.clean == 95, 94, pairs.clean)
    return replace(pairs, clean=clean, wrong=wrong)


def test_prompts_without_a_token_to_look_at_stay_as_they_are_and_are_counted() -> None:
    model = tiny("llama")
    pairs = without_wrong(answerable(model), [1])
    head = Part("head", 0, 0)
    found = Bench(model, pairs).run([[], [head]])
    same = np.isclose(found.metric[0], found.metric[1], atol=1e-6)
    assert same.tolist() == [False, True, False, False]
    done = transplant(model, pairs, pairs, [head], draws=2, chosen_draws=0)
    assert any("1 of 4 held-out prompts" in note for note in done.notes)
    with pytest.raises(VesaliusError, match="no held-out prompt"):
        transplant(model, pairs, without_wrong(pairs, [0, 1, 2, 3]), [head], draws=0, chosen_draws=0)


def test_the_same_seed_gives_the_same_numbers_and_the_frame_holds_them() -> None:
    model = tiny("gpt2")
    pairs = answerable(model)
    heads = [Part("head", 0, 1), Part("head", 1, 3)]
    one, two = (transplant(model, pairs, pairs, heads, draws=3, chosen_draws=2, seed=5) for _ in range(2))
    assert one.to_frame().equals(two.to_frame()) and one.curve.equals(two.curve) and one.info == two.info
    frame = one.to_frame()
    accuracy = frame[frame["metric"] == "accuracy"].set_index("condition")["value"]
    assert accuracy["after"] - accuracy["before"] == pytest.approx(one.lift)
    assert len(frame[(frame["condition"] == "random") & (frame["metric"] == "accuracy")]) == 3
    assert set(frame["metric"]) == {"accuracy", "logit difference"}  # no movers were watched
    assert one.curve["accuracy"][len(one.heads)] == accuracy["after"]
    assert one.curve["accuracy"][0] == accuracy["before"]


def test_refusals() -> None:
    model = tiny("llama")
    pairs = answerable(model)
    with pytest.raises(VesaliusError, match="no heads to transplant"):
        transplant(model, pairs, pairs, [])
    with pytest.raises(PartError, match="L9.H0"):
        transplant(model, pairs, pairs, [Part("head", 9, 0)])
    with pytest.raises(VesaliusError, match="most=0"):
        transplant(model, pairs, pairs, [Part("head", 0, 0)], most=0)
    with pytest.raises(UnknownName, match="wrong"):
        Bench(model, pairs).run([[]], "wrnog")  # type: ignore[arg-type]


@pytest.mark.real
@pytest.mark.slow
def test_ioi_heads_repair_colored_objects(smollm2: Model) -> None:
    """Merullo et al. 2310.08744 in SmolLM2: heads found on IOI lift a task that the model does at chance."""
    from vesalius.tasks import task

    found = roles(smollm2, task("ioi", n=16))
    target = task("colored-objects", n=16)
    done = transplant(smollm2, target, target.held_out(48), donors(found), chosen_draws=3)
    assert done.before.preferred.mean() < 0.6  # a third is chance
    assert done.lift_interval()[0] >= 0.15
    assert done.random_lift <= 0.03
    assert done.random_chosen is not None
    assert done.random_chosen.preferred.mean() - done.before.preferred.mean() < 0.15
