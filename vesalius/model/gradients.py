"""The metric's gradient at chosen sites: one forward and one backward pass over the positions that can differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from vesalius.model.hooks import Hooks, Site, Tap, own_attention
from vesalius.model.memory import memory_errors
from vesalius.model.model import Model
from vesalius.model.pairs import Pairs
from vesalius.model.relevance import Rules, relevance
from vesalius.model.replay import Tape, _gather
from vesalius.model.sweep import Side, embedded, trunk


@dataclass(frozen=True)
class GradientRun:
    """Activations and gradients of the summed metric at sites, over positions from `start` on.

    Attributes:
        values: the metric of each example (example,), without gradient.
        acts, grads: by site, (row, pos - start, ...).
    """

    values: Tensor
    acts: Mapping[Site, Tensor]
    grads: Mapping[Site, Tensor]


class Differences:
    """A batch of pairs made ready for attribution: what differs between the runs, and gradients along the way.

    With causal attention the positions before the first differing token have the same activations in both runs and
    score nothing, so both runs and the backward pass cover the later positions only, against the recorded keys and
    values of the earlier ones (where that saves work).

    Args:
        model: the model. pairs: one batch. sites: where activations and gradients are wanted.
    """

    def __init__(self, model: Model, pairs: Pairs, sites: Sequence[Site]) -> None:
        self.model, self.pairs, self.sites = model, pairs, list(dict.fromkeys(sites))
        start = min(pairs.first_difference, int(pairs.reads.min())) if pairs.decoder is None else 0
        self.tape: Tape | None = None
        if model.anatomy.main.causal and model.kind == "causal" and start > pairs.length // 3:
            self.tape = Tape(model, pairs.corrupted, pairs.mask, pairs.reads, start=start)
        self.start = self.tape.start if self.tape is not None else 0

    @property
    def positions(self) -> range:
        return range(self.start, self.pairs.length)

    def ids(self, side: Side) -> Tensor:
        return self.pairs.clean if side == "clean" else self.pairs.corrupted

    def embedding(self, side: Side) -> Tensor:
        """The residual stream entering the first block, (row, pos - start, d)."""
        return embedded(self.model, self.ids(side), self.pairs)[:, self.start :]

    def activations(self, side: Side) -> Mapping[Site, Tensor]:
        """Sites of one run without gradient, (row, pos - start, ...)."""
        if self.tape is None:
            return trunk(self.model, self.ids(side), self.pairs, self.sites).sites
        found: dict[Site, Tensor] = {}
        reading = {s: [lambda x, s=s: found.__setitem__(s, x)] for s in self.sites}
        with torch.no_grad():
            self.tape.replay(0, 1, reading, hidden=self.embedding(side))
        return found

    def gradients(self, side: Side, rules: Rules | None = None, hidden: Tensor | None = None) -> GradientRun:
        """The metric's gradient on one run, or from a given embedding (row, pos - start, d).

        Args:
            side: whose run. rules: propagation rules in place of the plain gradient.
            hidden: residual stream to enter the first block with instead (integrated gradients).
        """
        model, pairs = self.model, self.pairs
        found: dict[Site, Tensor] = {}

        def watch(site: Site) -> Tap:
            def tap(x: Tensor) -> Tensor:
                found[site] = x.view_as(x)
                return found[site]

            return tap

        main = model.anatomy.main
        first = Site("resid_pre", 0, main.prefix)
        end = Site("resid_post", model.n_layers - 1, main.prefix)
        last: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            return (x if hidden is None else hidden).detach().requires_grad_()

        taps: dict[Site, list[Tap]] = {first: [leaf]}
        if model.kind == "encoder-decoder":
            taps = {first: [lambda x: x.detach().requires_grad_()], Site("resid_pre", 0, "enc"): [leaf]}
        for site in self.sites:
            taps.setdefault(site, []).append(watch(site))
        with ExitStack() as exits, torch.enable_grad(), memory_errors():
            if rules is not None:
                exits.enter_context(relevance(model, rules))
            if self.tape is not None:
                start = hidden if hidden is not None else self.embedding(side)
                final = self.tape.replay(0, 1, taps, hidden=start)
            else:
                taps.setdefault(end, []).append(last.append)
                body = model.hf.base_model if model.kind != "encoder-decoder" else model.hf
                exits.enter_context(own_attention(model.hf))
                exits.enter_context(Hooks(model.hf, model.anatomy, taps))
                body(**model.inputs(self.ids(side), pairs.mask, pairs.decoder))
                final = _gather(last[0], pairs.reads.to(last[0].device))
            logits = model.readout(final, pairs.metric.tokens(pairs)).float()
            values = pairs.value(logits)
            grads = torch.autograd.grad(values.sum(), [found[s] for s in self.sites], allow_unused=True)
        zero = [torch.zeros_like(found[s]) if g is None else g for s, g in zip(self.sites, grads, strict=True)]
        acts = {s: found[s].detach() for s in self.sites}
        return GradientRun(values.detach(), acts, dict(zip(self.sites, zero, strict=True)))

    def path_gradients(self, steps: int, rules: Rules | None = None) -> Mapping[Site, Tensor]:
        """Gradients averaged along the straight line between the two embeddings.

        (1/m) sum over k = 1..m of the gradient at corrupted + k/m (clean - corrupted): integrated gradients as in
        EAP-IG (Hanna et al. 2024, arXiv 2403.17806, eq. 3).
        """
        clean, corrupted = self.embedding("clean"), self.embedding("corrupted")
        total: dict[Site, Tensor] = {}
        for k in range(1, steps + 1):
            run = self.gradients("corrupted", rules, hidden=corrupted + (k / steps) * (clean - corrupted))
            for site, g in run.grads.items():
                total[site] = g if site not in total else total[site] + g
        return {site: g / steps for site, g in total.items()}
