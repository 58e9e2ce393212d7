"""What goes first is what does nothing, the budget is met to the parameter, and the model is really smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, some_ids, tiny
from widening import widened

import vesalius
from vesalius.build import Architecture, build
from vesalius.change import cut
from vesalius.change.prune import budget, choose
from vesalius.change.ranking import RANKINGS, by_part, from_run
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.weights import matrix
from vesalius.parts import Part
from vesalius.runs import Run

GROUPS, NEURONS = (1,), (0, 9, 50)


def of_parts() -> Model:
    """GPT-2's parts with heads whose width is their own."""
    shape = Architecture(layers=2, d_model=32, heads=4, d_head=8, d_ff=48, vocab_size=VOCAB, max_length=64)
    hf = build(shape, seed=0, stock=False)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    hf.tie_weights()
    return Model.wrap(hf, name="parts")


BASES = {"llama": lambda: tiny("llama"), "gpt2": of_parts}


def order(model: Model, ranking: str, kind: str, layer: int) -> list[int]:
    """Numbers of the parts of a block, the first to go first."""
    found = by_part(RANKINGS.get(ranking)(model, some_ids(6, 12)))
    mine = sorted((v, p.index) for p, v in found.items() if p.kind == kind and p.layer == layer)
    return [int(i) for _, i in mine]


@pytest.mark.parametrize("base", BASES)
def test_parts_that_do_nothing_go_first_and_leave_the_model_as_it_was(base: str) -> None:
    model = BASES[base]()
    wide = widened(model, GROUPS, NEURONS, model.n_kv_heads + 1, model.d_mlp + 3)
    ids = some_ids()
    assert torch.allclose(wide.logits(ids), model.logits(ids), atol=1e-4)
    group = wide.anatomy.group
    planted = {g * group + i for g in GROUPS for i in range(group)}
    for ranking in ("amp", "amp-out", "relp"):
        for layer in range(wide.n_layers):
            assert set(order(wide, ranking, "head", layer)[: len(planted)]) == planted, ranking
            assert set(order(wide, ranking, "neuron", layer)[: len(NEURONS)]) == set(NEURONS), ranking
    for layer in range(wide.n_layers):  # by their weights they look the most important
        assert set(order(wide, "magnitude", "head", layer)[-len(planted) :]) == planted
        assert set(order(wide, "magnitude", "neuron", layer)[-len(NEURONS) :]) == set(NEURONS)
    scores = RANKINGS.get("amp")(wide, some_ids(6, 12))
    a, block = wide.anatomy, wide.anatomy.main.blocks[0]
    attention = sum(matrix(m).numel() for m in {*block.projections.values(), block.o})
    mlp = sum(matrix(m).numel() for m in (*a.mlp_readers(block), block.down))
    goes = attention / wide.n_kv_heads + mlp * len(NEURONS) / wide.d_mlp
    plan = budget(wide, goes / (attention + mlp))
    assert (plan.heads, plan.neurons) == (len(planted), len(NEURONS))
    smaller = cut(wide, choose(wide, scores, plan))
    assert smaller.n_parameters == model.n_parameters
    assert torch.allclose(smaller.logits(ids), model.logits(ids), atol=1e-4)


def test_a_loud_neuron_that_writes_nothing_is_kept_by_amp_and_dropped_by_amp_out() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for block in model.anatomy.main.blocks:
            for module in model.anatomy.mlp_readers(block):
                matrix(module)[:, 5] *= 30
            matrix(block.down)[5] = 0
    for layer in range(model.n_layers):
        assert order(model, "amp", "neuron", layer)[-1] == 5
        assert order(model, "amp-out", "neuron", layer)[0] == 5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi", "phi3", "gpt2", "gpt-neox", "opt"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_the_budget_is_met_to_within_a_neuron(family: str, ratio: float) -> None:
    model = tiny(family)
    if ratio > 0.5 and model.anatomy.spec.sizes.head_dim is None:
        with pytest.raises(VesaliusError, match="of 48 neurons of every block; give a smaller ratio"):
            budget(model, ratio)
        return
    plan = budget(model, ratio)
    keep = choose(model, RANKINGS.get("random")(model, some_ids()), plan)
    smaller = cut(model, keep)
    removed = model.n_parameters - smaller.n_parameters
    assert removed == keep.removed(model)
    biases = (plan.heads * model.d_head * 3 + plan.neurons * 2) * model.n_layers
    neuron = matrix(model.anatomy.main.blocks[0].down).shape[1] * 3 * model.n_layers
    assert abs(removed - ratio * plan.body) <= neuron / 2 + biases
    assert len({len(h) for h in keep.heads}) == len({len(n) for n in keep.neurons}) == 1


def test_query_heads_go_from_every_group_alike() -> None:
    model = tiny("llama")
    found = RANKINGS.get("random")(model, some_ids(), seed=3)
    plan = budget(model, 0.4, "within")
    assert (plan.heads, plan.way) == (2, "within")
    keep = choose(model, found, plan)
    values = by_part(found)
    for layer in range(model.n_layers):
        best = [max(range(g, g + 2), key=lambda h: values[Part("head", layer, h)]) for g in (0, 2)]
        assert keep.heads[layer] == tuple(best)
    smaller = cut(model, keep)
    assert (smaller.n_heads, smaller.n_kv_heads) == (2, 2)


def test_the_lowest_scores_go_group_by_group() -> None:
    model = tiny("llama")
    found = RANKINGS.get("random")(model, some_ids(), seed=3)
    keep = choose(model, found, budget(model, 0.5))
    values = by_part(found)
    for layer in range(model.n_layers):
        sums = [sum(values[Part("head", layer, g * 2 + i)] for i in range(2)) for g in range(2)]
        best = int(np.argmax(sums))
        assert keep.heads[layer] == (2 * best, 2 * best + 1)
        gone = set(range(model.d_mlp)) - set(keep.neurons[layer])
        assert max(values[Part("neuron", layer, i)] for i in gone) < min(
            values[Part("neuron", layer, i)] for i in keep.neurons[layer]
        )


def test_a_finding_that_does_not_know_the_parts_is_refused() -> None:
    model = tiny("llama")
    scores = RANKINGS.get("random")(model, some_ids())
    few = type(scores)(scores.parts[:-1], scores.values[:-1], info=scores.info)
    with pytest.raises(VesaliusError, match="1 of 48 neurons of L2 have no score in this finding"):
        choose(model, few, budget(model, 0.1))
    with pytest.raises(VesaliusError, match="ratio 1.5 is no share"):
        budget(model, 1.5)
    with pytest.raises(VesaliusError, match="less than one neuron"):
        budget(model, 1e-6)
    with pytest.raises(VesaliusError, match="let heads go too"):
        budget(model, 0.9, "keep")


def test_a_finding_of_the_same_files_in_another_precision_is_taken(tmp_path: Path) -> None:
    tiny("llama").hf.to(torch.bfloat16).save_pretrained(tmp_path / "files")
    tiny("llama", seed=1).hf.save_pretrained(tmp_path / "others")
    read = vesalius.open(str(tmp_path / "files"), dtype="float32")
    with Run.start({"command": "circuit", "dtype": "float32"}, tmp_path / "runs") as run:
        run.save_scores("scores", RANKINGS.get("random")(read, some_ids()))
    changed = vesalius.open(str(tmp_path / "files"), dtype="auto")
    assert changed.fingerprint != read.fingerprint
    assert from_run(changed, run.folder).values.tolist() == run.scores().values.tolist()
    with pytest.raises(VesaliusError, match="another one"):
        from_run(vesalius.open(str(tmp_path / "others")), run.folder)
