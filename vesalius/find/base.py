"""The one door to every method: names, their parameters, and what each run is given.

A method is a function `(model, pairs, context, *, parameters...) -> Scores`. The types and defaults of its keyword
parameters are its schema: the command line, the docs and the checks below read them from the signature.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model, Pairs
from vesalius.model.sweep import Prefixed, Progress, Side, Store
from vesalius.parts import Address, Kind, Part
from vesalius.registry import Registry
from vesalius.scores import Scores

Level = Literal["node", "edge"]
Direction = Literal["denoise", "noise"]
DEFAULT_KINDS = ("head", "mlp")

METHODS: Registry[Callable[..., Scores]] = Registry("method")
METHODS.add(
    "direct",
    "vesalius.find.direct:direct",
    "each part's own contribution to the answer's logits, final norm frozen",
    "Elhage et al. 2021, transformer-circuits.pub/2021/framework; Wang et al. 2022, arXiv 2211.00593, sec. 3",
    levels=("node",),
)
METHODS.add(
    "activation-patching",
    "vesalius.find.patching:activation_patching",
    "exact effect of replacing each part by its counterfactual",
    "Vig et al. 2020, arXiv 2004.12265, eq. 5; Zhang & Nanda 2024, arXiv 2309.16042",
    levels=("node", "edge"),
)
METHODS.add(
    "path-patching",
    "vesalius.find.path_patching:path_patching",
    "exact effect of each head on chosen receivers, all other heads frozen",
    "Wang et al. 2022, arXiv 2211.00593, app. B; Goldowsky-Dill et al. 2023, arXiv 2304.05969",
    levels=("node",),
)
METHODS.add(
    "attribution-patching",
    "vesalius.find.attribution:attribution_patching",
    "first-order estimate of activation patching: one backward pass",
    "Nanda 2023, neelnanda.io/mechanistic-interpretability/attribution-patching; Kramár et al. 2024 (arXiv 2403.00745)",
    levels=("node", "edge"),
)
METHODS.add(
    "eap",
    "vesalius.find.attribution:eap",
    "edge attribution patching: the gradient on the clean run",
    "Syed et al. 2023, arXiv 2310.10348, eq. 4",
    levels=("node", "edge"),
)
METHODS.add(
    "eap-ig",
    "vesalius.find.attribution:eap_ig",
    "edge attribution patching with gradients integrated over the embeddings",
    "Hanna et al. 2024, arXiv 2403.17806, eq. 3",
    levels=("node", "edge"),
)
METHODS.add(
    "relp",
    "vesalius.find.attribution:relp",
    "relevance patching: attribution with layer-wise relevance coefficients",
    "Jafari et al. 2025, arXiv 2508.21258, eq. 5",
    levels=("node", "edge"),
)
METHODS.add(
    "acdc",
    "vesalius.find.acdc:acdc",
    "prunes edges one by one, from the logits back, while the output stays the same",
    "Conmy et al. 2023, arXiv 2304.14997, alg. 1",
    levels=("edge",),
)
METHODS.add(
    "sae-codes",
    "vesalius.features.dictionaries.codes:sae_codes",
    "heads with discrete codes seen on clean prompts and never on corrupted ones",
    "O'Neill & Bui 2024, arXiv 2405.12522",
    levels=("node",),
    together=True,
)
METHODS.add(
    "activation-difference",
    "vesalius.features.dictionaries.codes:activation_difference",
    "how far a head's output on the clean prompt is from that on the corrupted one, a baseline",
    "none",
    levels=("node",),
)


class PairsSource(Protocol):
    """A task: gives its prompts as tensors for one model, and describes itself."""

    name: str

    def pairs(self, model: Model) -> Pairs: ...


@dataclass(frozen=True)
class Context:
    """What every method run is given beside its parameters."""

    level: Level = "node"
    seed: int = 0
    memory_gb: float = DEFAULT_MEMORY_GB
    progress: Progress | None = None
    store: Store | None = None


def parameters(method: str) -> dict[str, inspect.Parameter]:
    """A method's own parameters with their defaults, by name."""
    signature = inspect.signature(METHODS.get(method))
    return {n: p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}


