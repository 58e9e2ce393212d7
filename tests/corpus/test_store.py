from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus.corpora import texts, tokenizer

from vesalius.corpus import CorpusError, Document, TokenStore, from_dolma, from_megatron, to_dolma, to_megatron


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore.build(texts(), tokenizer(), tmp_path_factory.mktemp("store") / "s")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_every_text_comes_back_from_its_place(tmp_path: Path, kind: str) -> None:
    made = tokenizer(kind)
    TokenStore.build(iter(texts()), made, tmp_path / "s")
    store = TokenStore.open(tmp_path / "s")
    flat = np.fromfile(tmp_path / "s" / "tokens.bin", dtype="<u2")
    assert len(flat) == store.n_tokens == sum(len(store.ids(i)) + 1 for i in range(60))
    for number, document in enumerate(texts()):
        assert store.text(number) == document.text
        assert flat[store.bounds[number + 1] - 1] == made.eos_token_id
    assert store.index["id"].tolist() == [d.id for d in texts()]
    assert store.index["line"].tolist() == [d.line for d in texts()]
    assert store.tokenizer("stone")["input_ids"] == made("stone")["input_ids"]


def test_the_same_build_is_found_and_another_is_refused(tmp_path: Path) -> None:
    made = tokenizer()
    first = TokenStore.build(texts(), made, tmp_path / "s", inputs="made 60")
    before = (tmp_path / "s" / "tokens.bin").stat().st_mtime_ns
    assert TokenStore.build(iter(texts()), made, tmp_path / "s").fingerprint == first.fingerprint

    def never() -> Document:
        raise AssertionError("the documents were read")

    assert TokenStore.build(iter(never, None), made, tmp_path / "s", inputs="made 60").fingerprint == first.fingerprint
    assert (tmp_path / "s" / "tokens.bin").stat().st_mtime_ns == before
    with pytest.raises(CorpusError, match="other documents; name another folder"):
        TokenStore.build(texts()[:-1], made, tmp_path / "s")
    with pytest.raises(CorpusError, match="another tokenizer"):
        TokenStore.build(texts(), tokenizer("bytes"), tmp_path / "s")
    assert TokenStore.build(texts()[:-1], made, tmp_path / "s", overwrite=True).n_documents == 59
    other = TokenStore.build(texts(), made, tmp_path / "elsewhere")
    assert other.fingerprint == first.fingerprint != TokenStore.open(tmp_path / "s").fingerprint


def test_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    some = [*texts()[:5], *texts()[2:4], Document("again", texts()[0].text)]
    store = TokenStore.build(some, tokenizer(), tmp_path / "s", deduplicate=True)
    assert store.index["id"].tolist() == ["d0", "d1", "d2", "d3", "d4"]
    assert (store.manifest["read"], store.manifest["dropped"]) == (8, 3)
    assert TokenStore.build(some, tokenizer(), tmp_path / "t").n_documents == 8


@pytest.mark.parametrize("name", ["tokens.bin", "bounds.npy", "documents.parquet", "tokenizer/tokenizer.json"])
def test_a_missing_short_or_changed_file_is_named(tmp_path: Path, store: TokenStore, name: str) -> None:
    folder = shutil.copytree(store.folder, tmp_path / "s")
    file = folder / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorpusError, match=f"{name} is damaged: its sha256"):
        TokenStore.open(folder)
    file.write_bytes(whole[:-2])
    with pytest.raises(CorpusError, match=f"{name} is damaged: {len(whole) - 2} bytes, expected {len(whole)}"):
        TokenStore.open(folder, verify=False)
    file.unlink()
    with pytest.raises(CorpusError, match=f"{name} is missing"):
        TokenStore.open(folder)
    (folder / "store.json").write_text("{")
    with pytest.raises(CorpusError, match="store.json cannot be read"):
        TokenStore.open(folder)


