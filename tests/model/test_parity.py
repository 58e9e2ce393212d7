"""The identities that make every number on the bench mean what it says, for every family."""

from __future__ import annotations

import pytest
import torch
from families import ALL, CAUSAL, MASKED, SEQ2SEQ, some_ids, tiny
from torch import Tensor

from vesalius.errors import PartError
from vesalius.model import Intervention, Model, Site
from vesalius.model.hooks import NAMES
from vesalius.model.intervene import first_layer, locate, taps
from vesalius.model.replay import Tape
from vesalius.parts import Part, parse_part

DECODER = torch.tensor([[0, 7, 8], [0, 9, 3], [0, 5, 6]])


def decoder_of(model: Model) -> Tensor | None:
    return DECODER if model.kind == "encoder-decoder" else None


def every_site(model: Model) -> list[Site]:
    names = [n for n in NAMES if not (n == "resid_mid" and model.anatomy.parallel)]
    sites = [
        Site(n, layer, p) for p, s in model.anatomy.stacks.items() for layer in range(len(s.blocks)) for n in names
    ]
    if model.kind == "encoder-decoder":
        sites += [
            Site(f"cross_{n}", layer, "dec")
            for layer in range(model.n_layers)
            for n in ("q", "k", "v", "z", "pattern", "out")
        ]
    return sites


