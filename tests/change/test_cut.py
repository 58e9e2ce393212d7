"""A model with parts taken out says what the whole model says with these parts silenced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import CAUSAL, MASKED, some_ids, tiny
from torch import Tensor

from vesalius.change import Keep, cut
from vesalius.errors import ModelError, PartError, VesaliusError
from vesalius.model import Intervention, Model
from vesalius.model.intervene import taps
from vesalius.model.saving import save_model
from vesalius.parts import Part, parse_part

ONE_STACK = [*CAUSAL, *MASKED]


def silenced(model: Model, parts: list[Part]) -> Tensor:
    """Logits with these parts' outputs at zero."""
    changes = [Intervention(p, "zero") for p in parts]
    logits = model.run(some_ids(), taps=taps([changes], rows=len(some_ids()))).logits
    assert logits is not None
    return logits


def heads_can_go(model: Model) -> bool:
    return model.anatomy.spec.sizes.head_dim is not None


@pytest.mark.parametrize("family", ONE_STACK)
def test_neurons_taken_out_are_neurons_silenced(family: str) -> None:
    model = tiny(family)
    if model.anatomy.spec.sizes.mlp is None:
        with pytest.raises(ModelError, match="4 d_model"):
            cut(model, Keep.of(model, neurons={i: range(3) for i in range(model.n_layers)}))
        return
    gone = [Part("neuron", layer, i) for layer in range(model.n_layers) for i in (layer, 7, 20 + layer)]
    keep = Keep.without(model, gone)
    smaller = cut(model, keep)
    assert smaller.d_mlp == model.d_mlp - 3 and smaller.n_heads == model.n_heads
    assert smaller.n_parameters == model.n_parameters - keep.removed(model) < model.n_parameters
    assert torch.allclose(smaller.logits(some_ids()), silenced(model, gone), atol=1e-5)


@pytest.mark.parametrize("family", ONE_STACK)
def test_heads_taken_out_are_heads_silenced(family: str) -> None:
    model = tiny(family)
    gone = [Part("head", layer, h) for layer in range(model.n_layers) for h in range(model.anatomy.group)]
    if model.anatomy.group == 1:
        gone = [Part("head", layer, layer) for layer in range(model.n_layers)]
    keep = Keep.without(model, gone)
    if not heads_can_go(model):
        with pytest.raises(ModelError, match="d_model / heads"):
            cut(model, keep)
        return
    smaller = cut(model, keep)
    assert smaller.d_head == model.d_head and smaller.n_kv_heads == model.n_kv_heads - 1
    assert torch.allclose(smaller.logits(some_ids()), silenced(model, gone), atol=1e-5)


def test_one_query_head_of_every_group_can_go() -> None:
    model = tiny("llama")
    gone = [Part("head", layer, h) for layer in range(model.n_layers) for h in (1, 2)]  # groups 0, 1 and 2, 3
    smaller = cut(model, Keep.without(model, gone))
    assert (smaller.n_heads, smaller.n_kv_heads) == (2, 2)
    assert torch.allclose(smaller.logits(some_ids()), silenced(model, gone), atol=1e-5)


@pytest.mark.parametrize("family", ONE_STACK)
def test_a_block_taken_out_is_a_block_that_writes_nothing(family: str) -> None:
    model = tiny(family)
    smaller = cut(model, Keep.without(model, [], layers=[1]))
    assert smaller.n_layers == model.n_layers - 1
    if model.anatomy.post_norm or family == "gemma2":
        return  # the norm of a silent block still acts; of Gemma 2 blocks alternate between kinds of attention
    quiet = silenced(model, [parse_part("L1.attn"), parse_part("L1.MLP")])
    if getattr(model.hf.config, "layer_types", None) is None or len(set(model.hf.config.layer_types)) == 1:
        assert torch.allclose(smaller.logits(some_ids()), quiet, atol=1e-5)


def test_what_was_cut_opens_without_vesalius(tmp_path: Path) -> None:
    model = tiny("qwen3")
    gone = [Part("head", layer, h) for layer in range(model.n_layers) for h in (0, 1)]
    gone += [Part("neuron", layer, 5) for layer in range(model.n_layers)]
    smaller = cut(model, Keep.without(model, gone, layers=[2]))
    folder = save_model(smaller, tmp_path / "cut")
    torch.save(smaller.logits(some_ids()), tmp_path / "logits.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"m, info = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        f"ids = torch.tensor({some_ids().tolist()})\n"
        f"assert torch.equal(m(ids).logits, torch.load({str(tmp_path / 'logits.pt')!r}))\n"
        "assert 'vesalius' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_no_class_can_hold_is_refused_and_says_why() -> None:
    model = tiny("llama")
    layers = range(model.n_layers)
    with pytest.raises(ModelError, match=r"block L1 would keep 47 neurons and L0 48"):
        cut(model, Keep.without(model, [parse_part("L1.N3")]))
    with pytest.raises(ModelError, match=r"unevenly among key-value heads \(1 of group 0, 2 of group 1\)"):
        cut(model, Keep.without(model, [Part("head", i, 0) for i in layers]))
    with pytest.raises(VesaliusError, match="L0 would be left without heads"):
        cut(model, Keep.without(model, [Part("head", i, h) for i in layers for h in range(4)]))
    with pytest.raises(VesaliusError, match="no block would be left"):
        cut(model, Keep.without(model, [], layers=layers))
    with pytest.raises(PartError, match="L7 does not exist"):
        Keep.without(model, [], layers=[7])
    with pytest.raises(PartError, match=r"L0.MLP cannot be taken out"):
        Keep.without(model, [parse_part("L0.MLP")])
    with pytest.raises(ModelError, match="one stack"):
        seq = tiny("t5")
        cut(seq, Keep.of(seq))
