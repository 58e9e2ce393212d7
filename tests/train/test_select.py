from __future__ import annotations

from pathlib import Path

import pytest
import torch
from train_helpers import small, steps_of, weights

import vesalius
from vesalius.errors import VesaliusError
from vesalius.runs import Run
from vesalius.train.running import train

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def parent(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small(text), tmp_path_factory.mktemp("parent"))


def from_parent(text: Path, parent: Path, **changes: object):  # type: ignore[no-untyped-def]
    return small(text, name="tuned", model={"source": f"{parent}@step12"}, **changes)


@pytest.mark.parametrize(
    ("choice", "moved"),
    [
        ({"only": ["L1.MLP"]}, "layers.1.mlp."),
        ({"only": ["L0.attn"]}, "layers.0.attention."),
        ({"only": ["embed"]}, "embed_in."),
        ({"only": ["*final_layer_norm*"]}, "final_layer_norm"),
        ({"roles": ["head"]}, "embed_out"),
        ({"only": ["L1"], "freeze": ["L1.attn", "*layernorm*"]}, "layers.1.mlp."),
    ],
)
def test_only_what_was_chosen_moves(text: Path, parent: Path, tmp_path: Path, choice: dict, moved: str) -> None:  # type: ignore[type-arg]
    run = train(from_parent(text, parent, steps=3, parameters=choice), tmp_path)
    before, after = weights(parent, 12), weights(run, 3)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if moved in n}


def test_adapters_change_nothing_at_first_and_are_merged_into_ordinary_checkpoints(
    text: Path, parent: Path, tmp_path: Path
) -> None:
    recipe = from_parent(text, parent, steps=6, parameters={"lora": {"r": 2, "lora_alpha": 4}}, optimizer__lr=0.05)
    run = train(recipe, tmp_path)
    before, first, last = weights(parent, 12), weights(run, 0), weights(run, 6)
    assert before.keys() == first.keys() == last.keys()
    for name in before:
        assert torch.equal(before[name], first[name]), name
        change = last[name] - before[name]
        if "query_key_value.weight" in name or "dense" in name and name.endswith("weight"):
            assert 1 <= torch.linalg.matrix_rank(change, tol=1e-5) <= 2, name
        else:
            assert torch.equal(last[name], before[name]), name
    summary = Run.open(run).json("summary")
    assert summary["trained"] < 0.2 * summary["parameters"]
    # What the adapters did in training is what the merged checkpoint does.
    from vesalius.train.assembly import assemble
    from vesalius.train.parallel import World

    made = assemble(recipe, World.single())
    made.trainer.load(run / "steps" / "step6")
    ids = torch.randint(20, 200, (2, 12))
    merged = vesalius.open(f"{run}@step6").logits(ids)
    assert torch.allclose(made.trainer.model.eval()(ids).logits, merged, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize(
    "settings", [{"r": 2, "lora_alpha": 4}, {"r": 2, "use_rslora": True, "rank_pattern": {"dense": 3}}]
)
def test_adapters_lie_beside_as_peft_keeps_them(
    text: Path, parent: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train(from_parent(text, parent, steps=4, parameters={"lora": settings}, optimizer__lr=0.05), tmp_path)
    ids = torch.randint(20, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(parent / "steps" / "step12")
    plain = base(ids).logits.detach()
    both = PeftModel.from_pretrained(base, str(run / "steps" / "step4" / "adapter"))(ids).logits.detach()
    merged = AutoModelForCausalLM.from_pretrained(run / "steps" / "step4")(ids).logits.detach()
    assert torch.allclose(both, merged, atol=1e-5) and not torch.allclose(both, plain, atol=1e-2)


def test_adapters_go_on_to_the_bit(text: Path, parent: Path, tmp_path: Path) -> None:
    import shutil

    recipe = from_parent(text, parent, steps=6, parameters={"lora": {"r": 2}}, checkpoints__every=3)
    whole = train(recipe, tmp_path / "a")
    cut = train(recipe, tmp_path / "b")
    for step in (3, 6):
        shutil.rmtree(cut / "steps" / f"step{step}")
    train(recipe, tmp_path / "b")
    assert steps_of(whole) == steps_of(cut)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"only": ["L7.MLP"]}, "L7 does not exist: this model has blocks L0 to L1"),
        ({"only": ["nothing*"]}, r"'nothing\*' matches no parameter"),
        ({"freeze": ["L1.H0"]}, "L1.H0 is a slice of a matrix"),
        ({"only": ["L1.N0"]}, "of slices only heads can be trained"),
        ({"freeze": ["*"]}, "nothing is left to train"),
        ({"lora": {"rank": 2}}, "unknown LoRA setting 'rank'"),
    ],
)
def test_choices_that_cannot_be_are_refused(
    text: Path, parent: Path, tmp_path: Path, choice: dict, message: str
) -> None:  # type: ignore[type-arg]
    with pytest.raises(VesaliusError, match=message):
        train(from_parent(text, parent, steps=3, parameters=choice), tmp_path)
