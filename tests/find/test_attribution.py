"""Attribution against a transformer written out by hand, against hooks on transformers' own, and where it is exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import tiny, tiny_hf
from pairs import random_pairs
from plain import LAYOUTS, T5, Change, Prompt, forward, padded_pairs, prompts, record
from torch import Tensor

from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.base import find
from vesalius.model import Model, Pairs, Site
from vesalius.model.gradients import Differences
from vesalius.model.graph import universe_of
from vesalius.model.relevance import Rules
from vesalius.parts import Edge, Part


@cache
def opened(family: str) -> Model:
    return tiny(family)


def close(got: np.ndarray, expected: np.ndarray, share: float = 1e-4) -> bool:
    """Equal within a share of the largest."""
    return bool(np.abs(got - expected).max() <= share * np.abs(expected).max() + 1e-7)


# -- a transformer written out, in which every sender's write and every receiver's input has a leaf -------------------


class Written:
    """GPT-2 or Llama in double precision for one prompt; `rules` changes what is differentiated, not what is computed.

    Each propagation rule is written as what it holds constant: the scale of a norm, the ratio f(v) / v of an
    activation, one half of a gate's product, and (the AH-rule) the attention pattern.
    """

    def __init__(self, model: Model, rules: Rules | None = None) -> None:
        self.model, self.rules, self.config = model, rules, model.hf.config
        self.w = {k: v.detach().double() for k, v in model.hf.state_dict().items()}
        self.llama = model.hf.config.model_type == "llama"
        self.n_heads = self.config.num_attention_heads
        self.width = self.config.hidden_size // self.n_heads
        self.leaves: dict[Part, Tensor] = {}
        self.writes: dict[Part, Tensor] = {}

    def hold(self, x: Tensor, rule: str) -> Tensor:
        return x.detach() if self.rules is not None and getattr(self.rules, rule) else x

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.llama:
            scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
            return x * self.hold(scale, "norm") * self.w[f"model.{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + self.config.layer_norm_epsilon).rsqrt()
        at = f"transformer.{name}"
        return x * self.hold(scale, "norm") * self.w[f"{at}.weight"] + self.w[f"{at}.bias"]

    def leaf(self, part: Part, x: Tensor) -> Tensor:
        self.leaves[part] = torch.zeros_like(x, requires_grad=True)
        return x + self.leaves[part]

    def project(self, layer: int, head: int, side: str, x: Tensor) -> Tensor:
        if self.llama:
            kv = head if side == "q" else head * self.config.num_key_value_heads // self.n_heads
            weight = self.w[f"model.layers.{layer}.self_attn.{side}_proj.weight"]
            return x @ weight[kv * self.width : (kv + 1) * self.width].T
        at = f"transformer.h.{layer}.attn.c_attn"
        lanes = slice(*(("qkv".index(side) * self.n_heads + head + i) * self.width for i in (0, 1)))
        return x @ self.w[f"{at}.weight"][:, lanes] + self.w[f"{at}.bias"][lanes]

    def rotate(self, x: Tensor) -> Tensor:
        half = self.width // 2
        angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)

    def head(self, layer: int, head: int, x: Tensor) -> Tensor:
        part = Part("head", layer, head)
        name = f"layers.{layer}.input_layernorm" if self.llama else f"h.{layer}.ln_1"
        read = {s: self.norm(self.leaf(replace(part, side=s), x), name) for s in "qkv"}
        q, k, v = (self.project(layer, head, s, read[s]) for s in "qkv")
        if self.llama:
            q, k = self.rotate(q), self.rotate(k)
        future = torch.ones(len(x), len(x)).triu(1).bool()
        pattern = (q @ k.T / math.sqrt(self.width)).masked_fill(future, -torch.inf).softmax(-1)
        lanes = slice(head * self.width, (head + 1) * self.width)
        if self.llama:
            out = self.w[f"model.layers.{layer}.self_attn.o_proj.weight"][:, lanes].T
        else:
            out = self.w[f"transformer.h.{layer}.attn.c_proj.weight"][lanes]
        return self.hold(pattern, "pattern") @ v @ out

    def activate(self, v: Tensor) -> Tensor:
        y = F.silu(v) if self.llama else F.gelu(v, approximate="tanh")
        return v * self.hold(y / v, "identity")

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.llama:
            at, x = f"model.layers.{layer}.mlp.", self.norm(x, f"layers.{layer}.post_attention_layernorm")
            product = self.activate(x @ self.w[at + "gate_proj.weight"].T) * (x @ self.w[at + "up_proj.weight"].T)
            return 0.5 * (product + self.hold(product, "half")) @ self.w[at + "down_proj.weight"].T
        at, x = f"transformer.h.{layer}.mlp.", self.norm(x, f"h.{layer}.ln_2")
        return self.activate(x @ self.w[at + "c_fc.weight"] + self.w[at + "c_fc.bias"]) @ self.w[at + "c_proj.weight"]

    def bias(self, layer: int, name: str) -> Tensor | float:
        return 0.0 if self.llama else self.w[f"transformer.h.{layer}.{name}.c_proj.bias"]

    def embed(self, ids: Tensor) -> Tensor:
        if self.llama:
            return self.w["model.embed_tokens.weight"][ids]
        return self.w["transformer.wte.weight"][ids] + self.w["transformer.wpe.weight"][: len(ids)]

    def run(self, embedded: Tensor) -> Tensor:
        """Logits (pos, vocabulary) from the embedding's write (pos, d); fills `writes` and `leaves`."""
        self.leaves, self.writes = {}, {}

        def write(part: Part, x: Tensor) -> Tensor:
            self.writes[part] = x.detach()
            return self.leaf(part, x)

        x = write(Part("embed"), embedded)
        for layer in range(self.config.num_hidden_layers):
            heads = [write(Part("head", layer, h), self.head(layer, h, x)) for h in range(self.n_heads)]
            x = x + torch.stack(heads).sum(0) + self.bias(layer, "attn")
            part = Part("mlp", layer)
            # An MLP reads under an address of its own, so that its leaf is not that of its write.
            x = x + write(part, self.mlp(layer, self.leaf(replace(part, side="in"), x))) + self.bias(layer, "mlp")
        x = self.norm(self.leaf(Part("unembed"), x), "norm" if self.llama else "ln_f")
        return x @ self.w["lm_head.weight"].T


