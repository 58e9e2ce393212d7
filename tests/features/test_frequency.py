"""Frequency tagging where the answer is known: planted series, a planted model, a mixed recording; and controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from features_helpers import tokenizer
from frequency_helpers import clock
from scipy.stats import kstest
from transformers import GPT2Config, GPT2LMHeadModel

from vesalius.errors import VesaliusError
from vesalius.features.frequency import (
    Recordings,
    frequency_tagging,
    made_sentences,
    natural_sentences,
    overlap,
    read_recordings,
    read_sentences,
    similarity,
    unit_series,
    untrained,
)
from vesalius.features.frequency.spectrum import corrected, least, measured, phrase_periods, sets, whole
from vesalius.features.frequency.stimuli import control
from vesalius.model import Model

SENTENCES = made_sentences(24)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_rhythms_are_found_and_noise_is_not(seed: int) -> None:
    """20 of 1000 series carry 1 or 2 Hz at -5 dB: recall and false positives, beside those of the raw rule."""
    rng = np.random.default_rng(seed)
    x, time = rng.standard_normal((1000, 256)), np.arange(256)
    power = 10 ** (-5 / 10)
    x[:10] += np.sqrt(2 * power) * np.cos(2 * np.pi * time / 4 + rng.uniform(0, 2 * np.pi, (10, 1)))
    x[10:20] += np.sqrt(power) * np.cos(np.pi * time)
    found = measured(x, 4, 1000, seed)
    held = sets(found, x, 4)
    assert np.isin(held[:10], ["sentence"]).mean() >= 0.95 and np.isin(held[10:20], ["phrase"]).mean() >= 0.95
    assert (held[20:] != "").mean() <= 0.01
    raw = [(found[f"p_{name}"][20:] < 0.05).mean() for name in ("sentence", "phrase")]
    assert all(0.03 < share < 0.07 for share in raw), raw  # what the 95 % rule lets through at each rate


def test_p_is_uniform_where_order_means_nothing_and_agrees_with_its_law() -> None:
    x = np.random.default_rng(3).standard_normal((1500, 96))
    shuffled, law = measured(x, 4, 999, 5), measured(x, 4, 0)
    for name in ("p_sentence", "p_phrase"):
        assert kstest(shuffled[name], "uniform").pvalue > 0.01
        middle = shuffled[name] > 0.01
        assert np.corrcoef(shuffled[name][middle], law[name][middle])[0, 1] > 0.998


def test_the_shuffles_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 48)) + np.cos(np.pi * np.arange(48) / 2) * np.array([[0.0], [0.1], [0.2]])
    found = measured(x, 4, 400, 7)
    orders = np.argsort(np.random.default_rng([7, *b"time"]).random((400, 48)), axis=1)
    for i, row in enumerate(x):
        real = abs(np.fft.rfft(row)[12])
        null = []
        for order in orders:
            there = np.zeros(48)
            there[order] = row  # the value at t goes to order[t]
            null.append(abs(np.fft.rfft(there)[12]))
        assert found["p_sentence"][i] == pytest.approx((1 + sum(v >= real for v in null)) / 401)


def test_an_overtone_is_no_phrase() -> None:
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((400, 128))
    x[0, ::4] += 1  # once a sentence: as much at 2 Hz as at 1 Hz
    x[1, ::2] += 1  # once a phrase
    x[2, ::2] += 1
    x[2, ::4] += 0.9  # both: phrases, those that begin a sentence more
    found = measured(x, 4, 200)
    assert sets(found, x, 4)[:3].tolist() == ["sentence", "phrase", "both"]
    assert sets(found, x, 4, raw=True)[:3].tolist() == ["both", "phrase", "both"]


@pytest.mark.parametrize("words", [8, 9])
def test_longer_sentences_have_their_own_rates(words: int) -> None:
    assert phrase_periods(words) == [2, 3, 4]
    n = whole(40, words)
    assert n * words % 12 == 0 and whole(least(words), words) == least(words)
    rng = np.random.default_rng(0)
    time = np.arange(n * words)
    x = rng.standard_normal((300, n * words))
    x[0] += np.cos(2 * np.pi * time / words)
    for i, period in enumerate((2, 3, 4), 1):
        x[i] += np.cos(2 * np.pi * time / period)
    found = measured(x, words, 200)
    held = sets(found, x, words)
    assert held[:4].tolist() == ["sentence", "phrase", "phrase", "phrase"]
    assert found["period"][1:4].tolist() == [2, 3, 4]


@pytest.fixture(scope="module")
def clocked() -> Model:
    return clock(sorted({w for s in SENTENCES for w in s}))


def test_planted_units_fall_into_their_sets(clocked: Model) -> None:
    """The lead-in is four sentences, so places of the stream and of its sentences agree."""
    found = frequency_tagging(clocked, SENTENCES, orders=4, permutations=300, controls=())
    held = found.units.set_index("unit")["set"]
    assert held[0] == "sentence" and held[1] == "phrase"
    assert (held[2:] == "").all()
    again = frequency_tagging(clocked, SENTENCES, orders=4, permutations=300, controls=())
    assert again.units.equals(found.units)
    assert found.scores().top(1, "value").parts[0].index in (0, 1)


def test_a_unit_is_averaged_over_the_tokens_of_its_word(clocked: Model) -> None:
    """Against a plain reading of the same stream, word by word, where each word is one token."""
    series = unit_series(clocked, SENTENCES, orders=2, seed=3)
    order = np.random.default_rng([3, *b"orders/"]).permutation(len(SENTENCES))
    stream = [SENTENCES[i] for i in order]
    words = [w for s in (*stream[-4:], *stream) for w in s]
    assert clocked.tokenizer is not None
    ids = torch.tensor([clocked.tokenizer.convert_tokens_to_ids(words)])
    x = clocked.run(ids, capture=[("neurons", 0)])[("neurons", 0)][0, 16:].T.double().numpy()
    time = np.arange(x.shape[1])
    x = np.stack([row - np.polyval(np.polyfit(time, row, 1), time) for row in x])
    np.testing.assert_allclose(series.halves[0][0][:, order].reshape(16, -1), x, atol=1e-4)


def test_a_short_context_is_read_in_chunks(clocked: Model) -> None:
    """The words' own activations do not depend on how the stream is cut, where the model looks at nothing else."""
    long = unit_series(clocked, SENTENCES, orders=2)
    short = clock(sorted({w for s in SENTENCES for w in s}))
    short.hf.config.n_positions = short.hf.config.max_position_embeddings = 42  # two chunks' sentences at a time
    cut = unit_series(short, SENTENCES, orders=2)
    assert cut.tokens > long.tokens
    mine, other = (s.by_sentence[0, 2:].reshape(14, -1) for s in (long, cut))
    assert np.median([np.corrcoef(a, b)[0, 1] for a, b in zip(mine, other, strict=True)]) > 0.9
    short.hf.config.n_positions = short.hf.config.max_position_embeddings = 18
    with pytest.raises(VesaliusError, match="do not fit into the context of clock"):
        unit_series(short, SENTENCES, orders=2)


