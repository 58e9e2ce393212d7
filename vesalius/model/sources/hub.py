"""A checkpoint from the model hub: its safe files alone, in the hub client's own cache, also when offline."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius.errors import DownloadError, ModelError
from vesalius.model.sources import checkpoint
from vesalius.model.sources.located import Progress, megabytes
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.model.sources.spec import Hub

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, on this machine."""

    folder: Path
    commit: str
    licence: str | None
    offline: bool


def cached(hub: Hub) -> Path | None:
    """The folder of a snapshot that lies in the hub client's cache, whole or not; never asks the network."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(hub.repo, "config.json", revision=hub.revision)
    except (ValueError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def fetch(hub: Hub, progress: Progress, hint: str = "", code: bool = False, refetch: bool = False) -> Snapshot:
    """Brings a repository's checkpoint here, or finds it in the hub client's cache.

    A commit that is already here is not asked about again; a branch or tag is, and when the hub cannot be reached or
    no longer lets this user in, the cached one is used and `progress` told so.

    Args:
        hub: repository and revision.
        progress: told of each step.
        hint: closes the message of a name that is not found.
        code: bring the repository's Python files too (the user trusts them).
        refetch: download again what is cached.

    Raises:
        DownloadError: not found, gated, or out of reach and not cached.
        ModelError: no safetensors.
    """
    shown = hub.repo + (f"@{hub.revision}" if hub.revision else "")
    here = cached(hub)
    pinned = hub.revision is not None and re.fullmatch(r"[0-9a-f]{40}", hub.revision) is not None
    if here is not None and pinned and not code and not refetch and _whole(here):
        return Snapshot(here, here.name, None, offline=True)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    with quiet_transformers():
        try:
            progress(f"asking the hub for {shown}", None)
            info = HfApi().model_info(hub.repo, revision=hub.revision, timeout=TIMEOUT_S)
        except Exception as error:
            if here is not None and not isinstance(error, RevisionNotFoundError) and not refetch and _whole(here):
                why = "cannot be reached" if _unreachable(error) else f"refused ({type(error).__name__})"
                progress(f"the hub {why}; using the cached {shown} ({here.name[:8]})", None)
                return Snapshot(here, here.name, None, offline=True)
            raise _refusal(error, shown, hint) from error
        names = [s.rfilename for s in info.siblings or []]
        wanted = _wanted(names, shown, code)
        try:
            # By branch or tag, not by the commit just learnt: only so does the client note which commit it stands for,
            # and finds it again when offline.
            bar = byte_counter(shown, progress)
            folder = snapshot_download(
                hub.repo, revision=hub.revision, allow_patterns=wanted, tqdm_class=bar, force_download=refetch
            )
        except Exception as error:
            raise _refusal(error, shown, hint) from error
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    return Snapshot(Path(folder), Path(folder).name, str(licence) if licence else None, offline=False)


def byte_counter(shown: str, progress: Progress) -> Any:
    """A tqdm class that passes the bytes on to `progress` and draws nothing."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        """Counts as tqdm does."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> Any:
            refreshed = super().update(n)
            if self.unit == "B" and self.total:
                progress(f"downloading {shown} ({megabytes(self.total)})", min(1.0, self.n / self.total))
            return refreshed

    return Bar


def _wanted(names: list[str], shown: str, code: bool) -> list[str]:
    """The files to fetch, by name: those of a safe checkpoint at the repository's root."""
    wanted = [n for n in names if checkpoint.is_checkpoint_file(n) or n in ("LICENSE", "README.md")]
    if checkpoint.WEIGHTS in wanted:  # some repositories hold the weights twice
        wanted = [n for n in wanted if not n.endswith(".safetensors") or n == checkpoint.WEIGHTS]
    if code:
        wanted += [n for n in names if n.endswith(".py")]
    if not any(n.endswith(".safetensors") for n in wanted) or "config.json" not in wanted:
        gguf = [n for n in names if n.lower().endswith(".gguf")]
        if gguf:
            raise ModelError(f"hub model '{shown}' holds {gguf[0]} and no safetensors; download it and give its path")
        root = [n for n in names if "/" not in n]
        raise ModelError(checkpoint.refusal(root, f"hub model {shown}"))
    return wanted


def _whole(folder: Path) -> bool:
    try:
        checkpoint.weight_files(folder)
    except ModelError:
        return False
    return True


def _unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status >= 500 or status == 429
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def _refusal(error: Any, shown: str, hint: str) -> ModelError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, ModelError):
        return error
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"hub model '{shown}' is gated: accept its terms on its page, then log in: hf auth login (or set HF_TOKEN)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DownloadError(f"hub model '{shown}' was not found (a private one needs: hf auth login){hint}")
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(f"hub model '{shown}': there is no such branch, tag or commit")
    if isinstance(error, ValueError):
        return ModelError(f"'{shown}' is not a hub name: {' '.join(str(error).split())[:200]}")
    if _unreachable(error):
        why = type(error).__name__
        return DownloadError(f"hub model '{shown}' is not cached and the hub cannot be reached ({why}){hint}")
    return DownloadError(f"hub model '{shown}' could not be fetched: {' '.join(str(error).split())[:200]}{hint}")
