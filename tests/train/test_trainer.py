from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_helpers import STEPS, small, steps_of, weights

import vesalius
from vesalius.corpus.batches import Batch
from vesalius.corpus.order import digest
from vesalius.errors import RunError, VesaliusError
from vesalius.runs import Run
from vesalius.train.assembly import assemble, data_of
from vesalius.train.objectives import Needs, make_objective
from vesalius.train.optimizers import make_optimizer
from vesalius.train.parallel import World
from vesalius.train.recipe import Recipe
from vesalius.train.running import train
from vesalius.train.trainer import Trainer


def model_of(seed: int = 0, dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **drop
        )
    )


class Random:
    """Rows of random tokens, some of them no targets."""

    fingerprint, vocab_size, rows, length = "random", 50, 8, 12

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng(step)
        ids = rng.integers(50, size=(self.rows, self.length + 1))
        return Batch(step, ids, np.zeros_like(ids), rng.random(ids.shape) < 0.7)

    def describe(self) -> dict[str, Any]:
        return {}


def trainer_of(model: Any, accumulate: int = 1, **settings: Any) -> Trainer:
    optimizer = make_optimizer("adamw", model, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    objective = make_objective("prompted", Needs(50))
    return Trainer(model, Random(), objective, optimizer, accumulate=accumulate, **settings)


def test_twenty_steps_are_those_of_a_plain_loop() -> None:
    """In float64: the key biases' gradients are nothing but rounding, which Adam makes whole steps of in float32."""
    ours, plain = model_of().double(), model_of().double()
    trainer = trainer_of(ours, seed=3)
    losses = [log.loss for log in trainer.steps(20)]
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False, fused=False)
    expected = []
    for step in range(20):
        batch = Random().batch(step)
        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        nll = -plain(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        loss = nll[mask[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-7)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_does_not_change_the_gradient(accumulate: int) -> None:
    """Micro-batches have different numbers of targets here: a mean of their means would be another gradient."""
    whole, parts = trainer_of(model_of()), trainer_of(model_of(), accumulate)
    for trainer in (whole, parts):
        trainer.gradients(0)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-7)


def test_dropout_depends_on_the_step_and_not_on_the_past() -> None:
    straight, late = trainer_of(model_of(dropout=0.3), seed=5), trainer_of(model_of(dropout=0.3), seed=5)
    straight.model.train(), late.model.train()
    straight.gradients(0)
    straight.optimizer.zero_grad()
    torch.rand(100)  # whatever else was drawn
    straight.gradients(7)
    late.gradients(7)
    other = trainer_of(model_of(dropout=0.3), seed=6)
    other.model.train()
    other.gradients(7)
    grads = [torch.cat([p.grad.flatten() for p in t.model.parameters()]) for t in (straight, late, other)]
    assert torch.equal(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(VesaliusError, match="8 rows .* 3 micro-batches.*change data.rows or accumulate"):
        trainer_of(model_of(), accumulate=3)


def test_a_loss_that_is_not_a_number_stops_the_run() -> None:
    trainer = trainer_of(model_of())
    trainer.model.transformer.wte.weight.data[:] = float("nan")
    with pytest.raises(RunError, match="loss of step 0 is nan; lower the learning rate"):
        trainer.step()


def test_two_runs_of_a_recipe_leave_the_same_bytes(text: Path, tmp_path: Path) -> None:
    first = train(small(text, dropout=0.1), tmp_path / "a")
    second = train(small(text, dropout=0.1), tmp_path / "b")
    assert steps_of(first) == steps_of(second)
    assert list(steps_of(first)) == [0, 1, 2, 4, 5, 10, 12]
    other = train(small(text, dropout=0.1, seed=8), tmp_path / "c")
    assert steps_of(other)[12]["model.safetensors"] != steps_of(first)[12]["model.safetensors"]


def test_the_loss_falls_and_is_what_the_checkpoint_has(text: Path, tmp_path: Path) -> None:
    recipe = small(text, steps=60, checkpoints__every=60, checkpoints__log=False)
    run = Run.open(train(recipe, tmp_path))
    log, summary = run.table("log"), run.json("summary")
    assert list(log["step"]) == list(range(60))
    assert log["loss"].iloc[-5:].mean() < log["loss"].iloc[0] - 1
    model = vesalius.open(f"{run.folder}@last")
    held_out = data_of(recipe).held_out
    assert held_out is not None
    total, count = 0.0, 0
    for step in range(2):
        batch = held_out.batch(step)
        logits = model.logits(torch.from_numpy(batch.ids[:, :-1]))
        valid = torch.from_numpy(batch.segments[:, 1:] >= 0)
        nll = -logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.ids[:, 1:, None]))[..., 0]
        total, count = total + float(nll[valid].sum()), count + int(valid.sum())
    assert summary["held_out"] == pytest.approx(total / count, abs=1e-4)
    bytes_of = summary["held_out"] / math.log(2) / summary["bits_per_byte"]
    text_of = [held_out.store.text(i) for i in range(held_out.store.n_documents)]
    assert bytes_of == pytest.approx(sum(len(t.encode()) for t in text_of) / held_out.store.n_tokens, rel=1e-6)