def test_controls_lose_what_they_should() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        for before, after in zip(SENTENCES, control("shuffled", SENTENCES, rng), strict=True):
            assert sorted(before) == sorted(after)
            assert not set(zip(before, before[1:], strict=False)) & set(zip(after, after[1:], strict=False))
    mixed = control("exchanged", SENTENCES, rng)
    for place in range(4):
        assert sorted(s[place] for s in mixed) == sorted(s[place] for s in SENTENCES)
    assert not set(mixed) & set(SENTENCES)


def test_a_word_that_the_tokenizer_does_not_know_is_refused(clocked: Model) -> None:
    """Every unknown word is the same token: a stream of them has no sentences to follow."""
    known = made_sentences(16)
    strange = [*known[:7], (*known[7][:2], "zzyzx", known[7][3]), *known[8:]]
    with pytest.raises(VesaliusError, match="the word 'zzyzx' is unknown to the tokenizer of .*leave out its sentence"):
        unit_series(clocked, strange, 2)


def test_no_word_of_the_made_sentences_stands_twice() -> None:
    words = [w for s in made_sentences(64, seed=4) for w in s]
    assert len(set(words)) == 256 and made_sentences(60, 1) != made_sentences(60, 2)


def test_random_weights_are_those_of_another_model(clocked: Model) -> None:
    state = torch.get_rng_state()
    a, b = untrained(clocked, 1), untrained(clocked, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert a.fingerprint == b.fingerprint != clocked.fingerprint


def test_overlap_against_counting_by_hand() -> None:
    a, b = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([0, 1, 1, 1, 0, 0, 0, 0], bool)
    assert overlap(a, b) == pytest.approx({"jaccard": 0.5, "dice": 2 / 3, "dice_chance": 3 / 8})


def test_correction_is_benjamini_and_hochbergs() -> None:
    p = np.array([0.01, 0.02, 0.03, 0.5])
    np.testing.assert_allclose(corrected(p), [0.04, 0.04, 0.04, 0.5])


# -- recordings


@pytest.fixture(scope="module")
def layered() -> tuple[Model, object]:
    """Five random blocks wide enough to differ, read once."""
    words = sorted({w for s in SENTENCES for w in s})
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(words) + 3, n_embd=32, n_layer=5, n_head=4, n_positions=256, n_inner=64)
    config.initializer_range = 0.4
    hf = GPT2LMHeadModel(config).eval()
    model = Model.wrap(hf, tokenizer(len(words) + 3, names=words), name="layered")
    return model, frequency_tagging(model, SENTENCES, orders=2, permutations=0, controls=())


