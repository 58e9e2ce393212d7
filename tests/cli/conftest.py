"""A model whose mechanism is known, as an ordinary folder with a tokenizer and prompts; and what one run on it left."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import SMALL, Outcome, vesalius
from families import tiny_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vesalius.build.planted import Planted, planted
from vesalius.model.sources.quiet import quiet_transformers


@pytest.fixture(scope="session")
def truth() -> Planted:
    """Two tasks, two shared heads out of four."""
    return planted("name-mover")


@pytest.fixture(scope="session")
def mover(truth: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, with `ioi.jsonl` and `who-stayed.jsonl`."""
    return truth.save(tmp_path_factory.mktemp("models") / "mover", 64)


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of numbered words."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, 97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with quiet_transformers():
        tiny_hf("llama").save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(mover: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished circuit run; see `first`."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def first(mover: Path, runs: Path) -> Outcome:
    """What `vesalius circuit` printed on the planted model."""
    return vesalius("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", runs, "--json", *SMALL)
