"""Planted models: transformers whose mechanism is set by hand, so that the right answer of a discovery method is known.

Each is an ordinary `GPT2LMHeadModel` or `LlamaForCausalLM` with a word-level tokenizer, prompts it answers with a wide
margin, and a list of the parts and edges that carry the answer: patching any of them with its value on the corrupted
prompt changes the logit difference, patching any other does not. `blueprint.py` says how the weights are made.

    induction      L0 previous-token -> L1 induction: "... apple river ... tiger violin ... apple" -> "river"
    name-mover     L0 duplicate-token (or L1 previous-token) -> L2 inhibition -> L3 mover, two tasks in one model:
                   ioi         "when mary and john went to the store , mary gave a ring to" -> "john"
                   who-stayed  "when mary left and john stayed , the host gave a ring to" -> "john"
                   They share two of the four planted heads: half of the union, two thirds of either circuit.
    successor      L1 successor head, whose value-output matrix shifts: "count on : three four five" -> "six"
    successor-mlp  L0 mover -> L1.MLP, one neuron an item, for the same prompts

Attention is kept off saturation: a planted head gives 92 to 97 % to its target and most of the rest to the opening
word, whose value is zero, so that gradients see every part. True edges depend on the counterfactual: an edge whose
sender writes the same in both prompts is not one. Here every corrupted prompt is itself a clean one with the opposite
answer, so the same lists hold in both directions. One listed edge works against the answer: in `ioi` the repeated name,
though inhibited, keeps 3 % of the mover's attention, so `embed->mover.v` carries -6 % of the logit difference.

The circuits are after Elhage et al. 2021 (transformer-circuits.pub/2021/framework: induction), Wang et al. 2022
(arXiv 2211.00593: duplicate-token, inhibition and mover heads), Merullo et al. 2023 (arXiv 2310.08744: two tasks that
share them) and Gould et al. 2023 (arXiv 2312.09230: successor heads).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vesalius.build.blueprint import BASES, Base, Blueprint, HeadPlan
from vesalius.errors import UnknownName, VesaliusError
from vesalius.parts import Edge, Part
from vesalius.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOGIT = 12.0  # of a word whose output feature is 1; all other words have 0

# Attention scores, in logits, where values leak unless only the target and the opening word are attended:
TARGET, REST = 19.0, 16.0  # e^3 to 1: 0.953 on the target; anything else, at 0 or less, gets below 1e-8
AVOID = 35.0  # brings a token's match with itself down to -16


class Prompt(NamedTuple):
    """One planted example. The answers carry a leading space: prompt + answer is one token longer than the prompt."""

    clean: str
    corrupted: str
    answer: str
    wrong: str


@dataclass(frozen=True)
class TrueCircuit:
    """What carries the answer of one task.

    Attributes:
        roles: what each true part does.
        edges: which of their inputs matter for the difference between clean and corrupted prompts.
        prompt: makes one example.
    """

    roles: Mapping[Part, str]
    edges: frozenset[Edge]
    prompt: Callable[[random.Random], Prompt] = field(repr=False)


class Design(NamedTuple):
    """A planted model before it is built: its weights, and the circuit of each task, the default one first."""

    blueprint: Blueprint
    circuits: Mapping[str, TrueCircuit]


PLANTED: Registry[Callable[[Base, int, int], Design]] = Registry("planted model")


@dataclass(frozen=True)
class Planted:
    """A model with a known mechanism, seen as the subject of one task.

    Attributes:
        name, base, seed, idle_heads: what was asked for.
        task: the task that `true_parts`, `true_edges`, `roles` and `examples` are of.
        hf: the model, float32, in evaluation mode.
        tokenizer: one token a word.
        circuits: the true circuit of every task the model knows.
    """

    name: str
    base: Base
    seed: int
    idle_heads: int
    task: str
    hf: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    circuits: Mapping[str, TrueCircuit] = field(repr=False)

    @property
    def roles(self) -> dict[Part, str]:
        """What each true part does: previous-token, induction, duplicate-token, inhibition, mover or successor."""
        return dict(self.circuits[self.task].roles)

    @property
    def true_parts(self) -> frozenset[Part]:
        """The heads and MLPs whose patching changes the answer."""
        return frozenset(self.circuits[self.task].roles)

    @property
    def true_edges(self) -> frozenset[Edge]:
        """The edges whose patching changes the answer, head inputs by side (q, k, v)."""
        return self.circuits[self.task].edges

    @property
    def idle_parts(self) -> frozenset[Part]:
        """All other heads and MLPs, those that serve only another task included."""
        config = self.hf.config
        layers, heads = range(config.num_hidden_layers), range(config.num_attention_heads)
        parts = {Part("head", layer, head) for layer in layers for head in heads}
        return frozenset(parts | {Part("mlp", layer) for layer in layers}) - self.true_parts

    def for_task(self, task: str) -> Planted:
        """The same model as the subject of another of its tasks.

        Raises:
            UnknownName: if the model does not know that task.
        """
        if task not in self.circuits:
            raise UnknownName(f"task of planted model '{self.name}'", task, self.circuits)
        return replace(self, task=task)

    def examples(self, n: int, seed: int = 0) -> list[Prompt]:
        """`n` prompts, all of one length in tokens, in which clean and corrupted differ in one to three words.

        Example:
            >>> planted("name-mover").examples(1)[0]._fields
            ('clean', 'corrupted', 'answer', 'wrong')
        """
        if n < 1:
            raise VesaliusError(f"{n} examples asked for; ask for at least 1")
        random_ = random.Random(f"{self.task} {seed}")
        return [self.circuits[self.task].prompt(random_) for _ in range(n)]

    def save(self, folder: str | Path, n: int = 64) -> Path:
        """Writes an ordinary checkpoint, the truth as `circuit.json`, and `n` prompts of each task as `TASK.jsonl`.

        The folder opens with `AutoModelForCausalLM` and `AutoTokenizer`, without Vesalius; the prompt files have the
        fields `clean`, `corrupted`, `answer`, `wrong` of a user's own task.
        """
        from vesalius.model.sources.quiet import quiet_transformers

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet_transformers():
                self.hf.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
            for task in self.circuits:
                lines = [json.dumps(prompt._asdict()) for prompt in self.for_task(task).examples(n, self.seed)]
                (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (folder / "circuit.json").write_text(json.dumps(self._truth(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise VesaliusError(
                f"cannot write the planted model to '{folder}': {error}; choose another folder"
            ) from error
        return folder

    def _truth(self) -> dict[str, Any]:
        tasks = {
            task: {
                "parts": {str(part): role for part, role in sorted(circuit.roles.items(), key=lambda p: p[0].order)},
                "edges": [str(edge) for edge in sorted(circuit.edges, key=lambda e: (e.order, str(e)))],
            }
            for task, circuit in self.circuits.items()
        }
        asked = {"planted": self.name, "base": self.base, "idle_heads": self.idle_heads, "seed": self.seed}
        return {**asked, "task": self.task, "tasks": tasks}


def planted(name: str, base: str = "gpt2", idle_heads: int = 3, seed: int = 0, task: str | None = None) -> Planted:
    """A model whose mechanism is set by hand, with its true circuit.

    Args:
        name: `induction`, `name-mover`, `successor` or `successor-mlp` (see `PLANTED`).
        base: `gpt2` (LayerNorm, learnt positions) or `llama` (RMSNorm, rotary positions, gated MLP, and key-value heads
            shared by two heads where their number is even).
        idle_heads: heads without a part in the mechanism, in each layer, beside the one that may have.
        seed: of the rotation of the residual stream, the places of the planted parts and the idle weights; the same
            seed gives the same model.
        task: which of the model's tasks; by default its first.

    Raises:
        UnknownName: for a name, base or task that does not exist.

    Example:
        >>> model = planted("induction")
        >>> sorted(model.roles.values()), len(model.idle_parts)
        (['induction', 'previous-token'], 8)
    """
    if base not in BASES:
        raise UnknownName("base of a planted model", base, BASES)
    if idle_heads < 0:
        raise VesaliusError(f"{idle_heads} idle heads a layer asked for; ask for 0 or more")
    blueprint, circuits = PLANTED.get(name)(base, idle_heads, seed)
    model = Planted(
        name=name,
        base=base,
        seed=seed,
        idle_heads=idle_heads,
        task=next(iter(circuits)),
        hf=blueprint.build(),
        tokenizer=blueprint.tokenizer(),
        circuits=circuits,
    )
    return model if task is None else model.for_task(task)


@cache
def _words() -> dict[str, Any]:
    words: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
    return words


def _edges(*pairs: tuple[Part | str, Part | str, str]) -> frozenset[Edge]:
    """Edges from (sender, receiver, sides), such as (mover, "unembed", "") or ("embed", mover, "kv")."""
    out = set()
    for sender, receiver, sides in pairs:
        source = Part("embed") if isinstance(sender, str) else sender
        target = Part("unembed") if isinstance(receiver, str) else receiver
        out |= {Edge(source, replace(target, side=side)) for side in sides} if sides else {Edge(source, target)}
    return frozenset(out)


@PLANTED.register("induction", "two layers: a previous-token head feeds the keys of an induction head")
def _induction(base: Base, idle_heads: int, seed: int) -> Design:
    words = _words()
    nouns, openings = words["nouns"], words["openings"]
    spaces = {"previous": len(nouns), "output": len(nouns)}
    plan = Blueprint(base, 2, idle_heads + 1, [*openings, *nouns], openings, spaces, seed)
    token = [plan.token(noun) for noun in nouns]
    before = [plan.feature("previous", i) for i in range(len(nouns))]
    output = [plan.feature("output", i) for i in range(len(nouns))]

    previous = plan.head(0)
    previous.seek(1, TARGET)
    previous.rest(REST * plan.one)
    previous.copy(token, before)

    induction = plan.head(1)
    for now, was in zip(token, before, strict=True):
        induction.score(8.0 * now, was)
    induction.rest(5.0 * plan.one)
    induction.copy(token, output)
    plan.logits(nouns, [LOGIT * o for o in output])

    def prompt(rng: random.Random) -> Prompt:
        first, second, third, fourth, *others = rng.sample(nouns, 9)
        pairs = [(first, second), (third, fourth)]
        rng.shuffle(pairs)
        cut = sorted(rng.randint(0, len(others)) for _ in range(2))
        gaps = [others[: cut[0]], others[cut[0] : cut[1]], others[cut[1] :]]
        clean = [rng.choice(openings), *gaps[0], *pairs[0], *gaps[1], *pairs[1], *gaps[2], first]
        swap = {first: third, third: first}
        corrupted = [swap.get(word, word) for word in clean[:-1]] + [first]
        return Prompt(" ".join(clean), " ".join(corrupted), f" {second}", f" {fourth}")

    roles = {previous.part: "previous-token", induction.part: "induction"}
    edges = _edges(("embed", previous.part, "v"), (previous.part, induction.part, "k"), (induction.part, "unembed", ""))
    return Design(plan, {"induction": TrueCircuit(roles, edges, prompt)})


@PLANTED.register("name-mover", "four layers: duplicate-token or previous-token, inhibition and mover heads; two tasks")
def _name_mover(base: Base, idle_heads: int, seed: int) -> Design:
    words = _words()
    names, openings, leaves, stays = words["names"], words["openings"], words["leaves"], words["stays"]
    vocabulary = [*openings, *names, *words["frame"], leaves, stays]
    vocabulary += [*words["places"], *words["objects"], *words["hosts"]]
    spaces = {"excluded": len(names), "inhibited": len(names), "output": len(names)}
    plan = Blueprint(base, 4, idle_heads + 1, vocabulary, openings, spaces, seed)
    token = [plan.token(name) for name in names]
    excluded, inhibited, output = ([plan.feature(space, i) for i in range(len(names))] for space in spaces)

    duplicate = plan.head(0)  # at a name said before: that name is out
    for name in token:
        duplicate.score(TARGET * name, name)
    duplicate.avoid_self(AVOID)
    duplicate.rest(REST * plan.one)
    duplicate.copy(token, excluded)

    leaver = plan.head(1)  # at "left": the name before it is out; elsewhere it rests, 16 above all else
    leaver.seek(1, REST)
    leaver.rest(2 * REST * plan.one - TARGET * plan.token(leaves))  # 13 there, 3 less than the name
    leaver.copy(token, excluded)

    inhibition = plan.head(2)  # at the end: fetches the name that is out
    inhibition.score(8.0 * plan.one, plan.all_of("excluded"))
    inhibition.rest(4.0 * plan.one)
    inhibition.copy(excluded, inhibited)

    mover = plan.head(3)  # at the end: copies a name, not the inhibited one
    mover.score(6.0 * plan.one, plan.any_token(names))
    for out, name in zip(inhibited, token, strict=True):
        mover.score(-3.9 * out, name)
    mover.copy(token, output)
    plan.logits(names, [LOGIT * o for o in output])

    def ioi(rng: random.Random) -> Prompt:
        giver, receiver = rng.sample(names, 2)
        pair = rng.sample([giver, receiver], 2)
        start = f"{rng.choice(openings)} {pair[0]} and {pair[1]} went to the {rng.choice(words['places'])} ,"
        end = f"gave a {rng.choice(words['objects'])} to"
        return Prompt(f"{start} {giver} {end}", f"{start} {receiver} {end}", f" {receiver}", f" {giver}")

    def who_stayed(rng: random.Random) -> Prompt:
        goer, stayer = rng.sample(names, 2)
        opening, host, thing = (rng.choice(words[kind]) for kind in ("openings", "hosts", "objects"))
        first, second = rng.sample([(goer, leaves, stays), (stayer, stays, leaves)], 2)
        clean, corrupted = (
            f"{opening} {first[0]} {first[verb]} and {second[0]} {second[verb]} , the {host} gave a {thing} to"
            for verb in (1, 2)
        )
        return Prompt(clean, corrupted, f" {stayer}", f" {goer}")

    shared = {inhibition.part: "inhibition", mover.part: "mover"}
    end = ((inhibition.part, mover.part, "q"), (mover.part, "unembed", ""))
    # The repeated name is itself a place the mover looks at, so its token reaches the mover directly as well.
    ioi_edges = _edges(
        ("embed", duplicate.part, "q"), (duplicate.part, inhibition.part, "v"), ("embed", mover.part, "kv"), *end
    )
    # Here the head that finds the name writes at another place in the corrupted prompt: keys and values both change.
    stayed_edges = _edges(("embed", leaver.part, "q"), (leaver.part, inhibition.part, "kv"), *end)
    return Design(
        plan,
        {
            "ioi": TrueCircuit({duplicate.part: "duplicate-token", **shared}, ioi_edges, ioi),
            "who-stayed": TrueCircuit({leaver.part: "previous-token", **shared}, stayed_edges, who_stayed),
        },
    )


class _Counting(NamedTuple):
    """A blueprint for the successor models, and its items: all of them, and which follows which."""

    plan: Blueprint
    items: list[str]
    follows: dict[str, str]


def _counting(base: Base, idle_heads: int, seed: int, spaces: tuple[str, ...]) -> _Counting:
    words = _words()
    cycles, lines = list(words["cycles"].values()), list(words["lines"].values())
    items = [item for run in cycles + lines for item in run]
    follows = {a: b for run in cycles for a, b in zip(run, run[1:] + run[:1], strict=True)}
    follows |= {a: b for run in lines for a, b in zip(run, run[1:], strict=False)}
    vocabulary = [*words["counting"], *words["counting_frame"], *items]
    sizes = {space: len(items) for space in spaces}
    plan = Blueprint(base, 2, idle_heads + 1, vocabulary, words["counting"], sizes, seed)
    plan.logits(items, [LOGIT * plan.feature("output", i) for i in range(len(items))])
    return _Counting(plan, items, follows)


def _last_token(head: HeadPlan, plan: Blueprint) -> None:
    """Makes a head attend to its own position."""
    head.seek(0, TARGET)
    head.rest(REST * plan.one)


def _count_on(rng: random.Random) -> Prompt:
    words = _words()
    kind, name = rng.choice([(kind, name) for kind in ("cycles", "lines") for name in words[kind]])
    series = words[kind][name]
    # runs of three and what follows, not wrapping round in a line
    starts = range(len(series) if kind == "cycles" else len(series) - 3)
    frame = f"{rng.choice(words['counting'])} {rng.choice(words['counting_frame'][:-1])} :"
    (clean, right), (corrupted, wrong) = (
        (" ".join([frame, *run[:3]]), run[3])
        for run in ([series[(start + i) % len(series)] for i in range(4)] for start in rng.sample(starts, 2))
    )
    return Prompt(clean, corrupted, f" {right}", f" {wrong}")


@PLANTED.register("successor", "two layers: a head whose value-output matrix maps each item to the next")
def _successor(base: Base, idle_heads: int, seed: int) -> Design:
    plan, items, follows = _counting(base, idle_heads, seed, ("output",))
    head = plan.head(1)
    _last_token(head, plan)
    head.copy([plan.token(a) for a in follows], [plan.feature("output", items.index(b)) for b in follows.values()])
    edges = _edges(("embed", head.part, "v"), (head.part, "unembed", ""))
    return Design(plan, {"successor": TrueCircuit({head.part: "successor"}, edges, _count_on)})


@PLANTED.register(
    "successor-mlp", "two layers: a mover head, and an MLP with a neuron for each item that writes the next"
)
def _successor_mlp(base: Base, idle_heads: int, seed: int) -> Design:
    plan, items, follows = _counting(base, idle_heads, seed, ("moved", "output"))
    mover = plan.head(0)
    _last_token(mover, plan)
    moved = [plan.feature("moved", items.index(a)) for a in follows]
    mover.copy([plan.token(a) for a in follows], moved)
    # The neuron of the item at hand has 3 * 0.95 before its activation, the others 0, where the slope is 1/2: none dead
    mlp = plan.neurons(
        1, [3.0 * m for m in moved], [plan.feature("output", items.index(b)) / 2.8 for b in follows.values()]
    )
    edges = _edges(("embed", mover.part, "v"), (mover.part, mlp, ""), (mlp, "unembed", ""))
    return Design(plan, {"successor": TrueCircuit({mover.part: "mover", mlp: "successor"}, edges, _count_on)})
