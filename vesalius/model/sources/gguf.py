"""GGUF to an ordinary safetensors checkpoint, proved to compute the same before it is believed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from vesalius.errors import DownloadError, ModelError, OutOfMemory
from vesalius.model.sources.loading import auto_class, out_of_memory
from vesalius.model.sources.located import Progress
from vesalius.model.sources.quiet import gguf_progress, quiet_transformers

MAGIC = b"GGUF"
TOLERANCE = 1e-4  # of the logits, float32; the weights themselves must be equal


def check_magic(path: Path, shown: str | None = None) -> None:
    """Refuses a file that is not a GGUF."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except FileNotFoundError:
        raise ModelError(f"there is no file '{shown or path}'") from None
    except OSError as error:
        raise ModelError(f"'{shown or path}' cannot be read: {error.strerror or error}") from None
    if head != MAGIC:
        raise ModelError(f"'{shown or path}' is not a GGUF file (it begins with {head!r})")


def convert(path: Path, target: Path, shown: str, progress: Progress) -> None:
    """Writes the checkpoint of a GGUF file to `target`, in float32, with its tokenizer.

    transformers refuses to save a model it read from GGUF, so a fresh one of the same configuration takes the weights
    over; the saved folder is then loaded as anybody would and compared: every weight equal, the logits of a few tokens
    within `TOLERANCE`.

    Args:
        path: the GGUF file.
        target: an empty folder.
        shown: the user's name for the file, for messages.
        progress: told of each step.

    Raises:
        ModelError: an architecture or tokenizer that transformers cannot read from GGUF, or an unequal conversion.
        DownloadError: a file that is cut short.
    """
    check_magic(path, shown)
    try:
        with quiet_transformers():
            _convert(path, target, shown, progress)
    except ModelError:
        raise
    except Exception as error:
        if out_of_memory(error):
            need = f"converting '{shown}' needs about {_need_gb(path)} GB of memory"
            raise OutOfMemory(f"{need}; close other programs, or convert it on a larger machine") from error
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not transformers'
            raise
        raise _refusal(error, shown) from error


def _convert(path: Path, target: Path, shown: str, progress: Progress) -> None:
    from transformers import AutoConfig, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    progress("reading the GGUF header", None)
    config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **where)
    auto = auto_class(config, shown)
    with gguf_progress("dequantising the weights (once)", progress):
        source = auto.from_pretrained(path.parent, dtype=torch.float32, trust_remote_code=False, **where).eval()
    progress("reading the tokenizer", None)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **where)

    progress("writing safetensors", None)
    plain = copy.deepcopy(source.config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    plain.architectures = [type(source).__name__]
    with torch.device("meta"):
        fresh = type(source)(plain)
    fresh.load_state_dict(source.state_dict(), assign=True)
    fresh.tie_weights()
    if getattr(source, "generation_config", None) is not None:
        fresh.generation_config = source.generation_config
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    del fresh

    progress("checking that the checkpoint computes the same", None)
    _compare(source, target, auto, shown)


@torch.no_grad()
def _compare(source: Any, target: Path, auto: Any, shown: str) -> None:
    saved = auto.from_pretrained(
        target, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()
    before, after = source.state_dict(), saved.state_dict()
    differing = sorted(k for k in before.keys() | after.keys() if not _same(before.get(k), after.get(k)))
    if differing:
        raise ModelError(f"converting '{shown}' did not keep {differing[0]}; the result is not kept")
    ids = torch.arange(1, 9).remainder(source.config.vocab_size)[None]  # (1, 8)
    inputs = {"input_ids": ids}
    if source.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    gap = (source(**inputs)[0] - saved(**inputs)[0]).abs().max().item()
    if not gap <= TOLERANCE:
        raise ModelError(
            f"converting '{shown}' changed its logits by {gap:.2g}, over {TOLERANCE}; the result is not kept"
        )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def _refusal(error: Exception, shown: str) -> ModelError:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return ModelError(f"reading '{shown}' needs gguf and accelerate; run: pip install gguf accelerate")
    if "not supported" in text and "architecture" in text:
        return ModelError(f"'{shown}' cannot be read: {text}. GGUF architectures that can: {', '.join(_supported())}")
    signs = ("reshape", "size", "bounds", "mmap", "buffer")
    if isinstance(error, ValueError | IndexError) and any(sign in text for sign in signs):
        return DownloadError(f"'{shown}' is cut short or damaged ({text[:200]}); fetch it again")
    return ModelError(f"'{shown}' cannot be read as a GGUF model: {type(error).__name__}: {text[:300]}")


def _supported() -> list[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general"})


def _need_gb(path: Path) -> int:
    # A 4-bit weight becomes 4 bytes, and the model stands in memory twice while it is compared.
    return max(1, round(path.stat().st_size * 16 / 1e9))
