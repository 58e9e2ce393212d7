"""Training a tuned lens: what it learns was planted, each step is the plain one, and a killed run ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import some_ids, tiny_hf
from lens_helpers import numbered, small, streams, write_text
from transformers import BertConfig, BertModel

from vesalius.corpus.documents import CorpusError
from vesalius.errors import ModelError, VesaliusError
from vesalius.lens import LensRecipe, TunedLens, train_lens, training
from vesalius.lens.base import residuals
from vesalius.lens.objective import LensObjective, Reader, objective_for
from vesalius.lens.regression import Regression
from vesalius.lens.tuned import TENSORS
from vesalius.model import Model
from vesalius.runs import Run
from vesalius.train.objectives.base import IGNORED, Sample
from vesalius.train.objectives.samples import model_inputs
from vesalius.train.trainer import Trainer

FAST: dict[str, Any] = {"tokens": 2400, "length": 24, "rows": 4, "states": 40, "check_states": 200, "held_out": 0.2}
D = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def affine(seed: int = 0) -> tuple[Model, torch.Tensor, torch.Tensor]:
    """A model whose last block does nothing but h -> h + B h + c, whatever the other two do; and B, c."""
    model = small("llama", seed)
    generator = torch.Generator().manual_seed(seed + 1)
    b = torch.randn(D, D, generator=generator) / D**0.5
    c = torch.randn(D, generator=generator)

    def replace(_: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden + hidden @ b.T + c

    model.hf.model.layers[-1].register_forward_hook(replace, with_kwargs=True)
    return model, b, c


# -- the regression


@pytest.mark.parametrize("form", [{}, {"rank": 6}, {"bias_only": True}])
def test_states_of_nothing_but_zeros(text: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    """A model whose every weight is 0 says the same at every layer; so does any lens of it."""
    model = small()
    with torch.no_grad():
        for p in model.hf.parameters():
            p.zero_()
    run = Run.open(train_lens(model, [str(text)], LensRecipe(**FAST, **form), out=tmp_path))
    assert (run.table("quality")["kl"].abs() < 1e-6).all()
    assert "nearer at 0 of 3 layers." in run.json("summary")["lead"]


@pytest.mark.parametrize("form", [{}, {"rank": 6}, {"bias_only": True}])
def test_the_regression_recovers_a_map_of_its_form(form: dict[str, Any]) -> None:
    model = small()
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(D, form.get("rank", D), generator=generator)
    b = torch.zeros(D, D) if form.get("bias_only") else factor @ torch.randn(factor.T.shape, generator=generator) / D
    c = torch.randn(D, generator=generator)
    sums = Regression(model)
    for _ in range(20):
        h = [3.0 * torch.randn(64, D, generator=generator) + 1 for _ in range(3)]
        sums.add([*h, h[1] + h[1] @ b.T + c])  # the last state follows from that after block 0
    lens = TunedLens.for_model(model, **form)
    sums.solve(lens)
    assert int(sums.counts[0]) == 20 * 64 and not int(sums.counts[1])
    assert torch.allclose(lens.matrix(0), b, atol=0.03)  # the ridge draws a little towards 0
    assert torch.allclose(lens.shift(0), c, atol=0.06)
    assert not torch.allclose(lens.matrix(1), b, atol=0.03) or form.get("bias_only")


def test_enormous_states_are_left_out_and_counted() -> None:
    model = small()
    h = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    plain, spoilt = Regression(model), Regression(model)
    plain.add([h[1:], h[1:], h[1:], 2 * h[1:]])
    big = h.clone()
    big[0] *= 1000
    spoilt.add([h, big, h, 2 * h])
    assert spoilt.counts.tolist() == [63, 1]
    assert torch.allclose(plain.gram, spoilt.gram) and torch.allclose(plain.cross, spoilt.cross)


# -- the loss and the loop


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bert", "t5"])
def test_the_reader_gives_the_streams_and_the_loss_is_each_layers_own(family: str) -> None:
    model = small(family)
    lens = TunedLens.for_model(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        lens.weight.copy_(torch.randn(lens.weight.shape, generator=generator) * 0.05)
    reader = Reader(lens, model)
    ids = some_ids(2, 8)
    inputs = {"input_ids": ids}
    decoder = torch.tensor([[0, 7, 8], [0, 9, 3]]) if family == "t5" else None
    if decoder is not None:
        inputs["decoder_input_ids"] = decoder
    found = reader(**inputs)
    want = streams(model, ids, decoder)
    assert all(torch.equal(a, b) for a, b in zip(found.states, want, strict=True))
    targets = (decoder if decoder is not None else ids).clone()
    targets[0, 1] = IGNORED
    valid = targets != IGNORED
    objective = LensObjective(reader, None, 100, 0)  # type: ignore[arg-type]  # the loss needs no base
    loss = objective.loss(found, Sample(inputs, targets))
    loss.total.backward()
    assert lens.weight.grad is not None
    log_p = model.readout(want[-1][valid]).log_softmax(-1)
    for row in range(3):
        alone = TunedLens.for_model(model)
        alone.load_state_dict(lens.state_dict())
        log_q = alone(model, want[row][valid], row - 1).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        kl.backward()
        assert float(loss.logs["embed" if row == 0 else f"L{row - 1}"]) == pytest.approx(
            float(kl.detach()), rel=1e-3, abs=1e-3
        )
        for got, mine in ((lens.weight.grad, alone.weight.grad), (lens.bias.grad, alone.bias.grad)):
            assert got is not None and mine is not None
            assert torch.allclose(got[row], mine[row], atol=2e-3, rtol=1e-3)
            assert not mine[[r for r in range(3) if r != row]].any()  # no layer moves another


def test_the_states_of_a_step_are_drawn_from_those_that_foretell_something(text: Path) -> None:
    model = small()
    recipe = LensRecipe(**FAST)
    source = training.lens_data(model, [str(text)], recipe).source
    objective = objective_for(Reader(TunedLens.for_model(model), model), 40)
    samples = [objective.sample(source.batch(step), 0) for step in (0, 0, 1)]
    valid = [s.targets != IGNORED for s in samples]
    assert all(int(v.sum()) == 40 and not v[:, 0].any() for v in valid)
    assert torch.equal(valid[0], valid[1]) and not torch.equal(valid[0], valid[2])
    ids = torch.from_numpy(source.batch(0).ids)
    assert torch.equal(samples[0].targets[valid[0]], ids[:, 1:][valid[0]])
    assert torch.equal(samples[0].inputs["input_ids"], ids[:, :-1])


def test_steps_are_those_of_a_plain_loop(text: Path, tmp_path: Path) -> None:
    """Hidden states kept by transformers, full softmax, autograd through everything, torch's Adam: the same numbers."""
    model = small()
    steps = 6
    recipe = LensRecipe(**FAST | {"tokens": steps * 96}, start="zero", words=None, lr=0.01)
    folder = train_lens(model, str(text), recipe, out=tmp_path)
    lens = TunedLens.load(folder, model)
    source = training.lens_data(model, [str(text)], recipe).source
    objective = objective_for(Reader(lens, model), recipe.states)
    first = objective.sample(source.batch(0), 0)
    scale = [h[first.targets != IGNORED].square().mean().sqrt() for h in streams(model, first.inputs["input_ids"])]
    maps = [torch.nn.Linear(D, D) for _ in range(3)]
    for m in maps:
        torch.nn.init.zeros_(m.weight)
        torch.nn.init.zeros_(m.bias)
    groups = [{"params": [m.weight for m in maps], "weight_decay": recipe.weight_decay}]
    groups += [{"params": [m.bias for m in maps], "weight_decay": 0.0}]
    defaults = {"lr": recipe.lr, "betas": (0.9, 0.95), "eps": 1e-8}
    from vesalius.train.optimizers import settings

    known = settings("adamw")
    defaults |= {k: known[k] for k in ("betas", "eps") if k in known}
    adam = torch.optim.AdamW(groups, **defaults)
    for step in range(steps):
        sample = objective.sample(source.batch(step), 0)
        ids, valid = sample.inputs["input_ids"], sample.targets != IGNORED
        hidden = [h[valid] for h in streams(model, ids)]
        log_p = model.hf(ids).logits[valid].log_softmax(-1).detach()
        total = torch.zeros(())
        for row, m in enumerate(maps):
            weight, bias = m.weight, m.bias * scale[row]
            translated = hidden[row] + hidden[row] @ weight.T + bias
            log_q = model.hf.lm_head(model.hf.model.norm(translated)).log_softmax(-1)
            total = total + (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        warm = 0.05 * steps
        factor = min(1.0, (step + 1) / warm) * (1 - max(0.0, step - warm) / (steps - warm))
        for group in adam.param_groups:
            group["lr"] = recipe.lr * factor
        adam.zero_grad()
        total.backward()
        adam.step()
    for row, m in enumerate(maps):
        assert torch.allclose(lens.weight[row], m.weight, atol=1e-4), row
        assert torch.allclose(lens.bias[row], m.bias, atol=1e-4), row
    assert float(lens.weight.abs().max()) > 0.01


# -- what it learns


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_affine_map_is_recovered(seed: int, text: Path, tmp_path: Path) -> None:
    model, b, c = affine(seed)
    recipe = LensRecipe(**FAST | {"tokens": 4800}, words=None, lr=3e-3, seed=seed)
    folder = train_lens(model, str(text), recipe, out=tmp_path)
    lens = TunedLens.load(folder, model)
    quality = Run.open(folder).table("quality").set_index(["lens", "layer"])["kl"]
    assert quality["tuned", 1] < 0.005 < 0.1 < quality["logit", 1]
    hidden = residuals(model, some_ids(4, 20, seed=9)).states[2][:, 1:].reshape(-1, D)
    want = hidden + hidden @ b.T + c
    cosine = torch.nn.functional.cosine_similarity(lens.translate(hidden, 1), want, dim=-1)
    assert float(cosine.min()) > 0.99  # RMSNorm takes the length away, so the direction is all there is to learn
    assert quality["tuned", 2] == pytest.approx(0, abs=1e-6)
    assert (quality["tuned"] <= quality["logit"] + 1e-6).all()


def test_from_zero_gradient_steps_alone_come_near(text: Path, tmp_path: Path) -> None:
    model, _, _ = affine()
    recipe = LensRecipe(**FAST | {"tokens": 19200}, start="zero", words=None, lr=0.03, weight_decay=0.0)
    quality = Run.open(train_lens(model, str(text), recipe, out=tmp_path)).table("quality")
    kl = quality.set_index(["lens", "layer"])["kl"]
    assert kl["tuned", 1] < 0.1 * kl["logit", 1]


def test_hidden_words_of_a_masked_model_are_foretold(text: Path, tmp_path: Path) -> None:
    model = Model.wrap(tiny_hf("bert"), masked_tokenizer(), name="bert")
    recipe = LensRecipe(**FAST | {"tokens": 4800}, lr=3e-3, bias_only=True)
    objective = objective_for(Reader(TunedLens.for_model(model), model), 200)
    source = training.lens_data(model, [str(text)], recipe).source
    sample = objective.sample(source.batch(0), 0)
    hidden = sample.inputs["input_ids"][sample.targets != IGNORED]
    assert (hidden == model.tokenizer.mask_token_id).float().mean() > 0.5
    quality = Run.open(train_lens(model, str(text), recipe, out=tmp_path)).table("quality")
    kl = quality.set_index(["lens", "layer"])["kl"]
    assert (kl["tuned"].iloc[:-1] < kl["logit"].iloc[:-1]).all() and kl["tuned", 2] == pytest.approx(0, abs=1e-6)


def masked_tokenizer() -> Any:
    tokenizer = numbered()
    tokenizer.add_special_tokens({"mask_token": "w3", "pad_token": "w4", "cls_token": "w1", "sep_token": "w2"})
    return tokenizer


# -- going on


class Killed(BaseException):
    """Ends a sitting as a signal would."""


@pytest.mark.parametrize("when", [("regression", 5), ("training", 4), ("training", 10)])
def test_a_killed_run_ends_with_the_same_bytes(
    when: tuple[str, int], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    recipe = LensRecipe(**FAST)
    whole = train_lens(model, str(text), recipe, out=tmp_path / "whole")
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    stage, at = when
    calls = {"n": 0}
    owner, name = (Regression, "add") if stage == "regression" else (Trainer, "step")
    real = getattr(owner, name)

    def counted(*given: Any) -> Any:
        if calls["n"] == at:
            raise Killed
        calls["n"] += 1
        return real(*given)

    with monkeypatch.context() as m:
        m.setattr(owner, name, counted)
        with pytest.raises(Killed):
            train_lens(model, str(text), recipe, out=tmp_path / "killed")
    with monkeypatch.context() as m:
        calls["n"] = -1000
        m.setattr(owner, name, counted)
        folder = train_lens(model, str(text), recipe, out=tmp_path / "killed")
    total = recipe.start_steps if stage == "regression" else recipe.steps
    assert calls["n"] + 1000 == total - at  # what was done was not done again
    assert (folder / TENSORS).read_bytes() == (whole / TENSORS).read_bytes()
    a, b = (Run.open(f) for f in (folder, whole))
    assert a.table("quality").equals(b.table("quality"))
    drop = ["seconds", "cpu_seconds"]
    assert a.table("log").drop(columns=drop).equals(b.table("log").drop(columns=drop))
    assert not (folder / "steps").exists() and not (folder / "start").exists() and a.done


def test_the_same_request_finds_its_lens_again_and_a_seed_makes_another(text: Path, tmp_path: Path) -> None:
    model = small()
    first = train_lens(model, str(text), LensRecipe(**FAST), out=tmp_path)
    before = (first / TENSORS).stat().st_mtime_ns
    assert train_lens(model, str(text), LensRecipe(**FAST), out=tmp_path) == first
    assert (first / TENSORS).stat().st_mtime_ns == before
    other = train_lens(model, str(text), LensRecipe(**FAST, seed=1), out=tmp_path)
    assert other != first and (other / TENSORS).read_bytes() != (first / TENSORS).read_bytes()
    assert not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
    assert all(not m._forward_hooks for m in model.hf.modules())


def test_bias_of_the_mean_is_not_the_mean_divergence(text: Path, tmp_path: Path) -> None:
    """By hand from all distributions at once."""
    model = small()
    found = Run.open(train_lens(model, str(text), LensRecipe(**FAST), out=tmp_path)).table("quality")
    recipe = LensRecipe(**FAST)
    data = training.lens_data(model, [str(text)], recipe)
    objective = objective_for(Reader(TunedLens.for_model(model), model), recipe.batch)
    rows: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    step = 0
    while sum(len(r) for r in rows) < recipe.check_states:
        sample = objective.sample(data.held_out.batch(step), 0)
        valid = sample.targets != IGNORED
        states = streams(model, sample.inputs["input_ids"])
        assert model_inputs(sample, objective.reader).keys() == {"input_ids"}
        rows.append(model.readout(states[1][valid]).softmax(-1).double())
        last.append(model.readout(states[-1][valid]).softmax(-1).double())
        step += 1
    p, q = torch.cat(last).numpy(), torch.cat(rows).numpy()
    mine = found[(found["lens"] == "logit") & (found["layer"] == 0)].iloc[0]
    assert mine["n"] == len(p)
    assert mine["kl"] == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-4)
    assert mine["bias"] == pytest.approx(float((p.mean(0) * np.log(p.mean(0) / q.mean(0))).sum()), rel=1e-4)
    assert mine["low"] < mine["kl"] < mine["high"] and mine["bias"] < mine["kl"]


def test_no_held_out_state_is_judged_twice(text: Path, tmp_path: Path) -> None:
    model = small()
    recipe = LensRecipe(**FAST | {"check_states": 100_000, "held_out": 0.02})
    held_out = training.lens_data(model, [str(text)], recipe).held_out
    run = Run.open(train_lens(model, str(text), recipe, out=tmp_path))
    rows = held_out.rows_per_epoch // held_out.rows * held_out.rows
    assert set(run.table("quality")["n"]) == {rows * (recipe.length - 1)}
    assert any("100,000 were asked for" in note for note in run.json("summary")["notes"])


def test_bad_input(text: Path, tmp_path: Path) -> None:
    model = small()
    with pytest.raises(CorpusError, match=r"has [\d,]+ tokens to train on.*100,032 are needed.*lower --tokens"):
        train_lens(model, str(text), LensRecipe(**FAST | {"tokens": 100_000}), out=tmp_path)
    with pytest.raises(VesaliusError, match="200 tokens are too few.*at least 264 are needed"):
        train_lens(model, str(text), LensRecipe(**FAST | {"tokens": 200}), out=tmp_path)
    with pytest.raises(VesaliusError, match="rows of 80 tokens are longer than llama-0 reads"):
        train_lens(model, str(text), LensRecipe(**FAST | {"length": 80}), out=tmp_path)
    one = tmp_path / "one.txt"
    one.write_text("w7 w8 w9")
    with pytest.raises(CorpusError, match="3,000 tokens in several documents are needed"):
        train_lens(model, str(one), LensRecipe(**FAST), out=tmp_path)
    with pytest.raises(VesaliusError, match="no such file|nothing|there is no"):
        train_lens(model, str(tmp_path / "none.txt"), LensRecipe(**FAST), out=tmp_path)
    with pytest.raises(VesaliusError, match="no tokenizer"):
        train_lens(Model.wrap(tiny_hf("llama"), name="bare"), str(text), LensRecipe(**FAST), out=tmp_path)
    for bad, says in (({"lr": 0.0}, "lr 0"), ({"start": "middle"}, "'middle'"), ({"states": 0}, "states 0")):
        with pytest.raises(VesaliusError, match=says):
            LensRecipe(**FAST | bad)
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    with pytest.raises(ModelError, match="without a head"):
        train_lens(
            Model.wrap(BertModel(config), numbered(), name="headless"), str(text), LensRecipe(**FAST), out=tmp_path
        )
