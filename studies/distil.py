"""Efficient-attention distillation on planted long news: conversion, half the depth, soft labels, latency by length."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from _page import RUNS, changed, table, write
from _runs import is_quick

import vesalius
from vesalius.change.distil import alternate, student_of
from vesalius.change.longformer import to_longformer
from vesalius.corpus.far_news import LABELS, FarNews, Story, tokenizer
from vesalius.evaluate.tagging import Sentence, entity_score, finetune, tag
from vesalius.model import Model
from vesalius.model.global_attention import global_attention
from vesalius.model.saving import save_model
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.records import request_hash
from vesalius.train.learning import TextRows, learn
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.special import masking_for, needs_for
from vesalius.train.select import choose

NAME = "change-distil"
LEARNT, SHORT, LONG = 64, 512, 1024  # tokens of a text, [CLS] and [SEP] included; BERT has LEARNT positions


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    layers: int = 4
    d: int = 64
    heads: int = 4
    window: int = 32
    seen_by_all: int = 16  # first positions with global attention: [CLS] and the first sentence
    learn_rows: int = 16  # of 64 tokens
    learn_steps: int = 1200
    adapt_rows: int = 4  # of 1,024 tokens
    adapt_steps: int = 30
    distil_steps: int = 40
    rate: float = 1e-2  # of language, with Muon; a third of it to adapt, half of it for students
    labelled_short: int = 19200  # of 64 tokens, the mentions right after the first sentence
    short_rows: int = 16
    short_updates: int = 1200
    labelled: int = 200  # of 1,024 tokens
    updates: int = 150
    test: int = 40
    tune_rate: float = 2e-3  # of short stories, half of it for long ones
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 7
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    deep: int = 12  # blocks of the models whose latency is taken
    wide: int = 256


FULL = Size()
QUICK = Size(
    layers=4, d=16, window=32, learn_rows=2, learn_steps=2, adapt_rows=2, adapt_steps=2, distil_steps=2,
    labelled_short=4, short_rows=2, short_updates=2, labelled=4, updates=2, test=4,
    seeds=(0,), rounds=2, lengths=(128, 256), deep=2, wide=32,
)  # fmt: skip


def say(text: str) -> None:
    """How far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Study:
    """Models and numbers, each made once and found again."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.folder, self.seconds = size, folder, dict[str, float]()
        self.reader = tokenizer(LONG)
        self.tests = FarNews(seed=0).stories(size.test, "test")
        self.pool = FarNews(seed=0).stories(size.labelled, "train")
        self.short = FarNews(seed=0, words=LEARNT - 2, gap=2).stories(size.labelled_short, "train, short")

    def made(self, name: str, make: Callable[[], Model]) -> Model:
        place = self.folder / name
        if not (place / "manifest.json").exists():
            began = time.perf_counter()
            save_model(make(), place, {"study": NAME, "model": name})
            say(f"{name}: {time.perf_counter() - began:.0f} s")
        return vesalius.open(str(place))

    def number(self, name: str, count: Callable[[], Any]) -> Any:
        place = self.folder / "numbers.json"
        known = json.loads(place.read_text()) if place.exists() else {}
        if name not in known:
            began = time.perf_counter()
            known[name] = count()
            place.write_text(json.dumps(known, indent=1))
            say(f"{name}: {known[name]} ({time.perf_counter() - began:.0f} s)")
        return known[name]

    # -- language

    def text(self, tokens: int, n: int, stream: str, gap: int) -> np.ndarray:
        """Stories, half of whose later mentions tell the kind; a last column that nothing reads."""
        news = FarNews(seed=0, words=tokens - 2, gap=gap, telling=0.5)
        ids = [self.reader(list(s.words), is_split_into_words=True)["input_ids"] for s in news.stories(n, stream)]
        return np.pad(np.array(ids), ((0, 0), (0, 1)))

    def taught(
        self, model: Model, tokens: int, steps: int, rows: int, stream: str, gap: int, rate: float,
        teacher: Model | None = None,
    ) -> Model:  # fmt: skip
        """The model after some steps of hidden words, with a teacher's opinion or without."""
        text = masking_for(self.reader) | {"frame": False, "rate": 0.2}  # the rows have [CLS] and [SEP]
        needs = needs_for(model.hf, self.reader)
        name, more = ("masked-lm", text) if teacher is None else ("distil", {"teacher": teacher.hf, "text": text})
        objective = make_objective(name, needs, tokenizer=self.reader, **more)
        source = TextRows(self.text(tokens, steps * rows, stream, gap), rows, 0, needs.vocab_size)
        choose(model.hf)
        every = max(1, steps // 10)

        def told(what: str, share: float | None) -> None:
            if round((share or 0) * steps) % every == 0:
                say(f"  {what}")

        log = learn(model, source, objective, steps, rate, tell=told, weight_decay=0.01, optimizer="muon")
        say(f"  nll {log['nll'].tail(every).mean():.3f} at the end")
        return model

    def bert(self) -> Model:
        s = self.size
        config = tf.BertConfig(
            vocab_size=len(self.reader), hidden_size=s.d, num_hidden_layers=s.layers, num_attention_heads=s.heads,
            intermediate_size=4 * s.d, max_position_embeddings=LEARNT, pad_token_id=self.reader.pad_token_id,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        )  # fmt: skip
        torch.manual_seed(0)
        with quiet_transformers():
            model = Model.wrap(tf.BertForMaskedLM(config), self.reader, "bert")
        waves(model.hf.base_model.embeddings.position_embeddings.weight)
        return self.taught(model, LEARNT, s.learn_steps, s.learn_rows, "language", 2, s.rate)

    def models(self) -> dict[str, Model]:
        """All that is taught by hidden words."""
        s = self.size
        bert = self.made("bert", self.bert)
        adapted = partial(self.taught, tokens=LONG, steps=s.adapt_steps, rows=s.adapt_rows, stream="long", gap=60)
        teacher = self.made(
            "teacher", lambda: adapted(to_longformer(bert, s.window, LONG, s.seen_by_all), rate=0.3 * s.rate)
        )
        again = partial(self.taught, tokens=LONG, steps=s.distil_steps, rows=s.adapt_rows, stream="again", gap=60,
                        rate=0.5 * s.rate)  # fmt: skip
        student = partial(student_of, teacher, "half")
        return {
            "bert": bert, "teacher": teacher,
            "distilled": self.made("distilled", lambda: again(student(), teacher=teacher)),
            "control": self.made("control", lambda: again(student())),
        }  # fmt: skip

    # -- entities

    def f1(self, model: Model, seed: int) -> dict[str, float]:
        """Tuned on short and then on long labelled stories; F1 of all entities, and the share of far mentions right."""
        size, made = self.size, model.hf
        for pool, updates, rows, rate, length in (
            (self.short, size.short_updates, size.short_rows, size.tune_rate, LEARNT),
            (self.pool, size.updates, size.adapt_rows, size.tune_rate / 2, LONG),
        ):
            sentences = [Sentence(s.words, s.labels) for s in pool]
            made = finetune(
                made, self.reader, sentences, LABELS, updates=updates, lr=rate, rows=rows, length=length, seed=seed
            )
        return self.judged(made)

    def judged(self, made: Any) -> dict[str, float]:
        truth = [list(s.labels) for s in self.tests]
        read = partial(tag, made, self.reader, labels=LABELS, rows=8, length=LONG)
        whole = read([Sentence(s.words, s.labels) for s in self.tests])
        first = tag(made, self.reader, [Sentence(s.words, s.labels) for s in self.tests], LABELS, 8, SHORT)
        found = {"all": whole, "first 512": first, "pieces of 512": self.in_pieces(read)}
        numbers = {name: entity_score(truth, said).f1 for name, said in found.items()}
        numbers |= {f"{name}, far": far_share(self.tests, said) for name, said in found.items()}
        return numbers

    def in_pieces(self, read: Callable[[list[Sentence]], list[list[str]]]) -> list[list[str]]:
        """Every story read in pieces of 512 tokens, each by itself."""
        step, found = SHORT - 2, []
        for story in self.tests:
            at = range(0, len(story.words), step)
            found.append(sum(read([Sentence(story.words[i : i + step], story.labels[i : i + step]) for i in at]), []))
        return found


@torch.no_grad()
def waves(table: torch.Tensor) -> None:
    """Learnt positions begin as sines and cosines: from random ones a small net takes long to find its neighbours."""
    positions, d = table.shape
    angle = torch.arange(positions)[:, None] / 10_000 ** (torch.arange(0, d, 2) / d)
    table.copy_(0.15 * torch.stack([angle.sin(), angle.cos()], -1).flatten(1))


def far_share(stories: Sequence[Story], said: Sequence[Sequence[str]]) -> float:
    """Far mentions whose first word has the right label."""
    hits = [row[i] == story.labels[i] for story, row in zip(stories, said, strict=True) for i in story.far]
    return float(np.mean(hits))


# -- latency


def latencies(size: Size) -> list[dict[str, float]]:
    """Milliseconds to read one text, by length: full attention, Longformer, and half of its blocks."""
    longest = max(size.lengths)
    config = tf.BertConfig(
        vocab_size=2000, hidden_size=size.wide, num_hidden_layers=size.deep, num_attention_heads=4,
        intermediate_size=4 * size.wide, max_position_embeddings=longest, pad_token_id=0,
    )  # fmt: skip
    with quiet_transformers():
        bert = Model.wrap(tf.BertForMaskedLM(config), name="bert")
    long = to_longformer(bert, 128, longest)
    models = {"full": bert, "longformer": long, "half": student_of(long, "half")}
    rows = []
    for length in size.lengths:
        ids = torch.randint(5, 2000, (1, length), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {name: [] for name in models}
        with torch.inference_mode(), quiet_transformers():
            for turn in range(size.rounds + 1):
                for name, model in models.items():
                    began = time.perf_counter()
                    model.hf.base_model(input_ids=ids, **global_attention(model.hf.base_model, ids))
                    if turn:
                        times[name].append(1e3 * (time.perf_counter() - began))
        rows.append({"length": length} | {name: statistics.median(t) for name, t in times.items()})
    return rows


# -- the page


def verdict(holds: bool) -> str:
    """In words."""
    return "holds" if holds else "does not hold"


def main() -> None:
    """Trains, distils, tunes, and writes docs/results/change-distil.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    began = time.perf_counter()
    decides = {name: value for name, value in asdict(size).items() if name != "seeds"}
    folder = RUNS / "distil" / request_hash(decides)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(size, folder)
    models = study.models()
    found: dict[str, list[dict[str, float]]] = {"teacher": [], "distilled": [], "control": []}
    for seed in size.seeds:
        for name, runs in found.items():
            runs.append(study.number(f"{name}, seed {seed}", partial(study.f1, models[name], seed)))
    times = study.number("latency", partial(latencies, size))
    exact = study.number("exactness", partial(exactness, study, models["bert"]))
    claims = claimed(size, found, times, exact)
    body = page(size, found, times, claims)
    say(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    if quick:
        print("\n".join(body))
    else:
        write(NAME, "Distilling models with sliding-window attention", "python studies/distil.py", *body,
              seeds=f"tuning seed {', '.join(map(str, size.seeds))}")  # fmt: skip
        changed("Efficient-attention distillation", claims, "python studies/distil.py", NAME)


def exactness(study: Study, bert: Model) -> float:
    """Largest difference of hidden states between BERT and its conversion, the window as wide as the text."""
    wide = to_longformer(bert, 2 * LEARNT, LEARNT, global_tokens=0)
    ids = torch.tensor(study.text(LEARNT, 2, "exact", 2))[:, :-1]
    with torch.no_grad(), quiet_transformers():
        one, two = (m.hf(**m.inputs(ids), output_hidden_states=True).hidden_states for m in (bert, wide))
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def mean(runs: list[dict[str, float]], key: str = "all") -> float:
    """Over tuning seeds."""
    return float(np.mean([f[key] for f in runs]))


def claimed(size: Size, found: dict[str, list[dict[str, float]]], times: Any, exact: float) -> list[list[str]]:
    """What was asked, what came out, and whether it holds."""
    share = [d["all"] / max(t["all"], 1e-9) for d, t in zip(found["distilled"], found["teacher"], strict=True)]
    gain = [100 * (d["all"] - c["all"]) for d, c in zip(found["distilled"], found["control"], strict=True)]
    at = next((t for t in times if t["length"] == LONG), times[-1])
    ratio = at["half"] / at["longformer"]
    return [
        ["window as wide as the text: hidden states within 1e-3 of BERT's", f"{exact:.1e}", verdict(exact < 1e-3)],
        ["converted and tuned: F1 .90 or more at 1,024 tokens", f"{mean(found['teacher']):.3f}",
         verdict(mean(found["teacher"]) >= 0.9)],
        ["the same, first 512 tokens: .60 or less", f"{mean(found['teacher'], 'first 512'):.3f}",
         verdict(mean(found["teacher"], "first 512") <= 0.6)],
        ["half the blocks, distilled: 95 % of the teacher's F1 or more",
         f"{np.mean(share):.1%} ({', '.join(f'{s:.1%}' for s in share)})", verdict(float(np.mean(share)) >= 0.95)],
        ["2 points or more above the same student without soft labels",
         f"{np.mean(gain):+.1f} ({', '.join(f'{g:+.1f}' for g in gain)})", verdict(float(np.mean(gain)) >= 2)],
        [f"{size.deep // 2} of {size.deep} blocks: .60 of the time or less at {at['length']:,} tokens", f"{ratio:.2f}",
         verdict(ratio <= 0.6)],
    ]  # fmt: skip


LEARNT_FROM = (
    "What it took, by pilots of one seed: a model that knows the language (hidden words cost 2.7 nats after 1,000"
    " steps of AdamW at 2e-3, 1.3 after 1,500 of Muon at 1e-2); positions tiled from the {learnt} that were "
    "trained (with a table of 512 of which 64 were, the converted model began at 5.4 nats, not at 3.2); and many "
    "labelled stories, each of which says only once which kind its first sentence's noun stands for. The loss of "
    "far mentions stays at chance for about 300 updates of 16 short stories and then falls to nothing within 100;"
    " from 60 updates of 4 long stories alone no model learnt it. Hidden words alone did not teach it in 500 to "
    "1,800 steps, even with all telling nouns hidden and two of them a kind instead of eight; sentences that name"
    " noun and telling noun together taught which belong together, after 950 steps, but not to look back. What "
    "was learnt from short labelled stories before distillation did not outlast it. So what tuning teaches is not"
    " in the teacher when it gives its opinion, which can help students with the language alone. Models leave the "
    "plateau at different updates: after half as much tuning (600 short updates and 60 long ones, seed 0) teacher, "
    "distilled student and control had F1 .726, .564 and .417, and what looks like a gain of soft labels there is gone"
    " where all have left it."
)


def page(size: Size, found: dict[str, list[dict[str, float]]], times: Any, claims: list[list[str]]) -> list[str]:
    """The parts of the page."""
    keys = ("all", "first 512", "pieces of 512", "all, far", "pieces of 512, far")
    rows = [
        [name, *(f"{mean(found[name], k):.3f} ({', '.join(f'{f[k]:.3f}' for f in found[name])})" for k in keys)]
        for name in found
    ]
    crossing = [t["length"] for t in times if t["longformer"] < t["full"]]
    half = len(alternate(size.layers, size.layers // 2))
    return [
        f"Planted news of {LONG:,} tokens (`vesalius.corpus.far_news`): every story's first sentence tells whether its "
        "subject is a person, an organisation, a place or something else; every later mention stands 600 or more words "
        "after it, in sentences that are the same for all kinds. Other names are told by what stands beside them.",
        f"A BERT ({size.layers} blocks of {size.d}, {LEARNT} positions) learns the language by hidden words (20 %; "
        f"{size.learn_steps} steps of {size.learn_rows} stories of {LEARNT} tokens; Muon), becomes a Longformer "
        f"(window {size.window}, {LONG:,} positions tiled, the first {size.seen_by_all} global: [CLS] and the "
        f"first sentence), and goes on for {size.adapt_steps} steps of {size.adapt_rows} long stories: the teacher. "
        f"Its student has {half} of the blocks and learns for {size.distil_steps} such steps from hidden words and "
        "the teacher (5 / 2 / 1, T = 2); the control starts from the same weights and learns from hidden words alone. "
        "In these unlabelled stories half of the later mentions stand in a sentence with a noun that tells the kind; "
        "in labelled and test stories none does.",
        f"All three are then tuned alike: {size.short_updates} updates of {size.short_rows} labelled stories of "
        f"{LEARNT} tokens, whose later mentions stand right after the first sentence, then {size.updates} updates of "
        f"{size.adapt_rows} from {size.labelled} labelled stories of {LONG:,} tokens like the {size.test} they are "
        "asked about.",
        "## Claims",
        table(["asked", "came out", ""], claims),
        LEARNT_FROM.format(learnt=LEARNT),
        "## Entities",
        "F1 of entities found whole (mean, and by tuning seed), over all entities; `far`: share of far mentions whose "
        "first word has the right label (chance among kinds .25). `pieces`: every 512 tokens read by themselves.",
        table(["model", *keys], rows),
        "## Latency",
        f"Milliseconds to read one text, medians of {size.rounds} interleaved turns on a core shared with other work: "
        f"{size.deep} blocks of {size.wide}, window 128. Sliding windows are "
        + (f"faster than full attention from {crossing[0]:,} tokens on." if crossing else "not faster at any length."),
        table(
            ["tokens", "full attention", "Longformer", "half of its blocks", "half / whole"],
            [[f"{t['length']:,}", *(f"{t[k]:.0f}" for k in ("full", "longformer", "half")),
              f"{t['half'] / t['longformer']:.2f}"] for t in times],
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