def reference(model: Model, prompt: Prompt, points: list[float], rules: Rules | None) -> tuple[dict, dict]:
    """Scores of nodes and of edges; gradients averaged over points between corrupted (0) and clean (1)."""
    written = Written(model, rules)
    ends = {side: written.embed(prompt.ids(side)[0]) for side in ("clean", "corrupted")}
    writes = {}
    for side in ends:
        logits = written.run(ends[side])
        theirs = model.hf(prompt.ids(side)).logits[0]
        assert torch.allclose(logits.float(), theirs, atol=1e-4)  # the same function
        writes[side] = written.writes
    change = {p: writes["clean"][p] - writes["corrupted"][p] for p in writes["clean"]}
    nodes: dict[Part, float] = dict.fromkeys(change, 0.0)
    edges: dict[Edge, float] = {}
    for point in points:
        logits = written.run(torch.lerp(ends["corrupted"], ends["clean"], point))
        value = logits[prompt.read, prompt.right] - logits[prompt.read, prompt.wrong]
        leaves = list(written.leaves.values())
        found = torch.autograd.grad(value, leaves, materialize_grads=True)  # queries and keys of a held pattern: zero
        grads = dict(zip(written.leaves, found, strict=True))
        for part, delta in change.items():
            nodes[part] += float((grads[part] * delta).sum()) / len(points)
        for edge in universe_of(model).edges:
            receiver = replace(edge.receiver, side="in") if edge.receiver.kind == "mlp" else edge.receiver
            more = float((grads[receiver] * change[edge.sender]).sum()) / len(points)
            edges[edge] = edges.get(edge, 0.0) + more
    return nodes, edges


