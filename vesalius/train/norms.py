"""Taking norms out of a model while it is trained, one after another, each replaced by division by a constant.

The constant of a norm is a running average of the sizes s(x) (see `model.constant_norms`) of what it is given, kept
while it is real and held from then on. The first position of a row and separators (end of text), whose sizes are far
from the others', have averages of their own for a while. Of a block's norm before attention, queries and keys get the
constant first; values read the real norm some steps longer, and then the same constant.

    order: norms before MLPs, first block to last; before queries and keys; before values; the last norm; separators;
    first positions

Heimersheim 2024 (arXiv 2409.13710), Baroni et al. 2025, "Transformers Don't Need LayerNorm at Inference Time" (arXiv
2507.02559). There, values have a constant of their own, and the penalty is in absolute units.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vesalius.errors import UnknownName, VesaliusError
from vesalius.model.anatomy import Anatomy, Block, read_anatomy
from vesalius.model.constant_norms import (
    EPS,
    FILE,
    ConstantNorm,
    Place,
    constants_of,
    eps_key,
    install,
    is_norm_free,
    lasting,
    places,
)
from vesalius.records import dump
from vesalius.train.objectives.base import Sample
from vesalius.train.plugs import Plug
from vesalius.train.recipe import NormSection

ORDINARY, FIRST, SEPARATOR = range(3)
SPREAD = "norm_spread"


class Move(NamedTuple):
    """What happens before a step: a norm goes (`what` names its readers), or a class of tokens loses its constants."""

    step: int
    what: str  # mlp, qk, v, unembed, separators, first
    name: str  # of the norm, "" for the last two
    address: str


def schedule(chosen: list[Place], section: NormSection) -> list[Move]:
    """All that happens, in order."""
    found: list[Move] = []
    at = section.start
    ways = (("mlp", "mlp", section.gap_mlp), ("qk", "attn", section.gap_qk), ("v", "attn", section.gap_v))
    for what, reads, gap in ways:
        for place in (p for p in chosen if p.reads == reads):
            found.append(Move(at, what, place.name, place.address))
            at += gap
    found += [Move(at, "unembed", p.name, p.address) for p in chosen if p.reads == "unembed"]
    at = found[-1].step
    found.append(Move(at + section.gap_separators, "separators", "", ""))
    return [*found, Move(at + section.gap_separators + section.gap_first, "first", "", "")]


class NormRemoval(Plug):
    """The plug that takes norms out.

    Args:
        model: changed in place: each chosen norm is replaced by a stand-in that is the norm until its step.
        section: which, and when.
        separator: the token that ends a text, None if none does.

    Raises:
        VesaliusError: if the model has no norms, or keeps some that would not survive in an ordinary checkpoint.
    """

    def __init__(self, model: PreTrainedModel, section: NormSection, separator: int | None) -> None:
        anatomy = read_anatomy(model)
        self.section, self.separator = section, separator
        self.chosen = chosen_places(model, anatomy, section)
        self.whole = len(self.chosen) == len(places(model, anatomy)) and not lasting(model, anatomy)
        self.key = eps_key(model, self.chosen[0].view.eps)
        if section.remove == "all" and self.key is None:
            raise VesaliusError(
                f"the configuration of {type(model).__name__} has no epsilon for its norms, so that an ordinary "
                "checkpoint cannot hold constants in their place; name the norms to take out (norms.remove: [L0.MLP])"
            )
        self.plan = schedule(self.chosen, section)
        self.shared: dict[str, Any] = {}
        self.norms = {n.name: n for n in install(model, self.chosen, self.shared)}
        self.running = {n: torch.full((3,), torch.nan, dtype=torch.float64) for n in self.norms}
        self.sums = {n: torch.zeros(2, 3, dtype=torch.float64) for n in self.norms}
        final = next((n for p, n in zip(self.chosen, self.norms.values(), strict=True) if p.reads == "unembed"), None)
        if section.penalty and final is None:
            raise VesaliusError("norms.penalty is on the sizes before the last norm; take out unembed as well")
        self.final, self.done = final, 0
        self._hooks = ExitStack()
        anatomy = read_anatomy(model)
        for block in anatomy.main.blocks:
            if isinstance(block.norm_in.module, ConstantNorm):
                self._split(block, anatomy)

    @property
    def last_step(self) -> int:
        """From the step after this one on every chosen norm is one number."""
        return self.plan[-1].step

    def _split(self, block: Block, anatomy: Anatomy) -> None:
        """Lets values read the real norm while it is split."""
        norm: Any = block.norm_in.module
        module = block.projections["v"]
        if module is not block.projections["q"]:

            def swap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                return (norm.values, *args[1:]) if norm.state == "split" else None

            self._hooks.callback(module.register_forward_pre_hook(swap).remove)
            return

        def mixed(fused: nn.Module, _: Any, out: Tensor) -> Tensor | None:
            if norm.state != "split":
                return None
            real = type(fused).forward(fused, norm.values)
            parts = [anatomy.split_qkv(x, s) for x, s in ((out, "q"), (out, "k"), (real, "v"))]  # type: ignore[arg-type]
            return anatomy.join_qkv(*parts)

        self._hooks.callback(module.register_forward_hook(mixed).remove)

    # -- by the step

    def begin(self, step: int) -> None:
        """Makes the moves of this step."""
        for sums in self.sums.values():
            sums.zero_()
        for norm in self.norms.values():
            norm.watch = norm.state == "real" or (norm is self.final and self.section.penalty > 0)
        for move in self.plan:
            if move.step == step:
                self._make(move)
        self.done = step

    def _make(self, move: Move) -> None:
        if move.what in ("separators", "first"):
            place = SEPARATOR if move.what == "separators" else FIRST
            for norm in self.norms.values():
                norm.sizes[place] = norm.sizes[ORDINARY]
            return
        norm = self.norms[move.name]
        if norm.state == "real":
            running = self.running[move.name]
            norm.sizes.copy_(torch.where(torch.isfinite(running), running, running[ORDINARY]))
        norm.state = "split" if move.what == "qk" else "constant"

    def read(self, micro: Sample) -> None:
        """Tells first positions and separators from the rest."""
        ids = micro.inputs["input_ids"]
        kinds = torch.zeros_like(ids) if self.separator is None else (ids == self.separator).long() * SEPARATOR
        kinds[:, 0] = FIRST
        self.shared["kinds"] = kinds

    def terms(self) -> Mapping[str, Tensor]:
        """Notes the sizes just seen; the spread of those before the last norm."""
        kinds = self.shared["kinds"].flatten()
        for name, norm in self.norms.items():
            if norm.seen is not None:
                seen = norm.seen.detach().flatten().double().cpu()
                for sums, what in zip(self.sums[name], (seen, torch.ones_like(seen)), strict=True):
                    sums.index_add_(0, kinds.cpu(), what)
        if not self.section.penalty or self.final is None or self.final.seen is None:  # a gradient outside of a step
            self._forget()
            return {}
        sizes = self.final.seen
        mean = sizes[self.shared["kinds"] == ORDINARY].mean()
        self._forget()
        return {SPREAD: self.section.penalty * (sizes / mean - 1).square().mean()}

    def _forget(self) -> None:
        for norm in self.norms.values():
            norm.seen = None

    def end(self, step: int) -> None:
        """Moves the running sizes of the norms that are real."""
        for name, norm in self.norms.items():
            norm.watch, norm.seen = False, None
            if norm.state == "real":
                total, count = self.sums[name]
                mean = total / count  # nan where there was none
                old = self.running[name]
                kept = self.section.momentum * old + (1 - self.section.momentum) * mean
                self.running[name] = torch.where(
                    torch.isfinite(mean), torch.where(torch.isfinite(old), kept, mean), old
                )
        self.done = step + 1

    # -- keeping

    @property
    def folds(self) -> bool:
        """Whether what is saved now is an ordinary norm-free checkpoint."""
        return self.whole and self.key is not None and all(n.constant is not None for n in self.norms.values())

    def tensors(self) -> dict[str, Tensor]:
        """Running sizes and constants; gains as they are trained, where the checkpoint holds others."""
        found: dict[str, Tensor] = {}
        for name, norm in self.norms.items():
            found[f"{name}.running"], found[f"{name}.sizes"] = self.running[name], norm.sizes.cpu()
            if self.folds:
                assert norm.weight is not None
                found[f"{name}.gain"] = norm.weight.detach().cpu().clone()
        return found

    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Takes up an earlier sitting; nothing is taken up from a run that took out no norms."""
        self.done = done
        if not tensors:
            if self.plan[0].step < done:
                raise VesaliusError(
                    f"norms.start is {self.section.start}, and the branch begins at step {done}; start later than that"
                )
            return
        for name, norm in self.norms.items():
            if f"{name}.running" not in tensors:
                raise VesaliusError(f"the run kept no size of {name}; its norms.remove is another, start it anew")
            self.running[name] = tensors[f"{name}.running"].double()
            norm.sizes.copy_(tensors[f"{name}.sizes"])
            if norm.weight is not None and f"{name}.gain" in tensors:
                norm.weight.data.copy_(tensors[f"{name}.gain"])
        for move in self.plan:
            if move.name and move.step < done:
                self.norms[move.name].state = "split" if move.what == "qk" else "constant"

    def weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """With each constant in the norm's gain, once all are there."""
        if not self.folds:
            return weights
        return weights | {f"{name}.weight": norm.folded().cpu() for name, norm in self.norms.items()}

    def written(self, folder: Path) -> None:
        """The huge eps into the configuration; or the constants beside, where some norms are real."""
        if self.folds:
            assert self.key is not None
            config = json.loads((folder / "config.json").read_bytes())
            inner = config
            for key in self.key[:-1]:
                inner = inner[key]
            inner[self.key[-1]] = EPS
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            return
        taken = {name: norm for name, norm in self.norms.items() if norm.state != "real"}
        if taken:
            between = any(n.constant is None for n in taken.values())
            constants = {name: float(n.sizes[ORDINARY]) for name, n in taken.items()}
            told = {"constants": constants, "between": between, "of": len(self.norms), "until": self.last_step + 1}
            (folder / FILE).write_bytes(dump(told))

    def table(self) -> pd.DataFrame:
        """Each norm: address, name, step it went at (queries and keys first), its constant and those of the others."""
        rows = []
        for place in self.chosen:
            norm, steps = self.norms[place.name], [m.step for m in self.plan if m.name == place.name]
            running = self.running[place.name]
            rows.append(
                {
                    "norm": place.address,
                    "name": place.name,
                    "step": steps[0],
                    "step_values": steps[-1] if place.reads == "attn" else pd.NA,
                    "state": norm.state,
                    "size": float(running[ORDINARY]),
                    "size_first": float(running[FIRST]),
                    "size_separator": float(running[SEPARATOR]),
                }
            )
        return pd.DataFrame(rows).astype({"step_values": "Int64"})


