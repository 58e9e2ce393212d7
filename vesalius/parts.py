"""Addresses of the parts of a model, parsed and printed the same everywhere.

    L9.H6            attention head 6 of block 9 (its output, before the output projection's bias)
    L9.H6.q|k|v|out  one side of that head; k and v are per query head, also when key-value heads are shared
    L9.MLP           the MLP's write to the residual stream
    L9.N217          MLP neuron 217 (the value the output matrix multiplies, after any gate)
    L9.attn          the whole attention write; L9.mix is the same for any sequence mixer
    L9.resid_pre|mid|post   the residual stream before, inside and after the block
    embed, unembed   the embedding's write, and the input of the final norm and unembedding
    enc.L3.H2, dec.L3.H2, dec.L3.X2   encoder, decoder, and cross-attention heads
    L5.H1->L9.H6.q   an edge: what a sender writes, as one receiver reads it

Hook names of TransformerLens (`blocks.9.attn.hook_z`, `blocks.9.hook_mlp_out`) and node names of the MIB benchmark
(`a9.h6`, `m9`, `input`, `logits`) are accepted as aliases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from vesalius.errors import PartError

Kind = Literal["head", "xhead", "mlp", "neuron", "attn", "resid_pre", "resid_mid", "resid_post", "embed", "unembed"]
SIDES = ("q", "k", "v", "out")

_PART = re.compile(
    r"^(?:(?P<stack>enc|dec)\.)?(?:"
    r"L(?P<layer>\d+)\.(?:"
    r"(?P<head>[HX])(?P<hi>\d+)(?:\.(?P<side>q|k|v|out))?"
    r"|(?P<mlp>MLP)(?:\.(?P<mside>in|out))?"
    r"|N(?P<ni>\d+)"
    r"|(?P<whole>attn|mix|resid_pre|resid_mid|resid_post))"
    r"|(?P<end>embed|unembed))$"
)
_ALIASES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"^blocks\.(\d+)\.(?:attn\.)?hook_resid_(pre|mid|post)$"), r"L\1.resid_\2"),
    (re.compile(r"^blocks\.(\d+)\.hook_attn_out$"), r"L\1.attn"),
    (re.compile(r"^blocks\.(\d+)\.hook_mlp_out$"), r"L\1.MLP"),
    (re.compile(r"^blocks\.(\d+)\.attn\.hook_(?:z|result)(?:\.|:|\[)(\d+)\]?$"), r"L\1.H\2"),
    (re.compile(r"^blocks\.(\d+)\.attn\.hook_(q|k|v)(?:\.|:|\[)(\d+)\]?$"), r"L\1.H\3.\2"),
    (re.compile(r"^blocks\.(\d+)\.mlp\.hook_post(?:\.|:|\[)(\d+)\]?$"), r"L\1.N\2"),
    (re.compile(r"^blocks\.(\d+)\.attn\.hook_(?:z|result)$"), r"L\1.attn"),
    (re.compile(r"^hook_embed$"), r"embed"),
    (re.compile(r"^a(\d+)\.h(\d+)$"), r"L\1.H\2"),
    (re.compile(r"^a(\d+)\.h(\d+)<(q|k|v)>$"), r"L\1.H\2.\3"),
    (re.compile(r"^m(\d+)$"), r"L\1.MLP"),
    (re.compile(r"^input$"), r"embed"),
    (re.compile(r"^logits$"), r"unembed"),
]


@dataclass(frozen=True)
class Part:
    """One part of a model; `str(part)` is its address and `parse(str(part)) == part`.

    Attributes:
        kind: what it is.
        layer: block number from 0, or None for `embed` and `unembed`.
        index: head or neuron number, or None.
        side: `q`, `k` or `v` for one input of a head; None for its output.
        stack: `enc` or `dec` in encoder-decoder models, else empty.
    """

    kind: Kind
    layer: int | None = None
    index: int | None = None
    side: str | None = None
    stack: str = ""

    def __str__(self) -> str:
        prefix = f"{self.stack}." if self.stack else ""
        if self.kind in ("embed", "unembed"):
            return prefix + self.kind
        body = {"head": f"H{self.index}", "xhead": f"X{self.index}", "mlp": "MLP", "neuron": f"N{self.index}"}
        tail = f".{self.side}" if self.side else ""
        return f"{prefix}L{self.layer}.{body.get(self.kind, self.kind)}{tail}"

    def __repr__(self) -> str:
        return str(self)

    @property
    def output(self) -> Part:
        """The same part without a side: the node a receiving side belongs to."""
        return replace(self, side=None) if self.side else self

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sorts parts in the order a forward pass computes them."""
        stack = {"enc": 0, "": 1, "dec": 1}[self.stack]
        if self.layer is None:
            return (stack, -1 if self.kind == "embed" else 10**6, 0, 0)
        within = {"resid_pre": 0, "head": 1, "attn": 2, "xhead": 3, "resid_mid": 4, "neuron": 5, "mlp": 6}
        return (stack, self.layer, within.get(self.kind, 7), self.index or 0)


@dataclass(frozen=True)
class Edge:
    """What `sender` writes into the residual stream, as `receiver` alone reads it."""

    sender: Part
    receiver: Part

    def __str__(self) -> str:
        return f"{self.sender}->{self.receiver}"

    def __repr__(self) -> str:
        return str(self)

    @property
    def order(self) -> tuple[tuple[int, int, int, int], ...]:
        """Sorts edges by receiver, then sender."""
        return (self.receiver.order, self.sender.order)


Address = Part | Edge


def parse(text: str | Part | Edge) -> Address:
    """Reads an address of a part or an edge (see the module's table), with the common aliases.

    Raises:
        PartError: if it is not an address, with the forms that are.

    Examples:
        >>> parse("L9.H6"), parse("a9.h6<q>"), parse("blocks.3.hook_mlp_out")
        (L9.H6, L9.H6.q, L3.MLP)
        >>> parse("L5.H1->L9.H6.q").receiver
        L9.H6.q
    """
    if isinstance(text, (Part, Edge)):
        return text
    text = text.strip()
    if "->" in text:
        sender, receiver = text.split("->", 1)
        return Edge(parse_part(sender), parse_part(receiver))
    return parse_part(text)


def parse_part(text: str | Part) -> Part:
    """As `parse`, for a single part."""
    if isinstance(text, Part):
        return text
    text = text.strip()
    for pattern, form in _ALIASES:
        if pattern.match(text):
            text = pattern.sub(form, text)
            break
    m = _PART.match(text)
    if m is None:
        raise PartError(
            f"'{text}' is not a part; parts look like L9.H6, L9.H6.q, L9.MLP, L9.N217, L9.attn, L9.resid_post, "
            "embed, unembed, enc.L3.H2, or an edge L5.H1->L9.H6.q"
        )
    stack = m["stack"] or ""
    if m["end"]:
        return Part(m["end"], stack=stack)  # type: ignore[arg-type]
    layer = int(m["layer"])
    if m["head"]:
        side = m["side"] if m["side"] != "out" else None
        return Part("head" if m["head"] == "H" else "xhead", layer, int(m["hi"]), side, stack)
    if m["mlp"]:
        return Part("mlp", layer, stack=stack)
    if m["ni"]:
        return Part("neuron", layer, int(m["ni"]), stack=stack)
    whole = "attn" if m["whole"] == "mix" else m["whole"]
    return Part(whole, layer, stack=stack)  # type: ignore[arg-type]
