"""Observables pulled back: exact where everything is linear, and as the theory says where it is not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from families import ALL, LAYERS, VOCAB, D, some_ids, tiny, tiny_hf
from torch import nn

from vesalius.build import planted
from vesalius.errors import ModelError, PartError, VesaliusError
from vesalius.lens import (
    Observable,
    between_prompts,
    coupling,
    head_features,
    mean_states,
    moments,
    norm_scales,
    path_value,
    pull_back,
    subtraction,
)
from vesalius.lens.observable import unembedding
from vesalius.lens.paths import norm_angle_bound
from vesalius.lens.tangents import boundary, mlp_output, mlp_tangent
from vesalius.lens.texts import Moments, states, token_rows
from vesalius.model import Model, Site
from vesalius.model.head_weights import head_weights
from vesalius.model.hooks import Hooks
from vesalius.model.intervene import taps
from vesalius.parts import Part, parse_part

ASKED = "#11, #12 - #40"
NO_UNEMBEDDING = ("bert", "roberta", "distilbert")
# MLP after attention, norms off the stream, logits uncapped: the end of the model is MLP, norm and matrix
SERIAL = [f for f in ALL if f not in (*NO_UNEMBEDDING, "gpt-neox", "gptj", "phi", "opt-350m", "gemma2")]


def attention_only(family: str, norms: bool) -> Model:
    """A tiny model whose MLPs write nothing, without norms if asked."""
    hf = tiny_hf(family)
    for block in hf.model.layers:
        block.mlp.down_proj.weight.data.zero_()
        if not norms:
            block.input_layernorm = block.post_attention_layernorm = nn.Identity()
            block.self_attn.v_proj.weight.data *= 0.3
    if not norms:
        hf.model.norm = nn.Identity()
    return Model.wrap(hf, name=family)


@pytest.mark.parametrize("norms", [False, True], ids=["norm-free", "norms held"])
def test_the_values_of_all_paths_are_the_observable(norms: bool) -> None:
    """Check 6.1: every chain of heads through three layers, and the direct path."""
    model = attention_only("llama", norms)
    ids, reads = some_ids(2, 7), torch.tensor([6, 4])
    observable = Observable.parse(ASKED, model)
    wanted = observable.value(model.logits(ids))[torch.arange(2), reads]
    total = path_value(model, ids, None, reads, observable)
    chains = 0
    for layers in itertools.chain.from_iterable(itertools.combinations(range(LAYERS), n) for n in (1, 2, 3)):
        for heads in itertools.product(range(model.n_heads), repeat=len(layers)):
            path = [Part("head", layer, h) for layer, h in zip(layers, heads, strict=True)]
            total = total + path_value(model, ids, None, reads, observable, path)
            chains += 1
    assert chains == 12 + 48 + 64
    assert torch.allclose(total, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_one_path_is_what_its_feature_says() -> None:
    """Check 6.1: x . y of a path, weighted by the attention along it, is that path's part of the logits."""
    model = attention_only("llama", norms=False)
    ids = some_ids(1, 6)
    run = model.run(ids, capture=[("resid_pre", 0), ("pattern", 0), ("pattern", 2), ("v", 0)])
    feature = pull_back(model, ASKED, ["L0.H1", "L2.H3"])
    assert str(feature.at) == "L0.resid_pre" and [str(p) for p in feature.path] == ["L0.H1", "L2.H3"]
    attention = run["pattern", 2][0, 3, 5] @ run["pattern", 0][0, 1]  # (key,) of the first head
    mine = attention @ feature.scores(run["resid_pre", 0])[0]
    # by hand: the value of L0.H1 written, then read by the value of L2.H3
    a = model.anatomy
    o, v = (lambda layer, h: a.head_out(a.block(layer))[h]), (lambda layer, h: a.head_in(a.block(layer), "v")[0][h])
    z = run["pattern", 0][0, 1] @ run["v", 0][0, :, 1]
    write = run["pattern", 2][0, 3, 5] @ (z @ o(0, 1) @ v(2, 3) @ o(2, 3))
    unembed = model.hf.get_output_embeddings().weight
    theirs = write @ (0.5 * unembed[11] + 0.5 * unembed[12] - unembed[40])
    assert float(mine) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.parametrize("family", SERIAL)
