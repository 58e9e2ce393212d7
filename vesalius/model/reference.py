"""Activations over a set of prompts, from which ablations take their means and their resamples.

Prompts are aligned by length: the mean at a position is over prompts of the same length. Lengths with fewer than
`FEW` prompts take the mean over all positions of all prompts instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model.hooks import Site
from vesalius.model.model import Model
from vesalius.model.pairs import Pairs
from vesalius.model.sweep import BATCH, trunk

FEW = 4


class Reference:
    """Recorded activations of one side of some pairs.

    Args:
        model: the model. pairs: the prompts. side: `clean` or `corrupted`. sites: what to record.
    """

    def __init__(self, model: Model, pairs: Pairs, side: str, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.acts: list[dict[Site, Tensor]] = []  # a row each, real positions only
        for group in pairs.batches(BATCH):
            ids = group.clean if side == "clean" else group.corrupted
            found = trunk(model, ids, group, self.sites).sites
            for row in range(group.n_rows):
                keep = group.mask[row].bool().to(model.device)
                self.acts.append({s: self._real(s, x[row], keep, group) for s, x in found.items()})

    @staticmethod
    def _real(site: Site, x: Tensor, keep: Tensor, pairs: Pairs) -> Tensor:
        return x if site.stack == "dec" and pairs.decoder is not None else x[keep]

    def _length(self, site: Site, row: int) -> int:
        return int(self.acts[row][site].shape[0])

    def means(self, pairs: Pairs) -> Mapping[Site, Tensor]:
        """Means laid out for these pairs, (row, pos, ...), zero at padding."""
        out: dict[Site, Tensor] = {}
        for site in self.sites:
            by_length: dict[int, list[Tensor]] = {}
            for row in range(len(self.acts)):
                by_length.setdefault(self._length(site, row), []).append(self.acts[row][site])
            overall = torch.cat([a[site] for a in self.acts]).mean(0)
            table = {
                n: torch.stack(x).mean(0) if len(x) >= FEW else overall.expand(n, *overall.shape)
                for n, x in by_length.items()
            }
            out[site] = self._lay(site, pairs, lambda n, _, t=table, o=overall: t.get(n, o.expand(n, *o.shape)))
        return out

    def resamples(self, pairs: Pairs, seed: int, offset: int = 0) -> Mapping[Site, Tensor]:
        """Activations of another prompt of the same length for each row, (row, pos, ...).

        Raises:
            VesaliusError: if a prompt is the only one of its length.
        """
        generator = torch.Generator().manual_seed(seed + 7919 * offset)
        donors: dict[int, list[int]] = {}
        any_site = self.sites[0]
        for row in range(len(self.acts)):
            donors.setdefault(self._length(any_site, row), []).append(row)
        chosen = []
        for row in range(pairs.n_rows):
            n = int(pairs.mask[row].sum())
            pool = [d for d in donors.get(n, []) if d != offset + row]
            if not pool:
                raise VesaliusError(
                    f"no other prompt has {n} tokens to resample from; use --ablation mean, or more prompts"
                )
            chosen.append(pool[int(torch.randint(len(pool), (1,), generator=generator))])
        return {s: self._lay(s, pairs, lambda _, row, s=s: self.acts[chosen[row]][s]) for s in self.sites}

    def _lay(self, site: Site, pairs: Pairs, pick: object) -> Tensor:
        """Rows of real positions as a padded tensor aligned with the pairs' columns."""
        rows = []
        for row in range(pairs.n_rows):
            if site.stack == "dec" and pairs.decoder is not None:
                rows.append(pick(pairs.decoder.shape[1], row))  # type: ignore[operator]
                continue
            keep = pairs.mask[row].bool()
            x = pick(int(keep.sum()), row)  # type: ignore[operator]
            full = x.new_zeros(pairs.length, *x.shape[1:])
            full[keep.to(x.device)] = x
            rows.append(full)
        return torch.stack(rows)
