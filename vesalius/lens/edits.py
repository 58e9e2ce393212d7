"""Components of heads zeroed, scaled or flipped, in a pass or in the weights.

With W_OV = sum_i s_i u_i v_i^T of a head and a factor c_i for each chosen component,

    W_OV' = W_OV + sum_i (c_i - 1) s_i u_i v_i^T = W_V Z W_O,    Z = I + sum_i (c_i - 1) (W_O v_i) (v_i^T W_O^+)

so one (d_head, d_head) matrix Z is the whole edit: z Z in a forward pass, or W_O' = Z W_O in the weights, which changes
that head's rows of the output projection and nothing else, also where heads share values. What the value bias writes
along v_i is scaled with it. Where a sandwich norm follows the output, W_O stands for W_O times its gain.

Merullo et al. 2024 (arXiv 2406.09519): singular values of a few heads changed, and lists are recalled better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.errors import ModelError, PartError, VesaliusError
from vesalius.model import Intervention, Model
from vesalius.model.head_weights import head_weights
from vesalius.model.saving import origin_of, save_model
from vesalius.parts import Part, parse_part


@dataclass(frozen=True)
class ComponentEdit:
    """Components of one head multiplied by factors: 0 takes one out, -1 flips it, 2 doubles it.

    Attributes:
        part: the head. factors: by number of the component, the largest singular value first.
        fold: whether components are those of W_OV with norm gains folded in, as `composition` counts them.

    Example:
        >>> edit = ComponentEdit.of("L19.H2", {0: 0.0})
        >>> with edited(model, [edit]): model.logits(ids)           # doctest: +SKIP
    """

    part: Part
    factors: Mapping[int, float]
    fold: bool = True

    @classmethod
    def of(cls, part: str | Part, factors: Mapping[int, float], fold: bool = True) -> ComponentEdit:
        """From an address."""
        found = parse_part(part).output
        if found.kind not in ("head", "xhead"):
            raise PartError(f"{found} is not an attention head; only heads have components, such as L3.H2")
        if not factors:
            raise VesaliusError(f"an edit of {found} that changes no component; name one, such as {{0: 0.0}}")
        return cls(found, dict(factors), fold)

    def matrix(self, model: Model) -> Tensor:
        """Z, (d_head, d_head), float32."""
        weights = head_weights(
            model, self.part.layer or 0, self.part.stack or None, cross=self.part.kind == "xhead", fold=self.fold
        )
        index = self.part.index or 0
        out, v = weights.ov.right[index], weights.ov[index].svd().v  # (d_head, d_model), (d_model, component)
        back = torch.linalg.pinv(out)
        z = torch.eye(model.d_head, device=out.device)
        for number, factor in self.factors.items():
            if not 0 <= number < v.shape[1]:
                raise PartError(f"{self.part} has components 0 to {v.shape[1] - 1}, not {number}")
            z = z + (factor - 1.0) * torch.outer(out @ v[:, number], v[:, number] @ back)
        return z

    def intervention(self, model: Model, positions: Tensor | None = None) -> Intervention:
        """The edit in a forward pass, at chosen positions (row,) or (row, k), or all."""
        return Intervention(self.part, "map", self.matrix(model), positions)

    def apply(self, model: Model) -> Callable[[], None]:
        """Changes the weights of the opened model in place; returns what undoes it, bit for bit."""
        block = model.anatomy.attention_of(self.part)
        weight = block.o.weight
        if not isinstance(weight, Tensor) or weight.device.type == "meta" or not weight.is_floating_point():
            raise ModelError(
                f"the output projection of {self.part} is quantized or kept on disk; open the model whole, in float32 "
                "or bfloat16, to edit it"
            )
        rows = model.anatomy.head_out(block)[self.part.index or 0]  # a view of the parameter, (d_head, d_model)
        before, z = rows.clone(), self.matrix(model)
        with torch.no_grad():
            rows.copy_((z.to(rows.device) @ rows.float()).to(rows.dtype))

        def undo() -> None:
            with torch.no_grad():
                rows.copy_(before)

        return undo

    def record(self) -> dict[str, Any]:
        """As it is written beside an edited checkpoint."""
        return {"part": str(self.part), "factors": {str(k): v for k, v in self.factors.items()}, "fold": self.fold}


@contextmanager
def edited(model: Model, edits: Sequence[ComponentEdit]) -> Iterator[Model]:
    """The model with its weights edited, for the duration; they are restored bit for bit, also after an error."""
    undo: list[Callable[[], None]] = []
    with model.alone():
        try:
            for edit in edits:
                undo.append(edit.apply(model))
            yield model
        finally:
            for back in reversed(undo):
                back()


def save_edited(
    model: Model, edits: Sequence[ComponentEdit], folder: str | Path, measured: Mapping[str, Any] | None = None
) -> Path:
    """Writes the edited model as an ordinary checkpoint that opens without Vesalius, with `vesalius.json` beside it.

    Args:
        model: stays as it is. edits: what is changed. folder: new, or empty.
        measured: what was measured before and after, for the record.
    """
    story = {
        "edit": "components of heads scaled",
        "of": origin_of(model),
        "components": [edit.record() for edit in edits],
        "measured": dict(measured or {}),
    }
    with edited(model, edits):
        return save_model(model, folder, story)
