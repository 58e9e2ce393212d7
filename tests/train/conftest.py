from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from train_helpers import write_corpus


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small corpus, with a cache of its own for what is made of it."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VESALIUS_CACHE", str(folder / "cache"))
        yield write_corpus(folder)
