"""The most sensitive blocks are trained and nothing else; losses are the published ones; what must not move is held."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import VOCAB, some_ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vesalius.change.faults import Fault, Faults, Judged, Repairing, RepairPlan, likelihood, read_faults
from vesalius.change.repair import repair
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.train.objectives import IGNORED

FAULTS = [Fault("w5 w6 w7", "w8 w9", "w20 w21"), Fault("w9 w4", "w30", "w40 w41 w42")]


def worded(family: str = "llama") -> Model:
    """A tiny model with a tokenizer of numbered words."""
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    return Model.wrap(tiny(family).hf, made, name=family)


def plan(**more: object) -> RepairPlan:
    return RepairPlan(**{"steps": 3, "rows": 4, "lr": 1e-2, "k": 1, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_chosen_blocks_move_and_the_choice_is_the_largest_gradient(family: str) -> None:
    model = worded(family)
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    one = plan(steps=1, size="raw", keep=0.0)
    source = Faults(model, FAULTS, one)
    sample = Repairing(one).sample(source.batch(0), 0)
    with torch.enable_grad():
        model.hf.requires_grad_(True)
        logits = model.hf(**sample.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample.targets.flatten(), ignore_index=IGNORED)
        loss.backward()
    blocks = [list(b.module.parameters()) for b in model.anatomy.main.blocks]
    norms = [math.sqrt(sum(float(p.grad.square().sum()) for p in b if p.grad is not None)) for b in blocks]
    model.hf.zero_grad(set_to_none=True)
    model.hf.requires_grad_(False)
    done = repair(model, FAULTS, some_ids(), one)
    assert done.choices["sensitivity"].to_numpy() == pytest.approx(norms, rel=1e-4)
    best = int(np.argmax(norms))
    assert done.choices.set_index("layer")["chosen"].to_list() == [i == best for i in range(model.n_layers)]
    inside = {id(p) for p in blocks[best]}
    for name, p in model.hf.named_parameters():
        assert torch.equal(before[name], p) == (id(p) not in inside), name
    done.edit.undo(model)
    assert all(torch.equal(before[n], p) for n, p in model.hf.named_parameters())


def test_sensitivity_less_that_of_plain_text_and_over_it() -> None:
    text, found = some_ids(4, 9), {}
    for size in ("size", "neutral", "ratio"):
        found[size] = repair(worded(), FAULTS, text, plan(steps=1, size=size, keep=0.0)).choices["sensitivity"]
    model = worded()
    with torch.enable_grad():
        model.hf.requires_grad_(True)
        logits = model.hf(input_ids=text).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    plain = []
    for block in model.anatomy.main.blocks:
        grads = torch.cat([p.grad.flatten() for p in block.module.parameters() if p.grad is not None])
        plain.append(float(grads.norm()) / math.sqrt(len(grads)))
    assert (found["size"] - found["neutral"]).to_numpy() == pytest.approx(plain, rel=1e-4)
    assert (found["size"] / found["ratio"]).to_numpy() == pytest.approx(plain, rel=1e-4)


def test_a_block_that_is_not_chosen_has_no_momentum() -> None:
    """Two steps on different blocks move each as a first step of AdamW does: by the learning rate."""
    model = worded()
    moved = []
    for layer in (0, 2):
        mine = worded()
        start = {n: p.detach().clone() for n, p in mine.hf.named_parameters()}
        from vesalius.change import repair as module

        class Told(module.Choosing):
            def _choice(self, sizes: object, step: int, layer: int = layer) -> list[int]:
                return [1] if step == 0 else [layer]

        original, module.Choosing = module.Choosing, Told  # type: ignore[misc]
        try:
            repair(mine, FAULTS, some_ids(), plan(steps=2, keep=0.0))
        finally:
            module.Choosing = original  # type: ignore[misc]
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        moved.append((mine.hf.get_parameter(name) - start[name]).abs().max())
    assert all(0 < float(m) <= 1.01e-2 for m in moved)
    assert model.n_layers == 3


def test_random_fixed_and_all() -> None:
    chosen = {}
    for how in ("fixed", "random", "all", "dynamic"):
        done = repair(worded(), FAULTS, some_ids(), plan(how=how, steps=6))
        chosen[how] = [tuple(g.loc[g["chosen"], "layer"]) for _, g in done.choices.groupby("step")]
    assert len(set(chosen["fixed"])) == 1 and set(chosen["all"]) == {(0, 1, 2)}
    assert len(set(chosen["random"])) > 1
    assert chosen["dynamic"][0] == chosen["fixed"][0]
    share = repair(worded(), FAULTS, some_ids(), plan()).by_block()
    assert share["share"].sum() == pytest.approx(1) and share["chosen"].sum() == 3


def test_the_leash_holds_plain_text() -> None:
    def gone(keep: float) -> float:
        model, reference = worded(), worded()
        repair(model, FAULTS, some_ids(8, 12), plan(steps=30, k=3, keep=keep, lr=3e-3))
        p, q = (m.logits(some_ids(8, 12)).log_softmax(-1) for m in (model, reference))
        assert likelihood(model, FAULTS, "good")[:, 1].all()  # repaired: what should follow is said
        return float((q.exp() * (q - p)).sum(-1).mean())

    assert gone(10.0) < gone(0.0) / 2


def test_losses_one_token_at_a_time() -> None:
    logits = torch.randn(4, 5, VOCAB, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4, 5, VOCAB, generator=torch.Generator().manual_seed(1))
    targets = torch.full((4, 5), IGNORED)
    targets[0, 2:4], targets[1, 2:5] = torch.tensor([7, 8]), torch.tensor([9, 10, 11])
    targets[2, 1:2], targets[3, 1:3] = torch.tensor([12]), torch.tensor([13, 14])
    bad = torch.tensor([False, True, False, True])
    ids = torch.zeros(4, 5, dtype=torch.long)
    sample = Judged({"input_ids": ids}, targets, None, bad)
    p, q = logits.softmax(-1), other.softmax(-1)

    def each(x: torch.Tensor, row: int) -> list[float]:
        return [float(x[row, t, targets[row, t]]) for t in range(5) if int(targets[row, t]) != IGNORED]

    good = -sum(math.log(v) for r in (0, 2) for v in each(p, r))
    never = -sum(math.log(1 - v) for r in (1, 3) for v in each(p, r))
    out = SimpleNamespace(logits=logits)
    assert float(Repairing(plan(loss="unlikelihood")).loss(out, sample).total) == pytest.approx(good + never, rel=1e-5)

    class Reference(torch.nn.Module):
        def forward(self, **given: object) -> SimpleNamespace:
            return SimpleNamespace(logits=other)

    def ratio(row: int) -> float:
        return sum(math.log(a) - math.log(b) for a, b in zip(each(p, row), each(q, row), strict=True))

    wanted = np.mean([math.log1p(math.exp(-0.3 * (ratio(a) - ratio(a + 1)))) for a in (0, 2)])
    found = Repairing(plan(loss="dpo", beta=0.3), Reference()).loss(out, sample)
    assert float(found.total) / sample.count() == pytest.approx(wanted, rel=1e-4)


def test_rows_are_prompt_and_continuation() -> None:
    source = Faults(worded(), FAULTS, plan(loss="dpo", rows=6))
    batch = source.batch(0)
    assert batch.mask is not None and len(batch) == 12
    for good in range(0, 12, 2):
        said = [batch.ids[r][batch.mask[r]].tolist() for r in (good, good + 1)]
        assert said in ([[8, 9], [20, 21]], [[30], [40, 41, 42]])
        assert batch.segments[good, 0] % 2 == 0 and batch.segments[good + 1, 0] % 2 == 1
    half = [*FAULTS, Fault("w1", "w2")]
    assert Faults(worded(), half, plan(loss="dpo")).left_out == 1


def test_bad_input_is_told(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    for text, why in (
        ("", "holds no line"),
        ("{", "line 1: not JSON"),
        ('{"good": "w1"}\n[1]', "line 2: a list where an object is needed"),
        ('{"good": 5}', "line 1: something is no text"),
        ('{"prompt": "w1"}', "has neither good nor bad"),
    ):
        file.write_text(text)
        with pytest.raises(VesaliusError, match=why):
            read_faults(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VesaliusError, match="cannot be read"):
        read_faults(file)
    file.write_text(json.dumps({"text": "w1 w2"}) + "\n\n" + json.dumps({"prompt": "w3", "good": "w4"}))
    assert read_faults(file) == [Fault("", "", "w1 w2"), Fault("w3", "w4", "")]
    with pytest.raises(VesaliusError, match="no example has what the loss dpo needs: good and bad"):
        Faults(worded(), [Fault("w1", "w2")], plan(loss="dpo"))
    with pytest.raises(VesaliusError, match="k=9 blocks of 3"):
        repair(worded(), FAULTS, some_ids(), plan(k=9))
    with pytest.raises(UnknownName, match="did you mean 'dynamic'"):
        plan(how="dynamical")
    with pytest.raises(VesaliusError, match="steps=0"):
        plan(steps=0)
