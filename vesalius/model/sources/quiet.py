"""Keeps transformers' own bars and reports off the terminal while it loads, and passes its progress on."""

from __future__ import annotations

import contextlib
import logging as stdlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from vesalius.model.sources.located import Progress


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only and no progress bars inside; the user's settings are put back on the way out."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    level, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
    )
    logging.set_verbosity(stdlib.CRITICAL)
    logging.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        # The two calls for transformers switch the hub's bars along with their own.
        if hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()


@contextlib.contextmanager
def gguf_progress(message: str, progress: Progress) -> Iterator[None]:
    """Hands the tensor count of transformers' GGUF reader to `progress` in place of its bar."""
    import transformers.modeling_gguf_pytorch_utils as reader

    def counted(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        listed = list(tensors)
        for done, tensor in enumerate(listed):
            progress(message, done / len(listed))
            yield tensor
        progress(message, 1.0)

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = counted
    try:
        yield
    finally:
        reader.tqdm = bar
