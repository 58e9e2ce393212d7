"""Sparse autoencoders: a vector as a sum of few of many directions, in the file format of SAELens.

    features f(x) = act((x - b_dec) W_enc + b_enc)          f W_dec + b_dec = the reconstruction of x

The activation is what the architectures differ by. With p the values before it:

    standard    relu(p)                                                    Bricken et al. 2023; Cunningham 2309.08600
    topk        relu of the k largest p, 0 elsewhere                       Gao et al. 2024, arXiv 2406.04093
    jumprelu    p where it is above a threshold of its own, 0 elsewhere    Rajamanoharan et al. 2024, arXiv 2407.14435
    gated       [p_gate > 0] relu(p_mag), both from the same W_enc         Rajamanoharan et al. 2024, arXiv 2404.16014

A folder holds `cfg.json` and `sae_weights.safetensors` as SAELens 6 writes them (W_enc (d_in, d_sae), W_dec
(d_sae, d_in), b_dec, and b_enc; threshold; or b_gate, r_mag, b_mag), so that either program reads the other's. What
SAELens has no field for stands in `metadata` under names beginning with `vesalius_`: the model's fingerprint, the site,
how many first positions were left out, the scale activations were trained at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vesalius.checkpoints import load_finite, save_tensors
from vesalius.errors import PartError, RunError, UnknownName, VesaliusError
from vesalius.features.dictionaries.places import first_read, hook_name, parse_place, place_name, width_of
from vesalius.model import Model, Site
from vesalius.records import dump, read_json, typed, write_atomic

Architecture = Literal["standard", "topk", "jumprelu", "gated"]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FORMAT = "6.0.0"  # of SAELens: without it the file is taken for one of an older version, and its metadata is dropped
_NAMES: dict[str, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"),
}
# "expected_average_only_in" is folded into the weights before SAELens saves them, so it asks for nothing here.
_NORMALISED = ("none", "expected_average_only_in")


class SAE(nn.Module):
    """A sparse autoencoder and where it belongs.

    Args:
        architecture: standard, topk, jumprelu or gated.
        tensors: its weights by SAELens's names.
        site: what it reads.
        k: of topk. centred: subtract b_dec before encoding. rescaled: topk chooses by features times decoder lengths.
        metadata: whatever else is known; kept and saved.

    Attributes:
        d_in, d_sae: width of the vectors, and number of features.
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: Mapping[str, Tensor],
        site: Site,
        *,
        k: int | None = None,
        centred: bool = True,
        rescaled: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if architecture not in get_args(Architecture):
            raise UnknownName("architecture of an SAE", architecture, get_args(Architecture))
        names = _NAMES[architecture]
        if lacking := [n for n in names if n not in tensors]:
            raise VesaliusError(
                f"an SAE of architecture {architecture} has {', '.join(names)}; {lacking[0]} is missing"
            )
        if tensors["W_enc"].dim() != 2:
            raise VesaliusError(f"W_enc of the SAE is {tuple(tensors['W_enc'].shape)}, and no matrix")
        self.d_in, self.d_sae = (int(n) for n in tensors["W_enc"].shape)
        shapes = {"W_enc": (self.d_in, self.d_sae), "W_dec": (self.d_sae, self.d_in), "b_dec": (self.d_in,)}
        for name in names:
            wanted, got = shapes.get(name, (self.d_sae,)), tuple(tensors[name].shape)
            if got != wanted:
                raise VesaliusError(f"{name} of the SAE is {got}, not {wanted}: its weights do not fit together")
            self.register_buffer(name, tensors[name].detach().float().clone())
        if architecture == "topk" and (k is None or not 1 <= k <= self.d_sae):
            raise VesaliusError(f"a topk SAE keeps 1 to {self.d_sae} features, not k = {k}")
        self.architecture, self.site, self.k = architecture, site, k
        self.centred, self.rescaled = centred, rescaled
        self.metadata = dict(metadata or {})

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    # -- the arithmetic

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., d_sae) of vectors (..., d_in); float32.

        Raises:
            VesaliusError: if the vectors have another width.
        """
        if x.shape[-1] != self.d_in:
            raise VesaliusError(f"this SAE reads vectors of width {self.d_in}, not {x.shape[-1]} (as at another site)")
        x = x.float() - self.b_dec if self.centred else x.float()
        if self.architecture == "gated":
            p = x @ self.W_enc
            return (p + self.b_gate > 0) * torch.relu(p * torch.exp(self.r_mag) + self.b_mag)  # type: ignore[operator,arg-type]
        p = x @ self.W_enc + self.b_enc
        if self.architecture == "topk":
            assert self.k is not None
            return keep_largest(p * self.W_dec.norm(dim=-1) if self.rescaled else p, self.k)
        if self.architecture == "jumprelu":
            return torch.relu(p) * (p > self.threshold)  # type: ignore[operator]
        return torch.relu(p)

    def decode(self, features: Tensor) -> Tensor:
        """Vectors (..., d_in) of features (..., d_sae)."""
        if self.rescaled:
            features = features / self.W_dec.norm(dim=-1)
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of vectors (..., d_in)."""
        return self.decode(self.encode(x))

    def feature(self, number: int) -> int:
        """The number itself if there is such a feature; VesaliusError otherwise."""
        if not 0 <= number < self.d_sae:
            raise VesaliusError(f"this SAE has no feature {number}; it has 0 to {self.d_sae - 1}")
        return number

    # -- whose it is

    @property
    def place(self) -> str:
        """The address of its site."""
        return place_name(self.site)

    @property
    def skip(self) -> int:
        """First positions of a row that it was not trained on."""
        return int(self.metadata.get("vesalius_skip") or 0)

    def belongs(self, model: Model) -> None:
        """Writes into the metadata which model it was trained on."""
        self.metadata |= {
            "model_name": model.name,
            "vesalius_fingerprint": model.fingerprint,
            "vesalius_spec": model.spec,
            "vesalius_skip": first_read(model),
        }

    def check(self, model: Model, force: bool = False) -> list[str]:
        """Refuses a model other than its own; returns what cannot be known.

        Args:
            force: accept another model if the widths agree.

        Raises:
            VesaliusError: naming both models.
        """
        width = width_of(model, self.site)
        if width != self.d_in:
            raise VesaliusError(
                f"this SAE reads vectors of width {self.d_in}, and {self.place} of {model.name} has {width}: it was "
                f"trained on another model ({self.metadata.get('model_name') or 'unnamed'}) or site"
            )
        own = self.metadata.get("vesalius_fingerprint")
        if own is None:
            name = self.metadata.get("model_name") or "a model it does not name"
            found = [
                f"the SAE carries no fingerprint: whether it is of {model.name} cannot be checked (it says {name})"
            ]
            options = self.metadata.get("model_from_pretrained_kwargs") or {}
            if self.metadata.get("model_class_name") == "HookedTransformer" and options.get(
                "center_writing_weights", True
            ):
                found.append("it may have been trained on centred weights; what it explains here tells (see quality)")
            return found
        if own == model.fingerprint:
            return []
        if not force:
            raise VesaliusError(
                f"this SAE was trained on {self.metadata.get('model_name')} (fingerprint {own}), not on {model.name} "
                f"({model.fingerprint}); train one for it, or use it all the same with --force"
            )
        return [f"the SAE was trained on {self.metadata.get('model_name')} (fingerprint {own}), another model"]

    # -- keeping

    def config(self) -> dict[str, Any]:
        """What `cfg.json` says."""
        from vesalius import __version__

        made = {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": self.centred,
            "normalize_activations": "none",
            "reshape_activations": "hook_z" if self.site.name == "z" else "none",
            "architecture": self.architecture,
        }
        if self.architecture == "topk":
            made |= {"k": self.k, "rescale_acts_by_decoder_norm": self.rescaled}
        where = {"hook_name": hook_name(self.site), "vesalius_site": self.place}
        told = {"sae_lens_version": FORMAT, "vesalius_version": __version__, **self.metadata, **where}
        return made | {"metadata": told}

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by SAELens's names."""
        return {name: getattr(self, name) for name in _NAMES[self.architecture]}

    def save(self, folder: Path | str) -> Path:
        """Writes both files: the weights first, then what describes them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS, lambda path: save_tensors(path, self.tensors()))
        write_atomic(folder / CONFIG, dump(self.config()))
        return folder

    @classmethod
    def load(cls, folder: Path | str, model: Model | None = None, *, force: bool = False) -> SAE:
        """Reads an SAE saved here or by SAELens.

        Args:
            folder: with `cfg.json` and `sae_weights.safetensors`. model: what it shall read; see `check`.
            force: accept another model of the same width.

        Raises:
            RunError: if the files are not there, damaged, or of a kind that is not read here.
            VesaliusError: if it was trained on another model.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).exists():
                raise RunError(f"there is no SAE in {folder} (no {name}); name a folder that `vesalius sae train` left")
        remedy = "it is not what SAELens or `vesalius sae train` writes"
        config = read_json(folder / CONFIG, remedy)
        typed({"k": None, "metadata": None} | config, folder / CONFIG, remedy, k=int | None, metadata=dict | None)
        made = _from_config(config, load_finite(folder / WEIGHTS, remedy), folder)
        if model is not None:
            made.check(model, force)
            made.to(model.device)
        return made


