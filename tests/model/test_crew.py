"""Sharing a sweep out among threads changes nothing but the time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from families import tiny
from pairs import random_pairs

from vesalius.find import find
from vesalius.model.crew import Crew, replica
from vesalius.model.replay import Tape
from vesalius.prove.circuit import Circuit
from vesalius.prove.faithfulness import evaluate


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_replica_shares_every_weight_and_no_module() -> None:
    model = tiny("llama")
    other = replica(model)
    mine, theirs = dict(model.hf.named_parameters()), dict(other.hf.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    assert not {id(m) for m in model.hf.modules()} & {id(m) for m in other.hf.modules()}
    assert other.hf.config is not model.hf.config  # attention is switched by the config
    ids = torch.arange(1, 7)[None]
    assert torch.equal(model.logits(ids), other.logits(ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "bert", "t5"])
def test_two_threads_find_what_one_finds(family: str, two_threads: None) -> None:
    model = tiny(family)
    pairs = random_pairs(model, shared=3)
    both = find("activation-patching", model, pairs)
    torch.set_num_threads(1)
    alone = find("activation-patching", model, pairs)
    np.testing.assert_allclose(both.per_example, alone.per_example, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_two_threads_prove_what_one_proves(two_threads: None) -> None:
    model = tiny("llama")
    pairs = random_pairs(model, shared=3)
    parts = model.parts(("head", "mlp"))
    circuits = [Circuit(nodes=frozenset(parts[:k]), edges=None) for k in range(1, len(parts))]
    both, _ = evaluate(model, pairs, circuits, memory_gb=1e-6)
    torch.set_num_threads(1)
    alone, _ = evaluate(model, pairs, circuits)
    np.testing.assert_allclose(both, alone, atol=1e-5)


def test_every_job_is_done_once_and_an_error_leaves_threads_as_they_were(two_threads: None) -> None:
    model = tiny("gpt2")
    pairs = random_pairs(model)
    tape = Tape(model, pairs.clean, pairs.mask, pairs.reads)
    with Crew(model) as crew:
        assert crew.workers == 2
        assert sorted(crew.run(tape, range(20), lambda _, job: job * job)) == [(i, i * i) for i in range(20)]

        def fail(_: Tape, job: int) -> int:
            if job == 3:
                raise ValueError("job 3")
            return job

        with pytest.raises(ValueError, match="job 3"):
            list(crew.run(tape, range(20), fail))
    assert torch.get_num_threads() == 2
    assert len(crew.models) == 1
