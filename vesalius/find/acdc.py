"""ACDC: automatic circuit discovery, Conmy et al. 2023 (arXiv 2304.14997), algorithm 1.

The whole graph is run on the base prompts; a cut edge carries what its sender wrote on the other prompts. From the
logits back to the embedding, and for each receiver from late to early senders, every edge is cut in turn:

    cut it for good if  worse(graph without the edge) - worse(graph) <= threshold,  else restore it
    worse = -metric (objective "metric"),  or  KL(output of the full model || output of the graph)  ("kl")

A node whose outgoing edges are all cut is dead: its incoming edges are cut without a test. The order of tests within a
block, which the paper leaves open: the MLP, then values, keys and queries of the heads, the last head first.

Tests are speculative: the next edges are cut one upon another in one batch, each set assuming that the sets before it
were accepted, and those after the first rejection are thrown away. The decisions are those of one test at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import OutOfMemory, UnknownName, VesaliusError
from vesalius.find.base import METHODS, Context, Direction, base_side, parameters
from vesalius.model import Model, Pairs
from vesalius.model.edges import EdgeRun, write_sites, writes
from vesalius.model.graph import Universe, universe_of
from vesalius.model.intervene import Ablation
from vesalius.model.memory import memory_errors
from vesalius.model.reference import Reference
from vesalius.model.sweep import BATCH, Side, activations, record
from vesalius.scores import Scores

Objective = Literal["metric", "kl"]
LARGEST = 20_000  # edges tested without a budget
FIRST_BATCH, LAST_BATCH = 4, 64  # edges cut one upon another in one batch: at first, and at most


def acdc(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    threshold: float = 0.05,
    objective: Objective = "metric",
    ablation: Ablation = "counterfactual",
    direction: Direction = "noise",
    budget: int | None = None,
    screen: str = "relp",
) -> Scores:
    """The edges that cannot be cut one after another without the output getting worse.

    Args:
        threshold: how much worse one cut may make the objective, in the metric's unit or in nats; larger values give
            smaller circuits.
        objective: `metric`: its mean may not fall (edges that work against it are cut); `kl`: the output distribution
            at the reads may not move from the full model's.
        ablation: what cut edges carry: the paired prompt's write (`counterfactual`), another such prompt's
            (`resample`), the `mean` over them, or `zero`.
        direction: `noise`: base is clean, other corrupted. `denoise`: the reverse, and the metric may not rise.
        budget: test at most so many edges, those with the largest screen scores that are no dead ends; all others are
            cut at the start, together (`info` has the metric before and after that: if it fell far, raise the budget).
        screen: the attribution method that chooses them.

    Returns:
        Scores of all edges. A kept edge has what cutting it made worse when it was tested, always above the threshold;
        a cut edge has 0. So `grow(scores, threshold=1e-12)` is the circuit (without edges that nothing from the
        embedding reaches: those carry the same cut or kept). `verified` marks edges that were tested one by one; the
        others were screened out, or their receiver was dead. `info` counts all of them, and `passes` says what it cost,
        in forward passes over the prompts.

    Raises:
        VesaliusError: if the model has more than 20,000 edges and there is no budget.
    """
    base = base_side(direction)
    _check(threshold, objective, ablation, budget)
    graph = universe_of(model)
    if budget is None and graph.n_edges > LARGEST:
        raise VesaliusError(
            f"{model.name} has {graph.n_edges:,} edges, each tested by a pass over all {pairs.n_examples} prompts: "
            f"up to {graph.n_edges:,} passes; use --budget (such as 2000) to test only those that a screen picks"
        )
    candidates = _screened(model, pairs, context, graph, budget, screen, direction)
    runs = _Runs(model, pairs, base, objective, ablation, context)
    search = _Search(graph, runs, threshold, context)
    return search(candidates, budget)


def _check(threshold: float, objective: str, ablation: str, budget: int | None) -> None:
    if objective not in get_args(Objective):
        raise UnknownName("objective", objective, get_args(Objective))
    if ablation not in get_args(Ablation):
        raise UnknownName("ablation", ablation, get_args(Ablation))
    if not threshold >= 0:
        raise VesaliusError(f"threshold is {threshold}; it must be 0 or more")
    if budget is not None and budget < 1:
        raise VesaliusError(f"a budget of {budget} tests nothing; give at least 1")


def _screened(
    model: Model,
    pairs: Pairs,
    context: Context,
    graph: Universe,
    budget: int | None,
    screen: str,
    direction: Direction,
) -> NDArray[np.bool_]:
    """The edges to be tested, (sender, receiver): as many of the largest as leave at most `budget` without dead ends.

    Dead ends (no way from embed, or none to unembed) carry the same cut or kept, so no test is spent on them.
    """
    if budget is None or budget >= graph.n_edges:
        return graph.exists
    options = {"direction": direction} if "direction" in parameters(screen) else {}
    estimate = METHODS.get(screen)(model, pairs, Context("edge", context.seed), **options)
    order = np.argsort(-np.abs(graph.values(estimate)), kind="stable")

    def largest(n: int) -> NDArray[np.bool_]:
        chosen = np.zeros(graph.n_edges, dtype=bool)
        chosen[order[:n]] = True
        return graph.prune(graph.matrix(chosen, False)).numpy()

    low, high = 0, graph.n_edges  # the count grows with n: bisect
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if largest(middle).sum() <= budget else (low, middle)
    found = largest(low)
    if not found.any():
        raise VesaliusError(
            f"a budget of {budget} is used up before the edges that {screen} ranks highest join embed to unembed "
            f"(the first {high} hold {int(largest(high).sum())} that do); give a larger budget"
        )
    return found


class _Runs:
    """The objective of every example under sets of cut edges, over all batches of prompts."""

    def __init__(
        self, model: Model, pairs: Pairs, base: Side, objective: Objective, ablation: Ablation, context: Context
    ) -> None:
        self.model, self.objective = model, objective
        self.sign = 1.0 if base == "clean" else -1.0
        self.memory = context.memory_gb * 2**30
        self.runs: list[EdgeRun] = []
        side: Side = "corrupted" if base == "clean" else "clean"
        reference = Reference(model, pairs, side, write_sites(model)) if ablation in ("mean", "resample") else None
        offset = 0
        for group in pairs.batches(BATCH):
            recording = record(model, group, base, [], paired=ablation == "counterfactual")
            if reference is None:
                ids = group.corrupted if base == "clean" else group.clean
                found = activations(model, ids, group, write_sites(model), recording.tape)
            elif ablation == "mean":
                found = reference.means(group)
            else:
                found = reference.resamples(group, context.seed, offset)
            offset += group.n_rows
            other = writes(model, found)
            self.runs.append(EdgeRun(model, group, base, other * 0 if ablation == "zero" else other))
        held = sum(run.bytes_held for run in self.runs)
        if held > self.memory:
            raise OutOfMemory(
                f"the writes of all parts on {pairs.n_examples} prompts take {held / 2**30:.2g} GiB, more than the "
                f"budget of {context.memory_gb:.2g} GiB; give fewer or shorter prompts, or a larger memory budget"
            )
        self.left = self.memory - held
        with torch.no_grad():
            finals = [run.tape.final for run in self.runs] if objective == "kl" else []
            self.full = [model.readout(x).double().log_softmax(-1) for x in finals]

    @property
    def blocks_run(self) -> float:
        """Blocks run so far, averaged over batches of prompts."""
        return sum(run.blocks_run * run.pairs.n_examples for run in self.runs) / sum(
            run.pairs.n_examples for run in self.runs
        )

    def metric(self, cut: Tensor) -> float:
        """The mean metric with these edges cut (sender, receiver)."""
        return float(torch.cat([run.values(cut) for run in self.runs]).double().mean())

    def record(self, cut: Tensor) -> None:
        for run in self.runs:
            run.record(cut)

    def at_once(self, layer: int) -> int:
        """How many sets fit into the memory budget when run from a block on."""
        if layer >= self.model.n_layers:
            return LAST_BATCH
        return max(1, min(LAST_BATCH, int(self.left / max(run.bytes_per_set(layer) for run in self.runs))))

    def worse(self, cuts: Tensor) -> NDArray[np.float64]:
        """How bad the output is under each set of cut edges: (set, example)."""
        if self.objective == "metric":
            values = torch.cat([run.values(cuts) for run in self.runs], dim=1)
            return -self.sign * values.double().numpy()
        found = []
        with torch.no_grad(), memory_errors():
            for run, full in zip(self.runs, self.full, strict=True):
                finals = run.finals(cuts).unflatten(0, (len(cuts), -1))  # (set, row, read, d)
                found.append(torch.stack([self._divergence(run.pairs, full, one) for one in finals]))
        return torch.cat(found, dim=1).numpy()

    def _divergence(self, pairs: Pairs, full: Tensor, final: Tensor) -> Tensor:
        """KL(full || this) in nats, averaged over the reads of each example, (example,)."""
        now = self.model.readout(final).double().log_softmax(-1)
        each = (full.exp() * (full - now)).sum(-1).cpu()  # (row, read)
        real = pairs.read_mask.double()
        total = torch.zeros(2, pairs.n_examples, dtype=torch.float64)
        total.index_add_(1, pairs.row_example.cpu(), torch.stack([(each * real).sum(1), real.sum(1)]))
        return total[0] / total[1]


UNTESTED, CUT, KEPT = 0.0, 1.0, 2.0


@dataclass
class _Search:
    """Algorithm 1, with its state: which edges are cut, and what every test found."""

    graph: Universe
    runs: _Runs
    threshold: float
    context: Context
    sets: int = 0
    resumed: int = 0
    dead: int = 0
    batch: int = FIRST_BATCH
    cut: Tensor = field(init=False)

    def __call__(self, candidates: NDArray[np.bool_], budget: int | None) -> Scores:
        graph, runs = self.graph, self.runs
        n_examples = sum(run.pairs.n_examples for run in runs.runs)
        metric_full = runs.metric(torch.zeros(graph.exists.shape, dtype=torch.bool))
        self.cut = torch.from_numpy(graph.exists & ~candidates)
        metric_screened = runs.metric(self.cut)
        runs.record(self.cut)
        state = np.zeros((graph.n_senders, graph.n_receivers))
        changes = np.zeros((graph.n_senders, graph.n_receivers, n_examples))
        now: NDArray[np.float64] | None = None  # the objective at present, (example,)
        total, done = int(candidates.sum()), 0
        for column in reversed(range(graph.n_receivers)):
            senders = np.flatnonzero(candidates[:, column])[::-1]
            if not len(senders):
                continue
            owner = int(graph.owner[column])
            if owner < graph.n_senders and bool(self.cut[owner, torch.from_numpy(graph.exists[owner])].all()):
                self.cut[senders.copy(), column] = True
                self.dead += len(senders)
            else:
                name = f"acdc:{column}"
                kept = self.context.store.get(name) if self.context.store else None
                if kept is None:
                    now = runs.worse(self.cut[None])[0] if now is None else now
                    kept, now = self._receiver(column, senders, now)
                    if self.context.store:
                        self.context.store.put(name, kept)
                else:
                    self.resumed += len(senders)
                    now = None
                    self.cut[senders[kept[:, 0] == CUT].copy(), column] = True
                state[senders, column] = kept[:, 0]
                changes[senders, column] = kept[:, 1:]
            done += len(senders)
            if self.context.progress:
                self.context.progress(done, total)
        return self._scores(state, changes, total, metric_full, metric_screened, budget)

    def _receiver(
        self, column: int, senders: NDArray[np.int64], now: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Tests the edges into one receiver: for each sender its state and the change of every example."""
        out = np.zeros((len(senders), 1 + len(now)))
        limit = self.runs.at_once(min(column // self.graph.block_columns(0).stop, self.runs.model.n_layers))
        i = 0
        while i < len(senders):
            upto = min(len(senders), i + min(self.batch, limit))
            sets = self.cut.repeat(upto - i, 1, 1)
            for step, sender in enumerate(senders[i:upto]):
                sets[step:, int(sender), column] = True
            found = self.runs.worse(sets)
            self.sets += len(sets)
            rejected = False
            for after in found:
                change = after - now
                rejected = bool(change.mean() > self.threshold)
                out[i, 0] = KEPT if rejected else CUT
                out[i, 1:] = change if rejected else 0.0
                if not rejected:
                    self.cut[int(senders[i]), column] = True
                    now = after
                i += 1
                if rejected:
                    break
            self.batch = max(1, self.batch // 2) if rejected else min(LAST_BATCH, 2 * self.batch)
        return out, now

    def _scores(
        self,
        state: NDArray[np.float64],
        changes: NDArray[np.float64],
        candidates: int,
        metric_full: float,
        metric_screened: float,
        budget: int | None,
    ) -> Scores:
        graph, runs = self.graph, self.runs
        tested = graph.flat(state != UNTESTED)
        per_example = changes.transpose(1, 0, 2)[graph.exists.T]  # (edge, example)
        layers = runs.model.n_layers
        return Scores(
            graph.edges,
            per_example.mean(1),
            per_example,
            verified=tested,
            info={
                "threshold": self.threshold,
                "objective": runs.objective,
                "unit": "nat" if runs.objective == "kl" else runs.runs[0].pairs.metric.unit,
                "kept": int((state == KEPT).sum()),
                "tested": int(tested.sum()),
                "cut_by_test": int((state == CUT).sum()),
                "cut_untested_dead": self.dead,
                "never_tested_screened_out": graph.n_edges - candidates,
                "sets_run": self.sets,
                "tests_taken_from_store": self.resumed,
                "passes": runs.blocks_run / layers,
                "metric_full": metric_full,
                "metric_after_screen": metric_screened if budget is not None else None,
                "metric_circuit": runs.metric(self.cut),
            },
        )