def mixed(series: np.ndarray, seed: int, channels: int = 60) -> np.ndarray:
    """Noisy linear mixes of a layer's standardised units, (stimulus, channel, word)."""
    rng = np.random.default_rng(seed)
    x = np.moveaxis(series, 0, -1)  # (stimulus, word, unit)
    z = (x - x.mean(0)) / x.std(0)
    out = z @ rng.standard_normal((x.shape[-1], channels))
    return np.moveaxis(out + rng.standard_normal(out.shape) * out.std(), 1, 2)


def test_the_mixed_layer_is_the_nearest(layered: tuple[Model, object]) -> None:
    found = layered[1]
    nearest = []
    for seed in range(10):
        data = mixed(found.series.by_sentence[3], seed)  # type: ignore[attr-defined]
        layers, _ = similarity(found, Recordings.of(SENTENCES, data))  # type: ignore[arg-type]
        nearest.append(int(layers.loc[layers["score"].idxmax(), "layer"]))
        assert layers.loc[3, "p"] < 0.05
    assert sum(abs(n - 3) <= 1 for n in nearest) >= 9
    noise = np.random.default_rng(0).standard_normal((24, 20, 4))
    layers, _ = similarity(found, Recordings.of(SENTENCES, noise))  # type: ignore[arg-type]
    assert (layers["p"] > 0.01).all()


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_recordings_come_from_both_kinds_of_file(tmp_path: Path, suffix: str) -> None:
    data = np.random.default_rng(0).standard_normal((24, 5, 8))
    texts = [" ".join(s) for s in SENTENCES]
    if suffix == ".npz":
        np.savez(tmp_path / "r.npz", stimuli=texts, recordings=data, channels=list("abcde"))
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "r.h5", "w") as file:
            file["stimuli"], file["recordings"], file["channels"] = texts, data, list("abcde")
    found = read_recordings(tmp_path / f"r{suffix}")
    assert found.stimuli == tuple(SENTENCES) and found.channels == tuple("abcde")
    np.testing.assert_allclose(found.distances[2, 0], 1 - np.corrcoef(data[0, 2], data[1, 2])[0, 1])


def test_phases_that_agree_between_trials_are_near() -> None:
    """Stimuli 0 to 7 answer with one phase in every trial, the others with a random one."""
    rng = np.random.default_rng(0)
    time = np.arange(100) / 100  # one second: one sentence of four words
    phase = rng.uniform(0, 2 * np.pi, (16, 60, 1, 1))
    phase[:8] = 1.0
    data = np.cos(2 * np.pi * time + phase) + 0.1 * rng.standard_normal((16, 60, 1, 100))
    found = Recordings.of(SENTENCES[:16], data, rate=100)
    square = np.zeros((16, 16))
    square[np.triu_indices(16, 1)] = found.distances[0]
    assert square[:8, :8].max() < 0.1 and square[8:, 8:][np.triu_indices(8, 1)].min() > 0.5


def test_pickled_recordings_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", stimuli=np.array([{"a": 1}], dtype=object), recordings=np.zeros((1, 1, 1)))
    with pytest.raises(VesaliusError, match="r.npz cannot be read"):
        read_recordings(tmp_path / "r.npz")


def test_recordings_of_other_stimuli_are_refused(layered: tuple[Model, object]) -> None:
    other = [*SENTENCES[:10], ("a", "green", "idea", "sleeps"), *SENTENCES[11:]]
    with pytest.raises(VesaliusError, match="stimulus 11 of the recordings, 'a green idea sleeps', is not among"):
        similarity(layered[1], Recordings.of(other, np.zeros((24, 2, 4))))  # type: ignore[arg-type]


# -- texts


def test_a_line_of_another_length_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text("Fat rats sensed fear.\n\nOld men saw ships!\nA dog ran home fast\n")
    with pytest.raises(VesaliusError, match=r"s.txt line 4 has 5 words and line 1 4"):
        read_sentences(path)
    path.write_text("Fat rats sensed fear.\n\nOld men's eyes closed!\n")
    assert read_sentences(path)[1] == ("Old", "men's", "eyes", "closed")


def test_running_text_gives_its_sentences_of_one_length() -> None:
    text = 'He went out. "She saw him go there!" It was late, too. They all went home again. No end here at all'
    assert natural_sentences([text], 5, 2) == [
        ("She", "saw", "him", "go", "there"), ("They", "all", "went", "home", "again"),
    ]  # fmt: skip
    with pytest.raises(VesaliusError, match="has 2 sentences of 5 words, and 3 are needed"):
        natural_sentences([text], 5, 3)


def test_too_few_sentences_for_the_window(clocked: Model) -> None:
    with pytest.raises(VesaliusError, match="8 sentences of 4 words are too few: the 10 bins .* need 12 or more"):
        frequency_tagging(clocked, SENTENCES[:8])
