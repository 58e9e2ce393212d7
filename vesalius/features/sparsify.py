"""Masks over the weights of a frozen model, learnt by continuous sparsification.

    effective weight = w * sigmoid(beta s)        s starts at 0, beta grows from 1 by a constant factor a step
    loss = loss of the objective + strength * (mean over weights of sigmoid(beta s))
    final mask = s > 0

Savarese et al. 2020 (arXiv 1912.04427). Matrices of attention and MLPs are masked; embeddings, unembedding, norms and
biases are always kept. Masks are trained by the trainer that trains models; they are saved as bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vesalius.checkpoints import load_tensors, save_tensors
from vesalius.corpus.batches import Batch
from vesalius.corpus.bigrams import BigramTable
from vesalius.errors import RunError, VesaliusError
from vesalius.model import Model
from vesalius.model.saving import origin_of, save_model
from vesalius.records import dump, read_json, sha256, write_atomic
from vesalius.train.objectives import IGNORED, Loss, Sample
from vesalius.train.objectives.causal import CausalLM
from vesalius.train.plugs import Plug

SCORES = "scores.safetensors"
MASK, NOTE, FORMAT = "mask.safetensors", "mask.json", 1
SIZE = "size"


def matrices(model: Model) -> dict[str, nn.Module]:
    """The modules whose `weight` is masked, by name: linear maps of attention and MLPs, in forward order.

    Raises:
        VesaliusError: if a weight belongs to two of them, or is not on this machine's devices.
    """
    wanted: dict[int, nn.Module] = {}
    for stack in model.anatomy.stacks.values():
        for block in stack.blocks:
            inside = list(block.mlp_in.modules())
            for module in (*block.projections.values(), block.o, *inside, block.down):
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
                    wanted[id(module)] = module
    found = {n: m for n, m in model.hf.named_modules() if id(m) in wanted}
    if not found:
        raise VesaliusError(f"{model.name} has no matrices of attention and MLPs to mask")
    if any(m.weight.device.type == "meta" for m in found.values()):
        raise VesaliusError(f"{model.name} is spread by device_map; masks are learnt on whole models, open it without")
    return found


class _Masked(nn.Module):
    """The parametrization of one weight; its scores belong to `Masks`, not to the model."""

    def __init__(self, masks: Masks, name: str) -> None:
        super().__init__()
        self._masks, self._name = (masks,), name

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._masks[0].gate(self._name).to(weight.dtype)


class Masks(nn.Module):
    """Scores over the matrices of a frozen model, and the model under them: what the trainer trains.

    Args:
        model: frozen; not a part of this module, so that it is neither saved nor trained.

    Attributes:
        beta: sharpness of the soft masks; infinite for s > 0.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._bench = (model,)
        self.beta = 1.0
        self.names = list(matrices(model))
        self.scores = nn.ParameterDict(
            {_key(n): nn.Parameter(torch.zeros_like(m.weight, dtype=torch.float32)) for n, m in matrices(model).items()}  # type: ignore[arg-type]
        )
        self._gates: dict[str, Tensor] = {}  # of the last forward pass: each is computed once for all its uses

    @property
    def model(self) -> Model:
        """What is masked."""
        return self._bench[0]

    def gate(self, name: str) -> Tensor:
        """What a weight is multiplied with, in its shape."""
        if name not in self._gates:
            s = self.scores[_key(name)]
            self._gates[name] = (s > 0).to(s) if math.isinf(self.beta) else torch.sigmoid(self.beta * s)
        return self._gates[name]

    def fresh(self) -> None:
        """Forgets the gates: scores or beta have changed, or a new graph begins."""
        self._gates.clear()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model's weights under the masks for the duration; afterwards they are what they were."""
        modules = matrices(self.model)
        with self.model.alone():
            try:
                for name, module in modules.items():
                    parametrize.register_parametrization(module, "weight", _Masked(self, name), unsafe=True)
                yield
            finally:
                for module in modules.values():
                    if parametrize.is_parametrized(module, "weight"):
                        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    def forward(self, **inputs: Any) -> Any:
        """The model's own output; called within `applied`."""
        return self.model.hf(**inputs, use_cache=False)

    def mean_gate(self) -> Tensor:
        """Mean of sigmoid(beta s) over all masked weights."""
        total = sum((self.gate(n).sum() for n in self.names), torch.zeros(()))
        return total / sum(p.numel() for p in self.scores.values())

    def undecided(self) -> float:
        """Masks within (0.1, 0.9), over those that are kept."""
        self.fresh()
        with torch.no_grad():
            gates = [self.gate(n) for n in self.names]
            self.fresh()
            between = sum(int(((g > 0.1) & (g < 0.9)).sum()) for g in gates)
            return between / max(sum(int((g >= 0.5).sum()) for g in gates), 1)

    @torch.no_grad()
    def mask(self) -> WeightMask:
        """The final masks, s > 0."""
        return WeightMask(self.model.fingerprint, {n: (self.scores[_key(n)] > 0).cpu().numpy() for n in self.names})

    # -- what the trainer keeps of it

    def save_pretrained(self, folder: Path, state_dict: Mapping[str, Tensor]) -> None:
        """The scores alone."""
        save_tensors(Path(folder) / SCORES, dict(state_dict))

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype) -> _Saved:
        """What `save_pretrained` wrote."""
        return _Saved(load_tensors(Path(folder) / SCORES))


