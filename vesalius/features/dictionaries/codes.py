"""Codes of heads: a circuit from ten prompts and no intervention (O'Neill & Bui 2024, arXiv 2405.12522).

One small sparse autoencoder reads the outputs of *all* heads, at one token, over prompts on which the task can be
solved (positives: the clean ones) and others on which it cannot (negatives: the corrupted ones). The code of a head on
a prompt is its strongest feature; a head that takes on codes on positives which it never shows on negatives does
something there:

    c = relu(W_e h + b_e)      loss = |h - W_d c - b_d|^2 + l1 |c|_1      code(prompt, head) = argmax_j c_j

Each head's vectors are first brought to one length on average, or late heads, which write most, would own the
dictionary. (They are not centred: what is left of a head that always writes the same would be noise, and noise has new
codes on every prompt.) A head with no feature on has the code -1, "dead", which never counts as new. Codes hang on the
seed, so several autoencoders are trained and scores are averaged. `activation_difference` is the plain baseline: how
far apart a head's outputs are on the two prompts of a pair.

How many features there are decides how fine codes are. With very many, every prompt has a code of its own in any head
that reads its words, and everything is new. The defaults (20 features, l1 .05, counted by prompts) are the best of
about 50 settings, by AUROC, on two planted models, whose circuit is known; the paper has 200 features, l1 .02 and
counts codes.

Negatives must differ in solvability alone. For `ioi` that is `corruption=abc` (three different names): with `swap`, the
default, both prompts can be solved, and only what differs between them is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.base import Context, resolve_positions, table
from vesalius.model import Model, Pairs, Site
from vesalius.model.hooks import Tap
from vesalius.parts import Part
from vesalius.scores import Scores

Of = Literal["z", "write"]
Count = Literal["examples", "codes", "share"]
FEWEST = 5  # positives and negatives: the least the paper tries
BATCH = 16
DEAD = -1


class Codes(NamedTuple):
    """The codes of all heads on all prompts.

    Attributes:
        parts: heads. positive, negative: (seed, example, head) codes, -1 where no feature is on.
        fvu: share of the variance that each autoencoder leaves unexplained, (seed,).
    """

    parts: list[Part]
    positive: NDArray[np.int64]
    negative: NDArray[np.int64]
    fvu: NDArray[np.float64]

    def scores(self, count: Count = "examples") -> NDArray[np.float64]:
        """(head, example): how a positive prompt adds to each head's score, whose mean it is; averaged over seeds.

        Args:
            count: `examples`, share of positive prompts whose code is on no negative one; `codes`, number of such codes
                (the paper's); `share`, their number among all codes the head was seen with.
        """
        if count not in get_args(Count):
            raise UnknownName("way to count codes", count, get_args(Count))
        seeds, n, heads = self.positive.shape
        out = np.zeros((heads, n))
        for s in range(seeds):
            for h in range(heads):
                mine, other = self.positive[s, :, h], {*self.negative[s, :, h].tolist(), DEAD}
                new = np.array([code not in other for code in mine.tolist()])
                if count == "examples":
                    out[h] += new
                    continue
                times = {code: int((mine == code).sum()) for code in set(mine.tolist())}
                each = np.array([n / times[code] for code in mine.tolist()])
                seen = len((set(mine.tolist()) | other) - {DEAD}) if count == "share" else 1
                out[h] += new * each / max(seen, 1)
        return out / seeds

    def to_frame(self) -> pd.DataFrame:
        """One row for each head and code of the first seed: part, code, positives, negatives, new."""
        rows = []
        for h, part in enumerate(self.parts):
            mine, other = self.positive[0, :, h], self.negative[0, :, h]
            for code in sorted(set(mine.tolist()) | set(other.tolist())):
                a, b = int((mine == code).sum()), int((other == code).sum())
                rows.append([str(part), code, a, b, bool(a and not b and code != DEAD)])
        return pd.DataFrame(rows, columns=["part", "code", "positives", "negatives", "new"])


def sae_codes(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    features: int = 20,
    l1: float = 0.05,
    steps: int = 200,
    seeds: int = 5,
    of: Of = "z",
    count: Count = "examples",
    position: str | None = None,
) -> Scores:
    """Heads with codes that are seen on clean prompts and never on corrupted ones.

    Args:
        features: of the autoencoder. l1: weight of its penalty. steps: of Adam, each over all prompts.
        seeds: autoencoders whose scores are averaged.
        of: `z`, a head's mix of values, or `write`, what it adds to the residual stream.
        count: what is counted (see `Codes.scores`).
        position: a named position of the task; the token that is read for the answer by default.

    Returns:
        Scores of heads from 0, higher where more is new; with the mean codes a head was seen with as column `codes`.

    Raises:
        VesaliusError: for fewer than five prompts.

    Example:
        >>> vesalius.find("sae-codes", model, vesalius.task("ioi", n=10, corruption="abc"))    # doctest: +SKIP
    """
    found = codes(
        model, pairs, features=features, l1=l1, steps=steps, seeds=seeds, of=of, position=position, context=context
    )
    both = np.concatenate([found.positive, found.negative], axis=1)  # (seed, example, head)
    seen = [[len(set(c.tolist()) - {DEAD}) for c in one.T] for one in both]
    made = table(found.parts, found.scores(count), unit="share of prompts" if count == "examples" else "codes")
    return Scores(
        made.parts,
        made.values,
        made.per_example,
        info={**made.info, "fvu": found.fvu.tolist(), "direction": "clean"},
        columns={"codes": np.mean(seen, axis=0)},
    )


def activation_difference(
    model: Model, pairs: Pairs, context: Context, *, of: Of = "z", scale: bool = True, position: str | None = None
) -> Scores:
    """How far a head's output on the clean prompt is from that on the corrupted one: the plain baseline of `sae-codes`.

    Args:
        of: `z` or `write`. scale: divide by the length the head's outputs have on average.
        position: a named position of the task; the token that is read for the answer by default.
    """
    rows = rows_of(pairs)
    places = places_of(pairs, position, rows)
    clean = head_vectors(model, pairs, "clean", of, places, rows, context)
    corrupted = head_vectors(model, pairs, "corrupted", of, places, rows, context)
    away = (clean - corrupted).norm(dim=-1).T.double().numpy()  # (head, example)
    if scale:
        # The length on these two prompts alone, so that a prompt's score does not hang on its company.
        away = away / ((clean.norm(dim=-1) + corrupted.norm(dim=-1)).T.double().numpy() / 2 + 1e-12)
    return table(heads_of(model), away, unit="share of length" if scale else "length", direction="clean")


def codes(
    model: Model,
    pairs: Pairs,
    *,
    features: int = 20,
    l1: float = 0.05,
    steps: int = 200,
    seeds: int = 5,
    of: Of = "z",
    position: str | None = None,
    context: Context | None = None,
) -> Codes:
    """The codes themselves; arguments as of `sae_codes`."""
    context = context or Context()
    rows = rows_of(pairs)
    if len(rows) < FEWEST:
        few = len(rows)
        raise VesaliusError(f"{few} prompts are too few to tell new codes from chance; give {FEWEST} or more (--n)")
    for name, value in (("features", features), ("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise VesaliusError(f"{name} is {value}; give 1 or more")
    places = places_of(pairs, position, rows)
    clean = head_vectors(model, pairs, "clean", of, places, rows, context)
    corrupted = head_vectors(model, pairs, "corrupted", of, places, rows, context)
    return codes_of(
        heads_of(model), clean, corrupted, features=features, l1=l1, steps=steps, seeds=range(seeds), seed=context.seed
    )


def codes_of(
    parts: list[Part],
    clean: Tensor,
    corrupted: Tensor,
    *,
    features: int = 20,
    l1: float = 0.05,
    steps: int = 200,
    seeds: Sequence[int] = range(5),
    seed: int = 0,
) -> Codes:
    """Codes from vectors (example, head, d) of positives and negatives."""
    if not 0 <= l1 < math.inf:
        raise VesaliusError(f"l1 {l1:g} is no weight of a penalty; give 0 or more")
    n = len(clean)
    h = standardised(torch.cat([clean, corrupted]))  # (example, head, d)
    flat = h.flatten(0, 1)
    positive, negative, fvu = [], [], []
    for number in seeds:
        drawn = torch.Generator().manual_seed(1000 * seed + number)
        found, left = _strongest(flat, features, l1, steps, drawn)
        found = found.view(len(h), -1)
        positive.append(found[:n].numpy())
        negative.append(found[n:].numpy())
        fvu.append(left)
    return Codes(parts, np.stack(positive), np.stack(negative), np.array(fvu))


def standardised(x: Tensor) -> Tensor:
    """Vectors (example, head, d) with every head's mean length set to 1 (those of a silent head to 0)."""
    length = x.float().norm(dim=-1).mean(0)  # (head,)
    scaled = x.float() / length[:, None].clamp(min=1e-12)
    return torch.where(length[:, None] > 1e-6 * length.max(), scaled, torch.zeros_like(scaled))


def _strongest(x: Tensor, features: int, l1: float, steps: int, drawn: torch.Generator) -> tuple[Tensor, float]:
    """Trains the autoencoder on vectors (vector, d); each one's strongest feature (-1 for none), and the FVU."""
    d = x.shape[1]
    with torch.enable_grad():
        decoder = torch.nn.functional.normalize(torch.randn(features, d, generator=drawn), dim=-1)
        weights = [decoder.T.clone(), torch.zeros(features), decoder.clone(), torch.zeros(d)]
        for w in weights:
            w.requires_grad_()
        encode, bias, decode, offset = weights
        optimizer = torch.optim.Adam(weights, lr=1e-2)
        for _ in range(steps):
            c = torch.relu(x @ encode + bias)
            loss = (x - c @ decode - offset).pow(2).sum(-1).mean() + l1 * c.sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # or the penalty is evaded by long decoder rows
                decode.copy_(torch.nn.functional.normalize(decode, dim=-1))
    with torch.no_grad():
        c = torch.relu(x @ encode + bias)
        value, which = c.max(-1)
        total = float((x - x.mean(0)).pow(2).sum())
        left = float((x - c @ decode - offset).pow(2).sum()) / total if total > 0 else float("nan")
        return torch.where(value > 0, which, torch.full_like(which, DEAD)), left


# -- what heads write


def heads_of(model: Model) -> list[Part]:
    """All heads, in the order of `head_vectors`."""
    return model.parts(("head",))


def rows_of(pairs: Pairs) -> Tensor:
    """The first row of every example: rows of one example share the prompt."""
    seen = pairs.row_example.tolist()
    return torch.tensor([seen.index(e) for e in range(pairs.n_examples)])


def places_of(pairs: Pairs, position: str | None, rows: Tensor) -> Tensor:
    """The position that is read in each example's row."""
    if position is None:
        return pairs.reads[rows, 0]
    found = resolve_positions(pairs, position)
    if found is None or len(found) != 1 or position == "each":
        raise VesaliusError(f"codes are read at one token; name one position, not '{position}'")
    place = found[0][1][rows]
    if bool((place < 0).any()):
        raise VesaliusError(f"{int((place < 0).sum())} prompts have no position '{position}'; name one they all have")
    return place


@torch.no_grad()
def head_vectors(
    model: Model,
    pairs: Pairs,
    side: Literal["clean", "corrupted"],
    of: Of,
    places: Tensor,
    rows: Tensor,
    context: Context | None = None,
) -> Tensor:
    """What every head has at one token of every example, (example, head, d_head or d_model), float32.

    The other stack of an encoder-decoder model is read at its last real token.
    """
    if of not in get_args(Of):
        raise UnknownName("output of a head", str(of), get_args(Of))
    ids = (pairs.clean if side == "clean" else pairs.corrupted)[rows]
    mask = pairs.mask[rows]
    decoder = None if pairs.decoder is None else pairs.decoder[rows]
    main = model.anatomy.main.prefix
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    blocks = [block for stack in model.anatomy.stacks.values() for block in stack.blocks]
    sites = [Site("z", block.layer, block.stack) for block in blocks]
    order = {site: i for i, site in enumerate(sites)}
    pieces = []
    for start in range(0, len(ids), BATCH):
        piece = slice(start, start + BATCH)
        got: dict[Site, Tensor] = {}

        def keep(x: Tensor, site: Site, piece: slice = piece, got: dict[Site, Tensor] = got) -> None:
            at = (places if site.stack == main else last)[piece].to(x.device)
            got[site] = x[torch.arange(len(x), device=x.device), at].float()

        taps: dict[Site, list[Tap]] = {s: [lambda x, s=s, keep=keep: keep(x, s)] for s in sites}  # type: ignore[misc]
        model.run(ids[piece], mask[piece], taps=taps, decoder=None if decoder is None else decoder[piece])
        found = [got[site] for site in sites]  # each (row, head, d_head)
        if of == "write":
            weights = [model.anatomy.head_out(blocks[order[site]]) for site in sites]
            found = [torch.einsum("rhd,hdm->rhm", z, w.to(z)) for z, w in zip(found, weights, strict=True)]
        pieces.append(torch.cat([f.cpu() for f in found], dim=1))
        if context is not None and context.progress is not None:
            context.progress(min(start + BATCH, len(ids)), len(ids))
    x = torch.cat(pieces)
    if not bool(torch.isfinite(x).all()):
        raise VesaliusError(
            f"{model.name} has NaN or infinity in its heads' outputs: its weights are damaged, or overflow"
        )
    return x