def test_features_of_the_last_layers_are_gradients_of_the_model(family: str) -> None:
    """The gradient at the stream before the last MLP, by autograd, is the direct path's plus the MLP's tangent."""
    model = tiny(family)
    a, prefix = model.anatomy, model.anatomy.main.prefix
    last = model.n_layers - 1
    ids = some_ids(1, 5)
    observable = Observable.parse(ASKED, model)
    decoder = ids if model.kind == "encoder-decoder" else None
    place, mlp = Site("resid_mid", last, prefix), Part("mlp", last, stack=prefix)
    kept: dict[str, torch.Tensor] = {}

    def watch(x: torch.Tensor) -> torch.Tensor:
        kept["x"] = x.detach().requires_grad_(True)
        return kept["x"]

    with Hooks(model.hf, a, {place: [watch]}):
        out = model.hf(**model.inputs(ids, decoder=decoder), use_cache=False)
    value = observable.value(out.logits)[0, -1]
    (grad,) = torch.autograd.grad(value, [kept["x"]])
    final_in = model.run(ids, capture=[Site("resid_post", last, prefix)], decoder=decoder)["resid_post", last, prefix]
    norm = a.main.final_norm
    assert norm is not None
    y = norm.vjp(observable.direction(model), final_in[0, -1])  # at the stream's actual end, nothing held
    x = kept["x"][0, -1]
    mine = y + mlp_tangent(model, mlp, y, x)
    assert torch.allclose(mine, grad[0, -1], rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


class Held(nn.LayerNorm):
    """LayerNorm whose factor r(x) is held fixed under differentiation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach() * self.weight + self.bias


def test_norms_of_the_stream_itself_are_carried_through() -> None:
    """Post-norm OPT with norms held: features and subtraction against the model's own gradient at a head's output."""
    hf = tiny_hf("opt-350m")
    for block in hf.model.decoder.layers:
        block.fc2.weight.data.zero_()
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            held = Held(D)
            held.load_state_dict(getattr(block, name).state_dict())
            setattr(block, name, held.requires_grad_(False))
    model, layer, ids = Model.wrap(hf, name="held"), LAYERS - 2, some_ids(1, 5)
    kept: dict[str, torch.Tensor] = {}

    def watch(z: torch.Tensor) -> torch.Tensor:
        kept["z"] = z.detach().requires_grad_(True)
        return kept["z"]

    observable = Observable.parse(ASKED, model)
    with Hooks(model.hf, model.anatomy, {Site("z", LAYERS - 1): [watch]}):
        out = model.hf(**model.inputs(ids), use_cache=False)
    (grad,) = torch.autograd.grad(observable.value(out.logits)[0, -1], [kept["z"]])
    for head in range(model.n_heads):
        part, inner = Part("head", LAYERS - 1, head), grad[0, -1, head]
        ov = head_weights(model, LAYERS - 1).ov[head]
        mine = pull_back(model, observable, [part]).vector
        assert float(nn.functional.cosine_similarity(mine, ov.left @ inner, dim=0)) > 1 - 1e-5
        run = model.run(ids, capture=[Site("v", LAYERS - 1)], taps=taps([subtraction(model, observable, [part])], 1))
        bias = model.anatomy.head_in(model.anatomy.block(LAYERS - 1), "v")[1]
        told = (run["v", LAYERS - 1][0, :, head] - (0 if bias is None else bias[head])) @ inner
        assert float(told.abs().max()) < 1e-5 * float(inner.norm())
    # one block down, through both norms of the last block: the same functional, read before them
    deeper = pull_back(model, observable, [Part("head", layer, 1)])
    norms = [model.anatomy.block(LAYERS - 1).norm_mid, model.anatomy.block(LAYERS - 1).norm_in]
    norms += [model.anatomy.block(layer).norm_mid, model.anatomy.block(layer).norm_in]
    y = observable.direction(model)
    for norm in norms:
        y = norm.gain * y - (norm.gain * y).mean()
    ov = head_weights(model, layer).ov[1]
    assert torch.allclose(deeper.vector, ov.left @ (ov.right @ y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", [f for f in ALL if f not in NO_UNEMBEDDING])
def test_the_direct_path_reads_the_logits(family: str) -> None:
    """W_U n through the final norm, output scale and projection included: value, less the constant of offsets."""
    model = tiny(family)
    stack, prefix = model.anatomy.main, model.anatomy.main.prefix
    last = model.n_layers - 1
    ids = some_ids(2, 5)
    decoder = ids if model.kind == "encoder-decoder" else None
    run = model.run(ids, capture=[Site("resid_post", last, prefix)], decoder=decoder)
    x = run["resid_post", last, prefix]
    observable = Observable.parse(ASKED, model)
    logits = run.logits
    assert logits is not None
    if model.anatomy.softcap is not None:
        logits = torch.atanh(logits / model.anatomy.softcap) * model.anatomy.softcap
    feature = pull_back(model, observable)
    assert feature.at == Part("resid_post", last, stack=prefix)
    mine = feature.scores(x)
    if stack.final_norm is not None:
        mine = mine * stack.final_norm.scale(x)[..., 0]
    gap = observable.value(logits) - mine
    assert torch.allclose(gap, gap[0, 0].expand_as(gap), atol=1e-4)  # the same everywhere: biases alone


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt-350m", "t5", "gpt-neox"])
def test_ranked_heads_have_the_features_of_their_paths(family: str) -> None:
    model = tiny(family)
    prefix = f"{model.anatomy.main.prefix}." if model.anatomy.main.prefix else ""
    scales = norm_scales(model, some_ids(3, 8))
    for held in (None, scales):
        ranking, vectors = head_features(model, ASKED, scales=held)
        assert len(ranking) == model.n_layers * model.n_heads * (2 if family == "t5" else 1)
        one = pull_back(model, ASKED, [f"{prefix}L1.H2"], scales=held)
        row = ranking.parts.index(parse_part(f"{prefix}L1.H2"))
        assert torch.allclose(vectors[row], one.vector, atol=1e-5 * float(vectors.abs().max()))
        assert ranking.values[row] == pytest.approx(one.norm, rel=1e-5)
        before, _ = head_features(model, ASKED, [f"{prefix}L2.H0"], scales=held)
        assert {p.layer for p in before.parts} == {0, 1}
    with pytest.raises(VesaliusError, match="another model object"):
        pull_back(tiny("llama"), ASKED, ["L1.H1"], scales=scales)


def test_a_cross_attention_head_leads_into_the_encoder() -> None:
    model = tiny("t5")
    feature = pull_back(model, ASKED, ["enc.L1.H0", "dec.L0.X2", "dec.L2.H1"])
    assert str(feature.at) == "enc.L1.resid_pre"
    across = pull_back(model, ASKED, ["dec.L0.X2", "dec.L2.H1"])
    assert str(across.at) == "enc.L2.resid_post"
    ranking, _ = head_features(model, ASKED, ["dec.L0.X2", "dec.L2.H1"])
    assert {p.stack for p in ranking.parts} == {"enc"}


def test_magnitudes_from_data_are_the_mean_sizes_of_paths() -> None:
    """With scales, the feature's score is the path's value on average over prompts, attention left out."""
    model = tiny("llama")
    ids = some_ids(6, 9, seed=3)
    scales = norm_scales(model, ids)
    run = model.run(ids, capture=[("resid_pre", 2), ("resid_post", 2)])
    block = model.anatomy.block(2)
    r_in = block.norm_in.scale(run["resid_pre", 2])[:, 1:].mean()
    r_out = model.anatomy.main.final_norm.scale(run["resid_post", 2])[:, 1:].mean()  # type: ignore[union-attr]
    plain, scaled = (pull_back(model, ASKED, ["L2.H1"], scales=s) for s in (None, scales))
    assert torch.allclose(scaled.vector, plain.vector * float(r_in * r_out), rtol=1e-4)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_norms_angle_theorem(kind: str) -> None:
    """Check 6.2: the angle between y and the gradient of y . norm(x) is below the bound, and shrinks as 1 / sqrt(d)."""
    from vesalius.model.norms import NormView

    angles = {}
    for d in (128, 576, 2048):
        g = torch.Generator().manual_seed(d)
        norm = NormView(nn.LayerNorm(d, elementwise_affine=False), kind)  # type: ignore[arg-type]
        x, y = torch.randn(400, d, generator=g), torch.randn(400, d, generator=g)
        x = x * torch.rand(400, 1, generator=g) * 10
        grad = norm.vjp(y, x)
        cos = nn.functional.cosine_similarity(grad.double(), y.double(), dim=-1).clamp(max=1.0)
        angles[d] = float(torch.acos(cos).mean())
        assert angles[d] < norm_angle_bound(d)
    assert norm_angle_bound(2048) == pytest.approx(0.0442, abs=1e-3)
    for small, large in ((128, 576), (576, 2048)):
        assert angles[small] / angles[large] == pytest.approx(math.sqrt(large / small), rel=0.1)


def test_isotropic_states_follow_the_coupling_coefficient() -> None:
    """Check 6.3: the slope of one score on the other is C, the correlation the cosine; with a covariance C_cov."""
    g = torch.Generator().manual_seed(0)
    y1 = torch.randn(64, generator=g)
    y2 = 0.6 * y1 + torch.randn(64, generator=g)
    x = torch.randn(200_000, 64, generator=g)
    x = x / x.norm(dim=1, keepdim=True)
    found = coupling(y1, y2)
    a, b = (x @ y1).double().numpy(), (x @ y2).double().numpy()
    assert np.polyfit(a, b, 1)[0] == pytest.approx(found.coefficient, rel=0.02)
    assert np.corrcoef(a, b)[0, 1] == pytest.approx(found.r, rel=0.02)
    stretched = x * torch.linspace(0.1, 3.0, 64) ** 2
    s = np.cov(stretched.numpy().T.astype(float), bias=True)
    known = Moments(np.zeros(64), s, len(x), Part("resid_pre", 0))
    a, b = (stretched @ y1).double().numpy(), (stretched @ y2).double().numpy()
    assert np.polyfit(a, b, 1)[0] == pytest.approx(coupling(y1, y2, known).coefficient, rel=1e-3)
    assert abs(coupling(y1, y2).coefficient / np.polyfit(a, b, 1)[0] - 1) > 0.1  # which the plain one does not tell


def test_tangents_and_boundaries_are_those_of_the_mlp() -> None:
    for family in ("llama", "opt", "t5", "gpt-neox", "gemma2"):
        model = tiny(family)
        part = Part("mlp", 1, stack=model.anatomy.main.prefix)
        g = torch.Generator().manual_seed(1)
        x, y, other = (torch.randn(D, generator=g) * 2 for _ in range(3))

        def write(state: torch.Tensor, part=part, model=model) -> torch.Tensor:
            return mlp_output(model, part, state[None])[0]

        tangent = mlp_tangent(model, part, y, x)
        step = torch.randn(D, generator=g) * 1e-3
        with torch.no_grad():
            change = float((write(x + step) - write(x - step)).double() @ y.double()) / 2
        assert change == pytest.approx(float(tangent @ step), rel=0.03, abs=2e-5), family
        with torch.no_grad():
            ends = [float(write(s) @ y) for s in (x, other)]
            level = 0.0 if ends[0] * ends[1] < 0 else sum(ends) / 2
            middle = float(write(boundary(model, part, y, x, other)) @ y)
        assert middle == pytest.approx(level, abs=2e-3 * (abs(ends[0]) + abs(ends[1]))), family


def test_subtraction_leaves_the_head_without_the_feature_and_nothing_else() -> None:
    for family in ("llama", "llama-bias", "gpt2", "gemma3"):
        model = tiny(family)
        ids, last = some_ids(2, 6), model.n_layers - 1
        head = Part("head", last, 1)
        after = pull_back(model, ASKED).vector
        block = model.anatomy.block(last)
        if block.norm_attn_out is not None:
            after = block.norm_attn_out.transpose(after)
        inner = model.anatomy.head_out(block)[1] @ after
        for direction in (None, torch.randn(D, generator=torch.Generator().manual_seed(2))):
            changes = subtraction(model, ASKED, [head], direction=direction)
            found = model.run(ids, capture=[Site("v", last), Site("pattern", last)], taps=taps([changes], 2))
            plain = model.run(ids, capture=[Site("v", last), Site("pattern", last)])
            weight, bias = model.anatomy.head_in(block, "v")
            told = (found["v", last][:, :, 1] - (0 if bias is None else bias[1])) @ inner
            if direction is None:
                assert float(told.abs().max()) < 1e-4 * float((plain["v", last][:, :, 1] @ inner).abs().max())
            else:
                assert not torch.allclose(found["v", last][:, :, 1], plain["v", last][:, :, 1], atol=1e-4)
            for other in (0, 2, 3):
                assert torch.allclose(found["v", last][:, :, other], plain["v", last][:, :, other], atol=1e-6)
            assert torch.allclose(found["pattern", last], plain["pattern", last], atol=1e-6)


def test_covariance_is_streamed() -> None:
    it = planted("induction", "llama", seed=0)
    model = Model.wrap(it.hf, it.tokenizer, name="planted")
    texts = [p.clean for p in it.examples(12)]
    rows = token_rows(model, texts, 90)
    found, x = moments(model, rows, "L1.resid_pre"), states(model, rows, "L1.resid_pre").double().numpy()
    assert found.n == len(x) == 90
    assert np.allclose(found.mean, x.mean(0)) and np.allclose(found.covariance, np.cov(x.T, bias=True), atol=1e-6)
    with pytest.raises(VesaliusError, match="tokens to read .* fewer than 5000"):
        token_rows(model, texts, 5000)


def test_a_path_through_an_mlp_is_taken_at_a_boundary_or_a_mean() -> None:
    it = planted("name-mover", "llama", seed=0)
    model = Model.wrap(it.hf, it.tokenizer, name="planted")
    prompts = [p.clean for p in it.examples(2)]
    path = ["L1.H0", "L1.MLP", "L2.MLP", "L3.H2"]
    rows = token_rows(model, prompts, None)
    seen: dict[Part, torch.Tensor] = {}

    def kept(part: Part, y: torch.Tensor) -> torch.Tensor:
        seen[part] = mean_states(model, rows)(part, y)
        return seen[part]

    at_mean = pull_back(model, "mary - john", path, points=kept)
    assert set(seen) == {Part("mlp", 1), Part("mlp", 2)}
    assert torch.allclose(seen[Part("mlp", 2)], states(model, rows, "L2.resid_mid").mean(0))
    # by hand, from the end: what the last head reads, the two tangents, what the first head reads
    y = pull_back(model, "mary - john", ["L3.H2"]).vector
    for part in (Part("mlp", 2), Part("mlp", 1)):
        y = mlp_tangent(model, part, y, seen[part])
    ov = head_weights(model, 1).ov[0]
    assert torch.allclose(at_mean.vector, ov.left @ (ov.right @ y), rtol=1e-4, atol=1e-6)
    between = pull_back(model, "mary - john", path, points=between_prompts(model, *prompts))
    assert str(between.at) == "L1.resid_pre" and bool(torch.isfinite(between.vector).all())
    with pytest.raises(VesaliusError, match="between two prompts"):
        pull_back(model, "mary - john", path)


def test_words_become_tokens_and_pieces_are_noted() -> None:
    it = planted("name-mover", "llama")
    model = Model.wrap(it.hf, it.tokenizer, name="planted")
    vocabulary = it.tokenizer.get_vocab()
    found = Observable.parse(" mary, john - ring", model)
    assert found.weights == {vocabulary["mary"]: 0.5, vocabulary["john"]: 0.5, vocabulary["ring"]: -1.0}
    assert Observable.parse("mary", model).weights == {vocabulary["mary"]: 1.0}
    assert not found.notes
    pieces = Observable.parse("#5 - #6", model)
    logits = torch.randn(2, len(vocabulary))
    assert torch.allclose(pieces.value(logits), logits[:, 5] - logits[:, 6])


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (lambda m: Observable.parse("zzyzx - mary", m), VesaliusError, "zzyzx is unknown to the tokenizer"),
        (lambda m: Observable.parse("mary - ", m), VesaliusError, "is no observable"),
        (lambda m: Observable.parse("mary - john - ring", m), VesaliusError, "is no observable"),
        (lambda m: Observable.parse("mary - mary", m), VesaliusError, "of the other side"),
        (lambda m: Observable.parse("#99999", m), VesaliusError, "is no token"),
        (lambda m: pull_back(m, "mary - john", ["L2.H0", "L1.H0"]), PartError, "not forward: L1.H0 does not read"),
        (lambda m: pull_back(m, "mary - john", ["L1.MLP", "L1.H0"]), PartError, "not forward"),
        (
            lambda m: pull_back(tiny("gpt-neox"), "#5 - #6", ["L1.H0", "L1.MLP"]),
            PartError,
            "block of gpt-neox are parallel",
        ),
        (lambda m: pull_back(m, "mary - john", ["L1.H77"]), PartError, "L1.H77 does not exist"),
        (lambda m: pull_back(m, "mary - john", ["L1.resid_pre"]), PartError, "cannot be on a path"),
        (lambda m: pull_back(m, "mary - john", ["L1.MLP"]), VesaliusError, "L1.MLP is not linear"),
        (
            lambda m: pull_back(m, "mary - john", ["L1.H0"], at="L2.resid_pre"),
            VesaliusError,
            "lies behind the beginning",
        ),
        (lambda m: pull_back(m, "mary - john", at="L1.H0"), PartError, "no place in the stream"),
        (lambda m: subtraction(m, "mary - john", ["L1.MLP"]), VesaliusError, "begin the path with a head"),
        (lambda m: path_value(m, some_ids(), None, torch.tensor([8]), "mary", ["L1.MLP"]), PartError, "no exact value"),
        (lambda m: coupling(torch.zeros(4), torch.ones(4)), VesaliusError, "zero"),
        (
            lambda m: coupling(pull_back(m, "mary", ["L2.H0"]), pull_back(m, "mary", ["L1.H0"])),
            VesaliusError,
            "pull both back to one place",
        ),
    ],
)
def test_bad_requests_are_refused(ask, error: type[Exception], match: str) -> None:
    it = planted("name-mover", "llama")
    with pytest.raises(error, match=match) as caught:
        ask(Model.wrap(it.hf, it.tokenizer, name="planted"))
    assert "\n" not in str(caught.value)


def test_models_without_a_linear_unembedding_are_refused_by_name() -> None:
    for family in NO_UNEMBEDDING:
        with pytest.raises(ModelError, match="more than a matrix"):
            Observable.parse("#5", tiny(family))
    body = Model.wrap(tiny_hf("bert").bert, name="body")
    with pytest.raises(ModelError, match="without an unembedding"):
        Observable.parse("#5", body)
    with pytest.raises(ModelError, match="has no tokenizer; name tokens by number"):
        Observable.parse("she", tiny("llama"))
    assert unembedding(tiny("opt-350m")).shape == (VOCAB, D)
