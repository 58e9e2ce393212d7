"""Causal bases: a subspace that was planted is found, and influence in lens and model is what plain passes give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import some_ids, tiny
from lens_helpers import small, streams
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from vesalius.errors import UnknownName, VesaliusError
from vesalius.lens import LogitLens, TunedLens, causal_basis, influences
from vesalius.lens.basis import (
    agreement,
    aitchison,
    principal_angles,
    random_directions,
    replacement,
    sample_states,
)
from vesalius.model import Model

D, V = 32, 97
IDS = some_ids(12, 12)
EACH = torch.cat([torch.full((12, 1), 3), torch.arange(1, 97).view(12, 8)], dim=1)  # every word once, after a first


def planted(seed: int) -> tuple[Model, torch.Tensor]:
    """A Llama whose unembedding reads a 4-dimensional subspace alone, and that subspace (4, d).

    Over the words, all directions of the embedding vary alike, so that none is of more consequence for its spread. One
    coordinate is large and constant, so that the final norm hardly depends on the others; blocks do not write into it.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    inside = torch.linalg.qr(torch.cat([torch.zeros(1, 4), torch.randn(D - 1, 4, generator=generator)]))[0].T
    with torch.no_grad():
        drawn = torch.randn(96, D - 1, generator=generator)
        hf.model.embed_tokens.weight[1:, 1:] = torch.linalg.qr(drawn - drawn.mean(0))[0] * 96**0.5
        hf.model.embed_tokens.weight[:, 0] = 30.0
        hf.lm_head.weight.copy_(torch.randn(V, 4, generator=generator) @ inside * 5)
        for layer in hf.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight[0] = 0
    return Model.wrap(hf, name="planted"), inside


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_subspace_is_found(seed: int) -> None:
    model, inside = planted(seed)
    sample = sample_states(model, EACH, 0)
    basis = causal_basis(model, LogitLens(), sample, 4)
    assert torch.allclose(basis.directions @ basis.directions.T, torch.eye(4), atol=1e-5)
    assert principal_angles(basis.directions, inside).max() < 15
    assert principal_angles(random_directions(D, 4, seed), inside).max() > 60
    assert (basis.influence > 0).all() and basis.influence[0] == basis.influence.max()
    more = causal_basis(model, LogitLens(), sample, 6)
    assert more.influence[4:].max() < 0.1 * more.influence[:4].min()  # a fifth has nothing left to do


def test_no_direction_that_was_tried_has_more_influence() -> None:
    """The first direction is at least as good as a few hundred others and as the ends of plain gradient ascents."""
    model = tiny("gpt2")
    sample = sample_states(model, IDS, 1)
    basis = causal_basis(model, LogitLens(), sample, 2)
    others = torch.cat([random_directions(32, 32, s) for s in range(2)])
    found = influences(model, LogitLens(), sample, torch.cat([basis.directions, others]))
    assert basis.influence == pytest.approx(found["lens"][:2].to_numpy(), rel=1e-4)
    assert found["lens"][0] >= found["lens"][1:].max()


