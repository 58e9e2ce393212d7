"""Generative-discriminative training: a class-conditional language model that also tells its classes apart.

A document begins with a code, one token: c if its text is of the class, and the anti-code otherwise. The same text is
read twice, after its own code and after the other one. With L_c the mean log-probability of the text's tokens after
code c, a learned scale a and biases b,

    P(c | x) = softmax over the two codes of (a L_c + b_c)
    loss = lam nll(x | own code) + (1 - lam) (-log P(own code | x))

both parts as means over tokens: a text's class loss weighs as much as it has tokens, so micro-batches change nothing.
With topics, a topic word of one token follows the code and is given, not foretold: `true sports ...` for a text of its
own topic, `false science ...` for the same text under a wrong one (multi-topic training by binarisation).

GeDi, Krause et al. 2020, arXiv 2009.06367 (EMNLP Findings 2021); lam 0.8 is its script's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.records import dump, write_atomic
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Sample
from vesalius.train.objectives.ragged import padding, texts
from vesalius.train.plugs import Plug

FILE = "gedi.json"  # beside the checkpoint: codes, topics, scale, biases
PAIRS = 8  # texts come in multiples of this, so that micro-batches never part a text's two readings


@dataclass(frozen=True)
class Gedi(Plug):
    """Objective `gedi`: texts under their class code, told from the same texts under the other.

    Attributes:
        needs: nothing beside the kind of model.
        codes: the two codes, for having and for lacking the class; one token each at the beginning of a text.
        topics: topic words that may follow a code; none for a single class.
        lam: weight of the language-modelling part, 0 to 1.
        scale: a at the beginning. learn_scale: rate at which a and the biases are learned (Adam); 0 holds them.
        length: longest text, code included; longer ones are cut.
        ids: of the codes; found in the tokenizer if not given.
    """

    needs: Needs
    codes: tuple[str, str] = ("true", "false")
    topics: tuple[str, ...] = ()
    lam: float = 0.8
    scale: float = 1.0
    learn_scale: float = 0.01
    length: int = 192
    ids: tuple[int, int] = (-1, -1)
    _learned: torch.nn.Parameter = field(init=False, repr=False, compare=False)
    _adam: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        settings.kinds("gedi", self.needs.kind, ("causal",))
        settings.number("gedi", "lam", self.lam, 0.0, 1.0)
        settings.number("gedi", "scale", self.scale, 0.0)
        settings.number("gedi", "learn_scale", self.learn_scale, 0.0)
        settings.whole("gedi", "length", self.length, 3)
        if len(self.codes) != 2 or len(set(self.ids)) != 2 or min(self.ids) < 0:
            raise VesaliusError(f"gedi.codes {self.codes} have the ids {self.ids}; give two codes of one token each")
        object.__setattr__(self, "_learned", torch.nn.Parameter(torch.tensor([self.scale, 0.0, 0.0])))
        object.__setattr__(self, "_adam", torch.optim.Adam([self._learned], lr=self.learn_scale or 1.0))

    @property
    def given(self) -> int:
        """Tokens of a text that are given and not foretold: the code, and a topic."""
        return 1 + bool(self.topics)

    # -- the objective

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Every text that begins with a code in its row, twice: rows 2i under its own code, 2i + 1 under the other."""
        found = texts(batch, by_document=True)
        pieces = [found.ids[s : s + n] for s, n in zip(found.starts, found.lengths, strict=True)]
        own = [p[: self.length] for p in pieces if len(p) > self.given and int(p[0]) in self.ids]
        if not own:
            raise VesaliusError(
                f"no text of step {batch.step} begins with a code ({', '.join(self.codes)}) and goes on in its row; "
                "put a code before every text, and make data.length longer than the texts"
            )
        rows = -(-len(own) // PAIRS) * PAIRS
        width = max(map(len, own))
        ids = np.full((rows, 2, width), padding(self.needs))
        targets = np.full((rows, 2, width - 1), IGNORED)
        for i, text in enumerate(own):
            ids[i, :, : len(text)] = text
            ids[i, 1, 0] = self.ids[1 - self.ids.index(int(text[0]))]
            targets[i, :, self.given - 1 : len(text) - 1] = text[self.given :]
        weights = np.zeros(targets.shape, dtype=np.float32)
        weights[:, 0] = 1.0
        flat = (rows * 2, -1)
        return Sample(
            {"input_ids": torch.from_numpy(ids[..., :-1].reshape(flat))},
            torch.from_numpy(targets.reshape(flat)),
            torch.from_numpy(weights.reshape(flat)),
        )

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`; logs `nll`, `class_loss` and `class_accuracy`."""
        means, counts = mean_log_probs(outputs.logits, sample.targets)  # (text reading)
        pair, n = means.view(-1, 2), counts.view(-1, 2)[:, 0]  # (text, reading)
        code = (sample.inputs["input_ids"][:, 0] == self.ids[1]).long().view(-1, 2)
        learned = self._learned.to(pair.device)
        logits = learned[0] * pair + learned[1:][code]
        apart = torch.nn.functional.cross_entropy(logits, torch.zeros_like(code[:, 0]), reduction="none") @ n
        nll = -(pair[:, 0] @ n)
        right = (logits[:, 0] > logits[:, 1]).to(n) @ n
        logs = {"nll": nll.detach(), "class_loss": apart.detach(), "class_accuracy": right}
        return Loss(self.lam * nll + (1 - self.lam) * apart, logs)

    # -- the scale and the biases, which are no weights of the model

    def begin(self, step: int) -> None:
        """Forgets gradients."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise VesaliusError("objective gedi learns its scale in one process; start without torchrun")
        self._learned.grad = None

    def end(self, step: int) -> None:
        """One step of Adam."""
        if self.learn_scale and self._learned.grad is not None:
            self._adam.step()
            with torch.no_grad():
                self._learned[0].clamp_(min=0.0)
                self._learned[1:] -= self._learned[1:].mean()

    def tensors(self) -> dict[str, Tensor]:
        """The scale, the biases, and what Adam remembers of them."""
        state = self._adam.state.get(self._learned, {})
        return {"learned": self._learned.detach().clone(), **{f"adam_{k}": v.clone() for k, v in state.items()}}

    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Takes up what `tensors` gave."""
        if "learned" in tensors:
            with torch.no_grad():
                self._learned.copy_(tensors["learned"])
            state = {k.removeprefix("adam_"): v.clone() for k, v in tensors.items() if k.startswith("adam_")}
            if state:
                self._adam.state[self._learned] = state

    def written(self, folder: Path) -> None:
        """Puts what a guide needs beside the weights."""
        scale, *biases = self._learned.detach().tolist()
        told = {"codes": list(self.codes), "ids": list(self.ids), "topics": list(self.topics), "scale": scale,
                "biases": biases}  # fmt: skip
        write_atomic(folder / FILE, dump(told))


def mean_log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each row's targets, (row,), and how many there are; 0 of a row without any."""
    valid = targets != IGNORED
    each = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    counts = valid.sum(-1)
    return (each * valid).sum(-1) / counts.clamp_min(1), counts.to(each)
