"""What studies of rounding share: small models that have learnt a table, and outliers that change nothing in them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from _page import RUNS
from _runs import trained

import vesalius
from vesalius.change.edit import recording
from vesalius.change.os_plus import Migration, fold, sites
from vesalius.corpus import synthetic_source
from vesalius.model import Model
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.train.recipe import read_recipe

TABLE, LENGTH, STEPS = "markov2", 48, 250
GPT2 = {"preset": "tiny-gpt2", "architecture": {"layers": 2, "d_model": 64, "heads": 4}}
CHANNELS = (5, 17, 40, 63)


def learnt(model: dict[str, Any], name: str, seed: int) -> Model:
    """A model trained on a table of what follows two tokens."""
    wanted = {
        "name": name, "model": model, "data": {"synthetic": TABLE, "length": LENGTH, "rows": 16}, "steps": STEPS,
        "seed": seed, "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "linear", "warmup": 0.05, "final": 0.1},
        "checkpoints": {"log": False, "every": STEPS, "keep_state": "last"},
        "evaluate": {"every": STEPS, "batches": 1},
    }  # fmt: skip
    return vesalius.open(f"{trained(read_recipe(wanted), 'outliers')}@last")


def learnt_opt(seed: int) -> Model:
    """An OPT of two blocks."""
    folder = RUNS / "outliers" / f"opt-{seed}"
    config = tf.OPTConfig(
        vocab_size=16, hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    if not folder.exists():
        begun = Path(f"{folder}.begun")
        shutil.rmtree(begun, ignore_errors=True)
        torch.manual_seed(seed)
        with quiet_transformers():
            tf.OPTForCausalLM(config).save_pretrained(begun)
        begun.rename(folder)
    return learnt({"source": str(folder)}, "opt", seed)


def unseen(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of that seed's table nobody was trained on: 16 to calibrate with, 80 to judge by, (row, pos)."""
    rows = torch.from_numpy(synthetic_source(TABLE, rows=96, length=LENGTH - 1, split="test", seed=seed).batch(0).ids)
    return rows[:16].clone(), rows[16:].clone()


def losses(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Nats a token of every row, of the tokens after the second, (row,)."""
    log_p = model.logits(ids)[:, 1:-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 2:, None])[..., 0].mean(1)


def perplexity(model: Model, ids: torch.Tensor) -> float:
    """Of the tokens after the second."""
    return float(losses(model, ids).mean().exp())


def with_outliers(model: Model, channels: tuple[int, ...], scale: float, offset: float = 0.0) -> Model:
    """A model that says the same: outputs of its norms scaled and offset, what reads them made up for it."""
    made = Model.wrap(copy.deepcopy(model.hf), model.tokenizer, f"{model.name}-outliers")
    found = []
    for site in sites(made):
        if site.kind == "norm":
            divide, shift = torch.ones(made.d_model), torch.zeros(made.d_model)
            divide[list(channels)], shift[list(channels)] = 1 / scale, -offset / scale
            found.append(Migration(site, shift, divide))
    with recording(made, "outliers") as recorder:
        fold(recorder, made, found)
    return Model.wrap(made.hf, model.tokenizer, made.name)
