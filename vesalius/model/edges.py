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
from vesalius.model.hooks import Hooks, Site, Tap
from vesalius.model.memory import memory_errors
from vesalius.model.model import Model
from vesalius.model.pairs import Pairs
from vesalius.model.relevance import Rules
from vesalius.model.sweep import Side, metric_values


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
    return block.norm_attn_out.linear(out, block.norm_attn_out.scale(_attention_sum(block, out)).unsqueeze(1))


def _attention_sum(block: Block, by_head: Tensor) -> Tensor:
    """The input of a sandwich norm, (row, pos, d): all heads and the output bias."""
    total = by_head.sum(1)
    bias = block.o.bias
    return total if not isinstance(bias, Tensor) else total + bias


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
    clean, corrupted = diff.activations("clean"), diff.activations("corrupted")
    frozen = rules is not None and rules.norm
    delta = (writes(model, clean) - writes(model, corrupted)).flatten(2)  # (row, sender, pos * d)
    total: Tensor | None = None
    embeds = (diff.embedding("clean"), diff.embedding("corrupted")) if steps else None
    for k in range(1, max(steps, 1) + 1):
        start = None if embeds is None else embeds[1] + (k / steps) * (embeds[0] - embeds[1])
        run = diff.gradients(side, rules, hidden=start)
        with torch.no_grad(), memory_errors():
            scores = torch.zeros(delta.shape[0], graph.n_senders, graph.n_receivers)
            for layer, block in enumerate(model.anatomy.main.blocks):
                reading = _receiver_gradients(model, block, run.acts, run.grads, frozen)  # (row, receiver, pos, d)
                n, r = graph.before_mlp(layer), graph.block_columns(layer)
                scores[:, :n, r] = torch.bmm(delta[:, :n], reading.flatten(2).transpose(1, 2)).float().cpu()
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

    Args:
        model: the model. ids, mask, reads as in `Pairs`. other: every sender's write in the other run
            (row, sender, pos, d), from `writes`.
    """

    def __init__(self, model: Model, pairs: Pairs, side: Side, other: Tensor) -> None:
        self.model, self.pairs, self.side, self.other = model, pairs, side, other
        self.graph = universe_of(model)

    def values(self, cut: Tensor) -> Tensor:
        """The metric of each example (example,) with the edges in `cut` (sender, receiver) carrying the other write."""
        model, graph, pairs = self.model, self.graph, self.pairs
        a = model.anatomy
        ids = pairs.clean if self.side == "clean" else pairs.corrupted
        cut = (cut & torch.from_numpy(graph.exists)).to(model.device)
        gap = torch.zeros_like(self.other)  # (row, sender, pos, d): other minus present write
        state: dict[str, Tensor] = {}
        taps: dict[Site, list[Tap]] = {}

        def correction(n: int, r: slice | int) -> Tensor | None:
            """Summed corrections for receivers r, (row, receiver, pos, d), from the first n senders."""
            mine = cut[:n, r] if isinstance(r, slice) else cut[:n, r : r + 1]
            if not bool(mine.any()):
                return None
            used = mine.any(dim=1).nonzero().flatten()
            return torch.einsum("busd,ur->brsd", gap[:, used], mine[used].to(gap.dtype))

        def for_block(block: Block) -> None:
            layer = block.layer
            heads = graph.block_columns(layer)
            n, n_mlp = graph.before_block(layer), graph.before_mlp(layer)

            def enter(x: Tensor) -> None:
                state["pre"] = x
                if layer == 0:
                    gap[:, 0] = self.other[:, 0] - x

            def side_tap(i: int, side: str) -> Tap:
                def tap(old: Tensor) -> Tensor | None:
                    r = slice(heads.start + i * graph.n_heads, heads.start + (i + 1) * graph.n_heads)
                    add = correction(n, r)
                    if add is None:
                        return None
                    weight, bias = a.head_in(block, side)  # type: ignore[arg-type]
                    normed = block.norm_in.module(state["pre"].unsqueeze(1) + add)  # (row, head, pos, d)
                    new = torch.einsum("bhsd,hde->bshe", normed, weight)
                    new = new if bias is None else new + bias
                    changed = cut[:n, r].any(dim=0)
                    return torch.where(changed.view(1, 1, -1, 1), new, old)

                return tap

            def z_tap(z: Tensor) -> None:
                end = n + graph.n_heads
                gap[:, n:end] = self.other[:, n:end] - head_writes(model, block, z)

            def mid_tap(x: Tensor) -> None:
                state["mid"] = x

            def mlp_tap(old: Tensor) -> Tensor | None:
                add = correction(n_mlp, heads.stop - 1)
                if add is None:
                    return None
                x = state["pre"] if a.parallel else state["mid"]
                return block.norm_mid.module(x + add[:, 0])  # type: ignore[no-any-return]

            def out_tap(write: Tensor) -> None:
                gap[:, n + graph.n_heads] = self.other[:, n + graph.n_heads] - write

            taps[Site("resid_pre", layer)] = [enter]
            for i, side in enumerate(SIDES):
                r = slice(heads.start + i * graph.n_heads, heads.start + (i + 1) * graph.n_heads)
                if bool(cut[:n, r].any()):
                    taps[Site(side, layer)] = [side_tap(i, side)]
            taps[Site("z", layer)] = [z_tap]
            taps[Site("mlp_in", layer)] = [mlp_tap]
            if not a.parallel:
                taps[Site("resid_mid", layer)] = [mid_tap]
            taps[Site("mlp_out", layer)] = [out_tap]

        for block in a.main.blocks:
            for_block(block)
        last: list[Tensor] = []
        taps[Site("resid_post", model.n_layers - 1)] = [last.append]
        with torch.no_grad(), memory_errors(), Hooks(model.hf, a, taps):
            model.hf.base_model(**model.inputs(ids, pairs.mask))
            final = last[0]
            add = correction(graph.n_senders, graph.n_receivers - 1)
            final = final if add is None else final + add[:, 0]
            index = pairs.reads.to(final.device).unsqueeze(-1).expand(-1, -1, final.shape[-1])
            return metric_values(model, pairs, final.gather(1, index))[0]
