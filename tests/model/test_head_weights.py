"""Heads as low-rank matrices: against dense algebra, and against what the model itself computes."""

from __future__ import annotations

import pytest
import torch
from families import ALL, CAUSAL, D, some_ids, tiny

from vesalius.build import planted
from vesalius.errors import ModelError, PartError
from vesalius.model import Model, Site
from vesalius.model.head_weights import head_weights, reading_norm, rotary_turns
from vesalius.model.low_rank import LowRank

LENGTH = 6  # within every sliding window
PLAIN_SCORES = [f for f in CAUSAL if f not in ("bloom", "gemma2")]  # ALiBi adds to scores, Gemma 2 caps them


def low_rank(seed: int, *batch: int, rows: int = 20, rank: int = 5, columns: int = 17) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(*batch, rows, rank, generator=g), torch.randn(*batch, rank, columns, generator=g))


@pytest.mark.parametrize("rank", [1, 5, 30])  # 30: wider than the matrix itself
def test_the_decomposition_is_that_of_the_dense_matrix(rank: int) -> None:
    m = low_rank(0, 3, rank=rank)
    u, s, v = m.svd()
    dense = torch.linalg.svdvals(m.dense())[:, : s.shape[-1]]
    assert torch.allclose(s, dense, rtol=1e-5, atol=1e-5)
    assert torch.allclose(u * s[:, None] @ v.mT, m.dense(), atol=1e-5 * float(m.dense().abs().max()) + 1e-5)
    assert torch.allclose(u.mT @ u, torch.eye(u.shape[-1]).expand(3, -1, -1), atol=1e-5)
    assert (v.gather(-2, v.abs().argmax(-2, keepdim=True)) > 0).all()


def test_products_norms_and_eigenvalues_equal_the_dense_ones() -> None:
    a, b = low_rank(1, 2, columns=20), low_rank(2, 2, rank=9)
    dense = a.dense() @ b.dense()
    for product in (a @ b, (b.T @ a.T).T):
        assert product.rank == 5
        assert torch.allclose(product.dense(), dense, rtol=1e-4, atol=1e-4)
    assert torch.allclose((a @ b).reader().norm(dim=(1, 2)), torch.linalg.matrix_norm(dense), rtol=1e-5)
    x = torch.randn(7, 20, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(b[1].apply(x), x @ b[1].dense(), atol=1e-4)
    assert torch.allclose((x @ b[1].reader()).norm(dim=-1), (x @ b[1].dense()).norm(dim=-1), rtol=1e-4)
    square = low_rank(4, rows=12, rank=4, columns=12)
    mine = square.eigenvalues().abs().sort(descending=True).values
    theirs = torch.linalg.eigvals(square.dense()).abs().sort(descending=True).values
    assert torch.allclose(mine, theirs[:4], rtol=1e-3) and float(theirs[4:].max()) < 1e-3
    with pytest.raises(ValueError, match="do not multiply"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 2))


def normed(model: Model, norm, x: torch.Tensor) -> torch.Tensor:
    """x as a head's folded matrices take it: centring and gain are theirs, the factor r(x) is not."""
    return x if norm is None else x * norm.scale(x)


@pytest.mark.parametrize("family", ALL)
def test_values_queries_keys_and_writes_are_the_models_own(family: str) -> None:
    model = tiny(family)
    stacks = ["enc", "dec"] if model.kind == "encoder-decoder" else [""]
    ids = some_ids(2, LENGTH)
    for prefix in stacks:
        for cross in (False, True) if prefix == "dec" else (False,):
            layer, tag = 1, "cross_" if cross else ""
            sites = [Site(tag + n, layer, prefix) for n in ("q", "k", "v", "z", "pattern")]
            stream = Site("resid_post", model.n_layers - 1, "enc") if cross else Site("resid_pre", layer, prefix)
            decoder = ids if model.kind == "encoder-decoder" else None
            found = model.run(ids, capture=[*sites, stream], decoder=decoder)
            block = model.anatomy.block(layer, prefix)
            block = block.cross if cross and block.cross is not None else block
            weights = head_weights(model, layer, prefix or None, cross=cross)
            assert [str(p) for p in weights.parts][:1] == [
                f"{prefix + '.' if prefix else ''}L1.{'X' if cross else 'H'}0"
            ]
            sides = {"v": (weights.ov.left, weights.value_bias)}
            if not block.head_norms:
                sides |= {"q": (weights.qk.left, weights.query_bias), "k": (weights.qk.right.mT, weights.key_bias)}
            for side, (left, bias) in sides.items():
                if cross and side == "q":
                    continue  # read from the middle of the block, which has no site of its own between two attentions
                read = normed(model, reading_norm(model, block, side), found[stream])
                mine = torch.einsum("bsd,hde->bshe", read, left) + bias
                assert torch.allclose(mine, found[tag + side, layer, prefix], atol=1e-4), (family, tag + side)
            pattern, v = found[tag + "pattern", layer, prefix], found[tag + "v", layer, prefix]
            writes = torch.einsum("bhqk,bkhe,hed->bqd", pattern, v, weights.ov.right)
            z = found[tag + "z", layer, prefix]
            plain = torch.einsum("bqhe,hed->bqd", z, model.anatomy.head_out(block))
            if block.norm_attn_out is None:
                assert torch.allclose(writes, plain, atol=1e-4)


