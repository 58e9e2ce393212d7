"""How well lenses foretell what the model will say, layer by layer, on text they were not trained on.

    kl          mean KL(final || lens), nats, with a 95 % interval over states
    perplexity  exp of the mean surprisal of what the base objective asks for (the next token), under the lens
    agree       share of states at which the likeliest token is the final one
    bias        KL(mean final || mean lens): what is left of the divergence when both are averaged over states.
                An unbiased lens has the right distribution on average, whatever it gets wrong in each case.

Belrose et al. 2023, arXiv 2303.08112, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vesalius.corpus.batches import Source
from vesalius.errors import VesaliusError
from vesalius.lens.base import Lens, divergence, layer_name, layers
from vesalius.lens.divergence import rows_at_once
from vesalius.lens.objective import LensObjective
from vesalius.model import Model
from vesalius.scores import bootstrap_mean
from vesalius.train.objectives import IGNORED
from vesalius.train.objectives.samples import model_inputs


class _Tally:
    """What is summed for one lens at one layer."""

    def __init__(self, size: int) -> None:
        self.kl: list[Tensor] = []
        self.nll: list[Tensor] = []
        self.agree: list[Tensor] = []
        self.mean = torch.zeros(size, dtype=torch.float64)

    def add(self, final: _Final, log_q: Tensor, targets: Tensor) -> None:
        self.kl.append((final.own - (final.p * log_q).sum(-1)).cpu())
        self.nll.append(-log_q.gather(-1, targets[:, None])[:, 0].cpu())
        self.agree.append((final.first == log_q.argmax(-1)).cpu())
        self.mean += log_q.exp_().sum(0).double().cpu()


class _Final:
    """The final distribution at some states: p (state, word), sum p log p, and the likeliest word."""

    def __init__(self, log_p: Tensor) -> None:
        self.p = log_p.exp()
        self.own = torch.where(self.p > 0, self.p * log_p, 0.0).sum(-1)
        self.first = log_p.argmax(-1)


@torch.no_grad()
def judge(
    model: Model,
    lenses: Mapping[str, Lens],
    objective: LensObjective,
    source: Source,
    states: int,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Compares lenses on the first so many states of a source.

    Args:
        model: what they read. lenses: by the name each shall have in the table.
        objective: says which states are read; its reader runs the model.
        source: held-out rows. states: how many states to read, at least.
        seed: of what the objective draws. steps: batches of the source to read at most, so that none comes twice.
        progress: called with (states done, of).

    Returns:
        lens, layer, name, n, kl, low, high, nll, perplexity, agree, bias; a row a lens and layer.

    Raises:
        VesaliusError: if the source has no states to read.
    """
    size = int(model.hf.config.vocab_size)
    tallies = {(name, layer): _Tally(size) for name in lenses for layer in layers(model)}
    final_mean = torch.zeros(size, dtype=torch.float64)
    done, step = 0, 0
    while done < states and (steps is None or step < steps):
        sample = objective.sample(source.batch(step), seed).to(model.device)
        valid = sample.targets != IGNORED
        if not bool(valid.any()):
            raise VesaliusError("the held-out text has no states to read; give longer text")
        found = objective.reader(**model_inputs(sample, objective.reader))
        targets = sample.targets[valid]
        rows = [h[valid] for h in found.states]
        for at in torch.arange(len(targets)).split(rows_at_once(size)):
            final = _Final(model.readout(rows[-1][at]).float().log_softmax(-1))
            final_mean += final.p.sum(0).double().cpu()
            for name, lens in lenses.items():
                for layer, hidden in zip(layers(model), rows, strict=True):
                    log_q = lens(model, hidden[at], layer).float().log_softmax(-1)
                    tallies[name, layer].add(final, log_q, targets[at])
        done, step = done + len(targets), step + 1
        if progress is not None:
            progress(min(done, states), states)
    return pd.DataFrame([_row(n, layer, t, final_mean / done) for (n, layer), t in tallies.items()])


def _row(name: str, layer: int, tally: _Tally, final_mean: Tensor) -> dict[str, Any]:
    kl = torch.cat(tally.kl).double().numpy()
    low, high = bootstrap_mean(kl)
    nll = float(torch.cat(tally.nll).double().mean())
    bias = divergence(final_mean.clamp(min=1e-300).log(), (tally.mean / len(kl)).clamp(min=1e-300).log())
    row: dict[str, Any] = {"lens": name, "layer": layer, "name": layer_name(layer), "n": len(kl)}
    row |= {"kl": float(kl.mean()), "low": float(low), "high": float(high), "nll": nll}
    row |= {"perplexity": float(np.exp(min(nll, 700.0))), "agree": float(torch.cat(tally.agree).double().mean())}
    return row | {"bias": float(bias)}
