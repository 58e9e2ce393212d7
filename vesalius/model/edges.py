"""Edges without copies: the residual stream as the sum of what senders write and as what each receiver alone reads.

Senders are the embedding, every head's output and every MLP's; receivers are each head's query, key and value inputs,
every MLP's input, and the unembedding. The graph is kept as one matrix (sender, receiver). Keys and values are
receivers of query heads, also where key-value heads are shared: a receiver's input is projected through its (shared)
weights for that head alone, so that no weight is copied, ungrouped or untied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vesalius.model.anatomy import Block
from vesalius.model.gradients import Differences
from vesalius.model.graph import SIDES, universe_of
from vesalius.model.hooks import Site, Tap
from vesalius.model.memory import memory_errors
from vesalius.model.model import Model
from vesalius.model.pairs import Pairs
from vesalius.model.relevance import Rules
from vesalius.model.replay import Tape
from vesalius.model.sweep import Side, metric_values
from vesalius.model.weights import bias_of


def write_sites(model: Model) -> list[Site]:
    """Sites from which every sender's write can be computed."""
    sites = [Site("resid_pre", 0)]
    for layer in range(model.n_layers):
        sites += [Site("z", layer), Site("mlp_out", layer)]
    return sites


def head_writes(model: Model, block: Block, z: Tensor) -> Tensor:
    """What each head adds to the residual stream, (row, head, pos, d), from z (row, pos, head, d_head).

    Where a sandwich norm follows, a head's write is its share of the sum, at the norm's actual scale.
    """
    out = torch.einsum("bshe,hed->bhsd", z, model.anatomy.head_out(block).to(z.dtype))
    if block.norm_attn_out is None:
        return out
    scale = block.norm_attn_out.scale(_attention_sum(block, out)).unsqueeze(1)
    return block.norm_attn_out.linear(out, scale).to(out.dtype)


def _attention_sum(block: Block, by_head: Tensor) -> Tensor:
    """The input of a sandwich norm, (row, pos, d): all heads and the output bias."""
    total = by_head.sum(1)
    bias = bias_of(block.o)
    return total if bias is None else total + bias


def writes(model: Model, acts: Mapping[Site, Tensor]) -> Tensor:
    """Every sender's write, (row, sender, pos, d), from recorded sites. Biases are not parts and are left out."""
    found = [acts[Site("resid_pre", 0)].unsqueeze(1)]
    for layer, block in enumerate(model.anatomy.main.blocks):
        found += [head_writes(model, block, acts[Site("z", layer)]), acts[Site("mlp_out", layer)].unsqueeze(1)]
    return torch.cat(found, dim=1)


def edge_sites(model: Model) -> list[Site]:
    """Sites whose activations and gradients give the score of every edge."""
    sites = write_sites(model)
    for layer in range(model.n_layers):
        sites += [Site("resid_pre", layer), Site("q", layer), Site("k", layer), Site("v", layer), Site("mlp_in", layer)]
        sites += [] if model.anatomy.parallel else [Site("resid_mid", layer)]
    return list(dict.fromkeys([*sites, Site("resid_post", model.n_layers - 1)]))


def edge_scores(model: Model, diff: Differences, steps: int, side: Side, rules: Rules | None) -> Tensor:
    """First-order effect of every edge, (example-row, sender, receiver): (clean - corrupted) write . gradient read.

    The gradient at a receiver's input is carried back from its query, key, value (or MLP input) through that head's
    weights and the norm; the product with all senders is one matrix product a block. No residual is stored per edge.

    Args:
        diff: made with `edge_sites(model)`. steps: 0 for the gradient on `side`'s run, else integrated-gradient steps.
        rules: propagation rules in place of the plain gradient.
    """
    graph = universe_of(model)
    frozen = rules is not None and rules.norm
    alone = None if steps else diff.gradients(side, rules)  # its activations are that side's
    clean, corrupted = (
        alone.acts if alone is not None and side == one else diff.activations(one) for one in ("clean", "corrupted")
    )
    with torch.no_grad():
        delta = (writes(model, clean) - writes(model, corrupted)).flatten(2)  # (row, sender, pos * d)
    total: Tensor | None = None
    embeds = (diff.embedding("clean"), diff.embedding("corrupted")) if steps else None
    for k in range(1, max(steps, 1) + 1):
        start = None if embeds is None else embeds[1] + (k / steps) * (embeds[0] - embeds[1])
        run = alone or diff.gradients(side, rules, hidden=start)
        with torch.no_grad(), memory_errors():
            scores = torch.zeros(delta.shape[0], graph.n_senders, graph.n_receivers)
            for layer, block in enumerate(model.anatomy.main.blocks):
                reading = _receiver_gradients(model, block, run.acts, run.grads, frozen)  # (row, receiver, pos, d)
                n, r = graph.before_mlp(layer), graph.block_columns(layer)
                reading = reading.flatten(2).transpose(1, 2).to(delta.dtype)
                scores[:, :n, r] = torch.bmm(delta[:, :n], reading).float().cpu()
            last = run.grads[Site("resid_post", model.n_layers - 1)]
            scores[:, :, -1] = torch.bmm(delta, last.flatten(1).unsqueeze(2)).squeeze(2).float().cpu()
        total = scores if total is None else total + scores
    assert total is not None
    return total / max(steps, 1) * torch.from_numpy(graph.exists)


