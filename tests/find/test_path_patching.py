"""Path patching against its definition written out with one forward pass and plain hooks a sender."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch
from families import ALL, tiny
from pairs import PlainLogitDiff, random_pairs
from torch import Tensor, nn

from vesalius.build import Planted, planted
from vesalius.errors import PartError, VesaliusError
from vesalius.find.base import Context, find
from vesalius.find.path_patching import path_patching
from vesalius.model import Model, Pairs
from vesalius.parts import Part, parse_part

FAMILIES = ["gpt2", "llama", "gpt-neox", "gemma3"]
CLOSE = 3e-6  # logits are compared in single precision, effects are as small as 1e-4


@cache
def opened(family: str) -> Model:
    """A tiny model in double precision: some paths carry very little."""
    return Model.wrap(tiny(family).hf.double(), name=family)


@cache
def ungrouped(family: str) -> Model:
    """The same function with a key and a value projection for every query head."""
    hf = opened(family).hf
    config = copy.deepcopy(hf.config)
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared is None or shared == heads:
        return opened(family)
    config.num_key_value_heads = heads
    state = dict(hf.state_dict())
    for name in state:
        if ".k_proj." in name or ".v_proj." in name:
            state[name] = state[name].unflatten(0, (shared, -1)).repeat_interleave(heads // shared, dim=0).flatten(0, 1)
    other = type(hf)(config).double().eval()
    other.load_state_dict(state)
    return Model.wrap(other, name=family)


@dataclass
class Plain:
    """One forward pass of transformers' model, with outputs replaced and recorded by hooks made here."""

    family: str
    seen: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def run(self, ids: Tensor, put: dict[tuple[str, int], Callable[[Tensor], Tensor]]) -> Tensor:
        """Logits; `put` changes z (heads flat), q, k, v (row, pos, head, d_head) or an MLP's write."""
        model, handles = ungrouped(self.family), []

        def note(key: tuple[str, int], x: Tensor) -> Tensor:
            self.seen[key] = x.clone()
            return put[key](x.clone()) if key in put else x

        def before(module: nn.Module, key: tuple[str, int]) -> None:
            handles.append(module.register_forward_pre_hook(lambda m, args: (note(key, args[0]), *args[1:])))

        def after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
            handles.append(module.register_forward_hook(lambda m, args, out: change(out)))

        for i, block in enumerate(model.anatomy.main.blocks):
            before(block.o, ("z", i))
            after(block.norm_mlp_out.module if block.norm_mlp_out else block.down, lambda x, i=i: note(("mlp", i), x))
            heads, width = model.n_heads, model.d_head
            if self.family == "gpt2":  # all queries, all keys, all values

                def fused(x: Tensor, i: int = i) -> Tensor:
                    sides = zip("qkv", x.unflatten(-1, (3, heads, width)).unbind(-3), strict=True)  # noqa: B023
                    return torch.stack([note((s, i), y) for s, y in sides], dim=-3).flatten(-3)

                after(block.projections["q"], fused)
            elif self.family == "gpt-neox":  # query, key and value of one head, then of the next

                def woven(x: Tensor, i: int = i) -> Tensor:
                    sides = zip("qkv", x.unflatten(-1, (heads, 3, width)).unbind(-2), strict=True)  # noqa: B023
                    return torch.stack([note((s, i), y) for s, y in sides], dim=-2).flatten(-3)

                after(block.projections["q"], woven)
            else:
                for side, module in block.projections.items():
                    after(
                        module,
                        lambda x, s=side, i=i, w=width: note((s, i), x.unflatten(-1, (-1, w))).flatten(-2),
                    )
        try:
            with torch.no_grad():
                return model.hf(ids).logits
        finally:
            for handle in handles:
                handle.remove()

    def metric(self, pairs: Pairs, logits: Tensor) -> Tensor:
        read = logits[torch.arange(pairs.n_rows)[:, None], pairs.reads]
        return pairs.value(read[..., pairs.metric.tokens(pairs)])