@pytest.mark.parametrize("family", PLAIN_SCORES)
def test_turned_scores_are_those_of_the_models_pattern(family: str) -> None:
    """The softmax of x_q W_QK(distance) x_k^T / sqrt(d_head) is the pattern; each turn is told from means."""
    model, layer = tiny(family), 1
    ids = some_ids(2, LENGTH)
    run = model.run(ids, capture=[("resid_pre", layer), ("pattern", layer), ("q", layer), ("k", layer)])
    block = model.anatomy.block(layer)
    x = normed(model, reading_norm(model, block, "q"), run["resid_pre", layer])
    w = head_weights(model, layer)
    q = torch.einsum("bsd,hde->bshe", x, w.qk.left) + w.query_bias
    k = torch.einsum("bsd,hde->bshe", x, w.qk.right.mT) + w.key_bias
    if block.head_norms:  # the remaining factor of these norms, from the actual queries and keys
        plain = head_weights(model, layer, fold=False)
        unit = x * block.norm_in.gain
        raw = {
            s: torch.einsum("bsd,hde->bshe", unit, left) for s, left in (("q", plain.qk.left), ("k", plain.qk.right.mT))
        }
        q, k = q * block.head_norms[0].scale(raw["q"]), k * block.head_norms[1].scale(raw["k"])
    means = [rotary_turns(model, n)[layer] for n in range(LENGTH)]
    assert (means[1] is None) == (family in ("gpt2", "opt", "opt-350m"))
    eye = torch.eye(model.d_head)
    turns = [eye if m is None else m for m in means]
    at = [(n + 1) * turns[n] - (n * turns[n - 1] if n else 0) for n in range(LENGTH)]
    scores = torch.full((2, model.n_heads, LENGTH, LENGTH), -torch.inf)
    for i in range(LENGTH):
        for j in range(i + 1):
            scores[:, :, i, j] = torch.einsum("bhe,ef,bhf->bh", q[:, i], at[i - j], k[:, j])
    pattern = (scores * model.d_head**-0.5).softmax(-1)
    assert torch.allclose(pattern, run["pattern", layer], atol=2e-4)


def test_shared_values_stay_shared_and_nothing_of_the_model_changes() -> None:
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    ov = head_weights(model, 0).ov
    assert torch.equal(ov.left[0], ov.left[1]) and not torch.equal(ov.left[1], ov.left[2])
    assert ov.shape == (4, D, D) and ov.rank == D // 4
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())


def test_what_has_no_matrices_is_refused_by_name() -> None:
    model = tiny("llama")
    with pytest.raises(PartError, match="L9.H0 does not exist"):
        head_weights(model, 9)
    with pytest.raises(PartError, match="no cross-attention"):
        head_weights(model, 0, cross=True)
    wide = tiny("qwen3")
    norm = wide.anatomy.block(0).head_norms[0].module
    norm.weight = torch.nn.Parameter(torch.ones(48), requires_grad=False)
    with pytest.raises(ModelError, match="over all heads together"):
        head_weights(wide, 0)
    from vesalius.build import Architecture, build

    lstm = build(
        Architecture(kind="causal", d_model=32, layers=2, heads=4, vocab_size=40, max_length=16, mixers="lstm")
    )
    with pytest.raises(PartError, match="not with attention"):
        head_weights(Model.wrap(lstm, name="lstm"), 0)


def test_planted_copying_heads_have_positive_eigenvalues() -> None:
    """An induction head copies: the eigenvalues of W_E W_OV W_U are positive."""
    it = planted("induction", "llama", seed=1)
    model = Model.wrap(it.hf, it.tokenizer)
    head = next(p for p, role in it.roles.items() if role == "induction")
    ov = head_weights(model, head.layer or 0).ov[head.index or 0]
    embed, unembed = it.hf.get_input_embeddings().weight, it.hf.get_output_embeddings().weight
    copying = LowRank(embed @ ov.left, ov.right @ unembed.T).eigenvalues().real
    assert float(copying.sum() / copying.abs().sum()) > 0.95
