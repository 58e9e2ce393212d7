"""Codebooks: the layer's arithmetic and gradients, planted codes, keeping, forcing, reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from features_helpers import spoken, words
from torch import Tensor

from vesalius.errors import ModelError, RunError, VesaliusError
from vesalius.features.codebooks import (
    Chosen,
    Codebook,
    CodebookRecipe,
    Codebooks,
    chosen,
    fit,
    pattern_labels,
    train_codebooks,
)
from vesalius.features.dictionaries import prompt_rows


def reference(book: Codebook, x: Tensor) -> Tensor:
    """The mean of the k codes with the largest inner product with the unit code, one vector at a time."""
    out = torch.zeros_like(x)
    for r in range(x.shape[0]):
        for p in range(x.shape[1]):
            for g in range(x.shape[2]):
                codes = book.codes[g].detach()
                near = [float(x[r, p, g] @ c / c.norm()) for c in codes]
                best = sorted(range(len(near)), key=lambda i: -near[i])[: book.k]
                out[r, p, g] = codes[best].mean(0)
    return out


def test_the_output_is_the_mean_of_the_nearest_codes_and_gradients_pass_straight_through() -> None:
    book = Codebook(2, 9, 5, 3)
    x = torch.randn(2, 4, 2, 5, requires_grad=True)
    out = book(x)
    assert torch.allclose(out, reference(book, x.detach()), atol=1e-6)
    assert float(book.missed.detach()) == pytest.approx(float((out - x).detach().pow(2).mean()), abs=1e-6)
    push = torch.randn_like(out)
    (out * push).sum().backward()
    assert torch.allclose(x.grad, push)  # as if the bottleneck were not there
    wanted = torch.zeros_like(book.codes)
    for place in np.ndindex(2, 4, 2):
        for code in book.chosen[place].tolist():
            wanted[place[2], code] += push[place] / 3
    assert torch.allclose(book.codes.grad, wanted, atol=1e-6)
    book.force({1: 4})
    assert torch.allclose(book(x)[:, :, 1], book.codes[1, 4].expand(2, 4, 5), atol=1e-6)
    assert torch.allclose(book(x)[:, :, 0], out[:, :, 0], atol=1e-6)
    book.force({0: 2}, "lowest")
    two = book.codes[0][torch.cat([book.choose(x)[0, 0, 0, :2], torch.tensor([2])])].mean(0)
    if 2 not in book.choose(x)[0, 0, 0].tolist():
        assert torch.allclose(book(x)[0, 0, 0], two, atol=1e-6)
    with pytest.raises(VesaliusError, match="no code 9 of group 0"):
        book.force({0: 9})
    with pytest.raises(VesaliusError, match="9 codes cannot have 12"):
        Codebook(1, 9, 5, 12)


def test_k_means_finds_planted_codes_and_unused_ones_are_replaced() -> None:
    drawn = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 8, generator=drawn)
    x = centres[torch.arange(600) % 6] + 0.05 * torch.randn(600, 8, generator=drawn)
    book = Codebook(1, 6, 8, 1)
    book.start(x[:, None])
    away = torch.cdist(book.codes[0].detach(), centres).amin(0)
    assert float(away.max()) < 0.1
    optimizer = torch.optim.AdamW(book.parameters(), lr=0.1)
    book.codes.data[0, 2] = -book.codes.data[0].mean(0) * 50  # where nothing is
    book.train()
    book(x[None, :, None]).pow(2).sum().backward()
    optimizer.step()
    dead = book.uses[0] == 0
    assert dead[2]
    assert book.replace_dead(optimizer, np.random.default_rng(0), 1.0) == int(dead.sum())
    assert float(torch.cdist(book.codes[0, 2:3].detach(), x).min()) == 0 and not book.uses.any()
    assert (optimizer.state[book.codes]["exp_avg"][0, 2] == 0).all()
    with pytest.raises(VesaliusError, match="NaN or infinite"):
        book.start(torch.full((20, 1, 8), float("nan")))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_a_codebook_that_holds_every_vector_changes_nothing_and_one_that_does_not_does(family: str) -> None:
    model = spoken(family)
    ids = prompt_rows(model, [words(3, 9, 4, 7)]).ids[0][None]
    places = ["L0.z", "L1.MLP", "L2.resid_post"]
    books = Codebooks(model, places, 4, 1).eval()
    plain = model.logits(ids)
    assert books.book("L0.z").groups == model.n_heads and books.book("L0.z").width == model.d_head
    with torch.no_grad():
        for site in books.sites:
            book = books.book(site)
            x = model.run(ids, capture=[site])[site][:, 1:]
            rows = x.unflatten(-1, (book.groups, book.width)) if x.dim() == 3 else x
            scaled = torch.nn.functional.normalize(rows[0], dim=-1)  # so that each vector is nearest to itself
            near = torch.einsum("pgd,qgd->pqg", rows[0], scaled).argmax(1)
            assert (near == torch.arange(4)[:, None]).all()
            book.codes.copy_(rows[0].transpose(0, 1))
        with books.attached(model):
            assert torch.allclose(model.hf(ids).logits, plain, atol=1e-4)
            books.book("L2.resid_post").codes.zero_()
            assert not torch.allclose(model.hf(ids).logits, plain, atol=1e-2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_codes_are_found_by_what_they_mean() -> None:
    labels = np.array([True] * 10 + [False] * 90)
    codes = np.zeros((100, 1, 2), dtype=np.int64)
    codes[:, 0, 1] = 1
    codes[:8, 0, 0] = 5  # eight of the ten, and two others
    codes[50:52, 0, 0] = 5
    table = fit(Chosen({"L0.MLP": codes}, np.zeros(100, int), np.arange(100)), labels)
    best = table.iloc[0]
    assert (best["code"], best["tokens"]) == (5, 10)
    assert best["precision"] == pytest.approx(0.8) and best["recall"] == pytest.approx(0.8)
    with pytest.raises(VesaliusError, match="0 of 100 tokens bear the label"):
        fit(Chosen({"L0.MLP": codes}, np.zeros(100, int), np.arange(100)), np.zeros(100, dtype=bool))


def test_patterns_are_marked_token_by_token() -> None:
    model = spoken("llama")
    rows = prompt_rows(model, [words(3, 44, 5), words(44, 7)])
    books = Codebooks(model, ["L1.MLP"], 6, 2).eval()
    found = chosen(model, books, rows)
    assert found.codes["L1.MLP"].shape == (5, 1, 2)
    assert pattern_labels(model, rows, found, "w44").tolist() == [False, True, False, True, False]
    with pytest.raises(VesaliusError, match="not a regular expression"):
        pattern_labels(model, rows, found, "(")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with codebooks, trained on walks through a machine of five states."""
    model = tiny("llama")
    recipe = CodebookRecipe(
        size=24, k=2, steps=40, rows=8, length=16, lr=3e-3, every=10, start_tokens=400, check_batches=2
    )
    out = tmp_path_factory.mktemp("codes")
    return train_codebooks(model, ["MLP"], "synthetic:fsm", recipe, out=out, states=5, edges=2)


