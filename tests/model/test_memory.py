"""Running out of memory is one clear line with a remedy, wherever it happens; other errors stay themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import tiny
from pairs import random_pairs

from vesalius.errors import OutOfMemory, VesaliusError
from vesalius.model import Model, Pairs, Site
from vesalius.model.gradients import Differences
from vesalius.model.memory import memory_errors
from vesalius.model.sweep import embedded, metric_values, record, trunk

OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: tried to allocate 9"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    MemoryError(),
]  # fmt: skip
OTHER = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), KeyboardInterrupt()]

WORK: dict[str, Callable[[Model, Pairs], object]] = {
    "run": lambda m, p: m.run(p.clean),
    "record": lambda m, p: record(m, p, "clean", []),
    "trunk": lambda m, p: trunk(m, p.clean, p, [Site("z", 0)]),
    "gradients": lambda m, p: Differences(m, p, [Site("z", 0)]).gradients("clean"),
}


def raising(error: BaseException) -> Callable[..., None]:
    def hook(*_: object) -> None:
        raise error

    return hook


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("error", OUT, ids=["cuda", "cpu", "mps", "python"])
def test_the_allocators_errors_say_what_to_lower(work: str, error: BaseException) -> None:
    model = tiny("llama")
    pairs = random_pairs(model)
    handle = model.anatomy.block(1).down.register_forward_hook(raising(error))
    with pytest.raises(OutOfMemory) as caught:
        WORK[work](model, pairs)
    text = str(caught.value)
    assert isinstance(caught.value, VesaliusError) and caught.value.__cause__ is error
    assert "\n" not in text and all(flag in text for flag in ("--n", "--memory", "--dtype"))
    assert (str(error).splitlines() or ["MemoryError"])[0][:40] in text
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    WORK[work](model, pairs)  # and the model still works


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("error", OTHER, ids=["shapes", "value", "ctrl-c"])
def test_other_errors_pass_through_as_they_are(work: str, error: BaseException) -> None:
    model = tiny("llama")
    pairs = random_pairs(model)
    model.anatomy.block(1).down.register_forward_hook(raising(error))
    with pytest.raises(type(error)) as caught:
        WORK[work](model, pairs)
    assert caught.value is error


def test_the_replay_the_readout_and_the_embedding_are_covered() -> None:
    model = tiny("llama")
    pairs = random_pairs(model)
    recording = record(model, pairs, "clean", [])
    for module, work in [
        (model.anatomy.block(1).down, lambda: recording.tape.replay(0)),
        (model.anatomy.main.final_norm.module, lambda: metric_values(model, pairs, recording.tape.final)),
        (model.hf.get_input_embeddings(), lambda: embedded(model, pairs.clean, pairs)),
    ]:
        handle = module.register_forward_hook(raising(torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(OutOfMemory, match="lower"), torch.no_grad():
            work()
        handle.remove()


def test_nothing_happens_when_nothing_does() -> None:
    with memory_errors():
        value = 3
    assert value == 3
