"""Training of a guide from labelled texts: the recipe of the objective `gedi`, run by the trainer.

Two labels that are one token each are the codes themselves. More labels (or one topic against the others) are made
binary: each text once after `true` and its own label, and once after `false` and another label drawn at random; such a
guide can be asked for topics it never saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vesalius.errors import VesaliusError
from vesalius.records import write_atomic
from vesalius.train.objectives.special import one_token
from vesalius.train.recipe import Recipe, read_recipe

CODES = ("true", "false")


def coded(rows: Sequence[tuple[str, str]], tokenizer: Any, topics: bool | None = None, seed: int = 0) -> dict[str, Any]:
    """Texts with their codes before them.

    Args:
        rows: (text, label). tokenizer: of the guide. topics: binarise; if None, where there are not just two labels.

    Returns:
        `texts`, and the settings of the objective: `codes`, `topics`.

    Raises:
        VesaliusError: for a single label, or one that is not one token.
    """
    labels = sorted({label for _, label in rows})
    if len(labels) < 2:
        raise VesaliusError(f"the texts have {len(labels)} label, and a guide tells classes apart; give two or more")
    if not (len(labels) > 2 if topics is None else topics):
        if len(labels) > 2:
            raise VesaliusError(f"{len(labels)} labels cannot be two codes; train with topics")
        for label in labels:
            one_token(tokenizer, label)
        return {"texts": [f"{label} {text}" for text, label in rows], "codes": tuple(labels), "topics": ()}
    for label in labels:
        one_token(tokenizer, label, CODES[0])
    rng = np.random.default_rng([seed, *b"guide"])
    texts = []
    for text, label in rows:
        other = str(rng.choice([x for x in labels if x != label]))
        texts += [f"{CODES[0]} {label} {text}", f"{CODES[1]} {other} {text}"]
    return {"texts": texts, "codes": CODES, "topics": tuple(labels)}


def guide_recipe(
    made: Mapping[str, Any],
    folder: Path,
    model: Mapping[str, Any],
    *,
    steps: int,
    lr: float = 2e-5,
    lam: float = 0.8,
    rows: int = 4,
    length: int = 192,
    tokenizer: str | None = None,
    seed: int = 0,
    name: str = "guide",
) -> Recipe:
    """The recipe of a guide; the coded texts are written to `folder`.

    Args:
        made: from `coded`. model: the recipe's model section: a source, or a preset with its sizes.
        steps, lr, rows: of training; lr 2e-5 is GeDi's for a pretrained guide. lam: weight of language modelling.
        length: of a row in tokens, which holds one or more texts. tokenizer: folder or name, for a new model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in made["texts"])
    file = folder / "coded.jsonl"
    write_atomic(file, ("\n".join(lines) + "\n").encode())
    data = {"corpus": str(file), "length": length, "rows": rows, "held_out": 0.05, "shuffle": "documents"}
    return read_recipe(
        {
            "name": name,
            "about": "a class-conditional guide (GeDi)",
            "model": dict(model),
            "data": data | ({} if tokenizer is None else {"tokenizer": tokenizer}),
            "objective": {
                "name": "gedi", "codes": list(made["codes"]), "topics": list(made["topics"]), "lam": lam,
                "length": length,
            },
            "optimizer": {"name": "adamw", "lr": lr},
            "schedule": {"name": "linear", "warmup": 0.05, "final": 0.0},
            "steps": steps,
            "checkpoints": {"log": False, "every": steps, "keep_state": "last"},
            "evaluate": {"every": max(1, steps // 4), "batches": 8},
            "seed": seed,
        }
    )  # fmt: skip


def labelled(path: Path) -> list[tuple[str, str]]:
    """(text, label) of a .csv or .jsonl file with those columns.

    Raises:
        VesaliusError: if a column or a value is missing.
    """
    from vesalius.features.concepts import rows

    found = []
    for row in rows(path, ("text", "label")):
        text, label = str(row["text"] or "").strip(), str(row["label"] or "").strip()
        if not text or not label:
            raise VesaliusError(f"{row['where']} lacks a text or a label; fill it in, or leave the row out")
        found.append((text, label))
    return found
