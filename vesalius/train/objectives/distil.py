"""Distillation: learn the next token from the text and from a teacher's distribution.

    loss of a token = (1 - alpha) nll + alpha T^2 KL(teacher / T || student / T)

Hinton et al. 2015 (arXiv 1503.02531). Both parts are sums over targets, to be divided by their number, so that the
divergence weighs the same whatever the batch's shape. Several teachers: their logits are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Sample
from vesalius.train.objectives.causal import CausalLM
from vesalius.train.objectives.losses import token_loss
from vesalius.train.objectives.samples import model_inputs

Teacher = nn.Module | Callable[[Sample], Tensor] | str


@dataclass(frozen=True)
class Distil:
    """Objective `distil`: the next token, and a teacher's opinion of it.

    Attributes:
        needs: nothing beside the kind of model.
        teacher: a model, the name or folder of one, a function from the sample to logits, or a list of these.
        temperature: T.
        alpha: weight of the teacher's part, 0 to 1.
        cross_document: see `CausalLM`.
        restart_positions: see `CausalLM`.
        z_loss: see `CausalLM`.
        chunk: see `CausalLM`.
    """

    needs: Needs
    teacher: Teacher | Sequence[Teacher]
    temperature: float = 1.0
    alpha: float = 0.5
    cross_document: Literal["allow", "mask"] = "allow"
    restart_positions: bool = False
    z_loss: float = 0.0
    chunk: int = 0
    _teachers: tuple[Callable[[Sample], Tensor], ...] = field(init=False, repr=False)
    _text: CausalLM = field(init=False, repr=False)

    def __post_init__(self) -> None:
        settings.number("distil", "temperature", self.temperature, 1e-3)
        settings.number("distil", "alpha", self.alpha, 0.0, 1.0)
        text = CausalLM(self.needs, self.cross_document, self.restart_positions, self.z_loss, self.chunk)
        object.__setattr__(self, "_text", text)
        many = isinstance(self.teacher, (list, tuple))
        teachers: Any = self.teacher if many else [self.teacher]
        if not teachers:
            raise VesaliusError("distil.teacher is empty; name a model")
        object.__setattr__(self, "_teachers", tuple(_opinion(t) for t in teachers))

    def sample(self, batch: Batch, seed: int) -> Sample:
        """As `causal-lm`."""
        return self._text.sample(batch, seed)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`; logs `nll` and `divergence`, without T^2."""
        text = token_loss(outputs.logits, sample, self.z_loss, self.chunk)
        with torch.no_grad():
            opinions = [teacher(sample) for teacher in self._teachers]
            opinion = opinions[0] if len(opinions) == 1 else torch.stack(opinions).mean(0)
        if opinion.shape != outputs.logits.shape:
            raise VesaliusError(
                f"the teacher's logits are {tuple(opinion.shape)}, the student's {tuple(outputs.logits.shape)}; "
                "both must share one tokenizer and one size of vocabulary"
            )
        valid = sample.targets != IGNORED
        # (target, vocabulary)
        student = (outputs.logits[valid].float() / self.temperature).log_softmax(-1)
        teacher = (opinion[valid].float() / self.temperature).log_softmax(-1)
        each = (teacher.exp() * (teacher - student)).sum(-1)
        if sample.weights is not None:
            each = each * sample.weights[valid].to(each)
        divergence = each.sum()
        total = (1 - self.alpha) * text.total + self.alpha * self.temperature**2 * divergence
        return Loss(total, {**text.logs, "divergence": divergence.detach()})


def _opinion(teacher: Teacher) -> Callable[[Sample], Tensor]:
    """A function from the sample to the teacher's logits."""
    if isinstance(teacher, str):
        import vesalius

        teacher = vesalius.open(teacher).hf
    if not isinstance(teacher, nn.Module):
        return cast(Callable[[Sample], Tensor], teacher)
    module = teacher.eval().requires_grad_(False)

    def logits(sample: Sample) -> Tensor:
        if next(module.parameters()).device != sample.targets.device:
            module.to(sample.targets.device)
        return module(**model_inputs(sample, module)).logits

    return logits
