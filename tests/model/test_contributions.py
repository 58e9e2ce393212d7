"""The final residual stream is the sum of what the parts write, part by part."""

from __future__ import annotations

import pytest
import torch
from families import ALL, CAUSAL, SEQ2SEQ, some_ids, tiny
from pairs import random_pairs
from torch import Tensor

from vesalius.find.base import find
from vesalius.model import Model, Site
from vesalius.model.contributions import Contributions, contributions
from vesalius.parts import Part

DECODER = torch.tensor([[0, 7, 8], [0, 9, 3], [0, 5, 6]])
LINEAR = [f for f in CAUSAL + SEQ2SEQ if f != "gemma2"]  # no soft-cap and no further layer after the final norm


def of(model: Model, mask: Tensor | None = None) -> tuple[Contributions, Tensor, Tensor, Tensor | None]:
    ids = some_ids()
    decoder = DECODER if model.kind == "encoder-decoder" else None
    reads = torch.tensor([[0, 2], [1, 2], [2, 1]]) if decoder is not None else torch.tensor([[0, 8], [4, 7], [8, 3]])
    return contributions(model, ids, torch.ones_like(ids), reads, decoder), ids, reads, decoder


def at(x: Tensor, reads: Tensor) -> Tensor:
    return torch.stack([x[i, r] for i, r in enumerate(reads)])


@pytest.mark.parametrize("family", ALL)
def test_parts_and_biases_sum_to_the_final_residual(family: str) -> None:
    model = tiny(family)
    found, ids, reads, decoder = of(model)
    a = model.anatomy
    end = Site("resid_post", model.n_layers - 1, a.main.prefix)
    final = at(model.run(ids, capture=[end], decoder=decoder).sites[end], reads)
    assert torch.allclose(found.final, final, atol=1e-5)
    assert torch.allclose(found.values.sum(1) + found.bias, final, atol=1e-4)
    cross = ["xhead"] if model.kind == "encoder-decoder" else []
    assert set(found.parts) == set(p for p in model.parts(("embed", "head", "mlp", *cross)) if p.stack == a.main.prefix)
    assert len(set(found.parts)) == len(found.parts) == found.values.shape[1]
    assert bool((found.values.flatten(2).norm(dim=-1) > 1e-3).all())  # no part is there as a zero


def test_each_contribution_is_what_its_part_writes() -> None:
    """On a pre-norm model, computed from the modules' own outputs and plain slices of W_O."""
    model = tiny("llama-bias")
    found, ids, reads, _ = of(model)
    seen: dict[str, Tensor] = {}
    handles = [model.hf.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.__setitem__("embed", o))]
    for n, layer in enumerate(model.hf.model.layers):
        handles.append(layer.mlp.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(f"mlp{n}", o)))
        handles.append(
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, i, n=n: seen.__setitem__(f"z{n}", i[0]))
        )
    with torch.no_grad():
        model.hf(ids)
    for h in handles:
        h.remove()
    for i, part in enumerate(found.parts):
        if part.kind == "embed":
            want = seen["embed"]
        elif part.kind == "mlp":
            want = seen[f"mlp{part.layer}"]
        else:
            lo, hi = part.index * 8, part.index * 8 + 8
            o = model.hf.model.layers[part.layer].self_attn.o_proj
            want = seen[f"z{part.layer}"][..., lo:hi] @ o.weight[:, lo:hi].T
        assert torch.allclose(found.values[:, i], at(want, reads), atol=1e-5), part
    biases = sum(layer.self_attn.o_proj.bias for layer in model.hf.model.layers)
    assert torch.allclose(found.bias, biases.expand_as(found.bias), atol=1e-5)


def test_through_post_norms_a_contribution_is_the_derivative_of_the_frozen_stream() -> None:
    """BERT: with every norm's statistics held, the final residual moves by a part's contribution when it doubles."""
    model = tiny("bert")
    found, ids, reads, _ = of(model)
    blocks = model.anatomy.main.blocks
    part = Part("head", 0, 2)
    frozen: dict[int, Tensor] = {}
    norms = [n for b in blocks for n in (b.norm_in, b.norm_mid)]
    handles = [
        n.module.register_forward_hook(lambda m, i, o, k=k, n=n: frozen.__setitem__(k, (i[0], n.scale(i[0]))))
        for k, n in enumerate(norms)
    ]
    with torch.no_grad():
        model.hf(ids)
    for h in handles:
        h.remove()
    z = model.run(ids, capture=[Site("z", 0)])["z", 0][:, :, part.index]
    move = z @ model.anatomy.head_out(blocks[0])[part.index]  # what the head adds before the first norm
    for k, n in enumerate(norms):
        scale = frozen[k][1]
        move = (move - move.mean(-1, keepdim=True)) * scale * n.module.weight
    assert torch.allclose(found.values[:, found.parts.index(part)], at(move, reads), atol=1e-5)


@pytest.mark.parametrize("family", LINEAR)
def test_direct_scores_sum_to_the_metric(family: str) -> None:
    """With a linear head all terms add up to the logit difference, the unembedding's bias included (GPT-J, Phi)."""
    model = tiny(family)
    pairs = random_pairs(model)
    logits = model.logits(pairs.clean, decoder=pairs.decoder)
    read = logits[torch.arange(3), pairs.reads[:, 0]][:, None][..., pairs.metric.tokens(pairs)]
    metric = float(pairs.value(read).mean())
    scores = find("direct", model, pairs, parts="head,xhead,mlp,embed")
    assert scores.info["sum"] == pytest.approx(metric, abs=1e-4)
    assert scores.values.sum() + scores.info["bias"] == pytest.approx(metric, abs=1e-4)


def test_direct_contrast_sums_to_the_difference_of_metrics() -> None:
    model = tiny("phi")
    pairs = random_pairs(model)
    clean, corrupted = (find("direct", model, p) for p in (pairs, pairs.swap()))
    contrast = find("direct", model, pairs, contrast=True)
    assert contrast.info["sum"] == pytest.approx(clean.info["sum"] - corrupted.info["sum"], abs=1e-4)
