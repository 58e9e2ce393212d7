"""Putting a dictionary into the forward pass: the reconstruction in the place of the activation, features changed.

    without its error    x' = decode(g(f(x)))                        what the features alone carry
    with its error       x' = x + decode(g(f(x))) - decode(f(x))     only what g changes is changed

With the error term and nothing changed the model's logits stay what they were, to the last bit. First positions that
the dictionary was not trained on are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from vesalius.errors import UnknownName, VesaliusError
from vesalius.features.dictionaries.places import flat, shaped
from vesalius.features.dictionaries.sae import SAE
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap

Op = Literal["set", "add", "scale"]
Change = Callable[[Tensor], Tensor]


def changing(sae: SAE, values: Mapping[int, float], op: Op = "set") -> Change:
    """A change of some features: `set` to a value, `add` to it, or `scale` it (0 switches it off).

    Example:
        >>> changing(sae, {7: 0.0}, "scale")        # doctest: +SKIP
    """
    if op not in get_args(Op):
        raise UnknownName("change of a feature", op, get_args(Op))
    if not values:
        raise VesaliusError("no feature is named that shall be changed")
    for value in values.values():
        if not math.isfinite(value):
            raise VesaliusError(f"a feature cannot be changed by {value:g}; give a number")
    numbers = torch.tensor([sae.feature(n) for n in values])
    amounts = torch.tensor([float(v) for v in values.values()])

    def change(features: Tensor) -> Tensor:
        index, by = numbers.to(features.device), amounts.to(features)
        old = features[..., index]
        new = by.expand_as(old) if op == "set" else old + by if op == "add" else old * by
        out = features.clone()
        out[..., index] = new
        return out

    return change


def tap(sae: SAE, change: Change | None = None, *, error: bool = True, skip: int | None = None) -> Tap:
    """The splice as a tap on the SAE's site; `skip` first positions are left alone (its own by default)."""
    first = sae.skip if skip is None else skip

    def spliced(activation: Tensor) -> Tensor | None:
        x = flat(activation, sae.site).float()
        kept = x[:, :first]
        x = x[:, first:]
        if not x.shape[1]:
            return None
        features = sae.encode(x)
        changed = features if change is None else change(features)
        if error:
            new = x if change is None else x + (sae.decode(changed) - sae.decode(features))
        else:
            new = sae.decode(changed)
        return shaped(torch.cat([kept, new], dim=1), activation)

    return spliced


def taps(
    sae: SAE, change: Change | None = None, *, error: bool = True, skip: int | None = None
) -> dict[Site, list[Tap]]:
    """The splice as `Model.run(taps=...)` takes it."""
    return {sae.site: [tap(sae, change, error=error, skip=skip)]}


@contextmanager
def spliced(
    model: Model, sae: SAE, change: Change | None = None, *, error: bool = True, force: bool = False
) -> Iterator[None]:
    """The SAE in the model's forward pass for the duration, also of `model.hf.generate`.

    Args:
        model: the SAE's own. change: see `changing`; None for none.
        error: keep what the SAE does not explain. force: accept another model of the same width.

    Raises:
        VesaliusError: if it is another model.

    Example:
        >>> with spliced(model, sae, changing(sae, {7: 5.0})):       # doctest: +SKIP
        ...     model.hf.generate(**prompt)
    """
    sae.check(model, force)
    inside = tap(sae, change, error=error)
    onward = tap(sae, change, error=error, skip=0)
    begun: list[bool] = []

    def step(activation: Tensor) -> Tensor | None:
        # While text is generated each pass after the first holds one new token, which is not the first of its row.
        single = activation.shape[1] == 1 and bool(begun)
        begun.append(True)
        return (onward if single else inside)(activation)

    with model.alone(), Hooks(model.hf, model.anatomy, {sae.site: [step]}):
        yield
