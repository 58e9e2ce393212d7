"""A student starts as some of its teacher's blocks, and with the teacher's opinion it learns more than without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny

import vesalius
from vesalius.build import build
from vesalius.build import preset as make
from vesalius.change.distil import DistilPlan, alternate, distillation, student_of
from vesalius.change.longformer import to_longformer
from vesalius.corpus.grammar import LookupGrammar
from vesalius.errors import VesaliusError
from vesalius.evaluate.card import Yardstick, measure
from vesalius.model.saving import save_model
from vesalius.train.assembly import data_of
from vesalius.train.running import train


def blocks(model: vesalius.Model) -> list[dict[str, torch.Tensor]]:
    return [b.module.state_dict() for b in model.anatomy.main.blocks]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "gemma3", "longformer"])
def test_a_student_starts_as_alternate_blocks_of_its_teacher(family: str) -> None:
    teacher = to_longformer(tiny("bert"), 8, 64) if family == "longformer" else tiny(family)
    assert teacher.n_layers == 3
    student = student_of(teacher, "2-layers")
    mine, theirs = blocks(student), blocks(teacher)
    assert len(mine) == 2 and student.hf.config.num_hidden_layers == 2
    for new, old in ((0, 0), (1, 1)):
        assert mine[new].keys() == theirs[old].keys()
        assert all(torch.equal(mine[new][n], theirs[old][n]) for n in mine[new])
    rest = {n: p for n, p in student.hf.state_dict().items() if ".0." not in n and ".1." not in n}
    assert rest and all(torch.equal(p, teacher.hf.state_dict()[n]) for n, p in rest.items())
    assert blocks(student_of(teacher, "half"))[0].keys() == theirs[0].keys()


def test_alternate_blocks() -> None:
    assert alternate(12, 6) == (0, 2, 4, 6, 8, 10) and alternate(6, 6) == tuple(range(6)) and alternate(7, 1) == (0,)
    with pytest.raises(VesaliusError, match="student of 4 blocks cannot start from 3"):
        student_of(tiny("llama"), "4-layers")
    with pytest.raises(VesaliusError, match="is encoder-decoder; a teacher foretells tokens"):
        student_of(tiny("t5"), "half")
    with pytest.raises(VesaliusError, match="unknown recipe 'haf'"):
        student_of(tiny("llama"), "haf")


def test_a_student_of_a_recipe_has_the_teachers_vocabulary(tmp_path: Path) -> None:
    teacher = tiny("llama")
    file = tmp_path / "small.yaml"
    shape = {"layers": 1, "d_model": 16, "heads": 2, "kv_heads": 2, "d_ff": 24}
    recipe = {"name": "small", "model": {"preset": "tiny-llama", "architecture": shape}, "steps": 1,
              "data": {"synthetic": "induction", "length": 16}}  # fmt: skip
    file.write_text(json.dumps(recipe))
    student = student_of(teacher, str(file))
    assert student.n_layers == 1 and student.hf.config.vocab_size == teacher.hf.config.vocab_size
    recipe["model"] = {"preset": "tiny-bert"}
    file.write_text(json.dumps(recipe))
    with pytest.raises(VesaliusError, match="a student is of its teacher's kind"):
        student_of(teacher, str(file))


GRAMMAR = LookupGrammar(8, seed=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a table: what stands between two symbols is theirs."""
    file = tmp_path_factory.mktemp("text") / "lookup.jsonl"
    file.write_text("\n".join(json.dumps({"text": d.text, "id": d.id}) for d in GRAMMAR.documents(300, 8)))
    return file


def reader() -> Any:
    """Its tokenizer, with the tokens hidden words need."""
    made = GRAMMAR.tokenizer(("[CLS]", "[SEP]", "[MASK]"))
    made.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"})
    return made


def learnt(kind: str, corpus: Path, folder: Path) -> vesalius.Model:
    """A model of two blocks that knows the table."""
    tokenizer = reader()
    preset = {"causal": "tiny-llama", "masked": "tiny-bert"}[kind]
    shape = {"layers": 2, "d_model": 48, "heads": 4, "vocab_size": len(tokenizer), "max_length": 64}
    torch.manual_seed(0)
    save_model(vesalius.Model.wrap(build(make(preset, **shape), 0), tokenizer, kind), folder / "new")
    plan = DistilPlan(str(corpus), steps=250, rows=16, length=24, lr=3e-3, held_out=0.2)
    return vesalius.open(f"{train(distillation(folder / 'new', None, kind, tokenizer, plan), folder)}@last")


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_student_comes_nearer_to_its_teacher_than_text_alone_brings_it(
    kind: str, corpus: Path, tmp_path: Path
) -> None:
    """In each of three orders; both trainings are runs of the trainer, and what they leave are ordinary checkpoints."""
    teacher = learnt(kind, corpus, tmp_path / "teacher")
    save_model(student_of(teacher, "half"), tmp_path / "student")
    save_model(teacher, tmp_path / "saved")
    for seed in range(3):
        plan = DistilPlan(str(corpus), steps=40, rows=8, length=24, lr=3e-3, held_out=0.2, seed=seed)
        far = {}
        for source in (tmp_path / "saved", None):
            recipe = distillation(tmp_path / "student", source, kind, teacher.tokenizer, plan)
            made = vesalius.open(f"{train(recipe, tmp_path / 'runs')}@last")
            held_out = data_of(recipe).held_out
            assert held_out is not None
            yard = Yardstick(torch.from_numpy(held_out.batch(0).ids), timed=False)
            found = measure(made, yard, base=teacher)
            assert found.divergence is not None
            far[recipe.name] = float(found.divergence.mean())
        assert far["distilled"] < far["control"]
