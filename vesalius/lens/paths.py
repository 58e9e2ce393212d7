"""An observable pulled back through heads and MLPs to a direction of an earlier stream (ObsProp).

From the end of a path to its beginning, with the weights alone (Dunefsky and Cohan 2024, arXiv 2312.16291, sec. 3):

    at the final norm's output     y = W_U n
    before a norm                  y <- gain * y, for LayerNorm less its mean; the factor r(x) > 0 is left out
    before a head's write          y <- W_OV y, the attention weight left out
    before an MLP's write          y <- grad_x [ y . MLP(norm(x)) ] at a point x

For a token's state x, x . y is the feature's score: what this path adds to the observable if the heads look there.

Why r(x) may go. The gradient of y . LN(x) is r(x) times y less its part along x (and along the vector of ones). For y
drawn from a normal distribution the expected angle to y is below 2 arccos sqrt(1 - 1/(d - 1)): 0.044 rad at d = 2048.
So directions are kept and lengths are not. `scales` puts the mean r(x) of some text back, so that features of different
layers can be compared; `path_value` takes r(x) and attention from the prompt itself, and then the values of all paths
through heads (and the direct one) add up to the observable, less what biases and MLPs add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.errors import PartError, VesaliusError
from vesalius.lens.observable import Observable
from vesalius.lens.places import Stage, check_path, entry, named, norms_between, reads, stage_of, written
from vesalius.lens.tangents import Points, mlp_tangent
from vesalius.model import Intervention, Model, Site
from vesalius.model.head_weights import head_weights, reading_norm
from vesalius.model.intervene import locate
from vesalius.model.norms import NormView
from vesalius.parts import Part
from vesalius.scores import Scores

Scales = Mapping[int, float]  # mean r(x), by the id of a norm's module


@dataclass(frozen=True)
class Feature:
    """A direction of the residual stream that an observable becomes along a path.

    Attributes:
        vector: (d_model,). at: where in the stream it is read, such as `L9.resid_pre`.
        path: the parts it was pulled through, in forward order. observable: what was asked.
    """

    vector: Tensor
    at: Part
    path: tuple[Part, ...]
    observable: Observable

    @property
    def norm(self) -> float:
        return float(self.vector.norm())

    def scores(self, states: Tensor) -> Tensor:
        """The scores x . y of states (..., d_model) taken at `at`: (...)."""
        return states.float() @ self.vector.to(states.device)

    def __repr__(self) -> str:
        path = " -> ".join(map(str, self.path)) or "direct"
        return f"Feature({self.observable.text!r} through {path}, read at {self.at}, length {self.norm:.3g})"


def pull_back(
    model: Model,
    observable: Observable | str,
    through: Sequence[Part | str] = (),
    *,
    at: Part | str | None = None,
    points: Points | None = None,
    scales: Scales | None = None,
) -> Feature:
    """The feature vector of an observable along a path of heads and MLPs.

    Args:
        model: the model. observable: or its text, such as "she - he".
        through: parts in forward order, such as ["L9.H6", "L12.MLP"]; none for the direct path.
        at: where the feature is read; by default right before the first part (`L9.resid_pre`). The stream carries it
            unchanged from any earlier place (but for models that norm the stream itself).
        points: where the tangents of MLPs on the path are taken: `between_prompts(...)` or `mean_states(...)`.
        scales: mean r(x) of norms, from `norm_scales`; without it norms keep directions only.

    Raises:
        PartError: for a part the model has not, that is neither head nor MLP, or that does not read what the one before
            it wrote. VesaliusError: for an MLP without points, or a place behind the path's beginning.

    Example:
        >>> pull_back(model, "she - he", ["L23.H3"])               # doctest: +SKIP
        Feature('she - he' through L23.H3, read at L23.resid_pre, length 2.31)
    """
    asked = Observable.parse(observable, model)
    path = check_path(model, through)
    y, start = _pulled(model, asked, path, points, scales)
    target = start if at is None else stage_of(model, at)
    if target[0] != start[0] or target[1] > start[1]:
        raise VesaliusError(
            f"{at} lies behind the beginning of the path, {named(model, start)}; read the feature there or before"
        )
    return Feature(_back(model, y, target, start, scales).cpu(), named(model, target), path, asked)


def head_features(
    model: Model,
    observable: Observable | str,
    through: Sequence[Part | str] = (),
    *,
    points: Points | None = None,
    scales: Scales | None = None,
) -> tuple[Scores, Tensor]:
    """The feature of an observable through every head that can feed a path (or the logits), at that head's input.

    Heads are ranked by the length of their feature: what they could move the observable by, wherever they look. Only
    with `scales` are lengths of different layers comparable.

    Returns:
        Scores of the heads (length of the feature), and the features (head, d_model) in the same order.

    Example:
        >>> ranking, features = head_features(model, "she - he")    # doctest: +SKIP
        >>> ranking.top(5)                                          # doctest: +SKIP
    """
    asked = Observable.parse(observable, model)
    path = check_path(model, through)
    y, start = _pulled(model, asked, path, points, scales)
    found: dict[Part, Tensor] = {}
    for first in _attentions(model, start[0]):
        if not path or reads(model, first, path[0]):
            after = _back(model, y, written(model, first), start, scales)
            vectors = _through_heads(model, first, after, scales).cpu()
            found |= {Part(first.kind, first.layer, h, stack=first.stack): v for h, v in enumerate(vectors)}
    if not found:
        raise VesaliusError(f"no head comes before {path[0] if path else 'the end'} of {model.name}")
    parts = sorted(found, key=lambda p: p.order)
    stacked = torch.stack([found[p] for p in parts])
    info = {
        "method": "feature length",
        "task": asked.text,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "unit": "logit" if scales is not None else "direction's length",
        "through": [str(p) for p in path],
        "seed": 0,
    }
    return Scores(parts, stacked.norm(dim=-1).double().numpy(), info=info), stacked


def subtraction(
    model: Model,
    observable: Observable | str,
    through: Sequence[Part | str],
    *,
    amount: float = 1.0,
    direction: Tensor | None = None,
    points: Points | None = None,
    positions: Tensor | None = None,
) -> list[Intervention]:
    """Takes an observable's feature out of what the first head of a path reads for its values; nothing else sees it.

    With y = W_V (W_O y_after) the feature at the norm's output x,

        v' = v - amount (x . y / |y|^2) y W_V,      x . y = (v - bias) . (W_O y_after)

    the values the head would have without the feature in its input, as a map of the values it has.

    Args:
        through: a path that begins with a head.
        amount: 1 takes it out, 2 turns it round. direction: (d_model,) of the normed input instead, such as a random
            one; the part of it that this head's values can tell.
        points: as for `pull_back`. positions: tokens at which values are changed, (row,) or (row, k); all by default.

    Returns:
        Interventions on that head's v.
    """
    path = check_path(model, through)
    if not path or path[0].kind == "mlp":
        raise VesaliusError("a feature is taken out of what a head reads; begin the path with a head, such as L9.H6")
    head = path[0]
    weights = head_weights(model, head.layer or 0, head.stack, cross=head.kind == "xhead", fold=False)
    left, right = weights.ov.left[head.index or 0], weights.ov.right[head.index or 0]  # (d_model, d_head) and back
    if direction is None:
        y, start = _pulled(model, Observable.parse(observable, model), path[1:], points, None)
        after = _back(model, y, written(model, head), start, None)
        norm = model.anatomy.attention_of(head).norm_attn_out
        inner = right @ (after if norm is None else norm.transpose(after)).to(right.device)  # what of v it reads
    else:
        inner = torch.linalg.pinv(left) @ direction.float().to(left.device)
    y = left @ inner
    back = torch.outer(inner, y @ left) / (y @ y).clamp(min=1e-30)
    change = torch.eye(len(inner), device=left.device) - amount * back
    part = Part(head.kind, head.layer, head.index, "v", head.stack)
    found = [Intervention(part, "map", change, positions)]
    bias = weights.value_bias[head.index or 0]
    if bool(bias.any()):  # the bias is no reading of x: what the map took of it is given back
        found.append(Intervention(part, "add", bias - bias @ change, positions))
    return found


# -- actual prompts --------------------------------------------------------------------------------------------------


@torch.no_grad()
def norm_scales(model: Model, rows: Tensor | Sequence[Tensor]) -> dict[int, float]:
    """Mean r(x) of every norm over some text, for `scales`; first tokens of rows, unlike all others, left out.

    Args:
        rows: token ids (row, pos), or several such tensors; without padding.
    """
    total: dict[int, tuple[float, int]] = {}

    def note(norm: NormView, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        scale = norm.scale(x)[..., 0]
        if x.dim() == 3 and x.shape[1] > 1:
            scale = scale[:, 1:]
        summed, n = total.get(id(norm.module), (0.0, 0))
        total[id(norm.module)] = summed + float(scale.double().sum()), n + scale.numel()

    norms = [n for s in model.anatomy.stacks.values() for b in s.blocks for n in b.norms]
    norms += [s.final_norm for s in model.anatomy.stacks.values() if s.final_norm is not None]
    handles = []
    try:
        for norm in {id(n.module): n for n in norms}.values():
            handles.append(norm.module.register_forward_pre_hook(partial(note, norm), with_kwargs=True))
        for ids in [rows] if isinstance(rows, Tensor) else rows:
            model.run(ids, decoder=ids if model.kind == "encoder-decoder" else None)
    finally:
        for handle in handles:
            handle.remove()
    return {key: summed / n for key, (summed, n) in total.items()}


@torch.no_grad()
def path_value(
    model: Model,
    ids: Tensor,
    mask: Tensor | None,
    reads: Tensor,
    observable: Observable | str,
    through: Sequence[Part | str] = (),
    at: Part | str | None = None,
) -> Tensor:
    """What a path of heads adds to an observable in given prompts, attention and norms held at their own values.

        sum over tokens j of  A_last[read, .] ... A_first[., j]  (x_j . y),   with every r(x) where it belongs

    Exact for pre-norm models: the direct path from the embedding, plus every path through heads from the embedding,
    plus the paths that begin at MLPs and biases, is the observable.

    Args:
        ids, mask: (row, pos). reads: position of each row, (row,). through: heads alone, in forward order.
        at: where the path begins; by default the embedding (`L0.resid_pre`).

    Returns:
        (row,).
    """
    a = model.anatomy
    if a.post_norm or model.kind == "encoder-decoder":
        raise VesaliusError(f"values of single paths are computed for pre-norm decoders, which {model.name} is not")
    path = check_path(model, through)
    if any(p.kind == "mlp" for p in path):
        raise PartError("a path with an MLP has no exact value: MLPs are not linear; use pull_back with points")
    feature = pull_back(model, observable, path, at="embed" if at is None else at)
    start, end = locate(feature.at).site, Site("resid_post", model.n_layers - 1)
    sites = [Site(name, p.layer or 0) for p in path for name in ("resid_pre", "pattern", "z")]
    run = model.run(ids, mask, capture=list(dict.fromkeys([start, end, *sites])))
    values = feature.scores(run[start])  # (row, pos)
    for part in path:
        block = a.block(part.layer or 0)
        values = values * block.norm_in.scale(run["resid_pre", part.layer or 0])[..., 0]
        pattern = run["pattern", part.layer or 0][:, part.index].float()  # (row, query, key)
        values = (pattern @ values.unsqueeze(-1))[..., 0]
        if block.norm_attn_out is not None:
            z = run["z", part.layer or 0]
            total = torch.einsum("bshe,hed->bsd", z, a.head_out(block).to(z.dtype))
            values = values * block.norm_attn_out.scale(total)[..., 0]
    if a.main.final_norm is not None:
        values = values * a.main.final_norm.scale(run[end])[..., 0]
    return values[torch.arange(len(values)), reads.to(values.device)]


def norm_angle_bound(d: int) -> float:
    """Largest expected angle, radians, between y and the gradient of y . LN(x), for normally distributed y in R^d."""
    return 2 * math.acos(math.sqrt(1 - 1 / (d - 1)))


# -- inside ----------------------------------------------------------------------------------------------------------


def _r(norm: NormView | None, scales: Scales | None) -> float:
    """The mean r(x) of a norm, 1 where only directions are kept."""
    if norm is None or scales is None or norm.kind == "none":
        return 1.0
    if id(norm.module) not in scales:
        raise VesaliusError("the scales are of another model object; measure them with norm_scales(model, ...)")
    return scales[id(norm.module)]


def _back(model: Model, y: Tensor, start: Stage, end: Stage, scales: Scales | None) -> Tensor:
    """A functional of the stream at `end` as one of an earlier place: the same, save for norms of the stream."""
    for norm in reversed(norms_between(model, start, end)):
        y = norm.transpose(y) * _r(norm, scales)
    return y


def _pulled(
    model: Model, observable: Observable, path: Sequence[Part], points: Points | None, scales: Scales | None
) -> tuple[Tensor, Stage]:
    """The functional of the stream where a path begins, and that place; for no path, after the last block."""
    stack = model.anatomy.main
    y, place = observable.direction(model), (stack.prefix, 2 * len(stack.blocks))
    if stack.final_norm is not None:
        y = stack.final_norm.transpose(y) * _r(stack.final_norm, scales)
    for part in reversed(path):
        y = _back(model, y, written(model, part), place, scales)
        if part.kind != "mlp":
            y = _through_heads(model, part, y, scales)[part.index or 0]
        elif points is None:
            raise VesaliusError(
                f"{part} is not linear: its tangent is taken between two prompts, one for each side, or at the mean of "
                "some text; give one of them"
            )
        else:
            y = mlp_tangent(model, part, y, points(part, y))
        place = entry(model, part)
    return y, place


def _attentions(model: Model, stack: str) -> Iterator[Part]:
    """The first head of every attention of a stack whose values lead on from it."""
    for layer, block in enumerate(model.anatomy.stack(stack).blocks):
        if not getattr(block.attn, "recurrent", False):
            yield Part("head", layer, 0, stack=stack)
        if block.cross is not None:
            yield Part("xhead", layer, 0, stack=stack)


def _through_heads(model: Model, part: Part, y: Tensor, scales: Scales | None) -> Tensor:
    """W_OV y of every head of a part's layer, (head, d_model)."""
    weights = head_weights(model, part.layer or 0, part.stack, cross=part.kind == "xhead")
    block = model.anatomy.attention_of(part)
    r = _r(reading_norm(model, block, "v"), scales) * _r(block.norm_attn_out, scales)
    return r * weights.ov.T.apply(y.to(weights.ov.right.device)[None])[:, 0]
