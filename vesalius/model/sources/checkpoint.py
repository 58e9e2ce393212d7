"""Is this folder a checkpoint that can be read safely? Says what is missing, cut short, or refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vesalius.errors import DownloadError, ModelError
from vesalius.model.sources.hashing import remembered_sha256, sha256_of

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".tflite", ".npz")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_CORES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ROUNDED = "int8.safetensors"  # of a model in whole numbers that plain transformers cannot hold
# Keys of config.json that tell how the file was written, not what the model computes.
NOT_COMPUTED = ("transformers_version", "_name_or_path", "_model_name_or_path", "torch_dtype", "dtype")


def is_checkpoint_file(name: str) -> bool:
    """Whether a file belongs to a safe checkpoint: safetensors, configuration or tokenizer; never a pickle or code."""
    return name in CONFIG_FILES or name in TOKENIZER_FILES or name == INDEX or is_shard(name)


def is_shard(name: str) -> bool:
    """`model.safetensors`, or one of the numbered shards of it."""
    return name == WEIGHTS or (name.startswith("model-") and name.endswith(".safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; `ModelError` when it is not one."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch or save the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; fetch or save the model again")
    return content


def weight_files(folder: Path, spec: str | None = None) -> list[Path]:
    """The weight files of a checkpoint, after checking that the folder is one and that none of them is cut short.

    Args:
        folder: config.json and model.safetensors (or its shards and their index).
        spec: how the user named it, for the messages.

    Raises:
        ModelError: not a model, or only weights that would have to be unpickled; the message says what is missing.
        DownloadError: a weight file that is shorter or longer than its own header says, or missing from its index.
    """
    shown = spec or str(folder)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise ModelError(f"there is no folder '{shown}'") from None
    except NotADirectoryError:
        raise ModelError(f"'{shown}' is a file; give the folder that holds config.json, or a .gguf file") from None
    except PermissionError:
        raise ModelError(f"the folder '{shown}' may not be read by this user; change its permissions") from None
    _check_config(folder, names, shown)
    if WEIGHTS in names:
        files = [folder / WEIGHTS]
    elif INDEX in names:
        files = [folder / name for name in _indexed(folder / INDEX, names, shown)]
    elif ROUNDED in names:
        files = [folder / ROUNDED]
    else:
        raise ModelError(refusal(names, shown))
    for path in files:
        check_safetensors(path)
    return files


def check_safetensors(path: Path) -> None:
    """Reads the header alone and compares the size it announces with the file's.

    The format: 8 bytes, the header's length; the header, a JSON object with each tensor's offsets; the data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise DownloadError(f"{path} is cut short ({size} bytes); fetch or save the model again")
            header = json.loads(file.read(length))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        announced = 8 + length + max(ends, default=0)
    except PermissionError:
        raise ModelError(f"{path} may not be read by this user; change its permissions") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise DownloadError(f"{path} is not a safetensors file, or is damaged; fetch or save the model again") from None
    if size != announced:
        state = "cut short" if size < announced else "longer than its header says"
        raise DownloadError(f"{path} is {state}: {size} bytes where {announced} belong; fetch or save the model again")


def fingerprints(folder: Path, sha256: dict[str, str]) -> tuple[str, str]:
    """(sha256 of the weights, 16 hex digits over weights and configuration).

    Args:
        folder: where config.json lies.
        sha256: of each weight file, by name.
    """
    hashes = sorted(sha256.items())
    if len(hashes) == 1:
        weights = hashes[0][1]
    else:
        weights = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in hashes).encode()).hexdigest()
    config = {k: v for k, v in read_json(folder / "config.json").items() if k not in NOT_COMPUTED}
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return weights, hashlib.sha256(f"{weights}\n{canonical}".encode()).hexdigest()[:16]


def hash_weights(files: list[Path], memo: Path, verify: bool = False) -> dict[str, str]:
    """sha256 of each weight file by name; hashes that were computed before are remembered in `memo` unless `verify`.

    The hub's cache names a large file's blob by its sha256: one that differs is a damaged download.
    """
    found = {}
    for path in files:
        digest = sha256_of(path) if verify else remembered_sha256(path, memo)
        blob = path.resolve().name
        if path.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef") and blob != digest:
            raise DownloadError(
                f"{path} is damaged: expected sha256 {blob}, got {digest}; delete {path.resolve()} and open it again"
            )
        found[path.name] = digest
    return found


def licence_of(folder: Path) -> str:
    """The licence named at the head of README.md, or the LICENSE file's presence; "not stated" otherwise."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        head = (folder / "README.md").read_text("utf-8").split("---")
        for line in head[1].splitlines() if len(head) > 2 else []:
            if line.startswith("license:") and line.partition(":")[2].strip():
                return line.partition(":")[2].strip()
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (folder / name).is_file():
            return f"see {folder / name}"
    return "not stated"


def _check_config(folder: Path, names: list[str], shown: str) -> None:
    if "config.json" in names:
        read_json(folder / "config.json")
        return
    gguf = [n for n in names if n.lower().endswith(".gguf")]
    if "adapter_config.json" in names:
        raise ModelError(f"'{shown}' is an adapter without its base model; merge the two with peft and open the result")
    if gguf:
        raise ModelError(f"'{shown}' is not a checkpoint but holds {gguf[0]}; give that file: {folder / gguf[0]}")
    held = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
    raise ModelError(f"'{shown}' is not a model: config.json is missing (the folder holds {held})")


def _indexed(index: Path, names: list[str], shown: str) -> list[str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{index} lists no weights; fetch or save the model again")
    shards = sorted({str(name) for name in table.values()})
    strange = [s for s in shards if not is_shard(s) or "/" in s or "\\" in s]
    if strange:
        raise ModelError(f"{index} names '{strange[0]}', which is not a shard of this checkpoint; refused")
    missing = [s for s in shards if s not in names]
    if missing:
        raise DownloadError(
            f"'{shown}' is incomplete: {len(missing)} of {len(shards)} weight files are missing "
            f"({missing[0]}); fetch it again"
        )
    return shards


def refusal(names: list[str], shown: str) -> str:
    """Why a folder or repository with these files at its root has no weights to read, and what to do."""
    pickled = [n for n in names if n.lower().endswith(PICKLES)]
    if pickled:
        return (
            f"'{shown}' has its weights only as a pickle ({pickled[0]}), which can run code when opened; Vesalius "
            "reads safetensors and GGUF. If you trust it, convert it once with transformers: load it with the class "
            "that its config.json names, then model.save_pretrained(NEW) and tokenizer.save_pretrained(NEW)"
        )
    stray = [n for n in names if n.endswith(".safetensors")]
    if stray:
        return f"'{shown}' has {stray[0]} but no {WEIGHTS} or {INDEX}; rename a single file to {WEIGHTS}"
    other = [n for n in names if n.lower().endswith(OTHER_WEIGHTS)]
    if other:
        return f"'{shown}' has its weights only as {other[0]}; save it as safetensors (save_pretrained) first"
    return f"'{shown}' is not a whole model: {WEIGHTS} (or its shards and {INDEX}) is missing beside config.json"
