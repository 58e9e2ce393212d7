"""A change of weights, recorded: what was there, what is there now, and why; undone and made again to the last bit.

    with recording(model, "repair") as edit:
        edit.set("model.layers.3.mlp.down_proj.weight", better, "L3.MLP: the fault sits here")
    edit.undo(model); edit.apply(model); edit.save("edit/")

Of a tensor that changed in few places only these are kept. A tensor that stands in a model under two names (a tied
embedding) is changed once: a second change under the other name is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from vesalius import checkpoints
from vesalius.errors import ModelError, RunError, UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.model.model import weights_fingerprint
from vesalius.model.saving import origin_of, refuse_rounded, refuse_scattered
from vesalius.records import dump, read_json, sha256

TENSORS, NOTE = "edit.safetensors", "edit.json"
FORMAT = 1
SPARSE = 0.25  # of a tensor's numbers: above, all of it is kept


@dataclass(frozen=True)
class Change:
    """One tensor's change.

    Attributes:
        name: of the parameter. reason: why it was changed. shape: of the tensor.
        index: (n,) flat places that changed, or None where the whole tensor is kept.
        before, after: (n,) values there, or tensors of that shape.
    """

    name: str
    reason: str
    shape: tuple[int, ...]
    index: Tensor | None
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, name: str, reason: str, before: Tensor, after: Tensor) -> Change | None:
        """The difference of two tensors; None if there is none. Bits are compared: -0 is not 0, NaN is itself."""
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
        moved = before.contiguous().view(whole) != after.contiguous().view(whole)
        places = moved.flatten().nonzero()[:, 0]
        if not len(places):
            return None
        if len(places) > SPARSE * before.numel():
            return cls(name, reason, tuple(before.shape), None, before.clone(), after.clone())
        kept = [t.flatten()[places].clone() for t in (before, after)]
        return cls(name, reason, tuple(before.shape), places, *kept)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Writes `before` or `after` where it belongs."""
        if self.index is None:
            tensor.copy_(values)
        else:
            flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
            flat[self.index.to(flat.device)] = values.to(flat)
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))

    @property
    def delta(self) -> Tensor:
        """After minus before, float32, in the places that are kept."""
        return self.after.float() - self.before.float()