def find(
    method: str,
    model: Model,
    task: PairsSource | Pairs,
    *,
    level: Level = "node",
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    progress: Progress | None = None,
    store: Store | None = None,
    **options: Any,
) -> Scores:
    """Scores the parts (or edges) of a model on a task.

    Args:
        method: `direct`, `activation-patching`, `path-patching`, `attribution-patching`, `eap`, `eap-ig`, `relp`,
            `acdc`, `sae-codes` or `activation-difference`; plug-ins registered in `METHODS` too.
        model: from `vesalius.open`. task: from `vesalius.task` (or ready `Pairs`).
        level: score `node`s (heads, MLPs) or `edge`s.
        seed: for whatever the method draws. memory_gb: working memory, GiB.
        progress: called with (done, total). store: keeps finished pieces, so that a killed run goes on.
        **options: the method's own parameters.

    Returns:
        Scores, positive where a part helps the metric.

    Raises:
        UnknownName: for an unknown method or parameter. VesaliusError: if the method cannot score that level.

    Example:
        >>> scores = vesalius.find("relp", model, vesalius.task("ioi", n=32))   # doctest: +SKIP
        >>> scores.top(5)                                                         # doctest: +SKIP
    """
    function = METHODS.get(method)
    if level not in get_args(Level):
        raise UnknownName("level", level, get_args(Level))
    levels = METHODS.entry(method).info.get("levels", ("node",))
    if level not in levels:
        able = [e.name for e in METHODS if level in e.info.get("levels", ("node",))]
        raise VesaliusError(
            f"{method} scores {' and '.join(levels)}s, not {level}s; for {level}s use {', '.join(able)}"
        )
    known = parameters(method)
    for name in options:
        if name not in known:
            raise UnknownName(f"parameter of {method}", name, known)
    if not isinstance(model, Model):
        raise VesaliusError(f"a model is opened first: vesalius.open(...), not {str(model)[:60]!r}")
    pairs = pairs_of(task, model)
    if pairs.n_examples == 0:
        raise VesaliusError("there are no prompts to score on; give a task with n of at least 1")
    if bool((pairs.clean == pairs.corrupted).all()):
        raise VesaliusError("clean and corrupted prompts are the same: there is no effect to measure")
    chosen = {n: options.get(n, p.default) for n, p in known.items()}
    if store is not None:  # pieces of other prompts, weights or options may lie in the same store
        asked = repr((method, level, seed, sorted(chosen.items()), model.fingerprint, pairs.fingerprint))
        store = Prefixed(store, hashlib.sha256(asked.encode()).hexdigest()[:12] + ":")
    with model.alone(), torch.inference_mode(False):  # where the caller is in it, no gradient could be taken
        scores = function(model, pairs, Context(level, seed, memory_gb, progress, store), **options)
    scores.info.update(
        {
            "method": method,
            "level": level,
            "task": getattr(task, "name", "pairs"),
            "model": model.name,
            "fingerprint": model.fingerprint,
            "metric": pairs.metric.name,
            "unit": scores.info.get("unit", pairs.metric.unit),
            "n": pairs.n_examples,
            "prompts": pairs.prompts,
            "seed": seed,
            "options": {
                k: v for k, v in chosen.items() if isinstance(v, (str, int, float, bool, list, tuple, type(None)))
            },
        }
    )
    return scores


def pairs_of(task: Any, model: Model) -> Pairs:
    """The prompts of a task (or ready `Pairs`) for one model; a refusal for anything else."""
    if isinstance(task, Pairs):
        return task
    if not hasattr(task, "pairs"):
        raise VesaliusError(f"a task is made first: vesalius.task(...), not {str(task)[:60]!r}")
    found: Pairs = task.pairs(model)
    return found


def per_example(values: Tensor, pairs: Pairs) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sums rows of one example (the continuations of multi-token answers): (part, row) -> (part, example)."""
    out = torch.zeros(values.shape[0], pairs.n_examples, dtype=torch.float64)
    out.index_add_(1, pairs.row_example.cpu(), values.detach().double().cpu())
    return out.numpy()


def table(
    parts: Sequence[Address],
    values: np.ndarray[Any, np.dtype[np.float64]],
    positions: Sequence[str] | None = None,
    **info: Any,
) -> Scores:
    """Scores from per-example values (part, example)."""
    return Scores(parts, values.mean(axis=1), values, positions, info=info)


def base_side(direction: Direction) -> Side:
    """Whose run is intervened on: denoising patches clean into corrupted, noising corrupted into clean."""
    if direction not in ("denoise", "noise"):
        raise UnknownName("direction", direction, ("denoise", "noise"))
    return "corrupted" if direction == "denoise" else "clean"


def named_parts(model: Model, kinds: str) -> list[Part]:
    """Every part of these kinds (`head,mlp`), in forward order.

    Raises:
        UnknownName: for a word that is no kind of part. VesaliusError: if the model has none of these.
    """
    names = [k.strip() for k in kinds.split(",")]
    for name in names:
        if name not in get_args(Kind):
            raise UnknownName("kind of part", name, get_args(Kind))
    found = model.parts(names)
    if not found:
        raise VesaliusError(f"{model.name} has no part of kind {' or '.join(names)}")
    return found


def resolve_positions(pairs: Pairs, position: str | None) -> list[tuple[str, Tensor]] | None:
    """Which token positions to treat apart: None for all together, a name of the task's, or `each` token.

    Returns:
        (label, positions (row,)) for each, or None.
    """
    if position is None:
        return None
    if position == "each":
        if bool((pairs.mask == 0).any()):
            raise VesaliusError("position 'each' needs prompts of one length; name a position of the task instead")
        rows = pairs.n_rows
        return [(str(i), torch.full((rows,), i)) for i in range(pairs.length)]
    chosen = []
    for name in position.split(","):
        if name not in pairs.positions:
            raise UnknownName("position", name, [*pairs.positions, "each"])
        chosen.append((name, pairs.positions[name]))
    return chosen
