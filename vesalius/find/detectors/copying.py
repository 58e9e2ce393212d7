"""Copying heads, from weights alone: does attending to a token raise that token?

Score: the share of a random sample of tokens that are among the top 1 % of the sample by the head's own value-output
circuit when it attends to them (contextual form, see `ov`). Null: the same with the tokens' names shuffled.

Column `eigen`: sum of the eigenvalues of W_E W_V W_O W_U over the sum of their sizes, -1 to 1; positive for heads that
copy (Elhage et al. 2021). Gains of the norms are folded in; W_E and W_U are the tables themselves.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vesalius.find.detectors.base import HeadContext, head_scores
from vesalius.find.detectors.looks import heads_with_patterns
from vesalius.find.detectors.ov import Values, head_values, ov_logits
from vesalius.find.detectors.significance import DRAWS, against
from vesalius.find.detectors.stimuli import usable_tokens
from vesalius.model import Model
from vesalius.model.weights import matrix
from vesalius.parts import Part
from vesalius.scores import Array, Scores

SAMPLE = 256
TOP = 0.01
TABLE = 8192  # rows of the embedding that stand for all of them in the eigenvalues


def copying(model: Model, context: HeadContext, *, tokens: int = SAMPLE, top: float = TOP) -> Scores:
    """How often a head's value-output circuit puts the token it reads among the first.

    Args:
        tokens: how many are sampled. top: which share of the sample counts as the first, at least one token.
    """
    rng = np.random.default_rng([context.seed, tokens])
    usable = usable_tokens(model)
    sample = rng.choice(usable, min(tokens, len(usable)), replace=False).tolist()
    values: Values = context.once(("values", "sample", tuple(sample)), lambda: head_values(model, sample))
    k = max(1, int(round(top * len(sample))))
    hits, shuffled = [], []
    labels = np.stack([rng.permutation(len(sample)) for _ in range(DRAWS)])  # (draw, token)
    parts: list[Part] = []
    for layer, logits in ov_logits(model, values, sample):
        first = torch.zeros_like(logits, dtype=torch.bool)
        first.scatter_(2, logits.topk(k, dim=2).indices, True)  # (head, token, word)
        hits.append(first.diagonal(dim1=1, dim2=2).float())
        under = np.zeros((len(first), DRAWS))
        for token, named in zip(first.numpy().swapaxes(0, 1), np.ascontiguousarray(labels.T), strict=True):
            under += token[:, named]
        shuffled.append(under / len(sample))
        parts += [Part("head", layer, h, stack=model.anatomy.main.prefix) for h in range(logits.shape[0])]
    each_token = torch.cat(hits).double().numpy()
    columns = against(each_token.mean(1), np.concatenate(shuffled))
    found = head_scores(
        parts, each_token, {**columns, "eigen": eigenvalues(model, context.seed)}, unit="share of tokens"
    )
    found.info["null_is"] = "the sample's names shuffled"
    return found


def eigenvalues(model: Model, seed: int = 0) -> Array:
    """Sum over sum of sizes of the eigenvalues of each head's W_E W_V W_O W_U, (head,).

    They are those of the small matrix W_O W_U W_E W_V, (d_head, d_head).
    """
    a, stack, layers = model.anatomy, model.anatomy.main, heads_with_patterns(model)[1]
    embedding = model.hf.get_input_embeddings().weight.float().cpu()  # (word, d)
    assert stack.unembed is not None
    out = matrix(stack.unembed).float().cpu()  # (d, word)
    rows = min(embedding.shape[0], out.shape[1])
    if rows > TABLE:
        keep = np.random.default_rng([seed, rows]).choice(rows, TABLE, replace=False)
        embedding, out = embedding[keep], out[:, keep]
    if stack.project_out is not None or embedding.shape[1] != a.d_model:
        return np.full(a.n_heads * len(layers), np.nan)  # tables of another width than the residual stream
    between = out[:, :rows] @ embedding[:rows]  # (d, d)
    if stack.final_norm is not None:
        between = stack.final_norm.gain.cpu()[:, None] * between
    shares = []
    for block in (stack.blocks[n] for n in layers):
        gain = torch.ones(1) if a.post_norm else block.norm_in.gain.cpu()
        w_v = gain[:, None] * a.head_in(block, "v")[0].float().cpu()  # (head, d, d_head)
        w_o = a.head_out(block).float().cpu()
        small: Tensor = w_o @ between @ w_v  # (head, d_head, d_head)
        values = torch.linalg.eigvals(small)
        shares.append(values.real.sum(1) / values.abs().sum(1).clamp(min=1e-12))
    found: Array = torch.cat(shares).double().numpy()
    return found
