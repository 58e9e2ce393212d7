"""PST at small scale: a tiny BERT without nine tenths of its weights, beside movement and magnitude (2205.11005)."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from _page import changed, table, write
from _runs import is_quick, verdict
from numpy.typing import NDArray

from vesalius.change.sparse import SparsePlan, Sparsified, sparsify, trained_numbers, zeros_of
from vesalius.model import Model
from vesalius.model.saving import save_model
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.train.labels import LabelledRows, Labelling
from vesalius.train.learning import TextRows, learn
from vesalius.train.objectives.base import Needs
from vesalius.train.objectives.masked import MaskedLM
from vesalius.train.select import choose

NAME = "change-sparse"
KINDS, WORDS, PHRASES = 3, 10, 4  # of nouns and adjectives; words of a kind; phrases of a text
NOUNS, ADJECTIVES = 0, KINDS * WORDS  # the first of each
ONE, OTHER, CLS, MASK, PAD = range(2 * KINDS * WORDS, 2 * KINDS * WORDS + 5)
VOCAB = PAD + 1
HEAD = ("classifier*", "bert.pooler*")
SPARSITY = 0.9


@dataclass(frozen=True)
class Size:
    """How large the study is. rates: peak learning rates tried for each way, on a seed of their own."""

    pretrain: int
    steps: int
    labelled: int
    test: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]


FULL = Size(300, 300, 8192, 1024, (0, 1, 2), (2e-3, 5e-3))
QUICK = Size(5, 8, 64, 32, (0,), (1e-3,))
RANK = 3  # so that scores' state is below a twentieth of the full matrix's at these sizes
WAYS = ("pst", "full", "movement", "magnitude")
AFTER = "dense, then dropped"


def texts(n: int, seed: int, stream: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Texts of adjectives and nouns that agree in kind, two phrases marked, (text, 13) with [CLS].

    Which words are of which kind is drawn by the seed. The label is the kinds of the two marked phrases.
    """
    lexicon = np.random.default_rng([seed, *b"lexicon"])
    nouns, adjectives = (lexicon.permutation(KINDS * WORDS).reshape(KINDS, WORDS) for _ in range(2))
    rng = np.random.default_rng([seed, *stream.encode()])
    kinds = rng.integers(0, KINDS, (n, PHRASES))
    words = [t[kinds, rng.integers(0, WORDS, (n, PHRASES))] for t in (ADJECTIVES + adjectives, NOUNS + nouns)]
    marked = np.argsort(rng.random((n, PHRASES)), axis=1)[:, :2]
    ids = np.full((n, 3 + 2 * PHRASES), CLS)
    every, at = np.arange(n), np.ones(n, dtype=np.int64)
    for phrase in range(PHRASES):
        for number, marker in enumerate((ONE, OTHER)):
            here = marked[:, number] == phrase
            ids[every[here], at[here]] = marker
            at += here
        for word in words:
            ids[every, at] = word[:, phrase]
            at += 1
    both = np.take_along_axis(kinds, marked, axis=1)
    return ids, both[:, 0] * KINDS + both[:, 1]


def pretrained(seed: int, size: Size) -> Model:
    """A tiny BERT that has learnt the language by filling in words."""
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=32, num_labels=KINDS**2, pad_token_id=PAD, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.05,
    )  # fmt: skip
    with quiet_transformers():
        body = tf.BertForMaskedLM(config)
        model = Model.wrap(body, name="tiny-bert")
        text, _ = texts(8192, seed, "pretrain")
        choose(model.hf)
        needs = Needs(VOCAB, {"cls": CLS, "mask": MASK, "pad": PAD}, "masked")
        source = TextRows(np.pad(text, ((0, 0), (0, 1)), constant_values=PAD), 64, seed, VOCAB)
        log = learn(model, source, MaskedLM(needs, whole_words=False, rate=0.2), size.pretrain, 1e-3, seed)
        print(f"seed {seed}: masked loss {log['loss'].iloc[-20:].mean():.3f}", file=sys.stderr, flush=True)
        made = tf.BertForSequenceClassification(config)
    made.bert.load_state_dict(body.bert.state_dict(), strict=False)
    return Model.wrap(made, name="tiny-bert")


