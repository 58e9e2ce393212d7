"""Memory as a stated budget, and running out of it as a clear refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vesalius.errors import OutOfMemory

PROMPTS = "lower --n (prompts), --memory (working memory in GiB) or use --dtype bfloat16"


@contextmanager
def memory_errors(remedy: str = PROMPTS) -> Iterator[None]:
    """Turns the allocators' out-of-memory errors into `OutOfMemory`, which says what to lower.

    Args:
        remedy: what makes the work inside smaller.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{_told(error)}; {remedy}") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise OutOfMemory(f"{_told(error)}; {remedy}") from error


def _told(error: BaseException) -> str:
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return f"out of memory ({first})"
