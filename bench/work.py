"""What every engine is given: one model folder, two sets of prompt pairs as token ids, and the heads to patch.

The main process writes this once as JSON, so that every environment works on exactly the same numbers. Nothing here
imports torch; the prompts need a tokenizer only when they are made.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

NAMES = "Mary John Tom James Dan Sarah Mark Anna Paul Kate Peter David Alice Robert Laura Simon Emma Henry".split(" ")  # noqa: SIM905
PLACES = ["store", "school", "station", "office"]
THINGS = ["drink", "book", "ring", "letter"]

# In `late`, the pairs differ in one token, ten tokens in: who is named a second time. In `early`, every name differs,
# from the first word on. Both have fifteen tokens for the tokenizers the benchmark has been run with.
LATE = "Then, {a} and {b} went to the {place}, {s} gave a {thing} to"
EARLY = "{a} and {b} walked together to the {place}, and {s} gave a {thing} to"


@dataclass(frozen=True)
class PromptSet:
    """Clean and corrupted prompts as token ids (pair, pos), with the ids of the right and the wrong answer (pair,)."""

    name: str
    clean: list[list[int]]
    corrupted: list[list[int]]
    answer: list[int]
    wrong: list[int]
    text: list[dict[str, str]]

    @property
    def first_difference(self) -> int:
        """First position at which any pair differs."""
        columns = zip(zip(*self.clean, strict=True), zip(*self.corrupted, strict=True), strict=True)
        return next((i for i, (c, d) in enumerate(columns) if c != d), len(self.clean[0]))


@dataclass(frozen=True)
class Work:
    """One benchmark request; `digest` identifies it, so that results of different requests are never mixed."""

    folder: str
    model: str
    weights_sha256: str
    device: str
    dtype: str
    threads: int
    n_layers: int
    n_heads: int
    heads: list[tuple[int, int]]
    sets: dict[str, PromptSet]

    @property
    def digest(self) -> str:
        """A hash of everything that decides the numbers, the folder's place on disk apart."""
        request = {k: v for k, v in asdict(self).items() if k != "folder"}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def complete(self) -> bool:
        """Whether every head is patched (`--quick` takes a sample)."""
        return len(self.heads) == self.n_layers * self.n_heads

    def save(self, path: Path) -> None:
        """Writes the request as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Work:
        """Reads what `save` wrote."""
        raw: dict[str, Any] = json.loads(path.read_text())
        sets = {name: PromptSet(**fields) for name, fields in raw.pop("sets").items()}
        heads = [(int(layer), int(head)) for layer, head in raw.pop("heads")]
        return cls(**raw, heads=heads, sets=sets)


class Outcome(NamedTuple):
    """What one call of a job gave: numbers to compare between engines, and how it was done."""

    values: list[float] | None
    note: str = ""
    all_heads: bool = False  # a sweep that patched every head although a sample was asked for


class Job(NamedTuple):
    """A job made ready: `run` is timed; `plain`, if there is one, is a plain forward timed alternately with it."""

    run: Callable[[], Outcome]
    plain: Callable[[], Any] | None = None


class Refused(Exception):
    """Raised by a job that the engine does not offer for this model, with the engine's own reason."""


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_sets(encode: Callable[[str], Sequence[int]], pairs: int) -> dict[str, PromptSet]:
    """The two prompt sets, from names that are one token both at the start of a text and after a space.

    Args:
        encode: text to token ids, with whatever special tokens the tokenizer adds by itself.
        pairs: how many pairs in each set.

    Raises:
        ValueError: if the tokenizer splits too many names, or if prompts do not align.
    """
    special = len(encode("")) if encode("") else 0
    names = [n for n in NAMES if len(encode(n)) == len(encode(" " + n)) == special + 1]
    if len(names) < 6:
        raise ValueError(f"only {len(names)} of {len(NAMES)} names are single tokens for this tokenizer; 6 are needed")
    fills = list(itertools.islice(itertools.cycle(itertools.product(PLACES, THINGS)), pairs))
    rows: dict[str, list[dict[str, str]]] = {"late": [], "early": []}
    for i, (place, thing) in enumerate(fills):
        a, b, c, d = (names[(2 * i + k) % len(names)] for k in range(4))
        s, io = (b, a) if i % 2 == 0 else (a, b)  # both orders of the two names
        common = {"place": place, "thing": thing}
        rows["late"].append(
            {
                "clean": LATE.format(a=a, b=b, s=s, **common),
                "corrupted": LATE.format(a=a, b=b, s=io, **common),
                "answer": " " + io,
                "wrong": " " + s,
            }
        )
        rows["early"].append(
            {
                "clean": EARLY.format(a=a, b=b, s=s, **common),
                "corrupted": EARLY.format(a=c, b=d, s=d if i % 2 == 0 else c, **common),
                "answer": " " + io,
                "wrong": " " + s,
            }
        )
    sets = {}
    for name, texts in rows.items():
        clean = [list(encode(t["clean"])) for t in texts]
        corrupted = [list(encode(t["corrupted"])) for t in texts]
        lengths = {len(r) for r in clean + corrupted}
        if len(lengths) != 1:
            raise ValueError(f"prompts of the set '{name}' have lengths {sorted(lengths)} for this tokenizer")
        answers = [encode(t["answer"])[-1] for t in texts]
        wrong = [encode(t["wrong"])[-1] for t in texts]
        sets[name] = PromptSet(name, clean, corrupted, answers, wrong, texts)
    return sets


def make_work(
    folder: Path, device: str, dtype: str, threads: int, pairs: int = 16, sample: int | None = None, name: str = ""
) -> Work:
    """Builds the request for a Hugging Face folder; `sample` takes that many heads, spread evenly over the model."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n_layers, n_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    if sample is not None and sample < len(heads):
        step = len(heads) / sample
        heads = [heads[int((i + 0.5) * step)] for i in range(sample)]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no safetensors file")
    digest = hashlib.sha256("".join(_file_sha256(w) for w in weights).encode()).hexdigest()
    sets = make_sets(lambda text: tokenizer(text)["input_ids"], pairs)
    return Work(
        str(folder.resolve()), name or folder.name, digest, device, dtype, threads, n_layers, n_heads, heads, sets
    )
