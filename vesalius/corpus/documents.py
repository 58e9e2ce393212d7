"""Documents: one text with its name and its place, read from files as a stream.

Files: `.txt` (or any `.gz` of a text), `.jsonl`, `.jsonl.gz`, `.parquet`, and folders of these in sorted order. Nothing
is normalised: the text of a document is the text of the file. What is not text is refused with the file and the byte.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vesalius.errors import VesaliusError

SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".gz", ".parquet")
BOM = b"\xef\xbb\xbf"


class CorpusError(VesaliusError):
    """Text or tokens that cannot be read, with the file, the place in it and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: its name, unique where the source has unique names.
        text: as it stands in the source.
        source: the file or corpus it comes from.
        line: where it begins there, from 1; in a parquet file its row.
        metadata: whatever else the source says of it.
    """

    id: str
    text: str
    source: str = ""
    line: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read(
    path: str | Path,
    *,
    paragraphs: bool = False,
    text_field: str = "text",
    skipped: Callable[[Path], None] | None = None,
) -> Iterator[Document]:
    r"""Reads the documents of a file, or of all files below a folder, one at a time.

    Args:
        path: `.txt`, `.jsonl`, `.parquet`, `.gz` of text or jsonl, or a folder of these; hidden files are left out.
        paragraphs: blank lines divide a text file into documents; otherwise the whole file is one.
        text_field: the field (jsonl) or column (parquet) that holds the text.
        skipped: told of each file of a folder whose ending is none of `SUFFIXES`.

    Raises:
        CorpusError: at once if there is nothing to read at `path`; while reading, at the first thing that is not text.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = file.write_text("one\n\ntwo\n")
        >>> [(d.id, d.line, d.text) for d in read(file, paragraphs=True)]
        [('a.txt#1', 1, 'one\n'), ('a.txt#2', 3, 'two\n')]
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise CorpusError(f"there is no file or folder '{path}'; check the path")
    if root.is_dir():
        files: list[Path] = []
        odd: list[Path] = []
        for file in sorted(root.rglob("*"), key=lambda f: f.relative_to(root).as_posix()):
            if file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts):
                (files if file.name.lower().endswith(SUFFIXES) else odd).append(file)
        if not files:
            held = ", ".join(sorted({f.suffix or f.name for f in odd})[:6]) or "nothing"
            raise CorpusError(f"the folder '{path}' holds no {', '.join(SUFFIXES)} (it holds {held})")
        for file in odd:
            if skipped is not None:
                skipped(file)
        names = [f.relative_to(root).as_posix() for f in files]
    else:
        files, names = [root], [root.name]
    return _all(root, files, names, paragraphs, text_field)


def _all(root: Path, files: list[Path], names: list[str], paragraphs: bool, text_field: str) -> Iterator[Document]:
    something = False
    for file, name in zip(files, names, strict=True):
        try:
            for document in _one(file, name, paragraphs, text_field):
                something = something or bool(document.text.strip())
                yield document
        except OSError as error:
            if isinstance(error, gzip.BadGzipFile):
                raise CorpusError(f"{file} is not a gzip file ({error}); fetch it again or rename it") from error
            raise CorpusError(f"{file} cannot be read: {error.strerror or error}") from error
        except (EOFError, zlib.error) as error:
            raise CorpusError(f"{file} is cut short or damaged ({error}); fetch it again") from error
    if not something:
        raise CorpusError(f"'{root}' holds no text: every document in it is empty; name another file")


def _one(file: Path, name: str, paragraphs: bool, text_field: str) -> Iterator[Document]:
    plain = name.lower().removesuffix(".gz")
    if plain.endswith(".parquet"):
        yield from _parquet(file, name, text_field)
        return
    with gzip.open(file, "rb") if name.lower().endswith(".gz") else file.open("rb") as stream:
        if plain.endswith(".jsonl"):
            yield from _jsonl(stream, file, name, text_field)
        elif paragraphs:
            yield from _paragraphs(stream, file, name)
        else:
            yield Document(name, decode(stream.read(), file), str(file))


def decode(data: bytes, file: Path | str, offset: int = 0) -> str:
    """UTF-8 bytes as text; `CorpusError` naming the file and the byte otherwise. A mark of byte order is left out.

    Args:
        data: the bytes.
        file: for the message.
        offset: of `data` within the (unpacked) file.
    """
    if offset == 0 and data.startswith(BOM):
        data, offset = data[len(BOM) :], len(BOM)
    nul = data.find(b"\0")
    if nul >= 0:
        raise CorpusError(f"{file} is not text: a zero byte at offset {offset + nul}; give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        raise CorpusError(f"{file} is not UTF-8 text: {where}; convert it (iconv -t UTF-8) or leave it out") from None


def _paragraphs(stream: Iterable[bytes], file: Path, name: str) -> Iterator[Document]:
    lines: list[bytes] = []
    offset = begins = number = 0
    first = 1
    for at, line in enumerate(stream, start=1):
        if line.strip():
            if not lines:
                begins, first = offset, at
            lines.append(line)
        elif lines:
            number += 1
            yield Document(f"{name}#{number}", decode(b"".join(lines), file, begins), str(file), first)
            lines = []
        offset += len(line)
    if lines:
        yield Document(f"{name}#{number + 1}", decode(b"".join(lines), file, begins), str(file), first)


def _jsonl(stream: Iterable[bytes], file: Path, name: str, text_field: str) -> Iterator[Document]:
    offset = 0
    for at, line in enumerate(stream, start=1):
        text_of_line = decode(line, file, offset)
        offset += len(line)
        if not text_of_line.strip():
            continue
        try:
            record = json.loads(text_of_line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{file}, line {at}: not JSON ({error}); one JSON object a line is wanted") from None
        if not isinstance(record, dict):
            raise CorpusError(f"{file}, line {at}: a JSON {type(record).__name__}, not an object; write {{...}}")
        yield _record(record, f"{file}, line {at}", str(file), f"{name}:{at}", at, text_field)


def _record(record: dict[str, Any], where: str, source: str, default_id: str, line: int, text_field: str) -> Document:
    if text_field not in record:
        held = ", ".join(map(str, list(record)[:8])) or "nothing"
        raise CorpusError(f"{where}: no field '{text_field}' (it has {held}); name the field with text_field=")
    text = record[text_field]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: '{text_field}' is {json.dumps(text, default=str)[:40]}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: half a surrogate pair at character {error.start}; it is no text") from None
    metadata = {k: v for k, v in record.items() if k not in (text_field, "id")}
    return Document(str(record.get("id", default_id)), text, source, line, metadata)


def _parquet(file: Path, name: str, text_field: str) -> Iterator[Document]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{file} is not a parquet file that can be read ({str(error).splitlines()[0]})") from None
    with table:
        if text_field not in table.schema_arrow.names:
            held = ", ".join(table.schema_arrow.names[:8])
            raise CorpusError(f"{file}: no column '{text_field}' (it has {held}); name it with text_field=")
        row = 0
        for batch in table.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                row += 1
                yield _record(record, f"{file}, row {row}", str(file), f"{name}:{row}", row, text_field)
