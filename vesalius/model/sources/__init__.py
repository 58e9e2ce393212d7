"""How a model is found, fetched, verified and cached, and loaded from where it then lies.

    located = resolve("smollm2-135m")
    model, tokenizer = load(located)

Only safetensors and GGUF are ever read, nothing is unpickled, and no code that comes with a model or package is run.
"""

from vesalius.model.sources.cache import cache_folder
from vesalius.model.sources.catalogue import CatalogueRow, default_model, listing
from vesalius.model.sources.loading import load
from vesalius.model.sources.located import Located, Progress
from vesalius.model.sources.resolving import lasting, resolve

__all__ = [
    "CatalogueRow", "Located", "Progress", "cache_folder", "default_model", "lasting", "listing", "load", "resolve",
]  # fmt: skip