@dataclass
class Edit:
    """A recorded change of some of a model's weights.

    Attributes:
        kind: what was done. of: the model it was made on (name, spec, fingerprint). changes: one a tensor.
        start, result: fingerprints of the weights before and after, from `weights_fingerprint`.
    """

    kind: str
    of: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    start: str = ""
    result: str = ""

    def __len__(self) -> int:
        return len(self.changes)

    def to_frame(self) -> pd.DataFrame:
        """One row a tensor: tensor, numbers, changed, share, largest and norm (of the change), reason."""
        rows = []
        for c in self.changes:
            numbers = int(torch.tensor(c.shape).prod())
            changed = numbers if c.index is None else len(c.index)
            sizes = {"largest": float(c.delta.abs().max()), "norm": float(c.delta.double().norm())}
            row = {"tensor": c.name, "numbers": numbers, "changed": changed, "share": changed / numbers}
            rows.append(row | sizes | {"reason": c.reason})
        columns = ["tensor", "numbers", "changed", "share", "largest", "norm", "reason"]
        return pd.DataFrame(rows, columns=columns)

    def apply(self, model: Model) -> None:
        """Makes the change on the model it was recorded on, in place.

        Raises:
            ModelError: if the weights are other ones.
        """
        self._put(model, "after", self.start)

    def undo(self, model: Model) -> None:
        """Takes the change back, to the last bit.

        Raises:
            ModelError: if the weights are not those the change led to, or are not what they were after all.
        """
        self._put(model, "before", self.result)
        if weights_fingerprint(model.hf, config=False) != self.start:
            raise ModelError(
                f"taking this edit ({self.kind}) back does not lead to the weights it was made on: it is not whole; "
                f"open {self.of.get('spec') or self.of.get('name')}"
            )

    @torch.no_grad()
    def _put(self, model: Model, side: str, expected: str) -> None:
        if weights_fingerprint(model.hf, config=False) != expected:
            then = "was recorded on" if side == "after" else "led to"
            raise ModelError(
                f"the weights of {model.name} are not those that this edit ({self.kind}) {then}: fingerprints differ; "
                f"open {self.of.get('spec') or self.of.get('name')}"
            )
        tensors = dict(model.hf.named_parameters(remove_duplicate=False))
        with model.alone():
            for change in self.changes:
                change.put(tensors[change.name].data, getattr(change, side))

    # -- keeping

    def save(self, folder: str | Path) -> Path:
        """Writes the edit into a folder: before and after of what changed, and why."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for change in self.changes:
            tensors |= {f"{change.name}/before": change.before, f"{change.name}/after": change.after}
            if change.index is not None:
                tensors[f"{change.name}/index"] = change.index
        checkpoints.save_tensors(place / TENSORS, tensors)
        listed = [{"name": c.name, "reason": c.reason, "shape": list(c.shape)} for c in self.changes]
        story = {"format": FORMAT, "kind": self.kind, "of": self.of, "changes": listed}
        story |= {"start": self.start, "result": self.result}
        (place / NOTE).write_bytes(dump(story | {"sha256": sha256(place / TENSORS)}))
        return place

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """What `save` wrote.

        Raises:
            RunError: if a file is missing or was changed.
        """
        place = Path(folder)
        remedy = "make the change again"
        note = read_json(place / NOTE, remedy)
        if note.get("format") != FORMAT or not (place / TENSORS).exists():
            raise RunError(f"{place} holds no whole edit; {remedy}")
        if sha256(place / TENSORS) != note.get("sha256"):
            raise RunError(f"{place / TENSORS} was changed after it was saved (its sha256 differs); {remedy}")
        found = checkpoints.load_tensors(place / TENSORS)
        try:
            changes = []
            for row in note["changes"]:
                name = row["name"]
                sides = (found.get(f"{name}/index"), found[f"{name}/before"], found[f"{name}/after"])
                changes.append(Change(name, row["reason"], tuple(row["shape"]), *sides))
            return cls(str(note["kind"]), dict(note["of"]), changes, str(note["start"]), str(note["result"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{place / NOTE} was changed by hand or is damaged; {remedy}") from error


class Recorder:
    """What is handed out by `recording`: every tensor that is to change is named first.

    Attributes:
        edit: filled when the block ends.
    """

    def __init__(self, model: Model, kind: str) -> None:
        self.edit = Edit(kind, origin_of(model), start=weights_fingerprint(model.hf, config=False))
        self._tensors = dict(model.hf.named_parameters(remove_duplicate=False))
        self._model = model
        self._before: dict[str, tuple[str, Tensor]] = {}
        self._by_place: dict[int, str] = {}

    def touch(self, names: str | Sequence[str], reason: str) -> None:
        """Tells that these tensors will change.

        Raises:
            UnknownName: for a name that is no parameter. VesaliusError: for the other name of a tied tensor.
        """
        for name in [names] if isinstance(names, str) else names:
            if name not in self._tensors:
                raise UnknownName("parameter", name, self._tensors)
            tensor = self._tensors[name]
            first = self._by_place.setdefault(tensor.data_ptr(), name)
            if first != name:
                raise VesaliusError(
                    f"{name} and {first} are one tied tensor, which this edit has changed already; change it once, "
                    "or untie the model first"
                )
            if name not in self._before:
                self._before[name] = (reason, tensor.detach().clone())

    def set(self, name: str, value: Tensor, reason: str) -> None:
        """Gives a parameter a new value, in its dtype.

        Raises:
            VesaliusError: for a value of another shape, or one that is not finite.
        """
        self.touch(name, reason)
        tensor = self._tensors[name]
        if value.shape != tensor.shape:
            raise VesaliusError(f"{name} is {tuple(tensor.shape)}, the new value {tuple(value.shape)}; give that shape")
        cast = value.detach().to(tensor)
        if not bool(torch.isfinite(cast).all()):
            raise VesaliusError(f"the new value of {name} is not finite in {tensor.dtype}; nothing was changed there")
        with torch.no_grad():
            tensor.copy_(cast)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for name, (_, before) in self._before.items():
            self._tensors[name].copy_(before)

    def finish(self) -> Edit:
        """Compares."""
        for name, (reason, before) in self._before.items():
            change = Change.of(name, reason, before, self._tensors[name].detach())
            if change is not None:
                self.edit.changes.append(change)
        self.edit.result = weights_fingerprint(self._model.hf, config=False)
        return self.edit


@contextmanager
def recording(model: Model, kind: str) -> Iterator[Recorder]:
    """Records what the block changes of a model's weights; after an error they are what they were.

    Args:
        model: changed in place. kind: what is done, such as `repair`.

    Example:
        >>> with recording(model, "scale") as recorder:                      # doctest: +SKIP
        ...     recorder.set("lm_head.weight", 2 * model.hf.lm_head.weight, "colder")
        >>> recorder.edit.undo(model)                                         # doctest: +SKIP
    """
    refuse_scattered(model.hf, model.name)
    refuse_rounded(model.hf, model.name)
    with model.alone():
        recorder = Recorder(model, kind)
        try:
            yield recorder
        except BaseException:
            recorder.restore()
            raise
        recorder.finish()