@torch.no_grad()
def accuracy(hf: Any, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of labels said, in percent."""
    logits = torch.cat([hf(input_ids=part).logits for part in torch.from_numpy(ids).split(256)])
    return 100 * float((logits.argmax(-1).numpy() == labels).mean())


def tuned(model: Model, way: str, lr: float, seed: int, size: Size) -> Sparsified:
    """The model made sparse on labelled texts."""
    began = time.perf_counter()
    ids, labels = texts(size.labelled, seed, "train")
    plan = SparsePlan(SPARSITY, way, size.steps, 32, lr, RANK, seed=seed)  # type: ignore[arg-type]
    done = sparsify(model, LabelledRows(ids, labels, 32, seed, VOCAB), Labelling(), plan, HEAD)
    print(f"seed {seed}, {way}, {lr:g}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return done


def dense(model: Model, lr: float, seed: int, size: Size) -> Model:
    """The whole model trained on the same texts."""
    with quiet_transformers():
        hf = tf.BertForSequenceClassification(model.hf.config)
    hf.load_state_dict(model.hf.state_dict())
    whole = Model.wrap(hf, name="dense")
    choose(whole.hf)
    ids, labels = texts(size.labelled, seed, "train")
    learn(whole, LabelledRows(ids, labels, 32, seed, VOCAB), Labelling(), size.steps, lr, seed)
    return whole


@torch.no_grad()
def at_once(whole: Model, names: Sequence[str]) -> Model:
    """The trained model without the smallest numbers of some matrices, and not trained afterwards; in place."""
    for name in names:
        weight = whole.hf.get_submodule(name).weight
        gone = weight.abs().flatten().argsort()[: zeros_of(SPARSITY, weight.numel())]
        weight.view(-1)[gone] = 0.0
    return whole


def reloaded(done: Sparsified, ids: NDArray[np.int64]) -> tuple[bool, float]:
    """Whether every matrix has its exact number of zeros after save and reload, and the largest change of a logit."""
    with tempfile.TemporaryDirectory() as place:
        save_model(done.model, Path(place) / "out")
        with quiet_transformers():
            hf = tf.AutoModelForSequenceClassification.from_pretrained(Path(place) / "out").eval()
    modules = dict(hf.named_modules())
    weights = [modules[name].weight for name in done.maps["name"]]
    exact = all(int((w == 0).sum()) == zeros_of(SPARSITY, w.numel()) for w in weights)
    some = torch.from_numpy(ids[:64])
    with torch.no_grad():
        off = (hf(input_ids=some).logits - done.trained.hf(input_ids=some).logits).abs().max()
    return exact, float(off)


def rates_of(size: Size) -> tuple[dict[str, float], list[list[str]]]:
    """The best learning rate of each way, on a seed that is not used again."""
    seed = 10
    model, held = pretrained(seed, size), texts(size.test, seed, "held out")
    best, rows = {}, []
    for way in WAYS:
        found = {lr: accuracy(tuned(model, way, lr, seed, size).model.hf, *held) for lr in size.rates}
        best[way] = max(found, key=lambda lr: found[lr])
        rows.append([way, *(f"{found[lr]:.1f}" for lr in size.rates)])
    return best, rows


def main() -> None:
    """Runs everything and writes docs/results/change-sparse.md."""
    size = QUICK if is_quick(__doc__) else FULL
    rates, tried = rates_of(size)
    rows, exact, off, otherwise = [], [], [], []
    accuracies: dict[str, list[float]] = {way: [] for way in (*WAYS, "dense", AFTER)}
    counts: list[Sparsified] = []
    state: dict[str, int] = {}
    for seed in size.seeds:
        model, test = pretrained(seed, size), texts(size.test, seed, "test")
        whole = dense(model, 1e-3, seed, size)
        accuracies["dense"].append(accuracy(whole.hf, *test))
        for way in WAYS:
            done = tuned(model, way, rates[way], seed, size)
            accuracies[way].append(accuracy(done.model.hf, *test))
            same, change = reloaded(done, test[0])
            exact.append(same)
            off.append(change)
            state[way] = done.scoring
            if way == "pst":
                counts.append(done)
                otherwise.append(float(np.average(done.maps["otherwise"], weights=done.maps["zeros"])))
        accuracies[AFTER].append(accuracy(at_once(whole, done.maps["name"].tolist()).hf, *test))
    for way in ("dense", *WAYS, AFTER):
        rows.append([way, *(f"{a:.1f}" for a in accuracies[way]), f"{np.mean(accuracies[way]):.1f}"])
    by = {way: np.array(found) for way, found in accuracies.items()}
    ahead = {way: by["pst"] - by[way] for way in (*WAYS[1:], AFTER)}
    maps = counts[0].maps
    formula = sum(trained_numbers(int(a), int(b), RANK) for a, b in zip(maps["out"], maps["in"], strict=True))
    numbers = int((maps["out"] * maps["in"]).sum())
    share = state["pst"] / state["movement"]
    claims = [
        *([f"PST within 1.5 points of {name}", ", ".join(f"{x:+.1f}" for x in ahead[way]),
           verdict([x >= -1.5 for x in ahead[way]], bool(ahead[way].mean() >= -1.5))]
          for way, name in (("movement", "full-score movement"), ("full", "its own score in full"))),
        *([f"PST 5 points or more above one-shot magnitude, {how}", ", ".join(f"{x:+.1f}" for x in ahead[way]),
           verdict([x >= 5 for x in ahead[way]], bool(ahead[way].mean() >= 5))]
          for way, how in ((AFTER, "after dense tuning"), ("magnitude", "before tuning, which then goes on"))),
        ["trained numbers are (n + k)(2r + 1) a matrix", f"{counts[0].trained_numbers:,} of {numbers:,} "
         f"({formula / numbers:.1%}); the formula says {formula:,}",
         "holds" if all(c.trained_numbers == formula for c in counts) else "does not hold"],
        ["every matrix has ceil(0.9 n k) zeros after save and reload", f"{sum(exact)} of {len(exact)} models",
         "holds" if all(exact) else "does not hold"],
        ["logits equal to the training-time model's within 1e-5", f"{max(off):.1e} at most",
         "holds" if max(off) <= 1e-5 else "does not hold"],
        ["optimizer state of the scores 5 % of movement's at most", f"{share:.1%} ({state['pst']:,} numbers against "
         f"{state['movement']:,}, two moments each)", "holds" if share <= 0.05 else "does not hold"],
    ]  # fmt: skip
    if size is QUICK:
        print(table(["asked", "came out", ""], claims))
        return
    write(
        NAME,
        "Change: sparse training",
        "python studies/sparse.py",
        f"A BERT of 4 blocks (d 128, MLP 512), trained {size.pretrain} steps to fill in words of a small language: "
        f"{PHRASES} phrases, adjective and noun, agree each in kind ({KINDS} kinds, {WORDS} words of each), and two "
        f"are marked. Then {size.steps} steps of 32 on {size.labelled:,} labelled texts: of which kinds are the marked "
        f"two? Accuracy on {size.test:,} other texts, chance {100 / KINDS**2:.0f} %. {SPARSITY:.0%} of every matrix of "
        f"the blocks go; classifier and pooler train beside them in every way. `pst` has rank {RANK}; `movement` has a "
        "score for every number and trains weights whole; `full` is the same, and counts a number's size too; "
        "`magnitude` drops the smallest at once and trains what is left. `dense` drops nothing and trains everything; "
        f"`{AFTER}` is that model, its smallest numbers dropped at once.",
        table(["asked", "came out", ""], claims),
        "## Accuracy",
        table(["way", *(f"seed {s}" for s in size.seeds), "mean"], rows),
        f"Of what PST keeps, {np.mean(otherwise):.0%} would have gone by size alone.",
        "Scores of `movement` begin at zero and have no size to lean on, which in so few steps makes it a weak "
        "control; `full` is the stronger one.",
        "## Learning rates",
        "Each way's rate is the best of these on a seed that is not used again ("
        + ", ".join(f"{way} {rates[way]:g}" for way in WAYS) + ").",
        table(["way", *(f"{lr:g}" for lr in size.rates)], tried),
        seeds=f"seeds {', '.join(map(str, size.seeds))}",
    )  # fmt: skip
    changed("PST", claims, "python studies/sparse.py", NAME)


if __name__ == "__main__":
    main()
