"""What goes first: a score for every head and every MLP neuron, by name or from any finding in a run.

A ranking is a function `(model, rows, seed, progress) -> Scores` over heads and neurons; the lowest score goes first.
`from_run` makes one of any run's scores: parts it does not score stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import ModelError, VesaliusError
from vesalius.model import Model
from vesalius.model.weights import matrix
from vesalius.parts import Address, Part
from vesalius.registry import Registry
from vesalius.runs import Run
from vesalius.scores import Scores

Progress = Callable[[int, int], object]
Ranking = Callable[..., Scores]

RANKINGS: Registry[Ranking] = Registry("ranking")
RANKINGS.add(
    "amp", "vesalius.change.amp:amp", "how much a head writes, and how strongly a neuron fires", "arXiv 2504.21174"
)
RANKINGS.add(
    "amp-out", "vesalius.change.amp:amp_out", "as amp, a neuron's firing times the length of what it writes", "none"
)
RANKINGS.add("amp-reversed", "vesalius.change.amp:amp_reversed", "the opposite of amp, a control", "arXiv 2504.21174")
RANKINGS.add("magnitude", "vesalius.change.ranking:magnitude", "the length of a part's own weights", "Han et al. 2015")
RANKINGS.add("random", "vesalius.change.ranking:random_order", "drawn by chance, the baseline", "none")
RANKINGS.add(
    "relp",
    "vesalius.change.relevance:relp_text",
    "relevance to the next token of plain text, by relevance propagation",
    "Jafari et al. 2025, arXiv 2508.21258",
)


def scores_of(model: Model, heads: NDArray[np.float64], neurons: NDArray[np.float64], method: str) -> Scores:
    """A table from (block, head) and (block, neuron)."""
    parts: list[Address] = [Part("head", i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    parts += [Part("neuron", i, j) for i in range(model.n_layers) for j in range(model.d_mlp)]
    values = np.concatenate([heads.ravel(), neurons.ravel()])
    if not np.isfinite(values).all():
        raise ModelError(f"{method} gives numbers that are not finite for {model.name}; open it in float32")
    info = {"method": method, "model": model.name, "fingerprint": model.fingerprint, "unit": "", "n": 0}
    return Scores(parts, values, info=info)


def random_order(model: Model, rows: Tensor, seed: int = 0, progress: Progress | None = None) -> Scores:
    """Scores drawn evenly from 0 to 1."""
    rng = np.random.default_rng([seed, *b"prune"])
    sizes = [(model.n_layers, k) for k in (model.n_heads, model.d_mlp)]
    heads, neurons = (rng.random(s) for s in sizes)
    return scores_of(model, heads, neurons, "random")


@torch.no_grad()
def magnitude(model: Model, rows: Tensor, seed: int = 0, progress: Progress | None = None) -> Scores:
    """The norm of a head's W_Q, W_K, W_V and W_O together, and of a neuron's rows and columns."""
    a = model.anatomy
    heads, neurons = np.zeros((model.n_layers, model.n_heads)), np.zeros((model.n_layers, model.d_mlp))
    for layer, block in enumerate(a.main.blocks):
        sides = [a.head_in(block, "q")[0], a.head_in(block, "k")[0], a.head_in(block, "v")[0], a.head_out(block)]
        heads[layer] = torch.stack([s.float().flatten(1).square().sum(1) for s in sides]).sum(0).sqrt().cpu().numpy()
        total = matrix(block.down).float().square().sum(1)
        for module in a.mlp_readers(block):
            total = total + matrix(module).float().square().sum(0).view(-1, model.d_mlp).sum(0)
        neurons[layer] = total.sqrt().cpu().numpy()
    return scores_of(model, heads, neurons, "magnitude")


def from_run(model: Model, folder: str | Path) -> Scores:
    """The scores a run found, for this model.

    Raises:
        VesaliusError: if they are of another model, or score neither heads nor neurons.
    """
    run = Run.open(folder)
    found = run.scores()
    made_on = str(found.info.get("fingerprint", ""))
    if made_on and made_on not in (model.fingerprint, _as_found(model, run)):
        raise VesaliusError(
            f"{folder} is a finding about {found.info.get('model', 'another model')}, and {model.name} is another one "
            f"(fingerprints {made_on} and {model.fingerprint}); name a run made on {model.name}"
        )
    if not _of_kind(found, ("head", "neuron")):
        raise VesaliusError(f"{folder} scores neither heads nor neurons, so nothing can be taken out by it")
    return found


def _as_found(model: Model, run: Run) -> str:
    """The fingerprint of the model's files in the precision of the run; "" where that is the model's own."""
    from vesalius.model import open_model

    dtype = str(run.request.get("dtype") or "float32").removeprefix("torch.")
    if not model.origin or dtype == str(model.dtype).removeprefix("torch."):
        return ""
    return open_model(model.spec, dtype=dtype, device=str(model.device)).fingerprint


def _of_kind(scores: Scores, kinds: Sequence[str]) -> list[tuple[Part, float]]:
    pairs = zip(scores.parts, scores.values.tolist(), strict=True)
    return [(p.output, v) for p, v in pairs if isinstance(p, Part) and p.kind in kinds]


def by_part(scores: Scores) -> dict[Part, float]:
    """The score of each head and neuron; of one scored at several positions or sides, the sum."""
    found: dict[Part, float] = {}
    for part, value in _of_kind(scores, ("head", "neuron")):
        found[part] = found.get(part, 0.0) + value
    return found
