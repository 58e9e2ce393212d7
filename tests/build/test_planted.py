"""The truth that planted models claim, found again by brute force: one plain forward pass a part, one an edge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vesalius.build import PLANTED, Planted, planted
from vesalius.errors import UnknownName, VesaliusError
from vesalius.parts import Edge, Part, parse

TASKS = [
    ("induction", "induction"),
    ("name-mover", "ioi"),
    ("name-mover", "who-stayed"),
    ("successor", "successor"),
    ("successor-mlp", "successor"),
]

every_task = pytest.mark.parametrize(("name", "task"), TASKS)
both_bases = pytest.mark.parametrize("base", ["gpt2", "llama"])


def total(writes: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(writes)).sum(dim=0)


@cache
def made(name: str, base: str, seed: int = 0) -> Planted:
    return planted(name, base, seed=seed)


class Batch:
    """Prompts of one planted model as tensors, and the logit difference at their last token."""

    def __init__(self, model: Planted, n: int, seed: int = 1) -> None:
        examples = model.examples(n, seed)

        def ids(texts: list[str]) -> Tensor:
            return torch.tensor(model.tokenizer(texts)["input_ids"])

        self.clean, self.corrupted = ids([e.clean for e in examples]), ids([e.corrupted for e in examples])
        self.right, self.wrong = ids([e.answer for e in examples])[:, 0], ids([e.wrong for e in examples])[:, 0]

    def difference(self, logits: Tensor) -> Tensor:
        """Right minus wrong, (..., example), from logits (..., example, vocabulary)."""
        rows = torch.arange(len(self.right))
        return logits[..., rows, self.right] - logits[..., rows, self.wrong]


class Plain:
    """A transformer written out head by head, in which each input of each head can be given separately.

    Shares no code with Hugging Face's modules, only their weights. Residuals are (batch, pos, d_model).
    """

    def __init__(self, model: Planted) -> None:
        config = model.hf.config
        self.base, self.w = model.base, {k: v.detach() for k, v in model.hf.state_dict().items()}
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.d_head = config.hidden_size // self.n_heads
        self.group = self.n_heads // getattr(config, "num_key_value_heads", self.n_heads)

    def embed(self, ids: Tensor) -> Tensor:
        if self.base == "gpt2":
            return self.w["transformer.wte.weight"][ids] + self.w["transformer.wpe.weight"][: ids.shape[1]]
        return self.w["model.embed_tokens.weight"][ids]

    def norm(self, x: Tensor, which: str) -> Tensor:
        if self.base == "gpt2":
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"transformer.{which}.weight"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"model.{which}.weight"]

    def matrices(self, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (d_model, d_head) and out (d_head, d_model)."""
        d, mine = self.d_head, slice(head * self.d_head, (head + 1) * self.d_head)
        if self.base == "gpt2":
            q, k, v = self.w[f"transformer.h.{layer}.attn.c_attn.weight"].chunk(3, dim=1)
            return q[:, mine], k[:, mine], v[:, mine], self.w[f"transformer.h.{layer}.attn.c_proj.weight"][mine]
        at, shared = f"model.layers.{layer}.self_attn.", head // self.group
        theirs = slice(shared * d, (shared + 1) * d)
        q, k, v = (self.w[f"{at}{n}_proj.weight"][s].T for n, s in (("q", mine), ("k", theirs), ("v", theirs)))
        return q, k, v, self.w[f"{at}o_proj.weight"][:, mine].T

    def rotate(self, x: Tensor) -> Tensor:
        half = self.d_head // 2
        angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def head(self, layer: int, head: int, xq: Tensor, xk: Tensor, xv: Tensor) -> Tensor:
        """What the head writes when its queries, keys and values are read from these residuals."""
        which = f"h.{layer}.ln_1" if self.base == "gpt2" else f"layers.{layer}.input_layernorm"
        w_q, w_k, w_v, w_o = self.matrices(layer, head)
        q, k, v = self.norm(xq, which) @ w_q, self.norm(xk, which) @ w_k, self.norm(xv, which) @ w_v
        if self.base == "llama":
            q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.d_head)
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v @ w_o

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.base == "gpt2":
            at = f"transformer.h.{layer}.mlp."
            before = self.norm(x, f"h.{layer}.ln_2") @ self.w[at + "c_fc.weight"]
            return F.gelu(before, approximate="tanh") @ self.w[at + "c_proj.weight"]
        at, x = f"model.layers.{layer}.mlp.", self.norm(x, f"layers.{layer}.post_attention_layernorm")
        hidden = F.silu(x @ self.w[at + "gate_proj.weight"].T) * (x @ self.w[at + "up_proj.weight"].T)
        return hidden @ self.w[at + "down_proj.weight"].T

    def logits(self, x: Tensor) -> Tensor:
        """(batch, vocabulary) at the last position."""
        return self.norm(x[..., -1, :], "ln_f" if self.base == "gpt2" else "norm") @ self.w["lm_head.weight"].T

    def writes(self, ids: Tensor) -> dict[Part, Tensor]:
        """What every sender writes on these prompts, in the order of computation."""
        out = {Part("embed"): self.embed(ids)}
        for layer in range(self.n_layers):
            x = total(out.values())
            out |= {Part("head", layer, h): self.head(layer, h, x, x, x) for h in range(self.n_heads)}
            out[Part("mlp", layer)] = self.mlp(layer, total(out.values()))
        return out

    def receivers(self) -> list[Part]:
        heads = [Part("head", i, h, s) for i in range(self.n_layers) for h in range(self.n_heads) for s in "qkv"]
        return [*heads, *(Part("mlp", layer) for layer in range(self.n_layers)), Part("unembed")]

    def senders(self, receiver: Part, parts: Iterable[Part]) -> list[Part]:
        """Those whose writes the receiver reads."""
        same_block = (receiver.layer,) if receiver.kind == "head" else ()
        return [part for part in parts if part.order < receiver.output.order and part.layer not in same_block]

    def logits_with_leaves(self, embedded: Tensor, leaves: dict[Part, Tensor]) -> Tensor:
        """A forward pass in which every receiver's input has a zero added, kept in `leaves` to differentiate by."""

        def read(receiver: Part) -> Tensor:
            leaves[receiver] = torch.zeros_like(x, requires_grad=True)
            return x + leaves[receiver]

        x = embedded
        for layer in range(self.n_layers):
            parts = [Part("head", layer, h) for h in range(self.n_heads)]
            x = x + sum(self.head(layer, h, *(read(replace(p, side=s)) for s in "qkv")) for h, p in enumerate(parts))
            x = x + self.mlp(layer, read(Part("mlp", layer)))
        return self.logits(read(Part("unembed")))

    def after(self, receiver: Part, inputs: Tensor, clean: dict[Part, Tensor]) -> Tensor:
        """Logits when this receiver alone reads `inputs` (batch, pos, d_model) in place of the clean residual."""
        if receiver.kind == "unembed":
            return self.logits(inputs)
        before = [part for part in clean if part.order < receiver.output.order]
        heads = [part for part in clean if part.kind == "head" and part.layer == receiver.layer]
        layer = receiver.layer or 0
        x = total(clean[part] for part in before if part not in heads)  # the residual that enters the block
        if receiver.kind == "mlp":
            x = x + sum(clean[part] for part in heads) + self.mlp(layer, inputs)
        else:
            sides = [inputs if receiver.side == s else x.expand_as(inputs) for s in "qkv"]
            others = [clean[part] for part in heads if part != receiver.output]
            x = x + sum(others) + self.head(layer, receiver.index or 0, *sides)
            x = x + self.mlp(layer, x)
        for later in range(layer + 1, self.n_layers):
            x = x + sum(self.head(later, h, x, x, x) for h in range(self.n_heads))
            x = x + self.mlp(later, x)
        return self.logits(x)


