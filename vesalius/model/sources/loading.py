"""From a checkpoint folder to a frozen Hugging Face model in eval mode, with its tokenizer."""

from __future__ import annotations

import difflib
import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from vesalius.errors import DownloadError, ModelError, OutOfMemory
from vesalius.model.sources import checkpoint
from vesalius.model.sources.located import Located
from vesalius.model.sources.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
    "fp64": torch.float64,
}
FAMILIES = Path(__file__).parent.parent / "families"
# New weights that no answer of the model passes through: pooling for a sentence classifier.
HARMLESS_MISSING = ("pooler.",)


def load(
    located: Located,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads a located checkpoint: eval mode, no gradients on weights, nothing invented, nothing printed.

    Args:
        located: from `resolve`.
        dtype: a torch dtype or its name, "auto" for the checkpoint's own; None is float32 on a CPU and the checkpoint's
            own elsewhere.
        device: where to put the model; None is CUDA if there is one, else the CPU (Apple's MPS only when asked for: its
            kernels are not exact enough to compare interventions by default).
        device_map: passed to transformers instead of `device`, to spread a model over devices.
        trust_remote_code: run the Python code that comes with this checkpoint, with the user's rights.
        attn_implementation: passed to transformers; None leaves its own choice.

    Returns:
        The model and its tokenizer, or None where the checkpoint has none.

    Raises:
        ModelError: an unknown architecture, weights missing from the checkpoint, a dtype or device not to be had.
        OutOfMemory: with what to lower.

    Example:
        >>> model, tokenizer = load(resolve("smollm2-135m"), dtype="bfloat16")  # doctest: +SKIP
    """
    where = _device(device, device_map)
    precision = _dtype(dtype, where, device_map)
    files = checkpoint.weight_files(located.folder, located.spec)
    config = read_config(located, trust_remote_code)
    options: dict[str, Any] = {"dtype": precision, "use_safetensors": True, "output_loading_info": True}
    options |= {"local_files_only": True, "trust_remote_code": trust_remote_code, "config": config}
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    auto = auto_class(config, located.spec)
    from vesalius.model.int8_files import is_rounded
    from vesalius.model.int8_files import read as read_rounded

    try:
        with quiet_transformers():
            if is_rounded(located.folder):
                model, info = read_rounded(located.folder, files, auto, config, options)
            else:
                model, info = auto.from_pretrained(located.folder, **options)
            refuse_missing(info, located.spec)
            _settle(model, info)
            _constant_norms(model, located.folder)
            if device_map is None:
                model = model.to(where)
            refuse_unfinite(model, located.spec)
    except (ModelError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise _refusal(error, located, where) from error
    model.eval()
    model.requires_grad_(False)
    return model, load_tokenizer(located, trust_remote_code)


def load_tokenizer(located: Located, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, or None where it has none."""
    from transformers import AutoTokenizer

    if not any((located.folder / name).is_file() for name in checkpoint.TOKENIZER_CORES):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                located.folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"the tokenizer of '{located.spec}' cannot be read: {type(error).__name__}: {text}") from error


def read_config(located: Located, trust_remote_code: bool = False) -> Any:
    """The configuration as transformers reads it; code that was not asked for and unknown architectures are refused."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = checkpoint.read_json(located.folder / "config.json")
    kind = raw.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not known and raw.get("auto_map") and not trust_remote_code:
        raise ModelError(
            f"'{located.spec}' (model type '{kind}') comes with its own Python code, which is not run unasked; "
            "--trust-remote-code (trust_remote_code=True) runs it, with all your rights, for this model: read it first"
        )
    if not known and not raw.get("auto_map"):
        raise ModelError(_unknown_architecture(located.spec, kind, list(CONFIG_MAPPING)))
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                located.folder, local_files_only=True, trust_remote_code=trust_remote_code and not known
            )
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the configuration of '{located.spec}' cannot be read: {type(error).__name__}: {text}"
        ) from error


def auto_class(config: Any, shown: str) -> Any:
    """The Auto class of transformers for a checkpoint, by the architecture it names, else by its model type.

    A causal, masked or encoder-decoder language model keeps its head. A body alone, or one under a head for something
    other than language (a classifier), is opened as the bare encoder; but a causal body with tied embeddings has its
    language head already.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables: list[tuple[Any, Any]] = [
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
        (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
    ]
    kind = config.model_type
    remote = getattr(config, "auto_map", None) or {}
    for _, cls in tables:
        if kind not in auto.MODEL_MAPPING_NAMES and cls.__name__ in remote:
            return cls
    named = (getattr(config, "architectures", None) or [None])[0]
    causal = kind in tables[0][0] and kind not in tables[1][0] and not config.is_encoder_decoder
    if named is not None:
        for table, cls in tables:
            if kind in table and named in _names(table[kind]):
                return cls
        if (
            causal
            and named in _names(auto.MODEL_MAPPING_NAMES.get(kind))
            and getattr(config, "tie_word_embeddings", False)
        ):
            return transformers.AutoModelForCausalLM
        if kind in auto.MODEL_MAPPING_NAMES or "AutoModel" in remote:
            return transformers.AutoModel
    if causal:
        return transformers.AutoModelForCausalLM
    if config.is_encoder_decoder and kind in tables[2][0]:
        return transformers.AutoModelForSeq2SeqLM
    if kind in tables[1][0]:
        return transformers.AutoModelForMaskedLM
    if kind in auto.MODEL_MAPPING_NAMES or "AutoModel" in remote:
        return transformers.AutoModel
    raise ModelError(_unknown_architecture(shown, kind, list(auto.MODEL_MAPPING_NAMES)))


def refuse_missing(info: Mapping[str, Any], shown: str) -> None:
    """Raises `ModelError` when transformers had to invent weights that the checkpoint does not hold.

    Args:
        info: transformers' loading report: `missing_keys`, `mismatched_keys`.
        shown: the user's name for the model.
    """
    missing = sorted(k for k in info.get("missing_keys", ()) if not any(h in k for h in HARMLESS_MISSING))
    wrong = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get("mismatched_keys", ()))
    for names, what in ((missing, "missing from its checkpoint"), (wrong, "of another shape in its checkpoint")):
        if names:
            listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ModelError(
                f"'{shown}' cannot be opened: {len(names)} weights are {what} and would be random ({listed}); "
                "check `architectures` in its config.json, or save the whole model again"
            )