def test_a_killed_build_is_never_taken_for_a_store(tmp_path: Path) -> None:
    code = (
        "import sys, time; from corpus.corpora import texts, tokenizer; from vesalius.corpus import TokenStore\n"
        "def slow():\n"
        "    yield from texts(); yield from texts(200, 1); print('half', flush=True); time.sleep(60)\n"
        "TokenStore.build(slow(), tokenizer('bytes'), sys.argv[1])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s")], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    time.sleep(0.05)
    assert not (tmp_path / "s").exists()
    with pytest.raises(CorpusError, match="no finished token store"):
        TokenStore.open(tmp_path / "s")
    assert TokenStore.build(texts(), tokenizer("bytes"), tmp_path / "s").n_documents == 60


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no tokens"):
        TokenStore.build([], tokenizer(), tmp_path / "s")
    with pytest.raises(CorpusError, match="no token 'x!' to end"):
        TokenStore.build(texts(), tokenizer(), tmp_path / "s", separator="x!")
    with pytest.raises(CorpusError, match="separator 9999 is outside"):
        TokenStore.build(texts(), tokenizer(), tmp_path / "s", separator=9999)
    (tmp_path / "full").mkdir()
    with pytest.raises(CorpusError, match="no finished token store"):
        TokenStore.build(texts(), tokenizer(), tmp_path / "full")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_split_is_by_text_whatever_the_order(tmp_path: Path, store: TokenStore) -> None:
    train, held = store.split(0.3, seed=4)
    names = set(held.index["id"])
    assert names.isdisjoint(train.index["id"]) and len(names) + train.n_documents == 60 and 8 <= len(names) <= 28
    assert [held.text(i) for i in range(held.n_documents)] == [d.text for d in texts() if d.id in names]
    turned = TokenStore.build([*texts()[::-1], *texts()], tokenizer(), tmp_path / "t")
    assert set(turned.split(0.3, seed=4).held_out.index["id"]) == names
    assert set(store.split(0.3, seed=5).held_out.index["id"]) != names
    places = np.arange(train.n_tokens)
    whole = np.concatenate([[*train.ids(i), train.separator] for i in range(train.n_documents)])
    assert np.array_equal(train.at(places), whole) and train.fingerprint != store.fingerprint
    with pytest.raises(CorpusError, match="holds out nothing"):
        store.split(0.0)
    alone = TokenStore.build(texts()[:1] * 3, tokenizer(), tmp_path / "one")
    with pytest.raises(CorpusError, match="all documents are one text \\(3\\)"):
        alone.split(0.5)


def test_dolma_and_megatron_layouts_read_by_others_and_back(tmp_path: Path, store: TokenStore) -> None:
    flat = store.at(np.arange(store.n_tokens))
    to_dolma(store, tmp_path / "d")
    assert np.array_equal(np.fromfile(tmp_path / "d.npy", dtype=np.uint16), flat)
    with gzip.open(tmp_path / "d.csv.gz", "rt", newline="") as stream:
        rows = list(csv.reader(stream))
    assert [(int(r[0]), int(r[1])) for r in rows] == list(zip(store.bounds[:-1], store.bounds[1:], strict=True))
    assert [(r[2], r[3], int(r[4])) for r in rows] == [(d.id, d.source, d.line) for d in texts()]

    to_megatron(store, tmp_path / "m")
    raw = (tmp_path / "m.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\0\0" and struct.unpack_from("<Q", raw, 9) == (1,) and raw[17] == 8
    n, marks = struct.unpack_from("<QQ", raw, 18)
    lengths = struct.unpack_from(f"<{n}i", raw, 34)
    offsets = struct.unpack_from(f"<{n}q", raw, 34 + 4 * n)
    assert (n, marks, len(raw)) == (60, 61, 34 + 12 * n + 8 * marks)
    body = (tmp_path / "m.bin").read_bytes()
    for number in (0, 7, 59):
        ids = struct.unpack_from(f"<{lengths[number]}H", body, offsets[number])
        assert list(ids) == [*store.ids(number), store.separator]

    for back in (
        from_dolma(tmp_path / "d", tokenizer(), tmp_path / "bd", separator=store.separator),
        from_megatron(tmp_path / "m", tokenizer(), tmp_path / "bm", separator=store.separator),
    ):
        assert np.array_equal(back.at(np.arange(back.n_tokens)), flat) and np.array_equal(back.bounds, store.bounds)
        assert back.index["sha256"].tolist() == store.index["sha256"].tolist()
    view = store.split(0.3).train
    to_megatron(view, tmp_path / "v")
    assert from_megatron(tmp_path / "v", tokenizer(), tmp_path / "bv").n_tokens == view.n_tokens
    (tmp_path / "m.idx").write_bytes(raw[:40])
    with pytest.raises(CorpusError, match="not a Megatron index"):
        from_megatron(tmp_path / "m", tokenizer(), tmp_path / "x")
    (tmp_path / "d.npy").write_bytes(body[:100])
    with pytest.raises(CorpusError, match="which has 50"):
        from_dolma(tmp_path / "d", tokenizer(), tmp_path / "x")


def test_the_manifest_is_plain_json(store: TokenStore) -> None:
    manifest = json.loads((store.folder / "store.json").read_text())
    assert manifest["documents"] == 60 and manifest["tokens"] == store.n_tokens and manifest["vocab_size"] % 8 == 0