def edge_effects(model: Planted, batch: Batch, denoise: bool) -> dict[Edge, float]:
    """Change of the logit difference, as a share of the clean one, when one edge carries the other prompt's value."""
    plain = Plain(model)
    here, there = (batch.corrupted, batch.clean) if denoise else (batch.clean, batch.corrupted)
    own, other = plain.writes(here), plain.writes(there)
    whole = batch.difference(plain.logits(total(own.values()))).mean()
    out: dict[Edge, float] = {}
    for receiver in plain.receivers():
        senders = plain.senders(receiver, own)
        x = total(own[part] for part in senders)
        inputs = torch.stack([x + other[part] - own[part] for part in senders])  # (sender, example, pos, d_model)
        # senders that are batched with the examples meet the clean writes by broadcasting
        changed = batch.difference(plain.after(receiver, inputs, own)).mean(dim=1)
        out |= {Edge(s, receiver): float(c - whole) / abs(float(whole)) for s, c in zip(senders, changed, strict=True)}
    return out


def node(model: Planted, part: Part) -> tuple[torch.nn.Module, slice]:
    """The linear layer whose input is this part's activation, and the columns that belong to the part."""
    body = model.hf.transformer.h if model.base == "gpt2" else model.hf.model.layers
    block = body[part.layer]
    if part.kind == "mlp":
        return (block.mlp.c_proj if model.base == "gpt2" else block.mlp.down_proj), slice(None)
    d = model.hf.config.hidden_size // model.hf.config.num_attention_heads
    projection = block.attn.c_proj if model.base == "gpt2" else block.self_attn.o_proj
    index = part.index or 0
    return projection, slice(index * d, (index + 1) * d)