def _receiver_gradients(
    model: Model, block: Block, acts: Mapping[Site, Tensor], grads: Mapping[Site, Tensor], frozen: bool
) -> Tensor:
    """The metric's gradient at the residual input of each receiver of a block, (row, 3 * head + 1, pos, d)."""
    layer, a = block.layer, model.anatomy
    x = acts[Site("resid_pre", layer)]
    found = []
    for side in SIDES:
        weight, _ = a.head_in(block, side)  # type: ignore[arg-type]
        found.append(torch.einsum("bshe,hde->bhsd", grads[Site(side, layer)], weight.to(x.dtype)))
    heads = block.norm_in.vjp(torch.cat(found, dim=1), x.unsqueeze(1), frozen)
    mid = x if a.parallel else acts[Site("resid_mid", layer)]
    mlp = block.norm_mid.vjp(grads[Site("mlp_in", layer)].view(mid.shape), mid, frozen)
    return torch.cat([heads, mlp.unsqueeze(1)], dim=1)


class EdgeRun:
    """Forward passes in which chosen edges carry what their sender wrote in another run.

    Every receiver reads the residual stream plus, for each of its cut edges, the sender's other write minus its
    present one (the input construction of edge patching in ACDC and EAP).

    One run is recorded (at first the plain one: no edge cut), and a set of edges is run only from the first block at
    which it differs from the recorded set; if only edges into unembed differ, no block is run. Several sets are run as
    one batch.

    Args:
        model: the model. pairs, side: whose run edges are cut in.
        other: every sender's write in the other run, (row, sender, pos, d), from `writes`. If it covers only the last
            positions, the earlier ones are taken to be the same in both runs (true for a pair under causal attention
            before its first differing token) and are not run again.

    Attributes:
        start: the first position that is run again.
        blocks_run: how many blocks were run so far, once for each set of edges.
    """

    def __init__(self, model: Model, pairs: Pairs, side: Side, other: Tensor) -> None:
        self.model, self.pairs, self.side = model, pairs, side
        self.graph = universe_of(model)
        ids = pairs.clean if side == "clean" else pairs.corrupted
        sites = write_sites(model)
        self.tape = Tape(model, ids, pairs.mask, pairs.reads, start=pairs.length - other.shape[2], capture=sites)
        self.start = self.tape.start
        if other.shape[2] != self.tape.length:
            raise ValueError(f"other writes cover {other.shape[2]} positions, the run {self.tape.length}")
        own = writes(model, {s: self.tape.sites.pop(s)[:, self.start :] for s in sites})
        self.other = other.expand_as(own)
        self.blocks_run = model.n_layers
        self._reads = self.tape.reads - self.start
        # The recorded run: its cut edges, the residual stream entering each block, other minus present writes.
        self._cut = torch.zeros(self.graph.n_senders, self.graph.n_receivers, dtype=torch.bool)
        self._hidden = [x[:, self.start :] for x in self.tape.hidden]
        self._gap = self.other - own
        self._final = self.tape.final

    def values(self, cut: Tensor) -> Tensor:
        """The metric of each example (example,) with the edges in `cut` (sender, receiver) carrying the other write.

        Several sets of edges (set, sender, receiver) give (set, example).
        """
        sets = cut if cut.dim() == 3 else cut.unsqueeze(0)
        with torch.no_grad():
            found = metric_values(self.model, self.pairs, self.finals(sets), len(sets))
        return found if cut.dim() == 3 else found[0]

    def finals(self, cuts: Tensor) -> Tensor:
        """What unembed reads, (set * row, read, d), under each set of cut edges (set, sender, receiver)."""
        cuts = cuts & torch.from_numpy(self.graph.exists)
        layer = self._first_change(cuts)
        with torch.no_grad(), memory_errors():
            if layer == self.model.n_layers:
                final, fresh = self._final.repeat(len(cuts), 1, 1), None
            else:
                final, fresh = self._run(cuts, layer, None)
            return self._with_unembed(cuts, layer, final, fresh)

    def record(self, cut: Tensor) -> None:
        """Makes the run with these edges cut (sender, receiver) the recorded one, from which later runs depart."""
        cut = cut & torch.from_numpy(self.graph.exists)
        layer = self._first_change(cut.unsqueeze(0))
        if layer < self.model.n_layers:
            n = self.graph.before_block(layer)
            hidden: list[Tensor] = []
            with torch.no_grad(), memory_errors():
                final, fresh = self._run(cut.unsqueeze(0), layer, hidden)
            self._final = final
            self._hidden[layer:] = hidden
            self._gap[:, n:] = fresh[0]
        self._cut = cut

    def bytes_per_set(self, layer: int) -> int:
        """Rough working memory of one set of edges that is run from a block on."""
        graph, row = self.graph, self.tape.rows * self.tape.length * self.model.d_model * self._gap.itemsize
        return row * (graph.n_senders - graph.before_block(layer) + 4 * graph.n_heads) + self.tape.bytes_per_copy()

    @property
    def bytes_held(self) -> int:
        """Memory of the recorded run and of the other writes."""
        held = [self._gap, self.other, *self._hidden, *self.tape.keys, *self.tape.values]
        return sum(x.numel() * x.itemsize for x in held)

    # -- inside --------------------------------------------------------------------------------------------------

    def _first_change(self, cuts: Tensor) -> int:
        """The first block with a receiver whose cut edges differ from the recorded run's; n_layers if there is none."""
        changed = (cuts != self._cut).any(0).any(0).nonzero()  # (receiver, 1)
        if not len(changed):
            return self.model.n_layers
        return min(int(changed[0]) // self.graph.block_columns(0).stop, self.model.n_layers)

    def _corrections(
        self, cuts: Tensor, n0: int, n: int, fresh: Tensor | None, old: Tensor | None = None
    ) -> Tensor | None:
        """Summed corrections of receivers, (set * row, receiver, pos, d), from the first n senders.

        Args:
            cuts: (set, sender, receiver).
            n0: how many senders write before the first block that is run again: their recorded gaps serve all sets.
            fresh: gaps of the later ones, (set, row, sender, pos, d).
            old: the recorded gaps, if not those at all positions.
        """
        gap = self._gap if old is None else old
        mine = cuts[:, :n].to(gap.device, gap.dtype)
        used = cuts[:, :n].any(2).any(0)  # (sender,)
        if not bool(used.any()):
            return None
        sets, receivers = mine.shape[0], mine.shape[2]
        total = torch.zeros(1, 1, device=gap.device, dtype=gap.dtype)
        early, late = used[:n0].nonzero().flatten(), used[n0:].nonzero().flatten()
        if len(early):  # one product for all sets; a copy of the gaps only where few are used
            few = 2 * len(early) < n0
            source, weight = (gap[:, early], mine[:, early]) if few else (gap[:, :n0], mine[:, :n0])
            product = weight.permute(0, 2, 1).flatten(0, 1) @ source.flatten(2)  # (row, set * receiver, pos * d)
            total = product.unflatten(1, (sets, receivers)).transpose(0, 1)  # (set, row, receiver, pos * d)
        if len(late):
            assert fresh is not None
            few = 2 * len(late) < n - n0
            source, weight = (fresh[:, :, late], mine[:, n0 + late]) if few else (fresh[:, :, : n - n0], mine[:, n0:])
            total = total + weight.transpose(1, 2).unsqueeze(1) @ source.flatten(3)
        return total.flatten(0, 1).unflatten(-1, gap.shape[2:])

    def _with_unembed(self, cuts: Tensor, layer: int, final: Tensor, fresh: Tensor | None) -> Tensor:
        """Adds the corrections of the edges into unembed to the final residual stream, (set * row, read, d)."""
        graph = self.graph
        n0 = graph.n_senders if layer == self.model.n_layers else graph.before_block(layer)
        last = cuts[:, :, -1:]
        if not bool(last.any()):
            return final
        old = _at_reads(self._gap[:, :n0], self._reads)
        new = None if fresh is None else _at_reads(fresh.flatten(0, 1), self._reads.repeat(len(cuts), 1))
        new = None if new is None else new.unflatten(0, (len(cuts), -1))
        add = self._corrections(last, n0, graph.n_senders, new, old)
        return final if add is None else final + add[:, 0].to(final.device)

    def _run(self, cuts: Tensor, layer: int, hidden: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Runs blocks from `layer` on; `hidden` collects the residual stream entering each of them.

        Returns:
            What would enter unembed (set * row, read, d), edges into it not yet cut, and the gaps of the senders
            written on the way, (set, row, sender, pos, d): only those that some edge needs, unless `hidden` is given.
        """
        model, graph, a = self.model, self.graph, self.model.anatomy
        sets, rows, n0 = len(cuts), self.tape.rows, self.graph.before_block(layer)
        fresh = self._gap.new_zeros(sets, rows, graph.n_senders - n0, *self._gap.shape[2:])
        taps: dict[Site, list[Tap]] = {}
        self.blocks_run += sets * (model.n_layers - layer)

        def for_block(block: Block) -> None:
            heads = graph.block_columns(block.layer)
            n, n_mlp = graph.before_block(block.layer), graph.before_mlp(block.layer)
            end = n + graph.n_heads
            state: dict[str, Tensor] = {}

            def enter(x: Tensor) -> None:
                state["pre"] = x
                if hidden is not None:
                    hidden.append(x)

            def side_tap(mine: Tensor, side: str) -> Tap:
                changed = mine.any(1).repeat_interleave(rows, dim=0)  # (set * row, head)

                def tap(old: Tensor) -> Tensor | None:
                    add = self._corrections(mine, n0, n, fresh)
                    assert add is not None
                    weight, bias = a.head_in(block, side)  # type: ignore[arg-type]
                    normed = block.norm_in.module(state["pre"].unsqueeze(1) + add.to(old.device))  # (row, head, pos, d)
                    new = torch.einsum("bhsd,hde->bshe", normed, weight)
                    new = new if bias is None else new + bias
                    return torch.where(changed.to(old.device)[:, None, :, None], new, old)

                return tap

            def z_tap(z: Tensor) -> None:
                mine = head_writes(model, block, z).unflatten(0, (sets, rows))
                fresh[:, :, n - n0 : end - n0] = self.other[:, n:end] - mine

            def mid_tap(x: Tensor) -> None:
                state["mid"] = x

            def mlp_tap(old: Tensor) -> Tensor:
                add = self._corrections(cuts[:, :, heads.stop - 1 : heads.stop], n0, n_mlp, fresh)
                assert add is not None
                x = state["pre"] if a.parallel else state["mid"]
                return block.norm_mid.module(x + add[:, 0].to(x.device))

            def out_tap(write: Tensor) -> None:
                fresh[:, :, end - n0] = self.other[:, end] - write.unflatten(0, (sets, rows))

            here = block.layer
            taps[Site("resid_pre", here)] = [enter]
            for i, side in enumerate(SIDES):
                mine = cuts[:, :n, heads.start + i * graph.n_heads : heads.start + (i + 1) * graph.n_heads]
                if bool(mine.any()):
                    taps[Site(side, here)] = [side_tap(mine, side)]
            if hidden is not None or bool(cuts[:, n:end].any()):
                taps[Site("z", here)] = [z_tap]
            if bool(cuts[:, :n_mlp, heads.stop - 1].any()):
                taps[Site("mlp_in", here)] = [mlp_tap]
                if not a.parallel:
                    taps[Site("resid_mid", here)] = [mid_tap]
            if hidden is not None or bool(cuts[:, end].any()):
                taps[Site("mlp_out", here)] = [out_tap]

        for block in a.main.blocks[layer:]:
            for_block(block)
        final = self.tape.replay(layer, sets, taps, hidden=self._hidden[layer].repeat(sets, 1, 1))
        return final, fresh


def _at_reads(gap: Tensor, reads: Tensor) -> Tensor:
    """Positions `reads` (row, read) of gap (row, sender, pos, d): (row, sender, read, d)."""
    index = reads.to(gap.device)[:, None, :, None].expand(-1, gap.shape[1], -1, gap.shape[3])
    return gap.gather(2, index)
