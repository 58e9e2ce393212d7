"""The tuned lens: one affine map a layer, learnt so that norm and unembedding give the model's final distribution.

    lens_l(h) = unembed(norm(h + A_l h + s_l b_l))

A_l and b_l start at zero, which is the logit lens; the last layer has none, which is the model. s_l is a constant, the
typical size of a coordinate at that layer, so that one learning rate suits the biases of all layers. A_l may be left
out (bias only), or be a product of two thin matrices (rank). Belrose et al. 2023, arXiv 2303.08112.

A lens is two files, `lens.safetensors` and `lens.json`. The second one names the model it was trained on, by the
fingerprint of its weights and by a hash of its norm and unembedding; on another model the lens is refused unless it is
asked for (`transfer`), as the paper does with fine-tuned models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.checkpoints import load_finite, save_tensors
from vesalius.errors import RunError, VesaliusError
from vesalius.lens.base import EMBEDDING, layer_name
from vesalius.model import Model
from vesalius.records import dump, read_json, sha256, typed, why, write_atomic
from vesalius.run_index import find_run, list_runs
from vesalius.runs import DEFAULT_ROOT

TENSORS, NOTE = "lens.safetensors", "lens.json"
FORMAT = 1
COMMAND = "lens-train"


class TunedLens(nn.Module):
    """Affine translators for every layer but the last.

    Args:
        n_layers: blocks of the model. d_model: width of its stream.
        rank: of the matrices; full if None. bias_only: no matrices at all.
        note: what `lens.json` says of where it comes from.

    Attributes:
        weight: (layer, d, d), or `up` (layer, d, rank) and `down` (layer, rank, d): A_l h = up (down h).
        bias: (layer, d). scale: s, (layer,).
    """

    name = "tuned"

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        *,
        rank: int | None = None,
        bias_only: bool = False,
        seed: int = 0,
        note: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if rank is not None and (bias_only or not 1 <= rank <= d_model):
            raise VesaliusError(f"a lens of rank {rank} on a stream of {d_model}: give 1 to {d_model}, or bias only")
        self.n_layers, self.d_model, self.rank, self.bias_only = n_layers, d_model, rank, bias_only
        self.note = dict(note or {})
        self.bias = nn.Parameter(torch.zeros(n_layers, d_model))
        if rank is not None:
            drawn = torch.randn(n_layers, rank, d_model, generator=torch.Generator().manual_seed(seed))
            self.up = nn.Parameter(torch.zeros(n_layers, d_model, rank))
            self.down = nn.Parameter(drawn / d_model**0.5)
        elif not bias_only:
            self.weight = nn.Parameter(torch.zeros(n_layers, d_model, d_model))
        self.register_buffer("scale", torch.ones(n_layers))
        self.scale: Tensor

    @classmethod
    def for_model(cls, model: Model, **settings: Any) -> TunedLens:
        """Translators at zero, which read as the logit lens does, on the model's device."""
        return cls(model.n_layers, model.d_model, **settings).to(model.device)

    def matrix(self, layer: int) -> Tensor:
        """A_l, (d, d)."""
        if self.bias_only:
            return self.bias.new_zeros(self.d_model, self.d_model)
        return self.up[layer + 1] @ self.down[layer + 1] if self.rank is not None else self.weight[layer + 1]

    def shift(self, layer: int) -> Tensor:
        """s_l b_l, (d,)."""
        return self.bias[layer + 1] * self.scale[layer + 1]

    def translate(self, hidden: Tensor, layer: int) -> Tensor:
        """The states (..., d) of a layer as h + A_l h + s_l b_l, float32; the last layer's are left as they are.

        Raises:
            VesaliusError: if there is no such layer.
        """
        if layer == self.n_layers - 1:
            return hidden
        if not EMBEDDING <= layer < self.n_layers:
            last = layer_name(self.n_layers - 1)
            raise VesaliusError(f"there is no layer {layer}; this lens reads the embedding (-1) and L0 to {last}")
        hidden = hidden.float()
        if self.bias_only:
            return hidden + self.shift(layer)
        at = layer + 1
        moved = hidden @ self.weight[at].T if self.rank is None else hidden @ self.down[at].T @ self.up[at].T
        return hidden + moved + self.shift(layer)

    def forward(self, model: Model, hidden: Tensor, layer: int, tokens: Tensor | None = None) -> Tensor:
        """See `vesalius.lens.base.Lens`."""
        return model.readout(self.translate(hidden, layer).to(hidden.dtype), tokens)

    # -- keeping

    def describe(self, model: Model) -> dict[str, Any]:
        """What `lens.json` says: the shape, and the model it belongs to."""
        shape = {"n_layers": self.n_layers, "d_model": self.d_model, "rank": self.rank, "bias_only": self.bias_only}
        told = {"model": model.name, "spec": model.spec, "fingerprint": model.fingerprint}
        return {"format": FORMAT, "kind": "tuned", **shape, **told, "ending": ending_hash(model), **self.note}

    def write_tensors(self, path: Path) -> None:
        """The translators as safetensors, the same bytes for the same numbers."""
        save_tensors(path, self.state_dict())

    def save(self, folder: Path, model: Model) -> None:
        """Writes both files into a folder: the tensors whole first, then the note that vouches for them."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / TENSORS, self.write_tensors)
        write_atomic(folder / NOTE, dump({**self.describe(model), "sha256": sha256(folder / TENSORS)}))

    @classmethod
    def load(cls, folder: str | Path, model: Model, *, transfer: bool = False) -> TunedLens:
        """Reads a saved lens, for the model it was trained on.

        Args:
            folder: with `lens.safetensors` and `lens.json`; a finished run of `vesalius lens train` is one.
            model: what it shall read.
            transfer: accept another model of the same shape, such as a fine-tuned one.

        Raises:
            RunError: if it is not there, or its files are not what was saved.
            VesaliusError: if it was trained on another model and `transfer` is not set, or the shapes differ.
        """
        folder = Path(folder)
        again = "train it again with `vesalius lens train`"
        if not (folder / NOTE).exists():
            raise RunError(f"there is no trained lens in {folder} (no {NOTE}); {again}, or let that run finish")
        note = read_json(folder / NOTE, again)
        if note.get("kind") != "tuned" or note.get("format") != FORMAT:
            raise RunError(f"{folder / NOTE} is not of a tuned lens that this version reads; {again}")
        if not (folder / TENSORS).exists() or sha256(folder / TENSORS) != note.get("sha256"):
            raise RunError(f"{folder / TENSORS} is missing or was changed after it was saved; {again}")
        sizes = {"n_layers": int, "d_model": int, "rank": int | None, "bias_only": bool}
        typed(note, folder / NOTE, again, **sizes, model=str, fingerprint=str, ending=str)
        shape = (note["n_layers"], note["d_model"])
        if shape != (model.n_layers, model.d_model):
            raise VesaliusError(
                f"the lens in {folder} is for {shape[0]} blocks of width {shape[1]} ({note['model']}), and "
                f"{model.name} has {model.n_layers} of {model.d_model}; a lens fits one shape alone"
            )
        if note["fingerprint"] != model.fingerprint and not transfer:
            same = "the same" if note["ending"] == ending_hash(model) else "another"
            raise VesaliusError(
                f"the lens in {folder} was trained on {note['model']} (fingerprint {note['fingerprint']}), not on "
                f"{model.name} ({model.fingerprint}), which has {same} norm and unembedding; train one for it, or "
                "read it all the same with --transfer"
            )
        lens = cls(*shape, rank=note["rank"], bias_only=note["bias_only"], note=note)
        try:
            lens.load_state_dict(load_finite(folder / TENSORS, again))
        except RuntimeError as error:
            raise RunError(f"{folder / TENSORS} does not fit {NOTE}: {why(error)[:160]}; {again}") from error
        return lens.to(model.device).requires_grad_(False)


def ending_hash(model: Model) -> str:
    """A short sha256 of what turns the last state into logits: the final norm, projections and unembedding."""
    stack = model.anatomy.main
    digest = hashlib.sha256()
    norm = [] if stack.final_norm is None else [stack.final_norm.module]
    for module in [*norm, *([stack.project_out] if stack.project_out is not None else []), *stack.head]:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if tensor.device.type != "meta":
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_tuned(model: Model, source: str | Path | None, transfer: bool) -> TunedLens:
    """A trained lens by its folder or run; by default the latest one of the model in ./runs.

    Raises:
        RunError: if there is none, with the command that makes one.
    """
    if source is not None:
        folder = Path(source)
        if not (folder / NOTE).exists() and not folder.is_dir():
            folder = find_run(str(source), holding=NOTE).folder
        return TunedLens.load(folder, model, transfer=transfer)
    runs = list_runs(DEFAULT_ROOT)
    for folder in map(Path, runs.loc[(runs["command"] == COMMAND) & (runs["state"] == "done"), "folder"]):
        if read_json(folder / NOTE, "train it again").get("fingerprint") == model.fingerprint:
            return TunedLens.load(folder, model, transfer=transfer)
    raise RunError(
        f"no tuned lens of {model.name} was trained in ./{DEFAULT_ROOT}; `vesalius lens train --model {model.spec}` "
        "makes one, or name its run with --lens"
    )
