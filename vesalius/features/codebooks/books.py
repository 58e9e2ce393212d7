"""Codebooks on an opened model: where they are, the model with them, and keeping both.

    FOLDER/model/                    the fine-tuned model, an ordinary checkpoint
    FOLDER/codebooks.safetensors     the codes; FOLDER/codebooks.json: places, sizes, a hash of the checkpoint

The checkpoint opens anywhere, without the bottleneck; with `Codebooks.load` it has it. A codebook is installed by the
same hooks as every intervention, so any family of causal model takes them: `L3.z` (one codebook a query head, before
W_O), `L3.MLP`, `L3.attn`, `L3.resid_post`. The first position, where a model parks attention, stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.checkpoints import load_finite, save_tensors
from vesalius.errors import ModelError, RunError, VesaliusError
from vesalius.features.codebooks.layer import Codebook, Force
from vesalius.features.dictionaries.places import first_read, parse_place, place_name, width_of
from vesalius.model import Model, Site
from vesalius.model.hooks import Hooks, Tap
from vesalius.model.saving import save_model
from vesalius.records import dump, read_json, sha256, typed, write_atomic

TENSORS, NOTE, MODEL = "codebooks.safetensors", "codebooks.json", "model"
FORMAT = 1


class Codebooks(nn.Module):
    """Codebooks at several places of one model.

    Args:
        model: its sizes decide theirs. places: addresses, or `z`, `MLP`, `attn`, `resid_post` for that of every block.
        size, k: of each codebook.

    Attributes:
        books: by address, dots written as underscores (modules have no dots in their names).
        skip: first positions that are left alone.
    """

    def __init__(self, model: Model, places: Sequence[str], size: int, k: int, seed: int = 0) -> None:
        super().__init__()
        if model.kind != "causal":
            raise ModelError(f"{model.name} is {model.kind}; codebooks are put into causal language models")
        self.sites = sites_of(model, places)
        self.size, self.k, self.skip = size, k, first_read(model)
        self.books = nn.ModuleDict()
        for number, site in enumerate(self.sites):
            width = width_of(model, site)
            groups = model.n_heads if site.name == "z" else 1
            self.books[_key(site)] = Codebook(groups, size, width // groups, k, seed + 1000 * number)

    def book(self, place: str | Site) -> Codebook:
        """The codebook at a place; VesaliusError where there is none."""
        site = parse_place(place)
        if _key(site) not in self.books:
            known = ", ".join(place_name(s) for s in self.sites)
            raise VesaliusError(f"there is no codebook at {place_name(site)}; there are at {known}")
        found = self.books[_key(site)]
        assert isinstance(found, Codebook)
        return found

    def taps(self) -> dict[Site, list[Tap]]:
        """The codebooks as hooks take them."""
        return {site: [self._tap(site)] for site in self.sites}

    def _tap(self, site: Site) -> Tap:
        book = self.book(site)

        def tap(x: Tensor) -> Tensor | None:
            first = self.skip if x.shape[1] > 1 else 0  # a single position is a new token of a text being written
            parts = x[:, first:].unflatten(-1, (book.groups, book.width)) if x.dim() == 3 else x[:, first:]
            book.offset = first
            made = book(parts).reshape(x[:, first:].shape)
            return torch.cat([x[:, :first], made], dim=1)

        return tap

    @contextmanager
    def attached(self, model: Model) -> Iterator[None]:
        """The model with its codebooks, for the duration."""
        with model.alone(), Hooks(model.hf, model.anatomy, self.taps()):
            yield

    @contextmanager
    def forcing(
        self, place: str | Site, codes: Mapping[int, int], how: Force = "all", position: int | None = None
    ) -> Iterator[None]:
        """Codes forced at a place, by group, for the duration (at one position if named); see `Codebook.force`."""
        book = self.book(place)
        book.force(codes, how, position)
        try:
            yield
        finally:
            book.force({})

    def missed(self) -> Tensor:
        """Mean squared distance between output and input in the last pass, mean over the codebooks."""
        found = [b.missed for b in self.books.values() if isinstance(b, Codebook) and b.missed is not None]
        return torch.stack(found).mean()

    # -- keeping

    def describe(self, model: Model) -> dict[str, Any]:
        """What `codebooks.json` says."""
        places = [place_name(s) for s in self.sites]
        told = {"model": model.name}
        return {"format": FORMAT, "places": places, "size": self.size, "k": self.k, "skip": self.skip, **told}

    def save(self, folder: Path | str, model: Model) -> Path:
        """Writes model and codebooks."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder / MODEL)
        write_atomic(folder / TENSORS, lambda path: save_tensors(path, dict(self.state_dict())))
        write_atomic(folder / NOTE, dump({**self.describe(model), "weights": weights_hash(folder / MODEL)}))
        return folder

    @classmethod
    def load(cls, folder: Path | str, **options: Any) -> tuple[Model, Codebooks]:
        """The model and its codebooks; options as of `vesalius.open`.

        Raises:
            RunError: if there are none, or they are of another model than the one beside them.
        """
        from vesalius.model import open_model

        folder = Path(folder)
        again = "train it again with `vesalius codebook train`"
        if not (folder / NOTE).exists():
            raise RunError(f"there are no codebooks in {folder} (no {NOTE}); {again}, or name such a run")
        note = read_json(folder / NOTE, again)
        if note.get("format") != FORMAT:
            raise RunError(f"{folder / NOTE} is not of a kind that this version reads; {again}")
        typed(note, folder / NOTE, again, places=list, size=int, k=int, model=str)
        if note.get("weights") != weights_hash(folder / MODEL):
            raise RunError(f"the codebooks in {folder} are of another model than the one beside them; {again}")
        model = replace(open_model(str(folder / MODEL), **options), name=note["model"])
        try:
            books = cls(model, [str(p) for p in note["places"]], note["size"], note["k"])
            books.load_state_dict(load_finite(folder / TENSORS, again))
        except RuntimeError as error:
            raise RunError(f"{folder / TENSORS} does not fit {NOTE}: {' '.join(str(error).split())[:160]}") from error
        return model, books.to(model.device).eval().requires_grad_(False)


def sites_of(model: Model, places: Sequence[str]) -> list[Site]:
    """The sites of addresses, with `MLP`, `z`, `attn` and `resid_post` for that of every block."""
    found: list[Site] = []
    for text in places:
        if "." in text or "L" in text[:1] and text[1:2].isdigit():
            found.append(parse_place(text))
        else:
            found += [parse_place(f"L{layer}.{text}") for layer in range(model.n_layers)]
    for site in found:
        width_of(model, site)
        if site.name in ("neurons", "mlp_in", "resid_pre", "resid_mid") or site.stack:
            raise VesaliusError(f"a codebook is put at z, MLP, attn or resid_post, not at {place_name(site)}")
    if not found:
        raise VesaliusError(
            "no place is named for codebooks; give z, MLP, attn or resid_post, or addresses such as L3.MLP"
        )
    return list(dict.fromkeys(found))


def identity(folder: Path) -> str:
    """What identifies saved codebooks: a short sha256 of the codes, and of what is said of them."""
    return hashlib.sha256((sha256(folder / TENSORS) + sha256(folder / NOTE)).encode()).hexdigest()[:16]


def weights_hash(folder: Path) -> str:
    """A short sha256 of a checkpoint's weights."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()[:16]


def _key(site: Site) -> str:
    return place_name(site).replace(".", "_")
