"""Memory as a stated budget, and running out of it as a clear refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vesalius.errors import OutOfMemory


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns the allocators' out-of-memory errors into `OutOfMemory`, which says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(_advice(error)) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise OutOfMemory(_advice(error)) from error


def _advice(error: BaseException) -> str:
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return f"out of memory ({first}); lower --n (prompts), --memory (working memory in GiB) or use --dtype bfloat16"