def hooked(model: Planted, ids: Tensor, edits: list[tuple[Part, Callable[[Tensor], Tensor]]]) -> Tensor:
    """Hugging Face's logits at the last token, (example, vocabulary), with some parts' activations replaced or seen."""
    handles = []
    try:
        for part, edit in edits:
            module, columns = node(model, part)

            def hook(_: object, args: tuple[Tensor], columns: slice = columns, edit: object = edit) -> tuple[Tensor]:
                x = args[0].clone()
                x[..., columns] = edit(x[..., columns])  # type: ignore[operator]
                return (x,)

            handles.append(module.register_forward_pre_hook(hook))
        return model.hf(ids).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


def activations(model: Planted, ids: Tensor) -> dict[Part, Tensor]:
    seen: dict[Part, Tensor] = {}
    parts = model.true_parts | model.idle_parts

    def keep(part: Part) -> Callable[[Tensor], Tensor]:
        return lambda x: seen.setdefault(part, x.clone())

    hooked(model, ids, [(part, keep(part)) for part in parts])
    return seen


class Patching:
    """Exact patching, one forward a question: the change of the logit difference as a share of the unpatched one."""

    def __init__(self, model: Planted, batch: Batch, denoise: bool = False) -> None:
        self.model, self.batch = model, batch
        self.here, there = (batch.corrupted, batch.clean) if denoise else (batch.clean, batch.corrupted)
        self.other = activations(model, there)
        self.whole = batch.difference(hooked(model, self.here, [])).mean()

    def effect(self, *parts: Part) -> float:
        """The effect of giving these parts, together, their values on the other prompt."""

        def put(part: Part) -> Callable[[Tensor], Tensor]:
            return lambda _: self.other[part]

        changed = self.batch.difference(hooked(self.model, self.here, [(part, put(part)) for part in parts])).mean()
        return float((changed - self.whole) / self.whole.abs())


@torch.no_grad()
@both_bases
@every_task
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_on_every_example_by_a_wide_margin(name: str, task: str, base: str, seed: int) -> None:
    model = made(name, base, seed).for_task(task)
    batch = Batch(model, 200, seed)
    clean, corrupted = (model.hf(ids).logits[:, -1] for ids in (batch.clean, batch.corrupted))
    assert torch.equal(clean.argmax(-1), batch.right)
    assert torch.equal(corrupted.argmax(-1), batch.wrong)
    assert batch.difference(clean).min() > 8
    assert batch.difference(corrupted).max() < -8


