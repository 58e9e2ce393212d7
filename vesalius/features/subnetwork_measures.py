"""What a subnetwork does: surprisals against the bigram table, ablations against random masks, the turn of states.

    r        Pearson correlation over held-out tokens of -log p(next), of a variant and of the table
    kl       mean KL(bigram row || variant), nats a token
    nll      mean -log p(next), nats a token

The turn: at each layer, how alike states are to the embedding of the token just read, and to the last layer's state,
from which the next one is said. Alike is linear CKA, |X'Y|^2 / (|X'X| |Y'Y|) of centred states (Kornblith et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vesalius.corpus.batches import Source
from vesalius.corpus.bigrams import BigramTable
from vesalius.features.sparsify import WeightMask
from vesalius.model import Model
from vesalius.model.hooks import Site
from vesalius.train.objectives.base import IGNORED
from vesalius.train.objectives.causal import next_tokens


def variants(
    model: Model,
    mask: WeightMask,
    table: BigramTable,
    source: Source,
    batches: int,
    controls: int = 3,
    seed: int = 0,
    tell: Callable[[str, float | None], None] = lambda text, share: None,
) -> pd.DataFrame:
    """The model under several masks, on the same held-out tokens.

    Returns:
        variant, seed, kept, r, kl, nll, n. Variants: model, subnetwork, no matrices, random (same counts in each
        matrix), without it (the subnetwork's weights taken out), without random.
    """
    nothing = WeightMask(mask.fingerprint, {n: np.zeros_like(k) for n, k in mask.kept.items()})
    cases: list[tuple[str, int, WeightMask | None]] = [("model", 0, None), ("subnetwork", 0, mask)]
    cases += [("no matrices", 0, nothing), ("without it", 0, ~mask)]
    for i in range(controls):
        drawn = mask.like(seed + i)
        cases += [("random", i, drawn), ("without random", i, ~drawn)]
    rows = []
    for number, (name, which, chosen) in enumerate(cases):
        tell(f"held-out text: {name}", number / len(cases))
        context: AbstractContextManager[None] = nullcontext() if chosen is None else chosen.applied(model)
        with context:
            found = [_numbers(logits, ids, aims, table) for ids, aims, logits in _read(model, source, batches)]
        ours, theirs, kl = (np.concatenate(x) for x in zip(*found, strict=True))
        kept = mask.total if chosen is None else chosen.size
        flat = ours.std() < 1e-9 or theirs.std() < 1e-9
        r = float("nan") if flat else float(np.corrcoef(ours, theirs)[0, 1])
        row = {"variant": name, "seed": which, "kept": kept, "r": r, "kl": float(kl.mean()), "nll": float(ours.mean())}
        rows.append({**row, "n": len(ours)})
    return pd.DataFrame(rows)


def means(found: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Of `variants`, by variant: r, kl and nll, averaged over controls."""
    grouped = found.groupby("variant")[["r", "kl", "nll"]].mean()
    return {str(name): {str(k): float(v) for k, v in row.items()} for name, row in grouped.T.to_dict().items()}


def _read(model: Model, source: Source, batches: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids (row, pos), next tokens (row, pos), logits, batch by batch."""
    for step in range(batches):
        batch = source.batch(step)
        whole = batch.mask is not None and not bool(
            (batch.segments < 0).any()
        )  # a task scores a part; all is read here
        aims = torch.from_numpy(batch.ids[:, 1:].copy() if whole else next_tokens(batch, by_document=False))
        ids = torch.from_numpy(batch.ids[:, :-1].copy())
        yield ids, aims, model.logits(ids)


def _numbers(logits: Tensor, ids: Tensor, aims: Tensor, table: BigramTable) -> tuple[np.ndarray, ...]:
    """Surprisals of the variant and of the table, and KL, (token,) each."""
    valid = aims != IGNORED
    log_q = logits[valid].float().log_softmax(-1).cpu()  # (token, vocabulary)
    current, following = ids[valid], aims[valid]
    ours = -log_q.gather(-1, following[:, None])[:, 0]
    theirs = -table.log_p(current.numpy(), following.numpy())
    words, kept, rest = table.rows(current.numpy())
    cross = -(log_q.gather(-1, words) * kept).sum(-1) - rest * (log_q @ torch.from_numpy(table.unigram).float())
    return ours.double().numpy(), theirs, cross.double().numpy() - table.entropy(current.numpy())


def turn(model: Model, mask: WeightMask, source: Source, batches: int = 4, most: int = 1024) -> pd.DataFrame:
    """How alike the states of each layer are to this token's embedding, and to the last state.

    Args:
        most: tokens read.

    Returns:
        variant (model, subnetwork), place, order, this_token, next_token.
    """
    sites = [Site("resid_pre", 0)]
    for layer in range(model.n_layers):
        sites += [] if model.anatomy.parallel else [Site("resid_mid", layer)]
        sites.append(Site("resid_post", layer))
    embedding = model.hf.get_input_embeddings().weight
    rows = []
    for name, context in (("model", nullcontext()), ("subnetwork", mask.applied(model))):
        states: dict[Site, list[Tensor]] = {s: [] for s in sites}
        tokens: list[Tensor] = []
        count = 0
        with context:
            for step in range(batches):
                ids = torch.from_numpy(source.batch(step).ids[:, :-1].copy())
                run = model.run(ids, capture=sites)
                for site in sites:
                    states[site].append(
                        run[site][:, 1:].flatten(0, 1).float().cpu()
                    )  # the first token is unlike others
                tokens.append(ids[:, 1:].flatten())
                count += len(tokens[-1])
                if count >= most:
                    break
        this = embedding[torch.cat(tokens).to(embedding.device)].float().cpu()
        last = torch.cat(states[sites[-1]])
        for order, site in enumerate(sites):
            x = torch.cat(states[site])
            place = "embed" if order == 0 else f"L{site.layer}.{site.name.removeprefix('resid_')}"
            rows.append(
                {
                    "variant": name,
                    "place": place,
                    "order": order,
                    "this_token": cka(x, this),
                    "next_token": cka(x, last),
                }
            )
    return pd.DataFrame(rows)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of states of the same tokens, (token, d) each; 0 where one does not vary.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(cka(x, 2 * x.flip(1) + 1), 6)
        1.0
    """
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).square().sum() / own) if own > 0 else 0.0
