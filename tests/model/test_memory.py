"""Running out of memory is one clear line with a remedy, wherever it happens; other errors stay themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import some_ids, tiny
from pairs import random_pairs

from vesalius.errors import OutOfMemory, VesaliusError
from vesalius.model import Model, Pairs, Site
from vesalius.model.gradients import Differences
from vesalius.model.memory import Tally, memory_errors
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


def test_a_tally_counts_what_is_alive_at_once() -> None:
    weight = torch.ones(1000)
    layer = torch.nn.ParameterList([weight])
    with Tally(layer) as tally, torch.no_grad():
        first = weight * 2
        assert tally.now == tally.peak == 4000
        view = first[:10].view(5, 2)
        del first
        assert tally.now == 4000  # the view holds it
        second = view.reshape(10).repeat(10) + weight[:100]
        assert tally.peak == 4000 + 2 * 400 and tally.now == 4400
        del view, second
        assert tally.now == 0 and weight.view(10, 100).sum() == 1000


def test_a_models_peak_grows_with_what_it_reads_not_with_its_weights() -> None:
    model, peaks = tiny("llama").hf, []
    for length in (8, 8, 16):
        with Tally(model) as tally, torch.no_grad():
            model(some_ids(1, length), use_cache=False)
        peaks.append(tally.peak)
    assert peaks[0] == peaks[1] and 1.9 * peaks[0] < peaks[2] < sum(p.nbytes for p in model.parameters())
