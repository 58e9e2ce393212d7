"""Small recipes on a small text, and runs of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from vesalius import checkpoints
from vesalius.train.recipe import Recipe, read_recipe

STEPS = 12


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Documents of words that follow one another by chance, as `corpus.jsonl`."""
    import json

    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 7))) for _ in range(80)]
    after = {w: rng.sample(words, 4) for w in words}
    lines = []
    for i in range(documents):
        word, text = rng.choice(words), []
        for _ in range(rng.randint(40, 120)):
            text.append(word)
            word = rng.choice(after[word])
        lines.append(json.dumps({"id": f"doc{i}", "text": " ".join(text)}))
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def small(corpus: Path | str, **changes: Any) -> Recipe:
    """A recipe of a few steps; changes by dotted key, a dot written as two underscores."""
    base: dict[str, Any] = {
        "name": "small",
        "model": {"preset": "tiny-pythia", "architecture": {"layers": 2, "d_model": 32, "heads": 2}},
        "data": {
            "corpus": str(corpus),
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
            "length": 24,
            "rows": 8,
            "held_out": 0.2,
        },
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        "steps": STEPS,
        "checkpoints": {"log": True, "every": 5},
        "evaluate": {"every": 6, "batches": 2},
        "seed": 7,
    }
    for section in ("model", "optimizer"):
        if isinstance(changes.get(section), dict):
            base[section] = changes.pop(section)
    return read_recipe(base, {k.replace("__", "."): v for k, v in changes.items()})


def steps_of(run: Path) -> dict[int, dict[str, str]]:
    """sha256 of every file of every checkpoint, after checking that each is what its manifest says."""
    place = run / checkpoints.FOLDER
    found = {}
    for step in checkpoints.steps_in(place):
        folder = place / checkpoints.name_of(step)
        assert not checkpoints.troubles(folder)
        found[step] = {name: entry["sha256"] for name, entry in checkpoints.manifest(folder).items()}
    return found


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors at a step."""
    return checkpoints.load_tensors(run / checkpoints.FOLDER / checkpoints.name_of(step) / "model.safetensors")
