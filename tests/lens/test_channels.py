"""Channels between heads: planted ones are found and removed exactly; scores and edits equal the dense algebra."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import ALL, D, some_ids, tiny
from pairs import random_pairs
from transformers import LlamaForCausalLM

from vesalius.build import planted
from vesalius.build.channel import planted_channel
from vesalius.errors import PartError, UnknownName, VesaliusError
from vesalius.lens import (
    ComponentEdit,
    Subspace,
    Wiring,
    components_between,
    composition,
    coordinates,
    edited,
    grid,
    inhibition,
    save_edited,
    steer,
)
from vesalius.lens.channels import measure
from vesalius.lens.places import reads
from vesalius.lens.wiring import outlying
from vesalius.model import Model, Pairs
from vesalius.model.head_weights import head_weights
from vesalius.parts import Edge, Part, parse
from vesalius.tasks.encode import Encoder, Example, encode


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_a_planted_component_stands_out_where_the_whole_matrix_does_not(seed: int, side: str) -> None:
    it = planted_channel(side, seed)
    model, edge = Model.wrap(it.hf), it.edge
    found = components_between(model, edge)
    best = int(found["score"].idxmax())
    assert best == it.component == 31  # the smallest singular value
    assert abs(float(Wiring.of(model).components(edge.sender).v[:, best] @ it.direction)) > 0.999
    assert found["z"][best] > 10
    assert found["z"].drop(best).max() < 3
    scores = composition(model, kinds=side)
    row = scores.parts.index(edge)
    assert len(scores) == 16**2 and int(scores.columns["component"][row]) == best
    assert scores.columns["p"][row] == 1 / 16**2  # the first of all pairs by its component ...
    assert scores.columns["p_whole"][row] > 0.1  # ... and not among the first tenth undecomposed
    assert scores.columns["z"].argmax() == row


def test_taking_the_planted_component_out_removes_the_effect_and_no_other_does() -> None:
    it = planted_channel("v")
    model = Model.wrap(it.hf.double())  # its constants are large: float32 leaves rounding behind
    ids = torch.tensor([[7, 3, 5], [7, 4, 6], [7, 5, 5], [0, 3, 6]])
    pairs = with_answers(ids, it.right, it.wrong)
    edits = [ComponentEdit(it.edge.sender, {number: 0.0}) for number in range(32)]
    found = measure(model, pairs, lambda group: [[], *[[e.intervention(model)] for e in edits]]).metric
    base, others = found[0], np.delete(found[1:], it.component, axis=0)
    assert np.abs(base).min() > 0.5
    assert np.abs(found[1 + it.component]).max() < 1e-4 * np.abs(base).min()
    assert np.abs(others - base).max() < 0.01 * np.abs(base).min()
    with pytest.raises(UnknownName, match="unknown position 'IO'"):
        inhibition(model, pairs, [it.edge])


def with_answers(ids: torch.Tensor, right: int, wrong: int) -> Pairs:
    """Prompts that all ask for the same two tokens at their last position."""
    pairs = random_pairs(tiny("llama"), rows=len(ids), length=ids.shape[1])
    return Pairs(
        **{f: getattr(pairs, f) for f in ("read_mask", "row_example", "row_right", "metric", "reads")},
        clean=ids,
        corrupted=ids.roll(1, 0),
        mask=torch.ones_like(ids),
        answers=[[right]] * len(ids),
        wrong=[[wrong]] * len(ids),
    )


@pytest.mark.parametrize("family", ALL)
def test_factored_scores_equal_the_dense_ones(family: str) -> None:
    model = tiny(family)
    scores = composition(model)
    rng = np.random.default_rng(0)
    for row in rng.choice(len(scores), size=12, replace=False):
        edge = scores.parts[row]
        assert isinstance(edge, Edge)
        a, b, side = edge.sender, edge.receiver, edge.receiver.side
        sender = head_weights(model, a.layer, a.stack or None, cross=a.kind == "xhead").ov[a.index].dense()
        weights = head_weights(model, b.layer, b.stack or None, cross=b.kind == "xhead")
        qk, ov = weights.qk[b.index].dense(), weights.ov[b.index].dense()
        reader = {"q": qk, "k": qk.T, "v": ov}[str(side)]
        between = torch.eye(D)
        if model.anatomy.post_norm:  # through the gains of the norms of the stream in between, each centring first
            for layer in range(a.layer, b.layer):
                for norm in (model.anatomy.block(layer).norm_in, model.anatomy.block(layer).norm_mid):
                    between = between @ (torch.eye(D) - torch.ones(D, D) / D) @ torch.diag(norm.gain)
        written = sender @ between
        whole = (written @ reader).norm() / (written.norm() * reader.norm())
        assert scores.columns["whole"][row] == pytest.approx(float(whole), rel=1e-4), edge
        _, s, vh = torch.linalg.svd(sender)
        rows = vh[: model.d_head] @ between
        rows = rows / rows.norm(dim=1, keepdim=True)
        each = (rows @ reader).norm(dim=1) / reader.norm()
        assert scores.values[row] == pytest.approx(float(each.max()), rel=2e-3), edge
        assert scores.columns["share"][row] == pytest.approx(
            float(s[int(scores.columns["component"][row])] ** 2 / (s**2).sum()), rel=1e-3, abs=1e-6
        )


def test_edges_run_forward_and_cross_where_the_model_does() -> None:
    t5 = tiny("t5")
    edges = {str(e) for e in composition(t5, kinds="qk").parts}
    assert "enc.L0.H1->dec.L0.X2.k" in edges and "dec.L1.H0->dec.L1.X3.q" in edges and "dec.L0.X1->dec.L2.H0.q" in edges
    assert "enc.L0.H1->dec.L1.H2.k" not in edges and "dec.L0.H1->dec.L1.X2.k" not in edges
    head, cross = Part("head", 1, 0, stack="dec"), Part("xhead", 1, 0, stack="dec")
    assert reads(t5, head, cross, "q") and not reads(t5, cross, head, "q")
    llama = tiny("llama")
    scores = composition(llama, senders=["L0.H1", "L2.H0"], receivers="L1.H3")
    assert [str(e) for e in scores.parts] == ["L0.H1->L1.H3.q", "L0.H1->L1.H3.k", "L0.H1->L1.H3.v"]
    whole = composition(llama)
    for edge, value in zip(scores.parts, scores.values, strict=True):
        assert value == whole[edge]
    offset = composition(llama, kinds="qv", offsets=4)
    same = composition(llama, kinds="qv")
    assert np.array_equal(offset.kind("edge").values.shape, same.values.shape)
    assert offset["L0.H1->L1.H3.v"] == same["L0.H1->L1.H3.v"] != offset["L0.H1->L1.H3.q"]


def test_outlying_is_leave_one_out() -> None:
    x = np.random.default_rng(0).normal(size=(3, 9))
    plain = [[(row[i] - np.delete(row, i).mean()) / np.delete(row, i).std(ddof=1) for i in range(9)] for row in x]
    assert np.allclose(outlying(x), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma3", "bloom", "opt-350m", "bert", "t5"])
def test_an_edit_of_the_weights_is_the_edit_of_the_pass_and_leaves_no_trace(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    pairs = random_pairs(model)
    part = "dec.L1.X2" if family == "t5" else "L1.H2"
    edit = ComponentEdit.of(part, {0: -1.0, 3: 2.5})
    weights = head_weights(model, 1, "dec" if family == "t5" else None, cross=family == "t5", fold=True)
    before, z = weights.ov[2], edit.matrix(model)
    u, s, v = before.svd()
    wanted = before.dense() - 2 * s[0] * torch.outer(u[:, 0], v[:, 0]) + 1.5 * s[3] * torch.outer(u[:, 3], v[:, 3])
    assert torch.allclose(before.left @ z @ before.right, wanted, atol=1e-4 * float(wanted.abs().max()))
    state = {k: x.clone() for k, x in model.hf.state_dict().items()}
    in_pass = measure(model, pairs, lambda group: [[], [edit.intervention(model)]])
    with edited(model, [edit]):
        in_weights = measure(model, pairs, lambda group: [[]])
    assert np.allclose(in_weights.metric[0], in_pass.metric[1], atol=1e-4)
    assert not np.allclose(in_pass.metric[0], in_pass.metric[1], atol=1e-3)
    after = model.hf.state_dict()
    assert all(torch.equal(x, after[k]) for k, x in state.items())
    with edited(model, [edit]):
        changed = [k for k, x in model.hf.state_dict().items() if not torch.equal(x, state[k])]
    assert len(changed) == 1
    if family == "llama":
        folder = save_edited(model, [edit], tmp_path / "edited", {"accuracy": 0.5})
        reopened = Model.wrap(LlamaForCausalLM.from_pretrained(folder).eval())
        ids = some_ids()
        with edited(model, [edit]):
            assert torch.allclose(reopened.logits(ids), model.logits(ids), atol=1e-6)
        story = json.loads((folder / "vesalius.json").read_text())
        assert story["components"] == [{"part": "L1.H2", "factors": {"0": -1.0, "3": 2.5}, "fold": True}]
        assert story["of"]["fingerprint"] == model.fingerprint and story["measured"] == {"accuracy": 0.5}
        with pytest.raises(VesaliusError, match="is there already"):
            save_edited(model, [edit], folder)


def test_inhibition_is_carried_by_the_components_that_were_planted() -> None:
    """In the planted IOI model the inhibition head tells the mover which name is out, a component a name."""
    it = planted("name-mover", "llama", seed=0)
    model = Model.wrap(it.hf, it.tokenizer, name="planted")
    sender, receiver = (next(p for p, r in it.roles.items() if r == role) for role in ("inhibition", "mover"))
    examples = [
        Example(
            p.clean,
            p.corrupted,
            (p.answer,),
            (p.wrong,),
            {"IO": span(p.clean, p.answer, 0), "S2": span(p.clean, p.wrong, 1)},
        )
        for p in it.examples(8)
    ]
    pairs = encode(Encoder(it.tokenizer), examples, model, "logit-diff", "single", [""] * len(examples))
    edge = Edge(sender, Part("head", receiver.layer, receiver.index, "q"))
    names = composition(model, sender, receiver, kinds="q")
    assert names.columns["p"][0] <= 1 / model.n_heads
    all_out = ComponentEdit(sender, {i: 0.0 for i in range(model.d_head)})
    found = measure(
        model,
        pairs,
        lambda g: [[], [all_out.intervention(model, g.reads[:, :1])]],
        watch=[receiver],
        places=["IO", "S2"],
    )
    gap = found.attention[..., 0] - found.attention[..., 1]
    assert gap[0].min() > 0.8 and abs(gap[1]).max() < 0.1  # without it the mover looks at both names alike
    scores = inhibition(model, pairs, [edge])
    assert len(scores) == Wiring.of(model).locate(sender)[0].components.s.shape[-1]
    # each name has its own component, or one in a degenerate space: together they carry it, idle ones carry nothing
    sigma = Wiring.of(model).locate(sender)[0].components.s[sender.index]
    idle = sigma < 1e-4 * sigma[0]
    assert float(np.abs(scores.values[idle.numpy()]).max(initial=0)) < 1e-3


def span(text: str, word: str, mention: int) -> tuple[int, int]:
    """The place of a word's first (0) or last (1) mention."""
    word = word.strip()
    at = text.rindex(word) if mention else text.index(word)
    return at, at + len(word)


