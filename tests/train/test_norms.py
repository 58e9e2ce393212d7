"""Norms taken out on a schedule: what stands for them, what a checkpoint holds, and what it is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import some_ids, tiny, tiny_hf
from train_helpers import small, weights
from transformers import AutoModelForCausalLM, PreTrainedModel

import vesalius
from vesalius.errors import VesaliusError
from vesalius.find.exactness import exactness
from vesalius.model import Model
from vesalius.model.anatomy import read_anatomy
from vesalius.model.constant_norms import EPS, ROOT, is_norm_free, places
from vesalius.model.hooks import Site
from vesalius.model.norms import NormView
from vesalius.train.norms import NormRemoval, schedule
from vesalius.train.objectives.base import Sample
from vesalius.train.recipe import NormSection
from vesalius.train.running import Silent, train

AT_ONCE = {"start": 1, "gap_mlp": 0, "gap_qk": 0, "gap_v": 0, "gap_separators": 0, "gap_first": 0}
FAMILIES = ["gpt2", "gpt-neox", "llama", "qwen2", "gemma", "phi"]
FAST = {"start": 2, "gap_mlp": 1, "gap_qk": 1, "gap_v": 1, "gap_separators": 1, "gap_first": 1}
STEPS = 16
ARCHITECTURE = {"layers": 2, "d_model": 32, "heads": 2, "tied": False}


def seen(removal: NormRemoval, hf: PreTrainedModel, step: int, ids: torch.Tensor) -> torch.Tensor:
    """One step's forward pass, as the trainer makes it."""
    removal.begin(step)
    removal.read(Sample({"input_ids": ids}, ids))
    logits: torch.Tensor = hf(ids).logits
    removal.terms()
    removal.end(step)
    return logits


def removed(family: str, ids: torch.Tensor, **changes: Any) -> tuple[PreTrainedModel, NormRemoval]:
    """A tiny model all of whose norms were taken out before step 1."""
    hf = tiny_hf(family)
    removal = NormRemoval(hf, NormSection(**{**AT_ONCE, **changes}), None)
    with torch.no_grad():
        seen(removal, hf, 0, ids)
    removal.begin(1)
    return hf, removal


