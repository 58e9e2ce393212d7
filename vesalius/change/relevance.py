"""Relevance of heads and neurons to plain text: what RelP attributes to each of the next token's log-probability.

    score = mean over prompts of | sum over positions of  a . r |,     r = d log p(next token) / d a by RelP's rules

With the part's activation at zero as the other run: a first-order estimate of what silencing it costs.

Jafari et al. 2025 (arXiv 2508.21258); the rules are those of `vesalius.model.relevance`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vesalius.change.calibration import Progress
from vesalius.change.ranking import scores_of
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap, own_attention
from vesalius.model.relevance import relevance
from vesalius.scores import Scores


def relp_text(model: Model, rows: Tensor, seed: int = 0, progress: Progress | None = None) -> Scores:
    """Scores of heads and neurons on rows of text (row, pos)."""
    prefix = model.anatomy.main.prefix
    layers = range(model.n_layers)
    sites = {name: [Site(name, i, prefix) for i in layers] for name in ("z", "neurons")}
    totals = {"z": np.zeros((model.n_layers, model.n_heads)), "neurons": np.zeros((model.n_layers, model.d_mlp))}
    found: dict[Site, Tensor] = {}

    def watch(site: Site) -> Tap:
        def tap(x: Tensor) -> Tensor:
            found[site] = x.view_as(x)
            return found[site]

        return tap

    taps: dict[Site, list[Tap]] = {s: [watch(s)] for every in sites.values() for s in every}
    taps.setdefault(Site("resid_pre", 0, prefix), []).insert(0, lambda x: x.detach().requires_grad_())
    for done, row in enumerate(rows):
        ids = row[None].to(model.device)
        with model.alone(), torch.inference_mode(False), torch.enable_grad(), relevance(model):
            with own_attention(model.hf), Hooks(model.hf, model.anatomy, taps):
                logits = model.hf(**model.inputs(ids)).logits
            chance = logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
            every = [s for group in sites.values() for s in group]
            grads = dict(zip(every, torch.autograd.grad(chance, [found[s] for s in every]), strict=True))
        for name, group in sites.items():
            for layer, site in zip(layers, group, strict=True):
                product = (found[site].detach() * grads[site])[0]  # (pos, head, d_head) or (pos, neuron)
                by_part = product.flatten(2).sum(2) if product.dim() > 2 else product
                totals[name][layer] += by_part.sum(0).abs().double().cpu().numpy()
        found.clear()
        if progress is not None:
            progress(done + 1, len(rows))
    made = scores_of(model, totals["z"] / len(rows), totals["neurons"] / len(rows), "relp")
    return Scores(made.parts, made.values, info=made.info | {"n": len(rows), "unit": "nats"})
