"""What a dictionary is worth: how much of the activations it explains, by how few features, and what the model loses.

    FVU = sum |x - x^|^2 / sum |x - mean|^2                explained = 1 - FVU
    L0 = features that are not 0, mean over tokens         dead = share of features that fire on no token at all
    recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean)

CE is the model's mean loss on the next token, nats, with the site as it is, replaced by the reconstruction (no error
term), by zero, or by the mean over tokens. Zero ablation of the residual stream destroys the model, so it flatters
every dictionary; the mean is the harder judge, and both stand here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.features.dictionaries import splice
from vesalius.features.dictionaries.places import flat, shaped
from vesalius.features.dictionaries.reading import Rows, Tell, Vectors, gather, silent
from vesalius.features.dictionaries.sae import SAE
from vesalius.model import Model
from vesalius.model.hooks import Tap

CHUNK = 2048  # tokens encoded at once
DRAWS = 1000
LEAST = 0.01  # nats that an ablation must cost


class Quality(NamedTuple):
    """What `quality` found.

    Attributes:
        numbers: fvu, explained, cosine, l0, dead, tokens; and where the model foretells next tokens ce_clean,
            ce_spliced, ce_zero, ce_mean, recovered_zero, recovered_mean, each recovered with "mean", "low" and "high"
            (None where the ablation costs the model nothing).
        rows: the losses of every row of text.
        density: share of tokens on which each feature fires, (feature,). largest: its largest value, (feature,).
    """

    numbers: dict[str, Any]
    rows: pd.DataFrame
    density: NDArray[np.float64]
    largest: NDArray[np.float32]


@torch.no_grad()
def quality(
    model: Model, sae: SAE, rows: Rows, *, force: bool = False, memory_gb: float = 2.0, tell: Tell = silent
) -> Quality:
    """Judges an SAE on text it was not trained on.

    Args:
        model: its own. rows: from `corpus_rows` or `prompt_rows`.
        force: judge it on another model of the same width.

    Example:
        >>> quality(model, sae, corpus_rows(model, ["foldoc"], 1, held_out_tokens=8000).held_out)   # doctest: +SKIP
    """
    sae.check(model, force)
    found = gather(model, sae.site, rows, memory_gb=memory_gb, tell=tell)
    numbers, density, largest = explained(sae, found.x)
    table = pd.DataFrame()
    if model.kind == "causal":
        table = losses(model, sae, rows, found.x.mean(0), tell)
        numbers |= recovered(table)
    return Quality(numbers, table, density, largest)


def explained(sae: SAE, x: Tensor) -> tuple[dict[str, Any], NDArray[np.float64], NDArray[np.float32]]:
    """Reconstruction of vectors (token, d), how dense each feature is, and its largest value."""
    mean = x.double().mean(0)
    fires = torch.zeros(sae.d_sae, dtype=torch.float64)
    largest = torch.zeros(sae.d_sae)
    missed = total = cosine = 0.0
    for piece in x.split(CHUNK):
        features = sae.encode(piece.to(sae.W_enc.device))
        made = sae.decode(features).cpu()
        fires += (features > 0).sum(0).double().cpu()
        largest = torch.maximum(largest, features.amax(0).cpu())
        missed += float((piece - made).double().pow(2).sum())
        total += float((piece.double() - mean).pow(2).sum())
        cosine += float(torch.cosine_similarity(piece, made, dim=-1).double().sum())
    n = len(x)
    fvu = missed / total if total > 0 else float("nan")
    numbers = {
        "tokens": n,
        "fvu": fvu,
        "explained": 1 - fvu,
        "cosine": cosine / n,
        "l0": float(fires.sum()) / n,
        "dead": float((fires == 0).double().mean()),
    }
    return numbers, (fires / n).numpy(), largest.numpy()


def losses(model: Model, sae: SAE, rows: Rows, mean: Tensor, tell: Tell = silent) -> pd.DataFrame:
    """Mean next-token loss of every row: as it is, spliced, zero- and mean-ablated at the SAE's site."""

    def put(value: Tensor) -> Tap:
        def ablate(activation: Tensor) -> Tensor:
            x = flat(activation, sae.site).clone()
            x[:, rows.skip :] = value.to(x)
            return shaped(x, activation)

        return ablate

    ways: dict[str, dict[Any, list[Tap]] | None] = {
        "clean": None,
        "spliced": splice.taps(sae, error=False, skip=rows.skip),
        "zero": {sae.site: [put(torch.zeros(sae.d_in))]},
        "mean": {sae.site: [put(mean)]},
    }
    out: dict[str, list[float]] = {name: [] for name in ways}
    tokens: list[int] = []
    done = 0
    with model.alone():
        for numbers, ids, mask in rows.batches(1024):
            for name, taps in ways.items():
                logits = model.run(ids, mask, taps=taps).logits
                assert logits is not None
                out[name] += _row_losses(logits, ids, mask, rows.skip)
            tokens += [int(mask[i].sum()) - rows.skip - 1 for i in range(len(numbers))]
            done += len(numbers)
            tell(f"loss with the dictionary in place, {done} of {len(rows.ids)} rows", done / len(rows.ids))
    return pd.DataFrame({"tokens": tokens, **out})


def _row_losses(logits: Tensor, ids: Tensor, mask: Tensor, skip: int) -> list[float]:
    targets, seen = ids[:, skip + 1 :].to(logits.device), mask[:, skip + 1 :].to(logits.device)
    nll = torch.nn.functional.cross_entropy(
        logits[:, skip:-1].float().transpose(1, 2), targets, reduction="none"
    )  # (row, pos)
    found: list[float] = ((nll * seen).sum(1) / seen.sum(1).clamp(min=1)).tolist()
    return found


def recovered(table: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """Mean losses over tokens, and the share of the loss that the dictionary wins back, with bootstrap over rows."""
    weights = table["tokens"].to_numpy(float)
    names = ["clean", "spliced", "zero", "mean"]
    values = table[names].to_numpy(float)  # (row, way)
    drawn = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), size=DRAWS)
    means = (drawn * weights) @ values / (drawn @ weights)[:, None]  # (draw, way)
    whole = weights @ values / weights.sum()
    found: dict[str, Any] = {f"ce_{n}": float(v) for n, v in zip(names, whole, strict=True)}
    for way, at in (("zero", 2), ("mean", 3)):
        if whole[at] - whole[0] < LEAST:  # nothing is lost, so nothing can be won back
            found[f"recovered_{way}"] = {"mean": None, "low": None, "high": None}
            continue
        share = (means[:, at] - means[:, 1]) / (means[:, at] - means[:, 0])
        low, high = np.quantile(share, [0.025, 0.975])
        point = (whole[at] - whole[1]) / (whole[at] - whole[0])
        found[f"recovered_{way}"] = {"mean": float(point), "low": float(low), "high": float(high)}
    return found


def fired(sae: SAE, found: Vectors, features: list[int]) -> Tensor:
    """Values of some features on all tokens, (token, feature)."""
    return torch.cat([sae.encode(piece.to(sae.W_enc.device))[:, features].cpu() for piece in found.x.split(CHUNK)])
