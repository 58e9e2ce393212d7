"""Masks over weights: what is masked, what is kept, and a subnetwork whose job is known."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM

from vesalius import checkpoints
from vesalius.build import build, preset
from vesalius.corpus import Source, synthetic_source
from vesalius.corpus.bigrams import BigramTable, bigram_table
from vesalius.errors import RunError, VesaliusError
from vesalius.features.sparsify import (
    MASK,
    NOTE,
    BigramObjective,
    Masks,
    Sharpen,
    WeightMask,
    by_matrix,
    matrices,
    save_masked,
)
from vesalius.features.subnetwork import MaskRecipe, learn_masks
from vesalius.features.subnetwork_measures import turn, variants
from vesalius.model import Model
from vesalius.train import Trainer, make_objective, make_optimizer, make_schedule
from vesalius.train.objectives.causal import CausalLM
from vesalius.train.objectives.special import needs_for

CHAIN = {"chain": 16, "symbols": 8, "span": 4, "rows_with": 0.2, "length": 24}
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def some_mask(model: Model, share: float = 0.3) -> WeightMask:
    rng = np.random.default_rng(0)
    kept = {n: rng.random(m.weight.shape) < share for n, m in matrices(model).items()}  # type: ignore[arg-type]
    return WeightMask(model.fingerprint, kept)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-neox", "gemma2"])
def test_masks_cover_the_matrices_of_attention_and_mlps_and_nothing_else(family: str) -> None:
    model = tiny(family)
    named = {n: p for n, p in model.hf.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n}
    expected = {n.removesuffix(".weight") for n in named if "wte" not in n and "wpe" not in n}
    assert set(matrices(model)) == expected
    rows = by_matrix(model, some_mask(model))
    assert sum(r["weights"] for r in rows) == sum(p.numel() for n, p in named.items() if n[:-7] in expected)
    assert {r["part"] for r in rows} == {f"L{n}.{k}" for n in range(3) for k in ("attn", "MLP")}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_soft_mask_scales_each_weight_and_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny(family)
    before = {n: p.clone() for n, p in model.hf.state_dict().items()}
    masks = Masks(model)
    drawn = torch.Generator().manual_seed(1)
    for p in masks.scores.values():
        p.data = torch.randn(p.shape, generator=drawn)
    masks.beta = 1.7
    with masks.applied():
        ours = masks(input_ids=IDS).logits
        ours.square().mean().backward()
    assert all(torch.equal(p, before[n]) for n, p in model.hf.state_dict().items())
    other = tiny(family)  # the same with numbers written into its weights
    gates = {n: torch.sigmoid(1.7 * masks.scores[n.replace(".", "/")].detach()) for n in masks.names}
    for name, module in matrices(other).items():
        module.weight.data.mul_(gates[name])
    other.hf.requires_grad_(True)
    theirs = other.hf(IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    theirs.square().mean().backward()
    name = masks.names[1]
    weight: Any = matrices(other)[name].weight
    expected = weight.grad * before[f"{name}.weight"] * 1.7 * gates[name] * (1 - gates[name])
    assert torch.allclose(masks.scores[name.replace(".", "/")].grad, expected, atol=1e-6)


def test_sharpness_grows_by_a_constant_factor_and_size_has_its_price() -> None:
    masks = Masks(tiny("gpt2"))
    plug = Sharpen(masks, steps=5, last_beta=81.0, strength=2.0)
    betas = []
    for step in range(5):
        plug.begin(step)
        betas.append(masks.beta)
    assert betas == pytest.approx([1, 3, 9, 27, 81])
    masks.fresh()
    assert float(plug.terms()["size"].detach()) == pytest.approx(2 * 0.5)


def test_a_mask_is_one_bit_a_weight_and_fits_its_model_alone(tmp_path: Path) -> None:
    model = tiny("llama")
    mask = some_mask(model)
    mask.save(tmp_path)
    assert (tmp_path / MASK).stat().st_size < mask.total / 8 + 4096
    again = WeightMask.load(tmp_path, model)
    assert all((again.kept[n] == k).all() for n, k in mask.kept.items()) and again.size == mask.size
    with pytest.raises(VesaliusError, match="the mask was learnt on a model with fingerprint"):
        WeightMask.load(tmp_path, tiny("llama", seed=1))
    raw = bytearray((tmp_path / MASK).read_bytes())
    raw[-1] ^= 1
    (tmp_path / MASK).write_bytes(bytes(raw))
    with pytest.raises(RunError, match="was changed after it was saved"):
        WeightMask.load(tmp_path)
    with pytest.raises(RunError, match="there is no mask in"):
        WeightMask.load(tmp_path / "nowhere")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_masked_model_is_an_ordinary_checkpoint_with_the_same_logits(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    mask, before = some_mask(model), model.logits(IDS)
    save_masked(model, mask, tmp_path)
    with mask.applied(model):
        inside = model.logits(IDS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, inside)
    assert torch.equal(model.logits(IDS), before) and not torch.equal(inside, before)
    with mask.applied(model), pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            pass
    assert torch.equal(model.logits(IDS), before)


def test_random_masks_have_the_same_counts_and_overlap_by_chance() -> None:
    model = tiny("llama")
    mask = some_mask(model)
    other = mask.like(3)
    assert {n: k.sum() for n, k in mask.kept.items()} == {n: k.sum() for n, k in other.kept.items()}
    assert mask.overlap(mask)["jaccard"] == 1 and mask.overlap(~mask)["shared"] == 0
    assert mask.overlap(other)["ratio"] == pytest.approx(1, abs=0.1)
    assert (~mask).size == mask.total - mask.size


def test_the_loss_is_the_cross_entropy_to_the_table() -> None:
    source = synthetic_source("markov-spans", rows=4, **CHAIN)
    table = bigram_table(source, source.vocab_size, batches=60, top=5)
    hf = build(preset("tiny-gpt2", layers=1, vocab_size=source.vocab_size, max_length=24), 0)
    objective = BigramObjective(CausalLM(needs_for(hf, None)), table)
    sample = objective.sample(source.batch(0), 0)
    out = hf(**sample.inputs)
    loss = objective.loss(out, sample)
    p = torch.from_numpy(table.matrix()).float()[sample.inputs["input_ids"]]
    cross = -(p * out.logits.log_softmax(-1)).sum()
    own = -(p * p.log()).sum()
    assert float(loss.total.detach()) == pytest.approx(float(cross.detach()), rel=1e-4)
    assert float(loss.logs["divergence"]) == pytest.approx(float((cross - own).detach()), rel=1e-3)


# -- a model whose job is known


@pytest.fixture(scope="module")
def chain() -> tuple[Model, Source, Source, BigramTable]:
    """Two layers trained on a Markov chain: what the current token says is nearly all there is to know."""
    torch.manual_seed(0)
    source, test = (synthetic_source("markov-spans", rows=16, split=s, **CHAIN) for s in ("train", "test"))
    hf = build(preset("tiny-gpt2", layers=2, d_model=32, heads=2, vocab_size=24, max_length=24), 0)
    hf.requires_grad_(True)
    objective = make_objective("causal-lm", needs_for(hf, None))
    optimizer = make_optimizer("adamw", hf, lr=5e-3)
    for _ in Trainer(hf, source, objective, optimizer, make_schedule("linear", 250, warmup=0.05)).steps(250):
        pass
    return Model.wrap(hf, name="chain"), source, test, bigram_table(source, 24, batches=300)


def test_few_weights_hold_the_bigrams_and_the_model_needs_them(
    chain: tuple[Model, Source, Source, BigramTable],
) -> None:
    model, source, test, table = chain
    masks, steps = Masks(model), 200
    trainer = Trainer(
        masks,
        source,
        BigramObjective(make_objective("causal-lm", needs_for(model.hf, None)), table),  # type: ignore[arg-type]
        make_optimizer("adamw", masks, lr=0.015, weight_decay=0.0),
        make_schedule("cosine", steps, warmup=0.02, final=0.1),
        clip=None,
        plugs=[Sharpen(masks, steps, 300.0, 3.0)],
    )
    with masks.applied():
        for _ in trainer.steps(steps):
            pass
    mask = masks.mask()
    found = variants(model, mask, table, test, 8, controls=2)
    mean = found.groupby("variant")[["r", "nll"]].mean()
    assert mask.share <= 0.2
    assert mean.loc["subnetwork", "r"] >= 0.95
    assert mean.loc["random", "r"] < mean.loc["no matrices", "r"] + 0.1 < 0.5  # what the embeddings know by themselves
    cost = mean["nll"] - mean.loc["model", "nll"]
    assert cost["without it"] >= 5 * cost["without random"] and cost["without it"] > 0.1
    turned = turn(model, mask, test).set_index(["variant", "place"])
    assert turned.loc[("subnetwork", "L1.post"), "next_token"] == pytest.approx(1)
    first, last = (turned.loc[("subnetwork", p), "this_token"] for p in ("embed", "L1.post"))
    assert first > last


def test_an_interrupted_search_ends_with_the_mask_it_would_have_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = [{"id": str(i), "text": " ".join(f"w{w}" for w in rng.integers(3, 20, 60))} for i in range(80)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    from features_helpers import spoken

    model = spoken("llama")
    recipe = MaskRecipe(steps=12, rows=4, length=16, check=2, controls=1, stop=0.0)
    corpus = str(folder / "text.jsonl")
    whole = learn_masks(model, corpus, recipe, out=tmp_path / "whole")
    step = Trainer.step

    def stopping(self: Trainer) -> Any:
        if self.done == 7:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            learn_masks(model, corpus, recipe, out=tmp_path / "cut")

    cut = learn_masks(model, corpus, recipe, out=tmp_path / "cut")
    assert (cut / MASK).read_bytes() == (whole / MASK).read_bytes()
    assert json.loads((cut / NOTE).read_text())["fingerprint"] == model.fingerprint
    assert not (cut / "steps").exists() and (cut / "model" / "config.json").exists()

    def signalled(self: Trainer) -> Any:
        """Ctrl-C after the weights have changed and before the step is counted."""
        update = self.optimizer.step

        def half(*given: Any) -> None:
            update(*given)
            signal.raise_signal(signal.SIGINT)

        self.optimizer.step = half if self.done == 4 else update  # type: ignore[method-assign]
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        with pytest.raises(KeyboardInterrupt):
            learn_masks(model, corpus, recipe, out=tmp_path / "signalled")
    assert [p.name for p in tmp_path.glob("signalled/*/steps/*")] == [checkpoints.name_of(5)]
    again = learn_masks(model, corpus, recipe, out=tmp_path / "signalled")
    assert (again / MASK).read_bytes() == (whole / MASK).read_bytes()
    with pytest.raises(VesaliusError, match="too few for a bigram table"):
        (folder / "short.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
        small = MaskRecipe(steps=1, rows=1, length=4, check=1, held_out=0.5)
        learn_masks(model, str(folder / "short.jsonl"), small, out=tmp_path / "short")
