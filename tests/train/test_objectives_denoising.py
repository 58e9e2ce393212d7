"""Span corruption and mixtures of denoisers: rates, spans, order of sentinels, exact recovery, no padding inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.masks import PADDING
from vesalius.train.objectives import IGNORED, Needs, Sample, make_objective
from vesalius.train.objectives.denoising import splice
from vesalius.train.objectives.ragged import parts, span_noise

SENTINELS = {f"sentinel_{i}": 1000 + i for i in range(100)}
SPECIAL = {"pad": 0, "eos": 1, "mode_r": 2, "mode_s": 3, "mode_x": 4} | SENTINELS
CAUSAL, SEQ2SEQ = Needs(1100, SPECIAL), Needs(1100, SPECIAL, "encoder-decoder")
ROWS, WIDTH = 10_000, 257


def text(rows: int = ROWS, width: int = WIDTH, step: int = 0) -> Batch:
    ids = np.random.default_rng([1, step]).integers(10, 1000, (rows, width))
    return Batch(step, ids, np.zeros_like(ids))


def streams(sample: Sample, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one row, without padding: from a decoder's row by its loss, else as they are."""
    told = sample.targets[row].numpy()
    if "decoder_input_ids" in sample.inputs:
        shown = sample.inputs["input_ids"][row].numpy()
        return shown[shown != 0], told[told != IGNORED]
    first = int((told != IGNORED).argmax())
    return sample.inputs["input_ids"][row, : first + 1].numpy(), told[told != IGNORED]


def is_sentinel(ids: np.ndarray) -> np.ndarray:
    return ids >= 1000


@pytest.mark.parametrize("needs", [CAUSAL, SEQ2SEQ], ids=["decoder", "encoder-decoder"])
def test_span_corruption_of_ten_thousand_texts(needs):
    batch = text()
    sample = make_objective("span-corruption", needs, mask="causal").sample(batch, 0)
    noise = spans = total = 0
    for row in range(ROWS):
        shown, told = streams(sample, row)
        back = splice(shown, told, needs)
        assert np.array_equal(back, batch.ids[row, : len(back)])
        marks, asked = told[is_sentinel(told)], shown[is_sentinel(shown)]
        assert np.array_equal(marks, asked) and np.array_equal(marks, 1000 + np.arange(len(marks)))
        assert told[-1] == 1
        noise, spans, total = noise + len(told) - 1 - len(marks), spans + len(marks), total + len(back)
        if needs.kind == "encoder-decoder":
            assert len(back) == WIDTH
    assert noise / total == pytest.approx(0.150, abs=0.003)
    assert noise / spans == pytest.approx(3.0, abs=0.1)
    print(f"{needs.kind}: noise {noise / total:.4f}, span {noise / spans:.3f}, text kept {total / batch.ids.size:.3f}")


def test_decoder_rows_are_full_and_padded_only_at_the_end():
    batch = text(rows=200)
    for name, settings in [("span-corruption", {}), ("ul2", {}), ("ul2", {"mixture": "ul2"})]:
        sample = make_objective(name, CAUSAL, mask="causal", **settings).sample(batch, 0)
        assert sample.inputs["input_ids"].shape[1] == WIDTH - 1
        pad = (sample.inputs["input_ids"] == 0).numpy()
        assert not (pad[:, :-1] & ~pad[:, 1:]).any()
        assert pad.sum(1).max() <= 2  # a sentinel goes with its span: two tokens cannot always be placed


def test_ul2r_draws():
    batch = text()
    sample = make_objective("ul2", CAUSAL, mask="causal").sample(batch, 0)
    assert not ((sample.inputs["input_ids"] == 0)[:, :-1] & (sample.inputs["input_ids"] != 0)[:, 1:]).any()
    seen: dict[int, list[tuple[int, int, int]]] = {2: [], 3: [], 4: []}
    for row in range(ROWS):
        shown, told = streams(sample, row)
        back = splice(shown, told, CAUSAL)
        assert np.array_equal(back, batch.ids[row, : len(back)])
        marks = int(is_sentinel(told).sum())
        seen[int(shown[0])].append((len(told) - 1 - marks, marks, len(back)))
    shares = {mode: len(found) / ROWS for mode, found in seen.items()}
    assert shares[3] == pytest.approx(0.5, abs=0.015)
    assert shares[2] == pytest.approx(0.25, abs=0.015) and shares[4] == pytest.approx(0.25, abs=0.015)
    regular, sequential, extreme = (np.array(seen[m]) for m in (2, 3, 4))
    assert regular[:, 0].sum() / regular[:, 2].sum() == pytest.approx(0.15, abs=0.005)
    assert regular[:, 0].sum() / regular[:, 1].sum() == pytest.approx(3.0, abs=0.1)
    assert (sequential[:, 1] == 0).all()
    assert (sequential[:, 0] / sequential[:, 2]).mean() == pytest.approx(0.5, abs=0.02)
    rate, span = extreme[:, 0] / extreme[:, 2], extreme[:, 0] / extreme[:, 1]
    long, dense = span > 16, np.abs(rate - 0.5) < 0.01
    assert (long ^ dense).all()  # either spans of about 32, or half of the text
    assert rate.max() <= 0.5 + 0.01
    assert long.mean() == pytest.approx(0.5, abs=0.04)
    assert np.abs(span[long] - 32).max() <= 8 and np.abs(span[dense] - 3).max() < 0.2
    print(f"modes S {shares[3]:.3f} R {shares[2]:.3f} X {shares[4]:.3f}; span of long X {span[long].mean():.1f}")


