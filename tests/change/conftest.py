"""Small models that have learnt something: rounding must have something to break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import vesalius
from vesalius.corpus import synthetic_source
from vesalius.model import Model
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.train import read_recipe, train

TASK = {"synthetic": "markov2", "length": 48, "rows": 16}


def learnt(model: dict[str, Any], name: str, folder: Path, steps: int = 250) -> Model:
    """A model trained on a table of the last two tokens, by the trainer."""
    wanted = {
        "name": name, "model": model, "data": TASK, "steps": steps, "seed": 0, "deterministic": False,
        "optimizer": {"name": "adamw", "lr": 3e-3}, "schedule": {"name": "linear", "warmup": 0.05, "final": 0.1},
        "checkpoints": {"log": False, "every": steps, "keep_state": "last"},
        "evaluate": {"every": steps, "batches": 1},
    }  # fmt: skip
    return vesalius.open(f"{train(read_recipe(wanted), folder)}@last")


@pytest.fixture(scope="session")
def held_out() -> torch.Tensor:
    """Rows of the same table that nobody was trained on, (row, pos)."""
    source = synthetic_source("markov2", rows=96, length=47, split="test", seed=0)
    return torch.from_numpy(source.batch(0).ids.copy())


@pytest.fixture(scope="session")
def trained_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A GPT-2 of two blocks."""
    shape = {"layers": 2, "d_model": 64, "heads": 4}
    return learnt({"preset": "tiny-gpt2", "architecture": shape}, "gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def trained_opt(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An OPT of two blocks."""
    folder = tmp_path_factory.mktemp("opt")
    config = tf.OPTConfig(
        vocab_size=16, hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        tf.OPTForCausalLM(config).save_pretrained(folder / "start")
    return learnt({"source": str(folder / "start")}, "opt", folder)