def reference(
    family: str, pairs: Pairs, receivers: list[Part], sender: Part, freeze: bool, noise: bool, at: Tensor | None
) -> Tensor:
    """The score of one sender (example,), by the definition alone."""
    model = opened(family)
    ids, other = (pairs.clean, pairs.corrupted) if noise else (pairs.corrupted, pairs.clean)
    mine, theirs = Plain(family), Plain(family)
    base = mine.metric(pairs, mine.run(ids, {}))
    theirs.run(other, {})
    width = model.d_head

    def held(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
        def change(_: Tensor) -> Tensor:
            new = mine.seen[key].clone()
            if key == ("z" if sender.kind == "head" else "mlp", sender.layer):
                rows = slice(None) if at is None else torch.arange(pairs.n_rows)
                place = slice(None) if at is None else at
                lanes = (
                    slice(sender.index * width, (sender.index + 1) * width) if sender.kind == "head" else slice(None)
                )
                new[rows, place, lanes] = theirs.seen[key][rows, place, lanes]
            return new

        return change

    put = {("z", i): held(("z", i)) for i in range(model.n_layers)}
    put |= {("mlp", i): held(("mlp", i)) for i in range(model.n_layers) if freeze}
    if sender.kind == "mlp":
        put["mlp", sender.layer] = held(("mlp", sender.layer))
    first = Plain(family)
    logits = first.run(ids, put)
    if receivers[0].kind != "unembed":
        read = dict(first.seen)

        def placed(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                if key[0] == "mlp":
                    return read[key]
                for r in receivers:
                    if (r.side, r.layer) == key:
                        x[:, :, r.index] = read[key][:, :, r.index]
                return x

            return change

        keys = [(r.side or "mlp", r.layer) for r in receivers]
        logits = first.run(ids, {key: placed(key) for key in keys})
    change = first.metric(pairs, logits) - base
    return -change if noise else change


RECEIVERS = {
    "unembed": "unembed",
    "one query": "L2.H1.q",
    "keys and values of a shared group": "L2.H0.k,L2.H1.v",
    "two layers": "L1.H2.q,L2.H3.v,L1.MLP",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("receivers", RECEIVERS.values(), ids=RECEIVERS)
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_equals_the_definition(family: str, receivers: str, freeze: bool, direction: str) -> None:
    model = opened(family)
    pairs = random_pairs(model, shared=3)
    got = path_patching(
        model,
        pairs,
        Context(),
        receivers=receivers,
        freeze_mlps=freeze,
        direction=direction,
        senders="head,mlp",
    )
    parts = [parse_part(name) for name in receivers.split(",")]
    assert len(got) == model.n_layers * (model.n_heads + 1)
    size = 0.0
    for part, score in zip(got.parts, got.per_example, strict=True):
        expected = reference(family, pairs, parts, part, freeze, direction == "noise", None)
        assert np.allclose(score, expected.numpy(), atol=CLOSE), part
        size = max(size, float(expected.abs().max()))
    assert size > 10 * CLOSE  # there was something to get wrong


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("receivers", ["unembed", "L2.H1.k,L2.H2.q"])
def test_at_named_positions(family: str, receivers: str) -> None:
    model = opened(family)
    pairs = random_pairs(model, shared=2)
    places = {"a": torch.tensor([3, 5, 4]), "end": torch.tensor([8, 8, 8])}
    pairs = replace(pairs, positions=places)
    got = path_patching(model, pairs, Context(), receivers=receivers, position="a,end")
    assert got.positions == ["a", "end"] * model.n_layers * model.n_heads
    parts = [parse_part(p) for p in receivers.split(",")]
    for part, place, score in zip(got.parts, got.positions, got.per_example, strict=True):
        expected = reference(family, pairs, parts, part, False, True, places[place])
        assert np.allclose(score, expected.numpy(), atol=CLOSE), (part, place)
    each = path_patching(model, pairs, Context(), receivers=receivers, position="each")
    assert len(each) == pairs.length * len(model.parts(("head",)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-neox", "gemma3"])
def test_direct_paths_alone_are_the_change_of_the_write_through_the_final_norm(family: str) -> None:
    """With MLPs frozen nothing lies between a sender's write and the logits but the final norm and the unembedding."""
    model = opened(family)
    pairs = random_pairs(model)
    got = path_patching(model, pairs, Context(), freeze_mlps=True, senders="head,mlp")
    mine, theirs = Plain(family), Plain(family)
    base = mine.metric(pairs, mine.run(pairs.clean, {}))
    theirs.run(pairs.corrupted, {})
    hidden: list[Tensor] = []
    handle = model.anatomy.main.final_norm.module.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    model.hf(pairs.clean)
    handle.remove()
    for part, score in zip(got.parts, got.per_example, strict=True):
        block = ungrouped(family).anatomy.main.blocks[part.layer]
        if part.kind == "mlp":
            delta = theirs.seen["mlp", part.layer] - mine.seen["mlp", part.layer]
        else:
            z = mine.seen["z", part.layer].clone()
            lanes = slice(part.index * model.d_head, (part.index + 1) * model.d_head)
            z[..., lanes] = theirs.seen["z", part.layer][..., lanes]
            after = block.norm_attn_out.module if block.norm_attn_out else nn.Identity()
            delta = after(block.o(z)) - after(block.o(mine.seen["z", part.layer]))
        logits = model.hf.get_output_embeddings()(model.anatomy.main.final_norm.module(hidden[0] + delta))
        assert np.allclose(score, (base - mine.metric(pairs, logits)).detach().numpy(), atol=2 * CLOSE), part


@pytest.mark.parametrize(("family", "norm"), [("gpt2", "transformer.ln_f"), ("llama", "model.norm")])
def test_without_a_final_norm_direct_paths_of_all_parts_and_the_embedding_sum_to_the_whole(
    family: str, norm: str
) -> None:
    hf = copy.deepcopy(opened(family).hf)
    hf.set_submodule(norm, nn.Identity())
    model = Model.wrap(hf, name=family)
    pairs = random_pairs(model)
    got = path_patching(model, pairs, Context(), freeze_mlps=True, senders="head,mlp")
    plain = Plain(family)
    sides = [hf(ids, output_hidden_states=True) for ids in (pairs.clean, pairs.corrupted)]
    whole = plain.metric(pairs, sides[0].logits) - plain.metric(pairs, sides[1].logits)
    embed = hf.get_output_embeddings()(sides[0].hidden_states[0] - sides[1].hidden_states[0])
    total = got.per_example.sum(0) + plain.metric(pairs, embed).detach().numpy()
    assert np.allclose(total, whole.detach().numpy(), atol=2 * CLOSE)


@pytest.mark.parametrize("receivers", ["unembed", "L1.H2.q,L2.H0.v,L2.MLP"])
def test_batched_equals_one_at_a_time_and_any_memory_budget(receivers: str) -> None:
    model = opened("llama")
    pairs = random_pairs(model, rows=5, shared=3)
    options = {"receivers": receivers, "senders": "head,mlp"}
    whole = find("path-patching", model, pairs, **options)
    small = find("path-patching", model, pairs, memory_gb=1e-9, **options)
    assert np.allclose(whole.per_example, small.per_example, atol=1e-5)
    alone = [find("path-patching", model, pairs.take([i]), **options).per_example[:, 0] for i in range(5)]
    assert np.allclose(whole.per_example, np.stack(alone, axis=1), atol=1e-5)


@cache
def subject(task: str, base: str, seed: int = 0) -> tuple[Planted, Model, Pairs]:
    name = {"ioi": "name-mover", "who-stayed": "name-mover"}.get(task, task)
    made = planted(name, base, seed=seed)
    made = made.for_task(task) if name == "name-mover" else made
    examples = made.examples(4, seed=1)

    def ids(texts: list[str]) -> Tensor:
        return torch.tensor(made.tokenizer(texts)["input_ids"])

    clean = ids([e.clean for e in examples])
    pairs = Pairs(
        clean=clean,
        corrupted=ids([e.corrupted for e in examples]),
        mask=torch.ones_like(clean),
        reads=torch.full((4, 1), clean.shape[1] - 1),
        read_mask=torch.ones(4, 1, dtype=torch.bool),
        row_example=torch.arange(4),
        row_right=torch.ones(4, dtype=torch.bool),
        answers=ids([e.answer for e in examples]).tolist(),
        wrong=ids([e.wrong for e in examples]).tolist(),
        metric=PlainLogitDiff(),
    )
    return made, Model.wrap(made.hf, made.tokenizer, name=task), pairs


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize(("task", "first"), [("ioi", "duplicate-token"), ("who-stayed", "previous-token")])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_walking_back_from_the_logits_finds_each_planted_head(base: str, task: str, first: str, direction: str) -> None:
    """Wang et al.'s stages: movers at the logits, inhibition at their queries, then what inhibition reads."""
    truth, model, pairs = subject(task, base)
    head = {role: part for part, role in truth.roles.items()}
    values = ",".join(f"{head['inhibition']}.{side}" for side in "kv")
    stages = [("unembed", "mover"), (f"{head['mover']}.q", "inhibition"), (values, first)]
    whole = 2 * abs(find("direct", model, pairs).info["sum"])  # clean and corrupted answers are opposites
    for receivers, role in stages:
        scores = find("path-patching", model, pairs, receivers=receivers, direction=direction)
        assert scores[head[role]] > 0.5 * whole
        others = [abs(v) for p, v in zip(scores.parts, scores.values, strict=True) if p != head[role]]
        assert max(others) < 0.001 * whole, (receivers, role)


class Killed(Exception):
    pass


@dataclass
class Shelf:
    """A store that can break off after so many pieces."""

    left: int = 10**9
    kept: dict[str, np.ndarray] = field(default_factory=dict)

    def get(self, key: str) -> np.ndarray | None:
        return self.kept.get(key)

    def put(self, key: str, values: np.ndarray) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        assert key not in self.kept
        self.kept[key] = values


@pytest.mark.parametrize("receivers", ["unembed", "L2.H1.q,L2.MLP"])
def test_a_killed_run_goes_on(receivers: str) -> None:
    model = opened("gpt2")
    pairs = random_pairs(model, rows=18)  # two batches
    whole = find("path-patching", model, pairs, receivers=receivers)
    shelf = Shelf(left=5)
    tight = 4e-5  # GiB: a few senders at a time
    with pytest.raises(Killed):
        find("path-patching", model, pairs, receivers=receivers, memory_gb=tight, store=shelf)
    before = dict(shelf.kept)
    shelf.left = 10**9
    seen: list[tuple[int, int]] = []
    again = find(
        "path-patching",
        model,
        pairs,
        receivers=receivers,
        memory_gb=tight,
        store=shelf,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert np.allclose(whole.per_example, again.per_example, atol=1e-5)
    assert all(np.array_equal(shelf.kept[key], value) for key, value in before.items())
    assert seen == sorted(seen) and seen[-1] == (seen[-1][1], again.info["senders_run"] * 2)


def test_only_senders_before_a_receiver_are_run() -> None:
    for family, expected in [("gpt2", 8), ("gpt-neox", 4)]:  # parallel: a block's MLP does not read its own heads
        scores = find("path-patching", opened(family), random_pairs(opened(family)), receivers="L1.MLP")
        assert scores.info["senders_run"] == expected
        assert scores.info["senders_not_before_a_receiver"] == 12 - expected
        assert {p for p, v in zip(scores.parts, scores.values, strict=True) if v} == set(scores.parts[:expected])


@pytest.mark.parametrize("family", ALL)
def test_the_last_block_reaches_unembed_as_in_activation_patching(family: str) -> None:
    """The last heads have nothing after them but an MLP: freezing other heads changes nothing."""
    model = opened(family)
    pairs = random_pairs(model, shared=4)
    kind = "xhead" if model.kind == "encoder-decoder" else "head"
    paths = find("path-patching", model, pairs, senders=kind)
    patches = find("activation-patching", model, pairs, direction="noise", parts=kind)
    last = [Part(kind, model.n_layers - 1, head, stack=model.anatomy.main.prefix) for head in range(model.n_heads)]
    assert max(abs(patches[part]) for part in last) > 10 * CLOSE
    for part in last:
        assert paths[part] == pytest.approx(patches[part], abs=CLOSE), part


def test_refusals_say_what_to_do() -> None:
    model = opened("gpt2")
    pairs = random_pairs(model)
    for receivers, message in [
        ("L9.H0.q", "does not exist"),
        ("L1.resid_pre", "is no receiver"),
        ("unembed,L1.H0.q", "apart"),
        ([], "no receivers"),
    ]:
        with pytest.raises((PartError, VesaliusError), match=message):
            find("path-patching", model, pairs, receivers=receivers)
    with pytest.raises(VesaliusError, match="no kind of sender"):
        find("path-patching", model, pairs, senders="neuron")
