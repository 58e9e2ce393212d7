"""Addresses: every part prints as what reads back as itself; other spellings mean what their authors mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesalius.errors import PartError, VesaliusError
from vesalius.parts import Edge, Part, parse, parse_part

number = st.integers(0, 500)
stack = st.sampled_from(["", "enc", "dec"])
part = st.one_of(
    st.builds(Part, st.sampled_from(["head", "xhead"]), number, number, st.sampled_from([None, "q", "k", "v"]), stack),
    st.builds(Part, st.just("neuron"), number, number, st.none(), stack),
    st.builds(
        Part,
        st.sampled_from(["mlp", "attn", "resid_pre", "resid_mid", "resid_post"]),
        number,
        st.none(),
        st.none(),
        stack,
    ),
    st.builds(Part, st.sampled_from(["embed", "unembed"]), st.none(), st.none(), st.none(), stack),
)


@given(part)
def test_a_part_reads_back_as_itself(one: Part) -> None:
    assert parse(str(one)) == one and parse_part(f"  {one}\n") == one
    assert parse(one) is one and repr(one) == str(one)


@given(part, part)
def test_an_edge_reads_back_as_itself(a: Part, b: Part) -> None:
    edge = Edge(a, b)
    assert parse(str(edge)) == edge and parse(f"{a} -> {b}") == edge


@given(part, part)
def test_parts_are_equal_exactly_when_their_addresses_are(a: Part, b: Part) -> None:
    assert (a == b) == (str(a) == str(b))
    assert len({a, b}) == 1 + (a != b)


@pytest.mark.parametrize(
    ("alias", "address"),
    [
        ("blocks.9.hook_resid_pre", "L9.resid_pre"),
        ("blocks.9.hook_resid_mid", "L9.resid_mid"),
        ("blocks.9.hook_resid_post", "L9.resid_post"),
        ("blocks.9.hook_attn_out", "L9.attn"),
        ("blocks.9.hook_mlp_out", "L9.MLP"),
        ("blocks.9.attn.hook_z", "L9.attn"),
        ("blocks.9.attn.hook_z.6", "L9.H6"),
        ("blocks.9.attn.hook_z[6]", "L9.H6"),
        ("blocks.9.attn.hook_result:6", "L9.H6"),
        ("blocks.9.attn.hook_q.6", "L9.H6.q"),
        ("blocks.9.attn.hook_v[6]", "L9.H6.v"),
        ("blocks.9.mlp.hook_post.217", "L9.N217"),
        ("hook_embed", "embed"),
        ("a9.h6", "L9.H6"),
        ("a9.h6<k>", "L9.H6.k"),
        ("m9", "L9.MLP"),
        ("input", "embed"),
        ("logits", "unembed"),
        ("L9.mix", "L9.attn"),
        ("L9.H6.out", "L9.H6"),
        ("L9.MLP.in", "L9.MLP"),
        ("L9.MLP.out", "L9.MLP"),
    ],
)
def test_aliases(alias: str, address: str) -> None:
    assert str(parse(alias)) == address
    if parse_part(address).kind in ("head", "mlp", "embed"):
        assert parse(f"{alias}->logits") == parse(f"{address}->unembed")


@pytest.mark.parametrize(
    "bad",
    [
        "", " ", "L9", "L9.", "L9.H", "L.H6", "9.6", "l9.h6", "L9.H6.z", "L9.H-1", "L-1.H0", "L9.H6.q.k", "L9.N",
        "L9.MLP.q", "L9.resid", "mid.L9.H6", "enc.", "embedding", "L1.5.H0", "a9.h6<z>", "blocks.9.hook_foo",
        "->", "L5.H1->", "->L9.H6", "L5.H1->L9.H6->L10.MLP", "L5.H1-L9.H6",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_the_forms_that_are(bad: str) -> None:
    with pytest.raises(PartError, match=r"L9\.H6\.q") as caught:
        parse(bad)
    assert isinstance(caught.value, VesaliusError) and "\n" not in str(caught.value)


def test_the_output_of_a_side_and_the_order_of_a_forward_pass() -> None:
    assert parse_part("L9.H6.q").output == parse_part("L9.H6")
    names = [
        "enc.L0.H0", "enc.L1.MLP", "dec.embed", "dec.L0.resid_pre", "dec.L0.H0", "dec.L0.H1", "dec.L0.attn",
        "dec.L0.X0", "dec.L0.resid_mid", "dec.L0.N3", "dec.L0.MLP", "dec.L0.resid_post", "dec.L1.H0", "dec.unembed",
    ]  # fmt: skip
    parts = [parse_part(n) for n in names]
    assert sorted(reversed(parts), key=lambda p: p.order) == parts
    edges = [parse(e) for e in ("embed->L0.H0.q", "embed->L1.H0.q", "L0.H0->L1.H0.q", "embed->unembed")]
    assert sorted(reversed(edges), key=lambda e: e.order) == edges