def test_seven_denoisers_of_ul2():
    batch = text(rows=2100)
    sample = make_objective("ul2", SEQ2SEQ, mixture="ul2", end=False).sample(batch, 0)
    found: dict[tuple[int, float, float], int] = {}
    for row in range(2100):
        shown, told = streams(sample, row)
        assert np.array_equal(splice(shown, told, SEQ2SEQ), batch.ids[row])
        marks = int(is_sentinel(told).sum())
        noise = len(told) - marks
        key = (int(shown[0]), round(noise / WIDTH, 2), round(noise / marks) if marks else 0)
        found[key] = found.get(key, 0) + 1
    # 257 tokens: .15 is 39 (one span at mean 64), .5 is 128 (two at mean 64), S foretells the last 64
    assert set(found) == {
        (2, 0.15, 3),
        (2, 0.15, 8),
        (3, 0.25, 0),
        (4, 0.5, 3),
        (4, 0.5, 8),
        (4, 0.15, 39),
        (4, 0.5, 64),
    }
    assert min(found.values()) > 230 and max(found.values()) < 370  # 300 expected, deviation 16


def test_documents_are_denoised_apart():
    rng = np.random.default_rng(0)
    batch = text(rows=50)
    segments = np.cumsum(rng.random(batch.ids.shape) < 0.02, 1)
    segments[:, 240:] = PADDING
    batch = Batch(0, batch.ids, segments)
    for name in ("span-corruption", "ul2"):
        sample = make_objective(name, CAUSAL, cross_document="mask", restart_positions=True).sample(batch, 0)
        ids, documents = sample.inputs["input_ids"].numpy(), sample.mask.query.numpy()
        two_way = sample.mask.both_ways.numpy()
        for row in range(50):
            rest = [
                d for s in range(segments[row].max() + 1) if len(d := batch.ids[row][segments[row] == s]) > 1
            ]  # documents of one token cannot be denoised
            for document in dict.fromkeys(documents[row][documents[row] != PADDING].tolist()):
                at = np.flatnonzero(documents[row] == document)
                assert (np.diff(at) == 1).all()
                shown = ids[row, at[two_way[row, at]]]
                told = sample.targets[row, at].numpy()
                back = splice(shown, told[told != IGNORED], CAUSAL)
                original = rest.pop(0)
                assert np.array_equal(back, original[: len(back)])
                last = at[-1] == (documents[row] != PADDING).sum() - 1
                assert len(back) == len(original) or last  # only the row's last document is cut
        positions = sample.inputs["position_ids"][documents != PADDING]
        assert int(positions.max()) < WIDTH and int((positions == 0).sum()) > 50


def test_prefix_mask_covers_inputs_alone():
    sample = make_objective("span-corruption", CAUSAL).sample(text(rows=20), 0)
    told = (sample.targets != IGNORED).numpy()
    two_way = sample.mask.both_ways.numpy()
    first = told.argmax(1)
    assert np.array_equal(two_way.sum(1), first + 1)
    assert (two_way[:, 0]).all() and not two_way[np.arange(20), first + 1].any()
    assert torch.equal(sample.mask.allowed(), sample.inputs["attention_mask"])


def test_spans_stand_anywhere():
    """Two spans of three noise tokens among three kept ones: 2 ways to cut, 6 to place, each a twelfth of the time."""
    n = 12_000
    noise = span_noise(np.full(n, 6), np.full(n, 3), np.full(n, 2), np.random.default_rng(0)).reshape(n, 6)
    assert (noise.sum(1) == 3).all() and (np.diff(noise.astype(int), prepend=0, axis=1) == 1).sum() == 2 * n
    _, counts = np.unique(noise, axis=0, return_counts=True)
    assert len(counts) == 12 and np.abs(counts / n - 1 / 12).max() < 0.01


def test_every_cut_is_equally_likely():
    """Cutting 5 into 3 positive parts: six ways, each a sixth of the time."""
    n = 12_000
    cut = parts(np.full(n, 5), np.full(n, 3), np.random.default_rng(0)).reshape(n, 3)
    assert (cut.sum(1) == 5).all() and (cut > 0).all()
    _, counts = np.unique(cut, axis=0, return_counts=True)
    assert len(counts) == 6 and np.abs(counts / n - 1 / 6).max() < 0.015


def test_too_few_sentinels_and_odd_texts():
    few = Needs(1100, {"pad": 0, "sentinel_0": 1000, "sentinel_1": 1001})
    with pytest.raises(VesaliusError, match="12 noise spans and the vocabulary 2 sentinels"):
        make_objective("span-corruption", few).sample(text(rows=2, width=257), 0)
    objective = make_objective("span-corruption", CAUSAL)
    short = Batch(0, np.full((3, 9), 20), np.array([[0] * 9, [0] + [-1] * 8, [-1] * 9]))
    sample = objective.sample(short, 0)
    assert (sample.targets[1:] == IGNORED).all() and sample.count() > 0
    with pytest.raises(VesaliusError, match="one text a row"):
        make_objective("ul2", SEQ2SEQ, cross_document="mask").sample(
            Batch(0, np.full((1, 9), 20), np.arange(9)[None] // 3), 0
        )
    with pytest.raises(VesaliusError, match="no span for sentinel 1003"):
        splice([5, 1003], [1000, 6], CAUSAL)
