"""Encoder-decoders of parts learn as the stock T5 does: the same first weights, data and noise give the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import small, weights

import vesalius
from vesalius.build import preset, stock_name
from vesalius.train.assembly import assemble
from vesalius.train.objectives.special import sentinels
from vesalius.train.parallel import World
from vesalius.train.running import train

SPECIAL = ["<eos>", "<pad>", "[NLU]", "[NLG]", "[S2S]", *sentinels(16)]
TOKENIZER = {
    "kind": "bpe",
    "vocab_size": 330,
    "special": SPECIAL,
    "roles": {"eos_token": "<eos>", "pad_token": "<pad>"},
}
SIZE = {"layers": 2, "d_model": 32, "heads": 2, "d_head": 16, "d_ff": 64}
OTHERS: dict[str, dict[str, Any]] = {
    "bart-like": {"norm": {"kind": "layer"}, "positions": {"kind": "learned"}, "bias": True, "feed_forward": "gelu"},
    "rotary-hybrid": {"positions": {"kind": "rotary"}, "feed_forward": "swiglu", "mixers": "[qlstm,attn]"}
    | {"encoder_mixers": "attn", "kv_heads": 1},
}


def losses(text: Path, objective: str, stock: bool, steps: int = 8, **architecture: Any) -> tuple[str, list[float]]:
    """The model's class and the loss a target of each step."""
    recipe = small(
        text,
        model={"preset": "tiny-t5", "stock": stock, "architecture": {**SIZE, **architecture}},
        data__tokenizer=TOKENIZER,
        data__length=48,
        objective={"name": objective},
        clip=1.0,
        steps=steps,
    )
    trainer = assemble(recipe, World.single()).trainer
    found = [step.loss for step in trainer.steps(steps)]
    return type(trainer.model).__name__, found


@pytest.mark.parametrize("objective", ["span-corruption", "ul2", "prefix-lm"])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_are_those_of_t5(text: Path, objective: str, tied: bool) -> None:
    scale = {"tied": tied, "logit_scale": "inverse-sqrt" if tied else "none"}
    (theirs, want), (ours, got) = (losses(text, objective, stock, **scale) for stock in (True, False))
    assert (theirs, ours) == ("T5ForConditionalGeneration", "VesaliusForConditionalGeneration")
    assert got == pytest.approx(want, rel=1e-4)
    assert len(set(want)) == len(want)


@pytest.mark.parametrize("name", OTHERS)
def test_other_parts_learn_too(text: Path, name: str) -> None:
    assert stock_name(preset("tiny-t5", **OTHERS[name])) is None
    made, found = losses(text, "span-corruption", True, steps=40, **OTHERS[name])
    assert made == "VesaliusForConditionalGeneration"
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


def test_a_run_is_opened_with_its_tokenizer(text: Path, tmp_path: Path) -> None:
    """A checkpoint of a run holds the weights, the tokenizer and the addresses."""
    recipe = small(
        text,
        model={"preset": "tiny-t5", "stock": False, "architecture": SIZE},
        data__tokenizer=TOKENIZER,
        data__length=48,
        objective={"name": "ul2"},
    )
    whole = train(recipe, tmp_path / "whole")
    model = vesalius.open(f"{whole}@last", device="cpu")
    assert model.kind == "encoder-decoder" and model.anatomy.family == "vesalius-encoder-decoder"
    assert "dec.L1.X1" in [str(p) for p in model.parts(("xhead",))]
    assert model.tokenizer is not None and len(model.tokenizer) <= model.hf.config.vocab_size
    saved = weights(whole, small(text).steps)
    assert all(torch.equal(saved[n], p) for n, p in model.hf.named_parameters() if n in saved) and len(saved) > 40
