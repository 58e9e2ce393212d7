"""Encoder-decoders of parts on the bench: T5's addresses, T5's activations, the same interventions."""

from __future__ import annotations

import pytest
import torch
from test_encoder_decoder import PARTS, SOURCE, TARGET, loud, of_parts, t5
from torch import Tensor, nn

from vesalius.build import build, export
from vesalius.errors import ModelError, PartError
from vesalius.model import Model
from vesalius.model.check import check
from vesalius.model.hooks import CROSS_NAMES, NAMES, Site
from vesalius.model.intervene import Intervention, locate, taps
from vesalius.parts import parse

KINDS = ("head", "xhead", "mlp", "neuron", "attn", "resid_pre", "resid_mid", "resid_post", "embed", "unembed")


def twins(head: str = "untied", **changes) -> tuple[Model, Model]:
    hf = loud(build(t5("geglu-tanh", head, **changes), seed=4, stock=False))
    return Model.wrap(hf), Model.wrap(export(hf))


def every_site(model: Model) -> list[Site]:
    found = []
    for prefix, stack in model.anatomy.stacks.items():
        names = NAMES + (CROSS_NAMES if prefix == "dec" else ())
        found += [Site(name, layer, prefix) for layer in range(len(stack.blocks)) for name in names]
    return found


def test_addresses_are_those_of_t5() -> None:
    ours, stock = twins(encoder_layers=3)
    assert [str(p) for p in ours.parts(KINDS)] == [str(p) for p in stock.parts(KINDS)]
    assert {"enc.L2.H3", "dec.L1.X0", "dec.L0.MLP", "enc.L0.N127"} <= {str(p) for p in ours.parts(KINDS)}
    sizes = ("kind", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "n_parameters")
    assert [getattr(ours, s) for s in sizes] == [getattr(stock, s) for s in sizes]
    for wrong in ("enc.L3.H0", "enc.L0.X0", "dec.L0.X4", "L0.H0"):
        for model in (ours, stock):
            with pytest.raises(PartError):
                model.anatomy.require(parse(wrong))


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_recorded_activations_are_those_of_t5(head: str) -> None:
    ours, stock = twins(head, encoder_layers=3)
    sites = every_site(stock)
    assert sites == every_site(ours) and len(sites) == 3 * 12 + 2 * 18
    mask = torch.ones_like(SOURCE)
    mask[1, 30:] = 0
    got, want = (m.run(SOURCE, mask, capture=sites, decoder=TARGET) for m in (ours, stock))
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    for site in sites:
        a, b = got[site], want[site]
        assert a.shape == b.shape and b.abs().max() > 0
        if site.stack == "enc":  # what padding holds is nobody's
            a, b = (x.transpose(1, 2) if site.name == "pattern" else x for x in (a, b))
            a, b = a[mask.bool()], b[mask.bool()]
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda text, site=site: f"{site}: {text}")
    with torch.no_grad():
        assert torch.equal(ours.logits(SOURCE, mask, TARGET), ours.hf(SOURCE, mask, TARGET).logits)
    last = want[Site("resid_post", 1, "dec")]
    torch.testing.assert_close(ours.readout(last), want.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("address", ["enc.L1.H2", "dec.L0.H1", "dec.L1.X3", "enc.L0.MLP", "dec.L1.N5", "dec.L1.X0.q"])
def test_an_intervention_does_what_it_does_to_t5(address: str) -> None:
    ours, stock = twins()
    part, other = parse(address), SOURCE.flip(0)
    base, found = ours.logits(SOURCE, decoder=TARGET), []
    for model in (ours, stock):
        there = model.run(other, capture=[locate(part).site], decoder=TARGET.flip(0))
        change = taps([[Intervention(part, value=there.part(part))]], rows=3)
        found.append(model.run(SOURCE, taps=change, decoder=TARGET).logits)
    assert (found[0] - base).abs().max() > 1e-3
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_patched_cross_head_is_a_plain_hook() -> None:
    model, a = twins()[0], t5()
    other = model.run(SOURCE.flip(0), capture=[Site("cross_z", 1, "dec")], decoder=TARGET)
    part = parse("dec.L1.X2")
    got = model.run(SOURCE, taps=taps([[Intervention(part, value=other.part(part))]], rows=3), decoder=TARGET).logits

    def patch(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z, columns = args[0].clone(), slice(2 * a.d_head, 3 * a.d_head)
        z[..., columns] = other[Site("cross_z", 1, "dec")].flatten(-2)[..., columns]
        return (z,)

    handle = model.hf.model.decoder.layers[1].cross.o.register_forward_pre_hook(patch)
    want = model.logits(SOURCE, decoder=TARGET)
    handle.remove()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert not torch.equal(want, model.logits(SOURCE, decoder=TARGET))


@pytest.mark.parametrize("name", [n for n in PARTS if n != "post-norm"])
def test_every_identity_of_the_bench_holds(name: str) -> None:
    report = check(Model.wrap(of_parts(name), name=name))
    assert report.ok, report
    usable = {kind for kind, one in report.usable().items() if one.ok}
    theirs = check(Model.wrap(export(of_parts("t5")))).usable()
    assert usable == {kind for kind, one in theirs.items() if one.ok} and "xhead" in usable


def test_patterns_exist_where_attention_does() -> None:
    model = Model.wrap(of_parts("recurrent"))
    wanted = [Site("pattern", layer, "dec") for layer in range(2)] + [Site("cross_pattern", 0, "dec")]
    found = model.run(SOURCE, capture=wanted, decoder=TARGET).sites
    assert set(found) == set(wanted[1:])
    assert all(torch.allclose(x.sum(-1), torch.ones(())) for x in found.values())


def test_norms_after_sums_are_not_read_yet() -> None:
    with pytest.raises(ModelError, match="is_post_norm.*middle of a block"):
        Model.wrap(of_parts("post-norm"))