@pytest.mark.parametrize("family", ALL)
def test_logits_without_hooks_are_transformers_bit_for_bit(family: str) -> None:
    model = tiny(family)
    ids = some_ids()
    extra = {"decoder_input_ids": DECODER} if model.kind == "encoder-decoder" else {}
    before = model.hf(input_ids=ids, **extra).logits
    model.run(ids, capture=every_site(model), decoder=decoder_of(model))  # hooks come and go
    assert torch.equal(before, model.logits(ids, decoder=decoder_of(model)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    quiet = [s for s in every_site(model) if s.name not in ("pattern", "cross_pattern", "k", "v", "cross_k", "cross_v")]
    assert torch.equal(before, model.run(ids, capture=quiet, decoder=decoder_of(model)).logits)


@pytest.mark.parametrize("family", ALL)
def test_recorded_sites_fit_together(family: str) -> None:
    """Residual stream = sum of writes; head outputs through W_O = attention's write; patterns sum to one."""
    model = tiny(family)
    a = model.anatomy
    run = model.run(some_ids(), capture=every_site(model), decoder=decoder_of(model))
    plain = model.logits(some_ids(), decoder=decoder_of(model))
    assert torch.allclose(run.logits, plain, atol=1e-4)
    for prefix, stack in a.stacks.items():
        for layer, block in enumerate(stack.blocks):
            get = lambda n: run[n, layer, prefix]  # noqa: B023, E731
            write = torch.einsum("bshe,hed->bsd", get("z"), a.head_out(block))
            if block.o.bias is not None:
                write = write + block.o.bias
            if block.norm_attn_out is not None:
                write = block.norm_attn_out.module(write)
            assert torch.allclose(write, get("attn_out"), atol=1e-5)
            total = get("resid_pre") + get("attn_out") + get("mlp_out")
            if block.cross is not None:
                total = total + get("cross_out")
            if a.post_norm:
                mid = block.norm_in.module(get("resid_pre") + get("attn_out"))
                assert torch.allclose(mid, get("resid_mid"), atol=1e-5)
                total = block.norm_mid.module(mid + get("mlp_out"))
            assert torch.allclose(total, get("resid_post"), atol=1e-4)
            assert torch.allclose(get("pattern").sum(-1), torch.ones(()), atol=1e-5)
            for side in ("q", "k", "v"):
                weight, bias = a.head_in(block, side)
                source = get("resid_pre") if a.post_norm else block.norm_in.module(get("resid_pre"))
                expected = torch.einsum("bsd,hde->bshe", source, weight) + (0 if bias is None else bias)
                assert torch.allclose(expected, get(side), atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_readout_of_the_last_residual_is_the_logits(family: str) -> None:
    model = tiny(family)
    run = model.run(
        some_ids(),
        capture=[Site("resid_post", model.n_layers - 1, model.anatomy.main.prefix)],
        decoder=decoder_of(model),
    )
    last = next(iter(run.sites.values()))
    assert torch.allclose(model.readout(last), run.logits, atol=1e-5)
    tokens = torch.tensor([3, 50, 8])
    assert torch.allclose(model.readout(last, tokens), run.logits[..., tokens], atol=1e-5)


def plain_reference(model: Model, part: Part, value: Tensor, ids: Tensor) -> Tensor:
    """One hook written by hand on the module that computes the part, and one full forward pass."""
    a = model.anatomy
    block = a.block(part.layer or 0, part.stack)
    handles = []

    def set_in(module, change):
        handles.append(module.register_forward_pre_hook(lambda m, args: (change(args[0].clone()), *args[1:])))

    def set_out(module, change):
        def hook(m, args, out):
            return (change(out[0].clone()), *out[1:]) if isinstance(out, tuple) else change(out.clone())

        handles.append(module.register_forward_hook(hook))

    def put(slice_):
        def change(x):
            x[..., slice_] = value.reshape(x[..., slice_].shape)
            return x

        return change

    d = a.d_head
    o = block.cross.o if part.kind == "xhead" else block.o
    if part.kind in ("head", "xhead"):
        set_in(o, put(slice(part.index * d, (part.index + 1) * d)))
    elif part.kind == "neuron":
        set_in(block.down, put(slice(part.index, part.index + 1)))
    elif part.kind == "mlp":
        set_out(block.norm_mlp_out.module if block.norm_mlp_out else block.down, put(slice(None)))
    elif part.kind == "attn":
        set_out(block.norm_attn_out.module if block.norm_attn_out else block.o, put(slice(None)))
    elif part.kind == "resid_post":
        set_out(block.module, put(slice(None)))
    else:
        raise AssertionError(part)
    try:
        return model.logits(ids, decoder=decoder_of(model))
    finally:
        for h in handles:
            h.remove()


def single_parts(model: Model) -> list[Part]:
    found = []
    for prefix in model.anatomy.stacks:
        p = f"{prefix}." if prefix else ""
        names = [f"{p}L0.H1", f"{p}L2.H3", f"{p}L1.MLP", f"{p}L1.attn", f"{p}L0.resid_post", f"{p}L2.N5"]
        found += [parse_part(n) for n in names] + ([parse_part("dec.L1.X2")] if prefix == "dec" else [])
    return found


@pytest.mark.parametrize("family", ALL)
def test_every_single_part_patch_equals_one_plain_hook(family: str) -> None:
    model = tiny(family)
    base, other = some_ids(seed=1), some_ids(seed=2)
    parts = single_parts(model)
    source = model.run(other, capture=[locate(p).site for p in parts], decoder=decoder_of(model))
    reads = torch.tensor([[2]] * 3) if model.kind == "encoder-decoder" else torch.tensor([[7], [8], [8]])
    tape = Tape(model, base, torch.ones_like(base), reads, decoder=decoder_of(model))
    for part in parts:
        change = Intervention(part, value=source.part(part))
        expected = plain_reference(model, part, source.part(part), base)
        got = model.run(base, taps=taps([[change]], rows=3), decoder=decoder_of(model)).logits
        assert torch.allclose(got, expected, atol=1e-5), part
        with torch.no_grad():
            replayed = model.readout(tape.replay(first_layer([change]), taps=taps([[change]], rows=3)))
        wanted = torch.stack([expected[i, reads[i]] for i in range(3)])
        assert torch.allclose(replayed, wanted, atol=1e-4), part


@pytest.mark.parametrize("family", CAUSAL)
def test_replay_of_variants_from_the_first_differing_position(family: str) -> None:
    """Batched variants over recomputed positions only give what one full pass each gives."""
    model = tiny(family)
    base = some_ids(seed=1)
    other = torch.cat([base[:, :5], some_ids(seed=2)[:, 5:]], dim=1)
    parts = [Part("head", 1, h) for h in range(4)] + [Part("mlp", 1)]
    source = model.run(other, capture=[locate(p).site for p in parts])
    tape = Tape(model, base, torch.ones_like(base), torch.full((3, 1), 8), start=5)
    assert tape.start == 5
    variants = [[Intervention(p, value=source.part(p))] for p in parts]
    with torch.no_grad():
        got = model.readout(tape.replay(1, len(parts), taps(variants, rows=3, start=5))).unflatten(0, (len(parts), 3))
    for i, part in enumerate(parts):
        expected = plain_reference(model, part, source.part(part), base)[:, 8:9]
        assert torch.allclose(got[i], expected, atol=1e-4), part


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gpt2", "gpt-neox", "bloom", "gptj", "mistral"])
@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_patching_one_side_of_all_heads_equals_patching_the_projection(family: str, side: str) -> None:
    model = tiny(family)
    base, other = some_ids(seed=1), some_ids(seed=2)
    source = model.run(other, capture=[Site(side, 1)])
    changes = [Intervention(Part("head", 1, h, side), value=source.part(Part("head", 1, h, side))) for h in range(4)]
    got = model.run(base, taps=taps([changes], rows=3)).logits
    a, block = model.anatomy, model.anatomy.block(1)
    mine, theirs = [model.run(i, capture=[Site("resid_pre", 1)])["resid_pre", 1] for i in (base, other)]
    normed = block.norm_in.module(theirs)
    fused = block.projections["q"] is block.projections["k"]

    def hook(module, args, out):
        new = (
            torch.nn.functional.linear(normed, module.weight, module.bias)
            if hasattr(module, "in_features")
            else torch.addmm(module.bias, normed.flatten(0, 1), module.weight).view(out.shape)
        )
        if not fused:
            return new
        out = out.clone()
        a.split_qkv(out, side).copy_(a.split_qkv(new, side))
        return out

    handle = block.projections[side].register_forward_hook(hook)
    expected = model.logits(base)
    handle.remove()
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(got, model.logits(base), atol=1e-3)


@pytest.mark.parametrize("family", CAUSAL + MASKED + SEQ2SEQ)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_batches_answer_as_one_prompt_at_a_time(family: str, padding: str) -> None:
    model = tiny(family)
    lengths, width = [4, 9, 6], 9
    prompts = [some_ids(1, n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    columns = []
    for i, p in enumerate(prompts):
        at = slice(width - lengths[i], width) if padding == "left" else slice(0, lengths[i])
        ids[i, at], mask[i, at] = p[0], 1
        columns.append(at)
    if family in ("roberta",):
        ids[mask == 0] = 0
    site = Site("z", 2, model.anatomy.main.prefix)
    batch = model.run(ids, mask, capture=[site], decoder=decoder_of(model))
    for i, p in enumerate(prompts):
        alone = model.run(p, capture=[site], decoder=None if decoder_of(model) is None else DECODER[i : i + 1])
        at = slice(None) if model.kind == "encoder-decoder" else columns[i]
        assert torch.allclose(batch.logits[i, at], alone.logits[0], atol=1e-4)
        assert torch.allclose(batch.sites[site][i, at], alone.sites[site][0], atol=1e-4)


def test_parts_that_do_not_exist_are_refused() -> None:
    model = tiny("phi")
    for name, word in [
        ("L9.H0", "L0 to L2"),
        ("L0.H7", "H0 to H3"),
        ("L1.resid_mid", "parallel"),
        ("enc.L0.H0", "stack"),
    ]:
        with pytest.raises(PartError, match=word):
            model.anatomy.require(parse_part(name))
