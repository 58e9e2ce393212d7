"""IRepair: a fault is repaired where it is felt, by training at every step the few blocks most sensitive to it.

Each step: (1) the repair loss is propagated through all blocks; (2) block l has the sensitivity

    s_l = || g_l || / sqrt(n_l)        g_l its gradient, n_l its size

(`raw`: not divided; `neutral`: less the same of plain text; `ratio`, ours: over the same of plain text, for the first
block has large gradients whatever is read); (3) the k most sensitive blocks stay, the others' gradients are dropped:
they are not moved, nor is their share of the optimizer's state; (4) to theirs is added that of lambda
KL(reference || model) on plain text. Embeddings, the output layer and the final norm never change. `fixed` chooses
once, at the first step; `random` draws; `all` is fine-tuning.

"IRepair: An Intent-Aware Approach to Repair Data-Driven Errors in Large Language Models", arXiv 2502.07072.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vesalius.change.edit import Edit, recording
from vesalius.change.faults import Fault, Faults, Repairing, RepairPlan
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.train.learning import Tell, learn
from vesalius.train.plugs import Plug
from vesalius.train.select import choose

TINY = 1e-30


class Choosing(Plug):
    """Keeps the gradients of the most sensitive blocks, and adds the divergence's.

    Args:
        model: trained. reference: as it was. text: rows of plain text, (row, pos). plan: how.

    Attributes:
        rows: one a step and block: step, layer, sensitivity, chosen.
    """

    def __init__(self, model: Model, reference: nn.Module | None, text: Tensor, plan: RepairPlan) -> None:
        self.model, self.reference, self.text, self.plan = model, reference, text, plan
        self.blocks = [list(b.module.parameters()) for b in model.anatomy.main.blocks]
        self.rows: list[dict[str, Any]] = []
        self._first: list[int] | None = None
        if plan.k > len(self.blocks):
            raise VesaliusError(f"k={plan.k} blocks of {len(self.blocks)} cannot be chosen; give fewer")

    def ready(self, step: int) -> None:
        """Measures, chooses, drops, and pulls towards the reference."""
        sizes = self._norms([[p.grad for p in block] for block in self.blocks])
        if self.plan.size in ("neutral", "ratio"):
            plain = self._norms(self._neutral(step))
            sizes = sizes - plain if self.plan.size == "neutral" else sizes / np.maximum(plain, TINY)
        chosen = self._choice(sizes, step)
        for layer, block in enumerate(self.blocks):
            self.rows.append(
                {"step": step, "layer": layer, "sensitivity": float(sizes[layer]), "chosen": layer in chosen}
            )
            for p in block if layer not in chosen else ():
                p.grad = None
        if self.plan.keep and self.reference is not None:
            self._pull(step, chosen)

    def _norms(self, grads: Sequence[Sequence[Tensor | None]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = []
        for every in grads:
            square = sum(float(g.double().square().sum()) for g in every if g is not None)
            numbers = sum(g.numel() for g in every if g is not None)
            found.append(np.sqrt(square / (1 if self.plan.size == "raw" else max(numbers, 1))))
        return np.array(found)

    def _choice(self, sizes: np.ndarray[Any, np.dtype[np.float64]], step: int) -> list[int]:
        k, n = self.plan.k, len(self.blocks)
        if self.plan.how == "all":
            return list(range(n))
        if self.plan.how == "random":
            drawn = np.random.default_rng([self.plan.seed, step, *b"blocks"])
            return sorted(drawn.choice(n, k, replace=False).tolist())
        best = sorted(np.argsort(-sizes, kind="stable")[:k].tolist())
        if self.plan.how == "fixed":
            self._first = self._first or best
            return self._first
        return best

    def _some(self, step: int) -> Tensor:
        drawn = np.random.default_rng([self.plan.seed, step, *b"plain text"])
        n = min(self.plan.rows, len(self.text))
        return self.text[torch.from_numpy(drawn.choice(len(self.text), n, replace=False))].to(self.model.device)

    def _neutral(self, step: int) -> list[list[Tensor | None]]:
        """Gradients of the loss on plain text, by block; the repair's are kept."""
        ids = self._some(step)
        logits = self.model.hf(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        flat = [p for block in self.blocks for p in block]
        found = iter(torch.autograd.grad(loss, flat, allow_unused=True))
        return [[next(found) for _ in block] for block in self.blocks]

    def _pull(self, step: int, chosen: Sequence[int]) -> None:
        """Adds the gradient of lambda KL(reference || model) to the chosen blocks'."""
        assert self.reference is not None
        ids = self._some(step)
        for layer, block in enumerate(self.blocks):
            for p in block:
                p.requires_grad_(layer in chosen)
        try:
            with torch.no_grad():
                was = self.reference(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            now = self.model.hf(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            each = (was.exp() * (was - now)).sum(-1)
            (self.plan.keep * each.mean()).backward()
        finally:
            for block in self.blocks:
                for p in block:
                    p.requires_grad_(True)


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        edit: recorded. log: one row a step. choices: one row a step and block. left_out: examples the loss cannot use.
    """

    edit: Edit
    log: pd.DataFrame
    choices: pd.DataFrame
    left_out: int

    def by_block(self) -> pd.DataFrame:
        """One row a block: times chosen, mean sensitivity, and its share of all (the error density)."""
        found = self.choices.groupby("layer", as_index=False).agg(
            chosen=("chosen", "sum"), sensitivity=("sensitivity", "mean")
        )
        positive = found["sensitivity"].clip(lower=0)
        return found.assign(share=positive / max(float(positive.sum()), 1e-30))


def repair(
    model: Model, faults: Sequence[Fault], text: Tensor, plan: RepairPlan, tell: Tell = lambda what, share: None
) -> Repaired:
    """Repairs a model in place.

    Args:
        model: causal. faults: examples. text: rows of plain text (row, pos) that must not move. plan: how.

    Raises:
        VesaliusError: if no example fits the loss, or k is more than there are blocks.
    """
    source = Faults(model, faults, plan)
    reference = None
    if plan.keep or plan.loss == "dpo":
        reference = model.copied().hf
    with recording(model, "repair") as recorder:
        only = [f"L{i}" for i in range(model.n_layers)]
        choose(model.hf, only=only)
        plug = Choosing(model, reference, text, plan)
        recorder.touch([n for n, p in model.hf.named_parameters() if p.requires_grad], "a chosen block")
        log = learn(model, source, Repairing(plan, reference), plan.steps, plan.lr, plan.seed, [plug], tell)
    return Repaired(recorder.edit, log, pd.DataFrame(plug.rows), source.left_out)
