"""One head, closely: where in some prompts it writes most, what it attends to there, and what it makes of each token.

Prompts are the clean ones of every task that this vocabulary knows, and one of random tokens that come twice. Of each
prompt the position is taken at which the head writes most into the residual stream, the share of its attention that
rests on the first token left out: |write| (1 - attention to the first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vesalius.errors import PartError, TaskError
from vesalius.find.detectors.looks import run
from vesalius.find.detectors.ov import bearing, head_values
from vesalius.find.detectors.stimuli import repeated
from vesalius.model import Model, Site
from vesalius.model.hooks import Tap
from vesalius.parts import Part
from vesalius.tasks import TASKS, task

PROMPTS = 4  # of each task
EXAMPLES = 6
OF_A_TASK = 2
WORDS = 5  # raised most
TOKENS = 8  # whose value-output circuit is read


@dataclass(frozen=True)
class Example:
    """A head at one position of one prompt.

    Attributes:
        source: the task, or `random tokens`. tokens: of the prompt, as texts. query: the position.
        attention: from there to every token. write: size of what it writes. raised: tokens that this raises most.
    """

    source: str
    tokens: list[str]
    query: int
    attention: list[float]
    write: float
    raised: list[str]


@dataclass(frozen=True)
class Reading:
    """What a head's value-output circuit makes of one token: the tokens it raises most, and the token's own rank."""

    token: str
    raised: list[str]
    own_rank: int


@dataclass(frozen=True)
class Portrait:
    """The examples and readings of one head."""

    head: str
    examples: list[Example]
    readings: list[Reading]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def portraits(model: Model, heads: Sequence[Part], seed: int = 0) -> list[Portrait]:
    """A portrait of each head; all are taken from the same passes.

    Raises:
        PartError: for a part that is no head of the model's main stack.
    """
    for part in heads:
        model.anatomy.require(part)
        if part.kind != "head" or part.stack != model.anatomy.main.prefix or part.side:
            raise PartError(f"{part} is no head; a head is called L9.H6")
    found: dict[Part, list[tuple[Example, Tensor, list[int]]]] = {p: [] for p in heads}
    for source, ids, mask in _prompts(model, seed):
        for part, row in _looked(model, heads, source, ids, mask):
            found[part].append(row)
    out = []
    for part in heads:
        kept: list[tuple[Example, Tensor, list[int]]] = []
        for one in sorted(found[part], key=lambda e: -e[0].write):
            if sum(k[0].source == one[0].source for k in kept) < OF_A_TASK and len(kept) < EXAMPLES:
                kept.append(one)
        out.append(Portrait(str(part), [k[0] for k in kept], _readings(model, part, [k[2] for k in kept])))
    return out


def _prompts(model: Model, seed: int) -> list[tuple[str, Tensor, Tensor]]:
    found = []
    if model.tokenizer is not None:
        for entry in TASKS:
            try:
                pairs = task(entry.name, n=PROMPTS, seed=seed).pairs(model)
            except TaskError:
                continue  # its words are not in this vocabulary
            found.append((entry.name, pairs.clean, pairs.mask))
    ids = repeated(model, seed, rows=2, length=16)
    return [*found, ("random tokens", ids, torch.ones_like(ids))]


def _looked(
    model: Model, heads: Sequence[Part], source: str, ids: Tensor, mask: Tensor
) -> list[tuple[Part, tuple[Example, Tensor, list[int]]]]:
    """Each head at its place in each row of a batch, with its write and the tokens it attends most."""
    prefix, layers = model.anatomy.main.prefix, sorted({p.layer or 0 for p in heads})
    seen: dict[Site, Tensor] = {}

    def read(site: Site) -> Tap:
        return lambda x: seen.__setitem__(site, x.float().cpu())

    sites = [Site(name, n, prefix) for n in layers for name in ("pattern", "z")]
    run(model, ids, mask, {site: [read(site)] for site in sites})
    first = mask.long().argmax(1)
    real = mask.bool() & (torch.arange(ids.shape[1]) > first[:, None])
    out = []
    for part in heads:
        layer, index = part.layer or 0, part.index or 0
        pattern, z = seen[Site("pattern", layer, prefix)][:, index], seen[Site("z", layer, prefix)][:, :, index]
        matrix = model.anatomy.head_out(model.anatomy.block(layer, prefix))[index].float().cpu()
        write = z @ matrix  # (row, pos, d)
        resting = pattern[torch.arange(len(ids)), :, first]  # (row, query)
        strength = (write.norm(dim=-1) * (1 - resting)).masked_fill(~real, -1)
        for row, query in enumerate(strength.argmax(1).tolist()):
            begin, weights = int(first[row]), pattern[row, query]
            shown = ids[row, begin : query + 1].tolist()
            raised = bearing(model, layer, write[row, query]).topk(WORDS).indices.tolist()
            most = weights[begin + 1 :].topk(min(2, len(weights) - begin - 1)).indices + begin + 1
            example = Example(
                source,
                texts(model, shown),
                query - begin,
                [round(float(w), 4) for w in weights[begin : query + 1]],
                float(strength[row, query]),
                texts(model, raised),
            )
            out.append((part, (example, write[row, query], ids[row, most].tolist())))
    return out


def _readings(model: Model, part: Part, attended: Sequence[Sequence[int]]) -> list[Reading]:
    tokens = list(dict.fromkeys(t for some in attended for t in some))[:TOKENS]
    if not tokens:
        return []
    layer, index = part.layer or 0, part.index or 0
    v = head_values(model, tokens).v[layer][:, index]  # (token, d_head)
    out = model.anatomy.head_out(model.anatomy.block(layer, model.anatomy.main.prefix))[index].float().cpu()
    logits = bearing(model, layer, v @ out)  # (token, word)
    ranks = (logits > logits.gather(1, torch.tensor(tokens)[:, None])).sum(1) + 1
    best = logits.topk(WORDS, dim=1).indices
    return [
        Reading(texts(model, [t])[0], texts(model, words), int(rank))
        for t, words, rank in zip(tokens, best.tolist(), ranks, strict=True)
    ]


def texts(model: Model, ids: Sequence[int]) -> list[str]:
    """Tokens as texts, or as numbers where there is no tokenizer."""
    if model.tokenizer is None:
        return [str(i) for i in ids]
    return [str(model.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