METHODS: Mapping[str, tuple[str, dict[str, object], list[float], Rules | None]] = {
    "plain, denoise": ("attribution-patching", {}, [0.0], None),
    "plain, noise": ("attribution-patching", {"direction": "noise"}, [1.0], None),
    "eap": ("eap", {}, [1.0], None),
    "eap-ig": ("eap-ig", {}, [0.2, 0.4, 0.6, 0.8, 1.0], None),
    "eap-ig, 3 steps": ("eap-ig", {"steps": 3}, [1 / 3, 2 / 3, 1.0], None),
    "relp": ("relp", {}, [0.0], Rules()),
    "relp, noise": ("relp", {"direction": "noise"}, [1.0], Rules()),
    "relp, pattern": ("relp", {"pattern_rule": True}, [0.0], Rules(pattern=True)),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shared", [0, 5])
def test_nodes_and_edges_equal_the_written_out_model(family: str, name: str, shared: int) -> None:
    """Llama's keys and values are shared by two heads each: every query head has edges of its own."""
    model = opened(family)
    pairs = random_pairs(model, rows=2, shared=shared)
    method, options, points, rules = METHODS[name]
    by_node = find(method, model, pairs, parts="head,mlp,embed", **options)
    by_edge = find(method, model, pairs, level="edge", **options)
    for column, prompt in enumerate(prompts(pairs)):
        nodes, edges = reference(model, prompt, points, rules)
        for got, expected in (
            (by_node, [nodes[p] for p in by_node.parts]),
            (by_edge, [edges[e] for e in by_edge.parts]),
        ):
            assert close(got.per_example[:, column], np.array(expected), 3e-4)


# -- other families: hooks on transformers' modules -------------------------------------------------------------------


def plain_scores(
    model: Model, prompt: Prompt, parts: list[Part], side: str, points: Sequence[float] = ()
) -> np.ndarray:
    """Gradient times difference by a leaf added to every part, (part,).

    Args:
        side: whose run is differentiated. points: average instead over runs whose first block reads a point on the line
            from the corrupted (0) to the clean (1) prompt's embedding.
    """
    _, clean = record(model, prompt, "clean", parts)
    _, corrupted = record(model, prompt, "corrupted", parts)
    blocks = T5["enc"][0] if model.kind == "encoder-decoder" else LAYOUTS[model.name].blocks
    first = model.hf.get_submodule(f"{blocks}.0")
    entered: dict[str, Tensor] = {}
    for one in ("clean", "corrupted"):
        note = first.register_forward_pre_hook(lambda _, args, one=one: entered.__setitem__(one, args[0].detach()))
        record(model, prompt, one, [])
        note.remove()
    total = np.zeros(len(parts))
    for point in points or [None]:
        leaves: dict[Part, Tensor] = {}

        def adder(part: Part, leaves: dict[Part, Tensor] = leaves) -> Change:
            def add(x: Tensor) -> Tensor:
                leaves[part] = torch.zeros_like(x, requires_grad=True)
                return x + leaves[part]

            return add

        def between(_: object, args: tuple[Tensor, ...], point: float | None = point) -> tuple[Tensor, ...] | None:
            return None if point is None else (torch.lerp(entered["corrupted"], entered["clean"], point), *args[1:])

        handle = first.register_forward_pre_hook(between)
        logits, _ = forward(model, {p: adder(p) for p in parts}, **prompt.inputs(side))
        handle.remove()
        grads = torch.autograd.grad(prompt.difference(logits), [leaves[p] for p in parts])
        total += [float((g * (clean[p] - corrupted[p])).sum()) for g, p in zip(grads, parts, strict=True)]
    return total / max(1, len(points))


@pytest.mark.parametrize("family", ["gpt-neox", "gptj", "gemma2", "bloom", "opt", "qwen3", "bert", "t5"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_gradient_times_difference_in_every_kind_of_model(family: str, direction: str, padding: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [6, 9, 7], padding, 3)
    scores = find("attribution-patching", model, pairs, direction=direction, parts="head,xhead,mlp")
    side = "corrupted" if direction == "denoise" else "clean"
    for column, prompt in enumerate(prompts(pairs)):
        expected = plain_scores(model, prompt, list(scores.parts), side)
        assert close(scores.per_example[:, column], expected, 1e-3)


@pytest.mark.parametrize("family", ["gpt-neox", "gptj", "gemma2", "bloom", "opt", "bert", "t5"])
@pytest.mark.parametrize("shared", [1, 4])
def test_gradients_averaged_along_the_line_in_every_kind_of_model(family: str, shared: int) -> None:
    """The line joins what enters the first block: the encoder's, where only the encoder's prompt differs."""
    model = opened(family)
    pairs = padded_pairs(model, [6, 8], "left", shared)
    scores = find("eap-ig", model, pairs, parts="head,xhead,mlp", steps=4)
    for column, prompt in enumerate(prompts(pairs)):
        expected = plain_scores(model, prompt, list(scores.parts), "corrupted", [0.25, 0.5, 0.75, 1.0])
        assert close(scores.per_example[:, column], expected, 1e-3)


# -- where estimates are exact ----------------------------------------------------------------------------------------


def straightened(family: str) -> Model:
    """The same architecture as a linear map: norms whose scale cannot move, uniform attention, no curved activation."""
    if family == "gpt2":
        import transformers as tf
        from families import _GPT

        torch.manual_seed(0)
        hf = tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT, activation_function="linear", layer_norm_epsilon=1e8))
    else:
        hf = tiny_hf(family)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight"):
                p.fill_(1e4)  # times 1 / sqrt(1e8 + x^2): one, to seven digits
            elif family == "gpt2" and "c_attn.weight" in name:
                p[:, : hf.config.n_embd] = 0  # no queries
            elif "q_proj" in name or ("down_proj" in name and family == "llama"):
                p.zero_()  # a gate's product is not linear: without it
            elif p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        if family == "gpt2":
            for block in hf.transformer.h:
                block.attn.c_attn.bias[: hf.config.n_embd] = 0
        hf.get_output_embeddings().weight.mul_(10)
    for module in hf.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e8
    hf.tie_weights()
    return Model.wrap(hf, name=family)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_in_a_linear_model_every_estimate_is_the_exact_effect(family: str, level: str) -> None:
    model = straightened(family)
    pairs = random_pairs(model)
    exact = find("activation-patching", model, pairs, level=level)
    assert np.abs(exact.values).max() > 0.1
    assert close(
        find("activation-patching", model, pairs, level=level, direction="noise").per_example, exact.per_example
    )
    for method in ("attribution-patching", "eap", "eap-ig", "relp"):
        scores = find(method, model, pairs, level=level)
        assert list(scores.parts) == list(exact.parts)
        assert close(scores.per_example, exact.per_example), method


def without_biases(family: str) -> Model:
    hf = tiny_hf(family)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    return Model.wrap(hf, name=family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "qwen2", "phi3", "gemma", "gemma2", "gemma3"])