def chosen_places(model: PreTrainedModel, anatomy: Anatomy, section: NormSection) -> list[Place]:
    """The norms a recipe takes out, in forward order.

    Raises:
        VesaliusError: for a model that norms the stream itself, one without norms, or one that must keep some.
    """
    kind = type(model).__name__
    if anatomy.post_norm or "dec" in anatomy.stacks:
        raise VesaliusError(
            f"norms of {kind} stand on the stream itself, or in two stacks; only those of pre-norm decoders can go"
        )
    if constants_of(model):
        raise VesaliusError(f"some norms of this {kind} are constants already; go on with its run (--resume, --branch)")
    known = places(model, anatomy)
    if not known or is_norm_free(anatomy):
        raise VesaliusError(f"this {kind} has no norms to take out: they are constants, or not there")
    if section.remove == "all":
        if kept := lasting(model, anatomy):
            shown = ", ".join(kept[:3])
            raise VesaliusError(
                f"{kind} would keep {len(kept)} norms ({shown}, ...), which share one epsilon with the others, so that "
                "no ordinary checkpoint holds it norm-free; name the norms to take out (norms.remove: [L0.MLP, ...])"
            )
        return known
    by_address = {p.address: p for p in known}
    for address in section.remove:
        if address not in by_address:
            raise UnknownName("norm of this model", address, by_address)
    if not section.remove:
        raise VesaliusError("norms.remove is empty; name norms such as L3.MLP, L3.attn, unembed, or all")
    return [p for p in known if p.address in section.remove]