def test_words_that_stand_for_the_vocabulary_lose_little_and_the_influence_is_exact() -> None:
    model, inside = planted(0)
    sample = sample_states(model, EACH, 0)
    whole, some = (causal_basis(model, LogitLens(), sample, 4, words=n) for n in (None, 48))
    assert principal_angles(some.directions, inside).max() < 15
    assert some.influence.sum() > 0.9 * whole.influence.sum()
    found = influences(model, LogitLens(), sample, some.directions)
    assert some.influence == pytest.approx(found["lens"].to_numpy(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma2"])
@pytest.mark.parametrize("kind", ["mean", "zero", "resample"])
def test_both_influences_are_those_of_plain_passes(family: str, kind: str) -> None:
    model = tiny(family)
    layer, skip = 1, 1 if family != "bert" else 0
    lens = TunedLens.for_model(model)
    with torch.no_grad():
        lens.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    v = random_directions(32, 1, 3)[0]
    sample = sample_states(model, IDS, layer)
    found = influences(model, lens, sample, v[None], ablation=kind, seed=5).iloc[0]  # type: ignore[arg-type]
    states = streams(model, IDS)[layer + 1]
    flat = states[:, skip:].reshape(-1, 32)
    toward = {"mean": flat.mean(0), "zero": torch.zeros(32)}.get(kind, replacement(flat, "resample", 5))
    moved = flat - (flat @ v)[:, None] * v + (toward @ v).expand(len(flat))[:, None] * v
    whole = states.clone()
    whole[:, skip:] = moved.view(12, 12 - skip, 32)
    block = [m for m in model.hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3][0][layer]
    with torch.no_grad():
        before = model.hf(IDS).logits
        handle = block.register_forward_hook(lambda m, a, o: (whole, *o[1:]) if isinstance(o, tuple) else whole)
        after = model.hf(IDS).logits
        handle.remove()
        p, q = (x[:, skip:].flatten(0, 1).double().softmax(-1).numpy() for x in (before, after))
        a, b = (lens(model, x, layer).double().softmax(-1).numpy() for x in (flat, moved))
    assert found["model"] == pytest.approx(stats.entropy(p, q, axis=-1).mean(), rel=1e-3)
    assert found["lens"] == pytest.approx(stats.entropy(a, b, axis=-1).mean(), rel=1e-3)
    x, y = np.log(b / a), np.log(q / p)
    x, y = (z - (p * z).sum(-1, keepdims=True) for z in (x, y))
    cosine = (p * x * y).sum(-1) / np.sqrt((p * x * x).sum(-1) * (p * y * y).sum(-1))
    assert found["alignment"] == pytest.approx(cosine.mean(), abs=1e-3)


def test_where_the_rest_of_the_model_does_nothing_lens_and_model_agree() -> None:
    model = small("llama")
    with torch.no_grad():
        for layer in model.hf.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    sample = sample_states(model, IDS, 0)
    found = influences(model, LogitLens(), sample, random_directions(32, 8))
    assert np.allclose(found["lens"], found["model"], rtol=1e-3)
    assert np.allclose(found["alignment"], 1, atol=1e-3)
    assert agreement(found)["spearman"] == pytest.approx(1)


def test_each_state_is_replaced_by_another_one() -> None:
    hidden = torch.arange(20.0)[:, None].expand(20, 3)
    other = replacement(hidden, "resample", 1)
    assert (other != hidden).all() and sorted(other[:, 0].tolist()) == list(range(20))
    assert torch.equal(other, replacement(hidden, "resample", 1))
    assert not torch.equal(other, replacement(hidden, "resample", 2))
    assert torch.equal(replacement(hidden, "mean")[3], torch.full((3,), 9.5))


def test_aitchisons_cosine_sees_distributions_not_logits() -> None:
    x, y = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind(0)
    w = torch.rand(5, 7, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(aitchison(x + 3.0, 2 * y - 1.0, 5 * w), aitchison(x, y, w), atol=1e-5)
    assert torch.allclose(aitchison(x, x, w), torch.ones(5)) and torch.allclose(aitchison(x, -x, w), -torch.ones(5))
    assert aitchison(x, torch.ones(5, 7), w).isnan().all()  # no change at all


def test_bad_requests_are_refused() -> None:
    model = tiny("llama")
    sample = sample_states(model, IDS, 0)
    with pytest.raises(VesaliusError, match="layer 2 has no causal basis.*L0 to L1"):
        sample_states(model, IDS, 2)
    with pytest.raises(VesaliusError, match="8 states are too few"):
        sample_states(model, IDS[:1, :9], 0)
    with pytest.raises(VesaliusError, match="33 directions.*width 32"):
        causal_basis(model, LogitLens(), sample, 33)
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        causal_basis(model, LogitLens(), sample, 1, ablation="meen")  # type: ignore[arg-type]
    with pytest.raises(VesaliusError, match="models of one stack"):
        sample_states(tiny("t5"), IDS, 0)


def test_states_on_which_attention_is_parked_are_left_out_and_untouched() -> None:
    model = small("llama")
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[7] *= 1000
    ids = IDS.clone()
    ids[ids == 7] = 8
    ids[3, 5] = 7
    sample = sample_states(model, ids, 0)
    assert sample.left_out == 1 and len(sample.hidden) == 12 * 11 - 1 and not sample.at[3, 5]
    assert float(sample.hidden.norm(dim=1).max()) < 100
    seen: list[torch.Tensor] = []
    handle = model.hf.model.layers[1].register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    influences(model, LogitLens(), sample, random_directions(32, 1))
    handle.remove()
    assert torch.equal(seen[0][3, 5], streams(model, ids)[1][3, 5])
