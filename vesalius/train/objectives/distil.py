"""Distillation: learn from the text, from a teacher's distribution, and from the direction of its last hidden states.

    loss of a target = hard * nll + soft * T^2 KL(teacher / T || student / T) + cosine * (1 - cos(h_student, h_teacher))

The first two terms are Hinton et al. 2015 (arXiv 1503.02531); the third, and the weights 5, 2 and 1 with T = 2, are
DistilBERT's (Sanh et al. 2019, arXiv 1910.01108). What is foretold is the next token for a causal model, hidden words
for a masked one; nll and the divergence are over these targets, and, with `everywhere`, the divergence is over every
token read, as DistilBERT's is. Hidden states are compared at every token read; of a causal model that means every token
that has a target.

All parts are sums over targets, to be divided by their number, so that none weighs more in another shape of batch: a
mean over the tokens a row reads counts as often as the row has targets. Several teachers: their logits are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Objective, Sample
from vesalius.train.objectives.samples import MaskedSample, model_inputs


class Opinion(NamedTuple):
    """What a teacher says: logits (row, pos, vocabulary), and its last hidden states (row, pos, d) if known."""

    logits: Tensor
    hidden: Tensor | None = None


Teacher = nn.Module | Callable[[Sample], Tensor] | str
BY_KIND = {"causal": "causal-lm", "masked": "masked-lm"}  # what is foretold beside the teacher's opinion


@dataclass(frozen=True)
class Distil:
    """Objective `distil`: the text, and a teacher's opinion of it.

    Attributes:
        needs: what the objective of the text needs.
        teacher: a model, the name or folder of one, a function from the sample to logits, or a list of these.
        text: the objective of the text; from a recipe, settings of `causal-lm` or `masked-lm`.
        temperature: T.
        soft: weight of the teacher's distribution.
        hard: weight of the text.
        cosine: weight of the hidden states' direction; needs one teacher, a model as wide as the student.
        everywhere: compare distributions at every token read, and not at targets alone; the same for causal models.
    """

    needs: Needs
    teacher: Teacher | Sequence[Teacher]
    text: Objective
    temperature: float = 2.0
    soft: float = 5.0
    hard: float = 2.0
    cosine: float = 1.0
    everywhere: bool = True
    asks: Mapping[str, Any] = field(init=False, repr=False)  # what the trainer adds to every forward pass
    _teachers: tuple[Callable[[Sample], Opinion], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        settings.number("distil", "temperature", self.temperature, 1e-3)
        for name in ("soft", "hard", "cosine"):
            settings.number("distil", name, getattr(self, name), 0.0)
        settings.flag("distil", "everywhere", self.everywhere)
        if not self.soft + self.hard + self.cosine:
            raise VesaliusError("distil.soft, hard and cosine are all 0, so nothing would be learnt; raise one")
        many = isinstance(self.teacher, (list, tuple))
        teachers: Any = self.teacher if many else [self.teacher]
        if not teachers:
            raise VesaliusError("distil.teacher is empty; name a model")
        if self.cosine and (len(teachers) > 1 or not isinstance(teachers[0], (str, nn.Module))):
            raise VesaliusError("distil.cosine compares hidden states with those of one model; give one, or cosine: 0")
        object.__setattr__(self, "asks", {"output_hidden_states": True} if self.cosine else {})
        object.__setattr__(self, "_teachers", tuple(_opinion(t, bool(self.cosine)) for t in teachers))

    def sample(self, batch: Batch, seed: int) -> Sample:
        """As the objective of the text."""
        return self.text.sample(batch, seed)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`; logs what the text's objective does, `divergence` (without T^2), `cosine` (1 - cos)."""
        text = self.text.loss(outputs, sample)
        total, logs = self.hard * text.total, dict(text.logs)
        with torch.no_grad():
            found = [teacher(sample) for teacher in self._teachers]
        logits = found[0].logits if len(found) == 1 else torch.stack([f.logits for f in found]).mean(0)
        _same("logits", logits, outputs.logits, "both must share one tokenizer and one size of vocabulary")
        targets = sample.targets != IGNORED
        weight = targets.float() if sample.weights is None else sample.weights * targets
        spread = weight if self.needs.kind == "causal" else _spread(weight, _read(sample))
        if self.soft:
            share = spread if self.everywhere else weight
            at = share > 0
            each = divergence(outputs.logits[at], logits[at], self.temperature)
            logs["divergence"] = (each * share[at].to(each)).sum()
            total = total + self.soft * self.temperature**2 * logs["divergence"]
        if self.cosine:
            hidden, theirs = outputs.hidden_states[-1], found[0].hidden
            assert theirs is not None
            _same("hidden states", theirs, hidden, "give a student of that width, or cosine: 0")
            at = spread > 0
            each = 1 - torch.cosine_similarity(hidden[at].float(), theirs[at].float(), dim=-1)
            logs["cosine"] = (each * spread[at].to(each)).sum()
            total = total + self.cosine * logs["cosine"]
        return Loss(total, {name: value.detach() for name, value in logs.items()})


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher / T || student / T) of each row of logits, (..., vocabulary) -> (...), without the factor T^2."""
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _spread(weight: Tensor, read: Tensor) -> Tensor:
    """Each row's weights, (row, pos), spread evenly over the tokens it reads."""
    return weight.sum(1, keepdim=True) * read / read.sum(1, keepdim=True).clamp_min(1)


def _read(sample: Sample) -> Tensor:
    """(row, pos) bool, which tokens are text and not padding."""
    if isinstance(sample, MaskedSample):
        return sample.mask.query >= 0
    mask = sample.inputs.get("attention_mask")
    return torch.ones_like(sample.targets, dtype=torch.bool) if mask is None else mask.bool()


def _same(what: str, teacher: Tensor, student: Tensor, remedy: str) -> None:
    if teacher.shape != student.shape:
        raise VesaliusError(
            f"the teacher's {what} are {tuple(teacher.shape)}, the student's {tuple(student.shape)}; {remedy}"
        )


def _opinion(teacher: Teacher, with_hidden: bool) -> Callable[[Sample], Opinion]:
    """A function from the sample to what the teacher says."""
    if isinstance(teacher, str):
        import vesalius

        teacher = vesalius.open(teacher).hf
    if not isinstance(teacher, nn.Module):
        told = cast(Callable[[Sample], Tensor], teacher)
        return lambda sample: Opinion(told(sample))
    module = teacher.eval().requires_grad_(False)
    more = {"output_hidden_states": True} if with_hidden else {}

    def opinion(sample: Sample) -> Opinion:
        if next(module.parameters()).device != sample.targets.device:
            module.to(sample.targets.device)
        found = module(**model_inputs(sample, module), **more)
        return Opinion(found.logits, found.hidden_states[-1] if with_hidden else None)

    return opinion
