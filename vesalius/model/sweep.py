"""Many interventions as few passes: the metric of every example under every variant, exactly.

Variants that first touch the same block are run as one batch from the recorded residual stream at that block, over the
positions that can differ, and only the wanted logits are computed (see `replay`). The numbers are those of one full
forward pass a variant; the work is several times less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.model.crew import Crew
from vesalius.model.hooks import Site, Tap
from vesalius.model.intervene import Intervention, first_layer, taps
from vesalius.model.memory import memory_errors
from vesalius.model.model import Capture, Model
from vesalius.model.pairs import Pairs
from vesalius.model.replay import Tape

Side = Literal["clean", "corrupted"]
Progress = Callable[[int, int], None]
BATCH = 16  # examples recorded at once


class Store(Protocol):
    """Where finished pieces of a sweep are kept, so that a killed one goes on (`runs.Checkpoint` is one)."""

    def get(self, key: str) -> NDArray[np.float64] | None: ...

    def put(self, key: str, values: NDArray[np.float64]) -> None: ...


@dataclass(frozen=True)
class Prefixed:
    """A store whose keys are kept apart from those of other work in it."""

    store: Store
    prefix: str

    def get(self, key: str) -> NDArray[np.float64] | None:
        return self.store.get(self.prefix + key)

    def put(self, key: str, values: NDArray[np.float64]) -> None:
        self.store.put(self.prefix + key, values)


@dataclass(frozen=True)
class Recording:
    """One batch of pairs with both runs recorded.

    Attributes:
        pairs: the batch. tape: the base run. base: its sites. source: the other run's sites.
        first_row: the batch's place among all rows.
    """

    pairs: Pairs
    tape: Tape
    base: Mapping[Site, Tensor]
    source: Mapping[Site, Tensor]
    first_row: int = 0


@dataclass(frozen=True)
class Sweep:
    """Metric values under interventions.

    Attributes:
        values: (variant, example). base: the metric without intervention (example,).
    """

    values: NDArray[np.float64]
    base: NDArray[np.float64]


def record(
    model: Model,
    pairs: Pairs,
    base: Side,
    capture: Sequence[Site],
    *,
    paired: bool = True,
    capture_base: Sequence[Site] = (),
) -> Recording:
    """Runs both prompts of a batch once. With `paired`, only positions from the first difference will be recomputed."""
    mine, other = (pairs.clean, pairs.corrupted) if base == "clean" else (pairs.corrupted, pairs.clean)
    start = pairs.first_difference if paired else 0
    tape = Tape(model, mine, pairs.mask, pairs.reads, start=start, capture=list(capture_base), decoder=pairs.decoder)
    source: Mapping[Site, Tensor] = {}
    if capture:
        source = activations(model, other, pairs, capture, tape)
    return Recording(pairs, tape, tape.sites, source)


def activations(model: Model, ids: Tensor, pairs: Pairs, capture: Sequence[Site], tape: Tape) -> Mapping[Site, Tensor]:
    """Sites of another run over the same rows, recomputing only positions from `tape.start` on where that is exact.

    Sites come back as long as the suffix alone, (row, pos - start, ...).
    """
    if tape.start == 0 or not tape.replayable:
        return trunk(model, ids, pairs, capture).sites
    if tape.reads_ids:  # the recorded arguments hold the other prompt's
        whole = trunk(model, ids, pairs, capture).sites
        return {
            s: x[:, :, tape.start :] if s.name.endswith("pattern") else x[:, tape.start :] for s, x in whole.items()
        }
    recorded: dict[Site, Tensor] = {}
    reading = {s: [lambda x, s=s: recorded.__setitem__(s, x)] for s in capture}
    with torch.no_grad():
        tape.replay(0, 1, reading, hidden=embedded(model, ids, pairs)[:, tape.start :])
    return recorded


class _Stop(Exception):
    """Ends a forward pass early."""


def embedded(model: Model, ids: Tensor, pairs: Pairs) -> Tensor:
    """The residual stream entering the first block, (row, pos, d), without running any block."""
    found: list[Tensor] = []

    def stop(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    stack = model.anatomy.stacks.get("enc", model.anatomy.main)
    handle = stack.blocks[0].module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), memory_errors():
            model.hf.base_model(**model.inputs(ids, pairs.mask, pairs.decoder))
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def trunk(model: Model, ids: Tensor, pairs: Pairs, capture: Sequence[Site]) -> Capture:
    """A forward pass without the unembedding, recording sites."""
    from vesalius.model.hooks import Hooks

    recorded: dict[Site, Tensor] = {}
    reading = {s: [lambda x, s=s: recorded.__setitem__(s, x)] for s in capture}
    body = model.hf.base_model if model.kind != "encoder-decoder" else model.hf
    with torch.no_grad(), memory_errors(), Hooks(model.hf, model.anatomy, reading):
        body(**model.inputs(ids, pairs.mask, pairs.decoder))
    return Capture(None, recorded)


def metric_values(model: Model, pairs: Pairs, hidden: Tensor, copies: int = 1) -> Tensor:
    """The metric of each variant and example, (copies, example), from final residuals (copies * row, read, d)."""
    tokens = pairs.metric.tokens(pairs)
    with memory_errors():
        logits = model.readout(hidden, tokens).float().cpu().unflatten(0, (copies, -1))
    return torch.stack([pairs.value(one) for one in logits])


def sweep(
    model: Model,
    pairs: Pairs,
    variants: Callable[[Recording], Sequence[Sequence[Intervention]]],
    *,
    base: Side,
    capture: Sequence[Site] = (),
    capture_base: Sequence[Site] = (),
    paired: bool = True,
    common: Callable[[Recording], Mapping[Site, Sequence[Tap]]] | None = None,
    memory_gb: float = DEFAULT_MEMORY_GB,
    batch: int = BATCH,
    progress: Progress | None = None,
    store: Store | None = None,
    key: str = "sweep",
) -> Sweep:
    """The metric of every example under every variant.

    Args:
        model: the model. pairs: clean and corrupted prompts.
        variants: given a recorded batch, the interventions of each variant; the same number for every batch. Values
            come from `recording.source`, whose tensors start at position `recording.tape.start`.
        base: which prompt the interventions change.
        capture, capture_base: sites to record on the other prompt and on the base prompt.
        paired: the values put in equal the base's own before the first differing token (true for counterfactual
            patching between a pair), so that earlier positions need no recomputation.
        common: taps applied to every variant (such as freezing all other heads).
        memory_gb: working memory for a batch of variants, GiB.
        batch: examples recorded at once.
        progress: called with (done, total) variants x examples.
        store: finished pieces are put there and not computed again.

    Returns:
        Values in the metric's unit, (variant, example), and the base's own.
    """
    pieces, bases, done, first_row = [], [], 0, 0
    groups = pairs.batches(batch)
    with Crew(model) as crew:
        for number, part in enumerate(groups):
            name = f"{key}:{base}:{number}"
            kept = store.get(name) if store else None
            if kept is None:
                recording = record(model, part, base, capture, paired=paired, capture_base=capture_base)
                recording = replace(recording, first_row=first_row)
                wanted = variants(recording)
                extra = common(recording) if common else {}
                values = _run(
                    model,
                    recording,
                    wanted,
                    extra,
                    memory_gb,
                    crew,
                    store,
                    name,
                    _shift(progress, done, len(groups), len(wanted)),
                )
                with torch.no_grad():
                    own = metric_values(model, part, recording.tape.final)[0].numpy().astype(float)
                kept = np.concatenate([values, own[None]])
                if store:
                    store.put(name, kept)
            done += len(kept) - 1
            first_row += part.n_rows
            if progress:
                progress(done, len(groups) * (len(kept) - 1))
            pieces.append(kept[:-1])
            bases.append(kept[-1])
    return Sweep(np.concatenate(pieces, axis=1), np.concatenate(bases))


def _shift(progress: Progress | None, done: int, groups: int, each: int) -> Callable[[int], None]:
    return lambda n: progress(done + n, groups * each) if progress else None


def _run(
    model: Model,
    recording: Recording,
    wanted: Sequence[Sequence[Intervention]],
    extra: Mapping[Site, Sequence[Tap]],
    memory_gb: float,
    crew: Crew,
    store: Store | None,
    name: str,
    progress: Callable[[int], None],
) -> NDArray[np.float64]:
    tape, pairs = recording.tape, recording.pairs
    at_once = tape.copies_within(memory_gb / crew.workers)
    by_layer: dict[int, list[int]] = {}
    for i, interventions in enumerate(wanted):
        by_layer.setdefault(_start_layer(model, interventions), []).append(i)
    jobs = [
        (layer, indices[lo : lo + at_once])
        for layer, indices in sorted(by_layer.items())
        for lo in range(0, len(indices), at_once)
    ]
    out = np.empty((len(wanted), pairs.n_examples))
    done = 0

    def label(chunk: Sequence[int]) -> str:
        return f"{name}:{chunk[0]}-{chunk[-1]}:{len(chunk)}"

    def replay(mine: Tape, job: tuple[int, list[int]]) -> NDArray[np.float64]:
        layer, chunk = job
        both: dict[Site, list[Tap]] = {s: list(f) for s, f in extra.items()}
        for site, functions in taps([wanted[i] for i in chunk], mine.rows, mine.start).items():
            both.setdefault(site, []).extend(functions)
        with torch.no_grad():
            hidden = mine.replay(layer, len(chunk), both)
            return metric_values(mine.model, pairs, hidden, len(chunk)).numpy().astype(float)

    def kept() -> Iterator[tuple[tuple[int, list[int]], NDArray[np.float64]]]:
        todo = []
        for job in jobs:
            values = store.get(label(job[1])) if store else None
            if values is None:
                todo.append(job)
            else:
                yield job, values
        for job, values in crew.run(tape, todo, replay):
            if store:
                store.put(label(job[1]), values)
            yield job, values

    for (_, chunk), values in kept():
        out[chunk] = values
        done += len(chunk)
        progress(done)
    return out


def _start_layer(model: Model, interventions: Sequence[Intervention]) -> int:
    """Encoder-side changes need the whole model again; `Tape` does that wherever a replay starts."""
    return first_layer(interventions) if interventions else model.n_layers - 1


def read_logits(model: Model, pairs: Pairs, side: Side) -> tuple[Tensor, Tensor]:
    """Logits at the reads, (row, read, vocabulary), and the metric, (example,), of one side of a batch."""
    ids = pairs.clean if side == "clean" else pairs.corrupted
    tape = Tape(model, ids, pairs.mask, pairs.reads, decoder=pairs.decoder)
    with torch.no_grad():
        return model.readout(tape.final).float().cpu(), metric_values(model, pairs, tape.final)[0]
