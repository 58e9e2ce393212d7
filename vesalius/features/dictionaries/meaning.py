"""What a feature stands for: the texts in which it fires most, and the tokens it makes likelier.

    logit effect = U (gain * (w - mean w))          the direct path from the feature's direction to the logits

with w what the feature's decoder row writes into the residual stream, the final norm's scale taken as 1 (so effects of
one feature compare, those of different sites do not), and the mean over the vocabulary taken off, which no probability
sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vesalius.features.dictionaries.places import writes
from vesalius.features.dictionaries.quality import fired
from vesalius.features.dictionaries.reading import Rows, Vectors, around, words_of
from vesalius.features.dictionaries.sae import SAE
from vesalius.model import Model


class Meaning(NamedTuple):
    """A feature.

    Attributes:
        number: which. density: share of tokens on which it fires. largest: its largest value.
        texts: value, before, token, after, row, position: where it fires most, the largest first, one of a row.
        tokens: token, value, count: mean value on each token it fires on, the commonest first.
        up, down: (token, effect): what it makes likelier and less likely; empty where the path is not linear.
    """

    number: int
    density: float
    largest: float
    texts: pd.DataFrame
    tokens: pd.DataFrame
    up: list[tuple[str, float]]
    down: list[tuple[str, float]]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        tables = {"texts": self.texts.to_dict("records"), "tokens": self.tokens.to_dict("records")}
        return {**self._asdict(), **tables}


@torch.no_grad()
def meanings(
    model: Model, sae: SAE, features: Sequence[int], rows: Rows, found: Vectors, *, shown: int = 8
) -> list[Meaning]:
    """What some features stand for, from vectors that were read at the SAE's site.

    Args:
        features: their numbers. rows, found: text and what `gather` read of it. shown: texts and tokens of each.
    """
    numbers = [sae.feature(int(n)) for n in features]
    values = fired(sae, found, numbers)  # (token, feature)
    made = []
    for column, number in enumerate(numbers):
        mine = values[:, column].numpy()
        effects = logit_effects(model, sae, number)
        up, down = ([], []) if effects is None else _extremes(model, effects, shown)
        made.append(
            Meaning(
                number,
                float((mine > 0).mean()),
                float(mine.max()),
                _texts(model, mine, rows, found, shown),
                _tokens(model, mine, rows, found, shown),
                up,
                down,
            )
        )
    return made


def _texts(model: Model, values: Any, rows: Rows, found: Vectors, shown: int) -> pd.DataFrame:
    out: list[dict[str, Any]] = []
    seen: set[int] = set()
    for at in np.argsort(-values, kind="stable"):
        row, place = int(found.row[at]), int(found.position[at])
        if values[at] <= 0 or len(out) == shown:
            break
        if row in seen:
            continue
        seen.add(row)
        ids = rows.ids[row].tolist()
        out.append({"value": float(values[at]), **around(model, ids, place), "row": row, "position": place})
    return pd.DataFrame(out, columns=["value", "before", "token", "after", "row", "position"])


def _tokens(model: Model, values: Any, rows: Rows, found: Vectors, shown: int) -> pd.DataFrame:
    where = np.flatnonzero(values > 0)
    ids = [int(rows.ids[found.row[i]][found.position[i]]) for i in where]
    table = pd.DataFrame({"id": ids, "value": values[where]}).groupby("id")["value"].agg(["mean", "count"])
    table = table.sort_values("count", ascending=False, kind="stable").head(shown)
    return pd.DataFrame(
        {
            "token": words_of(model, list(table.index)),
            "value": table["mean"].to_numpy(),
            "count": table["count"].to_numpy(),
        }
    )


def logit_effects(model: Model, sae: SAE, number: int) -> Tensor | None:
    """What one unit of a feature adds to every logit by the direct path, (vocabulary,), mean taken off.

    None where there is no such linear path: an encoder without a head, a soft-capped or deeper head, a normed write.
    """
    written = writes(model, sae.site, sae.W_dec[number].to(model.device))
    unembedding = model.unembedding if model.anatomy.main.head else None
    if written is None or unembedding is None or sae.site.stack not in ("", model.anatomy.main.prefix):
        return None
    norm = model.anatomy.main.final_norm
    if norm is not None:
        written = norm.linear(written.float(), torch.ones(1, device=written.device))
    effects = torch.nn.functional.linear(model.stem(written.to(unembedding.weight)), unembedding.weight).float().cpu()
    return effects - effects.mean()


def _extremes(model: Model, effects: Tensor, shown: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    def named(order: Tensor) -> list[tuple[str, float]]:
        return list(zip(words_of(model, order.tolist()), effects[order].tolist(), strict=True))

    shown = min(shown, len(effects))
    return named(effects.topk(shown).indices), named((-effects).topk(shown).indices)
