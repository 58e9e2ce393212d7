"""A model that `device_map` keeps partly on disk gives the same findings as the whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from pairs import random_pairs
from transformers import AutoModelForCausalLM

import vesalius
from vesalius.find import find
from vesalius.model import Model
from vesalius.prove.circuit import Circuit
from vesalius.prove.faithfulness import evaluate


def on_disk(model: Model, folder: Path) -> Model:
    """The model, saved and opened again with every second block offloaded to disk."""
    model.hf.save_pretrained(folder / "model")
    rest, blocks = names(model)
    layers = dict.fromkeys(rest, "cpu") | {name: "disk" if i % 2 else "cpu" for i, name in enumerate(blocks)}
    hf = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=layers, offload_folder=folder / "offload", dtype=torch.float32
    )
    assert any(p.device.type == "meta" for p in hf.parameters())
    return vesalius.open(hf)


def names(model: Model) -> tuple[list[str], list[str]]:
    """Modules that together hold every parameter: children of the trunk and the head; the blocks."""
    hf = model.hf
    blocks = {id(b.module): name for b in model.anatomy.main.blocks for name, m in hf.named_modules() if m is b.module}
    trunk = hf.base_model_prefix
    rest = [f"{trunk}.{name}" for name, m in hf.base_model.named_children() if not isinstance(m, torch.nn.ModuleList)]
    return [*rest, "lm_head"], list(blocks.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_findings_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = tiny(family)
    split = on_disk(whole, tmp_path)
    pairs = random_pairs(whole, shared=3)
    assert torch.equal(whole.logits(pairs.clean), split.logits(pairs.clean))
    for method in ("direct", "activation-patching", "path-patching", "attribution-patching", "eap-ig", "relp"):
        for level in ("node", "edge"):
            if level == "edge" and method in ("direct", "path-patching"):
                continue
            mine, theirs = (find(method, m, pairs, level=level).values for m in (split, whole))
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=f"{method} {level}")
    circuits = [Circuit(frozenset(whole.parts(("head", "mlp"))[:4]))]
    mine, theirs = (evaluate(m, pairs, circuits)[0] for m in (split, whole))
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
