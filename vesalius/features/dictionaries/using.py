"""What changing features does to a model: the next token, the text it writes, and which features there were."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
import torch

from vesalius.errors import VesaliusError
from vesalius.features.dictionaries.places import read
from vesalius.features.dictionaries.reading import prompt_rows, words_of
from vesalius.features.dictionaries.sae import SAE
from vesalius.features.dictionaries.splice import changing, spliced
from vesalius.model import Model

LISTED = 20


class Outcome(NamedTuple):
    """What came of a change.

    Attributes:
        next: token, before, after: the likeliest next tokens under either. kl: from before to after, nats.
        active: feature, value, token: the features that are on most at the prompt's last token, and their largest value
            in the prompt. texts: what the model writes, before and after. lead: in a sentence.
    """

    next: pd.DataFrame
    kl: float
    active: pd.DataFrame
    texts: list[str]
    lead: str


@torch.no_grad()
def outcome(
    model: Model,
    sae: SAE,
    prompt: str,
    values: dict[int, float],
    op: str = "set",
    *,
    error: bool = True,
    tokens: int = 20,
    force: bool = False,
) -> Outcome:
    """What a causal model says with some features changed (see `splice.changing`), beside what it says as it is."""
    ids = prompt_rows(model, [prompt]).ids[0][None].to(model.device)
    kind: Any = op or "set"
    change = changing(sae, values, kind) if values else None
    features = sae.encode(read(model, sae.site, ids)[0])  # (pos, feature)
    before, first = _next(model, ids, tokens)
    with spliced(model, sae, change, error=error, force=force):
        logits = model.hf(input_ids=ids, use_cache=False).logits[0, -1]
    with spliced(model, sae, change, error=error, force=force):
        second = written(model, ids, tokens)
    p, q = before.float().log_softmax(-1).cpu(), logits.float().log_softmax(-1).cpu()
    order = torch.maximum(p, q).topk(LISTED).indices
    table = pd.DataFrame(
        {"token": words_of(model, order.tolist()), "before": p[order].exp().numpy(), "after": q[order].exp().numpy()}
    )
    kl = float((p.exp() * (p - q)).sum())
    said = f"the reconstruction alone at {sae.place}"
    if values:
        verb = {"set": "set to", "add": "raised by", "scale": "multiplied by"}[kind]
        named = ", ".join(str(n) for n in values)
        said = f"feature{'s' * (len(values) > 1)} {named} {verb} {next(iter(values.values())):g} at {sae.place}"
    best = [repr(words_of(model, [int(x.argmax())])[0]) for x in (p, q)]
    lead = (
        f"With {said} the next token's distribution moves by {kl:.3f} nats; the likeliest token is {best[1]} "
        f"({float(q.max().exp()):.2f}), before {best[0]} ({float(p.max().exp()):.2f})."
    )
    return Outcome(table, kl, _active(model, features, ids[0].tolist(), sae.skip), [first, second], lead)


def _next(model: Model, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, str]:
    return model.hf(input_ids=ids, use_cache=False).logits[0, -1], written(model, ids, tokens)


def written(model: Model, ids: torch.Tensor, tokens: int) -> str:
    """What a model writes, the likeliest token each time; ids (1, pos).

    Raises:
        VesaliusError: if prompt and text are longer than the model reads.
    """
    most = model.n_positions
    if most and ids.shape[1] + tokens > most:
        raise VesaliusError(
            f"{tokens} tokens after a prompt of {ids.shape[1]} are more than {model.name} reads ({most}); lower "
            "--tokens, or shorten the prompt"
        )
    generate: Any = model.hf.generate
    pad = model.tokenizer.pad_token_id if model.tokenizer is not None else None
    made = generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
        pad_token_id=pad if pad is not None else 0,
    )  # fmt: skip
    new = made[0, ids.shape[1] :].tolist()
    return "".join(words_of(model, new)) if model.tokenizer is None else str(model.tokenizer.decode(new))


def _active(model: Model, features: torch.Tensor, ids: list[int], skip: int) -> pd.DataFrame:
    """Features that are on, those of the last token first."""
    skip = min(skip, len(ids) - 1)  # of a prompt of one token, that one is shown
    largest, where = features[skip:].max(0)
    last = features[-1]
    order = (last + 1e-6 * largest).topk(min(LISTED, features.shape[1])).indices
    order = order[largest[order] > 0]
    return pd.DataFrame(
        {
            "feature": order.tolist(),
            "last token": last[order].tolist(),
            "largest": largest[order].tolist(),
            "on": words_of(model, [ids[skip + int(where[i])] for i in order]),
        }
    )