@dataclass(frozen=True)
class _Saved:
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


def _key(name: str) -> str:
    return name.replace(".", "/")


class Sharpen(Plug):
    """Raises beta by the step, and adds the price of size to the loss.

    Args:
        masks: what is trained. steps: of the run. last_beta: at its end. strength: of the mean of all masks.
    """

    def __init__(self, masks: Masks, steps: int, last_beta: float, strength: float) -> None:
        self.masks, self.steps, self.last_beta, self.strength = masks, steps, last_beta, strength

    def begin(self, step: int) -> None:
        """Beta = last_beta^(step / steps)."""
        self.masks.beta = self.last_beta ** (step / max(self.steps - 1, 1))

    def read(self, micro: Sample) -> None:
        """Gates are made anew."""
        self.masks.fresh()

    def end(self, step: int) -> None:
        """Lets go of the graph."""
        self.masks.fresh()

    def terms(self) -> Mapping[str, Tensor]:
        """The price of size."""
        return {SIZE: self.strength * self.masks.mean_gate()}


@dataclass(frozen=True)
class BigramObjective:
    """Cross entropy to a bigram table: the sum over positions of - sum P(w | current) log q(w).

    Attributes:
        base: makes inputs and targets. table: what is to be said. The next token of the text itself is not looked at.
    """

    base: CausalLM
    table: BigramTable

    def sample(self, batch: Batch, seed: int) -> Sample:
        """As `causal-lm`."""
        return self.base.sample(batch, seed)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`; logs `divergence`, the sum of KL(bigram || model)."""
        valid = sample.targets != IGNORED
        current = sample.inputs["input_ids"][valid]
        log_q = outputs.logits[valid].float().log_softmax(-1)  # (token, vocabulary)
        ids = current.cpu().numpy()
        words, kept, rest = (t.to(log_q.device) for t in self.table.rows(ids))
        unigram = torch.from_numpy(self.table.unigram).to(log_q)
        total = -(log_q.gather(-1, words) * kept).sum() - (log_q @ unigram) @ rest
        entropy = torch.tensor(self.table.entropy(ids).sum(), dtype=torch.float32, device=log_q.device)
        return Loss(total, {"divergence": (total - entropy).detach()})


@dataclass(frozen=True)
class WeightMask:
    """Which weights of a model are kept.

    Attributes:
        fingerprint: of the model. kept: bool arrays in the shape of each matrix, by the module's name.
    """

    fingerprint: str
    kept: dict[str, NDArray[np.bool_]]

    @property
    def size(self) -> int:
        """Weights kept."""
        return sum(int(k.sum()) for k in self.kept.values())

    @property
    def total(self) -> int:
        """Weights masked over."""
        return sum(k.size for k in self.kept.values())

    @property
    def share(self) -> float:
        """Of the masked weights, those kept."""
        return self.size / self.total

    def __invert__(self) -> WeightMask:
        """What this mask leaves out."""
        return WeightMask(self.fingerprint, {n: ~k for n, k in self.kept.items()})

    def like(self, seed: int) -> WeightMask:
        """A random mask that keeps as many weights of each matrix."""
        rng = np.random.default_rng([seed, *b"mask"])
        found = {}
        for name, kept in self.kept.items():
            flat = np.zeros(kept.size, dtype=bool)
            flat[rng.choice(kept.size, int(kept.sum()), replace=False)] = True
            found[name] = flat.reshape(kept.shape)
        return WeightMask(self.fingerprint, found)

    def overlap(self, other: WeightMask) -> dict[str, float]:
        """Weights both keep, over what chance gives two masks with these counts in each matrix.

        Returns:
            shared, expected, ratio; jaccard.
        """
        both = sum(int((k & other.kept[n]).sum()) for n, k in self.kept.items())
        either = sum(int((k | other.kept[n]).sum()) for n, k in self.kept.items())
        chance = sum(int(k.sum()) * int(other.kept[n].sum()) / k.size for n, k in self.kept.items())
        return {
            "shared": both, "expected": chance, "ratio": both / chance if chance else float("nan"),
            "jaccard": both / max(either, 1),
        }  # fmt: skip

    # -- on the model

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """The model with all other masked weights at zero, for the duration."""
        self.check(model)
        modules = matrices(model)
        before = {}
        with model.alone(), torch.no_grad():
            try:
                for name, module in modules.items():
                    weight: Any = module.weight
                    before[name] = weight.detach().clone()
                    weight.mul_(torch.from_numpy(self.kept[name]).to(weight.device))
                yield
            finally:
                for name, old in before.items():
                    kept: Any = modules[name].weight
                    kept.copy_(old)

    def check(self, model: Model) -> None:
        """Refuses another model than the one it was learnt on."""
        if self.fingerprint != model.fingerprint:
            raise VesaliusError(
                f"the mask was learnt on a model with fingerprint {self.fingerprint}, and {model.name} has "
                f"{model.fingerprint}; a mask fits the weights it was learnt on alone"
            )

    # -- keeping

    def write_bits(self, path: Path) -> None:
        """One bit a weight, matrix by matrix, as uint8 tensors."""
        packed = {n: torch.from_numpy(np.packbits(k, axis=None)) for n, k in sorted(self.kept.items())}
        save_file(packed, path)

    def describe(self) -> dict[str, Any]:
        """What `mask.json` says beside the sum over the bits."""
        shapes = {n: list(k.shape) for n, k in self.kept.items()}
        return {"format": FORMAT, "fingerprint": self.fingerprint, "shapes": shapes, "kept": self.size}

    def save(self, folder: Path) -> None:
        """Writes `mask.safetensors` and `mask.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / MASK, self.write_bits)
        write_atomic(folder / NOTE, dump({**self.describe(), "sha256": sha256(folder / MASK)}))

    @classmethod
    def load(cls, folder: str | Path, model: Model | None = None) -> WeightMask:
        """Reads a saved mask; a finished run of `vesalius subnetwork` is such a folder.

        Raises:
            RunError: if it is not there or was changed.
            VesaliusError: if it was learnt on another model than the one given.
        """
        place = Path(folder)
        again = "learn it again with `vesalius subnetwork`"
        if not (place / NOTE).exists():
            raise RunError(f"there is no mask in {place} (no {NOTE}); {again}, or let that run finish")
        note = read_json(place / NOTE, again)
        if note.get("format") != FORMAT or not (place / MASK).exists() or sha256(place / MASK) != note.get("sha256"):
            raise RunError(f"{place / MASK} is missing or was changed after it was saved; {again}")
        bits = load_tensors(place / MASK)
        kept = {}
        for name, shape in note["shapes"].items():
            count = int(np.prod(shape))
            kept[name] = np.unpackbits(bits[name].numpy(), count=count).astype(bool).reshape(shape)
        made = cls(str(note["fingerprint"]), kept)
        if model is not None:
            made.check(model)
        return made