def refuse_unfinite(model: torch.nn.Module, shown: str) -> None:
    """Raises `ModelError` for weights that are NaN or infinite: nothing that is measured on them means anything."""
    bad = []
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and weight.numel():
            low, high = torch.aminmax(weight.detach())  # NaN if any is
            if not (math.isfinite(float(low)) and math.isfinite(float(high))):
                bad.append(name)
    if bad:
        listed = ", ".join(bad[:4]) + (", ..." if len(bad) > 4 else "")
        raise ModelError(
            f"'{shown}' holds NaN or infinite numbers in {len(bad)} of its weights ({listed}), as a diverged training "
            "leaves them, or a dtype too small for them; open an earlier checkpoint, or give --dtype float32"
        )


def _settle(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Sets weights that are missing without harm to zero: random ones would change the fingerprint at each opening."""
    missing = set(info.get("missing_keys", ()))
    for name, parameter in model.named_parameters():
        if name in missing and any(h in name for h in HARMLESS_MISSING):
            torch.nn.init.zeros_(parameter)


def _constant_norms(model: PreTrainedModel, folder: Path) -> None:
    """Some norms of the checkpoint may stand by constants, which no stock class has a place for."""
    from vesalius.model.constant_norms import FILE, restore

    if (folder / FILE).exists():
        from vesalius.model.anatomy import read_anatomy

        restore(model, folder, read_anatomy(model))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(
        t in text for t in ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    )


def supported_types() -> list[str]:
    """The model types whose anatomy Vesalius knows, from the family files."""
    types: set[str] = set()
    for path in FAMILIES.glob("*.yaml"):
        types |= set((yaml.safe_load(path.read_text("utf-8")) or {}).get("model_types", []))
    return sorted(types)


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _device(device: torch.device | str | None, device_map: Any) -> torch.device:
    if device_map is not None:
        if device is not None:
            raise ModelError(f"device={device} and device_map={device_map!r} were both given; give one of them")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ModelError(f"'{device}' is not a device; one of: cpu, cuda, cuda:0, mps") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"device '{device}' was asked for but torch sees no GPU; use --device cpu, or install torch with CUDA"
        )
    if where.type == "cuda" and where.index is not None and where.index >= torch.cuda.device_count():
        raise ModelError(
            f"device '{device}' was asked for but torch sees {torch.cuda.device_count()} GPUs (counted from 0)"
        )
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"device '{device}' was asked for but torch sees none; use --device cpu")
    return where


def _dtype(dtype: torch.dtype | str | None, where: torch.device, device_map: Any) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if where.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto"
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"'{dtype}' is not a dtype for weights; one of: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _unknown_architecture(shown: str, kind: Any, known: list[str]) -> str:
    import transformers

    near = difflib.get_close_matches(str(kind), known, n=2, cutoff=0.7)
    guess = f"; did its config.json mean {' or '.join(near)}?" if near else ""
    stated = (
        f"model type '{kind}' is not known to transformers {transformers.__version__}"
        if kind
        else "it has no model_type"
    )
    return f"'{shown}' cannot be opened: {stated}{guess or ';'} Vesalius takes apart: {', '.join(supported_types())}"


def _refusal(error: Exception, located: Located, where: torch.device) -> Exception:
    text = " ".join(str(error).split())[:300]
    if out_of_memory(error):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        need = sum(p.stat().st_size for p in checkpoint.weight_files(located.folder)) / 1e9
        return OutOfMemory(
            f"'{located.spec}' ({need:.1f} GB on disk) does not fit into the memory of {where}; use a smaller dtype "
            "(--dtype bfloat16), another device (--device cpu), or device_map='auto' to spread it"
        )
    if isinstance(error, ImportError):
        return ModelError(f"'{located.spec}' needs a package that is not installed: {text}")
    if type(error).__name__ == "SafetensorError":
        return DownloadError(
            f"the weights of '{located.spec}' in {located.folder} are damaged ({text}); fetch them again"
        )
    return ModelError(f"'{located.spec}' cannot be opened: {type(error).__name__}: {text}")