@torch.no_grad()
@both_bases
@every_task
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_patching_finds_precisely_the_true_parts(name: str, task: str, base: str, seed: int) -> None:
    model = made(name, base, seed).for_task(task)
    batch = Batch(model, 6)
    for denoise in (False, True):
        patching, sign = Patching(model, batch, denoise), 1 if denoise else -1
        for part in model.true_parts:
            assert sign * patching.effect(part) > 0.1, part
        for part in model.idle_parts:
            assert abs(patching.effect(part)) < 1e-4, part
        # together: the circuit is the whole difference, the rest none of it
        assert sign * patching.effect(*model.true_parts) > 1.5
        assert abs(patching.effect(*model.idle_parts)) < 3e-4


@torch.no_grad()
@both_bases
@every_task
def test_true_edges_are_those_that_matter_in_a_plain_reference(name: str, task: str, base: str) -> None:
    model = made(name, base).for_task(task)
    batch = Batch(model, 2)
    ours = Plain(model)
    theirs = model.hf(batch.clean).logits[:, -1]
    assert torch.allclose(ours.logits(total(ours.writes(batch.clean).values())), theirs, atol=1e-3)
    for denoise in (False, True):
        effects = edge_effects(model, batch, denoise)
        assert {edge for edge, effect in effects.items() if abs(effect) > 0.01} == model.true_edges
        rest = {edge: effect for edge, effect in effects.items() if edge not in model.true_edges}
        worst = max(rest, key=lambda edge: abs(rest[edge]))
        assert abs(rest[worst]) < 1e-3, (worst, rest[worst])


@both_bases
@every_task
def test_integrated_gradients_see_every_true_edge(name: str, task: str, base: str) -> None:
    """EAP-IG with 5 steps, plainly: no part is so saturated that its gradient is lost among the idle ones."""
    model = made(name, base).for_task(task)
    batch, plain, steps = Batch(model, 2), Plain(model), 5
    with torch.no_grad():
        clean, corrupted = plain.writes(batch.clean), plain.writes(batch.corrupted)
    scores: dict[Edge, float] = {}
    for step in range(1, steps + 1):
        leaves: dict[Part, Tensor] = {}
        embedded = torch.lerp(corrupted[Part("embed")], clean[Part("embed")], step / steps)
        value = batch.difference(plain.logits_with_leaves(embedded, leaves)).mean()
        for receiver, gradient in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            for sender in plain.senders(receiver, clean):
                change = float((gradient * (clean[sender] - corrupted[sender])).sum()) / steps
                edge = Edge(sender, receiver)
                scores[edge] = scores.get(edge, 0.0) + change
    weakest = min(abs(scores[edge]) for edge in model.true_edges)
    strongest_other = max(abs(score) for edge, score in scores.items() if edge not in model.true_edges)
    assert weakest > 0.3  # logits, of a whole difference of 20
    assert weakest > 50 * strongest_other


@torch.no_grad()
@both_bases
def test_attention_is_sharp_but_not_saturated(base: str) -> None:
    model = made("name-mover", base)
    batch = Batch(model, 16)
    model.hf.set_attn_implementation("eager")
    patterns = model.hf(batch.clean, output_attentions=True).attentions
    model.hf.set_attn_implementation("sdpa")
    for part, role in model.roles.items():
        at = 9 if role == "duplicate-token" else -1  # "when A and B went to the store , A gave a ring to"
        largest = patterns[part.layer][:, part.index, at].max(dim=-1).values
        assert largest.min() > 0.88 and largest.max() < 0.985, (part, largest)


