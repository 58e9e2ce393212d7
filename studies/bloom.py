"""BLOOM: does what was trained at 128 tokens bear 512, by kind of position; and what sharing a tokenizer costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from _page import table, write
from _runs import interval, is_quick, trained, verdict

import vesalius
from vesalius.corpus import Document, documents, sample, statistics, train_tokenizer
from vesalius.corpus.order import Order
from vesalius.errors import VesaliusError
from vesalius.evaluate.windows import last_losses
from vesalius.train.assembly import data_of
from vesalius.train.recipe import Recipe, read_recipe

SHORT, LONG = 128, 512
PIECE = 2000  # characters
KINDS = ("alibi", "rotary", "learned")
LANGUAGES = {"en": ("bible-web", 1.0), "es": ("bible-es", 0.4), "hi": ("help-hi", 0.1)}  # and the share of the most


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    steps: int
    windows: int  # held-out rows of LONG tokens
    mono: int  # vocabulary of one language
    text_bytes: int  # of the language with most


FULL = Size((0, 1, 2), 500, 100, 4096, 2_000_000)
QUICK = Size((0,), 20, 8, 600, 200_000)


def recipe_of(kind: str, seed: int, size: Size) -> Recipe:
    """tiny-bloom with other positions; nothing else differs."""
    return read_recipe(
        "tiny-bloom",
        {
            "name": f"bloom-{kind}-{seed}",
            "model": {"preset": "tiny-bloom", "architecture": {"positions": {"kind": kind}, "max_length": SHORT}},
            "data": {"tokenizer": {"kind": "bpe", "vocab_size": 1024}, "length": SHORT, "rows": 12},
            "optimizer.lr": 3e-3,
            "steps": size.steps,
            "checkpoints": {"log": False, "every": size.steps, "keep_state": "last"},
            "evaluate": {"every": size.steps, "batches": 8},
            "seed": seed,
        },
    )


def lengths(size: Size, folder: str) -> list[str]:
    """The first half of the page."""
    rows: list[list[Any]] = []
    ratios: dict[str, list[float]] = {k: [] for k in KINDS}
    refusals: list[str] = []
    for kind, seed in [p for p in itertools.product(KINDS, size.seeds) if p[0] != "learned" or p[1] == size.seeds[0]]:
        recipe = recipe_of(kind, seed, size)
        run = trained(recipe, folder)
        data = data_of(recipe)
        order = Order(data.held_out.store, LONG, size.windows, 0, "none")  # type: ignore[union-attr]
        batch = order.batch(0)
        ids = batch.ids[(batch.segments >= 0).all(1)]
        model = vesalius.open(f"{run}@last")
        size_in_bytes = sum(len(data.tokenizer.decode(r).encode()) for r in ids[:, -SHORT:])
        bits = {}
        for n in (SHORT, LONG // 2, LONG):
            try:
                bits[n] = float(last_losses(model, ids, n, SHORT).sum()) / np.log(2) / size_in_bytes
            except VesaliusError as error:
                refusals.append(str(error))
        ratios[kind].append(bits[LONG] / bits[SHORT] if LONG in bits else float("nan"))
        cells = [f"{bits[n]:.3f}" if n in bits else "raises" for n in (SHORT, LONG // 2, LONG)]
        rows.append([kind, seed, *cells, f"{ratios[kind][-1]:.3f}" if LONG in bits else "-"])

    def told(kind: str) -> str:
        mean, low, high = interval(ratios[kind])
        return f"{mean:.3f} [{low:.3f}, {high:.3f}] times"

    alibi, rotary = ratios["alibi"], ratios["rotary"]
    claims = [
        [
            f"ALiBi: bits per byte at {LONG} at most 1.02 times those at {SHORT}",
            told("alibi"),
            verdict([r <= 1.02 for r in alibi], bool(np.mean(alibi) <= 1.02)),
        ],
        [
            f"rotary positions lose at least 5 % at {LONG}",
            told("rotary"),
            verdict([r >= 1.05 for r in rotary], bool(np.mean(rotary) >= 1.05)),
        ],
        [
            f"learned positions cannot go past {SHORT}, and say so",
            f"'{refusals[0]}'" if refusals else "no refusal",
            verdict([np.isnan(r) for r in ratios["learned"]]),
        ],
    ]
    return [
        "## Trained at 128 tokens, read at 512",
        f"`tiny-bloom` (2 layers of 64, 4 heads, embedding norm, 1,024 byte-level BPE tokens; 0.17 M parameters) on "
        f"the World English Bible, 12 rows of {SHORT} tokens, {size.steps} steps; the twins differ in "
        f"`positions.kind` alone. {len(ids)} held-out rows of {LONG} tokens; the targets are the same last {SHORT} "
        f"tokens of each row for every length read, so that with {SHORT} the first of them has one token before it.",
        table(["what was asked", "what came out", ""], claims),
        table(["positions", "seed", f"bits/byte, {SHORT} read", f"{LONG // 2} read", f"{LONG} read", "ratio"], rows),
    ]


def lines_of(corpus: str, language: str) -> Iterator[str]:
    """The lines of a corpus; of the Hindi help, which is mostly English, those in Devanagari, each once."""
    seen: set[str] = set()
    for document in documents(corpus):
        for line in document.text.splitlines(keepends=True):
            if language == "hi":
                letters = [c for c in line if c.isalpha()]
                if line in seen or 2 * sum("\u0900" <= c <= "\u097f" for c in letters) <= len(letters):
                    continue
                seen.add(line)
            yield line


def texts(size: Size) -> dict[str, tuple[list[Document], list[Document]]]:
    """(to train on, held out) of each language: pieces of whole lines, every tenth of them held out."""
    found = {}
    for language, (corpus, share) in LANGUAGES.items():
        pieces: list[Document] = []
        total, lines = 0, ""
        for line in lines_of(corpus, language):
            lines += line
            if len(lines) >= PIECE:
                pieces.append(Document(f"{corpus}-{len(pieces)}", lines, corpus))
                total, lines = total + len(lines.encode()), ""
            if total >= share * size.text_bytes:
                break
        found[language] = ([d for i, d in enumerate(pieces) if i % 10], pieces[::10])
    return found


def fertility(size: Size) -> list[str]:
    """The second half of the page."""
    text = texts(size)
    train = {k: v[0] for k, v in text.items()}
    single = {k: train_tokenizer(v, "bloom", size.mono, multiple=1) for k, v in train.items()}
    alone = {k: statistics(single[k], held) for k, (_, held) in text.items()}
    rows, worse, span, exact = [], {}, {}, []
    for alpha, times in itertools.product((1.0, 0.3), (len(LANGUAGES), len(LANGUAGES) / 2)):
        drawn = sample(train, alpha)
        shares = drawn.mix.set_index("language")["share"]
        entries = int(size.mono * times)
        joint = train_tokenizer(drawn.documents, "bloom", entries, multiple=1)
        found = {k: statistics(joint, held) for k, (_, held) in text.items()}
        worse[alpha, times] = {k: f.fertility / alone[k].fertility - 1 for k, f in found.items()}
        span[alpha, times] = max(f.fertility for f in found.values()) / min(f.fertility for f in found.values())
        exact += [f.round_trip for f in found.values()]
        for k, f in found.items():
            cells = [f"{alone[k].fertility:.3f}", f"{f.fertility:.3f}", f"{worse[alpha, times][k]:+.1%}"]
            rows.append([k, f"{entries:,}", alpha, f"{shares[k]:.0%}", *cells])
    whole, half = (0.3, len(LANGUAGES)), (0.3, len(LANGUAGES) / 2)

    def told(which: dict[str, float]) -> str:
        return ", ".join(f"{k} {w:+.1%}" for k, w in which.items())

    def holds(found: bool) -> str:
        return "holds" if found else "does not hold"

    claims = [
        [
            f"fertility within 10 % of each language's own, {size.mono:,} entries a language in both (alpha .3)",
            told(worse[whole]),
            holds(max(worse[whole].values()) <= 0.10),
        ],
        [
            "within 25 % with half as many entries a language in the joint one (alpha .3)",
            told(worse[half]),
            holds(max(worse[half].values()) <= 0.25),
        ],
        [
            "alpha .3 cuts the largest over the smallest fertility against proportional sampling",
            " and ".join(f"{span[0.3, t]:.3f} against {span[1.0, t]:.3f}" for t in (whole[1], half[1])),
            holds(all(span[0.3, t] < span[1.0, t] for t in (whole[1], half[1]))),
        ],
        ["held-out pieces come back exactly", f"{min(exact):.0%}", holds(min(exact) == 1)],
    ]
    sources = ", ".join(f"{k}: {c}" for k, (c, _) in LANGUAGES.items())
    sizes = ", ".join(f"{s * size.text_bytes / 1e6:.2f}" for _, s in LANGUAGES.values())
    return [
        "## One tokenizer for three languages",
        f"The `bloom` recipe (byte-level BPE, nothing normalised, every sign of punctuation alone) with {size.mono:,} "
        f"entries for each language alone, against one for all; {sources} ({sizes} MB), cut into pieces of about "
        "2,000 characters, every tenth held out. The Hindi text is a program's help, of which only lines in Devanagari "
        "are taken, each once. Fertility is tokens a word, words being runs without whitespace. The published recipe "
        "has 250,680 entries for 46 languages; small vocabularies tell more of the split between languages than of its "
        "quality.",
        table(["what was asked", "what came out", ""], claims),
        table(["language", "joint entries", "alpha", "share of the text", "own", "joint", ""], rows),
    ]


def main() -> None:
    """Trains everything (ten minutes on one core) and writes docs/results/train-bloom.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    body = [*lengths(size, "bloom-quick" if quick else "bloom"), *fertility(size)]
    if quick:
        print("\n".join(body))
    else:
        write(
            "train-bloom",
            "BLOOM in small",
            "python studies/bloom.py",
            *body,
            seeds=f"seeds {', '.join(map(str, size.seeds))}",
        )


if __name__ == "__main__":
    main()