def test_training_lowers_the_loss_and_keeps_an_ordinary_checkpoint(trained: Path) -> None:
    import json

    from transformers import AutoModelForCausalLM

    told = json.loads((trained / "summary.json").read_text())
    losses = told["losses"]
    assert losses["with codes"] < losses["codes put in"] - 0.5
    model, books = Codebooks.load(trained)
    ids = torch.tensor([[10, 0, 3, 0, 1, 0, 2]])
    plain = AutoModelForCausalLM.from_pretrained(trained / "model").eval()
    assert torch.equal(plain(ids).logits, model.logits(ids))
    with books.attached(model):
        coded = model.hf(ids).logits
    assert not torch.allclose(coded, model.logits(ids), atol=1e-3) and not (trained / "steps").exists()


def test_a_model_with_tied_embeddings_is_trained_and_kept(tmp_path: Path) -> None:
    """Its one matrix of tokens has two names in what is trained."""
    model = tiny("gpt2")
    assert model.hf.lm_head.weight is model.hf.transformer.wte.weight
    recipe = CodebookRecipe(size=8, k=1, steps=3, rows=4, length=16, every=2, start_tokens=100, check_batches=1)
    made = train_codebooks(model, ["MLP"], "synthetic:fsm", recipe, out=tmp_path, states=5, edges=2)
    found, _ = Codebooks.load(made)
    assert found.hf.lm_head.weight is found.hf.transformer.wte.weight


def test_forcing_a_code_acts_while_it_is_forced(trained: Path) -> None:
    model, books = Codebooks.load(trained)
    ids = torch.tensor([[10, 0, 3, 0, 1]])
    with books.attached(model), torch.no_grad():
        free = model.hf(ids).logits
        with books.forcing("L2.MLP", {0: 7}):
            forced = model.hf(ids).logits
        assert torch.equal(model.hf(ids).logits, free)
    assert not torch.allclose(free, forced, atol=1e-3)


def test_what_cannot_be_is_refused(trained: Path, tmp_path: Path) -> None:
    import json
    import shutil

    with pytest.raises(ModelError, match="bert is masked"):
        Codebooks(tiny("bert"), ["MLP"], 8, 1)
    model = tiny("llama")
    with pytest.raises(VesaliusError, match="not at L1.neurons"):
        Codebooks(model, ["L1.neurons"], 8, 1)
    with pytest.raises(VesaliusError, match="no codebook at L1.z; there are at L0.MLP"):
        Codebooks(model, ["L0.MLP"], 8, 1).book("L1.z")
    with pytest.raises(VesaliusError, match="no tokenizer"):
        train_codebooks(model, ["MLP"], "foldoc", out=tmp_path)
    with pytest.raises(RunError, match="no codebooks in"):
        Codebooks.load(tmp_path)
    shutil.copytree(trained, tmp_path / "copy")
    note = json.loads((tmp_path / "copy" / "codebooks.json").read_text())
    (tmp_path / "copy" / "codebooks.json").write_text(json.dumps(note | {"weights": "0" * 16}))
    with pytest.raises(RunError, match="of another model than the one beside them"):
        Codebooks.load(tmp_path / "copy")