@torch.no_grad()
@both_bases
@every_task
def test_saved_as_an_ordinary_checkpoint(name: str, task: str, base: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = made(name, base).for_task(task)
    folder = model.save(tmp_path / "model", n=5)
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = Batch(model, 8)
    assert type(hf) is type(model.hf)
    assert torch.equal(hf(batch.clean).logits, model.hf(batch.clean).logits)
    truth = json.loads((folder / "circuit.json").read_text())["tasks"][task]
    assert {parse(text) for text in truth["edges"]} == model.true_edges
    assert {parse(text): role for text, role in truth["parts"].items()} == model.roles
    lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        prompt = tokenizer(line["clean"])["input_ids"]
        assert len(tokenizer(line["corrupted"])["input_ids"]) == len(prompt)
        for answer in (line["answer"], line["wrong"]):
            whole = tokenizer(line["clean"] + answer)["input_ids"]
            assert whole[:-1] == prompt and tokenizer.unk_token_id not in whole


@torch.no_grad()
@both_bases
def test_left_padding_changes_nothing(base: str) -> None:
    model = made("induction", base)
    text = [e.clean for e in model.examples(4)]
    plain = model.tokenizer(text, return_tensors="pt")
    padded = model.tokenizer(text, return_tensors="pt", padding="max_length", max_length=20)
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model.hf(**padded, position_ids=positions).logits[:, -1]
    assert torch.allclose(logits, model.hf(**plain).logits[:, -1], atol=1e-3)


@both_bases
def test_the_two_tasks_of_the_name_mover_share_half_of_their_parts(base: str) -> None:
    model = made("name-mover", base)
    ioi, stayed = model.true_parts, model.for_task("who-stayed").true_parts
    assert len(ioi & stayed) / len(ioi | stayed) == 0.5
    assert {model.roles[part] for part in ioi & stayed} == {"inhibition", "mover"}
    assert len([part for part in model.idle_parts if part.kind == "head"]) == 13  # one of them serves the other task


@torch.no_grad()
@both_bases
@pytest.mark.parametrize("idle_heads", [0, 1, 5])
def test_any_number_of_idle_heads(base: str, idle_heads: int) -> None:
    for name in PLANTED.names():
        model = planted(name, base, idle_heads=idle_heads, seed=7)
        assert model.hf.config.num_attention_heads == idle_heads + 1
        assert model.true_parts.isdisjoint(model.idle_parts)
        batch = Batch(model, 8)
        assert batch.difference(model.hf(batch.clean).logits[:, -1]).min() > 8
        assert abs(Patching(model, batch).effect(*model.idle_parts)) < 3e-4


@torch.no_grad()
def test_idle_heads_do_compute_something() -> None:
    model = made("name-mover", "gpt2")
    clean, corrupted = (Plain(model).writes(ids) for ids in (Batch(model, 4).clean, Batch(model, 4).corrupted))
    for part in model.idle_parts - model.for_task("who-stayed").true_parts:
        assert (clean[part] - corrupted[part]).norm(dim=-1).amax() > 0.02, part


def test_the_seed_decides_everything() -> None:
    a, b, c = planted("induction", seed=3), planted("induction", seed=3), planted("induction", seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.hf.parameters(), b.hf.parameters(), strict=True))
    assert not torch.equal(a.hf.lm_head.weight, c.hf.lm_head.weight)
    assert a.examples(5, seed=1) == b.examples(5, seed=1) != a.examples(5, seed=2)


def test_refusals_name_the_value_and_the_remedy() -> None:
    with pytest.raises(UnknownName, match="did you mean 'induction'"):
        planted("inducton")
    with pytest.raises(UnknownName, match="unknown base of a planted model 'bert'"):
        planted("induction", "bert")
    with pytest.raises(UnknownName, match="who-stayed"):
        planted("name-mover", task="stayed")
    with pytest.raises(VesaliusError, match="-1 idle heads"):
        planted("induction", idle_heads=-1)
    with pytest.raises(VesaliusError, match="0 examples"):
        made("induction", "gpt2").examples(0)
