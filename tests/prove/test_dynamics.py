from __future__ import annotations

import numpy as np
import pytest
import torch

from vesalius.build import planted
from vesalius.corpus.batches import Batch
from vesalius.find.detectors.repeats import LOOKS, on_repeats
from vesalius.find.detectors.stimuli import repeated
from vesalius.model import Model
from vesalius.prove.dynamics import in_context, moment, position_loss


@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_a_planted_induction_circuit_is_told_by_its_attention(base: str) -> None:
    """On repeated tokens the planted previous-token head and induction head look where they were made to look."""
    made = planted("induction", base, seed=3)
    model = Model.wrap(made.hf, made.tokenizer)
    ids = repeated(model, seed=0, rows=8, length=12)
    heads, _, _ = on_repeats(model, ids)
    table = heads.set_index("part")
    for part, role in made.roles.items():
        if role in LOOKS:
            assert table[role].idxmax() == str(part)
            assert table.loc[str(part), role] > 0.7
            assert table[role].drop(str(part)).max() < 0.3


def test_repeats_are_different_tokens_and_none_special() -> None:
    made = planted("induction")
    model = Model.wrap(made.hf, made.tokenizer)
    ids = repeated(model, seed=1, rows=6, length=10)
    assert ids.shape == (6, 20) and torch.equal(ids[:, :10], ids[:, 10:])
    assert all(len(set(row[:10].tolist())) == 10 for row in ids)
    assert not set(ids.flatten().tolist()) & set(made.tokenizer.all_special_ids)
    assert torch.equal(ids, repeated(model, seed=1, rows=6, length=10))
    assert not torch.equal(ids, repeated(model, seed=2, rows=6, length=10))


class Rows:
    fingerprint, vocab_size, rows, length = "rows", 20, 4, 9

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng(step)
        ids = rng.integers(4, 20, (4, 10))
        segments = np.zeros_like(ids)
        segments[0, 6:] = -1
        mask = np.zeros(ids.shape, dtype=bool)
        mask[:, 5] = True
        return Batch(step, ids, segments, mask)

    def describe(self) -> dict[str, object]:
        return {}


def test_the_loss_by_position_is_that_of_a_loop() -> None:
    made = planted("induction")
    model = Model.wrap(made.hf, made.tokenizer)
    found = position_loss(model, Rows(), 2)
    sums: dict[int, list[float]] = {p: [] for p in range(9)}
    targets = []
    for step in range(2):
        batch = Rows().batch(step)
        for row in range(4):
            ids = torch.from_numpy(batch.ids[row])
            log = model.logits(ids[None, :-1])[0].log_softmax(-1)
            for p in range(9):
                if batch.segments[row, p + 1] >= 0:
                    sums[p].append(-log[p, ids[p + 1]].item())
                    if batch.mask[row, p + 1]:  # type: ignore[index]
                        targets.append(sums[p][-1])
    assert found.by_position == pytest.approx([np.mean(sums[p]) for p in range(9)], rel=1e-4)
    assert found.targets == pytest.approx(np.mean(targets), rel=1e-4)


def test_in_context_compares_late_with_early() -> None:
    falling = np.linspace(3, 1, 200)
    assert in_context(falling) == pytest.approx(falling[180:].mean() - falling[10:30].mean())
    assert in_context([1.0] * 50) == 0


def test_moments_keep_their_parts_apart() -> None:
    made = planted("induction")
    model = Model.wrap(made.hf, made.tokenizer)
    bare = moment(model, 3)
    assert bare.step == 3 and bare.scores is None and set(bare.numbers) == {"repeat_first", "repeat_second"}
    assert bare.numbers["repeat_second"] < bare.numbers["repeat_first"]
