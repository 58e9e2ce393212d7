"""Where a fact is recalled, step by step, and at which step a wrong one fails.

    1 topic     heads bring the topic to END                     (`heads`)
    2 mixing    MLPs weigh what the heads brought                (`regression`)
    3 answer    a deep MLP adds a vector of its own that turns the topic into its answer   (`vectors`)
    4 last      the last block damps or raises it                (`last`)

The machinery is found on many prompts of the same relation that the model answers rightly; the traced prompt is then
read by it. Lv et al., "Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
arXiv 2403.19521.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import VesaliusError
from vesalius.find.base import find
from vesalius.find.recall.heads import TaskHeads, Writes, attention, task_heads, topic_tokens, unembedded, writes
from vesalius.find.recall.last import LastBlock, last_block
from vesalius.find.recall.questions import Asked, Question, ask, one, take_apart
from vesalius.find.recall.regression import NEEDED, Floats, Mixing, mix
from vesalius.find.recall.vectors import effects, neutral
from vesalius.model import Model, Pairs, Site
from vesalius.model.sweep import Progress, Store
from vesalius.parts import Part
from vesalius.scores import Scores
from vesalius.tasks.facts import Relation

Step = Literal["none", "topic", "answer", "last", "form"]
WEAK = 0.05  # the topic counts as brought if its score is not below this point of the prompts answered rightly
FAINT = 0.25  # of the usual lead before the last block: with less, an answer that is first is so by accident


@dataclass(frozen=True)
class Machinery:
    """How a model recalls one relation, found on prompts it answers rightly.

    Attributes:
        asked: the prompts. writes: what every part wrote. heads: step 1. mixings: step 2, every MLP, by layer.
        vectors: step 3, see `vectors.effects`. last: step 4.
    """

    asked: Asked
    writes: Writes = field(repr=False)
    heads: TaskHeads
    mixings: list[Mixing]
    vectors: pd.DataFrame
    last: LastBlock

    @property
    def warnings(self) -> list[str]:
        """What to know before believing a step."""
        by_name = {m.part: m for m in self.mixings}
        found = [by_name[str(w)].warning for w in self.heads.writers if str(w) in by_name]
        return [w for w in found if w]

    def mixing_frame(self) -> pd.DataFrame:
        """A row for each MLP: part, layer, r2, r2_fitted, null, rest (weight of the rest), spread, heads."""
        rows = []
        for i, m in enumerate(self.mixings):
            said = ", ".join(f"{name} {w:+.2f}" for name, w in m.top(4))
            task = [m.weights[m.inputs.index(str(h))] for h in self.heads.heads if str(h) in m.inputs]
            rows.append(
                {"part": m.part, "layer": i, "r2": m.r2, "r2_fitted": m.r2_fitted, "null": m.null,
                 "rest": float(m.weights[m.inputs.index("rest")]),
                 "task_heads": float(np.mean(task)) if task else np.nan,
                 "spread": m.spread, "largest": said}
            )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Moved:
    """What the task heads write of the topic.

    Attributes:
        place: of the topic among all known topics (1: first). of: how many those are.
        strength: its score as a share of what is usual (median over prompts answered rightly).
        brought: whether it is not weaker than nearly all of those.
    """

    place: int
    of: int
    strength: float
    brought: bool


@dataclass(frozen=True)
class Trace:
    """One prompt, step by step.

    Attributes:
        question: the prompt taken apart. machinery: what it was read with.
        said: the model's likeliest token. p_said, p_right: probabilities. rank: of the right answer, among all tokens.
        attention: of each task head from END to the topic, here and on the other prompts (mean).
        moved: what the task heads write of the topic. written: whether the answer leads before the last block, and with
            a lead worth the name; strength: that lead by direct attribution, as a share of what is usual.
        terms: every part's direct contribution to the answer's lead over the relation's other answers, in order.
        layers: lead, place among the answers, and which answer is first, if the model ended after each block.
        instead: the topic whose answer leads, where it is another's. fails: the step at which a wrong fact fails.
    """

    question: Question
    machinery: Machinery
    said: str
    p_said: float
    p_right: float
    rank: int
    attention: pd.DataFrame
    moved: Moved
    written: bool
    strength: float
    terms: Scores
    layers: pd.DataFrame
    instead: str
    fails: Step

    @property
    def written_by(self) -> Part:
        """The part that raises the answer most itself: an MLP by the paper; a head where it brings the answer ready."""
        return self.terms.top(1, "value").parts[0]  # type: ignore[return-value]

    @property
    def last_change(self) -> float:
        """What the last block's parts add to the answer's lead."""
        last = max(p.layer or 0 for p in self.terms.parts)  # type: ignore[union-attr]
        return float(sum(v for p, v in zip(self.terms.parts, self.terms.values, strict=True) if p.layer == last))  # type: ignore[union-attr]

    def steps(self) -> pd.DataFrame:
        """The steps in words: step, holds, what."""
        q, end = self.question, self.layers.iloc[-1]
        before = self.layers.iloc[-2] if len(self.layers) > 1 else end
        by = self.written_by
        m = self.moved
        told = f"the topic is number {m.place} of {m.of} known topics in what the task heads write, "
        told += f"{max(m.strength, 0.0):.0%} as strong as usual"
        wrote = f"{by} writes most of it ({self.terms[by]:+.2f}); before the last block ' {q.answer}' is number "
        wrote += f"{before['place']:.0f} of the answers"
        wrote += (
            f", behind '{before['first']}'"
            if before["place"] > 1
            else f", {max(self.strength, 0.0):.0%} as far ahead as usual"
        )
        last = f"its parts add {self.last_change:+.2f} to the lead; after it ' {q.answer}' is number {end['place']:.0f}"
        out = f"{self.said!r} with {self.p_said:.2f}; ' {q.answer}' has {self.p_right:.3f} and rank {self.rank}"
        rows = [
            ("1 topic brought to the end", m.brought, told),
            ("2-3 answer written", self.written, wrote),
            ("4 kept by the last block", self.written and end["place"] == 1, last),
            ("said", self.rank == 1, out),
        ]
        return pd.DataFrame(rows, columns=["step", "holds", "what"])

    @property
    def verdict(self) -> str:
        """At which step the fact fails, in a sentence."""
        a, said = f"“{self.question.answer}”", f"“{self.said.strip()}”"
        whose = f", the answer for {self.instead}" if self.instead else ""
        return {
            "none": f"{a} is recalled: the topic is brought to the end, {self.written_by} writes most of the answer"
            + (" (a head: it reads the answer itself, not the topic)." if self.written_by.kind == "head" else "."),
            "topic": f"The fact fails at step 1: the task heads do not bring “{self.question.topic}” to the end; the "
            f"model says {said}{whose}.",
            "answer": f"The fact fails at step 3: “{self.question.topic}” is brought to the end, but the MLPs do not "
            f"turn it into {a}; the model says {said}{whose}.",
            "last": f"The fact fails at step 4: {a} leads before the last block, and that takes it away; the model "
            f"says {said}.",
            "form": f"The fact is there, {a} leads all answers that are known of its kind, but the model says {said} "
            f"with {self.p_said:.2f}, which is none of these; {a} has {self.p_right:.2f} and rank {self.rank}.",
        }[self.fails]

    def summary(self) -> dict[str, Any]:
        """Everything of the prompt as plain values."""
        q, m = self.question, self.machinery
        last, it = m.last, m.last.mitigation
        return {
            "prompt": q.prompt, "topic": q.topic, "relation": q.relation.name, "answer": q.answer, "said": self.said,
            "p_said": self.p_said, "p_right": self.p_right, "rank": self.rank, "moved": asdict(self.moved),
            "instead": self.instead, "written": self.written, "strength": self.strength, "fails": self.fails,
            "verdict": self.verdict,
            "written_by": str(self.written_by), "last_change": self.last_change,
            "task_heads": [str(h) for h in m.heads.heads], "writers": [str(w) for w in m.heads.writers],
            "prompts": m.asked.pairs.n_examples, "own_wording": m.asked.own, "tried": m.asked.tried,
            "last": {
                "total": asdict(last.total), "before": asdict(last.before), "after": asdict(last.after),
                "suppressors": [str(p) for p in last.suppressors],
                "mitigation": None if it is None else asdict(it) | {"helps": it.helps},
            },
            "warnings": m.warnings,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"Trace({self.question.prompt!r})\n{self.steps().to_string(index=False)}\n{self.verdict}"


def machinery(
    model: Model,
    asked: Asked,
    answers: Mapping[str, str],
    *,
    heads: int = 10,
    patched: int = 24,
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    step: Callable[[str], Progress | None] = lambda name: None,
    store: Store | None = None,
) -> Machinery:
    """Steps 1 to 4 on many prompts of one relation.

    Args:
        asked: prompts from `ask`. answers: of every topic. heads: task heads at most. patched: prompts for path
            patching. step: told each step's name, gives a progress callback. store: keeps finished pieces.
    """
    pairs = asked.pairs
    step("reading what every part writes")
    found = writes(model, pairs)
    progress = step("path patching every head")
    first = task_heads(
        model, pairs, found, k=heads, patched=patched, seed=seed, memory_gb=memory_gb, progress=progress, store=store
    )
    step("regressions of MLPs on heads")
    mixings = mix_all(model, found, seed)
    step("adding intercepts")
    vectors = effects(model, neutral(model, asked, answers, seed), mixings, seed=seed)
    step("the last block")
    last = last_block(model, pairs, first.direct, seed)
    return Machinery(asked, found, first, mixings, vectors, last)


def mix_all(model: Model, found: Writes, seed: int = 0) -> list[Mixing]:
    """The regression of every MLP on the heads before it and the rest of the stream."""
    raw = found.raw.double().numpy()
    out = []
    for layer in range(model.n_layers):
        below = layer if model.anatomy.parallel else layer + 1
        mlp = found.parts.index(Part("mlp", layer, stack=model.anatomy.main.prefix))
        heads = [i for i, p in enumerate(found.parts) if p.kind == "head" and (p.layer or 0) < below]
        rest = [
            i for i, p in enumerate(found.parts) if p.kind == "embed" or (p.kind == "mlp" and (p.layer or 0) < layer)
        ]
        inputs = np.concatenate([raw[:, heads], raw[:, rest].sum(1, keepdims=True)], axis=1)
        names = [*[str(found.parts[i]) for i in heads], "rest"]
        out.append(mix(inputs, raw[:, mlp], names, str(found.parts[mlp]), seed))
    return out


def trace(
    model: Model,
    prompt: str,
    *,
    topic: str | None = None,
    relation: str | Relation | None = None,
    answer: str | None = None,
    n: int = 48,
    heads: int = 10,
    patched: int = 24,
    all_facts: bool = False,
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    step: Callable[[str], Progress | None] = lambda name: None,
    store: Store | None = None,
) -> Trace:
    """Where a fact is recalled, step by step.

    Args:
        model: an opened causal model. prompt: up to where the answer begins.
        topic: by default the known topic in the prompt. relation: by default by the prompt's words; see `take_apart`.
        answer: the right one; by default from the list.
        n: prompts on which the machinery is found. heads: task heads at most. patched: prompts for path patching.
        all_facts: also prompts that the model answers wrongly. seed: of everything drawn. memory_gb: working memory.

    Raises:
        VesaliusError: if topic, relation or answer cannot be found, or too few facts are known.

    Example:
        >>> trace(model, "The capital of France is").verdict                      # doctest: +SKIP
    """
    if n < NEEDED:
        raise VesaliusError(f"n is {n}, and a regression needs {NEEDED} prompts")
    question = take_apart(model, prompt, topic=topic, relation=relation, answer=answer)
    alone = one(model, question)
    step("asking the model")
    asked = ask(model, question, n, seed, all_facts)
    known = machinery(
        model, asked, question.relation.answers, heads=heads, patched=patched, seed=seed, memory_gb=memory_gb,
        step=step, store=store,
    )  # fmt: skip
    return read_prompt(model, question, alone, known)


@torch.no_grad()
def read_prompt(model: Model, question: Question, alone: Pairs, known: Machinery) -> Trace:
    """One prompt read by the machinery of its relation."""
    end = int(alone.reads[0, 0])
    prefix = model.anatomy.main.prefix
    sites = [Site("resid_post", layer, prefix) for layer in range(model.n_layers)]
    run = model.run(alone.clean, alone.mask, capture=sites)
    right = alone.answers[0][0]
    options = torch.tensor(list(dict.fromkeys((alone.options or alone.wrong)[0])))
    p = model.readout(run[sites[-1]][0, end]).float().softmax(-1)
    said = int(p.argmax())
    rows = []
    own = int((options == right).nonzero()[0])
    for layer, site in enumerate(sites):
        logits = model.readout(run[site][0, end], options).float()
        others = torch.cat([logits[:own], logits[own + 1 :]])
        rows.append(
            {"layer": layer, "lead": float(logits[own] - others.mean()), "place": 1 + int((logits > logits[own]).sum()),
             "first": model.tokenizer.decode([int(options[logits.argmax()])])}  # type: ignore[union-attr]
        )  # fmt: skip
    layers = pd.DataFrame(rows)
    heads = known.heads.heads
    look = attention(model, alone)[0]
    usual = {str(h): v for h, v in zip(known.heads.scores.parts, known.heads.scores.columns["attention"], strict=True)}
    looks = pd.DataFrame(
        [
            {"head": str(h), "here": float(look[h.layer or 0, h.index or 0]), "usual": float(usual[str(h)])}
            for h in heads
        ]
    )
    moved = _topic(model, alone, known)
    terms = find("direct", model, alone, parts="head,mlp,embed")
    before, after = (layers.iloc[-2] if len(layers) > 1 else layers.iloc[-1]), layers.iloc[-1]
    fails: Step
    strength = _before_last(terms).mean() / max(float(np.median(_before_last(known.heads.direct))), 1e-6)
    written = bool(before["place"] == 1 and strength >= FAINT)
    if said == right:
        fails = "none"
    elif after["place"] == 1 and strength >= FAINT:
        fails = "form"
    elif written:
        fails = "last"
    else:
        fails = "answer" if moved.brought else "topic"
    spoken = model.tokenizer.decode([said]).strip()  # type: ignore[union-attr]
    instead = next((t for t, a in question.relation.answers.items() if a == spoken != question.answer), "")
    return Trace(
        question, known, model.tokenizer.decode([said]), float(p[said]), float(p[right]),  # type: ignore[union-attr]
        1 + int((p > p[right]).sum()), looks, moved, written, float(strength), terms, layers, instead, fails,
    )  # fmt: skip


def _before_last(terms: Scores) -> Floats:
    """What all parts before the last block add to the lead, (prompt,)."""
    assert terms.per_example is not None
    last = max(p.layer or 0 for p in terms.parts)  # type: ignore[union-attr]
    return terms.per_example[[i for i, p in enumerate(terms.parts) if p.kind == "embed" or p.layer != last]].sum(0)  # type: ignore[union-attr]


@torch.no_grad()
def _topic(model: Model, alone: Pairs, known: Machinery) -> Moved:
    """How much of the topic the task heads write, beside the prompts answered rightly.

    Scores are logits of a topic's token in the sum of their writes, less its mean over the prompts of other topics.
    """
    heads, tokens = known.heads.heads, torch.unique(topic_tokens(known.asked.pairs))
    if not heads:
        return Moved(0, len(tokens), 0.0, False)
    mine = int(topic_tokens(alone)[0])
    every = torch.tensor([mine, *[t for t in tokens.tolist() if t != mine]])
    pool = unembedded(model, known.writes.of(heads).sum(1), every).cpu()  # (prompt, topic)
    own = topic_tokens(known.asked.pairs)[:, None].cpu() == every[None]
    others = pool.masked_fill(own, 0.0).sum(0) / (~own).sum(0).clamp(min=1)
    score = unembedded(model, writes(model, alone).of(heads).sum(1), every)[0].cpu() - others
    usual = (pool - others)[own]
    return Moved(
        1 + int((score > score[0]).sum()),
        len(every),
        float(score[0] / usual.median().clamp(min=1e-6)),
        bool(score[0] >= usual.quantile(WEAK)),
    )
