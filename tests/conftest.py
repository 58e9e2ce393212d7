from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def smollm2() -> Iterator[object]:
    """The default model, fetched once into the cache; the test is skipped, saying why, if it cannot be fetched."""
    import vesalius
    from vesalius.errors import DownloadError

    try:
        model = vesalius.open("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"the default model cannot be fetched here: {error}")
    yield model