def test_a_subspace_is_set_added_to_and_stretched() -> None:
    model = tiny("llama")
    pairs = random_pairs(model)
    space = Subspace.of_channels(model, [("L0.H0", 0), ("L0.H1", 1), ("L0.H3", 0)], 2)
    assert torch.allclose(space.basis @ space.basis.T, torch.eye(2), atol=1e-5)
    part = Part("resid_pre", 2)
    here = coordinates(model, pairs, space, part)
    points = grid(here, points=2, reach=1.0)
    assert len(points) == 4 and np.allclose(np.mean(points, 0), here.mean(0))
    x = torch.randn(2, 3, D)
    where = torch.tensor([[1], [2]])
    for how, wanted in (
        ("set", lambda c: points[1] + 0 * c),
        ("add", lambda c: c + np.array(points[1])),
        ("scale", lambda c: c * np.array(points[1])),
    ):
        moved = x
        for change in space.interventions(part, points[1], how, where):
            moved = change.changed(moved)
        before, after = ((t @ space.basis.T).numpy() for t in (x, moved))
        for row, at in enumerate((1, 2)):
            assert np.allclose(after[row, at], wanted(before[row, at]), atol=1e-4)
            out = torch.eye(D) - space.basis.T @ space.basis
            assert torch.allclose(moved[row, at] @ out, x[row, at] @ out, atol=1e-4)
            assert torch.equal(moved[row, 0], x[row, 0])
    found = steer(model, pairs, space, part, points, watch=["L2.H1"])
    assert len(found.to_frame()) == 5 and found.measured.metric.shape == (5, pairs.n_examples)
    still = steer(model, pairs, space, part, [(1.0, 1.0)], how="scale").measured.metric
    assert np.allclose(still[0], still[1], atol=1e-5)
    assert torch.allclose(Subspace.random(model, 3, 5).basis, Subspace.random(model, 3, 5).basis)


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (lambda m: composition(m, senders="L7.H0"), PartError, "L7.H0 does not exist"),
        (lambda m: composition(m, senders="L0.MLP"), PartError, "not an attention head"),
        (lambda m: composition(m, kinds="x"), UnknownName, "kind of composition"),
        (lambda m: composition(m, senders="L2.H0"), VesaliusError, "no channel runs from L2.H0 to any head"),
        (lambda m: composition(m, senders=[]), VesaliusError, "no head was named"),
        (lambda m: components_between(m, parse("L1.H0->L0.H1.q")), VesaliusError, "later blocks alone"),
        (lambda m: components_between(m, parse("L0.H0->L1.H1")), PartError, "write L0.H0->L1.H1.q"),
        (lambda m: ComponentEdit.of("L0.MLP", {0: 0}), PartError, "only heads have components"),
        (lambda m: ComponentEdit.of("L0.H1", {}), VesaliusError, "changes no component"),
        (lambda m: ComponentEdit.of("L0.H1", {99: 0}).matrix(m), PartError, "components 0 to 7, not 99"),
        (lambda m: Subspace.of_channels(m, [("L0.H0", 0)], 3), VesaliusError, "give at least as many"),
        (lambda m: Subspace.of_channels(m, [("L0.H0", 0)] * 3, 3), VesaliusError, "fewer than 3 directions"),
        (lambda m: steer(m, random_pairs(m), Subspace.random(m), "L1.resid_pre", []), VesaliusError, "no points"),
        (
            lambda m: steer(m, random_pairs(m), Subspace.random(m), "L1.resid_pre", [(1.0,)]),
            VesaliusError,
            "a point of 1 coordinates",
        ),
    ],
)
def test_bad_requests_are_refused(ask, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        ask(tiny("llama"))
    assert "\n" not in str(caught.value)
