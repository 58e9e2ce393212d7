"""PST against gradients written by hand, a teacher whose useful weights are known, and counts that must be exact."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import VOCAB, some_ids, tiny, tiny_hf
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vesalius.change.linears import REPLACEMENTS, linear_names, merged
from vesalius.change.sparse import (
    SparseLinear,
    SparsePlan,
    Thinning,
    largest,
    sparse,
    sparse_maps,
    sparsify,
    trained_numbers,
    zeros_of,
)
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.model.saving import save_model
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.model.weights import matrix
from vesalius.train.labels import LabelledRows, Labelling
from vesalius.train.learning import TextRows
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.base import Needs
from vesalius.train.optimizers import make_optimizer, state_bytes

QUICK = SparsePlan(0.9, steps=12, rows=8, lr=1e-2, rank=2)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_map(n_out: int, n_in: int, seed: int = 0) -> nn.Linear:
    module = nn.Linear(n_in, n_out).requires_grad_(False)
    module.weight.copy_(numbers(n_out, n_in, seed=seed))
    return module


def ready(module: nn.Module, plan: SparsePlan, zeros: int) -> SparseLinear:
    """A map that learns, all its factors away from zero."""
    made = SparseLinear.of(module, plan, "map")
    made.zeros = zeros
    for i, p in enumerate(made.learnt()):
        p.requires_grad_(True)
        if plan.how == "pst":
            with torch.no_grad():
                p.copy_(numbers(*p.shape, seed=10 + i))
    return made


def test_counts_of_zeros_are_those_of_the_decimal_number() -> None:
    assert zeros_of(0.55, 100) == 55 != math.ceil(0.55 * 100)
    assert zeros_of(0.9, 16384) == 14746
    for seed in range(20):  # few values, so that many are equal
        score = torch.randint(0, 4, (7, 9), generator=torch.Generator().manual_seed(seed)).float()
        for zeros in (0, 1, 31, 62):
            kept = largest(score, zeros)
            assert int((~kept).sum()) == zeros
            order = torch.sort(score.flatten(), stable=True).indices[:zeros]  # the slow way
            assert not kept.flatten()[order].any()


def test_at_first_the_mask_goes_by_size_alone() -> None:
    module = linear_map(30, 20)
    for how in ("pst", "magnitude"):
        made = SparseLinear.of(module, SparsePlan(0.9, how=how), "map")  # type: ignore[arg-type]
        made.zeros = zeros_of(0.9, 600)
        by_size = module.weight.abs().flatten().argsort()
        gone = (~made.mask()).flatten().nonzero()[:, 0]
        assert set(gone.tolist()) == set(by_size[:540].tolist())
    for family in ("gpt2", "llama", "bert", "t5"):  # and nothing goes before the schedule says so
        model, ids = tiny(family), some_ids()
        decoder = ids if family == "t5" else None
        made_model = sparse(model, QUICK)
        assert torch.equal(made_model.logits(ids, decoder=decoder), model.logits(ids, decoder=decoder))


def test_gradients_are_those_written_by_hand() -> None:
    plan = SparsePlan(0.6, rank=3, by_product=0.7, by_lines=1.3, update=0.5)
    module = linear_map(6, 5)
    made = ready(module, plan, 18)
    x, g = numbers(4, 5, seed=1), numbers(4, 6, seed=2)
    (made(x) * g).sum().backward()

    u, v, a, b, r, c = (p.detach() for p in made.learnt())
    weight = module.weight + 0.5 * u @ v
    score = weight.abs() + 0.7 * a @ b + 1.3 * (r @ torch.ones(1, 5) + torch.ones(6, 1) @ c)
    mask = torch.zeros(30)
    mask[score.flatten().argsort()[18:]] = 1
    mask = mask.view(6, 5)
    assert torch.allclose(made(x), x @ (weight * mask).T + module.bias, atol=1e-5)
    reached = g.T @ x  # dL / d(W * M)
    of_score = reached * weight  # at dropped numbers too
    of_weight = reached * mask
    by_hand = [
        0.5 * of_weight @ v.T, 0.5 * u.T @ of_weight, 0.7 * of_score @ b.T, 0.7 * a.T @ of_score,
        1.3 * of_score.sum(1, keepdim=True), 1.3 * of_score.sum(0, keepdim=True),
    ]  # fmt: skip
    for found, expected in zip(made.learnt(), by_hand, strict=True):
        assert found.grad is not None
        assert torch.allclose(found.grad, expected, atol=1e-4)


@pytest.mark.parametrize("how", ["movement", "full"])
def test_a_score_for_every_weight_learns_what_movement_is(how: str) -> None:
    module, x, g = linear_map(6, 5), numbers(4, 5, seed=1), numbers(4, 6, seed=2)
    whole = ready(module, SparsePlan(0.6, how=how), 18)  # type: ignore[arg-type]
    learnt = numbers(6, 5, seed=3)
    with torch.no_grad():
        whole.scores.copy_(learnt)
    (whole(x) * g).sum().backward()
    score = learnt if how == "movement" else learnt + module.weight.abs()
    mask = torch.zeros(30)
    mask[score.flatten().argsort()[18:]] = 1
    reached, of_weight = g.T @ x, (g.T @ x) * mask.view(6, 5)
    assert whole.scores.grad is not None and whole.start.grad is not None
    assert torch.allclose(whole.scores.grad, reached * module.weight, atol=1e-4)
    assert torch.allclose(whole.start.grad, of_weight, atol=1e-4)


@pytest.mark.parametrize("how", ["pst", "full", "movement", "magnitude"])
def test_conv1d_and_linear_are_the_same(how: str) -> None:
    flat = linear_map(6, 5)
    turned = Conv1D(6, 5).requires_grad_(False)
    turned.weight.copy_(flat.weight.T)
    turned.bias.copy_(flat.bias)
    x, outputs = numbers(4, 5, seed=1), []
    for module in (flat, turned):
        made = SparseLinear.of(module, SparsePlan(0.6, how=how, steps=20, lr=0.05), "map")  # type: ignore[arg-type]
        fit(made, x, numbers(4, 6, seed=2), SparsePlan(0.6, how=how, steps=20, lr=0.05))  # type: ignore[arg-type]
        back = made.merge()
        assert type(back) is type(module)
        assert torch.allclose(back(x), made(x), atol=1e-6)
        outputs.append((made(x), matrix(back)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert int((outputs[0][1] == 0).sum()) == 18


def fit(made: SparseLinear, x: Tensor, y: Tensor, plan: SparsePlan) -> torch.optim.Optimizer:
    """The map trained to say y to x, by the plan's schedule."""
    for p in made.learnt():
        p.requires_grad_(True)
    optimizer, plug = make_optimizer("adamw", made, lr=plan.lr, weight_decay=0.0), Thinning([made], plan)
    for step in range(plan.steps):
        plug.begin(step)
        (made(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def descend(made: SparseLinear, x: Tensor, y: Tensor, plan: SparsePlan) -> None:
    """The same by plain gradient descent."""
    for p in made.learnt():
        p.requires_grad_(True)
    plug = Thinning([made], plan)
    for step in range(plan.steps):
        plug.begin(step)
        learning = [p for p in made.learnt() if p.requires_grad]
        grads = torch.autograd.grad((made(x) - y).square().mean(), learning)
        with torch.no_grad():
            for p, g in zip(learning, grads, strict=True):
                p -= plan.lr * g


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("where", ["rows or columns", "rows alone", "crossings"])
def test_rows_and_columns_rank_the_weights_a_teacher_uses(where: str, seed: int) -> None:
    """A quarter of the weights matters, whatever their size: those of some rows and columns, or where both cross.

    At the crossings every row and every column has weights that do not matter; Adam, which looks at signs, moves all of
    them down alike there (AUC .74 to .84), while gradient descent tells them apart.
    """
    n_out, n_in = 40, 48
    draw = torch.Generator().manual_seed(seed)
    module = linear_map(n_out, n_in, seed)
    useful = torch.zeros(n_out, n_in, dtype=torch.bool)
    rows, columns = torch.randperm(n_out, generator=draw), torch.randperm(n_in, generator=draw)
    if where == "crossings":
        useful[rows[:20, None], columns[:24]] = True
    else:
        useful[rows[: 10 if where == "rows alone" else 5]] = True
        useful[:, columns[: 0 if where == "rows alone" else 7]] = True
    x = torch.randn(512, n_in, generator=draw)
    y = x @ (module.weight * useful).T + module.bias
    plan = SparsePlan(0.75, steps=150, lr=0.5 if where == "crossings" else 3e-3, rank=2, seed=seed)
    made = SparseLinear.of(module, plan, "map")
    (descend if where == "crossings" else fit)(made, x, y, plan)
    by_lines = (made.R + made.C).detach().flatten()
    assert roc_auc_score(useful.flatten(), by_lines) >= 0.95
    assert 0.45 < roc_auc_score(useful.flatten(), module.weight.abs().flatten()) < 0.55
    by_size = largest(module.weight.abs(), zeros_of(0.75, useful.numel()))
    kept, kept_by_size = (float((m & useful).sum() / useful.sum()) for m in (made.mask(), by_size))
    assert kept > kept_by_size + 0.2


def test_what_scores_cost_and_how_much_is_trained() -> None:
    """At the shapes of BERT-base: of a block's matrices."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    state = {}
    for how in ("pst", "movement"):
        state[how] = 0
        for n_out, n_in in shapes:
            made = SparseLinear.of(nn.Linear(n_in, n_out, bias=False), SparsePlan(how=how), "map")  # type: ignore[arg-type]
            if how == "pst":
                assert sum(p.numel() for p in made.learnt()) == (n_out + n_in) * 17 == trained_numbers(n_out, n_in, 8)
            for p in made.scoring():
                p.requires_grad_(True)
            optimizer = make_optimizer("adamw", made)
            for p in made.scoring():
                p.grad = torch.ones_like(p)
            optimizer.step()
            state[how] += state_bytes(optimizer)
    assert state["pst"] <= 0.05 * state["movement"]
    assert state["movement"] >= 8 * 768 * 768 * 12  # two moments of four bytes


def classifier(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    with quiet_transformers():
        return Model.wrap(tf.BertForSequenceClassification(config), name="classifier")


@pytest.mark.parametrize("how", ["pst", "full", "movement", "magnitude"])
def test_a_classifier_learns_and_its_zeros_are_exact_after_reload(how: str, tmp_path: Path) -> None:
    model = classifier()
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    ids = some_ids(90, 8)
    labels = ids[:, 2] % 3
    plan = SparsePlan(0.9, how=how, steps=60, rows=30, lr=1e-2, rank=4)  # type: ignore[arg-type]
    source = LabelledRows(ids, labels, 30, 0, VOCAB)
    done = sparsify(model, source, Labelling(padding=0), plan, also=("classifier*", "bert.pooler*"))
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())  # the first model stays
    assert done.log["loss"].iloc[-5:].mean() < 0.8 * done.log["loss"].iloc[:5].mean()
    assert done.log["sparsity"].iloc[-1] == 0.9 and done.also == 3 * 32 + 3 + 32 * 32 + 32
    names = linear_names(model)
    assert done.maps["name"].tolist() == names
    if how == "pst":
        assert done.trained_numbers == sum((r.out + r["in"]) * 9 for _, r in done.maps.iterrows())
        assert done.maps["otherwise"].max() > 0
    if how == "magnitude":
        assert done.maps["otherwise"].max() == 0
        assert (done.log["sparsity"] == 0.9).all()

    save_model(done.model, tmp_path / "out")
    hf = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    modules = dict(hf.named_modules())
    for name in names:
        weight = modules[name].weight
        assert int((weight == 0).sum()) == zeros_of(0.9, weight.numel())
    with torch.no_grad():
        trained = done.trained.hf(input_ids=ids).logits
        assert torch.allclose(hf(input_ids=ids).logits, trained, atol=1e-5)
        assert not torch.allclose(trained, model.hf(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_keeps_exact_zeros(family: str, tmp_path: Path) -> None:
    model, ids = Model.wrap(tiny_hf(family), name=family), some_ids(32, 12)
    source = TextRows(ids, 8, 0, VOCAB)
    done = sparsify(model, source, make_objective("causal-lm", Needs(VOCAB)), QUICK)
    assert done.also == 0
    save_model(done.model, tmp_path / "out")
    hf = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(hf(input_ids=ids).logits, done.trained.logits(ids), atol=1e-5)
    modules = dict(hf.named_modules())
    for name in linear_names(model):
        weight = modules[name].weight
        assert int((weight == 0).sum()) == zeros_of(0.9, weight.numel())
    assert torch.equal(hf.get_input_embeddings().weight, model.hf.get_input_embeddings().weight)
    assert torch.equal(sparsify(model, source, make_objective("causal-lm", Needs(VOCAB)), QUICK).model.logits(ids),
                       done.model.logits(ids))  # fmt: skip


def test_half_precision_stays_and_factors_do_not(tmp_path: Path) -> None:
    hf = tiny_hf("llama").to(torch.bfloat16)
    model, ids = Model.wrap(hf, name="half"), some_ids(16, 12)
    done = sparsify(model, TextRows(ids, 8, 0, VOCAB), make_objective("causal-lm", Needs(VOCAB)), QUICK)
    assert done.model.dtype == torch.bfloat16
    assert all(one.U.dtype == torch.float32 for one in sparse_maps(done.trained).values())
    assert torch.equal(done.model.logits(ids), done.trained.logits(ids))


def test_the_schedule_rises_and_is_held() -> None:
    plan = SparsePlan(0.8, steps=100, warmup=0.1, held=0.3)
    shares = [plan.sparsity_at(s) for s in range(100)]
    assert shares[:11] == [0.0] * 11 and shares[70:] == [0.8] * 30
    assert shares[40] == pytest.approx(0.8 * (1 - 0.5**3))
    assert all(a <= b for a, b in zip(shares, shares[1:], strict=False))
    made = SparseLinear.of(linear_map(10, 10), plan, "map")
    plug = Thinning([made], plan)
    plug.begin(69)
    assert made.mask_held is None
    plug.begin(70)
    assert made.mask_held is not None and int((~made.mask_held).sum()) == 80
    with torch.no_grad():
        made.R.add_(numbers(10, 1))
    assert torch.equal(made.mask(), made.mask_held)
    assert SparsePlan(steps=1, held=0.0).sparsity_at(0) == 0.9  # one step at least has the last mask


def test_nonsense_is_refused() -> None:
    assert "sparse" in {e.name for e in REPLACEMENTS}
    with pytest.raises(VesaliusError, match="sparsity 1 is no share"):
        SparsePlan(1.0)
    with pytest.raises(UnknownName, match="movment"):
        SparsePlan(how="movment")  # type: ignore[arg-type]
    with pytest.raises(VesaliusError, match="rank 0"):
        SparsePlan(rank=0)
    with pytest.raises(VesaliusError, match="leave no step"):
        SparsePlan(warmup=0.6, held=0.5)
    with pytest.raises(VesaliusError, match="leaves none of the 4 numbers of tiny"):
        SparseLinear.of(nn.Linear(2, 2), SparsePlan(0.99), "tiny")
    with pytest.raises(VesaliusError, match="matches no parameter"):
        sparsify(classifier(), None, None, QUICK, also=("clasifier*",))
    with pytest.raises(VesaliusError, match="2 labels for 3 texts"):
        LabelledRows(some_ids(3), [0, 1], 1, 0, VOCAB)
    assert torch.equal(merged(sparse(tiny("gpt2"), QUICK)).logits(some_ids()), tiny("gpt2").logits(some_ids()))