def folded(hf: PreTrainedModel, removal: NormRemoval, folder: Path) -> PreTrainedModel:
    hf.save_pretrained(folder, state_dict=removal.weights(dict(hf.state_dict())))
    removal.written(folder)
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_until_its_step_a_norm_is_what_it_was_and_then_a_constant(family: str, tmp_path: Path) -> None:
    ids = some_ids()
    with torch.no_grad():
        expected = tiny_hf(family)(ids).logits
        hf = tiny_hf(family)
        removal = NormRemoval(hf, NormSection(**AT_ONCE), None)
        assert torch.equal(seen(removal, hf, 0, ids), expected)
        removal.begin(1)
        free = hf(ids).logits
        assert (free - expected).abs().max() > 0.01
        again = folded(hf, removal, tmp_path)
        for prompt in (ids, ids[:, :1]):
            ours, theirs = hf(prompt).logits, again(prompt).logits
            assert torch.isfinite(theirs).all()
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert type(again) is type(tiny_hf(family)) and is_norm_free(read_anatomy(again))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_the_stock_norm_of_a_folded_checkpoint_does_not_round_the_size_away(family: str, tmp_path: Path) -> None:
    hf, removal = removed(family, some_ids())
    again = folded(hf, removal, tmp_path)
    anatomy = read_anatomy(again)
    view = anatomy.main.blocks[0].norm_in
    x = torch.randn(4, 7, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    bias = 0 if view.bias is None else view.bias
    with torch.no_grad():
        once, large = view.module(x) - bias, view.module(2048 * x) - bias
    assert torch.allclose(large, 2048 * once, rtol=1e-6, atol=1e-4)  # linear: any size of input, the same constant
    assert view.scale(x).eq(1 / ROOT).all() and view.eps == EPS
    assert torch.allclose(view.jvp(x, x), view.linear(x, view.scale(x)))  # nothing of a Jacobian's second term


def test_direct_attribution_is_exact_without_norms_and_far_off_with_them(tmp_path: Path) -> None:
    ids = some_ids(4, 12)
    for family in ("gpt2", "llama"):
        before = exactness(tiny(family), ids)
        hf, removal = removed(family, ids)
        # gains are made smaller, so that the logits of a random model are of the size of a trained one's
        after = exactness(Model.wrap(folded(hf, removal, tmp_path / family)), ids)
        size = float(after.parts["measured"].max())
        assert after.of_sum < 1e-5 * max(1, size) and after.largest < 1e-5 * max(1, size)
        assert before.of_sum < 1e-4 and before.relative > 0.1
        assert after.relative < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-neox"])
def test_values_read_the_real_norm_a_while_longer(family: str) -> None:
    ids = some_ids()
    hf = tiny_hf(family)
    plain = tiny(family)
    removal = NormRemoval(hf, NormSection(**{**AT_ONCE, "gap_qk": 3, "remove": ["L0.attn"], "gap_v": 5}), None)
    with torch.no_grad():
        seen(removal, hf, 0, ids)
        removal.begin(1)
    norm = removal.norms[removal.chosen[0].name]
    assert norm.state == "split"
    sites = [Site(s, 0) for s in ("q", "k", "v", "resid_pre")]
    ours, theirs = Model.wrap(hf).run(ids, capture=sites), plain.run(ids, capture=sites)
    assert torch.allclose(ours["v", 0], theirs["v", 0], atol=1e-5)
    block, x = plain.anatomy.block(0), theirs["resid_pre", 0]
    view = block.norm_in
    scale = 1 / norm.sizes[torch.tensor([1] + [0] * (ids.shape[1] - 1))][None, :, None]
    normed = view.linear(x, scale) + (0 if view.bias is None else view.bias)
    for side in ("q", "k"):
        weight, bias = plain.anatomy.head_in(block, side)  # type: ignore[arg-type]
        expected = torch.einsum("bpd,hde->bphe", normed, weight) + (0 if bias is None else bias)
        assert torch.allclose(ours[side, 0], expected, atol=1e-4)


def test_the_order_is_the_papers() -> None:
    hf = tiny_hf("gpt2")
    plan = schedule(places(hf, read_anatomy(hf)), NormSection())
    assert [(m.step, m.what, m.address) for m in plan] == [
        (20, "mlp", "L0.MLP"), (22, "mlp", "L1.MLP"), (24, "mlp", "L2.MLP"),
        (26, "qk", "L0.attn"), (28, "qk", "L1.attn"), (30, "qk", "L2.attn"),
        (32, "v", "L0.attn"), (35, "v", "L1.attn"), (38, "v", "L2.attn"),
        (41, "unembed", "unembed"), (43, "separators", ""), (53, "first", ""),
    ]  # fmt: skip


def test_constants_are_running_means_by_kind_of_token() -> None:
    hf = tiny_hf("gpt2")
    removal = NormRemoval(hf, NormSection(**{**AT_ONCE, "start": 9, "momentum": 0.75}), separator=7)
    view = NormView(tiny_hf("gpt2").transformer.ln_f, "layer")
    expected: list[float] = []
    for step in range(3):
        ids = some_ids(4, 9, seed=step)
        ids[:, 4] = 7
        plain = Model.wrap(tiny_hf("gpt2")).run(ids, capture=[Site("resid_post", 2)])["resid_post", 2]
        sizes = 1 / view.scale(plain)[..., 0]
        kinds = torch.where(ids == 7, 2, 0)
        kinds[:, 0] = 1
        means = [float(sizes[kinds == k].mean()) for k in range(3)]
        expected = means if not expected else [0.75 * e + 0.25 * m for e, m in zip(expected, means, strict=True)]
        removal.begin(step)
        with torch.no_grad():
            for half in (ids[:2], ids[2:]):  # two micro-batches of a step
                removal.read(Sample({"input_ids": half}, half))
                hf(half)
                removal.terms()
        removal.end(step)
    assert removal.running["transformer.ln_f"].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_is_the_spread_of_sizes_before_the_last_norm() -> None:
    ids = some_ids(4, 9)
    hf = tiny_hf("gpt2")
    removal = NormRemoval(hf, NormSection(**{**AT_ONCE, "start": 3, "penalty": 0.5}), None)
    removal.read(Sample({"input_ids": ids}, ids))
    hf(ids)
    assert removal.terms() == {}  # outside of a step nothing is watched
    removal.begin(0)
    removal.read(Sample({"input_ids": ids}, ids))
    hf(ids)
    found = float(removal.terms()["norm_spread"].detach())
    state = tiny("gpt2").run(ids, capture=[Site("resid_post", 2)])["resid_post", 2]
    sizes = 1 / NormView(tiny_hf("gpt2").transformer.ln_f, "layer").scale(state)[..., 0]
    expected = 0.5 * float((sizes / sizes[:, 1:].mean() - 1).square().mean())
    assert found == pytest.approx(expected, rel=1e-4)


# -- runs


def recipe(text: Path, **changes: Any) -> Any:
    model = {"preset": changes.pop("preset", "tiny-gpt2"), "architecture": ARCHITECTURE}
    norms = changes.pop("norms", FAST)
    base = {"steps": STEPS, "checkpoints": {"log": False, "every": 100, "at": [6]}, "norms": norms}
    return small(text, model=model, **{**base, **changes})


class StopAt(Silent):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, log: Any, *_: Any) -> None:
        if log.step + 1 == self.at:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def done(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(text), tmp_path_factory.mktemp("free"))