def test_relevance_is_conserved_from_block_to_block(family: str) -> None:
    """With all rules on and no biases a model is linear in its stream: activation . relevance is the logit difference.

    Soft-capping and query-key norms sit inside the pattern, or after the logits, where nothing is conserved.
    """
    model = without_biases(family)
    if model.anatomy.softcap is not None:
        model = Model.wrap(model.hf, name=family)
        object.__setattr__(model.anatomy, "softcap", None)
    pairs = random_pairs(model)
    sites = [Site("resid_pre", i) for i in range(model.n_layers)] + [Site("resid_post", model.n_layers - 1)]
    run = Differences(model, pairs, sites).gradients("clean", Rules(pattern=True))
    assert run.values.abs().min() > 0.01
    for site in sites:
        carried = (run.acts[site] * run.grads[site]).sum((1, 2))
        assert torch.allclose(carried, run.values, rtol=2e-3, atol=2e-4), site
    plain = Differences(model, pairs, sites[:1]).gradients("clean")
    lost = (plain.acts[sites[0]] * plain.grads[sites[0]]).sum((1, 2)) - run.values
    assert lost.abs().max() > 10 * 2e-3 * run.values.abs().max()  # which the plain gradient does not do


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-neox", "bloom"])
@pytest.mark.parametrize("method", ["attribution-patching", "eap", "eap-ig", "relp"])
def test_a_node_is_the_sum_of_its_outgoing_edges(family: str, method: str) -> None:
    model = opened(family)
    pairs = random_pairs(model, shared=4)
    nodes = find(method, model, pairs, parts="head,mlp,embed")
    edges = find(method, model, pairs, level="edge")
    place = {part: i for i, part in enumerate(nodes.parts)}
    total = np.zeros_like(nodes.per_example)
    for edge, score in zip(edges.parts, edges.per_example, strict=True):
        total[place[edge.sender]] += score
    assert close(total, nodes.per_example, 1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_integrated_gradients_add_up_to_the_whole_difference(family: str) -> None:
    """Completeness of the embedding's score; the error of the sum falls with the number of steps."""
    model = opened(family)
    pairs = random_pairs(model, shared=2)
    whole = [record(model, p, "clean", [])[0] - record(model, p, "corrupted", [])[0] for p in prompts(pairs)]
    errors = []
    for steps in (2, 16, 128):
        scores = find("eap-ig", model, pairs, parts="embed", steps=steps)
        errors.append(np.abs(scores.per_example[0] - whole).max())
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02 * np.abs(whole).max() + 1e-3


def test_one_step_is_the_gradient_on_the_clean_run() -> None:
    model = opened("llama")
    pairs = random_pairs(model, shared=4)
    for level in ("node", "edge"):
        one, clean = find("eap-ig", model, pairs, level=level, steps=1), find("eap", model, pairs, level=level)
        assert close(one.per_example, clean.per_example, 1e-5)


@pytest.mark.parametrize("method", ["attribution-patching", "eap", "eap-ig", "relp"])
@pytest.mark.parametrize("shared", [0, 5])
def test_positions_add_up(method: str, shared: int) -> None:
    model = opened("gpt2")
    pairs = random_pairs(model, shared=shared)
    pairs = replace(pairs, positions={"some": torch.tensor([6, -1, 3])})
    whole = find(method, model, pairs).per_example
    each = find(method, model, pairs, position="each").per_example.reshape(len(whole), pairs.length, 3)
    assert close(each.sum(1), whole)
    assert np.abs(each[:, :shared]).max(initial=0) == 0  # nothing differs there
    some = find(method, model, pairs, position="some")
    assert set(some.positions) == {"some"}
    expected = np.stack([each[:, 6, 0], np.zeros(len(whole)), each[:, 3, 2]], axis=1)
    assert close(some.per_example, expected)


def passes(model: Model, method: str, pairs: Pairs, **options: object) -> int:
    calls = []
    module = model.anatomy.main.blocks[0].mlp_in
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    find(method, model, pairs, **options)
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma2"])
def test_nodes_cost_two_forward_passes_and_integrated_gradients_one_more_a_step(family: str) -> None:
    model = opened(family)
    pairs = random_pairs(model)
    for method in ("attribution-patching", "eap", "relp"):
        assert passes(model, method, pairs) == 2
    assert passes(model, "eap-ig", pairs, steps=5) <= 2 + 5


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model = opened("gpt2")
    pairs = random_pairs(model)
    with pytest.raises(VesaliusError, match="steps is 0; integrated gradients need at least 1"):
        find("eap-ig", model, pairs, steps=0)
    with pytest.raises(UnknownName, match="unknown kind of part 'heads'; did you mean 'head'"):
        find("relp", model, pairs, parts="heads")
    with pytest.raises(UnknownName, match="direction 'both'"):
        find("relp", model, pairs, direction="both")
    with pytest.raises(UnknownName, match="position 'end'.*each"):
        find("relp", model, pairs, position="end")
    for family in ("opt-350m", "bert", "t5"):
        with pytest.raises(VesaliusError, match="edges between its parts are not defined; use --level node"):
            find("eap", opened(family), random_pairs(opened(family)), level="edge")
