"""Muon for hidden matrices, AdamW for the rest: torch's own two, as one optimizer.

Jordan 2024, kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from vesalius.errors import VesaliusError


class MuonAdamW(Optimizer):
    """torch's Muon on the matrices of groups with `project=True`, its AdamW on everything else.

    Args:
        params: groups; those with `project=True` hold matrices of two axes alone.
        lr: of both; Muon's steps are scaled to AdamW's size (`match_rms_adamw`).
        momentum: Muon's.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: decoupled, of both.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise VesaliusError(f"torch {torch.__version__} has no Muon; install torch 2.9 or newer")
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "project": False})
        self._link()

    def _link(self) -> None:
        """Gives both halves their groups, and the one state."""
        self._halves: list[Optimizer] = []
        muon = [g for g in self.param_groups if g["project"]]
        rest = [g for g in self.param_groups if not g["project"]]
        if muon:
            self._halves.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self._halves.append(torch.optim.AdamW(rest))
        for half in self._halves:
            half.state = self.state
        self.param_groups = [group for half in self._halves for group in half.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies, and what is loaded, come through here
        super().__setstate__(state)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for half in self._halves:
            half.step()
        return loss
