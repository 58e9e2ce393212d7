"""Lets transformers' Auto classes find the parts models, without loading anything until they are asked for one.

`import vesalius` calls `announce`. Until transformers' tables of names are imported, by whomever, there is nothing to
do; then the names of our classes are written into them, and the modules where those tables look for the classes, such
as "transformers.models.vesalius", lead to ours (`PLACES`). A saved model thus needs no code of its own and no trust in
it.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader, MetaPathFinder
else:  # their methods are all that counts, and importing them takes longer than the rest of `import vesalius`
    Loader = MetaPathFinder = object

CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
PLACES = {
    "transformers.models.vesalius": "vesalius.build.hf",
    "transformers.models.vesalius_encoder_decoder": "vesalius.build.encoder_decoder",
}
ONE, TWO = "vesalius", "vesalius-encoder-decoder"  # model types: of one stack, of two
CONFIG_CLASSES = {ONE: "VesaliusConfig", TWO: "VesaliusEncoderDecoderConfig"}
CLASSES = (
    ("MODEL_MAPPING", ONE, "VesaliusModel"),
    ("MODEL_MAPPING", TWO, "VesaliusEncoderDecoder"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING", ONE, "VesaliusForCausalLM"),
    ("MODEL_FOR_MASKED_LM_MAPPING", ONE, "VesaliusForMaskedLM"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", TWO, "VesaliusForConditionalGeneration"),
)


class _Alias(Loader):
    """Loads a module of `PLACES` as the one that it stands for."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(PLACES[spec.name])
        # the import machinery labels what it is given with its own name and spec; the module keeps its own
        self.own = {name: getattr(module, name) for name in ("__spec__", "__loader__", "__package__", "__name__")}
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.own)


class _After(Loader):
    """A module's own loader, and then our names in its tables."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        _write(module)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.own, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in PLACES:
            return ModuleSpec(name, _Alias())
        if name not in (CONFIGS, MODELS):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader)
        return spec


def _write(module: ModuleType) -> None:
    """Our names in one of transformers' tables; twice is as good as once."""
    if module.__name__ == CONFIGS:
        module.CONFIG_MAPPING_NAMES.update(CONFIG_CLASSES)
        return
    for table, kind, name in CLASSES:
        getattr(module, f"{table}_NAMES")[kind] = name
        getattr(module, table)._reverse_config_mapping[CONFIG_CLASSES[kind]] = kind


def announce() -> None:
    """Makes the parts models known to transformers, now or when it is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in (CONFIGS, MODELS):
        if name in sys.modules:
            _write(sys.modules[name])
