"""Memory as a stated budget, and running out of it as a clear refusal."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vesalius.errors import OutOfMemory

PROMPTS = "lower --n (prompts), --memory (working memory in GiB) or use --dtype bfloat16"


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on and still alive; the same on every machine.

    Args:
        model: whose weights are not counted.

    Attributes:
        now: bytes alive. peak: the most at one time.

    Example:
        >>> with Tally() as tally:
        ...     sum_ = (torch.ones(1000) + 1).sum()
        >>> tally.peak, tally.now
        (8000, 4)
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        tensors = () if model is None else (*model.parameters(), *model.buffers())
        self._known = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._known:
            return
        size = storage.nbytes()
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


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