def test_the_end_of_a_run_is_an_ordinary_norm_free_checkpoint(done: Path) -> None:
    told = json.loads((done / "summary.json").read_text())["norms"]
    assert told["ordinary_checkpoint"] and told["largest_difference"] < 1e-4
    model = vesalius.open(f"{done}@last")
    assert is_norm_free(model.anatomy) and model.hf.config.layer_norm_epsilon == EPS
    ids = torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(0))
    found = exactness(model, ids)
    assert found.of_sum < 1e-5 and found.largest < 1e-5
    assert torch.isfinite(model.logits(ids[:, :1])).all()


def test_an_interrupted_removal_ends_with_the_bytes_it_would_have_had(text: Path, done: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe(text), tmp_path, watcher=StopAt(11))  # some norms gone, some split
    again = train(recipe(text), tmp_path)
    ours, theirs = weights(again, STEPS), weights(done, STEPS)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_checkpoint_between_says_where_it_stands(done: Path) -> None:
    with pytest.raises(VesaliusError, match=r"saved while norms were being taken out .* open a step from \d+ on"):
        vesalius.open(f"{done}@step6")


def test_norms_taken_out_in_part_stay_out_on_the_bench(text: Path, tmp_path: Path) -> None:
    folder = train(recipe(text, norms={**FAST, "remove": ["L1.MLP"]}), tmp_path)
    told = json.loads((folder / "summary.json").read_text())["norms"]
    assert told == {"removed": 1, "ordinary_checkpoint": False}
    model = vesalius.open(f"{folder}@last")
    fixed = {p.address for p in places(model.hf, model.anatomy) if p.view.fixed}
    assert fixed == {"L1.MLP"}
    found = exactness(model, some_ids())
    assert found.of_sum < 1e-4
    with pytest.raises(VesaliusError, match="constants, which an ordinary checkpoint cannot hold"):
        train(small(text, model={"source": f"{folder}@last"}, data__tokenizer=None), tmp_path)


def test_refusals_say_what_is_in_the_way(text: Path, done: Path, tmp_path: Path) -> None:
    section = NormSection(**AT_ONCE)
    with pytest.raises(VesaliusError, match=r"would keep 6 norms .*q_norm.* share one epsilon"):
        NormRemoval(tiny_hf("qwen3"), section, None)
    with pytest.raises(VesaliusError, match="has no epsilon for its norms"):
        NormRemoval(tiny_hf("opt"), section, None)
    with pytest.raises(VesaliusError, match="stand on the stream itself"):
        NormRemoval(tiny_hf("bert"), section, None)
    with pytest.raises(VesaliusError, match=r"unknown norm of this model 'L9.MLP'"):
        NormRemoval(tiny_hf("gpt2"), NormSection(remove=["L9.MLP"]), None)
    with pytest.raises(VesaliusError, match="has no norms to take out"):
        train(recipe_on(text, done), tmp_path)
    with pytest.raises(
        VesaliusError, match="the last norm becomes one number at step 10, and there are 9 steps; give 11"
    ):
        train(recipe(text, steps=9), tmp_path)
    branch = {"run": str(done), "step": STEPS}
    with pytest.raises(VesaliusError, match="belongs to a run that takes norms out"):
        train(recipe(text, norms=None, steps=20, branch=branch), tmp_path)


def recipe_on(text: Path, run: Path) -> Any:
    return small(text, model={"source": f"{run}@last"}, norms=FAST, steps=STEPS, data__tokenizer=None)


def test_gemma_loses_its_block_norms_by_name_and_keeps_those_of_queries() -> None:
    hf = tiny_hf("gemma3")
    removal = NormRemoval(hf, NormSection(**{**AT_ONCE, "remove": ["L0.MLP", "L1.attn"]}), None)
    assert not removal.whole
    ids = some_ids()
    with torch.no_grad():
        seen(removal, hf, 0, ids)
        removal.begin(1)
        hf(ids)
    views = read_anatomy(hf).main.blocks
    assert [v.fixed for v in (views[0].norm_mid, views[1].norm_in, views[1].norm_mid)] == [True, True, False]
    assert not views[1].head_norms[0].fixed
