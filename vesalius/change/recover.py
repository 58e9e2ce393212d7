"""Recovery: a changed model learns plain text for a while, through LoRA adapters that are merged at the end.

The setting is that of AMP (arXiv 2504.21174): r 8, alpha 16, dropout 0.05 on all matrices of the blocks. The training
is an ordinary run of the trainer: it resumes, and its checkpoints are whole models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesalius.errors import VesaliusError
from vesalius.train.recipe import Recipe, read_recipe
from vesalius.train.running import Watcher, train

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}


def recovery(source: str | Path, corpus: str, tokens: int, lr: float, length: int, rows: int, seed: int) -> Recipe:
    """The recipe of a recovery.

    Args:
        source: folder of the model. corpus: as in `vesalius corpora`. tokens: read in all. lr: peak.
        length, rows: of a batch.

    Raises:
        VesaliusError: if the tokens do not fill one batch.
    """
    steps = tokens // (length * rows)
    if steps < 1:
        raise VesaliusError(f"{tokens} tokens are less than one batch of {rows} x {length}; give more, or smaller rows")
    wanted: dict[str, Any] = {
        "name": "recovery",
        "about": "a changed model learns plain text through LoRA adapters",
        "model": {"source": str(source)},
        "data": {"corpus": corpus, "length": length, "rows": rows, "held_out": 0.05},
        "parameters": {"lora": LORA},
        "optimizer": {"name": "adamw", "lr": lr},
        "schedule": {"name": "linear", "warmup": 0.1, "final": 0.0},
        "steps": steps,
        "checkpoints": {"log": False, "every": steps, "keep_state": "last"},
        "evaluate": {"every": max(1, steps // 4), "batches": 8},
        "seed": seed,
    }
    return read_recipe(wanted)


def recover(recipe: Recipe, out: Path, watcher: Watcher | None = None) -> str:
    """Trains; returns what opens the recovered model."""
    return f"{train(recipe, out, watcher=watcher)}@last"
