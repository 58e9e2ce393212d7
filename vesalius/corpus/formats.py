"""Token stores in other programs' layouts, both ways.

Dolma/OLMo: NAME.npy, raw ids without a header, and NAME.csv.gz with start, end, id, source, line of each document.
Megatron/GPT-NeoX: NAME.bin, raw ids, and NAME.idx: magic, version, type, counts, lengths, byte offsets, documents.
Neither keeps the sha256 of a document's text: after reading one, it is that of the decoded text.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.documents import CorpusError
from vesalius.corpus.store import Tokens, TokenStore, Writer, tokenizer_sha256
from vesalius.records import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAGIC = b"MMIDIDX\x00\x00"
TYPES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
BLOCK = 1 << 20  # tokens written at once


def to_dolma(store: Tokens, prefix: str | Path) -> list[Path]:
    """Writes PREFIX.npy and PREFIX.csv.gz; returns both paths."""
    base = Path(prefix)
    data, table = base.with_name(base.name + ".npy"), base.with_name(base.name + ".csv.gz")
    kind = "<u2" if store.vocab_size <= 1 << 16 else "<u4"
    write_atomic(data, lambda path: _dump(store, path, kind))

    def rows(path: Path) -> None:
        with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
            for row, first, last in zip(store.index.itertuples(), store.bounds, store.bounds[1:], strict=False):
                packed.write(_csv([first, last, row.id, row.source, row.line]))

    write_atomic(table, rows)
    return [data, table]


def _csv(values: list[Any]) -> bytes:
    import io

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue().encode()


def to_megatron(store: Tokens, prefix: str | Path) -> list[Path]:
    """Writes PREFIX.bin and PREFIX.idx, one sequence a document; returns both paths."""
    base = Path(prefix)
    data, table = base.with_name(base.name + ".bin"), base.with_name(base.name + ".idx")
    code, kind = (8, "<u2") if store.vocab_size <= 65_500 else (4, "<i4")
    write_atomic(data, lambda path: _dump(store, path, kind))
    n = store.n_documents
    head = MAGIC + struct.pack("<QBQQ", 1, code, n, n + 1)
    sizes = np.diff(store.bounds).astype("<i4").tobytes()
    offsets = (store.bounds[:-1] * np.dtype(kind).itemsize).astype("<i8").tobytes()
    write_atomic(table, head + sizes + offsets + np.arange(n + 1, dtype="<i8").tobytes())
    return [data, table]


def _dump(store: Tokens, path: Path, kind: str) -> None:
    with path.open("wb") as out:
        for first in range(0, store.n_tokens, BLOCK):
            places = np.arange(first, min(first + BLOCK, store.n_tokens))
            store.at(places).astype(kind).tofile(out)


def from_dolma(
    prefix: str | Path, tokenizer: PreTrainedTokenizerFast, folder: str | Path, separator: int | None = None
) -> TokenStore:
    """Makes a store of PREFIX.npy and PREFIX.csv.gz.

    Args:
        prefix: path without the two endings.
        tokenizer: that the ids belong to; its size decides whether they are 16 or 32 bits wide.
        folder: of the new store.
        separator: id that ends each document there; it is kept as such.
    """
    base = Path(prefix)
    data, table = base.with_name(base.name + ".npy"), base.with_name(base.name + ".csv.gz")
    ids = _mapped(data, "<u2" if len(tokenizer) <= 1 << 16 else "<u4")

    def rows() -> Iterator[tuple[str, str, int, int, int]]:
        try:
            with gzip.open(table, "rt", encoding="utf-8", newline="") as stream:
                for row in csv.reader(stream):
                    yield row[2], row[3], int(row[4]), int(row[0]), int(row[1])
        except (OSError, EOFError, ValueError, IndexError) as error:
            raise CorpusError(f"{table} cannot be read ({error}); five columns are wanted") from None

    return _collect(ids, rows(), tokenizer, folder, separator, str(data))


def from_megatron(
    prefix: str | Path, tokenizer: PreTrainedTokenizerFast, folder: str | Path, separator: int | None = None
) -> TokenStore:
    """Makes a store of PREFIX.bin and PREFIX.idx, one document a Megatron document; they are named by number."""
    base = Path(prefix)
    data, table = base.with_name(base.name + ".bin"), base.with_name(base.name + ".idx")
    try:
        raw = table.read_bytes()
        version, code, n, marks = struct.unpack_from("<QBQQ", raw, len(MAGIC))
        at = len(MAGIC) + 25
        sizes = np.frombuffer(raw, "<i4", n, at).astype(np.int64)
        offsets = np.frombuffer(raw, "<i8", n, at + 4 * n)
        documents = np.frombuffer(raw, "<i8", marks, at + 12 * n)
        if raw[: len(MAGIC)] != MAGIC or version != 1 or code not in TYPES:
            raise ValueError("another magic, version or type")
    except (OSError, ValueError, struct.error) as error:
        raise CorpusError(f"{table} is not a Megatron index that can be read ({error})") from None
    kind = TYPES[code]
    starts = offsets // np.dtype(kind).itemsize
    if not np.array_equal(starts[1:], (starts + sizes)[:-1]):
        raise CorpusError(f"the sequences of {table} do not follow each other in {data}; merge them first")

    def rows() -> Iterator[tuple[str, str, int, int, int]]:
        for number, (first, last) in enumerate(zip(documents, documents[1:], strict=False)):
            end = int(starts[last - 1] + sizes[last - 1]) if last > first else int(starts[first])
            yield str(number), str(data), 1, int(starts[first]), end

    return _collect(_mapped(data, kind), rows(), tokenizer, folder, separator, str(data))


def _mapped(path: Path, kind: str) -> NDArray[Any]:
    try:
        return np.memmap(path, dtype=kind, mode="r")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as {kind} ids ({error}); check the path and the type") from None


def _collect(
    ids: NDArray[Any],
    rows: Iterator[tuple[str, str, int, int, int]],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    separator: int | None,
    named: str,
) -> TokenStore:
    root = Path(folder)
    if root.exists():
        raise CorpusError(f"{root} is there already; name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".building-{root.name}-", dir=root.parent))
    request = {"tokenizer": tokenizer_sha256(tokenizer), "separator": separator, "deduplicate": False, "inputs": named}
    try:
        with Writer(building, tokenizer, separator, request) as writer:
            for name, source, line, first, last in rows:
                if not 0 <= first <= last <= len(ids):
                    raise CorpusError(f"document '{name}' is tokens {first} to {last} of {named}, which has {len(ids)}")
                own = np.asarray(ids[first:last], dtype=np.int64)
                if len(own) and not 0 <= own.min() <= own.max() < len(tokenizer):
                    raise CorpusError(
                        f"document '{name}' of {named} has ids outside of the tokenizer's {len(tokenizer)}"
                    )
                if separator is not None:
                    if not len(own) or own[-1] != separator:
                        raise CorpusError(
                            f"document '{name}' of {named} does not end with {separator}; give separator=None"
                        )
                    own = own[:-1]
                text = tokenizer.decode(own.tolist(), clean_up_tokenization_spaces=False)
                writer.add(name, source, line, hashlib.sha256(text.encode()).hexdigest(), own)
            writer.finish(root, overwrite=False)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return TokenStore.open(root, verify=False)
