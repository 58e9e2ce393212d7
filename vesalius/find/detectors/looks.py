"""Where heads look: attention summed over chosen query-key pairs, and over what chance would have chosen instead.

A `Look` lists the pairs that one kind of head attends, and for each of them, a number of draws of what stands for it
under the null: another key of the same query ("random keys"), or the same two places in another prompt, whose tokens
do not match there ("shuffled prompts"). One forward pass serves any number of looks; patterns are read block by block
and none is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap
from vesalius.model.memory import memory_errors
from vesalius.parts import Part

NULL_DRAWS = 64


class Look(NamedTuple):
    """Query-key pairs whose attention is summed, with weights that sum to 1 over the queries of a row."""

    rows: Tensor
    queries: Tensor
    keys: Tensor
    weights: Tensor
    other_rows: Tensor  # what stands for the pair under the null, (pair, draw): a prompt ...
    other_keys: Tensor  # ... and a key in it, for the same query
    present: Tensor  # (row,): the row has such a query

    @classmethod
    def of(
        cls, wanted: Tensor, allowed: Tensor | None = None, rng: torch.Generator | None = None, draws: int = NULL_DRAWS
    ) -> Look:
        """From the wanted pairs and the keys that random ones are drawn from, both (row, query, key).

        Without `allowed` the null is the pair itself, until `in_prompts` says otherwise.
        """
        rows, queries, keys = wanted.nonzero(as_tuple=True)
        asking = wanted.any(-1)  # (row, query)
        weights = (1.0 / asking.sum(-1).clamp(min=1))[rows]
        other = keys[:, None]
        if allowed is not None:
            pool = allowed[rows, queries]
            usable = pool.any(-1)
            rows, queries, keys, weights, pool = (x[usable] for x in (rows, queries, keys, weights, pool))
            other = torch.zeros(len(rows), draws, dtype=torch.long)
            if len(rows):
                other = torch.multinomial(pool.float(), draws, replacement=True, generator=rng)
        present = torch.zeros(wanted.shape[0], dtype=torch.bool)
        present[rows] = True
        return cls(rows, queries, keys, weights, rows[:, None].expand_as(other), other, present)

    def in_prompts(self, others: Tensor) -> Look:
        """The same, its null the same places in other prompts: `others` (row, draw) names them."""
        prompts = others[self.rows]  # (pair, draw)
        return self._replace(other_rows=prompts, other_keys=self.keys[:, None].expand_as(prompts))


class Attended(NamedTuple):
    """What every head attends to.

    Attributes:
        heads: in model order; blocks without an attention pattern have none.
        score: for each look, over its rows, (head, row), NaN for a row without such a query.
        chance: for each look, (head, row, draw).
        logits: (row, pos, vocabulary), if they were asked for.
    """

    heads: list[Part]
    score: dict[str, Tensor]
    chance: dict[str, Tensor]
    logits: Tensor | None = None


def require_causal(model: Model, what: str) -> None:
    """Refuses models in which no token is read from the ones before it alone."""
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind}; {what} follow causal language models")


def attend(
    model: Model,
    ids: Tensor,
    mask: Tensor | None,
    looks: Mapping[str, Look],
    *,
    logits: bool = False,
    chance: bool = True,
) -> Attended:
    """Sums every head's attention over each look, in one forward pass.

    Args:
        ids, mask: (row, pos). looks: by name, over these rows or the first of them.
        logits: run the unembedding too. chance: also sum what the looks' nulls attend to.

    Raises:
        VesaliusError: if no block of the model has an attention pattern.
    """
    prefix = model.anatomy.main.prefix
    score: dict[str, dict[int, Tensor]] = {name: {} for name in looks}
    null: dict[str, dict[int, Tensor]] = {name: {} for name in looks}

    def read(layer: int) -> Tap:
        def tap(pattern: Tensor) -> None:
            x = pattern.float().cpu()  # (row, head, query, key)
            for name, look in looks.items():
                at = x[look.rows, :, look.queries, look.keys] * look.weights[:, None]  # (pair, head)
                score[name][layer] = by_row(at, look).T
                if chance:
                    there = x[look.other_rows, :, look.queries[:, None], look.other_keys]  # (pair, draw, head)
                    null[name][layer] = by_row(there * look.weights[:, None, None], look).permute(2, 0, 1)

        return tap

    taps: dict[Site, Sequence[Tap]] = {Site("pattern", n, prefix): [read(n)] for n in range(model.n_layers)}
    found = None
    if logits:
        found = model.run(ids, mask, taps=taps).logits
    else:
        run(model, ids, mask, taps)
    seen = sorted(next(iter(score.values()), {}))
    heads = _heads_of(model, seen)
    return Attended(
        heads,
        {name: torch.cat([by[n] for n in seen]) for name, by in score.items()},
        {name: torch.cat([by[n] for n in seen]) for name, by in null.items() if chance},
        found,
    )


def heads_with_patterns(model: Model) -> tuple[list[Part], list[int]]:
    """The heads that have an attention pattern, and their blocks; a model may have other mixers in some blocks.

    Raises:
        VesaliusError: if there are none.
    """
    seen = set[int]()
    taps: dict[Site, Sequence[Tap]] = {
        Site("pattern", n, model.anatomy.main.prefix): [lambda x, n=n: seen.add(n)]  # type: ignore[misc]
        for n in range(model.n_layers)
    }
    run(model, torch.zeros(1, 2, dtype=torch.long), None, taps)
    return _heads_of(model, sorted(seen)), sorted(seen)


def _heads_of(model: Model, layers: Sequence[int]) -> list[Part]:
    if not layers:
        raise VesaliusError(f"no block of {model.name} has an attention pattern; head detectors need attention heads")
    return [p for p in model.parts(("head",)) if p.layer in layers and p.stack == model.anatomy.main.prefix]


def run(model: Model, ids: Tensor, mask: Tensor | None, taps: Mapping[Site, Sequence[Tap]]) -> None:
    """A forward pass without the unembedding, for its taps."""
    with torch.no_grad(), memory_errors(), Hooks(model.hf, model.anatomy, taps):
        model.hf.base_model(**model.inputs(ids, mask))


def by_row(values: Tensor, look: Look) -> Tensor:
    """Sums pairs of one row, (pair, ...) -> (row, ...); NaN where a row has none."""
    out = torch.zeros(len(look.present), *values.shape[1:])
    out.index_add_(0, look.rows, values)
    out[~look.present] = float("nan")
    return out


def joined(pieces: Sequence[Attended]) -> Attended:
    """Several batches as one."""
    first = pieces[0]
    return Attended(
        first.heads,
        {name: torch.cat([p.score[name] for p in pieces], dim=1) for name in first.score},
        {name: torch.cat([p.chance[name] for p in pieces], dim=1) for name in first.chance},
    )
