"""Places in the residual stream, and paths of parts from one to the next.

A place is a stack and a number: 2 l before block l, 2 l + 1 in its middle. A part reads the stream at its entry; what
it wrote joins the stream at the next place. Only where a model norms the stream itself, after each sum (BERT), does
anything change between places.
"""

from __future__ import annotations

from collections.abc import Sequence

from vesalius.errors import PartError
from vesalius.model import Model
from vesalius.model.norms import NormView
from vesalius.parts import Part, parse_part

Stage = tuple[str, int]  # stack, and twice the layer, one more in the middle of the block
_ORDER = {"head": 0, "xhead": 1, "mlp": 2}
_OFFSET = {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}


def reads(model: Model, first: Part, second: Part, side: str = "v") -> bool:
    """Whether what one head or MLP writes can reach another (of a head its queries, keys or values, `q`, `k`, `v`)."""
    if second.kind == "xhead" and side != "q":
        return first.stack == "enc"
    if first.stack != second.stack or first.layer is None or second.layer is None:
        return False
    if first.layer != second.layer:
        return first.layer < second.layer
    return _ORDER[first.kind] < _ORDER[second.kind] and not model.anatomy.parallel


def check_path(model: Model, through: Sequence[Part | str]) -> tuple[Part, ...]:
    """The parts of a path, each of which reads what the one before it wrote; PartError names the one that does not."""
    prefix = model.anatomy.main.prefix
    path = []
    for item in through:
        part = parse_part(item).output
        part = Part(part.kind, part.layer, part.index, None, part.stack or prefix)
        if part.kind not in _ORDER:
            raise PartError(f"{part} cannot be on a path: paths lead through heads and MLPs, such as L9.H6, L12.MLP")
        path.append(model.anatomy.require(part))
    for first, second in zip(path, path[1:], strict=False):
        if reads(model, first, second):
            continue
        if model.anatomy.parallel and first.layer == second.layer and first.kind != second.kind:
            raise PartError(
                f"{second} does not read what {first} writes: attention and MLP of a block of {model.name} are parallel"
            )
        raise PartError(
            f"the path is not forward: {second} does not read what {first} writes; list parts in the order of "
            "computation"
        )
    if path and path[-1].stack != prefix:
        raise PartError(
            f"the path ends in {path[-1]}, whose stack has no logits; lead it on through a cross-attention head"
        )
    return tuple(path)


def entry(model: Model, part: Part) -> Stage:
    """Where a part reads the stream."""
    if part.kind == "xhead":
        return "enc", 2 * len(model.anatomy.stack("enc").blocks)
    middle = part.kind == "mlp" and not model.anatomy.parallel
    return part.stack or model.anatomy.main.prefix, 2 * (part.layer or 0) + int(middle)


def written(model: Model, part: Part) -> Stage:
    """The last place without what a part wrote: norms of the stream come after it."""
    return part.stack or model.anatomy.main.prefix, 2 * (part.layer or 0) + int(part.kind == "mlp")


def norms_between(model: Model, start: Stage, end: Stage) -> list[NormView]:
    """The norms of the stream itself from one place to a later one, in forward order; none if the model is pre-norm."""
    if not model.anatomy.post_norm:
        return []
    blocks = model.anatomy.stack(start[0]).blocks
    return [blocks[n // 2].norm_mid if n % 2 else blocks[n // 2].norm_in for n in range(start[1], end[1])]


def stage_of(model: Model, place: Part | str) -> Stage:
    """The place with a name such as `L9.resid_pre` or `embed`; PartError for a part that is none."""
    part = parse_part(place)
    stack = part.stack or model.anatomy.main.prefix
    if part.kind == "embed":
        return stack, 0
    if part.kind not in _OFFSET:
        raise PartError(
            f"{part} is no place in the stream; features are read at L9.resid_pre, resid_mid, resid_post or embed"
        )
    model.anatomy.require(Part(part.kind, part.layer, stack=stack))
    return stack, 2 * (part.layer or 0) + _OFFSET[part.kind]


def named(model: Model, stage: Stage) -> Part:
    """The name of a place."""
    stack, n = stage
    if n % 2:
        return Part("resid_mid", n // 2, stack=stack)
    last = len(model.anatomy.stack(stack).blocks)
    return Part("resid_pre", n // 2, stack=stack) if n // 2 < last else Part("resid_post", last - 1, stack=stack)