def test_batches_are_the_same_for_every_size_and_accumulation_and_rebuilt_from_the_manifest(
    text: Path, tmp_path: Path
) -> None:
    recipes = [
        small(text),
        small(text, accumulate=4),
        small(text, model__architecture={"layers": 1, "d_model": 64, "heads": 4}),
    ]
    sources = [assemble(r, World.single()).trainer.source for r in recipes]
    for step in range(STEPS):
        assert len({digest(s.batch(step)) for s in sources}) == 1
    folder = train(recipes[0], tmp_path)
    found = Run.open(folder).json("data")
    from vesalius.corpus.order import Order

    rebuilt = Order.from_description(found, data_of(recipes[0]).store)
    for step in (0, 1, 7, STEPS - 1):
        assert digest(rebuilt.batch(step)) == digest(sources[0].batch(step))
    assert digest(data_of(small(text, seed=99)).source.batch(0)) != digest(sources[0].batch(0))


def test_a_checkpoint_is_an_ordinary_model_and_opens_on_the_bench(text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = train(small(text), tmp_path)
    place = folder / "steps" / "step10"
    hf = AutoModelForCausalLM.from_pretrained(place)
    assert type(hf).__name__ == "GPTNeoXForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = vesalius.open(f"{folder}@step10")
    ids = torch.tensor([tokenizer("abc def")["input_ids"]])
    assert torch.equal(model.logits(ids), hf.eval()(ids).logits)
    assert [str(p) for p in model.parts(("head",))] == ["L0.H0", "L0.H1", "L1.H0", "L1.H1"]
    assert vesalius.open(f"{folder}@step12").fingerprint != model.fingerprint
    with pytest.raises(RunError, match=r"no checkpoint .*step7; saved steps: 0, 1, 2, 4, 5, 10, 12"):
        vesalius.open(f"{folder}@step7")


def test_the_state_of_old_checkpoints_can_be_dropped(text: Path, tmp_path: Path) -> None:
    kept = train(small(text), tmp_path / "all")
    lean = train(small(text, checkpoints__keep_state="last"), tmp_path / "last")
    full, thin = steps_of(kept), steps_of(lean)
    assert [s for s in thin if "trainer/state.safetensors" in thin[s]] == [12]
    assert all("trainer/state.safetensors" in full[s] for s in full)
    for step in full:
        assert torch.equal(weights(kept, step)["embed_out.weight"], weights(lean, step)["embed_out.weight"])


def test_a_branch_takes_up_weights_optimizer_and_order(text: Path, tmp_path: Path) -> None:
    """Without a change it is the run it came from; with words swapped only the batches from there on are others."""
    parent = train(small(text), tmp_path)
    same = train(small(text, name="same", branch={"run": str(parent), "step": 5}), tmp_path)
    assert sorted(steps_of(same)) == [5, 10, 12]
    for name, tensor in weights(parent, 12).items():
        assert torch.equal(tensor, weights(same, 12)[name])
    assert Run.open(same).json("data")["lineage"] == {"parent": str(parent), "step": 5}
    words = sorted(set(data_of(small(text)).store.text(0).split()))[:2]
    recipe = small(text, name="swap", branch={"run": str(parent), "step": 5, "swap": dict([words, words[::-1]])})
    before, after = data_of(small(text)).source, data_of(recipe).source
    assert all(digest(before.batch(s)) == digest(after.batch(s)) for s in range(5))
    assert any(digest(before.batch(s)) != digest(after.batch(s)) for s in range(5, 12))
    other = train(recipe, tmp_path)
    assert not torch.equal(weights(other, 12)["embed_out.weight"], weights(parent, 12)["embed_out.weight"])


def test_a_branch_may_change_the_optimizer(text: Path, tmp_path: Path) -> None:
    parent = train(small(text), tmp_path)
    recipe = small(text, name="adan", branch={"run": str(parent), "step": 5}, optimizer={"name": "adan", "lr": 0.001})
    other = train(recipe, tmp_path)
    assert torch.equal(weights(other, 5)["embed_out.weight"], weights(parent, 5)["embed_out.weight"])
    assert not torch.equal(weights(other, 12)["embed_out.weight"], weights(parent, 12)["embed_out.weight"])


def test_the_ledger_counts_what_is_multiplied(text: Path, tmp_path: Path) -> None:
    """A forward pass of L tokens through a NeoX block: 24 d^2 multiply-adds' worth a token, attention and the head."""
    recipe = small(text, steps=2)
    summary = Run.open(train(recipe, tmp_path)).json("summary")
    tokens, d, layers, length, vocabulary = 2 * 8 * 24, 32, 2, 24, 320
    linear = 24 * d * d * layers + 2 * d * vocabulary
    attention = layers * 4 * length * d
    assert summary["ledger"]["tokens"] == tokens
    assert summary["ledger"]["flops"] == pytest.approx(3 * tokens * (linear + attention), rel=0.01)
    assert summary["flops_6nt"] == 3 * tokens * linear


def test_a_data_change_is_noticed_when_a_run_goes_on(text: Path, tmp_path: Path) -> None:
    import json
    import shutil

    copy = tmp_path / "mine.jsonl"
    shutil.copy(text, copy)
    recipe = small(copy)
    folder = train(recipe, tmp_path)
    shutil.rmtree(folder / "steps" / "step12")
    copy.write_text(copy.read_text() + json.dumps({"id": "new", "text": "something else " * 50}) + "\n")
    with pytest.raises(RunError, match="no longer what it was trained on"):
        train(recipe, tmp_path)


@pytest.mark.parametrize("name", ["adan", "conda", "sgd-sai", "palm", "sgdm", "adafactor"])
def test_every_optimizer_goes_on_to_the_bit(text: Path, tmp_path: Path, name: str) -> None:
    """Stopped after five steps (its later checkpoints removed) and gone on with: the bytes of an uninterrupted run."""
    import shutil

    recipe: Recipe = small(text, optimizer={"name": name}, dropout=0.1)
    whole = train(recipe, tmp_path / "whole")
    stopped = train(recipe, tmp_path / "stopped")
    for step in (10, 12):
        shutil.rmtree(stopped / "steps" / f"step{step}")
    again = train(recipe, tmp_path / "stopped")
    assert again == stopped
    assert steps_of(whole) == steps_of(stopped)
    log = Run.open(stopped).table("log")
    assert list(log["step"]) == list(range(STEPS))


def test_an_interrupted_run_keeps_where_it_was_until_the_next_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(small(text), tmp_path / "whole")
    step = Trainer.step

    def stopped(self: Trainer) -> Any:
        if self.done == 6:
            os.kill(os.getpid(), signal.SIGTERM)  # in the midst of a step: it is finished first
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(small(text), tmp_path)
    (folder,) = tmp_path.glob("train-*")
    assert list(steps_of(folder)) == [0, 1, 2, 4, 5, 7]
    assert Run.open(folder).state == "interrupted"
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self: made.append(self.done) or step(self))
        assert train(small(text), tmp_path) == folder
    assert made == [7, 8, 9, 10, 11]
    assert steps_of(folder) == steps_of(whole)
