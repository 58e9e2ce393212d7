"""Path patching: what a part does to chosen receivers, directly or through MLPs, all other heads held still.

For every sender s and a set of receivers R (Wang et al. 2022, app. B; MLPs are recomputed, as there):

    1. run the base prompt with s as on the other prompt and every other head frozen as it is; note what R reads
    2. run the base prompt with R reading that, everything else computed as usual
    noise:   score = metric(base) - metric(run 2), base = clean
    denoise: score = metric(run 2) - metric(base), base = corrupted

Positive where the sender helps through these paths. If R is unembed, run 2 is only a readout, and since heads alone
move information between positions, run 1 has to compute nothing before the first position that is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesalius.errors import PartError, VesaliusError
from vesalius.find.base import Context, Direction, base_side, resolve_positions, table
from vesalius.model import Intervention, Model, Pairs, Site
from vesalius.model.hooks import Tap
from vesalius.model.intervene import locate, sites_of, taps
from vesalius.model.memory import memory_errors
from vesalius.model.sweep import BATCH, Recording, sweep, trunk
from vesalius.parts import Part, parse_part
from vesalius.scores import Scores

SENDERS = ("head", "xhead", "mlp")
_RANK = {"head": 0, "xhead": 1, "mlp": 2}  # order of computation within a block


def path_patching(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    receivers: str | Sequence[str] = "unembed",
    position: str | None = None,
    freeze_mlps: bool = False,
    direction: Direction = "noise",
    senders: str = "head",
) -> Scores:
    """Exact effect of each sender on chosen receivers.

    Args:
        receivers: `unembed`, or parts such as `L9.H6.q,L9.H9.q`; a head without a side means its q, k and v. Keys and
            values are those of one query head, also where heads share them. An MLP's address means its input.
        position: change the sender only at this named position (several: `a,b`; `each`: every token apart).
        freeze_mlps: hold MLPs still in run 1 as well, so that only direct paths count.
        direction: `noise` (as published) or `denoise`.
        senders: kinds of sender: head, mlp, xhead.

    Returns:
        A row for every sender. Those that are not computed before any receiver score 0 and are not run; `info` says how
        many were run.

    Example:
        >>> vesalius.find("path-patching", model, task, receivers="L9.H6.q,L9.H9.q")   # doctest: +SKIP
    """
    base = base_side(direction)
    plan = _Plan(model, _receivers(model, receivers), freeze_mlps, context.memory_gb)
    candidates = _senders(model, senders)
    places = resolve_positions(pairs, position)
    each: Sequence[Place | None] = places or [None]
    variants = [(part, place) for part in candidates for place in each]
    run = [i for i, (part, _) in enumerate(variants) if plan.reached_from(part)]
    if not plan.receivers:
        pairs = AtReads(**vars(pairs))
    groups = math.ceil(pairs.n_examples / BATCH)
    values = np.zeros((len(variants), pairs.n_examples))
    slices = _slices(len(run), plan.senders_at_once(pairs))
    for lo, hi in slices:
        chosen = [variants[i] for i in run[lo:hi]]
        result = sweep(
            model,
            pairs,
            lambda recording, chosen=chosen: plan.variants(recording, base == "clean", chosen),  # type: ignore[misc]
            base=base,
            capture=sites_of(candidates) if plan.receivers else (),
            capture_base=plan.held,
            common=None if plan.receivers else plan.frozen,
            memory_gb=plan.memory_gb,
            progress=_shifted(context, lo * groups, len(run) * groups),
            store=context.store,
            key=f"path:{lo}-{hi}",
        )
        change = result.values - result.base
        values[run[lo:hi]] = change if direction == "denoise" else -change
    named = [part for part, _ in variants]
    labels = None if places is None else [place[0] for _, place in variants if place is not None]
    return table(
        named,
        values,
        labels,
        direction=direction,
        receivers=[str(p) for p in plan.receivers] or ["unembed"],
        freeze_mlps=freeze_mlps,
        senders_run=len(run),
        senders_not_before_a_receiver=len(variants) - len(run),
    )


class AtReads(Pairs):
    """Pairs whose runs matter only from the first read on: with every head frozen nothing crosses positions."""

    @property
    def first_difference(self) -> int:
        return int(self.reads.min())


Place = tuple[str, Tensor]


@dataclass(frozen=True)
class _Plan:
    """What one path patching freezes and reads.

    Attributes:
        receivers: heads' sides and MLPs; empty for unembed.
        memory_gb: for a batch of variants; as much again holds what receivers read.
    """

    model: Model
    receivers: Sequence[Part]
    freeze_mlps: bool
    budget_gb: float

    @property
    def memory_gb(self) -> float:
        return self.budget_gb / 2 if self.receivers else self.budget_gb

    @property
    def held(self) -> list[Site]:
        """What is held as it is on the base run: every head's output and, if asked, every MLP's."""
        return sites_of(self.model.parts(SENDERS if self.freeze_mlps else ("head", "xhead")))

    def reached_from(self, sender: Part) -> bool:
        """Whether the sender is computed before some receiver reads."""
        parallel = self.model.anatomy.parallel

        def moment(part: Part) -> tuple[int, int, int]:
            within = 0 if parallel else _RANK[part.kind]
            return 0 if part.stack == "enc" else 1, part.layer or 0, within

        return not self.receivers or any(moment(sender) < moment(r) for r in self.receivers)

    def senders_at_once(self, pairs: Pairs) -> int:
        """How many senders' receiver inputs fit into the memory budget."""
        a = self.model.anatomy
        width = sum(a.d_model if p.kind == "mlp" else a.d_head for p in self.receivers)
        rows = max(
            int(torch.bincount(pairs.row_example)[i : i + BATCH].sum()) for i in range(0, pairs.n_examples, BATCH)
        )
        length = pairs.length if pairs.decoder is None else max(pairs.length, pairs.decoder.shape[1])
        held = rows * length * width * self.model.dtype.itemsize
        return max(1, int(self.memory_gb * 2**30 / held)) if held else 10**9

    def frozen(self, recording: Recording) -> dict[Site, list[Tap]]:
        """Taps that hold what is held, in any number of copies."""

        def hold(value: Tensor) -> Tap:
            def tap(x: Tensor) -> Tensor:
                cut = value[:, value.shape[1] - x.shape[1] :]  # recorded at all positions, needed at the last ones
                return cut.repeat(x.shape[0] // cut.shape[0], *[1] * (x.dim() - 1))

            return tap

        return {site: [hold(recording.base[site])] for site in self.held}

    def variants(
        self, recording: Recording, clean: bool, chosen: Sequence[tuple[Part, Place | None]]
    ) -> list[list[Intervention]]:
        """What the measured run of each sender changes: the sender itself for unembed, else what receivers read."""
        group = recording.pairs
        source = recording.source
        if not self.receivers:
            other = group.corrupted if clean else group.clean
            source = trunk(self.model, other, group, sites_of([part for part, _ in chosen])).sites
        changed = []
        for part, place in chosen:
            where = locate(part)
            positions = None
            if place is not None:
                name = place[0]
                here = group.positions.get(name)
                positions = torch.full((group.n_rows,), int(name)) if here is None else here
            changed.append([Intervention(part, value=where.read(source[where.site]), positions=positions)])
        return self._read(recording, changed) if self.receivers else changed

    def _read(self, recording: Recording, changed: Sequence[list[Intervention]]) -> list[list[Intervention]]:
        """Run 1: what the receivers read under each sender's change, as interventions for run 2."""
        tape, frozen = recording.tape, self.frozen(recording)
        at_once = tape.copies_within(self.memory_gb)
        last = max(self.receivers, key=lambda p: p.order)
        end = Site("resid_post", last.layer or 0, last.stack)
        by_layer: dict[int, list[int]] = {}
        for i, items in enumerate(changed):
            by_layer.setdefault(items[0].where.site.layer, []).append(i)
        out: list[list[Intervention]] = [[] for _ in changed]
        for layer, indices in by_layer.items():
            for lo, hi in _slices(len(indices), at_once):
                chunk = indices[lo:hi]
                read: dict[Site, Tensor] = {}
                # An MLP is read by what it makes of its input, before it is frozen itself.
                both: dict[Site, list[Tap]] = {s: [_note(read, s)] for s in sites_of(self.receivers)}
                for site, functions in [
                    *frozen.items(),
                    *taps([changed[i] for i in chunk], tape.rows, tape.start).items(),
                ]:
                    both.setdefault(site, []).extend(functions)
                both.setdefault(end, []).append(_stop)
                with torch.no_grad(), memory_errors(), suppress(_Stop):
                    tape.replay(layer, len(chunk), both)
                for part in self.receivers:
                    where = locate(part)
                    if where.site not in read:  # the receiver is in an earlier block than these senders
                        continue
                    for i, value in zip(chunk, where.read(read[where.site]).split(tape.rows), strict=True):
                        out[i].append(Intervention(part, value=value.clone()))
        return out


class _Stop(Exception):
    """Ends run 1 once the last receiver has read."""


def _stop(_: Tensor) -> None:
    raise _Stop


def _note(read: dict[Site, Tensor], site: Site) -> Tap:
    def tap(x: Tensor) -> None:
        read[site] = x

    return tap


def _receivers(model: Model, wanted: str | Sequence[str]) -> list[Part]:
    """Receivers as sides of heads and MLPs; empty for unembed."""
    names = wanted.split(",") if isinstance(wanted, str) else [str(name) for name in wanted]
    parts: list[Part] = []
    for name in names:
        part = parse_part(name)
        if part.kind == "unembed":
            part = Part("unembed", stack=model.anatomy.main.prefix)
        part = model.anatomy.require(part)
        if part.kind in ("head", "xhead") and part.side is None:
            parts += [Part(part.kind, part.layer, part.index, side, part.stack) for side in "qkv"]
        elif part.kind in ("head", "xhead", "mlp", "unembed"):
            parts.append(part)
        else:
            raise PartError(f"{part} is no receiver; receivers are unembed, MLPs and inputs of heads such as L9.H6.q")
    parts = list(dict.fromkeys(parts))
    if not parts:
        raise PartError("no receivers are named; name unembed, MLPs or inputs of heads such as L9.H6.q")
    ends = [p for p in parts if p.kind == "unembed"]
    if ends and len(parts) > 1:
        raise VesaliusError("unembed reads what all other receivers lead to; run it and the others apart")
    return [] if ends else parts


def _senders(model: Model, kinds: str) -> list[Part]:
    names = kinds.split(",")
    for name in names:
        if name not in SENDERS:
            raise VesaliusError(f"'{name}' is no kind of sender; senders are {', '.join(SENDERS)}")
    found = model.parts(names)
    if not found:
        raise VesaliusError(f"'{kinds}' names no part of {model.name}")
    return found


def _slices(n: int, size: int) -> list[tuple[int, int]]:
    return [(lo, min(lo + size, n)) for lo in range(0, n, size)]


def _shifted(context: Context, done: int, total: int) -> Callable[[int, int], None] | None:
    progress = context.progress
    return None if progress is None else lambda n, _: progress(done + n, total)