def keep_largest(p: Tensor, k: int) -> Tensor:
    """Relu of the k largest of the last axis, 0 elsewhere; the gradient reaches those alone."""
    values, places = p.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(p).scatter(-1, places, torch.relu(values))


def _from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> SAE:
    metadata = dict(config.get("metadata") or {})
    # Before version 6 SAELens kept these beside the sizes.
    metadata |= {k: config[k] for k in ("hook_name", "model_name", "model_class_name") if k in config}
    architecture = str(config.get("architecture") or "standard")
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    if architecture == "standard" and config.get("activation_fn") == "topk":
        architecture = "topk"
    normalised = str(config.get("normalize_activations") or "none")
    if normalised not in _NORMALISED:
        raise RunError(
            f"{folder / CONFIG} normalises activations by '{normalised}', which is not read here; fold it into the "
            "weights with SAELens first"
        )
    if architecture not in get_args(Architecture):
        raise RunError(
            f"{folder / CONFIG} is of architecture '{architecture}'; read here: {', '.join(get_args(Architecture))}"
        )
    hook = metadata.get("vesalius_site") or metadata.get("hook_name")
    if not hook:
        raise RunError(f"{folder / CONFIG} does not say which site it reads (metadata.hook_name)")
    try:
        site = parse_place(str(hook))
    except PartError as error:
        raise RunError(f"{folder / CONFIG} reads '{hook}', which is no site here: {error}") from None
    return SAE(
        architecture,  # type: ignore[arg-type]
        tensors,
        site,
        k=None if k is None else int(k),
        centred=bool(config.get("apply_b_dec_to_input", True)),
        rescaled=bool(config.get("rescale_acts_by_decoder_norm", False)),
        metadata=metadata,
    )
