"""Several cores on one sweep: variants are shared out among threads, each with a copy of the modules.

On a CPU one matrix product over two cores wastes part of both; two products on a core each do not (measured on two
cores: docs/results/bench.md). PyTorch runs without Python's lock, so threads suffice. Hooks belong to modules, so that
each thread has modules of its own around the same weights: no tensor is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import TypeVar

import torch

from vesalius.model.model import Model
from vesalius.model.replay import Tape

Job = TypeVar("Job")
Result = TypeVar("Result")


def replica(model: Model) -> Model:
    """The same model under other module objects; parameters and buffers are shared, not copied."""
    shared = {id(t): t for t in chain(model.hf.parameters(), model.hf.buffers())}
    hf = copy.deepcopy(model.hf, shared)
    return Model.wrap(hf, model.tokenizer, model.name, model.spec, model.fingerprint)


class Crew:
    """Runs replays side by side; a context manager.

    Args:
        model: the model. workers: threads; by default as many as PyTorch may use on a CPU, one elsewhere.
    """

    def __init__(self, model: Model, workers: int | None = None) -> None:
        alone = model.device.type != "cpu" or model.kind == "encoder-decoder" or hasattr(model.hf, "hf_device_map")
        self.workers = 1 if alone else workers or torch.get_num_threads()
        self.models = [model]

    def __enter__(self) -> Crew:
        self.models += [replica(self.models[0]) for _ in range(self.workers - 1)]
        return self

    def __exit__(self, *_: object) -> None:
        del self.models[1:]

    def run(self, tape: Tape, jobs: Sequence[Job], work: Callable[[Tape, Job], Result]) -> Iterator[tuple[Job, Result]]:
        """Yields each job with its result as it is done, in any order; `work` may replay the tape it is given."""
        workers = min(self.workers, len(jobs))
        if workers <= 1:
            for job in jobs:
                yield job, work(tape, job)
            return
        idle = [tape.on(m) for m in self.models[:workers]]
        waiting = list(reversed(jobs))
        busy: dict[Future[Result], tuple[Tape, Job]] = {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                while waiting or busy:
                    while waiting and idle:
                        mine, job = idle.pop(), waiting.pop()
                        busy[pool.submit(work, mine, job)] = (mine, job)
                    for future in wait(busy, return_when=FIRST_COMPLETED).done:
                        mine, job = busy.pop(future)
                        idle.append(mine)
                        yield job, future.result()
        finally:
            torch.set_num_threads(threads)