def save_masked(model: Model, mask: WeightMask, folder: str | Path) -> Path:
    """Writes the masked model as an ordinary checkpoint, with its tokenizer."""
    with mask.applied(model):
        return save_model(model, folder, {"edit": "weights masked", "of": origin_of(model), "kept": mask.size})


def by_matrix(model: Model, mask: WeightMask) -> list[dict[str, Any]]:
    """Weights and kept weights of each matrix: block, part (attn, mlp), name, weights, kept, density."""
    anatomy, rows = model.anatomy, []
    home: dict[int, tuple[str, int, str]] = {}
    for stack in anatomy.stacks.values():
        for block in stack.blocks:
            attention: Sequence[nn.Module] = (*block.projections.values(), block.o)
            for module in (*block.mlp_in.modules(), block.down):
                home[id(module)] = (block.stack, block.layer, "mlp")
            home |= {id(m): (block.stack, block.layer, "attn") for m in attention}
    for name, module in matrices(model).items():
        prefix, layer, part = home[id(module)]
        label = f"{prefix + '.' if prefix else ''}L{layer}.{'MLP' if part == 'mlp' else 'attn'}"
        kept = mask.kept[name]
        rows.append(
            {"part": label, "layer": layer, "kind": part, "matrix": name.rpartition(".")[2], "weights": kept.size,
             "kept": int(kept.sum()), "density": float(kept.mean())}
        )  # fmt: skip
    return rows
