"""The circuit as a drawing: layers upwards, heads at their number, MLPs in a column on the right.

Plain SVG, so that it prints, and is there without JavaScript. Members are discs filled by their score; the model's
other parts are specks, so that the reader sees where the circuit is not. Edges are as wide as |score|, weak ones faint
and drawn first, so that two hundred of them leave the strong ones readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from vesalius.parts import Part, parse_part
from vesalius.report.charts import DIVERGING, NEUTRAL
from vesalius.report.page import Drawing
from vesalius.report.words import number

MOST_EDGES = 400  # more than this is a smear; the strongest are drawn and the rest counted
_SHORT = {
    "duplicate-token": "dup", "induction": "ind", "inhibition": "inh", "s-inhibition": "inh", "mover": "mov",
    "name-mover": "mov", "negative-mover": "neg", "previous-token": "prev", "content-gatherer": "gath",
}  # fmt: skip
_LEFT, _RIGHT = 66, 150  # room for the layers' names, and for the MLPs


@dataclass(frozen=True)
class _Spot:
    x: float
    y: float
    r: float


def short_role(role: str) -> str:
    """A role in at most four letters, as it stands under a node."""
    key = role.strip().lower().replace(" ", "-").replace("_", "-").removesuffix("-head")
    return _SHORT.get(key, key[:4])


def shade(value: float) -> str:
    """The colour of a number in [-1, 1] on the diverging scale."""
    place = (float(np.clip(value, -1, 1)) + 1) / 2 * (len(DIVERGING) - 1)
    i = min(int(place), len(DIVERGING) - 2)
    a, b = (np.array([int(c[j : j + 2], 16) for j in (1, 3, 5)]) for c in (DIVERGING[i], DIVERGING[i + 1]))
    return "#" + "".join(f"{round(v):02x}" for v in a + (b - a) * (place - i))


def _ink(fill: str) -> str:
    r, g, b = (int(fill[j : j + 2], 16) for j in (1, 3, 5))
    return "#ffffff" if 0.299 * r + 0.587 * g + 0.114 * b < 140 else "#1d1f21"


def draw(
    members: Sequence[Mapping[str, Any]],
    edges: Sequence[Mapping[str, Any]],
    universe: Iterable[str] = (),
    width: int = 1000,
    beside: Iterable[str] = (),
    caption: str = "",
) -> tuple[Drawing, list[str]]:
    """Draws a circuit.

    Args:
        members: `{"part", "role"?, "score"?}` for each part of the circuit.
        edges: `{"sender", "receiver", "score"}`; a receiver may have a side.
        universe: addresses of all parts of the model, drawn as specks.
        width: of the drawing, in the units in which a disc is at most 23 wide.
        beside: parts of the circuits drawn next to this one, so that the layers stand at the same heights; members that
            are among them get a heavy outline.
        caption: stands above the drawing.

    Returns:
        The drawing, and remarks on what is not in it.
    """
    known: dict[Part, Mapping[str, Any]] = {parse_part(str(m["part"])).output: m for m in members}
    links = [(parse_part(str(e["sender"])).output, parse_part(str(e["receiver"])), e) for e in edges]
    for sender, receiver, _ in links:
        known.setdefault(sender, {})
        known.setdefault(receiver.output, {})
    if not any(p.stack or p.layer is None for p in known):  # of an encoder-decoder's ends only those it uses
        known |= {Part("embed"): {}, Part("unembed"): {}}
    others = {parse_part(p).output for p in beside}
    everything = {*known, *others, *(p.output for p in map(parse_part, universe))}
    busy = {(p.stack, p.layer) for p in (*known, *others)}
    spots, height, rows = _places(everything, busy, bool(any(m.get("role") for m in members)), width)
    remarks = []
    links.sort(key=lambda link: abs(_score(link[2])))
    if len(links) > MOST_EDGES:
        remarks.append(f"The {MOST_EDGES} strongest of {len(links)} edges are drawn; the table of edges has them all.")
        links = links[-MOST_EDGES:]
    out = [
        f'<div class="scroll"><svg class="graph" viewBox="0 0 {width} {height:.0f}" '
        f'style="min-width:{width * 2 // 3}px" '
        f'role="img" '
        f'aria-label="The circuit: {len(known)} parts, {len(links)} edges">'
    ]
    out += _rulers(everything, spots, rows, height, width)
    out += [
        f'<circle class="idle" cx="{s.x:.1f}" cy="{s.y:.1f}" r="2">'
        f"<title>{escape(p)}: not in the circuit</title></circle>"
        for p, s in spots.items()
        if p not in known
    ]
    out += _edges(links, spots, width - _RIGHT)
    out += _nodes(known, spots, others)
    out.append("</svg></div>")
    return Drawing(Markup("".join(out)), caption), remarks


def _score(row: Mapping[str, Any]) -> float:
    value = row.get("score")
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else 0.0


def _places(
    parts: Iterable[Part], busy: set[tuple[str, int | None]], roles: bool, width: int
) -> tuple[dict[Part, _Spot], float, dict[tuple[str, int], float]]:
    """Where each part stands; layers without a member take little room."""
    items = sorted(parts, key=lambda p: p.order)
    layers = sorted({(0 if p.stack == "enc" else 1, p.stack, p.layer) for p in items if p.layer is not None})
    heads = max([(p.index or 0) + 1 for p in items if p.kind == "head"], default=1)
    cross = max([(p.index or 0) + 1 for p in items if p.kind == "xhead"], default=0)
    columns = heads + cross
    room = (width - _LEFT - _RIGHT) / columns
    r = min(11.5, room * 0.42)
    full, empty = (2 * r + 16 if roles else 2 * r + 11), 14.0
    height = 46.0 + sum(full if (s, n) in busy else empty for _, s, n in layers) + 64
    y, rows = height - 62, {}
    for _, stack, layer in layers:
        assert layer is not None
        step = full if (stack, layer) in busy else empty
        rows[(stack, layer)] = y - step / 2
        y -= step
    spots: dict[Part, _Spot] = {}
    crowd: dict[tuple[str, int | None], int] = {}
    for p in items:
        if p.layer is None:
            bottom = p.kind == "embed"
            x = _LEFT + (width - _LEFT - _RIGHT) * (0.25 if p.stack == "enc" else 0.75 if p.stack == "dec" else 0.5)
            spots[p] = _Spot(x, height - 30 if bottom else 22, 13)
        elif p.kind in ("head", "xhead"):
            column = (p.index or 0) + (heads if p.kind == "xhead" else 0)
            spots[p] = _Spot(_LEFT + room * (column + 0.5), rows[(p.stack, p.layer)], r)
        else:  # MLPs a little higher than the heads they follow; neurons and others beside them
            beside = 0 if p.kind == "mlp" else 1 + crowd.get((p.stack, p.layer), 0)
            crowd[(p.stack, p.layer)] = beside
            spots[p] = _Spot(width - _RIGHT + 46 + 15 * beside, rows[(p.stack, p.layer)] - r * 0.35, r)
    return spots, height, rows


def _rulers(
    parts: Iterable[Part], spots: Mapping[Part, _Spot], rows: Mapping[tuple[str, int], float], height: float, width: int
) -> list[str]:
    out = []
    for (stack, layer), y in rows.items():
        name = f"{stack}.L{layer}" if stack else f"L{layer}"
        out.append(f'<text class="layer" x="{_LEFT - 16}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        out.append(f'<line class="line" x1="{_LEFT - 8}" x2="{width - _RIGHT + 70}" y1="{y:.1f}" y2="{y:.1f}"/>')
    columns = {}
    for p in parts:
        if p.kind in ("head", "xhead"):
            columns[spots[p].x] = ("X" if p.kind == "xhead" else "H") + str(p.index)
        elif p.kind == "mlp":
            columns[spots[p].x] = "MLP"
    few = 1 if len(columns) <= 26 else 4
    for i, (x, name) in enumerate(sorted(columns.items())):
        if i % few == 0 or name == "MLP":
            out.append(f'<text class="column" x="{x:.1f}" y="{height - 2:.1f}" text-anchor="middle">{name}</text>')
    return out


def _edges(
    links: Sequence[tuple[Part, Part, Mapping[str, Any]]], spots: Mapping[Part, _Spot], right: float
) -> list[str]:
    out = []
    largest = max((abs(_score(e)) for _, _, e in links), default=0.0) or 1.0
    for rank, (sender, receiver, edge) in enumerate(links):
        score = _score(edge)
        share = abs(score) / largest
        place = (rank + 1) / len(links)
        a, b = spots[sender], spots[receiver.output]
        shift = {"q": -0.5, "k": 0.0, "v": 0.5}.get(receiver.side or "k", 0.0) * b.r
        x1, y1, x2, y2 = a.x, a.y - a.r, b.x + shift, b.y + b.r
        lift = max(14.0, 0.42 * abs(y1 - y2))
        bend = 0.0
        if abs(a.x - b.x) < 1 and y1 - y2 > 30:  # around what lies between, to the right in the MLPs' column
            bend = min(70.0, 0.22 * (y1 - y2)) * (1 if a.x > right else -1)
        path = f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1 - lift:.1f} {x2 + bend:.1f} {y2 + lift:.1f} {x2:.1f} {y2:.1f}"
        opacity = min(0.9, 0.08 + 0.5 * share + 0.45 * place**4)
        out.append(
            f'<path class="edge {"pos" if score >= 0 else "neg"}" data-a="{escape(sender)}" '
            f'data-b="{escape(receiver.output)}" d="{path}" stroke-width="{0.7 + 4.3 * share:.2f}" '
            f'stroke-opacity="{opacity:.2f}"><title>{escape(sender)} → {escape(receiver)}: '
            f"{number(score)}</title></path>"
        )
    return out


def _nodes(known: Mapping[Part, Mapping[str, Any]], spots: Mapping[Part, _Spot], shared: set[Part]) -> list[str]:
    out = []
    sizes = [abs(_score(m)) for p, m in known.items() if p.kind in ("head", "xhead")]
    largest = max(sizes, default=0.0) or max((abs(_score(m)) for m in known.values()), default=0.0) or 1.0
    for p in sorted(known, key=lambda q: q.order):
        member, s = known[p], spots[p]
        role = str(member.get("role") or "")
        fill = shade(_score(member) / largest) if member.get("score") is not None else NEUTRAL
        told = [str(p), f"score {number(_score(member))}" if member.get("score") is not None else "", role]
        heavy = " shared" if p in shared else ""
        out.append(
            f'<g class="node{heavy}" data-part="{escape(p)}"><title>{escape(", ".join(t for t in told if t))}</title>'
        )
        if p.layer is None:
            name = (f"{p.stack}. " if p.stack else "") + ("embed" if p.kind == "embed" else "logits")
            out.append(
                f'<rect class="end" x="{s.x - 48:.1f}" y="{s.y - 13:.1f}" width="96" height="26" rx="4"/>'
                f'<text x="{s.x:.1f}" y="{s.y + 4.5:.1f}" text-anchor="middle" font-size="13">{escape(name)}</text></g>'
            )
            continue
        if p.kind in ("head", "xhead"):
            out.append(f'<circle cx="{s.x:.1f}" cy="{s.y:.1f}" r="{s.r:.1f}" fill="{fill}"/>')
            size, text = min(12.0, s.r * 0.95), str(p.index)
        else:
            out.append(
                f'<rect x="{s.x - s.r * 1.35:.1f}" y="{s.y - s.r * 0.8:.1f}" width="{s.r * 2.7:.1f}" '
                f'height="{s.r * 1.6:.1f}" rx="3" fill="{fill}"/>'
            )
            size, text = min(11.0, s.r * 0.9), f"m{p.layer}" if p.kind == "mlp" else f"N{p.index}"
        out.append(
            f'<text x="{s.x:.1f}" y="{s.y + size * 0.36:.1f}" text-anchor="middle" font-size="{size:.1f}" '
            f'font-weight="600" style="fill:{_ink(fill)}">{escape(text)}</text>'
        )
        if role:
            x = s.x + (s.r * 1.35 + 5 if p.kind == "mlp" else 0)
            y, anchor = (s.y + 3, "start") if p.kind == "mlp" else (s.y + s.r + 9, "middle")
            out.append(
                f'<text class="role" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(short_role(role))}</text>'
            )
        out.append("</g>")
    return out


def key(members: Iterable[Mapping[str, Any]], shared: bool = False) -> Drawing:
    """What the colours and the short roles mean."""
    items = ['<li class="pos"><i></i><span>helps the metric</span></li>']
    items.append('<li class="neg"><i></i><span>hurts it</span></li>')
    items += ['<li class="shared"><i></i><span>in every circuit</span></li>'] * shared
    roles = sorted({str(m["role"]) for m in members if m.get("role")})
    items += [f"<li><b>{escape(short_role(r))}</b> {escape(r)}</li>" for r in roles if short_role(r) != r]
    return Drawing(Markup(f'<ul class="key">{"".join(items)}</ul>'), span=True)
